"""Stage 1: representation learning of the Q-Former against a frozen encoder (ITC + ITM + ITG).

Dimensions: B local batch, N global batch, F frames (1 for an image), P image tokens, V encoder width, Q queries,
T text tokens, D hidden width, E joint embedding width, R pairs scored by ITM, G frames of several samples, M rows
fetched from other ranks (images) or tokens that predict another (text).
Where a bridge keeps frames apart, a clip is its frames' query outputs: ITC takes the maximum over all of them, ITG
decodes against all of their caches, ITM averages its logits over them.
Reference: BLIP-2 (arXiv:2301.12597), section 3.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.backbones import require_finite
from qformer.bridges.frames import without_unread
from qformer.bridges.protocol import BridgeInput, BridgeText, Keys, Masks, Percept, TextBridge
from qformer.bridges.reading import Passes, Reading, Term
from qformer.bridges.stage_model import StageModel
from qformer.bridges.table import IMAGE_BRIDGE, BridgeConfig, build_bridge
from qformer.config import QFormerConfig
from qformer.distributed import fetch_rows, gather, mean_over_ranks, rank, world_size
from qformer.model import check_text
from qformer.objectives import Negatives, PairNoise, itc_loss, itg_loss, itm_loss, sample_negatives, similarity
from qformer.objectives.losses import DIVERSITY, diversity_loss

INITIAL_TEMPERATURE = 0.07
TERMS = ("itc", "itm", "itg")
"""The objectives of the paper."""


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
    """What came of a step."""

    terms: Mapping[str, Tensor]
    """Scalars by name: ITC, ITM, ITG, diversity and the bridge's own, each this rank's share of the mean."""
    passes: Passes
    """Query outputs, for those who watch them."""

    @property
    def total(self) -> Tensor:
        """Plain sum of ITC, ITM and ITG, as in the paper."""
        return self.terms["itc"] + self.terms["itm"] + self.terms["itg"]


class ImageEncoding(NamedTuple):
    """Clips as the objectives and retrieval read them."""

    percept: Percept
    keys: Keys
    reading: Reading
    queries_BNE: Tensor
    """L2-normalised query embeddings, N of all frames."""


class NegativePairs(NamedTuple):
    """Clips and texts that match none of the batch's texts and clips."""

    keys: Keys
    """Each text's negative clip."""
    text: BridgeText
    """Each clip's negative text."""
    has_negative_B: Tensor


class Stage1(StageModel):
    """The trainables of stage 1: a bridge with text branch, ITC projections, ITM head, temperature.

    Args:
        config: Must have a text branch; its last vocabulary id is [DEC].
        lavis_reduction: Match LAVIS: gathered features carry no gradient and ITG averages over each rank's own tokens.
            The default keeps the gradient and averages over all ranks, which equals one process on the joined batch.
        bridge: Kind and sizes of the bridge.

    Raises:
        ValueError: If the config has no text branch, or stage 1 cannot train the bridge.
    """

    bridge: TextBridge
    vision_projection: nn.Linear
    text_projection: nn.Linear
    itm_head: nn.Linear

    def __init__(
        self,
        config: QFormerConfig,
        *,
        lavis_reduction: bool = False,
        bridge: BridgeConfig = IMAGE_BRIDGE,
    ) -> None:
        if not config.has_text_branch:
            raise ValueError("stage 1 needs a text branch: set vocab_size to the tokenizer's size plus one for [DEC]")
        super().__init__(build_bridge(bridge, config), stage=1)
        if not isinstance(self.bridge, TextBridge):
            raise ValueError(f"{type(self.bridge).__name__} reads no text: leave stage 1 out of its `stages`")
        self.lavis_reduction = lavis_reduction
        self.term_names = (*TERMS, DIVERSITY, *bridge.term_names)
        self.add_head("vision_projection", nn.Linear(config.hidden_size, config.embed_dim))
        self.add_head("text_projection", nn.Linear(config.hidden_size, config.embed_dim))
        self.add_head("itm_head", nn.Linear(config.hidden_size, 2))
        self.temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))

    @property
    def dec_id(self) -> int:
        """Id of [DEC], the token that starts ITG's text."""
        return self.bridge.vocab_size - 1

    def forward(self, batch: Stage1Batch, *, noise_key: int = 0, negatives: Negatives | None = None) -> Stage1Losses:
        """All losses of one step; the gradient of `total` averaged over ranks is the joined batch's.

        Args:
            batch: Every rank must bring equally many samples and frames, and text padded to one length.
            noise_key: Key of the step's randomness: the hard negatives' `PairNoise`, the bridge's draws; the same on
                every rank.
            negatives: Use these instead of drawing (for comparison with recorded runs).

        Raises:
            ValueError: If the batch does not fit the model, or its features hold NaN or infinity.
        """
        self.check(batch)
        given = self.given(batch, noise_key)
        image, text_BE = self.encode(batch, given)
        itc, drawn = self.contrast(batch, image.queries_BNE, text_BE, noise_key)
        pairs = self.negative_pairs(batch, image, negatives or drawn)
        terms = {"itc": itc, **self.local_terms(batch, given, image, pairs)}
        losses = Stage1Losses({name: self._mean(name, term) for name, term in terms.items()}, image.reading.passes)
        if not losses.total.isfinite():
            # Only then, so that a healthy run does not look; where features are finite the weights are to blame.
            require_finite(batch.image_BFPV, batch.is_valid_B, batch.sample_ids)
        return losses

    def local_terms(
        self, batch: Stage1Batch, given: BridgeInput, image: ImageEncoding, negatives: NegativePairs
    ) -> dict[str, Term]:
        """Every term that needs no other samples' embeddings, in the order in which they are reduced."""
        terms = {
            "itm": self.match(batch, given, image.keys, negatives),
            "itg": self.caption(batch, image.reading),
            DIVERSITY: Term(
                *diversity_loss(image.reading.passes.hidden_GQD, batch.is_valid_B, image.reading.passes.frame_mask)
            ),
        }
        return {**terms, **image.reading.terms}

    def given(self, batch: Stage1Batch, noise_key: int) -> BridgeInput:
        """A batch as the bridge reads it."""
        # Zeros in place of a masked sample's features: NaN there would live through a weight of zero.
        image_BFPV = batch.image_BFPV.masked_fill(~batch.is_valid_B[:, None, None, None], 0.0)
        return BridgeInput(image_BFPV, batch.is_frame_BF, draw=noise_key, is_valid_B=batch.is_valid_B)

    def encode(self, batch: Stage1Batch, given: BridgeInput) -> tuple[ImageEncoding, Tensor]:
        """The unimodal passes, over this rank's samples or some of them: clips, and text_BE."""
        image = self.encode_image(given)
        return image, self.embed_text(batch.input_ids_BT, batch.is_text_BT)

    def encode_image(self, given: BridgeInput) -> ImageEncoding:
        """The pass of the queries alone."""
        percept = self.bridge.perceive(given)
        keys = self.bridge.keys(percept)
        reading = self.bridge.read_keys(keys, given)
        return ImageEncoding(percept, keys, reading, self.embed_queries(reading.hidden_BSQD, reading.is_read_BSQ))

    def embed_queries(self, hidden_BSQD: Tensor, is_read_BSQ: Tensor | None = None) -> Tensor:
        """L2-normalised query embeddings, [B, S*Q, E]; those that are not read repeat others of their clip."""
        embedded_BSQE = F.normalize(self.vision_projection(hidden_BSQD).float(), dim=-1)
        return without_unread(embedded_BSQE, is_read_BSQ).flatten(1, 2)

    def contrast(
        self, batch: Stage1Batch, queries_BNE: Tensor, text_BE: Tensor, noise_key: int
    ) -> tuple[Term, Negatives]:
        """ITC over the global batch, and the hard negatives that its similarities suggest."""
        with_gradient = not self.lavis_reduction
        scores_i2t_BN = similarity(queries_BNE, gather(text_BE, with_gradient=with_gradient)) / self.temperature
        all_queries_MNE = gather(queries_BNE, with_gradient=with_gradient)
        scores_t2i_BN = similarity(all_queries_MNE, text_BE).T / self.temperature
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
        return Term((totals[0] + totals[1]) / 2, counts[0]), negatives

    def embed_text(self, input_ids_BT: Tensor, is_text_BT: Tensor) -> Tensor:
        """L2-normalised embedding of the text's [CLS]: [B, E]."""
        cls_BD = self.bridge.read_text(BridgeText(input_ids_BT, is_text_BT))
        return F.normalize(self.text_projection(cls_BD).float(), dim=-1)

    def match_logits(self, keys: Keys, text: BridgeText, given: BridgeInput, negatives: Keys | None = None) -> Tensor:
        """ITM logits of `TextBridge.read_pairs`, the mean over all frames' queries: [R, 2]; class 1 is "match"."""
        passes = self.bridge.read_pairs(keys, text, given, negatives)
        return passes.mean(self.itm_head(passes.hidden_GQD))

    def match(self, batch: Stage1Batch, given: BridgeInput, keys: Keys, negatives: NegativePairs) -> Term:
        """ITM over matching and non-matching pairs, 1 to 2.

        An image meets its own text and its negative text over one set of keys and values.
        """

        def rows(own_BT: Tensor, negative_BT: Tensor) -> Tensor:
            """Own and negative text of every clip in turn, then the own text of every negative clip."""
            return torch.cat([torch.stack([own_BT, negative_BT], dim=1).flatten(0, 1), own_BT])

        own = BridgeText(batch.input_ids_BT, batch.is_text_BT)
        text = BridgeText(*(rows(*both) for both in zip(own, negatives.text, strict=True)))
        logits_R2, valid_B = self.match_logits(keys, text, given, negatives.keys), batch.is_valid_B
        size = len(valid_B)
        own_logits_S2, other_logits_B2 = logits_R2.split([2 * size, size])
        own_logits_B22 = own_logits_S2.unflatten(0, (size, 2))
        logits_R2 = torch.cat([own_logits_B22[:, 0], own_logits_B22[:, 1], other_logits_B2])
        has_negative_B = valid_B & negatives.has_negative_B
        is_match_R = torch.cat([torch.ones_like(valid_B), torch.zeros_like(valid_B), torch.zeros_like(valid_B)])
        return Term(*itm_loss(logits_R2, is_match_R, torch.cat([valid_B, has_negative_B, has_negative_B])))

    def negative_pairs(self, batch: Stage1Batch, image: ImageEncoding, negatives: Negatives) -> NegativePairs:
        """The negatives' clips and texts.

        Negative clips of this rank are indexed; those of other ranks come as percepts, which are smaller than six
        layers' keys and values.
        """
        percept = image.percept
        fetched_MFPV, place_B = fetch_rows(percept.tokens_BFPV, negatives.image_B)
        fetched = None
        if world_size() > 1:  # also when nothing was fetched: the exchange's backward needs every rank
            fetched = self.bridge.keys(Percept(fetched_MFPV))

        def of_negatives(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else gather(mask, with_gradient=False)[negatives.image_B]

        masks = Masks(of_negatives(percept.is_token), of_negatives(percept.is_frame_BF))
        keys = image.keys.take(fetched, place_B, masks)
        return NegativePairs(keys, negative_text(batch, negatives), negatives.has_negative_B)

    def caption(self, batch: Stage1Batch, reading: Reading) -> Term:
        """ITG, text decoded against the reading.

        Only tokens that predict a token of a valid sample are computed; the last one, [SEP], predicts none.
        """
        is_label_BT = batch.is_text_BT[:, 1:].bool() & batch.is_valid_B[:, None]
        decoder_ids_BT = batch.input_ids_BT[:, :-1].clone()
        decoder_ids_BT[:, 0] = self.dec_id
        logits_MV = self.bridge.decode_text(BridgeText(decoder_ids_BT, is_label_BT), reading)
        return Term(*itg_loss(logits_MV, batch.input_ids_BT[:, 1:][is_label_BT]))

    def check(self, batch: Stage1Batch) -> None:
        """Refuse a batch that does not fit the model or itself with a ValueError that names both sides."""
        image = batch.image_BFPV
        self.bridge.check(image, batch.is_frame_BF)
        check_text(batch.input_ids_BT, batch.is_text_BT)
        for name in ("input_ids_BT", "image_ids_B", "is_valid_B"):
            if len(getattr(batch, name)) != len(image):
                raise ValueError(
                    f"image_BFPV has {len(image)} samples but {name} {len(getattr(batch, name))}; give every sample one"
                )
        if batch.is_valid_B.dtype != torch.bool:
            raise ValueError(f"is_valid_B is {batch.is_valid_B.dtype} but must be torch.bool; convert it with .bool()")

    def _mean(self, name: str, term: Term) -> Tensor:
        """A term's mean over the items of all ranks; by LAVIS, of ITG over those of this rank."""
        if self.lavis_reduction and name == "itg":
            return term.total / term.num_items.clamp(min=1)
        return mean_over_ranks(*term)


def negative_text(batch: Stage1Batch, negatives: Negatives) -> BridgeText:
    """The text that does not match, for each clip of the batch."""
    own = (batch.input_ids_BT, batch.is_text_BT)
    return BridgeText(*(gather(one, with_gradient=False)[negatives.text_B] for one in own))


def _noise(batch: Stage1Batch, key: int) -> PairNoise:
    """Noise by place in the global batch, which rows that only pad a rank's share have none of."""
    names = batch.sample_ids or ["?"] * len(batch.is_valid_B)
    is_row_B = torch.tensor([bool(name) for name in names], device=batch.is_valid_B.device)
    place_N = gather(is_row_B, with_gradient=False).cumsum(dim=0) - 1
    return PairNoise(key, place_N.chunk(world_size())[rank()], place_N)
