"""The `qformer` command: one job, its YAML files, a few overrides."""

import argparse
import difflib
import importlib
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jobs.cluster_session import set_ray_environment
from jobs.settings_data import Settings
from jobs.settings_help import describe_settings
from jobs.settings_loading import load, resolved_yaml
from qformer.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Where a job lives and how it is explained."""

    module: str
    """Holds `main(settings)`; an int it returns is the exit code. Imported only when the job runs."""
    settings: str
    """Settings class as "module:Class"."""
    summary: str
    example: str
    takes_media: bool = False
    """Files after the options are put into the setting `media`."""
    takes_run: bool = False
    """A folder after the options is put into the setting `run`."""


JOBS = {
    "demo": Job(
        module="jobs.demo.run",
        settings="jobs.demo.settings:DemoSettings",
        summary="run the whole road on a small synthetic world: prepare, train, evaluate, serve, report",
        example="qformer demo",
    ),
    "prepare": Job(
        module="jobs.prepare",
        settings="jobs.settings:PrepareSettings",
        summary="check every media file, write a manifest of the good rows and a quarantine table of the bad",
        example="qformer prepare --config jobs/configs/prepare.yaml --set output=runs/data",
    ),
    "features": Job(
        module="jobs.features",
        settings="jobs.settings:FeaturesSettings",
        summary="run the frozen encoder once over a manifest; training then reads what it saw",
        example="qformer features --config jobs/configs/features.yaml --set output=runs/features",
    ),
    "train": Job(
        module="jobs.train",
        settings="jobs.settings:TrainSettings",
        summary="train the Q-Former: stage 1 (contrast, match, generate) or stage 2 (prompt a model)",
        example="qformer train --config jobs/configs/blip2_stage1.yaml --set output=runs/stage1",
    ),
    "evaluate": Job(
        module="jobs.evaluate",
        settings="jobs.settings:EvaluateSettings",
        summary="score a checkpoint: retrieval after stage 1, captions after stage 2",
        example="qformer evaluate --config jobs/configs/evaluate.yaml --set checkpoint=runs/stage1",
    ),
    "doctor": Job(
        module="jobs.doctor",
        settings="jobs.settings:DoctorSettings",
        summary="tell whether a run's model uses its images, and what is odd in the run; exit code 1 at a problem",
        example="qformer doctor runs/stage1",
        takes_run=True,
    ),
    "caption": Job(
        module="jobs.caption",
        settings="jobs.settings:CaptionSettings",
        summary="caption image and video files, or a whole manifest, with a stage-2 checkpoint",
        example="qformer caption --set checkpoint=runs/stage2 photo.jpg clip.mp4",
        takes_media=True,
    ),
    "import": Job(
        module="jobs.import_checkpoint",
        settings="jobs.settings:ImportSettings",
        summary="make a checkpoint of a LAVIS file or a Hugging Face BLIP-2 / InstructBLIP folder",
        example="qformer import --set source=blip2-opt-2.7b --set output=runs/blip2-opt",
    ),
    "export": Job(
        module="jobs.export",
        settings="jobs.settings:ExportSettings",
        summary="write a checkpoint as a folder that stock transformers loads, processor included",
        example="qformer export --set checkpoint=runs/stage2 --set output=runs/huggingface",
    ),
    "serve": Job(
        module="jobs.serve",
        settings="jobs.settings:ServeSettings",
        summary="answer POST /v1/caption over HTTP with a stage-2 checkpoint",
        example="qformer serve --set checkpoint=runs/stage2 --set port=8000",
    ),
}


CLEAN_FEATURES = Job(
    module="jobs.clean_features",
    settings="jobs.clean_features:CleanFeaturesSettings",
    summary="remove feature caches that no run refers to; only tells which until confirm=true",
    example="qformer features --clean --set caches=runs --set runs=[runs]",
)
"""What `qformer features --clean` runs, with settings of its own."""


class _Parser(argparse.ArgumentParser):
    """Mistakes on the command line end like every other mistake of the user: one line, exit code 2."""

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
    name = words[0]
    if name not in JOBS:
        nearest = difflib.get_close_matches(name, JOBS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"the jobs are {', '.join(JOBS)}"
        return _report(UserError(f"unknown job {name!r}; {hint}"))
    return run_job(name, words[1:])


def run_job(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one job; `python -m jobs.NAME` ends here too.

    Args:
        name: A key of `JOBS`.
        argv: Words after the job's name; None takes the process's own.

    Returns:
        The exit code, as `main`.

    Raises:
        Exception: What the job raised, when no mistake of the user lies beneath it.
    """
    job = JOBS[name]
    try:
        arguments = _parser(name, job).parse_intermixed_args(argv)
        if getattr(arguments, "clean", False):
            job = CLEAN_FEATURES
        settings = load(_settings_class(job), arguments.config, _overrides(arguments))
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


def find_user_error(error: BaseException) -> UserError | None:
    """The user's mistake beneath an exception, or None.

    Ray hands a worker's exception on inside its own: as a cause, an attribute, one failure per worker, an
    instance that mixes both classes, or (Ray Data) nothing but the text of a stack trace.
    """
    seen: set[int] = set()
    texts: list[str] = []
    waiting: list[Any] = [error]
    while waiting:
        current = waiting.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        inner = vars(current).get("cause")
        if isinstance(current, UserError) and not isinstance(inner, BaseException):
            return current
        waiting += [inner, current.__cause__, current.__context__]
        waiting += [vars(current).get(name) for name in ("controller_failure", "_base_exc")]
        failures = vars(current).get("worker_failures")
        waiting += failures.values() if isinstance(failures, dict) else []
        texts.append(str(current))
    found = re.search(rf"^{UserError.__module__}\.UserError: (.+)$", "\n".join(texts), re.MULTILINE)
    return UserError(found[1]) if found else None


def _settings_class(job: Job) -> type[Settings]:
    module, _, name = job.settings.partition(":")
    found: type[Settings] = getattr(importlib.import_module(module), name)
    return found


def _overrides(arguments: argparse.Namespace) -> list[str]:
    overrides = list(arguments.overrides)
    if getattr(arguments, "resume", False):
        overrides.append("resume=true")
    if getattr(arguments, "retry_quarantined", False):
        overrides.append("retry_quarantined=true")
    if getattr(arguments, "dry_run", None) is not None:
        overrides.append(f"dry_run={arguments.dry_run}")
    for name in ("media", "manifest", "run"):
        if getattr(arguments, name, None):
            # JSON is YAML, and quotes whatever a file name may hold.
            overrides.append(f"{name}={json.dumps(getattr(arguments, name), ensure_ascii=False)}")
    return overrides


def _parser(name: str, job: Job) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"qformer {name}",
        description=f"{job.summary[0].upper()}{job.summary[1:]}.",
        epilog=f"example:\n  {job.example}\n\nkeys:\n{describe_settings(_settings_class(job))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file of settings; may be repeated, later files are merged over earlier ones, key by key",
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
    if name == "train":
        parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in `output`")
    if name == "features":
        parser.add_argument(
            "--clean", action="store_true", help=f"{CLEAN_FEATURES.summary}, as in: {CLEAN_FEATURES.example}"
        )
    if name == "prepare":
        parser.add_argument("--dry-run", metavar="N", help="try N rows of each source and write nothing")
        parser.add_argument(
            "--retry-quarantined", action="store_true", help="try the quarantined files of `output` again"
        )
    if job.takes_media:
        parser.add_argument("media", nargs="*", metavar="FILE", help="image or video files")
        parser.add_argument("--manifest", metavar="MANIFEST", help="a corpus instead of files; needs `output`")
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
        "qformer JOB --help explains one job.",
    ]
    return "\n".join(lines)


def _report(mistake: UserError) -> int:
    for line in str(mistake).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
