"""The video demo's table of measured values and bars, and its HTML report with film strips."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.demo.results import at_least, enlarged, quarantine_row
from jobs.demo.video.answers import ANSWERS_FILE, AS_IT_IS, CHOICES_FILE, FRAMES_SHUFFLED, SOUND_SHUFFLED, Clips
from jobs.demo.video.bridges import BRIDGES, DemoBridge
from jobs.demo.video.scoring import ORDER, SOUND, THINGS, best_guess_without, judge, score
from jobs.demo.video.world.corpus import read_broken, read_scenes
from jobs.demo.video.world.grammar import captions
from jobs.demo.video.world.scenes import ClipScene
from jobs.demo.video.world.spectrogram import spectrogram_picture
from pipelines.evaluation.report.page import GalleryItem, ResultRow, write_report

MIN_ATTRIBUTE = 0.75
MAX_FROM_GUESS = 0.1
MAX_MINUTES = 20
REPORT_FILE = "report_video.html"
NUM_SHOWN = 6
"""Number of clips of each kind in the report."""
_HEADINGS = {
    "direction": "Direction of a motion",
    "event": "Appears or disappears, before or after the sound",
    "first": "Which thing comes first",
    "before": "What a thing was before",
}
Answers = Mapping[str, Mapping[str, Sequence[Mapping[str, str]]]]
"""Captions by bridge, condition and sample id, with one table per shuffle."""


def measure(output: Path, clips: Clips, seconds: float) -> list[ResultRow]:
    """Measure the results of the video demo on held-out clips.

    Args:
        output: Folder of the demo.
        clips: Decoded held-out clips.
        seconds: Total duration of the video part.
    """
    scenes, answers = read_scenes(output / "clip_world"), _answers(output, ANSWERS_FILE)
    choices = _answers(output, CHOICES_FILE)
    truths = [scenes[sample_id] for sample_id in clips.sample_ids]
    without_order = best_guess_without(truths, clips.unordered_frames())
    # The corpus is balanced: frames carry no information about sound.
    without_sound = best_guess_without(truths, [0] * len(truths))
    rows: list[ResultRow] = []
    for bridge in BRIDGES:
        if bridge.reads_sound:
            rows += _sound_rows(bridge, scenes, answers[bridge.name], without_sound)
        else:
            rows += _order_rows(bridge, scenes, answers[bridge.name], choices[bridge.name], without_order)
    found = pq.read_table(output / "clip_data" / "quarantine.parquet")["sample_id"].to_pylist()
    rows.append(quarantine_row(read_broken(output / "clip_world"), set(found), "quarantined clips"))
    minutes = seconds / 60
    took = ResultRow(
        name="minutes of the clips' part", measured=f"{minutes:.1f}", bar=f"≤ {MAX_MINUTES}", ok=minutes <= MAX_MINUTES
    )
    return [*rows, took]


def write(output: Path, clips: Clips, table: Sequence[ResultRow]) -> Path:
    """Write the report: the table, loss curves, and clips as film strips with the captions of all bridges.

    Returns:
        The path of the report.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for bridge in BRIDGES:
        for line in (output / bridge.name / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            curves.setdefault(f"loss/{bridge.title}", []).append((record["step"], record["loss/lm"]))
    path = output / REPORT_FILE
    write_report(
        str(path), "Q-Former demo: time and sound", table, curves, _galleries(output, clips),
        summary="Captions of clips with colour-shape combinations that occur in no training data. Every clip occurs "
        "forwards and backwards, so its frames without their order carry no information about the order. Chosen: the "
        "likeliest of the captions that differ in the order alone.",
    )  # fmt: skip
    return path


def _order_rows(
    bridge: DemoBridge,
    scenes: Mapping[str, ClipScene],
    answers: Mapping[str, Sequence[Mapping[str, str]]],
    choices: Mapping[str, Sequence[Mapping[str, str]]],
    without_order: Mapping[str, float],
) -> list[ResultRow]:
    """Rows of a bridge without sound: accuracy of the order, with frames in order and (as a guess) without.

    A bridge without the order scores exactly one half if it always chooses the same of a clip's two directions, because
    every clip occurs in both. A score far below that means that it reads the order but states the other one, or that it
    does not recognise what the frames show.
    """
    plain, chosen = _mean_score(scenes, answers[AS_IT_IS]), _mean_score(scenes, choices[AS_IT_IS])
    disorder = FRAMES_SHUFFLED if bridge.reads_order else AS_IT_IS
    generated, guessed = _mean_score(scenes, answers[disorder]), _mean_score(scenes, choices[disorder])
    rows = []
    for name in ORDER:
        title = f"{bridge.title}: {name}"
        if bridge.reads_order:
            rows.append(at_least(title, plain[name], MIN_ATTRIBUTE))
            rows.append(at_least(f"{title}, chosen", chosen[name], MIN_ATTRIBUTE))
        where = f", {FRAMES_SHUFFLED}" if bridge.reads_order else ""
        note = f" (in captions {generated[name]:.3f})"
        rows.append(
            _close_to(f"{title}, chosen{where}", guessed[name], "guess without order", without_order[name], note)
        )
    return [*rows, at_least(f"{bridge.title}: {THINGS}", plain[THINGS], None)]


def _sound_rows(
    bridge: DemoBridge,
    scenes: Mapping[str, ClipScene],
    answers: Mapping[str, Sequence[Mapping[str, str]]],
    without_sound: Mapping[str, float],
) -> list[ResultRow]:
    plain, shuffled = _mean_score(scenes, answers[AS_IT_IS]), _mean_score(scenes, answers[SOUND_SHUFFLED])
    rows = [at_least(f"{bridge.title}: {name}", plain[name], None) for name in ORDER]
    for name in SOUND:
        rows.append(at_least(f"{bridge.title}: {name}", plain[name], MIN_ATTRIBUTE))
        title = f"{bridge.title}: {name}, {SOUND_SHUFFLED}"
        rows.append(_close_to(title, shuffled[name], "guess without sound", without_sound[name]))
    return rows


def _close_to(name: str, value: float, what: str, guess: float, note: str = "") -> ResultRow:
    bar = f"{what} {guess:.3f} ± {MAX_FROM_GUESS}"
    return ResultRow(name=name, measured=f"{value:.3f}{note}", bar=bar, ok=abs(value - guess) <= MAX_FROM_GUESS)


def _mean_score(scenes: Mapping[str, ClipScene], tables: Sequence[Mapping[str, str]]) -> dict[str, float]:
    truths = [scenes[sample_id] for table in tables for sample_id in table]
    return score(truths, [caption for table in tables for caption in table.values()])


def _galleries(output: Path, clips: Clips) -> dict[str, list[GalleryItem]]:
    scenes, answers = read_scenes(output / "clip_world"), _answers(output, ANSWERS_FILE)
    galleries: dict[str, list[GalleryItem]] = {heading: [] for heading in _HEADINGS.values()}
    for index, sample_id in enumerate(clips.sample_ids):
        scene = scenes[sample_id]
        items = galleries[_HEADINGS[scene.kind]]
        if len(items) == NUM_SHOWN:
            continue
        frames = [enlarged(frame) for frame in clips.pixels[index].permute(0, 2, 3, 1).numpy()]
        if scene.tone is not None:
            wave = clips.waveforms[index].flatten().numpy()
            frames.append(spectrogram_picture(wave, height=frames[0].shape[0]))
        texts = {bridge: answers[bridge.name][AS_IT_IS][0][sample_id] for bridge in BRIDGES}
        lines = [f"true: {captions(scene)[0]}", *(f"{bridge.title}: {text}" for bridge, text in texts.items())]
        with_sound = [text for bridge, text in texts.items() if bridge.reads_sound]
        items.append(
            GalleryItem(
                title=sample_id,
                frames=frames,
                lines=lines,
                ok=all(all(judge(scene, text).values()) for text in with_sound),
            )
        )
    return galleries


def _answers(output: Path, file: str) -> Answers:
    content: Any = json.loads((output / "clip_answers" / file).read_text(encoding="utf-8"))
    found: Answers = content
    return found
