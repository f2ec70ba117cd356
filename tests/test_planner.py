"""`neft plan`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import edit, tiny_workspace
from test_fit import with_scores

from neft_core import capacity, config, fit, plan_report, planner
from neft_core.capacity import Rates
from neft_core.config import load_params
from neft_core.forecast import Training
from neft_core.patterns import Patterns
from neft_core.planner import Planner, size
from neft_core.simulation import Batch
from neft_core.tracker import Work
from neft_core.warmups import Warmup

ROOT = Path(__file__).resolve().parents[1]

LLAMA_2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
QWEN3_06B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": True,
}  # fmt: skip


def config_file(folder, sizes):
    path = folder / "config.json"
    path.write_text(json.dumps(sizes))
    return path


@pytest.mark.usefixtures("few_ways")
def test_the_plan_of_the_demo_names_every_method_and_stage(tmp_path, neft, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ws = tiny_workspace(tmp_path / "w")
    monkeypatch.chdir(ws.root)
    from neft_core import cli

    capsys.readouterr()
    assert cli.main(["plan", "--json", "--set", "runs.neft.method.percent=5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "percent: 9" in ws.params_file.read_text()
    assert found["model"]["autocast"] is None
    methods = {entry["method"]: entry for entry in found["methods"]}
    assert {name: entry["runs"] for name, entry in methods.items()} == {
        "full": ["full"], "lora": ["lora"], "neft": ["neft"], "in_out": [], "embed": [],
    }  # fmt: skip
    assert methods["full"]["parameters"] == found["model"]["parameters"]
    assert 4 < methods["neft"]["percent"] <= 5
    assert methods["neft"]["selected_neurons"] * 16 == methods["neft"]["parameters"]
    names = [stage["stage"] for stage in found["stages"]]
    assert names == [
        "base", "warmup en-fr", "score en-fr", "train full", "train lora", "train neft",
        "baseline en-fr", "evaluate full", "evaluate lora", "evaluate neft",
    ]  # fmt: skip
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert stages["train neft"]["kept"] == 2 * methods["neft"]["adapter"]
    assert found["disk"]["kept"] == sum(stage["kept"] for stage in found["stages"])
    text = plan_report.text(found)
    for entry in ("neft percent=5", "(in_out)", "warmup en-fr", "meanwhile", "< "):
        assert entry in text
    ways = [(e["modules"], e["states"], e["update"], e["chosen"]) for e in found["warmups"]]
    assert ways[0] == ("all", "fp32", "after_backward", True)
    assert len(set(ways)) == len(planner.WARMUPS)
    assert "(candidates 8bit in_backward)" in text
    for entry in (*found["methods"], *found["warmups"], *stages.values()):
        assert max(entry["bytes"].values()) <= 2 * entry["bytes"]["peak"]
    # What a report says where the GPU is another machine's.
    found["model"]["device"], found["available"]["gpu_memory"] = "cuda", None
    assert "no GPU here" in plan_report.text(found)


def test_warmups_that_params_cant_say_are_not_named():
    of = Training("full", Batch(4, 8, trained=20), accumulation=3, warmup=Warmup())
    others = list(planner.other_warmups(of))
    assert len(others) == len(planner.WARMUPS) - 1
    for keys, other in others:
        section = {"steps": 1, "lr": 1e-3, "batch_size": 4, "accumulation": 3} | keys
        checked = config.Warmup(**section).model_dump(include={*Warmup.__annotations__})
        assert Warmup(**checked) == other.warmup
        # The rows of a step stay the same.
        assert other.accumulation * other.batch.rows == 12
        assert other.accumulation * other.batch.labels == 60
    patterns = replace(of, layout=Patterns(rows=("mlp.up_proj",), columns=()))
    assert not any("layout" in keys for keys, _ in planner.other_warmups(patterns))
    from_candidates = replace(of, warmup=Warmup("candidates", "mlp"))
    keys, exact = next(planner.other_warmups(from_candidates))
    assert (keys, exact.warmup) == ({"modules": "all", "layout": None}, Warmup())
    assert fit.said("warmup", keys) == "warmup: {modules: all, layout: null}"
    assert fit.said("warmup", {"gradient_checkpointing": True}) == (
        "warmup.gradient_checkpointing: true"
    )


def test_prepared_rows_count_where_there_are_some(finished):
    from neft_core.encoding import load_encoded

    arrays, _ = load_encoded(finished.path("prepared", "en-fr", "train.safetensors"))
    lengths = arrays["offsets"][1:] - arrays["offsets"][:-1]
    known = Planner(finished.params(), finished.root, finished).rows("en-fr")
    assert known.train == len(lengths)
    assert known.longest == max(lengths) < 160
    assert known.batch(8).labels <= 8 * max(lengths)
    unknown = Planner(finished.params(), finished.root).rows("en-fr")
    assert (unknown.train, unknown.longest, unknown.typical) == (None, 160, None)
    assert unknown.batch(8).labels == 8 * 159


def test_adapters_have_the_size_that_was_forecast(finished):
    from neft_core.methods import METHODS

    planned = Planner(finished.params(), finished.root, finished)
    for run in ("full", "lora", "neft"):
        file = finished.path("train", run, "seed-1", METHODS[run].file)
        # Beside the tensors a header of names.
        adapter = planned.need(planned.training("train", run)).kept
        assert adapter < file.stat().st_size < adapter + 8192
    steps = {run: planned.steps("train", run) for run in ("full", "neft")}
    metrics = json.loads(finished.path("train", "full", "seed-1", "metrics.json").read_text())
    assert steps == {"full": metrics["steps"], "neft": 2 * metrics["steps"]}


@pytest.mark.parametrize(
    ("example", "sizes", "parameters", "neurons"),
    [
        ("llama-2-7b-news-commentary", LLAMA_2_7B, 6_738_415_616, 150_000),
        ("qwen3-0.6b-news-commentary", QWEN3_06B, 596_049_920, 52_387),
    ],
)
def test_an_example_is_planned_from_a_config_alone(example, sizes, parameters, neurons, tmp_path):
    params = load_params(ROOT / "examples" / example / "params.yaml")
    planned = Planner(params, tmp_path, config_file=config_file(tmp_path, sizes))
    assert planned.subject.parameters == parameters
    need = planned.need(planned.training("train", "neft"))
    assert need.selected == neurons
    trained = need.step.parameters
    assert (trained, need.step.trained) == (neurons * sizes["hidden_size"], 4 * trained)
    assert need.step.states == 2 * 4 * trained + 4 * 2 * sizes["num_hidden_layers"]


def test_the_example_with_a_local_model_is_planned(shared, tmp_path):
    model = shared / "models" / "tatoeba-llama-2.5m"
    if not model.is_dir():
        pytest.skip("no model there")
    (tmp_path / "base").symlink_to(model)
    params = load_params(ROOT / "examples/tatoeba-en-fr/params.yaml")
    planned = Planner(params, tmp_path)
    assert planned.subject.parameters == 2_539_200
    # The example's own arithmetic.
    assert planned.need(planned.training("train", "neft")).selected == 1_190


def test_a_model_that_is_not_here_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    from neft_core import cli

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for example, line in (
        ("qwen3-0.6b-news-commentary", "neft: model 'Qwen/Qwen3-0.6B-Base': no config.json (the "
         "Hub can't be reached and the local cache lacks it); give the file with --config FILE"),
        ("tatoeba-en-fr", f"neft: {ROOT}/examples/tatoeba-en-fr/base: no such directory; give a "
         "model's directory, or its config.json with --config FILE"),
    ):  # fmt: skip
        file = ROOT / "examples" / example / "params.yaml"
        assert cli.main(["plan", "--params", str(file)]) == 2
        assert capsys.readouterr().err.splitlines() == [line]
    lost = tmp_path / "params.yaml"
    lost.write_text(file.read_text().replace("  path: base\n", "  path: ~nobody-here/x\n"))
    assert cli.main(["plan", "--params", str(lost)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"neft: {tmp_path}/~nobody-here/x: no such directory; give a model's")
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"model_type": "nothing"}')
    assert cli.main(["plan", "--params", str(file), "--config", str(wrong)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"neft: {wrong}: not a model's configuration (")
    wrong.write_text('{"model_type": "llama", "kind": "built", "parameters": 9088}')
    assert cli.main(["plan", "--params", str(file), "--config", str(wrong)]) == 2
    assert capsys.readouterr().err == (
        f"neft: {wrong}: not a model's configuration (no sizes); give a config.json\n"
    )


def test_a_budget_that_the_model_has_not_is_refused_by_its_key(copied, neft):
    edit(copied, ("percent: 9", "percent: 99"))
    code, said = neft(copied, "plan")
    assert (code, said[0][:52]) == (2, "neft: params.yaml: runs.neft.method.percent: got 99;")


@pytest.mark.usefixtures("few_ways")
def test_the_plan_has_scores_and_further_warmups(copied):
    planned = Planner(with_scores(copied).params(), copied.root, copied)
    found = plan_report.report(planned, Rates(1e9, 1e9, 1e-6))
    stages = {stage["stage"]: stage for stage in found["stages"]}
    for name in (
        "warmup early",
        "scores grad",
        "scores probe",
        "activations act",
        "baseline en-fr",
    ):
        assert stages[name]["seconds"] > 0
        assert stages[name]["bytes"]["peak"] > stages[name]["bytes"].get("weights", 0)
    assert stages["activations act"]["bytes"]["weights"] == (
        2 * stages["scores grad"]["bytes"]["weights"]
    )
    assert found["processes"] == 1
    assert "processes" not in plan_report.text(found)


@pytest.mark.usefixtures("few_ways")
def test_the_plan_says_where_starts_are_not_checked(copied):
    edit(copied, ("threads: 1}", "threads: 1, accelerate_config: mine.yaml}"))
    (copied.root / "mine.yaml").write_text("{distributed_type: FSDP, num_processes: 3}")
    planned = Planner(copied.params(), copied.root, copied)
    found = plan_report.report(planned, None)
    assert {entry["fits"] for entry in found["methods"]} == {None}
    assert (
        "compute.accelerate_config has distributed_type FSDP, which may divide what a process "
        "holds: told of one process; starts unchecked"
    ) in plan_report.text(found).splitlines()
    found["processes"] = 3
    assert "3 processes; told of one" in plan_report.text(found).splitlines()


def test_rates_add_up_or_overlap():
    work = Work(flops=100, moved=50, calls=10)
    assert Rates(10, 10, 1).seconds(work) == 10 + 5 + 10
    assert Rates(10, 10, 2, overlap=True).seconds(work) == 20
    assert Rates(10, 10, 1).slower(2).seconds(work) == 50


def test_what_the_machine_has_is_measured(tmp_path):
    assert 0 < capacity.free_memory() < 2**50
    assert capacity.free_disk(tmp_path / "not" / "yet") > 0


def test_a_real_layer_corrects_the_rates(tmp_path):
    ws = tiny_workspace(tmp_path / "w")
    planned = Planner(ws.params(), ws.root)
    rates = planned.rates(layer=True)
    assert rates.flops > 0
    assert rates.moved > 0


@pytest.mark.parametrize(
    ("amount", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (107.8e9, "107.8 GB"),
     (2e15, "2000.0 TB")],
)  # fmt: skip
def test_sizes_are_said_in_words(amount, words):
    assert size(amount) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "?"), (0.25, "250 ms"), (90, "90.0 s"), (600, "10.0 min"), (9000, "2.5 h"),
     (432_000, "5.0 days")],
)  # fmt: skip
def test_times_are_said_in_words(seconds, words):
    assert plan_report.duration(seconds) == words
    if seconds:
        assert plan_report.duration(seconds, at_most=True) == f"< {words}"
