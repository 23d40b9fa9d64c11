"""Settings of `qformer serve`."""

from pydantic import Field

from jobs.settings.data import RaySettings, Settings
from pipelines.serving.contract.adapters import Backbones
from pipelines.serving.contract.config import (
    EncoderScale,
    FetchPolicy,
    GeneratorScale,
    IngressScale,
    MediaScale,
    RequestLimits,
    ServingConfig,
    ServingLimits,
)
from qformer.config import GenerationSettings
from qformer.errors import UserError


class ServiceSettings(Settings):
    """What replicas are made of, whatever they serve."""

    requests: RequestLimits = RequestLimits()
    limits: ServingLimits = ServingLimits()
    fetch: FetchPolicy = FetchPolicy()
    """Remote media; none unless `fetch.hosts` names hosts."""
    generation: GenerationSettings = GenerationSettings()
    """What requests get that do not ask otherwise; without beams."""
    fused: bool | None = None
    """Everything in one replica, without ways between processes, which then scales by `ingress`; null: where this
    command starts Ray itself, on one machine. Else media, encoder and generator are deployments that scale by
    themselves."""
    ingress: IngressScale = IngressScale()
    media: MediaScale = MediaScale()
    encoder: EncoderScale = EncoderScale()
    generator: GeneratorScale = GeneratorScale()
    decode_children: int = Field(default=2, ge=1)
    """Files that a media replica decodes side by side, each in a process of its own."""
    max_batch_frames: int = Field(default=32, ge=1)
    """Images and frames of one pass of the encoder."""
    max_loaded_adapters: int = Field(default=16, ge=1)
    """Adapters that an encoder replica keeps; the one used longest ago goes first."""
    max_sequences: int = Field(default=32, ge=1)
    """Answers that a generator replica writes at a time; others wait."""
    kv_tokens: int = Field(default=16_384, ge=1)
    """Tokens of prompts and answers whose keys and values a generator replica keeps at a time."""
    use_gpu: bool = False
    """One GPU for each replica of encoder and generator, or of everything."""

    def config(self, backbones: Backbones, *, counts_quotas: bool, is_local: bool) -> ServingConfig:
        """What the serving plane takes.

        Raises:
            UserError: If `generation` searches with beams.
        """
        if (num_beams := self.generation.num_beams) > 1:
            raise UserError(
                f"generation.num_beams={num_beams}: answers that share a batch are not searched for with beams; leave "
                "it at 1, or use `qformer evaluate`"
            )
        own = {name: getattr(self, name) for name in ServiceSettings.model_fields if name not in ("limits", "fused")}
        return ServingConfig(
            backbones=backbones,
            counts_quotas=counts_quotas,
            is_local=is_local,
            media_limits=self.limits,
            fused=bool(self.fused),
            **own,
        )


class ServeSettings(ServiceSettings):
    """`qformer serve`: chats, embeddings, captions, answers and matches over HTTP."""

    checkpoint: str
    """Run folder (its newest checkpoint) or one checkpoint folder, of either stage; what a request gets that names no
    model."""
    name: str | None = None
    """How requests name it; null: the run folder's name."""
    adapters: dict[str, str] = {}
    """Further checkpoints over the same frozen encoder and language model, by the names that requests choose."""
    host: str = "127.0.0.1"
    """Loopback unless you mean to open the endpoint to the network, which wants `api_keys`."""
    port: int = Field(default=8000, ge=1, le=65535)
    api_keys: str | None = None
    """File (path or fsspec URI) of those who may ask, as `qformer serve --make-key NAME` writes it; null: everybody."""
    allow_open: bool = False
    """Without API keys, listen beyond loopback, or on loopback under names that are not this machine's."""
    ray: RaySettings = RaySettings()
