"""Rows in = rows used + rows quarantined while decoders, workers and the object store fail."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.data import storage
from tests.pipelines.data.builders import jpeg, open_files, write_clip, write_moving_clip
from tests.pipelines.data.corpus.sources.shards import write_shard
from tests.pipelines.data.fault_proxy import failing_proxy
from tests.pipelines.data.manifest_parts import cut_into_parts
from tests.pipelines.data.object_store import CREDENTIALS, moto_program, s3_server

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[3]
EPOCHS, RANKS = 2, 2
FAMILIES = ("coco", "karpathy", "lavis", "csv", "parquet")
KILL_EVERY_S = 5.0
KILLS_AT_WORK = 2
"""Of each GIF and AVI: so often its decoder is killed while it holds the file open."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The bucket's own address, that of the proxy, and the proxy's counts; credentials are in the environment."""
    with (
        s3_server(moto_program(tmp_path_factory.mktemp("moto"))) as address,
        failing_proxy(address) as (proxy, counts),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # of another test's server
        fsspec.filesystem("s3").mkdir("corpus")
        yield proxy, counts


def _clip(folder, number):
    return write_clip(folder / f"clip-{number}.mp4", [(number * 9 + step * 4) % 200 + 20 for step in range(12)])


def _jsonl(uri, rows):
    storage.write_text(uri, "".join(json.dumps(row) + "\n" for row in rows))


def _write_annotations(folder):
    """Six healthy rows in each format of annotations and tables. Returns their paths."""
    (folder / "years").mkdir(parents=True)

    def photo(family, number):
        name = f"{family}-{number}.jpg"
        (folder / name).write_bytes(jpeg((60, 40 * FAMILIES.index(family), number * 9)))
        return name

    sixes = {family: [photo(family, number) for number in range(6)] for family in FAMILIES}
    for number in range(20, 26):
        _clip(folder / "years", number).rename(folder / "years" / f"{number}.mp4")
    coco = {"images": [], "annotations": []}
    for number, name in enumerate(sixes["coco"]):
        coco["images"].append({"id": 900 + number, "file_name": name})
        coco["annotations"].append({"id": number, "image_id": 900 + number, "caption": f"coco {number}"})
    karpathy = [
        {"filename": name, "split": "train", "cocoid": 800 + number, "sentences": [{"raw": f"karpathy {number}"}]}
        for number, name in enumerate(sixes["karpathy"])
    ]
    lavis = [{"image": name, "caption": f"lavis {number}"} for number, name in enumerate(sixes["lavis"])]
    documents = {"coco": coco, "karpathy": {"images": karpathy}, "lavis": lavis}
    for family, document in documents.items():
        (folder / f"{family}.json").write_text(json.dumps(document))
    clips = "".join(f"{number},https://example.org/x,PT1S,years,clip {number}\n" for number in range(20, 26))
    (folder / "webvid.csv").write_text("videoid,contentUrl,duration,page_dir,name\n" + clips)
    lines = "".join(f"{name},csv {number}\n" for number, name in enumerate(sixes["csv"]))
    (folder / "table.csv").write_text("media,caption\n" + lines)
    captions = [f"parquet {number}" for number in range(6)]
    pq.write_table(pa.table({"media": sixes["parquet"], "caption": captions}), folder / "table.parquet")
    names = [*(f"{family}.json" for family in documents), "webvid.csv", "table.csv", "table.parquet"]
    return [str(folder / name) for name in names]


def _write_sources(folder):
    """Sources of every kind, those with many rows with one corrupt file each. Returns their paths, and how many."""
    for name in ("table", "folder", "scratch"):
        (folder / name).mkdir()
    rows = []
    for number in range(40):
        (folder / "table" / f"{number}.jpg").write_bytes(jpeg((number, 10, 10)))
        rows.append({"sample_id": f"t{number}", "media": f"{number}.jpg", "caption": f"table {number}"})
    (folder / "table" / "7.jpg").write_bytes(b"no picture")
    _jsonl(str(folder / "table" / "rows.jsonl"), [*rows, {"sample_id": "gone", "media": "gone.jpg", "caption": "x"}])
    for number in range(12):
        _clip(folder / "folder", number)
        (folder / "folder" / f"clip-{number}.txt").write_text(f"clip {number}")
    (folder / "folder" / "clip-3.mp4").write_bytes(b"\0" * 4000)
    (folder / "moving").mkdir()
    for number in range(3):
        # Only PyAV decodes these, and long enough to be met at it.
        for name, codec in ((f"g{number}.gif", "gif"), (f"a{number}.avi", "mpeg4")):
            write_moving_clip(folder / "moving" / name, codec, shift=number)
            (folder / "moving" / f"{name}.txt").write_text(f"moving {name}")
    for shard in ("s3", "local"):
        members = []
        for number in range(30):
            content = b"torn" if number == 9 else jpeg((10, number, 10))
            members += [(f"{number:03d}.jpg", content), (f"{number:03d}.txt", f"{shard} {number}".encode())]
        write_shard(folder / shard / "shard.tar", members)
    storage.write_bytes("s3://corpus/tars/s3-shard.tar", (folder / "s3" / "shard.tar").read_bytes())
    rows = []
    for number in range(60):
        media = f"photo-{number}.jpg"
        storage.write_bytes(f"s3://corpus/photos/{media}", jpeg((10, 10, number)) if number != 5 else b"\xff\xd8torn")
        rows.append({"sample_id": f"p{number}", "media": media, "caption": f"photo {number}"})
    for number in range(12, 20):
        content = _clip(folder / "scratch", number).read_bytes()
        storage.write_bytes(f"s3://corpus/photos/clip-{number}.mp4", content)
        rows.append({"sample_id": f"c{number}", "media": f"clip-{number}.mp4", "caption": f"far clip {number}"})
    _jsonl("s3://corpus/photos/rows.jsonl", rows)
    sources = [str(folder / "table" / "rows.jsonl"), str(folder / "folder"), str(folder / "local")]
    sources += [*_write_annotations(folder / "annotated"), str(folder / "moving")]
    return [*sources, "s3://corpus/tars", "s3://corpus/photos/rows.jsonl"], 6


def _environment(proxy):
    return {**os.environ, "AWS_ENDPOINT_URL": proxy, "OMP_NUM_THREADS": "1"}


def _prepare(sources, folder, proxy):
    config = folder / "prepare.yaml"
    values = {"sources": [{"path": path} for path in sources], "output": str(folder / "prepared"), "num_frames": 4}
    config.write_text(yaml.safe_dump({**values, "decode_workers": 2}))
    command = [sys.executable, "-m", "jobs.cli", "prepare", "--config", str(config)]
    return subprocess.run(command, cwd=REPOSITORY, env=_environment(proxy), capture_output=True, text=True)


def _children(pid):
    """Process ids and command lines of everything below a process."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it ended
            parents[int(entry.name)] = int(status[1])
    found, grown = {pid}, True
    while grown:
        below = {child for child, parent in parents.items() if parent in found} - found
        found, grown = found | below, bool(below)
    return {child: lines[child] for child in found - {pid}}


def _kill_while_it_runs(process, killed):
    """SIGKILL a decoding child every few seconds, those of some clips at work, and twice a Ray worker that decodes."""
    next_s = time.monotonic() + KILL_EVERY_S
    at_work: Counter = Counter()
    while process.poll() is None:
        time.sleep(0.02)
        below = _children(process.pid)
        children = [pid for pid, line in below.items() if "pipelines.data.media.video.child" in line]
        for pid in children:
            for path in open_files(pid):
                if path.endswith((".gif", ".avi")) and at_work[path] < KILLS_AT_WORK:
                    _kill(pid)
                    at_work[path] += 1
                    killed["at work"] += 1
        if time.monotonic() < next_s:
            continue
        next_s = time.monotonic() + KILL_EVERY_S
        victims = {"child": children}
        if killed["child"] >= 2 and killed["worker"] < 2 and killed["worker"] < killed["child"] // 2:
            victims["worker"] = [pid for pid, line in below.items() if line.startswith("ray::MapWorker")]
        for what, pids in victims.items():
            for pid in pids[:1]:
                _kill(pid)
                killed[what] += 1


def _kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _read(manifests, folder, proxy):
    folder.mkdir()
    values = {"manifests": manifests, "epochs": EPOCHS, "ranks": RANKS, "output": str(folder)}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipelines.data.read_epochs", json.dumps(values)],
            cwd=REPOSITORY,
            env=_environment(proxy),
            stdout=log,
            stderr=log,
        )
    killed: Counter = Counter()
    killer = threading.Thread(target=_kill_while_it_runs, args=(process, killed))
    killer.start()
    process.wait(timeout=900)
    killer.join()
    assert process.returncode == 0, (folder / "log").read_text()[-4000:]
    batches = [json.loads(line) for path in folder.glob("rank-*") for line in path.read_text().splitlines()]
    return batches, json.loads((folder / "accounting.json").read_text()), killed


def test_no_row_is_lost_and_no_healthy_file_is_blamed(stores, tmp_path):
    proxy, counts = stores
    sources, num_bad = _write_sources(tmp_path)
    done = _prepare(sources, tmp_path, proxy)
    assert done.returncode == 0, done.stderr[-3000:]
    used = pq.read_table(tmp_path / "prepared" / "manifest.parquet")
    quarantined = pq.read_table(tmp_path / "prepared" / "quarantine.parquet").to_pylist()
    num_rows = 41 + 12 + 30 + 30 + 68 + 6 * 6 + 6
    line = f"rows in {num_rows} = rows used {num_rows - num_bad} + rows quarantined {num_bad}"
    assert done.stdout.splitlines()[-1] == line, [(row["sample_id"], row["message"]) for row in quarantined]
    assert {row["error_class"] for row in quarantined} <= {"corrupt", "unsupported", "missing"}

    # Between prepare and training files go bad: one local, one clip, one on S3.
    media = dict(zip(used["sample_id"].to_pylist(), used["media"].to_pylist(), strict=True))
    bad = {"t11": "unsupported", "clip-5.mp4": "unsupported", "p20": "missing"}
    for name in ("t11", "clip-5.mp4"):
        Path(media[name]).write_bytes(b"gone bad")
    fsspec.filesystem("s3").rm(media["p20"])
    # A second manifest, in parts on S3, has the first one's photographs once more.
    photos = used.filter(pc.starts_with(used["sample_id"], "t"))
    parts = cut_into_parts(tmp_path / "parts", photos, rows_per_part=10)
    fsspec.filesystem("s3").put(str(parts), "s3://corpus/again/manifest", recursive=True)
    manifests = [str(tmp_path / "prepared"), "s3://corpus/again"]
    before = Counter(counts)
    batches, accounting, killed = _read(manifests, tmp_path / "read", proxy)

    again = photos["sample_id"].to_pylist()
    rows = {f"prepared/{name}" for name in media} | {f"again/{name}" for name in again}
    failed = {f"prepared/{name}" for name in bad} | {"again/t11"}
    for epoch in range(EPOCHS):
        seen = [name for e, _, names, *_ in batches if e == epoch for name in names if name]
        assert sorted(seen) == sorted(rows), "every row once an epoch"
        ok = [n for e, _, names, valid, _ in batches if e == epoch for n, v in zip(names, valid, strict=True) if v]
        blamed = [entry for entry in accounting["quarantined"].values() if entry["sample_id"] not in failed]
        assert set(ok) == rows - failed, f"healthy files are blamed: {blamed}; killed {killed}"
    entries = [(entry["epoch"], entry["sample_id"]) for entry in accounting["quarantined"].values()]
    assert sorted(entries) == sorted((epoch, name) for epoch in range(EPOCHS) for name in failed)
    classes = {entry["sample_id"]: entry["error_class"] for entry in accounting["quarantined"].values()}
    assert classes == {name: bad[name.partition("/")[2]] for name in failed}
    assert accounting["rows_in"] == accounting["rows_used"] + accounting["rows_quarantined"] == EPOCHS * len(rows)
    faults = {fault: counts[fault] - before[fault] for fault in ("served", "503", "cut", "half")}
    print(f"\n{accounting['line']}; SIGKILLed {dict(killed)}; requests while training: {faults}; in all {dict(counts)}")
    assert killed["at work"] >= 6 and killed["child"] >= 2 and killed["worker"] >= 1, (
        f"the drill was over too soon: {killed}"
    )
    assert min(faults.values()) > 0
