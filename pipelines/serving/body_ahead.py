"""Import path that clusters give to Ray Serve's proxies as RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""

from pipelines.serving.http.body_transfer import proxy_middlewares

__all__ = ["proxy_middlewares"]
