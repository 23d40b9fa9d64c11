"""`qformer demo --video` from end to end, too small to learn anything."""

import json

import pytest

from jobs.cli.main import main
from jobs.demo.video.bridges import BRIDGES

TINY = (
    "world.num_images=100", "world.num_clips=50", "world.num_test_images=200", "world.num_test_clips=64",
    "stage1.steps=2", "stage1.batch_size=8", "stage2.steps=2", "stage2.batch_size=8",
    "clips.world.num_clips=40", "clips.world.num_test_clips=40", "clips.world.broken_share=0.1",
    "clips.training.steps=2", "clips.training.baseline_steps=2", "clips.training.sound_steps=2",
    "clips.training.batch_size=8",
)  # fmt: skip


@pytest.mark.slow
def test_the_whole_demo_runs_and_is_reused(tmp_path, capsys, caplog):
    arguments = ["demo", "--video", "--set", f"demo.output={tmp_path / 'demo'}", "--set", "demo.port=18473"]
    for value in TINY:
        arguments += ["--set", f"demo.{value}"]
    # After two steps no bar is met: the command must say so.
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert "cascaded: direction" in shown and "MISSED" in shown
    assert (
        "mean pooling: first, chosen" in shown
        and "minutes of the clips' part" in shown
        and "guess without order 0.500" in shown
    )
    assert "quarantined clips" in shown
    output = tmp_path / "demo"
    answers = json.loads((output / "clip_answers/answers.json").read_text())
    assert set(answers) == {bridge.name for bridge in BRIDGES}
    choices = json.loads((output / "clip_answers/choices.json").read_text())
    for conditions in (*answers.values(), *choices.values()):
        assert all(len(table) == 40 for tables in conditions.values() for table in tables)
    assert (output / "report_video.html").is_file()
    summary = json.loads((output / "clip_cascaded_sound/summary.json").read_text())
    assert summary["rows_in"] == summary["rows_used"] + summary["rows_quarantined"]

    caplog.clear()
    assert main(arguments) == 1
    reused = {
        record.getMessage().split(":")[0] for record in caplog.records if "unchanged, reused" in record.getMessage()
    }
    assert {"clip_world", "clip_data", "clip_features", "clip_answers", *(bridge.name for bridge in BRIDGES)} <= reused
