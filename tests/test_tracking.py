import contextvars
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fabricated
import pytest
from ruamel.yaml import YAML
from test_mlflow_store import always

from neft_core import tracking
from neft_core.delivery import seed_key
from neft_core.errors import NeftError
from neft_core.graph import Graph
from neft_core.lockfile import entry_key, locked
from neft_core.mlflow_store import open_store
from neft_core.tracking import Delivery, Tracker, sync
from neft_core.workspace import Workspace, init_dvc


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose stages are all made, and MLflow's empty database (5 s to make)."""
    folder = tmp_path_factory.mktemp("template")
    root = folder / "ws"
    fabricated.make(root)
    init_dvc(root)
    dvc = [sys.executable, "-m", "dvc", "repro", "-q"]
    subprocess.run(dvc, cwd=root, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        with open_store(Workspace(root)) as store:
            store.client.rename_experiment(store.experiment, "gone")
    shutil.rmtree(root / ".neft")
    return folder


@pytest.fixture
def ws(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    root = Path(shutil.copytree(template / "ws", tmp_path / "a workspace"))
    shutil.copy(template / "mlflow.db", root)
    return Workspace(root)


def runs(ws: Workspace) -> dict[str, Any]:
    """Active MLflow runs by name; two of the same name fail."""
    with open_store(ws) as store:
        found = store.client.search_runs([store.experiment])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def steps(ws: Workspace, run: Any, name: str) -> list[tuple[int, float]]:
    with open_store(ws) as store:
        return [(m.step, m.value) for m in store.client.get_metric_history(run.info.run_id, name)]


def artifacts(run: Any) -> list[str]:
    place = Path(run.info.artifact_uri.removeprefix("file://").replace("%20", " "))
    return sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file())


def test_without_a_report_the_summary_is_delivered_and_the_report_later(ws: Workspace) -> None:
    whole = (ws.root / "dvc.lock").read_text()
    shutil.move(ws.root / "reports", ws.root / "away")
    lock = YAML().load(whole)
    del lock["stages"]["report"]
    YAML().dump(lock, ws.root / "dvc.lock")
    sync(ws, Graph(ws))
    parent = next(run for name, run in runs(ws).items() if name.startswith("pipeline"))
    assert "summary/summary.md" in artifacts(parent)
    assert not [name for name in artifacts(parent) if name.startswith("reports/")]
    shutil.move(ws.root / "away", ws.root / "reports")
    (ws.root / "dvc.lock").write_text(whole)
    assert sync(ws, Graph(ws)).updated == 1
    assert "reports/report.html" in artifacts(parent)


def test_everything_is_delivered_once(ws: Workspace) -> None:
    graph = Graph(ws)
    assert sync(ws, graph) == Delivery(f"sqlite:///{ws.root}/mlflow.db", created=4)
    found = runs(ws)
    names = sorted(found)
    assert names[:3] == ["full seed 1", "neft seed 1", "neft seed 2"]
    assert names[3].startswith("pipeline ")
    run, parent = found["neft seed 2"], found[names[3]]
    tags = run.data.tags
    train = locked(ws)["train@neft"]
    assert tags["mlflow.parentRunId"] == parent.info.run_id
    assert tags["neft.key"] == seed_key(entry_key(train), 2) == seed_key(graph.key("train@neft"), 2)
    assert tags["neft.bleu_signature"] == "nrefs:1"
    assert tags["neft.adapter"] == "work/train/neft/seed-2/adapter_model.safetensors"
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.003"
    assert (
        tags["mlflow.note.content"] == "neft, lowest 0.5 of candidates on en-fr, lr 0.003, seed 2"
    )
    assert run.data.params["seed"] == "2"
    assert run.data.params["run.method.share"] == "0.5"
    assert run.data.params["task.source.kind"] == "generated"
    assert found["full seed 1"].data.params["lr"] == "0.001"
    metrics = run.data.metrics
    assert metrics["test/bleu"] == 21.5
    assert metrics["cost/peak_bytes"] == 5
    assert metrics["mask/neurons"] == 5
    assert metrics["best_dev_loss"] == 2.5
    assert "mask/neurons" not in found["full seed 1"].data.metrics
    assert steps(ws, run, "mask/neurons") == [(0, 5.0)]
    assert not metrics.keys() & run.data.params.keys()
    assert run.info.end_time - run.info.start_time == 1500, "the seconds of work/cost"
    note = "a workspace: full, neft\n\n| run | BLEU |\n|---|---|\n| neft | 21.5 |"
    assert parent.data.tags["mlflow.note.content"] == note
    assert steps(ws, run, "train/loss") == [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5)]
    assert steps(ws, run, "dev/loss") == [(0, 3.5), (4, 2.5)]
    inputs = {i.dataset.name: i.dataset for i in run.inputs.dataset_inputs}
    assert sorted(inputs) == ["en-fr dev", "en-fr test", "en-fr train"]
    listing = json.loads(
        next(
            p.read_text()
            for p in (ws.root / ".dvc/cache/files").rglob("*.dir")
            if "test.jsonl" in p.read_text()
        )
    )
    assert inputs["en-fr test"].digest == {f["relpath"]: f["md5"] for f in listing}["test.jsonl"]
    assert {"reports/report.html", "reports/figures/png/bleu.png"} <= set(artifacts(parent))
    assert "summary/summary.md" in artifacts(parent)
    place = Path(run.info.artifact_uri.removeprefix("file://").replace("%20", " "))
    assert ws.root in place.parents
    with open_store(ws) as store:
        name = "system/cpu_utilization_percentage"
        told = store.client.get_metric_history(run.info.run_id, name)
    assert [(m.timestamp, m.step, m.value) for m in told] == [(10_000, 0, 10), (13_000, 3, 13)]
    table = json.loads((place / "samples/en-fr.json").read_text())
    assert table["columns"] == ["source", "reference", "base", "output"]
    assert table["data"][:2] == [
        ["s0", "r0", "base 0", "seed-2 0"],
        ["s2", "r2", "base 2", "seed-2 2"],
    ]
    assert len(table["data"]) == 75
    shown = json.loads(tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "samples/en-fr.json", "type": "table"}]
    files = artifacts(run)
    adapter = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    assert files == [*adapter, "hypotheses/seed-2.jsonl", "mask.json", "samples/en-fr.json"]

    assert (
        sync(ws, graph) == sync(ws, graph, trust=True) == Delivery(f"sqlite:///{ws.root}/mlflow.db")
    )
    assert steps(ws, run, "train/loss") == [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5)]
    assert steps(ws, run, "test/bleu") == [(0, 21.5)]
    assert len(steps(ws, run, name)) == 2


def elsewhere(ws: Workspace, told: str = "") -> list[str]:
    """Synchronise in another process: the delivery, and which heavy packages it imported."""
    script = (
        "import sys; from pathlib import Path; from neft_core.graph import Graph\n"
        "from neft_core.tracking import sync; from neft_core.workspace import Workspace\n"
        "ws = Workspace(Path('.').resolve()); done = sync(ws, Graph(ws), trust=True)\n"
        "print(done.created, done.updated, 'mlflow' in sys.modules, 'torch' in sys.modules)"
    )
    env = {"PYTHONPATH": str(fabricated.PROJECT), "DVC_SITE_CACHE_DIR": str(ws.root / "site")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ws.root, env=env, capture_output=True, check=True)
    assert done.stderr.decode() == told
    return done.stdout.decode().split()


def test_nothing_new_needs_no_mlflow(ws: Workspace) -> None:
    sync(ws, Graph(ws))
    assert elsewhere(ws) == ["0", "0", "False", "False"]


@pytest.mark.parametrize("harm", ["delete", "empty", "cut"])
def test_a_lost_database_is_made_anew(ws: Workspace, template: Path, harm: str) -> None:
    database = ws.root / "mlflow.db"
    sync(ws, Graph(ws))
    if harm == "delete":
        database.unlink()
    elif harm == "empty":  # as `mlflow ui` makes it after a deletion
        shutil.copy(template / "mlflow.db", database)
    else:
        database.write_bytes(database.read_bytes()[:200_000])
    told = f"{database}: damaged; kept as mlflow.db.damaged, made anew from the runs' files\n"
    assert elsewhere(ws, told if harm == "cut" else "") == ["4", "0", "True", "False"]
    assert (ws.root / "mlflow.db.damaged").exists() == (harm == "cut")
    assert elsewhere(ws) == ["0", "0", "False", "False"]


def test_only_what_is_whole_is_delivered(ws: Workspace) -> None:
    (ws.root / "work/train/neft/seed-1/dev.csv").write_text("step,epoch,loss\n0,0,9\n")
    (ws.root / "work/evaluation/full/metrics.json").unlink()
    assert sync(ws, Graph(ws)).created == 2  # the run and its execution
    found = runs(ws)
    assert "test/bleu" not in found["full seed 1"].data.metrics
    subprocess.run([sys.executable, "-m", "dvc", "checkout", "-q", "-f"], cwd=ws.root, check=True)
    assert sync(ws, Graph(ws)) == Delivery(f"sqlite:///{ws.root}/mlflow.db", created=2, updated=2)
    assert runs(ws)["full seed 1"].data.metrics["test/bleu"] == 21.5


def wait_for(found: Any, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def training(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch
) -> tuple[Workspace, dict[str, str], Path]:
    """A run that is about to train: its whole files set aside, old live files in place."""
    monkeypatch.setattr(tracking, "POLL", 0.05)
    whole = {
        name: (ws.root / f"work/train/full/seed-1/{name}.csv").read_text()
        for name in ("train", "dev")
    }
    live = ws.root / ".neft/live/train/full/seed-1"
    live.mkdir(parents=True)
    (live / "train.csv").write_text("step,epoch,loss\n77,0,77\n")
    return ws, whole, live


def test_a_training_is_shown_live_and_resumed_without_repetition(
    training: tuple[Workspace, dict[str, str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    ws, whole, live = training
    rows = whole["train"].splitlines(keepends=True)
    graph, log = Graph(ws), logging.getLogger("test")

    def shown(status: str, count: int) -> bool:
        run = runs(ws).get("full seed 1")
        return (
            run is not None
            and run.info.status == status
            and len(steps(ws, run, "train/loss")) == count
        )

    tracker = Tracker(ws, log)

    def interrupted() -> None:
        with tracker.follow(graph, "full"):
            time.sleep(0.3)  # the old file's row must not be taken for this training's
            (live / "train.csv").write_text("".join(rows[:3]) + rows[3][:5])
            wait_for(lambda: shown("RUNNING", 2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    wait_for(lambda: shown("KILLED", 2))

    # Resumed from a checkpoint before the kill: the file is cut and grows again.
    with tracker.follow(graph, "full"):
        (live / "train.csv").write_text("".join(rows[:2]))
        wait_for(lambda: shown("RUNNING", 2))
        (live / "train.csv").write_text("".join(rows[:4]))
        wait_for(lambda: shown("RUNNING", 3))
        # Another stage ends after this one's result was there: what is followed would come twice.
        tracker.sync(graph)
        assert shown("RUNNING", 3)
        assert runs(ws)["neft seed 1"].info.status == "FINISHED"
    tracker.sync(graph)
    run = runs(ws)["full seed 1"]
    assert run.info.status == "FINISHED"
    assert steps(ws, run, "train/loss") == [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5)]
    assert steps(ws, run, "train/lr") == [(1, 0.001), (2, 0.002), (3, 0.003), (4, 0.004)]
    # A forced repetition with the same result touches nothing.
    with tracker.follow(graph, "full"):
        (live / "train.csv").write_text("".join(rows))
        time.sleep(0.3)
    assert runs(ws)["full seed 1"].info.status == "FINISHED"
    assert not caplog.records


def test_a_lost_training_that_ran_differently_is_replaced(
    training: tuple[Workspace, dict[str, str], Path],
) -> None:
    ws, _, live = training
    graph = Graph(ws)
    with Tracker(ws, logging.getLogger("test")).follow(graph, "full"):
        (live / "train.csv").write_text("step,epoch,loss\n1,0,2.0\n2,0,1.25\n")
        wait_for(lambda: "full seed 1" in runs(ws))
    sync(ws, graph)
    found = runs(ws)["full seed 1"]
    assert steps(ws, found, "train/loss") == [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5)]


def test_a_changed_evaluation_updates_the_same_run(ws: Workspace) -> None:
    sync(ws, Graph(ws))
    text = (ws.root / "params.yaml").read_text().replace("max_new_tokens: 8", "max_new_tokens: 9")
    (ws.root / "params.yaml").write_text(text)
    names = ["evaluate@full", "evaluate@neft"]
    dvc = [sys.executable, "-m", "dvc", "repro", "-q", "-s", "-f"]
    subprocess.run([*dvc, *names], cwd=ws.root, check=True)
    assert sync(ws, Graph(ws)).updated == 3
    assert len(runs(ws)) == 4


def test_a_transfer_is_shown_in_the_run_that_was_trained(ws: Workspace) -> None:
    sync(ws, Graph(ws))
    text = (ws.root / "params.yaml").read_text()
    task = text[text.index("  en-fr:") : text.index("compute:")].replace("en-fr:", "other:")
    text = text.replace("compute:", task + "compute:", 1)
    (ws.root / "params.yaml").write_text(
        text + "transfers: {neft-other: {run: neft, task: other}}\n"
    )
    due = [
        stage.name
        for stage in Graph(ws).stages
        if stage.item not in ("other", None) and Graph(ws).changes(stage.name)
    ]
    assert due == ["transfer@neft-other"], "no training and no other evaluation"
    dvc = [sys.executable, "-m", "dvc", "repro", "-q", "transfer@neft-other"]
    subprocess.run(dvc, cwd=ws.root, check=True)
    assert "train neft" not in (ws.root / "ran.log").read_text().splitlines()[-4:]
    assert sync(ws, Graph(ws)).updated == 2
    found = runs(ws)
    run = found["neft seed 2"]
    assert run.data.metrics["test/other/bleu"] == run.data.metrics["test/bleu"] == 21.5
    assert run.data.tags["neft.other.bleu_signature"] == "nrefs:1"
    assert "test/other/bleu" not in found["full seed 1"].data.metrics
    place = Path(run.info.artifact_uri.removeprefix("file://").replace("%20", " "))
    assert (place / "hypotheses/other/seed-2.jsonl").exists()
    assert sync(ws, Graph(ws)) == Delivery(f"sqlite:///{ws.root}/mlflow.db")


def test_a_server_that_fails_is_not_one_that_is_away(
    training: tuple[Workspace, dict[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with always(500) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(NeftError, match="answers with status 500; its log tells why; check ML"):
            sync(training[0], Graph(training[0]))


def test_a_server_that_is_away_costs_one_line(
    training: tuple[Workspace, dict[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ws, whole, live = training
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    graph = Graph(ws)
    tracker = Tracker(ws, logging.getLogger("test"))
    began = time.monotonic()
    with tracker.follow(graph, "full"):
        (live / "train.csv").write_text(whole["train"])
        time.sleep(0.3)
    tracker.sync(graph)
    assert time.monotonic() - began < 60
    ours = [r.getMessage() for r in caplog.records if r.name == "test"]
    assert len(ours) == 1
    assert ours[0].startswith(f"MLflow at http://127.0.0.1:{port}: ")
    assert ours[0].endswith("the work goes on, 'neft track' delivers later")
    assert "secret" not in caplog.text
    with pytest.raises(NeftError, match="check MLFLOW_TRACKING_URI"):
        sync(ws, graph)
    tracker.close(graph)
    assert [r.getMessage() for r in caplog.records if r.name == "test"] == ours
    # Back at the end of the execution: it gets what it missed.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    caplog.set_level(logging.INFO)
    tracker.close(graph)
    assert caplog.records[-1].getMessage() == "MLflow: brought up to date"
    assert len(runs(ws)) == 4


def test_what_is_told_beside_a_training_is_told_in_the_callers_context(
    training: tuple[Workspace, dict[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect's log handler finds its server there, and starts a server where it finds none."""
    ws, whole, live = training
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    place = contextvars.ContextVar("place", default="nowhere")
    told = []

    class Handler(logging.Handler):
        def emit(self, _record: logging.LogRecord) -> None:
            told.append(place.get())

    log = logging.Logger("test of context")
    log.addHandler(Handler())
    place.set("here")
    with Tracker(ws, log).follow(Graph(ws), "full"):
        (live / "train.csv").write_text(whole["train"])
        wait_for(lambda: bool(told))
    assert told == ["here"]


def test_two_first_deliveries_at_once(ws: Workspace) -> None:
    (ws.root / "mlflow.db").unlink()
    threads = []
    faults: list[BaseException] = []

    def opened() -> None:
        try:
            with open_store(ws) as store:
                store.client.search_runs([store.experiment])
        except BaseException as fault:
            faults.append(fault)

    for _ in range(3):
        threads.append(threading.Thread(target=opened))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert not faults


def test_a_kill_while_the_database_is_made_leaves_none(ws: Workspace) -> None:
    (ws.root / "mlflow.db").unlink(missing_ok=True)
    code = (
        "from neft_core.mlflow_store import open_store; from neft_core.workspace import Workspace; "
        f"open_store(Workspace(__import__('pathlib').Path({str(ws.root)!r}))).__enter__()"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as making:
        wait_for(lambda: next(ws.root.glob("*mlflow.db*"), None))
        making.kill()
    assert not (ws.root / "mlflow.db").exists()
    with open_store(ws):
        pass
    assert [path.name for path in ws.root.glob("*mlflow.db*")] == ["mlflow.db"]


def test_a_moved_workspace_is_told(ws: Workspace) -> None:
    sync(ws, Graph(ws))
    moved = Workspace(ws.root.rename(ws.root.with_name("moved")))
    with pytest.raises(NeftError, match=r"moved/mlflow\.db: belongs to a workspace at .*a%20work"):
        sync(moved, Graph(moved))


def test_a_large_adapter_stays_where_it_is(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neft_core.delivery.LARGEST_ADAPTER", 10)
    sync(ws, Graph(ws))
    assert len(runs(ws)["full seed 1"].data.tags["neft.adapter.md5"]) == 32
    assert not list((ws.root / "mlruns").rglob("*.safetensors"))
