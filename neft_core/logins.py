"""What makes the servers of `neft up` ask who is there."""

import secrets
from collections.abc import Mapping
from importlib.util import find_spec

from neft_core.errors import NeftError

PASSWORDS = {
    "Prefect": "PREFECT_SERVER_API_AUTH_STRING",
    "MLflow": "MLFLOW_AUTH_ADMIN_PASSWORD",
}
"""The variable of each server; without it the server answers to everybody."""

_KEY = "MLFLOW_FLASK_SERVER_SECRET_KEY"


def of_mlflow(environment: Mapping[str, str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """What MLflow's server has on its command line and in its environment for its login."""
    if not environment.get(PASSWORDS["MLflow"]):
        return (), {}
    # The key signs the forms of its pages.
    return ("--app-name", "basic-auth"), {_KEY: environment.get(_KEY) or secrets.token_hex(16)}


def check(environment: Mapping[str, str]) -> None:
    """Raise a NeftError where MLflow's login lacks its package."""
    if environment.get(PASSWORDS["MLflow"]) and not find_spec("flask_wtf"):
        raise NeftError(f"{PASSWORDS['MLflow']}: needs pip install 'neft[auth]'")


def exposed(host: str, environment: Mapping[str, str]) -> str:
    """A line where servers that ask for no password can be reached from other machines."""
    open_to = [name for name, password in PASSWORDS.items() if not environment.get(password)]
    if host in ("127.0.0.1", "localhost", "::1") or not open_to:
        return ""
    return (
        f"CAUTION: {host} can be reached from other machines, {' and '.join(open_to)} without a "
        "password; docs/operations.md says how to put one in front"
    )
