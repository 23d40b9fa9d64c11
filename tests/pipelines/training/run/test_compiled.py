"""Compiled layers serve every way a run calls them; the compiler's backend is the plain one, for speed."""

import dataclasses

import numpy as np
import pytest
import torch

from pipelines.training.run.model import TrainingRun
from pipelines.training.step.validation import validation_losses
from qformer.config import QFormerSizes
from tests.pipelines.training.loops import make_loop, make_training
from tests.pipelines.training.step.test_loop import QFORMER, batches, choice, settings, tokenizer  # noqa: F401


def clips(start):
    for batch in batches(start):
        frame_valid = np.ones((4, 2), dtype=np.bool_)
        yield dataclasses.replace(batch, images=batch.images.repeat(2, axis=1), frame_valid=frame_valid)


def mixed():
    for image, clip in zip(batches(), clips(0), strict=True):
        yield clip if image.step % 2 else image


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_images_and_clips_validation_and_gradient_caching(stage, tokenizer, monkeypatch):  # noqa: F811
    torch._dynamo.reset()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager", **options)
    )
    chosen = dataclasses.replace(choice(stage, tokenizer), qformer=QFormerSizes(**{**QFORMER, "dropout": 0.0}))
    logged = {}
    for micro_batch in (None, 2):
        run = TrainingRun(
            chosen,
            torch.device("cpu"),
            precision="fp32",
            seed=5,
            init_from=None,
            is_compiled=True,
            micro_batch=micro_batch,
        )
        training, seen = make_training(run), []

        def validate(done, run=run, training=training):
            validation_losses(run.stage, mixed(), training.objective, training.precision, None)
            return True

        loop = make_loop(run, settings(validate_every=3), training=training, log=seen.append, validate=validate)
        loop.run(mixed(), 0)
        logged[micro_batch] = [record["loss/total"] for record in seen]
    assert logged[2] == pytest.approx(logged[None], rel=1e-3)
