"""Many scheduled runs, with a worker and MLflow's server killed and restarted in the middle.

`python tests/load.py --runs 50` starts the services of docker/compose.yaml on this machine, with
two workers, and prints what came of the runs. Their stages compute nothing: what is loaded is
Prefect, MLflow, DVC and PostgreSQL. The tests do it with 3 runs.
"""

import argparse
import json
import sys
import tempfile
import time
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fabricated
from operating import ENDED, ask, until
from stack import Stack, running

from neft_core.graph import Graph
from neft_core.workspace import Workspace, init_dvc

DEPLOYMENT = "neft-pipeline/on-demand"


def workspace(stack: Stack) -> Workspace:
    """The tiny workspace in the workers' volume, and the deployments for it."""
    root = stack.folder / "workspace/tiny"
    fabricated.make(root)
    init_dvc(root)
    stack.run("worker", "sh", "-c", "cd tiny && python -m neft_core.cli deploy")
    return Workspace(root)


def schedule(stack: Stack, ws: Workspace, numbers: list[int]) -> dict[int, str]:
    """Ask for a run of each number, a second from now; numbers to ids."""
    deployment = ask(stack.api, f"/deployments/name/{DEPLOYMENT}")["id"]
    due = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    found = {}
    for number in numbers:
        lr = f"runs.neft.lr={number / 1e5:g}"
        body = {
            "name": f"number {number}",
            "idempotency_key": str(uuid.uuid4()),
            "parameters": {"workspace": str(ws.root), "runs": ["neft"], "overrides": [lr]},
            "state": {"type": "SCHEDULED", "state_details": {"scheduled_time": due}},
        }
        made = ask(stack.api, f"/deployments/{deployment}/create_flow_run", body)
        found[number] = made["id"]
    return found


def states(stack: Stack, ids: list[str]) -> list[dict[str, Any]]:
    """The states of runs, in their order."""
    return [ask(stack.api, f"/flow_runs/{one}")["state"] for one in ids]


def ended(stack: Stack, ids: list[str], count: int | None = None) -> bool:
    """Whether so many of the runs, or all, have ended."""
    over = sum(state["type"] in ENDED for state in states(stack, ids))
    return over >= (len(ids) if count is None else count)


def trainings(stack: Stack) -> list[tuple[str, str]]:
    """Key and status of every MLflow run."""
    asked = {"experiment_ids": ["1"], "max_results": 5000}
    found = ask(f"{stack.tracking}/api/2.0/mlflow", "/runs/search", asked)["runs"]
    tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in found]
    return [(t["neft.key"], run["info"]["status"]) for t, run in zip(tags, found, strict=True)]


def load(stack: Stack, ws: Workspace, runs: int, patience: float) -> dict[str, Any]:
    """Schedule the runs, kill, restart, run again what crashed, and look at what is left."""
    began = time.monotonic()
    first = schedule(stack, ws, list(range(1, runs + 1)))
    ids = list(first.values())

    def at_a_training() -> str | None:
        busy = set(at_work(ws))
        return next((n for n in stack.worker_ports if busy & set(stack.processes(n))), None)

    victim = until(lambda: ended(stack, ids, runs // 10) and at_a_training(), patience)
    stack.kill(victim)
    stack.kill("mlflow")
    time.sleep(2)
    stack.start("mlflow")
    stack.start("worker", victim)
    stack.wait("mlflow")
    until(lambda: ended(stack, ids), patience)
    outcome = states(stack, ids)
    seconds = time.monotonic() - began
    again = [number for number, s in zip(first, outcome, strict=True) if s["type"] != "COMPLETED"]
    # All of them: those that completed while MLflow was away deliver what it lacks.
    second = list(schedule(stack, ws, list(first)).values())
    until(lambda: ended(stack, second), patience)
    found = trainings(stack)
    folders = sorted(ws.state("workspaces").iterdir())
    stale = [
        f.name for f in folders for s in [Graph(Workspace(f))] if any(map(s.changes, names(s)))
    ]
    return {
        "runs": runs,
        "first": dict(Counter(state["type"] for state in outcome)),
        "messages": sorted({s["message"] for s in outcome if s["type"] != "COMPLETED"}),
        "run again after a crash": len(again),
        "second": dict(Counter(state["type"] for state in states(stack, second))),
        "mlflow runs": len(found),
        "of these by key": len({key for key, _ in found}),
        "mlflow status": dict(Counter(status for _, status in found)),
        "workspaces": len(folders),
        "not up to date": stale,
        "stages left over": len(at_work(ws)),
        "seconds": round(seconds),
    }


def names(graph: Graph) -> list[str]:
    return [stage.name for stage in graph.stages]


def at_work(ws: Workspace) -> list[int]:
    """Numbers of the processes that train in the private workspaces."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_text().replace("\0", " ")
            inside = Path((place / "cwd").readlink()).is_relative_to(ws.root)
        except OSError:
            continue
        if inside and "fabricated.py train" in line:
            found.append(int(place.name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        with running(Path(scratch), options.workers) as stack:
            ws = workspace(stack)
            # As `prefect work-pool set-concurrency-limit neft 4`.
            stack.run("worker", "prefect", "work-pool", "set-concurrency-limit", "neft", "4")
            found = load(stack, ws, options.runs, 3600)
        found["processes left over"] = len(stack.processes())
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
