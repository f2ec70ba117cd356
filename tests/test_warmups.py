"""Cheaper warm-ups: the same bits where they claim it, resume, bounds, and what they leave."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from conftest import edit, run_stages, tiny_llama, tiny_rows
from safetensors.torch import load_file
from test_methods import tiny_gpt2

from neft_core.errors import NeftError
from neft_core.masks import NeuronScores
from neft_core.methods import trained_parameters
from neft_core.optimizers import InBackward
from neft_core.steps import Recipe
from neft_core.training import Trainer
from neft_core.warmups import MODULES, STATES, Warmup, describe, memory, shapes_of

RECIPE = Recipe(lr=1e-2, steps=6, batch_size=4, seed=3, checkpoint_every=2, weight_decay=0.1)
NO_CLIPPING = float("inf")
SCORED = [
    f"model.layers.{n}.mlp.{part}_proj.weight" for n in (0, 1) for part in ("gate", "up", "down")
]
WAYS = [
    *(Warmup(states=s, update=u) for s in STATES for u in ("after_backward", "in_backward")),
    Warmup("candidates", "mlp+gate", states="8bit", update="in_backward"),
    Warmup("lora", rank=2, states="factored"),
    Warmup("lora", rank=2, update="in_backward"),
]


def trainer_of(folder, way, recipe=RECIPE, model=None, kind="llama"):
    # Wide enough for states of 8 bits in the MLP and the embedding.
    model = model or tiny_llama(hidden_size=32, intermediate_size=144, vocab_size=160)
    torch.manual_seed(5)
    model = MODULES[way.modules].prepare(model, way, kind)
    return Trainer(
        model, trained_parameters(model), recipe, tiny_rows(20), None, pad=0, folder=folder,
        label="t", optimizer=STATES[way.states], in_backward=way.update == "in_backward",
    )  # fmt: skip


def dropping():
    """A GPT-2 with dropout."""
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return model


def warmed(folder, way, **options):
    trainer = trainer_of(folder, way, **options)
    course = trainer.run()
    return {k: v.detach().clone() for k, v in trainer.raw_model.named_parameters()}, course


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("limit", [0.05, NO_CLIPPING], ids=["two passes", "one pass"])
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("model", ["tied", "checkpointed", "dropout"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_in_backward_is_after_backward_bit_for_bit(tmp_path, model, states, limit):
    recipe = dataclasses.replace(
        RECIPE, max_grad_norm=limit, gradient_checkpointing=model == "checkpointed"
    )
    kind = "gpt2" if model == "dropout" else "llama"
    results = []
    for update in ("after_backward", "in_backward"):
        made = dropping() if kind == "gpt2" else None
        way = Warmup(states=states, update=update)
        results.append(warmed(tmp_path / update, way, recipe=recipe, model=made, kind=kind))
    (one, course), (two, other) = results
    assert same(one, two)
    assert course.train == other.train
    assert course.tokens == other.tokens
    if limit < NO_CLIPPING:
        assert max(row[4] for row in course.train) > limit, "something was clipped"


@pytest.mark.parametrize("way", WAYS, ids=describe)
def test_resumed_warmup_is_bit_identical(tmp_path, monkeypatch, way):
    whole, course = warmed(tmp_path / "whole", way)
    original = Trainer._step

    def dies(self, micro):
        if self.course.step == 3:
            raise KeyboardInterrupt
        return original(self, micro)

    monkeypatch.setattr(Trainer, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        warmed(tmp_path / "cut", way)
    monkeypatch.undo()
    torch.rand(5)
    resumed, second = warmed(tmp_path / "cut", way)
    assert same(whole, resumed)
    assert second.train == course.train


@pytest.mark.parametrize("way", WAYS, ids=describe)
def test_forecast_is_what_is_alive(tmp_path, way):
    """Bytes of gradients at every moment of the backward pass, and of states after it."""
    trainer = trainer_of(tmp_path, way)
    trained = list(trainer.trained.values())
    alive = []

    def count(*_):
        alive.append(sum(p.grad.nbytes for p in trained if p.grad is not None))

    # Parameters' hooks run in the order of registration: these see the gradient in hand too.
    for parameter in trained:
        hooks = parameter._post_accumulate_grad_hooks
        earlier = list(hooks.values()) if hooks else []
        if hooks:
            hooks.clear()
        for hook in [count, *earlier, count]:
            parameter.register_post_accumulate_grad_hook(hook)
    for _ in range(2):
        trainer._step([range(4)])
    states = sum(
        value.nbytes for p in trained for value in trainer.optimizer.state[p].values()
    )  # fmt: skip
    forecast = memory(shapes_of(trainer.raw_model), way)
    assert forecast["gradients"] == max(alive)
    assert forecast["states"] == states
    assert forecast["weights"] == sum(p.nbytes for p in trained)
    assert all(p.grad is None for p in trained)
    if way.update == "in_backward":
        assert max(alive) == max(p.nbytes for p in trained)
        assert 0 in alive


def test_forecast_by_hand():
    shapes = [(100, 50), (60,), (2, 30, 80)]
    exact = memory(shapes, Warmup())
    count = 5000 + 60 + 4800
    assert exact == {"weights": 4 * count, "gradients": 4 * count, "states": 8 * count + 3 * 4}
    small = memory(shapes, Warmup(states="8bit", update="in_backward"))
    assert small["states"] == 2 * 9800 + 2 * 4 * (100 + 60) + 8 * 60 + 3 * 4
    assert small["gradients"] == 4 * 5000
    factored = memory(shapes, Warmup(states="factored"))
    assert factored["states"] == 4 * (150 + 60 + 2 * 110) + 3 * 4


@pytest.mark.parametrize(("kind", "make"), [("llama", tiny_llama), ("gpt2", tiny_gpt2)])
def test_candidates_train_and_the_rest_keeps_its_bits(tmp_path, kind, make):
    way = Warmup("candidates", "mlp", states="8bit", update="in_backward")
    after, _ = warmed(tmp_path, way, model=make(), kind=kind)
    ends = {"llama": ("up_proj.weight", "down_proj.weight"),
            "gpt2": ("mlp.c_fc.weight", "mlp.c_proj.weight")}[kind]  # fmt: skip
    for name, before in make().named_parameters():
        assert torch.equal(after[name], before) != name.endswith(ends), name
    assert sum(name.endswith(ends) for name in after) == 4


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_merged_lora_is_pefts_merge_in_fp32(tmp_path, make):
    way = Warmup("lora", rank=4)
    kind = "llama" if make is tiny_llama else "gpt2"
    trained = []
    for part in ("ours", "peft"):
        trainer = trainer_of(tmp_path / part, way, model=make(), kind=kind)
        trainer.run()
        trained.append(trainer.release())
    theirs = trained[1].merge_and_unload().state_dict()
    ours = MODULES["lora"].finish(trained[0], []).state_dict()
    base = make().state_dict()
    assert same(ours, theirs)
    assert ours.keys() == base.keys()
    assert sum(not torch.equal(ours[k], base[k]) for k in base) == (14 if kind == "llama" else 8)


def test_merged_lora_keeps_what_bf16_would_lose(tmp_path):
    base = tiny_llama(vocab_size=160).to(torch.bfloat16)
    stored = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    recipe = dataclasses.replace(RECIPE, lr=2e-5, weight_decay=0.0)
    trainer = trainer_of(tmp_path, Warmup("lora", rank=4), recipe=recipe, model=base)
    trainer.run()
    model = trainer.release()
    deltas = {
        name: layer.get_delta_weight("default").detach().clone()
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    merged = MODULES["lora"].finish(model, SCORED).state_dict()
    for name in SCORED:
        weight = merged[name]
        assert weight.dtype == torch.float32
        assert torch.equal(weight, stored[name].float() + deltas[name.removesuffix(".weight")])
        lost = (weight.to(torch.bfloat16) == stored[name]).float().mean()
        assert lost > 0.5, "the test has a change that bf16 loses"
    assert {merged[name].dtype for name in set(merged) - set(SCORED)} == {torch.bfloat16}


def test_steps_in_the_backward_refuse_micro_batches(tmp_path):
    recipe = dataclasses.replace(RECIPE, accumulation=2)
    with pytest.raises(NeftError, match="t: updates in the backward pass keep no gradient to add"):
        trainer_of(tmp_path, Warmup(update="in_backward"), recipe=recipe)


def test_non_finite_loss_stops_before_anything_moves(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    way = Warmup(update="in_backward")
    with pytest.raises(NeftError, match="t: loss is nan at step 1; lower the learning rate"):
        warmed(tmp_path, way, model=model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) or name == "model.norm.weight"


CHEAP = {
    "lora": "modules: lora, rank: 2, states: 8bit",
    "candidates": "modules: candidates, layout: mlp, states: factored, update: in_backward, "
    "max_grad_norm: null",
}


@pytest.mark.parametrize("name", CHEAP)
def test_the_stage_warms_up_as_asked_and_says_so(copied, monkeypatch, name):
    calls = []
    step = InBackward.step
    monkeypatch.setattr(InBackward, "step", lambda *a: calls.append(a) or step(*a))
    exact = json.loads(copied.path("warmup", "en-fr", "provenance.json").read_text())
    assert "warmup" not in exact
    edit(copied, ("warmup: {steps: 6,", f"warmup: {{steps: 6, {CHEAP[name]},"))
    made = []
    for _ in range(2):
        shutil.rmtree(copied.path("warmup"))
        run_stages(copied, "warmup", "score", "select")
        made.append(load_file(copied.path("warmup", "en-fr", "model.safetensors")))
    assert same(*made)
    scores = NeuronScores.load(copied.path("scores", "en-fr.safetensors"))
    told = {"lora": "lora of rank 2, states 8bit, update after_backward",
            "candidates": "candidates of mlp, states factored, update in_backward"}  # fmt: skip
    assert scores.provenance["warmup"] == told[name]
    assert all((each > 0).any() for each in scores.sensitivity.values())
    base = load_file(copied.path("base", "model.safetensors"))
    still = {key for key in base if torch.equal(base[key], made[0][key])}
    parts = itertools.product((0, 1), ("up", "down"))
    moved = {f"model.layers.{n}.mlp.{part}_proj.weight" for n, part in parts}
    assert bool(calls) == ("in_backward" in CHEAP[name])
    if name == "candidates":
        assert still == set(base) - moved
    else:
        assert "model.embed_tokens.weight" in still
        assert not still & moved
    edit(copied, ("states: 8bit" if name == "lora" else "states: factored", "states: fp32"))
    shutil.rmtree(copied.path("warmup"))
    run_stages(copied, "warmup")
    other = load_file(copied.path("warmup", "en-fr", "model.safetensors"))
    assert any(not torch.equal(other[key], made[0][key]) for key in moved)
