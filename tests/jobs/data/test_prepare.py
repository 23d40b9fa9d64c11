"""`qformer prepare`: every row accounted for, over good and bad files of every kind."""

import json
import os
import re
import shutil
import signal
import tarfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data import prepare_probe
from jobs.data.prepare import main
from jobs.settings.corpus import PrepareSettings
from pipelines.data import schema
from pipelines.data.batches.decode_rows import CheckRows
from pipelines.data.corpus import manifest_files
from pipelines.data.corpus.manifest import read_manifest
from pipelines.data.media.samples import Limits
from qformer.errors import UserError
from tests.pipelines.data.builders import image_manifest, jpeg, write_clip
from tests.pipelines.data.corpus.sources.shards import add_entry, write_shard

pytestmark = pytest.mark.usefixtures("ray_local")


def _prepare(output, sources, **more):
    settings = {"sources": sources, "output": str(output), "decode_workers": 1, "num_frames": 2, **more}
    return main(PrepareSettings.model_validate(settings))


def _table(output, name):
    return {row["sample_id"]: row for row in pq.read_table(Path(output) / f"{name}.parquet").to_pylist()}


def _jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


@pytest.fixture
def world(tmp_path):
    """Sources of four formats with everything that may be wrong in them."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg((10, 0, 0)))
    (folder / "a.txt").write_text("one\ntwo three four five six\n")
    (folder / "same_as_a.jpg").write_bytes(jpeg((10, 0, 0)))
    write_clip(folder / "clip.mp4", [10, 20, 30, 40])
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    os.mkfifo(folder / "pipe.jpg")
    shard = write_shard(
        tmp_path / "shards" / "s-0.tar",
        [
            ("x.jpg", jpeg((20, 0, 0))),
            ("x.txt", b"of x"),
            ("../../y.jpg", jpeg()),
            ("clip.mp4", (folder / "clip.mp4").read_bytes()),
        ],
    )
    add_entry(shard, "link.jpg", tarfile.SYMTYPE, "/etc/passwd")
    cut = write_shard(tmp_path / "shards" / "s-1.tar", [("u.jpg", jpeg((30, 0, 0))), ("v.jpg", jpeg((40, 0, 0)))])
    with tarfile.open(cut) as tar:
        end = tar.getmember("v.jpg").offset_data + 50
    cut.write_bytes(cut.read_bytes()[:end])
    rows = [
        {"media": "late.jpg", "captions": "comes later"},
        {"media": "../folder/a.jpg", "sample_id": "escaped"},
        {"media": str(folder / "a.jpg"), "sample_id": "leak", "split": "val"},
        {"media": str(folder / "a.jpg"), "sample_id": "leak", "split": "val"},
        {"media": "/dev/zero", "sample_id": "device"},
        {"media": str(folder / "clip.mp4"), "sample_id": "never", "start_s": 1e9},
    ]
    table = _jsonl(tmp_path / "table" / "rows.jsonl", rows)
    with open(table["path"], "ab") as file:
        file.write(b'{"media": "a.jpg", "captions": "caf\xe9"}\n{oops\n')
    return [{"path": str(folder), "name": "photos"}, {"path": str(tmp_path / "shards")}, table]


QUARANTINED = {
    "broken.mp4": ("decode", "corrupt"),
    "pipe.jpg": ("read", "unsupported"),
    "shards:2": ("manifest", "unsupported"),
    "shards:4": ("manifest", "unsupported"),
    "shards:6": ("manifest", "corrupt"),
    "late.jpg": ("read", "missing"),
    "rows.jsonl:2": ("manifest", "config"),
    "rows.jsonl:4": ("manifest", "config"),
    "device": ("read", "unsupported"),
    "never": ("manifest", "config"),
    "rows.jsonl:7": ("manifest", "corrupt"),
    "rows.jsonl:8": ("manifest", "corrupt"),
}
USED = ["a.jpg", "clip.mp4", "same_as_a.jpg", "s-0/x", "s-0/clip", "s-1/u", "leak"]


def test_everything_at_once(tmp_path, world, capsys, caplog):
    output = tmp_path / "out"
    summary = _prepare(output, world)
    quarantined = _table(output, "quarantine")
    assert {name: (row["stage"], row["error_class"]) for name, row in quarantined.items()} == QUARANTINED
    manifest = read_manifest(str(output))
    assert manifest[schema.SAMPLE_ID].to_pylist() == USED
    assert manifest[schema.SOURCE].to_pylist() == ["photos"] * 3 + ["shards"] * 3 + ["rows.jsonl"]

    probe = _table(output, "probe")
    assert list(probe) == USED
    clip = probe["s-0/clip"]
    assert (clip["codec"], clip["width"], clip["height"], clip["num_frames"]) == ("h264", 64, 64, 4)
    assert clip["content_hash"] == probe["clip.mp4"]["content_hash"] and clip["media"] != probe["clip.mp4"]["media"]
    assert (probe["a.jpg"]["codec"], probe["a.jpg"]["width"], probe["a.jpg"]["duration_s"]) == ("jpeg", 48, None)

    # One file twice in training is a leak, which tells more than that it is a duplicate; so does the other.
    duplicates = _table(output, "duplicates")
    assert {name: (row["duplicate_of"], row["duplicate_of_split"]) for name, row in duplicates.items()} == {
        "a.jpg": ("leak", "val"),
        "same_as_a.jpg": ("leak", "val"),
        "s-0/clip": ("clip.mp4", "train"),
    }
    assert summary["training_rows_in_evaluation"] == 2 and summary["duplicates_within_split"] == {"train": 1}
    assert "2 training rows show the same bytes as evaluation rows" in caplog.text

    assert summary == json.loads((output / "summary.json").read_text())
    assert (summary["rows_in"], summary["rows_used"], summary["rows_quarantined"]) == (19, 7, 12)
    assert summary["caption_words"]["1-4"] == 2 and summary["caption_words"]["5-8"] == 1
    printed = capsys.readouterr().out
    assert "STILL IN TRAINING" in printed and "h264 2" in printed
    assert printed.splitlines()[-1] == "rows in 19 = rows used 7 + rows quarantined 12"
    with pytest.raises(UserError, match="already used"):
        _prepare(output, world)


def _counted(ray):
    """What Prometheus would read of `prepare`'s rows and seconds, by outcome or stage."""
    found = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        for labels, value in re.findall(
            r"^ray_qformer_data_(?:rows|stage_seconds)_total\{(.*)\} (\S+)$", text, re.MULTILINE
        ):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if tags.get("job") == "prepare":
                found[tags.get("outcome") or tags.get("stage")] = float(value)
    return found


def test_its_figures_go_to_prometheus(tmp_path, world, ray_local):
    """Also those of rows that are wrong in their source, which no decoder sees."""
    before = Counter(_counted(ray_local))
    while time.sleep(2.5) or (later := Counter(_counted(ray_local))) != before:
        before = later  # of the test before, still under way
    _prepare(tmp_path / "out", world)
    deadline = time.monotonic() + 60.0
    expected = {"used": 7, "quarantined": 12}
    while time.monotonic() < deadline:
        now = _counted(ray_local)
        found = {outcome: now.get(outcome, 0) - before[outcome] for outcome in expected}
        if found == expected and now.get("decode", 0) > before["decode"]:
            break
        time.sleep(0.5)
    assert found == expected and now["decode"] > before["decode"]


def test_quarantined_rows_are_tried_again(tmp_path, world, monkeypatch, capsys):
    output = tmp_path / "out"
    _prepare(output, world)
    (tmp_path / "table" / "late.jpg").write_bytes(jpeg((50, 0, 0)))
    shutil.copyfile(tmp_path / "folder" / "clip.mp4", tmp_path / "folder" / "broken.mp4")
    before = _table(output, "manifest")
    summary = _prepare(output, world, retry_quarantined=True)
    mended = {"late.jpg", "broken.mp4"}
    after = _table(output, "manifest")
    assert list(after) == [*before, "broken.mp4", "late.jpg"]
    assert after["late.jpg"]["captions"] == ["comes later"]
    assert {name: after[name] for name in before} == before
    quarantined = _table(output, "quarantine")
    assert {name: (row["stage"], row["error_class"]) for name, row in quarantined.items()} == {
        name: why for name, why in QUARANTINED.items() if name not in mended
    }
    assert quarantined["pipe.jpg"]["tries"] == 2 and quarantined["rows.jsonl:8"]["tries"] == 1
    assert list(_table(output, "probe")) == list(after)
    assert set(_table(output, "quarantined_rows")) == {"pipe.jpg", "device", "never"}
    assert (summary["rows_in"], summary["rows_used"], summary["rows_quarantined"]) == (19, 9, 10)
    assert "tried 5 quarantined rows again: 2 can be used now; 7 more" in capsys.readouterr().out

    # Killed after the manifest was written, and started again: nothing is there twice.
    (tmp_path / "folder" / "pipe.jpg").unlink()
    (tmp_path / "folder" / "pipe.jpg").write_bytes(jpeg((60, 0, 0)))
    from pipelines.data.corpus.preparation import Preparation

    with monkeypatch.context() as patch:
        patch.setattr(Preparation, "_write_rest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _prepare(output, world, retry_quarantined=True)
    assert "pipe.jpg" in _table(output, "manifest") and "pipe.jpg" in _table(output, "quarantine")
    summary = _prepare(output, world, retry_quarantined=True)
    assert read_manifest(str(output)).num_rows == 10 == len(_table(output, "probe"))
    assert (summary["rows_in"], summary["rows_used"], summary["rows_quarantined"]) == (19, 10, 9)


def test_training_rows_that_evaluation_shows_can_be_dropped(tmp_path, world):
    output = tmp_path / "out"
    summary = _prepare(output, world, drop_training_duplicates=True)
    assert read_manifest(str(output))[schema.SAMPLE_ID].to_pylist() == [
        name for name in USED if name not in ("a.jpg", "same_as_a.jpg")
    ]
    dropped = _table(output, "quarantine")["same_as_a.jpg"]
    assert (dropped["stage"], dropped["error_class"]) == ("manifest", "config") and "'leak'" in dropped["message"]
    assert (summary["rows_used"], summary["rows_quarantined"]) == (5, 14)
    again = _prepare(output, world, drop_training_duplicates=True, retry_quarantined=True)
    assert again["rows_used"] == 5  # retrying does not bring them back


def test_a_dry_run_writes_nothing(tmp_path, world, capsys):
    before = sorted(tmp_path.rglob("*"))
    summary = _prepare(tmp_path / "out", world, dry_run=2)
    assert sorted(tmp_path.rglob("*")) == before
    assert summary["rows_in"] == 3 * 2 + 7  # and all rows that are wrong among those read
    assert capsys.readouterr().out.splitlines()[-1].startswith("dry run: nothing was written")


def test_many_rows_become_parts(tmp_path, world, monkeypatch):
    monkeypatch.setattr(manifest_files, "MAX_FILE_ROWS", 2)
    monkeypatch.setattr(manifest_files, "PART_ROWS", 2)
    summary = _prepare(tmp_path / "out", world)
    index = pq.read_table(tmp_path / "out" / "manifest" / "index.parquet").to_pylist()
    assert sorted((row["kind"], row["split"], row["rows"]) for row in index) == [
        ("image", "train", 2),
        ("image", "train", 2),
        ("image", "val", 1),
        ("video", "train", 2),
    ]
    assert not (tmp_path / "out" / "manifest.parquet").exists() and summary["rows_used"] == 7
    (tmp_path / "table" / "late.jpg").write_bytes(jpeg((50, 0, 0)))
    _prepare(tmp_path / "out", world, retry_quarantined=True)
    assert sorted(read_manifest(str(tmp_path / "out"))[schema.SAMPLE_ID].to_pylist()) == sorted([*USED, "late.jpg"])


class Deadly(CheckRows):
    """Dies where a decoder might."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        names = rows[schema.SAMPLE_ID].to_pylist()
        if "s40" in names:
            os.kill(os.getpid(), signal.SIGKILL)
        mark = Path(rows[schema.MEDIA][0].as_py()).parent / "died" if len(rows) else None
        if "s50" in names and mark is not None and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(rows)


def test_a_row_that_kills_its_worker_is_the_only_one_lost(tmp_path, monkeypatch):
    """Also where the worker of other rows dies for another reason: those are healthy."""
    monkeypatch.setattr(prepare_probe, "CheckRows", Deadly)
    table = image_manifest(tmp_path, 100)
    checks = list(prepare_probe.probe([table], num_frames=1, limits=Limits(), decode_workers=2))
    assert pa.concat_tables([rows for rows, _ in checks]).equals(table)
    failed = {
        row["sample_id"]: (row["error_class"], row["tries"])
        for _, checked in checks
        for row in checked.to_pylist()
        if row["stage"]
    }
    assert failed == {"s40": ("corrupt", 2)}


def test_mistakes(tmp_path, world):
    with pytest.raises(UserError, match="two sources have the name 'x'"):
        _prepare(tmp_path / "out", [{**source, "name": "x"} for source in world])
    with pytest.raises(UserError, match="holds no prepared manifest"):
        _prepare(tmp_path / "out", world, retry_quarantined=True)
    with pytest.raises(UserError, match="exclude each other"):
        _prepare(tmp_path / "out", world, retry_quarantined=True, dry_run=3)
    with pytest.raises(UserError, match="does not exist"):
        _prepare(tmp_path / "out", [*world, {"path": str(tmp_path / "gone.jsonl")}])
    assert not (tmp_path / "out").exists()


def test_real_files(tmp_path, test_data_dir, capsys):
    """Photographs with captions and a folder of difficult clips: what the manifest of the data says, happens."""
    sources = [
        {"path": str(test_data_dir / "captioned/captions.jsonl"), "columns": {"media": "image"}},
        {"path": str(test_data_dir / "videos")},
    ]
    summary = _prepare(tmp_path / "out", sources, decode_workers=2, num_frames=8)
    used, quarantined, probe = (_table(tmp_path / "out", name) for name in ("manifest", "quarantine", "probe"))
    for record in json.loads((test_data_dir / "MANIFEST.json").read_text())["records"]:
        if record["kind"] == "video":
            name, truth = record["path"].removeprefix("videos/"), record["ground_truth"]
            if truth["expected"] in ("must_fail", "no_video_stream"):
                assert name in quarantined
            elif truth["expected"] == "decodes":
                assert name in used
                facts = {key: probe[name][key] for key in ("codec", "width", "height", "rotation_deg")}
                streams = [
                    {
                        "codec": stream["codec"],
                        "width": stream["display_width"],
                        "height": stream["display_height"],
                        "rotation_deg": stream["rotation_cw_deg"] % 360,
                    }
                    for stream in truth["streams"]
                ]
                assert facts in streams, name
    rows = f"rows in {len(used) + len(quarantined)} = rows used {len(used)} + rows quarantined {len(quarantined)}"
    assert capsys.readouterr().out.splitlines()[-1] == rows
    assert summary["used_by_kind"]["image"] == 1068 and summary["captions"] == 5340
