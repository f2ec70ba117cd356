"""Whether the databases that `neft up` hands to its servers answer, before it starts them.

A server that can't use its database tries for minutes, and then tells it in pages of text.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from neft_core.errors import NeftError

PATIENCE = 5
"""Seconds that a database may take to answer."""

VARIABLES = {
    "prefect": (
        "PREFECT_SERVER_DATABASE_CONNECTION_URL",
        "PREFECT_API_DATABASE_CONNECTION_URL",
    ),
    "mlflow": ("MLFLOW_BACKEND_STORE_URI",),
}
"""What names the database of a server."""

_ASYNCPG = "postgresql+asyncpg"


def check(environment: Mapping[str, str]) -> None:
    """Connect to each server's database, where it is told one that is no file.

    Args:
        environment: what the servers will have.

    Raises:
        NeftError: one can't be used, or both are the same; without passwords.
    """
    seen: dict[Any, str] = {}
    for server, names in VARIABLES.items():
        for name in names:
            told = environment.get(name, "")
            if not told or told.startswith("sqlite"):
                continue
            place = _connect(name, told, needs_async=server == "prefect")
            other = seen.setdefault(place, server)
            if other != server:
                raise NeftError(f"{name}: is {other}'s database too; give each one of its own")


def _connect(name: str, told: str, *, needs_async: bool) -> tuple[Any, ...]:
    """Open a database once; where it is."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    driver = _ASYNCPG if needs_async else "postgresql+psycopg2"
    form = f"the form is {driver}://USER:PASSWORD@HOST:PORT/NAME"
    if told.count("@") > 1:
        raise NeftError(f"{name}: has more than one '@'; write those of a password as %40")
    try:
        url = make_url(told)
    except (SQLAlchemyError, ValueError):
        raise NeftError(f"{name}: no address of a database; {form}") from None
    if needs_async and url.drivername != driver:
        raise NeftError(f"{name}: got {url.drivername}://, which Prefect can't use; {form}")
    where = f"database {url.database} on {url.host}" + (f", port {url.port}" if url.port else "")
    try:
        if needs_async:
            _open(url)
        else:
            _open_now(url)
    except ModuleNotFoundError as fault:
        lacking = f"{url.drivername}:// needs the package {fault.name}"
        raise NeftError(f"{name}: {lacking}; install it, or: {form}") from None
    except Exception as fault:  # SQLAlchemy's, the system's, or one of the driver's own
        raise NeftError(f"{name}: {where}: {_reason(fault, url)}; {form}") from None
    return url.host, url.port, url.database


def _open_now(url: Any) -> None:
    from sqlalchemy import create_engine

    soon = {"connect_timeout": PATIENCE} if url.drivername.endswith(("psycopg2", "psycopg")) else {}
    engine = create_engine(url, connect_args=soon)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _open(url: Any) -> None:
    """By the driver that Prefect uses, which is asynchronous."""
    from sqlalchemy.ext.asyncio import create_async_engine

    async def connect() -> None:
        engine = create_async_engine(url, connect_args={"timeout": PATIENCE})
        try:
            async with engine.connect():
                pass
        finally:
            await engine.dispose()

    asyncio.run(connect())


def _reason(fault: Exception, url: Any) -> str:
    """What the database or the system said, as one line."""
    said = " ".join(str(getattr(fault, "orig", None) or fault).split())
    said = said.partition(" Is the server running")[0]
    line = said.rpartition(">: ")[2].rpartition("FATAL: ")[2] or f"no answer in {PATIENCE} s"
    return line.replace(url.password, "...") if url.password else line
