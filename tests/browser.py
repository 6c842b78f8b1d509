"""A real browser without a window, driven over a pipe by its own protocol (Chrome DevTools); nothing else is needed.

A page is opened once for each size and colour scheme; what it complains of, what it asks for and what it shows is told.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip

LOOK = """
(() => {
  const seen = (element) => { const box = element.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
  const pictures = [...document.querySelectorAll("svg")].map((svg) => ({
    label: svg.getAttribute("aria-label") || "",
    width: svg.getBoundingClientRect().width,
    height: svg.getBoundingClientRect().height,
    marks: [...svg.querySelectorAll("path, rect, circle, polygon, line, use, image, text")].filter(seen).length,
    ink: [...svg.querySelectorAll("text")].map((text) => getComputedStyle(text).fill)[0] || "",
  }));
  const cells = [...document.querySelectorAll("table:not(details table) td")].filter(seen);
  return {
    pictures,
    images: [...document.images].map((image) => image.naturalWidth),
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    width: document.documentElement.scrollWidth,
    right: Math.max(0, ...cells.map((cell) => cell.getBoundingClientRect().right)),
    hidden: [...document.querySelectorAll(".wide")].filter((frame) => frame.scrollWidth > frame.clientWidth).length,
  };
})()
"""


@dataclass(frozen=True)
class Shown:
    """What a page looks like.

    Attributes:
        complaints: of the console, and of what could not be loaded.
        requests: addresses that were asked for, but for the page itself and data that stand in it.
        look: what `LOOK` finds.
    """

    complaints: tuple[str, ...]
    requests: tuple[str, ...]
    look: Mapping[str, Any]


def find() -> str | None:
    """A browser of this machine."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One that runs; see `browser`."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest, self._last = write, read, b"", 0
        self._events: list[dict[str, Any]] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def show(self, page: Path, width: int, scheme: str, height: int = 900, picture: Path | None = None) -> Shown:
        """Open a page.

        Args:
            page: the file.
            width, height: of the window, in CSS pixels.
            scheme: "light" or "dark", as the user prefers.
            picture: where a picture of the whole page is written.
        """
        mobile = width < 600
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._events.clear()
        address = page.resolve().as_uri()
        self._ask("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._next()
        look = self._ask("Runtime.evaluate", expression=LOOK, returnByValue=True)["result"]["value"]
        if picture is not None:
            size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
            shot = self._ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(shot["data"]))
        return Shown(tuple(self._complaints()), tuple(self._requests(address)), look)

    def _complaints(self) -> Iterator[str]:
        for event in self._events:
            told = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                yield str(told["exceptionDetails"]["text"])
            elif event["method"] == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                yield str(told["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                yield str(told["args"])
            elif event["method"] == "Network.loadingFailed":
                yield str(told["errorText"])

    def _requests(self, page: str) -> Iterator[str]:
        for event in self._events:
            if event["method"] == "Network.requestWillBeSent":
                address = str(event["params"]["request"]["url"])
                if address != page and not address.startswith("data:"):
                    yield address

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        asked: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if not method.startswith("Target."):
            asked["sessionId"] = self._session
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        """The next message; events are kept."""
        while b"\0" not in self._rest:
            more = os.read(self._read, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        if "method" in found:
            self._events.append(found)
        return found


@contextmanager
def browser(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, ended at the end.

    Args:
        program: see `find`.
        profile: an empty folder.
    """
    theirs_in, write = os.pipe()
    read, theirs_out = os.pipe()

    def streams() -> None:  # the protocol reads from 3 and writes to 4
        first, second = os.dup(theirs_in), os.dup(theirs_out)
        os.dup2(first, 3)
        os.dup2(second, 4)

    command = [program, *FLAGS, f"--user-data-dir={profile}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, close_fds=False, preexec_fn=streams, **quiet)  # type: ignore[call-overload]
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(write, read)
    finally:
        os.close(write)
        os.close(read)
        process.kill()
        process.wait(30)
