"""Servers that stay, on this machine: started, used by deployments, stopped."""

import contextlib
import importlib
import inspect
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import browser
import fabricated
import pytest
from operating import (
    PROJECT,
    ask,
    belonging,
    ended,
    environment,
    free_port,
    kill_left,
    neft,
    start_run,
    tasks,
    until,
)  # fmt: skip
from ruamel.yaml import YAML
from test_logins import LOGIN
from test_registry import answer, commit

from neft_core import servers
from neft_core.errors import NeftError
from neft_core.mlflow_store import VIEW
from neft_core.pages import TRAINING
from neft_core.workspace import Workspace, init_dvc


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


def test_a_worker_gets_no_password_of_a_database(state, monkeypatch, tmp_path):
    """What stages inherit is what the worker has."""
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql://me:planted@host/db")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql://me:planted@h/p")
    state.mkdir()
    for name, knows in (("worker", False), ("mlflow", True)):
        server = servers.Server(name, ("env",), {})
        servers._start(state, server, "mark").wait(30)
        told = (state / f"{name}.log").read_text()
        assert "NEFT_SERVERS=mark" in told
        assert ("planted" in told) is knows
        assert (state / f"{name}.log").stat().st_mode & 0o077 == 0


def test_commands_hold_no_password(state):
    told = {"MLFLOW_BACKEND_STORE_URI": "postgresql://me:planted@host/db"}
    found = servers.servers(state, "127.0.0.1", 4200, 5000, told)
    assert [server.name for server in found] == ["prefect", "mlflow", "worker"]
    assert not [part for server in found for part in server.command if "planted" in part]
    assert found[1].env["MLFLOW_BACKEND_STORE_URI"] == told["MLFLOW_BACKEND_STORE_URI"]
    assert found[1].env["MLFLOW_ARTIFACTS_DESTINATION"] == str(state / "artifacts")
    assert "planted" not in str(found[2].env)


def test_mlflow_asks_for_a_password_where_it_has_one(state):
    told = {"MLFLOW_AUTH_ADMIN_PASSWORD": "planted"}
    _, open_to_all, _ = servers.servers(state, "127.0.0.1", 4200, 5000, {})
    _, asks, worker = servers.servers(state, "127.0.0.1", 4200, 5000, told)
    assert asks.command == (*open_to_all.command, "--app-name", "basic-auth")
    key = "MLFLOW_FLASK_SERVER_SECRET_KEY"
    assert len(asks.env[key]) == 32
    assert key not in worker.env
    _, asks, _ = servers.servers(state, "127.0.0.1", 4200, 5000, {**told, key: "mine"})
    assert asks.env[key] == "mine"


def test_a_last_line_is_told_without_passwords(state):
    state.mkdir()
    log = state / "prefect.log"
    told = (
        "no connection to postgresql://me:planted@host:5432/db\n(Background on this error at: x)\n"
    )
    log.write_text(told)
    assert servers._last_line(log) == "no connection to postgresql://host:5432/db"


def test_a_port_in_use_is_one_line_and_nothing_starts(state):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for mode in (0o700, 0o755):  # made, or somebody else's, which stays as open as it is
            with pytest.raises(NeftError) as fault:
                servers.up(state, "127.0.0.1", free_port(), port, print)
            assert str(fault.value) == (
                f"port {port}: in use by another program; stop that one, or give --mlflow-port "
                "another number"
            )
            assert not (state / "servers.json").exists()
            assert state.stat().st_mode & 0o777 == mode
            state.chmod(0o755)


BAD = {
    "postgresql+{}://me:planted@127.0.0.1:1/db": "database db on 127.0.0.1, port 1: ",
    "postgresql+{}://me:planted@nohost.invalid/db": "database db on nohost.invalid: ",
    "postgresql+{}://me:plan@ted@host/db": "has more than one '@'; write those of a password as %4",
    "postgresql+{}://me:planted@host:port/db": "no address of a database; the form is postgresql+",
    "oracle+{}://me:planted@host/db": "",
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("name", "driver"),
    [
        ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "asyncpg"),
        ("MLFLOW_BACKEND_STORE_URI", "psycopg2"),
    ],
)
def test_a_database_that_can_not_be_used_is_one_line_and_nothing_starts(
    state, monkeypatch, name, driver, bad
):
    monkeypatch.setenv(name, bad.format(driver))
    with pytest.raises(NeftError) as fault:
        servers.up(state, "127.0.0.1", free_port(), free_port(), print)
    told = str(fault.value)
    assert told.startswith(f"{name}: {BAD[bad]}")
    assert f"postgresql+{driver}://USER:PASSWORD@HOST:PORT/NAME" in told or "%40" in told
    assert "plan" not in told
    assert "ted" not in told.replace("connected", "")
    assert not (state / "servers.json").exists()


def test_down_without_up(state, capsys):
    servers.down(state, print)
    assert capsys.readouterr().out == "nothing runs\n"


def test_down_stops_what_bears_the_mark_and_nobody_else(state, capsys):
    """After a reboot another process may have a number that was written down."""
    state.mkdir()
    script = ["sh", "-c", "trap 'exit 0' TERM; (sleep 60 & wait) & wait"]
    env = {**os.environ, servers.MARK: "ours"}
    ours = subprocess.Popen(script, env=env, start_new_session=True)
    other = subprocess.Popen(["sleep", "60"], env={**os.environ, servers.MARK: "another"})
    try:
        until(lambda: len(servers._marked("ours")) == 3)
        record = {"mark": "ours", "pids": {"worker": ours.pid, "prefect": other.pid},
                  "host": "127.0.0.1", "prefect": 1, "mlflow": 2}  # fmt: skip
        (state / "servers.json").write_text(json.dumps(record))
        assert servers._running(record) == {"worker"}
        servers.down(state, print)
        assert capsys.readouterr().out == "stopped 3 processes\n"
        assert ours.wait(10) is not None
        assert other.poll() is None
        assert servers._marked("ours") == []
        assert servers.clients(state) == {}
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


@pytest.mark.parametrize("there", [True, False], ids=["ends", "is missing"])
def test_a_start_that_fails_leaves_what_runs_and_asks_for_no_password_later(
    state, monkeypatch, tmp_path, there
):
    for name, value in LOGIN.items():
        monkeypatch.setenv(name, value)
    state.mkdir()
    with subprocess.Popen(["sleep", "60"], env={**os.environ, servers.MARK: "ours"}) as running:
        record = {"mark": "ours", "asks": [], "pids": {"prefect": running.pid},
                  "host": "127.0.0.1", "prefect": 1, "mlflow": free_port()}  # fmt: skip
        (state / "servers.json").write_text(json.dumps(record))
        real = servers.servers
        program = "false" if there else str(tmp_path / "nothing")

        def failing(*asked):
            return [replace(found, command=(program,)) for found in real(*asked)]

        monkeypatch.setattr(servers, "servers", failing)
        with pytest.raises(NeftError if there else OSError, match=r"mlflow: ended|nothing"):
            servers.up(state, "127.0.0.1", 1, record["mlflow"], print)
        assert running.poll() is None
        kept = json.loads((state / "servers.json").read_text())
        assert (kept["asks"], servers._running(kept)) == ([], {"prefect"})
        running.kill()


def test_deployments_name_flows_and_their_parameters():
    """Also with the limit, the pool and the flows' names that the code speaks of."""
    from flows import deploying

    told = YAML(typ="safe").load((PROJECT / "prefect.yaml").read_text())["deployments"]
    assert [entry["name"] for entry in told] == ["nightly", "on-demand", "study", "promote"]
    for entry in told:
        module, _, name = entry["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), name)
        assert flow.name in deploying.FLOWS
        assert set(entry["parameters"]) <= set(inspect.signature(flow.fn).parameters)
        assert entry["work_pool"] == {"name": servers.POOL}
    assert told[0]["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    heartbeat = int(os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert heartbeat * 3 < deploying.SILENCE


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pids": {}}'])
def test_a_damaged_record_is_as_none(state, text):
    state.mkdir()
    (state / "servers.json").write_text(text)
    assert servers.clients(state) == {}


def make(root: Path, device: str = "cpu", **fake: str) -> Workspace:
    fabricated.make(root)
    params = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(params.replace("device: cpu", f"device: {device}"))
    init_dvc(root)
    (root / "fake.json").write_text(json.dumps(fake))
    return Workspace(root)


def quick_run(api: str) -> str:
    """A run of on-demand with its own parameters, by its page where there is a browser; its id."""
    command = browser.find()
    if command is None:
        return start_run(api, "neft-pipeline/on-demand")
    found = ask(api, "/deployments/name/neft-pipeline/on-demand")["id"]
    asked = {"deployments": {"id": {"any_": [found]}}, "sort": "EXPECTED_START_TIME_ASC"}
    all_runs = "/flow_runs/filter", asked
    before = {run["id"] for run in ask(api, *all_runs)}

    def made() -> list[str]:
        return [run["id"] for run in ask(api, *all_runs) if run["id"] not in before]

    page = f"{api.removesuffix('/api')}/deployments/deployment/{found}"
    with browser.browser(command) as window:
        for _ in range(5):  # the page asks once, and shows no more where the server is too busy
            with contextlib.suppress(AssertionError):
                window.go(page, "Work Queue", seconds=60)
                window.press("Run", "Quick run", seconds=60)
                window.click("Quick run", 60)
                return until(made, 120)[0]
    raise AssertionError("the page started no run")


def look(api: str, tracking: str, run: str) -> None:
    """What both servers' pages show of a finished run, where there is a browser."""
    command = browser.find()
    if command is None:
        return
    found = ask(f"{tracking}/api/2.0/mlflow", "/runs/search", {"experiment_ids": ["1"]})["runs"]
    trained = next(r["info"] for r in found if r["info"]["run_name"] == "neft seed 2")
    with browser.browser(command) as window:
        page = f"{api.removesuffix('/api')}/runs/flow-run/{run}"
        window.go(page, "15 stages, 0 up to", "Completed")
        until(lambda: window.value("document.querySelector('canvas') !== null"))  # the graph
        window.press("Artifacts", "neft-summary", "neft-mlflow", "neft-report", "neft-progress")
        view = f"{tracking}/#/experiments/1/runs?{TRAINING}&viewStateShareKey={VIEW}"
        window.go(view, "full on en-fr, lr 0.001, seed 1", "test/bleu", "cost/seconds")
        window.go(f"{tracking}/#/experiments/1/runs/{trained['run_id']}", "neft seed 2")
        window.press("System metrics", "cpu_utilization_percentage")
        place = f"{trained['run_id']}/artifacts/samples/en-fr.json?{TRAINING}"
        page = f"{tracking}/#/experiments/1/runs/{place}"
        window.go(page, "seed-2 2", "source", "reference", "base", "output")
        trainings = [r["info"] for r in found if " seed " in r["info"]["run_name"]]
        ids = json.dumps([run["run_id"] for run in trainings]).replace(" ", "")
        page = f'{tracking}/#/compare-runs?runs={ids}&experiments=["1"]'
        names = [run["run_name"] for run in trainings]
        window.go(page, f"Comparing {len(trainings)} Runs", "run.method.name", *names)


def show(api: str, tracking: str, ws: Workspace, run: str) -> None:
    """What a run's artifacts hold."""
    asked = {"flow_runs": {"id": {"any_": [run]}}}
    found = {one["key"]: one["data"] for one in ask(api, "/artifacts/filter", asked)}
    assert set(found) == {"neft-summary", "neft-mlflow", "neft-report", "neft-progress"}
    assert found["neft-summary"].strip() == ws.path("summary", "summary.md").read_text().strip()
    assert f"({tracking}/#/experiments/1/runs" in found["neft-mlflow"]
    assert f"({tracking}/#/experiments/1/runs/" in found["neft-report"]
    assert "/artifacts/reports/report.html" in found["neft-report"]
    assert found["neft-progress"] == 100


def promote(api: str, tracking: str, ws: Workspace) -> None:
    """A better run than the base becomes champion, a worse one doesn't."""
    for run, name in (("full", "Champion"), ("lora", "Refused")):
        asked = {"run": run, "workspace": str(ws.root), "name": "tiny", "max_forgetting": "none"}
        state = ended(api, start_run(api, "neft-promotion/promote", **asked))
        assert (state["type"], state["name"]) == ("COMPLETED", name), state["message"]
    assert state["message"].startswith("version 2 stays challenger: BLEU is ")
    assert state["message"].endswith("BLEU is -100.00 to the champion's")
    found = ask(f"{tracking}/api/2.0/mlflow", "/registered-models/get?name=tiny")
    aliases = {one["alias"]: one["version"] for one in found["registered_model"]["aliases"]}
    assert aliases == {"champion": "1", "challenger": "2"}
    if command := browser.find():
        with browser.browser(command) as window:
            window.go(f"{tracking}/#/models/tiny", "@\xa0challenger", "@\xa0champion")
            version = f"{tracking}/#/models/tiny/versions/2"
            window.go(version, "neft.decision", "refused: BLEU is ")


@pytest.mark.integration
def test_servers_and_deployments(finished, tmp_path):
    """Up, a power cut, deploy, a run that fails, one that is cancelled while another waits for the
    GPU that it had, promotions, one at work, down."""
    ws = make(tmp_path / "ws", "cuda")
    trained = Workspace(shutil.copytree(finished.root, tmp_path / "trained"))
    answer(trained, "full", 8)
    answer(trained, "lora", 0)
    commit(trained)
    env = environment(tmp_path)
    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    try:
        told = neft(ws.root, env, "up", *ports).stdout.splitlines()
        assert [line.split(":")[0] for line in told] == [
            "prefect", "mlflow", "worker", "for this shell",
        ]  # fmt: skip
        exported = told[-1].partition("export ")[2].split()
        clients = dict(pair.split("=", 1) for pair in exported)
        api, tracking = clients["PREFECT_API_URL"], clients["MLFLOW_TRACKING_URI"]
        again = neft(ws.root, env, "up", *ports).stdout
        assert again.count("runs already") == 3
        wrong = neft(ws.root, env, "up", "--mlflow-port", "1", status=2).stderr
        assert "servers run already with host 127.0.0.1, ports" in wrong

        # A power cut: what was written down is stale.
        kill_left(tmp_path)
        until(lambda: not list(belonging(tmp_path)))
        assert neft(ws.root, env, "up", *ports).stdout.count("(started") == 3

        neft(ws.root, env, "deploy")
        found = ask(api, "/deployments/filter", {})
        assert {d["name"] for d in found} == {"nightly", "on-demand", "study", "promote"}
        nightly = next(d for d in found if d["name"] == "nightly")
        assert nightly["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
        asked = {"deployments": {"id": {"any_": [nightly["id"]]}}}
        nights = until(lambda: ask(api, "/flow_runs/filter", asked))
        assert {night["state"]["type"] for night in nights} == {"SCHEDULED"}
        assert {night["expected_start_time"][11:19] for night in nights} == {"02:00:00"}
        limits = ask(api, "/v2/concurrency_limits/filter", {})
        assert ("gpu", 1) in [(limit["name"], limit["limit"]) for limit in limits]
        neft(ws.root, env, "deploy")
        assert len(ask(api, "/deployments/filter", {})) == 4
        ask(api, f"/deployments/{nightly['id']}", {"paused": True}, "PATCH")  # it may be two
        made = ask(api, "/automations/filter", {})
        assert {one["name"] for one in made} == {"neft-silent-runs", "neft-unstarted-runs"}

        failing = make(tmp_path / "failing", FAKE_FAIL="corpus en-fr")
        broken = start_run(api, "neft-pipeline/on-demand", workspace=str(failing.root))
        slow = make(tmp_path / "slow", "cuda", FAKE_DELAY="1", FAKE_STEPS="3000")
        cancelled = start_run(api, "neft-pipeline/on-demand", workspace=str(slow.root))
        assert ended(api, broken)["type"] == "FAILED"
        until(lambda: tasks(api, broken).get("corpus@en-fr", {}).get("type") == "FAILED")
        message = tasks(api, broken)["corpus@en-fr"]["message"]
        assert "data/x.jsonl: line 7: no target; add one\ncorpus en-fr: works" in message
        live = slow.state("live/train/full/seed-1/train.csv")
        until(live.exists)

        # Another on the GPU gets on with what needs none, and waits.
        waiting = quick_run(api)
        until(lambda: tasks(api, waiting).get("base", {}).get("type") == "RUNNING")
        time.sleep(4)
        assert (ws.root / "ran.log").read_text() == "corpus en-fr\n"
        limits = ask(api, "/v2/concurrency_limits/filter", {})
        assert {limit["name"]: limit["active_slots"] for limit in limits}["gpu"] == 1

        ask(api, f"/flow_runs/{cancelled}/set_state", {"state": {"type": "CANCELLING"}})
        assert ended(api, cancelled)["type"] == "CANCELLED"
        until(lambda: "base" in (ws.root / "ran.log").read_text())
        state = ended(api, waiting)
        assert (state["type"], state["message"][:10]) == ("COMPLETED", "15 stages ")
        assert state["message"].endswith(": 15 ran")
        look(api, tracking, waiting)
        show(api, tracking, ws, waiting)
        asked = {"name": "nowhere", "workspace": str(trained.root)}
        state = ended(api, start_run(api, "neft-study/study", **asked))
        assert state["type"] == "FAILED"
        assert "study 'nowhere': unknown; " in state["message"]
        promote(api, tracking, trained)
        until(lambda: not [line for line in belonging(tmp_path) if "fabricated.py" in line])

        # With a run at work.
        live.unlink()
        start_run(api, "neft-pipeline/on-demand", workspace=str(slow.root))
        until(live.exists)
        neft(ws.root, env, "down")
        assert list(belonging(tmp_path)) == []
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(tracking, timeout=5)
    finally:
        kill_left(tmp_path)
