"""The jobs of the `qformer` command: module, settings, options and help of each."""

import json
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Module, settings and help of a job."""

    module: str
    """Holds `main(settings)`; an int it returns is the exit code. Imported only when the job runs."""
    settings: str
    """Settings class as "module:Class"."""
    summary: str
    """Purpose, as a clause that begins with a verb."""
    example: str
    more_examples: tuple[str, ...] = ()
    options: tuple["Option", ...] = ()
    takes_media: bool = False
    """Whether files after the options become the setting `media`."""
    takes_run: bool = False
    """Whether a folder after the options becomes the setting `run`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A flag of one job, short for a setting or for another job."""

    flag: str
    help: str
    key: str | None = None
    """Setting that gets the value; "true" for a flag without one."""
    metavar: str | None = None
    """Name of its value in the help; None: no value."""
    job: Job | None = None
    """Job that runs instead."""

    @property
    def name(self) -> str:
        """Attribute of the parsed arguments."""
        return self.flag.strip("-").replace("-", "_")

    def overrides(self, value: object) -> list[str]:
        """The equivalent `--set` overrides."""
        if self.key is None:
            return []
        text = str(value).lower() if isinstance(value, bool) else str(value)
        # JSON is YAML, and quotes what YAML would read otherwise.
        return [f"{self.key}={text if text.isalnum() else json.dumps(text, ensure_ascii=False)}"]


CLEAN_FEATURES = Job(
    module="jobs.data.clean_features",
    settings="jobs.data.clean_features:CleanFeaturesSettings",
    summary="list feature caches that no run refers to; remove them with confirm=true",
    example="qformer features --clean --set caches=runs --set runs=[runs]",
)


MAKE_KEY = Job(
    module="jobs.serve.make_key",
    settings="jobs.serve.make_key:MakeKeySettings",
    summary="add an API key to the file `api_keys` and print it once",
    example="qformer serve --make-key alice --set api_keys=keys.json",
)

WRITE_CONFIG = Job(
    module="jobs.serve.config",
    settings="jobs.serve.config:ServeConfigSettings",
    summary="write the settings as a config for `serve deploy` on a cluster, and stop",
    example="qformer serve --config serve.yaml --write-config serve_config.yaml",
)

JOBS = {
    "demo": Job(
        module="jobs.demo.run",
        settings="jobs.demo.settings:DemoSettings",
        summary="run all jobs on a small synthetic corpus: prepare, train, evaluate, serve, report",
        example="qformer demo",
        more_examples=(
            "qformer demo --set demo.output=runs/demo",
            "qformer demo --video",
        ),
        options=(
            Option(
                flag="--video", help="also train on clips, with the order of frames and with sound", key="demo.video"
            ),
        ),
    ),
    "prepare": Job(
        module="jobs.data.prepare",
        settings="jobs.settings.corpus:PrepareSettings",
        summary="check every media file, write a manifest of the good rows and a quarantine table of the bad",
        example="qformer prepare --config jobs/configs/examples/prepare.yaml --set output=runs/data",
        more_examples=(
            "qformer prepare --set sources.0.path=photos --set output=runs/data",
            "qformer prepare --set sources.0.path=s3://bucket/photos.parquet --set output=runs/data --dry-run 100",
        ),
        options=(
            Option(flag="--dry-run", key="dry_run", metavar="N", help="check N rows of each source and write nothing"),
            Option(
                flag="--retry-quarantined",
                key="retry_quarantined",
                help="check the quarantined files of `output` again",
            ),
        ),
    ),
    "features": Job(
        module="jobs.data.features",
        settings="jobs.settings.corpus:FeaturesSettings",
        summary="run the frozen encoders once over a manifest; training then reads their outputs",
        example="qformer features --config jobs/configs/examples/features.yaml --set output=runs/features",
        more_examples=(
            "qformer features --set vision=facebook/dinov2-base --set data.manifest=runs/data --set output=runs/dino",
            "qformer features --config examples/features --set vision.layer=-1 --set output=runs/last",
        ),
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
        settings="jobs.settings.train:TrainSettings",
        summary="train the Q-Former: stage 1 (contrast, match, generate) or stage 2 (prompt a model)",
        example="qformer train --config jobs/configs/recipes/blip2_stage1.yaml --set output=runs/stage1",
        more_examples=(
            "qformer train --config recipes/blip2_stage1 --set model.vision=facebook/dinov2-base --set steps=1000",
            "qformer train --config runs/stage1/settings.yaml --resume",
        ),
        options=(Option(flag="--resume", key="resume", help="continue from the newest checkpoint in `output`"),),
    ),
    "evaluate": Job(
        module="jobs.evaluate.job",
        settings="jobs.settings.evaluate:EvaluateSettings",
        summary="score a checkpoint: retrieval after stage 1, captions after stage 2",
        example="qformer evaluate --config jobs/configs/examples/evaluate.yaml --set checkpoint=runs/stage1",
        more_examples=(
            "qformer evaluate --set checkpoint=runs/stage1 --set data.manifest=runs/data --set output=runs/scores",
            "qformer evaluate --config examples/evaluate --set checkpoint=runs/stage2 --set generation.num_beams=5",
        ),
    ),
    "doctor": Job(
        module="jobs.doctor.job",
        settings="jobs.settings.evaluate:DoctorSettings",
        summary="check whether a run's model uses its images, and report problems of the run; exit code 1 at a problem",
        example="qformer doctor runs/stage1",
        more_examples=(
            "qformer doctor runs/stage2 --set rows=1024",
            "qformer doctor runs/stage1 --set data.manifest=runs/data --set data.split=test",
        ),
        takes_run=True,
    ),
    "caption": Job(
        module="jobs.evaluate.caption",
        settings="jobs.settings.evaluate:CaptionSettings",
        summary="caption image and video files, or a whole manifest, with a stage-2 checkpoint",
        example="qformer caption --set checkpoint=runs/stage2 photo.jpg clip.mp4",
        more_examples=(
            'qformer caption --set checkpoint=runs/stage2 --set instruction="What is this?" photo.jpg',
            "qformer caption --set checkpoint=runs/stage2 --manifest runs/data --set output=runs/captions",
        ),
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
        settings="jobs.settings.convert:ImportSettings",
        summary="convert a LAVIS file or a Hugging Face BLIP-2 / InstructBLIP folder to a checkpoint",
        example="qformer import --set source=blip2-opt-2.7b --set output=runs/blip2-opt",
        more_examples=(
            "qformer import --config jobs/configs/examples/import.yaml",
            "qformer import --set source=blip2.pth --set vision=eva_giant_patch14_clip_224 --set output=runs/blip2",
        ),
    ),
    "export": Job(
        module="jobs.convert.export",
        settings="jobs.settings.convert:ExportSettings",
        summary="write a checkpoint as a folder for stock transformers, processor included",
        example="qformer export --set checkpoint=runs/stage2 --set output=runs/huggingface",
        more_examples=(
            "qformer export --set checkpoint=runs/stage1/checkpoints/step-00000500 --set output=runs/step-500",
            "qformer export --config jobs/configs/examples/export.yaml",
        ),
    ),
    "serve": Job(
        module="jobs.serve.job",
        settings="jobs.settings.serve:ServeSettings",
        summary="answer over HTTP in OpenAI's format: chats, embeddings, captions, answers, matches",
        example="qformer serve --set checkpoint=runs/stage2 --set port=8000",
        more_examples=(
            "qformer serve --set checkpoint=runs/stage2 --set adapters.search=runs/stage1",
            "qformer serve --set checkpoint=runs/stage2 --set host=0.0.0.0 --set api_keys=keys.json",
        ),
        options=(
            Option(flag="--make-key", key="name", metavar="NAME", job=MAKE_KEY, help=MAKE_KEY.summary),
            Option(flag="--write-config", key="file", metavar="FILE", job=WRITE_CONFIG, help=WRITE_CONFIG.summary),
        ),
    ),
}
