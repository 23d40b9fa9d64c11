"""Import path in Serve configs that were written before `jobs.serve.config` existed."""

from jobs.serve.config import application

__all__ = ["application"]
