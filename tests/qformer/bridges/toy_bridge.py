"""What the page "Add a bridge" promises of its example, in a copy of the packages that holds it: python -m … FOLDER.

Both stages with gradient caching and resumed, two ranks as one, retrieval, answers, the doctor's probe, what a serving
replica computes, and the refusal to export.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import qformer
from jobs.settings.loading import load
from jobs.settings.train import TrainSettings
from jobs.train.checks import check
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.storage import checkpoint_folders
from pipelines.evaluation.doctor.pairs import PairBatch
from pipelines.evaluation.doctor.probe import probe_captioner, probe_retriever
from pipelines.inference.models import load_captioner, load_retriever
from pipelines.serving.contract.wire import DecodedMedia
from pipelines.serving.workers.adapter_models import load_adapter
from pipelines.training.run.model import TrainingRun
from pipelines.training.run.vocabulary import learn_text_tokenizer
from qformer.bridges.table import bridge_config
from qformer.conversion.huggingface import export_huggingface
from qformer.errors import UserError
from qformer.objectives import Negatives
from qformer.objectives.gradient_cache import cached_losses
from qformer.objectives.stage1 import Stage1
from tests.distributed import run_processes
from tests.pipelines.training.loops import CPU, make_training
from tests.pipelines.training.step.test_loop import CAPTIONS, choice, train
from tests.qformer.bridges.clips import CLOSE, CONFIG, batch, spread
from tests.qformer.objectives.test_stage1 import take

KIND, TERM = "weighted", "peak"
IS_FRAME = np.array([[True, True, False], [True, False, False], [True, True, True], [True, False, True]])
WEIGHTS = {TERM: 0.5}


def settings(file):
    """The page's YAML as `qformer train` reads it, and a loss that no bridge of the kind has."""
    needed = ["stage=1", "output=x", "model.vision=v", "data.manifest=m", "steps=3", "batch_size=4"]
    chosen = load(TrainSettings, file, needed)
    check(chosen, 100)
    bridge = chosen.model.bridge
    assert bridge == bridge_config({"kind": KIND, "num_heads": 2})
    assert chosen.optim.loss_weights.by_name()[TERM] == 0.1
    try:
        check(load(TrainSettings, file, [*needed, "optim.loss_weights.peek=1"]), 100)
    except UserError as error:
        assert "optim.loss_weights.peek is no loss of a bridge of kind=weighted" in str(error), error
    else:
        raise AssertionError("a loss that is none was taken")
    return bridge


def clips(start=0, steps=4):
    """The same clips at the same step, whatever step one starts from."""
    for step in range(start, steps):
        pixels = np.random.default_rng(step).integers(0, 255, (4, 3, 3, 64, 64), dtype=np.uint8)
        names, every = [f"s{row}" for row in range(4)], np.ones(4, np.bool_)
        yield SampleBatch(step, 0, names, CAPTIONS, np.arange(4), every, pixels, [], IS_FRAME)


def trained(chosen, output, init_from=None):
    """A run of four steps in parts of two samples, and one that is cut and resumed; their bytes are equal."""

    def build():
        return TrainingRun(chosen, CPU, precision="fp32", seed=5, init_from=init_from, micro_batch=2)

    changes = {"steps": 4, "checkpoint_every": 2}
    whole = build()
    training = make_training(whole, **WEIGHTS)
    logged = train(whole, output / "whole", given=clips(), training=training, **changes)
    assert all(f"loss/{TERM}" in record for record in logged) and 0 < logged[-1][f"loss/{TERM}"] < 1
    with contextlib.suppress(InterruptedError):
        cut = build()
        train(cut, output / "cut", given=clips(), training=make_training(cut, **WEIGHTS), stop_at=2, **changes)
    again = build()
    training = make_training(again, **WEIGHTS)
    state = again.restore(Path(checkpoint_folders.newest_checkpoint(str(output / "cut"))), training)
    assert state.step == 2
    train(again, output / "cut", 2, training=training, given=clips(2), **changes)
    ours, theirs = whole.stage.trainables.state_dict(), again.stage.trainables.state_dict()
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert {"score.weight", "qformer.query_tokens"} <= ours.keys()
    return Path(checkpoint_folders.newest_checkpoint(str(output / "whole")))


def stage1():
    torch.manual_seed(0)
    return spread(Stage1(CONFIG, bridge=bridge_config({"kind": KIND})))


def total(terms):
    return sum(WEIGHTS.get(name, 0.0 if name == "diversity" else 1.0) * value for name, value in terms.items())


def gradients(model):
    return {name: one.grad for name, one in model.named_parameters()}


def two_ranks(rank, world, folder):
    """With DDP and with gradient caching, each rank has half of the batch."""
    full, others = example()
    whole = torch.load(folder / "whole.pt")
    rows = slice(rank * 2, rank * 2 + 2)
    some, negatives = take(full, rows), Negatives(*(values[rows] for values in others))
    plain = stage1()
    call = DistributedDataParallel(plain)
    total(call(some, negatives=negatives).terms).backward()
    cached = stage1()

    def backward(terms, link):
        (total(terms) + (0.0 if link is None else link)).backward()

    cached_losses(
        cached,
        some,
        micro_batch=1,
        noise_key=0,
        backward=backward,
        autocast=contextlib.nullcontext,
        negatives=negatives,
    )
    for parameter in cached.parameters():
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= world
    for model in (plain, cached):
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, whole[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def example():
    full = batch(4, 3, is_frame=torch.from_numpy(IS_FRAME))
    others = Negatives(torch.tensor([2, 3, 0, 0]), torch.tensor([1, 2, 3, 0]), torch.ones(4, dtype=torch.bool))
    return full, others


def ranks(folder):
    full, others = example()
    model = stage1()
    total(model(full, negatives=others).terms).backward()
    assert model.score.weight.grad.abs().max() > 0
    torch.save(gradients(model), folder / "whole.pt")
    run_processes(two_ranks, 2, folder)


def pairs():
    sample = next(clips())
    pixels, valid = torch.from_numpy(sample.images), torch.from_numpy(IS_FRAME)
    return PairBatch(
        pixels_BFCYX=pixels,
        frame_valid_BF=valid,
        captions=CAPTIONS,
        instructions=[""] * 4,
        audio=None,
        may_swap_BB=~torch.eye(4, dtype=torch.bool),
    )


def in_use(first, second):
    """Offline, probed, and served."""
    sample = pairs()
    retriever, captioner = load_retriever(first), load_captioner(second)
    embeds, tokens = retriever.embed_image(sample.pixels_BFCYX, sample.frame_valid_BF)
    assert embeds.shape[:2] == (4, 4)  # one set of queries a clip
    assert retriever.match(tokens, CAPTIONS, sample.frame_valid_BF).isfinite().all()
    prompts = captioner.soft_prompts(sample.pixels_BFCYX, frame_valid=sample.frame_valid_BF)
    other = sample.pixels_BFCYX.masked_fill(~sample.frame_valid_BF[..., None, None, None], 255)
    again = captioner.soft_prompts(other, frame_valid=sample.frame_valid_BF)
    assert all(one.equal(two) for one, two in zip(prompts, again, strict=True))
    assert len(captioner.answer(sample.pixels_BFCYX, frame_valid=sample.frame_valid_BF)) == 4
    for figures in (probe_retriever(retriever, [sample], 0), probe_captioner(captioner, [sample], 0)):
        assert figures.num_texts == 4 and figures.queries.num_queries == 4
    decoded = [
        DecodedMedia(pixels=clip, frame_valid=mask, size_bytes=1)
        for clip, mask in zip(sample.pixels_BFCYX.numpy(), IS_FRAME, strict=True)
    ]
    served = load_adapter(str(second), captioner.encoder, "cpu").soft_prompts(
        tokens, sample.frame_valid_BF, decoded, [captioner.info.prompt] * 4
    )
    for here, there in zip(served, prompts, strict=True):
        np.testing.assert_allclose(here, there.numpy(), atol=1e-6)
    rows = load_adapter(str(first), retriever.encoder, "cpu").embed(tokens, sample.frame_valid_BF)
    np.testing.assert_allclose(np.stack(rows), embeds.numpy(), atol=1e-6)
    for folder in (first, second):
        try:
            export_huggingface(folder, folder.parent / "export")
        except UserError as error:
            assert "kind='weighted'" in str(error) and "no place" in str(error), error
        else:
            raise AssertionError("exported without a layout")


def main():
    folder, packages = Path(sys.argv[1]), Path(sys.argv[2])
    assert Path(qformer.__file__).is_relative_to(packages), qformer.__file__
    torch.set_num_threads(1)
    bridge = settings(folder / "bridge.yaml")
    ranks(folder)
    learn_text_tokenizer(lambda: CAPTIONS, folder / "tokenizer")
    chosen = [dataclasses.replace(choice(stage, folder / "tokenizer"), bridge=bridge) for stage in (1, 2)]
    first = trained(chosen[0], folder / "one")
    second = trained(chosen[1], folder / "two", init_from=str(folder / "one" / "whole"))
    in_use(first, second)
    print("done")


if __name__ == "__main__":
    main()
