"""Annotation files: one JSON document with COCO captions, a Karpathy split, or a LAVIS list."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from pipelines.data.corpus.sources.coco import is_coco, read_coco
from pipelines.data.corpus.sources.files import open_source
from pipelines.data.corpus.sources.karpathy import is_karpathy, read_karpathy
from pipelines.data.corpus.sources.lavis import is_lavis, read_lavis
from pipelines.data.corpus.sources.raw import BadRow, RawRow
from pipelines.data.corpus.sources.text import decode_text
from qformer.errors import UserError

_Reader = tuple[Callable[[Any], bool], Callable[[Any, str], Iterator[RawRow | BadRow]]]
READERS: dict[str, _Reader] = {
    "coco": (is_coco, read_coco),
    "karpathy": (is_karpathy, read_karpathy),
    "lavis": (is_lavis, read_lavis),
}


def read_annotations(path: str, format: str) -> Iterator[RawRow | BadRow]:  # noqa: A002 - as in the settings
    """Yield the rows of an annotation file, which is read into memory as a whole.

    Args:
        path: Annotation file.
        format: Key of `READERS`, or "auto" to detect the format from the content.

    Raises:
        UserError: If it is not JSON, or not of this format.
        MediaError: If it cannot be read.
    """
    with open_source(path) as file:
        text = decode_text(file.read())
    try:
        document: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}; correct the file") from None
    names = list(READERS) if format == "auto" else [format]
    for name in names:
        is_format, read = READERS[name]
        if is_format(document):
            return read(document, path)
    raise UserError(
        f"{path} holds a JSON document that is not {' or '.join(names)}; expected {{images, annotations}} (coco), "
        "{images: [{sentences}]} (karpathy), or a list of {image or video, caption} (lavis)"
    )
