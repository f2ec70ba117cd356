"""Every family through scoring, selection and its mask, on checkpoints as they lie on disk."""

import json
import shutil

import pytest
import torch
from conftest import run_stages
from families import shapes_of, tiny_model
from safetensors.torch import save_file

from neft_core import checkpoints, models, neurons
from neft_core.errors import NeftError
from neft_core.groups import read_neurons
from neft_core.masks import NeuronMask
from neft_core.selection import select_neurons
from neft_core.similarity import score_neurons, sensitivity
from neft_core.workspace import Workspace

TYPES = sorted(neurons.FAMILIES)
MIXTURES = [name for name in TYPES if any(p.experts for p in neurons.FAMILIES[name].parts)]


def pair(model_type, tmp_path, *, together=False):
    """A base and a tuned model, and their directories; together: named as in memory."""
    models, places = [], []
    for seed, name in ((0, "base"), (1, "tuned")):
        model = tiny_model(model_type, seed=seed)
        folder = tmp_path / name
        model.save_pretrained(folder)
        if together:
            save_file(
                {name: p.detach().contiguous() for name, p in model.named_parameters()},
                folder / "model.safetensors",
                metadata={"format": "pt"},
            )
        models.append(model)
        places.append(folder)
    return models, places


@pytest.mark.parametrize("model_type", TYPES)
def test_scores_and_masks_of_every_layout(model_type, tmp_path):
    (base, tuned), places = pair(model_type, tmp_path)
    before, after = (dict(model.named_parameters()) for model in (base, tuned))
    total = sum(parameter.numel() for parameter in base.parameters())
    for layout in ("mlp", "attention", "all", "rows"):
        scores = score_neurons(*places, layout)
        assert scores.total_parameters == total
        for module, group in scores.groups.items():
            every = group.indices(torch.arange(group.count))
            want = sensitivity(
                *(read_neurons(of[group.parameter], every, group.axis, group.transposed)
                  for of in (before, after))
            )  # fmt: skip
            assert torch.equal(scores.sensitivity[module], want)
        mask = select_neurons(scores, percent=9)
        chosen = sum(
            read_neurons(
                before[mask.groups[m].parameter], rows, mask.axis[m], mask.groups[m].transposed
            ).numel()
            for m, rows in mask.indices.items()
        )
        longest = max(group.length for group in mask.groups.values())
        assert mask.parameters == chosen
        assert 0 <= 0.09 * total - chosen < longest
        assert all(mask.groups[m].holds(rows) for m, rows in mask.indices.items())
        mask.save(tmp_path / "m.safetensors")
        read = NeuronMask.load(tmp_path / "m.safetensors")
        read.check(shapes=checkpoints.shapes(places[0]))
        read.check(shapes=shapes_of(base))
        other = select_neurons(scores, "random", percent=9)
        assert (read | other).neurons + (read & other).neurons == read.neurons + other.neurons
        assert read.overlap(read) == 1
        most = 100 * sum(g.count * g.length for g in scores.groups.values()) / total
        with pytest.raises(NeftError, match=f"percent: got 100; at most .* layout '{layout}'"):
            select_neurons(scores, percent=100)
        whole = select_neurons(scores, percent=most)
        assert whole.neurons == sum(group.count for group in scores.groups.values())


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_apart_and_together_score_the_same(model_type, tmp_path):
    _, apart = pair(model_type, tmp_path / "apart")
    _, together = pair(model_type, tmp_path / "together", together=True)
    names = [set(checkpoints.shapes(places[0])) for places in (apart, together)]
    assert (names[0] == names[1]) == (model_type == "gpt_oss"), "the two forms differ on disk"
    for layout in ("mlp", "mlp+gate", "rows"):
        want = score_neurons(*apart, layout)
        for places in (together, (apart[0], together[1]), (together[0], apart[1])):
            got = score_neurons(*places, layout)
            assert got.groups == want.groups
            assert got.total_parameters == want.total_parameters
            assert all(torch.equal(got.sensitivity[m], s) for m, s in want.sensitivity.items())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_mixture_goes_through_every_stage(model_type, finished, tmp_path):
    ws = Workspace(shutil.copytree(finished.root, tmp_path / "w"))
    tokens = json.loads((ws.path("base") / "config.json").read_text())["vocab_size"]
    base = tiny_model(model_type, vocab_size=tokens, max_position_embeddings=64)
    (ws.root / "mixture").mkdir()
    models.save_checkpoint(base, ws.root / "mixture")
    for path in ws.path("base").glob("token*"):
        shutil.copy(path, ws.root / "mixture")
    text = ws.params_file.read_text()
    text = "model: {kind: local, path: mixture}\n" + text[text.index("tasks:") :]
    text = text.replace("layout: mlp", "layout: all").replace("max_tokens: 160", "max_tokens: 64")
    entry = "runs: {neft: {task: en-fr, method: {name: neft, share: 0.4}}}\n"
    ws.params_file.write_text(
        text[: text.index("runs:")] + entry + text[text.index("evaluation:") :]
    )
    run_stages(ws, "base", "prepare", "warmup", "score", "select", "train", "evaluate")
    metrics = json.loads(ws.path("train", "neft", "seed-1", "metrics.json").read_text())
    mask = NeuronMask.load(ws.path("masks", "neft.safetensors"))
    total = sum(parameter.numel() for parameter in base.parameters())
    assert any("experts.gate_up_proj" in module for module in mask.indices)
    assert mask.total_parameters == total
    assert metrics["trainable_parameters"] == mask.parameters
    assert metrics["unselected_weights_verified"] == total - mask.parameters
    tuned = checkpoints.shapes(ws.path("warmup", "en-fr"))
    assert tuned == checkpoints.shapes(ws.root / "mixture"), "experts lie as in the base"


def test_scores_by_patterns_of_a_model_outside_the_table(tmp_path):
    _, places = pair("llama", tmp_path)
    want = score_neurons(*places, "mlp")
    layout = neurons.Patterns(rows=("up_proj",), columns=("mlp.down_proj",))
    for place in places:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    got = score_neurons(*places, layout)
    assert all(torch.equal(got.sensitivity[m], s) for m, s in want.sensitivity.items())
    mask = select_neurons(got, neurons=5)
    assert mask.provenance["layout"] == '{"columns": ["mlp.down_proj"], "rows": ["up_proj"]}'
    mask.check(shapes=checkpoints.shapes(places[0]))
    with pytest.raises(NeftError, match="for others give the layout as patterns"):
        score_neurons(*places, "mlp")
