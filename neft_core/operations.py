"""`neft up | down | deploy | promote | rollback`: what a team runs on shared servers."""

import argparse
from collections.abc import Callable
from pathlib import Path

from neft_core.errors import NeftError

REFUSED = 3
"""Exit status of `neft promote` where the gate refused."""


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Give `neft` these commands.

    Args:
        command: makes a parser of a name, what it does, and more about it.
    """
    start = command(
        "up",
        "start Prefect, MLflow and a worker on this machine, and leave them running",
        "SQLite by default; PREFECT_SERVER_DATABASE_CONNECTION_URL and MLFLOW_BACKEND_STORE_URI "
        "name other databases.",
    )
    start.add_argument("--host", default="127.0.0.1", help="address to bind (default: loopback)")
    for name, port in (("Prefect", 4200), ("MLflow", 5000)):
        flag = f"--{name.lower()}-port"
        start.add_argument(flag, type=int, default=port, metavar="PORT", help=f"default: {port}")
    start.set_defaults(command=up)
    command("down", "stop what 'neft up' started, and what runs on it").set_defaults(command=down)

    register = command("deploy", "register the deployments of prefect.yaml with the server")
    register.add_argument(
        "--file", type=Path, metavar="FILE", help="default: prefect.yaml of the workspace"
    )
    register.set_defaults(command=deploy)

    choose = command(
        "promote",
        "register a run's model; champion, where it beats base and champion",
        f"Ends with {REFUSED} where the gate refuses.",
    )
    choose.add_argument("run", metavar="RUN", help="a run of params.yaml")
    choose.add_argument("--seed", type=int, help="which seed of it (default: its first)")
    choose.add_argument("--name", help="the registered model (default: experiment and task)")
    choose.add_argument("--merged", action="store_true", help="keep a checkpoint, no adapter")
    choose.add_argument(
        "--alpha", type=float, default=0.05, help="largest p-value, exclusive (default: 0.05)"
    )
    choose.add_argument(
        "--margin", type=float, default=0.0, help="points by which it must be better (default: 0)"
    )
    choose.add_argument(
        "--max-forgetting",
        default="0.5",
        metavar="NATS",
        help="allowed rise of the loss on other text; none: not measured (default: 0.5)",
    )
    choose.add_argument("--text", type=Path, metavar="FILE", help="that text, one a line")
    choose.set_defaults(command=promote)

    back = command("rollback", "make the champion's predecessor champion again")
    back.add_argument("--name", help="the registered model (default: experiment and task)")
    back.set_defaults(command=rollback)


def _say(line: str) -> None:
    print(line, flush=True)


def up(options: argparse.Namespace) -> None:
    """Start the servers."""
    from neft_core import servers
    from neft_core.workspace import find_workspace

    state = servers.state_folder(find_workspace())
    servers.up(state, options.host, options.prefect_port, options.mlflow_port, _say)


def down(_options: argparse.Namespace) -> None:
    """Stop them."""
    from neft_core import servers
    from neft_core.workspace import find_workspace

    servers.down(servers.state_folder(find_workspace()), _say)


def deploy(options: argparse.Namespace) -> None:
    """Register deployments; a workspace without prefect.yaml gets the usual one."""
    from flows.deploying import deploy
    from neft_core import servers
    from neft_core.files import replacing
    from neft_core.workspace import PACKAGE, find_workspace

    ws = find_workspace()
    file = options.file.resolve() if options.file else ws.root / "prefect.yaml"
    if options.file and not file.is_file():
        raise NeftError(f"{file}: no such file; leave --file out for the usual deployments")
    if not file.exists():
        with replacing(file) as temporary:
            temporary.write_bytes((PACKAGE / "prefect.yaml").read_bytes())
        _say(f"{file}: written; change schedules and parameters there, then deploy again")
    page = deploy(ws, file, servers.clients(servers.state_folder(ws)))
    _say(f"deployments: {page}")


def promote(options: argparse.Namespace) -> int:
    """Register a model, decide, and tell why."""
    from neft_core.promotion import Gate
    from neft_core.registry import promote
    from neft_core.workspace import find_workspace

    gate = Gate(
        alpha=options.alpha,
        margin=options.margin,
        max_forgetting=allowed(options.max_forgetting),
        text=options.text,
    )
    name, version, decision = promote(
        find_workspace(),
        options.run,
        options.seed,
        name=options.name,
        gate=gate,
        merged=options.merged,
    )
    _say(f"{decision.text()}\n\nmodels:/{name}/{version}")
    return 0 if decision.champion else REFUSED


def allowed(text: str) -> float | None:
    """What `--max-forgetting` says."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise NeftError(f"--max-forgetting: got '{text}'; a number, or none") from None


def rollback(options: argparse.Namespace) -> None:
    """Give the alias back."""
    from neft_core.registry import model_name, rollback
    from neft_core.workspace import find_workspace

    ws = find_workspace()
    name = model_name(ws, None, options.name)
    left, back = rollback(ws, name)
    _say(f"{name}: champion was version {left}, is version {back} again")
