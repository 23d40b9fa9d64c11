"""A settings class as text for `--help`: every key with its default and what it means."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_origin

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
        if _is_nested(inner):
            yield from _nested(inner, f"{key}.")
            continue
        yield key, field.get_default(), field.description or ""
        for part in (inner, *get_args(inner)):  # list[X], X | None, str | list[X]
            is_list = get_origin(part) is list
            for item in filter(_is_nested, get_args(part) if is_list else [part]):
                yield from _nested(item, f"{key}.0." if is_list else f"{key}.")


def _is_nested(annotation: Any) -> bool:
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return is_model or (isinstance(annotation, type) and dataclasses.is_dataclass(annotation))


def _nested(model: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Keys of a settings class, or of a dataclass of the library, whose fields have no description to read."""
    if issubclass(model, BaseModel):
        yield from _entries(model, prefix)
    else:
        yield from ((f"{prefix}{part.name}", part.default, "") for part in dataclasses.fields(model))


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
    if isinstance(default, tuple | list):
        return f"[{', '.join(map(_plain, default))}]"
    return str(default) if default != "" else '""'
