"""Our stage 1 and stage 2 against tensors recorded from LAVIS, fp32, dropout 0."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qformer.backbones import import_torchvision
from qformer.config import QFormerConfig
from qformer.language import LanguageBatch, build_language_model
from qformer.objectives import Negatives
from qformer.stage1 import Stage1, Stage1Batch
from qformer.stage2 import Stage2
from tests.distributed import run_processes
from tests.qformer.lavis import our_name, our_weights

# Recorded fp32 losses differ from fp64 by up to 2e-6, gradients by 2e-5 of a tensor's maximum (goldens' README).
OUTPUT = {"atol": 2e-5, "rtol": 1e-4}
GRADIENT_SHARE = 1e-3


def stage1_from(goldens_dir):
    facts = json.loads((goldens_dir / "stage1_single.json").read_text())["config"]
    bert = facts["bert"]
    config = QFormerConfig(
        encoder_width=facts["encoder_width"],
        hidden_size=bert["hidden_size"],
        num_layers=bert["num_hidden_layers"],
        num_heads=bert["num_attention_heads"],
        intermediate_size=bert["intermediate_size"],
        num_queries=facts["num_query_tokens"],
        cross_attention_frequency=facts["cross_attention_freq"],
        vocab_size=facts["vocab_size_after_adding_DEC"],
        max_positions=bert["max_position_embeddings"],
        embed_dim=facts["embed_dim"],
        dropout=0.0,
    )
    model = Stage1(config, lavis_reduction=True)
    model.load_state_dict(our_weights(goldens_dir / "stage1_weights.safetensors"))
    return model


def stage1_batch(tensors, prefix="", image_ids=None):
    ids = tensors[f"{prefix}in.input_ids"]
    return Stage1Batch(
        image_BFPV=tensors[f"{prefix}in.image_embeds_raw"][:, None],
        input_ids_BT=ids,
        is_text_BT=tensors[f"{prefix}in.attention_mask"].bool(),
        image_ids_B=torch.arange(len(ids)) if image_ids is None else image_ids,
        is_valid_B=torch.ones(len(ids), dtype=torch.bool),
    )


def negatives_of(tensors, prefix=""):
    image = tensors[f"{prefix}in.neg_image_idx"]
    return Negatives(image, tensors[f"{prefix}in.neg_text_idx"], torch.ones(len(image), dtype=torch.bool))


def assert_losses(losses, tensors, prefix=""):
    for ours, theirs in (("total", "loss"), ("itc", "loss_itc"), ("itm", "loss_itm"), ("itg", "loss_lm")):
        torch.testing.assert_close(getattr(losses, ours), tensors[f"{prefix}out.{theirs}"], **OUTPUT)


def assert_gradients(module, tensors, prefix="grad."):
    own = dict(module.named_parameters())
    names = [name for name in tensors if name.startswith(prefix)]
    compared = 0
    for name in names:
        ours = own.get(our_name(name.removeprefix(prefix)))
        if ours is None:
            continue
        expected = tensors[name]
        worst = (ours.grad - expected).abs().max()
        assert worst <= GRADIENT_SHARE * expected.abs().max(), f"{name}: {worst}"
        compared += 1
    assert compared >= len(names) - 1 and compared > 0


def test_stage1_losses_and_gradients_equal_lavis(goldens_dir):
    tensors = load_file(goldens_dir / "stage1_single.safetensors")
    model = stage1_from(goldens_dir).train()
    losses = model(stage1_batch(tensors), negatives=negatives_of(tensors))
    assert_losses(losses, tensors)
    losses.total.backward()
    assert_gradients(model, tensors)


def test_image_id_variant_equals_lavis(goldens_dir):
    tensors = load_file(goldens_dir / "stage1_single.safetensors")
    model = stage1_from(goldens_dir).train()
    batch = stage1_batch(tensors, image_ids=tensors["image_id.in.image_id"].flatten())
    losses = model(batch, negatives=negatives_of(tensors, "image_id."))
    assert_losses(losses, tensors, "image_id.")


def test_hidden_states_equal_lavis(goldens_dir):
    tensors = load_file(goldens_dir / "stage1_single.safetensors")
    model = stage1_from(goldens_dir).eval()
    batch = stage1_batch(tensors)
    image = model.qformer.image_key_values(model.vision_norm(batch.image_BFPV[:, 0]))
    queries = model.qformer.forward_queries(image)
    torch.testing.assert_close(queries.hidden_BQD, tensors["out.query_last_hidden"], **OUTPUT)
    text = model.qformer.forward_text(batch.input_ids_BT, batch.is_text_BT)
    torch.testing.assert_close(text, tensors["out.text_last_hidden"][batch.is_text_BT], **OUTPUT)
    decoder_ids = batch.input_ids_BT.clone()
    decoder_ids[:, 0] = model.dec_id
    logits = model.qformer.decode_text(decoder_ids, batch.is_text_BT, queries.cache)
    torch.testing.assert_close(logits, tensors["out.itg_logits"][batch.is_text_BT], **OUTPUT)


def two_process_worker(rank, world, goldens_dir):
    tensors = load_file(goldens_dir / "stage1_dist2.safetensors")
    model = stage1_from(goldens_dir).train()
    prefix = f"rank{rank}."
    batch = stage1_batch(tensors, prefix)
    size = len(batch.input_ids_BT)
    ids = torch.arange(rank * size, (rank + 1) * size)
    batch = stage1_batch(tensors, prefix, image_ids=ids)
    losses = model(batch, negatives=negatives_of(tensors, prefix))
    assert_losses(losses, tensors, prefix)
    losses.total.backward()
    assert_gradients(model, tensors, f"{prefix}grad.")


def test_two_processes_equal_lavis(goldens_dir):
    run_processes(two_process_worker, 2, goldens_dir)


class NumberTokenizer:
    """The recorded texts are ids already: only the special ones are asked for."""

    name_or_path = "recorded"

    def __init__(self, facts):
        self.eos_token_id, self.pad_token_id, self.size = (
            facts["eos_token_id"],
            facts["pad_token_id"],
            facts["vocab_size"],
        )

    def __len__(self):
        return self.size


def stage2_from(goldens_dir, name, language_class, language_config, width):
    """The recorded bridge and language model, and the facts about them."""
    facts = json.loads((goldens_dir / f"{name}.json").read_text())["config"]
    file = goldens_dir / f"{name}_weights.safetensors"
    bert = facts["bert"]
    config = QFormerConfig(
        encoder_width=facts["encoder_width"],
        hidden_size=bert["hidden_size"],
        num_layers=bert["num_hidden_layers"],
        num_heads=bert["num_attention_heads"],
        intermediate_size=bert["intermediate_size"],
        num_queries=facts["num_query_tokens"],
        cross_attention_frequency=facts["cross_attention_freq"],
        dropout=0.0,
    )
    model = language_class(language_config(**facts["llm"]))
    if model.config.is_encoder_decoder:
        # Recorded with an output layer of its own, which the library ties to the embeddings whatever the config says.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    prefix = f"{name.removeprefix('stage2_')}_model."
    weights = {k.removeprefix(prefix): v for k, v in load_file(file).items() if k.startswith(prefix)}
    model.load_state_dict(weights)
    stage2 = Stage2(config, language_width=facts["llm"][width])
    stage2.load_state_dict(our_weights(file))
    return stage2, build_language_model(model, NumberTokenizer(facts["llm"]))


def assert_generation(stage2, language, image, batch, tensors, case=""):
    """Soft prompts, logits, loss and gradients; the recorded logits may begin with those over the soft prompts."""
    prefix = stage2(image[:, None])
    num_queries = prefix.shape[1]
    recorded = tensors[f"{case}out.inputs_embeds"][:, :num_queries]
    torch.testing.assert_close(prefix, recorded, **OUTPUT)
    logits = language.logits(prefix, batch)
    expected = tensors[f"{case}out.logits"]
    expected = expected if language.is_encoder_decoder else expected[:, num_queries - 1 : -1]
    torch.testing.assert_close(logits, expected, **OUTPUT)
    total, count = language.loss(prefix, batch)
    torch.testing.assert_close(total / count, tensors[f"{case}out.loss"], **OUTPUT)
    (total / count).backward()
    assert_gradients(stage2, tensors, f"{case}grad.")


@pytest.mark.parametrize("case", ["prompt", "noprompt"])
def test_stage2_opt_equals_lavis(goldens_dir, case):
    import_torchvision()
    from transformers import OPTConfig, OPTForCausalLM

    stage2, language = stage2_from(goldens_dir, "stage2_opt", OPTForCausalLM, OPTConfig, "hidden_size")
    tensors = load_file(goldens_dir / "stage2_opt.safetensors")
    labels = tensors[f"{case}.out.labels"][:, stage2.qformer.config.num_queries :]
    batch = LanguageBatch(tensors[f"{case}.in.input_ids"], tensors[f"{case}.in.attention_mask"].bool(), labels)
    assert_generation(stage2, language, tensors["in.image_embeds_raw"], batch, tensors, f"{case}.")


def test_stage2_t5_equals_lavis(goldens_dir):
    import_torchvision()
    from transformers import T5Config, T5ForConditionalGeneration

    stage2, language = stage2_from(goldens_dir, "stage2_t5", T5ForConditionalGeneration, T5Config, "d_model")
    tensors = load_file(goldens_dir / "stage2_t5.safetensors")
    batch = LanguageBatch(tensors["in.input_ids"], tensors["in.attention_mask"].bool(), tensors["out.labels"])
    assert_generation(stage2, language, tensors["in.image_embeds_raw"], batch, tensors)
