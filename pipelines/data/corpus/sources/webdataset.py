"""WebDataset shards: members of a tar with the same key form a sample."""

import os
import re
from collections.abc import Iterator
from typing import Any

from pipelines.data import schema, storage
from pipelines.data.corpus.sources.files import is_source_folder, list_source, read_source_bytes
from pipelines.data.corpus.sources.folders import sidecar_values
from pipelines.data.corpus.sources.raw import BadRow, BadRowError, RawRow
from pipelines.data.corpus.sources.tar_index import TarMember, walk_tar
from pipelines.data.corpus.sources.text import decode_text
from pipelines.data.media.kinds import kind_of_name
from pipelines.data.storage import members
from qformer.errors import UserError

_CAPTIONS = ("caption", "captions", "txt", "text")
"""Extensions of members with captions, one a line."""
_MAX_TEXT_BYTES = 16 * 1024**2
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def shard_files(path: str) -> list[str]:
    """The tars of a source: a file, a pattern such as shard-{000..127}.tar, or all .tar files of a folder by name.

    Raises:
        UserError: If there are none, or a name says that one is compressed.
    """
    if is_source_folder(path):
        names = list_source(path)
        packed = next((name for name in names if name.lower().endswith((".tar.gz", ".tgz", ".tar.zst"))), None)
        if packed:
            raise UserError(f"{storage.join(path, packed)} is compressed, and cannot be read by position; unpack it")
        tars = [storage.join(path, name) for name in names if name.lower().endswith(".tar")]
        if not tars:
            raise UserError(f"folder {path} holds no .tar files; check the path or set format")
        return tars
    found = _RANGE.search(path)
    if found is None:
        return [path]
    first, last = int(found[1]), int(found[2])
    width = len(found[1])
    rest = [f"{path[: found.start()]}{number:0{width}d}{path[found.end() :]}" for number in range(first, last + 1)]
    return [name for pattern in rest for name in shard_files(pattern)]


def read_webdataset(path: str, columns: dict[str, str]) -> Iterator[RawRow | BadRow]:
    """Yield one row a sample; its id is SHARD/KEY, its media is a range of the shard.

    The key of `photos/0001.seg.png` is `photos/0001`, its extension `seg.png`. The first member with the extension of
    an image or video is the sample's media; .txt and .caption members have captions, one a line; a .json member has any
    columns of the manifest.

    Args:
        path: File, pattern or folder as in `shard_files`.
        columns: Manifest column -> extension of a member, or key in the .json member.

    Raises:
        UserError: If a tar is compressed or there is none.
        MediaError: If one cannot be read.
    """
    # References must be valid in every working directory.
    shards = [storage.local_path(shard) if storage.is_local(shard) else shard for shard in shard_files(path)]
    root = os.path.commonprefix([f"{storage.parent(shard)}/" for shard in shards]).rpartition("/")[0]
    number = 0
    for shard in shards:
        stem = os.path.splitext(shard)[0].removeprefix(root).lstrip("/")
        for key, group in _samples(shard):
            number += 1
            place = f"{shard}, sample {key}"
            wrong = next((member for member in group if member.error_class), None)
            try:
                if wrong is not None and wrong.error_class is not None:
                    raise BadRowError(wrong.error_class, wrong.message)
                values = _values(shard, group, columns)
            except BadRowError as error:
                yield BadRow(number, place, error.error_class, error.message, _reference(shard, group))
                continue
            yield RawRow(number, place, values, sample_id=f"{stem}/{key}")


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member: the key ends at the first dot of the last path part."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _samples(shard: str) -> Iterator[tuple[str, list[TarMember]]]:
    """Group neighbouring members with the same key."""
    key, group = "", list[TarMember]()
    for member in walk_tar(shard):
        name = split_name(member.name)[0]
        if group and name != key:
            yield key, group
            group = []
        key = name
        group.append(member)
    if group:
        yield key, group


def _values(shard: str, group: list[TarMember], columns: dict[str, str]) -> dict[str, Any]:
    by_extension = {split_name(member.name)[1]: member for member in group}
    if len(by_extension) < len(group):
        raise BadRowError("config", f"the sample has two members of one extension: {group[0].name!r} …")
    texts = {theirs for ours, theirs in columns.items() if ours != schema.MEDIA}
    media = next((name for name in by_extension if _is_media(name, columns.get(schema.MEDIA))), None)
    if media is None:
        raise BadRowError("config", f"the sample has no image or video member, but {', '.join(by_extension)}")
    found_values: dict[str, Any] = {}
    for extension, member in by_extension.items():
        if extension == "json":
            found_values = {**sidecar_values(member.name, _content(shard, member)), **found_values}
        elif extension in _CAPTIONS:
            found_values[schema.CAPTIONS] = decode_text(_content(shard, member)).splitlines()
        elif extension in texts:
            found_values[extension] = decode_text(_content(shard, member)).strip()
    renamed = {ours: found_values.get(theirs) for ours, theirs in columns.items() if ours != schema.MEDIA}
    chosen = by_extension[media]
    return {
        **found_values,
        **renamed,
        schema.MEDIA: members.to_reference(members.Member(shard, chosen.offset, chosen.length)),
        schema.KIND: renamed.get(schema.KIND) or kind_of_name(f"x.{media}"),
    }


def _is_media(extension: str, wanted: str | None) -> bool:
    """Whether it is the given extension, or by default one of images or videos without a dot, unlike "seg.png"."""
    if wanted is not None:
        return extension == wanted
    return "." not in extension and kind_of_name(f"x.{extension}") is not None


def _content(shard: str, member: TarMember) -> bytes:
    if member.length > _MAX_TEXT_BYTES:
        raise BadRowError("too_large", f"member {member.name!r} holds {member.length} bytes of text")
    return read_source_bytes(members.to_reference(members.Member(shard, member.offset, member.length)), _MAX_TEXT_BYTES)


def _reference(shard: str, group: list[TarMember]) -> str:
    return members.to_reference(members.Member(shard, group[0].offset, group[0].length))
