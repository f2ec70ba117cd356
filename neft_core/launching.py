"""Stages in several processes: `accelerate launch` as a child, its lines, its first fault.

The processes say what went wrong in files, because the launcher's own report of it is a screenful.
"""

import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from neft_core import __version__, loading, processes, ranks
from neft_core.config import Compute, read_yaml
from neft_core.errors import NeftError
from neft_core.workspace import Workspace

STAGES = ("warmup", "warmups", "train", "baseline", "evaluate", "transfer")
"""Stages that may run in several processes."""

FAULTS = "NEFT_FAULTS"
"""Variable that names the folder in which a process started here tells its fault."""


DIVIDING = ("fsdp_config", "deepspeed_config", "megatron_lm_config", "parallelism_config")
"""Sections of an Accelerate configuration with which a process holds a part of the values."""


LOST = re.compile(r"Connection (closed|reset) by peer|/gloo/transport/")
"""What gloo says of a process that is gone."""


class LaunchFailed(Exception):  # noqa: N818
    """A process was killed, or failed by a defect; the text says which and how."""


def wanted(compute: Compute) -> bool:
    """Whether params ask for a launcher, and this process isn't under one yet."""
    asked = compute.processes > 1 or compute.accelerate_config is not None
    return asked and not ranks.launched() and FAULTS not in os.environ


def copies(compute: Compute, root: Path) -> int | str:
    """How many processes of this machine each hold what one alone holds, or why that isn't known.

    Of an Accelerate configuration it is known where all processes are here and none shares its
    values with another: `distributed_type` NO, MULTI_GPU or MULTI_CPU, `num_machines` 1.

    Args:
        compute: its section of params.
        root: where relative paths start.
    """
    if compute.accelerate_config is None:
        return compute.processes
    try:
        found = read_yaml(root / os.path.expanduser(compute.accelerate_config))
    except NeftError:
        return "can't be read"  # the launcher's refusal tells more
    kind = str(found.get("distributed_type", "NO"))
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return f"has distributed_type {kind}, which may divide what a process holds"
    if found.get("num_machines", 1) != 1:
        return f"has num_machines {found['num_machines']}, and this machine knows its own alone"
    if divided := [key for key in DIVIDING if found.get(key)]:
        return f"has {divided[0]}, which may divide what a process holds"
    count = found.get("num_processes", 1)
    known = type(count) is int and count > 0
    return count if known else f"has num_processes {count}, which is no number of processes"


def launch(ws: Workspace, compute: Compute, stage: list[str]) -> None:
    """Run a stage by `accelerate launch`; no process of it outlives this call.

    Args:
        ws: the workspace.
        compute: its section of params.
        stage: name and item.

    Raises:
        NeftError: a process found a user's mistake, or the Accelerate configuration is no file.
        LaunchFailed: a process was killed or failed by a defect.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "launcher.log"
        # What the launcher and libraries have to say is wanted only where no process tells more.
        command = ["/bin/sh", "-c", 'exec "$@" 2>"$0"', str(log), *_command(ws, compute, stage)]
        env = {
            **os.environ,
            FAULTS: name,
            processes.OWNER: str(os.getpid()),  # processes have sessions of their own
            "OMP_NUM_THREADS": str(compute.threads),
            "PYTHONUNBUFFERED": "1",
        }
        with processes.group(command, cwd=ws.root, env=env) as child:
            if others := _others(ws, compute):
                print(f"stage {' '.join(stage)}: waits for {others}", flush=True)
            for line in processes.lines(child):
                print(line, flush=True)
            status = child.wait()
        if status:
            raise _failure(" ".join(stage), folder, log, status)


def _command(ws: Workspace, compute: Compute, stage: list[str]) -> list[str]:
    how = ["--multi_gpu", "--num_processes", str(compute.processes), "--num_machines", "1"]
    how += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    if compute.accelerate_config is not None:
        file = ws.input(compute.accelerate_config)
        if not file.is_file():
            raise NeftError(
                f"params.yaml: compute.accelerate_config: {file} is no file; "
                "make it with 'accelerate config --config_file FILE'"
            )
        kind = read_yaml(file).get("distributed_type")
        if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
            raise NeftError(
                f"params.yaml: compute.accelerate_config: {file} shares by DeepSpeed, which is not "
                "installed; pip install deepspeed, or use FSDP2"
            )
        how = ["--config_file", str(file)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *how]
    return [*launcher, "-m", "neft_core.cli", "stage", *stage]


def _others(ws: Workspace, compute: Compute) -> str:
    """Which other machines have to be told, in words; empty where there are none."""
    if compute.accelerate_config is None:
        return ""
    count = read_yaml(ws.input(compute.accelerate_config)).get("num_machines", 1)
    if type(count) is not int or count < 2:
        return ""
    return (
        f"{count - 1} other {'machine' if count == 2 else 'machines'}; run the same stage there, "
        f"under --machine_rank {'1' if count == 2 else f'1 to {count - 1}'} (docs/architecture.md)"
    )


@contextmanager
def taking_part(ws: Workspace, stage: list[str]) -> Iterator[None]:
    """What a process does around a stage that several share: the first speaks, each tells faults.

    Args:
        ws: the workspace.
        stage: name and item.

    Raises:
        NeftError: the stage runs in one process, but several were started, or for different things.
    """
    if ranks.world() > 1 and stage[0] not in STAGES:
        raise NeftError(
            f"stage {stage[0]}: got {ranks.world()} processes; start it without a launcher"
        )
    if not ranks.main():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        _agree(ws, stage)
        yield
        ranks.leave()
    except (Exception, KeyboardInterrupt) as fault:
        if FAULTS in os.environ:
            _tell(fault)
            # A clean end would wait for the others, who may wait for this one.
            os._exit(1)
        raise


def _agree(ws: Workspace, stage: list[str]) -> None:
    """Refuse to share a stage with a process that would do something else, and wait for ever.

    Each machine's processes are started by a command of their own, which may differ.
    """
    if ranks.world() == 1:
        return
    params = ws.params()
    loading.device(params)
    sharing = ("ACCELERATE_USE_", "ACCELERATE_DEEPSPEED_", "FSDP_")
    mine = {
        "another stage": stage,
        "another version of neft": __version__,
        "another workspace": str(ws.root),
        "another params.yaml": params.model_dump() | {"compute": loading.arithmetic(params)},
        "another Accelerate configuration": {
            key: value for key, value in os.environ.items() if key.startswith(sharing)
        },
    }
    all_of_them = ranks.gather(mine)
    for number, told in enumerate(all_of_them):
        for what, value in told.items():
            if value != all_of_them[0][what]:
                raise NeftError(
                    f"stage {' '.join(stage)}: process {number} has {what} than process 0; "
                    "start the same on every machine"
                )


def _tell(fault: BaseException) -> None:
    mistake = isinstance(fault, NeftError)
    text = str(fault) if mistake else "".join(traceback.format_exception(fault))
    told = {"mistake": mistake, "time": time.time(), "rank": ranks.rank(), "text": text}
    path = Path(os.environ[FAULTS], f"rank-{ranks.rank()}.json")
    # The launcher may kill this process meanwhile, and what is half-written would be read.
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(told), "utf-8")
    temporary.replace(path)


def _failure(stage: str, folder: Path, log: Path, status: int) -> Exception:
    """The exception for a launcher that failed: a mistake first, else what came first."""
    told = log.read_text("utf-8", "replace") if log.exists() else ""
    faults = [json.loads(path.read_text("utf-8")) for path in folder.glob("rank-*.json")]
    faults.sort(key=lambda fault: (not fault["mistake"], fault["time"]))
    if faults and faults[0]["mistake"]:
        return NeftError(faults[0]["text"])
    # A killed process tells nothing, and those that lost it complain of the connection: so fast at
    # times that the launcher takes one of them for the cause.
    ended = r"rank +: (\d+).*\n.*exitcode +: -({})\b"
    cause = told[told.rfind("Root Cause") :]
    killed = re.search(ended.format(r"\d+"), cause) or re.search(ended.format(9), told)
    if killed:
        number = int(killed[2])
        return LaunchFailed(
            f"stage {stage}: process {killed[1]} was killed by {signal.Signals(number).name}"
            f"{', as when memory runs out' if number == signal.SIGKILL else ''}; run again"
        )
    if came := re.search(r"after (\d+) seconds waiting for clients. (\d+)/(\d+) clients", told):
        return LaunchFailed(
            f"stage {stage}: {came[2]} of {came[3]} machines were there after "
            f"{int(came[1]) // 60} minutes; start it on each of them"
        )
    if faults:
        # Who lost another process complains too, and may be the first to.
        faults.sort(key=lambda fault: bool(LOST.search(fault["text"])))
        if "connectFullMesh" in faults[0]["text"]:
            return LaunchFailed(
                f"stage {stage}: process {faults[0]['rank']} did not reach another one; see what "
                "that tells, or name the network between machines in GLOO_SOCKET_IFNAME"
            )
        if LOST.search(faults[0]["text"]):
            return LaunchFailed(
                f"stage {stage}: process {faults[0]['rank']} lost another one; what ended that "
                "is told on its machine; run again"
            )
        return LaunchFailed(f"stage {stage}: process {faults[0]['rank']}:\n{faults[0]['text']}")
    if "accelerate/commands/config/config_args.py" in told:  # before any process was there
        reason = told.splitlines()[-1].partition(": ")[2].rstrip(".")
        return NeftError(
            f"params.yaml: compute.accelerate_config: {reason}; make it with 'accelerate config "
            "--config_file FILE'"
        )
    last = "\n".join(told.splitlines()[-20:])
    return LaunchFailed(f"{last}\nstage {stage}: accelerate launch ended with status {status}")
