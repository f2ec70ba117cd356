"""The layer on random shapes, budgets, precisions and inputs, against plain products in float64."""

import random

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from neft_core.layer import NeftLinear
from neft_core.neurons import COLUMNS, ROWS

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = {
    torch.float64: 2**-52,
    torch.float32: 2**-23,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}
"""Of one value."""


def base_layer(choose: random.Random, dtype: torch.dtype) -> nn.Module:
    inside, outside = (choose.choice([1, 2, 3, 7, 16, 33, 40]) for _ in range(2))
    layer = (
        Conv1D(outside, inside)
        if choose.random() < 0.3
        else nn.Linear(inside, outside, bias=choose.random() < 0.5)
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(dtype).requires_grad_(False)


def some_of(count: int, choose: random.Random) -> torch.Tensor:
    """No neuron, one, all of them, or any number between."""
    number = choose.choice([0, 1, count, choose.randint(1, count)])
    return torch.tensor(sorted(choose.sample(range(count), number)), dtype=torch.int64)


def inputs(width: int, choose: random.Random, dtype: torch.dtype) -> torch.Tensor:
    """[..., width] of one to four dimensions, empty at times, of any strides."""
    sizes = [choose.choice([0, 1, 2, 3, 5, 8]) for _ in range(choose.randint(0, 3))]
    kind = choose.choice(["whole", "transposed", "every other", "expanded"])
    if kind == "transposed":
        x = torch.randn(width, *reversed(sizes), dtype=dtype).permute(*range(len(sizes), -1, -1))
    elif kind == "every other":
        x = torch.randn(*sizes, 2 * width, dtype=dtype)[..., ::2]
    elif kind == "expanded":
        x = torch.randn(width, dtype=dtype).expand(*sizes, width)
    else:
        x = torch.randn(*sizes, width, dtype=dtype)
    return x.detach().requires_grad_()


def close(found: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `found` is the product within what rounding its sums can make of them."""
    eps, least = ROUNDING[dtype], torch.finfo(dtype).smallest_normal
    longest = max(left.shape[-1], 1)
    error = (found.double() - left @ right).abs()
    return bool((error <= eps * (4 + longest**0.5) * (left.abs() @ right.abs() + least)).all())


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("form", ["auto", "additive"])
@pytest.mark.parametrize("seed", range(40))
def test_output_and_gradients_are_those_of_plain_products(seed, form, dtype):
    choose = random.Random(f"{seed} {form} {dtype}")
    torch.manual_seed(seed)
    base = base_layer(choose, dtype)
    stored = base.weight.clone()
    logical = (stored.t() if type(base) is Conv1D else stored).double()
    axis = choose.choice([ROWS, COLUMNS])
    indices = some_of(logical.shape[axis], choose)
    layer = NeftLinear(base, "default", axis, len(indices), indices, form)
    values = layer.neft_values["default"]
    with torch.no_grad():
        values += torch.randn_like(values)

    x = inputs(logical.shape[1], choose, dtype)
    if type(base) is Conv1D and form == "additive":
        x = x.detach().contiguous().requires_grad_()  # it takes no others itself
    y = layer(x)
    dy = torch.randn(y.shape, dtype=dtype)
    y.backward(dy)

    # What is computed with is what the base's precision holds of the trained values.
    inside = values.detach().to(dtype).double()
    weight = logical.clone()
    weight.index_copy_(axis, indices, inside if axis == ROWS else inside.t())
    tokens = x.shape[:-1].numel()
    rows, outputs = (t.detach().double().reshape(tokens, t.shape[-1]) for t in (x, dy))
    bias = torch.zeros(len(weight)) if base.bias is None else base.bias
    with_one = torch.cat([rows, torch.ones(tokens, 1)], 1)
    augmented = torch.cat([weight, bias.double()[:, None]], 1).t()
    if form == "additive":
        # The base's own products are rounded on the way, so they count too.
        with_one = torch.cat([with_one, rows, rows], 1)
        augmented = torch.cat([augmented, logical.t(), -logical.t()])
    assert y.dtype == dtype
    assert y.shape == (*x.shape[:-1], len(weight))
    assert close(y.detach().reshape(outputs.shape), with_one, augmented, dtype)

    back = torch.cat([weight, logical, -logical]) if form == "additive" else weight
    wide = torch.cat([outputs] * 3, 1) if form == "additive" else outputs
    assert close(x.grad.reshape(rows.shape), wide, back, dtype)

    assert values.grad.dtype == values.dtype
    if axis == ROWS:
        assert close(values.grad, outputs.t()[indices], rows, dtype)
    else:
        assert close(values.grad, rows.t()[indices], outputs, dtype)

    assert torch.equal(layer.state_dict()["base_layer.weight"], stored)
