"""The video demo's table of measured against bar, and its report with render_clip strips."""

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
MAX_FROM_BLIND = 0.1
MAX_MINUTES = 20
REPORT_FILE = "report_video.html"
NUM_SHOWN = 6
"""Clips of each kind in the report."""
_HEADINGS = {
    "direction": "Which way",
    "event": "Came or went, and the sound beside it",
    "first": "Which came first",
    "before": "What was there before",
}
Answers = Mapping[str, Mapping[str, Sequence[Mapping[str, str]]]]
"""By bridge and condition, captions by sample id, one table a shuffle."""


def measure(output: Path, clips: Clips, seconds: float) -> list[ResultRow]:
    """Measure everything that the video demo claims, on held-out clips.

    Args:
        output: Folder of the demo.
        clips: The held-out clips, decoded.
        seconds: That the steps of the clips took, all together.
    """
    stories, answers = read_scenes(output / "clip_world"), _answers(output, ANSWERS_FILE)
    choices = _answers(output, CHOICES_FILE)
    truths = [stories[sample_id] for sample_id in clips.sample_ids]
    without_order = best_guess_without(truths, clips.unordered_frames())
    # Balanced: what can be seen says nothing of what can be heard.
    without_sound = best_guess_without(truths, [0] * len(truths))
    rows: list[ResultRow] = []
    for bridge in BRIDGES:
        if bridge.reads_sound:
            rows += _sound_rows(bridge, stories, answers[bridge.name], without_sound)
        else:
            rows += _order_rows(bridge, stories, answers[bridge.name], choices[bridge.name], without_order)
    found = pq.read_table(output / "clip_data" / "quarantine.parquet")["sample_id"].to_pylist()
    rows.append(quarantine_row(read_broken(output / "clip_world"), set(found), "quarantined clips"))
    minutes = seconds / 60
    took = ResultRow(
        name="minutes of the clips' part", measured=f"{minutes:.1f}", bar=f"≤ {MAX_MINUTES}", ok=minutes <= MAX_MINUTES
    )
    return [*rows, took]


def write(output: Path, clips: Clips, table: Sequence[ResultRow]) -> Path:
    """Write the report: the table, loss curves, and clips as render_clip strips with what every bridge said of them.

    Returns:
        Its path.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for bridge in BRIDGES:
        for line in (output / bridge.name / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            curves.setdefault(f"loss/{bridge.title}", []).append((record["step"], record["loss/lm"]))
    path = output / REPORT_FILE
    write_report(
        str(path), "Q-Former demo: time and sound", table, curves, _galleries(output, clips),
        summary="Captions of clips on colour-shape combinations that no training saw. Every clip is there forwards and "
        "backwards, so that its frames without their order say nothing of what is asked. Chosen: the likeliest of the "
        "captions that differ in the order alone.",
    )  # fmt: skip
    return path


def _order_rows(
    bridge: DemoBridge,
    stories: Mapping[str, ClipScene],
    answers: Mapping[str, Sequence[Mapping[str, str]]],
    choices: Mapping[str, Sequence[Mapping[str, str]]],
    without_order: Mapping[str, float],
) -> list[ResultRow]:
    """Captions must tell the order where it is to be had; a choice must know it there, and guess where it is not.

    A bridge that always chooses one of a clip's two ways round scores one half exactly, for every clip is there both
    ways: that is what blind means. One far below the guess knows the order and tells the other, or does not even know
    what the frames together show.
    """
    plain, chosen = _mean_score(stories, answers[AS_IT_IS]), _mean_score(stories, choices[AS_IT_IS])
    disorder = FRAMES_SHUFFLED if bridge.knows_order else AS_IT_IS
    told, guessed = _mean_score(stories, answers[disorder]), _mean_score(stories, choices[disorder])
    rows = []
    for name in ORDER:
        title = f"{bridge.title}: {name}"
        if bridge.knows_order:
            rows.append(at_least(title, plain[name], MIN_ATTRIBUTE))
            rows.append(at_least(f"{title}, chosen", chosen[name], MIN_ATTRIBUTE))
        where = f", {FRAMES_SHUFFLED}" if bridge.knows_order else ""
        note = f" (in captions {told[name]:.3f})"
        rows.append(_near(f"{title}, chosen{where}", guessed[name], "blind", without_order[name], note))
    return [*rows, at_least(f"{bridge.title}: {THINGS}", plain[THINGS], None)]


def _sound_rows(
    bridge: DemoBridge,
    stories: Mapping[str, ClipScene],
    answers: Mapping[str, Sequence[Mapping[str, str]]],
    without_sound: Mapping[str, float],
) -> list[ResultRow]:
    plain, shuffled = _mean_score(stories, answers[AS_IT_IS]), _mean_score(stories, answers[SOUND_SHUFFLED])
    rows = [at_least(f"{bridge.title}: {name}", plain[name], None) for name in ORDER]
    for name in SOUND:
        rows.append(at_least(f"{bridge.title}: {name}", plain[name], MIN_ATTRIBUTE))
        title = f"{bridge.title}: {name}, {SOUND_SHUFFLED}"
        rows.append(_near(title, shuffled[name], "deaf", without_sound[name]))
    return rows


def _near(name: str, value: float, what: str, guess: float, note: str = "") -> ResultRow:
    bar = f"{what} guess {guess:.3f} ± {MAX_FROM_BLIND}"
    return ResultRow(name=name, measured=f"{value:.3f}{note}", bar=bar, ok=abs(value - guess) <= MAX_FROM_BLIND)


def _mean_score(stories: Mapping[str, ClipScene], tables: Sequence[Mapping[str, str]]) -> dict[str, float]:
    truths = [stories[sample_id] for table in tables for sample_id in table]
    return score(truths, [caption for table in tables for caption in table.values()])


def _galleries(output: Path, clips: Clips) -> dict[str, list[GalleryItem]]:
    stories, answers = read_scenes(output / "clip_world"), _answers(output, ANSWERS_FILE)
    galleries: dict[str, list[GalleryItem]] = {heading: [] for heading in _HEADINGS.values()}
    for index, sample_id in enumerate(clips.sample_ids):
        story = stories[sample_id]
        items = galleries[_HEADINGS[story.kind]]
        if len(items) == NUM_SHOWN:
            continue
        frames = [enlarged(frame) for frame in clips.pixels[index].permute(0, 2, 3, 1).numpy()]
        if story.tone is not None:
            wave = clips.waveforms[index].flatten().numpy()
            frames.append(spectrogram_picture(wave, height=frames[0].shape[0]))
        said = {bridge: answers[bridge.name][AS_IT_IS][0][sample_id] for bridge in BRIDGES}
        lines = [f"true: {captions(story)[0]}", *(f"{bridge.title}: {text}" for bridge, text in said.items())]
        able = [text for bridge, text in said.items() if bridge.reads_sound]
        items.append(
            GalleryItem(
                title=sample_id, frames=frames, lines=lines, ok=all(all(judge(story, text).values()) for text in able)
            )
        )
    return galleries


def _answers(output: Path, file: str) -> Answers:
    content: Any = json.loads((output / "clip_answers" / file).read_text(encoding="utf-8"))
    found: Answers = content
    return found
