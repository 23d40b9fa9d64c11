"""Stage 2's texts and generation with the demo's shipped language model."""

import dataclasses
from pathlib import Path

import pytest
import torch

from qformer.backbones import load_language, load_vision, weights_fingerprint
from qformer.bridges.protocol import BridgeText
from qformer.config import GenerationSettings, LanguageSpec, QFormerConfig, VisionSpec
from qformer.errors import UserError
from qformer.language import build_language_model
from qformer.objectives.stage2 import Stage2

MODELS = Path(__file__).parents[3] / "jobs" / "demo" / "models"
CONFIG = QFormerConfig(
    encoder_width=128, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, num_queries=4, dropout=0.0
)


@pytest.fixture(scope="module")
def language():
    return build_language_model(*load_language(LanguageSpec(str(MODELS / "language"))))


def prefix_of(language, size, seed=0):
    return torch.randn(size, 4, language.width, generator=torch.Generator().manual_seed(seed))


def test_labels_cover_the_caption_and_its_end_but_not_the_prompt(language):
    tokenizer = language.tokenizer
    captions = ["a small red circle", "a large blue square left of a small red circle"]
    batch = language.tokenize(["a"] * 2, captions, max_tokens=32)
    ids, mask, labels = batch.input_ids_BS, batch.is_input_BS, batch.labels_BT
    prompt_length = len([i for i in tokenizer.encode("a") if i != tokenizer.eos_token_id])
    assert (labels[:, :prompt_length] == -100).all()
    for row, caption in enumerate(captions):
        counted = labels[row][labels[row] != -100].tolist()
        assert counted[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(counted[:-1]) == caption
        assert ids[row][mask[row]].tolist()[prompt_length:] == counted
    assert (labels[~mask] == -100).all() and ids.shape == mask.shape == labels.shape


def test_a_caption_over_the_limit_keeps_its_end_token_and_is_counted(language):
    captions = ["a small red circle " * 20, "a small red circle"]
    batch = language.tokenize(["", ""], captions, max_tokens=8)
    assert batch.input_ids_BS.shape[1] == 8 and batch.is_input_BS[0].all()
    assert batch.input_ids_BS[0, -1] == language.tokenizer.eos_token_id
    assert batch.num_truncated == 1


def test_a_long_prompt_leaves_the_answer_whole(language):
    batch = language.tokenize(["a small red circle " * 20], ["a large square"], max_tokens=8)
    counted = batch.labels_BT[batch.labels_BT != -100].tolist()
    assert language.tokenizer.decode(counted[:-1]) == "a large square" and batch.num_truncated == 1


def test_generation_follows_the_logits_of_training(language):
    """The greedy first token is the argmax that the training path computes at the same place."""
    prefix = prefix_of(language, 3, seed=3)
    batch = language.tokenize(["a small"] * 3, ["red"] * 3, max_tokens=8)
    first = (batch.labels_BT[0] != -100).nonzero()[0, 0]
    expected = language.logits(prefix, batch)[:, first].argmax(dim=-1)
    texts = language.generate(prefix, ["a small"] * 3, GenerationSettings(max_new_tokens=1))
    decoded = language.tokenizer.batch_decode(expected[:, None], skip_special_tokens=True)
    assert texts == [text.strip() for text in decoded]


def test_only_the_bridge_gets_gradients(language):
    before = weights_fingerprint(language)
    stage2 = Stage2(CONFIG, language_width=language.width)
    batch = language.tokenize([""] * 2, ["a small red circle"] * 2, max_tokens=16)
    total, count = language.loss(stage2(torch.randn(2, 3, 5, 128)).prompts_BNL, batch)
    (total / count).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in stage2.parameters())
    assert all(p.grad is None for p in language.parameters())
    assert weights_fingerprint(language) == before
    assert not any(module.training for module in language.train().modules())


def test_clips_give_the_soft_prompts_of_their_frames_in_order(language):
    stage2 = Stage2(CONFIG, language_width=language.width).eval()
    clip = torch.randn(2, 3, 5, 128)
    apart = torch.cat([prompts(stage2, clip[:, frame : frame + 1]) for frame in range(3)], dim=1)
    torch.testing.assert_close(prompts(stage2, clip), apart, atol=1e-6, rtol=1e-5)


def prompts(stage2, image, text=None):
    return stage2(image, text).prompts_BNL


INSTRUCTED = dataclasses.replace(CONFIG, vocab_size=30, has_lm_head=False)


def test_the_instruction_reaches_the_soft_prompts_but_its_padding_does_not():
    torch.manual_seed(0)
    stage2 = Stage2(INSTRUCTED, language_width=16).eval()
    image, ids = torch.randn(2, 3, 5, 128), torch.randint(1, 29, (2, 6))
    mask = torch.ones_like(ids, dtype=torch.bool)
    prefix = prompts(stage2, image, BridgeText(ids, mask))
    assert prefix.shape == (2, 3 * 4, 16)
    other = ids.clone()
    other[:, 2] = (ids[:, 2] + 1) % 29
    assert (prompts(stage2, image, BridgeText(other, mask)) - prefix).abs().max() > 1e-4
    pad = torch.nn.functional.pad
    padded = BridgeText(pad(ids, (0, 3)), pad(mask, (0, 3)))
    torch.testing.assert_close(prompts(stage2, image, padded), prefix, atol=1e-6, rtol=1e-5)


def test_a_frozen_qformer_leaves_the_projection_alone_to_train():
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, dropout=0.5)
    stage2 = Stage2(config, language_width=16, freeze_qformer=True)
    trained = {name for name, p in stage2.named_parameters() if p.requires_grad}
    assert trained == {"language_projection.weight", "language_projection.bias"}
    image = torch.randn(2, 1, 5, 128)
    assert torch.equal(prompts(stage2.train(), image), prompts(stage2.eval(), image))
    free = Stage2(config, language_width=16).train()
    assert not torch.equal(prompts(free, image), prompts(free, image))


@pytest.mark.parametrize(
    ("image", "ids", "message"),
    [
        (torch.zeros(2, 1, 5, 127), None, r"\(2, 1, 5, 127\).*encoder_width=128"),
        (torch.zeros(2, 5, 128), None, r"\[B, F, P, 128\]"),
        (torch.zeros(2, 1, 5, 128, dtype=torch.uint8), None, "uint8.*floating"),
        (torch.zeros(2, 1, 5, 128), None, "qformer_reads_prompt"),
        (torch.zeros(2, 1, 5, 128), torch.tensor([[1, 30], [1, 2]]), "from 1 to 30, .*vocab_size=30.*model.tokenizer"),
        (torch.zeros(2, 1, 5, 128), torch.ones(3, 2, dtype=torch.long), "3 instructions for 2 images"),
        (torch.zeros(2, 1, 5, 128), torch.ones(2, 2), "float32"),
    ],
)
def test_bad_input_names_both_sides(image, ids, message):
    stage2 = Stage2(INSTRUCTED, language_width=16)
    with pytest.raises(ValueError, match=message):
        stage2(image, None if ids is None else BridgeText(ids, torch.ones_like(ids, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("config", "has_text", "message"),
    [
        (CONFIG, True, "instructions given: True, .*vocab_size=0 takes none"),
        (INSTRUCTED, False, "instructions given: False, .*vocab_size=30 takes them"),
    ],
)
def test_an_instruction_that_is_missing_and_one_that_no_text_branch_reads_are_refused(config, has_text, message):
    ids = torch.ones(2, 2, dtype=torch.long)
    text = BridgeText(ids, ids.bool()) if has_text else None
    with pytest.raises(ValueError, match=f"{message}.*qformer_reads_prompt"):
        Stage2(config, language_width=16)(torch.zeros(2, 1, 5, 128), text)


def test_text_for_a_qformer_without_text_branch_is_refused():
    qformer, ids = Stage2(CONFIG, language_width=16).qformer, torch.ones(2, 2, dtype=torch.long)
    image = qformer.image_key_values(torch.zeros(2, 5, 128))
    for call in (
        lambda: qformer.forward_text(ids, ids.bool()),
        lambda: qformer.forward_joint(image, ids, ids.bool()),
        lambda: qformer.decode_text(ids, ids.bool(), qformer.forward_queries(image).cache),
    ):
        with pytest.raises(ValueError, match="without text branch"):
            call()


@pytest.mark.parametrize(("weights", "features"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_features_of_another_dtype_than_the_weights_are_named_but_autocast_takes_half_precision(weights, features):
    stage2 = Stage2(CONFIG, language_width=16).to(weights).eval()
    image = torch.randn(2, 1, 5, 128, dtype=features)
    with pytest.raises(ValueError, match=rf"tokens are {features} .*takes floating {weights} .*\.to\({weights}\)"):
        stage2(image)
    assert prompts(stage2, image.to(weights)).dtype == weights
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if weights == torch.float32:
            assert prompts(stage2, image).isfinite().all()
        else:  # autocast casts what a layer is given, and a layer norm is not among them
            with pytest.raises(ValueError, match=rf"{features} .*{weights}"):
                stage2(image)


def test_a_stage_1_head_has_no_place_in_stage_2():
    with pytest.raises(ValueError, match="has_lm_head=False"):
        Stage2(dataclasses.replace(INSTRUCTED, has_lm_head=True), language_width=16)


def test_soft_prompts_of_another_width_are_named(language):
    batch = language.tokenize([""], ["a"], max_tokens=8)
    with pytest.raises(ValueError, match=rf"language_width={language.width}"):
        language.loss(torch.zeros(1, 4, language.width + 1), batch)


def test_the_encoder_stays_in_eval_and_refuses_other_pixels():
    encoder = load_vision(VisionSpec(str(MODELS / "vision")))
    encoder.train()
    assert not encoder.training and not any(m.training for m in encoder.modules())
    size = encoder.preprocessing.height
    tokens = encoder(torch.zeros(2, 3, 3, size, size, dtype=torch.uint8))
    assert tokens.shape == (2, 3, encoder.num_tokens, encoder.width) and not tokens.requires_grad
    with pytest.raises(ValueError, match="uint8"):
        encoder(torch.zeros(2, 3, 3, size, size))


def test_the_second_to_last_layer_is_read():
    """Zeroing the last block changes nothing; zeroing the one before does."""
    encoder = load_vision(VisionSpec(str(MODELS / "vision")))
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
        load_vision(VisionSpec(name, pretrained=False))
    assert name in str(caught.value) and "\n" not in str(caught.value)
