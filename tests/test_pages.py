"""Where runs can be looked at, and serving the pages on loopback."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from operating import free_port, until

from neft_core.errors import NeftError
from neft_core.mlflow_store import VIEW, open_store, public
from neft_core.pages import Page, pages, serve
from neft_core.workspace import Workspace

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture
def plain(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)


def test_own_pages(plain, finished):
    mlflow, prefect = pages(finished)
    assert f"ui --backend-store-uri sqlite:///{finished.root}/mlflow.db --host 1" in mlflow.line()
    assert mlflow.line().startswith("DO_NOT_TRACK=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false ")
    assert mlflow.url == "http://127.0.0.1:5000", "nothing was delivered yet"
    assert prefect.line().endswith("prefect server start --host 127.0.0.1 --port 4200 "
                                   "--analytics-off")  # fmt: skip
    other = pages(finished, 5001, 4201)[1]
    assert other.url == "http://127.0.0.1:4201/runs"
    assert other.env == (("PREFECT_SERVER_UI_API_URL", "http://127.0.0.1:4201/api"),)


def test_the_users_servers(finished, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host/mlflow")
    monkeypatch.setenv("PREFECT_API_URL", "http://host:4200/api")
    assert pages(finished) == [
        Page("MLflow", "https://host/mlflow"),
        Page("Prefect", "http://host:4200"),
    ]
    assert public("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"


def test_a_port_in_use_is_told_before_anything_starts(finished):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        page = Page("MLflow", "http://x", port, ("/bin/false",))
        with pytest.raises(NeftError) as fault:
            serve([page])
    assert str(fault.value) == (
        f"port {port}: in use by another program; stop that one, or give --mlflow-port another "
        "number"
    )


@pytest.mark.parametrize(
    ("ports", "line"),
    [
        ((70000, 4200), "port 70000: there is none; 1 to 65535"),
        ((5000, 5000), "port 5000: asked for twice; each page needs one of its own"),
    ],
)
def test_a_port_that_can_not_be(plain, finished, ports, line):
    with pytest.raises(NeftError) as fault:
        serve(pages(finished, *ports))
    assert str(fault.value) == line


def test_a_server_that_ends_is_told(capsys):
    page = Page("Prefect", "http://x", free_port(), ("sh", "-c", "echo no such table; exit 3"))
    with pytest.raises(NeftError, match=r"^Prefect's server ended: no such table; run sh -c "):
        serve([page])


@pytest.mark.integration
def test_the_real_pages_open_and_end_with_ctrl_c(finished, tmp_path):
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MLFLOW"))}
    env = {**keep, "PYTHONPATH": str(PROJECT), "PREFECT_HOME": str(tmp_path / "prefect")}
    ws = Workspace(tmp_path)
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_bytes((finished.root / name).read_bytes())
    with open_store(ws) as store:
        tags = store.client.get_experiment(store.experiment).tags
    assert json.loads(tags[f"mlflow.sharedViewState.{VIEW}"])["orderByAsc"] is False
    ports = free_port(), free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "neft_core.cli", "ui", "--mlflow-port", str(ports[0]),
         "--prefect-port", str(ports[1])],
        cwd=ws.root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(3)]
    assert told == [
        f"MLflow: http://127.0.0.1:{ports[0]}\n",
        f"Prefect: http://127.0.0.1:{ports[1]}/runs\n",
        "Ctrl-C ends them\n",
    ]
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=180) as page:
            assert b"<title>" in page.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert (process.returncode, out, err) == (0, "", "")
    until(lambda: not any(answers(port) for port in ports))


def answers(port: int) -> bool:
    """Whether anybody takes calls at a port."""
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        return True
    return False
