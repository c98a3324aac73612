"""A headless Chromium for tests, driven through chromedriver's WebDriver protocol with the standard library alone."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


class Browser:
    """One session: a window that opens files, runs scripts, clicks, hovers and takes pictures."""

    def __init__(self, address: str, capabilities: dict[str, Any]) -> None:
        self.address = address
        found = self._send("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.address = f"{address}/session/{found['sessionId']}"

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path: Path) -> None:
        self._send("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page; `return` gives its value, `arguments` holds the arguments."""
        return self._send("POST", "/execute/sync", {"script": script, "args": arguments})

    def resize(self, width: int, height: int) -> None:
        self._send("POST", "/window/rect", {"width": width, "height": height})

    def dark(self, on: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": [feature]}}
        self._send("POST", "/goog/cdp/execute", command)

    def move(self, x: float, y: float, *, click: bool = False) -> None:
        """Move a real mouse to a place in the window, and click there if asked."""
        steps: list[dict[str, Any]] = [{"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0}]
        if click:
            steps += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}
        self._send("POST", "/actions", {"actions": [mouse]})

    def press(self, key: str) -> None:
        steps = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._send("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def messages(self) -> list[str]:
        """What the page wrote to the console since the last look, errors and refused loads among it."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._send("GET", "/screenshot")))

    def close(self) -> None:
        self._send("DELETE", "")


def programs() -> tuple[str, str] | None:
    """Return the paths of chromium and chromedriver, None where one is missing."""
    chromium = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    return (chromium, driver) if chromium and driver else None


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser; skips the test without one, fails where EPOCHAL_REQUIRE_CHROMIUM is 1."""
    found = programs()
    if found is None:
        if os.environ.get("EPOCHAL_REQUIRE_CHROMIUM") == "1":
            pytest.fail("EPOCHAL_REQUIRE_CHROMIUM is 1 and chromium or chromedriver is missing")
        pytest.skip("chromium or chromedriver is not installed")
    chromium, driver = found
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder
        )
        try:
            session = Browser(_address(process), _capabilities(chromium, folder))
            try:
                yield session
            finally:
                session.close()
        finally:
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _address(process: "subprocess.Popen[str]") -> str:
    """Read the port that chromedriver chose from what it says."""
    assert process.stdout is not None
    for line in process.stdout:
        if "started successfully on port" in line:
            return f"http://127.0.0.1:{int(line.rstrip().rstrip('.').rpartition(' ')[2])}"
    raise AssertionError("chromedriver ended before it listened")


def _capabilities(chromium: str, folder: str) -> dict[str, Any]:
    return {
        "browserName": "chrome",
        "goog:loggingPrefs": {"browser": "ALL"},
        "goog:chromeOptions": {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={folder}/profile"]},
    }
