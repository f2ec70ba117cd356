from pathlib import Path

import pytest

from neft_core import records
from neft_core.errors import NeftError
from neft_core.records import Point
from neft_core.workspace import Workspace


def test_history_leaves_a_growing_line_for_later(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("step,epoch,loss,lr\n1,0.5,2.5,\n2,1.0,1e-3,0.1\n3,1.5,2")
    (tmp_path / "dev.csv").write_text("step,epoch,loss\n0,0,nan\n")
    found = records.history(tmp_path)
    assert found[:3] == [
        Point("train/loss", 1, 2.5), Point("train/loss", 2, 1e-3), Point("train/lr", 2, 0.1),
    ]  # fmt: skip
    assert [(p.name, p.step) for p in found[3:]] == [("dev/loss", 0)]


@pytest.mark.parametrize("row", ["x,0,1", "1,0,one", "1.5,0,1"])
def test_history_names_the_line_of_bad_rows(tmp_path: Path, row: str) -> None:
    (tmp_path / "dev.csv").write_text(f"step,epoch,loss\n0,0,1\n{row}\n")
    with pytest.raises(NeftError, match=r"dev\.csv: line 3: not a row of numbers"):
        records.history(tmp_path)


def test_params_of_runs_have_the_same_names() -> None:
    entries = {
        "corpus@de": {"params": {"tasks.de.source": {"kind": "local", "path": "data"}}},
        "corpus@fr": {"params": {"tasks.fr.source": {"kind": "generated"}}},
        "base": {"params": {"model": {"kind": "built", "pretraining": {"lr": 0.1}}}},
        "train@a": {
            "params": {
                "runs.a": {"task": "de", "method": {"name": "neft"}, "lr": 3e-3},
                "training": {"lr": 1e-3, "epochs": 2},
                "compute": {"device": "cpu"},
            }
        },
        "train@b": {"params": {"runs.b": {"task": "fr"}, "training": {"lr": 1e-3, "epochs": 2}}},
    }
    assert records.run_params(entries, "a", 7) == {
        "run.task": "de",
        "run.method.name": "neft",
        "task.source.kind": "local",
        "task.source.path": "data",
        "model.kind": "built",
        "model.pretraining.lr": "0.1",
        "training.lr": "0.001",
        "training.epochs": "2",
        "compute.device": "cpu",
        "lr": "0.003",
        "epochs": "2",
        "seed": "7",
    }
    assert records.run_params(entries, "b", 1)["lr"] == "0.001"


def test_seeds_in_order(tmp_path: Path) -> None:
    for name in ("seed-10", "seed-2", "seed-x", "other"):
        (tmp_path / name).mkdir()
    assert list(records.seeds(tmp_path)) == [(2, tmp_path / "seed-2"), (10, tmp_path / "seed-10")]


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    path = tmp_path / "work/masks/neft.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(NeftError, match=r"neft\.safetensors: not a safetensors file"):
        records.mask(Workspace(tmp_path), "neft")
    assert records.mask(Workspace(tmp_path), "full") == {}
