"""Stage 1: representation learning of the Q-Former against a frozen encoder (ITC + ITM + ITG).

Dimensions: B local batch, N global batch, F frames (1 for an image), P image tokens, V encoder width, Q queries,
T text tokens, D hidden width, E joint embedding width, R pairs scored by ITM.
A clip is its frames' query outputs, concatenated: ITC takes the maximum over all of them, ITG decodes against all of
their caches, ITM averages its logits over them.
Reference: BLIP-2 (arXiv:2301.12597), section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.attention import KeyValue
from qformer.config import QFormerConfig
from qformer.distributed import gather, rank
from qformer.model import QFormer
from qformer.objectives import Negatives, itc_loss, itg_loss, itm_loss, sample_negatives, similarity

INITIAL_TEMPERATURE = 0.07


@dataclass(frozen=True, slots=True)
class Stage1Batch:
    """One rank's inputs of a step."""

    image_BFPV: Tensor
    """Frozen encoder tokens, before the trained layer norm."""
    input_ids_BT: Tensor
    """[CLS] ... [SEP], padded with 0."""
    is_text_BT: Tensor
    image_ids_B: Tensor
    """int64; samples with the same id share an image and are positives of each other."""
    is_valid_B: Tensor
    """False for padded and quarantined rows."""


@dataclass(frozen=True, slots=True)
class Stage1Losses:
    """Scalars of a step; `total` is their plain sum, as in the paper."""

    total: Tensor
    itc: Tensor
    itm: Tensor
    itg: Tensor


class Stage1(nn.Module):
    """The trainables of stage 1: vision layer norm, Q-Former with text branch, ITC projections, ITM head, temperature.

    Args:
        config: Must have a text branch; its last vocabulary id is [DEC].
        lavis_reduction: Match LAVIS: gathered features carry no gradient and ITG averages over each rank's own tokens.
            The default keeps the gradient and averages over all ranks, which equals one process on the joined batch.

    Raises:
        ValueError: If the config has no text branch.
    """

    def __init__(self, config: QFormerConfig, *, lavis_reduction: bool = False) -> None:
        super().__init__()
        if not config.has_text_branch:
            raise ValueError("stage 1 needs a text branch: set vocab_size to the tokenizer's size plus one for [DEC]")
        self.lavis_reduction = lavis_reduction
        self.vision_norm = nn.LayerNorm(config.encoder_width, eps=config.vision_norm_eps)
        self.qformer = QFormer(config)
        self.vision_projection = nn.Linear(config.hidden_size, config.embed_dim)
        self.text_projection = nn.Linear(config.hidden_size, config.embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))

    @property
    def dec_id(self) -> int:
        """Id of [DEC], the token that starts ITG's text."""
        return self.qformer.config.vocab_size - 1

    def forward(
        self, batch: Stage1Batch, generator: torch.Generator | None = None, negatives: Negatives | None = None
    ) -> Stage1Losses:
        """All three losses of one step; the gradient of `total` averaged over ranks is the joined batch's.

        Args:
            batch: Every rank must bring equally many samples and frames.
            generator: Randomness of the hard negatives.
            negatives: Use these instead of drawing (for comparison with recorded runs).
        """
        frames = batch.image_BFPV.shape[1]
        tokens_BFPV = self.vision_norm(batch.image_BFPV)
        image = self.qformer.image_key_values(tokens_BFPV.flatten(0, 1))
        queries = self.qformer.forward_queries(image)
        queries_BQE = self.embed_queries(queries.hidden_BQD, frames)
        text_BE = self.embed_text(batch.input_ids_BT, batch.is_text_BT)

        with_gradient = not self.lavis_reduction
        scores_i2t_BN = similarity(queries_BQE, gather(text_BE, with_gradient=with_gradient)) / self.temperature
        all_queries_NQE = gather(queries_BQE, with_gradient=with_gradient)
        scores_t2i_BN = similarity(all_queries_NQE, text_BE).T / self.temperature
        is_valid_N = gather(batch.is_valid_B, with_gradient=False)
        is_positive_BN = batch.image_ids_B[:, None] == gather(batch.image_ids_B, with_gradient=False)[None]
        itc_i2t = itc_loss(scores_i2t_BN, is_positive_BN, batch.is_valid_B, is_valid_N)
        itc_t2i = itc_loss(scores_t2i_BN, is_positive_BN, batch.is_valid_B, is_valid_N)

        if negatives is None:
            negatives = sample_negatives(scores_i2t_BN, scores_t2i_BN, is_positive_BN, is_valid_N, generator)
        itm = self._itm(batch, tokens_BFPV, image, negatives)
        itg = self._itg(batch, queries.cache, frames)
        itc = (itc_i2t + itc_t2i) / 2
        return Stage1Losses(itc + itm + itg, itc, itm, itg)

    def embed_queries(self, hidden_GQD: Tensor, frames: int) -> Tensor:
        """L2-normalised query embeddings of all frames: [B, F*Q, E] from [B*F, Q, D]."""
        embedded_GQE = F.normalize(self.vision_projection(hidden_GQD).float(), dim=-1)
        return embedded_GQE.unflatten(0, (-1, frames)).flatten(1, 2)

    def embed_text(self, input_ids_BT: Tensor, is_text_BT: Tensor) -> Tensor:
        """L2-normalised embedding of the text's [CLS]: [B, E]."""
        cls_BD = self.qformer.forward_text(input_ids_BT, is_text_BT)[:, 0]
        return F.normalize(self.text_projection(cls_BD).float(), dim=-1)

    def match_logits(
        self, image: Sequence[KeyValue | None], input_ids_RT: Tensor, is_text_RT: Tensor, frames: int
    ) -> Tensor:
        """ITM logits, the mean over all frames' queries: [R, 2]; class 1 is "match".

        Args:
            image: Cross-attention keys and values of R*F frames.
            input_ids_RT: One text a pair.
            is_text_RT: Its mask.
            frames: F.
        """
        hidden_GSD = self.qformer.forward_joint(
            image, input_ids_RT.repeat_interleave(frames, 0), is_text_RT.repeat_interleave(frames, 0)
        )
        logits_GQ2 = self.itm_head(hidden_GSD[:, : self.qformer.config.num_queries])
        return logits_GQ2.unflatten(0, (-1, frames)).mean(dim=(1, 2))

    def _itm(
        self, batch: Stage1Batch, tokens_BFPV: Tensor, image: list[KeyValue | None], negatives: Negatives
    ) -> Tensor:
        """Pairs in LAVIS' order: (image, text), (negative image, text), (image, negative text)."""
        frames = tokens_BFPV.shape[1]
        all_tokens_NFPV = gather(tokens_BFPV, with_gradient=True)
        negative_image = self.qformer.image_key_values(all_tokens_NFPV[negatives.image_B].flatten(0, 1))
        pairs: list[KeyValue | None] = [
            None
            if own is None or negative is None
            else KeyValue(
                torch.cat([own.keys_BHNK, negative.keys_BHNK, own.keys_BHNK]),
                torch.cat([own.values_BHNK, negative.values_BHNK, own.values_BHNK]),
            )
            for own, negative in zip(image, negative_image, strict=True)
        ]
        ids_BT, mask_BT = batch.input_ids_BT, batch.is_text_BT
        negative_ids_BT = gather(ids_BT, with_gradient=False)[negatives.text_B]
        negative_mask_BT = gather(mask_BT, with_gradient=False)[negatives.text_B]
        logits_R2 = self.match_logits(
            pairs,
            torch.cat([ids_BT, ids_BT, negative_ids_BT]),
            torch.cat([mask_BT, mask_BT, negative_mask_BT]),
            frames,
        )
        valid_B = batch.is_valid_B
        has_negative_B = valid_B & negatives.has_negative_B
        is_match_R = torch.cat([torch.ones_like(valid_B), torch.zeros_like(valid_B), torch.zeros_like(valid_B)])
        return itm_loss(logits_R2, is_match_R, torch.cat([valid_B, has_negative_B, has_negative_B]))

    def _itg(self, batch: Stage1Batch, cache: list[KeyValue], frames: int) -> Tensor:
        """Text decoded against the cached keys and values of all frames' queries."""
        is_label_BT = batch.is_text_BT.bool() & batch.is_valid_B[:, None]
        labels_BT = batch.input_ids_BT.masked_fill(~is_label_BT, -100)
        decoder_ids_BT = batch.input_ids_BT.clone()
        decoder_ids_BT[:, 0] = self.dec_id
        logits_BTV = self.qformer.decode_text(
            decoder_ids_BT, batch.is_text_BT, [_join_frames(kv, frames) for kv in cache]
        )
        return itg_loss(logits_BTV, labels_BT, per_rank=self.lavis_reduction)


def _join_frames(cached: KeyValue, frames: int) -> KeyValue:
    """[B*F, H, Q, K] to [B, H, F*Q, K], frames in time order."""
    if frames == 1:
        return cached

    def join(states_GHQK: Tensor) -> Tensor:
        return states_GHQK.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2, 3)

    return KeyValue(join(cached.keys_BHNK), join(cached.values_BHNK))


def sampling_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Randomness of one step's hard negatives on this rank: a function of (seed, step, rank) alone."""
    generator = torch.Generator(device=device)
    return generator.manual_seed((seed * 1_000_003 + step) * 65_537 + rank())
