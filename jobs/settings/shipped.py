"""The settings files that the package ships in `jobs/configs`, found by name from any working directory."""

from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def find_config(config: Path) -> Path:
    """Find the file that `--config` names.

    Args:
        config: A file, or a shipped one as "recipes/blip2_stage1.yaml" (with or without "jobs/configs/" before it) or
            "blip2_stage1". "serve.yaml" never means a shipped file: it is the name of a person's own.

    Returns:
        The file of the working directory where there is one, else the shipped file, else `config` unchanged.
    """
    if config.exists() or config.is_absolute():
        return config
    if len(config.parts) == 1:
        found = sorted(CONFIGS.glob(f"*/{config}.yaml"))
    else:
        relative = config.relative_to("jobs/configs") if config.is_relative_to("jobs/configs") else config
        found = [CONFIGS / relative.with_suffix(".yaml")]
    return found[0] if found and found[0].is_file() else config
