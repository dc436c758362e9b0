"""The smallest app that leaks, for the doctor: it needs nothing but what session-watch itself needs."""

from __future__ import annotations

from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool
from starlette.types import Receive, Scope, Send


class LeakyApp:
    """An ASGI app on a database of its own, in memory."""

    def __init__(self) -> None:
        self.engine = create_engine("sqlite://", poolclass=QueuePool)
        self.kept: list[Session] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer every request, and leave its session open."""
        session = Session(self.engine)
        session.execute(text("SELECT 1"))
        self.kept.append(session)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    def mend(self) -> None:
        """Close all that was left open."""
        for session in self.kept:
            session.close()
        self.engine.dispose()
