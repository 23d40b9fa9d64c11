"""What a caption service needs to know."""

from dataclasses import dataclass

from pipelines.data.samples import DecodeSettings
from qformer.config import GenerationSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
    """One captioner behind HTTP.

    Raises:
        ValueError: If the replica bounds cross.
    """

    checkpoint: str
    """Folder or URI of a stage-2 checkpoint that every node can read."""
    model_name: str
    """How answers name the model."""
    decode: DecodeSettings
    """Preprocessing and frames as in training, and what one file may cost."""
    max_body_bytes: int
    request_timeout_s: float
    """A request's whole time: upload, decoding, waiting and generation."""
    max_concurrent_requests: int = 32
    """Requests in work per ingress replica; bounds the memory of bodies. More are told to come again."""
    generation: GenerationSettings = GenerationSettings()
    max_batch_size: int = 8
    """Samples captioned in one pass of the model."""
    batch_wait_s: float = 0.01
    """How long a sample waits for others to share a pass."""
    min_replicas: int = 1
    max_replicas: int = 2
    decode_threads: int = 2
    """Files decoded side by side in an ingress replica."""
    use_gpu: bool = False

    def __post_init__(self) -> None:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} exceeds max_replicas={self.max_replicas}")
