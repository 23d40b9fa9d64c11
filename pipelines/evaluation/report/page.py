"""A report as one self-contained HTML file, with style, pictures and plots inside."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.storage import write_text
from pipelines.evaluation.report.style import STYLE

MIN_SHOWN_PX = 96
"""Smaller pictures are enlarged to this height for viewing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultRow:
    """One line of the result table."""

    name: str
    measured: str
    bar: str = ""
    """Required value, as text; "" if there is none."""
    ok: bool | None = None
    """Whether the bar is met; None without a bar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryItem:
    """One sample: a picture, or the frames of a clip as a film strip, with lines of text."""

    title: str
    frames: list[NDArray[np.uint8]]
    """Pictures, RGB [H, W, 3]."""
    lines: list[str]
    ok: bool | None = None
    """Colour of the item's edge: right, wrong, or neutral (None)."""


def write_report(
    path: str,
    title: str,
    results: Sequence[ResultRow],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    galleries: Mapping[str, Sequence[GalleryItem]],
    summary: str = "",
) -> None:
    """Write the report.

    All text is escaped, so captions and file names may hold anything.

    Args:
        path: Local path or URI of the HTML file.
        title: Heading.
        results: Table of measured values and bars; empty leaves it out.
        curves: (step, value) points by name. Names with the same part before a "/" share a plot.
        galleries: Items by section heading.
        summary: A paragraph below the heading.
    """
    parts = [f"<h1>{_escape(title)}</h1>"]
    if summary:
        parts.append(f"<p class=summary>{_escape(summary)}</p>")
    if results:
        parts.append(_section("Results", _table(results)))
    if curves:
        parts.append(_section("Training", f"<div class=plots>{''.join(_plots(curves))}</div>"))
    for heading, items in galleries.items():
        cards = "".join(_card(item) for item in items)
        parts.append(_section(heading, f"<div class=cards>{cards}</div>"))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_escape(title)}</title>'
    body = "\n".join(parts)
    page = f"<head>{head}\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body>"
    write_text(path, f'<!doctype html>\n<html lang="en">{page}</html>\n')


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{_escape(heading)}</h2>\n{content}</section>"


def _table(results: Sequence[ResultRow]) -> str:
    marks = {True: ("yes", "met"), False: ("no", "missed"), None: ("none", "")}
    rows = []
    for row in results:
        style, mark = marks[row.ok]
        cells = f"<td>{_escape(row.name)}<td class=number>{_escape(row.measured)}<td class=number>{_escape(row.bar)}"
        rows.append(f"<tr>{cells}<td class=ok-{style}>{mark}")
    return f"<table><tr><th>what<th class=number>measured<th class=number>bar<th>{''.join(rows)}</table>"


def _card(item: GalleryItem) -> str:
    style = {True: "right", False: "wrong", None: "neutral"}[item.ok]
    frames = "".join(f'<img alt="" src="{_png(frame)}">' for frame in item.frames)
    lines = "".join(f"<p>{_escape(line)}</p>" for line in item.lines)
    return f'<article class="{style}"><div class=strip>{frames}</div><h3>{_escape(item.title)}</h3>{lines}</article>'


def _png(frame: NDArray[np.uint8]) -> str:
    """A picture as a data URL, enlarged by a whole factor when it is very small."""
    image = Image.fromarray(np.ascontiguousarray(frame))
    factor = -(-MIN_SHOWN_PX // image.height)
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plots(curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
    groups: dict[str, dict[str, Sequence[tuple[int, float]]]] = {}
    for name, points in curves.items():
        group, _, line = name.rpartition("/")
        groups.setdefault(group or name, {})[line] = points
    return [_plot(heading, lines) for heading, lines in groups.items()]


def _plot(heading: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    # The figure class itself: pyplot keeps figures and a backend in global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot([step for step, _ in points], [value for _, value in points], label=name, linewidth=1.4)
    axes.set_title(heading, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    # Embedded as an image, because ids of several inline SVGs would clash.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class=plot alt="{_escape(heading)}" src="data:image/svg+xml;base64,{data}">'
