"""Policies through the stages: from entries of params.yaml to masks, and what DVC re-runs."""

import json
import re
import shutil

import pytest
import torch
from conftest import edit, run_stages

from neft_core.errors import NeftError
from neft_core.gradients import gradient_scores
from neft_core.graph import Graph
from neft_core.groups import Group
from neft_core.loading import base_card, load_as_base
from neft_core.masks import NeuronMask, NeuronScores
from neft_core.scoring import _save, score
from neft_core.similarity import score_neurons
from neft_core.workspace import Workspace

SECTIONS = """\
warmups:
  early: {task: en-fr, steps: 2}
scores:
  grad: {criterion: gradient, task: en-fr, rows: 12, batch_size: 4}
activations:
  act: {task: en-fr, warmup: early, rows: 4}
"""

RUNS = {
    "joined": "parts: [{policy: lowest, percent: 3}, {policy: reversed, percent: 4}]",
    "both": "policy: union, percent: 6, scores: [en-fr, early]",
    "early": "policy: lowest, percent: 6, scores: early",
    "threshold": "policy: threshold, below_scaled: 0.5",
    "magnitude": "policy: magnitude, percent: 6, scores: early",
    "gradient": "policy: gradient, percent: 6, scores: grad",
    "activation": "policy: activation, percent: 6, scores: act",
    "mixed": "parts: [{percent: 3, scores: early}, {policy: gradient, neurons: 4, scores: grad}]",
}


def add(ws, sections: str, runs: dict[str, str]) -> None:
    """Put sections and runs of method neft into params.yaml."""
    entries = "".join(
        f"  {name}:\n    task: en-fr\n    method: {{name: neft, {method}}}\n"
        for name, method in runs.items()
    )
    edit(ws, ("runs:\n", f"{sections}runs:\n{entries}"))


@pytest.fixture(scope="module")
def scored(finished, tmp_path_factory):
    """The tiny workspace with more warm-ups, scores and runs, up to their masks."""
    ws = Workspace(shutil.copytree(finished.root, tmp_path_factory.mktemp("scored") / "w"))
    add(ws, SECTIONS, RUNS)
    run_stages(ws, "warmups", "similarity", "scores", "activations", "assign", "select")
    return ws


def scores_of(ws, name: str) -> NeuronScores:
    return NeuronScores.load(ws.path("scores", f"{name}.safetensors"))


def mask_of(ws, name: str) -> NeuronMask:
    return NeuronMask.load(ws.path("masks", f"{name}.safetensors"))


def chosen(mask: NeuronMask) -> set[tuple[str, int]]:
    return {(module, i) for module, rows in mask.indices.items() for i in rows.tolist()}


def highest(values: dict[str, torch.Tensor], count: int, sign: int = 1) -> set[tuple[str, int]]:
    flat = [
        (-sign * v, n, i) for n, m in enumerate(values) for i, v in enumerate(values[m].tolist())
    ]
    return {(list(values)[n], i) for _, n, i in sorted(flat)[:count]}


def budget(percent: float) -> int:
    """Neurons of 16 weights among 9,088 parameters."""
    return int(percent * 9088 / 100 / 16)


def test_every_policy_selects_what_its_scores_say(scored):
    own, early = (scores_of(scored, name) for name in ("en-fr", "early"))
    expected = {
        "early": highest(early.sensitivity, budget(6)),
        "magnitude": highest(early.magnitude, budget(6)),
        "gradient": highest(scores_of(scored, "grad").sensitivity, budget(6)),
        "activation": highest(scores_of(scored, "act").sensitivity, budget(6)),
        "joined": highest(own.sensitivity, budget(3)) | highest(own.sensitivity, budget(4), -1),
        "both": highest(own.sensitivity, budget(6)) | highest(early.sensitivity, budget(6)),
        "mixed": highest(early.sensitivity, budget(3))
        | highest(scores_of(scored, "grad").sensitivity, 4),
    }
    for name, want in expected.items():
        assert chosen(mask_of(scored, name)) == want, name
    flat = torch.cat(list(own.sensitivity.values()))
    scaled = (flat.max() - flat) / (flat.max() - flat.min())
    assert mask_of(scored, "threshold").neurons == int((scaled < 0.5).sum()) > 0


def test_scores_say_what_made_them(scored):
    assert scores_of(scored, "early").provenance["steps"] == "2"
    assert scores_of(scored, "en-fr").provenance["steps"] == "6"
    grad, act = (scores_of(scored, name).provenance for name in ("grad", "act"))
    assert (grad["criterion"], grad["rows"], grad["task"]) == ("gradient", "12", "en-fr")
    assert (act["criterion"], act["rows"], act["warmup"]) == ("activation", "4", "early")
    assert act["base"] == grad["base"] == scores_of(scored, "en-fr").provenance["base"]
    cost = json.loads(scored.path("cost", "score-grad.json").read_text())
    assert cost["seconds"] > 0 < cost["peak_bytes"]


def test_the_gradient_is_that_of_the_drawn_rows(scored):
    import numpy as np

    from neft_core.encoding import load_encoded
    from neft_core.steps import collate

    params = scored.params()
    card, tokenizer = base_card(scored)
    arrays, _ = load_encoded(scored.path("prepared", "en-fr", "train.safetensors"))
    rows = np.random.default_rng(1).permutation(len(arrays["offsets"]) - 1)[:12]
    model = load_as_base(scored, card, params)
    batch = collate(arrays, rows, tokenizer.pad_token_id)
    want = gradient_scores(model, [batch]).sensitivity
    for module, values in scores_of(scored, "grad").sensitivity.items():
        torch.testing.assert_close(values, want[module], rtol=1e-4, atol=1e-8)


def test_one_more_warm_up_is_scored_as_a_task_s_own(scored):
    found = score_neurons(scored.path("base"), scored.path("warmup", "early"))
    for module, values in scores_of(scored, "early").sensitivity.items():
        assert torch.equal(values, found.sensitivity[module])
        moved = scores_of(scored, "early").magnitude[module]
        assert torch.equal(moved, found.magnitude[module])
        assert (moved > 0).all()


def test_neurons_are_scored_on_the_device_that_params_name(scored, monkeypatch):
    """A GPU that torch only says it has: nothing can be computed there."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    compute = scored.params().compute.model_copy(update={"device": "cuda"})
    params = scored.params().model_copy(update={"compute": compute})
    monkeypatch.setattr(type(scored), "params", lambda _: params)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(NeftError, match=r"device: got 'cuda' \(.*(CUDA|NVIDIA)"):
        score(scored, "en-fr")


def test_a_probe_takes_few_answers_as_classes(finished, tmp_path, neft):
    """Targets of three words are classes; those of a translation are not."""
    from neft_core.rows import read_rows, write_rows

    ws = Workspace(shutil.copytree(finished.root, tmp_path / "w"))
    add(ws, "scores:\n  probed: {criterion: probe, task: en-fr, rows: 40}\n",
        {"probe": "policy: probe, percent: 6, scores: probed"})  # fmt: skip
    code, lines = neft(ws, "stage", "scores", "probed")
    assert code == 2
    assert re.search(
        r"probe: \d+ classes in 40 rows, and only one row of '.*'; a task that sorts", lines[0]
    )
    words, corpus = ("yes", "no", "perhaps"), ws.path("corpus", "en-fr", "train.jsonl")
    rows = read_rows(corpus)
    write_rows(corpus, [row | {"target": words[n % 3]} for n, row in enumerate(rows)])
    run_stages(ws, "prepare", "scores", "assign", "select")
    found = scores_of(ws, "probed")
    assert found.criterion == "probe"
    assert chosen(mask_of(ws, "probe")) == highest(found.sensitivity, budget(6))


@pytest.mark.integration
def test_new_entries_make_nothing_else_stale(scored, monkeypatch):
    """New scores and runs concern `assign`, the summary and themselves alone."""
    from dvc.repo import Repo

    ws = scored
    monkeypatch.chdir(ws.root)
    for name in RUNS:  # as if they were trained
        for folder in ("train", "evaluation"):
            ws.path(folder, name).mkdir()
            ws.path(folder, name, "made").touch()
        ws.path("cost", f"{name}.json").write_text("{}")
    with Repo(".") as repo:
        repo.commit(force=True)
    graph = Graph(ws)
    assert not [stage.name for stage in graph.stages if graph.changes(stage.name)]
    before = ws.params_file.read_text()
    try:
        edit(ws, ("warmups:\n", "warmups:\n  late: {task: en-fr, steps: 9}\n"),
             ("runs:\n", "runs:\n  late:\n    task: en-fr\n    method: {name: neft, percent: 6, "
              "scores: late}\n"))  # fmt: skip
        graph = Graph(ws)
        stale = {stage.name for stage in graph.stages if graph.changes(stage.name)}
        own = {
            f"{family}@late" for family in ("warmups", "similarity", "select", "train", "evaluate")
        }
        assert stale == own | {"assign", "summary", "report"}
        upstream = {stage.name: set(stage.upstream) for stage in graph.stages}
        assert upstream["select@late"] == {"similarity@late"}
        assert upstream["select@both"] == {"score@en-fr", "similarity@early"}
        assert upstream["select@mixed"] == {"scores@grad", "similarity@early"}
        assert upstream["select@full"] == set()
        run_stages(ws, "assign")
        assigned = json.loads(ws.path("assigned.json").read_text())
        assert assigned["late"] == {"late": None}, "not made yet, which stops nobody else"
        assert assigned["full"] == {}
        assert set(assigned["both"]) == {"en-fr", "early"}
        fresh = Graph(ws)
        assert not [n for n in RUNS if fresh.changes(f"select@{n}")]
    finally:
        ws.params_file.write_text(before)
        run_stages(ws, "assign")


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("policy: threshold, below: -0.5",
         r"params.yaml: runs.bad.method.below: got -0.5, which selects no neuron; the sim"),
        ("policy: threshold, below_scaled: 2",
         r"params.yaml: runs.bad.method.below_scaled: got 2, which selects all 96 neurons; the"),
        ("percent: 90",
         r"params.yaml: runs.bad.method.percent: got 90; at most 16.9 with layout 'mlp'"),
        ("parts: [{percent: 3}, {policy: reversed, neurons: 97}]",
         r"params.yaml: runs.bad.method.parts.1.neurons: got 97; at most 96 with layout 'mlp'"),
    ],
)  # fmt: skip
def test_what_selects_nothing_or_too_much_is_told_in_one_line(scored, tmp_path, neft, method, line):
    ws = Workspace(shutil.copytree(scored.root, tmp_path / "w"))
    add(ws, "", {"bad": method})
    code, lines = neft(ws, "stage", "select", "bad")
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"neft: {line}")
    assert not ws.path("masks", "bad.safetensors").exists()
    assert chosen(mask_of(ws, "both")) == chosen(mask_of(scored, "both"))


def test_quantiles_of_more_neurons_than_torch_takes(scored, tmp_path):
    every = torch.arange((1 << 24) + 1, dtype=torch.float64).flip(0)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(every, 0.5)
    ws = Workspace(tmp_path)
    group = Group("up", 0, 0, len(every), 1)
    _save(ws, "score", "large", NeuronScores({"up": every}, {"up": group}, len(every)))
    found = json.loads(ws.path("scores", "large.json").read_text())["sensitivity_quantiles"]
    assert found == {f"{mark:g}": mark * 2**24 for mark in (0.0, 0.25, 0.5, 0.75, 0.91, 1.0)}
    for name in ("en-fr", "grad"):
        values = torch.cat(list(scores_of(scored, name).sensitivity.values()))
        told = json.loads(scored.path("scores", f"{name}.json").read_text())
        for mark, value in told["sensitivity_quantiles"].items():
            assert value == float(torch.quantile(values, float(mark)))


def test_an_empty_mask_where_any_size_is_an_answer(scored, tmp_path, neft):
    ws = Workspace(shutil.copytree(scored.root, tmp_path / "w"))
    add(ws, "", {"none": "policy: threshold, below: -0.5, any_size: true"})
    assert neft(ws, "stage", "select", "none")[0] == 0
    assert mask_of(ws, "none").neurons == 0


def test_a_union_of_scores_of_other_layouts_is_refused(scored, tmp_path, neft):
    ws = Workspace(shutil.copytree(scored.root, tmp_path / "w"))
    edit(ws, ("scoring: {layout: mlp}", "scoring: {layout: all}"))
    assert neft(ws, "stage", "similarity", "early")[0] == 0
    code, lines = neft(ws, "stage", "select", "both")
    assert code == 2
    assert len(lines) == 1
    assert "en-fr.safetensors: layout is mlp, that of " in lines[0]
    assert lines[0].endswith("early.safetensors is all; compare masks of one model and layout")
    assert chosen(mask_of(ws, "both")) == chosen(mask_of(scored, "both"))
