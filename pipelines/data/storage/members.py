"""How a member of an uncompressed tar shard is named as a media reference; no other module spells one."""

import re
from dataclasses import dataclass
from typing import Final

# No file name contains this by accident, and it stays readable: shard.tar#offset=1536&length=2048
_REFERENCE: Final = re.compile(r"(?P<shard>.+)#offset=(?P<offset>\d{1,18})&length=(?P<length>\d{1,18})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    """A run of bytes inside a larger file. It is read by range, never unpacked: its name touches no file system."""

    shard: str
    """Path or URI of the tar file."""
    offset: int
    """Of the first content byte."""
    length: int


def spell(member: Member) -> str:
    """The media reference that `parse` reads back."""
    return f"{member.shard}#offset={member.offset}&length={member.length}"


def parse(media: str) -> Member | None:
    """Read a media reference; None when it names a whole file."""
    found = _REFERENCE.fullmatch(media) if "#offset=" in media else None
    return found and Member(found["shard"], int(found["offset"]), int(found["length"]))
