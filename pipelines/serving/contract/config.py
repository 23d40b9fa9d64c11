"""Settings of a service, fixed at its start. Adapters and keys may change while it runs (`app.ingress.live_config`)."""

from dataclasses import dataclass, field

from pipelines.data.media.samples import Limits
from pipelines.serving.contract.adapters import Backbones
from qformer.config import GenerationSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Autoscaling of a deployment.

    Raises:
        ValueError: If the bounds cross or a value is out of its range.
    """

    min_replicas: int = 1
    """0: no replica while there are no requests; the next request then waits for one to start."""
    max_replicas: int = 2
    num_cpus: float = 1.0
    """CPUs that Ray reserves for a replica; torch uses as many threads."""
    target_requests: float = 8.0
    """Concurrent requests per replica above which Serve starts another."""
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    to_zero_delay_s: float = 600.0
    """Idle time after which the last replica stops, where `min_replicas` is 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(
                f"min_replicas={self.min_replicas} and max_replicas={self.max_replicas}: give 0 <= min <= max, max >= 1"
            )
        delays = (self.upscale_delay_s, self.downscale_delay_s, self.to_zero_delay_s)
        if self.num_cpus < 0 or self.target_requests <= 0 or min(delays) < 0:
            raise ValueError(
                f"num_cpus={self.num_cpus} must be at least 0, target_requests={self.target_requests} above 0 and the "
                f"delays {delays} at least 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class IngressScale(Scale):
    """Autoscaling of the ingress, whose replicas hold no model."""

    num_cpus: float = 0.5
    target_requests: float = 16.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaScale(Scale):
    """Autoscaling of media decoding, which runs in child processes of the replicas."""

    num_cpus: float = 0.5
    target_requests: float = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderScale(Scale):
    """Autoscaling of the vision encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorScale(Scale):
    """Autoscaling of the language model."""

    target_requests: float = 16.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """Limits of one request, and of concurrent requests.

    Raises:
        ValueError: If a limit is not positive.
    """

    max_body_bytes: int = 64 * 2**20
    timeout_s: float = 60.0
    """Total time of a request: upload, decoding, queues and generation."""
    body_timeout_s: float = 20.0
    """Part of `timeout_s` in which the body must arrive."""
    max_concurrent: int = 32
    """Concurrent requests per ingress replica; bounds the memory of bodies. Further ones get 503 with Retry-After."""
    max_media: int = 16
    """Images and videos per request."""
    max_messages: int = 64
    max_text_characters: int = 32_768
    """Total length of all texts, checked before tokenisation."""
    max_prompt_tokens: int = 2048
    """Text tokens of the conversation including the tokenizer's start token; soft prompts are not counted."""
    max_new_tokens: int = 1024
    """Largest accepted `max_tokens`."""
    max_embedding_inputs: int = 64

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingLimits(Limits):
    """Limits for one media file, with a deadline that a waiting client can bear."""

    max_duration_s: float = 3600.0
    """Duration of a video."""
    video_timeout_s: float = 10.0
    """Deadline of one clip's decoding; the decoding process is killed after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchPolicy:
    """Rules for fetching remote media: without hosts, none are fetched.

    Raises:
        ValueError: If a limit is not positive.
    """

    hosts: tuple[str, ...] = ()
    """Exact names, or "*.example.org" for all names below it. Private addresses are refused under every name."""
    allow_http: bool = False
    """Also fetch `http:` URLs, whose content is not protected on the way."""
    max_bytes: int = 64 * 2**20
    timeout_s: float = 15.0
    max_redirects: int = 3

    def __post_init__(self) -> None:
        if self.max_bytes <= 0 or self.timeout_s <= 0 or self.max_redirects < 0:
            raise ValueError(
                f"max_bytes={self.max_bytes} and timeout_s={self.timeout_s} must be positive, "
                f"max_redirects={self.max_redirects} at least 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """Stored form of a client's API key: a hash, never the key itself."""

    name: str
    """Name of the client in logs and metrics."""
    sha256: str
    """Hexadecimal. A fast hash is enough, because keys are 32 random bytes."""
    requests_per_minute: float | None = None
    """Request rate; null: no limit."""
    max_concurrent: int | None = None
    """Concurrent requests; null: no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
    """One encoder and one language model behind HTTP; `app.ingress.live_config` holds adapters and keys."""

    backbones: Backbones
    counts_quotas: bool = False
    """Whether requests of API keys are counted; True where there are keys."""
    is_local: bool = False
    """Whether the service is for this machine alone: without keys, `Host` must then be a loopback name."""
    requests: RequestLimits = field(default_factory=RequestLimits)
    media_limits: Limits = field(default_factory=Limits)
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """Defaults for requests that set nothing else."""
    fused: bool = False
    """Run all workers inside the ingress replicas, which scale by the settings of `ingress`."""
    ingress: IngressScale = field(default_factory=IngressScale)
    media: MediaScale = field(default_factory=MediaScale)
    encoder: EncoderScale = field(default_factory=EncoderScale)
    generator: GeneratorScale = field(default_factory=GeneratorScale)
    decode_children: int = 2
    """Files that a media replica decodes in parallel."""
    max_batch_frames: int = 32
    """Images and frames per encoder pass."""
    max_loaded_adapters: int = 16
    """Adapters that an encoder replica keeps loaded; the least recently used is dropped first."""
    max_sequences: int = 32
    """Answers that a generator replica generates at once; further ones wait."""
    kv_tokens: int = 16_384
    """Size of a generator replica's key-value cache, in tokens of prompts and answers."""
    use_gpu: bool = False

    @property
    def num_cpus(self) -> float:
        """CPUs of a fused replica."""
        return sum(scale.num_cpus for scale in (self.ingress, self.media, self.encoder, self.generator))
