"""Runs of every policy: selected, trained, evaluated."""

import collections
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import edit, run_stages
from kinds import references, seed_rows
from test_probing import ridge_by_hand
from test_scoring import chosen, highest, mask_of, scores_of

from neft_core import loading, runs
from neft_core.rows import LABELS, read_rows
from neft_core.stages import STAGES
from neft_core.workspace import Workspace

SCORES = """\
warmups:
  early: {task: en-fr, steps: 1}
scores:
  grad: {criterion: gradient, task: en-fr, rows: 12}
  probed: {criterion: probe, task: nli-en}
activations:
  act: {task: en-fr, warmup: early, rows: 4}
"""
POLICIES = {
    "union": "en-fr, policy: union, percent: 4, scores: [en-fr, sum]",
    "magnitude": "en-fr, policy: magnitude, percent: 6",
    "gradient": "en-fr, policy: gradient, percent: 6, scores: grad",
    "activation": "en-fr, policy: activation, percent: 6, scores: act",
    "random": "en-fr, policy: random, percent: 6, seed: 3",
    "even": "en-fr, percent: 6, per_module: true",
    "trans": "en-fr, percent: 6, scores: sum",
    "early": "en-fr, percent: 6, scores: early",
    "probe": "nli-en, policy: probe, percent: 6, scores: probed",
}


@pytest.fixture(scope="module")
def selected(kinds, tmp_path_factory):
    """The workspace with a run of each policy, trained and evaluated."""
    other = Workspace(shutil.copytree(kinds.root, tmp_path_factory.mktemp("selected") / "ws"))
    entries = ""
    for name, words in POLICIES.items():
        task, _, method = words.partition(", ")
        entries += f"  {name}: {{task: {task}, method: {{name: neft, {method}}}}}\n"
    edit(other, ("runs:\n", f"{SCORES}runs:\n{entries}"))
    run_stages(other, "warmups", "similarity", "scores", "activations", "assign")
    for stage in ("select", "train", "evaluate"):
        for name in POLICIES:
            STAGES[stage](other, name)
    return other


def test_every_policy_selects_by_its_scores(selected):
    own, other, early = (scores_of(selected, name) for name in ("en-fr", "sum", "early"))

    def most(scores, percent: float, values=None):
        count = int(percent * scores.total_parameters / 100 / 16)
        return highest(scores.sensitivity if values is None else values, count)

    expected = {
        "union": most(own, 4) | most(other, 4),
        "magnitude": most(own, 6, own.magnitude),
        "trans": most(other, 6),
        "early": most(early, 6),
    }
    for run, scores in (("gradient", "grad"), ("activation", "act"), ("probe", "probed")):
        expected[run] = most(scores_of(selected, scores), 6)
    found = {name: chosen(mask_of(selected, name)) for name in POLICIES}
    drawn, even = found.pop("random"), found.pop("even")
    assert found == expected
    assert len(drawn) == len(even) == len(most(own, 6))
    counts = collections.Counter(module for module, _ in even)
    assert set(counts) == set(own.groups)
    assert max(counts.values()) - min(counts.values()) <= 1
    # Nine ways to select, and only what is the same by its definition is the same.
    sets = [frozenset(mask) for mask in (*found.values(), drawn, even)]
    assert len(set(sets)) == len(sets)


@pytest.mark.parametrize("run", POLICIES)
def test_every_policy_trains_its_neurons_and_nothing_else(selected, run):
    mask = chosen(mask_of(selected, run))
    before = loading.load_base(selected)
    after = runs.load_trained(selected, run, 1)[0].merge_and_unload()
    moved = set()
    for name, weight in after.named_parameters():
        different = weight != before.get_parameter(name)
        module, _, _ = name.rpartition(".")
        if "up_proj" in name or "down_proj" in name:
            neurons = different.any(1 if "up_proj" in name else 0)  # rows, or columns
            moved |= {(module, place) for place in neurons.nonzero().flatten().tolist()}
        else:
            assert not different.any(), name
    assert moved == mask
    scores = json.loads(selected.path("evaluation", run, "metrics.json").read_text())["seeds"]["1"]
    task = selected.params().runs[run].task
    needed = {"accuracy"} if task == "nli-en" else {"bleu", "chrf"}
    assert all(math.isfinite(scores[metric]) for metric in needed)
    assert len(seed_rows(selected, run)) == len(references(selected, task))


def test_a_probe_of_nli_tells_its_labels_apart(selected):
    """By ridge regression on the states of the corpus's own texts, one at a time."""
    model, (_, tokenizer) = loading.load_base(selected), loading.base_card(selected)
    rows = read_rows(selected.path("corpus", "nli-en", "train.jsonl"))
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _given, out: seen.append(out))
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for row in rows:
        text = f"Premise: {row['premise']}\nHypothesis: {row['hypothesis']}\nLabel:"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            model(torch.tensor([begin + ids]))
    scores = scores_of(selected, "probed").sensitivity
    for layer in (0, 1):
        states = torch.cat([state.mean(1) for state in seen[layer::2]]).double().numpy()
        space = ridge_by_hand(states, [row["label"] for row in rows], 1.0)
        assert len(space) == len(LABELS)
        space /= np.linalg.norm(space, axis=1, keepdims=True)
        for name, axis in (("up_proj", 0), ("down_proj", 1)):
            module = f"model.layers.{layer}.mlp.{name}"
            weight = model.get_parameter(f"{module}.weight").detach().double().numpy()
            neurons = weight.T if axis else weight
            cosines = neurons @ space.T / np.linalg.norm(neurons, axis=1, keepdims=True)
            wanted = torch.tensor(np.abs(cosines).max(1))
            torch.testing.assert_close(scores[module], wanted, rtol=1e-4, atol=1e-6)
