"""Make the demo's frozen models and check them: `python -m jobs.demo.backbones [--out DIR] [--only WHICH]`.

Dimensions: B batch, L prompt length, D width, P patches.
"""

import argparse
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.demo.backbones.facts import (
    CLEAN,
    FULL,
    Group,
    PromptNoise,
    clip_facts,
    embed_prompts,
    fact_tokens,
    fill_slots,
    image_facts,
)
from jobs.demo.backbones.language import caption_loss, greedy_captions, save_language, train_language
from jobs.demo.backbones.language_batches import caption_ids
from jobs.demo.backbones.patches import CLASSES, render_examples
from jobs.demo.backbones.vision import block_features, save_vision, train_vision
from jobs.demo.video.backbones.audio import probe_pitches, save_audio, train_audio
from jobs.demo.video.backbones.language import caption_accuracy, train_clip_language
from jobs.demo.world.grammar import captions, parse
from jobs.demo.world.scenes import Kind, Scene, sample_scene
from qformer.config import AudioSpec, LanguageSpec, VisionSpec

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MODELS_FOLDER = Path(__file__).parent / "models"
NUM_SLOTS = 8
KINDS: tuple[Kind, ...] = ("image", "clip")
NUM_CLIP_FRAMES = 4
FEATURE_WIDTH = 96
BRIDGE_LEARNING_RATE = 2e-3


def main(arguments: list[str] | None = None) -> None:
    """Train, save and check the models with fixed seeds."""
    parser = argparse.ArgumentParser(description="Make the demo's frozen models and check them.")
    parser.add_argument("--out", type=Path, default=MODELS_FOLDER, help="folder to write the models to")
    parser.add_argument("--only", choices=("vision", "language", "clip_language", "audio"), help="make one of them")
    parser.add_argument("--check", action="store_true", help="check the models in --out instead of making them")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    rows: list[tuple[str, str]] = []
    makers = {
        "language": _language_rows,
        "vision": _vision_rows,
        "clip_language": _clip_language_rows,
        "audio": _audio_rows,
    }
    for name, job in makers.items():
        if options.only in (None, name):
            rows += job(options.out / name, options.check)
    for title, value in rows:
        print(f"{title:<58} {value}")


def fact_accuracy(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    kind: Kind,
    *,
    noise_std: float,
    noise: PromptNoise = CLEAN,
    count: int = 200,
    seed: int = 1,
) -> float:
    """Measure how often the model's greedy caption of a held-out scene's facts is exactly right.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        kind: Kind of scene: "single", "pair", "image" or "clip".
        noise_std: Noise on every slot, relative to the embeddings' standard deviation.
        noise: Further corruption of the prompts.
        count: Number of scenes.
        seed: Decides scenes, slots and noise.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scenes = [sample_scene(rng, kind, held_out=True) for _ in range(count)]
    prompts = [_facts(scene, rng) for scene in scenes]
    weights_BLV = fill_slots(prompts, NUM_SLOTS, tokenizer.get_vocab(), noise, rng)
    embedding_VD = model.get_input_embeddings().weight.detach()
    prompts_BLD = embed_prompts(weights_BLV, embedding_VD, noise_std_max=0)
    noise_BLD = torch.randn(prompts_BLD.shape, generator=generator)
    texts = greedy_captions(model, tokenizer, prompts_BLD + noise_std * embedding_VD.std() * noise_BLD)
    return sum(parse(text) == scene for text, scene in zip(texts, scenes, strict=True)) / count


def bridge_accuracy(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    *,
    num_steps: int = 400,
    count: int = 200,
    seed: int = 2,
) -> dict[str, float]:
    """Train a linear layer from random features of a frame's two things to soft prompts of the frozen model.

    A real bridge must do at least this: if it fails, the language model does not use soft prompts.

    Returns:
        Share of greedy captions that are exactly right, for training and held-out images and clips.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model.requires_grad_(False).eval()
    column = {token: index for index, token in enumerate(fact_tokens())}
    mixing = torch.randn(len(column), FEATURE_WIDTH) / 3
    linear = nn.Linear(2 * FEATURE_WIDTH, NUM_SLOTS * model.config.hidden_size)

    def prompts_of(scenes: list[Scene]) -> Tensor:
        prompts = [_facts(scene, rng) for scene in scenes]
        hot = torch.zeros(len(prompts), len(prompts[0]), 2, len(column))
        for row, frames in enumerate(prompts):
            for frame, groups in enumerate(frames):
                for at, group in enumerate(groups):
                    for fact, weight in group.items():
                        hot[row, frame, at, column[fact]] = weight
        features = (hot @ mixing).flatten(2)
        features = features + 0.05 * torch.randn_like(features)
        return linear(features).view(len(scenes), -1, model.config.hidden_size)

    optimizer = torch.optim.Adam(linear.parameters(), lr=BRIDGE_LEARNING_RATE)
    for step in range(num_steps):
        scenes = [sample_scene(rng, "clip" if step % 2 else "image", held_out=False) for _ in range(32)]
        ids_BT = caption_ids(tokenizer, [captions(scene, rng, 1)[0] for scene in scenes])
        loss = caption_loss(model, prompts_of(scenes), ids_BT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracies = {}
    for held_out in (False, True):
        for kind in KINDS:
            scenes = [sample_scene(rng, kind, held_out) for _ in range(count)]
            texts = greedy_captions(model, tokenizer, prompts_of(scenes).detach())
            right = sum(parse(text) == scene for text, scene in zip(texts, scenes, strict=True))
            accuracies[f"{'held-out' if held_out else 'seen'} {kind}s"] = right / count
    return accuracies


def probe_accuracy(model: Any, *, num_train: int = 1500, num_test: int = 500, seed: int = 3) -> dict[str, float]:
    """Fit linear probes on patch features of the second-to-last block; score patches of held-out scenes.

    Returns:
        Share of right answers on patches with a thing, by attribute; under "nothing", the share of empty patches
        classified as empty; under "offset", the mean error in pixels.
    """
    torch.manual_seed(seed)
    train = render_examples(num_train, random.Random(seed), held_out=False)
    test = render_examples(num_test, random.Random(seed + 1), held_out=True)
    features_PD, centre, spread = _patch_features(model, train.pixels, None)
    test_PD, _, _ = _patch_features(model, test.pixels, (centre, spread))
    results = {}
    for name, values in CLASSES.items():
        probe = _fit_probe(features_PD, train.labels[name].flatten(), len(values) + 1)
        labels_P = test.labels[name].flatten()
        is_right_P = probe(test_PD).argmax(1) == labels_P
        is_thing_P = (labels_P >= 0) & (labels_P < len(values))
        results[name] = is_right_P[is_thing_P].float().mean().item()
        results["nothing"] = is_right_P[labels_P == len(values)].float().mean().item()
    is_thing_P = (train.labels["size"] >= 0) & (train.labels["size"] < len(CLASSES["size"]))
    chosen = is_thing_P.flatten()
    solution = torch.linalg.lstsq(features_PD[chosen], train.offsets.flatten(0, 1)[chosen]).solution
    is_thing_P = (test.labels["size"] >= 0) & (test.labels["size"] < len(CLASSES["size"]))
    chosen = is_thing_P.flatten()
    errors = test_PD[chosen] @ solution - test.offsets.flatten(0, 1)[chosen]
    results["offset"] = errors.norm(dim=1).mean().item() * test.pixels.shape[-1]
    return results


@torch.no_grad()
def _patch_features(
    model: Any, pixels: Tensor, statistics: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise as a Q-Former does (layer norm), then standardise for the probes and add a constant column."""
    features = [block_features(model, chunk)[0] for chunk in pixels.split(250)]
    features_PD = torch.cat(features).flatten(0, 1)
    features_PD = F.layer_norm(features_PD, features_PD.shape[1:])
    centre, spread = statistics or (features_PD.mean(0), features_PD.std(0))
    scaled_PD = (features_PD - centre) / spread
    return torch.cat([scaled_PD, torch.ones(len(scaled_PD), 1)], dim=1), centre, spread


def _fit_probe(features_PD: Tensor, labels_P: Tensor, num_classes: int) -> nn.Linear:
    probe = nn.Linear(features_PD.shape[1], num_classes, bias=False)
    usable = (labels_P >= 0).nonzero()[:, 0]
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.01)
    for _ in range(400):
        chosen = usable[torch.randint(len(usable), (2048,))]
        loss = F.cross_entropy(probe(features_PD[chosen]), labels_P[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe


def _language_rows(folder: Path, is_check_only: bool) -> list[tuple[str, str]]:
    from qformer.backbones import load_language

    start_s = time.perf_counter()
    if not is_check_only:
        save_language(*train_language(), folder)
    rows = [("language: training", f"{time.perf_counter() - start_s:.0f} s")]
    # Check the saved files that others will load, not the model in memory.
    model, tokenizer = load_language(LanguageSpec(str(folder)))
    for kind in KINDS:
        for title, noise_std, noise in (
            ("clean facts", 0.0, CLEAN),
            ("noise 0.3", 0.3, CLEAN),
            ("noise 0.3, cluttered slots", 0.3, FULL),
        ):
            share = fact_accuracy(model, tokenizer, kind, noise_std=noise_std, noise=noise)
            rows.append((f"language: held-out {kind}s right, {title}", f"{share:.1%}"))
    for title, share in bridge_accuracy(model, tokenizer).items():
        rows.append((f"language: linear bridge after 400 steps, {title}", f"{share:.1%}"))
    return [*rows, ("language: size", _size(folder))]


def _clip_language_rows(folder: Path, is_check_only: bool) -> list[tuple[str, str]]:
    from qformer.backbones import load_language

    start_s = time.perf_counter()
    if not is_check_only:
        save_language(*train_clip_language(), folder)
    rows = [("clip language: training", f"{time.perf_counter() - start_s:.0f} s")]
    model, tokenizer = load_language(LanguageSpec(str(folder)))
    for noise_std in (0.0, 0.3):
        share = caption_accuracy(model, tokenizer, noise_std=noise_std)
        rows.append((f"clip language: held-out scenes right, noise {noise_std}", f"{share:.1%}"))
    return [*rows, ("clip language: size", _size(folder))]


def _audio_rows(folder: Path, is_check_only: bool) -> list[tuple[str, str]]:
    from qformer.audio import load_audio

    start_s = time.perf_counter()
    if not is_check_only:
        save_audio(*train_audio(), folder)
    rows = [("audio: training", f"{time.perf_counter() - start_s:.0f} s")]
    share = probe_pitches(load_audio(AudioSpec(str(folder))))
    return [*rows, ("audio: linear probe, pitch or none of a segment", f"{share:.1%}"), ("audio: size", _size(folder))]


def _vision_rows(folder: Path, is_check_only: bool) -> list[tuple[str, str]]:
    from qformer.backbones import load_vision

    start_s = time.perf_counter()
    if not is_check_only:
        save_vision(train_vision(), folder)
    rows = [("vision: training", f"{time.perf_counter() - start_s:.0f} s")]
    encoder = load_vision(VisionSpec(str(folder)))
    for title, value in probe_accuracy(encoder.model).items():
        text = f"{value:.2f} px" if title == "offset" else f"{value:.1%}"
        rows.append((f"vision: linear probe on held-out scenes, {title}", text))
    frames = torch.zeros(32, 1, 3, 64, 64, dtype=torch.uint8)
    rows.append(("vision: second-to-last block, 32 frames, 1 thread", f"{_time_ms(lambda: encoder(frames)):.0f} ms"))
    return [*rows, ("vision: size", _size(folder))]


def _facts(scene: Scene, rng: random.Random) -> list[list[Group]]:
    return image_facts(scene, rng) if scene.motion is None else clip_facts(scene, rng, NUM_CLIP_FRAMES)


def _time_ms(work: Callable[[], object], repeats: int = 10) -> float:
    work()
    start_s = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start_s) / repeats * 1000


def _size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.2f} MB"
