"""Stages that a loaded process forks: as if they were processes of those that ask for them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import edit
from operating import until

from neft_core import preloaded

LONG = ("epochs: 2,", "epochs: 20000,")
"""A training that goes on until it is ended."""


@pytest.fixture(scope="module")
def address():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(preloaded.ADDRESS, raising=False)
        with preloaded.preloading():
            address = os.environ[preloaded.ADDRESS]
            yield address
        assert preloaded.ADDRESS not in os.environ
        until(lambda: not [line for line in working().values() if address.encode() in line])


def working(place: Path | None = None) -> dict[int, list[bytes]]:
    """Command lines of loaded processes and their forks, of all or of those in a directory."""
    found = {}
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (proc / "cmdline").read_bytes().split(b"\0")
            if b"neft_core.preloaded" in line and place in (None, (proc / "cwd").readlink()):
                found[int(proc.name)] = line
    return found


def start(ws, address: str, *argv: str, **more: str) -> subprocess.Popen[str]:
    env = {**os.environ, preloaded.ADDRESS: address, **more}
    return subprocess.Popen(
        [sys.executable, "-m", "neft_core.cli", "stage", *argv],
        cwd=ws.root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def long(copied, address):
    """A training that goes on for long, with its fork at work."""
    edit(copied, LONG)
    child = start(copied, address, "train", "full")
    (fork,) = until(lambda: working(copied.root))
    until(copied.state("locks", "train-full").exists)
    yield copied, child, fork
    child.kill()
    child.communicate()


def test_a_stage_is_made_as_ever(copied, address):
    mask = copied.path("masks", "neft.safetensors")
    before = mask.read_bytes()
    mask.unlink()
    child = start(copied, address, "select", "neft")
    said, complained = child.communicate()
    assert (child.returncode, complained) == (0, "")
    assert said.startswith("select neft: ")
    assert mask.read_bytes() == before
    assert not working(copied.root)


def test_a_mistake_is_told_and_has_its_status(copied, address):
    child = start(copied, address, "train", "nobody")
    said, complained = child.communicate()
    assert (child.returncode, said) == (2, "")
    assert complained == "neft: stage train: got item 'nobody'; it takes one of full, lora, neft\n"


def test_it_has_the_variables_of_who_asks(copied, address):
    edit(copied, LONG)
    child = start(copied, address, "train", "full", NEFT_OWNER_PID="999999999")
    child.communicate()
    assert child.returncode == 1, "nobody waits for it, so it leaves"


def test_ctrl_c_lets_it_clear_up(long):
    ws, child, fork = long
    child.send_signal(signal.SIGTERM)
    _, complained = child.communicate(timeout=180)
    assert child.returncode == 130
    assert complained == "neft: interrupted; run the same command again to go on\n"
    assert not Path(f"/proc/{fork}").exists()
    assert not working(ws.root)


def test_it_ends_with_who_asked(long):
    ws, child, _ = long
    child.kill()
    until(lambda: not working(ws.root), 60)


def test_one_that_is_killed_ends_who_asked_alike(long):
    _, child, fork = long
    os.kill(fork, signal.SIGKILL)
    assert child.wait(180) == -signal.SIGKILL


def test_a_signal_that_comes_too_late_starts_nothing_anew(long):
    """What is left unread when a link closes is an error for the other end, before the answer."""
    _, child, fork = long
    stop(fork)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    stop(child.pid)
    os.kill(fork, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{fork}").exists())
    child.send_signal(signal.SIGCONT)
    assert child.wait(180) == -signal.SIGKILL


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def test_a_fork_has_no_link_of_another(long, address):
    ws, _, fork = long
    child = start(ws, address, "train", "lora")
    try:
        until(ws.state("locks", "train-lora").exists)
        (other,) = set(working(ws.root)) - {fork}
        assert sockets(other) == sockets(fork)
    finally:
        child.kill()
        child.communicate()


def sockets(pid: int) -> int:
    count = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it is at work
            count += str(file.readlink()).startswith("socket:")
    return count


def test_the_process_belongs_to_the_flow_and_leaves_nothing_to_remove_at_exit(long):
    """`neft down` spares what has an owner; matplotlib may make a folder that each fork removes."""
    _, _, fork = long
    owner = f"NEFT_OWNER_PID={os.getpid()}".encode()
    assert owner in Path(f"/proc/{fork}/environ").read_bytes().split(b"\0")
    assert "matplotlib" not in Path(f"/proc/{fork}/maps").read_text()


def test_without_the_process_a_stage_works_itself(copied, tmp_path):
    copied.path("masks", "neft.safetensors").unlink()
    child = start(copied, str(tmp_path / "nobody"), "select", "neft")
    assert child.communicate()[1] == ""
    assert child.returncode == 0
    assert copied.path("masks", "neft.safetensors").is_file()


def test_one_that_ends_before_it_forks_leaves_the_work_to_who_asks(copied, tmp_path):
    listener = subprocess.Popen(
        [sys.executable, "-c", LISTENS, str(tmp_path / "s")], stdout=subprocess.PIPE
    )
    listener.stdout.readline()
    copied.path("masks", "neft.safetensors").unlink()
    child = start(copied, str(tmp_path / "s"), "select", "neft")
    listener.communicate()
    assert child.communicate()[1] == ""
    assert child.returncode == 0
    assert copied.path("masks", "neft.safetensors").is_file()


LISTENS = """
import socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print(flush=True)
    listener.accept()
"""


def test_a_gpu_and_a_single_stage_need_none(finished, monkeypatch):
    """A process that has looked for a GPU can't be forked; one stage alone would win nothing."""
    from flows.walking import Walk
    from neft_core.config import parse_params

    monkeypatch.delenv(preloaded.ADDRESS, raising=False)
    walk = Walk.__new__(Walk)
    for device, due, begun in (("cpu", 2, True), ("cpu", 1, False), ("cuda", 9, False)):
        data = finished.params().model_dump()
        data["compute"]["device"] = device
        walk._params = parse_params(data, "x")
        with walk._preloading(due):
            assert (preloaded.ADDRESS in os.environ) is begun
