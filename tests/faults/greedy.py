"""An app for a server of its own, which may use only so much memory and has a route that uses it up."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from session_watch import SessionWatchMiddleware
from tests.faults.shop import SELECT, SyncShop

# Bytes beyond what the process has when it starts.
SPARE = 300_000_000


class GreedyShop(SyncShop):
    """With a route that takes all the memory there is, in a transaction."""

    def __init__(self, url: str) -> None:
        super().__init__(url, pool_logging_name="main")
        self.add("GET", "/greedy", self.greedy)

    def greedy(self) -> str:
        """Fails with MemoryError, and lets go of it all."""
        with self.session("/greedy") as session:
            session.scalar(SELECT)
            hoard = []
            while True:
                hoard.append(bytearray(1_000_000))


app = GreedyShop(os.environ["DATABASE"]).app
app.add_middleware(SessionWatchMiddleware, metrics_path="/metrics")
if hasattr(resource, "RLIMIT_AS"):
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
