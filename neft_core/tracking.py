"""MLflow as a view of the run directories: delivered once, live while training, never twice."""

import contextlib
import contextvars
import json
import logging
import sqlite3
import threading
import urllib.parse
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neft_core import records
from neft_core.delivery import OUTPUT, Wanted, deliver, seed_key, training
from neft_core.errors import NeftError
from neft_core.graph import Graph
from neft_core.lockfile import entry_key, locked
from neft_core.mlflow_store import Store, is_server, open_store, public, tracking_uri
from neft_core.workspace import Workspace

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]

_Identity = tuple[int, int, int] | None

POLL = 2.0
"""Seconds between two looks at a training's live files."""


@dataclass(frozen=True)
class Delivery:
    """What a synchronisation did: MLflow runs created, and those completed or updated."""

    uri: str
    created: int = 0
    updated: int = 0


def sync(
    workspace: Workspace, graph: Graph, *, trust: bool = False, but: Collection[str] = ()
) -> Delivery:
    """Bring MLflow up to date with the run directories; a second call changes nothing.

    Only what is whole is delivered: outputs that are those of dvc.lock.

    Args:
        workspace: the workspace; nobody else may be running it.
        graph: its graph.
        trust: take a server's word of last time that it has everything, without asking it.
        but: runs to leave for later, since somebody else delivers them now.

    Raises:
        NeftError: the tracking store can't be reached or used.
    """
    with graph.reading():
        wanted = _wanted(graph, but)
    uri = tracking_uri(workspace)
    if trust and _delivered(workspace, uri, wanted):
        return Delivery(public(uri))
    with open_store(workspace) as store:
        created, updated = deliver(store, wanted)
        _write_state(workspace, store, wanted)
    return Delivery(public(uri), created, updated)


def experiment(workspace: Workspace) -> str | None:
    """Id of the MLflow experiment that the workspace's runs were delivered to last."""
    known = _read_state(workspace)
    same = known.get("uri") == public(tracking_uri(workspace))
    return str(known["experiment"]) if same else None


def run_ids(workspace: Workspace) -> dict[str, dict[int, str]]:
    """For each run the ids of its seeds' MLflow runs, as they were delivered last."""
    known, entries = _read_state(workspace).get("runs", {}), locked(workspace)
    found: dict[str, dict[int, str]] = {}
    for run, section in workspace.params().runs.items():
        if (made := entries.get(f"train@{run}")) is not None:
            keys = {seed: seed_key(entry_key(made), seed) for seed in section.seeds}
            found[run] = {seed: known[key] for seed, key in keys.items() if key in known}
    return {run: ids for run, ids in found.items() if ids}


def execution_run(workspace: Workspace) -> str | None:
    """Id of the MLflow run of the execution that was delivered last."""
    return _read_state(workspace).get("execution") if experiment(workspace) else None


class Tracker:
    """Tracking beside a running pipeline: a store that is away costs a line, not the training."""

    def __init__(self, workspace: Workspace, log: Log) -> None:
        self.workspace = workspace
        self._log = log
        self._away = False
        self._told = False
        self._changed = 0
        self._following: dict[str, threading.Thread] = {}

    def sync(self, graph: Graph) -> None:
        """Deliver what is whole (see `sync`) and not followed: two at once would say it twice."""
        if self._away:
            return
        followed = [run for run, thread in list(self._following.items()) if thread.is_alive()]
        try:
            done = sync(self.workspace, graph, trust=True, but=followed)
        except NeftError as fault:
            self._give_up(fault)
            return
        self._changed += done.created + done.updated

    def close(self, graph: Graph) -> None:
        """Deliver what is left, also to a store that was away for a while, and say so."""
        self._away = False
        self.sync(graph)
        if self._changed and not self._away:
            self._log.info("MLflow: brought up to date")

    @contextlib.contextmanager
    def follow(self, graph: Graph, run: str) -> Iterator[None]:
        """Deliver a training's metrics by step while it goes on in this block."""
        if self._away:
            yield
            return
        with graph.reading():
            entries = {**locked(self.workspace), f"train@{run}": graph.entry(f"train@{run}")}
            origin = graph.origin()
        # Files of an earlier training lie there until this one begins.
        live = self.workspace.state("live", "train", run)
        stale = {path: _identity(path) for path in live.glob("seed-*/train.csv")}
        ended = threading.Event()
        status: list[str] = []

        def work() -> None:
            try:
                _follow(self.workspace, entries, origin, run, stale, ended, status)
            except NeftError as fault:
                self._give_up(fault)

        # Prefect's logger finds its server by the context; without it, it would start another.
        context = contextvars.copy_context()
        thread = threading.Thread(
            target=context.run, args=(work,), name=f"mlflow-{run}", daemon=True
        )
        self._following[run] = thread
        thread.start()
        try:
            yield
        except BaseException as fault:
            status.append("FAILED" if isinstance(fault, Exception) else "KILLED")
            raise
        finally:
            ended.set()
            killed = status == ["KILLED"]
            # A file answers for sure, on a busy machine late; of a server nobody knows.
            patience = 15 if is_server(tracking_uri(self.workspace)) else 120
            thread.join(timeout=5 if killed else patience)
            if thread.is_alive() and not self._away and not killed:
                self._give_up(NeftError(f"MLflow at {public(tracking_uri(self.workspace))}: slow"))

    def _give_up(self, fault: NeftError) -> None:
        self._away = True
        if self._told:
            return
        self._told = True
        self._log.warning("%s; the work goes on, 'neft track' delivers later", fault)


def _wanted(graph: Graph, but: Collection[str]) -> Wanted:
    entries = locked(graph.workspace)
    trainings = {}
    scored = _scored(graph, entries)
    based = _based(graph, entries)
    for stage in graph.stages:
        run = stage.item
        if stage.family != "train" or run is None or stage.name not in entries or run in but:
            continue
        if not graph.intact(stage.name):
            continue
        made = entries[stage.name]
        folder = f"work/train/{run}"
        tests = {
            place: key
            for place, (of, trained, key) in scored.items()
            if of == run and trained == made["outs"].get(folder)
        }
        for seed, path in records.seeds(graph.workspace.path("train", run)):
            trainings[seed_key(entry_key(made), seed)] = {
                "run": run,
                "seed": seed,
                "folder": path,
                "entries": entries,
                "output": made["outs"][folder],
                "tests": tuple(tests),
                "evaluation": " ".join([*tests.values(), *based]) if tests else None,
            }
    names = {stage.name for stage in graph.stages}
    # The report is made of the summary: where both are whole, its key stands for both.
    whole = (n for n in ("report", "summary") if n in names & set(entries) and not graph.changes(n))
    summary = next((entry_key(entries[name]) for name in whole), None)
    return Wanted(trainings, graph.origin(), summary)


def _scored(graph: Graph, entries: records.Entries) -> dict[str, tuple[str, Any, str]]:
    """Whole folders of scores, with the run, what was trained for them, and the stage's key."""
    found = {}
    for stage in graph.stages:
        if stage.family in ("evaluate", "transfer") and stage.name in entries:
            entry = entries[stage.name]
            place = Path(next(iter(entry["outs"]))).name
            run = place.partition(".")[0]
            if graph.intact(stage.name):
                found[place] = (run, entry["deps"].get(f"work/train/{run}"), entry_key(dict(entry)))
    return found


def _based(graph: Graph, entries: records.Entries) -> list[str]:
    """Keys of the whole baselines, whose answers stand beside those of the runs."""
    names = [stage.name for stage in graph.stages if stage.family == "baseline"]
    return [entry_key(dict(entries[n])) for n in names if n in entries and graph.intact(n)]


def _follow(
    workspace: Workspace,
    entries: records.Entries,
    origin: str,
    run: str,
    stale: Mapping[Path, _Identity],
    ended: threading.Event,
    status: list[str],
) -> None:
    """Deliver the rows that a training adds to its live files, until it ends."""
    live = workspace.state("live", "train", run)
    sent: dict[int, tuple[str, dict[tuple[str, int], float]]] = {}
    delivered: set[int] = set()
    with contextlib.ExitStack() as stack:
        store: Store | None = None
        last = False
        while not last:
            last = ended.wait(POLL)
            for seed, folder in records.seeds(live):
                begun = folder / "train.csv"
                if seed in delivered or stale.get(begun) == _identity(begun):
                    continue
                points = records.history(folder)
                store = store or stack.enter_context(open_store(workspace))
                if seed not in sent:
                    start = min((p.time for p in points if p.time), default=None)
                    found = training(store, entries, run, seed, origin, start)
                    run_id = str(found.info.run_id)
                    if OUTPUT in found.data.tags:
                        delivered.add(seed)
                        continue
                    store.client.update_run(run_id, "RUNNING")
                    sent[seed] = run_id, store.logged(run_id, {p.name for p in points})
                run_id, have = sent[seed]
                new = [p for p in points if p.place not in have]
                store.log(run_id, new)
                have.update({p.place: p.value for p in new})
        for run_id, _ in sent.values():
            if store is not None and status:
                store.client.update_run(run_id, status[0])


def _identity(path: Path) -> _Identity:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _delivered(workspace: Workspace, uri: str, wanted: Wanted) -> bool:
    """Whether everything wanted was delivered before, and a local store still has it."""
    known = _read_state(workspace)
    marks = wanted.marks()
    if known.get("uri") != public(uri):
        return False
    if known.get("experiment name") != workspace.params().tracking.experiment:
        return False
    if any(known["marks"].get(key, "") != mark for key, mark in marks.items()):
        return False
    if not wanted.trainings.keys() <= known.get("runs", {}).keys():
        return False
    if not uri.startswith("sqlite:///"):
        return True
    query = (
        "SELECT tags.value FROM tags JOIN runs USING (run_uuid) "
        "WHERE tags.key = 'neft.key' AND runs.lifecycle_stage = 'active'"
    )
    path = urllib.parse.quote(uri.removeprefix("sqlite:///"))
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return set(marks) <= {value for (value,) in connection.execute(query)}
    except sqlite3.Error:
        return False


def _read_state(workspace: Workspace) -> dict[str, Any]:
    try:
        return records.read_json(workspace.state("tracked.json"))
    except NeftError:
        return {}


def _write_state(workspace: Workspace, store: Store, wanted: Wanted) -> None:
    path = workspace.state("tracked.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    execution = store.find(wanted.execution)
    state = {
        "execution": execution.info.run_id if execution else None,
        "uri": public(tracking_uri(workspace)),
        "experiment": store.experiment,
        "experiment name": workspace.params().tracking.experiment,
        "marks": wanted.marks(),
        "runs": {key: store.ids[key] for key in wanted.trainings},
    }
    temporary.write_text(json.dumps(state, indent=1), encoding="utf-8")
    temporary.replace(path)
