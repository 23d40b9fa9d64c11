"""Train the video demo's tiny audio spectrogram transformer to distinguish tones of different pitch, and noise.

Dimensions: G segments, N samples of a segment, V width.
"""

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.demo.backbones.language import import_transformers
from jobs.demo.video.world.render import DURATION_S
from jobs.demo.video.world.scenes import PITCHES, SIDES, Tone
from jobs.demo.video.world.sound import waveform_of
from jobs.demo.world.render import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from qformer.audio import AudioEncoder

NUM_SEGMENTS = 8
SEGMENT_S = DURATION_S / NUM_SEGMENTS
SEGMENT_SAMPLES = round(SEGMENT_S * SAMPLE_RATE_HZ)
WIDTH = 64
# A patch spans all bins of the spectrum; only their position would distinguish patches at different heights.
_NUM_BINS = 16
_MAX_COLUMNS = 32
_STRIDE = 4
NUM_STEPS = 200
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
LOG_EVERY_STEPS = 50
_NO_TONE = len(PITCHES)
logger = logging.getLogger(__name__)


def build_audio() -> tuple[Any, Any]:
    """Make the untrained model and its feature extractor."""
    transformers = import_transformers()
    config = transformers.ASTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        patch_size=_NUM_BINS,
        frequency_stride=_NUM_BINS,
        time_stride=_STRIDE,
        max_length=_MAX_COLUMNS,
        num_mel_bins=_NUM_BINS,
    )
    extractor = transformers.ASTFeatureExtractor(
        sampling_rate=SAMPLE_RATE_HZ, num_mel_bins=_NUM_BINS, max_length=_MAX_COLUMNS
    )
    return transformers.ASTModel(config), extractor


def train_audio(seed: int = 0, num_steps: int = NUM_STEPS) -> tuple[Any, Any]:
    """Train the model from scratch; less than a minute on one core."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model, extractor = build_audio()
    head = nn.Linear(WIDTH, _NO_TONE + 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=LEARNING_RATE, weight_decay=0.01)
    model.train()
    for step in range(num_steps):
        waveforms_GN, labels_G = draw_segments(rng, BATCH_SIZE)
        inputs = extractor(list(waveforms_GN.numpy()), sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")
        loss = F.cross_entropy(head(model(**inputs).last_hidden_state.mean(1)), labels_G)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % LOG_EVERY_STEPS == 0:
            logger.info("audio step %d of %d: loss %.3f", step, num_steps, loss.item())
    return model.eval(), extractor


def save_audio(model: Any, extractor: Any, folder: Path) -> None:
    """Write both in the ordinary transformers layout."""
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)


def draw_segments(rng: random.Random, count: int) -> tuple[Tensor, Tensor]:
    """Cut segments out of clips' sounds.

    Args:
        rng: Source of chance.
        count: How many.

    Returns:
        waveforms_GN, and labels_G: the number of the pitch that fills a tenth of the segment or more, else one more.
    """
    segments: list[NDArray[np.float32]] = []
    labels: list[int] = []
    while len(segments) < count:
        pitch = rng.choice(PITCHES)
        wave = waveform_of(Tone(pitch, rng.choice(SIDES)), DURATION_S, rng)
        for segment in rng.sample(list(wave.reshape(NUM_SEGMENTS, SEGMENT_SAMPLES)), 3):
            # Tones are louder than any noise here; most segments have none.
            loud = float(np.mean(np.abs(segment) > 0.05))
            if loud >= 0.1 or rng.random() < 0.3:
                segments.append(segment)
                labels.append(PITCHES.index(pitch) if loud >= 0.1 else _NO_TONE)
    return torch.from_numpy(np.stack(segments[:count])), torch.tensor(labels[:count])


def probe_pitches(encoder: "AudioEncoder", *, num_train: int = 400, num_test: int = 400, seed: int = 1) -> float:
    """Fit a linear classifier of pitches on the encoder's vectors; return its accuracy on new sounds."""
    rng = random.Random(seed)
    (waves_GN, labels_G), (test_GN, test_G) = draw_segments(rng, num_train), draw_segments(rng, num_test)
    vectors_GV, test_GV = encoder(waves_GN), encoder(test_GN)
    centre, spread = vectors_GV.mean(0), vectors_GV.std(0)
    classifier = nn.Linear(vectors_GV.shape[1], _NO_TONE + 1)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.02)
    for _ in range(200):
        loss = F.cross_entropy(classifier((vectors_GV - centre) / spread), labels_G)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (classifier((test_GV - centre) / spread).argmax(1) == test_G).float().mean().item()
