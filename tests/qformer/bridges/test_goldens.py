"""The cascade and its branch for sound against tensors recorded from Video-LLaMA, fp32, dropout 0."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qformer.bridges.audio_branch import Sound
from qformer.bridges.cascaded import CascadedConfig
from qformer.bridges.config import AudioConfig
from qformer.bridges.protocol import BridgeInput
from qformer.config import QFormerConfig
from qformer.language import LanguageBatch, build_language_model
from qformer.objectives.stage2 import Stage2
from qformer.torch_build.torchvision import import_torchvision
from tests.qformer import lavis
from tests.qformer.test_goldens import GRADIENT_SHARE, OUTPUT, NumberTokenizer

PARTS = (
    (r"^(video|audio)_(position_embedding|frame_position_embedding|query_tokens|Qformer|llama_proj)", r"\1/\2"),
    (r"^llama_proj\.", "video/language_projection."),
    (r"^(?=query_tokens$|Qformer\.)", "frames/"),
    (r"^(video|audio)/(frame_)?position_embedding\.weight$", r"\1/positions.table_MD"),
    (r"/llama_proj\.", "/language_projection."),
    (r"^video/positions", "frames/positions"),
)
PLACES = {"video": "", "audio": "audio.", "frames": "frames."}


def our_name(name):
    for pattern, replacement in PARTS:
        name = re.sub(pattern, replacement, name)
    place, _, rest = name.rpartition("/")
    return f"{PLACES[place]}{lavis.our_name(rest)}" if place else lavis.our_name(rest)


@pytest.fixture(scope="module")
def recorded(goldens_dir):
    return load_file(goldens_dir / "video_llama.safetensors")


@pytest.fixture
def facts(goldens_dir):
    return lavis.facts(goldens_dir, "video_llama")


@pytest.fixture
def weights(goldens_dir):
    theirs = load_file(goldens_dir / "video_llama_weights.safetensors")
    ours = {k: v for k, v in theirs.items() if not k.startswith("llama_model.") and not k.endswith("position_ids")}
    return {our_name(name): tensor for name, tensor in ours.items()}


def bridge(facts, weights, *, is_joint=False):
    bert, video, audio = facts["bert"], facts["video"], facts["audio"]
    assert (video["cross_attention_freq"], audio["cross_attention_freq"]) == (1, 1)  # as ours always have
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
    model = Stage2(
        config,
        language_width=facts["llama"]["hidden_size"],
        bridge=CascadedConfig(
            max_frames=video["max_frame_pos"],
            num_queries=video["num_video_query_token"],
            num_layers=video["layers"],
        ),
        audio=AudioConfig(
            encoder_width=config.hidden_size if is_joint else audio["encoder_width"],
            max_segments=audio["position_embeddings"],
            num_queries=audio["num_audio_query_token"],
            num_layers=audio["layers"],
            is_joint=is_joint,
        ),
    )
    own = model.state_dict()
    rest = {name for name in weights if name not in own}
    assert all(is_joint and name.startswith("audio.") for name in rest), rest
    model.load_state_dict({name: weights[name] for name in own})
    return model.train()


def assert_gradients(model, recorded, prefix):
    own = dict(model.named_parameters())
    names = [name for name in recorded if name.startswith(prefix)]
    assert names
    for name in names:
        ours, expected = own[our_name(name.removeprefix(prefix))].grad, recorded[name]
        worst = (ours - expected).abs().max()
        assert worst <= GRADIENT_SHARE * expected.abs().max(), f"{name}: {worst}"


def test_the_visual_path_equals_video_llama(recorded, facts, weights):
    model, image = bridge(facts, weights), recorded["in.frame_embeds_raw"]
    frame = model.frames.qformer
    hidden = frame.forward_queries(frame.image_key_values(model.vision_norm(image).flatten(0, 1))).hidden_BQD
    torch.testing.assert_close(hidden, recorded["video.frame_query_output"], **OUTPUT)
    percept = model.bridge.perceive(BridgeInput(image))
    torch.testing.assert_close(percept.tokens_BFPV[:, 0], recorded["video.frame_hidden_with_pos"], **OUTPUT)
    queries = model.qformer.forward_queries(model.qformer.image_key_values(percept.tokens_BFPV[:, 0]), percept.is_token)
    torch.testing.assert_close(queries.hidden_BQD, recorded["video.video_query_output"], **OUTPUT)
    prompts, is_prompt = model(image)[:2]
    expected = recorded["video.inputs_llama"]
    video = prompts[:, : expected.shape[1]]
    torch.testing.assert_close(video, expected, **OUTPUT)
    assert is_prompt.long()[:, : expected.shape[1]].equal(recorded["video.atts_llama"])
    assert not is_prompt[:, expected.shape[1] :].any()  # there is no sound
    (video * recorded["in.video_grad_weight"]).sum().backward()
    assert_gradients(model, recorded, "video.grad.")


@torch.no_grad()
def test_the_path_of_sound_equals_video_llama(recorded, facts, weights):
    model, audio = bridge(facts, weights), recorded["in.audio_imagebind_out"]
    branch, is_segment = model.audio, torch.ones(audio.shape[:2], dtype=torch.bool)
    placed = audio + branch.positions(is_segment)
    torch.testing.assert_close(placed, recorded["audio.encoder_hidden_states"], **OUTPUT)
    queries = branch.qformer.forward_queries(branch.qformer.image_key_values(placed), is_segment)
    torch.testing.assert_close(queries.hidden_BQD, recorded["audio.query_output"], **OUTPUT)
    prompts = model(recorded["in.frame_embeds_raw"], sound=Sound(audio, is_segment)).prompts_BNL
    expected = torch.cat([recorded["video.inputs_llama"], recorded["audio.inputs_llama"]], dim=1)
    torch.testing.assert_close(prompts, expected, **OUTPUT)


@torch.no_grad()
def test_the_joint_path_equals_video_llama(recorded, facts, weights):
    model, image = bridge(facts, weights, is_joint=True), recorded["in.frame_embeds_raw"]
    sound = Sound(recorded["in.audio_feature_for_joint"], torch.ones(image.shape[:2], dtype=torch.bool))
    percept = model.bridge.perceive(BridgeInput(image, sound=sound))
    torch.testing.assert_close(percept.tokens_BFPV[:, 0], recorded["audiovideo.encoder_hidden_states"], **OUTPUT)
    torch.testing.assert_close(model(image, sound=sound).prompts_BNL, recorded["audiovideo.inputs_llama"], **OUTPUT)


def test_the_loss_of_the_language_model_equals_video_llama(goldens_dir, recorded, facts, weights):
    import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(LlamaConfig(**facts["llama"], tie_word_embeddings=False))
    theirs = load_file(goldens_dir / "video_llama_weights.safetensors")
    prefix = "llama_model."
    llama.load_state_dict({k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)})
    language = build_language_model(llama, NumberTokenizer(facts["llama"]))
    model = bridge(facts, weights)
    video = model(recorded["in.frame_embeds_raw"]).prompts_BNL[:, : facts["video"]["num_video_query_token"]]

    ids, labels = recorded["llm.in.input_ids"], recorded["llm.in.labels"]
    is_placeholder = ids >= facts["llama"]["vocab_size"]
    assert is_placeholder.equal(is_placeholder[:1].expand_as(ids))
    places = is_placeholder[0].nonzero().flatten()
    first, end = int(places[0]), int(places[-1]) + 1
    before = llama.get_input_embeddings()(ids[:, :first])
    rows = torch.cat([before, video], dim=1)  # of the prompt, the words in front of the clip, then the clip
    batch = LanguageBatch(ids[:, end:], recorded["llm.in.attention_mask"][:, end:].bool(), labels[:, end:])
    embedded = language._with_prefix(rows, batch)["inputs_embeds"]
    torch.testing.assert_close(embedded, recorded["llm.out.inputs_embeds"], **OUTPUT)
    logits = language.logits(rows, batch)
    torch.testing.assert_close(logits, recorded["llm.out.logits"][:, end - 1 : -1], **OUTPUT)
    total, count = language.loss(rows, batch)
    torch.testing.assert_close(total / count, recorded["llm.out.loss"], **OUTPUT)
    (total / count).backward()
    assert_gradients(model, recorded, "llm.grad.")


def test_every_recorded_tensor_is_compared(recorded):
    """What the tests above read; a new recording must not go unpercept."""
    read = set(re.findall(r'"((?:in|video|audio|audiovideo|llm)\.[\w.]+)"', Path(__file__).read_text(encoding="utf-8")))
    prefixes = tuple(name for name in read if name.endswith("grad."))
    assert {name for name in recorded if name not in read and not name.startswith(prefixes)} == set()
