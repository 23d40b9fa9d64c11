"""Runs the pure parts in Ray Data: training segments, evaluation, features. The only module here that imports Ray."""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from pipelines.data.batches.batch import SampleBatch, split_steps, unpack
from pipelines.data.batches.decode_rows import DecodeRows
from pipelines.data.batches.plan import (
    RowLookup,
    block_steps,
    evaluation_blocks,
    lacks_caption,
    mark_failed,
    training_blocks,
)
from pipelines.data.corpus import quarantine
from pipelines.data.features.cache import FeatureCache, ReadFeatures
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.media.stage_costs import StageCosts
from pipelines.data.order.global_batches import Order
from pipelines.data.order.row_index import ManifestRows

if TYPE_CHECKING:
    from pipelines.data.features.shard_encoder import EncoderChoice

_SEGMENT_BLOCKS = 2048
"""Largest number of input blocks of one dataset: Ray handles all of them before it returns the first."""
_MIN_SEGMENT_STEPS, _MAX_SEGMENT_BLOCKS = 64, 16_384
"""Bounds for many ranks, where a segment has more blocks: the next one takes some seconds and about 1.4 ms a block to
start, and must be ready before this one ends."""
_MAX_RESTARTS = 3
"""Replacements of a crashed decode actor. Ray's default has no limit and would crash on one image for ever."""
_MAX_TASK_RETRIES = 2


@dataclass(frozen=True, slots=True)
class RankStream:
    """One rank's micro-batches of a segment, in step order. Picklable; all ranks iterate at the same time, once."""

    blocks: Any
    """A Ray Data iterator."""
    rank: int
    first_step: int
    num_steps: int

    def __iter__(self) -> Iterator[SampleBatch]:
        """Yield the batches in step order.

        Raises:
            UserError: If storage refuses to be read.
            RuntimeError: If Ray Data gave a block to the wrong rank, in the wrong order, or lost one.
        """
        step = self.first_step
        # The caller prefetches. Ray's prefetching would add four threads that poll twenty times a second.
        tables = self.blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for table in (part for block in tables for part in split_steps(block)):
            batch = unpack(table)
            quarantine.require_readable(batch.failures)
            if (batch.step, batch.rank) != (step, self.rank):
                raise RuntimeError(f"rank {self.rank} expected step {step}, got step {batch.step} of rank {batch.rank}")
            yield batch
            step += 1
        if step != self.first_step + self.num_steps:
            raise RuntimeError(f"rank {self.rank} got {step - self.first_step} of {self.num_steps} steps")


class _DecodePlan:
    """Looks up planned rows and decodes them, in one actor.

    Args:
        rows: Reference to the `mixture.Corpus`, which all actors of a machine share.
        seed: Seed of the run.
        operator: `DecodeRows`, or `ReadFeatures` for a cache.
        source: Argument of the operator.
    """

    def __init__(
        self, rows: ray.ObjectRef, seed: int, operator: type[Any], source: DecodeSettings | FeatureCache
    ) -> None:
        self._look_up = RowLookup(ray.get(rows), seed=seed, is_random=source.is_random)
        self._decode = operator(source)

    def __call__(self, plan: pa.Table) -> pa.Table:
        rows = self._look_up(plan)
        is_bad = lacks_caption(rows)
        decoded: pa.Table = self._decode(rows)
        return mark_failed(decoded, is_bad, "the row has no caption") if is_bad.any() else decoded


def build_segment(
    order: Order,
    rows: ray.ObjectRef,
    *,
    first_step: int,
    end_step: int,
    world_size: int,
    source: DecodeSettings | FeatureCache,
    decode_workers: int,
    reserves_cpus: bool = True,
) -> list[RankStream]:
    """Start decoding a run of consecutive steps in the background, or reading their features from a cache.

    Nothing is decoded before the ranks begin to iterate. The caller must outlive the streams, for it owns the
    blocks they read.

    Args:
        order: Order of the run.
        rows: Its `mixture.Corpus`, put into Ray's object store; with a cache, as `features.locate` returned them.
        first_step: First step.
        end_step: Exclusive end. Many blocks make a dataset start slowly, so a segment may end sooner.
        world_size: Number of ranks.
        source: Decode settings, or the feature cache that replaces decoding.
        decode_workers: Number of actors that decode or read.
        reserves_cpus: Whether each actor reserves a CPU; False shares CPUs that others have reserved.

    Returns:
        One stream a rank; `RankStream.num_steps` says how many steps it has.
    """
    sample_bytes = max(map(source.row_bytes, order.kinds))
    steps_per_block = block_steps(sample_bytes * -(-order.global_batch // world_size))
    most = segment_blocks(world_size) * steps_per_block
    steps = np.arange(first_step, min(end_step, first_step + most))
    blocks = training_blocks(
        order.at(steps), first_step=first_step, world_size=world_size, steps_per_block=steps_per_block
    )
    operator = ReadFeatures if isinstance(source, FeatureCache) else DecodeRows
    dataset = _mapped(blocks, _DecodePlan, (rows, order.seed, operator, source), decode_workers, reserves_cpus)
    # Ray deals the blocks round robin: rank 0, rank 1, ..., rank 0, ... Each rank checks what it gets.
    splits = dataset.streaming_split(world_size, equal=False)
    return [RankStream(split, rank, first_step, len(steps)) for rank, split in enumerate(splits)]


def segment_blocks(world_size: int) -> int:
    """Largest number of input blocks of one rank in a segment."""
    wanted = _MIN_SEGMENT_STEPS * world_size
    return max(1, min(max(_SEGMENT_BLOCKS, wanted), _MAX_SEGMENT_BLOCKS) // world_size)


def close_segment(streams: Sequence[RankStream]) -> None:
    """End a segment whose ranks are dead; otherwise its dataset and decode actors would wait for them."""
    for stream in streams[:1]:
        # Ray 2.60 has no public way. The decode actors belong to this actor and end with it.
        ray.kill(stream.blocks._coord_actor)


def evaluation_datasets(
    rows: ManifestRows, *, batch_size: int, decode: DecodeSettings, decode_workers: int
) -> Iterator[ray.data.Dataset]:
    """Decode every row exactly once, in blocks of one kind, in one dataset or several.

    Pass the result to `map_blocks`, whose operator calls `to_batch`. The rows of a dataset are read when the one before
    is finished.
    """
    blocks = evaluation_blocks(rows, batch_size)
    while chunk := list(itertools.islice(blocks, _SEGMENT_BLOCKS)):
        yield _mapped(chunk, DecodeRows, (decode,), decode_workers)


def map_blocks(
    datasets: Iterable[ray.data.Dataset], operator: type, arguments: Mapping[str, Any], *, workers: int, use_gpu: bool
) -> Iterator[pa.Table]:
    """Send every block through a pool of model actors.

    Args:
        datasets: Results of `evaluation_datasets`, run one after the other.
        operator: Callable class from a block to a table.
        arguments: Constructor arguments of `operator`.
        workers: Number of actors.
        use_gpu: Give each actor one GPU.

    Yields:
        The actors' results, in no particular order.
    """
    for dataset in datasets:
        # With a GPU, `map_batches` demands a batch size and would join blocks of different kinds to fill it. The inner
        # method takes blocks as they are.
        apply = dataset.map_batches_internal if use_gpu else dataset.map_batches
        with warnings.catch_warnings():
            # Ray 2.60 has no other way to bound the restarts of an actor pool, and warns that 2.64 removes this one.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            mapped = apply(
                operator,
                fn_constructor_kwargs=dict(arguments),
                batch_format="pyarrow",
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_gpus=1 if use_gpu else None,
                # The default has no limit: a model that crashes on one block would restart for ever.
                max_restarts=_MAX_RESTARTS,
                max_task_retries=_MAX_TASK_RETRIES,
            )
        yield from mapped.iter_batches(batch_size=None, batch_format="pyarrow")


def measure_features(
    blocks: list[pa.Table], *, choice: "EncoderChoice", decode: DecodeSettings, frames_per_pass: int, use_gpu: bool
) -> list[StageCosts]:
    """Decode and encode a few blocks in one task, writing nothing; see `shard_encoder.measure_rows`."""
    # Imported here because it loads torch, which the drivers of other jobs do not need.
    from pipelines.data.features.shard_encoder import measure_rows

    task = ray.remote(measure_rows).options(num_gpus=1 if use_gpu else 0, max_retries=_MAX_TASK_RETRIES)
    return list(ray.get(task.remote(choice, decode, frames_per_pass, "cuda" if use_gpu else "cpu", blocks)))


def encode_features(
    shards: list[pa.Table],
    *,
    folder: str,
    choice: "EncoderChoice",
    decode: DecodeSettings,
    frames_per_pass: int,
    workers: int,
    decode_workers: int,
    use_gpu: bool,
) -> Iterator[pa.Table]:
    """Write shards of a feature cache.

    Args:
        shards: Missing shards among those of `features.shards.shard_blocks`.
        folder: Folder of the cache.
        choice: Frozen encoders.
        decode: Decode settings.
        frames_per_pass: Frames in one pass of the vision encoder.
        workers: Number of encoder actors.
        decode_workers: Number of decode actors.
        use_gpu: Whether each encoder actor gets a GPU.

    Yields:
        The row of `EncodeShards` about each shard, as the shards finish.
    """
    from pipelines.data.features.shard_encoder import EncodeShards

    arguments = {"choice": choice, "folder": folder, "frames_per_pass": frames_per_pass}
    pools: dict[str, Any] = {"workers": workers, "decode_workers": decode_workers, "use_gpu": use_gpu}
    yield from write_shards(shards, EncodeShards, arguments, decode=decode, **pools)


def write_shards(
    shards: list[pa.Table],
    operator: type,
    arguments: Mapping[str, Any],
    *,
    decode: DecodeSettings,
    workers: int,
    decode_workers: int,
    use_gpu: bool,
) -> Iterator[pa.Table]:
    """Decode shards and send each through a model actor that writes it.

    Args:
        shards: Missing shards among those of `features.shards.shard_blocks`.
        operator: Callable class from a decoded shard to one row about it, such as `EncodeShards`.
        arguments: Constructor arguments of `operator`, besides its `device`.
        decode: Decode settings.
        workers: Number of model actors.
        decode_workers: Number of decode actors.
        use_gpu: Whether each model actor gets a GPU.

    Yields:
        The row of `operator` about each shard, as the shards finish.
    """
    from pipelines.data.features.shard_encoder import DecodeShards

    dataset = _mapped(shards, DecodeShards, (decode,), decode_workers)
    placed = {**arguments, "device": "cuda" if use_gpu else "cpu"}
    yield from map_blocks([dataset], operator, placed, workers=workers, use_gpu=use_gpu)


def to_batch(block: pa.Table) -> SampleBatch:
    """Turn a block of `evaluation_datasets` into arrays; `step` is the block's number."""
    return unpack(block)


def _mapped(
    blocks: list[pa.Table],
    operator: type[Any],
    arguments: tuple[Any, ...],
    decode_workers: int,
    reserves_cpus: bool = True,
) -> ray.data.Dataset:
    """Run an operator over blocks: one output block for each input block, in order."""
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to bound the restarts of an actor pool, and warns that 2.64 removes this one.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        # `from_arrow` would start a task for every block to learn its schema.
        dataset = ray.data.from_blocks(blocks).map_batches(
            operator,
            fn_constructor_args=arguments,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=decode_workers),
            num_cpus=1 if reserves_cpus else 0,
            ray_remote_args_fn=_bounded_retries,
        )
    # This is the dataset's own copy of the context; the global one stays as it is.
    dataset.context.execution_options.preserve_order = True
    # Ray must not split a large micro-batch: the round robin counts blocks.
    dataset.context.target_max_block_size = None
    return dataset


def _bounded_retries() -> dict[str, Any]:
    return {"max_restarts": _MAX_RESTARTS, "max_task_retries": _MAX_TASK_RETRIES}
