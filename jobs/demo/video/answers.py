"""Captions of the held-out clips by every bridge: unchanged, with frames shuffled, and with the sound of another clip.

Each bridge also ranks all captions that differ only in the order and chooses the likeliest. Generated captions do not
show whether a bridge reads the order, because they can be wrong in many ways.

Dimensions: B clips, F frames, C channels, Y/X pixels, P image tokens, V encoder width, A segments of sound,
W samples of a segment, N soft prompts, L language-model width.
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

from jobs.demo.video.backbones.audio import NUM_SEGMENTS, SEGMENT_S
from jobs.demo.video.bridges import BRIDGES, DemoBridge
from jobs.demo.video.scoring import choices
from jobs.demo.video.world.corpus import read_scenes
from jobs.demo.video.world.render import NUM_FRAMES
from jobs.demo.world.render import SAMPLE_RATE_HZ
from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.samples import DecodeSettings, SampleDecoder
from pipelines.data.storage.checkpoint_folders import newest_checkpoint
from pipelines.inference.models import Captioner, Waveforms, load_captioner
from qformer.analysis.image_use import answer_losses
from qformer.language import LanguageModel
from qformer.preprocessing import Preprocessing

ANSWERS_FILE, CHOICES_FILE = "answers.json", "choices.json"
AS_IT_IS, FRAMES_SHUFFLED, SOUND_SHUFFLED = "as it is", "frames shuffled", "sounds shuffled"
NUM_SHUFFLES = 3
"""Number of shuffles to average over."""
_CLIPS_PER_PASS = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Clips:
    """Decoded clips."""

    sample_ids: list[str]
    pixels: Tensor
    """Pixels BFCYX, uint8."""
    waveforms: Tensor
    """Sound BAW."""
    audio_valid: Tensor
    """Mask BA, False where there is no sound."""
    tokens: Tensor | None = None
    """Tokens BFPV of the frozen encoder, which all bridges share; None before `with_tokens`."""

    def with_tokens(self, captioner: Captioner) -> "Clips":
        """Encode the frames."""
        parts = [captioner.encoder.features(self.pixels[part]) for part in _passes(len(self.sample_ids))]
        return replace(self, tokens=torch.cat(parts))

    def unordered_frames(self) -> list[tuple[bytes, ...]]:
        """Frames of each clip without their order: sorted by content."""
        return [tuple(sorted(frame.numpy().tobytes() for frame in clip)) for clip in self.pixels]

    def with_frames_shuffled(self, rng: random.Random) -> "Clips":
        """Shuffle the frames of every clip independently."""
        orders = torch.tensor([rng.sample(range(n), n) for n in [self.pixels.shape[1]] * len(self.pixels)])
        index = torch.arange(len(orders))[:, None], orders
        return replace(self, pixels=self.pixels[index], tokens=None if self.tokens is None else self.tokens[index])

    def with_sound_shuffled(self, rng: random.Random) -> "Clips":
        """Give every clip with sound the sound of another one."""
        with_sound = self.audio_valid.any(dim=1).nonzero()[:, 0].tolist()
        order = rng.sample(with_sound, len(with_sound))
        # A random cycle through all of them: no clip keeps its own sound.
        source = list(range(len(self.sample_ids)))
        for this, other in zip(order, [*order[1:], *order[:1]], strict=True):
            source[this] = other
        return replace(self, waveforms=self.waveforms[source], audio_valid=self.audio_valid[source])


def decode_clips(manifest: Path, preprocessing: Preprocessing, *, split: str = "test") -> Clips:
    """Decode the clips of one split as `qformer evaluate` does."""
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
    """Write answers.json and choices.json: captions of the held-out clips by bridge and condition, a table per shuffle.

    The first holds generated captions; the second the likeliest of `scoring.choices`, for bridges without sound.

    Args:
        output: Folder of the demo, with its clips and the runs of all bridges.
        seed: Seed of the shuffles, which are the same for all bridges.
    """
    scenes, clips = read_scenes(output / "clip_world"), None
    answers: dict[str, dict[str, list[dict[str, str]]]] = {}
    chosen: dict[str, dict[str, list[dict[str, str]]]] = {}
    for bridge in BRIDGES:
        captioner = load_captioner(Path(newest_checkpoint(str(output / bridge.name))))
        if clips is None:
            clips = decode_clips(output / "clip_data" / "manifest.parquet", captioner.preprocessing).with_tokens(
                captioner
            )
        names, offered = clips.sample_ids, [choices(scenes[sample_id]) for sample_id in clips.sample_ids]
        answers[bridge.name], chosen[bridge.name] = {}, {}
        for condition, several in _conditions(bridge, clips, seed).items():
            prompts = [_soft_prompts(captioner, bridge, one) for one in several]
            answers[bridge.name][condition] = [dict(zip(names, _answer(captioner, p), strict=True)) for p in prompts]
            if not bridge.reads_sound:
                tables = [dict(zip(names, _choose(captioner, p, offered), strict=True)) for p in prompts]
                chosen[bridge.name][condition] = tables
        logger.info("%s: answers written", bridge.title)
    folder = output / "clip_answers"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((ANSWERS_FILE, answers), (CHOICES_FILE, chosen)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def likeliest(
    language: LanguageModel, prompts: list[Tensor], offered: list[list[str]], *, text: str, max_tokens: int
) -> list[str]:
    """Select the likeliest caption of each clip by the language model.

    Args:
        language: Frozen language model.
        prompts: Soft prompts NL of each clip, with the same number of rows.
        offered: Captions of each clip, with the same number of tokens.
        text: Text between soft prompts and caption, as in training.
        max_tokens: Limit of `LanguageModel.tokenize`.
    """
    chosen: list[str] = []
    for part in _passes(len(prompts)):
        texts = [caption for several in offered[part] for caption in several]
        counts = [len(several) for several in offered[part]]
        prefix_BNL = torch.stack(prompts[part]).repeat_interleave(torch.tensor(counts), dim=0)
        batch = language.tokenize([text] * len(texts), texts, max_tokens=max_tokens)
        # Means over tokens; equal lengths rank the same by sums.
        losses = answer_losses(language, prefix_BNL, batch).split(counts)
        chosen += [several[int(own.argmin())] for several, own in zip(offered[part], losses, strict=True)]
    return chosen


def _conditions(bridge: DemoBridge, clips: Clips, seed: int) -> dict[str, Sequence[Clips]]:
    conditions: dict[str, Sequence[Clips]] = {AS_IT_IS: [clips]}
    rngs = [random.Random(f"{seed}/{index}") for index in range(NUM_SHUFFLES)]
    if bridge.reads_sound:
        conditions[SOUND_SHUFFLED] = [clips.with_sound_shuffled(rng) for rng in rngs]
    elif bridge.reads_order:
        conditions[FRAMES_SHUFFLED] = [clips.with_frames_shuffled(rng) for rng in rngs]
    return conditions


def _soft_prompts(captioner: Captioner, bridge: DemoBridge, clips: Clips) -> list[Tensor]:
    """Soft prompts NL of every clip."""
    assert clips.tokens is not None, "call `with_tokens` first"
    prompts: list[Tensor] = []
    for part in _passes(len(clips.sample_ids)):
        audio = Waveforms(clips.waveforms[part], clips.audio_valid[part]) if bridge.reads_sound else None
        prompts += captioner.soft_prompts_of_tokens(clips.tokens[part], audio=audio)
    return prompts


def _answer(captioner: Captioner, prompts: list[Tensor]) -> list[str]:
    captions: list[str] = []
    for part in _passes(len(prompts)):
        captions += captioner.language.generate(prompts[part], captioner.prompts(None, len(prompts[part])))
    return captions


def _choose(captioner: Captioner, prompts: list[Tensor], offered: list[list[str]]) -> list[str]:
    info = captioner.info
    return likeliest(captioner.language, prompts, offered, text=info.prompt, max_tokens=info.max_text_tokens)


def _passes(count: int) -> list[slice]:
    return [slice(start, start + _CLIPS_PER_PASS) for start in range(0, count, _CLIPS_PER_PASS)]
