"""Probe of a checkpoint: its scores of true and permuted pairs, and statistics of its queries.

Dimensions: B pairs, K of them whose text also gets a wrong image, F frames, P image tokens, V encoder width, N = F * Q
queries of a sample, E joint width, G frames of several samples, L language-model width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipelines.evaluation.doctor.pairs import PairBatch
from pipelines.inference.models import Captioner, Retriever
from qformer.analysis.image_use import USED_GAIN_NATS, PairedFigures, answer_losses, compare_pairs, permute_images
from qformer.analysis.query_use import QueryFigures, QueryStatistics
from qformer.bridges.audio_branch import Sound
from qformer.objectives import similarity


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFigures:
    """Figures of a probe."""

    measures: dict[str, PairedFigures]
    """Comparisons by loss term: "itc" (similarity) and "itm" (match probability) in stage 1, "lm" (loss per token) in
    stage 2."""
    picked: float | None
    """Stage 1: share of images whose own text is the most similar one of the batch."""
    picked_chance: float | None
    """Stage 1: the same share for a random choice."""
    unread_queries: list[int]
    """Stage 1: queries that were never the most similar one to a text; also common in a healthy model."""
    queries: QueryFigures | None
    num_texts: int
    num_truncated: int
    """Number of truncated texts."""


@dataclass(slots=True)
class _Sums:
    """Accumulated scores of the batches."""

    true: dict[str, list[Tensor]] = field(default_factory=dict)
    permuted: dict[str, list[Tensor]] = field(default_factory=dict)
    queries: QueryStatistics = field(default_factory=QueryStatistics)
    num_texts: int = 0
    num_truncated: int = 0

    def add(self, name: str, true_K: Tensor, permuted_K: Tensor) -> None:
        """Add the scores of K texts with their own image and with another one."""
        self.true.setdefault(name, []).append(true_K.float().cpu())
        self.permuted.setdefault(name, []).append(permuted_K.float().cpu())

    def compare(self, *, lower_is_better: bool, least_gain: float = 0.0) -> dict[str, PairedFigures]:
        """Compare true with permuted pairs, for each measure."""
        joined = {name: (torch.cat(parts), torch.cat(self.permuted[name])) for name, parts in self.true.items()}
        return {
            name: compare_pairs(*pair, lower_is_better=lower_is_better, least_gain=least_gain)
            for name, pair in joined.items()
        }


@torch.no_grad()
def probe_retriever(retriever: Retriever, batches: Iterable[PairBatch], seed: int) -> ModelFigures:
    """Probe a stage-1 model.

    Args:
        retriever: Model to probe.
        batches: Pairs of image and text.
        seed: Seed of the permutations.
    """
    stage1, generator = retriever.stage1, torch.Generator().manual_seed(seed)
    sums = _Sums()
    num_queries = 0
    is_picked: list[Tensor] = []
    chances: list[Tensor] = []
    best: set[int] = set()
    for batch in batches:
        device = stage1.temperature.device
        tokens_BFPV = retriever.encoder.features(batch.pixels_BFCYX.to(device))
        is_frame_BF = batch.frame_valid_BF.to(device)
        image = retriever.encode_tokens(tokens_BFPV, is_frame_BF)
        passes, queries_BNE = image.reading.passes, image.queries_BNE
        num_queries = passes.hidden_GQD.shape[1]
        text_BE = retriever.embed_text(batch.captions)
        scores_BB = similarity(queries_BNE, text_BE)  # image by text
        is_positive_BB = ~batch.may_swap_BB.T.to(device)
        own = torch.arange(len(scores_BB), device=device)
        is_picked.append(is_positive_BB[own, scores_BB.argmax(dim=1)].float())
        chances.append(is_positive_BB.float().mean(dim=1))
        nearest_B = torch.einsum("bne,be->bn", queries_BNE, text_BE).argmax(dim=1) % num_queries
        best |= set(nearest_B.tolist())
        sums.num_texts += len(batch.captions)
        sums.num_truncated += retriever.tokenizer.encode(batch.captions).num_truncated
        text_K, other_K = _negative_images(batch, generator, device)
        if len(text_K):
            texts = [batch.captions[text] for text in text_K.tolist()]
            sums.add("itc", scores_BB[text_K, text_K], scores_BB[other_K, text_K])
            true_K, permuted_K = (
                retriever.match(tokens_BFPV[index_K], texts, is_frame_BF[index_K]) for index_K in (text_K, other_K)
            )
            sums.add("itm", true_K, permuted_K)
            hidden_BFQD = passes.hidden_GQD.unflatten(0, (len(queries_BNE), -1))
            sums.queries.add(*_both_real(hidden_BFQD, passes.frame_mask, text_K, other_K))
    return ModelFigures(
        measures=sums.compare(lower_is_better=False),
        picked=float(torch.cat(is_picked).mean()) if is_picked else None,
        picked_chance=float(torch.cat(chances).mean()) if chances else None,
        unread_queries=sorted(set(range(num_queries)) - best),
        queries=sums.queries.figures(),
        num_texts=sums.num_texts,
        num_truncated=sums.num_truncated,
    )


@torch.no_grad()
def probe_captioner(captioner: Captioner, batches: Iterable[PairBatch], seed: int) -> ModelFigures:
    """Probe a stage-2 model.

    Args:
        captioner: Model to probe.
        batches: Pairs of image and text.
        seed: Seed of the permutations.
    """
    stage2, language, info = captioner.stage2, captioner.language, captioner.info
    generator, sums = torch.Generator().manual_seed(seed), _Sums()
    device = stage2.language_projection.weight.device
    for batch in batches:
        text_K, other_K = _negative_images(batch, generator, device)
        sums.num_texts += len(batch.captions)
        if not len(text_K):
            continue
        captions = [batch.captions[text] for text in text_K.tolist()]
        prompts = [batch.instructions[text] or info.prompt for text in text_K.tolist()]
        answers = language.tokenize(prompts, captions, max_tokens=info.max_text_tokens)
        sums.num_truncated += answers.num_truncated
        tokens_BFPV = captioner.encoder.features(batch.pixels_BFCYX.to(device))
        answers, is_frame_BF = answers.to(device), batch.frame_valid_BF.to(device)
        sound = captioner.encode_audio(batch.audio, device)
        outputs, masks, losses = [], [], []
        for index_K in (text_K, other_K):
            of_these = sound and Sound(*(tensor[index_K] for tensor in sound))
            read = captioner.read(tokens_BFPV[index_K], prompts, is_frame_BF[index_K], of_these)
            losses.append(answer_losses(language, read.prompts_BNL, answers, read.is_prompt_BN))
            outputs.append(stage2.query_outputs(read))
            masks.append(read.is_output_BS)
        sums.add("lm", *losses)
        sums.queries.add(*_where_both(*outputs, *masks))
    return ModelFigures(
        measures=sums.compare(lower_is_better=True, least_gain=USED_GAIN_NATS),
        picked=None,
        picked_chance=None,
        unread_queries=[],
        queries=sums.queries.figures(),
        num_texts=sums.num_texts,
        num_truncated=sums.num_truncated,
    )


def _both_real(
    hidden_BFQD: Tensor, is_frame_BF: Tensor | None, text_K: Tensor, other_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Query outputs of the frames that are real in both of two clips, [G, Q, D] each."""
    masks = (None, None) if is_frame_BF is None else (is_frame_BF[text_K], is_frame_BF[other_K])
    return _where_both(hidden_BFQD[text_K].flatten(0, 1), hidden_BFQD[other_K].flatten(0, 1), *masks)


def _where_both(
    own_GQD: Tensor, other_GQD: Tensor, is_own_BS: Tensor | None, is_other_BS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sets of query outputs that are read on both sides."""
    if is_own_BS is None or is_other_BS is None:
        return own_GQD, other_GQD
    is_both_G = (is_own_BS & is_other_BS).flatten()
    return own_GQD[is_both_G], other_GQD[is_both_G]


def _negative_images(batch: PairBatch, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the texts that get a wrong image, and of those images."""
    image_B = permute_images(batch.may_swap_BB, generator)
    text_K = (image_B >= 0).nonzero().flatten()
    return text_K.to(device), image_B[text_K].to(device)
