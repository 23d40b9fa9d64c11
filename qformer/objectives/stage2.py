"""Stage 2: generative learning; query outputs become soft prompts of a frozen language model.

Dimensions: B batch, F frames, G = B * F, P image tokens, V encoder width, Q queries, T instruction tokens, D hidden
width, N soft prompts, L language-model width.
Reference: BLIP-2 (arXiv:2301.12597), section 3.3; InstructBLIP (arXiv:2305.06500), section 2.3; MiniGPT-4
(arXiv:2304.10592), section 3.
"""

import torch
from torch import Tensor, nn

from qformer.adapters.lora import Lora
from qformer.bridges.audio_branch import AudioBranch, Sound
from qformer.bridges.clip_reader import ClipReader
from qformer.bridges.config import AudioConfig, VideoConfig
from qformer.config import QFormerConfig


class Stage2(ClipReader):
    """What stage 2 trains: vision layer norm, Q-Former, projection to the LM's width, and the LM's LoRA if any.

    With a text branch (`config.vocab_size` > 0) the Q-Former reads the instruction beside the image, as InstructBLIP
    does; without, it is BLIP-2's.

    Args:
        config: Without the LM head, which only stage 1 uses.
        language_width: Width of the language model's embeddings.
        freeze_qformer: MiniGPT-4's recipe: vision norm and Q-Former stay as loaded, without dropout; the projection
            (and LoRA) alone is trained.
        lora: Low-rank updates of the language model, trained and saved with the bridge.
        video: See `ClipReader`.
        audio: Also read sound, if there is any.
        trains_audio_alone: Video-LLaMA's way to train the branch that reads sound: nothing else is trained, nor read.

    Raises:
        ValueError: If the config has a text branch with an LM head.
    """

    def __init__(
        self,
        config: QFormerConfig,
        *,
        language_width: int,
        freeze_qformer: bool = False,
        lora: Lora | None = None,
        video: VideoConfig | None = None,
        audio: AudioConfig | None = None,
        trains_audio_alone: bool = False,
    ) -> None:
        if config.has_text_branch and config.has_lm_head:
            raise ValueError(
                f"vocab_size={config.vocab_size} with has_lm_head=True: stage 2 generates with the language model, not "
                "with the Q-Former; set has_lm_head=False (or vocab_size=0 for queries without instruction)"
            )
        super().__init__(config, video)
        self.language_projection = nn.Linear(config.hidden_size, language_width)
        if audio is not None:
            audio.check(self.video, config)
        self.audio_config = audio
        is_beside = audio is not None and not audio.is_joint
        self.audio = AudioBranch(config, audio, language_width) if audio and is_beside else None
        if trains_audio_alone and self.audio is None:
            raise ValueError("trains_alone=true without a branch beside the frames; set model.audio, not is_joint")
        self.lora = lora
        self.freeze_qformer, self.trains_audio_alone = freeze_qformer, trains_audio_alone
        if (unread := self.qformer.layers[-1].text_ffn) is not None:
            # Queries alone become soft prompts: nothing reads the last layer's text, so its weights have no gradient.
            unread.requires_grad_(False)
        if freeze_qformer or trains_audio_alone:
            for frozen in (self.vision_norm, self.frames, self.qformer):
                frozen.requires_grad_(False)
        if trains_audio_alone:
            self.language_projection.requires_grad_(False)

    def train(self, mode: bool = True) -> "Stage2":
        """Switch dropout; a frozen Q-Former stays in eval mode."""
        super().train(mode)
        if self.freeze_qformer:
            self.qformer.eval()
            self.frames.eval()
        return self

    def forward(
        self,
        image_BFPV: Tensor,
        instruction_ids_BT: Tensor | None = None,
        is_instruction_BT: Tensor | None = None,
        is_frame_BF: Tensor | None = None,
        sound: Sound | None = None,
    ) -> Tensor:
        """Soft prompts: of all frames in time order, or of the frames joined; then those of sound. [B, N, L].

        Args:
            image_BFPV: Frozen encoder tokens, before the trained layer norm.
            instruction_ids_BT: Instruction in the Q-Former's own vocabulary; with a text branch only.
            is_instruction_BT: True at its real tokens.
            is_frame_BF: False at frames that are padding; `is_prompt` tells which rows the language model must not see.
            sound: None where no clip has any.

        Raises:
            ValueError: If the image tokens are not floating [B, F, P, V] of the encoder's width, ids lie outside the
                vocabulary, or instruction, its mask and text branch do not come together.
        """
        self.check_image(image_BFPV, is_frame_BF)
        has_ids, has_mask = instruction_ids_BT is not None, is_instruction_BT is not None
        config = self.qformer.config
        if not has_ids == has_mask == config.has_text_branch:
            raise ValueError(
                f"instruction_ids_BT given: {has_ids}, is_instruction_BT given: {has_mask}, but a Q-Former of "
                f"vocab_size={config.vocab_size} takes {'both' if config.has_text_branch else 'neither'}; "
                "change that, or model.qformer_reads_prompt"
            )
        sound = self._sound(sound, image_BFPV)
        prompts = []
        if not self.trains_audio_alone:
            hidden_BFQD = self._read(image_BFPV, instruction_ids_BT, is_instruction_BT, is_frame_BF, sound)
            prompts.append(self.language_projection(hidden_BFQD).flatten(1, 2))
        if self.audio is not None and sound is not None:
            prompts.append(self.audio(sound))
        return prompts[0] if len(prompts) == 1 else torch.cat(prompts, dim=1)

    def is_prompt(self, is_frame_BF: Tensor | None, sound: Sound | None, prompts_BNL: Tensor) -> Tensor | None:
        """Which rows of `prompts_BNL`, of `forward`, the language model reads, [B, N]; None where all are read.

        Left out are those of frames that are padding, and those of sound where there is none.
        """
        batch, num_prompts = prompts_BNL.shape[:2]
        num_audio = 0 if self.audio is None else self.audio.qformer.config.num_queries
        is_read_BN = prompts_BNL.new_ones(batch, num_prompts, dtype=torch.bool)
        if is_frame_BF is not None and self.video.temporal == "concatenate" and not self.trains_audio_alone:
            num_queries = self.qformer.config.num_queries
            is_read_BN[:, : num_prompts - num_audio] = is_frame_BF.repeat_interleave(num_queries, dim=1)
        if num_audio:
            is_read_BN[:, -num_audio:] = False if sound is None else sound.is_segment_BA.any(dim=1, keepdim=True)
        return None if is_read_BN.all() else is_read_BN

    def query_outputs(self, prompts_BNL: Tensor) -> Tensor:
        """Query outputs as the language model reads them, without the bias that all of them share: [G, Q, L]."""
        branch = self.audio if self.trains_audio_alone and self.audio is not None else self
        num_queries = branch.qformer.config.num_queries
        num_audio = 0 if self.audio is None or branch is self.audio else self.audio.qformer.config.num_queries
        own_BNL = prompts_BNL[:, : prompts_BNL.shape[1] - num_audio] - branch.language_projection.bias
        return own_BNL.unflatten(1, (-1, num_queries)).flatten(0, 1)

    def _read(
        self,
        image_BFPV: Tensor,
        instruction_ids_BT: Tensor | None,
        is_instruction_BT: Tensor | None,
        is_frame_BF: Tensor | None,
        sound: Sound | None,
    ) -> Tensor:
        """Query outputs of the frames, or of the clip in place of one."""
        joint = sound if self.audio is None else None
        seen = self.perceive(image_BFPV, is_frame_BF, joint)
        frames, image = seen.tokens_BFPV.shape[1], self.qformer.image_key_values(seen.tokens_BFPV.flatten(0, 1))
        if instruction_ids_BT is None or is_instruction_BT is None:
            hidden_GQD = self.qformer.forward_queries(image, seen.is_token).hidden_BQD
        else:
            self.qformer.check_text(instruction_ids_BT, is_instruction_BT)
            if len(instruction_ids_BT) != len(image_BFPV):
                raise ValueError(
                    f"{len(instruction_ids_BT)} instructions for {len(image_BFPV)} images; give every image one"
                )
            ids_GT = instruction_ids_BT.repeat_interleave(frames, 0)
            is_text_GT = is_instruction_BT.repeat_interleave(frames, 0)
            hidden_GQD = self.qformer.forward_joint(image, ids_GT, is_text_GT, is_image=seen.is_token)
        return self.pooled(hidden_GQD.unflatten(0, (-1, frames)), seen.is_frame_BF)[0]

    def _sound(self, sound: Sound | None, image_BFPV: Tensor) -> Sound | None:
        """Checked; where no clip has any, zeros that nothing reads, so that every weight has its part in the result."""
        if self.audio_config is None:
            if sound is not None:
                raise ValueError("sound for a bridge without audio branch; leave it out, or train one (model.audio)")
            return None
        if sound is None or (self.audio is None and not sound.is_segment_BA.any()):  # an image has no segment a frame
            return Sound.absent(len(image_BFPV), self.audio_config.encoder_width, image_BFPV.device)
        sound.check(
            len(image_BFPV), image_BFPV.shape[1] if self.audio is None else None, self.audio_config.encoder_width
        )
        return sound
