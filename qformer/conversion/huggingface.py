"""Import and export of Hugging Face BLIP-2 and InstructBLIP folders.

A folder holds vision tower, bridge, language model and processor. An import makes a checkpoint of the bridge, with the
frozen models as local folders inside it. An export makes a folder that stock transformers loads, with a side file for
values without a place in the layout (see `layouts`).

The two sides preprocess pictures with different code: the stock processor there, `pipelines.data` here. For a resize to
the square (BLIP-2's own), transformers' Pillow backend gives equal pixels; torchvision, its default, rounds differently
(mean 0.2 of 255 levels at worst over 60 photographs, 9 at single pixels of enlarged ones). JPEGs over four times the
encoder's size are decoded at half size here (mean 0.3, at most 9, at 224 px), and the stock centre crop is up to one
pixel off. Tests bound all three.

Sources: transformers `modeling_blip_2.py`, `modeling_instructblip.py`, `processing_blip_2.py`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from qformer.backbones import VisionEncoder, load_vision
from qformer.config import LanguageSpec, QFormerConfig, VisionSpec
from qformer.conversion.bundle import Bundle, ImportOptions, ImportTarget, first_line, read_tensors
from qformer.conversion.checkpoint import IN_CHECKPOINT, TOKENIZER_FOLDER, BridgeInfo, read_info, read_weights
from qformer.conversion.frozen import (
    image_processor_for,
    preprocessing_of,
    read_language,
    read_language_tokenizer,
    write_language,
    write_model,
)
from qformer.conversion.layouts import (
    LAYOUTS,
    SIDE_FILE,
    Layout,
    hf_qformer_config,
    qformer_config_of,
    read_side,
    write_side,
)
from qformer.conversion.names import from_layout, to_layout
from qformer.conversion.report import LoadReport
from qformer.conversion.vision import export_tower, import_tower, norm_eps_effect
from qformer.errors import UserError
from qformer.text import DEC_TOKEN, TextTokenizer, load_text_tokenizer
from qformer.torch_build.torchvision import import_torchvision

_VISION_FOLDER, _LANGUAGE_FOLDER = "vision", "language"
_IMAGE_TOKEN = "<image>"
_LORA = "lora."
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # saved by older versions of transformers only


def import_huggingface(source: Path, output: Path, options: ImportOptions) -> Bundle:
    """Import a folder.

    Args:
        source: Hugging Face folder.
        output: Folder of the future checkpoint; the frozen models are written below it.
        options: Values that the folder lacks, and mismatches that are allowed.

    Raises:
        UserError: If the folder is none of the three models, or its parts mismatch in a way `options` do not allow.
    """
    config, layout, processor = _open(source)
    side_info, side_tensors = read_side(source)
    info = _imported_info(config, layout, processor, side_info, options)
    target = ImportTarget(stage=layout.stage, config=info.qformer, language_width=config.text_config.hidden_size)
    own = target.build().state_dict().keys()
    found, rest = from_layout(read_tensors(source), own, layout.table)
    found |= {name: tensor for name, tensor in side_tensors.items() if name in own}
    left_out = [name for name in rest if name.endswith(_BUFFERS)]
    parts = _split(rest, left_out)
    foreign = import_tower(config.vision_config, parts["vision_model"], info.preprocessing, output / _VISION_FOLDER)
    unexpected = [*parts[""], *(side_tensors.keys() - own), *(f"vision_model.{name}" for name in foreign)]
    if not layout.has_language_model:
        unexpected += [f"language_model.{name}" for name in parts["language_model"]]
    trainables, report = target.fill(source, found, left_out, unexpected, options)
    if layout.has_language_model:
        write_language(config, parts["language_model"], processor.tokenizer, output / _LANGUAGE_FOLDER)
    return Bundle(info, trainables, _text_tokenizer(processor, layout, info), report)


def export_huggingface(checkpoint: Path, output: Path) -> LoadReport:
    """Export a checkpoint as a folder for stock transformers, processor included.

    Raises:
        UserError: If the encoder does not fit Hugging Face's ViT, or a backbone cannot be loaded.
    """
    import_torchvision()
    import transformers

    info = read_info(checkpoint)
    _refuse_unsupported(info)
    layout = next(layout for layout in LAYOUTS if (layout.stage, layout.has_text_branch) == _kind(info))
    weights = read_weights(checkpoint)
    updates = {name.removeprefix(_LORA): weights.pop(name) for name in list(weights) if name.startswith(_LORA)}
    placed, unmapped = to_layout(weights, layout.table)
    for name in sorted(unmapped):
        if not name.startswith(layout.side_file_prefixes):
            raise UserError(f"checkpoint: {name!r} has no place in {layout.architecture}; export a bridge without it")
    encoder = load_vision(info.vision)
    vision_config, tower = export_tower(encoder, info.vision.name)
    placed |= {f"vision_model.{name}": tensor for name, tensor in tower.items()}
    processor = _processor(checkpoint, info, layout)
    settings = {"vision_config": vision_config, **_settings(info, layout)}
    if layout.has_language_model:
        image_id = processor.tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
        name = cast(LanguageSpec, info.language).name
        language, text_config = read_language(name, image_id, processor.tokenizer, info.lora, updates)
        placed |= {f"language_model.{name}": tensor for name, tensor in language.items()}
        if info.answer_end_id is not None:
            text_config["eos_token_id"] = info.answer_end_id
        settings |= {"text_config": text_config, "image_token_index": image_id}
    model_class = getattr(transformers, layout.architecture)
    write_model(model_class, model_class.config_class(**settings), placed, output)
    processor.save_pretrained(output)
    # The updates are merged into the language model: a re-import must not attach them again.
    write_side(output, dataclasses.replace(info, lora=None), unmapped)
    notes = [f"into the side file {SIDE_FILE}: {len(unmapped)} tensors that the layout has no place for"]
    if updates:
        notes.append(f"merged into the language model: LoRA, {len(updates)} tensors")
    eps = vision_config["layer_norm_eps"]
    if eps != info.qformer.vision_norm_eps:
        notes.append(_eps_note(encoder, info.qformer, weights, eps))
    return LoadReport(source=repr(str(checkpoint)), loaded=sorted(weights.keys() - unmapped.keys()), notes=notes)


def _refuse_unsupported(info: BridgeInfo) -> None:
    """Refuse a bridge that no model of Hugging Face computes."""
    what = "" if info.bridge.is_image_qformer else f"a bridge of kind={info.bridge.kind!r}"
    what = what or (f"a branch for sound ({info.audio.name!r})" if info.audio is not None and info.audio_branch else "")
    if what:
        raise UserError(
            f"checkpoint: it has {what}; BLIP-2 and InstructBLIP in transformers have no place for that: serve it with "
            "`qformer serve`, or export a bridge without it"
        )


def _kind(info: BridgeInfo) -> tuple[int, bool]:
    return info.stage, info.qformer.has_text_branch


def _imported_info(
    config: Any, layout: Layout, processor: Any, side: BridgeInfo | None, options: ImportOptions
) -> BridgeInfo:
    """Info of the checkpoint: from the folder's side file if there is one, else from the options."""
    if side is not None and _kind(side) != (layout.stage, layout.has_text_branch):
        raise UserError(
            f"source: {SIDE_FILE} is of stage {side.stage}, not of a {layout.architecture}; export it again"
        )
    qformer = qformer_config_of(config, layout)
    # The tower that lies in the folder has its size already, and ends with the block to read.
    vision = VisionSpec(IN_CHECKPOINT + _VISION_FOLDER, layer=-1)
    base = side or BridgeInfo(
        stage=layout.stage,
        step=0,
        vision=vision,
        language=None,
        qformer=qformer,
        preprocessing=preprocessing_of(processor.image_processor),
        num_frames=options.num_frames,
        max_text_tokens=options.max_text_tokens,
        prompt=options.prompt,
    )
    return dataclasses.replace(
        base,
        vision=vision,
        language=LanguageSpec(IN_CHECKPOINT + _LANGUAGE_FOLDER) if layout.has_language_model else None,
        qformer=dataclasses.replace(qformer, vision_norm_eps=base.qformer.vision_norm_eps),
    )


def _settings(info: BridgeInfo, layout: Layout) -> dict[str, Any]:
    """Fields of Hugging Face's config that describe the bridge."""
    settings: dict[str, Any] = {
        "qformer_config": hf_qformer_config(info.qformer, layout),
        "num_query_tokens": info.qformer.num_queries,
        # Without an index the retrieval model reads the whole text; with one it removes the placeholders first.
        "image_token_index": None,
    }
    if layout.stage == 1:
        settings["image_text_hidden_size"] = info.qformer.embed_dim
    return settings


def _open(source: Path) -> tuple[Any, Layout, Any]:
    """Config, layout and processor of a folder."""
    import_torchvision()
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
        architecture = (config.architectures or ["none"])[0]
    except Exception as error:
        raise UserError(f"source: {str(source)!r} is no Hugging Face folder ({first_line(error)})") from error
    layout = next((layout for layout in LAYOUTS if layout.architecture == architecture), None)
    if layout is None:
        known = ", ".join(layout.architecture for layout in LAYOUTS)
        raise UserError(f"source: {str(source)!r} holds {architecture}; we import {known}")
    try:
        processor = getattr(transformers, layout.processor).from_pretrained(source)
    except Exception as error:
        raise UserError(
            f"source: {str(source)!r} has no {layout.processor} files ({first_line(error)}); "
            "save the model's processor into the folder"
        ) from error
    return config, layout, processor


def _split(weights: Mapping[str, Tensor], left_out: list[str]) -> dict[str, dict[str, Tensor]]:
    """Tensors by frozen model without its prefix; those of neither model under ""."""
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


def _processor(checkpoint: Path, info: BridgeInfo, layout: Layout) -> Any:
    """Stock processor with the checkpoint's preprocessing and tokenizers."""
    import transformers

    bert = None
    if layout.has_text_branch:
        folder = str(checkpoint / TOKENIZER_FOLDER)
        bert = load_text_tokenizer(folder, info.max_text_tokens, info.qformer.vocab_size).tokenizer
        if bert.convert_tokens_to_ids(DEC_TOKEN) in (None, bert.unk_token_id):
            # [DEC] gets its id in the embeddings before the processor adds a token of its own.
            bert.add_special_tokens({"bos_token": DEC_TOKEN})
    tokenizer = read_language_tokenizer(cast(LanguageSpec, info.language).name) if layout.has_language_model else bert
    parts = {"qformer_tokenizer": bert} if layout.has_language_model and layout.has_text_branch else {}
    num_query_tokens = info.qformer.num_queries if layout.has_language_model else None
    return getattr(transformers, layout.processor)(
        image_processor_for(info.preprocessing), tokenizer, **parts, num_query_tokens=num_query_tokens
    )


def _text_tokenizer(processor: Any, layout: Layout, info: BridgeInfo) -> TextTokenizer | None:
    """Tokenizer of the Q-Former; None where it reads no text."""
    if not layout.has_text_branch:
        return None
    tokenizer = processor.tokenizer if layout.stage == 1 else processor.qformer_tokenizer
    return TextTokenizer(tokenizer, info.max_text_tokens)


def _eps_note(encoder: VisionEncoder, config: QFormerConfig, weights: Mapping[str, Tensor], eps: float) -> str:
    norm = nn.LayerNorm(config.encoder_width, eps=config.vision_norm_eps)
    norm.load_state_dict({k: weights[f"vision_norm.{k}"] for k in ("weight", "bias")})
    effect = norm_eps_effect(encoder, norm.requires_grad_(False), eps)
    return (
        f"vision norm: eps {config.vision_norm_eps:g} here, {eps:g} in the folder (one value for all norms there); "
        f"on a picture of noise its output moves by {effect:.1e} of its largest value"
    )
