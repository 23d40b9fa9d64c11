"""Stage 1 beyond the recorded cases: masks, processes, frames, batches of one."""

import dataclasses
from unittest import mock

import pytest
import torch

from qformer.config import QFormerConfig
from qformer.distributed import gather, mean_of_ranks
from qformer.objectives import Negatives, PairNoise, itc_loss, itm_loss, sample_negatives
from qformer.objectives import stage1 as stage1_module
from qformer.objectives.stage1 import TERMS, Stage1, Stage1Batch
from tests.distributed import run_processes
from tests.qformer import plain

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


def model(config=CONFIG):
    torch.manual_seed(0)
    stage1 = Stage1(config)
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
    values = {name: getattr(full, name) for name in Stage1Batch.__dataclass_fields__}
    values = {name: value if value is None else value[rows] for name, value in values.items()}
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


def shared_batch():
    """Images that several samples share, on one rank and across the two."""
    return take(batch(6), slice(None), image_ids_B=torch.tensor([0, 1, 0, 1, 4, 0]))


JOINED = {"whole": batch(6), "masked": masked_batch(), "shared": shared_batch()}
# Fit all three: never a sample of the own image.
NEGATIVES = Negatives(torch.tensor([4, 2, 1, 5, 0, 3]), torch.tensor([3, 0, 4, 2, 1, 1]), torch.ones(6).bool())


def two_rank_worker(rank, world, folder):
    rows = slice(rank * 3, rank * 3 + 3)
    negatives = Negatives(*(values[rows] for values in NEGATIVES))
    for case, full in JOINED.items():
        expected = torch.load(folder / f"{case}.pt")
        stage1 = model()
        losses = stage1(take(full, rows), negatives=negatives)
        for name, loss in expected["losses"].items():
            assert mean_of_ranks(float(losses.terms[name].detach())) == pytest.approx(loss, abs=1e-5), (case, name)
        losses.total.backward()
        for name, parameter in stage1.named_parameters():
            torch.distributed.all_reduce(parameter.grad)
            joined = expected["gradients"][name]
            torch.testing.assert_close(parameter.grad / world, joined, **CLOSE, msg=f"{case} {name}")
    no_drawn_negative_shares_the_image(rows)
    gather_leaves_the_gradient_it_is_given(rank)


def no_drawn_negative_shares_the_image(rows):
    full, drawn = shared_batch(), []
    kept = mock.Mock(side_effect=lambda *arguments: drawn.append(sample_negatives(*arguments)) or drawn[-1])
    with mock.patch.object(stage1_module, "sample_negatives", kept):
        for key in range(20):
            model()(take(full, rows), noise_key=key)
    for negatives in drawn:
        for chosen in (negatives.image_B, negatives.text_B):
            assert (full.image_ids_B[chosen] != full.image_ids_B[rows]).all()


def gather_leaves_the_gradient_it_is_given(rank):
    """The sum hands the very same tensor to both its terms: summing over ranks in place would spoil the other's."""
    leaf, local = torch.ones(4, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    other = leaf * 1.0  # made first, so that its backward comes after the gather's
    weight = torch.arange(12.0).view(4, 3)
    ((gather(local, with_gradient=True) + other) * (weight + rank)).sum().backward()
    torch.testing.assert_close(leaf.grad, weight + rank)
    torch.testing.assert_close(local.grad, (2 * weight + 1)[rank * 2 : rank * 2 + 2])


def test_gather_with_gradient_equals_one_process_on_the_joined_batch(tmp_path):
    """Losses, as means over the ranks, and gradients."""
    for case, full in JOINED.items():
        stage1 = model()
        losses = stage1(full, negatives=NEGATIVES)
        losses.total.backward()
        values = {name: float(losses.terms[name].detach()) for name in TERMS}
        torch.save({"losses": values, "gradients": gradients(stage1)}, tmp_path / f"{case}.pt")
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
    torch.testing.assert_close(long.total, short.total, **CLOSE)
    for name in TERMS:
        torch.testing.assert_close(long.terms[name], short.terms[name], **CLOSE)
    for name, gradient in gradients(kept).items():
        torch.testing.assert_close(gradients(with_bad)[name], gradient, **CLOSE, msg=name)


def test_a_batch_of_one_has_no_negatives_and_equals_plain():
    stage1, slow, full = model(), model(), batch(1)
    losses = stage1(full)
    losses.total.backward()
    none = Negatives(torch.tensor([0]), torch.tensor([0]), torch.tensor([False]))
    expected = plain.plain_losses(slow, full, none)
    sum(expected).backward()
    for ours, theirs in zip((losses.terms[name] for name in TERMS), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    for name, gradient in gradients(stage1).items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, gradients(slow)[name], **CLOSE, msg=name)
    assert all(gradients(stage1)[name].abs().max() > 0 for name in ("itm_head.weight", "qformer.lm_bias"))


def test_a_batch_without_a_valid_row_has_zero_loss_and_zero_gradients():
    full, stage1 = batch(2), model()
    losses = stage1(take(full, slice(None), is_valid_B=torch.zeros(2, dtype=torch.bool)))
    assert losses.total.item() == 0.0
    losses.total.backward()
    for name, gradient in gradients(stage1).items():  # every one is there, as DDP needs it
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


def masked_objectives():
    """Loss of scores or logits of four rows, of which the third is masked."""
    valid = torch.tensor([True, True, False, True])
    match = torch.tensor([True, False, True, False])
    return {
        "itc": (torch.zeros(4, 4), lambda scores: itc_loss(scores, torch.eye(4).bool(), valid, valid)[0]),
        "itm": (torch.zeros(4, 2), lambda logits: itm_loss(logits, match, valid)[0]),
    }


@pytest.mark.parametrize("objective", ["itc", "itm"])
def test_nan_of_a_masked_row_changes_nothing_and_of_a_valid_row_is_not_hidden(objective):
    start, loss_of = masked_objectives()[objective]
    start.normal_(generator=torch.Generator().manual_seed(0))
    plainly, masked, spoilt = (start.clone() for _ in range(3))
    masked[2] = float("nan")
    if objective == "itc":
        masked[:, 2] = float("nan")  # a masked sample is no column either
    spoilt[1, 0] = float("nan")
    losses = []
    for scores in (plainly, masked, spoilt):
        losses.append(loss_of(scores.requires_grad_()))
        losses[-1].backward()
    assert losses[0].isfinite() and torch.equal(losses[1], losses[0])
    assert torch.equal(masked.grad, plainly.grad) and plainly.grad[2].eq(0).all()
    assert losses[2].isnan()


def noise(key, rows=4, columns=None):
    return PairNoise(key, torch.arange(rows), torch.arange(columns or rows))


def test_negatives_are_never_positives_nor_masked():
    scores = torch.zeros(4, 4)
    positives = torch.eye(4, dtype=torch.bool)
    positives[0, 1] = positives[1, 0] = True  # two captions of one image
    valid = torch.tensor([True, True, True, False])
    for key in range(50):
        drawn = sample_negatives(scores, scores, positives, valid, noise(key))
        assert drawn.image_B[:2].tolist() == [2, 2] and drawn.text_B[:2].tolist() == [2, 2]
        assert set(drawn.image_B.tolist()) <= {0, 1, 2}


def test_negatives_are_drawn_with_the_probabilities_of_the_softmax():
    """20,000 draws: the shares are within four standard deviations."""
    scores = torch.tensor([[5.0, 1.0, 0.0, -2.0]]).expand(20_000, 4)
    positives = torch.tensor([[True, False, False, False]]).expand(20_000, 4)
    places = torch.arange(20_000), torch.arange(4)
    drawn = sample_negatives(scores, scores, positives, torch.ones(4).bool(), PairNoise(2**62 + 7, *places))
    expected = torch.tensor([1.0, 0.0, -2.0]).softmax(dim=0)
    for chosen in (drawn.image_B, drawn.text_B):
        shares = torch.bincount(chosen, minlength=4)[1:] / 20_000
        assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt()).all(), shares
    assert (drawn.image_B != drawn.text_B).any()  # the two directions have noise of their own


def test_noise_is_that_of_the_place_whatever_part_of_the_batch_a_rank_sees():
    whole = noise(11, 6).gumbel(0)
    part = PairNoise(11, torch.tensor([4, 1]), torch.tensor([5, 0, 3])).gumbel(0)
    assert torch.equal(part, whole[[4, 1]][:, [5, 0, 3]])
    for other in (noise(12, 6).gumbel(0), noise(11, 6).gumbel(1), whole.T):
        assert (other != whole).float().mean() > 0.8
    large = noise(3, 500).gumbel(0)  # mean 0.5772, variance 1.645
    assert abs(float(large.mean()) - 0.5772) < 0.02 and abs(float(large.var()) - 1.645) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([large[:-1].flatten(), large[1:].flatten()]))[0, 1])) < 0.02


def test_rows_that_only_pad_a_share_take_no_place():
    """Two ranks of three, one row of the first being padding, see the noise of five rows in one process."""
    own = take(batch(3), slice(None), sample_ids=("a", "b", ""))
    places = stage1_module._noise(own, 5)
    assert places.place_N.tolist() == [0, 1, 1] and places.key == 5


def test_extra_padding_of_the_text_changes_nothing():
    stage1, full = model(), batch(4)
    pad = torch.nn.functional.pad
    longer = take(
        full, slice(None), input_ids_BT=pad(full.input_ids_BT, (0, 4)), is_text_BT=pad(full.is_text_BT, (0, 4))
    )
    first = stage1(full, negatives=cyclic_negatives(4)).total
    torch.testing.assert_close(stage1(longer, negatives=cyclic_negatives(4)).total, first, **CLOSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"encoder_width": -24}, "encoder_width=-24 must be at least 1"),
        ({"cross_attention_frequency": 0}, "cross_attention_frequency=0 must be at least 1"),
        ({"vocab_size": -3}, "vocab_size=-3 must be at least 0"),
        ({"num_heads": 5}, "num_heads=5 does not divide hidden_size=32"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
    ],
)
def test_sizes_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_queries_outside_a_text_branch_are_refused():
    with pytest.raises(ValueError, match="text branch"):
        Stage1(QFormerConfig(encoder_width=24, hidden_size=32, num_heads=4, vocab_size=0))


def test_another_encoder_width_is_named():
    with pytest.raises(ValueError, match=r"\(1, 3, 25\) .*encoder_width=24"):
        model().qformer.image_key_values(torch.zeros(1, 3, 25))
