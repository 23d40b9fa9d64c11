"""What a Q-Former starts from: a BERT, stage 1, another stage 2; every tensor accounted for."""

import dataclasses

import pytest
import torch

from qformer.adapters.lora import Lora
from qformer.config import LanguageSpec, LoraConfig, QFormerConfig
from qformer.conversion.bert import start_from_bert
from qformer.conversion.checkpoint import save_bridge
from qformer.conversion.initialisation import start_stage1, start_stage2
from qformer.errors import UserError
from qformer.model import QFormer
from qformer.objectives.stage1 import Stage1
from qformer.objectives.stage2 import Stage2
from qformer.torch_build.torchvision import import_torchvision
from tests.qformer.test_language import tiny_language
from tests.tiny_checkpoints import info_of

WORDS = 41
CONFIG = QFormerConfig(
    encoder_width=24,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    intermediate_size=48,
    num_queries=5,
    vocab_size=WORDS + 1,
    max_positions=20,
    embed_dim=16,
    dropout=0.0,
)
QUERIES_ONLY = dataclasses.replace(CONFIG, vocab_size=0)
READING = dataclasses.replace(CONFIG, has_lm_head=False)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT with its masked-LM head, all tensors distinct, and its folder."""
    import_torchvision()
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=20,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(4)
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.bert.embeddings.token_type_embeddings.weight.zero_()  # which the Q-Former has not
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return model, str(folder)


def qformer(config=CONFIG):
    torch.manual_seed(5)
    return QFormer(config).eval()


def test_the_text_branch_computes_what_the_bert_does(bert):
    model, folder = bert
    ours = qformer()
    start_from_bert(ours, folder)
    mask = torch.arange(8)[None] < torch.tensor([8, 5])[:, None]
    ids = torch.randint(1, WORDS, (2, 8)).masked_fill(~mask, 0)
    expected = model.bert(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours.forward_text(ids, mask), expected[mask], atol=2e-5, rtol=1e-4)


def test_query_feed_forwards_are_copies_and_dec_is_one_more_row(bert):
    model, folder = bert
    ours = qformer()
    report = start_from_bert(ours, folder)
    own = ours.state_dict()
    for layer in range(3):
        for name in ("up.weight", "down.bias", "norm.weight"):
            text, query = (own[f"layers.{layer}.{side}_ffn.{name}"] for side in ("text", "query"))
            assert torch.equal(text, query) and text.data_ptr() != query.data_ptr()
        expected = model.bert.encoder.layer[layer].intermediate.dense.weight
        assert torch.equal(own[f"layers.{layer}.query_ffn.up.weight"], expected)
    assert torch.equal(own["word_embeddings.weight"][:WORDS], model.bert.embeddings.word_embeddings.weight)
    assert own["word_embeddings.weight"][WORDS].abs().max() > 0 and own["lm_bias"][WORDS] == 0
    assert {name.split(".")[0] for name in report.reinitialised} == {"query_tokens", "layers"}
    assert all("cross_attention" in name or name == "query_tokens" for name in report.reinitialised)
    assert report.left_out == ["token_type_embeddings.weight"] and not report.missing and not report.unexpected
    assert set(report.loaded) | set(report.reinitialised) == own.keys()
    assert "re-initialised 21 tensors (layers.cross_attention" in str(report)


def test_a_bert_without_head_leaves_ours_fresh(bert, tmp_path):
    model, _ = bert
    model.bert.save_pretrained(tmp_path)
    report = start_from_bert(qformer(), str(tmp_path))
    assert {"lm_dense.weight", "lm_norm.bias", "lm_bias"} <= set(report.reinitialised)


def test_queries_alone_take_the_bert_without_its_text(bert):
    model, folder = bert
    ours = qformer(QUERIES_ONLY)
    report = start_from_bert(ours, folder)
    assert torch.equal(ours.layers[0].query_ffn.up.weight, model.bert.encoder.layer[0].intermediate.dense.weight)
    assert "word_embeddings.weight" in report.left_out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 60}, r"41 ids but model.tokenizer 59.*set model.tokenizer"),
        ({"num_heads": 8}, "num_heads=4 but the Q-Former num_heads=8"),
        ({"num_layers": 2}, r"tensors have no place here, first layers.2.*init_mismatch=reinitialise"),
        ({"intermediate_size": 64}, r"\(32, 48\) there but \(32, 64\) here"),
        ({"max_positions": 30}, r"position_embeddings.weight is \(20, 32\) there but \(30, 32\) here"),
    ],
)
def test_a_mismatch_is_refused_unless_asked_for(bert, change, message):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(UserError, match=message):
        start_from_bert(qformer(config), bert[1])
    if "num_heads" not in change:
        report = start_from_bert(qformer(config), bert[1], allow_mismatch=True)
        assert report.missing or len(report.unexpected) > 1


def test_what_is_no_bert_is_refused(tmp_path):
    tiny_language("gpt2").model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a gpt2; only a BERT"):
        start_from_bert(qformer(), str(tmp_path))
    with pytest.raises(UserError, match="model.qformer_init: cannot load '/nowhere'"):
        start_from_bert(qformer(), "/nowhere")


def save(folder, stage, model, language=None):
    folder.mkdir()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_bridge(folder, info_of(stage, model.qformer.config, language), model.state_dict(), None)
    return folder


def stage2_model(config, lora=None, width=32):
    torch.manual_seed(6)
    return Stage2(config, language_width=width, lora=lora)


def groups(names):
    return {name.split(".")[0] for name in names}


def test_stage_1_goes_on_from_stage_1_whole(tmp_path):
    trained, model = Stage1(CONFIG), Stage1(CONFIG)
    folder = save(tmp_path / "one", 1, trained)
    report = start_stage1(model, folder)
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in trained.state_dict().items())
    assert set(report.loaded) == own.keys() and "temperature" in own
    assert not report.reinitialised and not report.missing and not report.left_out and not report.unexpected


def test_stage_1_starts_from_no_stage_2(tmp_path):
    folder = save(tmp_path / "two", 2, stage2_model(READING), "a")
    for allow in (False, True):
        with pytest.raises(UserError, match="is a stage-2 checkpoint.*give stage 1 a stage-1 run, or set stage=2"):
            start_stage1(Stage1(CONFIG), folder, allow_mismatch=allow)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_queries": 6}, r"\(1, 5, 32\) there but \(1, 6, 32\) here.*init_mismatch=reinitialise"),
        ({"embed_dim": 8}, r"text_projection.bias is \(16,\) there but \(8,\) here"),
        ({"num_layers": 4}, "missing there"),
    ],
)
def test_another_shape_of_stage_1_is_refused_unless_asked_for(tmp_path, change, message):
    folder = save(tmp_path / "one", 1, Stage1(CONFIG))
    model = Stage1(dataclasses.replace(CONFIG, **change))
    with pytest.raises(UserError, match=message):
        start_stage1(model, folder)
    report = start_stage1(model, folder, allow_mismatch=True)
    assert report.missing and "qformer.layers.0.attention.query.weight" in report.loaded


def test_stage_2_takes_the_query_side_of_stage_1(tmp_path):
    folder = save(tmp_path / "one", 1, Stage1(CONFIG))
    plain, reading = stage2_model(QUERIES_ONLY), stage2_model(READING)
    report = start_stage2(plain, folder, language=LanguageSpec("a"))
    assert groups(report.reinitialised) == {"language_projection"} and not report.missing
    assert "qformer.word_embeddings.weight" in report.left_out
    report = start_stage2(reading, folder, language=LanguageSpec("a"))
    assert "qformer.word_embeddings.weight" in report.loaded
    assert "qformer.layers.1.text_ffn.up.weight" in report.loaded
    assert groups(report.left_out) == {
        "itm_head",
        "qformer",
        "temperature",
        "text_projection",
        "vision_projection",
    }


def test_instruction_tuning_starts_from_stage_2_with_the_berts_text_branch(bert, tmp_path):
    folder = save(tmp_path / "two", 2, stage2_model(QUERIES_ONLY), "a")
    trained = stage2_model(QUERIES_ONLY)
    start_stage2(trained, folder, language=LanguageSpec("a"))
    model = stage2_model(READING)
    start_from_bert(model.qformer, bert[1])
    report = start_stage2(model, folder, language=LanguageSpec("a"))
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in trained.state_dict().items())
    assert torch.equal(own["qformer.word_embeddings.weight"][:WORDS], bert[0].bert.embeddings.word_embeddings.weight)
    assert all("text_ffn" in name or "embeddings" in name for name in report.reinitialised)


def test_the_projection_stays_with_its_language_model(tmp_path):
    folder = save(tmp_path / "two", 2, stage2_model(QUERIES_ONLY), "a")
    same, other = stage2_model(QUERIES_ONLY), stage2_model(QUERIES_ONLY, width=40)
    assert "language_projection.weight" in start_stage2(same, folder, language=LanguageSpec("a")).loaded
    report = start_stage2(other, folder, language=LanguageSpec("b"))
    assert groups(report.reinitialised) == {"language_projection"} and not report.unexpected


def test_lora_of_a_checkpoint_is_not_dropped_in_silence(tmp_path):
    lora = Lora(tiny_language("llama").model, LoraConfig(rank=2))
    folder = save(tmp_path / "two", 2, stage2_model(QUERIES_ONLY, lora), "a")
    with pytest.raises(UserError, match="tensors have no place here, first lora.down"):
        start_stage2(stage2_model(QUERIES_ONLY), folder, language=LanguageSpec("a"))
    again = Lora(tiny_language("llama").model, LoraConfig(rank=2))
    model = stage2_model(QUERIES_ONLY, again)
    assert not start_stage2(model, folder, language=LanguageSpec("a")).reinitialised
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), lora.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_queries": 6}, r"\(1, 5, 32\) there but \(1, 6, 32\) here"), ({"num_layers": 4}, "missing there")],
)
def test_another_shape_of_checkpoint_is_refused(tmp_path, change, message):
    folder = save(tmp_path / "one", 1, Stage1(CONFIG))
    with pytest.raises(UserError, match=message):
        start_stage2(stage2_model(dataclasses.replace(QUERIES_ONLY, **change)), folder, language=LanguageSpec("a"))
