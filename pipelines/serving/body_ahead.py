"""The path that RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names on clusters."""

from pipelines.serving.http.body_ahead import proxy_middlewares

__all__ = ["proxy_middlewares"]
