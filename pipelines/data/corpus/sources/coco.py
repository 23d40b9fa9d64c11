"""COCO caption annotations: {"images": [{id, file_name}], "annotations": [{image_id, caption}]}."""

from collections.abc import Iterator
from typing import Any

from pipelines.data import schema
from pipelines.data.corpus.sources.raw import BadRow, RawRow


def is_coco(document: Any) -> bool:
    """Whether the document has the two lists."""
    is_object = isinstance(document, dict)
    return is_object and isinstance(document.get("images"), list) and isinstance(document.get("annotations"), list)


def read_coco(document: dict[str, Any], path: str) -> Iterator[RawRow | BadRow]:
    """Yield one row an image with all its captions, or none, as in evaluation sets.

    Annotations without a known image or without a caption are bad rows.
    """
    captions: dict[Any, list[Any]] = {}
    for image in document["images"]:
        if _has(image, "id", "file_name"):
            captions[image["id"]] = []
    first = len(document["images"]) + 1
    for number, annotation in enumerate(document["annotations"], start=first):
        place = f"{path}, annotation {number - first + 1}"
        if not _has(annotation, "image_id", "caption"):
            yield BadRow(number, place, "corrupt", f"no image_id with a caption: {str(annotation)[:60]}")
        elif annotation["image_id"] not in captions:
            yield BadRow(number, place, "missing", f"the file lists no image with id {annotation['image_id']!r}")
        else:
            captions[annotation["image_id"]].append(annotation["caption"])
    licences = {item.get("id"): item.get("name") for item in document.get("licenses") or [] if isinstance(item, dict)}
    for number, image in enumerate(document["images"], start=1):
        place = f"{path}, image {number}"
        if not _has(image, "id", "file_name"):
            yield BadRow(number, place, "corrupt", f"no id with a file_name: {str(image)[:60]}")
            continue
        values = {
            schema.SAMPLE_ID: image["id"],
            schema.MEDIA: image["file_name"],
            schema.CAPTIONS: captions[image["id"]],
            schema.LICENCE: licences.get(image.get("license")),
        }
        yield RawRow(number, place, values)


def _has(record: Any, identity: str, text: str) -> bool:
    """Whether a record has an id and a text."""
    return (
        isinstance(record, dict) and isinstance(record.get(identity), str | int) and isinstance(record.get(text), str)
    )
