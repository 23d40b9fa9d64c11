"""A trained bridge in use: the two models that a checkpoint folder becomes (`qformer.conversion.checkpoint`).

Dimensions: B batch, F frames, C channels, Y/X pixels, P image tokens, V encoder width, N queries or soft prompts, E
joint width, A segments of sound, W samples of a segment, L language-model width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from qformer.adapters.lora import Lora
from qformer.audio import AudioEncoder, load_audio
from qformer.backbones import VisionEncoder, load_language, load_vision
from qformer.bridges.audio_branch import Sound
from qformer.bridges.protocol import BridgeInput, BridgeText
from qformer.config import GenerationSettings, LanguageSpec
from qformer.conversion.checkpoint import TOKENIZER_FOLDER, BridgeInfo, load_weights, read_info
from qformer.errors import UserError
from qformer.language import LanguageModel, build_language_model
from qformer.objectives.stage1 import ImageEncoding, Stage1
from qformer.objectives.stage2 import SoftPrompts, Stage2, encode_instructions
from qformer.text import TextTokenizer, load_text_tokenizer


class Waveforms(NamedTuple):
    """The sound of clips, as `SampleBatch` holds it."""

    waveforms_BAW: Tensor
    is_segment_BA: Tensor
    """False at segments that are not there; a clip without sound has none."""


class Retriever:
    """Image and text embeddings and match scores of a stage-1 bridge."""

    def __init__(self, info: BridgeInfo, encoder: VisionEncoder, stage1: Stage1, tokenizer: TextTokenizer) -> None:
        self.info, self.encoder, self.stage1, self.tokenizer = info, encoder, stage1.eval(), tokenizer
        self.preprocessing, self.num_frames = info.preprocessing, info.num_frames

    @torch.no_grad()
    def embed_image(self, pixels_BFCYX: Tensor, frame_valid_BF: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed images or clips.

        Args:
            pixels_BFCYX: uint8, prepared by `preprocessing`.
            frame_valid_BF: False at frames that only repeat others; they change nothing.

        Returns:
            query_embeds_BNE, L2-normalised float32 (N = F * Q where frames are not joined), and the encoder's
            image_tokens_BFPV for `match`.
        """
        tokens_BFPV = self.encoder.features(pixels_BFCYX.to(self._device))
        return self.embed_tokens(tokens_BFPV, frame_valid_BF), tokens_BFPV

    @torch.no_grad()
    def embed_tokens(self, image_tokens_BFPV: Tensor, frame_valid_BF: Tensor | None = None) -> Tensor:
        """query_embeds_BNE of `embed_image`, from the encoder's tokens."""
        return self.encode_tokens(image_tokens_BFPV, frame_valid_BF).queries_BNE

    @torch.no_grad()
    def encode_tokens(self, image_tokens_BFPV: Tensor, frame_valid_BF: Tensor | None = None) -> ImageEncoding:
        """All that the queries alone make of the encoder's tokens."""
        return self.stage1.encode_image(self._given(image_tokens_BFPV, frame_valid_BF))

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """L2-normalised text embeddings [B, E], float32; the similarity to an image is the largest over its N rows."""
        return self.stage1.embed_text(*self._text(captions))

    @torch.no_grad()
    def match(self, image_tokens_BFPV: Tensor, captions: Sequence[str], frame_valid_BF: Tensor | None = None) -> Tensor:
        """ITM probability that each image matches its caption.

        Args:
            image_tokens_BFPV: From `embed_image`.
            captions: One an image.
            frame_valid_BF: False at frames that only repeat others; see `embed_image`.

        Returns:
            [B], float32, between 0 and 1.
        """
        given, bridge = self._given(image_tokens_BFPV, frame_valid_BF), self.stage1.bridge
        logits_B2 = self.stage1.match_logits(bridge.keys(bridge.perceive(given)), self._text(captions), given)
        return logits_B2.softmax(dim=-1)[:, 1]

    def _given(self, tokens_BFPV: Tensor, frame_valid_BF: Tensor | None) -> BridgeInput:
        """Clips as the bridge takes them."""
        is_frame_BF = None if frame_valid_BF is None else frame_valid_BF.to(self._device)
        return BridgeInput(tokens_BFPV.to(self._device).float(), is_frame_BF)

    def _text(self, captions: Sequence[str]) -> BridgeText:
        ids_BT, mask_BT, _ = self.tokenizer.encode(captions)
        return BridgeText(ids_BT.to(self._device), mask_BT.to(self._device))

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
        audio_encoder: AudioEncoder | None = None,
    ) -> None:
        self.info, self.encoder, self.stage2 = info, encoder, stage2.eval()
        self.language, self.tokenizer, self.audio_encoder = language, tokenizer, audio_encoder
        self.preprocessing, self.num_frames = info.preprocessing, info.num_frames

    @torch.no_grad()
    def soft_prompts(
        self,
        pixels_BFCYX: Tensor,
        instructions: Sequence[str] | None = None,
        *,
        frame_valid: Tensor | None = None,
        audio: Waveforms | None = None,
    ) -> list[Tensor]:
        """What the language model reads of each image or clip, [N, L], before the prompt.

        N is the same for all but where frames only repeat others, or some clips have no sound: their rows are left out.

        Args:
            pixels_BFCYX: uint8, prepared by `preprocessing`.
            instructions: One instruction an image, or None; see `answer`.
            frame_valid: [B, F], False at frames that only repeat others; None: none does.
            audio: The clips' sound, for a bridge that reads it; None: they have none.

        Raises:
            ValueError: If the features are not finite, or instructions and images differ in number.
        """
        tokens_BFPV = self.encoder.features(pixels_BFCYX.to(self._device))
        return self.soft_prompts_of_tokens(tokens_BFPV, instructions, frame_valid=frame_valid, audio=audio)

    @torch.no_grad()
    def soft_prompts_of_tokens(
        self,
        tokens_BFPV: Tensor,
        instructions: Sequence[str] | None = None,
        *,
        frame_valid: Tensor | None = None,
        audio: Waveforms | None = None,
    ) -> list[Tensor]:
        """`soft_prompts` of the encoder's tokens."""
        prompts = self.prompts(instructions, len(tokens_BFPV))
        return self.read(tokens_BFPV, prompts, frame_valid, self.encode_audio(audio, self._device)).rows()

    @torch.no_grad()
    def read(
        self, tokens_BFPV: Tensor, prompts: Sequence[str], frame_valid: Tensor | None, sound: Sound | None
    ) -> SoftPrompts:
        """Soft prompts and their masks, of the encoder's tokens and one prompt each."""
        text, _ = encode_instructions(self.tokenizer, prompts, self._device)
        is_frame_BF = None if frame_valid is None else frame_valid.to(self._device)
        return self.stage2(tokens_BFPV.to(self._device), text, is_frame_BF, sound)

    @property
    def _device(self) -> torch.device:
        return self.stage2.language_projection.weight.device

    def prompts(self, instructions: Sequence[str] | None, images: int) -> list[str]:
        """The text after each image's soft prompts: its instruction, or the prompt of training.

        Raises:
            ValueError: If instructions and images differ in number.
        """
        prompts = [text or self.info.prompt for text in instructions or [""] * images]
        if len(prompts) != images:
            raise ValueError(f"{len(prompts)} instructions for {images} images; give one each")
        return prompts

    def encode_audio(self, audio: Waveforms | None, device: torch.device) -> Sound | None:
        """Output of the frozen audio encoder, on `device`."""
        if audio is None:
            return None
        if self.audio_encoder is None:
            raise ValueError("sound for a bridge without audio branch; leave it out")
        waveforms_BAW, is_segment_BA = (tensor.to(device) for tensor in audio)
        return Sound(self.audio_encoder.features(waveforms_BAW, is_segment_BA), is_segment_BA)

    @torch.no_grad()
    def answer(
        self,
        pixels_BFCYX: Tensor,
        instructions: Sequence[str] | None = None,
        settings: GenerationSettings | None = None,
        *,
        frame_valid: Tensor | None = None,
        audio: Waveforms | None = None,
    ) -> list[str]:
        """Captions, or answers to one instruction an image or clip.

        Args:
            pixels_BFCYX: uint8, prepared by `preprocessing`.
            instructions: An instruction-aware Q-Former reads them too; cut as in training (see `num_truncated`). None,
                or "" among them, takes the prompt of training.
            settings: Greedy by default.
            frame_valid: Mask of real frames; see `soft_prompts`.
            audio: Sound of the clips; see `soft_prompts`.

        Raises:
            ValueError: If the encoder's features are not finite, or instructions and images differ in number.
        """
        prefixes = self.soft_prompts(pixels_BFCYX, instructions, frame_valid=frame_valid, audio=audio)
        return self.language.generate(prefixes, self.prompts(instructions, len(prefixes)), settings)

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
    stage1 = Stage1(info.qformer, bridge=info.bridge)
    load_weights(stage1, folder)
    return Retriever(info, _encoder(info).to(device), stage1.to(device), load_tokenizer(folder, info))


def load_captioner(folder: Path, device: str = "cpu") -> Captioner:
    """Load a stage-2 checkpoint for captions.

    Raises:
        UserError: If the folder is no stage-2 checkpoint, or a backbone cannot be loaded.
    """
    info = _info_of_stage(folder, 2, "captions")
    model, words = load_language(cast(LanguageSpec, info.language))
    if info.answer_end_id is not None:
        cast(Any, model).generation_config.eos_token_id = info.answer_end_id
    language = build_language_model(model, words, info.max_text_tokens)
    lora = Lora(language.model, info.lora) if info.lora else None
    stage2 = Stage2(info.qformer, language_width=language.width, lora=lora, bridge=info.bridge, audio=info.audio_branch)
    load_weights(stage2, folder)
    tokenizer = load_tokenizer(folder, info) if info.qformer.has_text_branch else None
    encoder, audio_encoder = _encoder(info).to(device), load_audio_encoder(info, device)
    return Captioner(info, encoder, stage2.to(device), language.to(device), tokenizer, audio_encoder)


def _info_of_stage(folder: Path, stage: int, purpose: str) -> BridgeInfo:
    info = read_info(folder)
    if info.stage != stage:
        raise UserError(f"{str(folder)!r} is a stage-{info.stage} checkpoint; {purpose} need(s) stage {stage}")
    return info


def load_tokenizer(folder: Path, info: BridgeInfo) -> TextTokenizer:
    """Load the Q-Former's text tokenizer from its checkpoint folder."""
    return load_text_tokenizer(str(folder / TOKENIZER_FOLDER), info.max_text_tokens, info.qformer.vocab_size)


def load_audio_encoder(info: BridgeInfo, device: str) -> AudioEncoder | None:
    """Load the frozen encoder of sound; None for a bridge that reads none.

    Raises:
        UserError: If it cannot be loaded, is another than in training, or was not there in training either.
    """
    if info.audio is None or info.audio_branch is None:
        return None
    if info.audio.is_cached:
        raise UserError(
            f"the bridge was trained with model.audio={info.audio.name}: it reads vectors of a feature cache, and "
            "nothing here makes them from a file; train with model.audio set to an audio encoder, or without sound"
        )
    encoder = load_audio(info.audio)
    width, rate_hz = info.audio_branch.encoder_width, info.audio_sampling["sample_rate_hz"]
    if (encoder.width, encoder.sample_rate_hz) != (width, rate_hz):
        raise UserError(
            f"audio encoder {info.audio.name!r} is {encoder.width} wide and takes {encoder.sample_rate_hz} Hz, the "
            f"bridge {width} and {rate_hz} Hz; it is another model than in training"
        )
    return encoder.to(device)


def _encoder(info: BridgeInfo) -> VisionEncoder:
    encoder = load_vision(info.vision)
    if encoder.width != info.qformer.encoder_width:
        raise UserError(
            f"encoder {info.vision.name!r} is {encoder.width} wide, the bridge {info.qformer.encoder_width}; it is "
            "another model than in training"
        )
    return encoder
