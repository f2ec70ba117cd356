"""The Prefect flow: the graph of dvc.yaml, one task per stage and item.

DVC decides what is up to date; Prefect shows it, retries, logs and cancels.
"""

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
)
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import server
from flows.console import console
from flows.walking import Walk
from neft_core.overrides import variant
from neft_core.pages import pages, report_page
from neft_core.workspace import Workspace, find_workspace, hold


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
    walk = Walk(workspace, force, study)
    walk.go()
    table = workspace.path("summary", "summary.md")
    result = Result(walk.outcomes)
    if walk.outcomes.get("summary") not in (None, "failed", "skipped") and table.is_file():
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
    walk.raise_failures()
    return result


if __name__ == "__main__":
    from neft_core.cli import main

    sys.exit(main(["run"]))
