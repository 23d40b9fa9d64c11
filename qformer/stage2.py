"""Stage 2: generative learning; query outputs become soft prompts of a frozen language model.

Dimensions: B batch, F frames, G = B * F, P image tokens, V encoder width, Q queries, T instruction tokens, D hidden
width, L language-model width.
Reference: BLIP-2 (arXiv:2301.12597), section 3.3; InstructBLIP (arXiv:2305.06500), section 2.3; MiniGPT-4
(arXiv:2304.10592), section 3.
"""

from torch import Tensor, nn

from qformer.config import QFormerConfig
from qformer.lora import Lora
from qformer.model import QFormer


class Stage2(nn.Module):
    """What stage 2 trains: vision layer norm, Q-Former, projection to the LM's width, and the LM's LoRA if any.

    With a text branch (`config.vocab_size` > 0) the Q-Former reads the instruction beside the image, as InstructBLIP
    does; without, it is BLIP-2's.

    Args:
        config: Without the LM head, which only stage 1 uses.
        language_width: Width of the language model's embeddings.
        freeze_qformer: MiniGPT-4's recipe: vision norm and Q-Former stay as loaded, without dropout; the projection
            (and LoRA) alone is trained.
        lora: Low-rank updates of the language model, trained and saved with the bridge.

    Raises:
        ValueError: If the config has a text branch with an LM head.
    """

    def __init__(
        self, config: QFormerConfig, *, language_width: int, freeze_qformer: bool = False, lora: Lora | None = None
    ) -> None:
        super().__init__()
        if config.has_text_branch and config.has_lm_head:
            raise ValueError(
                f"vocab_size={config.vocab_size} with has_lm_head=True: stage 2 generates with the language model, not "
                "with the Q-Former; set has_lm_head=False (or vocab_size=0 for queries without instruction)"
            )
        self.vision_norm = nn.LayerNorm(config.encoder_width, eps=config.vision_norm_eps)
        self.qformer = QFormer(config)
        self.language_projection = nn.Linear(config.hidden_size, language_width)
        self.lora = lora
        self.freeze_qformer = freeze_qformer
        if (unread := self.qformer.layers[-1].text_ffn) is not None:
            # Queries alone become soft prompts: nothing reads the last layer's text, so its weights have no gradient.
            unread.requires_grad_(False)
        if freeze_qformer:
            self.vision_norm.requires_grad_(False)
            self.qformer.requires_grad_(False)

    def train(self, mode: bool = True) -> "Stage2":
        """Switch dropout; a frozen Q-Former stays in eval mode."""
        super().train(mode)
        if self.freeze_qformer:
            self.qformer.eval()
        return self

    def forward(
        self, image_BFPV: Tensor, instruction_ids_BT: Tensor | None = None, is_instruction_BT: Tensor | None = None
    ) -> Tensor:
        """Soft prompts of all frames in time order: [B, F*Q, L].

        Args:
            image_BFPV: Frozen encoder tokens, before the trained layer norm.
            instruction_ids_BT: Instruction in the Q-Former's own vocabulary; with a text branch only.
            is_instruction_BT: True at its real tokens.

        Raises:
            ValueError: If the image tokens are not floating [B, F, P, V] of the encoder's width, ids lie outside the
                vocabulary, or instruction, its mask and text branch do not come together.
        """
        self.qformer.check_image(image_BFPV, "BFPV")
        config, frames = self.qformer.config, image_BFPV.shape[1]
        has_ids, has_mask = instruction_ids_BT is not None, is_instruction_BT is not None
        if not has_ids == has_mask == config.has_text_branch:
            raise ValueError(
                f"instruction_ids_BT given: {has_ids}, is_instruction_BT given: {has_mask}, but a Q-Former of "
                f"vocab_size={config.vocab_size} takes {'both' if config.has_text_branch else 'neither'}; "
                "change that, or model.qformer_reads_prompt"
            )
        image = self.qformer.image_key_values(self.vision_norm(image_BFPV).flatten(0, 1))
        if instruction_ids_BT is None or is_instruction_BT is None:
            hidden_GQD = self.qformer.forward_queries(image).hidden_BQD
        else:
            self.qformer.check_text(instruction_ids_BT, is_instruction_BT)
            if len(instruction_ids_BT) != len(image_BFPV):
                raise ValueError(
                    f"{len(instruction_ids_BT)} instructions for {len(image_BFPV)} images; give every image one"
                )
            ids_GT = instruction_ids_BT.repeat_interleave(frames, 0)
            is_text_GT = is_instruction_BT.repeat_interleave(frames, 0)
            hidden_GQD = self.qformer.forward_joint(image, ids_GT, is_text_GT)
        return self.language_projection(hidden_GQD).unflatten(0, (-1, frames)).flatten(1, 2)
