"""What a start refuses, and what it says would fit."""

from dataclasses import replace

import pytest
from conftest import edit, tiny_workspace

from neft_core import config, fit, forecast, passes, planner, pretraining
from neft_core.encoding import load_encoded
from neft_core.errors import NeftError
from neft_core.fit import check, refusals
from neft_core.planner import SHORT, Planner, size
from neft_core.simulation import Batch


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


def test_of_stages_that_one_key_sets_the_neediest_is_told(copied, room):
    planned = Planner(copied.params(), copied.root, copied)
    stages = [("evaluate", "neft"), ("baseline", "en-fr")]
    peaks = [passes.ask(planned, *stage).peak for stage in stages]
    assert peaks[0] > peaks[1]
    room(memory=1000)
    for order in (stages, stages[::-1]):
        with pytest.raises(NeftError) as refused:
            check(copied, order)
        (line,) = str(refused.value).splitlines()
        assert f": evaluate neft needs {size(peaks[0] * 1.05)} " in line


def test_no_batch_is_forecast_with_more_rows_than_there_are(copied):
    planned = Planner(with_scores(copied).params(), copied.root, copied)
    test = len(load_encoded(copied.path("prepared", "en-fr") / "test.safetensors")[0]["prompts"])
    found = [
        passes.ask(planned, stage, item, 10**6).rows
        for stage, item in (("evaluate", "neft"), ("scores", "grad"), ("activations", "act"))
    ]
    assert found == [test, 12, 4]


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
