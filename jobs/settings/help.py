"""Every key of a settings class with its default and its meaning, for `--help`, `--help-all` and the docs."""

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

_WIDTH = 110
_INDENT = "      "


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """One setting."""

    name: str
    default: Any
    text: str
    condition: str
    """Kind of the union's member that has the key, e.g. "kind: cascaded"; empty for a key that is always there."""


def describe_settings(model: type[BaseModel]) -> str:
    """One entry for each key with its default and its meaning, nested keys with dots, in the order of the class."""
    return "\n".join(line for key in model_keys(model) for line in _lines(key))


def describe_required(model: type[BaseModel]) -> list[str]:
    """One line for each key without a default: its name and the first sentence about it."""
    keys = list(required_keys(model))
    width = max((len(key.name) for key in keys), default=0)
    return [
        f"{key.name:<{width}}  {textwrap.shorten(_sentence(key.text), _WIDTH - width, placeholder=' …')}".rstrip()
        for key in keys
    ]


def _sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].removesuffix(".")


def _lines(key: Key) -> Iterator[str]:
    value = "(required)" if key.default is PydanticUndefined else f"= {as_yaml(key.default)}"
    condition = f" [{key.condition}]" if key.condition else ""
    yield "  " + textwrap.shorten(f"{key.name} {value}{condition}", _WIDTH, placeholder=" …")
    yield from textwrap.wrap(" ".join(key.text.split()), _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)


def model_keys(model: type[Any], prefix: str = "", condition: str = "") -> Iterator[Key]:
    """The keys of a settings class or of a dataclass, nested ones with dots, in the order of the class."""
    for name, annotation, default, text in _fields(model):
        key = prefix + name
        nested = list(nested_models(annotation))
        if not nested or not _is_plain(annotation) or text:
            yield Key(key, default, text, condition)
        for inner, is_item in nested:
            kind = kind_of(inner)
            inner_prefix = f"{key}.0." if is_item else f"{key}."
            yield from model_keys(inner, inner_prefix, f"kind: {kind}" if kind and len(nested) > 1 else condition)


def required_keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """The keys that have no default, of a nested settings class those inside it."""
    for name, annotation, default, text in _fields(model):
        if default is not PydanticUndefined:
            continue
        nested = [found for found, is_item in nested_models(annotation) if not is_item]
        if len(nested) == 1 and issubclass(nested[0], BaseModel) and _is_plain(annotation):
            yield from required_keys(nested[0], f"{prefix}{name}.")
        else:
            yield Key(prefix + name, default, text, "")


def _fields(model: type[Any]) -> Iterator[tuple[str, Any, Any, str]]:
    """Name, annotation, default and description of each field."""
    if issubclass(model, BaseModel):
        for name, field in model.model_fields.items():
            yield name, field.annotation, field.get_default(call_default_factory=True), field.description or ""
        return
    hints, texts = get_type_hints(model, include_extras=True), _field_texts(model)
    for part in dataclasses.fields(model):
        if part.init:
            yield part.name, hints[part.name], _default(part), texts.get(part.name, "")


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return PydanticUndefined if field.default_factory is dataclasses.MISSING else field.default_factory()


def _field_texts(model: type[Any]) -> dict[str, str]:
    """The docstrings under a dataclass' fields, and its base classes'."""
    texts: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if is_field and is_text:
                texts[field.target.id] = str(text.value.value)  # type: ignore[attr-defined]
    return texts


def nested_models(annotation: Any, is_item: bool = False) -> Iterator[tuple[type[Any], bool]]:
    """Settings classes and dataclasses that an annotation names, and whether they are items of a list."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation):
            yield annotation, is_item
        return
    if get_origin(annotation) is Literal:
        return
    for part in get_args(annotation):
        if isinstance(part, type) or get_args(part):
            yield from nested_models(part, is_item or get_origin(annotation) in (list, tuple))


def _is_plain(annotation: Any) -> bool:
    """Whether the annotation names nested classes alone, without None, strings or lists beside them."""
    if get_origin(annotation) in (Union, UnionType):
        return all(_is_plain(part) for part in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        return _is_plain(get_args(annotation)[0])
    return isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation))


def kind_of(model: type[Any]) -> str:
    """The member's name in a discriminated union; empty for a class without one."""
    hint = get_type_hints(model).get("kind") if dataclasses.is_dataclass(model) else None
    if issubclass(model, BaseModel) and "kind" in model.model_fields:
        hint = model.model_fields["kind"].annotation
    values = get_args(hint) if get_origin(hint) is Literal else ()
    return str(values[0]) if len(values) == 1 else ""


def as_yaml(value: Any) -> str:
    """A default as YAML would write it, on one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {as_yaml(own)}" for key, own in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(as_yaml, value))}]"
    return '""' if value == "" else str(value)
