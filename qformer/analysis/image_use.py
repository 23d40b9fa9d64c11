"""A test of whether a model uses its images: its scores of texts with their own images, and with permuted images.

A model that ignores its images scores a text equally with any image. So each text is scored with its own image and with
another sample's, and the two scores are compared text by text. A paired test needs no scale, and the difficulty of a
text cancels out.

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
"""Standard deviations above chance from which a share is significant: 1 in 740 by chance."""
USED_SHARE = 0.6
"""Share of texts that must score better with their own image; a smaller significant share counts as "hardly"."""
USED_GAIN_NATS = 0.05
"""Mean decrease of a token's loss that the own image must give; less changes its probability by under 5 %."""
MIN_PAIRS = 16
"""Number of pairs below which not even a perfect model is significantly above chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedFigures:
    """How often, and by how much, a text scores better with its own image than with another."""

    num_pairs: int
    true_mean: float
    """Mean over texts with their own images."""
    permuted_mean: float
    """Mean over texts with another sample's image."""
    share: float
    """Share of texts that score better with their own image; ties count half. Chance is 0.5."""
    z: float
    """Standard deviations of `share` above chance (sign test)."""
    least_gain: float = 0.0
    """Mean difference below which the verdict is at most "hardly", however significant."""

    @property
    def verdict(self) -> Verdict:
        """Verdict on the model."""
        if self.num_pairs < MIN_PAIRS:
            return "unknown"
        if self.z < SIGNIFICANT_Z:
            return "unused"
        is_much = self.share >= USED_SHARE and abs(self.true_mean - self.permuted_mean) >= self.least_gain
        return "used" if is_much else "hardly"


def compare_pairs(
    true_B: Tensor, permuted_B: Tensor, *, lower_is_better: bool = False, least_gain: float = 0.0
) -> PairedFigures:
    """Compare the scores of texts with their own and with another image.

    Args:
        true_B: Score or loss of each text with its own image.
        permuted_B: Score or loss of the same text with another image.
        lower_is_better: True for losses.
        least_gain: Mean difference below which the verdict is at most "hardly".
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
    """Permute images among texts: match as many texts as possible with an image of another sample, each image once.

    Args:
        may_swap_BB: True where text i may get image j: not its own, not the same picture, not one it describes, too.
        generator: Random generator of the permutation.

    Returns:
        [B] int64, the image of each text; -1 for texts without one.
    """
    size = len(may_swap_BB)
    allowed = may_swap_BB.tolist()
    order = torch.randperm(size, generator=generator).tolist()
    choices = [
        [j for j in torch.randperm(size, generator=generator).tolist() if allowed[text][j]] for text in range(size)
    ]
    text_of: dict[int, int] = {}

    def assign(text: int, visited: set[int]) -> bool:
        """Assign an image to `text`, reassigning others if needed (Kuhn's augmenting paths)."""
        for image in choices[text]:
            if image not in visited:
                visited.add(image)
                if image not in text_of or assign(text_of[image], visited):
                    text_of[image] = text
                    return True
        return False

    for text in order:
        assign(text, set())
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
