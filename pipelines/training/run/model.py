"""A run's model on one rank: built around frozen backbones, saved, restored, and checked to have left them alone."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.data.features.spec import FeatureSpec
from pipelines.data.storage import checkpoint_folders
from pipelines.training.records.accounting import Accounting
from pipelines.training.records.run_times import EncodeTimer
from pipelines.training.run.checkpoint import Checkpoint, TrainingState, copy_to_cpu, load_checkpoint
from pipelines.training.run.frozen_encoders import FrozenEncoders
from pipelines.training.run.model_choice import ModelChoice
from pipelines.training.step.ema import Ema
from pipelines.training.step.objective import Objective
from pipelines.training.step.precision import DTYPES, Precision, PrecisionName
from pipelines.training.step.stages import Encode, GenerationStage, RepresentationStage
from qformer.adapters.lora import Lora
from qformer.backbones import load_language, weights_fingerprint
from qformer.config import QFormerConfig
from qformer.conversion.bert import start_from_bert
from qformer.conversion.checkpoint import TOKENIZER_FOLDER, BridgeInfo
from qformer.conversion.initialisation import require_stage1, start_stage1, start_stage2
from qformer.distributed import mean_of_ranks, world_size
from qformer.errors import UserError
from qformer.language import build_language_model
from qformer.layers import QFormerLayers
from qformer.objectives.stage1 import Stage1
from qformer.objectives.stage2 import Stage2
from qformer.text import TextTokenizer, load_text_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """State of a training that changes with every step, besides the trainables."""

    optimizer: torch.optim.Optimizer
    objective: Objective
    precision: Precision
    ema: Ema | None
    order: str
    """Fingerprint of what decides the order of samples."""


class TrainingRun:
    """Frozen backbones and the trainables of one stage, on one device.

    Args:
        choice: Frozen models and bridge.
        device: Device of the model.
        precision: "bf16" and "fp16" keep frozen weights in that; trainables are always fp32.
        seed: Seed of the trainables' initial weights.
        features: Spec of the feature cache that takes the encoder's place; None runs the encoder.
        init_from: Run or checkpoint that starts this one: of stage 1, or for stage 2 of either; None starts from fresh
            weights, or from the BERT that `choice` names.
        is_compiled: Compile the Q-Former's layers; names and bytes of the weights stay as they are.
        micro_batch: Most samples of this rank that have a graph at a time; None: all.

    Raises:
        UserError: If a backbone cannot be loaded, or settings and checkpoint do not fit.
    """

    def __init__(
        self,
        choice: ModelChoice,
        device: torch.device,
        *,
        precision: PrecisionName,
        seed: int,
        init_from: str | None,
        features: FeatureSpec | None = None,
        is_compiled: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        frozen_dtype = DTYPES[precision] or torch.float32
        self.choice, self._micro_batch = choice, micro_batch
        self.encoders = encoders = FrozenEncoders(choice, device, frozen_dtype, features)
        self.frozen, self.fingerprints = dict(encoders.modules), dict(encoders.fingerprints)
        self.preprocessing, self.encoder_width = encoders.preprocessing, encoders.vision_width
        self.encode, self._encode_audio = EncodeTimer(encoders.encode, device), encoders.encode_audio
        self.audio_sampling = encoders.audio_sampling
        width = encoders.audio_width
        self.audio_branch = None if width is None else choice.audio_branch.config(width)
        self.tokenizer: TextTokenizer | None = None
        self.load_report = "re-initialised: everything"
        torch.manual_seed(seed)
        self.stage: RepresentationStage | GenerationStage
        if choice.stage == 1:
            self.stage = self._representation_stage(self.encode, device, init_from)
        else:
            self.stage = self._generation_stage(self.encode, device, frozen_dtype, init_from)
        self.fingerprints |= {name: weights_fingerprint(module) for name, module in self.frozen.items()}
        self._untrained = self._untrained_fingerprint()
        if is_compiled:
            for module in self.stage.trainables.modules():
                if isinstance(module, QFormerLayers):
                    module.compile(fullgraph=True)

    @property
    def trainable_names(self) -> list[str]:
        """Names of the parameters that the optimizer changes."""
        return sorted(name for name, p in self.stage.trainables.named_parameters() if p.requires_grad)

    @property
    def num_trainable(self) -> int:
        """Number of trainable values."""
        return sum(p.numel() for p in self.stage.trainables.parameters() if p.requires_grad)

    def num_truncated(self) -> int:
        """Texts of all ranks that lost their last words since this process began; every rank must call."""
        return round(mean_of_ranks(self.stage.num_truncated) * world_size())

    def info(self, step: int) -> BridgeInfo:
        """Description of the model after `step` steps."""
        choice = self.choice
        return BridgeInfo(
            stage=choice.stage,
            step=step,
            vision=choice.vision,
            language=choice.language if choice.stage == 2 else None,
            qformer=self.config,
            preprocessing=self.preprocessing,
            num_frames=choice.num_frames,
            sampling=choice.sampling.to_dict(),
            max_text_tokens=choice.max_text_tokens,
            prompt=choice.prompt,
            lora=choice.lora,
            bridge=choice.bridge,
            audio=choice.audio,
            audio_branch=self.audio_branch,
            audio_sampling={} if self.audio_sampling is None else dataclasses.asdict(self.audio_sampling),
        )

    def checkpoint(self, step: int, training: "Training", accounting: Accounting, *, settings: str) -> Checkpoint:
        """A copy of the run's state after `step` steps."""
        raw, ema = copy_to_cpu(self.stage.trainables.state_dict()), training.ema
        log_variances = training.objective.log_variances
        state = TrainingState(
            step=step,
            optimizer=copy_to_cpu(training.optimizer.state_dict()),
            accounting=accounting.state(),
            order=training.order,
            raw_weights=raw if ema else None,
            log_variances=None if log_variances is None else copy_to_cpu(log_variances),
            frozen={name: digest for name, digest in self.fingerprints.items() if name not in self._own_parts},
            workers=world_size(),
            loss_scale=copy_to_cpu(training.precision.state()),
        )
        return Checkpoint(
            info=self.info(step),
            weights=copy_to_cpu(ema.over(raw)) if ema else raw,
            tokenizer=self.tokenizer,
            state=state,
            settings_yaml=settings,
        )

    def restore(self, folder: Path, training: "Training") -> TrainingState:
        """Continue from a checkpoint's local folder.

        Raises:
            UserError: If it is of another model, stage, or order of the data.
        """
        trainables, frozen = self.stage.trainables, self.fingerprints
        state = load_checkpoint(folder, trainables, expected=self.info(0), order=training.order, frozen=frozen)
        if training.ema is not None:
            training.ema.restore(self.stage.trainables.state_dict())
        if state.raw_weights is not None:
            self.stage.trainables.load_state_dict(state.raw_weights)
        if self.choice.lavis_reduction and state.workers not in (0, world_size()):
            raise UserError(
                f"resume: {str(folder)!r} is of {state.workers} workers and there are {world_size()} now, which with "
                f"model.lavis_reduction changes the losses; set workers={state.workers}"
            )
        log_variances = training.objective.log_variances
        if (log_variances is None) != (state.log_variances is None):
            raise UserError("resume: optim.loss_weights.is_learned differs from the run's own; restore it")
        if log_variances is not None and state.log_variances is not None:
            log_variances.data.copy_(state.log_variances)
        own = [{name: group[name] for name in ("weight_decay", "betas")} for group in training.optimizer.param_groups]
        training.optimizer.load_state_dict(state.optimizer)
        for group, settings in zip(training.optimizer.param_groups, own, strict=True):
            group.update(settings)  # they may change in mid-run, as the learning rate may
        training.precision.restore(state.loss_scale)
        self.fingerprints |= {name: weights_fingerprint(part) for name, part in self._own_parts.items()}
        self._untrained = self._untrained_fingerprint()
        return state

    def assert_frozen(self) -> None:
        """Hold invariant 2: frozen is frozen.

        Raises:
            RuntimeError: If a byte of a backbone changed since the run began, or of the bridge where it is not trained.
        """
        for name, module in self.frozen.items():
            if weights_fingerprint(module) != self.fingerprints[name]:
                raise RuntimeError(f"the frozen {name} model changed during training")
        if self._untrained_fingerprint() != self._untrained:
            raise RuntimeError("weights of the bridge that are not trained changed during training")

    def _untrained_fingerprint(self) -> str:
        parameters = self.stage.trainables.named_parameters()
        return weights_fingerprint({name: one for name, one in parameters if not one.requires_grad})

    def _representation_stage(self, encode: Encode, device: torch.device, init_from: str | None) -> RepresentationStage:
        folder = None if init_from is None else checkpoint_folders.whole_checkpoint(init_from)
        if folder is not None:
            require_stage1(folder)  # before its tokenizer, which stage 2 may lack
        self.tokenizer = self._tokenizer(folder)
        self.config = self._config(self.tokenizer.vocab_size, has_lm_head=True)
        stage1 = Stage1(self.config, lavis_reduction=self.choice.lavis_reduction, bridge=self.choice.bridge)
        self._start(stage1)
        if folder is not None:
            allow = self.choice.init_mismatch == "reinitialise"
            self.load_report = str(start_stage1(stage1, folder, allow_mismatch=allow))
        self._record_frozen(stage1.to(device), is_whole=False)
        return RepresentationStage(encode, stage1, self.tokenizer, self._micro_batch)

    def _generation_stage(
        self, encode: Encode, device: torch.device, dtype: torch.dtype, init_from: str | None
    ) -> GenerationStage:
        choice = self.choice
        if choice.language is None:
            raise UserError("model.language is not set; stage 2 needs a language model (hub name or folder)")
        if choice.lavis_reduction:
            raise UserError("model.lavis_reduction belongs to stage 1; leave it out of stage 2")
        if choice.freeze_qformer and init_from is None:
            raise UserError("model.freeze_qformer=true needs a trained Q-Former: set init_from to a run")
        language = build_language_model(*load_language(choice.language, dtype=dtype)).to(device)
        self.frozen["language"] = language.model
        folder = None if init_from is None else checkpoint_folders.whole_checkpoint(init_from)
        if choice.qformer_reads_prompt:
            self.tokenizer = self._tokenizer(folder)
        self.config = self._config(0 if self.tokenizer is None else self.tokenizer.vocab_size, has_lm_head=False)
        lora = Lora(language.model, choice.lora) if choice.lora else None
        try:
            stage2 = Stage2(
                self.config,
                language_width=language.width,
                freeze_qformer=choice.freeze_qformer,
                lora=lora,
                bridge=choice.bridge,
                audio=self.audio_branch,
                trains_audio_alone=choice.audio_branch.trains_alone,
            )
        except ValueError as error:
            raise UserError(f"model.audio_branch: {error}") from error
        self._start(stage2)
        if folder is not None:
            report = start_stage2(
                stage2, folder, language=choice.language, allow_mismatch=choice.init_mismatch == "reinitialise"
            )
            self.load_report = f"{report}; {self.load_report}" if choice.qformer_init else str(report)
        stage2 = stage2.to(device)
        self._record_frozen(stage2, is_whole=choice.freeze_qformer or choice.audio_branch.trains_alone)
        return GenerationStage(
            encode,
            stage2,
            language,
            self.tokenizer,
            prompt=choice.prompt,
            max_tokens=choice.max_text_tokens,
            micro_batch=self._micro_batch,
            encode_audio=self._encode_audio,
        )

    def _record_frozen(self, model: Stage1 | Stage2, *, is_whole: bool) -> None:
        """Record the parts of the bridge that this run does not train, so that `assert_frozen` checks them."""
        self._own_parts = dict(model.bridge.frozen_parts(is_whole=is_whole))
        self.frozen |= self._own_parts

    def _tokenizer(self, folder: Path | None) -> TextTokenizer:
        """The tokenizer of the checkpoint with the initial weights; else the configured one."""
        own = None if folder is None else folder / TOKENIZER_FOLDER
        name = self.choice.tokenizer if own is None or not own.is_dir() else str(own)
        return load_text_tokenizer(name, self.choice.max_text_tokens)

    def _start(self, model: Stage1 | Stage2) -> None:
        """Initialise from a BERT if the settings name one."""
        if self.choice.qformer_init is not None:
            allow = self.choice.init_mismatch == "reinitialise"
            if (qformer := model.bridge.image_qformer) is None:
                kind = self.choice.bridge.kind
                raise UserError(f"model.qformer_init: a BERT starts no bridge of kind={kind}; leave it out")
            self.load_report = str(start_from_bert(qformer, self.choice.qformer_init, allow_mismatch=allow))

    def _config(self, vocab_size: int, *, has_lm_head: bool) -> QFormerConfig:
        width = self.encoder_width
        return QFormerConfig.of(
            self.choice.qformer, encoder_width=width, vocab_size=vocab_size, has_lm_head=has_lm_head
        )
