"""The stage-1 benchmark's peer computes what ours computes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jobs.bench.hf_stage1 import HuggingFaceStage1, their_name
from jobs.bench.stage1 import Stage1Case, make_batch, measure
from jobs.bench.stage1_flops import step_flops
from qformer.config import QFormerConfig
from qformer.objectives import Negatives
from qformer.objectives.stage1 import Stage1, Stage1Batch

CONFIG = QFormerConfig(
    encoder_width=24, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48, num_queries=5, vocab_size=40,
    embed_dim=16, dropout=0.0,
)  # fmt: skip
# Sums in another order: losses of about 4 differ by 1e-6, gradients by 2e-6.
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_reference_schedule_has_our_losses_and_gradients(attention):
    torch.manual_seed(0)
    ours = Stage1(CONFIG)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        ours.temperature.fill_(0.3)
    theirs = HuggingFaceStage1(ours, attention=attention)
    mask = torch.arange(9)[None] < torch.tensor([9, 4, 7, 5])[:, None]
    batch = Stage1Batch(
        image_BFPV=torch.randn(4, 1, 7, 24),
        input_ids_BT=torch.randint(1, 39, (4, 9)).masked_fill(~mask, 0),
        is_text_BT=mask,
        image_ids_B=torch.arange(4),
        is_valid_B=torch.ones(4, dtype=torch.bool),
    )
    index = torch.arange(4)
    negatives = Negatives((index + 1) % 4, (index + 2) % 4, torch.ones(4, dtype=torch.bool))
    expected, losses = theirs(batch, negatives), ours(batch, negatives=negatives)
    for name in ("itc", "itm", "itg"):
        torch.testing.assert_close(losses.terms[name], expected.terms[name], **CLOSE)
    torch.testing.assert_close(losses.total, expected.total, **CLOSE)
    expected.total.backward()
    losses.total.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[their_name(name)].grad, **CLOSE, msg=name)


def test_operations_are_those_that_torch_counts():
    """Without the products that the backward computes again, which are no useful work."""
    case = Stage1Case(config=CONFIG, image_tokens=7, batch=4)
    batch, negatives = make_batch(case, [9, 4, 7, 5], seed=0)
    model = Stage1(CONFIG)
    lengths = batch.is_text_BT.sum(dim=1)
    expected = step_flops(CONFIG, lengths.tolist(), lengths[negatives.text_B].tolist(), 7)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch, negatives=negatives)
    # ITC's similarities, batch x batch, are the only products that are left out.
    assert counter.get_total_flops() == pytest.approx(expected / 3, rel=0.01)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, negatives=negatives).total.backward()
    assert expected <= counter.get_total_flops() < 1.1 * expected


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "is_bf16"), [("eager", False), ("aot_eager", True)])
def test_the_way_of_the_gpu_runs_at_a_tiny_size(compiler, is_bf16):
    """The compiled measurement, operations a second and the encoder, on the CPU."""
    torch._dynamo.reset()
    case = Stage1Case(
        config=CONFIG, image_tokens=7, batch=4, rounds=1, is_bf16=is_bf16, compiler=compiler, vision="test_vit",
        vision_batch=2,
    )  # fmt: skip
    result = measure(case, [9, 4, 7, 5])
    assert set(result.seconds) == {"ours", "reference", "ours compiled"}
    assert set(result.ratios) == {"speedup", "speedup eager", "peak_memory"}
    assert set(result.rates) == {"ours TFLOP/s", "ours compiled TFLOP/s", "test_vit images/s"}
