"""Write the media files of a corpus in parallel, and damage some of them."""

import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

DAMAGES = ("truncated", "garbage", "empty", "missing")
# Below this many files a process pool costs more than it saves.
_POOL_FROM_ROWS = 300
_CHUNK_ROWS = 64

Row = TypeVar("Row")


def write_media(folder: Path, rows: Sequence[Row], write: Callable[[Path, Row], None]) -> None:
    """Call a function for every row, in a process pool if there are many.

    Args:
        folder: Folder of the corpus.
        rows: One row per file.
        write: Module-level function of folder and row, which other processes can import.
    """
    if len(rows) < _POOL_FROM_ROWS:
        _write_chunk(folder, rows, write)
        return
    chunks = [rows[start : start + _CHUNK_ROWS] for start in range(0, len(rows), _CHUNK_ROWS)]
    # Spawn, not fork: the caller may have threads (torch, Ray) that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=context) as pool:
        for future in [pool.submit(_write_chunk, folder, chunk, write) for chunk in chunks]:
            future.result()


def damage(path: Path, how: str, rng: random.Random) -> None:
    """Damage a file so that no decoder can read a picture from it.

    Args:
        path: File to damage.
        how: One of `DAMAGES`.
        rng: Random number generator.
    """
    content = path.read_bytes()
    match how:
        case "truncated":
            # A JPEG of this size keeps only part of its tables, an MP4 loses the index at its end.
            share = rng.uniform(0.1, 0.3) if path.suffix == ".jpg" else 0.5
            path.write_bytes(content[: max(1, int(len(content) * share))])
        case "garbage":
            path.write_bytes(rng.randbytes(len(content)))
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
        case other:
            raise ValueError(f"unknown damage {other!r}")


def _write_chunk(folder: Path, rows: Sequence[Row], write: Callable[[Path, Row], None]) -> None:
    for row in rows:
        write(folder, row)
