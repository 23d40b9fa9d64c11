"""LAVIS annotations: a list of {image or video, caption, image_id}, or of {image, question, answer}."""

from collections.abc import Iterator
from typing import Any

from pipelines.data import schema
from pipelines.data.corpus.sources.raw import BadRow, RawRow


def is_lavis(document: Any) -> bool:
    """Whether the document is a list of objects that name media."""
    return isinstance(document, list) and any(
        isinstance(row, dict) and ("image" in row or "video" in row) for row in document[:10]
    )


def read_lavis(document: list[Any], path: str) -> Iterator[RawRow | BadRow]:
    """Yield one row a record, as LAVIS counts samples: an image with five captions may be five of them.

    A question becomes the instruction and its answers the captions.
    """
    for number, record in enumerate(document, start=1):
        place = f"{path}, record {number}"
        if not isinstance(record, dict):
            yield BadRow(number, place, "corrupt", f"not an object: {str(record)[:60]}")
            continue
        media = record.get("video") or record.get("image")
        values = {
            schema.SAMPLE_ID: record.get("question_id"),
            schema.MEDIA: media,
            schema.KIND: schema.VIDEO if record.get("video") else None,
            schema.CAPTIONS: _texts(record),
            schema.INSTRUCTIONS: record.get("question"),
            schema.SPLIT: record.get("split"),
        }
        yield RawRow(number, place, values)


def _texts(record: dict[str, Any]) -> Any:
    """The caption, or the unique answers of all annotators, the most frequent first."""
    if "caption" in record:
        return record["caption"]
    answers = record.get("answer")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return answers
    return sorted(dict.fromkeys(answers), key=lambda answer: -answers.count(answer))
