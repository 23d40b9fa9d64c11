"""Ray Data and Ray Train in this process, for tests of what a job does with rows and not of how they get there.

In a job, an actor plans a training's batches, another deals them to the ranks, others decode or run a model: processes
whose start takes longer than the work on a test's few rows. Here the same operators run in the process that asks, one
block after the other. Of each job one test at least runs with its actors.
"""

import contextlib
import types

import pytest
import ray
from ray.train import ScalingConfig

from jobs.train import rows as train_rows
from pipelines.data import dataset
from pipelines.training.group import launch


class LocalDataset:
    """In place of a dataset whose blocks go through operators in actors, and of the iterator of its only reader."""

    def __init__(self, blocks, *operators):
        self._blocks, self._operators = blocks, operators

    def map_batches(self, operator, *, fn_constructor_kwargs, **_):
        return LocalDataset(self._blocks, *self._operators, (operator, (), fn_constructor_kwargs))

    def streaming_split(self, num_ranks, **_):
        assert num_ranks == 1
        return [self]

    def iter_batches(self, **_):
        operators = [operator(*arguments, **options) for operator, arguments, options in self._operators]
        with contextlib.ExitStack() as stack:
            for operator in operators:
                decoder = getattr(operator, "_decode", operator)
                if hasattr(decoder, "close"):
                    stack.callback(decoder.close)
            for block in self._blocks:
                for operator in operators:
                    block = operator(block)
                yield block


class LocalActor:
    """In place of an actor's handle: calls the object at once, and returns what `ray.get` takes."""

    def __init__(self, instance):
        self._instance = instance

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self._instance, name)
        return types.SimpleNamespace(remote=lambda *arguments, **options: ray.put(method(*arguments, **options)))


@contextlib.contextmanager
def local_data():
    """Within the block, datasets and the feeds of trainings start no process."""
    kill = ray.kill

    def mapped(blocks, operator, arguments, *_):
        return LocalDataset(blocks, (operator, arguments, {}))

    def measure(blocks, *, choice, decode, frames_per_pass, use_gpu):
        from pipelines.data.features.shard_encoder import measure_rows

        return measure_rows(choice, decode, frames_per_pass, "cuda" if use_gpu else "cpu", blocks)

    def actor_class(kind):
        return types.SimpleNamespace(remote=lambda *arguments, **options: LocalActor(kind(*arguments, **options)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_mapped", mapped)
        patch.setattr(dataset, "measure_features", measure)
        patch.setattr(train_rows, "_actor_class", actor_class)
        patch.setattr(ray, "kill", lambda actor: None if isinstance(actor, LocalActor) else kill(actor))
        yield


@contextlib.contextmanager
def local_training():
    """Within the block, Ray Train runs a training's function in this process, whatever number of workers it has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "ScalingConfig", lambda **_: ScalingConfig(num_workers=0))
        yield
