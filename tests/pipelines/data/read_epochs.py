"""Reads epochs of a mixture as the ranks of a training run do, in a process that a drill may do anything to.

`python -m tests.pipelines.data.read_epochs '{"manifests": [...], "epochs": 2, "ranks": 2, "output": FOLDER}'` writes
one line of JSON a batch into FOLDER/rank-N, and the accounting into FOLDER/accounting.json.
"""

import json
import sys
import threading
from pathlib import Path

from jobs.cluster.session import ray_session
from jobs.settings.data import RaySettings
from pipelines.data.order.global_batches import Order
from pipelines.data.order.mixture import open_corpus
from pipelines.training.records.accounting import Accounting
from tests.pipelines.data.builders import DECODE

GLOBAL_BATCH, SEED, DECODE_WORKERS = 6, 5, 2


def main(manifests: list[str], epochs: int, ranks: int, output: str) -> None:
    """Read and account; ranks are threads, as the processes that matter here are those that decode."""
    corpus = open_corpus([(path, None) for path in manifests], split="train", kind=None)
    order = Order(corpus.streams("proportional"), SEED, GLOBAL_BATCH)
    num_steps, accountings, errors = epochs * order.steps_per_epoch, [Accounting() for _ in range(ranks)], []
    with ray_session(RaySettings(num_cpus=4)):
        import ray

        from pipelines.training.group.feed import BatchFeed, rank_batches

        actor = ray.remote(BatchFeed).options(num_cpus=0)
        feed = actor.remote(order, [ray.put(corpus)], total_steps=num_steps, decode_workers=DECODE_WORKERS)

        def read(rank: int) -> None:
            batches = rank_batches(
                feed, attempt="", start_step=0, total_steps=num_steps, rank=rank, world_size=ranks, source=DECODE
            )
            with open(Path(output) / f"rank-{rank}", "w") as file:
                for batch in batches:
                    epoch = batch.step // order.steps_per_epoch
                    accountings[rank].add(batch, epoch)
                    failed = {failure.sample_id: failure.error_class for failure in batch.failures}
                    file.write(json.dumps([epoch, batch.step, batch.sample_ids, batch.is_valid.tolist(), failed]))
                    file.write("\n")
                    file.flush()

        def noted(rank: int) -> None:
            try:
                read(rank)
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=noted, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    total = Accounting()
    for accounting in accountings:  # what `combine` does over processes
        accounting.combine()
        total.rows_in += accounting.rows_in
        total.rows_used += accounting.rows_used
        total.rows_quarantined += accounting.rows_quarantined
        total.quarantined |= accounting.quarantined
    (Path(output) / "accounting.json").write_text(json.dumps({**total.state(), "line": total.line}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
