"""Write a config for `serve deploy`, and build what it names."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BeforeValidator

from jobs.serve.job import APP_NAME, PROXY_GRACE_S, require_guarded, what_to_serve
from jobs.settings.serve import ServeSettings, ServiceSettings
from pipelines.serving.contract.adapters import Backbones

if TYPE_CHECKING:
    from ray import serve

_HEAD = """\
# For a running Ray cluster whose nodes have this package and reach the checkpoints:
#     serve deploy {name}
# Newer checkpoints, other adapters, other keys: write this file anew and deploy it again. As long as `args` stays what
# it was, running replicas take them without a restart. Host, port and timeout hold from the first deployment on.
"""


class ServeConfigSettings(ServeSettings):
    """`qformer serve --write-config FILE`: the settings of `qformer serve`, and where they go."""

    file: str
    """YAML file; one that is there is replaced."""


class ApplicationSettings(ServiceSettings):
    """The `args` of the config: all that a new replica is made of."""

    backbones: Annotated[Backbones, BeforeValidator(Backbones.from_dict)]
    counts_quotas: bool = False
    is_local: bool = False


def application(settings: ApplicationSettings) -> "serve.Application":
    """Build the application on a cluster; Serve tells its deployments the adapters and keys of the config."""
    from pipelines.serving.app.app import build_app

    own = {name: getattr(settings, name) for name in ("backbones", "counts_quotas", "is_local")}
    return build_app(settings.config(**own))


def main(settings: ServeConfigSettings) -> None:
    """Check the settings and write them down.

    Raises:
        UserError: As `qformer serve`.
    """
    require_guarded(settings)
    file = Path(settings.file)
    file.write_text(
        _HEAD.format(name=file.name) + yaml.safe_dump(serve_config(settings), sort_keys=False, allow_unicode=True)
    )
    print(f"wrote {file}; deploy it with: serve deploy {file}")


def serve_config(settings: ServeSettings) -> dict[str, Any]:
    """A config as `serve deploy` takes it.

    Raises:
        UserError: If a checkpoint or the key file cannot be used.
    """
    from pipelines.serving.app.app import user_configs

    # For a cluster: apart unless it is wanted otherwise.
    settings = settings.model_copy(update={"fused": bool(settings.fused)})
    what = what_to_serve(settings)
    own = set(ServiceSettings.model_fields)
    arguments = ApplicationSettings(
        **{name: getattr(settings, name) for name in own},
        backbones=what.config.backbones,
        counts_quotas=what.config.counts_quotas,
        is_local=what.config.is_local,
    )
    live = user_configs(what.config, what.adapters, what.keys)
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
