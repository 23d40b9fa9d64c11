"""CSV tables of WebVid: videoid, page_dir, name (the caption), contentUrl, duration."""

import dataclasses
from collections.abc import Iterator

from pipelines.data import schema
from pipelines.data.corpus.sources.delimited import header, read_csv
from pipelines.data.corpus.sources.raw import BadRow, RawRow
from qformer.errors import UserError

_REQUIRED_COLUMNS = ("videoid", "name")
_TYPICAL_COLUMNS = ("page_dir", "contentUrl")


def is_webvid(names: list[str]) -> bool:
    """Whether a CSV header is WebVid's."""
    return all(name in names for name in _REQUIRED_COLUMNS) and any(name in names for name in _TYPICAL_COLUMNS)


def read_webvid(path: str) -> Iterator[RawRow | BadRow]:
    """Yield one row a video, whose file is page_dir/videoid.mp4 below the media root, as downloaders store it.

    Raises:
        UserError: If the header is not WebVid's.
        MediaError: If the file cannot be read.
    """
    names = header(path)
    if not is_webvid(names):
        raise UserError(f"{path} is not a WebVid table: it has the columns {', '.join(names)}; set format: csv")
    for row in read_csv(path):
        if isinstance(row, BadRow):
            yield row
            continue
        folder, name = row.values.get("page_dir"), row.values["videoid"]
        values = {
            schema.SAMPLE_ID: name,
            schema.MEDIA: f"{folder}/{name}.mp4" if folder else f"{name}.mp4",
            schema.KIND: schema.VIDEO,
            schema.CAPTIONS: row.values["name"],
        }
        if not name:
            yield BadRow(row.number, row.place, "config", "no videoid")
        else:
            yield dataclasses.replace(row, values=values)
