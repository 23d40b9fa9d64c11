"""Stage 2's texts and generation with the demo's shipped language model."""

from pathlib import Path

import pytest
import torch

from qformer.backbones import load_language, load_vision, weights_fingerprint
from qformer.config import QFormerConfig
from qformer.errors import UserError
from qformer.stage2 import Stage2, caption_ids, generate, language_logits, language_loss

MODELS = Path(__file__).parents[2] / "jobs" / "demo" / "models"
CONFIG = QFormerConfig(
    encoder_width=128, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, num_queries=4, dropout=0.0
)


@pytest.fixture(scope="module")
def language():
    return load_language(str(MODELS / "language"))


def test_labels_cover_the_caption_and_its_end_but_not_the_prompt(language):
    _, tokenizer = language
    captions = ["a small red circle", "a large blue square left of a small red circle"]
    ids, mask, labels = caption_ids(tokenizer, captions, prompt="a", max_tokens=32)
    prompt_length = len([i for i in tokenizer.encode("a") if i != tokenizer.eos_token_id])
    assert (labels[:, :prompt_length] == -100).all()
    for row, caption in enumerate(captions):
        counted = labels[row][labels[row] != -100].tolist()
        assert counted[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(counted[:-1]) == caption
    assert (labels[~mask] == -100).all() and ids.shape == mask.shape == labels.shape


def test_a_caption_over_the_limit_keeps_its_end_token(language):
    _, tokenizer = language
    ids, mask, _ = caption_ids(tokenizer, ["a small red circle " * 20], prompt="", max_tokens=8)
    assert ids.shape[1] == 8 and mask.all() and ids[0, -1] == tokenizer.eos_token_id


def test_batched_generation_equals_single(language):
    model, tokenizer = language
    torch.manual_seed(0)
    prefix = torch.randn(5, 4, model.get_input_embeddings().embedding_dim)
    together = generate(model, tokenizer, prefix, prompt="", max_new_tokens=12)
    alone = [generate(model, tokenizer, row[None], prompt="", max_new_tokens=12)[0] for row in prefix]
    assert together == alone


def test_generation_follows_the_logits_of_training(language):
    """The greedy first token is the argmax that the training path computes at the same place."""
    model, tokenizer = language
    prefix = torch.randn(3, 4, model.get_input_embeddings().embedding_dim, generator=torch.Generator().manual_seed(3))
    start = torch.tensor([[i for i in tokenizer.encode("") if i != tokenizer.eos_token_id]] * 3)
    logits = language_logits(model, prefix, start, torch.ones_like(start, dtype=torch.bool))
    first = logits[:, -1].argmax(dim=-1)
    texts = generate(model, tokenizer, prefix, prompt="", max_new_tokens=1)
    assert texts == [text.strip() for text in tokenizer.batch_decode(first[:, None], skip_special_tokens=True)]


def test_only_the_bridge_gets_gradients(language):
    model, tokenizer = language
    before = weights_fingerprint(model)
    stage2 = Stage2(CONFIG, language_width=model.get_input_embeddings().embedding_dim)
    ids, mask, labels = caption_ids(tokenizer, ["a small red circle"] * 2, prompt="", max_tokens=16)
    total, count = language_loss(language_logits(model, stage2(torch.randn(2, 3, 5, 128)), ids, mask), labels)
    (total / count).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in stage2.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert weights_fingerprint(model) == before


def test_the_encoder_stays_in_eval_and_refuses_other_pixels():
    encoder = load_vision(str(MODELS / "vision"))
    encoder.train()
    assert not encoder.training and not any(m.training for m in encoder.modules())
    size = encoder.preprocessing.height
    tokens = encoder(torch.zeros(2, 3, 3, size, size, dtype=torch.uint8))
    assert tokens.shape == (2, 3, encoder.num_tokens, encoder.width) and not tokens.requires_grad
    with pytest.raises(ValueError, match="uint8"):
        encoder(torch.zeros(2, 3, 3, size, size))


def test_the_second_to_last_layer_is_read():
    """Zeroing the last block changes nothing; zeroing the one before does."""
    encoder = load_vision(str(MODELS / "vision"))
    size = encoder.preprocessing.height
    pixels = torch.randint(0, 255, (1, 1, 3, size, size), dtype=torch.uint8)
    before = encoder(pixels)
    with torch.no_grad():
        for parameter in encoder.model.blocks[-1].parameters():
            parameter.zero_()
        torch.testing.assert_close(encoder(pixels), before, atol=0, rtol=0)
        for parameter in encoder.model.blocks[-2].parameters():
            parameter.zero_()
        assert not torch.allclose(encoder(pixels), before)


@pytest.mark.parametrize(
    ("name", "hint"), [("vit_tiny_patch16_22", "vit_tiny_patch16_224"), ("/nowhere", "config.json")]
)
def test_a_wrong_vision_name_is_one_clear_line(name, hint):
    with pytest.raises(UserError, match=hint) as caught:
        load_vision(name, pretrained=False)
    assert name in str(caught.value) and "\n" not in str(caught.value)
