"""Making one stage: `dvc repro` in a child process, its lines, its outcome, its failure."""

import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from neft_core import processes
from neft_core.errors import NeftError
from neft_core.graph import Graph
from neft_core.progress import OVERWRITE
from neft_core.workspace import Workspace

Outcome = Literal["ran", "restored", "unchanged"]


class StageFailed(Exception):  # noqa: N818
    """A stage was killed or failed by a defect; the text is its last line."""


def reproduce(
    graph: Graph,
    name: str,
    on_line: Callable[[str], None],
    *,
    on_state: Callable[[str], None] | None = None,
    force: bool = False,
    stop: threading.Event | None = None,
) -> Outcome:
    """Make one stage by `dvc repro` in a child process; its inputs must be there.

    Args:
        graph: the workspace's graph; read anew at the end.
        name: the stage.
        on_line: takes each line that the stage prints, as it comes.
        on_state: takes the state of its progress, several times a second; None: lines tell it.
        force: run it even if nothing changed.
        stop: where another thread says that nobody waits for it any more.

    Returns:
        `ran`, `restored` from DVC's cache, or `unchanged`.

    Raises:
        NeftError: the stage, or DVC, found a user's mistake; the text is its own last line.
        StageFailed: it failed otherwise.
        KeyboardInterrupt: `stop` was set.
    """
    changes = graph.changes(name)
    if changes.missing:
        raise NeftError(
            f"{changes.missing[0]}: not found; stage '{name}' reads it, "
            "put it there or name another path in params.yaml"
        )
    graph.busy.add(name)
    try:
        outcome = _repro(graph, name, on_line, on_state, force, stop)
        damaged = graph.drop_damaged(name) if outcome == "restored" else []
        if damaged:
            for path in damaged:
                on_line(f"{path}: damaged in the DVC cache too; making it again")
            outcome = _repro(graph, name, on_line, on_state, force, stop)
    finally:
        graph.busy.discard(name)
    if outcome == "restored":
        for line in changes.outputs:
            on_line(f"{line}; restored from the DVC cache")
    return outcome


def _repro(
    graph: Graph,
    name: str,
    on_line: Callable[[str], None],
    on_state: Callable[[str], None] | None,
    force: bool,
    stop: threading.Event | None,
) -> Outcome:
    waits = ["--wait-for-lock"] if graph.shared else []
    command = [sys.executable, "-m", "dvc", *waits, "repro", "-s", *(["-f"] if force else []), name]
    here = str(Path(sys.executable).parent)
    env = {
        **os.environ,
        # The stages call `neft` without an activated environment, and in a plain shell.
        "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)]),
        "SHELL": "/bin/sh",
        "PYTHONUNBUFFERED": "1",
        processes.OWNER: str(os.getpid()),
    }
    if on_state is not None:
        env[OVERWRITE] = "1"
    told: deque[str] = deque(maxlen=1)
    outcome: Outcome = "unchanged"
    error = busy = ""
    # DVC releases its locks on SIGINT, and lets the stage clear up; where a shell without job
    # control started us, both ignore it.
    ask = (signal.SIGINT, signal.SIGTERM)
    with processes.group(command, cwd=graph.workspace.root, env=env, ask=ask) as child:
        for line in processes.lines(child, on_state, stop):
            if line == f"Running stage '{name}':":
                outcome = "ran"
            elif line.startswith(f"Stage '{name}' is cached - skipping run"):
                outcome = "restored"
            elif line.startswith("ERROR: ") and (name in line or outcome == "unchanged"):
                error = error or line.removeprefix("ERROR: ")
            elif blocker := _BLOCKER.match(line):
                busy = busy or blocker[1]
            elif line.strip() and not _CHATTER.match(line):
                on_line(line)
                told.append(line)
        status = child.wait()
    if not status:
        graph.refresh()
    else:
        if busy or error.startswith("Unable to acquire lock"):
            raise NeftError(
                f"stage '{name}': another DVC process{busy and f' ({busy})'} is at work on it; "
                "wait for it, or stop it first"
            )
        if error and outcome == "unchanged":
            reason = error.removeprefix(f"failed to reproduce '{name}': ").rstrip(".")
            raise NeftError(f"stage '{name}': {reason}; mend params.yaml or dvc.yaml")
        raise _failure(graph.workspace, name, error, told[0] if told else "", status)
    return outcome


_CHATTER = re.compile(
    r"> |Stage '.*' didn't change, skipping|(Generating|Updating) lock file 'dvc\.lock'|"
    r"Use `dvc push` to|To track the changes with git|\tgit add|To enable auto staging|"
    r"\tdvc config core\.autostage|WARNING: '.*' is empty\.|WARNING: Process '.*' with \(Pid|"
    r"Having any troubles\? Hit us up|"
    r"Data and pipelines are up to date|If there are no processes with such PIDs"
)
"""What `dvc repro` says around a stage."""

_BLOCKER = re.compile(r"  \(PID (\d+)\): ")
"""How DVC names a process that holds what the stage needs."""


def _failure(workspace: Workspace, name: str, error: str, told: str, status: int) -> Exception:
    """The exception for a failed `dvc repro`.

    Args:
        workspace: where it ran.
        name: the stage.
        error: DVC's own line.
        told: the stage's last line.
        status: DVC's exit status.
    """
    ended = re.search(r"failed to run: .*, exited with (-?\d+)$", error)
    if re.search("no space left on device|not enough space|disk is full", error + told, re.I):
        return NeftError(
            f"{workspace.root}: no space left on device in stage '{name}'; free some and run again"
        )
    if ended is None:
        reason = error.removeprefix(f"failed to reproduce '{name}': ") or told
        reason = reason or f"dvc ended with status {status} without a word"
        return StageFailed(f"stage '{name}': {reason}")
    code = int(ended[1])
    # A shell reports a signal as 128 plus its number, Python as minus the number.
    number = -code if code < 0 else code - 128
    if number in set(signal.Signals):
        return StageFailed(
            f"stage '{name}': killed by {signal.Signals(number).name}"
            f"{', as when memory runs out' if number == signal.SIGKILL else ''}; run again"
        )
    if code == 2 and told:
        return NeftError(told.removeprefix("neft: "))
    return StageFailed(f"stage '{name}': {told or f'ended with status {code} without a word'}")
