"""From YAML files and `--set` overrides to checked settings, with errors a person can act on."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jobs.settings.data import Settings
from jobs.settings.renamed import RENAMED, with_present_keys
from jobs.settings.shipped import find_config
from jobs.settings.specs import is_spec_at, models_in, with_long_forms
from qformer.errors import UserError

SettingsT = TypeVar("SettingsT", bound=Settings)


def load(
    model: type[SettingsT], config: Path | Sequence[Path] | None = None, overrides: Sequence[str] = ()
) -> SettingsT:
    """Read YAML files, merge them, apply `key=value` overrides, check everything.

    Args:
        model: The job's settings class.
        config: YAML files, or names of shipped ones (`find_config`), whose top levels are mappings, later ones merged
            over earlier ones: mappings key by key, all else replaces. One may stand alone; none starts from the
            defaults.
        overrides: Dotted assignments such as "optim.learning_rate=1e-4"; values are YAML, later ones win.
            A number in the key addresses an item of a list: "sources.0.path=photos".

    Returns:
        The frozen settings.

    Raises:
        UserError: If a file is unreadable or no mapping, an override is not key=value, a key is unknown, or a value is
            missing or wrong. One line per mistake, each naming the file or override that holds it.
    """
    paths = [] if config is None else [config] if isinstance(config, Path) else config
    files = [(path, _read_mapping(path)) for path in paths]
    values: Any = {}
    for _, own in files:
        values = _merged(values, with_long_forms(model, own))
    assignments: list[tuple[tuple[str, ...], str]] = []
    for text in overrides:
        keys, value = _parse_override(text)
        # A frozen model's name alone leaves its other values as they are.
        place = (*keys, "name") if isinstance(value, str) and is_spec_at(model, keys) else keys
        values = with_long_forms(model, _assigned(values, place, value, text))
        assignments.append((keys, text))
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_describe(model, details, files, assignments) for details in error.errors()]
    raise UserError("\n".join(lines))


def load_saved(model: type[SettingsT], text: str) -> SettingsT | None:
    """Settings as an earlier run wrote them (`resolved_yaml`), also under former keys; None of what is no such text."""
    try:
        values = yaml.safe_load(text)
        if not isinstance(values, dict):
            return None
        return model.model_validate(with_present_keys(with_long_forms(model, values)))
    except (yaml.YAMLError, ValidationError):
        return None


def resolved_yaml(settings: Settings) -> str:
    """The settings with all defaults filled in, as YAML that `load` reads back."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Plain YAML lets a repeated key win silently; in a settings file that is always a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in keys and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                )
            keys.add(str(key_node.value))
        return super().construct_mapping(node, deep=deep)


def _read_mapping(config: Path) -> dict[str, Any]:
    try:
        text = find_config(config).read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "check the path after --config, or name a shipped file, such as recipes/blip2_stage1"
        raise UserError(f"settings file {config} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"settings file {config} cannot be read ({error}); --config takes a YAML file") from None
    try:
        # _UniqueKeyLoader is a SafeLoader: it builds plain values only, never objects.
        values = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506
    except yaml.YAMLError as error:
        raise UserError(f"settings file {config} is not valid YAML: {_yaml_problem(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"settings file {config} holds a {type(values).__name__}; write `key: value` lines")
    return values


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(problem)


def _merged(values: Any, over: Any) -> Any:
    """Both as one: mappings key by key, anything else is replaced."""
    if not isinstance(values, dict) or not isinstance(over, dict):
        return over
    return {**values, **{key: _merged(values.get(key), value) for key, value in over.items()}}


def _parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    key, equals, value = text.partition("=")
    keys = tuple(part.strip() for part in key.split("."))
    if not equals or not all(keys):
        raise UserError(f"--set {text}: write --set key=value, with dots for nested keys (model.vision=NAME)")
    try:
        return keys, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {text}: the value is not valid YAML; quote it: --set '{key}=\"…\"'") from None


def _assigned(values: Any, keys: tuple[str, ...], value: Any, text: str) -> Any:
    """A copy of `values` with the item at `keys` replaced; mappings on the way are made as needed."""
    if not keys:
        return value
    head, rest = keys[0], keys[1:]
    if isinstance(values, list):
        if not head.isdigit() or int(head) > len(values):
            raise UserError(f"--set {text}: {head!r} is no position in a list of {len(values)}; count from 0")
        position = int(head)
        old = values[position] if position < len(values) else None
        return [*values[:position], _assigned(old, rest, value, text), *values[position + 1 :]]
    if values is not None and not isinstance(values, dict):
        raise UserError(f"--set {text}: what stands before {head!r} is the value {values!r}, not a mapping")
    if values is None and head == "0":
        return [_assigned(None, rest, value, text)]
    old = (values or {}).get(head)
    return {**(values or {}), head: _assigned(old, rest, value, text)}


def _describe(
    model: type[Settings],
    details: ErrorDetails,
    files: Sequence[tuple[Path, Any]],
    assignments: Sequence[tuple[tuple[str, ...], str]],
) -> str:
    keys = tuple(str(part) for part in details["loc"])
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
    """Where the value at `keys` was written: the last override that reaches it, else the last such file."""
    for assigned, text in reversed(assignments):
        if keys[: len(assigned)] == assigned:
            return f"--set {text}"
    return str(_file_of(keys, files) or "settings")


def _file_of(keys: tuple[str, ...], files: Sequence[tuple[Path, Any]]) -> Path | None:
    """The last file that holds the value at `keys` or, where none does, most of the way to it; else the first."""
    depths = [_depth(keys, values) for _, values in files]
    for path, depth in zip(reversed([path for path, _ in files]), reversed(depths), strict=True):
        if depth > 0 and depth == max(depths):
            return path
    return files[0][0] if files else None


def _depth(keys: tuple[str, ...], values: Any) -> int:
    """How many of `keys` a file's nest of values has; what is no mapping decides all that lies below it."""
    for depth, key in enumerate(keys):
        if not isinstance(values, dict):
            return len(keys)
        if key not in values:
            return depth
        values = values[key]
    return len(keys)


def _first_required(model: type[Any], keys: Sequence[str]) -> tuple[str, ...]:
    """Names below a missing part down to one that has no default: a whole part is no value that a person can give."""
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
