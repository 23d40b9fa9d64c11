"""Stock transformers runs what we export, and computes what we compute: tokens, scores, hidden states, gradients."""

import json

import pytest
import torch

from pipelines.data.media.transforms import resize_and_crop
from pipelines.inference.models import load_captioner, load_retriever
from qformer.backbones import load_vision
from qformer.bridges.protocol import BridgeInput, BridgeText, Keys
from qformer.config import GenerationSettings, LoraConfig
from qformer.conversion.bundle import ImportOptions
from qformer.conversion.checkpoint import read_info, read_weights
from qformer.conversion.huggingface import export_huggingface
from qformer.conversion.names import HF_RETRIEVAL, layout_name
from qformer.objectives import similarity
from qformer.objectives.stage2 import Stage2
from tests.qformer.folders import (
    as_images,
    assert_same_files,
    eps_effect,
    imported,
    pixels,
    recorded_ids,
    stock_pixels,
    without_padding,
    write_large_encoder,
)
from tests.tiny_checkpoints import write_stage1, write_stage2
from tests.tiny_huggingface import ARCHITECTURES, NUM_QUERIES, PROMPT

# fp32 through three layers of two implementations; measured worst 2e-6.
OUTPUT = {"atol": 2e-5, "rtol": 1e-4}
GRADIENT_SHARE = 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stock_loads_the_export_without_a_missing_or_unexpected_tensor(folders, name):
    import transformers

    model, _, _, exported, _, _ = folders[name]
    loaded, info = type(model).from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = transformers.AutoProcessor.from_pretrained(exported)
    assert processor.image_processor.size["height"] == loaded.config.vision_config.image_size


# (architecture, prompt)
GENERATING = [
    ("Blip2ForConditionalGeneration", ""),
    ("Blip2ForConditionalGeneration", PROMPT),
    ("Blip2ForConditionalGeneration-t5", PROMPT),
    ("InstructBlipForConditionalGeneration", PROMPT),
]


@pytest.mark.parametrize(("name", "prompt"), GENERATING)
def test_stock_generates_our_tokens(folders, name, prompt, tmp_path):
    """Both ways of running the same checkpoint: our captioner, and stock transformers on the exported folder."""
    from transformers import AutoProcessor

    stock_class, stock = type(folders[name][0]), folders[name][1]
    imported(stock, tmp_path / "ours", ImportOptions(prompt=prompt))
    export_huggingface(tmp_path / "ours", tmp_path / "exported")
    batch = pixels(6)
    captioner = load_captioner(tmp_path / "ours")
    with recorded_ids(captioner.language) as calls:
        captions = captioner.answer(batch, settings=GenerationSettings(max_new_tokens=8))
    model = stock_class.from_pretrained(tmp_path / "exported")
    processor = AutoProcessor.from_pretrained(tmp_path / "exported")
    inputs = {"pixel_values": stock_pixels(processor, batch)}
    start = NUM_QUERIES + 1  # placeholders and the start token that stock puts there by itself
    if prompt:
        inputs = dict(processor(images=as_images(batch), text=[prompt] * len(batch), return_tensors="pt"))
        start = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=1)
    answers = ids if model.config.text_config.is_encoder_decoder else ids[:, start:]
    assert calls == [without_padding(answers, processor.tokenizer.pad_token_id)]
    assert captions == [t.strip() for t in processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]
    assert len(set(captions)) > 1 and max(map(len, captions)) > 10  # the pictures matter, the captions say something


def test_soft_prompts_equal_t5(folders):
    """T5 before its own generation: the projected queries that go into the encoder."""
    model, _, ours, _, _, _ = folders["Blip2ForConditionalGeneration-t5"]
    info = read_info(ours)
    stage2 = Stage2(info.qformer, language_width=model.config.text_config.hidden_size).eval()
    stage2.load_state_dict(read_weights(ours))
    encoder, batch = load_vision(info.vision), pixels()
    scaled = (batch[:, 0].float() / 255 - encoder.mean_1C11) / encoder.std_1C11
    with torch.no_grad():
        expected = model.get_image_features(scaled).pooler_output
        torch.testing.assert_close(stage2(encoder(batch)).prompts_BNL, expected, **OUTPUT)


def test_joint_hidden_states_equal_instructblip(folders):
    """The instruction inside the Q-Former: queries and text together, text padded."""
    model, _, ours, _, _, _ = folders["InstructBlipForConditionalGeneration"]
    info = read_info(ours)
    stage2 = Stage2(info.qformer, language_width=model.config.text_config.hidden_size).eval()
    stage2.load_state_dict(read_weights(ours))
    qformer = stage2.qformer
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])
    image = torch.randn(2, 7, info.qformer.encoder_width)
    mask = torch.cat([torch.ones(2, NUM_QUERIES, dtype=torch.long), (ids != 0).long()], dim=1)
    with torch.no_grad():
        expected = model.qformer(
            input_ids=ids,
            attention_mask=mask,
            query_embeds=model.query_tokens.expand(2, -1, -1),
            encoder_hidden_states=image,
        ).last_hidden_state
        hidden = qformer.forward_joint(qformer.image_key_values(image), ids, ids != 0)
    torch.testing.assert_close(hidden, expected[:, :NUM_QUERIES], **OUTPUT)


@pytest.mark.parametrize("with_head", [False, True], ids=["similarity", "match"])
def test_retrieval_scores_equal(folders, with_head):
    from transformers import AutoProcessor, Blip2ForImageTextRetrieval

    _, _, ours, exported, _, _ = folders["Blip2ForImageTextRetrieval"]
    captions, batch = ["a small red circle", "a large blue", "triangle moving"], pixels()
    retriever = load_retriever(ours)
    model = Blip2ForImageTextRetrieval.from_pretrained(exported)
    processor = AutoProcessor.from_pretrained(exported)
    text = processor(text=captions, padding=True, return_tensors="pt")
    inputs = {"pixel_values": stock_pixels(processor, batch), "use_image_text_matching_head": with_head}
    with torch.no_grad():
        scores = model(**inputs, input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits_per_image
    queries, tokens = retriever.embed_image(batch)
    if with_head:
        torch.testing.assert_close(retriever.match(tokens, captions), scores.softmax(dim=-1)[:, 1], **OUTPUT)
    else:
        ours_scores = (queries @ retriever.embed_text(captions).T).amax(dim=1)
        torch.testing.assert_close(ours_scores, scores, **OUTPUT)
        assert scores.std() > 1e-3


@pytest.mark.parametrize("with_head", [False, True], ids=["similarity", "match"])
def test_retrieval_hidden_states_and_gradients_equal(folders, with_head):
    from transformers import AutoProcessor, Blip2ForImageTextRetrieval

    _, _, ours, exported, _, _ = folders["Blip2ForImageTextRetrieval"]
    retriever, batch = load_retriever(ours), pixels()
    model = Blip2ForImageTextRetrieval.from_pretrained(exported).eval()
    processor = AutoProcessor.from_pretrained(exported)
    captions = ["a small red circle", "a large blue", "triangle moving"]
    text = processor(text=captions, padding=True, return_tensors="pt")
    ids, mask = text["input_ids"], text["attention_mask"].bool()
    passes = []
    model.qformer.register_forward_hook(lambda module, inputs, output: passes.append(output.last_hidden_state))
    scaled = stock_pixels(processor, batch)
    expected = model(scaled, ids, mask.long(), use_image_text_matching_head=with_head).logits_per_image
    stage1 = retriever.stage1
    image = stage1.qformer.image_key_values(stage1.vision_norm(retriever.encoder(batch)[:, 0]))
    if with_head:
        hidden = stage1.qformer.forward_joint(image, ids, mask)
        torch.testing.assert_close(hidden, passes[0][:, :NUM_QUERIES], **OUTPUT)
        scores = stage1.match_logits(Keys(image, 1), BridgeText(ids, mask), BridgeInput(ids))
    else:
        hidden = stage1.qformer.forward_queries(image).hidden_BQD
        torch.testing.assert_close(hidden, passes[0], **OUTPUT)
        torch.testing.assert_close(stage1.qformer.forward_text(ids, mask), passes[1][mask], **OUTPUT)
        scores = similarity(stage1.embed_queries(hidden[:, None]), stage1.embed_text(ids, mask))
    torch.testing.assert_close(scores, expected, **OUTPUT)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (scores * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_same_gradients(stage1, model)


def assert_same_gradients(stage1, model):
    """Of every bridge tensor that the layout has; what a score does not read has none, or zeros.

    A key's bias shifts all scores of a row alike: its gradient is zero but for rounding, measured 1e-6.
    """
    theirs, compared = dict(model.named_parameters()), 0
    for name, parameter in stage1.named_parameters():
        other = layout_name(name, HF_RETRIEVAL)
        expected = None if other is None else theirs[other].grad
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected = torch.zeros_like(parameter) if expected is None else expected
        assert (ours - expected).abs().max() <= GRADIENT_SHARE * expected.abs().max() + 5e-6, name
        compared += bool(expected.abs().max() > 0)
    assert compared > 40


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=3, targets=("q_proj", "up_proj"))], ids=["plain", "lora"])
def test_a_checkpoint_of_ours_runs_in_stock(tmp_path, lora):
    """Trained here: an encoder cut at its second-to-last block, Llama without a placeholder token, LAVIS' eps; LoRA,
    for which the layout has no place, is merged into the language model."""
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    folder = write_stage2(tmp_path / "ours", lora)
    captioner = load_captioner(folder)
    # A fresh encoder's tokens are so small that the eps alone would decide; trained ones are of the order of 1.
    tuned = tmp_path / "vision"
    write_large_encoder(captioner.encoder, tuned)
    info = json.loads((folder / "bridge.json").read_text())
    info["vision"] |= {"name": str(tuned), "pretrained": True}
    (folder / "bridge.json").write_text(json.dumps(info))
    report = export_huggingface(folder, tmp_path / "exported")
    captioner, side = load_captioner(folder), captioner.preprocessing.resize_short_side
    pictures = pixels(6, side)
    batch = torch.stack(
        [torch.from_numpy(resize_and_crop(image, captioner.preprocessing))[None] for image in as_images(pictures)]
    )
    assert batch.shape[-1] < side  # a centre crop
    model, loading = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.vision_config.num_hidden_layers == len(captioner.encoder.model.blocks) - 1
    processor = AutoProcessor.from_pretrained(tmp_path / "exported")
    ids = model.generate(stock_pixels(processor, pictures), max_new_tokens=12, do_sample=False)
    start = info["qformer"]["num_queries"] + 1
    with recorded_ids(captioner.language) as calls:
        captions = captioner.answer(batch, settings=GenerationSettings(max_new_tokens=12))
    assert calls == [without_padding(ids[:, start:], processor.tokenizer.pad_token_id)] and len(set(captions)) > 1
    effect = eps_effect(report.notes)
    assert 0 < effect < 1e-4, effect
    again = imported(tmp_path / "exported", tmp_path / "again", ImportOptions())
    if lora is None:
        assert_same_files(folder / "bridge.safetensors", tmp_path / "again" / "bridge.safetensors")
    else:
        assert "merged into the language model: LoRA, 8 tensors" in report.notes
        without = GenerationSettings(max_new_tokens=12)
        captioner.stage2.lora.detach()
        assert captioner.answer(batch, settings=without) != captions
    assert again.info.lora is None
    assert again.info.prompt == info["prompt"] and again.info.qformer.vision_norm_eps == 1e-5
    assert load_captioner(tmp_path / "again").answer(batch, settings=GenerationSettings(max_new_tokens=12)) == captions


def test_a_retriever_of_ours_runs_in_stock(tmp_path):
    """[DEC], which our tokenizers do not hold, gets the id that it has in the embeddings; the side file the rest."""
    from transformers import AutoProcessor, Blip2ForImageTextRetrieval

    folder = write_stage1(tmp_path / "ours")
    retriever = load_retriever(folder)
    write_large_encoder(retriever.encoder, tmp_path / "vision")
    info = json.loads((folder / "bridge.json").read_text())
    (folder / "bridge.json").write_text(json.dumps({**info, "vision": {"name": str(tmp_path / "vision")}}))
    export_huggingface(folder, tmp_path / "exported")
    processor = AutoProcessor.from_pretrained(tmp_path / "exported")
    assert processor.tokenizer.convert_tokens_to_ids("[DEC]") == info["qformer"]["vocab_size"] - 1
    retriever, captions = load_retriever(folder), ["a small red circle", "triangle"]
    batch = pixels(2, retriever.preprocessing.height)
    scaled = (batch[:, 0].float() / 255 - retriever.encoder.mean_1C11) / retriever.encoder.std_1C11
    text = processor(text=captions, padding=True, return_tensors="pt")
    model = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        logits = model(scaled, **text, use_image_text_matching_head=True).logits_per_image
    _, tokens = retriever.embed_image(batch)
    # The folder's eps is 1e-6 and ours 1e-5, yet tokens of this size hide it: measured 1e-7.
    torch.testing.assert_close(retriever.match(tokens, captions), logits.softmax(dim=-1)[:, 1], **OUTPUT)
    again = imported(tmp_path / "exported", tmp_path / "again", ImportOptions())
    assert_same_files(folder / "bridge.safetensors", tmp_path / "again" / "bridge.safetensors")
    assert again.tokenizer.vocab_size == info["qformer"]["vocab_size"]
