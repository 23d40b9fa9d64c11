"""A checkpoint for the serving benchmark: the demo's frozen models, and a bridge between them with random weights.

The copy of the language model never generates its end token, so every answer has exactly the requested tokens.
"""

import json
import shutil
from pathlib import Path

import torch

import jobs.demo
from jobs.demo.settings import DemoQFormerSizes
from pipelines.data.storage.checkpoint_folders import write_marker
from qformer.backbones import load_language, load_vision
from qformer.config import LanguageSpec, QFormerConfig, VisionSpec
from qformer.conversion.checkpoint import BridgeInfo, save_bridge
from qformer.language import build_language_model
from qformer.objectives.stage2 import Stage2

MODELS = Path(jobs.demo.__file__).parent / "models"
NUM_FRAMES = 4


def write_checkpoint(run: Path, *, language: Path | None = None, seed: int = 0) -> Path:
    """Write a run folder with one checkpoint of stage 2; returns the checkpoint.

    Args:
        run: New run folder.
        language: Language model of an earlier call; None writes one to RUN-language.
        seed: Seed of the bridge's weights.
    """
    language = language or _write_endless_language(run.with_name(run.name + "-language"))
    vision = VisionSpec(str(MODELS / "vision"))
    encoder = load_vision(vision)
    width = build_language_model(*load_language(LanguageSpec(str(language)))).width
    config = QFormerConfig.of(DemoQFormerSizes(), encoder_width=encoder.width, vocab_size=0, has_lm_head=True)
    torch.manual_seed(seed)
    bridge = Stage2(config, language_width=width)
    info = BridgeInfo(
        stage=2,
        step=0,
        vision=vision,
        language=LanguageSpec(str(language)),
        qformer=config,
        preprocessing=encoder.preprocessing,
        num_frames=NUM_FRAMES,
        max_text_tokens=32,
    )
    folder = run / "checkpoints" / "step-00000000"
    folder.mkdir(parents=True)
    save_bridge(folder, info, bridge.state_dict(), None)
    write_marker(folder, {"step": 0})
    return folder


def _write_endless_language(folder: Path) -> Path:
    """Copy the demo's language model with its end token suppressed, for `transformers` and the engine."""
    shutil.copytree(MODELS / "language", folder)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "suppress_tokens": [settings["eos_token_id"]]}))
    return folder
