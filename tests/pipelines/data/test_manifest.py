import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import schema
from pipelines.data.manifest import read_manifest, read_source, write_table
from qformer.errors import UserError
from tests.pipelines.data.builders import jpeg, manifest

ROWS = [
    {"image": "img/a.jpg", "captions": ["one", "two"], "licence": "CC0"},
    {"image": "img/b.mp4", "captions": "three", "split": "test"},
]


def _jsonl(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _csv(folder, text):
    path = folder / "rows.csv"
    path.write_text(text)
    return str(path)


def test_jsonl(tmp_path):
    rows = read_source(_jsonl(tmp_path, ROWS), columns={"media": "image"}).to_pylist()
    assert [row["sample_id"] for row in rows] == ["img/a.jpg", "img/b.mp4"]
    assert [row["media"] for row in rows] == [str(tmp_path / "img/a.jpg"), str(tmp_path / "img/b.mp4")]
    assert [row["kind"] for row in rows] == ["image", "video"]
    assert [row["captions"] for row in rows] == [["one", "two"], ["three"]]
    assert [row["split"] for row in rows] == ["train", "test"]
    assert [row["licence"] for row in rows] == ["CC0", None]


def test_csv_with_one_caption_a_row(tmp_path):
    """The same media in several rows, as many caption files have it: every row stays, with an id of its own."""
    path = _csv(tmp_path, 'media,caption,start_s\na.jpg,"one, two",\na.jpg,three,\nb.mp4,four,1.5\n')
    rows = read_source(path).to_pylist()
    assert [row["sample_id"] for row in rows] == ["a.jpg", "a.jpg#2", "b.mp4"]
    assert [row["captions"] for row in rows] == [["one, two"], ["three"], ["four"]]
    assert [row["start_s"] for row in rows] == [None, None, 1.5]


@pytest.mark.parametrize(
    ("captions", "instruction", "expected"),
    [
        (["red", "two"], "what is there", (["red", "two"], ["what is there"])),  # one for all
        (["red", "two"], ["which colour ", "how many"], (["red", "two"], ["which colour", "how many"])),
        (["red", "  ", "two"], ["a", "b", "c"], (["red", "two"], ["a", "c"])),  # an empty answer takes its question
        (["red", "two"], ["", "how many"], (["red", "two"], ["", "how many"])),
        (["red"], ["", ""][:1], (["red"], [])),
        (["red"], None, (["red"], [])),
    ],
)
@pytest.mark.parametrize("column", ["instruction", "instructions"])
def test_instructions_stay_with_their_captions(tmp_path, column, captions, instruction, expected):
    path = _jsonl(tmp_path, [{"media": "a.jpg", "captions": captions, column: instruction}])
    (row,) = read_source(path).to_pylist()
    assert (row["captions"], row["instructions"]) == expected


def test_csv_with_a_list_of_instructions(tmp_path):
    path = _csv(
        tmp_path, 'media,captions,instructions\na.jpg,"[""1"", ""2""]","[""one?"", ""two?""]"\nb.jpg,3,three?\n'
    )
    assert read_source(path)["instructions"].to_pylist() == [["one?", "two?"], ["three?"]]


def test_csv_with_a_list_of_captions(tmp_path):
    path = _csv(tmp_path, 'media,captions\na.jpg,"[""one"", ""two""]"\nb.jpg,plain\n')
    assert read_source(path)[schema.CAPTIONS].to_pylist() == [["one", "two"], ["plain"]]


def test_parquet_with_bytes(tmp_path):
    pq.write_table(pa.table({"id": [7], "picture": [jpeg()]}), tmp_path / "a.parquet")
    columns = {"sample_id": "id", "media_bytes": "picture"}
    (row,) = read_source(str(tmp_path / "a.parquet"), columns=columns).to_pylist()
    assert (row["sample_id"], row["media"], row["kind"]) == ("7", None, "image")
    assert row["media_bytes"] == jpeg()


def test_folder(tmp_path):
    for name in ("b/x.mp4", "a.JPG", "b/-dash .webm", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rows = read_source(str(tmp_path)).to_pylist()
    assert [(row["sample_id"], row["kind"]) for row in rows] == [
        ("a.JPG", "image"),
        ("b/-dash .webm", "video"),
        ("b/x.mp4", "video"),
    ]
    assert rows[1]["media"] == str(tmp_path / "b/-dash .webm")


def test_paths_and_uris_that_are_complete_stay(tmp_path):
    names = ["/elsewhere/a.jpg", "s3://bucket/a.jpg", "file:///elsewhere/b.jpg"]
    path = _jsonl(tmp_path, [{"media": name} for name in names])
    assert read_source(path)[schema.MEDIA].to_pylist() == [
        "/elsewhere/a.jpg",
        "s3://bucket/a.jpg",
        "/elsewhere/b.jpg",
    ]
    relative = _jsonl(tmp_path, [{"media": "a.jpg"}])
    assert read_source(relative, media_root="s3://bucket/x")[schema.MEDIA].to_pylist() == ["s3://bucket/x/a.jpg"]


def test_kind_by_content_when_the_name_says_nothing(tmp_path):
    (tmp_path / "picture").write_bytes(jpeg())
    (tmp_path / "clip").write_bytes(b"\x1aE\xdf\xa3" + bytes(40))
    path = _jsonl(tmp_path, [{"media": "picture"}, {"media": "clip"}, {"media": "gone"}])
    assert read_source(path)[schema.KIND].to_pylist() == ["image", "video", "image"]


def test_a_written_manifest_is_read_again(tmp_path):
    table = manifest([{"sample_id": "a", "media": "/a.jpg"}, {"sample_id": "b", "media": "/b.jpg", "split": "test"}])
    write_table(table, str(tmp_path / "out" / "manifest.parquet"))
    assert read_manifest(str(tmp_path / "out"), needs_captions=True).equals(table)
    assert read_manifest(str(tmp_path / "out" / "manifest.parquet"), split="test").num_rows == 1


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (ROWS, {}, ["'media'", "image", "columns"]),
        (ROWS, {"columns": {"media": "imgae"}}, ["'imgae'", "'image'"]),
        (ROWS, {"columns": {"meda": "image"}}, ["'meda'", "'media'"]),
        ([{"media": "a.jpg", "kind": "vidio"}], {}, ["'vidio'", "'video'"]),
        ([{"media": "a.jpg", "instruction": [1]}], {}, ["instructions", "[1]"]),
        (
            [{"media": "a.jpg", "captions": ["x"], "instruction": ["first", "second"]}],
            {},
            ["1 captions but 2 instructions", "'first'", "one for all captions, or one for each"],
        ),
        ([{"media": "a.jpg", "captions": [1]}], {}, ["captions", "[1]"]),
        ([{"media": "a.mp4", "start_s": "soon"}], {}, ["start_s", "'soon'"]),
    ],
)
def test_mistakes_name_the_value_and_the_fix(tmp_path, rows, options, words):
    path = _jsonl(tmp_path, rows)
    with pytest.raises(UserError) as caught:
        read_source(path, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in [path, *words]), message


def test_unreadable_tables(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    (tmp_path / "bad.jsonl").write_text('{"media": "a.jpg"}\n{oops\n')
    (tmp_path / "table.xyz").touch()
    (tmp_path / "empty").mkdir()
    for name, words in {
        "gone.jsonl": "does not exist",
        "bad.parquet": "cannot read",
        "bad.jsonl": "line 2",
        "table.xyz": "set format",
        "empty": "no image or video files",
    }.items():
        with pytest.raises(UserError, match=words):
            read_source(str(tmp_path / name))


def test_manifests_that_do_not_fit_the_job(tmp_path):
    path = _jsonl(tmp_path, [{"media": "a.jpg"}, {"media": "b.jpg", "split": "val"}])
    with pytest.raises(UserError, match="'test'.*train, val"):
        read_manifest(path, split="test")
    with pytest.raises(UserError, match=r"2 of 2 rows have no caption.*a\.jpg"):
        read_manifest(path, needs_captions=True)
    with pytest.raises(UserError, match="'x' occurs more than once"):
        read_manifest(_jsonl(tmp_path, [{"media": "a.jpg", "sample_id": "x"}] * 2))
    with pytest.raises(UserError, match="no rows"):
        read_manifest(_empty(tmp_path))


def _empty(folder):
    pq.write_table(schema.MANIFEST_SCHEMA.empty_table(), folder / "empty.parquet")
    return str(folder / "empty.parquet")
