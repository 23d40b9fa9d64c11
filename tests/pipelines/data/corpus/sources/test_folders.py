import os

from tests.pipelines.data.builders import jpeg
from tests.pipelines.data.corpus.sources.reading import read


def test_media_files_by_name(tmp_path):
    for name in ("b/x.mp4", "a.JPG", "b/-dash .webm", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rows, _ = read(tmp_path)
    assert [(row["sample_id"], row["kind"]) for row in rows] == [
        ("a.JPG", "image"),
        ("b/-dash .webm", "video"),
        ("b/x.mp4", "video"),
    ]
    assert rows[1]["media"] == str(tmp_path / "b/-dash .webm")


def test_captions_lie_beside(tmp_path):
    files = {
        "a.jpg": jpeg(),
        "a.txt": "eins\n\nzwei ü\n".encode(),
        "b.jpg": jpeg(),
        "b.json": b'{"caption": "one", "licence": "CC0", "split": "val", "status": "success"}',
        "b.txt": b"the JSON file says more",
        "c.mp4": b"",
        "c.mp4.json": b'{"captions": ["x", "y"], "start_s": 2}',
        "d.jpg": jpeg(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    rows, failures = read(tmp_path)
    assert failures == []
    assert [(row["sample_id"], row["captions"]) for row in rows] == [
        ("a.jpg", ["eins", "zwei ü"]),
        ("b.jpg", ["one"]),
        ("c.mp4", ["x", "y"]),
        ("d.jpg", []),
    ]
    assert (rows[1]["licence"], rows[1]["split"], rows[2]["start_s"]) == ("CC0", "val", 2.0)


def test_wrong_sidecars_and_names(tmp_path):
    for name in ("a", "b", "c", "d", "e"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg())
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.json").write_bytes(b"{oops")
    (tmp_path / "c.json").write_bytes(b"[1]")
    os.mkfifo(tmp_path / "d.txt")
    with open(os.fsencode(tmp_path) + b"/f\xff.jpg", "wb"):
        pass
    rows, failures = read(tmp_path, name="f")
    assert [row["sample_id"] for row in rows] == ["e.jpg"]
    reasons = [(failure.sample_id, failure.error_class) for failure in failures]
    assert reasons == [
        ("f:1", "corrupt"),
        ("f:2", "corrupt"),
        ("f:3", "corrupt"),
        ("f:4", "unsupported"),
        ("f:6", "corrupt"),
    ]
    assert "f\\udcff.jpg" in failures[-1].message
