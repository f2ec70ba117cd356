"""MLflow's model registry: `neft promote` and `neft rollback`.

A version is one trained run and seed in one form. The alias `challenger` is on what was registered
last, `champion` on what passed the gate last; each champion names the one that it took over from.
"""

import contextlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException

from neft_core import answering, promotion, records, runs, serving
from neft_core.delivery import seed_key
from neft_core.errors import NeftError
from neft_core.graph import Graph
from neft_core.lockfile import entry_key, locked
from neft_core.mlflow_store import LATE, Store, open_store, patient, public, tracking_uri
from neft_core.promotion import Decision, Gate, Rows
from neft_core.tracking import sync
from neft_core.workspace import Workspace, hold

CHAMPION, CHALLENGER = "champion", "challenger"

KEY, FORM, TOOK_OVER, DECISION = "neft.key", "neft.form", "neft.took_over_from", "neft.decision"
"""Tags of a version: what was trained; adapter or merged; the champion before; the gate's word."""

_ALIASES = (
    f"Made by 'neft promote'. {CHAMPION}: what passed the gate last; {CHALLENGER}: what was "
    "registered last. Each version's description has the gate's figures and its decision."
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def promote(
    ws: Workspace, run: str, seed: int | None, *, name: str | None, gate: Gate, merged: bool
) -> tuple[str, str, Decision]:
    """Register a run's model as challenger, and as champion where it passes the gate.

    Args:
        ws: the workspace; nobody else may be running it.
        run: a run that is trained and evaluated.
        seed: one of its seeds; None: the first.
        name: of the registered model; None: experiment and task.
        gate: what a champion must show.
        merged: keep a whole checkpoint in place of the adapter.

    Returns:
        Name and version of the registered model, and the decision.

    Raises:
        NeftError: run or seed is unknown or not up to date, the name can't be one, MLflow refuses,
            another promotion came first.
    """
    params = ws.params()
    seed = runs.chosen_seed(params, run, seed)
    name = model_name(ws, params.runs[run].task, name)
    with hold(ws.state("lock"), str(ws.root)):
        graph = Graph(ws)
        for stage in (f"train@{run}", f"evaluate@{run}", f"baseline@{params.runs[run].task}"):
            if graph.changes(stage):
                raise NeftError(f"{stage}: not up to date; run 'neft run' first")
        sync(ws, graph)
        with _opened(ws) as store:
            key = seed_key(entry_key(dict(locked(ws)[f"train@{run}"])), seed)
            champion = _by_alias(store, name, CHAMPION)
            again = champion is not None and champion.tags.get(KEY) == key
            answers = None
            if champion is not None and not again:
                answers = _answers(ws, run, seed, champion)
            decision = promotion.decide(ws, run, seed, answers, gate)
            _still_champion(store, name, champion)  # before anything is registered
            version = _version(ws, store, name, key, run, seed, merged)
            _still_champion(store, name, champion)  # sending a model may take long
            _describe(store, name, version, run, seed, decision)
            store.client.set_registered_model_alias(name, CHALLENGER, version)
            if decision.champion and not (champion and str(champion.version) == version):
                before = str(champion.version) if champion else ""
                store.client.set_model_version_tag(name, version, TOOK_OVER, before)
                store.client.set_registered_model_alias(name, CHAMPION, version)
    return name, version, decision


def rollback(ws: Workspace, name: str) -> tuple[str, str]:
    """Make the champion's predecessor champion again; both versions.

    Raises:
        NeftError: there is no champion, or it took over from nobody.
    """
    with _opened(ws) as store:
        champion = _by_alias(store, name, CHAMPION)
        if champion is None:
            where = f"has no champion in MLflow at {public(tracking_uri(ws))}"
            raise NeftError(f"model {name}: {where}; 'neft promote RUN' makes one")
        before = champion.tags.get(TOOK_OVER)
        if not before:
            raise NeftError(f"model {name}: version {champion.version} took over from nobody")
        store.client.set_registered_model_alias(name, CHAMPION, before)
        store.client.set_model_version_tag(name, champion.version, "neft.rolled_back_to", before)
    return str(champion.version), str(before)


def model_name(ws: Workspace, task: str | None, name: str | None) -> str:
    """The registered model's name: the one given, or that of experiment and task.

    Raises:
        NeftError: it can't be one, or the task is unknown or must be named.
    """
    if name is None:
        params = ws.params()
        if task is None and len(params.tasks) > 1:
            raise NeftError(f"--name: needed, as there are the tasks {', '.join(params.tasks)}")
        name = f"{params.tracking.experiment}-{task or next(iter(params.tasks))}"
    if not _NAME.fullmatch(name):
        raise NeftError(f"--name: got '{name}'; letters, digits, '_', '.' and '-', at most 100")
    return name


@contextlib.contextmanager
def _opened(ws: Workspace) -> Iterator[Store]:
    """The workspace's store, also for what MLflow does without a client."""
    # No bars for files of a few kB; what the user set stays.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    mlflow.set_tracking_uri(tracking_uri(ws))
    mlflow.set_registry_uri(tracking_uri(ws))
    with open_store(ws) as store:
        yield store


def _by_alias(store: Store, name: str, alias: str) -> Any | None:
    try:
        return store.client.get_model_version_by_alias(name, alias)
    except MlflowException as fault:
        if fault.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _still_champion(store: Store, name: str, champion: Any | None) -> None:
    """Refuse to go on where another promotion changed what was compared with."""
    now = _by_alias(store, name, CHAMPION)
    if getattr(now, "version", None) != getattr(champion, "version", None):
        said = f"version {now.version} became champion" if now else "lost its champion"
        raise NeftError(f"model {name}: {said} meanwhile; promote again")


def _answers(ws: Workspace, run: str, seed: int, champion: Any) -> Rows:
    """A champion's answers to the present test split: those that it came with, or new ones."""
    from neft_core.files import read_json
    from neft_core.rows import read_rows

    source = f"models:/{champion.name}/{champion.version}"
    with tempfile.TemporaryDirectory() as scratch:
        place = f"{source}/artifacts/model"
        kept, facts = (
            Path(mlflow.artifacts.download_artifacts(f"{place}/{file}", dst_path=scratch))
            for file in (serving.ANSWERS, serving.FACTS)
        )
        rows, task = read_rows(kept), read_json(facts)["task"]
    mine = read_rows(ws.path("evaluation", run, f"seed-{seed}.jsonl"))
    if promotion.same_questions(rows, mine):
        return rows
    params = ws.params()
    own = params.runs[run].task
    kind = params.tasks[own].format.task
    columns = answering.COLUMNS[kind]
    # Of texts that must not be long, the corpus may have more than were asked.
    asked = mine if columns == ("source",) else read_rows(ws.path("corpus", own, "test.jsonl"))
    if kind == "instruction":
        asked = [{"prompt": row["messages"][0]["content"]} for row in asked]
    import pandas

    print(f"champion of {task}: other test rows than now; it answers the present ones", flush=True)
    table = pandas.DataFrame([{name: row[name] for name in columns} for row in asked])
    with patient(LATE):
        model = mlflow.pyfunc.load_model(source)
    said = model.predict(table)
    return [row | {"hypothesis": text} for row, text in zip(mine, said, strict=True)]


def _version(
    ws: Workspace, store: Store, name: str, key: str, run: str, seed: int, merged: bool
) -> str:
    """The version of a trained run in a form; registered where there is none."""
    form = "merged" if merged else "adapter"
    if not store.client.search_registered_models(f"name = '{name}'"):
        store.client.create_registered_model(name, description=_ALIASES)
    for found in store.client.search_model_versions(f"name = '{name}'"):
        if (found.tags.get(KEY), found.tags.get(FORM)) == (key, form):
            return str(found.version)
    trained = store.find(key)
    if trained is None:
        raise NeftError(f"run {run}: not in MLflow; run 'neft track' first")
    run_id = trained.info.run_id
    logged = store.client.create_logged_model(
        store.experiment, f"{run}-seed-{seed}-{form}", source_run_id=run_id
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder, target = Path(scratch) / "model", Path(scratch) / "saved"
        folder.mkdir()
        serving.write(ws, run, seed, folder, merged)
        _save(ws, run, folder, target, run_id, logged)
        with patient(LATE):
            store.client.log_model_artifacts(logged.model_id, str(target))
    store.client.finalize_logged_model(logged.model_id, "READY")
    store.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
    base = records.read_json(ws.path("base", "base.json"))
    tags = {
        KEY: key,
        FORM: form,
        "neft.run": run,
        "neft.seed": str(seed),
        "neft.task": ws.params().runs[run].task,
        "neft.base": f"{base['kind']} {base['location']} {base['revision']}".strip(),
        "neft.base.hash": base["hash"],
    }
    made = store.client.create_model_version(
        name, logged.artifact_location, run_id, tags=tags, model_id=logged.model_id
    )
    return str(made.version)


def _save(ws: Workspace, run: str, folder: Path, target: Path, run_id: str, logged: Any) -> None:
    """The directory that MLflow loads: its description, the code that runs, and our files."""
    from importlib.metadata import version

    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    params = ws.params()
    kind = params.tasks[params.runs[run].task].format.task
    columns = [ColSpec("string", name) for name in answering.COLUMNS[kind]]
    longest = ParamSpec("max_new_tokens", "long", params.evaluation.max_new_tokens)
    libraries = ("mlflow", "torch", "transformers", "peft", "safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that an example would be welcome
        mlflow.pyfunc.save_model(
            str(target),
            python_model=str(Path(serving.__file__).with_name("served.py")),
            artifacts={"model": str(folder)},
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                run_id=run_id,
                model_id=logged.model_id,
            ),
            signature=ModelSignature(
                Schema(columns), Schema([ColSpec("string")]), ParamSchema([longest])
            ),
            pip_requirements=["neft", *(f"{name}=={version(name)}" for name in libraries)],
        )


def _describe(
    store: Store, name: str, version: str, run: str, seed: int, decision: Decision
) -> None:
    """Write the decision and its figures to a version."""
    said = CHAMPION if decision.champion else f"refused: {'; '.join(decision.reasons)}"
    figures = decision.as_dict()
    tags = {DECISION: said, "neft.gate": json.dumps(figures, ensure_ascii=False)}
    for label, found in decision.comparisons.items():
        for key in ("delta", "p_value"):
            tags[f"neft.{label}.{key}"] = f"{found[key]:.4g}"
    if decision.forgetting is not None:
        tags["neft.forgetting"] = f"{decision.forgetting:.4g}"
    for key, value in tags.items():
        store.client.set_model_version_tag(name, version, key, value[:5000])
    store.client.update_model_version(
        name, version, f"Run {run}, seed {seed}.\n\n{decision.text()}"
    )
