"""ITC, ITM and ITG: the three objectives of stage 1."""

from qformer.objectives.losses import LABEL_SMOOTHING, itc_loss, itg_loss, itm_loss, similarity
from qformer.objectives.negatives import Negatives, PairNoise, noisy_argmax, sample_negatives

__all__ = [
    "LABEL_SMOOTHING",
    "Negatives",
    "PairNoise",
    "itc_loss",
    "itg_loss",
    "itm_loss",
    "noisy_argmax",
    "sample_negatives",
    "similarity",
]
