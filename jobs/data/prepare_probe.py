"""Check rows in many processes: each row is decoded once, in order."""

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
_WORKER_CRASHES = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
"""Errors of Ray when the worker process has ended."""
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
    """Decode every row once to find which can be used, and the facts of their files.

    Only a few rows of each worker are held at a time. If decoding kills a worker, its rows are tried again one by one,
    so that only the row that causes it is lost.

    Args:
        blocks: Manifest rows.
        num_frames: Number of frames sampled from each video.
        limits: Limits for one file.
        decode_workers: Number of decode actors.
        audio: Segments of sound to decode; None: no sound.

    Yields:
        Rows in order, and their table of `CheckRows`.
    """
    settings = DecodeSettings(preprocessing=_PREPROCESSING, num_frames=num_frames, limits=limits, audio=audio)
    checkers = [_Checker(settings) for _ in range(decode_workers)]
    pending: collections.deque[tuple[pa.Table, _Checker, Any]] = collections.deque()
    try:
        for number, rows in enumerate(_pieces(blocks)):
            if len(pending) == _BLOCKS_PER_WORKER * decode_workers:
                yield _checked(*pending.popleft())
            checker = checkers[number % decode_workers]
            pending.append((rows, checker, checker.submit(rows)))
        while pending:
            yield _checked(*pending.popleft())
    finally:
        for checker in checkers:
            checker.close()


class _Checker:
    """An actor that checks rows, replaced after a crash."""

    def __init__(self, settings: DecodeSettings) -> None:
        self._class = ray.remote(CheckRows).options(num_cpus=1, max_restarts=0)
        self._settings = settings
        self._actor = self._class.remote(settings)

    def submit(self, rows: pa.Table) -> Any:
        return self._actor.__call__.remote(rows)

    def check_single(self, row: pa.Table) -> pa.Table:
        """Check one row of a block that killed a worker."""
        for _ in range(_TRIES):
            try:
                return ray.get(self.submit(row))
            except _WORKER_CRASHES:
                self.close()
                self._actor = self._class.remote(self._settings)
                # A failure to start the new worker is not the row's fault.
                ray.get(self.submit(row.slice(0, 0)))
        error = MediaError("corrupt", "decoding it kills the process", tries=_TRIES)
        return make_check_table(row, [CheckResult(error=error)])

    def close(self) -> None:
        ray.kill(self._actor)


def _checked(rows: pa.Table, checker: _Checker, reference: Any) -> tuple[pa.Table, pa.Table]:
    try:
        return rows, ray.get(reference)
    except _WORKER_CRASHES:
        return rows, pa.concat_tables([checker.check_single(rows.slice(row, 1)) for row in range(len(rows))])


def _pieces(blocks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for block in blocks:
        for start in range(0, len(block), _ROWS):
            yield block.slice(start, _ROWS)
