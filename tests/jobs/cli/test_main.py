"""The command: help, exit codes, and the user's mistake found beneath Ray's wrapping."""

import importlib
import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.cli import main as cli
from jobs.settings.data import Settings
from qformer.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]
CAPTION = ["--set", "checkpoint=nowhere"]


class WrittenJob:
    """A real module on the path whose `main` does what a test wrote into it."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.syspath_prepend(folder)

    def write(self, name, body):
        (self.folder / f"{name}.py").write_text(f"def main(settings):\n    {body}\n")
        importlib.invalidate_caches()
        job = cli.Job(module=name, settings="jobs.settings.data:Settings", summary="a test", example="")
        self.monkeypatch.setitem(cli.JOBS, name, job)
        return name


@pytest.fixture
def job(tmp_path, monkeypatch):
    return WrittenJob(tmp_path, monkeypatch)


def test_help_lists_every_job_and_loads_nothing_heavy():
    heavy = "{'torch', 'ray', 'pandas', 'transformers'}"
    code = f"import sys, jobs.cli.main; jobs.cli.main.main([]); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"  {name} " in done.stdout for name in ("demo", "prepare", "train", "evaluate", "caption", "serve"))


@pytest.mark.parametrize("name", list(cli.JOBS))
def test_help_of_each_job_shows_its_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    job, lines = cli.JOBS[name], capsys.readouterr().out.splitlines()
    place = lines.index("examples:")
    assert lines[0] == f"{job.summary[0].upper()}{job.summary[1:]}." and place <= 9
    assert lines[place + 1 : place + 4] == [f"  {example}" for example in (job.example, *job.more_examples)]
    assert len(lines) < 60


@pytest.mark.parametrize("name", list(cli.JOBS))
def test_every_example_of_a_job_is_settings_that_load(name, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for example in (cli.JOBS[name].example, *cli.JOBS[name].more_examples):
        words = shlex.split(example.replace("runs/stage1/settings.yaml", "jobs/configs/recipes/blip2_stage1.yaml"))
        assert words[:2] == ["qformer", name]
        assert cli.main([*words[1:], "--show-config"]) == 0, example


def test_help_lists_the_required_keys(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    required = [line.split()[0] for line in lines[lines.index("required keys:") + 1 : lines.index("examples:")]]
    assert required == ["output", "stage", "model.vision", "data.manifest", "steps", "batch_size"]


def test_version_is_the_installed_package_s(capsys, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"qformer": "1.2.3"}[name])
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "qformer 1.2.3\n"


def test_version_of_a_clone_that_is_not_installed_is_one_line(capsys, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert cli.main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert "not installed" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("name", list(cli.JOBS))
def test_each_job_has_its_settings_class_and_its_file(name):
    assert issubclass(cli._settings_class(cli.JOBS[name]), Settings)
    assert (REPOSITORY / cli.JOBS[name].module.replace(".", "/")).with_suffix(".py").is_file()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["trian"], "error: unknown job 'trian'; did you mean 'train'?"),
        (
            ["zzz"],
            "error: unknown job 'zzz'; the jobs are demo, prepare, features, train, evaluate, doctor, caption, import, "
            "export, serve",
        ),
        (["serve", "--prot", "3"], "error: unrecognized arguments: --prot 3; see `qformer serve --help`"),
        (["serve", "--config"], "error: argument --config: expected one argument; see `qformer serve --help`"),
        (
            ["serve", "--set", "checkpoint=a", "--set", "prot=3"],
            "error: --set prot=3: unknown key 'prot'; did you mean port?",
        ),
        (["caption", *CAPTION], "error: settings: give either media (files) or manifest (a corpus)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, expected, capsys):
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err == f"{expected}\n"
    assert printed.out == ""


def test_show_config_prints_the_resolved_settings_and_runs_nothing(capsys):
    assert cli.main(["serve", "--set", "checkpoint=c", "--show-config"]) == 0
    assert "port: 8000" in capsys.readouterr().out


def test_media_files_stand_anywhere_and_keep_their_names(capsys):
    names = ['b "x" é😀.mp4', "c: [d].jpg"]
    assert cli.main(["caption", names[0], *CAPTION, "--show-config", names[1]]) == 0
    shown = capsys.readouterr().out
    assert all(f"- {name}" in shown or f"- '{name}'" in shown for name in names)


def test_resume_sets_the_setting(capsys):
    config = ["--config", str(REPOSITORY / "jobs/configs/recipes/blip2_stage1.yaml"), "--show-config"]
    assert cli.main(["train", *config, "--resume"]) == 0
    assert "resume: true" in capsys.readouterr().out


def test_video_sets_the_setting(capsys):
    for words, value in ((["--video"], "true"), ([], "false")):
        assert cli.main(["demo", *words, "--show-config"]) == 0
        assert f"  video: {value}\n" in capsys.readouterr().out


def test_config_is_given_several_times(tmp_path, capsys):
    (tmp_path / "over.yaml").write_text("optim: {learning_rate: 0.5}\nsteps: 3\n")
    words = ["train", "--config", str(REPOSITORY / "jobs/configs/recipes/blip2_stage1.yaml"), "--show-config"]
    assert cli.main([*words, "--config", str(tmp_path / "over.yaml"), "--set", "steps=4"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["optim"]["learning_rate"], shown["optim"]["warmup_steps"], shown["steps"]) == (0.5, 2000, 4)
    (tmp_path / "over.yaml").write_text("stpes: 3\n")
    assert cli.main([*words, "--config", str(tmp_path / "over.yaml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/over.yaml: unknown key 'stpes'; did you mean steps?\n"


def test_flags_of_prepare_set_the_settings(capsys):
    config = ["--config", str(REPOSITORY / "jobs/configs/examples/prepare.yaml"), "--show-config"]
    assert cli.main(["prepare", *config, "--dry-run", "20"]) == 0
    assert "dry_run: 20" in capsys.readouterr().out
    assert cli.main(["prepare", *config, "--retry-quarantined"]) == 0
    assert "retry_quarantined: true" in capsys.readouterr().out
    assert cli.main(["prepare", *config, "--dry-run", "some"]) == 2
    assert "dry_run=some" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return None", 0),
        ("return {'rows': 3}", 0),
        ("return 1", 1),
        ("raise KeyboardInterrupt", 130),
        ("from qformer.errors import UserError; raise UserError('x=3 is odd; make it even')", 2),
    ],
)
def test_exit_codes(job, body, expected):
    assert cli.run_job(job.write(f"job_{abs(hash(body))}", body), []) == expected


def test_a_programming_error_keeps_its_trace(job):
    with pytest.raises(ZeroDivisionError):
        cli.run_job(job.write("job_bug", "return 1 / 0"), [])


def test_python_m_runs_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "serve", "--set", "port=x"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "port = 'x'" in done.stderr and "Traceback" not in done.stderr


def test_user_error_beneath_plain_causes():
    try:
        try:
            raise UserError("the one")
        except UserError as error:
            raise RuntimeError("wrapped") from error
    except RuntimeError as wrapped:
        assert str(cli.find_user_error(wrapped)) == "the one"
    assert cli.find_user_error(RuntimeError("no mistake of the user")) is None


def test_user_error_beneath_ray(ray_local):
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    def fail(*_):
        raise UserError("batch_size=9 is odd; make it even")

    with pytest.raises(Exception) as from_task:  # noqa: B017, PT011
        ray_local.get(ray_local.remote(fail).options(max_retries=0).remote())
    with pytest.raises(Exception) as from_data:  # noqa: B017, PT011
        ray_local.data.range(2).map_batches(fail).take_all()
    wrapped = [
        from_task.value,
        from_data.value,
        WorkerGroupError("two workers failed", {0: RuntimeError("other"), 1: from_task.value}),
        ControllerError(UserError("batch_size=9 is odd; make it even")),
    ]
    for error in wrapped:
        assert str(cli.find_user_error(error)) == "batch_size=9 is odd; make it even", type(error)
