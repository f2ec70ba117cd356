"""Two processes against one: the same steps, losses, weights and texts; resumed, broken, killed."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import several
import torch
from conftest import edit, run_stages
from test_processes import gone

from neft_core.files import load_tensors
from neft_core.masks import NeuronMask

pytestmark = pytest.mark.integration

TESTS = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
DDP = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
       "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
FSDP2 = ["--config_file", str(TESTS.parent / "docs/accelerate/fsdp2.yaml")]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}

CASES: dict[str, dict] = {
    "full": {"method": "full", "tied": True, "gradient_checkpointing": True},
    "in_out": {"method": "in_out"},
    "embed": {"method": "embed"},
    "lora": {"method": "lora", "gradient_checkpointing": True},
    "neft": {"method": "neft", "gradient_checkpointing": True},
    "float32": {"method": "full", "dtype": "float32"},
    "one row": {"method": "neft", "batch_size": 1, "accumulation": 1},
    "patience": {"method": "neft", "lr": 0.5, "evaluate_every": 1, "patience": 2},
}
SHARDED = ("full", "lora", "neft", "float32")
PLAIN = {"dtype": "float32"}
DEEPSPEED: dict[str, dict] = {
    "full": PLAIN | {"method": "full", "tied": True, "gradient_checkpointing": True},
    "lora": PLAIN | {"method": "lora", "gradient_checkpointing": True},
    "neft": PLAIN | {"method": "neft", "gradient_checkpointing": True},
    "unclipped": PLAIN | {"method": "neft", "max_grad_norm": math.inf, "batch_size": 2},
}
"""Their steps have several micro-batches."""
NEEDED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
MIXED = {"method": "neft", "dtype": "bfloat16", "precision": "bf16"}
BROKEN = {"method": "neft", "broken": True}
DROPOUT = {"method": "lora", "dropout": 0.5}


def launch(how: list[str], folder: Path, cases: dict[str, dict]) -> str:
    command = [*LAUNCH, *how, str(TESTS / "several.py"), str(folder), json.dumps(cases)]
    done = subprocess.run(
        command, cwd=TESTS, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def result(folder: Path) -> dict:
    found = json.loads((folder / "result.json").read_text())
    found["state"] = load_tensors(folder / "state.safetensors", "")[0]
    (adapter,) = folder.glob("adapter*.safetensors")
    found["adapter"] = load_tensors(adapter, "")[0]
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    several.main(folder, CASES)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    several.main(folder, {"begun by one": {"method": "full", "stop": 5}})
    told = launch(
        DDP,
        folder,
        {
            **CASES,
            "begun by one": {"method": "full"},
            "begun by two": {"method": "full", "stop": 5},
            "dropout": DROPOUT,
            "resumed dropout": DROPOUT | {"stop": 5},
            "resumed dropout@2": DROPOUT,
            "broken": BROKEN,
        },
    )
    assert told.count("full float64: goes on after step 3") == 2
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    begun = {"begun": {"method": "full", "stop": 5}}
    several.main(folder, {"begun by one": begun["begun"]})
    cases = {name: CASES[name] for name in SHARDED}
    told = launch(
        FSDP2, folder, cases | begun | {"begun by one": {"method": "full"}, "broken": BROKEN}
    )
    assert told.count("full float64: goes on after step 3") == 2
    return folder


def check(single: dict, shared: dict, exact: bool = True) -> None:
    for part in ("train", "dev"):
        np.testing.assert_allclose(shared[part], single[part], rtol=1e-10 if exact else 1e-5)
    for key in ("step", "best_step", "stopped_early", "tokens"):
        assert shared[key] == single[key], key
    for part in ("adapter", "state"):
        assert shared[part].keys() == single[part].keys()
        for key, value in single[part].items():
            assert shared[part][key].dtype == value.dtype
            close = {"rtol": 1e-10, "atol": 1e-10} if exact else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(shared[part][key], value, **close)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(one, two, name):
    check(result(one / name), result(two / name), exact=name != "float32")


@pytest.mark.parametrize("name", SHARDED)
def test_two_processes_that_shard_equal_one(one, sharded, name):
    check(result(one / name), result(sharded / name), exact=name != "float32")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    command = [sys.executable, str(TESTS / "several.py"), str(folder)]
    cases = DEEPSPEED | {"mixed": MIXED}  # Accelerate keeps one precision for a process
    for chosen in (DEEPSPEED, {"mixed": MIXED}):
        subprocess.run([*command, json.dumps(chosen)], cwd=TESTS, env=ENV, check=True)
    assert all((folder / name / "result.json").is_file() for name in cases)
    return folder


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=NEEDED), pytest.param(2, marks=NEEDED)]
)
def zero(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    text = (TESTS.parent / "docs/accelerate/zero2.yaml").read_text()
    (folder / "zero.yaml").write_text(text.replace("stage: 2", f"stage: {request.param}"))
    several.main(folder, {"begun": {"method": "neft", "dtype": "float32", "stop": 5}})
    cases = DEEPSPEED | {"mixed": MIXED, "begun": DEEPSPEED["neft"]}
    broken = {"broken": BROKEN | PLAIN}
    told = launch(["--config_file", str(folder / "zero.yaml")], folder, cases | broken)
    assert "goes on after step" not in told
    return folder


@pytest.mark.parametrize("name", DEEPSPEED)
def test_two_processes_under_deepspeed_equal_one(plain, zero, name):
    check(result(plain / name), result(zero / name), exact=False)


def test_deepspeed_leaves_what_trains_in_fp32(plain, zero):
    alone, shared = result(plain / "mixed"), result(zero / "mixed")
    np.testing.assert_allclose(shared["train"], alone["train"], rtol=1e-2)
    for key, value in alone["adapter"].items():
        assert shared["adapter"][key].dtype == value.dtype
        if value.is_floating_point():
            assert value.dtype == torch.float32
            torch.testing.assert_close(shared["adapter"][key], value, rtol=1e-2, atol=1e-2)
    assert shared["moved"] == []


def test_deepspeed_starts_anew_and_keeps_one_best(plain, zero):
    check(result(plain / "neft"), result(zero / "begun"), exact=False)
    assert not list((zero / "begun").glob("checkpoint-*"))
    assert len(list((zero / "begun").glob("best-*"))) == 1
    assert result(zero / "broken")["moved"] == ["model.norm.weight"]


REFUSED = {
    "zero_stage is 3; at most 2, or FSDP2": ("3", {"method": "full", "dtype": "float32"}),
    "got float64; what trains under DeepSpeed is float32": ("2", {"method": "full"}),
    "got fp16; under DeepSpeed no or bf16": ("2", MIXED | {"precision": "fp16"}),
}


@NEEDED
@pytest.mark.parametrize("reason", REFUSED)
def test_what_deepspeed_is_not_given_is_one_line(tmp_path, reason):
    number, case = REFUSED[reason]
    command = [sys.executable, str(TESTS / "several.py"), str(tmp_path), json.dumps({"a": case})]
    alone = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": number,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    done = subprocess.run(command, cwd=TESTS, env=ENV | alone, text=True, stderr=subprocess.PIPE)
    assert done.returncode
    assert "neft_core.errors.NeftError: params.yaml: " in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].endswith(reason)


def test_the_last_of_nine_steps_stops_early_and_the_best_is_kept(one):
    found = result(one / "patience")
    assert found["stopped_early"]
    assert found["best_step"] < found["step"] < 9


def test_a_training_goes_on_in_another_number_of_processes(tmp_path, two, sharded, capsys):
    several.main(tmp_path, {"whole": {"method": "full"}})
    whole = result(tmp_path / "whole")
    for folder, begun in ((two, "begun by two"), (sharded, "begun")):
        check(whole, result(folder / "begun by one"))
        capsys.readouterr()
        several.main(folder, {begun: {"method": "full"}})
        assert "goes on after step 3" in capsys.readouterr().out
        check(whole, result(folder / begun))


def test_dropout_differs_between_processes_and_resumes_exactly(two):
    whole, resumed = result(two / "dropout"), result(two / "resumed dropout")
    assert len(set(whole["draws"])) == 2
    check(whole, resumed)
    with (two / "resumed dropout" / "train.csv").open() as handle:
        assert [int(row["step"]) for row in csv.DictReader(handle)] == list(range(1, 10))


def test_a_weight_that_moves_outside_the_mask_is_caught(two, sharded):
    for folder in (two, sharded):
        assert result(folder / "neft")["moved"] == []
        assert result(folder / "neft")["compared"] > 3000
        assert result(folder / "broken")["moved"] == ["model.norm.weight"]


def test_texts_are_those_of_one_process_in_order(one, two):
    (alone,) = json.loads((one / "said-1.json").read_text())
    assert {int(count): len(texts) for count, texts in alone.items()} == {11: 11, 4: 4, 1: 1, 0: 0}
    assert len(set(alone["11"])) > 8
    assert json.loads((two / "said-2.json").read_text()) == [alone, alone]


def stage(ws, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "neft_core.cli", "stage", *words]
    return subprocess.Popen(
        command, cwd=ws.root, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def table(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", skiprows=1)


def test_stages_in_two_processes_equal_those_in_one(finished, copied):
    edit(copied, ("threads: 1", "threads: 1, processes: 2"))
    for words in (("warmup", "en-fr"), ("train", "neft"), ("evaluate", "neft")):
        out, err = (process := stage(copied, *words)).communicate()
        assert (process.returncode, err) == (0, ""), err
        assert len(out.splitlines()) == {"warmup": 1, "train": 6, "evaluate": 4}[words[0]]
        if words[0] == "warmup":
            mask = NeuronMask.load(copied.path("masks", "neft.safetensors"))
            run_stages(copied, "score", "select")
            again = NeuronMask.load(copied.path("masks", "neft.safetensors"))
            assert again.overlap(mask) >= 0.999
    for name in (
        "warmup/en-fr/train.csv",
        "train/neft/seed-2/train.csv",
        "train/neft/seed-2/dev.csv",
    ):
        np.testing.assert_allclose(table(copied.path(name)), table(finished.path(name)), rtol=1e-5)
    for seed in (1, 2):
        name = f"evaluation/neft/seed-{seed}.jsonl"
        assert copied.path(name).read_bytes() == finished.path(name).read_bytes()
    assert not list(copied.state("checkpoints").glob("*"))


def children(pid: int) -> list[int]:
    """Processes below a process, deepest last."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def workers(ws, process: subprocess.Popen) -> list[int]:
    """All processes below a training that has begun."""
    end = time.monotonic() + 600
    # Not at any depth: files that are being written vanish while one looks for them.
    while not list(ws.state("checkpoints").glob("*/*/checkpoint-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    return children(process.pid)


@pytest.fixture
def long(copied):
    edit(copied, ("threads: 1", "threads: 1, processes: 2"), ("epochs: 2,", "epochs: 5000,"))
    return copied


def test_a_killed_process_is_named_and_ctrl_c_leaves_none(long):
    process = stage(long, "train", "full")
    victim = [pid for pid in workers(long, process) if environment(pid).get("RANK") == "1"][-1]
    # It ends with the stage, also where it waits for others and no signal reaches it.
    assert environment(victim)["NEFT_OWNER_PID"] == str(process.pid)
    os.kill(victim, signal.SIGKILL)
    err = process.communicate()[1]
    assert (process.returncode, err) == (
        1,
        "neft: stage train full: process 1 was killed by SIGKILL, as when memory runs out; "
        "run again\n",
    )
    process = stage(long, "train", "full")
    assert "goes on after step" in process.stdout.readline()
    below = children(process.pid)
    assert len(below) > 3
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert all(gone(pid) for pid in below)


def environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def test_a_mistake_found_by_the_processes_is_one_line(copied):
    edit(copied, ("threads: 1", "threads: 1, processes: 2"))
    adapter = copied.path("train", "full", "seed-1", "adapter.safetensors")
    adapter.write_bytes(b"")
    process = stage(copied, "evaluate", "full")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"neft: {adapter}: not a whole safetensors file (")
    assert len(err.splitlines()) == 1
