import math
import re

import pytest
import torch
from conftest import tiny_llama, tiny_rows
from families import tiny_model
from test_methods import tiny_gpt2

from neft_core.activations import activation_scores
from neft_core.errors import NeftError
from neft_core.gradients import gradient_scores, passes
from neft_core.groups import Group, read_neurons
from neft_core.probing import sentence_states
from neft_core.steps import collate


def batches_of(rows=6, size=2, seed=0):
    arrays = tiny_rows(rows, seed)
    return [collate(arrays, range(i, min(i + size, rows)), 0) for i in range(0, rows, size)]


def by_loops(model, batches, weight, axis, transposed=False, relative=False) -> list[float]:
    """The score of every neuron of a weight, one number after the other."""
    model.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, labels in enumerate(batch["labels"]):
            for place in range(1, len(labels)):
                if labels[place] != -100:
                    chances = torch.log_softmax(logits[row, place - 1], dim=0)
                    total = total - chances[labels[place]]
                    count += 1
    (total / count).backward()
    w, g = (t.t() if transposed else t for t in (weight.detach(), weight.grad))
    w, g = (t.t() if axis == 1 else t for t in (w, g))
    scores = []
    for neuron, gradient in zip(w.tolist(), g.tolist(), strict=True):
        ww = sum(a * a for a in neuron)
        gw = sum(a * b for a, b in zip(gradient, neuron, strict=True))
        rest = [b - gw / ww * a for a, b in zip(neuron, gradient, strict=True)]
        size = math.sqrt(sum(b * b for b in rest))
        scores.append(size / math.sqrt(ww) if relative else size)
    model.zero_grad(set_to_none=True)
    return scores


@pytest.mark.parametrize("relative", [False, True])
def test_scores_are_those_of_plain_loops(relative):
    model, batches = tiny_llama().double(), batches_of()
    found = gradient_scores(model, batches, "mlp+gate", relative=relative)
    for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
        module = f"model.layers.1.mlp.{name}_proj"
        want = by_loops(
            model, batches, model.get_parameter(f"{module}.weight"), axis, relative=relative
        )
        torch.testing.assert_close(
            found.sensitivity[module], torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=0
        )
    assert found.criterion == "gradient"
    assert found.provenance["relative"] == str(relative).lower()


def test_weights_stored_the_other_way_round():
    model, batches = tiny_gpt2().double(), batches_of()
    found = gradient_scores(model, batches)
    for name, axis in (("c_fc", 0), ("c_proj", 1)):
        module = f"transformer.h.0.mlp.{name}"
        weight = model.get_parameter(f"{module}.weight")
        want = torch.tensor(by_loops(model, batches, weight, axis, True), dtype=torch.float64)
        torch.testing.assert_close(found.sensitivity[module], want, rtol=1e-6, atol=0)


def test_several_passes_give_the_same_bits():
    model, batches = tiny_llama(), batches_of()
    told = []
    once = gradient_scores(model, batches, "all")
    twice = gradient_scores(
        model, batches, "all", memory=5000, progress=lambda *at: told.append(at)
    )
    assert told[-1] == (len(told), len(told))
    assert len(told) > len(batches)
    for module, values in once.sensitivity.items():
        assert torch.equal(values, twice.sensitivity[module])


def test_passes_fill_the_memory_that_they_may_use():
    groups = [Group(str(n), 0, 0, 10, 10) for n in range(5)]  # 400 bytes each
    sizes = [len(part) for part in passes(groups, 800)]
    assert sizes == [2, 2, 1]
    assert [len(part) for part in passes(groups, 1)] == [1] * 5
    assert [len(part) for part in passes(groups, math.inf)] == [5]


def test_only_one_dense_gradient_exists_at_a_time():
    model, seen = tiny_llama(), []

    def look(_parameter):
        seen.append(sum(p.grad is not None for p in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    gradient_scores(model, batches_of())
    assert set(seen) == {1}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_left_as_it_was():
    model = tiny_llama().train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    gradient_scores(model, batches_of())
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]


def test_gradients_from_before_are_neither_added_nor_lost():
    model, batches = tiny_llama(), batches_of()
    want = gradient_scores(model, batches).sensitivity
    (100 * model(input_ids=batches[0]["input_ids"]).logits.square().mean()).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    found = gradient_scores(model, batches).sensitivity
    assert all(torch.equal(found[name], scores) for name, scores in want.items())
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())


def test_a_step_along_the_gradient_turns_neurons_by_the_score():
    """To first order, 1 - cos is half the square of the relative score times the rate."""
    from neft_core.similarity import sensitivity

    model, batches = tiny_llama().double(), batches_of()
    scores = gradient_scores(model, batches, relative=True)
    module = "model.layers.0.mlp.up_proj"
    weight = model.get_parameter(f"{module}.weight")
    by_loops(model, batches, weight, 0)
    tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    loss = sum(
        torch.nn.functional.cross_entropy(
            model(input_ids=b["input_ids"], attention_mask=b["attention_mask"])
            .logits[:, :-1].reshape(-1, 64),
            b["labels"][:, 1:].reshape(-1), ignore_index=-100, reduction="sum")
        for b in batches) / tokens  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, [weight])
    rate = 1e-4
    turned = sensitivity(weight.detach(), weight.detach() - rate * gradient)
    expected = (rate * scores.sensitivity[module]) ** 2 / 2
    torch.testing.assert_close(turned, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "phi3"])
def test_fused_weights_and_experts(family):
    model = tiny_model(family)
    batch = batches_of()[0]
    for name in ("input_ids", "labels"):
        batch[name] = torch.where(batch[name] > 0, batch[name] % 13 + 3, batch[name])
    found = gradient_scores(model, [batch])
    model(**batch).loss.backward()  # of one batch the mean loss has the gradient that is scored
    for module, group in found.groups.items():
        weight = model.get_parameter(group.parameter)
        every = group.indices(torch.arange(group.count))
        w, g = (
            read_neurons(t, every, group.axis, group.transposed)
            for t in (weight.detach().double(), weight.grad.double())
        )
        rest = g - ((g * w).sum(1) / (w * w).sum(1))[:, None] * w
        torch.testing.assert_close(
            found.sensitivity[module], rest.norm(dim=1), rtol=1e-4, atol=1e-9
        )


def test_rows_without_a_trained_token_are_refused():
    model, (batch, *_) = tiny_llama(), batches_of()
    batch["labels"].fill_(-100)
    for given in ([batch], []):
        with pytest.raises(NeftError, match=re.escape("gradient: the rows have no trained token")):
            gradient_scores(model, given)


def test_a_gradient_that_is_not_finite_is_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(NeftError, match="has a gradient that is not finite"):
        gradient_scores(model, batches_of())


def test_after_a_fault_models_train_on_as_they_did():
    batch = batches_of()[0]
    wrong = {**batch, "input_ids": batch["input_ids"] + 1000}
    model, other = tiny_llama().train(), tiny_llama().eval()
    for score in (
        lambda: gradient_scores(model, [wrong]),
        lambda: activation_scores(model, other, [batch, wrong]),
        lambda: sentence_states(model, ["model.layers.0"], [wrong]),
    ):
        with pytest.raises(IndexError):
            score()
        assert model.training
        assert not other.training
