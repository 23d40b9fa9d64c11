"""Write a config for `serve deploy`, and build the application that it names."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BeforeValidator

from jobs.serve.job import APP_NAME, PROXY_GRACE_S, require_protection, resolve_service
from jobs.settings.serve import ServeSettings, ServiceSettings
from pipelines.serving.contract.adapters import Backbones

if TYPE_CHECKING:
    from ray import serve

_HEAD = """\
# For a running Ray cluster whose nodes have this package and can read the checkpoints:
#     serve deploy {name}
# For newer checkpoints, other adapters or keys, write this file again and deploy it again. While `args` is unchanged,
# running replicas take the change without a restart. Host, port and timeout are fixed by the first deployment.
"""


class ServeConfigSettings(ServeSettings):
    """`qformer serve --write-config FILE`: write the settings of `qformer serve` as a config for `serve deploy`."""

    file: str
    """YAML file; an existing one is replaced."""


class ApplicationSettings(ServiceSettings):
    """The `args` of the config: all settings of a new replica."""

    backbones: Annotated[Backbones, BeforeValidator(Backbones.from_dict)]
    counts_quotas: bool = False
    is_local: bool = False


def application(settings: ApplicationSettings) -> "serve.Application":
    """Build the application on a cluster; the user_config of its deployments holds adapters and keys."""
    from pipelines.serving.app.app import build_app

    own = {name: getattr(settings, name) for name in ("backbones", "counts_quotas", "is_local")}
    return build_app(settings.config(**own))


def main(settings: ServeConfigSettings) -> None:
    """Check the settings and write the config.

    Raises:
        UserError: If `qformer serve` would refuse the settings.
    """
    require_protection(settings)
    file = Path(settings.file)
    file.write_text(
        _HEAD.format(name=file.name) + yaml.safe_dump(serve_config(settings), sort_keys=False, allow_unicode=True)
    )
    print(f"wrote {file}; deploy it with: serve deploy {file}")


def serve_config(settings: ServeSettings) -> dict[str, Any]:
    """Build a config for `serve deploy`.

    Raises:
        UserError: If a checkpoint or the key file cannot be used.
    """
    from pipelines.serving.app.app import user_configs

    # On a cluster, the deployments are separate unless the settings say otherwise.
    settings = settings.model_copy(update={"fused": bool(settings.fused)})
    service = resolve_service(settings)
    own = set(ServiceSettings.model_fields)
    arguments = ApplicationSettings(
        **{name: getattr(settings, name) for name in own},
        backbones=service.config.backbones,
        counts_quotas=service.config.counts_quotas,
        is_local=service.config.is_local,
    )
    live = user_configs(service.config, service.adapters, service.keys)
    return {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": settings.host,
            "port": settings.port,
            "request_timeout_s": settings.requests.timeout_s + PROXY_GRACE_S,
        },
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": f"{application.__module__}:{application.__name__}",
                "args": arguments.model_dump(mode="json", exclude_defaults=True),
                "deployments": [{"name": name, "user_config": values} for name, values in live.items()],
            }
        ],
    }
