"""A decoded batch to the losses of a stage: what the training loop needs to know of stage 1 and stage 2.

Dimensions: B local batch, F frames, T text tokens.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from pipelines.data.batch import SampleBatch
from qformer.bridge import instruction_inputs
from qformer.distributed import mean_over_ranks, world_size
from qformer.language import LanguageModel
from qformer.stage1 import Stage1, Stage1Batch, sampling_generator
from qformer.stage2 import Stage2
from qformer.text import TextTokenizer, pad_text


class Stage(Protocol):
    """One stage of training."""

    num_truncated: int
    """Texts of this rank that lost their last words so far."""

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
        self.trainables, self.num_truncated = trainables, 0

    def losses(self, call: Callable[..., Any], batch: SampleBatch, step: int) -> dict[str, Tensor]:
        """The three losses and their sum."""
        device = self.trainables.temperature.device
        ids_BT, mask_BT, num_truncated = self.tokenizer.encode(batch.captions)
        self.num_truncated += num_truncated
        ids_BT, mask_BT = pad_text(ids_BT, mask_BT, _longest_over_ranks(ids_BT.shape[1], device))
        inputs = Stage1Batch(
            image_BFPV=require_finite(self.encode(batch), batch),
            input_ids_BT=ids_BT.to(device),
            is_text_BT=mask_BT.to(device),
            image_ids_B=torch.from_numpy(batch.image_ids).to(device),
            is_valid_B=torch.from_numpy(batch.is_valid).to(device),
            sample_ids=tuple(batch.sample_ids),
        )
        losses = call(inputs, sampling_generator(self.seed, step, device))
        return {"total": losses.total, "itc": losses.itc, "itm": losses.itm, "itg": losses.itg}


class GenerationStage:
    """Stage 2: language modelling through the frozen LM; with a tokenizer, InstructBLIP's instruction tuning.

    Args:
        encode: See `Encode`.
        trainables: On the same device.
        language: Frozen, on the same device.
        tokenizer: Of the Q-Former's text branch, where it reads the prompt.
        prompt: Text before every caption.
        max_tokens: Longest prompt and longest caption.

    Raises:
        ValueError: If the prompt alone is longer.
    """

    def __init__(
        self,
        encode: Encode,
        trainables: Stage2,
        language: LanguageModel,
        tokenizer: TextTokenizer | None,
        *,
        prompt: str,
        max_tokens: int,
    ) -> None:
        self.encode, self.language, self.tokenizer = encode, language, tokenizer
        self.trainables, self.num_truncated = trainables, 0
        self.prompt, self.max_tokens = prompt, max_tokens
        if language.tokenize([prompt], [""], max_tokens=max_tokens).num_truncated:
            raise ValueError(f"model.prompt={prompt!r} is longer than max_text_tokens={max_tokens} tokens; raise that")

    def losses(self, call: Callable[..., Any], batch: SampleBatch, step: int) -> dict[str, Tensor]:
        """The language-modelling loss."""
        device = self.trainables.language_projection.weight.device
        prompts = [self.prompt] * len(batch.captions)
        texts = self.language.tokenize(prompts, batch.captions, max_tokens=self.max_tokens)
        self.num_truncated += texts.num_truncated
        texts = texts.without_labels(torch.from_numpy(~batch.is_valid)).to(device)
        tokens_BFPV = require_finite(self.encode(batch), batch)
        prefix_BNL = call(tokens_BFPV, *instruction_inputs(self.tokenizer, prompts, device))
        loss = mean_over_ranks(*self.language.loss(prefix_BNL, texts))
        return {"total": loss, "lm": loss}


def require_finite(tokens_BFPV: Tensor, batch: SampleBatch) -> Tensor:
    """Return the features, after a look at them.

    Raises:
        ValueError: If a valid sample's features hold NaN or inf, naming the samples.
    """
    is_bad_B = ~torch.isfinite(tokens_BFPV).flatten(1).all(dim=1).cpu() & torch.from_numpy(batch.is_valid)
    if is_bad_B.any():
        names = [name for name, is_bad in zip(batch.sample_ids, is_bad_B.tolist(), strict=True) if is_bad]
        raise ValueError(
            f"NaN or inf in the encoder's features of {len(names)} samples, first {names[:8]}, at step {batch.step}; "
            "run the encoder with precision=fp32 (or rebuild the feature cache so), or take these samples out"
        )
    return tokens_BFPV


def _longest_over_ranks(length: int, device: torch.device) -> int:
    """Ranks exchange text rows, which must be of one length."""
    if world_size() == 1:
        return length
    longest = torch.tensor(length, device=device)
    distributed.all_reduce(longest, op=distributed.ReduceOp.MAX)
    return int(longest)
