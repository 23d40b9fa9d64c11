"""The data plane against torch DataLoaders and Ray's own readers: images/s, clips/s, and memory.

Both sides read the same files (warm in the page cache) and make the same tensors in batches of 32, on two cores with
two decoding processes each, and are timed in a steady state, in turns. Clips are 10 s of 640x360 H.264 at 30 frames/s,
of which eight frames are used. Memory is that of all processes at their peak.
Segments are those of training: one hands over to the next in 512 steps, outside the timed window. That takes about
three seconds of work, 4 % of the time that such a segment of images takes.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import multiprocessing

from jobs.bench.data_media import JPEG_BYTES, JPEG_SIZE, write_clips, write_jpegs
from jobs.bench.data_memory import PeakMemory
from jobs.bench.data_peers import NUM_FRAMES, SIDE, VIDEO_READS, Peer, Read, TimedWindow, peer, read_image
from jobs.bench.result import BenchResult
from jobs.cluster.session import ray_session
from jobs.settings.data import RaySettings
from pipelines.data import schema
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.media.samples import DecodeSettings, SampleDecoder
from pipelines.data.order.global_batches import Order
from pipelines.data.order.mixture import Corpus, MixtureSource
from pipelines.data.order.row_index import TableRows
from qformer.preprocessing import Preprocessing

WORKERS = 2
RAY = RaySettings(num_cpus=WORKERS)
"""Ray session; with more CPUs, two segments would decode at once at a handover."""
MAX_LEVELS = 1.5
"""Allowed mean difference of pixels, of 255, for scaled decoding."""
MAX_CLIP_LEVELS = 6.0
"""Allowed mean difference of clips; a larger one means different frames."""
DECODE = DecodeSettings(
    preprocessing=Preprocessing(
        height=SIDE,
        width=SIDE,
        resize_short_side=SIDE,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    num_frames=NUM_FRAMES,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCase:
    """Sizes of the measurement."""

    batch_size: int = 32
    rounds: int = 3
    jpegs: int = 48
    jpeg_size: tuple[int, int] = JPEG_SIZE
    jpeg_bytes: int = JPEG_BYTES
    images: TimedWindow = TimedWindow(warm_up=8, timed=64)
    clips_each: int = 6
    clip_frames: int = 300
    gops: tuple[int, ...] = (30, 250)
    clips: TimedWindow = TimedWindow(warm_up=3, timed=6)
    trial: TimedWindow = TimedWindow(warm_up=1, timed=2, tail=1)
    """Window of the trials that find the best clip peer."""
    ray_images: int = 640
    ray_clips: int = 24
    memory_images: tuple[int, int] = (2_000, 20_000)
    memory_segment_steps: int = 40
    """Steps per segment; small, so that both counts include handovers, which briefly need a second set of processes."""


def run() -> BenchResult:
    """Measure at full size."""
    return measure(DataCase())


def measure(case: DataCase) -> BenchResult:
    """Measure images, clips and memory.

    Raises:
        ValueError: If ours and a peer do not make the same pixels.
    """
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="qformer-bench-") as folder:
        root = Path(folder)
        jpegs = write_jpegs(root / "jpegs", case.jpegs, case.jpeg_size, case.jpeg_bytes)
        clips = {gop: write_clips(root / f"gop{gop}", case.clips_each, gop, case.clip_frames) for gop in case.gops}
        small = write_jpegs(root / "small", case.jpegs, (160, 120), 6_000)
        with peer() as other, ray_session(RAY):
            image_ratio = _images(case, jpegs, other, seconds)
            clip_ratio = min(_clips(case, clips[gop], f"gop {gop}", other, seconds) for gop in case.gops)
            _ray_readers(case, jpegs, clips[case.gops[0]], seconds)
        peaks = [_peak_bytes(case, small, count) for count in case.memory_images]
    sizes = ", ".join(f"{n} images: {p / 2**20:.0f} MiB" for n, p in zip(case.memory_images, peaks, strict=True))
    print(f"memory of all processes, {sizes}")
    ratios = {
        "images_vs_dataloader": image_ratio,
        "clips_vs_best_peer": clip_ratio,
        "memory_growth": peaks[1] / peaks[0],
    }
    return BenchResult(bench="data", seconds=seconds, ratios=ratios)


def _images(case: DataCase, paths: list[str], other: Peer, seconds: dict[str, float]) -> float:
    """Return how many times as many images/s ours makes as a DataLoader with Pillow."""
    difference = _difference(other, read_image, paths[:8], schema.IMAGE)
    print(f"images: mean pixel difference {difference:.2f} levels")
    if difference > MAX_LEVELS:
        raise ValueError(f"pixels differ by {difference:.2f} levels, more than {MAX_LEVELS}")
    return _alternate(case, "images", paths, schema.IMAGE, case.images, other, ("dataloader", read_image), seconds)


def _clips(case: DataCase, paths: list[str], title: str, other: Peer, seconds: dict[str, float]) -> float:
    """Return how many times as many clips/s ours makes as the best peer."""
    trials: dict[str, float] = {}
    repeated = _repeated(paths, case.batch_size * case.trial.batches)
    for name, read in VIDEO_READS.items():
        found = other.read(read, paths[0])
        if isinstance(found, str):
            print(f"{title}: {name} does not work here ({found})")
            continue
        difference = _difference(other, read, paths[:2], schema.VIDEO)
        if difference > MAX_CLIP_LEVELS:
            raise ValueError(f"{name}'s frames differ by {difference:.1f} levels; they are not the same frames")
        trials[name] = other.seconds_per_batch(read, repeated, case.batch_size, case.trial, WORKERS)
        rate = case.batch_size / trials[name]
        print(f"{title}: {name} {rate:.1f} clips/s in a trial, {difference:.2f} levels from ours")
    best = min(trials, key=lambda name: trials[name])
    chosen = (best, VIDEO_READS[best])
    return _alternate(case, title, paths, schema.VIDEO, case.clips, other, chosen, seconds)


def _alternate(
    case: DataCase,
    title: str,
    paths: list[str],
    kind: str,
    window: TimedWindow,
    other: Peer,
    peer_read: tuple[str, Read],
    seconds: dict[str, float],
) -> float:
    """Time ours and a peer in turns; return the median ratio of the rounds."""
    name, read = peer_read
    files = _repeated(paths, case.batch_size * window.batches)
    ours, theirs = [], []
    for _ in range(case.rounds):
        ours.append(_our_seconds(files, kind, case, window))
        theirs.append(other.seconds_per_batch(read, files, case.batch_size, window, WORKERS))
    ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
    seconds[f"{title}, batch, ours"] = statistics.median(ours)
    seconds[f"{title}, batch, {name}"] = statistics.median(theirs)
    rates = [case.batch_size / statistics.median(values) for values in (ours, theirs)]
    print(
        f"{title}: ours {rates[0]:.1f}/s, {name} {rates[1]:.1f}/s, "
        f"ratio of each round {' '.join(f'{ratio:.2f}' for ratio in ratios)}"
    )
    return statistics.median(ratios)


def _our_seconds(paths: list[str], kind: str, case: DataCase, window: TimedWindow) -> float:
    return window.seconds_per_batch(_checked(our_batches(paths, kind, case.batch_size)))


def our_batches(
    paths: list[str], kind: str, batch_size: int, segment_steps: int | None = None
) -> Iterator[SampleBatch]:
    """Our batches of these files, in the order of training, by the feed that training reads from.

    Args:
        paths: Paths of the files.
        kind: "image" or "video".
        batch_size: Batch size.
        segment_steps: Largest number of steps per segment; None: that of training.
    """
    import ray

    from pipelines.training.group.feed import SEGMENT_STEPS, BatchFeed, rank_batches

    corpus = Corpus([MixtureSource("bench", TableRows(_manifest(paths, kind)))])
    order = Order(corpus.streams("proportional"), 0, batch_size)
    feed = (
        ray.remote(BatchFeed)
        .options(num_cpus=0)
        .remote(
            order,
            [ray.put(corpus)],
            total_steps=order.steps_per_epoch,
            decode_workers=WORKERS,
            segment_steps=segment_steps or SEGMENT_STEPS,
        )
    )
    steps = order.steps_per_epoch
    yield from rank_batches(feed, attempt="bench", start_step=0, total_steps=steps, rank=0, world_size=1, source=DECODE)
    ray.kill(feed)


def _checked(batches: Iterable[SampleBatch]) -> Iterator[SampleBatch]:
    for batch in batches:
        assert batch.is_valid.all(), batch.failures
        yield batch


def _difference(other: Peer, read: Read, paths: Sequence[str], kind: str) -> float:
    """Mean absolute difference between ours and a peer's pixels, in levels of 255."""
    decoder = SampleDecoder(DECODE)
    gaps = []
    for path in paths:
        theirs = other.read(read, path)
        assert not isinstance(theirs, str), theirs
        mine: NDArray[np.uint8] = decoder.decode(kind=kind, media=path).pixels
        gaps.append(np.abs(mine.astype(np.int16) - theirs.reshape(mine.shape).astype(np.int16)).mean())
    decoder.close()
    return float(np.mean(gaps))


def _ray_readers(case: DataCase, jpegs: list[str], clips: list[str], seconds: dict[str, float]) -> None:
    """Time Ray's own readers in their fastest form: resizing while reading, and decoding every frame of a clip."""
    import ray

    def read_images(count: int) -> float:
        files = _repeated(jpegs, count)
        images = ray.data.read_images(files, size=(SIDE, SIDE), mode="RGB", override_num_blocks=max(2, count // 32))
        return _seconds_of(images.iter_batches(batch_size=case.batch_size))

    def read_videos(count: int) -> float:
        videos = ray.data.read_videos(_repeated(clips, count), resize=(SIDE, SIDE), override_num_blocks=count)
        return _seconds_of(videos.iter_batches(batch_size=case.batch_size))

    for read, count, name in ((read_images, case.ray_images, "images"), (read_videos, case.ray_clips, "clips")):
        read(WORKERS)  # the first dataset of a reader takes seconds more to start
        rate = count / read(count)
        seconds[f"{name}, batch, ray {read.__name__}"] = case.batch_size / rate
        print(f"ray {read.__name__}: {rate:.1f} {name}/s")


def _seconds_of(batches: Iterable[Any]) -> float:
    start_s = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start_s


def _peak_bytes(case: DataCase, paths: list[str], count: int) -> int:
    """Peak memory of a process with its own Ray session that reads `count` images in several segments."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_report_peak, args=(sender, paths, count, case.batch_size, case.memory_segment_steps)
    )
    child.start()
    sender.close()
    try:
        return int(receiver.recv())
    finally:
        child.join()


def _report_peak(sender: Any, paths: list[str], count: int, batch_size: int, segment_steps: int) -> None:
    with ray_session(RAY):
        memory = PeakMemory(os.getpid())
        with memory.watch():
            files = _repeated(paths, count // batch_size * batch_size)
            for _ in our_batches(files, schema.IMAGE, batch_size, segment_steps):
                pass
        sender.send(memory.num_bytes)


def _manifest(paths: list[str], kind: str) -> pa.Table:
    rows = [
        {
            schema.SAMPLE_ID: f"s{index}",
            schema.MEDIA: path,
            schema.KIND: kind,
            schema.CAPTIONS: ["a picture"],
            schema.SPLIT: "train",
        }
        for index, path in enumerate(paths)
    ]
    return pa.Table.from_pylist(rows, schema=schema.MANIFEST_SCHEMA)


def _repeated(paths: list[str], count: int) -> list[str]:
    return [paths[index % len(paths)] for index in range(count)]
