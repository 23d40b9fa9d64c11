"""Frozen models in local folders: their names made absolute, for workers run in other folders."""

import dataclasses
from typing import TypeVar

from pipelines.data import storage
from qformer.config import AudioSpec, LanguageSpec, VisionSpec

SpecT = TypeVar("SpecT", VisionSpec, AudioSpec, LanguageSpec)


def absolute_name(name: str) -> str:
    """The absolute path of a local folder that exists; hub names and URIs stay as they are."""
    return storage.local_path(name) if storage.is_local(name) and storage.exists(name) else name


def with_absolute_name(spec: SpecT) -> SpecT:
    """The same model under the absolute path of its folder; what only a feature cache holds stays as it is."""
    is_cached = isinstance(spec, AudioSpec) and spec.is_cached
    return spec if is_cached else dataclasses.replace(spec, name=absolute_name(spec.name))
