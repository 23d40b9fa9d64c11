"""A decoded batch to the losses of a stage and their gradient: what the loop needs to know of stage 1 and stage 2.

Dimensions: B local batch, F frames, T text tokens, G frames of several samples, Q queries, D their width.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from pipelines.data.batches.batch import SampleBatch
from pipelines.training.step.objective import Objective
from pipelines.training.step.precision import Precision
from qformer.analysis.queries import mean_cosine
from qformer.backbones import require_finite
from qformer.bridges.audio_branch import Sound
from qformer.bridges.protocol import BridgeText
from qformer.distributed import any_text, gather, mean_over_ranks, world_size
from qformer.errors import NotFiniteError, UserError
from qformer.language import IGNORED, LanguageModel
from qformer.objectives.gradient_cache import cached_losses
from qformer.objectives.losses import DIVERSITY, diversity_loss
from qformer.objectives.stage1 import Stage1, Stage1Batch
from qformer.objectives.stage2 import SoftPrompts, Stage2, encode_instructions
from qformer.text import TextTokenizer


class Outcome(NamedTuple):
    """What came of a step, without gradient; of this rank's share, and a mean over ranks once that is taken."""

    losses: dict[str, Tensor]
    """Terms by name, before their weights."""
    query_cosine: Tensor
    """Mean cosine between an image's query outputs."""
    num_samples: Tensor
    """Valid ones, on all ranks: what chance levels depend on."""


class Stage(Protocol):
    """One stage of training."""

    num_truncated: int
    """Texts of this rank that lost their last words so far, an instruction once for each of its readers."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms, `DIVERSITY` among them."""

    @property
    def trainables(self) -> nn.Module:
        """What the optimizer moves."""

    def backward(
        self, call: Callable[..., Any], batch: SampleBatch, noise_key: int, objective: Objective, precision: Precision
    ) -> Outcome:
        """Compute the losses and add their gradient to the trainables'.

        Args:
            call: The trainables, or DDP around them; with `micro_batch` the trainables alone, and the caller averages
                gradients over ranks.
            batch: This rank's share of the step.
            noise_key: Keys the step's randomness; the same on every rank.
            objective: Weighs the terms.
            precision: Number format of the forward computations.
        """


Encode = Callable[[SampleBatch], Tensor]
"""A batch to the frozen encoder's tokens_BFPV, fp32 on the training device: run now, or read from a feature cache."""
EncodeAudio = Callable[[SampleBatch], Sound | None]
"""A batch to the frozen audio encoder's vectors, run now or read from a cache; None where no sound was asked for."""


class RepresentationStage:
    """Stage 1: ITC + ITM + ITG.

    Args:
        encode: See `Encode`.
        trainables: On the same device.
        tokenizer: Tokenizer of the Q-Former's text branch.
        micro_batch: Most samples that have a graph at a time, by gradient caching; None: all.
    """

    def __init__(
        self, encode: Encode, trainables: Stage1, tokenizer: TextTokenizer, micro_batch: int | None = None
    ) -> None:
        self.encode, self.tokenizer, self.micro_batch = encode, tokenizer, micro_batch
        self.trainables, self.num_truncated, self.terms = trainables, 0, trainables.term_names

    def backward(
        self, call: Callable[..., Any], batch: SampleBatch, noise_key: int, objective: Objective, precision: Precision
    ) -> Outcome:
        """See `Stage.backward`."""
        inputs = self._inputs(batch, precision)
        if self.micro_batch is not None:
            losses = cached_losses(
                self.trainables,
                inputs,
                micro_batch=self.micro_batch,
                noise_key=noise_key,
                backward=objective.backward,
                autocast=precision.autocast,
            )
        else:
            with precision.autocast():
                losses = call(inputs, noise_key=noise_key)
            objective.backward(losses.terms)
        return _outcome(losses.terms, losses.passes.hidden_GQD, inputs.is_valid_B, losses.passes.frame_mask)

    def _inputs(self, batch: SampleBatch, precision: Precision) -> Stage1Batch:
        device = self.trainables.temperature.device
        with _raised_by_all_ranks(device) as longest:
            ids_BT, mask_BT, num_truncated = self.tokenizer.encode(batch.captions)
            self.num_truncated += num_truncated
            longest.number = ids_BT.shape[1]
            parts = _parts(batch, self.micro_batch)
            with precision.autocast():
                image_BFPV = torch.cat([self.encode(_rows(batch, part)) for part in parts])
            inputs = Stage1Batch(
                image_BFPV=image_BFPV,
                input_ids_BT=ids_BT.to(device),
                is_text_BT=mask_BT.to(device),
                image_ids_B=torch.from_numpy(batch.image_ids).to(device),
                is_valid_B=torch.from_numpy(batch.is_valid).to(device),
                sample_ids=tuple(batch.sample_ids),
                is_frame_BF=_is_frame(batch, device),
            )
            self.trainables.check(inputs)
            require_finite(inputs.image_BFPV, inputs.is_valid_B, inputs.sample_ids)
        # Ranks exchange rows of text, which must be of one length.
        extra = longest.number - ids_BT.shape[1]
        ids_BT, mask_BT = F.pad(inputs.input_ids_BT, (0, extra)), F.pad(inputs.is_text_BT, (0, extra))
        return dataclasses.replace(inputs, input_ids_BT=ids_BT, is_text_BT=mask_BT)


class GenerationStage:
    """Stage 2: language modelling through the frozen LM; with a tokenizer, InstructBLIP's instruction tuning.

    Args:
        encode: See `Encode`.
        trainables: On the same device.
        language: Frozen, on the same device.
        tokenizer: Tokenizer of the Q-Former's text branch, where it reads the prompt.
        prompt: Text before every caption whose sample brings no instruction of its own.
        max_tokens: Longest prompt and longest caption.
        micro_batch: Most samples that have a graph at a time, whose gradients are added up; None: all.
        encode_audio: See `EncodeAudio`; where the bridge reads sound.

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
        micro_batch: int | None = None,
        encode_audio: EncodeAudio | None = None,
    ) -> None:
        self.encode, self.language, self.tokenizer, self.encode_audio = encode, language, tokenizer, encode_audio
        self.trainables, self.num_truncated, self.terms = trainables, 0, trainables.term_names
        self.prompt, self.max_tokens, self.micro_batch = prompt, max_tokens, micro_batch
        if language.tokenize([prompt], [""], max_tokens=max_tokens).num_truncated:
            raise UserError(f"model.prompt={prompt!r} is longer than max_text_tokens={max_tokens} tokens; raise that")

    def backward(
        self, call: Callable[..., Any], batch: SampleBatch, noise_key: int, objective: Objective, precision: Precision
    ) -> Outcome:
        """See `Stage.backward`."""
        device = self.trainables.language_projection.weight.device
        asked = [text or self.prompt for text in batch.instructions or [""] * len(batch.captions)]
        texts = self.language.tokenize(asked, batch.captions, max_tokens=self.max_tokens)
        self.num_truncated += texts.num_truncated
        valid_B = torch.from_numpy(self._is_read(batch)).to(device)
        texts = texts.to(device).without_labels(~valid_B)
        text, num_truncated = encode_instructions(self.tokenizer, asked, device)
        self.num_truncated += num_truncated
        one = torch.ones((), device=device)
        share = mean_over_ranks(one, (texts.labels_BT != IGNORED).sum())
        share_of_row = mean_over_ranks(one, valid_B.sum())
        parts = _parts(batch, self.micro_batch)
        shares = self._own_shares(batch, parts, text, noise_key, precision)
        sums: dict[str, Tensor] = {name: torch.zeros((), device=device) for name in self.terms}
        hidden: list[Tensor] = []
        masks: list[Tensor] = []
        for part in parts:
            with precision.autocast():
                prompts = self._read(call, batch, part, text, noise_key)
                total, _ = self.language.loss(prompts.prompts_BNL, texts.rows(part), prompts.is_prompt_BN)
            outputs_GQL = self.trainables.query_outputs(prompts)
            diversity, _ = diversity_loss(outputs_GQL, valid_B[part], prompts.is_output_BS)
            terms = {"lm": total * share, DIVERSITY: diversity * share_of_row}
            terms |= {name: term.total * shares[name] for name, term in prompts.terms.items()}
            objective.backward(terms)
            sums = {name: sums[name] + value.detach() for name, value in terms.items()}
            hidden.append(outputs_GQL.detach())
            masks += [] if prompts.is_output_BS is None else [prompts.is_output_BS]
        return _outcome(sums, torch.cat(hidden), valid_B, torch.cat(masks) if masks else None)

    def _read(
        self, call: Callable[..., Any], batch: SampleBatch, part: slice, text: BridgeText | None, draw: int
    ) -> SoftPrompts:
        """Soft prompts of some rows."""
        device, some = self.trainables.language_projection.weight.device, _rows(batch, part)
        tokens_BFPV = self._tokens(some, device)
        with _raised_by_all_ranks(device):
            sound = None if self.encode_audio is None else self.encode_audio(some)
        instructions, is_frame_BF = None if text is None else text.rows(part), _is_frame(some, device)
        is_valid_B = torch.from_numpy(some.is_valid).to(device)
        return call(tokens_BFPV, instructions, is_frame_BF, sound, draw, is_valid_B)

    @torch.no_grad()
    def _own_shares(
        self, batch: SampleBatch, parts: list[slice], text: BridgeText | None, draw: int, precision: Precision
    ) -> dict[str, Tensor]:
        """What turns the bridge's own terms, summed over some rows of this rank, into shares of means over all ranks'.

        Their items are counted in a pass without gradient, for a bridge that has terms alone.
        """
        if not (names := self.trainables.bridge.config.term_names):
            return {}
        device = self.trainables.language_projection.weight.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), precision.autocast():
            found = [self._read(self.trainables, batch, part, text, draw).terms for part in parts]
        one = torch.ones((), device=device)
        counts = {name: torch.stack([terms[name].num_items for terms in found]).sum() for name in names}
        return {name: mean_over_ranks(one, count) for name, count in counts.items()}

    def _tokens(self, batch: SampleBatch, device: torch.device) -> Tensor:
        is_valid_B = torch.from_numpy(batch.is_valid).to(device)
        with _raised_by_all_ranks(device):
            tokens_BFPV = self.encode(batch)
            self.trainables.bridge.check(tokens_BFPV)
            require_finite(tokens_BFPV, is_valid_B, batch.sample_ids)
        # Zeros in place of a masked sample's features: NaN there would live through a gradient of zero.
        return tokens_BFPV.masked_fill(~is_valid_B[:, None, None, None], 0.0)

    def _is_read(self, batch: SampleBatch) -> NDArray[np.bool_]:
        """Samples that count: where sound alone is read, those that have some."""
        if not self.trainables.trains_audio_alone:
            return batch.is_valid
        has_sound_B = np.zeros_like(batch.is_valid) if batch.audio_valid is None else batch.audio_valid.any(axis=1)
        return batch.is_valid & has_sound_B


def _parts(batch: SampleBatch, micro_batch: int | None) -> list[slice]:
    size = micro_batch or len(batch.sample_ids)
    return [slice(start, start + size) for start in range(0, len(batch.sample_ids), size)]


def _rows(batch: SampleBatch, part: slice) -> SampleBatch:
    """Some rows of a batch, for an encoder."""
    return dataclasses.replace(
        batch,
        sample_ids=batch.sample_ids[part],
        is_valid=batch.is_valid[part],
        images=batch.images[part],
        frame_valid=batch.frame_valid[part],
        audio=None if batch.audio is None else batch.audio[part],
        audio_valid=None if batch.audio_valid is None else batch.audio_valid[part],
    )


def _is_frame(batch: SampleBatch, device: torch.device) -> Tensor | None:
    """Frames of clips that are no padding; None for images. One step's batches are of one kind on all ranks."""
    return torch.from_numpy(batch.frame_valid).to(device) if batch.frame_valid.shape[1] > 1 else None


def _outcome(terms: Mapping[str, Tensor], hidden_GQD: Tensor, valid_B: Tensor, is_output_BS: Tensor | None) -> Outcome:
    valid_G = valid_B.repeat_interleave(len(hidden_GQD) // len(valid_B))
    if is_output_BS is not None:
        valid_G = valid_G & is_output_BS.flatten()
    cosine = mean_cosine(hidden_GQD.detach()).masked_fill(~valid_G, 0.0).sum()
    num_samples = gather(valid_B, with_gradient=False).sum()
    return Outcome(
        {name: value.detach() for name, value in terms.items()}, mean_over_ranks(cosine, valid_G.sum()), num_samples
    )


@dataclasses.dataclass(slots=True)
class _Largest:
    """A number of this rank; after `_raised_by_all_ranks` the largest of all ranks'."""

    number: int = 0


@contextlib.contextmanager
def _raised_by_all_ranks(device: torch.device) -> Iterator[_Largest]:
    """Let one rank's bad data end all ranks with its message: the others would wait for it in a collective.

    Yields:
        For a number that the ranks must agree on, which costs no exchange of its own.
    """
    mistake, largest = None, _Largest()
    if world_size() == 1:
        yield largest
        return
    try:
        yield largest
    except ValueError as error:
        mistake = error
    grade = 0 if mistake is None else 1 if isinstance(mistake, NotFiniteError) else 2
    numbers = torch.tensor([grade, largest.number], device=device)
    distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
    worst, largest.number = numbers.tolist()
    if worst:
        text = any_text(str(mistake) if grade == worst else None)
        raise (NotFiniteError if worst == 1 else ValueError)(text) from mistake
