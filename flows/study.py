"""The flow that runs a study: its file expanded, then the pipeline in the study's own workspace."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.pipeline import pipeline
from neft_core import study_command, study_files
from neft_core.workspace import REPORTS, find_workspace


@flow(
    name="neft-study",
    description="A study's runs, tables and figures.",
    flow_run_name="study {name}",
)
def study(name: str, workspace: str = ".", settings: list[str] | None = None) -> State:
    """Run what is missing of a study; goes on past failures, which its tables then tell of.

    Args:
        name: a study of `neft study`, or the path of a study file.
        workspace: a directory with dvc.yaml and params.yaml. The study runs below it, and shares
            its DVC cache and MLflow store.
        settings: changes of the study file for this run, each as `KEY=VALUE`.

    Raises:
        NeftError: a fault in the study, or runs that failed by a user's mistake.
        StageFailed: a stage failed otherwise.
    """
    host = find_workspace(Path(workspace)).host
    place = study_files.find(name, host.root)
    ws = study_command.ready(host, place, *study_command.preview(host, place, settings or []))
    try:
        pipeline(str(ws.root), study=True)
    finally:
        tables = ws.root / REPORTS / "study" / "study.md"
        if tables.is_file():
            create_markdown_artifact(
                tables.read_text(encoding="utf-8"), key="neft-study", description=place.name
            )
    return Completed(message=f"{ws.root / REPORTS}")
