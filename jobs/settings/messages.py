"""One line for each mistake in settings: its place, its whole key, and the fix."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from jobs.settings.data import Settings
from jobs.settings.help import kind_of
from jobs.settings.renamed import RENAMED
from jobs.settings.specs import models_in


def describe(
    model: type[Settings],
    details: ErrorDetails,
    files: Sequence[tuple[Path, Any]],
    assignments: Sequence[tuple[tuple[str, ...], str]],
) -> str:
    """Turn one error of pydantic into a line.

    Args:
        model: Settings class of the job.
        details: Error of pydantic.
        files: Settings files and their values, in the order of the merge.
        assignments: Keys and texts of the `--set` overrides, in their order.
    """
    keys = _without_kinds(model, tuple(str(part) for part in details["loc"]))
    if details["type"] == "missing":
        keys = (*keys, *_first_required(model, keys))
    dotted = ".".join(keys)
    origin = _origin(keys, files, assignments)
    match details["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            if (present := RENAMED.get(dotted)) in set(_dotted_keys(model)):
                return f"{origin}: {dotted} is now {present}; rename it"
            return f"{origin}: unknown key {dotted!r}; {_suggestion(model, keys)}"
        case "missing":
            file = _file_of(keys, files)
            place = f"write `{keys[-1]}: …` in {file}" if file else "give a --config file"
            return f"{origin}: {dotted!r} is missing; {place} or add --set {dotted}=VALUE"
        case _:
            return f"{origin}: {_problem(model, keys, details)}"


def _without_kinds(model: type[Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    """The keys as a person writes them: pydantic puts the kind of a union's member between them."""
    found: list[str] = []
    models = [model]
    for key in keys:
        kinds = {kind_of(one): one for one in models if kind_of(one)}
        if len(models) > 1 and key in kinds:
            models = [kinds[key]]
            continue
        found.append(key)
        hints = [get_type_hints(one).get(key) for one in models]
        models = [one for hint in hints for one in models_in(hint)] or ([] if not key.isdigit() else models)
    return tuple(found)


def _problem(model: type[Settings], keys: tuple[str, ...], details: ErrorDetails) -> str:
    """Key, value and what is wrong with it. What a dataclass finds wrong in itself begins with one of its fields."""
    problem, value = details["msg"].removeprefix("Value error, "), details["input"]
    found = re.match(r"(\w+)=\S+ (?=must )", problem)
    if found and isinstance(value, dict) and found[1] in value:
        keys, value, problem = (*keys, found[1]), value[found[1]], problem[found.end() :]
    problem = problem[:1].lower() + problem[1:]
    return f"{'.'.join(keys)} = {_shortened(value)}: {problem}" if keys else problem


def _shortened(value: Any, length: int = 80) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _origin(
    keys: tuple[str, ...], files: Sequence[tuple[Path, Any]], assignments: Sequence[tuple[tuple[str, ...], str]]
) -> str:
    """Place of the value at `keys`: the last override that sets it, else the last file that does."""
    for assigned, text in reversed(assignments):
        if keys[: len(assigned)] == assigned:
            return f"--set {text}"
    return str(_file_of(keys, files) or "settings")


def _file_of(keys: tuple[str, ...], files: Sequence[tuple[Path, Any]]) -> Path | None:
    """The last file with the value at `keys` or, if none has it, with most of its keys; else the first."""
    depths = [_depth(keys, values) for _, values in files]
    for path, depth in zip(reversed([path for path, _ in files]), reversed(depths), strict=True):
        if depth > 0 and depth == max(depths):
            return path
    return files[0][0] if files else None


def _depth(keys: tuple[str, ...], values: Any) -> int:
    """Number of `keys` that a file's values have; a value that is no mapping stands for all keys below it."""
    for depth, key in enumerate(keys):
        if not isinstance(values, dict):
            return len(keys)
        if key not in values:
            return depth
        values = values[key]
    return len(keys)


def _first_required(model: type[Any], keys: Sequence[str]) -> tuple[str, ...]:
    """Names below a missing mapping down to a key that takes a value and has no default."""
    for key in keys:
        annotation = model.model_fields[key].annotation if key in getattr(model, "model_fields", {}) else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ()
        model = annotation
    required = next((name for name, field in model.model_fields.items() if field.is_required()), None)
    return () if required is None else (required, *_first_required(model, (required,)))


def _suggestion(model: type[Settings], keys: tuple[str, ...]) -> str:
    """The nearest valid key: first among its siblings, then anywhere by its last part."""
    every = list(_dotted_keys(model))
    parent, name = ".".join(keys[:-1]), keys[-1]
    prefix = f"{parent}." if parent else ""
    # Items of a list are addressed by number, the keys of their class are listed without it.
    plain_prefix = "".join(f"{part}." for part in keys[:-1] if not part.isdigit())
    siblings = [
        key.removeprefix(plain_prefix)
        for key in every
        if key.startswith(plain_prefix) and "." not in key.removeprefix(plain_prefix)
    ]
    for found in difflib.get_close_matches(name, siblings, n=1):
        return f"did you mean {prefix}{found}?"
    leaves = {key.rpartition(".")[2]: key for key in reversed(every)}
    for found in difflib.get_close_matches(name, leaves, n=1):
        return f"did you mean {leaves[found]}?"
    return f"valid keys{f' under {parent}' if parent else ''}: {', '.join(siblings)}"


def _dotted_keys(model: type[Any], prefix: str = "") -> Iterator[str]:
    for name, annotation in get_type_hints(model).items():
        if name == "model_config":
            continue
        yield prefix + name
        for nested in models_in(annotation):
            yield from _dotted_keys(nested, f"{prefix}{name}.")
