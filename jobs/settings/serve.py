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
    """Sizes and limits of the replicas."""

    requests: RequestLimits = RequestLimits()
    limits: ServingLimits = ServingLimits()
    fetch: FetchPolicy = FetchPolicy()
    """Download of remote media; none unless `fetch.hosts` names hosts."""
    generation: GenerationSettings = GenerationSettings()
    """Defaults of requests; beam search is not available."""
    fused: bool | None = None
    """Whether one replica does everything, which then scales by `ingress`; false: media, encoder and generator are
    deployments that scale separately; null: true if this command starts Ray itself, on one machine."""
    ingress: IngressScale = IngressScale()
    media: MediaScale = MediaScale()
    encoder: EncoderScale = EncoderScale()
    generator: GeneratorScale = GeneratorScale()
    decode_children: int = Field(default=2, ge=1)
    """Files that a media replica decodes in parallel, each in a separate process."""
    max_batch_frames: int = Field(default=32, ge=1)
    """Images and frames of one pass of the encoder."""
    max_loaded_adapters: int = Field(default=16, ge=1)
    """Most adapters in the memory of an encoder replica; the least recently used is removed first."""
    max_sequences: int = Field(default=32, ge=1)
    """Answers that a generator replica generates at a time; others wait."""
    kv_tokens: int = Field(default=16_384, ge=1)
    """Tokens in the key-value cache of a generator replica, of prompts and answers."""
    use_gpu: bool = False
    """One GPU for each replica of encoder and generator, or of everything."""

    def config(self, backbones: Backbones, *, counts_quotas: bool, is_local: bool) -> ServingConfig:
        """Build the configuration of the serving plane.

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
    """Name of the checkpoint in requests; null: the run folder's name."""
    adapters: dict[str, str] = {}
    """Further checkpoints for the same frozen encoder and language model, by their names in requests."""
    host: str = "127.0.0.1"
    """Loopback unless you mean to open the endpoint to the network, which wants `api_keys`."""
    port: int = Field(default=8000, ge=1, le=65535)
    api_keys: str | None = None
    """File (path or fsspec URI) of API keys, as `qformer serve --make-key NAME` writes it; null: open access."""
    allow_open: bool = False
    """Without API keys, listen beyond loopback, or on loopback under names that are not this machine's."""
    ray: RaySettings = RaySettings()
