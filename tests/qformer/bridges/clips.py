"""Tiny clips and bridges for the tests of video."""

import dataclasses

import torch

from qformer.bridges.cascaded import CascadedConfig
from qformer.bridges.concatenate import ConcatenateConfig
from qformer.bridges.mean import MeanConfig
from qformer.bridges.positions import FramePositions
from qformer.bridges.spatio_temporal import AttentivePool, SpatioTemporalConfig
from qformer.config import QFormerConfig
from qformer.objectives.stage1 import Stage1, Stage1Batch
from qformer.objectives.stage2 import Stage2

CONFIG = QFormerConfig(
    encoder_width=24,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=48,
    num_queries=5,
    vocab_size=40,
    max_positions=16,
    embed_dim=16,
    dropout=0.0,
)
BRIDGES = {
    "concatenate": ConcatenateConfig(),
    "mean": MeanConfig(),
    "cascaded": CascadedConfig(max_frames=6, num_queries=4, num_layers=2, freeze_frames=False),
    "spatio_temporal": SpatioTemporalConfig(
        max_frames=6, num_spatial_queries=3, num_temporal_queries=4, num_summary_queries=2
    ),
}
NUM_QUERIES = 4
"""Soft prompts of the cascaded bridge."""
WAYS = ("concatenate", "mean", "cascaded", "spatio_temporal")
JOINED = ("cascaded", "spatio_temporal")
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def bridge(kind, **changes):
    return dataclasses.replace(BRIDGES[kind], **changes)


def spread(module, seed=1):
    """Larger weights than the initial ones, so that what a model attends to shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in module.modules():
            own = {FramePositions: 1.0, AttentivePool: 1.0}.get(type(one), 0.3)
            for parameter in one.parameters(recurse=False):
                parameter.add_(own * torch.randn(parameter.shape, generator=generator))
        if hasattr(module, "temperature"):
            module.temperature.fill_(0.3)
    return module


def stage1(kind, *, seed=0, **changes):
    torch.manual_seed(seed)
    return spread(Stage1(CONFIG, bridge=bridge(kind, **changes)))


def stage2(kind, *, config=None, seed=0, audio=None, **changes):
    torch.manual_seed(seed)
    config = config or dataclasses.replace(CONFIG, vocab_size=0)
    return spread(Stage2(config, language_width=16, bridge=bridge(kind, **changes), audio=audio))


def prompts(model, image, is_frame=None, sound=None):
    """Soft prompts, masked ones among them."""
    return model(image, is_frame_BF=is_frame, sound=sound).prompts_BNL


def read(model, image, is_frame=None, sound=None):
    """Soft prompts that the language model reads of each clip."""
    return model(image, is_frame_BF=is_frame, sound=sound).rows()


def frames(clips=3, number=4, seed=0):
    """Encoder tokens [B, F, P, V]."""
    return torch.randn(clips, number, 7, CONFIG.encoder_width, generator=torch.Generator().manual_seed(seed))


def batch(clips=4, number=3, seed=0, is_frame=None):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (clips,), generator=generator)
    is_text = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.randint(1, CONFIG.vocab_size - 1, is_text.shape, generator=generator)
    return Stage1Batch(
        image_BFPV=frames(clips, number, seed),
        input_ids_BT=ids.masked_fill(~is_text, 0),
        is_text_BT=is_text,
        image_ids_B=torch.arange(clips),
        is_valid_B=torch.ones(clips, dtype=torch.bool),
        is_frame_BF=is_frame,
    )
