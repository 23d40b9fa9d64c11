"""What every bridge says of the held-out clips: as they are, with frames shuffled, with another clip's sound.

Dimensions: B clips, F frames, C channels, Y/X pixels, A segments of sound, N samples of a segment.
"""

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from jobs.demo.render import SAMPLE_RATE_HZ
from jobs.demo.video.bridges import BRIDGES, Bridge
from jobs.demo.video.film import NUM_FRAMES
from jobs.demo.video.make_audio import NUM_SEGMENTS, SEGMENT_S
from pipelines.data.audio_sampling import AudioSampling
from pipelines.data.checkpoint_folders import newest_checkpoint
from pipelines.data.samples import DecodeSettings, SampleDecoder
from qformer.bridge import Captioner, Waveforms, load_captioner
from qformer.preprocessing import Preprocessing

ANSWERS_FILE = "answers.json"
AS_IT_IS, FRAMES_SHUFFLED, SOUND_SHUFFLED = "as it is", "frames shuffled", "sounds shuffled"
NUM_SHUFFLES = 3
"""Answers under a shuffle are averaged over so many of them."""
_CLIPS_PER_PASS = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Clips:
    """Decoded clips."""

    sample_ids: list[str]
    pixels: Tensor
    """BFCYX, uint8."""
    waveforms: Tensor
    """BAN."""
    audio_valid: Tensor
    """BA, False where there is no sound."""

    def bags(self) -> list[tuple[bytes, ...]]:
        """What an observer without order sees of each: its frames, sorted by their content."""
        return [tuple(sorted(frame.numpy().tobytes() for frame in clip)) for clip in self.pixels]

    def with_frames_shuffled(self, rng: random.Random) -> "Clips":
        """Every clip's frames in an order of its own."""
        orders = torch.tensor([rng.sample(range(n), n) for n in [self.pixels.shape[1]] * len(self.pixels)])
        return replace(self, pixels=self.pixels[torch.arange(len(orders))[:, None], orders])

    def with_sound_shuffled(self, rng: random.Random) -> "Clips":
        """Every clip that has sound gets another one's."""
        heard = self.audio_valid.any(dim=1).nonzero()[:, 0].tolist()
        order = rng.sample(heard, len(heard))
        # A cycle through all of them in random order: none keeps its own.
        source = list(range(len(self.sample_ids)))
        for this, other in zip(order, [*order[1:], *order[:1]], strict=True):
            source[this] = other
        return replace(self, waveforms=self.waveforms[source], audio_valid=self.audio_valid[source])


def decode_clips(manifest: Path, preprocessing: Preprocessing, *, split: str = "test") -> Clips:
    """Decode a manifest's clips of one split as `qformer evaluate` does."""
    audio = AudioSampling(sample_rate_hz=SAMPLE_RATE_HZ, num_segments=NUM_SEGMENTS, segment_s=SEGMENT_S)
    settings = DecodeSettings(preprocessing=preprocessing, num_frames=NUM_FRAMES, audio=audio)
    rows = [row for row in pq.read_table(manifest).to_pylist() if row["split"] == split]
    decoder = SampleDecoder(settings)
    try:
        clips = [decoder.decode(kind="video", media=row["media"]) for row in rows]
    finally:
        decoder.close()
    return Clips(
        [row["sample_id"] for row in rows],
        torch.from_numpy(np.stack([clip.pixels for clip in clips])),
        torch.from_numpy(np.stack([clip.waveforms for clip in clips if clip.waveforms is not None])),
        torch.from_numpy(np.stack([clip.audio_valid for clip in clips if clip.audio_valid is not None])),
    )


def write_answers(output: Path, *, seed: int = 0) -> None:
    """Write answers.json: by bridge and condition, the captions of every held-out clip, one list a shuffle.

    Args:
        output: Folder of the demo, with every bridge's run.
        seed: Decides the shuffles, which are the same for all bridges.
    """
    clips: Clips | None = None
    answers: dict[str, dict[str, list[dict[str, str]]]] = {}
    for bridge in BRIDGES:
        captioner = load_captioner(Path(newest_checkpoint(str(output / bridge.name))))
        clips = clips or decode_clips(output / "clip_data" / "manifest.parquet", captioner.preprocessing)
        answers[bridge.name] = {
            condition: [dict(zip(one.sample_ids, _answer(captioner, bridge, one), strict=True)) for one in shown]
            for condition, shown in _conditions(bridge, clips, seed).items()
        }
        logger.info("%s has answered", bridge.title)
    folder = output / "clip_answers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ANSWERS_FILE).write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


def _conditions(bridge: Bridge, clips: Clips, seed: int) -> dict[str, Sequence[Clips]]:
    shown: dict[str, Sequence[Clips]] = {AS_IT_IS: [clips]}
    rngs = [random.Random(f"{seed}/{index}") for index in range(NUM_SHUFFLES)]
    if bridge.hears:
        shown[SOUND_SHUFFLED] = [clips.with_sound_shuffled(rng) for rng in rngs]
    elif bridge.knows_order:
        shown[FRAMES_SHUFFLED] = [clips.with_frames_shuffled(rng) for rng in rngs]
    return shown


def _answer(captioner: Captioner, bridge: Bridge, clips: Clips) -> list[str]:
    captions: list[str] = []
    for start in range(0, len(clips.sample_ids), _CLIPS_PER_PASS):
        part = slice(start, start + _CLIPS_PER_PASS)
        audio = Waveforms(clips.waveforms[part], clips.audio_valid[part]) if bridge.hears else None
        captions += captioner.answer(clips.pixels[part], audio=audio)
    return captions
