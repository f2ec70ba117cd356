"""Registering the deployments of prefect.yaml with a Prefect server, and the limit for the GPU."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from neft_core.errors import NeftError
from neft_core.mlflow_store import public
from neft_core.workspace import Workspace

GPU = "gpu"
"""The limit that stages on an accelerator take; of one, so that they run one after the other."""

FLOWS = ("neft-pipeline", "neft-study", "neft-promotion")
"""Names of our flows."""

SILENCE = 100
"""Seconds without a heartbeat (our flows send one every 30) after which a run has crashed."""

START = 600
"""Seconds that a worker may take from taking a run to its first step."""

_ENDED = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Cancelled", "Crashed")}
_ALIVE = "prefect.flow-run.heartbeat"


def _automations() -> list[AutomationCore]:
    """What tells that a flow run's process is gone, where it could not say so itself."""

    def crashed(name: str, after: str, expect: set[str], seconds: int, why: str) -> AutomationCore:
        return AutomationCore(
            name=name,
            description="Made by 'neft deploy'; change it as you like.",
            trigger=EventTrigger(
                after={after},
                expect=expect | _ENDED,
                match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
                # Of our flows alone: others may send fewer signs of life.
                match_related=ResourceSpecification(
                    {"prefect.resource.role": ["flow"], "prefect.resource.name": list(FLOWS)}
                ),
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=seconds),
            ),
            actions=[
                ChangeFlowRunState(name=None, state=StateType.CRASHED, message=why, force=False)
            ],
        )

    silent = f"no sign of life in {SILENCE} s: its process was killed"
    never = f"not started in {START} s: its worker was killed"
    starting = {_ALIVE, "prefect.flow-run.Running"}
    return [
        crashed("neft-silent-runs", _ALIVE, {_ALIVE}, SILENCE, silent),
        crashed("neft-unstarted-runs", "prefect.flow-run.Pending", starting, START, never),
    ]


def deploy(workspace: Workspace, file: Path, clients: Mapping[str, str]) -> str:
    """Register every deployment of a file; what is registered already is brought up to date.

    With them come the limit for the GPU, and automations that end runs whose process was killed.

    Args:
        workspace: the workspace that they run by default.
        file: such as prefect.yaml.
        clients: variables that name the server, where `neft up` started one.

    Returns:
        The address of the list of deployments.

    Raises:
        NeftError: no server is known or answers, or Prefect refuses the file.
    """
    url = os.environ.get("PREFECT_API_URL") or clients.get("PREFECT_API_URL")
    url = url or get_current_settings().api.url
    if not url:
        raise NeftError("deploy: no Prefect server; run 'neft up' first, or set PREFECT_API_URL")
    try:
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            client.raise_for_api_version_mismatch()
            limit = GlobalConcurrencyLimitCreate(name=GPU, limit=1)
            with contextlib.suppress(ObjectAlreadyExists):  # yours may be larger
                client.create_global_concurrency_limit(limit)
            for automation in _automations():
                if not client.read_automations_by_name(automation.name):
                    client.create_automation(automation)
    except Exception as fault:  # of httpx and Prefect, a dozen unrelated types
        reason = " ".join(str(fault).split())[:200] or type(fault).__name__
        raise NeftError(
            f"PREFECT_API_URL: {public(url)}: {reason}; start that server, or name its "
            "user:password in PREFECT_API_AUTH_STRING"
        ) from None
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(
        [*command, "--prefect-file", str(file)],
        cwd=workspace.root,
        env={**os.environ, "PREFECT_API_URL": url, "NEFT_WORKSPACE": str(workspace.root)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        told = (done.stdout + done.stderr).strip().splitlines()
        raise NeftError(f"{file}: {told[-1] if told else 'refused'}; see 'prefect deploy'")
    return public(url).removesuffix("/api") + "/deployments"
