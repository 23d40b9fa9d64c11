"""Frozen models in settings: a mapping such as {name: NAME, layer: -1}, or the name alone as a string."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import BaseModel, BeforeValidator

from qformer.config import AudioSpec, LanguageSpec, VisionSpec

_SPECS = (VisionSpec, AudioSpec, LanguageSpec)


def _long_form(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Vision = Annotated[VisionSpec, BeforeValidator(_long_form)]
Audio = Annotated[AudioSpec, BeforeValidator(_long_form)]
Language = Annotated[LanguageSpec, BeforeValidator(_long_form)]


def with_long_forms(annotation: Any, values: Any) -> Any:
    """The same nest of values with every frozen model as a mapping, so that other values of it can be merged in.

    Args:
        annotation: Type that the values are for.
        values: Mapping as a YAML file holds it.
    """
    models = models_in(annotation)
    if any(model in _SPECS for model in models):
        return _long_form(values)
    if not isinstance(values, Mapping):
        return values
    hints = {name: hint for model in models for name, hint in get_type_hints(model).items()}
    return {key: with_long_forms(hints[key], value) if key in hints else value for key, value in values.items()}


def models_in(annotation: Any) -> list[type[Any]]:
    """Settings classes and dataclasses named by an annotation: itself, or inside `X | None`, `list[X]`."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def is_spec_at(model: type[Any], keys: tuple[str, ...]) -> bool:
    """Whether the value at `keys` of a settings class is a frozen model."""
    models = [model]
    for key in keys:
        hints = [get_type_hints(one).get(key) for one in models]
        models = [found for hint in hints for found in models_in(hint)]
    return any(one in _SPECS for one in models)
