import json

import pytest

from qformer.errors import UserError
from tests.pipelines.data.corpus.sources.reading import read


def _write(folder, document, name="annotations.json"):
    path = folder / name
    path.write_text(json.dumps(document))
    return path


def test_coco(tmp_path):
    document = {
        "licenses": [{"id": 4, "name": "CC BY 4.0"}],
        "images": [
            {"id": 9, "file_name": "9.jpg", "license": 4, "height": 5},
            {"id": 7, "file_name": "7.jpg"},
            {"id": 5},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "caption": "one"},
            {"id": 2, "image_id": 8, "caption": "of no image"},
            {"id": 3, "image_id": 9, "caption": " two "},
            {"id": 4, "image_id": 9, "caption": None},
        ],
    }
    rows, failures = read(_write(tmp_path, document), media_root="/photos", split="val", name="coco")
    assert [(row["sample_id"], row["media"], row["captions"]) for row in rows] == [
        ("9", "/photos/9.jpg", ["one", "two"]),
        ("7", "/photos/7.jpg", []),
    ]
    assert [row["licence"] for row in rows] == ["CC BY 4.0", None] and {row["split"] for row in rows} == {"val"}
    reasons = [(failure.sample_id, failure.error_class) for failure in failures]
    assert reasons == [("coco:5", "missing"), ("coco:7", "corrupt"), ("coco:3", "corrupt")]


def test_karpathy(tmp_path):
    def image(split, name, **more):
        return {"filepath": "val2014", "filename": name, "split": split, "sentences": [{"raw": f"of {name}"}], **more}

    document = {
        "dataset": "coco",
        "images": [
            image("restval", "a.jpg", cocoid=5),
            image("test", "b.jpg", cocoid=6, sentences=[{"tokens": ["two", "words"]}, {"raw": "x"}]),
            {"filename": "c.jpg", "split": "val", "sentences": [{}]},
            {"split": "val"},
        ],
    }
    rows, failures = read(_write(tmp_path, document), name="k")
    assert [(row["sample_id"], row["split"], row["captions"]) for row in rows] == [
        ("5", "train", ["of a.jpg"]),
        ("6", "test", ["two words", "x"]),
    ]
    assert rows[0]["media"] == str(tmp_path / "val2014/a.jpg")
    assert [(failure.sample_id, failure.error_class) for failure in failures] == [
        ("k:3", "corrupt"),
        ("k:4", "corrupt"),
    ]


def test_lavis_captions(tmp_path):
    document = [
        {"image": "a.jpg", "caption": "one", "image_id": "coco_1"},
        {"image": "a.jpg", "caption": "two", "image_id": "coco_1"},
        {"video": "clip", "caption": ["x", "y"]},
        {"caption": "of nothing"},
        "no object",
    ]
    rows, failures = read(_write(tmp_path, document), name="l")
    assert [(row["sample_id"], row["kind"], row["captions"]) for row in rows] == [
        ("a.jpg", "image", ["one"]),
        ("a.jpg#2", "image", ["two"]),
        ("clip", "video", ["x", "y"]),
    ]
    assert [(failure.sample_id, failure.error_class) for failure in failures] == [("l:4", "config"), ("l:5", "corrupt")]


def test_lavis_questions(tmp_path):
    document = [
        {"image": "a.jpg", "question": "how many?", "answer": ["2", "two", "two"], "question_id": 11},
        {"image": "a.jpg", "question": "what?", "answer": "a dog", "question_id": 12},
        {"image": "b.jpg", "question": "what?", "question_id": 13},
    ]
    rows, _ = read(_write(tmp_path, document))
    assert [(row["sample_id"], row["instructions"], row["captions"]) for row in rows] == [
        ("11", ["how many?"], ["two", "2"]),
        ("12", ["what?"], ["a dog"]),
        ("13", ["what?"], []),
    ]


def test_real_coco_captions(test_data_dir):
    """All 5,000 validation images of 2017 with their 25,014 captions."""
    rows, failures = read(test_data_dir / "metrics/coco_caption/captions_val2017_slim.json", media_root="/val2017")
    assert failures == []
    assert len(rows) == 5000 and sum(len(row["captions"]) for row in rows) == 25014
    assert all(row["media"] == f"/val2017/{int(row['sample_id']):012d}.jpg" for row in rows)


def test_webvid(tmp_path):
    path = tmp_path / "results_2M_train.csv"
    path.write_text(
        "videoid,contentUrl,duration,page_dir,name\n"
        '1066674784,https://example.org/a.mp4,PT00H00M10S,014251_014300,"Snow, falling"\n'
        ",https://example.org/b.mp4,PT00H00M10S,014251_014300,no id\n"
    )
    ((row,), (failure,)) = read(path, media_root="/videos", name="w")
    assert (row["sample_id"], row["kind"], row["captions"]) == ("1066674784", "video", ["Snow, falling"])
    assert row["media"] == "/videos/014251_014300/1066674784.mp4"
    assert (failure.sample_id, failure.error_class) == ("w:2", "config")
    assert read(path, format="csv", columns={"media": "contentUrl", "captions": "name"})[0][0]["media"].startswith(
        "htt"
    )


def test_a_named_format_is_checked(tmp_path):
    with pytest.raises(UserError, match="is not coco"):
        read(_write(tmp_path, [{"image": "a.jpg"}]), format="coco")
    with pytest.raises(UserError, match="not a WebVid table.*media"):
        (tmp_path / "a.csv").write_text("media\na.jpg\n")
        read(tmp_path / "a.csv", format="webvid")
    with pytest.raises(UserError, match="columns has no effect"):
        read(_write(tmp_path, [{"image": "a.jpg"}]), columns={"media": "image"})
