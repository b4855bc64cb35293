"""A headless Chromium, driven over the WebDriver protocol, with what its console and its network said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

START_LIMIT_S = 100.0
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def require_browser() -> None:
    """Skips the test where there is no browser."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and chromedriver are not installed (apt-get install chromium chromium-driver)")


class Browser:
    """One window; use it in a `with` statement.

    Args:
        width: of the window in pixels.
        is_phone: behave as a phone of that width.
    """

    def __init__(self, *, width: int, is_phone: bool) -> None:
        self._width = width
        self._is_phone = is_phone
        self._entries: dict[str, list[dict[str, Any]]] = {"browser": [], "performance": []}

    def __enter__(self) -> Browser:
        self._directory = Path(tempfile.mkdtemp(prefix="browser-"))
        self._log = open(self._directory / "log", "wb")  # closed in __exit__
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HOME": str(self._directory), "TMPDIR": str(self._directory)},
            start_new_session=True,
        )
        try:
            self._port = self._find_port()
            options: dict[str, Any] = {
                "args": [
                    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                    f"--window-size={self._width},900",
                    f"--user-data-dir={self._directory / 'profile'}",
                ]
            }
            if self._is_phone:
                metrics = {"width": self._width, "height": 844, "pixelRatio": 2.0, "mobile": True, "touch": True}
                options["mobileEmulation"] = {"deviceMetrics": metrics}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            answer = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._session = f"/session/{answer['sessionId']}"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            if hasattr(self, "_session"):
                self._send("DELETE", self._session, None)
        finally:
            self._driver.kill()
            self._driver.wait()
            self._log.close()
            shutil.rmtree(self._directory, ignore_errors=True)

    def _find_port(self) -> int:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self._driver.poll() is None:
            for line in (self._directory / "log").read_text().splitlines():
                if "started successfully on port" in line:
                    return int(line.rstrip(".").rsplit(" ", 1)[1])
            time.sleep(0.05)
        raise AssertionError(f"chromedriver does not start: {(self._directory / 'log').read_text()}")

    def _send(self, verb: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}{path}", data=data, method=verb)
        with urllib.request.urlopen(request, timeout=START_LIMIT_S) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self._send("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """The value that a script returns in the page."""
        return self._send("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def type(self, selector: str, text: str) -> None:
        """Types into what the selector finds; end with a newline to send a form."""
        found = self._send("POST", f"{self._session}/element", {"using": "css selector", "value": selector})
        self._send("POST", f"{self._session}/element/{found[_ELEMENT]}/value", {"text": text})

    def text(self) -> str:
        """All text that can be seen."""
        return self.run("return document.body.innerText")

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float = 100.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.1)
        raise AssertionError(f"waited for {what}; the page says:\n{self.text()}\n{self.console()}")

    def _logged(self, kind: str) -> list[dict[str, Any]]:
        self._entries[kind] += self._send("POST", f"{self._session}/se/log", {"type": kind})
        return self._entries[kind]

    def console(self) -> list[str]:
        """What was said on the console, errors of the page and of its requests included."""
        return [entry["message"] for entry in self._logged("browser")]

    def requests(self) -> list[str]:
        """The addresses of all requests that pages have made; the browser's own first page asks for its parts, too."""
        messages = [json.loads(entry["message"])["message"] for entry in self._logged("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent if not each["documentURL"].startswith("chrome://")]

    def screenshot(self) -> str:
        """The window as PNG in base64."""
        return self._send("GET", f"{self._session}/screenshot", None)
