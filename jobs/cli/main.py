"""The `qformer` command: one job, its YAML files, a few overrides."""

import argparse
import difflib
import importlib
import importlib.metadata
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jobs.cli.catalogue import JOBS, Job
from jobs.cluster.exceptions import find_user_error
from jobs.cluster.session import set_ray_environment
from jobs.settings.data import Settings
from jobs.settings.help import describe_required, describe_settings
from jobs.settings.loading import load, resolved_yaml
from qformer.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are the user's: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qformer JOB …`.

    Args:
        argv: Words after `qformer`; None takes the process's own.

    Returns:
        The exit code: the job's own, 2 for a mistake of the user, 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"qformer {_version()}")
        return 0
    name = words[0]
    if name not in JOBS:
        nearest = difflib.get_close_matches(name, JOBS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"the jobs are {', '.join(JOBS)}"
        return _report(UserError(f"unknown job {name!r}; {hint}"))
    return run_job(name, words[1:])


def run_job(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one job; also the entry of `python -m jobs.NAME`.

    Args:
        name: A key of `JOBS`.
        argv: Words after the job's name; None takes the process's own.

    Returns:
        The exit code, as `main`.

    Raises:
        Exception: Error of the job that no mistake of the user caused.
    """
    job = JOBS[name]
    try:
        arguments = _parser(name, job).parse_intermixed_args(argv)
        overrides = list(arguments.overrides)
        for option in job.options:
            if (value := getattr(arguments, option.name)) not in (None, False):
                overrides += option.overrides(value)
                job = option.job or job
        overrides += _positional(arguments)
        settings = load(_settings_class(job), arguments.config, overrides)
        if arguments.show_config:
            print(resolved_yaml(settings), end="")
            return 0
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
        # One line for each request is a client's detail, not a job's progress.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        set_ray_environment()
        result = importlib.import_module(job.module).main(settings)
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        mistake = find_user_error(error)
        if mistake is None:
            raise
        return _report(mistake)


def _settings_class(job: Job) -> type[Settings]:
    module, _, name = job.settings.partition(":")
    found: type[Settings] = getattr(importlib.import_module(module), name)
    return found


def _positional(arguments: argparse.Namespace) -> list[str]:
    # JSON is YAML, and quotes whatever a file name may hold.
    given = {name: getattr(arguments, name, None) for name in ("media", "run")}
    return [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items() if value]


def _version() -> str:
    try:
        return importlib.metadata.version("qformer")
    except importlib.metadata.PackageNotFoundError:
        return "of a clone that is not installed; `pip install .` gives it a version"


class _HelpAll(argparse.Action):
    """Print the help with every key, and stop."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, settings: type[Settings], help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self._settings = settings

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"{parser.format_help()}\nkeys:\n{describe_settings(self._settings)}")
        parser.exit()


def _introduction(job: Job) -> str:
    """Purpose, required keys and examples of a job: the first lines of its help."""
    required = describe_required(_settings_class(job))
    return "\n".join(
        [
            f"{job.summary[0].upper()}{job.summary[1:]}.",
            "",
            "required keys:" if required else "No key is required.",
            *(f"  {line}" for line in required),
            "examples:",
            *(f"  {example}" for example in (job.example, *job.more_examples)),
        ]
    )


def _parser(name: str, job: Job) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"qformer {name}",
        usage=argparse.SUPPRESS,
        description=_introduction(job),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--help-all", action=_HelpAll, settings=_settings_class(job), help="show every key with its default, and exit"
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file of settings, or the name of a shipped one (recipes/blip2_stage1); may be repeated, later files "
        "are merged over earlier ones, key by key",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting of the files, with dots for nested keys; may be repeated",
    )
    parser.add_argument("--show-config", action="store_true", help="print the resolved settings and stop")
    for option in job.options:
        if option.metavar is None:
            parser.add_argument(option.flag, action="store_true", help=option.help)
        else:
            parser.add_argument(option.flag, metavar=option.metavar, help=option.help)
    if job.takes_media:
        parser.add_argument("media", nargs="*", metavar="FILE", help="image or video files")
    if job.takes_run:
        parser.add_argument("run", nargs="?", metavar="RUN", help="run folder of `qformer train`")
    return parser


def _overview() -> str:
    width = max(map(len, JOBS))
    lines = [
        "usage: qformer JOB [--config FILE …] [--set KEY=VALUE …] [--show-config]",
        "",
        "Train and serve Q-Former vision-language bridges on Ray.",
        "",
        "jobs:",
        *(f"  {name:<{width}}  {job.summary}" for name, job in JOBS.items()),
        "",
        "examples:",
        *(f"  {job.example}" for job in JOBS.values()),
        "",
        "qformer JOB --help explains a job, --help-all lists its keys; qformer --version prints the version.",
    ]
    return "\n".join(lines)


def _report(mistake: UserError) -> int:
    for line in str(mistake).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return EXIT_USER_ERROR
