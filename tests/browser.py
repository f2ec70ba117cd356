"""A headless Chromium by its DevTools protocol: what a page logs, asks for and looks like."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """A Chromium on this machine: what CHROME names, or one on the PATH."""
    return os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. `events` holds what the browser told of it, in order."""

    def __init__(self, send: BinaryIO, receive: int) -> None:
        self._send, self._receive, self._last = send, receive, 0
        self._begun: list[bytes] = []
        self._whole_messages: list[bytes] = []
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while not self._whole_messages:
            piece = os.read(self._receive, 1 << 20)
            assert piece, "the browser ended"
            *ends, rest = piece.split(b"\0")
            for end in ends:
                self._whole_messages.append(b"".join([*self._begun, end]))
                self._begun = []
            self._begun.append(rest)
        message = json.loads(self._whole_messages.pop(0))
        if "method" in message:
            self.events.append(message)
        return message

    def open(
        self, path: Path, width: int, height: int = 900, dark: bool = False, media: str = ""
    ) -> None:
        """Load a file at a width, as somebody who likes dark pages sees it, and wait for it."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        del self.events[:]
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def go(self, url: str, *texts: str, seconds: float = 180) -> str:
        """Load a page of a server; what it shows once it shows all the texts."""
        self.call("Emulation.setDeviceMetricsOverride", width=1500, height=1000,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        del self.events[:]
        self.call("Page.navigate", url=url)
        return self.shows(*texts, seconds=seconds)

    def shows(self, *texts: str, seconds: float = 180) -> str:
        """What the page shows, once all the texts are there."""
        end = time.monotonic() + seconds
        while True:
            shown = str(self.value("document.body ? document.body.innerText : ''"))
            missing = [text for text in texts if text not in shown]
            if not missing:
                return shown
            assert time.monotonic() < end, f"no {missing} in: {shown[:2000]}"
            time.sleep(0.2)

    def press(self, text: str, *after: str, seconds: float = 300) -> str:
        """Click until the page shows what comes after: a page that moves can miss a click."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.click(text, 60)
                return self.shows(*after, seconds=15)
            except AssertionError:
                if time.monotonic() > end:
                    raise

    def click(self, text: str, seconds: float = 180) -> None:
        """Press with the mouse what is visible and has exactly this text: the innermost of it.

        It has to lie still and free, or what a page moves while it loads would be missed.
        """
        place = f"""(() => {{
            const says = e => e.offsetParent && e.innerText?.trim() === {json.dumps(text)};
            const all = [...document.body.querySelectorAll('*')].filter(says);
            const found = all.find(e => ![...e.children].some(says));
            if (!found) return null;
            const box = found.getBoundingClientRect();
            const at = [box.x + box.width / 2, box.y + box.height / 2];
            const top = document.elementFromPoint(...at);
            return top && (found.contains(top) || top.contains(found)) ? at : null;
        }})()"""
        end = time.monotonic() + seconds
        before, at = None, self.value(place)
        while at is None or at != before:
            assert time.monotonic() < end, f"nothing to press says '{text}'"
            time.sleep(0.2)
            before, at = at, self.value(place)
        for kind, more in (
            ("mouseMoved", {}),
            ("mousePressed", {"button": "left", "buttons": 1, "clickCount": 1}),
            ("mouseReleased", {"button": "left", "clickCount": 1}),
        ):
            self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], **more)

    def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def picture(self, whole: bool = True) -> bytes:
        """The page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole,
                         **({"clip": self._whole()} if whole else {}))  # fmt: skip
        return base64.b64decode(shot["data"])

    def _whole(self) -> dict[str, float]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}

    def pdf(self) -> bytes:
        """The page as it is printed, with its structure for those who hear it."""
        made = self.call("Page.printToPDF", preferCSSPageSize=True, generateTaggedPDF=True)
        return base64.b64decode(made["data"])

    def said(self) -> list[str]:
        """Messages of the console, and what the browser complains of."""
        return [
            json.dumps(event["params"])
            for event in self.events
            if event["method"]
            in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        ]

    def asked(self) -> list[str]:
        """Addresses that the page wanted."""
        wanted = (e for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in wanted]


@contextlib.contextmanager
def browser(command: str) -> Iterator[Browser]:
    """A running browser, without a profile of the user's and without talk to its maker."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--disable-background-networking", "--no-first-run", "--hide-scrollbars",
               "--remote-debugging-pipe"]  # fmt: skip
    commands, answers = os.pipe(), os.pipe()

    def pipes() -> None:  # it reads from 3 and writes to 4
        kept = os.dup(commands[0]), os.dup(answers[1])
        os.dup2(kept[0], 3)
        os.dup2(kept[1], 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [command, *options, f"--user-data-dir={profile}"],
            preexec_fn=pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands[0])
        os.close(answers[1])
        with os.fdopen(commands[1], "wb") as send:
            try:
                yield Browser(send, answers[0])
            finally:
                process.kill()
                process.wait()
                os.close(answers[0])
