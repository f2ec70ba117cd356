"""Stages as forks of one process that has torch and transformers loaded: seconds less for each.

Whoever makes several stages starts that process (`preloading`); its address stands in the
environment. `neft stage`, which DVC calls, hands its work over (`hand_over`), passes signals on and
ends as the fork does. Where there is no such process, or none any more, it works itself.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from neft_core import processes

ADDRESS = "NEFT_PRELOADED"
"""Variable with the path of the process's socket; where it is empty, none is started or asked."""

MODULES = (
    "torch", "transformers.modeling_utils", "transformers.generation", "transformers.models.auto",
    "peft", "accelerate", "sacrebleu", "neft_core.cli", "neft_core.stages", "neft_core.evaluation",
    "neft_core.fit", "neft_core.tuner", "neft_core.training",
)  # fmt: skip
"""What the process imports before it forks.

Nothing that computes, or there would be threads; and nothing that makes what it removes at exit, as
matplotlib does with a folder where the home can't be written: every fork would remove it.
"""

LONGEST = 1 << 20
"""Bytes of a request: arguments, directory and environment."""

PATIENCE = 10.0
"""Seconds in which one that asks must have said for what."""


@contextlib.contextmanager
def preloading() -> Iterator[None]:
    """Stages that this block starts are forks of one process, which ends with it, or with us."""
    # Elsewhere than on Linux what these libraries load is not made to be forked.
    if ADDRESS in os.environ or sys.platform != "linux":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="neft-") as name, Path(os.devnull).open("wb") as none:
        folder = Path(name)
        command = [sys.executable, "-P", "-m", "neft_core.preloaded", str(folder / "socket")]
        # By the owner `neft down` knows it, and its forks, for what the flow itself ends.
        env = {**os.environ, processes.OWNER: str(os.getpid())}
        with processes.group(command, cwd=folder, env=env, output=none):
            os.environ[ADDRESS] = command[-1]
            try:
                yield
            finally:
                del os.environ[ADDRESS]


def hand_over(argv: Sequence[str]) -> int | None:
    """Let the loaded process run a command with our files, directory and environment.

    Args:
        argv: what follows `neft`.

    Returns:
        The command's status, once it has ended; None: nobody took it.
    """
    # What the command starts in its turn is its own.
    address = os.environ.pop(ADDRESS, "")
    if not address:
        return None
    told = {"argv": [*argv], "cwd": str(Path.cwd()), "env": dict(os.environ)}
    try:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:  # a system without such sockets
        return None
    with link:

        def pass_on(number: int, _frame: FrameType | None) -> None:
            with contextlib.suppress(OSError):
                link.send(bytes([number]))

        try:
            link.connect(address)
            socket.send_fds(link, [json.dumps(told).encode()], [0, 1, 2])
            if not link.recv(1):
                return None
        except OSError:
            return None
        # From here on it is being made, and never again by us, whatever the link says.
        before, answer = {}, b""
        try:
            before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
            with contextlib.suppress(OSError):
                answer = link.recv(16)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    status = int(answer or -signal.SIGKILL)
    if status < 0:
        # As the command would have ended: DVC and the shell tell by what.
        with contextlib.suppress(OSError):  # of SIGKILL there is nothing to set
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def serve(address: Path) -> None:
    """Take requests and fork, until killed. A fork leaves by SystemExit.

    Args:
        address: where to listen.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(address))
    listener.listen()
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # so that no collection in a fork writes to what all share
    ended, ends = os.pipe()
    for end in (ended, ends):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ends)
    forks: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, ended], [], [])
        if ended in ready:
            os.read(ended, 1 << 10)
        while forks and (over := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
            if over.si_code != os.CLD_EXITED:  # it could not end what it had started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(over.si_pid, signal.SIGKILL)
            _, status = os.waitpid(over.si_pid, 0)
            if over.si_pid in forks:
                _answer(forks.pop(over.si_pid), os.waitstatus_to_exitcode(status))
        if listener not in ready:
            continue
        link, _ = listener.accept()
        link.settimeout(PATIENCE)
        request, files, flags, child = b"", list[int](), 0, -1
        with contextlib.suppress(OSError):
            request, files, flags, _ = socket.recv_fds(link, LONGEST, 3)
        link.settimeout(None)
        if len(files) == 3 and not flags & socket.MSG_TRUNC:
            with contextlib.suppress(OSError):  # no memory, or too many processes
                child = os.fork()
        if not child:
            for other in (listener, *forks.values()):  # who asked for those waits for their end
                other.close()
            _work(link, request, files)
        if child > 0:
            forks[child] = link
        else:
            link.close()
        for file in files:
            os.close(file)


def _answer(link: socket.socket, status: int) -> None:
    """Tell how a fork ended; a signal that it took no more would come before that, as an error."""
    with contextlib.suppress(OSError), link:
        link.shutdown(socket.SHUT_RD)
        while link.recv(1):
            pass
        link.send(str(status).encode())


def _work(link: socket.socket, request: bytes, files: Sequence[int]) -> None:
    """In a fork: run the command as if it were a process of the one that asks."""
    link.send(b"f")
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for own, file in enumerate(files):
        os.dup2(file, own)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    told = json.loads(request)
    os.chdir(told["cwd"])
    os.environ.clear()
    os.environ.update(told["env"])
    threading.Thread(target=_follow, args=(link,), daemon=True).start()
    from neft_core import cli

    sys.argv = ["neft", *told["argv"]]
    sys.exit(cli.main(told["argv"]))


def _follow(link: socket.socket) -> None:
    """Take the signals that are passed on; where nobody is there any more, end with all we have."""
    with contextlib.suppress(OSError):
        while told := link.recv(1):
            os.kill(os.getpid(), told[0])
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
