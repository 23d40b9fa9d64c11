"""Karpathy splits: {"images": [{filepath, filename, split, sentences: [{raw}]}]}."""

from collections.abc import Iterator
from typing import Any

from pipelines.data import schema
from pipelines.data.corpus.sources.raw import BadRow, RawRow

_SPLITS = {"restval": schema.TRAIN}
"""The part of COCO's validation set that is used for training."""


def is_karpathy(document: Any) -> bool:
    """Whether the document lists images with their sentences."""
    images = document.get("images") if isinstance(document, dict) else None
    return isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images[:10])


def read_karpathy(document: dict[str, Any], path: str) -> Iterator[RawRow | BadRow]:
    """Yield one row an image, in the file's own split; "restval" counts as training."""
    for number, image in enumerate(document["images"], start=1):
        place = f"{path}, image {number}"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            yield BadRow(number, place, "corrupt", f"no filename: {str(image)[:60]}")
            continue
        sentences = image.get("sentences") or []
        try:
            captions = [sentence.get("raw") or " ".join(sentence["tokens"]) for sentence in sentences]
        except (AttributeError, KeyError, TypeError):
            yield BadRow(number, place, "corrupt", f"sentences without raw text: {str(sentences)[:60]}")
            continue
        split = image.get("split")
        values = {
            schema.SAMPLE_ID: image.get("cocoid"),
            schema.MEDIA: "/".join(part for part in (image.get("filepath"), image["filename"]) if part),
            schema.CAPTIONS: captions,
            schema.SPLIT: _SPLITS.get(split, split) if isinstance(split, str) else None,
        }
        yield RawRow(number, place, values)
