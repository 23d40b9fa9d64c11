import pytest

from pipelines.training.step.optim import build_optimizer, learning_rate
from qformer.config import QFormerConfig
from qformer.objectives.stage1 import Stage1


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.1),  # first of ten warm-up steps: never zero
        (9, 1.0),  # last of the warm-up
        (10, 1.0),  # the cosine starts at the peak
        (60, 0.6),  # half way down: the mean of peak and minimum
        (110, 0.2),  # the end
        (500, 0.2),  # and never below
    ],
)
def test_warmup_and_cosine(step, rate):
    assert learning_rate(step, peak=1.0, minimum=0.2, warmup_steps=10, total_steps=110) == pytest.approx(rate)


def test_vectors_are_not_decayed_but_temperature_and_queries_are():
    config = QFormerConfig(encoder_width=8, hidden_size=8, num_layers=1, num_heads=2, vocab_size=9)
    stage1 = Stage1(config)
    decayed, plain = build_optimizer(stage1, weight_decay=0.05, betas=(0.9, 0.98)).param_groups
    names = {id(parameter): name for name, parameter in stage1.named_parameters()}
    assert {"temperature", "qformer.query_tokens"} <= {names[id(p)] for p in decayed["params"]}
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
