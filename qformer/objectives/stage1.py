"""Stage 1: representation learning of the Q-Former against a frozen encoder (ITC + ITM + ITG).

Dimensions: B local batch, N global batch, F frames (1 for an image), P image tokens, V encoder width, Q queries,
T text tokens, D hidden width, E joint embedding width, R pairs scored by ITM, G frames of several samples, M rows
fetched from other ranks (images) or tokens that predict another (text).
Where frames are not joined (`qformer.bridges`), a clip is its frames' query outputs, concatenated: ITC takes the
maximum over all of them (or over their mean), ITG decodes against all of their caches, ITM averages its logits over
them.
Reference: BLIP-2 (arXiv:2301.12597), section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.attention import KeyValue
from qformer.backbones import require_finite
from qformer.bridges.clip_reader import ClipReader
from qformer.bridges.config import VideoConfig
from qformer.bridges.frames import Seen, mean_over_frames, without_padding
from qformer.config import QFormerConfig
from qformer.distributed import fetch_rows, gather, mean_over_ranks, rank, world_size
from qformer.objectives import Negatives, PairNoise, itc_loss, itg_loss, itm_loss, sample_negatives, similarity

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
    sample_ids: Sequence[str] = ()
    """Names for error messages, "" for rows that pad this rank's share; may be left out."""
    is_frame_BF: Tensor | None = None
    """False at frames that only pad their clip, which change nothing; None: none does. The same on every rank."""


@dataclass(frozen=True, slots=True)
class Stage1Losses:
    """Scalars of a step; `total` is their plain sum, as in the paper."""

    total: Tensor
    itc: Tensor
    itm: Tensor
    itg: Tensor
    hidden_GQD: Tensor
    """What the queries came out as, for those who watch them."""
    is_frame_BF: Tensor | None = None
    """Of separate frames: False at padding, whose outputs mean nothing."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the objectives share: the two unimodal passes."""

    seen: Seen
    image: list[KeyValue | None]
    """Cross-attention keys and values of all frames."""
    hidden_GQD: Tensor
    cache: list[KeyValue]
    """Self-attention keys and values of the queries."""
    queries_BQE: Tensor
    text_BE: Tensor


@dataclass(frozen=True, slots=True)
class Others:
    """What each sample's image and text do not match."""

    image: list[KeyValue | None]
    """As `Encoded.image`, of each text's negative image."""
    is_image: Tensor | None
    """As `Seen.is_token`, and below as `Seen.is_frame_BF`, of the same images."""
    is_frame_BF: Tensor | None
    input_ids_BT: Tensor
    """Of each image's negative text."""
    is_text_BT: Tensor
    has_negative_B: Tensor


class Stage1(ClipReader):
    """The trainables of stage 1: vision layer norm, Q-Former with text branch, ITC projections, ITM head, temperature.

    Args:
        config: Must have a text branch; its last vocabulary id is [DEC].
        lavis_reduction: Match LAVIS: gathered features carry no gradient and ITG averages over each rank's own tokens.
            The default keeps the gradient and averages over all ranks, which equals one process on the joined batch.
        video: See `ClipReader`.

    Raises:
        ValueError: If the config has no text branch.
    """

    def __init__(
        self, config: QFormerConfig, *, lavis_reduction: bool = False, video: VideoConfig | None = None
    ) -> None:
        if not config.has_text_branch:
            raise ValueError("stage 1 needs a text branch: set vocab_size to the tokenizer's size plus one for [DEC]")
        super().__init__(config, video)
        self.lavis_reduction = lavis_reduction
        self.vision_projection = nn.Linear(config.hidden_size, config.embed_dim)
        self.text_projection = nn.Linear(config.hidden_size, config.embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))

    @property
    def dec_id(self) -> int:
        """Id of [DEC], the token that starts ITG's text."""
        return self.qformer.config.vocab_size - 1

    def forward(self, batch: Stage1Batch, *, noise_key: int = 0, negatives: Negatives | None = None) -> Stage1Losses:
        """All three losses of one step; the gradient of `total` averaged over ranks is the joined batch's.

        Args:
            batch: Every rank must bring equally many samples and frames, and text padded to one length.
            noise_key: Of the hard negatives' `PairNoise`; the same on every rank.
            negatives: Use these instead of drawing (for comparison with recorded runs).

        Raises:
            ValueError: If the batch does not fit the model, or its features hold NaN or infinity.
        """
        self.check(batch)
        encoded = self.encode(batch)
        itc, drawn = self.contrast(batch, encoded.queries_BQE, encoded.text_BE, noise_key)
        itm = mean_over_ranks(*self.match(batch, encoded, self._others(batch, encoded, negatives or drawn)))
        total, count = self.caption(batch, encoded)
        itg = total / count.clamp(min=1) if self.lavis_reduction else mean_over_ranks(total, count)
        total = itc + itm + itg
        if not total.isfinite():
            # Only then, so that a healthy run does not look; where features are finite the weights are to blame.
            require_finite(batch.image_BFPV, batch.is_valid_B, batch.sample_ids)
        return Stage1Losses(total, itc, itm, itg, encoded.hidden_GQD, encoded.seen.is_frame_BF)

    def encode(self, batch: Stage1Batch) -> Encoded:
        """The unimodal passes, over this rank's samples or some of them."""
        # Zeros in place of a masked sample's features: NaN there would live through a weight of zero.
        image_BFPV = batch.image_BFPV.masked_fill(~batch.is_valid_B[:, None, None, None], 0.0)
        seen = self.perceive(image_BFPV, batch.is_frame_BF)
        image = self.qformer.image_key_values(seen.tokens_BFPV.flatten(0, 1))
        queries = self.qformer.forward_queries(image, seen.is_token)
        queries_BQE = self.embed_queries(queries.hidden_BQD, seen.tokens_BFPV.shape[1], seen.is_frame_BF)
        text_BE = self.embed_text(batch.input_ids_BT, batch.is_text_BT)
        return Encoded(seen, image, queries.hidden_BQD, queries.cache, queries_BQE, text_BE)

    def contrast(
        self, batch: Stage1Batch, queries_BQE: Tensor, text_BE: Tensor, noise_key: int
    ) -> tuple[Tensor, Negatives]:
        """ITC over the global batch, and the hard negatives that its similarities suggest."""
        with_gradient = not self.lavis_reduction
        scores_i2t_BN = similarity(queries_BQE, gather(text_BE, with_gradient=with_gradient)) / self.temperature
        all_queries_NQE = gather(queries_BQE, with_gradient=with_gradient)
        scores_t2i_BN = similarity(all_queries_NQE, text_BE).T / self.temperature
        is_valid_N = gather(batch.is_valid_B, with_gradient=False)
        is_positive_BN = batch.image_ids_B[:, None] == gather(batch.image_ids_B, with_gradient=False)[None]
        totals, counts = zip(
            *(
                itc_loss(scores, is_positive_BN, batch.is_valid_B, is_valid_N)
                for scores in (scores_i2t_BN, scores_t2i_BN)
            ),
            strict=True,
        )
        noise = _noise(batch, noise_key)
        negatives = sample_negatives(scores_i2t_BN, scores_t2i_BN, is_positive_BN, is_valid_N, noise)
        return mean_over_ranks(sum(totals) / 2, counts[0]), negatives

    def embed_queries(self, hidden_GQD: Tensor, frames: int, is_frame_BF: Tensor | None = None) -> Tensor:
        """L2-normalised query embeddings of all frames, [B, F*Q, E] from [B*F, Q, D], or of their mean, [B, Q, E]."""
        hidden_BFQD, is_frame_BF = self.pooled(hidden_GQD.unflatten(0, (-1, frames)), is_frame_BF)
        embedded_BFQE = F.normalize(self.vision_projection(hidden_BFQD).float(), dim=-1)
        return without_padding(embedded_BFQE, is_frame_BF).flatten(1, 2)

    def embed_text(self, input_ids_BT: Tensor, is_text_BT: Tensor) -> Tensor:
        """L2-normalised embedding of the text's [CLS]: [B, E]."""
        cls_BD = self.qformer.forward_text(input_ids_BT, is_text_BT, is_cls_only=True)
        return F.normalize(self.text_projection(cls_BD).float(), dim=-1)

    def match_logits(
        self,
        image: Sequence[KeyValue | None],
        input_ids_RT: Tensor,
        is_text_RT: Tensor,
        frames: int,
        seen: Seen | None = None,
    ) -> Tensor:
        """ITM logits, the mean over all frames' queries: [R, 2]; class 1 is "match".

        Args:
            image: Cross-attention keys and values of R*F frames.
            input_ids_RT: One text a pair.
            is_text_RT: Its mask.
            frames: F.
            seen: What `image` is made of, for its masks; None: they hide nothing.
        """
        ids_GT, is_text_GT = input_ids_RT.repeat_interleave(frames, 0), is_text_RT.repeat_interleave(frames, 0)
        hidden_GQD = self.qformer.forward_joint(image, ids_GT, is_text_GT, is_image=seen and seen.is_token)
        logits_RF2 = self.itm_head(hidden_GQD).mean(dim=1).unflatten(0, (-1, frames))
        return mean_over_frames(logits_RF2, seen and seen.is_frame_BF)

    def match(self, batch: Stage1Batch, encoded: Encoded, others: Others) -> tuple[Tensor, Tensor]:
        """ITM over matching and non-matching pairs, 1 to 2, as a sum and a count.

        An image meets its own text and its negative text over one set of keys and values.
        """
        seen, (size, frames) = encoded.seen, encoded.seen.tokens_BFPV.shape[:2]

        def rows(own_BT: Tensor, negative_BT: Tensor) -> Tensor:
            """Own and negative text of every frame in turn, then the own text of every negative frame."""
            both_GST = torch.stack([own_BT, negative_BT], dim=1).repeat_interleave(frames, 0)
            return torch.cat([both_GST.flatten(0, 1), own_BT.repeat_interleave(frames, 0)])

        ids_RT = rows(batch.input_ids_BT, others.input_ids_BT)
        is_text_RT = rows(batch.is_text_BT, others.is_text_BT)
        hidden_RQD = self.qformer.forward_joint(
            encoded.image, ids_RT, is_text_RT, others.image, seen.is_token, others.is_image
        )
        own_logits_S2, other_logits_G2 = self.itm_head(hidden_RQD).mean(dim=1).split([2 * size * frames, size * frames])
        own_logits_B22 = mean_over_frames(own_logits_S2.unflatten(0, (size, frames, 2)), seen.is_frame_BF)
        other_logits_B2 = mean_over_frames(other_logits_G2.unflatten(0, (size, frames)), others.is_frame_BF)
        logits_R2 = torch.cat([own_logits_B22[:, 0], own_logits_B22[:, 1], other_logits_B2])
        valid_B = batch.is_valid_B
        has_negative_B = valid_B & others.has_negative_B
        is_match_R = torch.cat([torch.ones_like(valid_B), torch.zeros_like(valid_B), torch.zeros_like(valid_B)])
        return itm_loss(logits_R2, is_match_R, torch.cat([valid_B, has_negative_B, has_negative_B]))

    def _others(self, batch: Stage1Batch, encoded: Encoded, negatives: Negatives) -> Others:
        """The negatives' images and texts.

        Negative images of this rank are indexed; those of other ranks come as what the Q-Former reads, which is smaller
        than six layers' keys and values.
        """
        seen, known = encoded.seen, encoded.image
        frames = seen.tokens_BFPV.shape[1]
        fetched_MFPV, place_B = fetch_rows(seen.tokens_BFPV, negatives.image_B)
        if world_size() > 1:  # also when nothing was fetched: the exchange's backward needs every rank
            fetched = self.qformer.image_key_values(fetched_MFPV.flatten(0, 1))
            known = [own and other and own.concatenate(other, dim=0) for own, other in zip(known, fetched, strict=True)]
        place_G = (place_B[:, None] * frames + torch.arange(frames, device=place_B.device)).flatten()

        def of_others(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else gather(mask, with_gradient=False)[negatives.image_B]

        return Others(
            image=[None if kv is None else kv.take(place_G) for kv in known],
            is_image=of_others(seen.is_token),
            is_frame_BF=of_others(seen.is_frame_BF),
            input_ids_BT=gather(batch.input_ids_BT, with_gradient=False)[negatives.text_B],
            is_text_BT=gather(batch.is_text_BT, with_gradient=False)[negatives.text_B],
            has_negative_B=negatives.has_negative_B,
        )

    def caption(self, batch: Stage1Batch, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """ITG, text decoded against the cached keys and values of all frames' queries, as a sum and a count.

        Only tokens that predict a token of a valid sample are computed; the last one, [SEP], predicts none.
        """
        frames, is_frame_BF = encoded.seen.tokens_BFPV.shape[1], encoded.seen.is_frame_BF
        is_label_BT = batch.is_text_BT[:, 1:].bool() & batch.is_valid_B[:, None]
        decoder_ids_BT = batch.input_ids_BT[:, :-1].clone()
        decoder_ids_BT[:, 0] = self.dec_id
        cache, queries = [_join_frames(kv, frames) for kv in encoded.cache], encoded.hidden_GQD.shape[1]
        is_query_BN = None if is_frame_BF is None else is_frame_BF.repeat_interleave(queries, dim=1)
        logits_MV = self.qformer.decode_text(decoder_ids_BT, is_label_BT, cache, is_query_BN)
        return itg_loss(logits_MV, batch.input_ids_BT[:, 1:][is_label_BT])

    def check(self, batch: Stage1Batch) -> None:
        """Refuse a batch that does not fit the model or itself with a ValueError that names both sides."""
        image = batch.image_BFPV
        self.check_image(image, batch.is_frame_BF)
        self.qformer.check_text(batch.input_ids_BT, batch.is_text_BT)
        for name in ("input_ids_BT", "image_ids_B", "is_valid_B"):
            if len(getattr(batch, name)) != len(image):
                raise ValueError(
                    f"image_BFPV has {len(image)} samples but {name} {len(getattr(batch, name))}; give every sample one"
                )
        if batch.is_valid_B.dtype != torch.bool:
            raise ValueError(f"is_valid_B is {batch.is_valid_B.dtype} but must be torch.bool; convert it with .bool()")


def _join_frames(cached: KeyValue, frames: int) -> KeyValue:
    """[B*F, H, Q, K] to [B, H, F*Q, K], frames in time order."""
    return KeyValue(*(states.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2, 3) for states in cached))


def _noise(batch: Stage1Batch, key: int) -> PairNoise:
    """Noise by place in the global batch, which rows that only pad a rank's share have none of."""
    names = batch.sample_ids or ["?"] * len(batch.is_valid_B)
    is_row_B = torch.tensor([bool(name) for name in names], device=batch.is_valid_B.device)
    place_N = gather(is_row_B, with_gradient=False).cumsum(dim=0) - 1
    return PairNoise(key, place_N.chunk(world_size())[rank()], place_N)
