"""Real clips with their sound through prepare, features, training, evaluation and captions; not a row is lost."""

import json

import pyarrow.parquet as pq
import pytest

from jobs.data import features, prepare
from jobs.evaluate import caption
from jobs.evaluate import job as evaluate
from jobs.settings.corpus import FeaturesSettings, PrepareSettings
from jobs.settings.data import AudioSettings, DataSettings, SourceSettings, TrainDataSettings
from jobs.settings.evaluate import CaptionSettings, EvaluateSettings
from jobs.settings.model import ModelSettings, OptimSettings
from jobs.settings.train import TrainSettings
from jobs.train import job as train
from pipelines.data.corpus.manifest import read_manifest
from pipelines.training.records.metrics_log import read_metrics
from pipelines.training.run.model_choice import AudioBranchOptions
from qformer.bridges.cascaded import CascadedConfig
from qformer.bridges.spatio_temporal import SpatioTemporalConfig
from qformer.config import GenerationSettings, QFormerSizes
from tests.jobs.train_jobs import REPOSITORY
from tests.tiny_audio import write_encoder

STEPS, BATCH_SIZE, NUM_FRAMES = 20, 8, 4
AUDIO = AudioSettings(num_segments=4, segment_s=1.0)
MODELS = REPOSITORY / "jobs" / "demo" / "models"
LOSS_TOLERANCE = 2e-3
"""Of a loss near 5, with features kept in fp16, over 20 steps of training."""


def _write_rows(data_dir, path):
    """Every clip of the test data; of those with sentences each part, and one that lies behind the end."""
    records = json.loads((data_dir / "MANIFEST.json").read_text())["records"]
    videos = [record["path"] for record in records if record["kind"] == "video"]
    rows = [{"sample_id": name, "media": name, "captions": [f"clip {name}"]} for name in videos]
    for one in json.loads((data_dir / "captioned_video" / "captions.json").read_text()):
        media = f"captioned_video/{one['video']}"
        rows += [
            {"sample_id": f"{media}#{text}", "media": media, "captions": [text]} for text in one.get("captions", [])
        ]
        for told in one.get("dense_captions", []):
            for (start_s, end_s), text in zip(told["timestamps"], told["sentences"], strict=True):
                part = {"start_s": start_s, "end_s": end_s}
                rows.append({"sample_id": f"{media}#{text}", "media": media, "captions": [text], **part})
    outside = {"start_s": 100.0, "end_s": 110.0}
    rows.append({"sample_id": "outside", "media": videos[0], "captions": ["nothing"], **outside})
    path.write_text("".join(f"{json.dumps({'kind': 'video', **row})}\n" for row in rows))
    return len(rows)


@pytest.fixture(scope="module")
def prepared(ray_local, test_data_dir, tmp_path_factory):
    """A folder with a tiny AST, the prepared manifest of the clips, and what the frozen encoders make of them."""
    folder = tmp_path_factory.mktemp("clips")
    write_encoder(folder / "ast", "ast")
    num_rows = _write_rows(test_data_dir, folder / "rows.jsonl")
    source = SourceSettings(path=str(folder / "rows.jsonl"), media_root=str(test_data_dir))
    told = prepare.main(PrepareSettings(sources=[source], output=str(folder / "prepared"), num_frames=NUM_FRAMES))
    quarantined = pq.read_table(folder / "prepared" / "quarantine.parquet").to_pylist()
    rows = _rows(folder)
    assert rows.num_rows + len(quarantined) == num_rows == told["rows_in"]
    assert {"outside": "config"}.items() <= {row["sample_id"]: row["error_class"] for row in quarantined}.items()
    kept = features.main(
        FeaturesSettings(
            output=str(folder / "cache"),
            vision=str(MODELS / "vision"),
            audio=str(folder / "ast"),
            data=DataSettings(manifest=str(folder / "prepared"), num_frames=NUM_FRAMES, audio=AUDIO),
        )
    )
    assert (kept["rows_in"], kept["rows_quarantined"]) == (rows.num_rows, 0)
    return folder


BRIDGES = {
    "cascaded": CascadedConfig(num_queries=4, freeze_frames=False),
    "spatio_temporal": SpatioTemporalConfig(freeze_attention=False),
}


def _rows(prepared):
    return read_manifest(str(prepared / "prepared"), "train", needs_captions=True, kind=None)


def _train_settings(prepared, temporal, output, **data):
    return TrainSettings(
        output=str(output),
        stage=2,
        model=ModelSettings(
            vision=str(MODELS / "vision"),
            language=str(MODELS / "language"),
            audio=str(prepared / "ast"),
            audio_branch=AudioBranchOptions(num_queries=4),
            bridge=BRIDGES[temporal],
            qformer=QFormerSizes(
                hidden_size=32,
                num_layers=2,
                num_heads=2,
                intermediate_size=64,
                num_queries=4,
                embed_dim=16,
                dropout=0.0,
            ),
        ),
        data=TrainDataSettings(manifest=str(prepared / "prepared"), num_frames=NUM_FRAMES, audio=AUDIO, **data),
        optim=OptimSettings(warmup_steps=2),
        steps=STEPS,
        batch_size=BATCH_SIZE,
        log_every=1,
        checkpoint_every=STEPS,
    )


@pytest.mark.slow
@pytest.mark.parametrize("temporal", ["cascaded", "spatio_temporal"])
def test_real_clips_are_prepared_trained_on_and_captioned(ray_local, prepared, tmp_path, capsys, temporal):
    rows = _rows(prepared)
    told = train.main(_train_settings(prepared, temporal, tmp_path / "run"))
    assert told["steps"] == STEPS and told["rows_quarantined"] == 0
    assert told["rows_used"] == told["rows_in"] >= 2 * rows.num_rows  # a third epoch has begun
    assert set(told["frozen_sha256"]) == {"audio", "language", "vision"}
    assert any(name.startswith("audio.") for name in told["trainable_names"])

    cache = str(prepared / "cache")
    cached = train.main(_train_settings(prepared, temporal, tmp_path / "cached", features=cache))
    assert cached["rows_used"] == told["rows_used"] and cached["frozen_sha256"] == told["frozen_sha256"]
    losses = [[step["loss/lm"] for step in read_metrics(str(tmp_path / name))] for name in ("run", "cached")]
    assert len(losses[0]) == STEPS
    worst = max(abs(one - other) for one, other in zip(*losses, strict=True))
    assert worst < LOSS_TOLERANCE, worst

    data = DataSettings(manifest=str(prepared / "prepared"))
    scored = evaluate.main(
        EvaluateSettings(
            checkpoint=str(tmp_path / "run"),
            data=data,
            output=str(tmp_path / "scored"),
            batch_size=8,
            generation=GenerationSettings(max_new_tokens=8),
        )
    )
    assert (scored["rows_in"], scored["rows_used"]) == (rows.num_rows, rows.num_rows)
    capsys.readouterr()
    media = sorted(set(rows["media"].to_pylist()))
    asked = CaptionSettings(
        checkpoint=str(tmp_path / "run"), media=media, generation=GenerationSettings(max_new_tokens=8)
    )
    assert caption.main(asked) == 0
    answered = [line.partition("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert answered == media
    print(f"{rows.num_rows} rows used; {len(media)} files captioned; {worst}")
