"""A decoded batch to the losses of a stage: what the training loop needs to know of stage 1 and stage 2.

Dimensions: B local batch, F frames, T text tokens.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from pipelines.data.batch import SampleBatch
from qformer.distributed import mean_over_ranks, world_size
from qformer.stage1 import Stage1, Stage1Batch, sampling_generator
from qformer.stage2 import Stage2, caption_ids, language_logits, language_loss
from qformer.text import TextTokenizer, pad_text


class Stage(Protocol):
    """One stage of training."""

    @property
    def trainables(self) -> nn.Module:
        """What the optimizer moves."""

    def losses(self, call: Callable[..., Any], batch: SampleBatch, step: int) -> dict[str, Tensor]:
        """Loss terms by name, "total" among them.

        Args:
            call: The trainables, or DDP around them.
            batch: This rank's share of the step.
            step: Keys the step's randomness.
        """


Encode = Callable[[SampleBatch], Tensor]
"""A batch to the frozen encoder's tokens_BFPV, fp32 on the training device: run now, or read from a feature cache."""


class RepresentationStage:
    """Stage 1: ITC + ITM + ITG.

    Args:
        encode: See `Encode`.
        trainables: On the same device.
        tokenizer: Of the Q-Former's text branch.
        seed: Of the run.
    """

    def __init__(self, encode: Encode, trainables: Stage1, tokenizer: TextTokenizer, seed: int) -> None:
        self.encode, self.tokenizer, self.seed = encode, tokenizer, seed
        self.trainables = trainables

    def losses(self, call: Callable[..., Any], batch: SampleBatch, step: int) -> dict[str, Tensor]:
        """The three losses and their sum."""
        device = self.trainables.temperature.device
        ids_BT, mask_BT = self.tokenizer.encode(batch.captions)
        ids_BT, mask_BT = pad_text(ids_BT, mask_BT, _longest_over_ranks(ids_BT.shape[1], device))
        inputs = Stage1Batch(
            image_BFPV=self.encode(batch),
            input_ids_BT=ids_BT.to(device),
            is_text_BT=mask_BT.to(device),
            image_ids_B=torch.from_numpy(batch.image_ids).to(device),
            is_valid_B=torch.from_numpy(batch.is_valid).to(device),
            sample_ids=tuple(batch.sample_ids),
        )
        losses = call(inputs, sampling_generator(self.seed, step, device))
        return {"total": losses.total, "itc": losses.itc, "itm": losses.itm, "itg": losses.itg}


class GenerationStage:
    """Stage 2: language modelling through the frozen LM.

    Args:
        encode: See `Encode`.
        trainables: On the same device.
        language: Frozen Hugging Face causal LM on the same device.
        tokenizer: The LM's.
        prompt: Text before every caption.
        max_tokens: Longest text.
    """

    def __init__(
        self,
        encode: Encode,
        trainables: Stage2,
        language: nn.Module,
        tokenizer: Any,
        *,
        prompt: str,
        max_tokens: int,
    ) -> None:
        self.encode, self.language, self.tokenizer = encode, language, tokenizer
        self.trainables = trainables
        self.prompt, self.max_tokens = prompt, max_tokens

    def losses(self, call: Callable[..., Any], batch: SampleBatch, step: int) -> dict[str, Tensor]:
        """The language-modelling loss."""
        device = self.trainables.language_projection.weight.device
        ids_BT, mask_BT, labels_BT = caption_ids(
            self.tokenizer, batch.captions, prompt=self.prompt, max_tokens=self.max_tokens
        )
        labels_BT[torch.from_numpy(~batch.is_valid)] = -100
        prefix_BQL = call(self.encode(batch))
        logits_BSV = language_logits(self.language, prefix_BQL, ids_BT.to(device), mask_BT.to(device))
        loss = mean_over_ranks(*language_loss(logits_BSV, labels_BT.to(device)))
        return {"total": loss, "lm": loss}


def _longest_over_ranks(length: int, device: torch.device) -> int:
    """Ranks exchange text rows, which must be of one length."""
    if world_size() == 1:
        return length
    longest = torch.tensor(length, device=device)
    distributed.all_reduce(longest, op=distributed.ReduceOp.MAX)
    return int(longest)
