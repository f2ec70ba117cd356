"""The MLflow experiment of a workspace: opened, asked what it has, given what it lacks.

An MLflow run is found by its tag `neft.key`: of a training, the hash of its stage's key and the
seed; of a pipeline execution, the key of the whole graph. The only module that imports MLflow.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import sqlite3
import subprocess
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import neft_core
from neft_core import records
from neft_core.errors import NeftError
from neft_core.graph import entry_key
from neft_core.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

LARGEST_ADAPTER = 100 * 1024**2
"""Bytes; of a larger adapter only path and hash are recorded."""

OUTPUT, SCORES, SUMMARY = "neft.output", "neft.evaluation", "neft.summary"
"""Tags that say what was delivered whole: hashes of outputs, and keys of stages."""

BATCH = 1000
"""Metrics that MLflow takes in one call."""


def tracking_uri(workspace: Workspace) -> str:
    """MLFLOW_TRACKING_URI, or the workspace's own SQLite file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.root / 'mlflow.db'}"


@dataclass(frozen=True)
class Wanted:
    """What MLflow shall show: (key, state) of the trainings and of the execution."""

    trainings: Mapping[str, Mapping[str, Any]]
    execution: str
    summary: str | None

    def marks(self) -> dict[str, str]:
        """For each key, what its MLflow run shows."""
        found = {k: f"{v['output']} {v['evaluation']}" for k, v in self.trainings.items()}
        if self.summary:
            found[self.execution] = self.summary
        return found


def seed_key(stage_key: str, seed: int) -> str:
    """The key of one training run: of its stage, and the seed."""
    return hashlib.sha256(f"{stage_key} seed {seed}".encode()).hexdigest()


class Store:
    """An open MLflow experiment."""

    def __init__(self, client: "MlflowClient", experiment: str, workspace: Workspace) -> None:
        self.client = client
        self.experiment = experiment
        self.workspace = workspace
        self._new: set[str] = set()

    def find(self, key: str) -> Any | None:
        """The MLflow run with this key."""
        query = f"tags.`neft.key` = '{key}'"
        found = self.client.search_runs([self.experiment], query, max_results=1)
        return found[0] if found else None

    def create(self, key: str, name: str, tags: Mapping[str, str]) -> Any:
        """A new MLflow run."""
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
        made = self.client.create_run(self.experiment, run_name=name, tags={**source, **tags})
        self._new.add(made.info.run_id)
        return made

    def execution(self, key: str) -> str:
        """Id of the MLflow run that holds the trainings of an execution."""
        found = self.find(key)
        if found is None:
            found = self.create(key, f"pipeline {key[:8]}", {"neft.kind": "pipeline"})
            self.client.set_terminated(found.info.run_id)
        return str(found.info.run_id)

    def training(self, entries: records.Entries, run: str, seed: int, origin: str) -> Any:
        """The MLflow run of one training, made where there is none."""
        stage_key = entry_key(dict(entries[f"train@{run}"]))
        key = seed_key(stage_key, seed)
        found = self.find(key)
        if found is not None:
            return found
        params = records.run_params(entries, run, seed)
        tags = {
            "neft.kind": "training",
            "neft.run": run,
            "neft.seed": str(seed),
            "neft.task": params["run.task"],
            "neft.stage_key": stage_key,
            "mlflow.parentRunId": self.execution(origin),
        }
        found = self.create(key, f"{run} seed {seed}", tags)
        self.log(found.info.run_id, params=params)
        return found

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
        metrics = [Metric(p.name, p.value, now, p.step) for p in points]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        values = [Param(name, value[:6000]) for name, value in (params or {}).items()]
        for start in range(0, len(values), 100):
            self.client.log_batch(run_id, params=values[start : start + 100])
        if tags:
            self.client.log_batch(run_id, tags=[RunTag(*pair) for pair in tags.items()])

    def logged(self, run_id: str, names: Iterable[str]) -> dict[tuple[str, int], float]:
        """Metrics by step that MLflow has already."""
        return {
            (metric.key, metric.step): metric.value
            for name in names
            for metric in self.client.get_metric_history(run_id, name)
        }

    def deliver(self, wanted: Wanted) -> tuple[int, int]:
        """Deliver what is missing; the number of MLflow runs created, and of others changed."""
        changed = set()
        for key, item in wanted.trainings.items():
            before = self.find(key)
            known = before.data.tags if before else {}
            score = item["evaluation"]
            if known.get(OUTPUT) == item["output"] and score in (None, known.get(SCORES)):
                continue
            run_id = self._complete(item, wanted.execution)
            if score is not None and known.get(SCORES) != score:
                self._score(run_id, item, score)
            changed.add(run_id)
        if wanted.summary:
            before = self.find(wanted.execution)
            if before is None or before.data.tags.get(SUMMARY) != wanted.summary:
                run_id = self.execution(wanted.execution)
                self._summarise(run_id, wanted.summary)
                changed.add(run_id)
        return len(self._new), len(changed - self._new)

    def _complete(self, item: Mapping[str, Any], origin: str) -> str:
        """Deliver all that a finished training left."""
        entries, run, seed, folder = (item[k] for k in ("entries", "run", "seed", "folder"))
        found = self.training(entries, run, seed, origin)
        if found.data.tags.get(OUTPUT) == item["output"]:
            return str(found.info.run_id)
        points = records.history(folder)
        have = self.logged(found.info.run_id, {point.name for point in points})
        if not _continues(have, points):
            # Left by a training that was lost and ran differently; a point can't be taken back.
            self.client.delete_run(found.info.run_id)
            found = self.training(entries, run, seed, origin)
            have = {}
        run_id = str(found.info.run_id)
        self.log(run_id, [point for point in points if (point.name, point.step) not in have])
        numbers, texts = records.final(folder)
        modules = records.mask(self.workspace, run)
        if modules:
            numbers["mask/neurons"] = float(sum(modules.values()))
            self.client.log_dict(run_id, modules, "mask.json")
        numbers |= records.cost(self.workspace, run, seed)
        last = max((point.step for point in points), default=0)
        self.log(run_id, [records.Point(name, last, value) for name, value in numbers.items()])
        self._datasets(found, entries, found.data.tags["neft.task"])
        tags = {f"neft.{name}": text for name, text in texts.items()}
        self.log(run_id, tags={**tags, **self._adapter(run_id, folder)})
        end = int((folder / "metrics.json").stat().st_mtime * 1000)
        self.client.set_terminated(run_id, "FINISHED", max(end, found.info.start_time))
        # Last: without this tag the delivery is repeated.
        self.log(run_id, tags={OUTPUT: item["output"]})
        return run_id

    def _adapter(self, run_id: str, folder: Path) -> dict[str, str]:
        # adapter.safetensors, or what PEFT reads: adapter_model.safetensors and its config.
        files = sorted(folder.glob("adapter*"))
        path = next((file for file in files if file.suffix == ".safetensors"), None)
        if path is None:
            return {}
        tags = {"neft.adapter": str(path.relative_to(self.workspace.root))}
        if path.stat().st_size <= LARGEST_ADAPTER:
            for file in files:
                self.client.log_artifact(run_id, str(file), "adapter")
        else:
            with path.open("rb") as handle:
                tags["neft.adapter.md5"] = hashlib.file_digest(handle, "md5").hexdigest()
        return tags

    def _datasets(self, found: Any, entries: records.Entries, task: str) -> None:
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
            for split in records.splits(self.workspace, entries, task)
            if split.digest not in have
        ]
        if inputs:
            self.client.log_inputs(found.info.run_id, inputs)

    def _score(self, run_id: str, item: Mapping[str, Any], key: str) -> None:
        """Deliver the scores of the test split, with the hypotheses."""
        numbers, texts = records.evaluation(self.workspace, item["run"], item["seed"])
        self.log(run_id, [records.Point(name, 0, value) for name, value in numbers.items()])
        hypotheses = self.workspace.path("evaluation", item["run"], f"seed-{item['seed']}.jsonl")
        if hypotheses.exists():
            self.client.log_artifact(run_id, str(hypotheses), "hypotheses")
        tags = {f"neft.{name}": text for name, text in texts.items()}
        self.log(run_id, tags={**tags, SCORES: key})

    def _summarise(self, run_id: str, key: str) -> None:
        """Deliver the execution's params and result table."""
        self.log(run_id, params=records.flat(self.workspace.params().model_dump(mode="json")))
        self.client.log_artifacts(run_id, str(self.workspace.path("summary")), "summary")
        self.log(run_id, tags={SUMMARY: key})


def _continues(have: Mapping[tuple[str, int], float], points: Iterable[records.Point]) -> bool:
    """Whether what MLflow has is part of what the files say."""
    said = {(point.name, point.step): point.value for point in points}
    return all(
        place in said and (said[place] == value or (math.isnan(said[place]) and math.isnan(value)))
        for place, value in have.items()
    )


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
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    uri = tracking_uri(workspace)
    own = workspace.root / "mlflow.db" if uri.endswith(f"{workspace.root}/mlflow.db") else None
    home = workspace.root
    if uri.startswith("sqlite:///"):
        home = Path(uri.removeprefix("sqlite:///")).resolve().parent
    # Without a root MLflow would write below the current directory.
    artifacts = None if is_server(uri) else (home / "mlruns").as_uri()
    experiment_name = workspace.params().tracking.experiment
    try:
        with _one_at_a_time(workspace):
            if own:
                _set_aside(own)
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(experiment_name)
            if found is None:
                experiment = client.create_experiment(experiment_name, artifact_location=artifacts)
            else:
                experiment = found.experiment_id
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
        if "Max retries exceeded" in reason:
            reason = "does not answer"
        reason = reason.replace(uri, public(uri))
        raise NeftError(f"MLflow at {public(uri)}: {reason}; check MLFLOW_TRACKING_URI") from fault


@contextlib.contextmanager
def _one_at_a_time(workspace: Workspace) -> Iterator[None]:
    """Several clients that make the same new database would all fail."""
    path = workspace.state("mlflow.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
