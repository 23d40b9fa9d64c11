"""BLIP-2 and InstructBLIP against Hugging Face's own, with tiny random weights made here: fp32, no downloads."""

import re

import pytest
import torch

from qformer.bridges.protocol import BridgeText
from qformer.config import GenerationSettings, QFormerConfig
from qformer.language import LanguageBatch, build_language_model
from qformer.objectives.stage2 import Stage2
from qformer.torch_build.torchvision import import_torchvision
from tests.qformer.folders import recorded_ids, without_padding
from tests.qformer.test_language import SPECIAL, VOCABULARY, word_tokenizer

# Both run fp32 in another order of operations; the goldens' tolerances.
OUTPUT = {"atol": 2e-5, "rtol": 1e-4}
GRADIENT_SHARE = 1e-3
NUM_QUERIES, TEXT_VOCABULARY = 5, 23
IMAGE_TOKEN = VOCABULARY  # one id past the words, as the placeholder that the library asks for

NAMES = (
    (r"^query_tokens$", "qformer.query_tokens"),
    (r"^vision_model\.post_layernorm\.", "vision_norm."),
    (r"^qformer\.(layernorm|embeddings\.layernorm)\.", "qformer.embedding_norm."),
    (r"^qformer\.embeddings\.", "qformer."),
    (r"^qformer\.encoder\.layer\.", "qformer.layers."),
    (r"\.crossattention\.", ".cross_attention."),
    (r"attention\.attention\.", "attention."),
    (r"attention\.output\.dense\.", "attention.output."),
    (r"attention\.output\.LayerNorm\.", "attention.norm."),
    (r"\.intermediate_query\.dense\.", ".query_ffn.up."),
    (r"\.output_query\.dense\.", ".query_ffn.down."),
    (r"\.output_query\.LayerNorm\.", ".query_ffn.norm."),
    (r"\.intermediate\.dense\.", ".text_ffn.up."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.text_ffn.down."),
    (r"(layers\.\d+)\.output\.LayerNorm\.", r"\1.text_ffn.norm."),
)


def our_name(name):
    """None for what the bridge does not hold."""
    if name.startswith("language_model.") or (name.startswith("vision_model.") and "post_layernorm" not in name):
        return None
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def text_config(family, end=2):
    ids = {"vocab_size": VOCABULARY + 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": end}
    if family == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        return {"model_type": "t5", **ids, **sizes, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    return {
        "model_type": "opt",
        **ids,
        **sizes,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        "max_position_embeddings": 64,
    }


@pytest.fixture(params=[(kind, family) for kind in ("blip2", "instruct") for family in ("opt", "t5")], ids="-".join)
def pair(request):
    return make_pair(*request.param)


def make_pair(kind, family, end=2):
    """Their model, our bridge and language model over the same weights, and the image tokens before the layer norm.

    Weights follow from kind and family alone; `end` is what the model's config calls the end, the tokenizer's is 2.
    """
    import_torchvision()
    import transformers as hf

    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    shape = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 20,
        "encoder_hidden_size": 24, "vocab_size": TEXT_VOCABULARY,
    }  # fmt: skip
    values = {
        "vision_config": vision, "qformer_config": shape, "text_config": text_config(family, end),
        "num_query_tokens": NUM_QUERIES, "image_token_index": IMAGE_TOKEN,
    }  # fmt: skip
    torch.manual_seed(9)  # of those tried, one whose texts differ from each other
    if kind == "blip2":
        theirs = hf.Blip2ForConditionalGeneration(hf.Blip2Config(**values))
    else:
        theirs = hf.InstructBlipForConditionalGeneration(hf.InstructBlipConfig(**values))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.eval()
    config = QFormerConfig(
        encoder_width=24,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        intermediate_size=48,
        num_queries=NUM_QUERIES,
        vocab_size=TEXT_VOCABULARY if kind == "instruct" else 0,
        has_lm_head=False,
        max_positions=20,
        dropout=0.0,
    )
    stage2 = Stage2(config, language_width=32).eval()
    stage2.load_state_dict({our_name(k): v for k, v in theirs.state_dict().items() if our_name(k)})
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(SPECIAL, "$A <eos>" if family == "t5" else "<bos> $A"),
        pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
    )  # fmt: skip
    pixels = torch.randn(3, 3, 8, 8)
    vision_model = theirs.vision_model
    with torch.no_grad():
        image = vision_model.encoder(inputs_embeds=vision_model.embeddings(pixels)).last_hidden_state[:, None]
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(our_name(name) is not None)
    return theirs, stage2, build_language_model(theirs.language_model, tokenizer), pixels, image


PROMPTS = ["a red circle", "blue", "small triangle above"]
ANSWERS = ["left of green", "moving still large square", "a"]


def instruction(stage2):
    """A ragged instruction for the Q-Former, theirs and ours; none for BLIP-2."""
    if not stage2.qformer.config.has_text_branch:
        return {}, None
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(6)[None] < torch.tensor([6, 2, 4])[:, None]
    ids = torch.randint(1, TEXT_VOCABULARY, (3, 6), generator=generator).masked_fill(~mask, 0)
    return {"qformer_input_ids": ids, "qformer_attention_mask": mask.long()}, BridgeText(ids, mask)


def placeholders(ids, mask):
    """Their ids and mask: room for the soft prompts, then the text."""
    front = torch.full((len(ids), NUM_QUERIES), IMAGE_TOKEN)
    return torch.cat([front, ids], dim=1), torch.cat([torch.ones_like(front), mask.long()], dim=1)


def test_hidden_states_loss_and_gradients_equal_hugging_face(pair):
    theirs, stage2, language, pixels, image = pair
    batch = language.tokenize(PROMPTS, ANSWERS, max_tokens=16)
    for_theirs, for_ours = instruction(stage2)
    ids, mask = placeholders(batch.input_ids_BS, batch.is_input_BS)
    labels = batch.labels_BT
    if not language.is_encoder_decoder:
        labels = torch.cat([torch.full((3, NUM_QUERIES), -100), labels], dim=1)
    expected = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels, **for_theirs)
    expected.loss.backward()
    gradients = {our_name(n): p.grad for n, p in theirs.named_parameters() if our_name(n)}

    hidden = expected.qformer_outputs.last_hidden_state[:, :NUM_QUERIES]
    prefix = stage2(image, for_ours).prompts_BNL
    torch.testing.assert_close(prefix, theirs.language_projection(hidden), **OUTPUT)
    logits = language.logits(prefix, batch)
    counted = batch.labels_BT != -100
    shown = expected.logits if language.is_encoder_decoder else expected.logits[:, NUM_QUERIES - 1 : -1]
    torch.testing.assert_close(logits[counted], shown[counted], **OUTPUT)
    total, count = language.loss(prefix, batch)
    torch.testing.assert_close(total / count, expected.loss, **OUTPUT)
    (total / count).backward()
    own = dict(stage2.named_parameters())
    assert own.keys() == gradients.keys()
    for name, parameter in own.items():
        largest = gradients[name].abs().max()
        if not parameter.requires_grad:  # the last layer's text feed-forward, which no query reads
            assert largest == 0 and "text_ffn" in name
            continue
        assert (parameter.grad - gradients[name]).abs().max() <= GRADIENT_SHARE * largest + 1e-7, name
    assert sum(float(g.abs().max()) > 0 for g in gradients.values()) > 0.8 * len(gradients)


@pytest.mark.parametrize("beams", [1, 4])
def test_generated_tokens_equal_hugging_face(pair, beams):
    """Theirs item by item, so that no padding of theirs is in play; ours in one ragged batch."""
    ours = generated_by_both(pair, beams)
    assert len(set(ours)) > 1


def generated_by_both(pair, beams):
    """Our texts, whose ids are theirs."""
    theirs, stage2, language, pixels, image = pair
    for_theirs, for_ours = instruction(stage2)
    settings = GenerationSettings(max_new_tokens=10, num_beams=beams)
    with torch.no_grad(), recorded_ids(language) as calls:
        texts = language.generate(stage2(image, for_ours).prompts_BNL, PROMPTS, settings)
    expected = []
    for row, prompt in enumerate(PROMPTS):
        text = torch.tensor([language.tokenizer.encode(prompt)])
        ids, mask = placeholders(text, torch.ones_like(text))
        own = {name: value[row : row + 1] for name, value in for_theirs.items()}
        generated = theirs.generate(
            pixels[row : row + 1], input_ids=ids, attention_mask=mask, max_new_tokens=10, num_beams=beams, **own
        )
        start = 0 if language.is_encoder_decoder else ids.shape[1]
        expected += without_padding(generated[:, start:], language.tokenizer.pad_token_id)
    # In a batch, what ended before others is filled up; beam search fills with an end token.
    assert [up_to_end(row, language) for row in calls[0]] == [up_to_end(row, language) for row in expected]
    return texts


def up_to_end(ids, language):
    place = next((at for at, one in enumerate(ids) if one in language.end_ids), len(ids))
    return ids[: place + 1]


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("is_list", [False, True], ids=["one", "list"])
def test_generation_ends_where_the_model_s_own_config_says(beams, is_list):
    """As BLIP-2's OPT, whose config names the newline (50118) and whose tokenizer `</s>`."""
    plain = make_pair("blip2", "opt")
    texts = generated_by_both(plain, beams)
    words = [text.split() for text in texts]
    word = next(word for row in words for word in row[2:-1] if row.index(word) > 1)
    end = plain[2].tokenizer.convert_tokens_to_ids(word)
    pair = make_pair("blip2", "opt", [end, VOCABULARY] if is_list else end)
    language = pair[2]
    assert language.end_id == end and set(language.end_ids) == {end, 2} | ({VOCABULARY} if is_list else set())
    ended = generated_by_both(pair, beams)
    assert ended != texts and all(row.split().count(word) <= 1 for row in ended)
    assert any(row.split()[-1] == word for row in ended)
    # Training teaches an end that the model stops at.
    labels = language.tokenize(PROMPTS, ANSWERS, max_tokens=16).labels_BT
    assert [row[row != -100][-1] for row in labels] == [end] * 3


def test_the_batch_is_what_the_library_is_given(pair):
    """Guards the comparison: rows are ragged and labels count the answers alone."""
    _, _, language, _, _ = pair
    batch = language.tokenize(PROMPTS, ANSWERS, max_tokens=16)
    assert isinstance(batch, LanguageBatch)
    assert len({int(n) for n in batch.is_input_BS.sum(dim=1)}) > 1
    for row, answer in enumerate(ANSWERS):
        counted = batch.labels_BT[row][batch.labels_BT[row] != -100]
        assert language.tokenizer.decode(counted[:-1]) == answer
