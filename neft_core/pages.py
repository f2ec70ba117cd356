"""The pages of MLflow and Prefect: their addresses, the commands that open them, `neft ui`."""

import contextlib
import errno
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from neft_core import processes
from neft_core.errors import NeftError
from neft_core.mlflow_store import VIEW, is_server, public, tracking_uri
from neft_core.tracking import execution_run, experiment
from neft_core.workspace import REPORTS, Workspace

HOST, MLFLOW_PORT, PREFECT_PORT = "127.0.0.1", 5000, 4200

TRAINING = "workflowType=machine_learning"
"""What lets MLflow's pages show trainings, and not prompts and traces."""

STARTUP = 120.0
"""Seconds that a page's server may take to start; a first start makes its database."""


@dataclass(frozen=True)
class Page:
    """Where something can be looked at.

    Attributes:
        name: what it shows.
        url: its address.
        port: where `command` listens.
        command: what serves it on this machine alone; empty where a server of the user's does.
        env: what the command has in its environment.
    """

    name: str
    url: str
    port: int = 0
    command: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    def line(self) -> str:
        """The command as a shell takes it."""
        return " ".join([*(f"{k}={v}" for k, v in self.env), shlex.join(self.command)])


def pages(
    workspace: Workspace, mlflow: int = MLFLOW_PORT, prefect: int = PREFECT_PORT
) -> list[Page]:
    """The pages of a workspace, with these ports where no server is configured."""
    tool = near(Path(sys.executable).parent)
    uri = tracking_uri(workspace)
    if is_server(uri):
        first = Page("MLflow", _runs(workspace, public(uri).rstrip("/")))
    else:
        serve = [str(tool / "mlflow"), "ui", "--backend-store-uri", public(uri)]
        serve += ["--host", HOST, "--port", str(mlflow), "--workers", "1"]
        # Without its job runners it is one process instead of ten.
        quiet = (("DO_NOT_TRACK", "true"), ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false"))
        url = _runs(workspace, f"http://{HOST}:{mlflow}")
        first = Page("MLflow", url, mlflow, tuple(serve), quiet)
    api = os.environ.get("PREFECT_API_URL")
    if api:
        return [first, Page("Prefect", public(api).removesuffix("/api"))]
    root = f"http://{HOST}:{prefect}"
    start = [str(tool / "prefect"), "server", "start", "--host", HOST, "--port", str(prefect)]
    # Its pages would look for their server at 4200, whatever the port.
    own = () if prefect == PREFECT_PORT else (("PREFECT_SERVER_UI_API_URL", f"{root}/api"),)
    return [first, Page("Prefect", f"{root}/runs", prefect, (*start, "--analytics-off"), own)]


def near(path: Path) -> Path:
    """A path as short as it can be said from here."""
    return min(path, Path(os.path.relpath(path)), key=lambda found: len(str(found)))


def run_page(workspace: Workspace, run_id: str) -> str:
    """The address of one MLflow run's page."""
    root, _, rest = pages(workspace)[0].url.partition("/#/experiments/")
    return f"{root}/#/experiments/{rest.partition('/')[0]}/runs/{run_id}?{TRAINING}"


def _runs(workspace: Workspace, root: str) -> str:
    """The list of the workspace's MLflow runs; the front page where there are none yet."""
    found = experiment(workspace)
    if found is None:
        return root
    return f"{root}/#/experiments/{found}/runs?{TRAINING}&viewStateShareKey={VIEW}"


def report_page(workspace: Workspace) -> str | None:
    """Address of the report as an artifact on MLflow's server; None where it isn't there."""
    uri, run = tracking_uri(workspace), execution_run(workspace)
    if run is None or not is_server(uri) or not (workspace.root / REPORTS).is_dir():
        return None
    place = f"experiments/{experiment(workspace)}/runs/{run}/artifacts/{REPORTS}/report.html"
    return f"{public(uri).rstrip('/')}/#/{place}?{TRAINING}"


def serve(found: list[Page]) -> None:
    """Serve the pages until Ctrl-C; those of the user's own servers are only named.

    Raises:
        NeftError: a port is taken, or a server doesn't start or ends.
    """
    own = [page for page in found if page.command]
    if len({page.port for page in own}) < len(own):
        raise NeftError(f"port {own[0].port}: asked for twice; each page needs one of its own")
    for page in own:
        check_port(HOST, page.port, f"give --{page.name.lower()}-port another number")
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_started(page)) for page in own]
        for page in found:
            print(f"{page.name}: {page.url}", flush=True)
        if running:
            print("Ctrl-C ends them", flush=True)
        while running:
            time.sleep(0.5)
            for check in running:
                check()


@contextlib.contextmanager
def _started(page: Page) -> Iterator[Callable[[], None]]:
    """Start a page's server and wait for its answer; yields a check that it lives."""
    with tempfile.TemporaryFile() as output:
        env = {**os.environ, **dict(page.env)}
        with processes.group(page.command, cwd=Path.cwd(), env=env, output=output) as child:

            def check() -> None:
                if child.poll() is not None:
                    output.seek(0)
                    told = output.read().decode("utf-8", "replace").strip().splitlines()
                    reason = told[-1] if told else "no message"
                    raise NeftError(f"{page.name}'s server ended: {reason}; run {page.line()}")

            end = time.monotonic() + STARTUP
            while not _answers(page.port):
                check()
                if time.monotonic() > end:
                    raise NeftError(f"{page.name}'s server: no answer; run {page.line()}")
                time.sleep(0.1)
            yield check


def check_port(host: str, port: int, remedy: str) -> None:
    """Refuse a port that can't be listened on.

    Raises:
        NeftError: it is in use, there is no such port, or no such address on this machine.
    """
    with socket.socket() as probe:
        # As the servers do: a port that was closed a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OverflowError:
            raise NeftError(f"port {port}: there is none; 1 to 65535") from None
        except OSError as fault:
            if isinstance(fault, socket.gaierror) or fault.errno == errno.EADDRNOTAVAIL:
                raise NeftError(f"host {host}: no address of this machine; 127.0.0.1 is") from None
            if fault.errno == errno.EACCES:
                raise NeftError(f"port {port}: not allowed here; choose above 1023") from None
            raise NeftError(
                f"port {port}: in use by another program; stop that one, or {remedy}"
            ) from None


def _answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=5).close()
    except OSError:
        return False
    return True
