"""What a service is told when it starts. Which adapters and keys it has may change while it runs (`ingress.Live`)."""

from dataclasses import dataclass, field

from pipelines.data.media.samples import Limits
from pipelines.serving.contract.adapters import Backbones
from qformer.config import GenerationSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How many replicas a deployment has, and when that changes.

    Raises:
        ValueError: If the bounds cross or a value is out of its range.
    """

    min_replicas: int = 1
    """0: none while nobody asks; the first request then waits for one to start."""
    max_replicas: int = 2
    num_cpus: float = 1.0
    """That Ray sets aside for a replica; torch uses as many threads."""
    target_requests: float = 8.0
    """Requests in a replica above which another is started."""
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    to_zero_delay_s: float = 600.0
    """Idle time after which the last replica goes, where `min_replicas` is 0."""

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
    """Cheap replicas that hold no model."""

    num_cpus: float = 0.5
    target_requests: float = 16.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaScale(Scale):
    """Replicas whose decoding children work."""

    num_cpus: float = 0.5
    target_requests: float = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderScale(Scale):
    """Replicas of the vision encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorScale(Scale):
    """Replicas of the language model."""

    target_requests: float = 16.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """What one request may cost.

    Raises:
        ValueError: If a limit is not positive.
    """

    max_body_bytes: int = 64 * 2**20
    timeout_s: float = 60.0
    """The whole time: upload, decoding, waiting and generation."""
    body_timeout_s: float = 20.0
    """Within it, for the body to come in."""
    max_concurrent: int = 32
    """Requests in work per ingress replica; bounds the memory of bodies. More are told to come again."""
    max_media: int = 16
    """Images and videos of one request."""
    max_messages: int = 64
    max_text_characters: int = 32_768
    """Of all texts together, before anything else looks at them."""
    max_prompt_tokens: int = 2048
    """Text tokens of the conversation, with the tokenizer's leading one; soft prompts are not counted."""
    max_new_tokens: int = 1024
    """The most that `max_tokens` may ask for."""
    max_embedding_inputs: int = 64

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchPolicy:
    """Which remote media are fetched: none unless hosts are named.

    Raises:
        ValueError: If a limit is not positive.
    """

    hosts: tuple[str, ...] = ()
    """Exact names, or "*.example.org" for all names below it. Private addresses are refused under every name."""
    allow_http: bool = False
    """Fetch `http:` too, which anyone on the way can change."""
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
    """One client's key, as it is kept: the key itself is known to the client alone."""

    name: str
    """For logs and metrics."""
    sha256: str
    """Hexadecimal. Keys are 32 random bytes, which no one can try out; so a fast hash is enough."""
    requests_per_minute: float | None = None
    """null: no limit."""
    max_concurrent: int | None = None
    """Requests in work at a time; null: no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
    """One encoder and one language model behind HTTP; adapters and keys come by themselves (`live_config`)."""

    backbones: Backbones
    counts_quotas: bool = False
    """Whether there are API keys, whose requests are to be counted."""
    is_local: bool = False
    """Whether it is for this machine alone: while there are no keys, `Host` must be a name of this machine."""
    requests: RequestLimits = field(default_factory=RequestLimits)
    media_limits: Limits = field(default_factory=Limits)
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """What requests get that do not ask otherwise."""
    fused: bool = False
    """Everything in the replicas of the ingress, which then scale by its settings."""
    ingress: IngressScale = field(default_factory=IngressScale)
    media: MediaScale = field(default_factory=MediaScale)
    encoder: EncoderScale = field(default_factory=EncoderScale)
    generator: GeneratorScale = field(default_factory=GeneratorScale)
    decode_children: int = 2
    """Files that a media replica decodes side by side."""
    max_batch_frames: int = 32
    """Images and frames of one pass of the encoder."""
    max_loaded_adapters: int = 16
    """Adapters that an encoder replica keeps; the one used longest ago goes first."""
    max_sequences: int = 32
    """Answers that a generator replica writes at a time; others wait."""
    kv_tokens: int = 16_384
    """Tokens of prompts and answers whose keys and values a generator replica keeps at a time."""
    use_gpu: bool = False

    @property
    def num_cpus(self) -> float:
        """Of one replica of everything."""
        return sum(scale.num_cpus for scale in (self.ingress, self.media, self.encoder, self.generator))
