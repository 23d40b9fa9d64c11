"""The HTML report: complete, escaped, and free of outside resources."""

import re
from html.parser import HTMLParser

import numpy as np

from pipelines.evaluation.report.page import GalleryItem, ResultRow, write_report


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.texts, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def picture(height=40, width=60):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def read_report(tmp_path):
    path = tmp_path / "report.html"
    write_report(
        str(path),
        "Demo <script>alert(1)</script>",
        [
            ResultRow(name="colour", measured="0.91", bar="≥ 0.80", ok=True),
            ResultRow(name="shape", measured="0.70", bar="≥ 0.80", ok=False),
            ResultRow(name="whole caption", measured="0.55"),
        ],
        {"loss/itc": [(0, 2.0), (10, 1.0)], "loss/itm": [(0, 0.7), (10, 0.5)], "learning rate": [(0, 0.0)]},
        {
            "Images": [GalleryItem(title="a.jpg", frames=[picture()], lines=['a "red" <b>circle</b>'], ok=True)],
            "Clips": [GalleryItem(title="b.mp4", frames=[picture()] * 4, lines=["a square"], ok=False)],
        },
    )
    reader = Reader()
    text = path.read_text()
    reader.feed(text)
    return text, reader


def test_report_holds_every_part(tmp_path):
    text, reader = read_report(tmp_path)
    words = " ".join(reader.texts)
    for wanted in ("colour", "0.91", "≥ 0.80", "met", "missed", "whole caption", "Images", "Clips", "a square"):
        assert wanted in words
    assert len(reader.sources) == 2 + 1 + 4  # two plots, one picture, a strip of four frames
    assert 'class="right"' in text and 'class="wrong"' in text


def test_report_escapes_text(tmp_path):
    text, reader = read_report(tmp_path)
    assert "script" not in reader.tags and "b" not in reader.tags
    assert 'a "red" <b>circle</b>' in reader.texts


def test_report_needs_no_outside_resource(tmp_path):
    text, reader = read_report(tmp_path)
    assert all(source.startswith("data:") for source in reader.sources)
    assert not re.search(r"@import|url\(|<link", text)
