"""The MLflow experiment of a workspace: opened, and asked and written in few calls.

Beside the registry of models the only module that imports MLflow; `delivery` says what is written.
"""

import contextlib
import json
import logging
import os
import re
import sqlite3
import subprocess
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import neft_core
from neft_core import records
from neft_core.errors import NeftError
from neft_core.files import replacing
from neft_core.workspace import Workspace, exclusive

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH = 1000
"""Metrics that MLflow takes in one call."""

SOON = 10
"""Seconds that a server may take to answer."""

LATE = 600
"""Seconds that it may take to pass a model on, which may be whole, to or from its store."""

_RATE = 10**6
"""Bytes a second at which it passes files on at least."""

_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"

VIEW = "neft"
"""Name under which the runs' page keeps the columns that tell runs apart."""

_PAGE = {
    # Of MLflow's two faces the one for trainings; the other speaks of traces and prompts.
    "mlflow.experimentKind": "custom_model_development",
    f"mlflow.sharedViewState.{VIEW}": json.dumps(
        {
            # Sorted by a metric, runs stand in one flat list instead of folded in executions.
            "orderByKey": "metrics.`test/bleu`",
            "orderByAsc": False,
            "selectedColumns": [
                "metrics.`test/bleu`",
                "metrics.`test/chrf`",
                "metrics.`test/rougeL`",
                "metrics.`test/accuracy`",
                "metrics.`best_dev_loss`",
                "metrics.`trainable_percent`",
                "metrics.`cost/seconds`",
                "params.`run.task`",
                "params.`run.method.name`",
                "params.`lr`",
                "params.`seed`",
                "attributes.`Description`",
            ],
        }
    ),
}
"""Tags of the experiment by which MLflow's pages open readable."""


def tracking_uri(workspace: Workspace) -> str:
    """MLFLOW_TRACKING_URI, or the workspace's own SQLite file (of a private one: its host's)."""
    own = f"sqlite:///{workspace.host.root / 'mlflow.db'}"
    return os.environ.get("MLFLOW_TRACKING_URI") or own


class Store:
    """An open MLflow experiment.

    Attributes:
        client: MLflow's own.
        experiment: id of the experiment.
        workspace: whose runs it shows.
        new: ids of the runs made here.
        ids: for each key that was asked for or made, the id of its run.
    """

    def __init__(self, client: "MlflowClient", experiment: str, workspace: Workspace) -> None:
        self.client = client
        self.experiment = experiment
        self.workspace = workspace
        self.new: set[str] = set()
        self.ids: dict[str, str] = {}

    def find(self, key: str) -> Any | None:
        """The MLflow run with this key."""
        query = f"tags.`neft.key` = '{key}'"
        found = self.client.search_runs([self.experiment], query, max_results=1)
        if not found:
            return None
        self.ids[key] = found[0].info.run_id
        return found[0]

    def create(self, key: str, name: str, tags: Mapping[str, str], start: int | None = None) -> Any:
        """A new MLflow run, which started in that millisecond or now."""
        source = {
            "neft.key": key,
            "neft.version": neft_core.__version__,
            "neft.workspace": str(self.workspace.root),
            "mlflow.runName": name,
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": "neft",
        }
        commit = _commit(self.workspace.root)
        if commit:
            source["mlflow.source.git.commit"] = commit
        tags = {**source, **tags}
        made = self.client.create_run(self.experiment, start, tags, run_name=name)
        self.new.add(made.info.run_id)
        self.ids[key] = made.info.run_id
        return made

    def log(
        self,
        run_id: str,
        points: Iterable[records.Point] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Metrics, params and tags in few calls."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        metrics = [Metric(p.name, p.value, p.time or now, p.step) for p in points]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        values = [Param(name, value[:6000]) for name, value in (params or {}).items()]
        for start in range(0, len(values), 100):
            self.client.log_batch(run_id, params=values[start : start + 100])
        if tags:
            self.client.log_batch(run_id, tags=[RunTag(*pair) for pair in tags.items()])

    def logged(self, run_id: str, names: Iterable[str]) -> dict[tuple[str, int], float]:
        """Metrics that MLflow has already, by the points' places."""
        system = "system/"
        return {
            (m.key, m.timestamp if m.key.startswith(system) else m.step): m.value
            for name in names
            for m in self.client.get_metric_history(run_id, name)
        }

    def send(self, run_id: str, path: Path, folder: str) -> None:
        """Files as artifacts: one, or all of a directory."""
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        with patient(SOON + sum(file.stat().st_size for file in files) // _RATE):
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), folder)
            else:
                self.client.log_artifact(run_id, str(path), folder)

    def datasets(self, found: Any, task: str, splits: Iterable[records.Split]) -> None:
        """The parts of a task's data as inputs of a run; those that it has are left out."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        have = {entry.dataset.digest for entry in found.inputs.dataset_inputs}
        inputs = [
            DatasetInput(
                Dataset(
                    name=f"{task} {split.name}",
                    digest=split.digest,
                    source_type=str(split.source.get("kind", "local")),
                    source=json.dumps(split.source, sort_keys=True),
                    profile=json.dumps({"rows": split.rows}),
                ),
                [InputTag("mlflow.data.context", split.name)],
            )
            for split in splits
            if split.digest not in have
        ]
        if inputs:
            self.client.log_inputs(found.info.run_id, inputs)


@contextlib.contextmanager
def open_store(workspace: Workspace) -> Iterator[Store]:
    """The workspace's experiment, made where there is none.

    Raises:
        NeftError: the store doesn't answer, or refuses.
    """
    # Read when mlflow is imported, or at each request; what the user set stays.
    for name, value in {
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # By the server: its store may be where only the server is.
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        _TIMEOUT: str(SOON),
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    uri = tracking_uri(workspace)
    home = workspace.host.root
    own = home / "mlflow.db" if uri.endswith(f"{home}/mlflow.db") else None
    if uri.startswith("sqlite:///"):
        home = Path(uri.removeprefix("sqlite:///")).resolve().parent
    # Without a root MLflow would write below the current directory.
    artifacts = None if is_server(uri) else (home / "mlruns").as_uri()
    experiment_name = workspace.params().tracking.experiment
    try:
        # Several clients that make the same new database would all fail.
        with exclusive(workspace.host.state("mlflow.lock")):
            if own:
                _set_aside(own)
                _make_whole(own)
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(experiment_name)
            if found is None:
                experiment = client.create_experiment(experiment_name, artifacts, dict(_PAGE))
            else:
                experiment = found.experiment_id
                for name in _PAGE.keys() - found.tags.keys():
                    client.set_experiment_tag(experiment, name, _PAGE[name])
        if found is not None and found.lifecycle_stage == "deleted":
            raise NeftError(
                f"params.yaml: tracking.experiment: '{experiment_name}' is deleted in MLflow at "
                f"{public(uri)}; restore it there, or choose another name"
            )
        if found is not None and own and found.artifact_location != artifacts:
            raise NeftError(
                f"{own}: belongs to a workspace at {found.artifact_location}; delete it, "
                "'neft track' makes it anew"
            )
        yield Store(client, experiment, workspace)
    except (MlflowException, SQLAlchemyError, OSError) as fault:
        reason = " ".join(str(fault).partition("[SQL:")[0].split())[:300]
        if failing := re.search(r"too many (\d+) error responses", reason):
            reason = f"answers with status {failing[1]}; its log tells why"
        elif "Max retries exceeded" in reason:
            reason = "does not answer"
        check = "MLFLOW_TRACKING_URI"
        status = (
            fault.get_http_status_code()
            if isinstance(fault, MlflowException)
            else getattr(getattr(fault, "response", None), "status_code", None)
        )
        if status == 401:
            reason = "refuses the login, or was given none"
            check = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        elif status == 403:
            check = "what its user may do, and MLFLOW_SERVER_ALLOWED_HOSTS of the server"
        reason = reason.replace(uri, public(uri))
        raise NeftError(f"MLflow at {public(uri)}: {reason}; check {check}") from fault


@contextlib.contextmanager
def patient(seconds: int) -> Iterator[None]:
    """While files are sent or fetched: a server answers only when it or its store has them."""
    if os.environ.get(_TIMEOUT) != str(SOON):  # the user's own
        yield
        return
    os.environ[_TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        os.environ[_TIMEOUT] = str(SOON)


def _set_aside(database: Path) -> None:
    """Rename a damaged database: the files hold all that it showed."""
    if not database.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            whole = connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except sqlite3.DatabaseError:
        whole = False
    if not whole:
        aside = database.with_name("mlflow.db.damaged")
        database.replace(aside)
        logging.getLogger(__name__).warning(
            "%s: damaged; kept as %s, made anew from the runs' files", database, aside.name
        )


def _make_whole(database: Path) -> None:
    """Make a missing database under another name: MLflow can't go on with tables half made."""
    from mlflow import MlflowClient

    if not database.exists():
        with replacing(database) as temporary:
            MlflowClient(tracking_uri=f"sqlite:///{temporary}").search_experiments(max_results=1)


def is_server(uri: str) -> bool:
    """Whether an MLflow server answers there, not a database."""
    return uri.startswith(("http://", "https://"))


def public(uri: str) -> str:
    """The URI without user name and password."""
    parts = urllib.parse.urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _commit(root: Path) -> str | None:
    """The git commit of the workspace, where it has one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
