"""The import path of Serve configs written before `jobs.serve.config` was its place."""

from jobs.serve.config import application

__all__ = ["application"]
