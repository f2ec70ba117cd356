"""The flow that registers a run's model, and makes it champion where it passes the gate."""

from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from neft_core.operations import allowed
from neft_core.promotion import Gate
from neft_core.workspace import find_workspace


@flow(
    name="neft-promotion",
    description="A run's model to the registry, through the gate.",
    flow_run_name="promote {run}",
)
def promotion(
    run: str,
    workspace: str = ".",
    seed: int | None = None,
    name: str | None = None,
    merged: bool = False,
    alpha: float = 0.05,
    margin: float = 0.0,
    max_forgetting: str = "0.5",
    text: str | None = None,
) -> State:
    """Register a run's model as challenger, and as champion where it passes the gate.

    Args:
        run: a run of params.yaml that is trained and evaluated.
        workspace: a directory with dvc.yaml and params.yaml.
        seed: one of its seeds; none: the first.
        name: of the registered model; none: experiment and task.
        merged: keep a whole checkpoint in place of the adapter.
        alpha: largest p-value against base and champion, exclusive.
        margin: points of the metric by which it must be better.
        max_forgetting: allowed rise of the loss on other text, in nats per token; `none`: not
            measured.
        text: a file with that text, one a line.

    Returns:
        A state `Champion` or `Refused` with the gate's reasons.
    """
    from neft_core.registry import promote

    gate = Gate(alpha, margin, allowed(max_forgetting), Path(text) if text else None)
    found = find_workspace(Path(workspace))
    model, version, decision = promote(found, run, seed, name=name, gate=gate, merged=merged)
    create_markdown_artifact(
        decision.text(), key="neft-gate", description=f"{model}, version {version}"
    )
    get_run_logger().info("models:/%s/%s\n%s", model, version, decision.text())
    if decision.champion:
        return Completed(name="Champion", message=f"models:/{model}@champion is version {version}")
    # A state that isn't completed would end the process with a traceback in the log.
    said = f"version {version} stays challenger: {'; '.join(decision.reasons)}"
    return Completed(name="Refused", message=said)
