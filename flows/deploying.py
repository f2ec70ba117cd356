"""Registering the deployments of prefect.yaml with a Prefect server, and the limit for the GPU."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from neft_core.errors import NeftError
from neft_core.mlflow_store import public
from neft_core.workspace import Workspace

GPU = "gpu"
"""The limit that stages on an accelerator take; of one, so that they run one after the other."""


def deploy(workspace: Workspace, file: Path, clients: Mapping[str, str]) -> str:
    """Register every deployment of a file; what is registered already is brought up to date.

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
    except Exception as fault:  # of httpx and Prefect, a dozen unrelated types
        reason = " ".join(str(fault).split())[:200] or type(fault).__name__
        raise NeftError(
            f"PREFECT_API_URL: {public(url)} does not answer ({reason}); start that server"
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
