import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpus.name_set import NameSet
from pipelines.data.corpus.sources.raw import Source
from pipelines.data.corpus.sources.source import read_source
from qformer.errors import UserError
from tests.pipelines.data.builders import jpeg
from tests.pipelines.data.corpus.sources.reading import read

ROWS = [
    {"image": "img/a.jpg", "captions": ["one", "two"], "licence": "CC0"},
    {"image": "img/b.mp4", "captions": "three", "split": "test"},
]


def _jsonl(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _csv(folder, text):
    path = folder / "rows.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_jsonl(tmp_path):
    rows, failures = read(_jsonl(tmp_path, ROWS), columns={"media": "image"}, name="photos")
    assert failures == []
    assert [row["sample_id"] for row in rows] == ["img/a.jpg", "img/b.mp4"]
    assert [row["media"] for row in rows] == [str(tmp_path / "img/a.jpg"), str(tmp_path / "img/b.mp4")]
    assert [row["kind"] for row in rows] == ["image", "video"]
    assert [row["captions"] for row in rows] == [["one", "two"], ["three"]]
    assert [row["split"] for row in rows] == ["train", "test"]
    assert [row["licence"] for row in rows] == ["CC0", None]
    assert [row["source"] for row in rows] == ["photos", "photos"]


def test_csv_with_one_caption_a_row(tmp_path):
    """The same media in several rows, as many caption files have it: every row stays, with an id of its own."""
    rows, _ = read(_csv(tmp_path, 'media,caption,start_s\na.jpg,"one, two",\na.jpg,three,\nb.mp4,four,1.5\n'))
    assert [row["sample_id"] for row in rows] == ["a.jpg", "a.jpg#2", "b.mp4"]
    assert [row["captions"] for row in rows] == [["one, two"], ["three"], ["four"]]
    assert [row["start_s"] for row in rows] == [None, None, 1.5]


def test_csv_with_lists_of_captions_and_instructions(tmp_path):
    text = 'media,captions,instruction\na.jpg,"[""one"", ""two""]",what?\nb.jpg,[music] plays,\n'
    rows, _ = read(_csv(tmp_path, text))
    assert [row["captions"] for row in rows] == [["one", "two"], ["[music] plays"]]
    assert [row["instructions"] for row in rows] == [["what?"], []]


@pytest.mark.parametrize(
    ("captions", "instruction", "expected"),
    [
        (["red", "two"], "what is there", (["red", "two"], ["what is there"])),  # one for all
        (["red", "two"], ["which colour ", "how many"], (["red", "two"], ["which colour", "how many"])),
        (["red", "  ", "two"], ["a", "b", "c"], (["red", "two"], ["a", "c"])),  # an empty answer takes its question
        (["red", "two"], ["", "how many"], (["red", "two"], ["", "how many"])),
        (["red"], [""], (["red"], [])),
        (["red"], None, (["red"], [])),
    ],
)
@pytest.mark.parametrize("column", ["instruction", "instructions"])
def test_instructions_stay_with_their_captions(tmp_path, column, captions, instruction, expected):
    ((row,), _) = read(_jsonl(tmp_path, [{"media": "a.jpg", "captions": captions, column: instruction}]))
    assert (row["captions"], row["instructions"]) == expected


def test_csv_with_a_list_of_instructions(tmp_path):
    path = _csv(
        tmp_path, 'media,captions,instructions\na.jpg,"[""1"", ""2""]","[""one?"", ""two?""]"\nb.jpg,3,three?\n'
    )
    assert [row["instructions"] for row in read(path)[0]] == [["one?", "two?"], ["three?"]]


def test_parquet_with_bytes(tmp_path):
    pq.write_table(pa.table({"id": [7], "picture": [jpeg()]}), tmp_path / "a.parquet")
    ((row,), _) = read(tmp_path / "a.parquet", columns={"sample_id": "id", "media_bytes": "picture"})
    assert (row["sample_id"], row["media"], row["kind"]) == ("7", None, "image")
    assert row["media_bytes"] == jpeg()


def test_parquet_with_images_as_hugging_face_keeps_them(tmp_path):
    pictures = [{"bytes": jpeg(), "path": None}, {"bytes": None, "path": "b.jpg"}]
    pq.write_table(pa.table({"image": pictures, "caption": ["one", "two"]}), tmp_path / "a.parquet")
    rows, failures = read(tmp_path / "a.parquet", columns={"media": "image"})
    assert failures == []
    assert [row["media_bytes"] for row in rows] == [jpeg(), None]
    assert [row["media"] for row in rows] == [None, str(tmp_path / "b.jpg")]


def test_a_folder_of_parquet_files(tmp_path):
    for part, name in enumerate(("one.jpg", "two.jpg")):
        (tmp_path / "data" / f"y={part}").mkdir(parents=True)
        pq.write_table(pa.table({"media": [name]}), tmp_path / "data" / f"y={part}" / "part-0.parquet")
    (tmp_path / "data" / "_metadata.parquet").write_bytes(b"not read")
    rows, _ = read(tmp_path / "data")
    assert [row["sample_id"] for row in rows] == ["one.jpg", "two.jpg"]
    assert rows[0]["media"] == str(tmp_path / "data" / "one.jpg")


def test_paths_and_uris_that_are_complete_stay(tmp_path):
    names = ["/elsewhere/a.jpg", "s3://bucket/a.jpg", "file:///elsewhere/b.jpg", "local:///elsewhere/c.jpg"]
    rows, _ = read(_jsonl(tmp_path, [{"media": name} for name in names]))
    assert [row["media"] for row in rows] == ["/elsewhere/a.jpg", names[1], "/elsewhere/b.jpg", "/elsewhere/c.jpg"]
    relative = _jsonl(tmp_path, [{"media": "x/../a.jpg"}])
    assert read(relative, media_root="s3://bucket/x")[0][0]["media"] == "s3://bucket/x/x/../a.jpg"


def test_kind_by_content_when_the_name_says_nothing(tmp_path):
    (tmp_path / "picture").write_bytes(jpeg())
    (tmp_path / "clip").write_bytes(b"\x1aE\xdf\xa3" + bytes(40))
    os.mkfifo(tmp_path / "pipe")  # must not be opened
    rows, _ = read(_jsonl(tmp_path, [{"media": name} for name in ("picture", "clip", "gone", "pipe")]))
    assert [row["kind"] for row in rows] == ["image", "video", "image", "image"]


@pytest.mark.parametrize(
    ("row", "error_class", "words"),
    [
        ({"media": None}, "config", "no media"),
        ({"media": ""}, "config", "no media"),
        ({"media": 3}, "config", "int"),
        ({"media": "../../etc/passwd"}, "config", "leaves the media root"),
        ({"media": "a/../../b.jpg"}, "config", "leaves the media root"),
        ({"media": "a\0.jpg"}, "config", "not a path"),
        ({"media": "simplecache::local:///a.jpg"}, "config", "another file system"),
        ({"media": "a.jpg", "kind": "vidio"}, "config", "'video'"),
        ({"media": "a.jpg", "captions": [1]}, "config", "[1]"),
        ({"media": "a.jpg", "captions": {"text": "a"}}, "config", "captions"),
        ({"media": "a.jpg", "captions": ["half a pair \ud800"]}, "corrupt", "not UTF-8"),
        ({"media": "a.jpg", "captions": ["a", "b"], "instructions": ["x", "y", "z"]}, "config", "3 instructions"),
        ({"media": "a.mp4", "start_s": "soon"}, "config", "'soon'"),
        ({"media": "a.mp4", "start_s": -1}, "config", "0 or more"),
        ({"media": "a.mp4", "end_s": 1e999}, "config", "inf"),
        ({"media": "a.mp4", "start_s": float("nan")}, "config", "nan"),
        ({"media": "a.mp4", "start_s": 5, "end_s": 5}, "config", "not after"),
    ],
)
def test_a_wrong_row_is_reported_and_the_others_stay(tmp_path, row, error_class, words):
    path = _jsonl(tmp_path, [{"media": "first.jpg"}, row, {"media": "last.jpg"}])
    rows, (failure,) = read(path, name="s")
    assert [row["sample_id"] for row in rows] == ["first.jpg", "last.jpg"]
    assert (failure.sample_id, failure.stage, failure.error_class) == ("s:2", "manifest", error_class)
    assert f"{path}, line 2" in failure.message and words in failure.message and "\n" not in failure.message


def test_lines_that_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"media": "a.jpg"}\n{oops\n[1]\n\n{"media": "caf\xe9.jpg"}\n{"media": "b.jpg", "x": "\xff"}\n'
        + b"[" * 100_000
        + b"\n"
    )
    rows, failures = read(path, name="s")
    assert [row["sample_id"] for row in rows] == ["a.jpg", "b.jpg"]  # what nobody reads may be anything
    reasons = {failure.sample_id: (failure.error_class, failure.message) for failure in failures}
    assert sorted(reasons) == ["s:2", "s:3", "s:5", "s:7"]
    assert {error_class for error_class, _ in reasons.values()} == {"corrupt"}
    assert "not UTF-8" in reasons["s:5"][1] and "caf\\udce9" in reasons["s:5"][1]


def test_csv_rows_that_are_no_rows(tmp_path):
    text = b'media,caption\na.jpg,one\nb.jpg\nc.jpg,two,three\n"d"x.jpg,four\ne.jpg,caf\xe9\n\nf.jpg,"five\nlines"\n'
    rows, failures = read(_csv(tmp_path, text), name="s")
    assert [row["sample_id"] for row in rows] == ["a.jpg", "f.jpg"]
    assert [failure.sample_id for failure in failures] == ["s:2", "s:3", "s:4", "s:5"]
    assert "line 5" in failures[2].message and "not UTF-8" in failures[3].message


def test_parquet_text_that_is_no_utf8(tmp_path):
    """Arrow writes and reads such text without a word, and raises for the whole batch when it is looked at."""
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 4, 8)))
    captions = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"finecaf\xe9"))
    lists = pa.ListArray.from_arrays([0, 1, 2], captions)
    pq.write_table(pa.table({"media": ["a.jpg", "b.jpg"], "captions": lists}), tmp_path / "a.parquet")
    rows, (failure,) = read(tmp_path / "a.parquet", name="s")
    assert [(row["sample_id"], row["captions"]) for row in rows] == [("a.jpg", ["fine"])]
    assert (failure.sample_id, failure.error_class) == ("s:2", "corrupt") and "not UTF-8" in failure.message


def test_ids_are_unique_over_all_sources(tmp_path):
    """Given ids that repeat are failures; media paths that repeat are not, for different folders may share names."""
    used_ids = NameSet()
    got = []
    for name, rows in {
        "one": [{"media": "a.jpg"}, {"media": "a.jpg"}, {"media": "b.jpg", "sample_id": "x"}],
        "two": [{"media": "a.jpg"}, {"media": "a.jpg"}, {"media": "c.jpg", "sample_id": "x"}],
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        blocks = list(read_source(Source(path=str(_jsonl(folder, rows)), name=name), used_ids))
        got += [row["sample_id"] for block in blocks for row in block.rows.to_pylist()]
        failures = [failure for block in blocks for failure in block.failures]
    assert got == ["a.jpg", "a.jpg#2", "x", "a.jpg#1", "two/a.jpg#2"]
    assert [(failure.sample_id, failure.error_class) for failure in failures] == [("two:3", "config")]
    assert "sample_id 'x'" in failures[0].message


def test_blocks_are_bounded(tmp_path):
    pq.write_table(pa.table({"media": [f"{n}.jpg" for n in range(2500)]}), tmp_path / "a.parquet")
    blocks = list(read_source(Source(path=str(tmp_path / "a.parquet"))))
    assert [len(block.rows) for block in blocks] == [1024, 1024, 452]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (ROWS, {}, ["'media'", "image", "columns"]),
        (ROWS, {"columns": {"media": "imgae"}}, ["'imgae'", "'image'"]),
        (ROWS, {"columns": {"meda": "image"}}, ["'meda'", "'media'"]),
        (ROWS, {"format": "jsnl"}, ["'jsnl'", "'jsonl'"]),
    ],
)
def test_mistakes_in_the_settings_name_the_value_and_the_fix(tmp_path, rows, options, words):
    path = _jsonl(tmp_path, rows)
    with pytest.raises(UserError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in [str(path), *words]), message


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text('{"rows": []}')
    (tmp_path / "table.xyz").touch()
    (tmp_path / "empty.csv").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "shards.tar.gz").touch()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, words in {
        "gone.jsonl": "does not exist",
        "bad.parquet": "cannot read",
        "bad.json": "cannot read .* as JSON",
        "other.json": "coco or karpathy or lavis",
        "table.xyz": "set format",
        "empty.csv": "is empty",
        "empty": "no image or video files",
        "shards.tar.gz": "compressed",
        "pipe.jsonl": "not a",
    }.items():
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)
    with pytest.raises(UserError, match="nope://x/a.csv: no such protocol"):
        read("nope://x/a.csv")
