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
        NeftError: one can't be used, or can't keep every letter, or both are the same; without
            passwords.
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
        encoding = _open(url) if needs_async else _open_now(url)
    except ModuleNotFoundError as fault:
        lacking = f"{url.drivername}:// needs the package {fault.name}"
        raise NeftError(f"{name}: {lacking}; install it, or: {form}") from None
    except Exception as fault:  # SQLAlchemy's, the system's, or one of the driver's own
        raise NeftError(f"{name}: {where}: {_reason(fault, url)}; {form}") from None
    if encoding not in ("UTF8", None):
        remedy = "make it with ENCODING 'UTF8' TEMPLATE template0"
        raise NeftError(f"{name}: {where}: its encoding is {encoding}; {remedy}")
    return url.host, url.port, url.database


_ASKED = "SHOW server_encoding"
"""The encoding of a PostgreSQL database; in SQL_ASCII a driver refuses letters such as `é`."""


def _open_now(url: Any) -> str | None:
    """Its encoding; None where it isn't PostgreSQL."""
    from sqlalchemy import create_engine, text

    soon = {"connect_timeout": PATIENCE} if url.drivername.endswith(("psycopg2", "psycopg")) else {}
    engine = create_engine(url, connect_args=soon)
    try:
        with engine.connect() as connection:
            if url.get_backend_name() != "postgresql":
                return None
            return str(connection.scalar(text(_ASKED)))
    finally:
        engine.dispose()


def _open(url: Any) -> str:
    """As `_open_now`, by the driver that Prefect uses, which is asynchronous."""
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    async def connect() -> str:
        engine = create_async_engine(url, connect_args={"timeout": PATIENCE})
        try:
            async with engine.connect() as connection:
                return str(await connection.scalar(text(_ASKED)))
        finally:
            await engine.dispose()

    return asyncio.run(connect())


def _reason(fault: Exception, url: Any) -> str:
    """What the database or the system said, as one line."""
    said = " ".join(str(getattr(fault, "orig", None) or fault).split())
    said = said.partition(" Is the server running")[0]
    line = said.rpartition(">: ")[2].rpartition("FATAL: ")[2] or f"no answer in {PATIENCE} s"
    return line.replace(url.password, "...") if url.password else line
