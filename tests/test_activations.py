import math

import pytest
import torch
from conftest import tiny_llama
from families import tiny_model
from test_gradients import batches_of
from test_methods import tiny_gpt2

from neft_core.activations import activation_scores
from neft_core.errors import NeftError


def nudged(model, size: float, seed: int = 1):
    """The same model with every weight changed a little."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def inputs_of(model, module, batches) -> list[list[float]]:
    """What a module is given at each token that is no padding."""
    found = []

    def hook(_module, given, _out):
        for row, real in zip(given[0], mask, strict=True):
            found.extend(
                token.tolist() for token, is_real in zip(row, real, strict=True) if is_real
            )

    handle = model.get_submodule(module).register_forward_hook(hook)
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"]
            model(input_ids=batch["input_ids"], attention_mask=mask)
    handle.remove()
    return found


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_scores_are_those_of_plain_loops(make):
    base, tuned = make().double(), nudged(make().double(), 0.05)
    batches = batches_of()
    scores = activation_scores(base, tuned, batches)
    assert scores.criterion == "activation"
    for module, group in scores.groups.items():
        weights, given, vectors = [], [], []
        for model in (base, tuned):
            weight = model.get_parameter(group.parameter).detach()
            weight = weight.t() if group.transposed else weight
            weights.append((weight.t() if group.axis else weight).tolist())
            given.append(inputs_of(model, module, batches))
        bias = getattr(base.get_submodule(module), "bias", None)
        for neuron in range(group.count):
            vectors = []
            for model, weight, tokens in zip((base, tuned), weights, given, strict=True):
                w = weight[neuron]
                if group.axis:  # a column gives its input times its weights
                    vectors.append([x[neuron] * a for x in tokens for a in w])
                else:
                    own = 0.0
                    if bias is not None:
                        own = float(model.get_submodule(module).bias[neuron].detach())
                    vectors.append(
                        [sum(a * b for a, b in zip(w, x, strict=True)) + own for x in tokens]
                    )
            want = 1 - cosine(*vectors)
            assert float(scores.sensitivity[module][neuron]) == pytest.approx(want, rel=1e-6)


def test_batches_and_padding_change_nothing():
    base, tuned = tiny_llama().double(), nudged(tiny_llama().double(), 0.05)
    one, other = (activation_scores(base, tuned, batches_of(size=n)) for n in (1, 4))
    for module, values in one.sensitivity.items():
        torch.testing.assert_close(values, other.sensitivity[module], rtol=1e-9, atol=1e-15)


def test_the_same_model_twice_scores_zero():
    scores = activation_scores(tiny_llama(), tiny_llama(), batches_of())
    assert all(not values.any() for values in scores.sensitivity.values())


def test_a_tiny_change_keeps_its_order():
    """As 1 - cos it would be lost in rounding at this size."""
    scores = [
        activation_scores(tiny_llama().double(), nudged(tiny_llama().double(), size), batches_of())
        for size in (1e-4, 1e-7)
    ]
    for module, large in scores[0].sensitivity.items():
        ratio = large / scores[1].sensitivity[module]
        torch.testing.assert_close(ratio, torch.full_like(ratio, 1e6), rtol=0.05, atol=0)


def test_models_of_another_form_are_refused():
    with pytest.raises(NeftError, match="tuned: its candidates differ from the base's"):
        activation_scores(tiny_llama(), tiny_llama(intermediate_size=12), batches_of())
    with pytest.raises(NeftError, match="activation: got no rows; give some"):
        activation_scores(tiny_llama(), tiny_llama(), [])
    experts = tiny_model("qwen3_moe")
    with pytest.raises(
        NeftError, match="gate_up_proj holds experts, whose activations aren't seen"
    ):
        activation_scores(experts, experts, [])


def test_values_that_are_not_finite_are_refused():
    tuned = tiny_llama()
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        NeftError, match=r"activation: model\.layers\.1\.mlp\.up_proj gives out val"
    ):
        activation_scores(tiny_llama(), tuned, batches_of())
