"""What MLflow shall show of a workspace, and giving an open store what it lacks.

An MLflow run is found by its tag `neft.key`: of a training, the hash of its stage's key and the
seed; of a pipeline execution, the key of the whole graph.
"""

import hashlib
import json
import math
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neft_core import records
from neft_core.lockfile import entry_key
from neft_core.mlflow_store import Store
from neft_core.workspace import REPORTS

LARGEST_ADAPTER = 100 * 1024**2
"""Bytes; of a larger adapter only path and hash are recorded."""

OUTPUT, SCORES, SUMMARY = "neft.output", "neft.evaluation", "neft.summary"
"""Tags that say what was delivered whole: hashes of outputs, and keys of stages."""


_PARENT = threading.Lock()
"""Trainings that go on at once would each make their common parent."""


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


def execution(store: Store, key: str) -> str:
    """Id of the MLflow run that holds the trainings of an execution."""
    with _PARENT:
        found = store.find(key)
        if found is None:
            found = store.create(key, f"pipeline {key[:8]}", {"neft.kind": "pipeline"})
            store.client.set_terminated(found.info.run_id)
        return str(found.info.run_id)


def training(
    store: Store,
    entries: records.Entries,
    run: str,
    seed: int,
    origin: str,
    start: int | None = None,
) -> Any:
    """The MLflow run of one training, made where there is none: as one that started then."""
    stage_key = entry_key(dict(entries[f"train@{run}"]))
    key = seed_key(stage_key, seed)
    found = store.find(key)
    if found is not None:
        return found
    params = records.run_params(entries, run, seed)
    tags = {
        "neft.kind": "training",
        "neft.run": run,
        "neft.seed": str(seed),
        "neft.task": params["run.task"],
        "neft.stage_key": stage_key,
        "mlflow.parentRunId": execution(store, origin),
        "mlflow.note.content": f"{store.workspace.params().runs[run].method.words()} "
        f"on {params['run.task']}, lr {params['lr']}, seed {seed}",
    }
    found = store.create(key, f"{run} seed {seed}", tags, start)
    store.log(found.info.run_id, params=params)
    return found


def deliver(store: Store, wanted: Wanted) -> tuple[int, int]:
    """Deliver what is missing; the number of MLflow runs created, and of others changed."""
    changed = set()
    for key, item in wanted.trainings.items():
        before = store.find(key)
        known = before.data.tags if before else {}
        score = item["evaluation"]
        if known.get(OUTPUT) == item["output"] and score in (None, known.get(SCORES)):
            continue
        run_id = _complete(store, item, wanted.execution)
        if score is not None and known.get(SCORES) != score:
            _score(store, run_id, item, score)
        changed.add(run_id)
    if wanted.summary:
        before = store.find(wanted.execution)
        if before is None or before.data.tags.get(SUMMARY) != wanted.summary:
            run_id = execution(store, wanted.execution)
            _summarise(store, run_id, wanted.summary)
            changed.add(run_id)
    return len(store.new), len(changed - store.new)


def _complete(store: Store, item: Mapping[str, Any], origin: str) -> str:
    """Deliver all that a finished training left."""
    entries, run, seed, folder = (item[k] for k in ("entries", "run", "seed", "folder"))
    cost = records.cost(store.workspace, run, seed)
    end = int((folder / "metrics.json").stat().st_mtime * 1000)
    start = end - int(1000 * cost.get("cost/seconds", 0))
    found = training(store, entries, run, seed, origin, start)
    if found.data.tags.get(OUTPUT) == item["output"]:
        return str(found.info.run_id)
    points = records.history(folder)
    have = store.logged(found.info.run_id, {point.name for point in points})
    if not _continues(have, points):
        # Left by a training that was lost and ran differently; a point can't be taken back.
        store.client.delete_run(found.info.run_id)
        found = training(store, entries, run, seed, origin, start)
        have = {}
    run_id = str(found.info.run_id)
    # The machine's may be there already, live, and more of them: the files keep fewer.
    machine = records.system(store.workspace, run, seed)
    have |= store.logged(run_id, {point.name for point in machine})
    store.log(run_id, [point for point in points + machine if point.place not in have])
    numbers, texts = records.final(folder)
    for name in numbers.keys() & found.data.params.keys():
        del numbers[name]
    modules = records.mask(store.workspace, run)
    if modules:
        numbers["mask/neurons"] = float(sum(modules.values()))
        store.client.log_dict(run_id, modules, "mask.json")
    numbers |= cost
    # MLflow's pages draw a single value at step 0 as a bar, at another step as a curve of a dot.
    store.log(run_id, [records.Point(name, 0, value) for name, value in numbers.items()])
    task = found.data.tags["neft.task"]
    store.datasets(found, task, records.splits(store.workspace, entries, task))
    tags = {f"neft.{name}": text for name, text in texts.items()}
    store.log(run_id, tags={**tags, **_adapter(store, run_id, folder)})
    store.client.set_terminated(run_id, "FINISHED", max(end, found.info.start_time))
    # Last: without this tag the delivery is repeated.
    store.log(run_id, tags={OUTPUT: item["output"]})
    return run_id


def _adapter(store: Store, run_id: str, folder: Path) -> dict[str, str]:
    # adapter.safetensors, or what PEFT reads: adapter_model.safetensors and its config.
    files = sorted(folder.glob("adapter*"))
    path = next((file for file in files if file.suffix == ".safetensors"), None)
    if path is None:
        return {}
    tags = {"neft.adapter": str(path.relative_to(store.workspace.root))}
    if path.stat().st_size <= LARGEST_ADAPTER:
        for file in files:
            store.send(run_id, file, "adapter")
    else:
        with path.open("rb") as handle:
            tags["neft.adapter.md5"] = hashlib.file_digest(handle, "md5").hexdigest()
    return tags


def _score(store: Store, run_id: str, item: Mapping[str, Any], key: str) -> None:
    """Deliver the scores of the test splits, with the hypotheses."""
    own = item["entries"][f"train@{item['run']}"]["params"][f"runs.{item['run']}"]["task"]
    tags: dict[str, str] = {}
    tables = []
    for place in item["tests"]:
        numbers, texts = records.evaluation(store.workspace, place, item["seed"])
        store.log(run_id, [records.Point(name, 0, value) for name, value in numbers.items()])
        hypotheses = store.workspace.path("evaluation", place, f"seed-{item['seed']}.jsonl")
        if hypotheses.exists():
            folder = "/".join(filter(None, ("hypotheses", place.partition(".")[2])))
            store.send(run_id, hypotheses, folder)
        task = place.partition(".")[2] or own
        table = records.samples(store.workspace, place, task, item["seed"])
        if table is not None:
            tables.append({"path": f"samples/{task}.json", "type": "table"})
            store.client.log_dict(run_id, table, tables[-1]["path"])
        tags |= {f"neft.{name}": text for name, text in texts.items()}
    # By this tag MLflow's pages know a table, and show those of several runs side by side.
    tags["mlflow.loggedArtifacts"] = json.dumps(tables)
    store.log(run_id, tags={**tags, SCORES: key})


def _summarise(store: Store, run_id: str, key: str) -> None:
    """Deliver the execution's params, result table and report."""
    params = store.workspace.params()
    # How a study shows its results is no param of a run.
    asked = params.model_dump(mode="json", exclude={"study"})
    asked |= {"study": params.study.title} if params.study else {}
    store.log(run_id, params=records.flat(asked))
    store.send(run_id, store.workspace.path("summary"), "summary")
    if (reports := store.workspace.root / REPORTS).is_dir():
        store.send(run_id, reports, REPORTS)
    store.client.set_terminated(run_id)
    table = (store.workspace.path("summary") / "summary.md").read_text(encoding="utf-8")
    # As the run's description; MLflow takes 8,000 characters, and the whole is an artifact.
    table = re.sub(" {2,}", " ", table)[:7000].rpartition("\n")[0]
    note = f"{store.workspace.root.name}: {', '.join(params.runs)[:900]}\n\n{table}"
    store.log(run_id, tags={"mlflow.note.content": note, SUMMARY: key})


def _continues(have: Mapping[tuple[str, int], float], points: Iterable[records.Point]) -> bool:
    """Whether what MLflow has is part of what the files say."""
    said = {point.place: point.value for point in points}
    return all(
        place in said and (said[place] == value or (math.isnan(said[place]) and math.isnan(value)))
        for place, value in have.items()
    )
