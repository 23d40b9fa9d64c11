"""Random Hugging Face audio encoders, small enough to make in a test: stock classes, stock files."""

import torch

from qformer.torch_build.torchvision import import_torchvision


def write_encoder(folder, kind, width=32):
    """A random model with distinct weights and its feature extractor, in the library's ordinary files."""
    import_torchvision()
    import transformers as hf

    torch.manual_seed(1)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    match kind:
        case "ast":
            model = hf.ASTModel(hf.ASTConfig(**sizes, max_length=256, num_mel_bins=32))
            extractor = hf.ASTFeatureExtractor(max_length=256, num_mel_bins=32)
        case "whisper":
            model = hf.WhisperModel(
                hf.WhisperConfig(
                    vocab_size=64,
                    d_model=width,
                    encoder_layers=2,
                    encoder_attention_heads=4,
                    encoder_ffn_dim=48,
                    decoder_layers=1,
                    decoder_attention_heads=4,
                    decoder_ffn_dim=48,
                    max_source_positions=200,
                    num_mel_bins=40,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=2,
                    decoder_start_token_id=1,
                )
            )
            extractor = hf.WhisperFeatureExtractor(feature_size=40, chunk_length=4)
        case "wav2vec2":
            model = hf.Wav2Vec2Model(hf.Wav2Vec2Config(**sizes, conv_dim=(16,) * 7, num_conv_pos_embeddings=16))
            extractor = hf.Wav2Vec2FeatureExtractor()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return model.eval(), extractor
