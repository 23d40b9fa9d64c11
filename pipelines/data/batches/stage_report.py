"""Table of the time that a job's stages took, and its bottleneck in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MIN_BUSY_SHARE = 0.5
"""If no pool is busy for more than this share of the time, none of them is the bottleneck."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerPool:
    """Workers of one kind, and the seconds they spent on each stage."""

    name: str
    """Name for reports, e.g. "decode workers"."""
    setting: str
    """Setting of their number, e.g. "decode_workers"."""
    workers: int
    seconds: Mapping[str, float]
    """Seconds of work by stage, summed over all workers."""

    def busy_share(self, wall_s: float) -> float:
        """Share of the time that the workers were busy, 0 to 1."""
        return min(1.0, sum(self.seconds.values()) / max(wall_s * self.workers, 1e-9))


def stage_table(pools: Sequence[WorkerPool], *, wall_s: float, rows: int, fetched_bytes: int) -> str:
    """Seconds of every stage, and their share of its workers' time.

    Args:
        pools: Worker pools of the job.
        wall_s: Duration of the job without its start.
        rows: Number of rows processed.
        fetched_bytes: Number of bytes read for them.
    """
    lines = [f"{'stage':<11}{'seconds':>9}  {'ms/row':>8}  share of"]
    for pool in pools:
        for stage, seconds in pool.seconds.items():
            share = seconds / max(wall_s * pool.workers, 1e-9)
            lines.append(
                f"{stage:<11}{seconds:>9.1f}  {1000 * seconds / max(1, rows):>8.2f}  {share:.0%} of "
                f"{pool.workers} {pool.name}"
            )
    rate = rows / max(wall_s, 1e-9)
    lines.append(f"{rows} rows, {format_bytes(fetched_bytes)} read, in {wall_s:.1f} s: {rate:.1f} rows/s")
    return "\n".join([*lines, bottleneck(pools, wall_s)])


def run_table(stages: Mapping[str, float], *, workers: int, decode_workers: int) -> str:
    """`stage_table` of a training run.

    Args:
        stages: wall_s, and sums over all ranks: wait_s (for batches), encode_s (frozen encoder), rows, fetch_s,
            decode_s, transform_s, fetched_bytes.
        workers: Number of ranks.
        decode_workers: Number of decode actors.
    """
    data = {stage: stages[f"{stage}_s"] for stage in ("fetch", "decode", "transform")}
    work_s = max(0.0, stages["wall_s"] * workers - stages["wait_s"])
    encode_s = min(stages["encode_s"], work_s)
    training = {"encode": encode_s, "train": work_s - encode_s}
    pools = [
        WorkerPool(name="decode workers", setting="decode_workers", workers=decode_workers, seconds=data),
        WorkerPool(name="training workers", setting="workers", workers=workers, seconds=training),
    ]
    rows, fetched_bytes = round(stages["rows"]), round(stages["fetched_bytes"])
    return stage_table(pools, wall_s=stages["wall_s"], rows=rows, fetched_bytes=fetched_bytes)


def bottleneck(pools: Sequence[WorkerPool], wall_s: float) -> str:
    """One sentence: which pool the others waited for, and which setting would help."""
    pools = [pool for pool in pools if any(pool.seconds.values())]
    if not pools:
        return "bottleneck: none, there was nothing to do"
    busiest = max(pools, key=lambda pool: pool.busy_share(wall_s))
    share = busiest.busy_share(wall_s)
    if share < _MIN_BUSY_SHARE:
        return (
            f"bottleneck: none of the stages; the busiest, {busiest.name}, was busy {share:.0%} of the time. The rest "
            "is start-up and transfer, whose share is smaller in a longer job"
        )
    stage = max(busiest.seconds, key=lambda name: busiest.seconds[name])
    part = busiest.seconds[stage] / max(sum(busiest.seconds.values()), 1e-9)
    return (
        f"bottleneck: {stage}, {part:.0%} of the work of the {busiest.name}, which were busy {share:.0%} of the time; "
        f"more {busiest.setting} on more cores (or GPUs) would help"
    )


def format_bytes(num_bytes: float) -> str:
    """Bytes with a unit, e.g. "707 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
