"""A decoded batch to the losses of a stage: what the training loop needs to know of stage 1 and stage 2.

Dimensions: B local batch, F frames, T text tokens.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from pipelines.data.batch import SampleBatch
from qformer.backbones import require_finite
from qformer.distributed import any_text, mean_over_ranks, world_size
from qformer.errors import UserError
from qformer.language import LanguageModel
from qformer.stage1 import Stage1, Stage1Batch, sampling_generator
from qformer.stage2 import Stage2
from qformer.text import TextTokenizer


class Stage(Protocol):
    """One stage of training."""

    num_truncated: int
    """Texts of this rank that lost their last words so far, an instruction once for each of its readers."""

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
        with _raised_by_all_ranks(device):
            ids_BT, mask_BT, num_truncated = self.tokenizer.encode(batch.captions)
            self.num_truncated += num_truncated
            inputs = Stage1Batch(
                image_BFPV=self.encode(batch),
                input_ids_BT=ids_BT.to(device),
                is_text_BT=mask_BT.to(device),
                image_ids_B=torch.from_numpy(batch.image_ids).to(device),
                is_valid_B=torch.from_numpy(batch.is_valid).to(device),
                sample_ids=tuple(batch.sample_ids),
            )
            self.trainables.check(inputs)
            require_finite(inputs.image_BFPV, inputs.is_valid_B, inputs.sample_ids)
        # Ranks exchange rows of text, which must be of one length.
        extra = _largest_over_ranks(ids_BT.shape[1], device) - ids_BT.shape[1]
        ids_BT, mask_BT = F.pad(inputs.input_ids_BT, (0, extra)), F.pad(inputs.is_text_BT, (0, extra))
        inputs = dataclasses.replace(inputs, input_ids_BT=ids_BT, is_text_BT=mask_BT)
        losses = call(inputs, sampling_generator(self.seed, step, device))
        return {"total": losses.total, "itc": losses.itc, "itm": losses.itm, "itg": losses.itg}


class GenerationStage:
    """Stage 2: language modelling through the frozen LM; with a tokenizer, InstructBLIP's instruction tuning.

    Args:
        encode: See `Encode`.
        trainables: On the same device.
        language: Frozen, on the same device.
        tokenizer: Of the Q-Former's text branch, where it reads the prompt.
        prompt: Text before every caption whose sample brings no instruction of its own.
        max_tokens: Longest prompt and longest caption.

    Raises:
        UserError: If the prompt alone is longer.
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
            raise UserError(f"model.prompt={prompt!r} is longer than max_text_tokens={max_tokens} tokens; raise that")

    def losses(self, call: Callable[..., Any], batch: SampleBatch, step: int) -> dict[str, Tensor]:
        """The language-modelling loss."""
        device = self.trainables.language_projection.weight.device
        prompts = [text or self.prompt for text in batch.instructions or [""] * len(batch.captions)]
        texts = self.language.tokenize(prompts, batch.captions, max_tokens=self.max_tokens)
        self.num_truncated += texts.num_truncated
        is_valid_B = torch.from_numpy(batch.is_valid)
        texts = texts.without_labels(~is_valid_B).to(device)
        with _raised_by_all_ranks(device):
            tokens_BFPV = self.encode(batch)
            self.trainables.qformer.check_image(tokens_BFPV, "BFPV")
            require_finite(tokens_BFPV, is_valid_B.to(device), batch.sample_ids)
        # Zeros in place of a masked sample's features: NaN there would live through a gradient of zero.
        inputs = [tokens_BFPV.masked_fill(~is_valid_B.to(device)[:, None, None, None], 0.0)]
        if self.tokenizer is not None:
            instruction = self.tokenizer.encode(prompts)
            self.num_truncated += instruction.num_truncated
            inputs += [instruction.input_ids_BT.to(device), instruction.is_text_BT.to(device)]
        prefix_BNL = call(*inputs)
        loss = mean_over_ranks(*self.language.loss(prefix_BNL, texts))
        return {"total": loss, "lm": loss}


@contextlib.contextmanager
def _raised_by_all_ranks(device: torch.device) -> Iterator[None]:
    """Let one rank's bad data end all ranks with its message: the others would wait for it in a collective."""
    mistake = None
    try:
        yield
    except ValueError as error:
        if world_size() == 1:
            raise
        mistake = error
    if _largest_over_ranks(int(mistake is not None), device):
        raise ValueError(any_text(None if mistake is None else str(mistake))) from mistake


def _largest_over_ranks(number: int, device: torch.device) -> int:
    """The largest of all ranks' numbers."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return int(largest)
