"""Stages `utilisation`, `forgetting`, `speed`, and a run whose mask holds nothing or everything."""

import json
import re

import pytest
import torch
from conftest import edit, run_stages

from neft_core import analyses, loading, runs
from neft_core.files import load_tensors, read_json
from neft_core.masks import NeuronMask

MEASURED = """\
utilisation:
  neft: {run: neft, task: en-fr, rows: 4}
forgetting:
  neft: {run: neft, path: text.txt, rows: 3}
speed:
  neft: {run: neft, task: en-fr, rows: 3, new_tokens: 4, repeats: 2}
evaluation:"""


@pytest.fixture
def measured(copied):
    (copied.root / "text.txt").write_text("the cat sees\n\n  a red dog\nfish\nnever read\n")
    edit(copied, ("evaluation:", MEASURED))
    return copied


def test_ranks_of_base_and_seeds(measured):
    run_stages(measured, "utilisation")
    path = measured.path("evaluation", "utilisation.neft.safetensors")
    ranks, metadata = load_tensors(path, "")
    assert list(ranks) == ["base", "seed-1", "seed-2"]
    for values in ranks.values():
        assert values.dtype == torch.int32
        assert sorted(values.tolist()) == list(range(96))
    said, _ = analyses.utilisation(
        measured, ["base", "neft"], task=None, count=4, seed=2, per_example=False
    )
    change = (ranks["seed-2"] - ranks["base"]).abs().double().mean()
    assert said["models"]["neft"]["average"] == pytest.approx(float(change))
    groups = [group["module"] for group in json.loads(metadata["groups"])]
    assert groups == list(NeuronMask.load(measured.path("masks", "neft.safetensors")).groups)
    first = path.read_bytes()
    run_stages(measured, "utilisation")
    assert path.read_bytes() == first


def test_what_was_trained_is_ranked_unrounded(copied):
    """With frozen weights in bf16, by values written into them by hand, in fp32."""
    from neft_core import utilisation
    from neft_core.measures import _states, load_plain, used_by
    from neft_core.tuner import neft_layers

    edit(copied, ("dtype: auto, mixed_precision: auto", "dtype: bfloat16, mixed_precision: 'no'"))
    plain = loading.load_base(copied)
    assert plain.dtype == torch.bfloat16
    base = {name: value.float() for name, value in plain.state_dict().items()}
    trained = runs.load_trained(copied, "neft", 2)[0].get_base_model()
    by_hand = loading.load_base(copied).float()
    for name, layer in neft_layers(trained).items():
        values, index = layer.neft_values["default"].detach(), layer.neft_indices["default"]
        weight = by_hand.get_submodule(name).weight.data
        weight.index_copy_(layer.axis, index, values if layer.axis == 0 else values.T)
        assert not torch.equal(weight.bfloat16().float(), weight), "there is something to round"
    for name, model in (("base", base), ("neft", by_hand.state_dict())):
        found = load_plain(copied, name, "en-fr", None if name == "base" else 2, exact=True)
        assert all(torch.equal(value, model[n]) for n, value in found.state_dict().items())
    full = load_tensors(copied.path("train", "full", "seed-1", "adapter.safetensors"), "")[0]
    found = dict(load_plain(copied, "full", "en-fr", 1, exact=True).named_parameters())
    assert all(torch.equal(value, found[name]) for name, value in full.items())
    tuned = load_plain(copied, "tuned", "en-fr", None, exact=True).state_dict()
    told = load_tensors(copied.path("warmup", "en-fr", "model.safetensors"), "")[0]
    assert all(torch.equal(value.float(), tuned[name]) for name, value in told.items())
    used = used_by(copied, "neft", "en-fr", 4, 2, False)
    wanted = utilisation.utilisation(by_hand, _states(copied, by_hand, "en-fr", 4), "mlp")
    assert all(torch.equal(wanted.pearson[name], value) for name, value in used.pearson.items())
    assert load_plain(copied, "neft", "en-fr", 2).dtype == torch.bfloat16, "as it is served"


def test_loss_before_and_after(measured):
    run_stages(measured, "forgetting")
    found = read_json(measured.path("evaluation", "forgetting.neft.json"))
    data, _ = analyses.forgetting(measured, ["neft"], text=measured.root / "text.txt", count=3)
    assert found["base"] == data["base"]
    assert list(found["seeds"].values()) == data["runs"]["neft"]["losses"]
    assert (found["run"], found["texts"]) == ("neft", 3)


def test_speed_of_each_form(measured):
    run_stages(measured, "speed")
    found = read_json(measured.path("cost", "speed.neft.json"))
    assert list(found["tokens_per_second"]) == ["adapter", "base", "merged"]
    for values in found["tokens_per_second"].values():
        assert len(values) == 2
        assert all(value > 0 for value in values)
    assert (found["prompts"], found["new_tokens"]) == (3, 4)


def test_speed_counts_tokens_that_nothing_ends(monkeypatch):
    """Every prompt gets all its tokens, also of a model that would end at once."""
    from conftest import tiny_llama

    from neft_core import evaluation

    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[2] = 100 * model.lm_head.weight.abs().amax()
    lengths = []
    plain = model.generate

    def watched(**options):
        output = plain(**options)
        lengths.append(output.shape[1] - options["input_ids"].shape[1])
        return output

    monkeypatch.setattr(model, "generate", watched)
    clock = iter(range(100))
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(clock))
    found = evaluation.tokens_per_second(
        {"a": model, "b": model}, [[1, 5], [1, 7, 9]], pad=0, new_tokens=6, repeats=2
    )
    assert lengths == [6] * 6
    # Each call takes a second of this clock: two prompts of six tokens.
    assert found == {"a": [12.0, 12.0], "b": [12.0, 12.0]}


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("run: neft, task: en-fr, rows: 4", "run: nef, task: en-fr", "did you mean 'neft'"),
        ("run: neft, task: en-fr, rows: 4", "run: neft, task: fr", "known: en-fr|did you mean"),
        ("rows: 3, new_tokens: 4", "rows: 0", "speed.neft.rows: got 0; at least 1"),
        (
            "{run: neft, task: en-fr, rows: 3",
            "{run: full, task: en-fr, rows: 3",
            "speed.neft.run: got 'full', whose method full has no adapter beside the base",
        ),
        ("new_tokens: 4", "new_tokens: 400", r"speed.neft.new_tokens: got 400; at most \d+, as"),
        ("path: text.txt", "path: no.txt", "no.txt: no such file; name an existing one"),
        (
            "path: text.txt",
            "path: data/none",
            "params.yaml: forgetting.neft.path: the base wasn't built from a generated corpus",
        ),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(measured, neft, old, new, line):
    edit(measured, (old, new))
    stage = "forgetting" if "path" in old else "speed"
    code, lines = neft(measured, "stage", stage, "neft")
    assert code == 2
    assert len(lines) == 1
    assert re.search(line, lines[0])


THRESHOLD = "method: {name: neft, policy: threshold, below: -1, any_size: true}"


@pytest.fixture
def nothing(copied):
    edit(copied, ("method: {name: neft, policy: lowest, percent: 9}", THRESHOLD))
    run_stages(copied, "assign", "select", "train", "evaluate", "summary", "report")
    return copied


def test_an_empty_selection_is_the_base_itself(nothing):
    result = read_json(nothing.path("train", "neft", "seed-2", "metrics.json"))
    assert "base's own results" in result["trained"]
    assert (result["trainable_parameters"], result["steps"], result["selected_neurons"]) == (
        0,
        0,
        0,
    )
    model, _ = runs.load_trained(nothing, "neft", 1)
    for name, value in loading.load_base(nothing).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    dev = nothing.path("train", "full", "seed-1", "dev.csv").read_text().splitlines()
    assert len(dev) > 1
    base = read_json(nothing.path("baseline", "en-fr", "metrics.json"))["base"]
    for seed in ("1", "2"):
        found = read_json(nothing.path("evaluation", "neft", "metrics.json"))["seeds"][seed]
        assert found == base
    table = nothing.path("summary", "summary.md").read_text()
    assert re.search(r"\| neft +\| neft, threshold below -1 +\| +0 \| +0.00 \|", table)


def test_the_loss_of_an_empty_selection_is_that_of_the_base(nothing):
    from neft_core.encoding import load_encoded

    arrays, _ = load_encoded(nothing.path("prepared", "en-fr", "dev.safetensors"))
    model = loading.load_base(nothing)
    total, count = 0.0, 0
    for row in range(len(arrays["offsets"]) - 1):
        first, last = arrays["offsets"][row : row + 2]
        ids = torch.from_numpy(arrays["tokens"][first:last].astype("int64"))
        with torch.no_grad():
            logits = torch.log_softmax(model(ids[None]).logits[0].double(), 1)
        for place in range(1, len(ids)):
            if arrays["trained"][first + place]:
                total -= float(logits[place - 1, ids[place]])
                count += 1
    result = read_json(nothing.path("train", "neft", "seed-1", "metrics.json"))
    assert result["best_dev_loss"] == pytest.approx(total / count, rel=1e-6)


def test_an_empty_selection_is_not_exported(nothing, neft, tmp_path):
    code, lines = neft(nothing, "export", "neft", "--to", str(tmp_path / "out"))
    assert code == 2
    assert lines == ["neft: run neft: its mask holds no neuron; export another, or use the base"]


def test_everything_can_be_selected(copied):
    edit(
        copied,
        ("method: {name: neft, policy: lowest, percent: 9}", THRESHOLD.replace("-1", "2")),
    )
    run_stages(copied, "assign", "select", "train", "evaluate")
    result = read_json(copied.path("train", "neft", "seed-1", "metrics.json"))
    assert result["selected_neurons"] == 96
    assert result["trainable_parameters"] == 96 * 16
    assert "trained" not in result


def test_an_empty_mask_is_refused_where_any_size_was_not_asked_for(nothing, neft):
    edit(nothing, (THRESHOLD, "method: {name: neft, policy: lowest, percent: 9}"))
    code, lines = neft(nothing, "stage", "train", "neft")
    assert code == 2
    assert lines[0].endswith("neft.safetensors: has no neurons; run 'neft stage select'")
