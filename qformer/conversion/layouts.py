"""Hugging Face layouts of BLIP-2's family: model class, config, side file.

Values without a place in the layout (temperature, ITG head; prompt, frames, the vision norm's eps) go into a side file,
which transformers does not read.

Sources: transformers `configuration_blip_2.py`, `modeling_blip_2.py`, `modeling_instructblip.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qformer.config import QFormerConfig
from qformer.conversion.checkpoint import BridgeInfo, read_weights
from qformer.conversion.names import HF_CAPTION, HF_INSTRUCT, HF_RETRIEVAL, NameTable
from qformer.errors import UserError

SIDE_FILE = "qformer.safetensors"
"""Tensors without a place in the layout, under this package's names; bridge.json as metadata."""
_SIDE_KEY = "bridge.json"


@dataclass(frozen=True, slots=True)
class Layout:
    """One of Hugging Face's model classes, and stage and parts of the bridge it holds."""

    architecture: str
    processor: str
    stage: int
    has_text_branch: bool
    table: NameTable
    side_file_prefixes: tuple[str, ...] = ()
    """Prefixes of names (this package's) that go into the side file."""

    @property
    def has_language_model(self) -> bool:
        """Whether the folder holds a frozen language model."""
        return self.stage == 2


LAYOUTS = (
    Layout("Blip2ForImageTextRetrieval", "Blip2Processor", 1, True, HF_RETRIEVAL, ("temperature", "qformer.lm_")),
    Layout("Blip2ForConditionalGeneration", "Blip2Processor", 2, False, HF_CAPTION),
    Layout("InstructBlipForConditionalGeneration", "InstructBlipProcessor", 2, True, HF_INSTRUCT),
)


def qformer_config_of(config: Any, layout: Layout) -> QFormerConfig:
    """Translate a Hugging Face config.

    Raises:
        UserError: If the Q-Former's activation is not the exact GELU, or its sizes are inconsistent.
    """
    source = config.qformer_config
    if source.hidden_act != "gelu":
        raise UserError(f"source: qformer_config.hidden_act={source.hidden_act!r}; our Q-Former has the exact 'gelu'")
    try:
        return QFormerConfig(
            encoder_width=source.encoder_hidden_size,
            hidden_size=source.hidden_size,
            num_layers=source.num_hidden_layers,
            num_heads=source.num_attention_heads,
            intermediate_size=source.intermediate_size,
            num_queries=config.num_query_tokens,
            cross_attention_frequency=source.cross_attention_frequency,
            vocab_size=source.vocab_size if layout.has_text_branch else 0,
            max_positions=source.max_position_embeddings,
            has_lm_head=layout.stage == 1,
            embed_dim=getattr(config, "image_text_hidden_size", 256),
            dropout=source.hidden_dropout_prob,
            layer_norm_eps=source.layer_norm_eps,
            vision_norm_eps=config.vision_config.layer_norm_eps,
        )
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"source: qformer_config of its config.json is no Q-Former's ({error}); mend it") from error


def hf_qformer_config(config: QFormerConfig, layout: Layout) -> dict[str, Any]:
    """Fields of Hugging Face's `qformer_config`; inverse of `qformer_config_of`."""
    values: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "cross_attention_frequency": config.cross_attention_frequency,
        "encoder_hidden_size": config.encoder_width,
        "max_position_embeddings": config.max_positions,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "layer_norm_eps": config.layer_norm_eps,
    }
    if layout.has_text_branch:
        values["vocab_size"] = config.vocab_size
    if layout.stage == 1:
        values["use_qformer_text_input"] = True
    return values


def read_side(source: Path) -> tuple[BridgeInfo | None, dict[str, Tensor]]:
    """Content of the side file; (None, {}) if there is none.

    Raises:
        UserError: If a file of that name is damaged, or not from `qformer export`.
    """
    from safetensors import safe_open

    file = source / SIDE_FILE
    if not file.is_file():
        return None, {}
    tensors = read_weights(source, SIDE_FILE)
    with safe_open(file, framework="pt") as side:
        content = (side.metadata() or {}).get(_SIDE_KEY)
    if content is None:
        raise UserError(
            f"source: {str(file)!r} is not what `qformer export` writes under this name (no {_SIDE_KEY} in its "
            "metadata); move it out of the folder"
        )
    return BridgeInfo.from_json(content, str(file)), tensors


def write_side(folder: Path, info: BridgeInfo, tensors: Mapping[str, Tensor]) -> None:
    """Write the side file; inverse of `read_side`."""
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / SIDE_FILE, metadata={_SIDE_KEY: info.to_json()})
