"""What tests of running servers share: processes, ports, and asking Prefect's API."""

import base64
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Ours without what names servers, with homes and caches in a folder."""
    keep = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT", "MLFLOW", "AWS", "NEFT"))
    }
    return {
        **keep,
        "PYTHONPATH": str(PROJECT),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), keep["PATH"]]),
        "PREFECT_HOME": str(folder / "prefect"),
        "NEFT_STATE": str(folder / "state"),
        "DVC_SITE_CACHE_DIR": str(folder / "site"),
        "DO_NOT_TRACK": "true",
        **more,
    }


# Where no system gives ports away by itself, and each process of the tests has its own.
_PORTS = itertools.count(20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))


def free_port() -> int:
    """A port that nobody else takes before the test does."""
    for port in _PORTS:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


def neft(
    cwd: Path, env: Mapping[str, str], *argv: str, status: int = 0
) -> subprocess.CompletedProcess[str]:
    """`neft` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "neft_core.cli", *argv],
        cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done


def ask(api: str, path: str, body: Any = None, method: str | None = None, again: int = 9) -> Any:
    """Prefect's or MLflow's API: GET, or with a body POST or `method`; `user:password@` logs in.

    Where its database is locked, as on a busy machine, Prefect asks to come again later (503), or
    is silent for long.
    """
    data = None if body is None else json.dumps(body).encode()
    parts = urllib.parse.urlsplit(api)
    login, _, host = parts.netloc.rpartition("@")
    headers = {"Content-Type": "application/json"}
    if login:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    url = urllib.parse.urlunsplit(parts._replace(netloc=host))
    request = urllib.request.Request(f"{url}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=180) as reply:
            return json.loads(reply.read() or b"null")
    except urllib.error.HTTPError as refused:
        if refused.code != 503 or not again:
            raise
    except TimeoutError:
        if not again:
            raise
    time.sleep(2)
    return ask(api, path, body, method, again - 1)


def start_run(api: str, deployment: str, **parameters: Any) -> str:
    """Ask for a run of a deployment, as its page does; the run's id."""
    found = ask(api, f"/deployments/name/{deployment}")
    body = {"parameters": parameters, "idempotency_key": str(uuid.uuid4())}
    made = ask(api, f"/deployments/{found['id']}/create_flow_run", body)
    return str(made["id"])


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


def ended(api: str, run: str, seconds: float = 600) -> dict[str, Any]:
    """The state in which a run ended."""
    return until(
        lambda: (s := ask(api, f"/flow_runs/{run}")["state"]) and s["type"] in ENDED and s, seconds
    )


def until(found: Callable[[], Any], seconds: float = 600) -> Any:
    """What a question gives as soon as it gives something; patient, for a busy machine."""
    end = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return answer


def tasks(api: str, run: str) -> dict[str, dict[str, Any]]:
    """States of a run's tasks by name; a task that has just been made has none yet."""
    asked = {"flow_runs": {"id": {"any_": [run]}}}
    found = ask(api, "/task_runs/filter", asked)
    return {task["name"]: task["state"] for task in found if task["state"]}


def belonging(folder: Path) -> Iterator[str]:
    """Command lines of living processes whose environment names a folder."""
    mark = f"DVC_SITE_CACHE_DIR={folder / 'site'}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            alive = (place / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and mark in (place / "environ").read_bytes().split(b"\0"):
                yield f"{place.name} " + (place / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue


def kill_left(folder: Path) -> list[str]:
    """End what runs still; what it was."""
    left = list(belonging(folder))
    for line in left:
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile
            os.kill(int(line.split()[0]), signal.SIGKILL)
    return left
