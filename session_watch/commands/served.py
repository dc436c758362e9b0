"""What uvicorn imports for ``session-watch run``: the watched app, or a short word on why there is none."""

from __future__ import annotations

import sys

from session_watch.loading import AppError

STARTUP_FAILURE = 3
"""As uvicorn has it: its parent process starts no other worker in place of one that ended with it."""

try:
    from session_watch.asgi import app
except AppError as error:
    print(f"session-watch run: {error}", file=sys.stderr)
    sys.exit(STARTUP_FAILURE)

__all__ = ["app"]
