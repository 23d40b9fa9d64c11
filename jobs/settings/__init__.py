"""YAML files and `--set` overrides in, one checked settings object a job out."""
