"""The flow against a real Prefect server, MLflow and DVC, on stages that compute nothing."""

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import time
import venv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fabricated
import pytest

from neft_core.config import read_yaml
from neft_core.workspace import Workspace, init_dvc

pytestmark = pytest.mark.integration

STAGES = 15
"""Stages of the fabricated workspace."""


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "ws"
    fabricated.make(root)
    init_dvc(root)
    return root


@pytest.fixture
def ws(template: Path, tmp_path: Path) -> Workspace:
    return Workspace(Path(shutil.copytree(template, tmp_path / "ws")))


@pytest.fixture
def env(prefect_home: Path, tmp_path: Path) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MLFLOW"))}
    return {
        **keep,
        "PYTHONPATH": str(fabricated.PROJECT),
        "PREFECT_HOME": str(prefect_home),
        "DVC_SITE_CACHE_DIR": str(tmp_path / "site"),
    }


STUDY = """
import sys
from neft_core.errors import NeftError, say
from neft_core.workspace import find_workspace
from flows.pipeline import run_pipeline
try:
    run_pipeline(find_workspace(), study=True)
except NeftError as fault:
    sys.exit(say(str(fault), 2))
"""


WAYS = {
    "flow": ("-m", "flows.pipeline"),
    "study": ("-c", STUDY),
    "neft study": ("-m", "neft_core.cli", "study", "s"),
}
"""The flow in a workspace, as that of a study, and of a study in the workspace's folder of them."""


def start(ws: Workspace, env: dict[str, str], way: str = "flow") -> subprocess.Popen[str]:
    """The flow in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [env.get("FAKE_PYTHON", sys.executable), *WAYS[way]],
        cwd=ws.root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(ws: Workspace, env: dict[str, str], status: int = 0, way: str = "flow") -> list[str]:
    """Run the flow to its end: its lines without the time of day."""
    with start(ws, env, way) as process:
        told = process.communicate(timeout=900)[0]
    assert process.returncode == status, told
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in told.splitlines()]


def states(home: Path) -> Counter[str]:
    """Names of the task runs' states in the newest flow run."""
    query = (
        "SELECT state_name FROM task_run WHERE flow_run_id = "
        "(SELECT id FROM flow_run ORDER BY created DESC LIMIT 1)"
    )
    connection = sqlite3.connect(home / "prefect.db")
    try:
        return Counter(name for (name,) in connection.execute(query))
    finally:
        connection.close()


def trainings(ws: Workspace) -> dict[str, tuple[str, int]]:
    """For each MLflow training: status, and number of its training losses."""
    query = (
        "SELECT r.name, r.status, (SELECT count(*) FROM metrics m "
        "WHERE m.run_uuid = r.run_uuid AND m.key = 'train/loss') FROM runs r "
        "WHERE r.lifecycle_stage = 'active' AND r.name LIKE '% seed %'"
    )
    connection = sqlite3.connect(ws.root / "mlflow.db")
    try:
        rows = connection.execute(query).fetchall()
    finally:
        connection.close()
    assert len({name for name, _, _ in rows}) == len(rows)
    return {name: (status, count) for name, status, count in rows}


def left_over(env: dict[str, str]) -> Iterator[str]:
    """Command lines of living processes that belong to these workspaces."""
    mark = f"DVC_SITE_CACHE_DIR={env['DVC_SITE_CACHE_DIR']}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes():
                yield (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue


SECTION = """\
study:
  title: T
  parts: [{show: table, tasks: [en-fr], rows: {FT: full, NeFT: neft}}]
"""


def set_jobs(ws: Workspace, jobs: int) -> None:
    ws.params_file.write_text(f"{ws.params_file.read_text()}jobs: {jobs}\n")


def test_everything_then_nothing_then_only_what_changed(
    ws: Workspace, env: dict[str, str], prefect_home: Path
) -> None:
    told = run(ws, env)
    assert told[0] == f"{STAGES} stages, 0 up to date"
    assert states(prefect_home) == {"Ran": STAGES}
    assert "  works" in told, "under its heading, without the stage's name"
    assert not [line for line in told if "Traceback" in line or "WARNING" in line]
    whole = {"full seed 1": ("FINISHED", 4), "neft seed 1": ("FINISHED", 4)}
    whole["neft seed 2"] = ("FINISHED", 4)
    assert trainings(ws) == whole

    lock = (ws.root / "dvc.lock").read_bytes()
    told = run(ws, env)
    assert told[0] == f"{STAGES} stages, {STAGES} up to date"
    assert told.index("") == STAGES + 1, "nothing else before the table"
    assert states(prefect_home) == {"Cached": STAGES}
    assert trainings(ws) == whole
    assert (ws.root / "dvc.lock").read_bytes() == lock

    (ws.root / "ran.log").unlink()
    params = ws.params_file.read_text()
    ws.params_file.write_text(params.replace("lr: 3e-3", "lr: 4e-3"))
    shutil.rmtree(ws.path("corpus"))
    told = run(ws, env)
    restored = "  work/corpus/en-fr: missing; restored from the DVC cache"
    assert restored in told
    # The fabricated result does not depend on the learning rate, so its evaluation is not stale.
    assert (ws.root / "ran.log").read_text().split("\n") == [
        "assign ",
        "train neft",
        "summary ",
        "report ",
        "",
    ]
    assert states(prefect_home) == {"Cached": STAGES - 5, "Restored": 1, "Ran": 4}


@pytest.mark.slow
def test_stages_at_once_end_in_the_same_files(ws: Workspace, env: dict[str, str]) -> None:
    other = Workspace(Path(shutil.copytree(ws.root, ws.root.with_name("other"))))
    run(ws, env)
    set_jobs(other, 2)
    told = run(other, {**env, "FAKE_DELAY": "2"})

    def when(text: str) -> int:
        return next(place for place, line in enumerate(told) if line.startswith(text))

    for first, second in (("train@full", "train@neft"), ("train@neft", "train@full")):
        assert when(f"{first}: starts") < when(f"{second}: ran in")
    assert when("summary: starts") > when("evaluate@neft: ran in")
    assert "  train@neft: works" in told, "beside others with its name"
    stages = [read_yaml(place.root / "dvc.lock")["stages"] for place in (ws, other)]
    assert stages[1]["report"]["params"]["params.yaml"].pop("jobs") == 2
    assert stages[0] == stages[1]
    assert trainings(ws) == trainings(other)


@pytest.mark.slow
def test_a_failure_stops_only_what_needs_it(
    ws: Workspace, env: dict[str, str], prefect_home: Path
) -> None:
    """Here all that selects neurons; what trains without a mask goes on."""
    told = run(ws, {**env, "FAKE_FAIL": "warmup en-fr"}, status=2)
    reason = "data/x.jsonl: line 7: no target; add one"
    assert [line for line in told if line.startswith("neft:")] == [f"neft: {reason}"]
    assert f"warmup@en-fr failed: {reason}" in told
    skipped = {"score@en-fr", "select@neft", "train@neft", "baseline@en-fr", "evaluate@neft",
               "summary", "report"}  # fmt: skip
    said = next(line for line in told if line.startswith("skipped, as they need what failed: "))
    assert set(said.partition(": ")[2].split(", ")) == skipped
    assert not [line for line in told if "Traceback" in line or "Error" in line]
    assert states(prefect_home) == {"Ran": STAGES - 8, "Failed": 1, "Skipped": 7}
    assert trainings(ws).keys() == {"full seed 1"}
    run(ws, env)
    # `assign` too: there are scores now.
    assert states(prefect_home) == {"Ran": 9, "Cached": STAGES - 9}


@pytest.mark.slow
def test_scores_that_were_made_before_a_failure_reach_the_runs_after_it(
    ws: Workspace, env: dict[str, str]
) -> None:
    run(ws, env)
    ws.params_file.write_text(ws.params_file.read_text().replace("layout: mlp", "layout: all"))
    run(ws, {**env, "FAKE_FAIL": "assign "}, status=2)
    (ws.root / "ran.log").unlink()
    told = run(ws, env)
    assert "score@en-fr: up to date" in told
    ran = (ws.root / "ran.log").read_text().split("\n")
    assert ran == ["assign ", "select neft", ""]
    assert f"{STAGES} stages, {STAGES} up to date" in run(ws, env)


@pytest.mark.slow
def test_a_study_shows_what_is_left_and_tells_the_time_left(
    ws: Workspace, env: dict[str, str], prefect_home: Path
) -> None:
    ws.params_file.write_text(ws.params_file.read_text() + SECTION)
    env = {**env, "FAKE_FAIL": "train full"}
    told = run(ws, env, status=2, way="study")
    assert told[-1] == "neft: data/x.jsonl: line 7: no target; add one"
    assert "skipped, as they need what failed: evaluate@full" in told
    assert states(prefect_home) == {"Ran": STAGES - 2, "Failed": 1, "Skipped": 1}
    reason = "data/x.jsonl: line 7: no target; add one"
    failed = dict.fromkeys(("train@full", "evaluate@full"), reason)
    assert ws.params().study.failed == failed
    assert f"corpus@en-fr: starts (made for the first time); {STAGES} stages to go" in told
    # Of the last three families none was seen yet.
    starts = [line for line in told if line.startswith("evaluate@neft: starts")]
    assert re.search(r"; 3 stages to go, roughly \d+ (s|min) left$", starts[0]), starts
    told = run(ws, env, status=2, way="study")
    assert states(prefect_home) == {"Cached": STAGES - 2, "Failed": 1, "Skipped": 1}
    # All kinds of stages were seen in the first run, but for the one that failed.
    assert any(
        re.search(r"train@full: starts .*; 4 stages to go, about \d+ (s|min) left$", t)
        for t in told
    )
    # As a new expansion of the study writes it.
    ws.params_file.write_text(re.sub(r"(?s)  failed:\n.*", "", ws.params_file.read_text()))
    del env["FAKE_FAIL"]
    run(ws, env, way="study")
    assert states(prefect_home) == {"Ran": 4, "Cached": STAGES - 4}
    assert ws.params().study.failed == {}


def as_a_study(ws: Workspace, env: dict[str, str], folder: Path) -> Workspace:
    """Give the workspace a study of its params, whose stages are fabricated too: where it runs."""
    (ws.root / "studies").mkdir()
    (ws.root / "studies/s.yaml").write_text(ws.params_file.read_text() + SECTION)
    # A study has the package's own dvc.yaml, whose `neft` is the one beside the interpreter.
    venv.create(folder / "venv", symlinks=True)
    env["FAKE_PYTHON"] = str(folder / "venv/bin/python")
    (packages,) = (folder / "venv").glob("lib/*/site-packages")
    known = sysconfig.get_path("purelib")
    (packages / "known.pth").write_text(f"import site; site.addsitedir({known!r})\n")
    neft = folder / "venv/bin/neft"
    neft.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} {fabricated.__file__} "$@"\n')
    neft.chmod(0o755)
    return Workspace(ws.root / ".neft/workspaces/s")


def written(path: Path) -> float:
    """When a file was last written, which a stage may remove at any time."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


@pytest.mark.parametrize(
    ("jobs", "way"), [(3, "neft study"), pytest.param(1, "flow", marks=pytest.mark.slow)]
)
def test_interrupted_runs_leave_no_process_and_end_as_an_undisturbed_one(
    jobs: int, way: str, ws: Workspace, env: dict[str, str], prefect_home: Path, tmp_path: Path
) -> None:
    set_jobs(ws, jobs)
    host, ws = ws, ws if way == "flow" else as_a_study(ws, env, tmp_path)
    finished: set[str] = set()
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[: 3 if jobs == 1 else 2]:
        process = start(host, {**env, "FAKE_DELAY": "1"}, way)
        assert process.stdout is not None
        for line in process.stdout:
            finished |= set(re.findall(r"(\S+): ran in ", line))
            if "train@full: starts" in line:
                break
        rows = ws.state("live/train/full/seed-1/train.csv")
        began = time.time()
        while written(rows) < began + 2:
            assert process.poll() is None
            time.sleep(0.05)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.send_signal(how)
        began = time.monotonic()
        told = process.communicate(timeout=180)[0]
        assert process.returncode == (-how if how == signal.SIGKILL else 130)
        if how != signal.SIGKILL:
            *log, last = told.splitlines()
            assert last == "neft: interrupted; run the same command again to go on"
            beside = r"|\S+: (starts|ran in) " if jobs > 1 else ""
            assert all(re.match(rf"\d\d:\d\d:\d\d (  {beside})", line) for line in log), told
            # DVC's list of who is at work, which a kill would leave as it was.
            assert (ws.root / ".dvc/tmp/rwlock").read_text() == "{}"
        while left := list(left_over(env)):
            assert time.monotonic() - began < 120, left
            time.sleep(0.1)

    (ws.root / "ran.log").unlink()
    told = run(host, env, way=way)
    assert "Traceback" not in " ".join(told)
    made = (ws.root / "ran.log").read_text().splitlines()
    again = {line.strip().replace(" ", "@") for line in made}
    assert {"base", "prepare@en-fr", "warmup@en-fr"} <= finished
    assert "train@full" in again
    assert not finished & again, "what was finished isn't made again"
    found = states(prefect_home)
    assert found["Ran"] + found["Cached"] == STAGES
    assert found["Cached"] >= 6
    names = ("full seed 1", "neft seed 1", "neft seed 2")
    assert trainings(host) == dict.fromkeys(names, ("FINISHED", 4))


@pytest.mark.slow
def test_two_starts_at_once_on_a_fresh_home(
    ws: Workspace, template: Path, env: dict[str, str], tmp_path: Path
) -> None:
    other = Workspace(Path(shutil.copytree(template, tmp_path / "other")))
    env = {**env, "PREFECT_HOME": str(tmp_path / "home"), "FAKE_DELAY": "0.5"}
    first, apart = start(ws, env), start(other, env)
    while not ws.state("live").exists():
        assert first.poll() is None
        time.sleep(0.1)
    told = run(ws, env, status=2)
    assert told == [
        f"neft: {ws.root}: process {first.pid} is at work on it; wait for it, or stop it first"
    ]
    for process in (first, apart):
        text = process.communicate(timeout=900)[0]
        assert process.returncode == 0, text


def test_a_wrong_server_address_is_told(ws: Workspace, env: dict[str, str]) -> None:
    told = run(ws, {**env, "PREFECT_API_URL": "http://me:secret@127.0.0.1:9/api"}, status=2)
    assert told == [
        "neft: PREFECT_API_URL: http://127.0.0.1:9/api does not answer; "
        "start that server, or unset it to run without one"
    ]
