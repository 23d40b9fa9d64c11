"""Evaluation over Ray Data with real (random) models: every row once, failures apart, the same answers as offline."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.evaluate.job import main
from jobs.settings.data import DataSettings
from jobs.settings.evaluate import EvaluateSettings
from pipelines.data.media.samples import DecodeSettings, SampleDecoder
from pipelines.inference.models import load_captioner, load_retriever
from qformer.config import GenerationSettings
from qformer.errors import UserError
from tests.local_data import local_data
from tests.media_files import jpeg_bytes, mp4_bytes
from tests.tiny_checkpoints import NUM_FRAMES, write_stage1, write_stage2

NUM_IMAGES, NUM_CLIPS = 10, 3
CAPTIONS = ["a small red circle", "a large blue square", "a green triangle moving", "left of a red square"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Images with two captions each, clips with one, between them a broken file and a missing one."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for index in range(NUM_IMAGES):
        (folder / f"{index}.jpg").write_bytes(jpeg_bytes(index))
        captions = [CAPTIONS[index % 4], f"a {'still ' * (index // 4)}{CAPTIONS[(index + 1) % 4]}"]
        rows.append({"sample_id": f"image-{index}", "media": f"{index}.jpg", "kind": "image", "captions": captions})
    for index in range(NUM_CLIPS):
        (folder / f"{index}.mp4").write_bytes(mp4_bytes(index))
        rows.insert(
            2 * index,
            {
                "sample_id": f"clip-{index}",
                "media": f"{index}.mp4",
                "kind": "video",
                "captions": [CAPTIONS[index]],
                "instruction": "above a large triangle",
            },
        )
    (folder / "broken.jpg").write_bytes(jpeg_bytes()[:2000])
    for name in ("broken", "missing"):
        rows.insert(5, {"sample_id": name, "media": f"{name}.jpg", "kind": "image", "captions": ["a red circle"]})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps({**row, "split": "test", "licence": ""}) + "\n" for row in rows))
    return manifest, rows


def evaluate(corpus, checkpoint, output, **changes):
    data = DataSettings(manifest=str(corpus[0]), split="test")
    settings = EvaluateSettings(checkpoint=str(checkpoint), data=data, output=str(output), batch_size=4, **changes)
    return main(settings)


def decoded(corpus, preprocessing):
    decoder = SampleDecoder(DecodeSettings(preprocessing=preprocessing, num_frames=NUM_FRAMES))
    good = [row for row in corpus[1] if row["sample_id"] not in ("broken", "missing")]
    paths = [str(corpus[0].parent / row["media"]) for row in good]
    clips = [decoder.decode(kind=row["kind"], media=path) for row, path in zip(good, paths, strict=True)]
    pixels = [torch.tensor(clip.pixels) for clip in clips]
    decoder.close()
    return good, pixels


def assert_accounted(summary, output):
    assert (
        summary["accounting"]
        == f"rows in {NUM_IMAGES + NUM_CLIPS + 2} = rows used {NUM_IMAGES + NUM_CLIPS} + rows quarantined 2"
    )
    quarantined = pq.read_table(output / "quarantine.parquet").to_pylist()
    assert {(row["sample_id"], row["error_class"]) for row in quarantined} == {
        ("broken", "corrupt"),
        ("missing", "missing"),
    }


def test_captions_of_every_row(ray_local, corpus, tmp_path, capsys):
    checkpoint = write_stage2(tmp_path / "stage2")
    generation = GenerationSettings(max_new_tokens=8)
    summary = evaluate(corpus, checkpoint, tmp_path / "out", generation=generation)
    assert_accounted(summary, tmp_path / "out")
    assert summary["texts_truncated"] == 0
    assert capsys.readouterr().out.strip() == summary["accounting"]

    captioner = load_captioner(checkpoint)
    good, pixels = decoded(corpus, captioner.preprocessing)
    predictions = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    assert predictions == [
        {
            "sample_id": row["sample_id"],
            "kind": row["kind"],
            "instruction": row.get("instruction", ""),
            "prediction": captioner.answer(sample[None], [row.get("instruction", "")], generation)[0],
            "references": row["captions"],
        }
        for row, sample in zip(good, pixels, strict=True)
    ]
    with pytest.raises(UserError, match="already used"):
        evaluate(corpus, checkpoint, tmp_path / "out")


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_texts_that_were_cut_are_counted(ray_local, corpus, tmp_path, caplog, stage):
    """One caption of three, or one instruction of three, is longer than the checkpoint's 16 tokens."""
    checkpoint = (write_stage1 if stage == 1 else write_stage2)(tmp_path / "stage")
    media = {"media": str(corpus[0].parent / "0.jpg"), "split": "test"}
    texts = ["red", "a " * 40 + "red", "small"]
    key = {1: "captions", 2: "instruction"}[stage]
    rows = [{"sample_id": f"s{i}", "captions": ["red"], **media, key: [text]} for i, text in enumerate(texts)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with local_data():
        summary = evaluate((tmp_path / "manifest.jsonl", None), checkpoint, tmp_path / "out")
    assert summary["texts_truncated"] == 1 and summary["rows_used"] == 3
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["texts_truncated"] == 1
    assert "1 texts cut to max_text_tokens=16" in caplog.text


def test_a_row_with_several_questions_is_refused(corpus, tmp_path):
    checkpoint, manifest = write_stage2(tmp_path / "stage2"), tmp_path / "manifest.jsonl"
    row = {"media": str(corpus[0].parent / "0.jpg"), "split": "test", "captions": ["red", "small"]}
    manifest.write_text(json.dumps({**row, "instruction": ["which colour", "which size"]}) + "\n")
    with pytest.raises(UserError, match=r"1 rows ask more than one question.*with 2; write a row for each"):
        evaluate((manifest, None), checkpoint, tmp_path / "out")


@pytest.mark.parametrize("top_k", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_retrieval_by_kind(ray_local, corpus, tmp_path, top_k):
    checkpoint = write_stage1(tmp_path / "stage1")
    summary = evaluate(corpus, checkpoint, tmp_path / "out", rerank_top_k=top_k)
    assert_accounted(summary, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "retrieval.json").read_text())["kinds"]
    assert summary["retrieval"]["kinds"] == found
    assert {kind: (one["images"], one["texts"]) for kind, one in found.items()} == {
        "image": (NUM_IMAGES, 2 * NUM_IMAGES),
        "video": (NUM_CLIPS, NUM_CLIPS),
    }
    retriever = load_retriever(checkpoint)
    good, pixels = decoded(corpus, retriever.preprocessing)
    for kind in ("image", "video"):
        rows = [(row, sample) for row, sample in zip(good, pixels, strict=True) if row["kind"] == kind]
        expected = text_to_image_recall(retriever, rows, top_k)
        assert found[kind]["text_to_image"]["r1"] == pytest.approx(expected)


def text_to_image_recall(retriever, rows, top_k):
    """Recall at 1 for one kind, written as plain loops over single images and texts."""
    texts = [(text, owner) for owner, (row, _) in enumerate(rows) for text in row["captions"]]
    hits, images = 0, [retriever.embed_image(sample[None]) for _, sample in rows]
    for text, owner in texts:
        embed = retriever.embed_text([text])[0]
        scores = [(float((queries[0] @ embed).max()), tokens) for queries, tokens in images]
        order = np.argsort([-similarity for similarity, _ in scores], kind="stable")
        if top_k:
            best = {i: scores[i][0] + float(retriever.match(scores[i][1], [text])[0]) for i in order[:top_k]}
            winner = max(best, key=best.get)
        else:
            winner = order[0]
        hits += int(winner == owner)
    return hits / len(texts)
