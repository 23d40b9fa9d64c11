import pickle

import fsspec
import numpy as np
import pytest

from pipelines.data import row_index, schema
from pipelines.data.row_index import PartRows, TableRows, streamed, total
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
    assert rows.counts == {"image": 5000, "video": 1500} and total(rows) == 6500
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
    assert [name for table in streamed(rows) for name in names(table)] == [
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
    monkeypatch.setattr(row_index, "_KEPT_GROUP_BYTES", 1)
    monkeypatch.setattr(row_index, "_KEPT_FOOTER_BYTES", 1)
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


def test_the_fingerprint_follows_the_rows(parts, tmp_path):
    other = write_parts(tmp_path / "manifest", {**TRAIN, ("image", "train"): 5001}, rows_per_part=2100)
    assert PartRows(str(other), "train").fingerprint != PartRows(str(parts), "train").fingerprint
    assert PartRows(str(other), "train", "video").fingerprint == PartRows(str(parts), "train", "video").fingerprint
    rows = [{"sample_id": name, "media": f"/{name}.jpg"} for name in "abc"]
    assert TableRows(manifest(rows)).fingerprint == TableRows(manifest(rows)).fingerprint
    assert TableRows(manifest(rows)).fingerprint != TableRows(manifest(rows[::-1])).fingerprint


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
    assert [len(table) for table in streamed(rows)] == [4]
