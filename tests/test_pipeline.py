"""The pipeline as a user runs it: real stages, Prefect, DVC and MLflow on a tiny workspace."""

import csv
import hashlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny_workspace
from dvc_objects.fs.system import reflink

from neft_core.files import read_json
from neft_core.workspace import Workspace

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MLFLOW"))}
    home = tmp_path_factory.mktemp("home")
    return {
        **keep,
        "PATH": f"{BIN}{os.pathsep}{keep['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "PREFECT_HOME": str(home / "prefect"),
        "DVC_SITE_CACHE_DIR": str(home / "site"),
    }


def told(ws: Workspace, env: dict[str, str], *command: str) -> list[str]:
    """The lines of a command that succeeds, without the time of day."""
    done = subprocess.run(
        command, cwd=ws.root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in done.stdout.splitlines()]


def neft(ws: Workspace, env: dict[str, str], *words: str) -> list[str]:
    return told(ws, env, sys.executable, "-m", "neft_core.cli", *words)


def ran(lines: list[str]) -> list[str]:
    """Names of the stages that ran."""
    return [match[1] for line in lines if (match := re.fullmatch(r"(\S+): ran in .* s", line))]


def results(ws: Workspace) -> dict[str, object]:
    """Every file of `work/` by content, without what tells of time."""
    found: dict[str, object] = {}
    for path in sorted(ws.path().rglob("*")):
        name = str(path.relative_to(ws.path()))
        if path.is_dir() or name.startswith("cost/") or path.name in (".gitignore", "summary.md"):
            continue
        if name == "summary/summary.csv":
            with path.open(newline="") as handle:
                found[name] = [{**row, "seconds": ""} for row in csv.DictReader(handle)]
        else:
            found[name] = path.read_bytes()
    return found


def mlflow_runs(ws: Workspace) -> list[str]:
    connection = sqlite3.connect(ws.root / "mlflow.db")
    try:
        rows = connection.execute("SELECT name FROM runs WHERE lifecycle_stage = 'active'")
        return sorted(name for (name,) in rows)
    finally:
        connection.close()


@pytest.fixture(scope="module")
def undisturbed(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace that one `neft run` finished, in a git repository of its own."""
    folder = tmp_path_factory.mktemp("undisturbed") / "ws"
    folder.mkdir()
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    ws = tiny_workspace(folder)
    subprocess.run([*git, "add", "-A"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-qm", "start"], cwd=folder, check=True)
    lines = neft(ws, env, "run")
    assert len(ran(lines)) == 18
    assert any(line.startswith("| en-fr | neft ") for line in lines)
    return ws


def test_every_front_door_finds_it_up_to_date(undisturbed, env):
    ws = undisturbed
    before, runs = results(ws), mlflow_runs(ws)
    assert "18 stages, 18 up to date" in told(ws, env, sys.executable, "-m", "flows.pipeline")
    assert told(ws, env, "dvc", "repro")[-1] == "Data and pipelines are up to date."
    assert told(ws, env, "dvc", "status") == ["Data and pipelines are up to date."]
    assert ": 0 runs new, 0 brought up to date" in neft(ws, env, "track")[-1]
    assert (results(ws), mlflow_runs(ws)) == (before, runs)
    assert told(ws, env, "git", "status", "--porcelain") == ["?? dvc.lock"]


def test_tracked_once_for_each_run_and_seed(undisturbed):
    trainings = [name for name in mlflow_runs(undisturbed) if " seed " in name]
    assert trainings == ["full seed 1", "lora seed 1", "neft seed 1", "neft seed 2"]


def killed_in_training(ws: Workspace, env: dict[str, str]) -> bool:
    """Kill a run when the training has a checkpoint; whether that was before its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "neft_core.cli", "run"],
        cwd=ws.root,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 240
    while not ws.state("checkpoints", "train-neft").exists():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < end, "never came so far"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return not ws.path("train", "neft").exists()


@pytest.mark.slow
def test_killed_and_run_again_ends_in_the_same_bits(undisturbed, env, tmp_path):
    # The training is short: on a busy machine the kill may come too late.
    tries = (tiny_workspace(tmp_path / str(n) / "ws") for n in range(4))
    ws = next(ws for ws in tries if killed_in_training(ws, env))
    assert "train@neft" in ran(neft(ws, env, "run"))
    assert results(ws) == results(undisturbed)
    assert mlflow_runs(ws) == mlflow_runs(undisturbed)


def test_what_a_change_makes_run_again(undisturbed, env):
    ws = undisturbed
    lines = neft(ws, env, "run", "--set", "runs.full.lr=2e-3")
    assert ran(lines) == ["assign", "train@full", "evaluate@full", "summary", "report"]
    lines = neft(ws, env, "run", "--set", "runs.more={task: en-fr, method: {name: embed}}")
    assert ran(lines) == [
        "assign", "select@more", "train@more", "evaluate@more", "summary", "report",
    ]  # fmt: skip
    metrics = read_json(ws.path("summary", "metrics.json"))["en-fr"]
    assert set(metrics) == {"base", "tuned", "full", "lora", "neft", "more"}


def test_base_and_run_side_by_side(undisturbed, env):
    lines = neft(undisturbed, env, "generate", "--run", "neft", "--prompt", "the cat")
    words = [line.split()[0] for line in lines if line.strip() and ": sentence" not in line]
    assert words == ["source", "base", "neft"]


@pytest.mark.slow
def test_an_experiment_of_dvc_beside_what_git_has(undisturbed, env):
    """In a git workspace `dvc exp run -S` is one more way to try a param, and DVC compares."""
    ws = undisturbed
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@t")
    told(ws, env, *git, "add", "-A")
    told(ws, env, *git, "commit", "-qm", "results")
    before = read_json(ws.path("summary", "metrics.json"))["en-fr"]
    lines = told(ws, env, "dvc", "exp", "run", "-n", "hot", "-S", "+runs.lora.lr=5e-2")
    made = [line.split("'")[1] for line in lines if line.startswith("Running stage")]
    assert made == ["assign", "train@lora", "evaluate@lora", "summary", "report"]
    after = read_json(ws.path("summary", "metrics.json"))["en-fr"]
    assert after["lora"]["dev_loss"] != before["lora"]["dev_loss"]
    assert after["full"] == before["full"]

    rows = list(csv.DictReader(told(ws, env, "dvc", "exp", "show", "--csv")))
    of = {row["Experiment"] or row["rev"]: row for row in rows}
    assert {"hot", "workspace"} <= of.keys()
    assert float(of["hot"]["runs.lora.lr"]) == 5e-2
    assert float(of["hot"]["en-fr.lora.dev_loss"]) == pytest.approx(after["lora"]["dev_loss"])
    committed = next(row for row in rows if row["rev"] in ("main", "master"))
    assert float(committed["en-fr.lora.dev_loss"]) == pytest.approx(before["lora"]["dev_loss"])

    (told_diff,) = told(ws, env, "dvc", "metrics", "diff", "--json", "HEAD")
    differences = json.loads(told_diff)["work/summary/metrics.json"]
    assert "en-fr.full.dev_loss" not in differences
    change = differences["en-fr.lora.dev_loss"]
    assert change["diff"] == pytest.approx(after["lora"]["dev_loss"] - before["lora"]["dev_loss"])

    told(ws, env, "dvc", "plots", "diff", "HEAD")
    html = (ws.root / "dvc_plots" / "index.html").read_text(encoding="utf-8")
    assert "Loss on the dev split" in html
    assert '"rev": "HEAD"' in html
    assert '"rev": "workspace"' in html
    assert not re.search(r"<(script|link)[^>]* (src|href)=", html)
    # Back to what git has: the experiment stays by its name, and nothing runs again.
    told(ws, env, "git", "checkout", "-q", "--", ".")
    told(ws, env, "dvc", "checkout", "-q")
    assert read_json(ws.path("summary", "metrics.json"))["en-fr"] == before
    assert told(ws, env, "dvc", "status") == ["Data and pipelines are up to date."]


def test_files_are_there_once_and_the_cache_is_whole(undisturbed, tmp_path):
    """After runs, changes and an experiment all that the cache names by a hash has that hash."""
    kept = [p for p in (undisturbed.root / ".dvc/cache/files/md5").rglob("*") if p.is_file()]
    assert len(kept) > 50
    for path in kept:
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        assert digest == path.parent.name + path.stem, path
    try:
        reflink(str(kept[0]), str(tmp_path / "copy"))
    except OSError:
        files = [path.stat() for path in (undisturbed.root / "work").rglob("*") if path.is_file()]
        linked = [file for file in files if file.st_nlink > 1]
        assert not [file for file in linked if file.st_mode & 0o222]
        # What was in the cache before with the same bytes stays a copy: small ones here.
        assert sum(file.st_size for file in linked) > 0.95 * sum(file.st_size for file in files)
