"""What a worker knows of its server: how many of its kind there are, and where it listens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from session_watch import server


@pytest.mark.parametrize(
    ("environ", "number"),
    [
        pytest.param({"WEB_CONCURRENCY": "4"}, 4, id="told"),
        pytest.param({"WEB_CONCURRENCY": "many"}, None, id="no number"),
        pytest.param({}, None, id="nothing"),
    ],
)
def test_workers_by_the_environment(environ: dict[str, str], number: int | None) -> None:
    """Without a server that says more, its variable counts."""
    assert server._by_environment(environ) == number


@pytest.mark.parametrize(
    ("arguments", "workers"),
    [
        pytest.param(["/bin/uvicorn", "app:app", "--workers", "3"], 3, id="an option"),
        pytest.param(["/bin/gunicorn", "-w", "3"], 3, id="a short one"),
        pytest.param(["/bin/gunicorn", "-w3"], 3, id="in one"),
        pytest.param(["/bin/granian", "--workers=3"], 3, id="with a sign"),
        pytest.param(["/bin/uvicorn", "app:app", "--workers"], None, id="nothing after it"),
        pytest.param(["/bin/uvicorn", "app:app", "--ws", "3"], None, id="another option"),
        pytest.param(["/bin/pytest", "-w", "3"], None, id="no server"),
        pytest.param([], None, id="nothing"),
    ],
)
def test_workers_on_the_command_line(arguments: list[str], workers: int | None) -> None:
    """As the servers' own command lines have them."""
    assert server._by_option(arguments) == workers


SERVED = """
import asyncio, os, socket, sys, uvicorn
from session_watch import server

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        print(server.workers(), server.address(), flush=True)
        await receive()
        os._exit(0)

def served(**options):
    return uvicorn.Server(uvicorn.Config(app, **{"port": 4711, "lifespan": "on", **options}))

own = socket.create_server(("127.0.0.1", 0))
print(own.getsockname()[1], flush=True)
"""


@pytest.mark.parametrize(
    ("started", "workers", "address"),
    [
        pytest.param("served().run()", 1, "('127.0.0.1', 4711)", id="one"),
        pytest.param("served(workers=3).run()", 3, "('127.0.0.1', 4711)", id="three"),
        pytest.param("served(workers=3, reload=True).run()", 1, "('127.0.0.1', 4711)", id="anew at each change"),
        pytest.param("asyncio.run(served().serve())", 1, "('127.0.0.1', 4711)", id="in a loop of one's own"),
        pytest.param("served().run(sockets=[own])", 1, "('127.0.0.1', {own})", id="with a socket"),
        pytest.param("asyncio.run(served().serve(sockets=[own]))", 1, "('127.0.0.1', {own})", id="both"),
        pytest.param("served(port=0).run()", 1, "None", id="any port"),
        pytest.param("served(fd=own.fileno()).run()", 1, "None", id="with a descriptor"),
        pytest.param("served(uds='here.sock').run()", 1, "None", id="with a file"),
    ],
)
def test_as_uvicorn_is_started(tmp_path: Path, started: str, workers: int, address: str) -> None:
    """A real server's configuration is found from inside the application, and the sockets it was given."""
    (tmp_path / "served.py").write_text(SERVED + started)
    command = [sys.executable, "served.py"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True).stdout
    own, said = told.splitlines()[:2]
    assert said == f"{workers} {address.format(own=own)}"
