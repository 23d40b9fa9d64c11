"""The stage-1 benchmark's peer computes what ours computes."""

import pytest
import torch

from jobs.bench.hf_stage1 import HuggingFaceStage1, their_name
from qformer.config import QFormerConfig
from qformer.objectives import Negatives
from qformer.stage1 import Stage1, Stage1Batch

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
    for name in ("itc", "itm", "itg", "total"):
        torch.testing.assert_close(getattr(losses, name), getattr(expected, name), **CLOSE)
    expected.total.backward()
    losses.total.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[their_name(name)].grad, **CLOSE, msg=name)
