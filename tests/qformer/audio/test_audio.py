"""Audio encoders of Hugging Face: equal to the stock extractor and model, frozen, refused where they must be."""

import numpy as np
import pytest
import torch

from qformer.audio import load_audio
from qformer.backbones import weights_fingerprint
from qformer.config import AudioSpec
from qformer.errors import NotFiniteError, UserError
from qformer.torch_build.torchvision import import_torchvision
from tests.tiny_audio import write_encoder

RATE_HZ = 16_000
KINDS = ("ast", "whisper", "wav2vec2")
TOLERANCE = 1e-6
"""Segments are encoded together or alone, which sums in another order; worst measured 3.6e-7."""


def waveforms(*shape):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def stock_tokens(kind, model, extractor, samples):
    """One segment through the library's own classes: [tokens, width]."""
    given = extractor(samples.numpy(), sampling_rate=RATE_HZ, return_tensors="pt")
    encoder = model.encoder if kind == "whisper" else model
    with torch.no_grad():
        return encoder(**given).last_hidden_state[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_is_the_mean_of_the_stock_models_tokens(tmp_path, kind):
    model, extractor = write_encoder(tmp_path, kind)
    encoder = load_audio(AudioSpec(str(tmp_path)))
    assert (encoder.sample_rate_hz, encoder.width) == (RATE_HZ, 32)
    sound = waveforms(2, 3, 2 * RATE_HZ)
    is_audio = torch.tensor([[True, False, True], [False, True, False]])
    found = encoder.features(sound, is_audio)
    assert found.dtype == torch.float32 and found.shape == (2, 3, 32)
    assert not found[~is_audio].any()
    for row, segment in is_audio.nonzero().tolist():
        tokens = stock_tokens(kind, model, extractor, sound[row, segment])
        match kind:
            case "whisper":
                assert len(tokens) == 200  # of 4 s, of which the segment has 2
                tokens = tokens[:100]
            case "ast":
                # 198 frames of 256: 20 of the 25 columns begin in them. Two rows, behind two tokens for the whole.
                assert len(tokens) == 2 + 2 * 25
                tokens = tokens[2:].unflatten(0, (2, 25))[:, :20].flatten(0, 1)
        torch.testing.assert_close(found[row, segment], tokens.mean(dim=0), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["ast", "whisper"])
def test_padding_does_not_thin_the_sound_out(tmp_path, kind):
    """Tokens of the padding behind a short segment say nothing of it: the mean leaves them out."""
    write_encoder(tmp_path, kind)
    encoder = load_audio(AudioSpec(str(tmp_path)))
    short, long = waveforms(4, RATE_HZ // 2), waveforms(4, 2 * RATE_HZ)
    spread = [encoder(sound).std(dim=0).mean() for sound in (short, long)]
    assert spread[0] > 0.5 * spread[1]


def test_it_is_frozen_and_the_same_in_every_process(tmp_path):
    write_encoder(tmp_path, "ast")
    state = torch.get_rng_state()
    one, other = (load_audio(AudioSpec(str(tmp_path), pretrained=False)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    trained = load_audio(AudioSpec(str(tmp_path)))
    assert weights_fingerprint(one) == weights_fingerprint(other) != weights_fingerprint(trained)
    assert not any(p.requires_grad for p in one.parameters()) and not one.train().training
    sound = waveforms(1, 1, RATE_HZ)
    assert torch.equal(one.features(sound, torch.ones(1, 1) > 0), other.features(sound, torch.ones(1, 1) > 0))


def test_the_feature_extractor_has_a_fingerprint(tmp_path):
    _, extractor = write_encoder(tmp_path, "ast")
    before = load_audio(AudioSpec(str(tmp_path))).extractor_fingerprint
    assert load_audio(AudioSpec(str(tmp_path))).extractor_fingerprint == before
    extractor.mean = -1.0
    extractor.save_pretrained(tmp_path)
    assert load_audio(AudioSpec(str(tmp_path))).extractor_fingerprint != before


def test_half_precision_gives_float32_features(tmp_path):
    write_encoder(tmp_path, "whisper")
    whole, half = (load_audio(AudioSpec(str(tmp_path)), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    sound, is_audio = waveforms(1, 2, RATE_HZ), torch.ones(1, 2) > 0
    found = half.features(sound, is_audio)
    assert found.dtype == torch.float32 and weights_fingerprint(half) != weights_fingerprint(whole)
    torch.testing.assert_close(found, whole.features(sound, is_audio), atol=0.1, rtol=0.1)


def test_many_segments_go_through_in_parts(tmp_path, monkeypatch):
    write_encoder(tmp_path, "whisper")
    encoder = load_audio(AudioSpec(str(tmp_path)))
    sound, is_audio = waveforms(3, 3, RATE_HZ // 4), torch.ones(3, 3) > 0
    whole = encoder.features(sound, is_audio)
    monkeypatch.setattr("qformer.audio.encoder._SEGMENTS_PER_PASS", 4)
    torch.testing.assert_close(encoder.features(sound, is_audio), whole, atol=TOLERANCE, rtol=0)


def test_nothing_to_hear_runs_nothing(tmp_path, monkeypatch):
    write_encoder(tmp_path, "ast")
    encoder = load_audio(AudioSpec(str(tmp_path)))
    monkeypatch.setattr(encoder.model, "forward", lambda **_: pytest.fail("it was run"))
    assert not encoder.features(waveforms(2, 4, RATE_HZ), torch.zeros(2, 4) > 0).any()


def test_features_that_are_not_finite_are_refused(tmp_path):
    write_encoder(tmp_path, "wav2vec2")
    encoder = load_audio(AudioSpec(str(tmp_path)))
    sound = waveforms(2, 1, RATE_HZ)
    sound[1] = np.nan
    with pytest.raises(NotFiniteError, match="features of 1 of 2 samples: row 1"):
        encoder.features(sound, torch.ones(2, 1) > 0)


def test_segments_that_an_encoder_cannot_hear_are_refused_by_name(tmp_path):
    write_encoder(tmp_path, "whisper")
    encoder = load_audio(AudioSpec(str(tmp_path)))
    encoder.require_fit(4 * RATE_HZ)
    with pytest.raises(UserError, match="data.audio.segment_s=5 is longer than the 4 s"):
        encoder.require_fit(5 * RATE_HZ)
    with pytest.raises(UserError, match="data.audio.segment_s=0.01 is shorter than model.audio's window"):
        encoder.require_fit(160)


def test_what_is_no_audio_encoder_is_the_users_mistake(tmp_path):
    import_torchvision()
    import transformers as hf

    with pytest.raises(UserError, match="model.audio: cannot load '/nowhere'"):
        load_audio(AudioSpec("/nowhere"))
    hf.ViTModel(
        hf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="^model.audio: ") as caught:
        load_audio(AudioSpec(str(tmp_path)))
    assert "\n" not in str(caught.value)
    # Two towers: a feature extractor, but the model wants text as well.
    hf.ClapModel(
        hf.ClapConfig(
            text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
            audio_config={"patch_embeds_hidden_size": 16, "depths": [1], "num_attention_heads": [2], "hidden_size": 16},
        )
    ).save_pretrained(tmp_path / "clap")
    hf.ClapFeatureExtractor().save_pretrained(tmp_path / "clap")
    with pytest.raises(UserError, match="cannot be run on sound alone .*; choose an audio encoder such as AST"):
        load_audio(AudioSpec(str(tmp_path / "clap")))
