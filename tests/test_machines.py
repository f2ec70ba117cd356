"""Two machines against one: a stage that each starts by a command of its own."""

import os
import shutil
import subprocess
import sys
from subprocess import PIPE

import numpy as np
import pytest
from conftest import edit
from operating import free_port
from test_several_processes import ENV, LAUNCH, table

pytestmark = pytest.mark.integration

MACHINES = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 2
num_processes: 2
machine_rank: 0
main_process_ip: {address}
main_process_port: {port}
same_network: true
mixed_precision: "no"
"""


ONE = "127.0.0.1", [], []
"""As `apart` has it where both machines are this one."""


@pytest.fixture
def apart():
    """The address of the first of two machines joined by a cable, and what a command of each begins
    with: network namespaces, where this machine lets us have any, or both are this machine."""
    mark = f"neft{os.getpid()}"
    machines = [f"{mark}-{number}" for number in (0, 1)]
    ip = shutil.which("ip")

    def told(*words: str) -> bool:
        return ip is not None and not subprocess.run([ip, *words], capture_output=True).returncode

    try:
        if not all(told("netns", "add", machine) for machine in machines):
            yield ONE
            return
        ends = [f"{mark}{end}"[-15:] for end in "ab"]
        if not told("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]):
            yield ONE
            return
        for number, (machine, end) in enumerate(zip(machines, ends, strict=True), 1):
            assert told("link", "set", end, "netns", machine)
            assert told("-n", machine, "addr", "add", f"10.0.0.{number}/24", "dev", end)
            assert told("-n", machine, "link", "set", end, "up")
            assert told("-n", machine, "link", "set", "lo", "up")
        yield "10.0.0.1", *([ip, "netns", "exec", machine] for machine in machines)
    finally:
        for machine in machines:
            told("netns", "del", machine)


def on_two_machines(
    ws, here: tuple[str, ...], there: tuple[str, ...], apart=ONE
) -> list[subprocess.Popen]:
    """A stage that two machines start, which may both be this one."""
    address, *before = apart
    (ws.root / "mine.yaml").write_text(MACHINES.format(address=address, port=free_port()))
    launcher = [*LAUNCH, "--config_file", "mine.yaml", "--machine_rank", "1"]
    commands = (
        [*before[0], sys.executable, "-m", "neft_core.cli", "stage", *here],
        [*before[1], *launcher, "-m", "neft_core.cli", "stage", *there],
    )
    return [
        subprocess.Popen(command, cwd=ws.root, env=ENV, text=True, stdout=PIPE, stderr=PIPE)
        for command in commands
    ]


def ends(both: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each machine's command."""
    try:
        said = [process.communicate(timeout=900) for process in both]
    finally:
        for process in both:
            process.terminate()
    return [(process.returncode, *told) for process, told in zip(both, said, strict=True)]


def test_two_machines_equal_one(finished, copied, apart):
    edit(copied, ("threads: 1", "threads: 1, accelerate_config: mine.yaml"))
    both = ends(on_two_machines(copied, *[("train", "neft")] * 2, apart))
    (code, out, err), (other, told, warned) = both
    assert (code, err, other, told) == (0, "", 0, ""), err + warned
    assert len(out.splitlines()) == 7
    assert out.startswith(
        "stage train neft: waits for 1 other machine; run the same stage there, under "
        "--machine_rank 1 (docs/architecture.md)\n"
    )
    for seed in (1, 2):
        for name in (f"seed-{seed}/train.csv", f"seed-{seed}/dev.csv"):
            found, expected = (table(ws.path("train", "neft", name)) for ws in (copied, finished))
            np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not list(copied.state("checkpoints").glob("*"))


@pytest.mark.slow
def test_machines_that_were_told_different_things_say_so(copied):
    edit(copied, ("threads: 1", "threads: 1, accelerate_config: mine.yaml"))
    both = on_two_machines(copied, ("train", "neft"), ("train", "full"))
    (code, _, err), (other, _, told) = ends(both)
    line = "process 1 has another stage than process 0; start the same on every machine\n"
    assert (code, err) == (2, f"neft: stage train neft: {line}")
    assert other
    assert f"neft: stage train full: {line}" in told
