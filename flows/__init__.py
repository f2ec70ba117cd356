"""Prefect flows over the workspace's pipeline."""

import os

STANDARD = "PREFECT_LOGGING_FORMATTERS_STANDARD"

# Prefect reads these when it is imported, so this is the one place where importing has an effect.
for name, value in {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # A run that is silent for longer counts as crashed on a server (`deploying`).
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    f"{STANDARD}_FLOW_RUN_FMT": "%(asctime)s %(message)s",
    f"{STANDARD}_TASK_RUN_FMT": "%(asctime)s %(message)s",
}.items():
    os.environ.setdefault(name, value)
