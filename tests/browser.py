"""A real headless Chromium for the tests, driven through its DevTools protocol; installed where it is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

START_SECONDS = 30.0
WAIT_SECONDS = 10.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--host-resolver-rules=MAP rebound.example 127.0.0.1",  # somebody's name that leads here
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
INSTALL = (("apt-get", "update", "-qq"), ("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"))


@cache
def chromium() -> str:
    """The browser's path, installed with apt-get if need be; the test that asks is skipped where it cannot be."""
    found = _found()
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        for command in INSTALL:
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, timeout=600)
        found = _found()
    if found is None:
        pytest.skip(
            "NOT tested in a browser: there is no Chromium, and apt-get install chromium (as root) did not give one"
        )
    return found


def _found() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def running() -> Iterator[Browser]:
    """A browser with a fresh profile."""
    with tempfile.TemporaryDirectory(prefix="session-watch-chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = _port(process, Path(profile, "DevToolsActivePort"))
            with channel(_json(f"http://127.0.0.1:{port}/json/version")["webSocketDebuggerUrl"]) as root:
                yield Browser(port, root)
        finally:
            process.terminate()
            process.wait(10)


def _port(process: subprocess.Popen[bytes], file: Path) -> int:
    """Chromium writes the port it has chosen into a file."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) > 1:
            return int(lines[0])
        time.sleep(0.02)
    raise RuntimeError(f"Chromium did not start in {START_SECONDS:g} s")


class Browser:
    """One running browser; ``tab`` opens a page of its own, with its own cookies and storage."""

    def __init__(self, port: int, root: Channel) -> None:
        self._port = port
        self._root = root

    @contextmanager
    def tab(self, **emulation: Any) -> Iterator[Tab]:
        """A tab; ``width`` and ``height`` in pixels, ``scheme`` is ``light`` or ``dark``."""
        context = self._root.call("Target.createBrowserContext")["browserContextId"]
        target = self._root.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        try:
            with channel(f"ws://127.0.0.1:{self._port}/devtools/page/{target}") as open_channel:
                tab = Tab(open_channel)
                tab.emulate(**emulation)
                yield tab
        finally:
            self._root.call("Target.disposeBrowserContext", browserContextId=context)


def _json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


class Channel:
    """One connection to the protocol: calls and their answers, and the events that come between."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = count(1)
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method; what it answers. Raises RuntimeError for a refusal."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)


@contextmanager
def channel(url: str) -> Iterator[Channel]:
    """Connected for the block."""
    with connect(url, max_size=None) as socket:
        yield Channel(socket)


KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "/": (191, "/"), "p": (80, "p"), "t": (84, "t")}
TROUBLE = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")


class Tab:
    """A page as somebody sees and uses it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        for domain in ("Page", "Runtime", "Log", "Network"):
            channel.call(f"{domain}.enable")

    def emulate(self, *, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        """Take on a size and a colour scheme."""
        self.channel.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.channel.call("Emulation.setEmulatedMedia", features=features)

    def go(self, url: str) -> None:
        """Open an address and wait for it to be loaded."""
        self.channel.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def js(self, expression: str) -> Any:
        """What an expression is worth, awaited if it is a promise."""
        answer = self.channel.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = WAIT_SECONDS) -> float:
        """Wait until a condition holds; after how many seconds it did. AssertionError if it does not."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            try:
                if self.js(f"Boolean({condition})"):
                    return time.monotonic() - begun
            except RuntimeError:  # between two documents
                pass
            time.sleep(0.02)
        raise AssertionError(f"not within {seconds:g} s: {condition}; the page shows: {self.text()[:2000]}")

    def text(self) -> str:
        """What the page shows as text."""
        return str(self.js("document.body.innerText"))

    def press(self, key: str) -> None:
        """Press and release a key."""
        code, text = KEYS[key]
        common = {"key": key, "windowsVirtualKeyCode": code}
        self.channel.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.channel.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.channel.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """Save what is visible as a PNG."""
        path.write_bytes(b64decode(self.channel.call("Page.captureScreenshot", format="png")["data"]))

    def requested(self) -> list[str]:
        """The addresses of all that was loaded since the tab was opened."""
        sent = (event for event in self.channel.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def trouble(self) -> list[str]:
        """Errors and warnings on the console, uncaught exceptions and breaches of the content security policy."""
        self.js("1")  # what happened before has been told by then
        return [json.dumps(event["params"])[:500] for event in self.channel.events if _is_trouble(event)]


def _is_trouble(event: dict[str, Any]) -> bool:
    if event.get("method") not in TROUBLE:
        return False
    entry = event["params"].get("entry", event["params"])
    return entry.get("level", entry.get("type", "error")) in ("error", "warning", "assert")
