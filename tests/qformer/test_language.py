"""Generation and LoRA with a tiny random model of every family: a batch gives what its items give one by one."""

import pytest
import torch

from qformer.adapters.lora import Lora, own_weights
from qformer.backbones import weights_fingerprint
from qformer.config import GenerationSettings, LoraConfig
from qformer.errors import UserError
from qformer.language import build_language_model
from qformer.torch_build.torchvision import import_torchvision
from tests.tiny_checkpoints import WORDS, word_tokenizer

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
VOCABULARY = len(SPECIAL) + len(WORDS)
PROMPTS = ["", "red", "a small blue circle left of green", "moving square", "above large triangle still small a"]
FAMILIES = ["opt", "gpt2", "llama", "qwen2", "t5"]
SEARCHES = {"greedy": GenerationSettings(max_new_tokens=12), "beam": GenerationSettings(max_new_tokens=12, num_beams=3)}


def tiny_language(family):
    """A random model of the family, its outputs far from uniform."""
    import_torchvision()
    import transformers as hf

    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {**ids, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    torch.manual_seed(3)
    match family:
        case "opt":
            model = hf.OPTForCausalLM(hf.OPTConfig(**shape, ffn_dim=64, word_embed_proj_dim=24))
        case "gpt2":
            model = hf.GPT2LMHeadModel(hf.GPT2Config(**ids, n_embd=32, n_layer=2, n_head=4, n_positions=64))
        case "llama":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**shape, intermediate_size=64, num_key_value_heads=2))
        case "qwen2":
            model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**shape, intermediate_size=64, num_key_value_heads=2))
        case "t5":
            sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
            config = hf.T5Config(**ids, **sizes, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
            model = hf.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(SPECIAL, "$A <eos>" if family == "t5" else "<bos> $A"),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    return build_language_model(model, tokenizer)


@pytest.fixture(scope="module", params=FAMILIES)
def language(request):
    return tiny_language(request.param)


def soft_prompts(language, size=5, seed=0):
    return torch.randn(size, 6, language.width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("search", SEARCHES)
def test_a_ragged_batch_generates_what_its_items_do(language, search):
    prefix = soft_prompts(language)
    together = language.generate(prefix, PROMPTS, SEARCHES[search])
    alone = [language.generate(prefix[i : i + 1], [PROMPTS[i]], SEARCHES[search])[0] for i in range(len(PROMPTS))]
    assert together == alone
    assert len(set(together)) >= len(PROMPTS) - 1  # not the same whatever the input


def test_long_prompts_are_cut_as_in_training(language):
    """Three words and the token before (or after) them; without a limit, GPT-2's and OPT's positions run out."""
    limited = build_language_model(language.model, language.tokenizer, 4)
    prefix, longest = soft_prompts(language, 2), " ".join(WORDS * 6)
    expected = language.generate(prefix, [" ".join(WORDS[:3]), "red"])
    assert limited.generate(prefix, [longest, "red"]) == expected
    assert language.generate(prefix, [" ".join(WORDS[:4]), "red"]) != expected
    trained, short = (language.tokenize([text], ["red"], max_tokens=4) for text in (longest, " ".join(WORDS[:3])))
    assert torch.equal(trained.input_ids_BS, short.input_ids_BS) and trained.num_truncated == 1


def test_nucleus_sampling_follows_its_seed_and_narrows_to_greedy(language):
    prefix = soft_prompts(language)
    state = torch.get_rng_state()

    def sample(**changes):
        return language.generate(prefix, PROMPTS, GenerationSettings(max_new_tokens=12, **changes))

    assert sample(top_p=0.95, seed=1) == sample(top_p=0.95, seed=1) != sample(top_p=0.95, seed=2)
    assert sample(top_p=1e-6, seed=1) == sample()
    assert torch.equal(torch.get_rng_state(), state)


def test_one_padded_batch_has_the_losses_of_its_items(language):
    prefix = soft_prompts(language)
    answers = ["red circle", "a", "small triangle above square", "still", "left of right"]
    total, count = language.loss(prefix, language.tokenize(PROMPTS, answers, max_tokens=32))
    parts = [
        language.loss(prefix[i : i + 1], language.tokenize([PROMPTS[i]], [answers[i]], max_tokens=32))
        for i in range(len(PROMPTS))
    ]
    torch.testing.assert_close(total, sum(part for part, _ in parts), atol=1e-4, rtol=1e-5)
    assert count == sum(n for _, n in parts)


def test_a_row_without_labels_counts_nothing(language):
    prefix = soft_prompts(language, 2)
    batch = language.tokenize(["red", "blue"], ["circle", "square"], max_tokens=8)
    first = language.tokenize(["red"], ["circle"], max_tokens=8)
    total, count = language.loss(prefix, batch.without_labels(torch.tensor([False, True])))
    alone, alone_count = language.loss(prefix[:1], first)
    torch.testing.assert_close(total, alone)
    assert count == alone_count


def test_lora_starts_as_no_change_and_trains_nothing_but_itself(language):
    prefix, names = soft_prompts(language), [name for name, _ in language.named_parameters()]
    batch = language.tokenize(PROMPTS, ["red circle"] * len(PROMPTS), max_tokens=16)
    plain, fingerprint = language.logits(prefix, batch), weights_fingerprint(language)
    lora = Lora(language.model, LoraConfig(rank=2, dropout=0.0))
    try:
        assert torch.equal(language.logits(prefix, batch), plain)
        optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2)
        losses = []
        for _ in range(3):
            total, count = language.loss(prefix, batch)
            losses.append((total / count).item())
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
        assert all(p.abs().max() > 0 for p in lora.up.values())
        assert not torch.equal(language.logits(prefix, batch), plain)
        assert {id(p) for p in language.parameters() if p.requires_grad} == {id(p) for p in lora.parameters()}
        assert weights_fingerprint(language) == fingerprint  # by the model's own names, updates attached
    finally:
        lora.detach()
    assert all(p.grad is None and not p.requires_grad for p in language.parameters())
    assert weights_fingerprint(language) == fingerprint
    assert [name for name, _ in language.named_parameters()] == names
    assert torch.equal(language.logits(prefix, batch), plain)


def test_the_update_is_the_product_of_its_two_matrices():
    """With the update added to the weight itself, the model answers the same."""
    language = tiny_language("gpt2")
    prefix, batch = soft_prompts(language, 1), language.tokenize(["red"], ["circle"], max_tokens=8)
    lora = Lora(language.model, LoraConfig(rank=3, alpha=6.0, dropout=0.0))
    with torch.no_grad():
        for up in lora.up.values():
            up.normal_(std=0.1)
    beside = language.logits(prefix, batch)
    weights = own_weights(language.model)
    products = {name.replace("/", "."): 2.0 * (up @ lora.down[name]).T for name, up in lora.up.items()}
    expected = {k: v + products.pop(k.removesuffix(".weight"), 0.0) for k, v in weights.items()}
    assert not products
    merged = lora.merge()
    assert merged.keys() == weights.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    torch.testing.assert_close(language.logits(prefix, batch), beside, atol=1e-4, rtol=1e-4)


def test_dropout_of_the_updates_follows_the_bridge_not_the_language_model():
    language = tiny_language("llama")
    prefix, batch = soft_prompts(language, 1), language.tokenize(["red"], ["circle"], max_tokens=8)
    lora = Lora(language.model, LoraConfig(rank=2, dropout=0.5))
    with torch.no_grad():
        for up in lora.up.values():
            up.normal_()
    assert not torch.equal(language.logits(prefix, batch), language.logits(prefix, batch))
    lora.eval()
    assert torch.equal(language.logits(prefix, batch), language.logits(prefix, batch))


def test_updates_of_a_bf16_model_are_trained_in_fp32():
    language = tiny_language("opt")
    language.model.bfloat16()
    lora = Lora(language.model, LoraConfig(rank=2))
    assert {p.dtype for p in lora.parameters()} == {torch.float32}
    prefix, batch = soft_prompts(language, 1), language.tokenize(["red"], ["circle"], max_tokens=8)
    logits = language.logits(prefix, batch)
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in lora.up.values())


def test_a_wrong_lora_target_lists_the_layers():
    with pytest.raises(UserError, match=r"nothing_proj.*'q_proj'"):
        Lora(tiny_language("llama").model, LoraConfig(targets=("nothing_proj",)))


@pytest.mark.parametrize("targets", [("embed_tokens",), ("q_proj", "embed_tokens"), ("mlp",), ("input_layernorm",)])
def test_lora_on_what_is_not_linear_is_refused(targets):
    """peft itself would wrap an embedding, whose matrices are elsewhere."""
    language = tiny_language("llama")
    with pytest.raises(UserError, match=rf"name \['{targets[-1]}'\], no linear layers.*'down_proj'.*'q_proj'"):
        Lora(language.model, LoraConfig(targets=targets))
    assert not any("lora" in name for name, _ in language.named_parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": 0.9, "num_beams": 2}, "set one of them"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": 0.7}, "temperature=0.7 changes sampling alone; set top_p"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 ranks beams; set num_beams"),
    ],
)
def test_wrong_generation_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**values)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(
    ("own", "end_id", "end_ids"),
    [
        (None, 2, [2]),  # the model names no end
        ([7, 2], 2, [2, 7]),  # the tokenizer's is one of several: training keeps it
        ([7, 9], 7, [2, 7, 9]),  # it is none of them
        (7, 7, [2, 7]),
        (50256, 2, [2]),  # a config's default, outside the embeddings
    ],
)
def test_generation_ends_at_the_tokenizer_s_and_the_model_s_own_end(family, own, end_id, end_ids):
    language = tiny_language(family)
    language.model.generation_config.eos_token_id = language.model.config.eos_token_id = own
    language = build_language_model(language.model, language.tokenizer)
    assert (language.end_id, language.end_ids) == (end_id, end_ids)
    batch = language.tokenize(["red"], ["circle"], max_tokens=8)
    assert batch.labels_BT[0, -1] == end_id
    if language.is_encoder_decoder:
        assert batch.input_ids_BS[0, -1] == 2  # the encoder's texts end as its tokenizer ends them


def test_a_generation_config_overrules_the_config():
    language = tiny_language("llama")
    language.model.generation_config.eos_token_id, language.model.config.eos_token_id = 7, 9
    assert build_language_model(language.model, language.tokenizer).end_ids == [2, 7]


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused():
    language = tiny_language("llama")
    language.tokenizer.add_tokens(["purple"])
    with pytest.raises(UserError, match=rf"{VOCABULARY + 1} ids but the model embeds {VOCABULARY}"):
        build_language_model(language.model, language.tokenizer)
