"""Write a config for `serve deploy`."""

from pathlib import Path

import yaml

from jobs.serve import APP_NAME, PROXY_GRACE_S, application, require_guarded, serving_config
from jobs.settings import ServeSettings


class ServeConfigSettings(ServeSettings):
    """`qformer serve --write-config FILE`: the settings of `qformer serve`, and where they go."""

    file: str
    """New YAML file."""


_HEAD = """\
# For a running Ray cluster whose nodes have this package and reach the checkpoints:
#     serve deploy {name}
# After a change (another checkpoint, another adapter) deploy it again: running replicas take new adapters and keys
# without a restart. Host, port and timeout hold from the first deployment on.
"""


def main(settings: ServeConfigSettings) -> None:
    """Check the settings and write them down.

    Raises:
        UserError: As `qformer serve`.
    """
    require_guarded(settings)
    serving_config(settings)
    arguments = settings.model_dump(mode="json", exclude={"file", "host", "port", "ray"}, exclude_defaults=True)
    config = {
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
                "args": arguments,
            }
        ],
    }
    file = Path(settings.file)
    file.write_text(_HEAD.format(name=file.name) + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    print(f"wrote {file}; deploy it with: serve deploy {file}")
