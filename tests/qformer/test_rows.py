"""Chosen rows and their gradients are those of `index_select`."""

import pytest
import torch

from qformer.rows import _TakeRows, pick_rows, take_rows

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
ONCE, OFTEN = [4, 0, 3], [2, 0, 2, 2, 4]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("choose", "index"), [(pick_rows, ONCE), (take_rows, OFTEN), (_TakeRows.apply, ONCE), (_TakeRows.apply, OFTEN)]
)
def test_forward_and_gradient_are_those_of_index_select(choose, index, device):
    generator, places = torch.Generator().manual_seed(0), torch.tensor(index, device=device)
    rows = [torch.randn(5, 3, 2, generator=generator).to(device).requires_grad_() for _ in range(2)]
    rows[1].data.copy_(rows[0].data)
    chosen, expected = choose(rows[0], places), rows[1].index_select(0, places)
    assert torch.equal(chosen, expected)
    weight = torch.randn(expected.shape, generator=generator).to(device)
    for output in (chosen, expected):
        (output * weight).sum().backward()
    torch.testing.assert_close(rows[0].grad, rows[1].grad, atol=1e-6, rtol=1e-6)
