"""A trained bridge on disk and in use: what a checkpoint folder holds, and the two models it becomes.

    bridge.json          BridgeInfo: format version, stage, shapes, backbones, preprocessing
    bridge.safetensors   the trainables alone, fp32
    tokenizer/           stage 1's text tokenizer
    vision/, language/   frozen backbones that lie in the checkpoint itself (after `qformer import`)

Dimensions: B batch, F frames, C channels, Y/X pixel rows/columns, P image tokens, V encoder width, N queries of all
frames, E joint embedding width.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qformer.backbones import VisionEncoder, load_language, load_vision
from qformer.config import QFormerConfig
from qformer.errors import UserError
from qformer.preprocessing import Preprocessing
from qformer.stage1 import Stage1
from qformer.stage2 import Stage2, generate
from qformer.text import TextTokenizer, load_text_tokenizer

FORMAT_VERSION = 1
INFO_FILE, WEIGHTS_FILE, TOKENIZER_FOLDER = "bridge.json", "bridge.safetensors", "tokenizer"
BESIDE = "checkpoint:"
"""Begins the name of a backbone that is a folder of the checkpoint: "checkpoint:vision"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BridgeInfo:
    """Everything needed to rebuild the model around the trainables."""

    stage: int
    step: int
    """Optimizer steps done."""
    vision: str
    vision_pretrained: bool
    vision_layer: int
    language: str | None
    qformer: QFormerConfig
    preprocessing: Preprocessing
    num_frames: int
    """Frames sampled from a clip in training."""
    max_text_tokens: int
    prompt: str = ""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The content of bridge.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "BridgeInfo":
        """Inverse of `to_json`.

        Raises:
            UserError: If the format version is another.
        """
        values = json.loads(text)
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"checkpoint format_version is {version!r}, this version reads {FORMAT_VERSION}; "
                "use the version that wrote it, or train anew"
            )
        values["qformer"] = QFormerConfig(**values["qformer"])
        values["preprocessing"] = Preprocessing.from_dict(values["preprocessing"])
        return cls(**values)


def read_info(folder: Path) -> BridgeInfo:
    """Read bridge.json; backbones that lie in the folder are named by their paths.

    Raises:
        UserError: If the folder is no checkpoint or of another format version.
    """
    file = folder / INFO_FILE
    if not file.is_file():
        raise UserError(f"{str(folder)!r} is no checkpoint (no {INFO_FILE}); give a run or checkpoint folder")
    info = BridgeInfo.from_json(file.read_text())
    language = None if info.language is None else _resolved(folder, info.language)
    return dataclasses.replace(info, vision=_resolved(folder, info.vision), language=language)


def _resolved(folder: Path, name: str) -> str:
    return str(folder / name.removeprefix(BESIDE)) if name.startswith(BESIDE) else name


def save_bridge(folder: Path, info: BridgeInfo, trainables: nn.Module, tokenizer: TextTokenizer | None) -> None:
    """Write the three parts into an existing folder."""
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu().contiguous() for k, v in trainables.state_dict().items()}, folder / WEIGHTS_FILE)
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER_FOLDER)
    (folder / INFO_FILE).write_text(info.to_json())


def load_weights(trainables: nn.Module, folder: Path) -> None:
    """Load bridge.safetensors of the same stage and shapes.

    Raises:
        UserError: If names or shapes differ, naming the first.
    """
    weights, own = read_weights(folder), trainables.state_dict()
    for name in sorted(own.keys() ^ weights.keys()):
        place = "the checkpoint lacks" if name in own else "the model has no"
        raise UserError(f"{str(folder)!r}: {place} {name!r}; the model settings differ from the checkpoint's")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{str(folder)!r}: {name} is {tuple(tensor.shape)} in the checkpoint but {tuple(own[name].shape)} in "
                "the model; the model settings differ from the checkpoint's"
            )
    trainables.load_state_dict(weights)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The trainables' tensors by name."""
    from safetensors.torch import load_file

    return cast(dict[str, Tensor], load_file(folder / WEIGHTS_FILE))


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of every tensor when one stage started from another's checkpoint."""

    loaded: list[str]
    left_out: list[str]
    """In the checkpoint but not in the model (stage 1's text branch and heads)."""
    fresh: list[str]
    """In the model but not in the checkpoint: initialised anew."""

    def __str__(self) -> str:
        groups = sorted({name.split(".")[0] for name in self.fresh})
        return (
            f"loaded {len(self.loaded)} tensors; left out {len(self.left_out)} of the text branch and its heads; "
            f"initialised anew: {', '.join(groups) or 'none'}"
        )


def start_stage2(trainables: Stage2, folder: Path) -> LoadReport:
    """Start stage 2 from a stage-1 checkpoint: vision norm and query side, without the text branch.

    Raises:
        UserError: If the checkpoint is not of stage 1, or a shared tensor has another shape.
    """
    info = read_info(folder)
    if info.stage != 1:
        raise UserError(f"init_from: {str(folder)!r} is a stage-{info.stage} checkpoint; stage 2 starts from stage 1")
    weights, own = read_weights(folder), trainables.state_dict()
    shared = sorted(own.keys() & weights.keys())
    for name in shared:
        if weights[name].shape != own[name].shape:
            raise UserError(
                f"init_from: {name} is {tuple(weights[name].shape)} in {str(folder)!r} but {tuple(own[name].shape)} "
                "here; make model.qformer and model.vision equal to stage 1's"
            )
    missing = [n for n in own if n not in weights and not n.startswith("language_projection.")]
    if missing:
        raise UserError(f"init_from: {str(folder)!r} lacks {missing[0]!r}; make model.qformer equal to stage 1's")
    trainables.load_state_dict({name: weights[name] for name in shared}, strict=False)
    return LoadReport(shared, sorted(weights.keys() - own.keys()), sorted(own.keys() - weights.keys()))


class Retriever:
    """Image and text embeddings and match scores of a stage-1 bridge."""

    def __init__(self, info: BridgeInfo, encoder: VisionEncoder, stage1: Stage1, tokenizer: TextTokenizer) -> None:
        self.info, self.encoder, self.stage1, self.tokenizer = info, encoder, stage1.eval(), tokenizer
        self.preprocessing, self.num_frames = info.preprocessing, info.num_frames

    @torch.no_grad()
    def embed_images(self, pixels_BFCYX: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images or clips.

        Args:
            pixels_BFCYX: uint8, prepared by `preprocessing`.

        Returns:
            query_embeds_BNE, L2-normalised float32 (N = F * Q), and the encoder's image_tokens_BFPV for `match`.
        """
        tokens_BFPV = self.encoder(pixels_BFCYX.to(self._device))
        qformer = self.stage1.qformer
        image = qformer.image_key_values(self.stage1.vision_norm(tokens_BFPV.float()).flatten(0, 1))
        hidden_GQD = qformer.forward_queries(image).hidden_BQD
        return self.stage1.embed_queries(hidden_GQD, tokens_BFPV.shape[1]), tokens_BFPV

    @torch.no_grad()
    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """L2-normalised text embeddings [B, E], float32."""
        ids_BT, mask_BT = self.tokenizer.encode(captions)
        return self.stage1.embed_text(ids_BT.to(self._device), mask_BT.to(self._device))

    @torch.no_grad()
    def match(self, image_tokens_BFPV: Tensor, captions: Sequence[str]) -> Tensor:
        """ITM probability that each image matches its caption: [B], float32."""
        ids_BT, mask_BT = self.tokenizer.encode(captions)
        frames = image_tokens_BFPV.shape[1]
        tokens_GPV = self.stage1.vision_norm(image_tokens_BFPV.to(self._device).float()).flatten(0, 1)
        image = self.stage1.qformer.image_key_values(tokens_GPV)
        logits_B2 = self.stage1.match_logits(image, ids_BT.to(self._device), mask_BT.to(self._device), frames)
        return logits_B2.softmax(dim=-1)[:, 1]

    @property
    def _device(self) -> torch.device:
        return self.stage1.temperature.device


class Captioner:
    """Captions of a stage-2 bridge."""

    def __init__(
        self, info: BridgeInfo, encoder: VisionEncoder, stage2: Stage2, language: nn.Module, tokenizer: Any
    ) -> None:
        self.info, self.encoder, self.stage2 = info, encoder, stage2.eval()
        self.language, self.tokenizer = language, tokenizer
        self.preprocessing, self.num_frames = info.preprocessing, info.num_frames

    @torch.no_grad()
    def caption(self, pixels_BFCYX: Tensor, max_new_tokens: int = 32) -> list[str]:
        """Greedy captions of images or clips.

        Args:
            pixels_BFCYX: uint8, prepared by `preprocessing`.
            max_new_tokens: Longest answer in tokens.
        """
        device = self.stage2.language_projection.weight.device
        prefix_BNL = self.stage2(self.encoder(pixels_BFCYX.to(device)).float())
        return generate(
            self.language, self.tokenizer, prefix_BNL, prompt=self.info.prompt, max_new_tokens=max_new_tokens
        )


def load_retriever(folder: Path, device: str = "cpu") -> Retriever:
    """Load a stage-1 checkpoint for retrieval.

    Raises:
        UserError: If the folder is no stage-1 checkpoint, or its encoder cannot be loaded.
    """
    info = _info_of_stage(folder, 1, "retrieval")
    stage1 = Stage1(info.qformer)
    load_weights(stage1, folder)
    tokenizer = load_text_tokenizer(str(folder / TOKENIZER_FOLDER), info.max_text_tokens)
    return Retriever(info, _encoder(info).to(device), stage1.to(device), tokenizer)


def load_captioner(folder: Path, device: str = "cpu") -> Captioner:
    """Load a stage-2 checkpoint for captions.

    Raises:
        UserError: If the folder is no stage-2 checkpoint, or a backbone cannot be loaded.
    """
    info = _info_of_stage(folder, 2, "captions")
    if info.language is None:
        raise UserError(f"{str(folder)!r} names no language model; its {INFO_FILE} is damaged")
    language, tokenizer = load_language(info.language)
    width = cast(Any, language).get_input_embeddings().embedding_dim
    stage2 = Stage2(info.qformer, language_width=width)
    load_weights(stage2, folder)
    return Captioner(info, _encoder(info).to(device), stage2.to(device), language.to(device), tokenizer)


def _info_of_stage(folder: Path, stage: int, purpose: str) -> BridgeInfo:
    info = read_info(folder)
    if info.stage != stage:
        raise UserError(f"{str(folder)!r} is a stage-{info.stage} checkpoint; {purpose} need(s) stage {stage}")
    return info


def _encoder(info: BridgeInfo) -> VisionEncoder:
    encoder = load_vision(info.vision, pretrained=info.vision_pretrained, layer=info.vision_layer)
    if encoder.width != info.qformer.encoder_width:
        raise UserError(
            f"encoder {info.vision!r} is {encoder.width} wide but the bridge was trained on "
            f"{info.qformer.encoder_width}; it is another model than in training"
        )
    return encoder
