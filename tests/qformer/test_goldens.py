"""Our stage 1 and stage 2 against tensors recorded from LAVIS, fp32, dropout 0."""

import contextlib
import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from qformer.bridges.protocol import BridgeInput, BridgeText, Keys
from qformer.config import QFormerConfig
from qformer.language import LanguageBatch, build_language_model
from qformer.masks import joint_mask
from qformer.objectives import Negatives, PairNoise, itg_loss, negatives, sample_negatives
from qformer.objectives import stage1 as stage1_module
from qformer.objectives.stage1 import Stage1, Stage1Batch
from qformer.objectives.stage2 import Stage2
from qformer.torch_build.torchvision import import_torchvision
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
        layer_norm_eps=facts["layer_norm_eps"],
        vision_norm_eps=facts["ln_vision_eps"],
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
    torch.testing.assert_close(losses.total, tensors[f"{prefix}out.loss"], **OUTPUT)
    for ours, theirs in (("itc", "loss_itc"), ("itm", "loss_itm"), ("itg", "loss_lm")):
        torch.testing.assert_close(losses.terms[ours], tensors[f"{prefix}out.{theirs}"], **OUTPUT)


def assert_gradients(module, tensors, prefix="grad."):
    """Every recorded gradient is compared: one without a counterpart of ours is an error."""
    own = dict(module.named_parameters())
    names = [name for name in tensors if name.startswith(prefix)]
    assert names
    for name in names:
        ours, expected = own[our_name(name.removeprefix(prefix))].grad, tensors[name]
        worst = (ours - expected).abs().max()
        assert worst <= GRADIENT_SHARE * expected.abs().max(), f"{name}: {worst}"


@contextlib.contextmanager
def seen_inside(model):
    """What a whole forward computes on its way, under the recorded names and in the recorded order."""
    seen, scores, hidden = {}, [], []
    itc_loss, itm_loss = stage1_module.itc_loss, stage1_module.itm_loss

    def as_lavis(groups):
        """Ours: positives, negative texts, negative images. Theirs: positives, negative images, negative texts."""
        return torch.cat([groups[0], groups[2], groups[1]])

    def itc(scores_BN, is_positive_BN, *masks):
        scores.append((scores_BN, is_positive_BN))
        return itc_loss(scores_BN, is_positive_BN, *masks)

    def itm(logits_R2, is_match_R, is_valid_R):
        seen["out.itm_logits"] = as_lavis(logits_R2.unflatten(0, (3, -1)))
        seen["out.itm_labels"] = as_lavis(is_match_R.unflatten(0, (3, -1))).long()
        return itm_loss(logits_R2, is_match_R, is_valid_R)

    handle = model.itm_head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    with mock.patch.multiple(stage1_module, itc_loss=itc, itm_loss=itm):
        yield seen
    handle.remove()
    (seen["out.sim_i2t"], is_positive), (seen["out.sim_t2i"], _) = scores
    seen["out.itc_targets"] = is_positive.long().argmax(dim=1)
    # The own and the negative text of every image in turn, then the negative images.
    size = len(hidden[0]) // 3
    both = hidden[0][: 2 * size].unflatten(0, (size, 2))
    seen["out.itm_last_hidden"] = as_lavis([both[:, 0], both[:, 1], hidden[0][2 * size :]])


def passes_of(model, batch):
    """The passes apart, under the recorded names; of text the real tokens alone, since no others are computed."""
    image = model.qformer.image_key_values(model.vision_norm(batch.image_BFPV[:, 0]))
    queries = model.qformer.forward_queries(image)
    decoder_ids = batch.input_ids_BT.clone()
    decoder_ids[:, 0] = model.dec_id
    return {
        "out.query_last_hidden": queries.hidden_BQD,
        "out.text_last_hidden": model.qformer.forward_text(batch.input_ids_BT, batch.is_text_BT),
        "out.itg_logits": model.qformer.decode_text(decoder_ids, batch.is_text_BT, queries.cache),
    }


def weights_of_negatives(scores_i2t, scores_t2i, targets):
    """What the negatives are drawn by."""
    drawn_by = []
    positives = torch.arange(scores_i2t.shape[1])[None] == targets[:, None]

    def argmax(scores, noise):
        drawn_by.append(scores.softmax(dim=1))
        return torch.zeros(len(scores), dtype=torch.long)

    places, is_valid = torch.arange(scores_i2t.shape[1]), torch.ones(scores_i2t.shape[1], dtype=torch.bool)
    with mock.patch.object(negatives, "noisy_argmax", argmax):
        noise = PairNoise(0, places[: len(scores_i2t)], places)
        sample_negatives(scores_i2t, scores_t2i, positives, is_valid, noise)
    return dict(zip(("out.weights_t2i", "out.weights_i2t"), drawn_by, strict=True))


def assert_outputs(ours, tensors, is_text, prefix=""):
    """All that is recorded under "out." is compared, losses apart."""
    losses = {f"{prefix}out.{name}" for name in ("loss", "loss_itc", "loss_itm", "loss_lm")}
    recorded = {name for name in tensors if name.startswith(f"{prefix}out.")} - losses
    assert recorded <= {prefix + name for name in ours}
    for name in recorded:
        expected, found = tensors[name], ours[name.removeprefix(prefix)]
        if "text_last" in name or "itg_logits" in name:
            expected = expected[is_text]
        elif "itm_last" in name:
            expected = expected[:, : found.shape[1]]  # of queries and text, which the last layer does not compute
        torch.testing.assert_close(found, expected, **OUTPUT, msg=lambda text, name=name: f"{name}: {text}")


def assert_stage1(model, batch, tensors, prefix=""):
    """Losses, all that leads to them, and gradients."""
    with seen_inside(model) as seen:
        losses = model(batch, negatives=negatives_of(tensors, prefix))
    assert_losses(losses, tensors, prefix)
    scores = seen["out.sim_i2t"], seen["out.sim_t2i"]
    seen |= passes_of(model, batch) | weights_of_negatives(*scores, seen["out.itc_targets"])
    assert_outputs(seen, tensors, batch.is_text_BT, prefix)
    losses.total.backward()
    assert_gradients(model, tensors, f"{prefix}grad.")


def test_stage1_equals_lavis(goldens_dir):
    tensors = load_file(goldens_dir / "stage1_single.safetensors")
    assert_stage1(stage1_from(goldens_dir).train(), stage1_batch(tensors), tensors)


def test_image_id_variant_equals_lavis(goldens_dir):
    tensors = load_file(goldens_dir / "stage1_single.safetensors")
    model = stage1_from(goldens_dir).train()
    batch = stage1_batch(tensors, image_ids=tensors["image_id.in.image_id"].flatten())
    losses = model(batch, negatives=negatives_of(tensors, "image_id."))
    assert_losses(losses, tensors, "image_id.")


def two_process_worker(rank, world, goldens_dir):
    tensors = load_file(goldens_dir / "stage1_dist2.safetensors")
    model = stage1_from(goldens_dir).train()
    prefix = f"rank{rank}."
    size = len(tensors[f"{prefix}in.input_ids"])
    batch = stage1_batch(tensors, prefix, image_ids=torch.arange(rank * size, (rank + 1) * size))
    assert_stage1(model, batch, tensors, prefix)
    for parameter in model.parameters():
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= world
    assert_gradients(model, tensors, "ddp_mean_grad.")


def test_two_processes_equal_lavis(goldens_dir):
    run_processes(two_process_worker, 2, goldens_dir)


def paths_of(model, tensors):
    """Every recorded path of the Q-Former, under its recorded name; of text the real tokens alone.

    Recorded "in." tensors and those that say how the others were made are compared with what we make of the same.
    """
    qformer, ids, is_text = model.qformer, tensors["in.input_ids"], tensors["in.attention_mask"].bool()
    num_queries, embedded, layers = qformer.config.num_queries, [], []
    qformer.embedding_norm.register_forward_hook(lambda _, inputs, output: embedded.append(output))
    for layer in qformer.layers:
        layer.register_forward_hook(lambda _, inputs, output: layers.append(output[0]))
    image = qformer.image_key_values(tensors["in.image_embeds"])
    ours = {}

    queries = qformer.forward_queries(image)
    ours["image.last_hidden_state"] = queries.hidden_BQD
    for i, hidden in enumerate([embedded[-1], *layers]):
        ours[f"image.hidden_states.{i}"] = hidden.unflatten(0, (-1, num_queries))
    for i, (keys, values) in enumerate(queries.cache):
        ours |= {f"image.past_key_values.{i}.key": keys, f"image.past_key_values.{i}.value": values}
    is_image = tensors["image_masked.encoder_attention_mask"].bool()
    ours["image_masked.last_hidden_state"] = qformer.forward_queries(image, is_image).hidden_BQD

    ours["text.last_hidden_state"] = qformer.forward_text(ids, is_text)
    ours["text.embedding_output"] = embedded[-1]

    ours["itm.attention_mask"] = joint_mask(is_text, num_queries)[:, 0, 0].long()
    ours["itm.last_hidden_state"] = qformer.forward_joint(image, ids, is_text)
    ours["itm.embedding_output"] = embedded[-1]
    ours["compute_itm.logit"] = model.match_logits(Keys(image, 1), BridgeText(ids, is_text), BridgeInput(ids))[:, 1]

    decoder_ids = torch.cat([torch.full_like(ids[:, :1], model.dec_id), ids[:, 1:]], dim=1)
    logits = qformer.decode_text(decoder_ids, is_text, queries.cache)
    ours |= {"itg.decoder_input_ids": decoder_ids, "itg.logits": logits, "itg.logits_one_pass": logits}
    is_label = is_text[:, 1:]
    labels = ids[:, 1:]
    ours["itg.labels"] = labels.masked_fill(~is_label, -100)
    item, position = is_text.nonzero(as_tuple=True)
    predicts = position + 1 < is_text.sum(dim=1)[item]
    total, count = itg_loss(logits[predicts], labels[is_label])
    ours["itg.loss"] = total / count
    each = [(logits[predicts & (item == row)], labels[row][is_label[row]]) for row in range(len(ids))]
    ours["itg.loss_per_sample_sum"] = torch.stack([itg_loss(rows, label)[0] for rows, label in each])

    features = "extract_features."
    ids, is_text = tensors[f"{features}input_ids"], tensors[f"{features}attention_mask"].bool()
    ours[f"{features}image.image_embeds"] = queries.hidden_BQD
    ours[f"{features}image.image_embeds_proj"] = model.embed_queries(queries.hidden_BQD[:, None])
    text = qformer.forward_text(ids, is_text)
    ours[f"{features}text.text_embeds"] = text
    ours[f"{features}text.text_embeds_proj"] = torch.nn.functional.normalize(model.text_projection(text), dim=-1)
    ours[f"{features}multimodal.multimodal_embeds"] = qformer.forward_joint(image, ids, is_text)
    torch.testing.assert_close(
        model.embed_text(ids, is_text), tensors[f"{features}text.text_embeds_proj"][:, 0], **OUTPUT
    )
    return ours


def recorded_path(name, tensors, num_queries):
    """A recorded tensor without what we never compute: padding, and the text rows of the joint pass's last layer."""
    expected = tensors[name]
    is_text = tensors["extract_features.attention_mask" if "extract" in name else "in.attention_mask"].bool()
    if name == "itm.last_hidden_state":
        return expected[:, :num_queries]
    if name == "itm.embedding_output":  # packed: all queries, then all text
        return torch.cat([expected[:, :num_queries].flatten(0, 1), expected[:, num_queries:][is_text]])
    if name == "itg.labels":
        return expected[:, 1:]  # the first is never predicted
    is_of_text = name.startswith(("text.", "extract_features.text.", "itg.logits"))
    return expected[is_text] if is_of_text else expected


@torch.no_grad()
def test_every_recorded_path_of_the_qformer_equals_lavis(goldens_dir):
    tensors = load_file(goldens_dir / "qformer_paths.safetensors")
    model = stage1_from(goldens_dir).eval()
    ours = paths_of(model, tensors)
    given = {"image_masked.encoder_attention_mask", "extract_features.input_ids", "extract_features.attention_mask"}
    assert ours.keys() == {name for name in tensors if not name.startswith("in.")} - given
    for name, tensor in ours.items():
        expected = recorded_path(name, tensors, model.qformer.config.num_queries)
        torch.testing.assert_close(tensor, expected, **OUTPUT, msg=lambda text, name=name: f"{name}: {text}")
    difference = tensors["image_masked.last_hidden_state"] - tensors["image.last_hidden_state"]
    assert difference.abs().max() > 1e-3  # the mask of the image matters


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
    prefix = stage2(image[:, None]).prompts_BNL
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
