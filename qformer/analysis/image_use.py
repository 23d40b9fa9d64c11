"""Does a model use its images? What it makes of true pairs of image and text, against images permuted among the texts.

A model that ignores its images fits a text as well beside any image. So each text meets its own image and one of
another sample, and the two fits are compared text by text: a paired test needs no scale, and texts that are easy or
hard in themselves cancel out.

Dimensions: B pairs, T labels, N soft-prompt rows, L language-model width.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer.language import IGNORED, LanguageBatch, LanguageModel

Verdict = Literal["used", "hardly", "unused", "unknown"]

SIGNIFICANT_Z = 3.0
"""Standard deviations above chance from which on a share is no accident: 1 in 740 by chance alone."""
USED_SHARE = 0.6
"""Share of the texts that the right image must fit better; what is significant and below it is hardly a use."""
USED_GAIN_NATS = 0.05
"""By how much the right image must lower the loss of a token on average: less changes its probability by below 5 %."""
MIN_PAIRS = 16
"""Below, not even a perfect model would be clearly above chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedFigures:
    """How often, and by how much, the right image fits a text better than another's."""

    num_pairs: int
    true_mean: float
    """Mean over texts beside their own images."""
    permuted_mean: float
    """Beside another sample's."""
    share: float
    """Of the texts that the right image fits better; where both fit the same it counts half. Chance is 0.5."""
    z: float
    """How many standard deviations `share` lies above chance (sign test)."""
    least_gain: float = 0.0
    """Mean difference below which it is hardly a use, however sure it is."""

    @property
    def verdict(self) -> Verdict:
        """What the figures say of the model."""
        if self.num_pairs < MIN_PAIRS:
            return "unknown"
        if self.z < SIGNIFICANT_Z:
            return "unused"
        is_much = self.share >= USED_SHARE and abs(self.true_mean - self.permuted_mean) >= self.least_gain
        return "used" if is_much else "hardly"


def compare_pairs(
    true_B: Tensor, permuted_B: Tensor, *, lower_is_better: bool = False, least_gain: float = 0.0
) -> PairedFigures:
    """Compare what the same texts gave beside their own and beside another image.

    Args:
        true_B: Score or loss of each text beside its own image.
        permuted_B: Of the same text beside another.
        lower_is_better: True for losses.
        least_gain: See `PairedFigures`.
    """
    true, permuted = true_B.double(), permuted_B.double()
    gains = permuted - true if lower_is_better else true - permuted
    count = len(gains)
    if count == 0:
        return PairedFigures(num_pairs=0, true_mean=0.0, permuted_mean=0.0, share=0.5, z=0.0)
    share = float((gains > 0).double().mean() + 0.5 * (gains == 0).double().mean())
    return PairedFigures(
        num_pairs=count,
        true_mean=float(true.mean()),
        permuted_mean=float(permuted.mean()),
        share=share,
        z=(share - 0.5) * 2.0 * math.sqrt(count),
        least_gain=least_gain,
    )


def permute_images(may_swap_BB: Tensor, generator: torch.Generator) -> Tensor:
    """Permute images among texts: give as many texts as possible an image of another sample, each image once.

    Args:
        may_swap_BB: True where text i may meet image j: not its own, not the same picture, not one it describes too.
        generator: Draws the permutation.

    Returns:
        [B] int64, the image that each text meets; -1 for texts that no image is left for.
    """
    size = len(may_swap_BB)
    allowed = may_swap_BB.tolist()
    order = torch.randperm(size, generator=generator).tolist()
    choices = [
        [j for j in torch.randperm(size, generator=generator).tolist() if allowed[text][j]] for text in range(size)
    ]
    text_of: dict[int, int] = {}

    def seat(text: int, seen: set[int]) -> bool:
        """Find `text` an image, moving others where that helps (Kuhn's augmenting paths)."""
        for image in choices[text]:
            if image not in seen:
                seen.add(image)
                if image not in text_of or seat(text_of[image], seen):
                    text_of[image] = text
                    return True
        return False

    for text in order:
        seat(text, set())
    image_B = torch.full((size,), -1, dtype=torch.int64)
    for image, text in text_of.items():
        image_B[text] = image
    return image_B


def answer_losses(
    language: LanguageModel, prefix_BNL: Tensor, batch: LanguageBatch, is_prefix_BN: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of each sample's answer tokens: [B], fp32; arguments as for `LanguageModel.logits`."""
    logits_BTV = language.logits(prefix_BNL, batch, is_prefix_BN).float()
    losses_BT = F.cross_entropy(logits_BTV.transpose(1, 2), batch.labels_BT, ignore_index=IGNORED, reduction="none")
    return losses_BT.sum(dim=1) / (batch.labels_BT != IGNORED).sum(dim=1).clamp(min=1)
