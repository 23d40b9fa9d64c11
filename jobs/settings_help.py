"""A settings class as text for `--help`: every key with its default and what it means."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

_WIDTH = 110
_INDENT = "      "


def describe_settings(model: type[BaseModel]) -> str:
    """One entry for each key, nested ones with dots, in the order of the class."""
    return "\n".join(line for key, default, text in _entries(model, "") for line in _lines(key, default, text))


def _entries(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, field in model.model_fields.items():
        inner, key = field.annotation, prefix + name
        items = [item for item in get_args(inner) if isinstance(item, type) and issubclass(item, BaseModel)]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _entries(inner, f"{key}.")
        elif dataclasses.is_dataclass(inner):
            yield from ((f"{key}.{part.name}", part.default, "") for part in dataclasses.fields(inner))
        else:
            yield key, field.get_default(), field.description or ""
            for item in items:
                yield from _entries(item, f"{key}.0.")


def _lines(key: str, default: Any, text: str) -> Iterator[str]:
    value = "(required)" if default is PydanticUndefined else f"= {_plain(default)}"
    yield "  " + textwrap.shorten(f"{key} {value}", _WIDTH, placeholder=" …")
    yield from textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)


def _plain(default: Any) -> str:
    """As YAML would write it."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return str(default) if default != "" else '""'
