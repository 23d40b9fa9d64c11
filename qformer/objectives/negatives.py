"""Hard negatives of ITM, drawn by how similar they are.

Dimensions: B local batch, N global batch.
Reference: BLIP-2 (arXiv:2301.12597), section 3.2; LAVIS `blip2_qformer.py`.
"""

from typing import NamedTuple

from torch import Tensor


class Negatives(NamedTuple):
    """Hard negatives as indexes into the global batch."""

    image_B: Tensor
    """For each local text, an image that does not match it."""
    text_B: Tensor
    """For each local image, a text that does not match it."""
    has_negative_B: Tensor
    """False where the global batch holds no candidate."""


def sample_negatives(
    scores_i2t_BN: Tensor, scores_t2i_BN: Tensor, is_positive_BN: Tensor, is_valid_N: Tensor, noise: "PairNoise"
) -> Negatives:
    """Draw one hard negative image per text and one text per image, likelier the more similar (section 3.2, ITM).

    The largest of scores with Gumbel noise is drawn with the probabilities of their softmax.
    """
    is_candidate_BN = is_valid_N[None] & ~is_positive_BN

    def draw(scores_BN: Tensor, direction: int) -> Tensor:
        # Rows of NaN, of a run that diverged, draw any: they stop at the loop's own check, which names the samples.
        scores_BN = scores_BN.detach().float().masked_fill(~is_candidate_BN, float("-inf"))
        return noisy_argmax(scores_BN, noise.gumbel(direction))

    return Negatives(draw(scores_t2i_BN, 0), draw(scores_i2t_BN, 1), is_candidate_BN.any(dim=1))


class PairNoise(NamedTuple):
    """Randomness of one step's hard negatives, the same however many ranks share the batch.

    That of a pair is a hash of the key and of both places, so that every rank knows its own rows' alone.
    """

    key: int
    """63 bits; of the run's seed and the step."""
    place_B: Tensor
    """int64 place of each row in the global batch."""
    place_N: Tensor
    """int64 place of each column in the global batch."""

    def gumbel(self, direction: int) -> Tensor:
        """Standard Gumbel noise of every pair: [B, N]."""
        hash_B1 = _mixed(_mixed(self.place_B + self.key)[:, None] + direction)
        hash_BN = _mixed(_mixed(hash_B1 + self.place_N[None]))
        uniform_BN = ((hash_BN & 0xFFFFFF).double() + 0.5) / 2**24  # never 0 nor 1
        return -(-uniform_BN.log()).log().float()


def noisy_argmax(scores_BN: Tensor, noise_BN: Tensor) -> Tensor:
    """Column of each row's largest sum: [B]."""
    return (scores_BN + noise_BN).argmax(dim=1)


def _mixed(hash_X: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64, whose products wrap around as those of unsigned numbers do."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        hash_X = (hash_X ^ ((hash_X >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return hash_X
