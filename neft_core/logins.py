"""What makes the servers of `neft up` ask who is there."""

import ipaddress
import secrets
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from neft_core.errors import NeftError

PASSWORDS = {
    "prefect": "PREFECT_SERVER_API_AUTH_STRING",
    "mlflow": "MLFLOW_AUTH_ADMIN_PASSWORD",
}
"""The variable of each server; without it the server answers to everybody."""

_CLIENTS = {
    "prefect": ("PREFECT_API_AUTH_STRING",),
    "mlflow": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
}
"""What the worker logs in with."""

_FILE = Path("~/.mlflow/credentials")
"""Where MLflow's client looks too."""

_KEY = "MLFLOW_FLASK_SERVER_SECRET_KEY"


def of_mlflow(environment: Mapping[str, str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """What MLflow's server has on its command line and in its environment for its login."""
    if not environment.get(PASSWORDS["mlflow"]):
        return (), {}
    # The key signs the forms of its pages.
    return ("--app-name", "basic-auth"), {_KEY: environment.get(_KEY) or secrets.token_hex(16)}


def asking(
    environment: Mapping[str, str], before: Iterable[str], starting: Iterable[str]
) -> list[str]:
    """Names of the servers that ask for a password, once those that don't run are started.

    Args:
        environment: what is started will have.
        before: names of those that asked when they were started last, and not taken down since.
        starting: names of what is started now, `worker` among them or not; the rest runs.

    Raises:
        NeftError: a server that is started has an empty password or none any more, or lacks the
            package for its login, or a worker that is started has nothing to log in with.
    """
    starting, asks = set(starting), set(before)
    for name in sorted(PASSWORDS.keys() & starting):
        password = PASSWORDS[name]
        told = password in environment
        asks |= {name} if told else set()
        if name in asks and not environment.get(password):
            state = "empty" if told else f"not set, and {name} asked for it before"
            raise NeftError(f"{password}: {state}; set it, or run 'neft down' to go without")
    if "mlflow" in asks & starting and not find_spec("flask_wtf"):
        raise NeftError(f"{PASSWORDS['mlflow']}: needs pip install 'neft[auth]'")
    for name in sorted(asks) if "worker" in starting else ():
        lacking = [client for client in _CLIENTS[name] if not environment.get(client)]
        if lacking and not (name == "mlflow" and _FILE.expanduser().exists()):
            raise NeftError(f"{lacking[0]}: not set; the worker needs it to log in to {name}")
    return sorted(asks)


def exposed(host: str, asks: Iterable[str]) -> str:
    """A line where servers that ask for no password can be reached from other machines."""
    open_to = [name for name in PASSWORDS if name not in asks]
    if _loopback(host) or not open_to:
        return ""
    return (
        f"CAUTION: {host} can be reached from other machines, {' and '.join(open_to)} without a "
        "password; docs/operations.md says how to put one in front"
    )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
