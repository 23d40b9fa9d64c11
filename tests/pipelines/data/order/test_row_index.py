import pickle
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.data import schema
from pipelines.data.corpus import manifest_files
from pipelines.data.order import row_index
from pipelines.data.order.row_index import PartRows, TableRows, count_rows, stream_rows
from qformer.errors import UserError
from tests.pipelines.data.builders import manifest
from tests.pipelines.data.manifest_parts import row_contents, write_parts

TRAIN = {("video", "train"): 1500, ("image", "train"): 5000, ("image", "val"): 70}
"""Videos are rows 0 to 1499 of the files, images 1500 to 6499."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts") / "manifest", TRAIN, rows_per_part=2100)


def names(table):
    return table[schema.SAMPLE_ID].to_pylist()


def test_rows_are_taken_in_any_order_images_first(parts):
    rows = PartRows(str(parts), "train")
    assert rows.counts == {"image": 5000, "video": 1500} and count_rows(rows) == 6500
    # Both ends of parts (2,100 rows) and of row groups (1,024), twice the same, images and videos.
    asked = np.array([6499, 0, 2099, 2100, 1023, 1024, 4999, 5000, 0])
    table = rows.take(asked)
    written = [number + 1500 if number < 5000 else number - 5000 for number in asked.tolist()]
    wanted = [row_contents(number) for number in written]
    assert table.select(list(wanted[0])).to_pylist() == wanted
    assert table[schema.KIND].to_pylist() == ["video" if row >= 5000 else "image" for row in asked]
    assert len(rows.take(np.array([], dtype=np.int64))) == 0


def test_all_rows_stream_once_in_order(parts):
    rows = PartRows(str(parts), "train")
    assert [name for table in stream_rows(rows) for name in names(table)] == [
        row_contents(number)[schema.SAMPLE_ID] for number in [*range(1500, 6500), *range(1500)]
    ]


def test_split_and_kind_choose_parts(parts):
    assert PartRows(str(parts), "train", "video").counts == {"video": 1500}
    assert PartRows(str(parts)).counts == {"image": 5070, "video": 1500}
    assert names(PartRows(str(parts), "val").take(np.array([0]))) == [row_contents(6500)[schema.SAMPLE_ID]]
    with pytest.raises(UserError, match="split 'test' of .* is empty; it has train, val"):
        PartRows(str(parts), "test")
    with pytest.raises(UserError, match="holds no videos in split 'val'"):
        PartRows(str(parts), "val", "video")


def test_only_what_is_needed_is_read_and_the_latest_is_kept(parts, monkeypatch):
    rows = PartRows(str(parts), "train")
    everything = sum(path.stat().st_size for path in parts.iterdir())
    rows.take(np.array([10]))
    once = rows.bytes_read
    assert 0 < once < everything / 2
    rows.take(np.array([10, 900, 11]))
    assert rows.bytes_read == once, "the same row group again"
    rows.take(np.array([1500]))
    assert once < rows.bytes_read < 2 * once, "another group of the same part needs no footer"
    copied = pickle.loads(pickle.dumps(rows))
    assert copied.bytes_read == 0 and names(copied.take(np.array([7]))) == names(rows.take(np.array([7])))
    monkeypatch.setattr(row_index, "_GROUP_CACHE_BYTES", 1)
    monkeypatch.setattr(row_index, "_FOOTER_CACHE_BYTES", 1)
    poor = PartRows(str(parts), "train")
    for _ in range(2):
        assert names(poor.take(np.array([10, 6000, 10]))) == names(rows.take(np.array([10, 6000, 10])))
    assert poor.bytes_read > 2 * once, "nothing but the newest is kept"


def test_parts_lie_on_any_filesystem(parts):
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(parts), "/corpus/manifest", recursive=True)
    remote, local = PartRows("memory://corpus/manifest", "train"), PartRows(str(parts), "train")
    asked = np.array([6000, 17, 4000])
    assert remote.take(asked).equals(local.take(asked))
    assert remote.fingerprint == local.fingerprint
    assert remote.bytes_read == local.bytes_read
    filesystem.rm("/corpus", recursive=True)


class SlowFileSystem(MemoryFileSystem):
    """Answers every read after 50 ms, as a remote store; `slow://`."""

    protocol = "slow"
    latency_s = 0.05
    store, pseudo_dirs = {}, [""]
    num_reads = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("slow://", "/"))

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        return _SlowFile(file) if mode == "rb" else file


class _SlowFile:
    def __init__(self, file):
        self._file = file

    def read(self, size=-1):
        time.sleep(SlowFileSystem.latency_s)
        SlowFileSystem.num_reads += 1
        return self._file.read(size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_batch_from_a_remote_store_waits_for_many_parts_at_once(tmp_path):
    """32 rows of 40 parts: one read after the other, footers and groups would take some 4 s."""
    folder = write_parts(tmp_path / "manifest", {("image", "train"): 40 * 50}, rows_per_part=50)
    fsspec.register_implementation("slow", SlowFileSystem, clobber=True)
    filesystem = fsspec.filesystem("slow")
    filesystem.put(str(folder), "/corpus", recursive=True)
    rows = PartRows("slow://corpus", "train")
    asked = np.random.default_rng(0).permutation(40)[:32].astype(np.int64) * 50 + 7
    SlowFileSystem.num_reads, begun_s = 0, time.monotonic()
    table = rows.take(asked)
    took_s = time.monotonic() - begun_s
    assert names(table) == [row_contents(row)[schema.SAMPLE_ID] for row in asked.tolist()]
    assert SlowFileSystem.num_reads >= 2 * 32
    assert took_s < 32 * 2 * SlowFileSystem.latency_s / 3, f"{SlowFileSystem.num_reads} reads in {took_s:.2f} s"
    begun_s = time.monotonic()
    assert rows.take(asked[::-1]).equals(table.take(pa.array(np.arange(32)[::-1])))
    assert time.monotonic() - begun_s < SlowFileSystem.latency_s, "all of it is kept"
    filesystem.rm("/corpus", recursive=True)


def test_rows_that_hold_their_media_are_cut_by_bytes(tmp_path, monkeypatch):
    """A row is reached without reading many megabytes beside it, and the manifest is never held as a whole."""
    monkeypatch.setattr(manifest_files, "ROW_GROUP_MEDIA_BYTES", 10_000)
    monkeypatch.setattr(manifest_files, "PART_MEDIA_BYTES", 100_000)
    monkeypatch.setattr(manifest_files, "MAX_FILE_MEDIA_BYTES", 150_000)
    chance = np.random.default_rng(0)
    sizes = [*chance.integers(100, 4000, 150).tolist(), 35_000, 10, 20]
    rows = [{"sample_id": f"s{i}", "media_bytes": chance.bytes(size)} for i, size in enumerate(sizes)]
    table = manifest(rows)
    manifest_files.write_manifest((table.slice(at, 40) for at in range(0, len(table), 40)), len(table), str(tmp_path))
    files = manifest_files.manifest_files(str(tmp_path))
    assert len(files) > 2 and not (tmp_path / "manifest.parquet").exists()
    for path in files:
        parquet = pq.ParquetFile(path)
        for group in range(parquet.num_row_groups):
            *others, last = parquet.read_row_group(group)["media_bytes"].to_pylist()
            assert sum(map(len, others)) < 10_000, "the last row is the one that reaches the limit"
            is_last = group == parquet.num_row_groups - 1
            assert is_last or sum(map(len, others)) + len(last) >= 10_000
        assert sum(len(one) for one in parquet.read()["media_bytes"].to_pylist()) < 100_000 + 40 * 4000 + 35_000
    assert pa.concat_tables(manifest_files.iterate_rows(str(tmp_path))).equals(table)
    found = PartRows(str(tmp_path / "manifest"))
    assert names(found.take(np.array([100]))) == ["s100"] and found.bytes_read < 2**16 + 16_000
    # The single file that grew stays one for small media, and becomes parts when it holds too much.
    small = manifest([{"sample_id": "t0", "media_bytes": b"x" * 100}])
    manifest_files.write_manifest([small], 1, str(tmp_path / "grown"))
    assert [path.endswith("/manifest.parquet") for path in manifest_files.manifest_files(str(tmp_path / "grown"))] == [
        True
    ]
    manifest_files.append_rows(table, str(tmp_path / "grown"))
    assert len(manifest_files.manifest_files(str(tmp_path / "grown"))) > 2
    whole = pa.concat_tables([small, table])
    assert pa.concat_tables(manifest_files.iterate_rows(str(tmp_path / "grown"))).equals(whole)


def test_the_fingerprint_follows_the_rows(parts, tmp_path):
    other = write_parts(tmp_path / "manifest", {**TRAIN, ("image", "train"): 5001}, rows_per_part=2100)
    assert PartRows(str(other), "train").fingerprint != PartRows(str(parts), "train").fingerprint
    assert PartRows(str(other), "train", "video").fingerprint == PartRows(str(parts), "train", "video").fingerprint
    rows = [{"sample_id": name, "media": f"/{name}.jpg"} for name in "abc"]
    assert TableRows(manifest(rows)).fingerprint == TableRows(manifest(rows)).fingerprint
    assert TableRows(manifest(rows)).fingerprint != TableRows(manifest(rows[::-1])).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"media": "/other.jpg"},
        {"captions": ["a cat", "a dog"]},
        {"captions": ["a dog a cat"]},
        {"instructions": ["What is it?"]},
        {"start_s": 1.0},
        {"end_s": 1.0},
        {"sample_id": "x"},
        {"kind": "video"},
        {"media_bytes": b"1"},
    ],
)
def test_the_fingerprint_of_a_table_covers_all_that_training_sees(change):
    """A resumed run whose manifest has another caption, or another file under an old id, goes on with other data."""
    row = {"sample_id": "a", "media": "/a.jpg", "captions": ["a dog", "a cat"]}
    rows = [row, {**row, "sample_id": "b"}]
    changed = [{**row, **change}, rows[1]]
    assert TableRows(manifest(rows)).fingerprint != TableRows(manifest(changed)).fingerprint


def test_a_corpus_that_was_moved_as_a_whole_is_the_same():
    here, there = ([{"sample_id": "a", "media": f"{root}/images/a.jpg"}] for root in ("/old", "s3://bucket/new"))
    assert TableRows(manifest(here)).fingerprint == TableRows(manifest(there)).fingerprint


def test_a_manifest_that_was_changed_is_refused(tmp_path):
    folder = write_parts(tmp_path / "manifest", {("image", "train"): 30}, rows_per_part=10)
    (folder / "part-image-train-00001.parquet").write_bytes((folder / "part-image-train-00002.parquet").read_bytes())
    PartRows(str(folder)).take(np.array([15]))  # as many rows, so that nothing tells
    write_parts(tmp_path / "other", {("image", "train"): 7}, rows_per_part=10)
    (tmp_path / "other" / "part-image-train-00000.parquet").rename(folder / "part-image-train-00001.parquet")
    with pytest.raises(UserError, match="has 7 rows where index.parquet says 10"):
        PartRows(str(folder)).take(np.array([15]))
    (folder / "part-image-train-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cannot be read: .*part-image-train-00001.parquet is damaged"):
        PartRows(str(folder)).take(np.array([15]))
    (folder / "part-image-train-00001.parquet").unlink()
    with pytest.raises(UserError, match="lacks part-image-train-00001.parquet"):
        PartRows(str(folder))


def test_a_table_is_numbered_by_kind():
    kinds = ["video", "image", "video", "image"]
    rows = TableRows(manifest([{"sample_id": f"s{i}", "media": "x", "kind": kind} for i, kind in enumerate(kinds)]))
    assert rows.counts == {"image": 2, "video": 2}
    assert names(rows.take(np.array([3, 0, 1, 2, 0]))) == ["s2", "s1", "s3", "s0", "s1"]
    assert [len(table) for table in stream_rows(rows)] == [4]
