"""Shards written by tarfile itself, read without it."""

import gzip
import json
import random
import tarfile

import pytest

from pipelines.data import storage
from pipelines.data.corpus.sources.tar_index import walk_tar
from pipelines.data.corpus.sources.webdataset import shard_files, split_name
from pipelines.data.storage import members
from qformer.errors import UserError
from tests.pipelines.data.builders import jpeg
from tests.pipelines.data.corpus.sources.reading import read
from tests.pipelines.data.corpus.sources.shards import add_entry, write_shard

LONG = "folder/" + "very-long-name-" * 12 + "ü"


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_found_where_tarfile_finds_them(tmp_path, tar_format):
    names = ["a.jpg", "./b.txt", "deep/er/c.jpg", "d"]
    names += [] if tar_format == tarfile.USTAR_FORMAT else [f"{LONG}.jpg"]
    sizes = (0, 1, 512, 513, 9000)[: len(names)]
    contents = [(name, random.Random(name).randbytes(size)) for name, size in zip(names, sizes, strict=True)]
    path = write_shard(tmp_path / "a.tar", contents, tar_format)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(found.name, found.offset, found.length) for found in walk_tar(str(path))] == expected
    for found, (_, content) in zip(walk_tar(str(path)), contents, strict=True):
        reference = members.to_reference(members.Member(str(path), found.offset, found.length))
        assert storage.read_bytes(reference, 10_000) == content


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_samples_and_their_members_in_any_order(tmp_path, scheme):
    pictures = {f"{n:04d}": jpeg((n, 0, 0)) for n in range(20)}
    for shard in range(2):
        contents = []
        for key in sorted(pictures)[shard * 10 : shard * 10 + 10]:
            contents += [(f"{key}.jpg", pictures[key]), (f"{key}.txt", f"first of {key}\nsecond".encode())]
            contents += [(f"{key}.seg.png", b"not the picture"), (f"{key}.cls", b"7")]
        write_shard(tmp_path / f"shard-{shard:03d}.tar", contents)
    root = str(tmp_path)
    if scheme == "memory":
        root = f"memory://{tmp_path.name}"
        for path in tmp_path.glob("*.tar"):
            storage.write_bytes(f"{root}/{path.name}", path.read_bytes())
    rows, failures = read(root, columns={"licence": "cls"})
    assert failures == []
    assert [row["sample_id"] for row in rows] == [f"shard-{int(key) // 10:03d}/{key}" for key in sorted(pictures)]
    assert {row["licence"] for row in rows} == {"7"} and {row["kind"] for row in rows} == {"image"}
    assert rows[3]["captions"] == ["first of 0003", "second"]
    random.Random(0).shuffle(rows)
    for row in rows:
        assert storage.read_bytes(row["media"], 10**6) == pictures[row["sample_id"].split("/")[1]]
    with pytest.raises(storage.FileTooLargeError):
        storage.read_bytes(rows[0]["media"], 10)


def test_what_a_json_member_says(tmp_path):
    contents = [
        ("x/1.mp4", b"clip"),
        ("x/1.json", json.dumps({"caption": "one", "key": "1", "licence": "CC0", "start_s": 1.5}).encode()),
        ("x/2.webp", b"picture"),
        ("x/2.json", json.dumps({"texts": ["two", "more"]}).encode()),
    ]
    rows, _ = read(write_shard(tmp_path / "a.tar", contents), columns={"captions": "texts"})
    assert [(row["sample_id"], row["kind"]) for row in rows] == [("a/x/1", "video"), ("a/x/2", "image")]
    assert [row["captions"] for row in rows] == [[], ["two", "more"]]
    rows, _ = read(tmp_path / "a.tar")
    assert [row["captions"] for row in rows] == [["one"], []]
    assert (rows[0]["licence"], rows[0]["start_s"]) == ("CC0", 1.5)


def test_keys():
    """As the format has it: to the first dot of the last path part."""
    assert split_name("./a/b.c/d.seg.PNG") == ("a/b.c/d", "seg.png")
    assert split_name("0001") == ("0001", "")


def test_wrong_members_are_reported_and_touch_no_file(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("untouched")
    path = write_shard(
        tmp_path / "data" / "a.tar",
        [
            ("1.jpg", jpeg()),
            ("../../outside.txt", b"overwritten"),
            ("/etc/outside.jpg", b"absolute"),
            ("2.txt", b"no picture"),
            ("3.jpg", jpeg()),
            ("3.txt", b"caf\xe9"),
            ("4.jpg", jpeg()),
            ("4.jpg", jpeg()),
            ("5.jpg", jpeg()),
            ("5.json", b"{oops"),
        ],
    )
    add_entry(path, "6.jpg", tarfile.SYMTYPE, "/etc/passwd")
    add_entry(path, "7.jpg", tarfile.LNKTYPE, "1.jpg")
    add_entry(path, "8.jpg", tarfile.FIFOTYPE)
    add_entry(path, "9.jpg", tarfile.CHRTYPE)
    add_entry(path, "folder", tarfile.DIRTYPE)
    add_entry(path, "last.jpg", tarfile.REGTYPE)
    before = sorted(str(found) for found in tmp_path.rglob("*"))
    rows, failures = read(path, name="w")
    assert [row["sample_id"] for row in rows] == ["a/1", "a/last"]
    assert [(failure.sample_id, failure.error_class) for failure in failures] == [
        ("w:2", "unsupported"),
        ("w:3", "unsupported"),
        ("w:4", "config"),
        ("w:5", "corrupt"),
        ("w:6", "config"),
        ("w:7", "corrupt"),
        *((f"w:{number}", "unsupported") for number in (8, 9, 10, 11)),
    ]
    assert sorted(str(found) for found in tmp_path.rglob("*")) == before and outside.read_text() == "untouched"


def test_a_truncated_shard_is_used_up_to_the_cut(tmp_path):
    contents = [(f"{n}.jpg", bytes([n]) * 3000) for n in range(4)]
    path = write_shard(tmp_path / "a.tar", contents)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmember("2.jpg")
    path.write_bytes(whole[: third.offset_data + 100])
    rows, (failure,) = read(path)
    assert [row["sample_id"] for row in rows] == ["a/0", "a/1"]
    assert failure.error_class == "corrupt" and "2900 bytes are missing" in failure.message
    path.write_bytes(whole[: third.offset + 100])  # inside a header
    rows, (failure,) = read(path)
    assert len(rows) == 2 and failure.error_class == "corrupt" and "ends inside a header" in failure.message
    path.write_bytes(whole[: third.offset] + b"garbage" * 100 + whole[third.offset + 700 :])
    rows, (failure,) = read(path)
    assert len(rows) == 2 and failure.error_class == "corrupt" and "damaged tar header" in failure.message
    path.write_bytes(whole[: third.offset])  # between two members: nothing tells that more was there but the end mark
    rows, failures = read(path)
    assert len(rows) == 2 and failures == []


def test_a_member_that_is_no_longer_there(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("1.jpg", bytes(3000))])
    ((row,), _) = read(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(storage.TruncatedFileError):
        storage.read_bytes(row["media"], 10**6)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(row["media"], 10**6)


def test_a_huge_extended_header_is_not_believed(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("1.jpg", jpeg()), (f"{LONG}.jpg", jpeg())])
    data = bytearray(path.read_bytes())
    start = data.index(b"././@PaxHeader")
    data[start + 124 : start + 136] = b"77777777777\0"
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = f"{sum(data[start : start + 512]):06o}\0 ".encode()
    path.write_bytes(data)
    rows, (failure,) = read(path)
    assert len(rows) == 1 and "an extended header of 8589934591 bytes" in failure.message


def test_compressed_shards_are_refused(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("1.jpg", jpeg())])
    (tmp_path / "b.tar").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"b\.tar is compressed.*gunzip"):
        read(tmp_path / "b.tar")
    (tmp_path / "c.tar.gz").touch()
    with pytest.raises(UserError, match=r"c\.tar\.gz is compressed"):
        read(tmp_path)


def test_shard_patterns(tmp_path):
    for number in (8, 9, 10):
        write_shard(tmp_path / f"s-{number:03d}.tar", [("1.jpg", jpeg())])
    pattern = str(tmp_path / "s-{008..010}.tar")
    assert shard_files(pattern) == [str(tmp_path / f"s-{number}.tar") for number in ("008", "009", "010")]
    assert [row["sample_id"] for row in read(pattern)[0]] == ["s-008/1", "s-009/1", "s-010/1"]
    with pytest.raises(UserError, match="011"):
        read(tmp_path / "s-{008..011}.tar")


def test_walking_reads_little_more_than_headers(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.tar", [(f"{n}.mp4", bytes(2 * 1024**2)) for n in range(8)])
    uri = f"memory://{tmp_path.name}/a.tar"
    storage.write_bytes(uri, path.read_bytes())
    sizes = []
    original = storage.read_range

    def counted(*arguments):
        data = original(*arguments)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(storage, "read_range", counted)
    assert len(list(walk_tar(str(path)))) == 8
    assert sum(sizes) < 0.05 * path.stat().st_size
    sizes.clear()
    assert len(list(walk_tar(uri))) == 8
    assert sum(sizes) <= path.stat().st_size and len(sizes) < 4  # one pass, in few requests
