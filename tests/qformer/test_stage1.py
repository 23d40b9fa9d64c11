"""Stage 1 beyond the recorded cases: masks, processes, frames, batches of one."""

import pytest
import torch

from qformer.config import QFormerConfig
from qformer.objectives import Negatives, sample_negatives
from qformer.stage1 import Stage1, Stage1Batch, sampling_generator
from tests.distributed import run_processes

CONFIG = QFormerConfig(
    encoder_width=24,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    intermediate_size=48,
    num_queries=5,
    vocab_size=40,
    embed_dim=16,
    dropout=0.0,
)
# fp32 sums taken in another order: losses of about 5 differ by 1e-6, gradients by 1e-6 of a tensor's maximum.
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def model():
    torch.manual_seed(0)
    stage1 = Stage1(CONFIG)
    with torch.no_grad():
        for parameter in stage1.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        stage1.temperature.fill_(0.3)
    return stage1


def batch(size, frames=1, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, length + 1, (size,), generator=generator)
    mask = torch.arange(length)[None] < lengths[:, None]
    return Stage1Batch(
        image_BFPV=torch.randn(size, frames, 7, 24, generator=generator),
        input_ids_BT=torch.randint(1, 39, (size, length), generator=generator).masked_fill(~mask, 0),
        is_text_BT=mask,
        image_ids_B=torch.arange(size),
        is_valid_B=torch.ones(size, dtype=torch.bool),
    )


def take(full, rows, **changes):
    values = {name: getattr(full, name)[rows] for name in Stage1Batch.__dataclass_fields__}
    return Stage1Batch(**{**values, **changes})


def cyclic_negatives(size, rows=slice(None)):
    image, text = (torch.arange(size) + 1) % size, (torch.arange(size) + 2) % size
    return Negatives(image[rows], text[rows], torch.ones(size, dtype=torch.bool)[rows])


def gradients(stage1):
    return {name: parameter.grad for name, parameter in stage1.named_parameters()}


def masked_batch():
    """Six samples, of which one on either of two ranks is masked and holds NaN."""
    full, valid = batch(6), torch.tensor([True, False, True, True, True, False])
    full.image_BFPV[~valid] = float("nan")
    return take(full, slice(None), is_valid_B=valid)


def two_rank_worker(rank, world, folder):
    for case, full in (("whole", batch(6)), ("masked", masked_batch())):
        expected = torch.load(folder / f"{case}.pt")
        stage1, rows = model(), slice(rank * 3, rank * 3 + 3)
        losses = stage1(take(full, rows), negatives=cyclic_negatives(6, rows))
        losses.total.backward()
        for name, parameter in stage1.named_parameters():
            torch.distributed.all_reduce(parameter.grad)
            torch.testing.assert_close(parameter.grad / world, expected[name], **CLOSE)


def test_gather_with_gradient_equals_one_process_on_the_joined_batch(tmp_path):
    for case, full in (("whole", batch(6)), ("masked", masked_batch())):
        stage1 = model()
        stage1(full, negatives=cyclic_negatives(6)).total.backward()
        torch.save(gradients(stage1), tmp_path / f"{case}.pt")
    run_processes(two_rank_worker, 2, tmp_path)


def test_lavis_reduction_differs_from_the_joined_gradient():
    """Guards the test above: without gradient through the gathered features the image side is not the same."""
    ours, lavis = model(), model()
    lavis.lavis_reduction = True
    for stage1 in (ours, lavis):
        stage1(batch(6), negatives=cyclic_negatives(6)).total.backward()
    gap = ours.vision_projection.weight.grad - lavis.vision_projection.weight.grad
    assert gap.abs().max() > 1e-3


@pytest.mark.parametrize("frames", [1, 3])
def test_a_masked_sample_changes_nothing(frames):
    full = batch(5, frames)
    full.image_BFPV[4, 0, 2] = float("nan")
    kept, with_bad = model(), model()
    short = kept(take(full, slice(0, 4)), negatives=cyclic_negatives(4))
    short.total.backward()
    valid = torch.tensor([True, True, True, True, False])
    negatives = cyclic_negatives(4)
    padded = Negatives(*(torch.cat([values, values[:1]]) for values in negatives))
    long = with_bad(take(full, slice(None), is_valid_B=valid), negatives=padded)
    long.total.backward()
    for name in ("itc", "itm", "itg", "total"):
        torch.testing.assert_close(getattr(long, name), getattr(short, name), **CLOSE)
    for name, gradient in gradients(kept).items():
        torch.testing.assert_close(gradients(with_bad)[name], gradient, **CLOSE, msg=name)


def test_a_batch_of_one_has_finite_losses_and_no_negatives():
    losses = model()(batch(1), sampling_generator(0, 0, torch.device("cpu")))
    assert all(torch.isfinite(value) for value in (losses.itc, losses.itm, losses.itg))


def test_a_batch_without_a_valid_row_has_zero_loss():
    full = batch(2)
    losses = model()(take(full, slice(None), is_valid_B=torch.zeros(2, dtype=torch.bool)))
    assert losses.total.item() == 0.0


def test_negatives_are_never_positives_nor_masked():
    scores = torch.zeros(4, 4)
    positives = torch.eye(4, dtype=torch.bool)
    positives[0, 1] = positives[1, 0] = True  # two captions of one image
    valid = torch.tensor([True, True, True, False])
    for seed in range(50):
        drawn = sample_negatives(scores, scores, positives, valid, torch.Generator().manual_seed(seed))
        assert drawn.image_B[:2].tolist() == [2, 2] and drawn.text_B[:2].tolist() == [2, 2]
        assert set(drawn.image_B.tolist()) <= {0, 1, 2}


def test_hard_negatives_follow_the_similarity():
    scores = torch.full((3, 3), -9.0)
    scores[0, 2] = 9.0
    drawn = [
        int(
            sample_negatives(
                scores, scores, torch.eye(3).bool(), torch.ones(3).bool(), torch.Generator().manual_seed(s)
            ).text_B[0]
        )
        for s in range(20)
    ]
    assert drawn == [2] * 20


def test_extra_padding_of_the_text_changes_nothing():
    stage1, full = model(), batch(4)
    pad = torch.nn.functional.pad
    longer = take(
        full, slice(None), input_ids_BT=pad(full.input_ids_BT, (0, 4)), is_text_BT=pad(full.is_text_BT, (0, 4))
    )
    first = stage1(full, negatives=cyclic_negatives(4)).total
    torch.testing.assert_close(stage1(longer, negatives=cyclic_negatives(4)).total, first, **CLOSE)


def test_queries_outside_a_text_branch_are_refused():
    with pytest.raises(ValueError, match="text branch"):
        Stage1(QFormerConfig(encoder_width=24, hidden_size=32, num_heads=4, vocab_size=0))


def test_another_encoder_width_is_named():
    with pytest.raises(ValueError, match=r"\(1, 3, 25\) .*encoder_width=24"):
        model().qformer.image_key_values(torch.zeros(1, 3, 25))
