"""The jobs of the `qformer` command: where each lives, what it takes, how it is explained."""

import json
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Where a job lives and how it is explained."""

    module: str
    """Holds `main(settings)`; an int it returns is the exit code. Imported only when the job runs."""
    settings: str
    """Settings class as "module:Class"."""
    summary: str
    example: str
    options: tuple["Option", ...] = ()
    takes_media: bool = False
    """Files after the options are put into the setting `media`."""
    takes_run: bool = False
    """A folder after the options is put into the setting `run`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A flag of one job, short for a setting or for another job."""

    flag: str
    help: str
    key: str | None = None
    """Setting that gets the value; "true" where the flag has none."""
    metavar: str | None = None
    """What its value is called; None: it has none."""
    job: Job | None = None
    """What runs instead."""

    @property
    def name(self) -> str:
        """Attribute of the parsed arguments."""
        return self.flag.strip("-").replace("-", "_")

    def overrides(self, value: object) -> list[str]:
        """The `--set` that it is short for."""
        if self.key is None:
            return []
        text = str(value).lower() if isinstance(value, bool) else str(value)
        # JSON is YAML, and quotes what YAML would read otherwise.
        return [f"{self.key}={text if text.isalnum() else json.dumps(text, ensure_ascii=False)}"]


CLEAN_FEATURES = Job(
    module="jobs.data.clean_features",
    settings="jobs.data.clean_features:CleanFeaturesSettings",
    summary="remove feature caches that no run refers to; only lists them until confirm=true",
    example="qformer features --clean --set caches=runs --set runs=[runs]",
)


MAKE_KEY = Job(
    module="jobs.serve.make_key",
    settings="jobs.serve.make_key:MakeKeySettings",
    summary="add an API key to the file `api_keys` and print it, this once",
    example="qformer serve --make-key alice --set api_keys=keys.json",
)

WRITE_CONFIG = Job(
    module="jobs.serve.config",
    settings="jobs.serve.config:ServeConfigSettings",
    summary="write the settings as a config that `serve deploy` takes on a cluster, and stop",
    example="qformer serve --config serve.yaml --write-config serve_config.yaml",
)

JOBS = {
    "demo": Job(
        module="jobs.demo.run",
        settings="jobs.demo.settings:DemoSettings",
        summary="run the whole road on a small synthetic world: prepare, train, evaluate, serve, report",
        example="qformer demo",
        options=(Option(flag="--video", help="then learn time and sound, on clips", key="demo.video"),),
    ),
    "prepare": Job(
        module="jobs.data.prepare",
        settings="jobs.settings.jobs:PrepareSettings",
        summary="check every media file, write a manifest of the good rows and a quarantine table of the bad",
        example="qformer prepare --config jobs/configs/examples/prepare.yaml --set output=runs/data",
        options=(
            Option(flag="--dry-run", key="dry_run", metavar="N", help="try N rows of each source and write nothing"),
            Option(
                flag="--retry-quarantined",
                key="retry_quarantined",
                help="try the quarantined files of `output` again",
            ),
        ),
    ),
    "features": Job(
        module="jobs.data.features",
        settings="jobs.settings.jobs:FeaturesSettings",
        summary="run the frozen encoder once over a manifest; training then reads what it saw",
        example="qformer features --config jobs/configs/examples/features.yaml --set output=runs/features",
        options=(
            Option(
                flag="--clean",
                job=CLEAN_FEATURES,
                help=f"{CLEAN_FEATURES.summary}, as in: {CLEAN_FEATURES.example}",
            ),
        ),
    ),
    "train": Job(
        module="jobs.train.job",
        settings="jobs.settings.jobs:TrainSettings",
        summary="train the Q-Former: stage 1 (contrast, match, generate) or stage 2 (prompt a model)",
        example="qformer train --config jobs/configs/recipes/blip2_stage1.yaml --set output=runs/stage1",
        options=(Option(flag="--resume", key="resume", help="continue from the newest checkpoint in `output`"),),
    ),
    "evaluate": Job(
        module="jobs.evaluate.job",
        settings="jobs.settings.jobs:EvaluateSettings",
        summary="score a checkpoint: retrieval after stage 1, captions after stage 2",
        example="qformer evaluate --config jobs/configs/examples/evaluate.yaml --set checkpoint=runs/stage1",
    ),
    "doctor": Job(
        module="jobs.doctor.job",
        settings="jobs.settings.jobs:DoctorSettings",
        summary="tell whether a run's model uses its images, and what is odd in the run; exit code 1 at a problem",
        example="qformer doctor runs/stage1",
        takes_run=True,
    ),
    "caption": Job(
        module="jobs.evaluate.caption",
        settings="jobs.settings.jobs:CaptionSettings",
        summary="caption image and video files, or a whole manifest, with a stage-2 checkpoint",
        example="qformer caption --set checkpoint=runs/stage2 photo.jpg clip.mp4",
        options=(
            Option(
                flag="--manifest",
                key="manifest",
                metavar="MANIFEST",
                help="caption a corpus in place of files, into the folder `output`",
            ),
        ),
        takes_media=True,
    ),
    "import": Job(
        module="jobs.convert.import_checkpoint",
        settings="jobs.settings.jobs:ImportSettings",
        summary="make a checkpoint of a LAVIS file or a Hugging Face BLIP-2 / InstructBLIP folder",
        example="qformer import --set source=blip2-opt-2.7b --set output=runs/blip2-opt",
    ),
    "export": Job(
        module="jobs.convert.export",
        settings="jobs.settings.jobs:ExportSettings",
        summary="write a checkpoint as a folder that stock transformers loads, processor included",
        example="qformer export --set checkpoint=runs/stage2 --set output=runs/huggingface",
    ),
    "serve": Job(
        module="jobs.serve.job",
        settings="jobs.settings.jobs:ServeSettings",
        summary="answer over HTTP as OpenAI's clients ask: chats, embeddings, captions, answers, matches",
        example="qformer serve --set checkpoint=runs/stage2 --set port=8000",
        options=(
            Option(flag="--make-key", key="name", metavar="NAME", job=MAKE_KEY, help=MAKE_KEY.summary),
            Option(flag="--write-config", key="file", metavar="FILE", job=WRITE_CONFIG, help=WRITE_CONFIG.summary),
        ),
    ),
}
