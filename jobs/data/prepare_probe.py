"""Check rows in many processes: each decoded once, a few at a time, in order."""

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions

from pipelines.data.batches.decode_rows import CheckRows, make_check_table
from pipelines.data.failures import MediaError
from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.check_result import CheckResult
from pipelines.data.media.samples import DecodeSettings, Limits
from qformer.preprocessing import Preprocessing

_ROWS = 32
_BLOCKS_PER_WORKER = 2
_TRIES = 2
_DEATHS = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
"""What Ray raises when the process that worked on something is gone."""
_PREPROCESSING = Preprocessing(
    height=32,
    width=32,
    resize_short_side=32,
    interpolation="nearest",
    crop="squash",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def probe(
    blocks: Iterable[pa.Table],
    *,
    num_frames: int,
    limits: Limits,
    decode_workers: int,
    audio: AudioSampling | None = None,
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Decode every row once to learn which can be used, and what the files are.

    Only a few rows for each worker are held at a time. Rows whose decoding kills a worker are tried again, each
    alone, so that only the one that does it is lost.

    Args:
        blocks: Manifest rows.
        num_frames: Frames sampled of each video.
        limits: What one file may cost.
        decode_workers: Actors that decode.
        audio: Segments of its sound; None: none.

    Yields:
        Rows, in order, and what `CheckRows` tells of them.
    """
    settings = DecodeSettings(preprocessing=_PREPROCESSING, num_frames=num_frames, limits=limits, audio=audio)
    checkers = [_Checker(settings) for _ in range(decode_workers)]
    waiting: collections.deque[tuple[pa.Table, _Checker, Any]] = collections.deque()
    try:
        for number, rows in enumerate(_pieces(blocks)):
            if len(waiting) == _BLOCKS_PER_WORKER * decode_workers:
                yield _checked(*waiting.popleft())
            checker = checkers[number % decode_workers]
            waiting.append((rows, checker, checker.submit(rows)))
        while waiting:
            yield _checked(*waiting.popleft())
    finally:
        for checker in checkers:
            checker.close()


class _Checker:
    """An actor that checks rows, replaced when it dies."""

    def __init__(self, settings: DecodeSettings) -> None:
        self._class = ray.remote(CheckRows).options(num_cpus=1, max_restarts=0)
        self._settings = settings
        self._actor = self._class.remote(settings)

    def submit(self, rows: pa.Table) -> Any:
        return self._actor.__call__.remote(rows)

    def alone(self, row: pa.Table) -> pa.Table:
        """Check a row that was in a block which killed a worker."""
        for _ in range(_TRIES):
            try:
                return ray.get(self.submit(row))
            except _DEATHS:
                self.close()
                self._actor = self._class.remote(self._settings)
                # A worker that cannot even start says nothing about the row.
                ray.get(self.submit(row.slice(0, 0)))
        error = MediaError("corrupt", "decoding it kills the process", tries=_TRIES)
        return make_check_table(row, [CheckResult(error=error)])

    def close(self) -> None:
        ray.kill(self._actor)


def _checked(rows: pa.Table, checker: _Checker, reference: Any) -> tuple[pa.Table, pa.Table]:
    try:
        return rows, ray.get(reference)
    except _DEATHS:
        return rows, pa.concat_tables([checker.alone(rows.slice(row, 1)) for row in range(len(rows))])


def _pieces(blocks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for block in blocks:
        for start in range(0, len(block), _ROWS):
            yield block.slice(start, _ROWS)
