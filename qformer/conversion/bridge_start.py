"""A checkpoint's bridge becomes the beginning of another one, where that bridge says that it can be."""

from collections.abc import Mapping

from torch import Tensor

from qformer.bridges.protocol import WeightStart
from qformer.bridges.stage_model import StageModel
from qformer.conversion.checkpoint import BridgeInfo
from qformer.errors import UserError

HEADS = (
    "vision_projection.",
    "text_projection.",
    "itm_head.",
    "temperature",
    "language_projection.",
    "audio.",
    "lora.",
)
"""Beginnings of the names that belong to a stage and not to its bridge."""


def bridge_start(module: StageModel, weights: Mapping[str, Tensor], info: BridgeInfo, *, source: str) -> WeightStart:
    """Rename a checkpoint's weights.

    Args:
        module: Model to start.
        weights: Weights of the checkpoint.
        info: Description of the checkpoint.
        source: Name of the checkpoint in messages.

    Raises:
        UserError: If its bridge cannot start the module's.
    """
    heads = {name: tensor for name, tensor in weights.items() if name.startswith(HEADS)}
    own = {name: tensor for name, tensor in weights.items() if name not in heads}
    start = module.bridge.start_from(own, info.bridge)
    if start is None:
        theirs, ours = info.bridge.kind, module.bridge.config.kind
        raise UserError(
            f"init_from: {source} has a bridge of kind={theirs!r}, which does not start kind={ours!r}; set "
            f"model.bridge.kind={theirs}, or start from another run"
        )
    return start._replace(weights=start.weights | heads)
