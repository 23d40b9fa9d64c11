"""Loaded adapters over one frozen encoder: what they make of the encoder's tokens.

B batch, F frames, P image tokens, V encoder width, N rows (F * Q queries), L language-model width, E embedding width.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.data.storage.local_copies import local_folder
from pipelines.inference.models import Retriever, load_audio_encoder, load_tokenizer
from pipelines.serving.contract.adapters import SharedEncoder
from pipelines.serving.contract.errors import Refusal
from pipelines.serving.contract.wire import DecodedMedia, MatchScore, TextEmbeddings
from qformer.audio import AudioEncoder
from qformer.backbones import VisionEncoder, load_vision
from qformer.bridges.audio_branch import Sound
from qformer.conversion.checkpoint import load_weights, read_info, read_weights
from qformer.errors import UserError
from qformer.objectives.stage1 import Stage1
from qformer.objectives.stage2 import Stage2, encode_instructions
from qformer.text import TextTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptAdapter:
    """A stage-2 adapter: image tokens, and sound, to soft prompts."""

    stage2: Stage2
    tokenizer: TextTokenizer | None
    """Text tokenizer of an instruction-aware Q-Former."""
    audio_encoder: AudioEncoder | None
    """Frozen; for a bridge that reads sound."""

    @torch.inference_mode()
    def soft_prompts(
        self, tokens_BFPV: Tensor, is_frame_BF: Tensor, clips: Sequence[DecodedMedia], instructions: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """Soft prompts [N, L] of each image or clip, as `Captioner.soft_prompts` gives them."""
        text, _ = encode_instructions(self.tokenizer, instructions, tokens_BFPV.device)
        prompts = self.stage2(tokens_BFPV, text, is_frame_BF, self._encode_audio(clips, tokens_BFPV.device))
        return [prompts_NL.float().cpu().numpy() for prompts_NL in prompts.rows()]

    def _encode_audio(self, clips: Sequence[DecodedMedia], device: torch.device) -> Sound | None:
        if self.audio_encoder is None:
            return None
        waveforms_BAW = torch.from_numpy(np.stack([clip.waveforms for clip in clips if clip.waveforms is not None]))
        is_segment_BA = torch.from_numpy(np.stack([clip.audio_valid for clip in clips if clip.audio_valid is not None]))
        is_segment_BA = is_segment_BA.to(device)
        return Sound(self.audio_encoder.features(waveforms_BAW.to(device), is_segment_BA), is_segment_BA)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalAdapter:
    """A stage-1 adapter: embeddings and match scores."""

    retriever: Retriever

    @torch.inference_mode()
    def embed(self, tokens_BFPV: Tensor, is_frame_BF: Tensor) -> list[NDArray[np.float32]]:
        """Normalised query embeddings [N, E] of each image or clip."""
        return [*self.retriever.embed_tokens(tokens_BFPV, is_frame_BF).cpu().numpy()]

    def refusal(self, texts: Sequence[str]) -> Refusal | None:
        """Why texts cannot be read whole; None where they can."""
        tokenizer = self.retriever.tokenizer
        if not (count := tokenizer.encode(texts).num_truncated):
            return None
        message = f"{count} texts have more than the {tokenizer.max_tokens} tokens that the model reads; shorten them"
        return Refusal(400, "context_length_exceeded", message)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> TextEmbeddings | Refusal:
        """Embed texts."""
        if (refusal := self.refusal(texts)) is not None:
            return refusal
        num_tokens = int(self.retriever.tokenizer.encode(texts).is_text_BT.sum())
        return TextEmbeddings(vectors=self.retriever.embed_text(texts).cpu().numpy(), num_tokens=num_tokens)

    @torch.inference_mode()
    def match(self, tokens_FPV: Tensor, is_frame_F: Tensor, texts: Sequence[str]) -> list[MatchScore]:
        """Scores of one image or clip with each text."""
        embeds_NE = self.retriever.embed_tokens(tokens_FPV[None], is_frame_F[None])[0]
        similarity_B = (self.retriever.embed_text(texts) @ embeds_NE.T).amax(dim=1)
        tokens_BFPV = tokens_FPV[None].expand(len(texts), -1, -1, -1)
        probability_B = self.retriever.match(tokens_BFPV, texts, is_frame_F[None].expand(len(texts), -1))
        scores = zip(probability_B.tolist(), similarity_B.tolist(), strict=True)
        return [MatchScore(probability=probability, similarity=similarity) for probability, similarity in scores]


def load_backbone(source: SharedEncoder, device: str) -> VisionEncoder:
    """The frozen encoder of all adapters.

    Raises:
        UserError: If it cannot be loaded, or is another model than in training.
    """
    name = source.vision.name
    local = dataclasses.replace(source.vision, name=str(local_folder(name))) if "://" in name else source.vision
    encoder = load_vision(local)
    if encoder.width != source.width:
        raise UserError(f"encoder {name!r} is {encoder.width} wide, the bridges {source.width}; it is another model")
    return encoder.to(device)


def load_adapter(folder: str, encoder: VisionEncoder, device: str) -> PromptAdapter | RetrievalAdapter:
    """Load a checkpoint's trainables onto an encoder that is already loaded.

    Raises:
        UserError: If the folder is no checkpoint, or a damaged one.
    """
    path = local_folder(folder)
    info = read_info(path)
    if info.stage == 1:
        stage1 = Stage1(info.qformer, bridge=info.bridge)
        load_weights(stage1, path)
        return RetrievalAdapter(retriever=Retriever(info, encoder, stage1.to(device), load_tokenizer(path, info)))
    tokenizer = load_tokenizer(path, info) if info.qformer.has_text_branch else None
    audio_encoder = load_audio_encoder(info, device)
    return PromptAdapter(stage2=_stage2(path).to(device).eval(), tokenizer=tokenizer, audio_encoder=audio_encoder)


def _stage2(folder: Path) -> Stage2:
    """Stage 2 without the language model, whose updates (LoRA) are the generator's."""
    info, weights = read_info(folder), read_weights(folder)
    own = {name: tensor for name, tensor in weights.items() if not name.startswith("lora.")}
    width = len(own["language_projection.weight"])
    stage2 = Stage2(info.qformer, language_width=width, bridge=info.bridge, audio=info.audio_branch)
    stage2.load_state_dict(own)
    return stage2
