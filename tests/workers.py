"""Real servers with several workers, and many clients of them."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60.0
WORKERS = 3
GUNICORN = ("gunicorn", "{app}", "-b", "127.0.0.1:{port}", "-w", str(WORKERS), "-k", "uvicorn_worker.UvicornWorker")
COMMANDS: Mapping[str, Sequence[str]] = {
    "uvicorn": ("uvicorn", "{app}", "--port", "{port}", "--workers", str(WORKERS), "--no-access-log"),
    "gunicorn": GUNICORN,
    "gunicorn --preload": (*GUNICORN, "--preload"),
    "uvicorn, one": ("uvicorn", "{app}", "--port", "{port}"),
}
# Before 0.30 uvicorn's first process neither sees that a worker has died nor starts another.
MINDS_WORKERS = tuple(map(int, uvicorn.__version__.split(".")[:2])) >= (0, 30)
SEVERAL = [kind for kind in COMMANDS if kind != "uvicorn, one"]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass
class Server:
    """A server with several workers. ``log``: what it and they have said so far; ``times``: when who answered."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    times: list[tuple[float, int]] = field(default_factory=list)

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> bytes:
        """Ask once, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path, headers=dict(headers or {}))
            return bytes(connection.getresponse().read())
        finally:
            connection.close()

    def metrics(self) -> Samples:
        """What any of its workers answers for all."""
        return parsed(self.get("/metrics").decode())

    def play(self, plan: Sequence[str], clients: int = 12, per_connection: int = 40) -> None:
        """Request these paths from several clients; who answered is noted in ``answered``."""
        waiting = list(plan)
        with ThreadPoolExecutor(clients) as pool:
            for played in [pool.submit(self._client, waiting, per_connection) for _ in range(clients)]:
                played.result()

    def _client(self, waiting: list[str], per_connection: int) -> None:
        while waiting:
            with suppress(ConnectionError):  # of a worker that was killed
                self._connected(waiting, per_connection)

    def _connected(self, waiting: list[str], per_connection: int) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            for _ in range(per_connection):
                try:
                    path = waiting.pop()
                except IndexError:
                    return
                connection.sendall(f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
                pid = _worker(connection)
                self.answered[path, pid] += 1
                self.times.append((time.monotonic(), pid))

    def pids(self) -> set[int]:
        """The workers that answer now, asked until each has."""
        found: set[int] = set()

        def all_found() -> bool:
            found.add(int(self.get("/who")))
            return len(found) == WORKERS

        wait_until(all_found)
        return found


def _worker(connection: socket.socket) -> int:
    """Who answers: the body is its process id. Read as it comes, for a library's client would take most of the time."""
    answer = b""
    while True:
        # Uvicorn sends head and body apart: the second would wait 40 ms for the acknowledgement of the first.
        if hasattr(socket, "TCP_QUICKACK"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        received = connection.recv(4096)
        if not received:
            raise ConnectionResetError
        answer += received
        head, end, body = answer.partition(b"\r\n\r\n")
        if end and len(body) == int(head.lower().partition(b"content-length:")[2].split()[0]):
            assert head.startswith(b"HTTP/1.1 200"), answer
            return int(body)


def parsed(text: str) -> Samples:
    """Every sample by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of the samples of a name that have these labels."""
    wanted, full = labels.items(), f"session_watch_{name}"
    return sum(value for (each, own), value in samples.items() if each == full and wanted <= dict(own).items())


def wait_until(reached: Callable[[], object]) -> None:
    """Ask until it is so. Raises AssertionError if it never is."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, "never so"
        time.sleep(0.02)


@contextmanager
def serving(
    kind: str, directory: Path | None, log: Path, app: str = "tests.apps.workers:app", **environment: str
) -> Iterator[Server]:
    """Start a server of this kind; it is stopped in the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    known = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    if directory is not None:
        known["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    command = [part.format(app=app, port=port) for part in COMMANDS[kind]]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=known | environment, stdout=output, stderr=output
        )
        server = Server(port, process, log)
        try:
            wait_until(lambda: _answers(server))
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def _answers(server: Server) -> bool:
    assert server.process.poll() is None, server.log.read_text()
    with suppress(OSError):
        return bool(server.get("/metrics"))
    return False
