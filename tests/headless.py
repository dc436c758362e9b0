"""A headless Chromium, driven over its DevTools protocol, and installed first where it is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)
SECONDS = 30
INSTALL_SECONDS = 300


def chromium() -> str:
    """The browser's path; installs Debian's package where it can, and skips where it cannot."""
    found = _found()
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        install = ["apt-get", "install", "--yes", "--no-install-recommends", "chromium"]
        subprocess.run(["apt-get", "update"], capture_output=True, timeout=INSTALL_SECONDS, check=False)
        subprocess.run(install, capture_output=True, timeout=INSTALL_SECONDS, check=False)
        found = _found()
    if found is None:
        pytest.skip("CHROMIUM IS NOT INSTALLED and could not be: apt-get install chromium")
    return found


def _found() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """One tab. ``problems`` are the console's errors and the exceptions, ``requested`` all that was loaded."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = count(1)
        self.problems: list[str] = []
        self.requested: list[str] = []
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; gives its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(SECONDS))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, event: str, told: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.problems.append(str(told["exceptionDetails"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.problems.append(str(told["entry"]))
        elif event == "Network.requestWillBeSent":
            self.requested.append(told["request"]["url"])

    def ask(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression in the page is true."""
        script = f"""new Promise((resolve) => {{
            const over = Date.now() + {(SECONDS - 5) * 1000};
            const look = () => {{
                let held = false;
                try {{ held = Boolean({condition}); }} catch {{ held = false; }}
                if (held || Date.now() > over) resolve(held); else setTimeout(look, 20);
            }};
            look();
        }})"""
        assert self.ask(script), f"{condition}\n{self.problems}\n{self.ask('document.body.innerText')}"

    def open(self, url: str) -> None:
        """Go there and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        text = {"Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text if kind == "keyDown" else "")


@contextmanager
def browsing() -> Iterator[Page]:
    """A tab of a fresh browser."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as browser:
            try:
                assert browser.stderr is not None
                listening = (re.search(r"DevTools listening on ws://([\d.:]+)/", line) for line in browser.stderr)
                address = next(found[1] for found in listening if found)
                tabs = httpx.get(f"http://{address}/json", trust_env=False, timeout=SECONDS).json()
                tab = next(tab for tab in tabs if tab["type"] == "page")
                with connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
                    yield Page(socket)
            finally:
                browser.terminate()
