import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import schema, storage
from pipelines.data.corpus import manifest_files
from pipelines.data.corpus.manifest import read_manifest
from pipelines.data.corpus.manifest_files import append_rows, iterate_rows, read_index, write_manifest
from pipelines.data.corpus.sources.raw import Source
from pipelines.data.corpus.sources.source import read_source
from qformer.errors import UserError
from tests.pipelines.data.builders import manifest


def _jsonl(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _rows(count, **values):
    return manifest([{"sample_id": f"s{n}", "media": f"/{n}.jpg", "instructions": [], **values} for n in range(count)])


@pytest.fixture
def small_files(monkeypatch):
    """A few rows stand for a million: the form for many rows, at the cost of few."""
    monkeypatch.setattr(manifest_files, "MAX_FILE_ROWS", 100)
    monkeypatch.setattr(manifest_files, "PART_ROWS", 100)
    monkeypatch.setattr(manifest_files, "ROW_GROUP_ROWS", 16)


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_a_written_manifest_is_read_again(tmp_path, scheme):
    output = str(tmp_path / "out") if scheme == "local" else f"memory://{tmp_path.name}/out"
    table = pa.concat_tables([_rows(3), _rows(1, sample_id="t", split="test")])
    write_manifest([table.slice(0, 1), table.slice(1)], len(table), output)
    assert read_manifest(output, needs_captions=True).equals(table)
    assert read_manifest(storage.join(output, "manifest.parquet"), split="test").num_rows == 1
    append_rows(_rows(1, sample_id="u"), output)
    assert read_manifest(output)[schema.SAMPLE_ID].to_pylist() == ["s0", "s1", "s2", "t", "u"]


def test_a_manifest_written_by_others_or_before(tmp_path):
    """A table without our mark is checked row by row; a marked one of an older version lacks columns."""
    table = _rows(2)
    pq.write_table(table.drop_columns([schema.SOURCE, schema.INSTRUCTIONS]), tmp_path / "plain.parquet")
    assert read_manifest(str(tmp_path / "plain.parquet")).equals(table)
    write_manifest([table], 2, str(tmp_path))
    old = pq.read_table(tmp_path / "manifest.parquet").drop_columns([schema.SOURCE, schema.INSTRUCTIONS])
    pq.write_table(old, tmp_path / "old.parquet")
    assert manifest_files.is_marked(str(tmp_path / "old.parquet"))
    assert read_manifest(str(tmp_path / "old.parquet")).equals(table)


@pytest.mark.usefixtures("small_files")
def test_many_rows_go_into_parts_of_one_kind_and_split(tmp_path):
    blocks = []
    for start in range(0, 390, 39):
        rows = [
            {
                "sample_id": f"s{n}",
                "media": f"/{n}",
                "kind": "video" if n % 3 == 0 else "image",
                "split": "a/b" if n % 13 == 0 else "train",
                "instructions": [],
            }
            for n in range(start, start + 39)
        ]
        blocks.append(manifest(rows))
    output = str(tmp_path)
    write_manifest(blocks, 390, output)
    index = read_index(str(tmp_path / "manifest")).to_pylist()
    assert sorted(found.name for found in (tmp_path / "manifest").iterdir()) == sorted(
        ["index.parquet", *(row["file"] for row in index)]
    )
    assert sorted((row["file"], row["split"], row["rows"]) for row in index) == [
        ("part-image-a_b-00000.parquet", "a/b", 20),
        ("part-image-train-00000.parquet", "train", 100),
        ("part-image-train-00001.parquet", "train", 100),
        ("part-image-train-00002.parquet", "train", 40),
        ("part-video-a_b-00000.parquet", "a/b", 10),
        ("part-video-train-00000.parquet", "train", 100),
        ("part-video-train-00001.parquet", "train", 20),
    ]
    for row in index:
        file = pq.ParquetFile(tmp_path / "manifest" / row["file"])
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        assert sum(sizes) == row["rows"] and all(size == 16 for size in sizes[:-1])
        table = file.read()
        assert set(table["kind"].to_pylist()) == {row["kind"]} and set(table["split"].to_pylist()) == {row["split"]}
    everything = pa.concat_tables(blocks).sort_by("sample_id")
    assert read_manifest(output).sort_by("sample_id").equals(everything)
    assert read_manifest(str(tmp_path / "manifest"), split="a/b").num_rows == 30
    assert pa.concat_tables(iterate_rows(output)).sort_by("sample_id").equals(everything)


@pytest.mark.usefixtures("small_files")
def test_rows_are_added_to_parts_too(tmp_path):
    output = str(tmp_path)
    write_manifest([_rows(95)], 95, output)
    assert not (tmp_path / "manifest").exists()
    append_rows(_rows(10).set_column(0, schema.MANIFEST_SCHEMA[0], [[f"t{n}" for n in range(10)]]), output)
    assert not (tmp_path / "manifest.parquet").exists()
    append_rows(_rows(1, sample_id="u"), output)
    names = [f"s{n}" for n in range(95)] + [f"t{n}" for n in range(10)] + ["u"]
    assert read_manifest(output)[schema.SAMPLE_ID].to_pylist() == names
    files = read_index(str(tmp_path / "manifest"))["file"].to_pylist()
    assert files == [f"part-image-train-{part:05d}.parquet" for part in range(3)]


@pytest.mark.usefixtures("small_files")
def test_a_manifest_that_was_not_finished_is_none(tmp_path):
    def broken():
        yield _rows(150)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(broken(), 300, str(tmp_path))
    assert manifest_files.manifest_files(str(tmp_path)) == []


def test_what_prepare_wrote_is_a_source(tmp_path):
    """And the tables beside the manifest are none of it."""
    write_manifest([_rows(2, source="old")], 2, str(tmp_path))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "quarantine.parquet")
    (block,) = read_source(Source(path=str(tmp_path), name="new"))
    assert block.rows[schema.SAMPLE_ID].to_pylist() == ["s0", "s1"] and not block.failures
    assert block.rows[schema.SOURCE].to_pylist() == ["new", "new"]


def test_manifests_that_do_not_fit_the_job(tmp_path):
    path = _jsonl(tmp_path, [{"media": "a.jpg"}, {"media": "b.jpg", "split": "val"}])
    with pytest.raises(UserError, match="'test'.*train, val"):
        read_manifest(path, split="test")
    with pytest.raises(UserError, match=r"2 of 2 rows have no caption.*a\.jpg"):
        read_manifest(path, needs_captions=True)
    with pytest.raises(UserError, match="holds no videos"):
        read_manifest(path, split="val", kind="video")
    with pytest.raises(UserError, match="line 2.*'x' was used by an earlier row.*qformer prepare"):
        read_manifest(_jsonl(tmp_path, [{"media": "a.jpg", "sample_id": "x"}] * 2))
    with pytest.raises(UserError, match="line 1.*vidio"):
        read_manifest(_jsonl(tmp_path, [{"media": "a.jpg", "kind": "vidio"}]))
    write_manifest([_rows(1), _rows(1)], 2, str(tmp_path))
    with pytest.raises(UserError, match="'s0' occurs more than once"):
        read_manifest(str(tmp_path))
    write_manifest([], 0, str(tmp_path))
    with pytest.raises(UserError, match="no rows"):
        read_manifest(str(tmp_path))
