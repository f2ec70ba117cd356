"""A child process whose whole group ends with it, and with us, however either of them ends."""

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

OWNER = "NEFT_OWNER_PID"
"""Variable that tells a stage which process it works for."""

GRACE = 15.0
"""Seconds between one signal and the next, harder one."""

# A pipe tells of our death even where it was SIGKILL: its other end reads end of file then. The
# guard sits in the child's own group, so "group 0" can never be somebody else's.
GUARD = """
exec 3<&0 </dev/null
(trap '' TERM INT HUP; read -r _; kill -KILL 0) <&3 >/dev/null 2>&1 &
exec 3<&-
exec "$@"
"""


@contextlib.contextmanager
def group(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    output: IO[bytes] | None = None,
    ask: Sequence[signal.Signals] = (signal.SIGTERM,),
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a session of its own; no process of it outlives the block.

    Ctrl-C in the terminal reaches us alone; leaving the block sends the group the signals that
    ask it to end, one after the other, then SIGKILL. When we die ourselves, by SIGKILL even, the
    group is killed by its guard.

    Args:
        command: program and arguments.
        cwd: its working directory.
        env: its whole environment.
        output: a file for what it prints; None: a pipe, which must be read (see `lines`).
        ask: the signals that ask it to end.

    Yields:
        The process; its `stdout` carries both output streams.
    """
    child = subprocess.Popen(
        ["/bin/sh", "-c", GUARD, "sh", *command],
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.PIPE,
        stdout=output or subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        try:
            for sent in ask:
                if child.poll() is None:
                    os.killpg(child.pid, sent)
                    _wait(child)
        finally:
            # The guard keeps the group's number taken until now, so this hits nobody else.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def end_with_owner() -> None:
    """Leave when the `neft run` that wants this stage is gone: nobody would read the result."""
    owner = os.environ.get(OWNER)
    if not owner:
        return

    def watch() -> None:
        while True:
            time.sleep(1)
            try:
                os.kill(int(owner), 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _wait(child: subprocess.Popen[bytes]) -> None:
    """Wait for the child, and for all that hold its pipe: they may be clearing up behind it."""
    end = time.monotonic() + GRACE
    if child.stdout is not None:
        pipe = child.stdout.fileno()
        while (left := end - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
            if not os.read(pipe, 1 << 16):
                break
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(max(0.0, end - time.monotonic()))


def lines(
    child: subprocess.Popen[bytes],
    on_state: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> Iterator[str]:
    """The child's output line by line, until it ends.

    Of a progress bar, which overwrites its line after a carriage return, the last state is kept.

    Args:
        child: a process of `group`.
        on_state: takes each state of such a line as it comes.
        stop: where another thread says that nobody waits for the child any more.

    Raises:
        KeyboardInterrupt: it was said.
    """
    assert child.stdout is not None
    pipe = child.stdout.fileno()
    rest = b""
    ended = 0.0
    while True:
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        # A grandchild that outlives the child may keep the pipe open: don't wait for its end.
        if select.select([pipe], [], [], 0.2)[0]:
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                break
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield _last_state(line)
            rest = rest[rest.rfind(b"\r", 0, len(rest) - 1) + 1 :]
            if on_state is not None and rest.endswith(b"\r"):
                on_state(_last_state(rest))
        elif child.poll() is not None:
            ended = ended or time.monotonic()
            if time.monotonic() - ended > 0.5:
                break
    if rest:
        yield _last_state(rest)


def _last_state(line: bytes) -> str:
    return line.rstrip(b"\r").rsplit(b"\r", 1)[-1].decode("utf-8", "replace").rstrip()
