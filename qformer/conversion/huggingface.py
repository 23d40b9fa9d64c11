"""Hugging Face BLIP-2 and InstructBLIP folders into ours and back.

A folder holds everything: vision tower, bridge, language model, processor. In: the bridge becomes our checkpoint, the
frozen models become ordinary local folders inside it. Out: a folder that stock transformers loads. What that layout
has no place for (temperature, ITG head; prompt, frames, the vision norm's eps) goes into a side file beside the model,
which transformers does not read.

Sources: transformers `modeling_blip_2.py`, `modeling_instructblip.py`, `processing_blip_2.py`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from qformer.backbones import VisionEncoder, import_torchvision, load_vision
from qformer.bridge import BESIDE, TOKENIZER_FOLDER, BridgeInfo, read_info, read_weights
from qformer.config import QFormerConfig
from qformer.conversion.bundle import (
    Bundle,
    ConversionReport,
    ImportOptions,
    complete,
    own_state,
    read_tensors,
    reason_of,
)
from qformer.conversion.frozen import image_processor_for, preprocessing_of, read_language, write_language, write_model
from qformer.conversion.names import HF_CAPTION, HF_INSTRUCT, HF_RETRIEVAL, Table, from_peer, to_peer
from qformer.conversion.vision import export_tower, import_tower, norm_eps_effect
from qformer.errors import UserError
from qformer.text import DEC_TOKEN, TextTokenizer, load_text_tokenizer

SIDE_FILE = "qformer.safetensors"
"""Tensors without a place under our names; bridge.json as metadata."""
_SIDE_KEY = "bridge.json"
_VISION_FOLDER, _LANGUAGE_FOLDER = "vision", "language"
_IMAGE_TOKEN = "<image>"
_LORA = "lora."
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # saved by older versions, computed since


@dataclass(frozen=True, slots=True)
class _Layout:
    """One of Hugging Face's model classes and the bridge of ours it holds."""

    architecture: str
    processor: str
    stage: int
    has_text_branch: bool
    table: Table
    into_side_file: tuple[str, ...] = ()
    """Beginnings of our names that the layout has no place for."""

    @property
    def has_language_model(self) -> bool:
        return self.stage == 2


LAYOUTS = (
    _Layout("Blip2ForImageTextRetrieval", "Blip2Processor", 1, True, HF_RETRIEVAL, ("temperature", "qformer.lm_")),
    _Layout("Blip2ForConditionalGeneration", "Blip2Processor", 2, False, HF_CAPTION),
    _Layout("InstructBlipForConditionalGeneration", "InstructBlipProcessor", 2, True, HF_INSTRUCT),
)


def import_huggingface(source: Path, output: Path, options: ImportOptions) -> Bundle:
    """Read a folder; its frozen models are written below `output`, which will be the checkpoint.

    Raises:
        UserError: If the folder is none of the three models, or its parts mismatch in a way `options` do not allow.
    """
    config, layout, processor = _open(source)
    side_info, side_tensors = _read_side(source)
    qformer = _our_config(config, layout)
    preprocessing = preprocessing_of(processor.image_processor)
    if side_info is not None:
        qformer = dataclasses.replace(qformer, vision_norm_eps=side_info.qformer.vision_norm_eps)
        preprocessing = side_info.preprocessing
    language_width = config.text_config.hidden_size
    own = own_state(layout.stage, qformer, language_width)
    found, rest = from_peer(read_tensors(source), own, layout.table)
    found |= {name: tensor for name, tensor in side_tensors.items() if name in own}
    left_out = [name for name in rest if name.endswith(_BUFFERS)]
    parts = _split(rest, left_out)
    rest_of_tower = import_tower(config.vision_config, parts["vision_model"], preprocessing, output / _VISION_FOLDER)
    unexpected = [*parts[""], *(side_tensors.keys() - own.keys()), *(f"vision_model.{name}" for name in rest_of_tower)]
    if not layout.has_language_model:
        unexpected += [f"language_model.{name}" for name in parts["language_model"]]
    weights, report = complete(
        source, found, left_out, unexpected, options, stage=layout.stage, config=qformer, language_width=language_width
    )
    if layout.has_language_model:
        write_language(config, parts["language_model"], processor.tokenizer, output / _LANGUAGE_FOLDER)
    base = side_info or BridgeInfo(
        stage=layout.stage,
        step=0,
        vision="",
        vision_pretrained=True,
        vision_layer=-1,
        language=None,
        qformer=qformer,
        preprocessing=preprocessing,
        num_frames=options.num_frames,
        max_text_tokens=options.max_text_tokens,
        prompt=options.prompt,
    )
    info = dataclasses.replace(
        base,
        vision_image_size=None,  # the tower that lies in the folder has its size already
        vision=BESIDE + _VISION_FOLDER,
        vision_pretrained=True,
        vision_layer=-1,  # Hugging Face's tower ends with the block to read
        language=BESIDE + _LANGUAGE_FOLDER if layout.has_language_model else None,
        qformer=qformer,
        preprocessing=preprocessing,
    )
    return Bundle(info, weights, _text_tokenizer(processor, layout, info), report)


def export_huggingface(checkpoint: Path, output: Path) -> ConversionReport:
    """Write a checkpoint of ours as a folder for stock transformers, processor included.

    Raises:
        UserError: If the encoder does not fit Hugging Face's ViT, or a backbone cannot be loaded.
    """
    import_torchvision()
    import transformers

    info = read_info(checkpoint)
    layout = next(
        layout
        for layout in LAYOUTS
        if (layout.stage, layout.has_text_branch) == (info.stage, info.qformer.has_text_branch)
    )
    weights = read_weights(checkpoint)
    updates = {name: weights.pop(name) for name in [name for name in weights if name.startswith(_LORA)]}
    placed, without_place = to_peer(weights, layout.table)
    for name in sorted(without_place):
        if not name.startswith(layout.into_side_file):
            raise UserError(f"checkpoint: {name!r} has no place in {layout.architecture}; export a bridge without it")
    encoder = load_vision(
        info.vision,
        pretrained=info.vision_pretrained,
        layer=info.vision_layer,
        image_size=info.vision_image_size,
    )
    vision_config, tower = export_tower(encoder, info.vision)
    placed |= {f"vision_model.{name}": tensor for name, tensor in tower.items()}
    processor = _processor(checkpoint, info, layout)
    image_id = processor.tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
    text_config: dict[str, Any] = {}
    if layout.has_language_model:
        bare = {name.removeprefix(_LORA): tensor for name, tensor in updates.items()}
        language, text_config = read_language(cast(str, info.language), image_id, processor.tokenizer, info.lora, bare)
        placed |= {f"language_model.{name}": tensor for name, tensor in language.items()}
    settings: dict[str, Any] = {
        "vision_config": vision_config,
        "qformer_config": _peer_config(info.qformer, layout),
        "num_query_tokens": info.qformer.num_queries,
        # Without an index the retrieval model takes text as it is; with one it cuts off the placeholders first.
        "image_token_index": image_id if layout.has_language_model else None,
    }
    if text_config:
        settings["text_config"] = text_config
    if layout.stage == 1:
        settings["image_text_hidden_size"] = info.qformer.embed_dim
    model_class = getattr(transformers, layout.architecture)
    write_model(model_class, model_class.config_class(**settings), placed, output)
    processor.save_pretrained(output)
    # Merged updates are no longer beside the language model: a re-import must not attach them again.
    _write_side(output, dataclasses.replace(info, lora=None), without_place)
    notes = [f"into the side file {SIDE_FILE}: {len(without_place)} tensors that the layout has no place for"]
    if updates:
        notes.append(f"merged into the language model: LoRA, {len(updates)} tensors")
    eps = vision_config["layer_norm_eps"]
    if eps != info.qformer.vision_norm_eps:
        notes.append(_eps_note(encoder, info.qformer, weights, eps))
    return ConversionReport(sorted(weights.keys() - without_place.keys()), [], [], [], notes)


def _open(source: Path) -> tuple[Any, _Layout, Any]:
    """Config, layout and processor of a folder."""
    import_torchvision()
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
        architecture = (config.architectures or ["none"])[0]
    except Exception as error:
        raise UserError(f"source: {str(source)!r} is no Hugging Face folder ({reason_of(error)})") from error
    layout = next((layout for layout in LAYOUTS if layout.architecture == architecture), None)
    if layout is None:
        known = ", ".join(layout.architecture for layout in LAYOUTS)
        raise UserError(f"source: {str(source)!r} holds {architecture}; we import {known}")
    try:
        processor = getattr(transformers, layout.processor).from_pretrained(source)
    except Exception as error:
        raise UserError(
            f"source: {str(source)!r} has no {layout.processor} files ({reason_of(error)}); "
            "save the model's processor into the folder"
        ) from error
    return config, layout, processor


def _our_config(config: Any, layout: _Layout) -> QFormerConfig:
    """Translate the shapes.

    Raises:
        UserError: If the Q-Former's activation is not the exact GELU.
    """
    theirs = config.qformer_config
    if theirs.hidden_act != "gelu":
        raise UserError(f"source: qformer_config.hidden_act={theirs.hidden_act!r}; our Q-Former has the exact 'gelu'")
    return QFormerConfig(
        encoder_width=theirs.encoder_hidden_size,
        hidden_size=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        intermediate_size=theirs.intermediate_size,
        num_queries=config.num_query_tokens,
        cross_attention_frequency=theirs.cross_attention_frequency,
        vocab_size=theirs.vocab_size if layout.has_text_branch else 0,
        max_positions=theirs.max_position_embeddings,
        has_lm_head=layout.stage == 1,
        embed_dim=getattr(config, "image_text_hidden_size", 256),
        dropout=theirs.hidden_dropout_prob,
        layer_norm_eps=theirs.layer_norm_eps,
        vision_norm_eps=config.vision_config.layer_norm_eps,
    )


def _peer_config(config: QFormerConfig, layout: _Layout) -> dict[str, Any]:
    """Inverse of `_our_config`, for the Q-Former's part."""
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


def _split(weights: Mapping[str, Tensor], left_out: list[str]) -> dict[str, dict[str, Tensor]]:
    """Sort tensors by frozen model, prefix removed; what belongs to none stays under ""."""
    parts: dict[str, dict[str, Tensor]] = {"vision_model": {}, "language_model": {}, "": {}}
    for name, tensor in weights.items():
        root, _, inner = name.partition(".")
        if name in left_out:
            continue
        if root in parts:
            parts[root][inner] = tensor
        else:
            parts[""][name] = tensor
    return parts


def _processor(checkpoint: Path, info: BridgeInfo, layout: _Layout) -> Any:
    """The stock processor around our contract and tokenizers."""
    import transformers

    bert = None
    if layout.has_text_branch:
        bert = load_text_tokenizer(str(checkpoint / TOKENIZER_FOLDER), info.max_text_tokens).tokenizer
        if bert.convert_tokens_to_ids(DEC_TOKEN) in (None, bert.unk_token_id):
            # [DEC] takes the id it has in the embeddings, before the processor adds its own token.
            bert.add_special_tokens({"bos_token": DEC_TOKEN})
    tokenizer = transformers.AutoTokenizer.from_pretrained(info.language) if layout.has_language_model else bert
    parts = {"qformer_tokenizer": bert} if layout.has_language_model and layout.has_text_branch else {}
    num_query_tokens = info.qformer.num_queries if layout.has_language_model else None
    return getattr(transformers, layout.processor)(
        image_processor_for(info.preprocessing), tokenizer, **parts, num_query_tokens=num_query_tokens
    )


def _text_tokenizer(processor: Any, layout: _Layout, info: BridgeInfo) -> TextTokenizer | None:
    """The Q-Former's own tokenizer, where it reads text."""
    if not layout.has_text_branch:
        return None
    tokenizer = processor.tokenizer if layout.stage == 1 else processor.qformer_tokenizer
    return TextTokenizer(tokenizer, info.max_text_tokens)


def _read_side(source: Path) -> tuple[BridgeInfo | None, dict[str, Tensor]]:
    """Content of the side file; nothing where the folder was not written by us."""
    from safetensors import safe_open

    file = source / SIDE_FILE
    if not file.is_file():
        return None, {}
    with safe_open(file, framework="pt") as side:
        return BridgeInfo.from_json(side.metadata()[_SIDE_KEY]), read_tensors(file)


def _write_side(folder: Path, info: BridgeInfo, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / SIDE_FILE, metadata={_SIDE_KEY: info.to_json()})


def _eps_note(encoder: VisionEncoder, config: QFormerConfig, weights: Mapping[str, Tensor], eps: float) -> str:
    norm = nn.LayerNorm(config.encoder_width, eps=config.vision_norm_eps)
    norm.load_state_dict({k: weights[f"vision_norm.{k}"] for k in ("weight", "bias")})
    effect = norm_eps_effect(encoder, norm.requires_grad_(False), eps)
    return (
        f"vision norm: eps {config.vision_norm_eps:g} here, {eps:g} in the folder (one value for all norms there); "
        f"on a picture of noise its output moves by {effect:.1e} of its largest value"
    )
