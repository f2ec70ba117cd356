"""The registry: the gate, aliases, what a version holds, loading and serving it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import edit
from mlflow import MlflowClient
from operating import environment, free_port, until

from neft_core import promotion, registry
from neft_core.errors import NeftError
from neft_core.metrics import paired_bootstrap
from neft_core.mlflow_store import open_store
from neft_core.promotion import Gate
from neft_core.rows import read_rows, write_rows
from neft_core.workspace import Workspace

FREELY = Gate(max_forgetting=None)
NAME = "tiny-en-fr"


@pytest.fixture(scope="module")
def template(finished, tmp_path_factory):
    """The finished workspace as `dvc repro` would have left it, with MLflow's database made."""
    ws = Workspace(shutil.copytree(finished.root, tmp_path_factory.mktemp("registry") / "ws"))
    commit(ws)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with open_store(ws) as store:
            store.client.delete_experiment(store.experiment)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{ws.root}/mlflow.db")
    return ws


def commit(ws: Workspace) -> None:
    """Take what lies in the workspace for what its stages made."""
    subprocess.run([sys.executable, "-m", "dvc", "commit", "-f", "-q"], cwd=ws.root, check=True)


@pytest.fixture
def ws(template, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    found = Workspace(Path(shutil.copytree(template.root, tmp_path / "ws", symlinks=True)))
    # The template's database knows its own folder; an experiment of another name is new.
    edit(found, ("experiment: tiny", "experiment: tiny2"))
    return found


def answer(ws: Workspace, run: str, right: int) -> None:
    """Let a run's evaluation have so many of its eight test rows right."""
    path = ws.path("evaluation", run, "seed-1.jsonl")
    rows = read_rows(path)
    for number, row in enumerate(rows):
        row["hypothesis"] = row["references"][0] if number < right else "WRONG"
    write_rows(path, rows)


def aliases(ws: Workspace, name: str) -> dict[str, str]:
    with open_store(ws) as store:
        found = store.client.get_registered_model(name).aliases
    return {alias: str(version) for alias, version in found.items()}


def test_the_gate_asks_for_significance_against_base_and_champion(ws):
    answer(ws, "full", 8)
    rows = read_rows(ws.path("evaluation", "full", "seed-1.jsonl"))
    best = promotion.decide(ws, "full", 1, None, FREELY)
    assert best.champion
    assert best.reasons == ()
    base = read_rows(ws.path("baseline", "en-fr", "base.jsonl"))
    asked = paired_bootstrap(
        [row["hypothesis"] for row in rows], [row["hypothesis"] for row in base],
        [row["references"] for row in rows], "French", samples=100,
    )  # fmt: skip
    assert best.comparisons == {"base": asked}

    same = promotion.decide(ws, "full", 1, rows, FREELY)
    assert not same.champion
    assert same.reasons == ("BLEU is +0.00 to the champion's",)

    one_less = [row | ({"hypothesis": "WRONG"} if n == 7 else {}) for n, row in enumerate(rows)]
    chance = promotion.decide(ws, "full", 1, one_less, Gate(max_forgetting=None, alpha=0.01))
    assert not chance.champion
    assert "may be chance: p = 0." in chance.reasons[0]
    assert chance.reasons[0].endswith("less than 0.01 is asked for")
    delta = chance.comparisons["champion"]["delta"]
    wide = promotion.decide(ws, "full", 1, one_less, Gate(0.99, margin=delta, max_forgetting=None))
    assert wide.reasons == (
        f"BLEU is {delta:+z.2f} to the champion's, and more than {delta:g} is asked for",
    )
    worse = promotion.decide(ws, "lora", 1, rows, FREELY)
    assert [reason.partition(" is ")[0] for reason in worse.reasons] == ["BLEU", "BLEU"]


def test_forgetting_is_measured_on_the_chosen_seed(ws, tmp_path):
    from neft_core.analyses import forgetting

    answer(ws, "full", 8)
    text = tmp_path / "other.txt"
    text.write_text("one two six ten\nsix ten one\n")
    found, _ = forgetting(ws, ["neft"], text=text, count=500)
    rise = found["runs"]["neft"]["losses"][1] - found["base"]
    decided = promotion.decide(ws, "full", 1, None, Gate(max_forgetting=-9.0, text=text))
    assert not decided.champion
    assert decided.reasons[0].startswith("the loss on other text rises by ")
    assert promotion._forgetting(ws, "neft", 2, Gate(text=text)) == rise
    with pytest.raises(NeftError, match=r"; give a file of such texts \(or go without: --max-fo"):
        promotion.decide(ws, "full", 1, None, Gate())


@pytest.mark.parametrize(
    ("gate", "line"),
    [
        ({"alpha": 0.0}, "--alpha: got 0; above 0 and below 1"),
        ({"margin": -1.0}, "--margin: got -1; 0 or more points of the metric"),
    ],
)
def test_a_gate_that_can_not_be(gate, line):
    with pytest.raises(NeftError) as fault:
        Gate(**gate)
    assert str(fault.value) == line


@pytest.mark.parametrize("name", ["../x", "a/b", "models:/x", "", ".hidden", "a" * 101, "a b"])
def test_a_models_name_stays_a_name(finished, name):
    with pytest.raises(NeftError, match="letters, digits"):
        registry.model_name(finished, None, name)


def test_what_was_not_made_is_not_registered(ws):
    shutil.rmtree(ws.path("evaluation", "full"))
    with pytest.raises(NeftError, match=r"^evaluate@full: not up to date; run 'neft run' first$"):
        registry.promote(ws, "full", None, name=None, gate=FREELY, merged=False)


@pytest.mark.parametrize(
    ("old", "new", "stage"),
    [("lr: 1e-3, batch_size: 8, epochs", "lr: 2e-3, batch_size: 8, epochs", "train@neft"),
     ("percent: 9", "percent: 3", "train@neft"),
     ("max_new_tokens: 6", "max_new_tokens: 5", "evaluate@neft")],
)  # fmt: skip
def test_what_was_changed_since_is_not_delivered(ws, neft, old, new, stage):
    edit(ws, (old, new))
    with pytest.raises(NeftError, match=f"^{stage}: not up to date; run 'neft run' first$"):
        registry.promote(ws, "neft", None, name=None, gate=FREELY, merged=False)
    key = {"p": "runs.neft", "l": "training"}.get(old[0])
    line = f"neft: run neft: {key} was changed since it was trained; run 'neft run' first"
    asked = ("generate", "--run", "neft", "--prompt", "the cat"), ("export", "neft", "--to", "new")
    for argv in asked:
        assert neft(ws, *argv) == ((2, [line]) if key else (0, []))


def test_another_device_makes_no_other_weights(ws, neft):
    edit(ws, ("threads: 1", "threads: 2"))
    assert neft(ws, "export", "neft", "--to", "new") == (0, [])


@pytest.mark.integration
def test_champions_follow_each_other_and_come_back(ws, neft, monkeypatch):
    name = "tiny2-en-fr"
    with pytest.raises(NeftError, match=r"has no champion in MLflow at sqlite:///"):
        registry.rollback(ws, name)
    answer(ws, "lora", 6)
    answer(ws, "full", 8)
    commit(ws)
    text = ws.root / "other.txt"
    text.write_text("one two six ten\nsix ten one\n")
    allowed = ["--text", str(text), "--max-forgetting", "9", "--alpha", "0.2"]
    assert neft(ws, "promote", "lora", *allowed)[0] == 0
    assert aliases(ws, name) == {"challenger": "1", "champion": "1"}
    with open_store(ws) as store:
        gate = json.loads(store.client.get_model_version(name, "1").tags["neft.gate"])
    assert gate["forgetting"] == promotion._forgetting(ws, "lora", 1, Gate(text=text)) != 0
    # Worse than the champion: registered, refused, and told why.
    _, version, decision = registry.promote(ws, "neft", 2, name=None, gate=FREELY, merged=False)
    assert (version, decision.champion) == ("2", False)
    assert aliases(ws, name) == {"challenger": "2", "champion": "1"}
    with open_store(ws) as store:
        told = store.client.get_model_version(name, "2")
        assert told.tags["neft.decision"].startswith("refused: BLEU is +0.00 to the base's; BLEU ")
        assert json.loads(told.tags["neft.gate"])["comparisons"] == decision.comparisons
        assert told.description.startswith("Run neft, seed 2.\n\n| against | BLEU |")
        run = store.client.get_run(told.run_id)
        assert run.data.tags["neft.run"] == "neft"
        assert run.data.tags["neft.seed"] == "2"
        before = len(store.client.search_runs([store.experiment]))
    assert neft(ws, "promote", "neft", "--seed", "2", "--max-forgetting", "none")[0] == 3

    easy = Gate(alpha=0.9, max_forgetting=None)
    assert registry.promote(ws, "full", None, name=None, gate=easy, merged=False)[1] == "3"
    assert aliases(ws, name) == {"challenger": "3", "champion": "3"}
    # Again: nothing is registered twice, and a champion doesn't take over from itself.
    assert registry.promote(ws, "full", None, name=None, gate=easy, merged=False)[1] == "3"
    assert neft(ws, "rollback")[0] == 0
    assert aliases(ws, name)["champion"] == "1"
    with open_store(ws) as store:
        assert store.client.get_model_version(name, "3").tags["neft.rolled_back_to"] == "1"
        assert len(store.client.search_runs([store.experiment])) == before
    with pytest.raises(NeftError, match="version 1 took over from nobody"):
        registry.rollback(ws, name)

    # Another workspace's promotion comes first: what was compared is no champion any more.
    decide = promotion.decide

    def other(version):
        with open_store(ws) as store:
            store.client.set_registered_model_alias(name, "champion", version)

    def overtaken(*asked):
        other("2")
        return decide(*asked)

    monkeypatch.setattr(promotion, "decide", overtaken)
    line = f"{name}: version {{}} became champion meanwhile; promote again"
    with pytest.raises(NeftError, match=line.format(2)):
        registry.promote(ws, "full", None, name=None, gate=easy, merged=True)
    assert aliases(ws, name) == {"challenger": "3", "champion": "2"}
    with open_store(ws) as store:
        assert len(store.client.search_model_versions(f"name = '{name}'")) == 3
    monkeypatch.setattr(promotion, "decide", decide)

    # Or while the files are sent.
    send = MlflowClient.log_model_artifacts

    def sent(*asked):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "600"
        other("1")
        return send(*asked)

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", sent)
    with pytest.raises(NeftError, match=line.format(1)):
        registry.promote(ws, "full", None, name=None, gate=easy, merged=True)
    assert aliases(ws, name) == {"challenger": "3", "champion": "1"}
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
    with open_store(ws) as store:
        assert "neft.decision" not in store.client.get_model_version(name, "4").tags

    def deleted(*asked):
        with open_store(ws) as store:
            store.client.delete_registered_model_alias(name, "champion")
        return decide(*asked)

    monkeypatch.setattr(promotion, "decide", deleted)
    with pytest.raises(NeftError, match=f"{name}: lost its champion meanwhile; promote again"):
        registry.promote(ws, "full", None, name=None, gate=easy, merged=True)


def said_to(request: urllib.request.Request):
    """A server's answer; None where it doesn't listen yet."""
    try:
        with urllib.request.urlopen(request, timeout=180) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as fault:
        raise RuntimeError(fault.read()) from fault
    except OSError:
        return None


@pytest.mark.integration
@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_a_registered_model_answers_as_the_evaluation_did(ws, merged, tmp_path, monkeypatch):
    import mlflow
    import pandas

    gate = Gate(max_forgetting=None)
    name, version, _ = registry.promote(ws, "neft", 2, name="mine", gate=gate, merged=merged)
    rows = read_rows(ws.path("evaluation", "neft", "seed-2.jsonl"))
    asked = pandas.DataFrame([{"source": row["source"]} for row in rows])
    with open_store(ws) as store:
        store.client.set_registered_model_alias(name, "champion", version)
    mlflow.set_tracking_uri(f"sqlite:///{ws.root}/mlflow.db")
    loaded = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    assert loaded.predict(asked) == [row["hypothesis"] for row in rows]
    (place,) = (ws.root / "mlruns").rglob("MLmodel")
    kept = sorted(path.name for path in place.parent.rglob("*") if path.is_file())
    assert not [n for n in kept if n.endswith((".pkl", ".bin", ".pt", ".pickle"))]
    weights = [n for n in kept if n.endswith(".safetensors")]
    assert weights == (["model.safetensors"] if merged else ["adapter_model.safetensors"])
    facts = json.loads((place.parent / "artifacts/model/neft.json").read_text())
    assert facts["base"]["hash"] == json.loads(ws.path("base/base.json").read_text())["hash"]

    # The base of another hash is refused; the merged form needs none.
    weight = ws.path("base", "model.safetensors")
    right = weight.read_bytes()
    shutil.copy(ws.path("warmup", "en-fr", "model.safetensors"), weight)
    if not merged:
        with pytest.raises(NeftError, match="the adapter was trained on"):
            mlflow.pyfunc.load_model(f"models:/{name}@champion")
        weight.write_bytes(right)
    port = free_port()
    env = environment(tmp_path, MLFLOW_TRACKING_URI=f"sqlite:///{ws.root}/mlflow.db")
    serve = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{name}@champion"]
    with subprocess.Popen(
        [*serve, "--env-manager", "local", "--port", str(port)], env=env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ) as server:  # fmt: skip
        try:
            body = {"dataframe_records": asked.to_dict("records"), "params": {"max_new_tokens": 6}}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            said = until(lambda: server.poll() is None and said_to(request))
            assert said == {"predictions": [row["hypothesis"] for row in rows]}
        finally:
            os.killpg(server.pid, signal.SIGTERM)
    if not merged:  # and in batches
        asked.to_csv(tmp_path / "in.csv", index=False)
        batch = ["-t", "csv", "-i", str(tmp_path / "in.csv"), "-o", str(tmp_path / "out.json")]
        line = [*serve[:4], "predict", *serve[5:], "--env-manager", "local", *batch]
        subprocess.run(line, env=env, check=True, capture_output=True)
        said = json.loads((tmp_path / "out.json").read_text())
        assert said == {"predictions": [row["hypothesis"] for row in rows]}
