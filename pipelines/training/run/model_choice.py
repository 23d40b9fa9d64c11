"""Frozen models and bridge of a run."""

from dataclasses import dataclass, fields

from pipelines.data.media.audio_sampling import AudioSegments
from pipelines.data.media.frame_sampling import Sampling
from qformer.bridges.config import AudioBranchSizes, AudioConfig
from qformer.bridges.table import IMAGE_BRIDGE, BridgeConfig
from qformer.config import AudioSpec, LanguageSpec, LoraConfig, QFormerSizes, VisionSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioBranchOptions(AudioBranchSizes):
    """The branch of a stage-2 bridge for sound: its sizes, and whether this run trains anything else."""

    trains_alone: bool = False
    """Train and read the branch alone in this run, as Video-LLaMA does; later runs and answers read both branches."""

    def config(self, encoder_width: int) -> AudioConfig:
        """Sizes of the branch for an encoder of that width."""
        sizes = {one.name: getattr(self, one.name) for one in fields(AudioBranchSizes)}
        return AudioConfig(encoder_width=encoder_width, **sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """Frozen models and bridge of a run, checked one by one."""

    stage: int
    vision: VisionSpec
    language: LanguageSpec | None
    tokenizer: str
    """Hub name or folder; for a Q-Former with text branch."""
    max_text_tokens: int
    prompt: str
    num_frames: int
    qformer: QFormerSizes
    sampling: Sampling = Sampling()
    """Choice of the frames, for jobs that load the checkpoint."""
    qformer_init: str | None = None
    """BERT that the Q-Former starts from."""
    init_mismatch: str = "refuse"
    """"refuse" or "reinitialise"."""
    qformer_reads_prompt: bool = False
    """InstructBLIP: the prompt goes to the Q-Former as well as to the LM."""
    lavis_reduction: bool = False
    """Stage 1 equals LAVIS on several ranks, and not one process on the joined batch."""
    freeze_qformer: bool = False
    """MiniGPT-4: the projection alone is trained."""
    lora: LoraConfig | None = None
    bridge: BridgeConfig = IMAGE_BRIDGE
    """Kind and sizes of the bridge."""
    audio: AudioSpec | None = None
    """Audio encoder; None: no sound."""
    audio_branch: AudioBranchOptions = AudioBranchOptions()
    segments: AudioSegments = AudioSegments()
    """Segments of sound; their rate is the encoder's."""
