"""Stage 2: generative learning; query outputs become soft prompts of a frozen language model.

Dimensions: B batch, F frames, G = B * F, P image tokens, V encoder width, Q queries, T instruction tokens, D hidden
width, N soft prompts, L language-model width.
Reference: BLIP-2 (arXiv:2301.12597), section 3.3; InstructBLIP (arXiv:2305.06500), section 2.3; MiniGPT-4
(arXiv:2304.10592), section 3.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from qformer.adapters.lora import Lora
from qformer.bridges.audio_branch import AudioBranch, Sound
from qformer.bridges.config import AudioConfig
from qformer.bridges.protocol import BridgeInput, BridgeText
from qformer.bridges.reading import Term
from qformer.bridges.stage_model import StageModel
from qformer.bridges.table import IMAGE_BRIDGE, BridgeConfig, build_bridge
from qformer.config import QFormerConfig
from qformer.objectives.losses import DIVERSITY
from qformer.text import TextTokenizer


class SoftPrompts(NamedTuple):
    """What the language model reads of clips."""

    prompts_BNL: Tensor
    is_prompt_BN: Tensor | None
    """False at rows that it must not read: those of padding frames, of dropped queries, of sound where there is none.
    None: all are read."""
    num_queries: int
    """Q: the first S sets of Q rows are the watched query outputs."""
    num_outputs: int
    """S * Q."""
    is_output_BS: Tensor | None
    """False at sets of query outputs of which none is read, as those of padding frames; None: each has some."""
    terms: Mapping[str, Term]
    """The bridge's own losses."""

    def rows(self) -> list[Tensor]:
        """Rows that are read of each clip, [N, L]."""
        if self.is_prompt_BN is None:
            return list(self.prompts_BNL)
        pairs = zip(self.prompts_BNL, self.is_prompt_BN, strict=True)
        return [prompts_NL[is_prompt_N] for prompts_NL, is_prompt_N in pairs]


def encode_instructions(
    tokenizer: TextTokenizer | None, instructions: Sequence[str], device: torch.device
) -> tuple[BridgeText | None, int]:
    """Instructions as a bridge reads them, and how many lost their last words; None for one that reads no text."""
    if tokenizer is None:
        return None, 0
    ids_BT, is_text_BT, num_truncated = tokenizer.encode(instructions)
    return BridgeText(ids_BT.to(device), is_text_BT.to(device)), num_truncated


class Stage2(StageModel):
    """What stage 2 trains: a bridge, the projection to the LM's width, a branch for sound, the LM's LoRA.

    With a text branch (`config.vocab_size` > 0) the bridge reads the instruction together with the image, as
    InstructBLIP does; without, it is BLIP-2's.

    Args:
        config: Without the LM head, which only stage 1 uses.
        language_width: Width of the language model's embeddings.
        freeze_qformer: MiniGPT-4's recipe: the bridge stays as loaded, without dropout; the projection (and LoRA) alone
            is trained.
        lora: Low-rank updates of the language model, trained and saved with the bridge.
        bridge: Kind and sizes of the bridge.
        audio: Sizes of what reads sound; None: nothing does.
        trains_audio_alone: Video-LLaMA's way to train the branch that reads sound: nothing else is trained, nor read.

    Raises:
        ValueError: If the config has a text branch with an LM head, or stage 2 cannot train the bridge.
    """

    language_projection: nn.Linear

    def __init__(
        self,
        config: QFormerConfig,
        *,
        language_width: int,
        freeze_qformer: bool = False,
        lora: Lora | None = None,
        bridge: BridgeConfig = IMAGE_BRIDGE,
        audio: AudioConfig | None = None,
        trains_audio_alone: bool = False,
    ) -> None:
        if config.has_text_branch and config.has_lm_head:
            raise ValueError(
                f"vocab_size={config.vocab_size} with has_lm_head=True: stage 2 generates with the language model, not "
                "with the Q-Former; set has_lm_head=False (or vocab_size=0 for queries without instruction)"
            )
        super().__init__(build_bridge(bridge, config), stage=2)
        self.term_names = ("lm", DIVERSITY, *bridge.term_names)
        self.add_head("language_projection", nn.Linear(config.hidden_size, language_width))
        if audio is not None:
            audio.check(bridge, config)
        self.audio_config = audio
        is_separate = audio is not None and not audio.is_joint
        self.audio = AudioBranch(config, audio, language_width) if audio and is_separate else None
        if trains_audio_alone and self.audio is None:
            raise ValueError("trains_alone=true without a branch for sound; set model.audio, not is_joint")
        self.lora = lora
        self.freeze_qformer, self.trains_audio_alone = freeze_qformer, trains_audio_alone
        # Queries alone become soft prompts.
        self.bridge.freeze_unread_text()
        if freeze_qformer or trains_audio_alone:
            self.bridge.requires_grad_(False)
        if trains_audio_alone:
            self.language_projection.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Switch dropout; a frozen bridge stays in eval mode."""
        super().train(mode)
        if self.freeze_qformer:
            self.bridge.eval()
        return self

    def forward(
        self,
        tokens_BFPV: Tensor,
        text: BridgeText | None = None,
        is_frame_BF: Tensor | None = None,
        sound: Sound | None = None,
        draw: int = 0,
        is_valid_B: Tensor | None = None,
    ) -> SoftPrompts:
        """Soft prompts of the clips, then those of sound.

        Args:
            tokens_BFPV: Frozen encoder tokens, before the trained layer norm.
            text: Instructions in the bridge's own vocabulary; for a bridge that reads text only.
            is_frame_BF: False at frames that are padding; None: none is.
            sound: Output of the audio encoder; None where no clip has any.
            draw: Random key of the step, the same on every rank.
            is_valid_B: False at samples that count for no loss; None: all do.

        Raises:
            ValueError: If the tokens are not floating [B, F, P, V] of the encoder's width, ids lie outside the
                vocabulary, or instructions and text branch do not come together.
        """
        self.bridge.check(tokens_BFPV, is_frame_BF)
        if (text is not None) != self.bridge.reads_text:
            raise ValueError(
                f"instructions given: {text is not None}, but a bridge of vocab_size={self.bridge.shape.vocab_size} "
                f"takes {'them' if self.bridge.reads_text else 'none'}; change that, or model.qformer_reads_prompt"
            )
        sound = self._sound(sound, tokens_BFPV)
        if self.trains_audio_alone and self.audio is not None and sound is not None:
            prompts_BNL, size = self.audio(sound), self.audio.num_queries
            return SoftPrompts(prompts_BNL, _unless_all(_of_sound(sound, prompts_BNL)), size, size, None, {})
        joint = sound if self.audio is None else None
        given = BridgeInput(tokens_BFPV, is_frame_BF, text, joint, draw, is_valid_B)
        reading = self.bridge.read(self.bridge.perceive(given), given)
        prompts_BNL = self.language_projection(reading.hidden_BSQD).flatten(1, 2)
        num_outputs, num_queries = prompts_BNL.shape[1], reading.hidden_BSQD.shape[2]
        is_prompt_BN, is_output_BS = None, None
        if reading.is_read_BSQ is not None:
            is_prompt_BN, is_output_BS = reading.is_read_BSQ.flatten(1, 2), reading.is_read_BSQ.any(dim=2)
        if self.audio is not None and sound is not None:
            audio_BNL = self.audio(sound)
            is_read_BN = prompts_BNL.new_ones(prompts_BNL.shape[:2], dtype=torch.bool)
            own_BN = is_read_BN if is_prompt_BN is None else is_prompt_BN
            is_prompt_BN = torch.cat([own_BN, _of_sound(sound, audio_BNL)], dim=1)
            prompts_BNL = torch.cat([prompts_BNL, audio_BNL], dim=1)
        is_prompt_BN = _unless_all(is_prompt_BN)
        return SoftPrompts(prompts_BNL, is_prompt_BN, num_queries, num_outputs, is_output_BS, reading.terms)

    def query_outputs(self, prompts: SoftPrompts) -> Tensor:
        """Query outputs as the language model reads them, without the bias that all of them share: [G, Q, L]."""
        branch = self.audio if self.trains_audio_alone and self.audio is not None else self
        own_BNL = prompts.prompts_BNL[:, : prompts.num_outputs] - branch.language_projection.bias
        return own_BNL.unflatten(1, (-1, prompts.num_queries)).flatten(0, 1)

    def _sound(self, sound: Sound | None, tokens_BFPV: Tensor) -> Sound | None:
        """Checked; where no clip has any, zeros that nothing reads, so that every weight has its part in the result."""
        if self.audio_config is None:
            if sound is not None:
                raise ValueError("sound for a bridge without audio branch; leave it out, or train one (model.audio)")
            return None
        if sound is None or (self.audio is None and not sound.is_segment_BA.any()):  # an image has no segment a frame
            return Sound.absent(len(tokens_BFPV), self.audio_config.encoder_width, tokens_BFPV.device)
        sound.check(
            len(tokens_BFPV), tokens_BFPV.shape[1] if self.audio is None else None, self.audio_config.encoder_width
        )
        return sound


def _of_sound(sound: Sound, prompts_BNL: Tensor) -> Tensor:
    """Which soft prompts of sound are read, [B, N]: those of clips that have some."""
    return sound.is_segment_BA.any(dim=1, keepdim=True).expand(prompts_BNL.shape[:2])


def _unless_all(is_prompt_BN: Tensor | None) -> Tensor | None:
    """The mask, or None where it leaves nothing out."""
    return None if is_prompt_BN is None or is_prompt_BN.all() else is_prompt_BN
