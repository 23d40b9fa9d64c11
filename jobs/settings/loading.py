"""From YAML files and `--set` overrides to checked settings, with errors a person can act on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from jobs.settings.data import Settings
from jobs.settings.messages import describe
from jobs.settings.renamed import with_present_keys
from jobs.settings.specs import is_spec_at, with_long_forms
from qformer.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
"""Settings files that the package ships."""
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
        lines = [describe(model, details, files, assignments) for details in error.errors()]
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


def find_config(config: Path) -> Path:
    """Find the file that `--config` names.

    Args:
        config: A file, or a shipped one as "recipes/blip2_stage1.yaml" (with or without "jobs/configs/" before it) or
            "blip2_stage1". "serve.yaml" never means a shipped file: it is the name of a person's own.

    Returns:
        The file of the working directory where there is one, else the shipped file, else `config` unchanged.
    """
    if config.exists() or config.is_absolute():
        return config
    if len(config.parts) == 1:
        found = sorted(CONFIGS.glob(f"*/{config}.yaml"))
    else:
        relative = config.relative_to("jobs/configs") if config.is_relative_to("jobs/configs") else config
        found = [CONFIGS / relative.with_suffix(".yaml")]
    return found[0] if found and found[0].is_file() else config


class _UniqueKeyLoader(yaml.SafeLoader):
    """Plain YAML lets a repeated key win silently; in a settings file that is always a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in keys and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
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
        raise UserError(f"--set {text}: the key before {head!r} has the value {values!r}, which is no mapping")
    if values is None and head == "0":
        return [_assigned(None, rest, value, text)]
    old = (values or {}).get(head)
    return {**(values or {}), head: _assigned(old, rest, value, text)}
