"""Write toy inputs of the recipes (jobs/configs/recipes/toy.yaml): `python -m jobs.demo.toy [FOLDER]`."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import jobs
from jobs.demo.world.corpus import LICENCE, write_world
from jobs.demo.world.toy_sound import write_audio_encoder, write_clips
from jobs.settings.loading import load
from jobs.settings.train import TrainSettings
from jobs.train.inputs import model_choice
from pipelines.data.storage.checkpoint_folders import write_marker
from pipelines.training.run.model import TrainingRun
from pipelines.training.run.vocabulary import learn_text_tokenizer
from qformer.conversion.checkpoint import save_bridge
from qformer.torch_build.torchvision import import_torchvision

FOLDER = Path("runs/toy")
"""Folder in toy.yaml."""
JOBS = Path(jobs.__file__).parent
RECIPES = JOBS / "configs" / "recipes"
NUM_IMAGES, NUM_TEST_IMAGES = 48, 8


def main(arguments: list[str] | None = None) -> None:
    """Write the folder given on the command line."""
    parser = argparse.ArgumentParser(description="Write toy inputs of the recipes.")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"new folder (default {FOLDER})")
    folder = parser.parse_args(arguments).folder
    write_toy(folder)
    print(f"written: {folder}; next: the first line of {Path('jobs/configs/recipes/toy.yaml')}")


def write_toy(folder: Path) -> None:
    """Write `corpus/` (pictures, captions, questions), `bridge/` (an untrained stage 1) and `t5/` (random weights).

    For the recipes with sound, also write `clips/` and `ast/` (`toy_sound`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus"
    write_world(
        corpus,
        num_images=NUM_IMAGES,
        num_clips=0,
        num_test_images=NUM_TEST_IMAGES,
        num_test_clips=0,
        seed=0,
        broken_share=0.0,
    )
    lines = (corpus / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    scenes = json.loads((corpus / "truth.json").read_text(encoding="utf-8"))["scenes"]
    rows += [_question(row, scenes[row["sample_id"]]) for row in rows]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (corpus / "manifest.jsonl").write_text(content, encoding="utf-8")
    _write_bridge(folder / "bridge", [text for row in rows for text in row["captions"]])
    _write_t5(folder / "t5")
    write_clips(folder / "clips")
    write_audio_encoder(folder / "ast")


def _question(row: dict[str, Any], scene: dict[str, Any]) -> dict[str, Any]:
    """Row of the same picture with a question, in BLIP-2's format, instead of its captions."""
    thing = scene["things"][0]
    return {
        "sample_id": f"{row['sample_id']}-question",
        "media": row["media"],
        "kind": row["kind"],
        "captions": [thing["colour"]],
        "instruction": f"Question: what colour is the {thing['size']} {thing['shape']}? Answer:",
        "split": row["split"],
        "licence": LICENCE,
    }


def _write_bridge(folder: Path, captions: list[str]) -> None:
    """Write a checkpoint of stage 1 at step 0, with the sizes of toy.yaml."""
    overrides = ["init_from=null", f"model.vision={JOBS / 'demo' / 'models' / 'vision'}"]
    settings = load(TrainSettings, [RECIPES / "blip2_stage1.yaml", RECIPES / "toy.yaml"], overrides)
    with tempfile.TemporaryDirectory() as tokenizer:
        learn_text_tokenizer(lambda: captions, Path(tokenizer))
        choice = model_choice(settings.model, stage=1, num_frames=settings.data.num_frames, tokenizer=tokenizer)
        run = TrainingRun(choice, torch.device("cpu"), precision="fp32", seed=settings.seed, init_from=None)
    folder.mkdir(exist_ok=True)
    save_bridge(folder, run.info(0), run.stage.trainables.state_dict(), run.tokenizer)
    write_marker(folder, {"step": 0})


def _write_t5(folder: Path) -> None:
    """Write an encoder-decoder model with the demo's vocabulary and random weights."""
    import_torchvision()
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(JOBS / "demo" / "models" / "language")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
