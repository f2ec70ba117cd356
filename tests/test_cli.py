"""The command line: commands, exit statuses, what is printed where."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from neft_core import cli
from neft_core.errors import NeftError
from neft_core.stages import STAGES


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(
        f"\n    {name} " in out for name in ("run", "plan", "stage", "init", "track", "generate")
    )


@pytest.mark.parametrize("argv", [[], ["rnu"], ["stage"], ["generate"]])
def test_a_command_that_does_not_exist(argv, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    assert "neft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "code", "lines"),
    [
        (NeftError("a: b; c\nd: e; f"), 2, ["neft: a: b; c", "neft: d: e; f"]),
        (NeftError("neft: a: b; c"), 2, ["neft: a: b; c"]),
        (OSError(errno.ENOSPC, "No space", "/x"), 2,
         ["neft: /x: no space left on the disk; free some and run again"]),
        (OSError(errno.EROFS, "Read-only", "/x"), 2,
         ["neft: /x: Read-only; choose what you can read and write"]),
        (OSError(errno.EPERM, "Not permitted", "/x"), 2,
         ["neft: /x: Not permitted; choose what you can read and write"]),
        (OSError(errno.ENAMETOOLONG, "Too long", "/x"), 2,
         ["neft: /x: Too long; give another path"]),
        (KeyboardInterrupt(), 130,
         ["neft: interrupted; run the same command again to go on"]),
        (ValueError("odd"), 1, None),
        (OSError(errno.EIO, "broken"), 1, None),
    ],
)  # fmt: skip
def test_exit_status(finished, neft, monkeypatch, fault, code, lines):
    def stage(_ws):
        raise fault

    monkeypatch.setitem(STAGES, "summary", stage)
    got, said = neft(finished, "stage", "summary")
    assert got == code
    if lines is None:
        assert said[0].startswith("Traceback")
    else:
        assert said == lines


def test_init_makes_a_workspace_and_says_how_to_go_on(tmp_path, neft, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "w", "--from", "examples/tatoeba-en-fr"]) == 0
    out = capsys.readouterr().out
    assert out == f"workspace {tmp_path / 'w'} is ready; next: cd w && neft run\n"
    assert cli.main(["init", "v", "--from", "nothing"]) == 2
    assert "nothing: no template" in capsys.readouterr().err


def test_names_that_the_file_system_does_not_take(finished, neft):
    long = "x" * 300
    for argv in (
        ["export", "neft", "--to", long],
        ["run", "--dry-run", "--params", long],
        ["study", long],
        ["analyse", "overlap", "neft", long],
        ["init", "w", "--from", long],
    ):
        code, (line,) = neft(finished, *argv)
        assert code == 2
        assert long in line
        assert line.endswith(": File name too long; give another path")
    assert not (finished.root / "w").exists()


def test_a_stage_ends_with_the_process_that_wants_it(finished, tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    code = (
        "import time; from neft_core import processes; processes.end_with_owner(); "
        "print('on', flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "NEFT_OWNER_PID": str(owner.pid)},
        stdout=subprocess.PIPE,
    )
    assert worker.stdout.readline() == b"on\n"
    owner.communicate(b"\n")
    began = time.monotonic()
    assert worker.wait(timeout=180) == 1
    assert time.monotonic() - began < 50
    worker.stdout.close()


def test_in_a_scripts_background_ctrl_c_ends_children_alone():
    """There SIGINT is ignored, and a child would inherit that: the signal that asks it to end."""
    ask = "import signal; print(signal.getsignal(signal.SIGINT) == signal.default_int_handler)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with cli._interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            child = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert child.stdout == "True\n"
