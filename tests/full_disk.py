"""Run stages on a tmpfs with little room; started in a mount namespace by test_bad_input.py.

Arguments: a finished workspace, an empty directory to mount on; stdin: a stage in each line.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

from neft_core.cli import main


def mount(*options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(disk)], check=True)


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if "cost" not in p.parts}


def attempt(stage: tuple[str, ...]) -> tuple[int, list[str]]:
    said = io.StringIO()
    os.environ["NEFT_CHECK_FIT"] = "0"  # or it would be refused before it starts
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        return main(["stage", *stage]), said.getvalue().splitlines()


def check(stage: tuple[str, ...], room: int) -> None:
    """With so many pages of room: one line, nothing half-written; then, with more, the result."""
    mount("-o", "size=64m")
    ws = Path(shutil.copytree(finished, disk / "w"))
    os.chdir(ws)
    before = files(ws / "work")
    with (disk / "ballast").open("wb") as ballast:
        free = os.statvfs(disk).f_bavail - room
        ballast.write(bytes(free * os.statvfs(disk).f_bsize))
    code, lines = attempt(stage)
    left = list((ws / "work").rglob(".*.[0-9]*"))
    assert not left, left
    if code:
        assert (code, len(lines)) == (2, 1), (code, lines)
        assert "o space left on" in lines[0], lines
        assert files(ws / "work") == before
    elif room == 0:
        raise AssertionError(f"{stage}: wrote without room")
    (disk / "ballast").unlink()
    assert attempt(stage) == (0, [])
    assert {n: c for n, c in files(ws / "work").items() if "summary" not in n} == {
        n: c for n, c in before.items() if "summary" not in n
    }
    os.chdir("/")
    subprocess.run(["umount", str(disk)], check=True)


finished, disk = Path(sys.argv[1]), Path(sys.argv[2])
for line in sys.stdin:
    for room in (0, 1, 3, 12, 40):
        check(tuple(line.split()), room)
