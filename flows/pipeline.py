"""The Prefect flow: the graph of dvc.yaml, one task per stage and item.

DVC decides what is up to date; Prefect shows it, retries, logs and cancels.
"""

import contextlib
import functools
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed

from flows import server
from flows.console import console, on_state
from neft_core import tracking
from neft_core.config import HubModel, HubSource, Params
from neft_core.errors import NeftError
from neft_core.graph import Changes, Graph, Stage
from neft_core.overrides import variant
from neft_core.pages import pages, report_page
from neft_core.remaining import Remaining
from neft_core.repro import StageFailed, reproduce
from neft_core.study_files import note_failures
from neft_core.workspace import Workspace, find_workspace, hold

RETRY_DELAYS = [2.0, 10.0]
"""Seconds before each new try of a stage that uses a network."""

ON_DEVICE = {
    "base", "warmup", "warmups", "scores", "activations", "train", "baseline", "evaluate",
    "transfer", "utilisation", "forgetting", "speed",
}  # fmt: skip
"""Families that compute on the device."""

SHOWING = ("summary", "report")
"""Stages that show what there is; in a study also where something failed."""


LAST_LINES = 15
"""How many of a failed stage's lines its task's state tells."""


class Ended(StageFailed):
    """A stage's failure with its last lines, as a task's state tells it."""

    def __init__(self, fault: NeftError | StageFailed, lines: Iterable[str]) -> None:
        super().__init__("\n".join([str(fault), *lines]))
        self.fault = fault


@dataclass
class Result:
    """What an execution did.

    Attributes:
        outcomes: for each stage `ran`, `restored`, `cached`, `failed` or `skipped`.
        table: the result table in Markdown, where the pipeline has one.
        seconds: how long it took.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    table: str | None = None
    seconds: float = 0.0

    def words(self) -> str:
        """In a line."""
        counts = Counter(self.outcomes.values())
        did = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        return f"{len(self.outcomes)} stages in {self.seconds:.0f} s: {did}"


def _run_name() -> str:
    """A flow run is named after its workspace and what is asked of it."""
    asked = flow_run.parameters
    chosen = [*(asked.get("runs") or []), *(asked.get("overrides") or [])]
    return ", ".join([Path(asked["workspace"]).resolve().name, *chosen])[:200]


@flow(
    name="neft-pipeline",
    description="Base model and corpus to a comparison of methods.",
    flow_run_name=_run_name,
)
def pipeline(
    workspace: str = ".",
    runs: list[str] | None = None,
    overrides: list[str] | None = None,
    force: bool = False,
    study: bool = False,
) -> State[Result]:
    """Make every stage that is not up to date.

    With `runs` or `overrides` that happens in a private workspace below the given one, which shares
    its DVC cache: its own files and dvc.lock stay as they are.

    Args:
        workspace: a directory with dvc.yaml and params.yaml.
        runs: names of the runs to make, of those in params.yaml; none: all.
        overrides: changes of params.yaml, each as `KEY=VALUE`, such as `runs.neft.lr=1e-3`.
        force: run each stage even if nothing changed.
        study: leave it off; on in a study's own workspace: the time left is told, and what could
            not be made is written into its params.yaml, so that summary and report tell of the
            rest.

    Returns:
        What was done; of a run on a server the message of its last state.

    Raises:
        NeftError: each failure was a user's mistake; one line for each.
        StageFailed: a stage failed otherwise.
    """
    found = find_workspace(Path(workspace))
    if runs or overrides:
        found = variant(found, runs or [], overrides or [])
        get_run_logger().info("private workspace %s", found.root)
    with hold(found.state("lock"), str(found.root)):
        result = _walk(found, force, study)
    return Completed(message=result.words(), data=result)


def run_pipeline(workspace: Workspace, force: bool = False, study: bool = False) -> Result:
    """Run the flow, with a Prefect server of its own where none is configured (see `pipeline`)."""
    # Said before a server starts; the flow itself holds the lock for as long as it runs.
    with hold(workspace.state("lock"), str(workspace.root)):
        pass
    with server.api() as lasting, console(lasting):
        # Prefect gives the data of the state that a flow returns.
        result: Any = pipeline(str(workspace.root), force=force, study=study)
        assert isinstance(result, Result)
        return result


def _walk(workspace: Workspace, force: bool, study: bool) -> Result:
    began = time.monotonic()
    log = get_run_logger()
    params = workspace.params()
    graph = Graph(workspace)
    for note in graph.notes:
        log.warning(note)
    tracker = tracking.Tracker(workspace, log)
    changes = {stage.name: graph.changes(stage.name) for stage in graph.stages}
    stale = sum(map(bool, changes.values()))
    log.info("%d stages, %d up to date", len(changes), 0 if force else len(changes) - stale)
    result = Result()
    reasons: list[Exception] = []
    causes: dict[str, str] = {}
    states: dict[str, State] = {}
    clock = Remaining(workspace.host.state("seconds.json")) if study else None
    progress = create_progress_artifact(0.0, key="neft-progress", description="Stages dealt with")
    assert isinstance(progress, UUID)
    for place, stage in enumerate(graph.stages):
        if study and causes and stage.family == "summary" and _any_result(result.outcomes):
            note_failures(workspace, causes)
            graph = Graph(workspace)
            changes |= {name: graph.changes(name) for name in SHOWING}
        before = {result.outcomes[name] for name in stage.upstream}
        if before & {"ran", "restored"}:
            changes[stage.name] = graph.changes(stage.name)
        broken = [n for n in stage.upstream if result.outcomes[n] in ("failed", "skipped")]
        shows = study and stage.family in SHOWING and _any_result(result.outcomes)
        if broken and (shows or stage.family == "assign"):  # they leave out what isn't there
            broken = [name for name in broken if name in SHOWING]
            graph.fill_in(stage.name)
        if broken:
            work = _skip(broken[0])
            causes[stage.name] = causes[broken[0]]
        elif force or changes[stage.name]:
            left = _left(clock, graph.stages[place:], changes, result.outcomes, force)
            work = _make(stage, graph, changes[stage.name], tracker, params, force, left)
        else:
            work = functools.partial(_cached, stage)
        # What a task waits for is drawn as lines in Prefect's graph; it would refuse a failed one.
        done = [states[name] for name in stage.upstream if name in states]
        started = time.monotonic()
        try:
            state = _task(stage, params, work)(wait_for=done)
        except Ended as ended:
            reasons.append(ended.fault)
            causes[stage.name] = str(ended.fault).partition("\n")[0]
            result.outcomes[stage.name] = "failed"
            log.error("%s failed: %s", stage.name, ended.fault)
        else:
            result.outcomes[stage.name] = state.name.lower() if state.name else "ran"
            if state.is_completed():
                states[stage.name] = state
            if clock and result.outcomes[stage.name] in ("ran", "restored"):
                clock.took(stage.family, time.monotonic() - started)
        update_progress_artifact(progress, 100 * len(result.outcomes) / len(graph.stages))
    skipped = [name for name, outcome in result.outcomes.items() if outcome == "skipped"]
    if skipped:
        log.warning("skipped, as they need what failed: %s", ", ".join(skipped))
    tracker.close(graph)
    table = workspace.path("summary", "summary.md")
    if result.outcomes.get("summary") not in (None, "failed", "skipped") and table.is_file():
        result.table = table.read_text(encoding="utf-8")
        create_markdown_artifact(result.table, key="neft-summary", description="Result table")
    create_link_artifact(
        pages(workspace)[0].url,
        link_text="MLflow runs",
        key="neft-mlflow",
        description="Params, curves, files, and runs side by side; without a server of its own "
        "'neft ui' in the workspace shows them",
    )
    report = report_page(workspace)
    if report:
        create_link_artifact(
            report, link_text="report", key="neft-report", description="Tables and figures"
        )
    result.seconds = time.monotonic() - began
    server.settle(str(flow_run.id), len(result.outcomes))
    if reasons:
        kind = StageFailed if any(isinstance(r, StageFailed) for r in reasons) else NeftError
        raise kind("\n".join(dict.fromkeys(map(str, reasons))))
    return result


def _any_result(outcomes: Mapping[str, str]) -> bool:
    """Whether something could be evaluated, so that there is something to show."""
    return any(
        name.startswith("evaluate@") and outcome not in ("failed", "skipped")
        for name, outcome in outcomes.items()
    )


def _left(
    clock: Remaining | None,
    ahead: Sequence[Stage],
    changes: Mapping[str, Changes],
    outcomes: Mapping[str, str],
    force: bool,
) -> str:
    """How many stages are still to be made, and how long that takes; empty without a clock."""
    if clock is None:
        return ""
    due: dict[str, Stage] = {}
    for stage in ahead:
        above = {outcomes.get(name) for name in stage.upstream}
        if above & {"failed", "skipped"} and stage.name not in SHOWING:
            continue
        if (
            force
            or changes[stage.name]
            or above & {"ran", "restored"}
            or due.keys() & stage.upstream
        ):
            due[stage.name] = stage
    said = clock.words([stage.family for stage in due.values()])
    return f"{len(due)} stages to go" + (f", {said}" if said else "")


def _task(stage: Stage, params: Params, work: Callable[[], State]) -> Callable[..., State]:
    """A Prefect task for one stage; called directly, so that a cancel reaches it."""
    source = params.tasks[stage.item].source if stage.family == "corpus" and stage.item else None
    remote = isinstance(source, HubSource) or (
        stage.family == "base" and isinstance(params.model, HubModel)
    )
    return task(
        name=stage.family,
        task_run_name=stage.name,
        cache_policy=NO_CACHE,
        retries=len(RETRY_DELAYS) if remote else 0,
        retry_delay_seconds=RETRY_DELAYS,
    )(work)


def _cached(stage: Stage) -> State:
    get_run_logger().info("%s: up to date", stage.name)
    return Completed(name="Cached", message="up to date")


def _skip(cause: str) -> Callable[[], State]:
    return lambda: Cancelled(name="Skipped", message=f"{cause} failed or was skipped")


def _make(
    stage: Stage,
    graph: Graph,
    changes: Changes,
    tracker: tracking.Tracker,
    params: Params,
    force: bool,
    left: str,
) -> Callable[[], State]:
    def make() -> State:
        log = get_run_logger()
        began = time.monotonic()

        def said(line: str) -> str:
            """A stage's line under its heading: without the stage's name, with which it begins."""
            own = re.escape(" ".join(filter(None, (stage.family, stage.item))))
            return "  " + re.sub(rf"^{own}[,:] *", "", line)

        last: deque[str] = deque(maxlen=LAST_LINES)

        def told(line: str) -> None:
            last.append(line)
            log.info("%s", said(line))

        why = "; ".join([*changes.inputs, *changes.outputs][:3]) or "forced"
        log.info("%s: starts (%s)%s", stage.name, why, f"; {left}" if left else "")
        with contextlib.ExitStack() as stack:
            if stage.family in ON_DEVICE and _on_accelerator(params):
                stack.enter_context(concurrency("gpu", occupy=1, strict=False))
            if stage.family == "train" and stage.item:
                stack.enter_context(tracker.follow(graph, stage.item))
            try:
                outcome = reproduce(graph, stage.name, told, on_state=on_state(said), force=force)
            except (NeftError, StageFailed) as fault:
                raise Ended(fault, last) from None
        if stage.family in ("train", "evaluate"):
            tracker.sync(graph)
        if outcome == "unchanged":
            return _cached(stage)
        took = f"{outcome} in {time.monotonic() - began:.1f} s"
        log.info("%s: %s", stage.name, took)
        # A state's name is what Prefect's pages show.
        return Completed(name="Ran" if outcome == "ran" else "Restored", message=took)

    return make


def _on_accelerator(params: Params) -> bool:
    device = params.compute.device
    return device not in ("auto", "cpu") or (device == "auto" and Path("/dev/nvidiactl").exists())


if __name__ == "__main__":
    from neft_core.cli import main

    sys.exit(main(["run"]))
