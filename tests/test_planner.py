"""`neft plan`, and what a start refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import edit, tiny_workspace

from neft_core import capacity, config, fit, forecast, passes, plan_report, planner, pretraining
from neft_core.capacity import Rates
from neft_core.config import load_params
from neft_core.errors import NeftError
from neft_core.fit import check, refusals
from neft_core.forecast import Training
from neft_core.patterns import Patterns
from neft_core.planner import SHORT, Planner, size
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


@pytest.fixture
def room(monkeypatch):
    """Say how much memory and disk there is."""

    def say(memory=10**15, disk=10**15, gpu=None, alternatives=False):
        if not alternatives:
            monkeypatch.setattr(fit, "exact", lambda *_: [])
            monkeypatch.setattr(fit, "cheaper", lambda *_: iter(()))
        monkeypatch.setattr(fit, "free_memory", lambda: memory)
        monkeypatch.setattr(fit, "free_disk", lambda folder: disk)
        for module in (fit, planner):
            monkeypatch.setattr(module, "free_gpu_memory", lambda: gpu)

    return say


@pytest.fixture
def few_ways(monkeypatch):
    """Three ways to warm up: each is a simulation of its own."""
    monkeypatch.setattr(planner, "WARMUPS", tuple(planner.WARMUPS[i] for i in (0, 3, 6)))


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
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"model_type": "nothing"}')
    assert cli.main(["plan", "--params", str(file), "--config", str(wrong)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"neft: {wrong}: not a model's configuration (")


def test_a_budget_that_the_model_has_not_is_refused_by_its_key(copied, neft):
    edit(copied, ("percent: 9", "percent: 99"))
    code, said = neft(copied, "plan")
    assert (code, said[0][:52]) == (2, "neft: params.yaml: runs.neft.method.percent: got 99;")


def test_a_model_that_looks_at_values_starts_unchecked(finished, room, monkeypatch, capsys):
    def odd(*_arguments, **_options):
        raise RuntimeError("data-dependent")

    room(memory=1000)
    monkeypatch.setattr(planner, "forecast", odd)
    check(finished, [("train", "neft")])
    assert capsys.readouterr().out == (
        "train neft: can't be forecast (RuntimeError); starts unchecked\n"
    )


def test_a_start_that_fits_goes_on(finished, room):
    room()
    check(finished, [("warmup", "en-fr"), ("train", "neft")])


def test_a_further_warmup_is_asked_for_by_its_own_name(copied, room):
    """Its task is another word than its name."""
    with copied.params_file.open("a") as handle:
        handle.write("warmups: {early: {task: en-fr, steps: 2}}\n")
    room()
    check(copied, [("warmup", "early")])
    room(memory=1000)
    with pytest.raises(NeftError, match=r"params\.yaml: warmup: needs .* of memory"):
        check(copied, [("warmup", "early")])


@pytest.mark.usefixtures("few_ways")
def test_a_warmup_without_memory_is_refused_with_what_would_fit(finished, room):
    need = Planner(finished.params(), finished.root, finished)
    exact = need.need(need.training("warmup", "en-fr")).peak
    room(memory=int(exact * 1.04), alternatives=True)
    with pytest.raises(NeftError) as refused:
        check(finished, [("warmup", "en-fr")])
    words = str(refused.value)
    longest = need.rows("en-fr").longest
    assert words.startswith(
        f"params.yaml: warmup: needs {size(exact * 1.05)} of memory with 8 rows of {longest} "
        f"tokens, {size(int(exact * 1.04))} available; would fit: "
        "warmup.gradient_checkpointing: true ("
    )
    assert words.endswith("(NEFT_CHECK_FIT=0 starts anyway)")
    assert "\n" not in words


@pytest.mark.usefixtures("few_ways")
def test_a_refused_warmup_names_the_cheaper_ones_with_their_need(finished, room):
    planned = Planner(finished.params(), finished.root, finished)
    chosen = planned.training("warmup", "en-fr")
    needs = {fit.said("warmup", k): planned.need(t).peak for k, t in planner.other_warmups(chosen)}
    # Room for one of them alone, whatever is recomputed.
    least = min(needs.values())
    (cheapest,) = (words for words, need in needs.items() if need == least)
    room(memory=int(least * 1.05) + 1, alternatives=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "exact", lambda _: [])
        (line,) = refusals(planned, "warmup", "en-fr")
    assert line.endswith(f"; would fit: {cheapest} ({size(least * 1.05)})")


def test_nothing_fits_then_the_least_is_named(finished, room):
    room(memory=1000, alternatives=True)
    with pytest.raises(NeftError, match="the least that was tried, ") as refused:
        check(finished, [("train", "full"), ("train", "neft")])
    first, second = str(refused.value).splitlines()
    assert first.startswith("params.yaml: runs.full: needs ")
    assert (
        "method neft at 9 % with training: {batch_size: 1, accumulation: 8, "
        "gradient_checkpointing: true}, needs "
    ) in first
    assert second.startswith("params.yaml: runs.neft: needs ")


def test_a_disk_that_is_too_small_is_refused(finished, room):
    room(disk=5000)
    with pytest.raises(
        NeftError, match=r"params.yaml: runs.lora: needs \d+.\d kB of disk, \d+.\d "
    ):
        check(finished, [("train", "lora")])


def test_before_rows_are_prepared_only_what_never_fits_is_refused(tmp_path, room):
    ws = tiny_workspace(tmp_path / "w")
    planned = Planner(ws.params(), ws.root)
    worst = planned.need(planned.training("train", "full")).peak
    room(memory=worst)
    check(ws, [("train", "full")], before=True)
    room(memory=1000)
    with pytest.raises(NeftError, match=r"of memory however short the rows, 1.0 kB"):
        check(ws, [("train", "full")], before=True)


def test_the_commands_refuse_with_2_and_a_variable_lets_them_go_on(copied, neft, room, monkeypatch):
    room(memory=1000)
    edit(copied, ("warmup: {steps: 6", "warmup: {steps: 5"))
    code, said = neft(copied, "stage", "warmup", "en-fr")
    assert code == 2
    assert said[0].startswith("neft: params.yaml: warmup: needs ")
    code, said = neft(copied, "run", "--force")
    assert code == 2
    assert [line.split(":")[2].strip() for line in said] == [
        "model", "warmup", "runs.full", "runs.lora", "runs.neft", "evaluation.batch_size",
    ]  # fmt: skip
    monkeypatch.setenv("NEFT_CHECK_FIT", "0")
    assert neft(copied, "stage", "warmup", "en-fr")[0] == 0


def test_a_gpu_is_asked_for_its_own_memory_and_for_main_memory(finished, room):
    params = finished.params()
    params = params.model_copy(
        update={"compute": params.compute.model_copy(update={"device": "cuda"})}
    )
    room(gpu=1000, memory=1000)
    planned = Planner(params, finished.root, finished)
    (line,) = refusals(planned, "train", "neft")
    assert " of GPU memory with 8 rows " in line
    room(gpu=10**12, memory=1000)
    (line,) = refusals(planned, "train", "neft")
    assert " of memory with 8 rows " in line
    room(gpu=None)
    assert list(refusals(planned, "train", "neft")) == []
    assert planned.rates() is None


SCORES = """\
warmups: {early: {task: en-fr, steps: 2}}
scores:
  grad: {criterion: gradient, task: en-fr, rows: 12, batch_size: 4}
  probe: {criterion: probe, task: en-fr, rows: 12, batch_size: 4}
activations: {act: {task: en-fr, warmup: early, rows: 4, batch_size: 4}}
"""


def with_scores(ws):
    with ws.params_file.open("a") as handle:
        handle.write(SCORES)
    return ws


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


@pytest.mark.parametrize(
    ("stage", "item", "key"),
    [
        ("evaluate", "neft", "evaluation.batch_size"),
        ("baseline", "en-fr", "evaluation.batch_size"),
        ("scores", "grad", "scores.grad.batch_size"),
        ("scores", "probe", "scores.probe.batch_size"),
        ("activations", "act", "activations.act.batch_size"),
    ],
)
def test_a_stage_that_trains_nothing_is_refused_with_rows_that_fit(copied, room, stage, item, key):
    planned = Planner(with_scores(copied).params(), copied.root, copied)
    four, two = (passes.ask(planned, stage, item, rows) for rows in (None, 2))
    assert (four.rows, two.rows, four.key) == (4, 2, key)
    have = int(two.peak * 1.05) + 1
    assert have < four.peak
    room(memory=have)
    with pytest.raises(NeftError) as refused:
        check(copied, [(stage, item)])
    assert str(refused.value) == (
        f"params.yaml: {key}: {stage} {item} needs {size(four.peak * 1.05)} of memory with 4 rows "
        f"of {four.tokens} tokens, {size(have)} available; would fit: {key}: 2 "
        f"({size(two.peak * 1.05)}) (NEFT_CHECK_FIT=0 starts anyway)"
    )
    room(memory=1000)
    with pytest.raises(NeftError, match=r"the least that was tried, .*1.*, needs "):
        check(copied, [(stage, item)])


def test_sums_of_gradients_can_have_less_memory(copied, room):
    planned = Planner(with_scores(copied).params(), copied.root, copied)
    *_, (words, least) = passes.smaller(
        planned, "scores", "grad", passes.ask(planned, "scores", "grad")
    )
    # One module of 24 neurons of 16 weights.
    assert words == "scores.grad: {batch_size: 1, memory: 1.54e-06}"
    room(memory=int(least.peak * 1.05) + 1)
    with pytest.raises(NeftError, match=r"would fit: scores.grad: \{batch_size: 1, memory: "):
        check(copied, [("scores", "grad")])


def test_a_built_base_is_refused_with_rows_that_fit(finished, room):
    planned = Planner(finished.params(), finished.root, finished)
    training = planned.training("base", "")
    assert training.batch == Batch(16, 160)
    # Texts have four words and the names of their languages, the tokenizer has to be made.
    tokens = fit._known_texts(planned, training.batch).tokens
    assert 10 < tokens < 60
    small = [replace(training, batch=Batch(rows, tokens)) for rows in (16, 4)]
    needs = [planned.need(one).peak for one in small]
    room(memory=int(needs[1] * 1.05) + 1)
    with pytest.raises(NeftError) as refused:
        check(finished, [("base", "")])
    assert str(refused.value).startswith(
        f"params.yaml: model: needs {size(needs[0] * 1.05)} of memory with 16 rows of {tokens} "
    )
    assert f"; would fit: model.pretraining.batch_size: 4 ({size(needs[1] * 1.05)})" in str(
        refused.value
    )
    room(memory=int(needs[0] * 1.05) + 1)
    check(finished, [("base", "")])
    # No batch holds more than there is; of texts that aren't there one, and short.
    most = fit._known_texts(planned, Batch(10**6, 160))
    assert 16 < most.rows == len(pretraining.all_texts(finished, finished.params())) < 1000
    before = Planner(finished.params(), finished.root, finished, least=True)
    assert fit._known_texts(before, Batch(10**6, 160)) == Batch(1, SHORT)
    params = finished.params()
    other = config.LocalModel(kind="local", path="base")
    assert not fit._holds(params.model_copy(update={"model": other}), "base", "")


def test_where_there_is_plenty_nothing_is_simulated(copied, room, monkeypatch):
    with_scores(copied)
    stages = [
        ("base", ""), ("evaluate", "neft"), ("baseline", "en-fr"), ("scores", "grad"),
        ("scores", "probe"), ("activations", "act"),
    ]  # fmt: skip
    planned = Planner(copied.params(), copied.root, copied)
    # No need comes near to what is plenty.
    for stage, item in stages[1:]:
        assert passes.most(planned, stage, item) > 2 * passes.ask(planned, stage, item).peak
    batch = planned.training("base", "").batch
    most = passes.bound(planned.subject, batch.rows, batch.tokens)
    assert most > 2 * planned.ask("base", "")[1].peak

    def simulated(*_arguments, **_options):
        raise NeftError("simulated")

    for name in ("forecast", "generation", "gradients", "states", "activations"):
        monkeypatch.setattr(forecast, name, simulated)
    monkeypatch.setattr(planner, "forecast", simulated)
    room()
    check(copied, stages)
    for entry in stages:
        room(memory=1000)
        with pytest.raises(NeftError, match="simulated"):
            check(copied, [entry])


def test_each_process_of_a_plain_configuration_needs_what_one_needs(copied, room):
    need = Planner(copied.params(), copied.root, copied).ask("train", "neft")[1]
    evaluation = passes.ask(Planner(copied.params(), copied.root, copied), "evaluate", "neft").peak
    file = copied.root / "mine.yaml"
    edit(copied, ("threads: 1}", "threads: 1, accelerate_config: mine.yaml}"))
    file.write_text("{distributed_type: MULTI_CPU, num_processes: 3, num_machines: 1}")
    for stage, item, each in (
        ("train", "neft", need.peak + need.step.gradients),
        ("evaluate", "neft", evaluation),
    ):
        room(memory=int(3 * each * 1.05) + 1)
        check(copied, [(stage, item)])
        room(memory=int(3 * each * 1.05) - 10)
        with pytest.raises(NeftError, match=f"needs {size(3 * each * 1.05)} of memory"):
            check(copied, [(stage, item)])
    # What may be divided isn't known; a base is made in one process all the same.
    file.write_text("{distributed_type: FSDP, num_processes: 3}")
    room(memory=1000)
    check(copied, [("train", "neft"), ("evaluate", "neft")])
    with pytest.raises(NeftError, match=r"params\.yaml: model: needs"):
        check(copied, [("base", "")])


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
