"""`neft study` as a user calls it: two runs, of which one fails, then again, then mended."""

import csv
import re
import sqlite3
import subprocess
import sys

import pytest
from conftest import TINY_PARAMS, tiny_workspace
from test_pipeline import env, ran

from neft_core.workspace import Workspace

__all__ = ["env"]

pytestmark = pytest.mark.integration

HEAD = TINY_PARAMS.partition("runs:")[0].replace("data/pairs", "../data/pairs")
TAIL = "evaluation:" + TINY_PARAMS.partition("evaluation:")[2]
COMMON = f"""{HEAD}{TAIL}
methods:
  full: {{method: {{name: full}}}}
  none: {{method: {{name: neft, policy: threshold, below: -1}}, lr: 1e-2}}
  unused: {{method: {{name: embed}}}}
"""
STUDY = """\
extends: common.yaml
grid:
  - {tasks: [en-fr], methods: [full, none]}
study:
  title: Tiny
  about: Does it fail well?
  parts:
    - {show: table, tasks: {en-fr: En→Fr}, rows: {Base: base, FT-full: full, Threshold: none}}
"""
REASON = "params.yaml: runs.none-en-fr.method.below: got -1, which selects no neuron"


def study(ws: Workspace, env: dict[str, str], *words: str) -> tuple[int, list[str]]:
    """Exit status and lines, without the time of day."""
    command = [sys.executable, "-m", "neft_core.cli", "study", *words]
    done = subprocess.run(
        command, cwd=ws.root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in done.stdout.splitlines()]
    return done.returncode, lines


def test_a_study_fails_in_one_cell_is_mended_then_does_nothing(tmp_path, env):
    ws = tiny_workspace(tmp_path / "ws")
    (ws.root / "studies").mkdir()
    (ws.root / "studies" / "common.yaml").write_text(COMMON)
    (ws.root / "studies" / "tiny.yaml").write_text(STUDY)
    before = ws.params_file.read_bytes()

    code, told = study(ws, env, "tiny")
    assert code == 2, told
    assert told[-1].startswith(f"neft: {REASON}")
    assert not [line for line in told if "Traceback" in line or "WARNING" in line]
    assert {"train@full-en-fr", "evaluate@full-en-fr", "summary", "report"} <= set(ran(told))
    own = Workspace(ws.root / ".neft" / "workspaces" / "tiny")
    assert set(own.params().study.failed) == {
        "select@none-en-fr", "train@none-en-fr", "evaluate@none-en-fr",
    }  # fmt: skip
    reports = ws.root / "reports" / "tiny"
    text = (reports / "study" / "study.md").read_text()
    assert "| Threshold | – | – | failed (1) |" in text
    assert f"(1) {REASON}" in text
    with (reports / "study" / "table.csv").open(newline="") as handle:
        rows = {row["method"]: row for row in csv.DictReader(handle)}
    assert float(rows["FT-full"]["En→Fr"]) >= 0
    assert rows["Threshold"]["En→Fr failed"].startswith(REASON)
    assert "(1) params.yaml" in (reports / "report.html").read_text()
    assert "Threshold" in " ".join(told), "the table is shown"
    # From the cell to the training's page in MLflow, whose runs lie with the host's.
    assert "(../mlflow.html#full-en-fr)" in text
    page = (reports / "mlflow.html").read_text()
    linked = re.findall(r'<li id="full-en-fr">.*?/runs/([0-9a-f]{32})[?].*?">seed 1</a></li>', page)
    connection = sqlite3.connect(ws.root / "mlflow.db")
    named = dict(connection.execute("SELECT run_uuid, name FROM runs"))
    connection.close()
    assert [named[found] for found in linked] == ["full-en-fr seed 1"]
    assert ws.params_file.read_bytes() == before

    code, told = study(ws, env, "tiny", "--set", "methods.none.method.below=0.995")
    assert code == 0, told
    # `assign` sees that runs changed; nothing before it does.
    assert ran(told) == [
        "assign", "select@none-en-fr", "train@none-en-fr", "evaluate@none-en-fr", "summary",
        "report",
    ]  # fmt: skip
    assert "failed" not in (reports / "study" / "study.md").read_text()

    files = {path: path.stat().st_mtime_ns for path in own.path().rglob("*") if path.is_file()}
    # As a server's deployment runs it, from elsewhere: nothing is left to do, the tables are shown.
    flow = (
        "import sys; from flows import server; from flows.study import study\n"
        "from prefect.client.orchestration import get_client\n"
        "with server.api(), get_client(sync_client=True) as client:\n"
        "    print(study('tiny', *sys.argv[1:2], sys.argv[2:], return_state=True))\n"
        "    print(*[a.data for a in client.read_artifacts() if a.key == 'neft-study'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", flow, str(ws.root), "methods.none.method.below=0.995"],
        cwd=tmp_path, env=env, text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert "Completed(" in done.stdout
    assert files == {
        path: path.stat().st_mtime_ns for path in own.path().rglob("*") if path.is_file()
    }
    assert done.stdout.strip().endswith((reports / "study" / "study.md").read_text().strip())

    # Another study of the same runs finds them in the cache.
    (ws.root / "studies" / "other.yaml").write_text(STUDY.replace("Tiny", "Other"))
    grid = "grid=[{tasks: [en-fr], methods: [full]}]"
    parts = "study.parts=[{show: table, tasks: [en-fr], rows: {F: full}}]"
    code, told = study(ws, env, "other", "--set", grid, "--set", parts)
    assert code == 0, told
    assert set(ran(told)) <= {"assign", "summary", "report"}
