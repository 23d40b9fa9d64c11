"""Initialisation of trainables from another model's weights; every tensor not loaded is reported or refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from qformer.bridges.protocol import WeightStart
from qformer.bridges.stage_model import StageModel
from qformer.config import LanguageSpec
from qformer.conversion.checkpoint import BridgeInfo, read_info, read_weights
from qformer.conversion.report import LoadReport
from qformer.errors import UserError
from qformer.objectives.stage1 import Stage1
from qformer.objectives.stage2 import Stage2

TEXT_BRANCH = (".text_ffn.", "word_embeddings.", "position_embeddings.")
_STAGE1_ONLY = (
    "lm_dense.",
    "lm_norm.",
    "lm_bias",
    "vision_projection.",
    "text_projection.",
    "itm_head.",
    "temperature",
)
_HEADS = (
    "vision_projection.",
    "text_projection.",
    "itm_head.",
    "temperature",
    "language_projection.",
    "audio.",
    "lora.",
)
"""Beginnings of the names that belong to a stage and not to its bridge."""
_LANGUAGE_SIDE = ("language_projection.", "lora.")


def load_matching(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    source: str,
    new: Sequence[str] = (),
    dropped: Sequence[str] = (),
    allow_mismatch: bool = False,
) -> LoadReport:
    """Load the tensors whose name and shape match, and refuse any other difference.

    Args:
        module: Module that receives the weights.
        weights: Tensors by the module's names.
        source: Name of their origin, for messages.
        new: Parts of names that only the module may have.
        dropped: Parts of names that only the source may have.
        allow_mismatch: Whether mismatched tensors are initialised or skipped instead of refused.

    Raises:
        UserError: If there is another difference; the message names the first of each kind.
    """
    own = module.state_dict()
    resized = sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
    absent = sorted(own.keys() - weights.keys())
    missing = [name for name in absent if not _has_part(name, new)]
    unexpected = sorted(weights.keys() - own.keys())
    unknown = [name for name in unexpected if not _has_part(name, dropped)]
    if not allow_mismatch and (resized or missing or unknown):
        problems = [f"{n} is {tuple(weights[n].shape)} there but {tuple(own[n].shape)} here" for n in resized[:1]]
        problems += [f"{len(missing)} tensors are missing there, first {n}" for n in missing[:1]]
        problems += [f"{len(unknown)} tensors have no place here, first {n}" for n in unknown[:1]]
        raise UserError(
            f"initialising from {source}: {'; '.join(problems)}; make model.qformer, model.vision and model.tokenizer "
            "equal to the source's, or set model.init_mismatch=reinitialise"
        )
    loaded = sorted((own.keys() & weights.keys()) - set(resized))
    module.load_state_dict({name: weights[name] for name in loaded}, strict=False)
    return LoadReport(
        source=source,
        loaded=loaded,
        reinitialised=[name for name in absent if _has_part(name, new)],
        missing=sorted(missing + resized),
        left_out=[name for name in unexpected if _has_part(name, dropped)],
        unexpected=unknown,
    )


def require_stage1(folder: Path) -> None:
    """Refuse a checkpoint of another stage than 1.

    Raises:
        UserError: If the folder is no checkpoint, or one of stage 2.
    """
    if (stage := read_info(folder).stage) != 1:
        raise UserError(
            f"init_from: {str(folder)!r} is a stage-{stage} checkpoint, which has no heads to contrast and match with; "
            "give stage 1 a stage-1 run, or set stage=2"
        )


def start_stage1(trainables: Stage1, folder: Path, *, allow_mismatch: bool = False) -> LoadReport:
    """Start stage 1 from a checkpoint of stage 1, temperature included, for fine-tuning on one corpus.

    Args:
        trainables: Module that receives the weights; its tokenizer must be the checkpoint's.
        folder: Folder of the checkpoint.
        allow_mismatch: Whether mismatched tensors are initialised or skipped instead of refused.

    Raises:
        UserError: If the checkpoint is of another stage, or a tensor has another shape.
    """
    require_stage1(folder)
    source = repr(str(folder))
    start = _bridge_start(trainables, read_weights(folder), read_info(folder), source=source)
    return load_matching(trainables, **start._asdict(), source=source, allow_mismatch=allow_mismatch)


def start_stage2(
    trainables: Stage2, folder: Path, *, language: LanguageSpec | None, allow_mismatch: bool = False
) -> LoadReport:
    """Start stage 2 from a checkpoint of stage 1 or 2.

    The projection (and LoRA) belongs to one language model: it is loaded for the same one, and initialised for another,
    as in MiniGPT-4. A text branch that the checkpoint lacks keeps its initial values.

    Args:
        trainables: Module that receives the weights.
        folder: Folder of the checkpoint.
        language: Language model of this run.
        allow_mismatch: Whether mismatched tensors are initialised or skipped instead of refused.

    Raises:
        UserError: If the folder is no checkpoint, or a shared tensor has another shape.
    """
    info, weights = read_info(folder), read_weights(folder)
    is_same_language = info.stage == 2 and info.language == language
    if not is_same_language:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(_LANGUAGE_SIDE)}
    reads_text, source = trainables.bridge.reads_text, repr(str(folder))
    new = ["lora."] if is_same_language else list(_LANGUAGE_SIDE)
    new += [] if info.qformer.has_text_branch else TEXT_BRANCH
    new += [] if info.audio_branch == trainables.audio_config else ["audio."]
    dropped = [*(_STAGE1_ONLY if info.stage == 1 else ()), *(() if reads_text else TEXT_BRANCH)]
    start = _bridge_start(trainables, weights, info, source=source)
    return load_matching(
        trainables,
        start.weights,
        source=source,
        new=[*new, *start.new],
        dropped=[*dropped, *start.dropped],
        allow_mismatch=allow_mismatch,
    )


def _has_part(name: str, parts: Sequence[str]) -> bool:
    return any(part in f".{name}" if part.startswith(".") else part in name for part in parts)


def _bridge_start(module: StageModel, weights: Mapping[str, Tensor], info: BridgeInfo, *, source: str) -> WeightStart:
    """Rename a checkpoint's weights.

    Args:
        module: Model to start.
        weights: Weights of the checkpoint.
        info: Description of the checkpoint.
        source: Name of the checkpoint in messages.

    Raises:
        UserError: If its bridge cannot start the module's.
    """
    heads = {name: tensor for name, tensor in weights.items() if name.startswith(_HEADS)}
    own = {name: tensor for name, tensor in weights.items() if name not in heads}
    start = module.bridge.start_from(own, info.bridge)
    if start is None:
        theirs, ours = info.bridge.kind_name, module.bridge.config.kind_name
        raise UserError(
            f"init_from: {source} has a bridge of kind={theirs!r}, which does not start kind={ours!r}; set "
            f"model.bridge.kind={theirs}, or start from a run that keeps frames apart (concatenate or mean)"
        )
    return start._replace(weights=start.weights | heads)
