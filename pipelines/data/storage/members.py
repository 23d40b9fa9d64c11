"""Media references to members of uncompressed tar shards; no other module writes or parses one."""

import re
from dataclasses import dataclass
from typing import Final

# Readable, and not part of ordinary file names: shard.tar#offset=1536&length=2048
_REFERENCE: Final = re.compile(r"(?P<shard>.+)#offset=(?P<offset>\d{1,18})&length=(?P<length>\d{1,18})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    """A range of bytes inside a larger file. It is read by range, never unpacked."""

    shard: str
    """Path or URI of the tar file."""
    offset: int
    """Position of the first content byte."""
    length: int


def to_reference(member: Member) -> str:
    """Write a media reference, the inverse of `parse`."""
    return f"{member.shard}#offset={member.offset}&length={member.length}"


def parse(media: str) -> Member | None:
    """Read a media reference; None when it names a whole file."""
    found = _REFERENCE.fullmatch(media) if "#offset=" in media else None
    return found and Member(found["shard"], int(found["offset"]), int(found["length"]))
