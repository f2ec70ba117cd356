"""Stages killed half-way, and the same pipeline twice: the same bytes in the end."""

import contextlib
import csv
import io
import itertools
import os
import pydoc
import shutil
import signal

import pytest
from conftest import run_stages, tiny_workspace

from neft_core import config


def files(ws) -> dict[str, bytes]:
    """Everything that stages wrote, but for the time that they took."""
    root = ws.path()
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    return {name: found[name].read_bytes() for name in sorted(found) if name[:5] != "cost/"}


def test_two_directories_give_the_same_bytes(finished, tmp_path):
    other = tiny_workspace(tmp_path / "some where else")
    run_stages(other)
    one, two = files(finished), files(other)
    assert one.keys() == two.keys()
    assert len(one) > 40
    # The table tells seconds too.
    tables = [
        [row | {"seconds": None} for row in csv.DictReader(io.StringIO(content.decode()))]
        for content in (one.pop("summary/summary.csv"), two.pop("summary/summary.csv"))
    ]
    assert tables[0] == tables[1]
    del one["summary/summary.md"]
    assert [name for name in one if one[name] != two[name]] == []


CUTS = [
    # stage, the function of which one call kills, which call
    ("corpus en-fr", "rows.write_rows", 2),
    ("corpus en-fr", "rows.write_rows", 4),
    ("base", "training.Trainer._checkpoint", 1),
    ("base", "models.save_checkpoint", 1),
    ("base", "models.Base.save", 1),
    ("prepare en-fr", "encoding.save_encoded", 3),
    ("warmup en-fr", "training.Trainer._step", 5),
    ("warmup en-fr", "course.write_table", 1),
    ("score en-fr", "masks.NeuronScores.save", 1),
    ("select neft", "files.os.replace", 1),
    ("train full", "training.Trainer._step", 8),
    ("train full", "course.write_json", 2),
    ("train lora", "training.Trainer._evaluate", 2),
    ("train neft", "training.Trainer._step", 17),
    ("train neft", "runs.write_json", 2),
    ("baseline en-fr", "testing._evaluate", 2),
    ("evaluate neft", "testing._evaluate", 2),
    ("summary", "summary._csv", 1),
]


def killed(ws, stage: list[str], function: str, call: int, how: int = signal.SIGKILL) -> int:
    """Exit status of a process that runs a stage and gets a signal in a function's n-th call."""
    from neft_core import cli

    child = os.fork()
    if child == 0:
        try:
            owner, name = pydoc.locate(function.rpartition(".")[0]), function.rpartition(".")[2]
            whole, calls = getattr(owner, name), itertools.count(1)

            def dying(*args, **options):
                if next(calls) == call:
                    os.kill(os.getpid(), how)
                return whole(*args, **options)

            setattr(owner, name, dying)
            os.chdir(ws.root)
            # As a shell with job control starts it: the tests may run where SIGINT is ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.redirect_stderr(io.StringIO()) as said:
                code = cli.main(["stage", *stage])
            (ws.root / "said").write_text(said.getvalue())
            os._exit(code)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def remove_outputs(ws, name: str, item: str | None) -> None:
    """As DVC does before it runs a stage."""
    entry = config.read_yaml(ws.root / "dvc.yaml")["stages"][name]
    for path in entry.get("do", entry)["outs"]:
        out = ws.root / path.replace("${key}", item or "")
        shutil.rmtree(out) if out.is_dir() else out.unlink()


@pytest.mark.parametrize(("stage", "function", "call"), CUTS)
def test_killed_half_way_and_run_again(copied, neft, stage, function, call):
    name, *item = stage.split()
    before = files(copied)
    remove_outputs(copied, name, item[0] if item else None)
    assert killed(copied, [name, *item], f"neft_core.{function}", call) == -signal.SIGKILL
    unfinished = [path for path in before if not (copied.path() / path).exists()]
    assert unfinished or name in ("warmup", "train", "summary"), "it was killed too late"
    assert neft(copied, "stage", name, *item) == (0, [])
    after = files(copied)
    assert [path for path in before if after.get(path) != before[path]] == []
    assert after.keys() == before.keys()
    assert not list(copied.path().rglob(".*.[0-9]*"))
    assert not list(copied.state("checkpoints").glob("*"))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("stage", "function", "call"),
    [("base", "models.Base.save", 1), ("train neft", "training.Trainer._step", 17)],
)
def test_asked_to_end_and_run_again(copied, neft, stage, function, call, how):
    """By Ctrl-C or SIGTERM: one line, nothing temporary left, and the same bytes in the end."""
    name, *item = stage.split()
    before = files(copied)
    remove_outputs(copied, name, item[0] if item else None)
    assert killed(copied, [name, *item], f"neft_core.{function}", call, how) == 130
    said = (copied.root / "said").read_text()
    assert said == "neft: interrupted; run the same command again to go on\n"
    assert not list(copied.path().rglob(".*.[0-9]*"))
    assert neft(copied, "stage", name, *item) == (0, [])
    assert files(copied) == before


def test_a_resumed_training_says_so(copied, capsys):
    remove_outputs(copied, "train", "full")
    assert killed(copied, ["train", "full"], "neft_core.training.Trainer._step", 8) < 0
    assert list(copied.state("checkpoints", "train-full").rglob("checkpoint-6"))
    capsys.readouterr()
    from neft_core.stages import STAGES

    STAGES["train"](copied, "full")
    assert "train full, seed 1: goes on after step 6" in capsys.readouterr().out
