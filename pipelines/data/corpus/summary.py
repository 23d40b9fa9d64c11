"""Counts over a prepared corpus, added up block by block."""

import bisect
import collections
import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data import schema

CAPTION_WORDS = (0, 4, 8, 16, 32, 64, 128)
"""Upper bounds of the bins of the histogram of caption lengths."""
_SAMPLED_VALUES = 65_536
_NUMERIC_COLUMNS = (schema.WIDTH, schema.HEIGHT, schema.DURATION_S, schema.FPS, schema.SIZE_BYTES)


class CorpusSummary:
    """Counts of rows, captions, files and quarantined rows."""

    def __init__(self) -> None:
        self._counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._words = [0] * (len(CAPTION_WORDS) + 1)
        self._ranges: dict[tuple[str, str], _ValueRange] = collections.defaultdict(_ValueRange)
        self.num_used = self.num_quarantined = 0
        self._num_captions = self._num_without = 0

    def add_rows(self, rows: pa.Table) -> None:
        """Count rows of the manifest."""
        self.num_used += len(rows)
        for name in (schema.KIND, schema.SPLIT, schema.SOURCE):
            self._counts[f"used_by_{name}"].update(_counted(rows[name]))
        for captions in rows[schema.CAPTIONS].to_pylist():
            self._num_captions += len(captions)
            self._num_without += not captions
            for caption in captions:
                self._words[bisect.bisect_left(CAPTION_WORDS, len(caption.split()))] += 1

    def add_facts(self, rows: pa.Table) -> None:
        """Count rows of the probe."""
        for kind in pc.unique(rows[schema.KIND]).to_pylist():
            of_kind = rows.filter(pc.equal(rows[schema.KIND], kind))
            self._counts[f"{kind}_codecs"].update(_counted(of_kind[schema.CODEC]))
            for name in _NUMERIC_COLUMNS:
                self._ranges[kind, name].add(of_kind[name].drop_null().to_numpy())
            self._counts["rotated"][kind] += pc.sum(pc.not_equal(of_kind[schema.ROTATION_DEG], 0)).as_py() or 0
            self._counts["with_sound"][kind] += pc.sum(of_kind[schema.HAS_AUDIO]).as_py() or 0

    def add_quarantined(self, rows: pa.Table) -> None:
        """Count rows of the quarantine table."""
        self.num_quarantined += len(rows)
        self._counts["quarantined_by_error"].update(_counted(rows[schema.ERROR_CLASS]))
        self._counts["quarantined_by_stage"].update(_counted(rows[schema.STAGE]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        names = ("used_by_kind", "used_by_split", "used_by_source", "quarantined_by_error", "quarantined_by_stage")
        kinds = sorted(self._counts["used_by_kind"])
        return {
            "rows_in": self.num_used + self.num_quarantined,
            "rows_used": self.num_used,
            "rows_quarantined": self.num_quarantined,
            **{name: dict(self._counts[name].most_common()) for name in names},
            "captions": self._num_captions,
            "rows_without_captions": self._num_without,
            "caption_words": {
                label: count for label, count in zip(_labels(), self._words, strict=True) if count or label != "0"
            },
            "files": {
                kind: {
                    "codecs": dict(self._counts[f"{kind}_codecs"].most_common()),
                    "rotated": self._counts["rotated"][kind],
                    "with_sound": self._counts["with_sound"][kind],
                    **{name: values for name in _NUMERIC_COLUMNS if (values := self._ranges[kind, name].to_dict())},
                }
                for kind in kinds
            },
        }


class _ValueRange:
    """Minimum, median and maximum of many numbers; the median is that of a random sample of very many."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._sample = np.empty(0)
        self._num_values = 0
        self._ends: list[float] = []

    def add(self, values: np.ndarray[Any, Any]) -> None:
        if not len(values):
            return
        self._ends = [min([*self._ends, float(values.min())]), max([*self._ends, float(values.max())])]
        self._num_values += len(values)
        joined = np.concatenate([self._sample, values])
        if len(joined) > _SAMPLED_VALUES:
            # The share of new values in the sample is their share of all values.
            num_new = round(_SAMPLED_VALUES * len(values) / self._num_values)
            old = self._rng.choice(self._sample, min(_SAMPLED_VALUES - num_new, len(self._sample)), replace=False)
            joined = np.concatenate([old, self._rng.choice(values, min(num_new, len(values)), replace=False)])
        self._sample = joined

    def to_dict(self) -> dict[str, float]:
        if not self._num_values:
            return {}
        low, high = self._ends
        return {"min": round(low, 3), "median": round(float(np.median(self._sample)), 3), "max": round(high, 3)}


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(row["values"] or "?"): row["counts"] for row in pc.value_counts(column).to_pylist()}


def _labels() -> list[str]:
    ranges = [f"{low + 1}-{high}" for low, high in itertools.pairwise(CAPTION_WORDS)]
    return ["0", *ranges, f">{CAPTION_WORDS[-1]}"]
