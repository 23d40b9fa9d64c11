"""Any Hugging Face audio encoder, by hub name or local folder. `transformers` is imported inside the loader only."""

from typing import Any

import torch

from qformer.audio.encoder import AudioEncoder, layout_of
from qformer.backbones import RANDOM_WEIGHTS_SEED, model_error
from qformer.config import AudioSpec
from qformer.errors import UserError
from qformer.torch_build.torchvision import import_torchvision


def load_audio(spec: AudioSpec, *, dtype: torch.dtype = torch.float32) -> AudioEncoder:
    """Load and freeze an audio encoder: AST, Whisper's encoder, wav2vec 2.0 or a similar one.

    Args:
        spec: The encoder; a local folder holds config.json, preprocessor_config.json and model.safetensors. Random
            weights are the same in every process.
        dtype: Type of the frozen weights.

    Raises:
        UserError: If the name is unknown, the folder is no audio model, or the hub cannot be reached.
    """
    import_torchvision()
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        try:
            extractor: Any = AutoFeatureExtractor.from_pretrained(spec.name)
            if spec.pretrained:
                model = AutoModel.from_pretrained(spec.name, dtype=torch.float32)
            else:
                model = AutoModel.from_config(AutoConfig.from_pretrained(spec.name))
        except Exception as error:
            raise model_error("model.audio", spec.name, error, []) from error
    if not hasattr(extractor, "sampling_rate"):
        raise UserError(f"model.audio: {spec.name!r} is not an audio model; choose one such as AST or Whisper")
    config = model.config
    encoder = model.get_encoder() if config.is_encoder_decoder else model
    try:
        return AudioEncoder(encoder.to(dtype), extractor, layout_of(config, extractor))
    except Exception as error:  # models of other kinds fail in many ways
        reason = str(error).strip()[:200] or type(error).__name__
        raise UserError(
            f"model.audio: {spec.name!r} cannot be run on sound alone ({reason}); choose an audio encoder such as "
            "AST or Whisper"
        ) from error
