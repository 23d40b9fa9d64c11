"""User errors inside the exceptions that Ray wraps around them."""

import re
from typing import Any

from qformer.errors import UserError


def find_user_error(error: BaseException) -> UserError | None:
    """Find the user error inside an exception; None if there is none.

    Ray wraps a worker's exception: as a cause, an attribute, one failure per worker, an instance of both classes,
    or (Ray Data) only as the text of a stack trace.
    """
    visited: set[int] = set()
    texts: list[str] = []
    waiting: list[Any] = [error]
    while waiting:
        current = waiting.pop(0)
        if not isinstance(current, BaseException) or id(current) in visited:
            continue
        visited.add(id(current))
        inner = vars(current).get("cause")
        if isinstance(current, UserError) and not isinstance(inner, BaseException):
            return current
        waiting += [inner, current.__cause__, current.__context__]
        waiting += [vars(current).get(name) for name in ("controller_failure", "_base_exc")]
        failures = vars(current).get("worker_failures")
        waiting += failures.values() if isinstance(failures, dict) else []
        texts.append(str(current))
    found = re.search(rf"^{UserError.__module__}\.UserError: (.+)$", "\n".join(texts), re.MULTILINE)
    return UserError(found[1]) if found else None
