"""When a launcher is started, how, and what is told of its failure."""

import json

import pytest

from neft_core import launching
from neft_core.config import Compute
from neft_core.errors import NeftError
from neft_core.launching import LaunchFailed
from neft_core.workspace import Workspace

KILLED = """\
E1121 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 1
Failures:
[1]:
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 14966)  (SIGTERM)
-------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_14:48:55
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 14967)  (SIGKILL)
"""
OUTRUN = """\
Failures:
[1]:
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 14967)  (SIGKILL)
-------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_14:48:55
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 14966)
"""
MISTAKE = {"mistake": True, "time": 3.0, "rank": 1, "text": "a: found; do"}
ALONE = "DistStoreError: Timed out after 901 seconds waiting for clients. 1/2 clients joined."
LOST = "Traceback\nRuntimeError: pair.cc:553] Connection closed by peer [127.0.0.1]:34706."
UNPLUGGED = (
    "Traceback\nRuntimeError: [/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error "
    "[10.0.0.2]:38592: No route to host. This is typically caused by a remote worker hanging"
)
APART = "RuntimeError: Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:152] timed out"
LEFT = {"mistake": False, "time": 0.5, "rank": 0, "text": LOST}
DEFECT = {"mistake": False, "time": 2.0, "rank": 0, "text": "Traceback\nValueError: b"}
EARLIER = {"mistake": False, "time": 1.0, "rank": 2, "text": "Traceback\nKeyError: c"}


@pytest.mark.parametrize(
    ("compute", "environment", "expected"),
    [
        ({}, {}, False),
        ({"processes": 2}, {}, True),
        ({"accelerate_config": "a.yaml"}, {}, True),
        ({"processes": 2}, {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, False),
        ({"processes": 2}, {launching.FAULTS: "/tmp"}, False),
        # Some schedulers set these on each machine, without any launcher.
        ({"processes": 2}, {"RANK": "0", "WORLD_SIZE": "2"}, True),
    ],
)
def test_a_launcher_is_started_once_and_only_where_asked(
    monkeypatch, compute, environment, expected
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launching.wanted(Compute(**compute)) is expected


def test_the_configuration_is_the_users_own_where_there_is_one(tmp_path, monkeypatch):
    ws = Workspace(tmp_path)
    command = launching._command(ws, Compute(processes=3), ["train", "full"])
    assert command[command.index("--num_processes") + 1] == "3"
    assert command[-5:] == ["-m", "neft_core.cli", "stage", "train", "full"]
    compute = Compute(accelerate_config="mine.yaml")
    where = f"params.yaml: compute.accelerate_config: {tmp_path}/mine.yaml "

    def refused() -> str:
        with pytest.raises(NeftError) as fault:
            launching._command(ws, compute, ["train", "full"])
        return str(fault.value).removeprefix(where)

    assert refused() == "is no file; make it with 'accelerate config --config_file FILE'"
    (tmp_path / "mine.yaml").write_text("distributed_type: DEEPSPEED\n")
    monkeypatch.setattr(launching, "find_spec", lambda _: None)
    assert refused() == (
        "shares by DeepSpeed, which is not installed; pip install deepspeed, or use FSDP2"
    )
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_GPU\n")
    command = launching._command(ws, compute, ["train", "full"])
    assert command[3:5] == ["--config_file", f"{tmp_path}/mine.yaml"]
    assert "--num_processes" not in command


@pytest.mark.parametrize(
    ("faults", "log", "kind", "text"),
    [
        ([EARLIER, MISTAKE], "Root Cause", NeftError, "a: found; do"),
        (
            [DEFECT, EARLIER],
            "",
            LaunchFailed,
            "stage train full: process 2:\nTraceback\nKeyError: c",
        ),
        (
            [DEFECT],
            KILLED,
            LaunchFailed,
            "stage train full: process 1 was killed by SIGKILL, as when memory runs out; run again",
        ),
        (
            [DEFECT],
            OUTRUN,
            LaunchFailed,
            "stage train full: process 1 was killed by SIGKILL, as when memory runs out; run again",
        ),
        (
            [],
            KILLED.replace("-9 ", "-11 "),
            LaunchFailed,
            "stage train full: process 1 was killed by SIGSEGV; run again",
        ),
        (
            [LEFT],
            "",
            LaunchFailed,
            "stage train full: process 0 lost another one; what ended that is told on its "
            "machine; run again",
        ),
        (
            [LEFT | {"text": UNPLUGGED}],
            "",
            LaunchFailed,
            "stage train full: process 0 lost another one; what ended that is told on its "
            "machine; run again",
        ),
        (
            [LEFT | {"text": APART}],
            "",
            LaunchFailed,
            "stage train full: process 0 did not reach another one; see what that tells, or name "
            "the network between machines in GLOO_SOCKET_IFNAME",
        ),
        ([LEFT, EARLIER], "", LaunchFailed, f"stage train full: process 2:\n{EARLIER['text']}"),
        (
            [],
            ALONE,
            LaunchFailed,
            "stage train full: 1 of 2 machines were there after 15 minutes; "
            "start it on each of them",
        ),
        (
            [],
            "You need\n2 of them",
            LaunchFailed,
            "You need\n2 of them\nstage train full: accelerate launch ended with status 1",
        ),
    ],
)
def test_one_fault_is_told(tmp_path, faults, log, kind, text):
    for fault in faults:
        (tmp_path / f"rank-{fault['rank']}.json").write_text(json.dumps(fault))
    (tmp_path / "log").write_text(log)
    told = launching._failure("train full", tmp_path, tmp_path / "log", 1)
    assert (type(told), str(told)) == (kind, text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: {}\n", "A `distributed_type` must be specified in the config file; make it"),
        ("distributed_type: MULTI_GPU\nmodel: {}\n", "had unknown keys (['model']), "),
    ],
)
def test_what_is_no_configuration_of_accelerate_is_one_line(tmp_path, text, reason):
    (tmp_path / "mine.yaml").write_text(text)
    compute = Compute(accelerate_config="mine.yaml")
    with pytest.raises(NeftError) as fault:
        launching.launch(Workspace(tmp_path), compute, ["train", "full"])
    told = str(fault.value)
    assert told.startswith("params.yaml: compute.accelerate_config: ")
    assert reason in told
    assert told.endswith("; make it with 'accelerate config --config_file FILE'")
    assert "\n" not in told


def test_a_fault_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv(launching.FAULTS, str(tmp_path))
    with monkeypatch.context() as killed:
        killed.setattr(launching.Path, "replace", lambda *_: None)
        launching._tell(NeftError("a: found; do"))
        assert launching._failure("train full", tmp_path, tmp_path / "log", 1).args == (
            "\nstage train full: accelerate launch ended with status 1",
        )
    launching._tell(NeftError("a: found; do"))
    told = launching._failure("train full", tmp_path, tmp_path / "log", 1)
    assert (type(told), str(told)) == (NeftError, "a: found; do")


def test_other_stages_refuse_to_be_shared(monkeypatch, copied, neft):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert neft(copied, "stage", "score", "en-fr") == (
        2,
        ["neft: stage score: got 2 processes; start it without a launcher"],
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{distributed_type: MULTI_GPU, num_processes: 4}", 4),
        ("{distributed_type: MULTI_CPU, num_processes: 2, num_machines: 1, fsdp_config: {}}", 2),
        ("{distributed_type: 'NO'}", 1),
        (
            "{distributed_type: FSDP, num_processes: 2}",
            "has distributed_type FSDP, which may divide",
        ),
        (
            "{distributed_type: DEEPSPEED, num_processes: 2}",
            "has distributed_type DEEPSPEED, which",
        ),
        (
            "{distributed_type: MULTI_GPU, num_processes: 8, num_machines: 2}",
            "has num_machines 2, ",
        ),
        (
            "{distributed_type: MULTI_GPU, num_processes: 2, parallelism_config: {tp_size: 2}}",
            "has parallelism_config, which may divide",
        ),
        ("{distributed_type: MULTI_GPU, num_processes: -1}", "has num_processes -1, which"),
        ("[]", "can't be read"),
    ],
)
def test_what_each_process_holds_is_known_where_none_divides_it(tmp_path, text, found):
    (tmp_path / "mine.yaml").write_text(text)
    told = launching.copies(Compute(accelerate_config="mine.yaml"), tmp_path)
    if isinstance(found, int):
        assert told == found
    else:
        assert str(told).startswith(found)


def test_without_a_configuration_params_say_how_many(tmp_path):
    assert launching.copies(Compute(processes=3), tmp_path) == 3
    for path in ("none.yaml", "~nobody-here/x.yaml"):
        assert launching.copies(Compute(accelerate_config=path), tmp_path) == "can't be read"
    docs = launching.Path(launching.__file__).parents[1] / "docs/accelerate"
    for file in ("fsdp2", "two-machines", "zero2"):
        assert "has " in str(launching.copies(Compute(accelerate_config=f"{file}.yaml"), docs))
