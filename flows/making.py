"""One stage as a task of Prefect: `dvc repro` in a child process, its lines, its state."""

import contextlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from prefect.states import Cancelled, Completed

from flows.console import on_state
from neft_core import tracking
from neft_core.config import HubModel, HubSource, Params
from neft_core.errors import NeftError
from neft_core.graph import Changes, Graph, Stage
from neft_core.repro import StageFailed, reproduce

RETRY_DELAYS = [2.0, 10.0]
"""Seconds before each new try of a stage that uses a network."""

ON_DEVICE = {
    "base", "warmup", "warmups", "scores", "activations", "train", "baseline", "evaluate",
    "transfer", "utilisation", "forgetting", "speed",
}  # fmt: skip
"""Families that compute on the device."""

LAST_LINES = 15
"""How many of a failed stage's lines its task's state tells."""


class Ended(StageFailed):
    """A stage's failure with its last lines, as a task's state tells it."""

    def __init__(self, fault: NeftError | StageFailed, lines: Iterable[str]) -> None:
        super().__init__("\n".join([str(fault), *lines]))
        self.fault = fault


def on_accelerator(params: Params) -> bool:
    """Whether stages that compute share a GPU."""
    device = params.compute.device
    return device not in ("auto", "cpu") or (device == "auto" and Path("/dev/nvidiactl").exists())


def as_task(stage: Stage, params: Params, work: Callable[[], State]) -> Callable[..., State]:
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


def cached(stage: Stage) -> State:
    """The work of a stage that is up to date."""
    get_run_logger().info("%s: up to date", stage.name)
    return Completed(name="Cached", message="up to date")


def skip(cause: str) -> State:
    """The work of a stage that needs what failed."""
    return Cancelled(name="Skipped", message=f"{cause} failed or was skipped")


@dataclass(frozen=True)
class Maker:
    """What makes stages that are not up to date.

    Attributes:
        params: the workspace's.
        tracker: tracks trainings as they go on.
        force: run them even if nothing changed.
        several: others are made beside, so each line names its stage.
        stop: see `reproduce`.
    """

    params: Params
    tracker: tracking.Tracker
    force: bool
    several: bool
    stop: threading.Event

    def make(self, stage: Stage, graph: Graph, changes: Changes, left: str) -> State:
        """The work of one stage.

        Args:
            stage: which.
            graph: the workspace's.
            changes: why it is made.
            left: how long all that remains takes, or nothing.

        Raises:
            Ended: it failed.
        """
        if self.stop.is_set():  # while a task waited to be tried again
            raise KeyboardInterrupt
        log = get_run_logger()
        began = time.monotonic()
        own = re.compile(rf"^{re.escape(' '.join(filter(None, (stage.family, stage.item))))}[,:] *")
        last: deque[str] = deque(maxlen=LAST_LINES)

        def said(line: str) -> str:
            """A stage's line below its heading, which has the name already; or else with it."""
            return f"  {stage.name + ': ' if self.several else ''}{own.sub('', line)}"

        def told(line: str) -> None:
            last.append(line)
            log.info("%s", said(line))

        why = "; ".join([*changes.inputs, *changes.outputs][:3]) or "forced"
        log.info("%s: starts (%s)%s", stage.name, why, f"; {left}" if left else "")
        with contextlib.ExitStack() as stack:
            if stage.family in ON_DEVICE and on_accelerator(self.params):
                stack.enter_context(concurrency("gpu", occupy=1, strict=False))
            if stage.family == "train" and stage.item:
                stack.enter_context(self.tracker.follow(graph, stage.item))
            try:
                outcome = reproduce(
                    graph,
                    stage.name,
                    told,
                    on_state=on_state(said),
                    force=self.force,
                    stop=self.stop,
                )
            except (NeftError, StageFailed) as fault:
                raise Ended(fault, last) from None
        if outcome == "unchanged":
            return cached(stage)
        took = f"{outcome} in {time.monotonic() - began:.1f} s"
        log.info("%s: %s", stage.name, took)
        # A state's name is what Prefect's pages show.
        return Completed(name="Ran" if outcome == "ran" else "Restored", message=took)
