"""Prefect's API for a flow run: the server that is configured, or one for this run alone."""

import contextlib
import contextvars
import fcntl
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from neft_core import processes
from neft_core.errors import NeftError
from neft_core.mlflow_store import public

STARTUP = 120.0
"""Seconds that a server of our own may take to start; the first start makes its database."""


RECORDING = 30.0
"""Seconds that a server of our own may take to record how the last tasks ended."""

_OWN: contextvars.ContextVar[str | None] = contextvars.ContextVar("own server", default=None)


@contextlib.contextmanager
def api() -> Iterator[bool]:
    """Let flow runs in this block find an API.

    A server of our own keeps its records in Prefect's home like any other, stops with the block,
    and dies with this process. Prefect's own temporary server would outlive a SIGKILL, and would
    die of a Ctrl-C before the flow could tell it that it was cancelled.

    Yields:
        Whether the server is a lasting one, whose pages can be opened afterwards.

    Raises:
        NeftError: the configured server doesn't answer, or none could be started.
    """
    settings = get_current_settings()
    if settings.api.url:
        if not _answers(settings.api.url, patience=5):
            raise NeftError(
                f"PREFECT_API_URL: {public(settings.api.url)} does not answer; "
                "start that server, or unset it to run without one"
            )
        yield True
        return
    home = Path(settings.home)
    home.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # Two first starts at once would both make the database, and one would fail.
        with (home / "neft-server.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            url = stack.enter_context(_server())
        stack.enter_context(temporary_settings({PREFECT_API_URL: url}))
        token = _OWN.set(url)
        try:
            yield False
        finally:
            _OWN.reset(token)
            # Prefect sends logs and states from threads, which would try for a minute in vain.
            for worker in (EventsWorker, APILogWorker):
                worker.drain_all(timeout=10)


def settle(flow_run: str, tasks: int) -> None:
    """Wait until a server of our own, which soon stops, has recorded the end of so many tasks.

    Prefect tells it of tasks by events, which it works off behind the back of who sent them.
    """
    url, end = _OWN.get(), time.monotonic() + RECORDING
    ended = {"type": {"any_": ["COMPLETED", "FAILED", "CANCELLED", "CRASHED"]}}
    asked = {"flow_runs": {"id": {"any_": [flow_run]}}, "task_runs": {"state": ended}}
    while url and time.monotonic() < end:
        request = urllib.request.Request(
            f"{url}/task_runs/count",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as reply:
            if json.load(reply) >= tasks:
                return
        time.sleep(0.1)


@contextlib.contextmanager
def _server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui"]
    command += ["--no-scheduler", "--no-late-runs", "--host", "127.0.0.1", "--port", str(port)]
    with (
        tempfile.TemporaryFile() as output,
        processes.group(command, cwd=Path.cwd(), env=os.environ, output=output) as child,
    ):
        url = f"http://127.0.0.1:{port}/api"
        if not _answers(url, patience=STARTUP, child=child):
            output.seek(0)
            told = output.read().decode("utf-8", "replace").strip().splitlines()
            raise NeftError(
                f"Prefect's temporary server did not start: {told[-1] if told else 'no message'}; "
                "set PREFECT_API_URL to a running one, or check PREFECT_HOME"
            )
        yield url


def _answers(url: str, *, patience: float, child: subprocess.Popen[bytes] | None = None) -> bool:
    """Whether something answers at the URL within so many seconds (and while the child lives)."""
    end = time.monotonic() + patience
    while time.monotonic() < end and (child is None or child.poll() is None):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except urllib.error.HTTPError:
            return True  # such as a server that wants to know who asks
        except (OSError, http.client.HTTPException):
            if child is None:
                time.sleep(0.5)
            time.sleep(0.05)
    return False
