"""Paired figures, permutations and losses of `qformer.analysis.image_use`."""

from pathlib import Path

import pytest
import torch

from qformer.analysis.image_use import answer_losses, compare_pairs, permute_images
from qformer.backbones import load_language
from qformer.config import LanguageSpec
from qformer.language import IGNORED, build_language_model

LANGUAGE = Path(__file__).parents[3] / "jobs" / "demo" / "models" / "language"


def test_figures_of_a_small_table():
    figures = compare_pairs(torch.tensor([3.0, 2.0, 1.0, 5.0]), torch.tensor([1.0, 2.0, 2.0, 1.0]))
    # Two better, one the same, one worse.
    assert (figures.num_pairs, figures.true_mean, figures.permuted_mean, figures.share) == (4, 2.75, 1.5, 0.625)
    assert figures.z == pytest.approx((2.5 - 2) / (4 / 4) ** 0.5)
    flipped = compare_pairs(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0]), lower_is_better=True)
    assert flipped.share == 0.25


@pytest.mark.parametrize(
    ("wins", "size", "verdict"),
    [
        (100, 100, "used"),
        (70, 100, "used"),
        (64, 100, "unused"),  # z 2.8
        (5600, 10000, "hardly"),  # z 12, but for few texts
        (50, 100, "unused"),
        (10, 100, "unused"),  # the wrong image fits better: no use either
        (15, 15, "unknown"),
        (0, 0, "unknown"),
    ],
)
def test_verdicts(wins, size, verdict):
    gains = torch.cat([torch.ones(wins), -torch.ones(size - wins)])
    assert compare_pairs(gains, torch.zeros(size)).verdict == verdict


@pytest.mark.parametrize(("gain", "verdict"), [(0.04, "hardly"), (0.06, "used")])
def test_a_gain_that_is_sure_but_small_is_hardly_a_use(gain, verdict):
    losses = torch.linspace(1.0, 3.0, 100)
    assert compare_pairs(losses, losses + gain, lower_is_better=True, least_gain=0.05).verdict == verdict


def test_a_model_that_gives_every_image_the_same_is_at_chance():
    figures = compare_pairs(torch.full((50,), 0.3), torch.full((50,), 0.3))
    assert (figures.share, figures.z, figures.verdict) == (0.5, 0.0, "unused")


def test_noise_is_no_use():
    generator = torch.Generator().manual_seed(0)
    verdicts = [compare_pairs(*torch.randn(2, 256, generator=generator)).verdict for _ in range(300)]
    assert verdicts.count("unused") >= 297  # 1 of 740 by chance


def test_no_text_meets_an_image_it_may_not_meet():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        may_swap = torch.rand(12, 12, generator=generator) < 0.4
        may_swap.fill_diagonal_(False)
        image_B = permute_images(may_swap, generator)
        met = [(text, int(image)) for text, image in enumerate(image_B) if image >= 0]
        assert len({image for _, image in met}) == len(met) >= 10
        assert all(may_swap[pair] for pair in met)


def test_every_text_that_can_be_served_is():
    """Text 0 may meet only image 2: whoever took that first has to give it up."""
    may_swap = torch.tensor([[0, 0, 1], [1, 0, 1], [1, 1, 0]], dtype=torch.bool)
    found = {tuple(permute_images(may_swap, torch.Generator().manual_seed(seed)).tolist()) for seed in range(20)}
    assert found == {(2, 0, 1)}


def test_texts_that_no_image_is_left_for_are_left_out():
    may_swap = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    assert permute_images(may_swap, torch.Generator()).tolist() == [1, 0, -1]


def test_losses_of_samples_make_up_the_loss_of_the_batch():
    language = build_language_model(*load_language(LanguageSpec(str(LANGUAGE))))
    torch.manual_seed(0)
    texts = ["a small red circle above a large blue square", "a red circle"]
    batch = language.tokenize(["", "a small"], texts, max_tokens=16)
    prefix_BNL = torch.randn(2, 3, language.width)
    losses_B = answer_losses(language, prefix_BNL, batch)
    counts_B = (batch.labels_BT != IGNORED).sum(dim=1)
    total, count = language.loss(prefix_BNL, batch)
    assert counts_B[0] != counts_B[1]
    torch.testing.assert_close((losses_B * counts_B).sum() / count, total / count)
