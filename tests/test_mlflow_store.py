"""How MLflow is asked: how long it may take, and what is told of one that refuses."""

import contextlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fabricated
import pytest

from neft_core.errors import NeftError
from neft_core.mlflow_store import open_store
from neft_core.workspace import Workspace


@pytest.fixture
def ws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fabricated.make(tmp_path / "ws")
    return Workspace(tmp_path / "ws")


@contextlib.contextmanager
def always(status: int) -> Iterator[str]:
    """Address of a server that answers everything with a status."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_may_take_as_long_as_they_are_large(
    ws: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    name, seen = "MLFLOW_HTTP_REQUEST_TIMEOUT", []
    for method in ("log_artifact", "log_artifacts"):
        monkeypatch.setattr(MlflowClient, method, lambda *_: seen.append(os.environ[name]))
    monkeypatch.delenv(name, raising=False)
    files = tmp_path / "sent/large", tmp_path / "sent/small"
    files[0].parent.mkdir()
    for file, size in zip(files, (30 * 10**6, 100), strict=True):
        file.touch()
        os.truncate(file, size)
    with open_store(ws) as store:
        for path in (*files, files[0].parent):
            store.send("run", path, "folder")
        assert os.environ[name] == "10"
        monkeypatch.setenv(name, "25")  # the user's own
        store.send("run", files[0], "folder")
    assert seen == ["40", "10", "40", "25"]


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "refuses the login, or was given none; check MLFLOW_TRACKING_USERNAME and MLFLOW_TR"),
        (403, "what its user may do, and MLFLOW_SERVER_ALLOWED_HOSTS of the server"),
    ],
)
def test_a_server_that_refuses_is_told(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, status: int, told: str
) -> None:
    with always(status) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(NeftError, match=told), open_store(ws):
            raise AssertionError
