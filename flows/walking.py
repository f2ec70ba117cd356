"""The walk through the graph: which stage is next, what it needs, what came of it."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State

from flows.at_once import AtOnce
from flows.making import Ended, Maker, as_task, cached, on_accelerator, skip
from neft_core import tracking
from neft_core.errors import NeftError
from neft_core.graph import Graph, Stage
from neft_core.preloaded import preloading
from neft_core.remaining import Remaining
from neft_core.repro import StageFailed
from neft_core.study_files import note_failures
from neft_core.workspace import Workspace

SHOWING = ("summary", "report")
"""Stages that show what there is; in a study also where something failed."""


class Walk:
    """Every stage of a workspace, made where it is not up to date.

    Attributes:
        outcomes: for each stage `ran`, `restored`, `cached`, `failed` or `skipped`.

    Args:
        workspace: whose stages.
        force: run each stage even if nothing changed.
        study: go on to what shows results past failures, and tell how long is left.
    """

    def __init__(self, workspace: Workspace, force: bool, study: bool) -> None:
        self.outcomes: dict[str, str] = {}
        self._workspace, self._force, self._study = workspace, force, study
        self._log = get_run_logger()
        self._params = workspace.params()
        # On a GPU one stage at a time computes anyway.
        self._jobs = 1 if on_accelerator(self._params) else self._params.jobs
        self._graph = Graph(workspace, shared=self._jobs > 1)
        self._waiting = list(self._graph.stages)
        self._tracker = tracking.Tracker(workspace, self._log)
        self._clock = Remaining(workspace.host.state("seconds.json")) if study else None
        self._changes = {stage.name: self._graph.changes(stage.name) for stage in self._waiting}
        self._states: dict[str, State] = {}
        self._began: dict[str, float] = {}
        self._faults: list[NeftError | StageFailed] = []
        self._causes: dict[str, str] = {}

    def go(self) -> None:
        """Deal with every stage; a failure ends what needs it, and nothing else."""
        for note in self._graph.notes:
            self._log.warning(note)
        total = len(self._waiting)
        fresh = 0 if self._force else total - sum(map(bool, self._changes.values()))
        self._log.info("%d stages, %d up to date", total, fresh)
        progress = create_progress_artifact(0.0, key="neft-progress", description="Stages so far")
        assert isinstance(progress, UUID)
        with self._preloading(total - fresh), AtOnce[Stage, State](self._jobs) as work:
            maker = Maker(self._params, self._tracker, self._force, self._jobs > 1, work.stop)
            while self._waiting or work:
                stage = None if work.full else self._next(alone=not work)
                if stage is not None:
                    work.start(stage, self._begin(stage, maker))
                    continue
                for ended, state in work.ended():
                    self._note(ended, state)
                    update_progress_artifact(progress, 100 * len(self.outcomes) / total)
        skipped = [name for name, outcome in self.outcomes.items() if outcome == "skipped"]
        if skipped:
            self._log.warning("skipped, as they need what failed: %s", ", ".join(skipped))
        self._tracker.close(self._graph)

    def _preloading(self, due: int) -> AbstractContextManager[None]:
        """For several stages; a process that has looked for a GPU can't be forked."""
        several = due > 1 and not on_accelerator(self._params)
        return preloading() if several else nullcontext()

    def raise_failures(self) -> None:
        """Tell all of them in one exception: a user's mistakes alone, or a defect among them."""
        if self._faults:
            defect = any(isinstance(fault, StageFailed) for fault in self._faults)
            kind = StageFailed if defect else NeftError
            raise kind("\n".join(dict.fromkeys(map(str, self._faults))))

    def _next(self, alone: bool) -> Stage | None:
        """The first stage whose turn it is; what shows results waits for everything else."""
        for stage in self._waiting:
            if self.outcomes.keys() >= set(stage.after) and (alone or stage.name not in SHOWING):
                self._waiting.remove(stage)
                return stage
        return None

    def _begin(self, stage: Stage, maker: Maker) -> "partial[State]":
        """What is to be done for a stage, as a task of Prefect."""
        if self._study and self._causes and stage.name == "summary" and self._any_result():
            note_failures(self._workspace, self._causes)
            self._graph = Graph(self._workspace, shared=self._graph.shared)
            self._changes |= {name: self._graph.changes(name) for name in SHOWING}
        if {self.outcomes[name] for name in stage.after} & {"ran", "restored"}:
            self._changes[stage.name] = self._graph.changes(stage.name)
        broken = [n for n in stage.upstream if self.outcomes[n] in ("failed", "skipped")]
        shows = self._study and stage.name in SHOWING and self._any_result()
        if broken and (shows or stage.family == "assign"):  # they leave out what isn't there
            broken = [name for name in broken if name in SHOWING]
            self._graph.fill_in(stage.name)
        if broken:
            do = partial(skip, broken[0])
            self._causes[stage.name] = self._causes[broken[0]]
        elif self._force or self._changes[stage.name]:
            changes, left = self._changes[stage.name], self._left([stage, *self._waiting])
            do = partial(maker.make, stage, self._graph, changes, left)
        else:
            do = partial(cached, stage)
        # What a task waits for is drawn as lines in Prefect's graph; it would refuse a failed one.
        done = [self._states[name] for name in stage.upstream if name in self._states]
        self._began[stage.name] = time.monotonic()
        return partial(as_task(stage, self._params, do), wait_for=done)

    def _note(self, stage: Stage, end: "Future[State]") -> None:
        """Keep what came of a stage."""
        try:
            state = end.result()
        except Ended as ended:
            self._faults.append(ended.fault)
            self._causes[stage.name] = str(ended.fault).partition("\n")[0]
            self.outcomes[stage.name] = "failed"
            self._log.error("%s failed: %s", stage.name, ended.fault)
            return
        outcome = self.outcomes[stage.name] = state.name.lower() if state.name else "ran"
        if state.is_completed():
            self._states[stage.name] = state
        if outcome not in ("ran", "restored"):
            return
        if self._clock:
            self._clock.took(stage.family, time.monotonic() - self._began[stage.name])
        if stage.family in ("train", "evaluate"):
            self._tracker.sync(self._graph)

    def _any_result(self) -> bool:
        """Whether something could be evaluated, so that there is something to show."""
        return any(
            name.startswith("evaluate@") and outcome not in ("failed", "skipped")
            for name, outcome in self.outcomes.items()
        )

    def _left(self, ahead: Sequence[Stage]) -> str:
        """How many stages are still to be made, and how long that takes; empty without a clock."""
        if self._clock is None:
            return ""
        due: dict[str, Stage] = {}
        beside = self._began.keys() - self.outcomes.keys()
        for stage in ahead:
            if {self.outcomes.get(name) for name in stage.upstream} & {"failed", "skipped"} and (
                stage.name not in SHOWING
            ):
                continue
            if (
                self._force
                or self._changes[stage.name]
                or {self.outcomes.get(name) for name in stage.after} & {"ran", "restored"}
                or (due.keys() | beside) & set(stage.after)
            ):
                due[stage.name] = stage
        said = self._clock.words([stage.family for stage in due.values()], self._jobs)
        return f"{len(due)} stages to go" + (f", {said}" if said else "")
