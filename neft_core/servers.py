"""`neft up` and `neft down`: Prefect, MLflow and a worker on this machine, detached.

Every process started here bears a mark in its environment, which its children inherit. So `down`
finds exactly what `up` started and what the worker started for it, and a process that has got an
old number after a reboot is never taken for one of ours.
"""

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neft_core import databases, logins
from neft_core.errors import NeftError
from neft_core.files import write_json
from neft_core.pages import check_port
from neft_core.processes import OWNER
from neft_core.workspace import Workspace, hold

MARK = "NEFT_SERVERS"
"""Variable with which every process started here, and its children, is known again."""

POOL = "neft"
"""The work pool that the worker serves and prefect.yaml names."""

STARTUP = 180.0
"""Seconds that a server may take to answer; a first start makes its database."""

GRACE = 20.0
"""Seconds between SIGTERM and SIGKILL: a flow run ends its stages and tells the server."""

SECRETS = (
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_API_AUTH_STRING",
    "MLFLOW_BACKEND_STORE_URI",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
)
"""What the servers alone may know; a worker, and so a stage, doesn't get it."""


@dataclass(frozen=True)
class Server:
    """One of the processes.

    Attributes:
        name: `prefect`, `mlflow` or `worker`; its log is `NAME.log`.
        command: program and arguments.
        env: what it has in its environment beside ours.
        url: where it answers; empty for the worker, whose log tells that it is ready.
        page: what to open in a browser.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    url: str = ""
    page: str = ""


def state_folder(workspace: Workspace) -> Path:
    """Where `up` keeps pids, logs and databases: `NEFT_STATE`, or `.neft/servers`."""
    told = os.environ.get("NEFT_STATE")
    return Path(told).expanduser().resolve() if told else workspace.state("servers")


def servers(
    state: Path, host: str, prefect: int, mlflow: int, environment: Mapping[str, str]
) -> list[Server]:
    """What `up` starts, in order.

    Args:
        state: the state directory.
        host: the address to bind.
        prefect: port of Prefect.
        mlflow: port of MLflow.
        environment: the caller's, which may name databases and where artifacts go.
    """
    near = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    api, tracking = f"http://{near}:{prefect}/api", f"http://{near}:{mlflow}"
    python, tools = sys.executable, Path(sys.executable).parent
    quiet = {"DO_NOT_TRACK": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    home = {**quiet, "PREFECT_HOME": str(state / "prefect")}
    stores = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{state / 'mlflow.db'}",
        "MLFLOW_ARTIFACTS_DESTINATION": str(state / "artifacts"),
    }
    asks, key = logins.of_mlflow(environment)
    return [
        Server(
            "prefect",
            (python, "-m", "prefect", "server", "start", "--host", host, "--port", str(prefect)),
            {**home, "PREFECT_SERVER_UI_API_URL": api},
            f"{api}/health",
            f"http://{near}:{prefect}",
        ),
        Server(
            "mlflow",
            (python, "-m", "mlflow", "server", "--host", host, "--port", str(mlflow),
             "--workers", "1", *asks),
            # Without its job runners it is two processes instead of fifteen.
            {**quiet, **key, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
             **{name: environment.get(name) or value for name, value in stores.items()}},
            f"{tracking}/health",
            tracking,
        ),
        Server(
            "worker",
            (python, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"),
            {**home, "PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": tracking,
             "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
             "PATH": os.pathsep.join([str(tools), environment.get("PATH", os.defpath)])},
        ),
    ]  # fmt: skip


def up(state: Path, host: str, prefect: int, mlflow: int, say: Callable[[str], None]) -> None:
    """Start what doesn't run yet, wait until it answers, and tell where.

    Args:
        state: the state directory.
        host: the address to bind.
        prefect: port of Prefect.
        mlflow: port of MLflow.
        say: takes each line.

    Raises:
        NeftError: a port is taken, a database can't be used, or a server doesn't start; what was
            started now is stopped.
    """
    if not state.exists():  # has databases, also of who may log in
        state.mkdir(parents=True, mode=0o700)
    with hold(state / "lock", str(state)):
        record = _read(state)
        running = _running(record)
        if running:
            asked = {"host": host, "prefect": prefect, "mlflow": mlflow}
            known = {name: record[name] for name in asked}
            if asked != known:
                raise NeftError(
                    f"{state}: servers run already with {_told(known)}; run 'neft down' first"
                )
        else:
            record = {
                "asks": record["asks"],
                "mark": uuid.uuid4().hex,
                "pids": {},
                "host": host,
                "prefect": prefect,
                "mlflow": mlflow,
            }
        wanted = servers(state, host, prefect, mlflow, os.environ)
        missing = [server for server in wanted if server.name not in running]
        ports = {"prefect": prefect, "mlflow": mlflow}
        for server in missing:
            if server.name in ports:
                remedy = f"give --{server.name}-port another number"
                check_port(host, ports[server.name], remedy)
        asked_before = record["asks"]
        if missing:
            databases.check(os.environ)
            names = (server.name for server in missing)
            record["asks"] = logins.asking(os.environ, record["asks"], names)
        started: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for server in missing:
                if not server.url:  # the worker, which needs the API
                    _wait(state, [s for s in missing if s.url], started)
                started[server.name] = _start(state, server, record["mark"])
                record["pids"][server.name] = started[server.name].pid
                write_json(state / "servers.json", record)
            _wait(state, missing, started)
        except BaseException:
            _stop(record, only=set(started))
            write_json(state / "servers.json", record | {"asks": asked_before})
            raise
    for server in wanted:
        how = "runs already" if server.name in running else "started"
        where = f"{server.page} " if server.page else ""
        say(f"{server.name}: {where}({how}, log {state / server.name}.log)")
    env = clients(state)
    say("for this shell: export " + " ".join(f"{name}={value}" for name, value in env.items()))
    if warning := logins.exposed(host, record["asks"]):
        say(warning)


def down(state: Path, say: Callable[[str], None]) -> None:
    """Stop what `up` started: the worker and its flow runs first, then the servers.

    Args:
        state: the state directory.
        say: takes each line.
    """
    if not (state / "servers.json").exists():
        say("nothing runs")
        return
    with hold(state / "lock", str(state)):
        count = _stop(_read(state))
        (state / "servers.json").unlink()
    say(f"stopped {count} processes" if count else "nothing runs any more")


def clients(state: Path) -> dict[str, str]:
    """The environment in which flows and tracking use the servers that run; empty without any."""
    record = _read(state)
    if not _running(record):
        return {}
    found = servers(state, record["host"], record["prefect"], record["mlflow"], {})
    return {name: found[-1].env[name] for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}


def _start(state: Path, server: Server, mark: str) -> subprocess.Popen[bytes]:
    env = {name: value for name, value in os.environ.items() if name != OWNER}
    if server.name == "worker":
        for name in SECRETS:
            env.pop(name, None)
    else:
        env.pop("PREFECT_API_URL", None)
    path = state / f"{server.name}.log"
    if path.exists():
        path.replace(path.with_suffix(".log.1"))
    with path.open("wb") as log:
        os.fchmod(log.fileno(), 0o600)  # what servers were asked is not for everybody
        return subprocess.Popen(
            server.command,
            cwd=state,
            env={**env, **server.env, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(
    state: Path, wanted: Iterable[Server], started: Mapping[str, subprocess.Popen[bytes]]
) -> None:
    """Until each answers."""
    end = time.monotonic() + STARTUP
    for server in wanted:
        child, log = started[server.name], state / f"{server.name}.log"
        while not _ready(server, log):
            if child.poll() is not None or time.monotonic() > end:
                what = "ended" if child.poll() is not None else f"no answer in {STARTUP:.0f} s"
                raise NeftError(f"{server.name}: {what} ({_last_line(log)}); see {log}")
            time.sleep(0.1)


def _ready(server: Server, log: Path) -> bool:
    if not server.url:
        return b" started!" in log.read_bytes()
    try:
        with urllib.request.urlopen(server.url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # such as one that wants to know who asks
    except (OSError, http.client.HTTPException):
        return False


def _last_line(log: Path) -> str:
    told = log.read_text(encoding="utf-8", errors="replace").splitlines()
    # SQLAlchemy ends with an address that explains its errors.
    lines = [line.strip() for line in told if line.strip() and "(Background on" not in line]
    # Without user names and passwords of the databases that it may speak of.
    return re.sub(r"://[^/@\s]+@", "://", lines[-1]) if lines else "no message"


def _read(state: Path) -> dict[str, Any]:
    try:
        found = json.loads((state / "servers.json").read_text(encoding="utf-8"))
        return {"mark": str(found["mark"]), "asks": [], **found}
    except (OSError, ValueError, KeyError, TypeError):
        return {"mark": "", "pids": {}, "asks": []}


def _told(known: Mapping[str, Any]) -> str:
    return f"host {known['host']}, ports {known['prefect']} and {known['mlflow']}"


def _marked(mark: str) -> list[Any]:
    """Living processes that bear the mark."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if mark and alive and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def _running(record: Mapping[str, Any]) -> set[str]:
    """Names of our processes that live."""
    alive = {process.pid for process in _marked(record["mark"])}
    return {name for name, pid in record["pids"].items() if pid in alive}


def _stop(record: Mapping[str, Any], only: set[str] | None = None) -> int:
    """End what bears the mark; the number of processes.

    Stages are left to the flow runs that wait for them: they let DVC release its locks.
    """
    import psutil

    servers = {pid for name, pid in record["pids"].items() if name in ("prefect", "mlflow")}
    spared = {pid for name, pid in record["pids"].items() if only is not None and name not in only}

    def living(kept: set[int]) -> list[Any]:
        found = []
        for process in _marked(record["mark"]):
            with contextlib.suppress(psutil.Error):
                if not kept & {process.pid, *(parent.pid for parent in process.parents())}:
                    found.append(process)
        return found

    def end(kept: set[int]) -> int:
        found = living(kept)
        for process in found:
            with contextlib.suppress(psutil.Error):
                if OWNER not in process.environ():
                    process.terminate()
        end = time.monotonic() + GRACE
        while (left := living(kept)) and time.monotonic() < end:
            time.sleep(0.1)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=GRACE)  # their ports are free then
        return len(found)

    return end(spared | servers) + end(spared)
