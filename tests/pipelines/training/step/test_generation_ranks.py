"""Stage 2 under DDP: two gloo ranks have the losses and gradients of one process on the joined batch; bad data of one
rank ends both stages on all ranks."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from pipelines.data.batches.batch import SampleBatch
from pipelines.training.step.stages import GenerationStage, RepresentationStage
from qformer.adapters.lora import Lora
from qformer.config import LoraConfig, QFormerConfig
from qformer.distributed import mean_of_ranks
from qformer.objectives.stage1 import Stage1
from qformer.objectives.stage2 import Stage2
from tests.distributed import run_processes
from tests.pipelines.training.loops import backward
from tests.qformer.test_language import tiny_language
from tests.tiny_checkpoints import text_tokenizer

CONFIG = QFormerConfig(
    encoder_width=24, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48, num_queries=5, dropout=0.0
)
KINDS = {
    "plain": {},
    "lora": {"lora": LoraConfig(rank=2, dropout=0.0)},
    "frozen": {"freeze_qformer": True},
    "instructed": {"reads": True},
    "instructed lora on t5": {"reads": True, "lora": LoraConfig(rank=2, dropout=0.0), "family": "t5"},
}
SHARE = 1e-4
"""Largest difference of a gradient, as a share of its tensor's maximum: fp32 sums in another order."""
NUM_THREADS = 2
"""Threads of torch in both ways: `SHARE` was measured with them, and with one a sum is rounded otherwise."""


def make_stage(family="llama", lora=None, freeze_qformer=False, reads=False):
    """The same on every call: seeds are fixed on the way."""
    language, tokenizer = tiny_language(family), text_tokenizer() if reads else None
    torch.manual_seed(7)
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size, has_lm_head=False) if reads else CONFIG
    updates = None if lora is None else Lora(language.model, lora)
    stage2 = Stage2(config, language_width=language.width, freeze_qformer=freeze_qformer, lora=updates)
    with torch.no_grad():
        for parameter in stage2.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def encode(batch):
        return torch.from_numpy(batch.images)

    return GenerationStage(encode, stage2.train(), language, tokenizer, prompt="a", max_tokens=16)


def joined_batch():
    """Six samples of ragged captions and instructions; one is masked."""
    captions = ["red", "a small blue circle left of green", "square", "", "large triangle still", "moving"]
    instructions = ["", "a small", "above large red triangle", "", "", "left"]
    tokens = np.random.default_rng(3).standard_normal((6, 2, 7, 24), dtype=np.float32)
    is_valid = np.array([True, True, True, False, True, True])
    names, is_real = [f"s{row}" for row in range(6)], np.ones((6, 2), dtype=np.bool_)
    return SampleBatch(0, 0, names, captions, np.arange(6), is_valid, tokens, [], is_real, instructions)


def part(batch, rows):
    values = {name: getattr(batch, name)[rows] for name in ("sample_ids", "captions", "instructions")}
    arrays = {name: getattr(batch, name)[rows] for name in ("image_ids", "is_valid", "images", "frame_valid")}
    return dataclasses.replace(batch, **values, **arrays)


def gradients(stage):
    return {name: p.grad for name, p in stage.trainables.named_parameters() if p.requires_grad}


def make_stage1():
    tokenizer = text_tokenizer()
    torch.manual_seed(7)
    stage1 = Stage1(dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size, embed_dim=16)).train()
    return RepresentationStage(lambda batch: torch.from_numpy(batch.images), stage1, tokenizer)


def bad_data_of_one_rank_ends_all(rank):
    """Without it the good rank waits for the bad one until it is killed, and its own message tells nothing."""
    for stage in (make_stage1(), make_stage()):
        call = DistributedDataParallel(stage.trainables)
        for spoil, message in (
            (lambda images: images.__setitem__((1, 0, 2, 3), np.nan), "NaN or infinity .* 1 of 3 samples: s4"),
            (lambda images: images[..., :-1], r"\(3, 2, 7, 23\) .*encoder_width=24"),
        ):
            own = part(joined_batch(), slice(rank * 3, rank * 3 + 3))
            if rank == 1:
                images = own.images.copy()
                cut = spoil(images)
                own = dataclasses.replace(own, images=images if cut is None else cut)
            with pytest.raises(ValueError, match=message):
                backward(stage, own, call=call)
        good = part(joined_batch(), slice(rank * 3, rank * 3 + 3))
        backward(stage, good, call=call)  # no rank is left behind in a collective


def ranks_equal_one(rank, world, folder):
    torch.set_num_threads(NUM_THREADS)
    torch.set_num_threads(NUM_THREADS)
    bad_data_of_one_rank_ends_all(rank)
    for index, (kind, options) in enumerate(KINDS.items()):
        stage = make_stage(**options)
        call = DistributedDataParallel(stage.trainables)
        loss = backward(stage, part(joined_batch(), slice(rank * 3, rank * 3 + 3)), call=call)["total"]
        expected = torch.load(folder / f"{index}.pt")
        assert mean_of_ranks(loss) == pytest.approx(expected["loss"], rel=1e-5), kind
        found = gradients(stage)
        assert found.keys() == expected["gradients"].keys()
        for name, gradient in found.items():
            difference = float((gradient - expected["gradients"][name]).abs().max())
            # Some gradients are zero but for rounding: of a key's bias, which the softmax cancels.
            allowed = SHARE * float(expected["gradients"][name].abs().max()) + 1e-6
            assert difference < allowed, (kind, name, difference, allowed)


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_two_ranks_equal_one_process_on_the_joined_batch(tmp_path):
    for index, (kind, options) in enumerate(KINDS.items()):
        stage = make_stage(**options)
        loss = backward(stage, joined_batch())["total"]
        assert all(g is not None and g.abs().max() > 0 for g in gradients(stage).values()), kind
        trained = {name.split(".")[0] for name in gradients(stage)}
        assert ("lora" in trained) == ("lora" in options) and ("qformer" in trained) != ("freeze_qformer" in options)
        torch.save({"loss": loss, "gradients": gradients(stage)}, tmp_path / f"{index}.pt")
    run_processes(ranks_equal_one, 2, tmp_path)
