"""A trained bridge in use: the two models that a checkpoint folder becomes (`qformer.conversion.checkpoint`).

Dimensions: B batch, F frames, C channels, Y/X pixels, P image tokens, V encoder width, N queries, E joint width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from qformer.attention import KeyValue
from qformer.backbones import VisionEncoder, load_language, load_vision
from qformer.config import GenerationSettings
from qformer.conversion.checkpoint import TOKENIZER_FOLDER, BridgeInfo, load_weights, read_info
from qformer.errors import UserError
from qformer.language import LanguageModel, build_language_model
from qformer.lora import Lora
from qformer.stage1 import Stage1
from qformer.stage2 import Stage2
from qformer.text import TextTokenizer, load_text_tokenizer


class Retriever:
    """Image and text embeddings and match scores of a stage-1 bridge."""

    def __init__(self, info: BridgeInfo, encoder: VisionEncoder, stage1: Stage1, tokenizer: TextTokenizer) -> None:
        self.info, self.encoder, self.stage1, self.tokenizer = info, encoder, stage1.eval(), tokenizer
        self.preprocessing, self.num_frames = info.preprocessing, info.num_frames

    @torch.no_grad()
    def embed_image(self, pixels_BFCYX: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images or clips.

        Args:
            pixels_BFCYX: uint8, prepared by `preprocessing`.

        Returns:
            query_embeds_BNE, L2-normalised float32 (N = F * Q), and the encoder's image_tokens_BFPV for `match`.
        """
        tokens_BFPV = self.encoder.features(pixels_BFCYX.to(self._device))
        return self.embed_tokens(tokens_BFPV), tokens_BFPV

    @torch.no_grad()
    def embed_tokens(self, image_tokens_BFPV: Tensor) -> Tensor:
        """query_embeds_BNE as `embed_image`, of what the encoder has seen already."""
        hidden_GQD = self.stage1.qformer.forward_queries(self._image(image_tokens_BFPV)).hidden_BQD
        return self.stage1.embed_queries(hidden_GQD, image_tokens_BFPV.shape[1])

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """L2-normalised text embeddings [B, E], float32; the similarity to an image is the largest over its N rows."""
        ids_BT, mask_BT, _ = self.tokenizer.encode(captions)
        return self.stage1.embed_text(ids_BT.to(self._device), mask_BT.to(self._device))

    @torch.no_grad()
    def match(self, image_tokens_BFPV: Tensor, captions: Sequence[str]) -> Tensor:
        """ITM probability that each image matches its caption.

        Args:
            image_tokens_BFPV: From `embed_image`.
            captions: One an image.

        Returns:
            [B], float32, between 0 and 1.
        """
        ids_BT, mask_BT, _ = self.tokenizer.encode(captions)
        image, frames = self._image(image_tokens_BFPV), image_tokens_BFPV.shape[1]
        logits_B2 = self.stage1.match_logits(image, ids_BT.to(self._device), mask_BT.to(self._device), frames)
        return logits_B2.softmax(dim=-1)[:, 1]

    def _image(self, tokens_BFPV: Tensor) -> list[KeyValue | None]:
        tokens_GPV = self.stage1.vision_norm(tokens_BFPV.to(self._device).float()).flatten(0, 1)
        return self.stage1.qformer.image_key_values(tokens_GPV)

    @property
    def _device(self) -> torch.device:
        return self.stage1.temperature.device


class Captioner:
    """Captions and answers of a stage-2 bridge; `tokenizer` is that of the Q-Former's text branch, where it has one."""

    def __init__(
        self,
        info: BridgeInfo,
        encoder: VisionEncoder,
        stage2: Stage2,
        language: LanguageModel,
        tokenizer: TextTokenizer | None = None,
    ) -> None:
        self.info, self.encoder, self.stage2 = info, encoder, stage2.eval()
        self.language, self.tokenizer = language, tokenizer
        self.preprocessing, self.num_frames = info.preprocessing, info.num_frames

    @torch.no_grad()
    def answer(
        self,
        pixels_BFCYX: Tensor,
        instructions: Sequence[str] | None = None,
        settings: GenerationSettings | None = None,
    ) -> list[str]:
        """Captions, or answers to one instruction an image or clip.

        Args:
            pixels_BFCYX: uint8, prepared by `preprocessing`.
            instructions: An instruction-aware Q-Former reads them too; cut as in training (see `num_truncated`). None,
                or "" among them, takes the prompt of training.
            settings: Greedy by default.

        Raises:
            ValueError: If the encoder's features are not finite, or instructions and images differ in number.
        """
        prompts = [text or self.info.prompt for text in instructions or [""] * len(pixels_BFCYX)]
        if len(prompts) != len(pixels_BFCYX):
            raise ValueError(f"{len(prompts)} instructions for {len(pixels_BFCYX)} images; give one each")
        device = self.stage2.language_projection.weight.device
        inputs = [self.encoder.features(pixels_BFCYX.to(device))]
        if self.tokenizer is not None:
            inputs += [tensor.to(device) for tensor in self.tokenizer.encode(prompts)[:2]]
        return self.language.generate(self.stage2(*inputs), prompts, settings)

    def num_truncated(self, instructions: Sequence[str]) -> int:
        """How many instructions lose their last words in `answer`, for being longer than `info.max_text_tokens`."""
        prompts = [text or self.info.prompt for text in instructions]
        own = 0 if self.tokenizer is None else self.tokenizer.encode(prompts).num_truncated
        batch = self.language.tokenize(prompts, [""] * len(prompts), max_tokens=self.info.max_text_tokens)
        return max(own, batch.num_truncated)


def load_retriever(folder: Path, device: str = "cpu") -> Retriever:
    """Load a stage-1 checkpoint for retrieval.

    Raises:
        UserError: If the folder is no stage-1 checkpoint, or its encoder cannot be loaded.
    """
    info = _info_of_stage(folder, 1, "retrieval")
    stage1 = Stage1(info.qformer)
    load_weights(stage1, folder)
    return Retriever(info, _encoder(info).to(device), stage1.to(device), load_tokenizer(folder, info))


def load_captioner(folder: Path, device: str = "cpu") -> Captioner:
    """Load a stage-2 checkpoint for captions.

    Raises:
        UserError: If the folder is no stage-2 checkpoint, or a backbone cannot be loaded.
    """
    info = _info_of_stage(folder, 2, "captions")
    model, words = load_language(cast(str, info.language))
    if info.answer_end_id is not None:
        cast(Any, model).generation_config.eos_token_id = info.answer_end_id
    language = build_language_model(model, words, info.max_text_tokens)
    lora = Lora(language.model, info.lora) if info.lora else None
    stage2 = Stage2(info.qformer, language_width=language.width, lora=lora)
    load_weights(stage2, folder)
    tokenizer = load_tokenizer(folder, info) if info.qformer.has_text_branch else None
    return Captioner(info, _encoder(info).to(device), stage2.to(device), language.to(device), tokenizer)


def _info_of_stage(folder: Path, stage: int, purpose: str) -> BridgeInfo:
    info = read_info(folder)
    if info.stage != stage:
        raise UserError(f"{str(folder)!r} is a stage-{info.stage} checkpoint; {purpose} need(s) stage {stage}")
    return info


def load_tokenizer(folder: Path, info: BridgeInfo) -> TextTokenizer:
    """Load the Q-Former's text tokenizer from its checkpoint folder."""
    return load_text_tokenizer(str(folder / TOKENIZER_FOLDER), info.max_text_tokens, info.qformer.vocab_size)


def _encoder(info: BridgeInfo) -> VisionEncoder:
    encoder = load_vision(
        info.vision, pretrained=info.vision_pretrained, layer=info.vision_layer, image_size=info.vision_image_size
    )
    if encoder.width != info.qformer.encoder_width:
        raise UserError(
            f"encoder {info.vision!r} is {encoder.width} wide, the bridge {info.qformer.encoder_width}; it is another "
            "model than in training"
        )
    return encoder
