import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from neft_core import processes
from neft_core.processes import group, lines


def run(script: str, tmp_path: Path) -> list[str]:
    with group(["sh", "-c", script], cwd=tmp_path, env=os.environ) as child:
        return list(lines(child))


def gone(pid: int, within: float = 20) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo one; echo two >&2; printf three", ["one", "two", "three"]),
        (r"printf '1%%\r2%%\r3%%\nnext\r\n'", ["3%", "next"]),
        (r"printf 'a\r'; sleep 0.1; printf 'b\rc'; sleep 0.1; printf '\rd\n'", ["d"]),
        (r"printf '\377ok\n'", ["\ufffdok"]),
        ("exit 3", []),
    ],
)
def test_lines(script: str, expected: list[str], tmp_path: Path) -> None:
    assert run(script, tmp_path) == expected


def test_lines_come_while_the_child_works(tmp_path: Path) -> None:
    with group(["sh", "-c", "echo first; sleep 30"], cwd=tmp_path, env=os.environ) as child:
        began = time.monotonic()
        assert next(lines(child)) == "first"
        assert time.monotonic() - began < 25


def test_a_grandchild_that_holds_the_pipe_open_does_not_block(tmp_path: Path) -> None:
    began = time.monotonic()
    assert run("sleep 30 & echo $!", tmp_path)[0].isdigit()
    assert time.monotonic() - began < 25


def test_leaving_the_block_ends_the_whole_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE", 2.0)
    script = "(trap '' TERM; sleep 60) & echo $!; sleep 60"
    with group(["sh", "-c", script], cwd=tmp_path, env=os.environ) as child:
        pid = int(next(lines(child)))
    assert child.returncode == -signal.SIGTERM
    assert gone(pid)


def test_the_group_dies_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    owner = textwrap.dedent("""
        import os, pathlib
        from neft_core.processes import group, lines
        command = ["sh", "-c", "sh -c 'echo $$; sleep 60' & echo $$; sleep 60"]
        with group(command, cwd=pathlib.Path("."), env=os.environ) as child:
            for line in lines(child):
                print(line, flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    process.stdout.close()
    assert all(gone(pid) for pid in pids)
