import functools

import pyarrow as pa
import pytest

from pipelines.data.corpus import duplicates
from pipelines.data.corpus.duplicates import COLUMNS, find_duplicates, is_leak
from pipelines.data.corpus.summary import CorpusSummary
from pipelines.data.media.facts import content_hash
from tests.pipelines.data.builders import manifest


def _find(rows, read=None):
    """Duplicates of (id, media, split, start_s, end_s, content) as {id: (other, is it a leak)}."""
    table = pa.table(
        {
            name: [row[place] if place < 5 else content_hash(row[5].encode()) for row in rows]
            for place, name in enumerate(COLUMNS)
        }
    )
    read = read or (lambda table, columns: (table.select(columns).slice(at, 2) for at in range(0, len(table), 2)))
    found = find_duplicates(functools.partial(read, table))
    return {
        row["sample_id"]: (row["duplicate_of"], bool(leak))
        for row, leak in zip(found.to_pylist(), is_leak(found), strict=True)
    }


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], {}),
        # Two files of one content, and one file in two rows.
        (
            [("a", "/1", "train", None, None, "x"), ("b", "/2", "train", None, None, "x")],
            {"b": ("a", False)},
        ),
        ([("a", "/1", "train", None, None, "x"), ("b", "/1", "train", None, None, "x")], {}),
        # Content in the rows themselves.
        ([("a", None, "val", None, None, "x"), ("b", None, "val", None, None, "x")], {"b": ("a", False)}),
        # In training and evaluation, whichever comes first, also by the same file.
        (
            [("a", "/1", "train", None, None, "x"), ("b", "/1", "val", None, None, "x")],
            {"a": ("b", True)},
        ),
        (
            [("b", "/1", "val", None, None, "x"), ("c", "/2", "val", None, None, "x"), ("a", "/3", "train", 1, 2, "x")],
            {"c": ("b", False), "a": ("b", True)},
        ),
        # Parts of one video: apart, touching, overlapping, and against the whole.
        ([("a", "/1", "train", 0, 5, "x"), ("b", "/1", "val", 6, 9, "x")], {}),
        ([("a", "/1", "train", 0, 5, "x"), ("b", "/1", "val", 5, None, "x")], {}),
        ([("a", "/1", "train", 0, 5, "x"), ("b", "/1", "val", 4.9, None, "x")], {"a": ("b", True)}),
        ([("a", "/1", "train", None, None, "x"), ("b", "/1", "val", 4, 5, "x")], {"a": ("b", True)}),
        # Two evaluation splits may share files: neither is trained on.
        ([("a", "/1", "val", None, None, "x"), ("b", "/1", "test", None, None, "x")], {}),
        # Others are no one's business.
        ([("a", "/1", "train", None, None, "x"), ("b", "/2", "val", None, None, "y")], {}),
    ],
)
def test_duplicates(rows, expected):
    assert _find(rows) == expected


def _rows(count, content, media, split="train"):
    return [(f"{split}{content}{n}", media(n), split, None, None, content) for n in range(count)]


def test_rows_that_share_one_file_are_never_held(monkeypatch):
    """Five captions a picture: only what another file or split shows, too, is looked at."""
    held = []
    monkeypatch.setattr(duplicates, "_duplicates_of_group", lambda group: held.append(len(group)) or [])
    rows = [row for content in "abcdefgh" for row in _rows(50, content, lambda n, content=content: f"/{content}.jpg")]
    rows += _rows(2, "z", lambda n: f"/{n}.jpg")
    assert _find(rows) == {} and held == [2]


def test_many_suspects_are_compared_a_portion_at_a_time(monkeypatch):
    rows = [row for content in "abcdefgh" for row in _rows(3, content, lambda n, content=content: f"/{content}{n}.jpg")]
    rows += _rows(7, "i", str) + _rows(1, "a", lambda n: "/a1.jpg", "val")
    rows = rows[::2] + rows[1::2]
    whole = _find(rows)
    assert len(whole) == 8 * 2 + 6 + 1
    compared = []

    def read(table, columns):
        blocks = [table.select(columns).slice(at, 2) for at in range(0, len(table), 2)]
        compared.extend([columns] if columns == list(COLUMNS) else [])
        return blocks

    monkeypatch.setattr(duplicates, "_COMPARED_ROWS", 6)
    assert _find(rows, read) == whole
    assert 5 <= len(compared) <= 7


def test_counts_of_captions():
    summary = CorpusSummary()
    captions = [["a b c d", "a b c d e", ""], [], [" ".join("w" * 129)]]
    summary.add_rows(manifest([{"sample_id": str(n), "captions": texts} for n, texts in enumerate(captions)]))
    counts = summary.to_dict()
    assert (counts["captions"], counts["rows_without_captions"], counts["rows_in"]) == (4, 1, 3)
    assert {label: count for label, count in counts["caption_words"].items() if count} == {
        "0": 1,
        "1-4": 1,
        "5-8": 1,
        ">128": 1,
    }


def test_spread_of_many_values():
    """The ends are exact, the middle is of a sample."""
    from pipelines.data.corpus.summary import _ValueRange

    spread = _ValueRange()
    values = pa.array(range(300_001)).to_numpy()
    for start in range(0, len(values), 7000):
        spread.add(values[start : start + 7000])
    counts = spread.to_dict()
    assert (counts["min"], counts["max"]) == (0, 300_000) and abs(counts["median"] - 150_000) < 3000
