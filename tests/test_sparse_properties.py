"""The layer on random shapes, budgets, precisions and inputs, against plain products in float64."""

import copy
import random

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from neft_core.groups import COLUMNS, ROWS, read_neurons, write_neurons
from neft_core.layer import NeftLinear
from neft_core.sparse_experts import ExpertsLinear, Route

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


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("stand", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_experts_are_those_of_plain_products(seed, stand, dtype):
    choose = random.Random(f"{seed} experts {stand} {dtype}")
    torch.manual_seed(seed)
    experts, tokens = choose.choice([1, 2, 5]), choose.choice([0, 1, 4, 9])
    each, gather = choose.randint(1, experts), choose.random() < 0.5
    outside, inside = (choose.choice([1, 3, 8, 17]) for _ in range(2))
    own = torch.randn(experts, outside, inside, dtype=dtype)
    if choose.random() < 0.5:
        own = own.transpose(1, 2).contiguous().transpose(1, 2)
    axis = choose.choice([ROWS, COLUMNS])
    indices = some_of(experts * own.shape[1 + axis], choose)
    values = read_neurons(own, indices, axis).float()
    values = (values + torch.randn_like(values)).to(torch.promote_types(dtype, torch.float32))
    full = own.clone()
    write_neurons(full, values, indices, axis)
    # Number `experts` means none of them.
    chosen = torch.rand(tokens, experts + 1).argsort(1)[:, :each]
    route = Route.sorted(chosen, experts)
    x = torch.randn(tokens if gather else tokens * each, inside, dtype=dtype, requires_grad=True)

    stored = full if stand else own
    values.requires_grad_()
    y = ExpertsLinear.apply(x, values, stored, indices, axis, route, gather, None, stand)
    dy = torch.randn(y.shape, dtype=dtype)
    y.backward(dy)

    pairs = (x[route.tokens] if gather else x).detach().double()
    back = torch.zeros(len(pairs), inside, dtype=torch.float64)
    dense = torch.zeros(own.shape, dtype=torch.float64)
    sizes, largest = back.clone(), dense.clone()
    for expert in range(experts):
        mine, weight = route.pairs(expert), full[expert].double()
        assert close(y[mine].detach(), pairs[mine], weight.t(), dtype)
        outer = dy[mine].double()
        back[mine], sizes[mine] = outer @ weight, outer.abs() @ weight.abs()
        dense[expert], largest[expert] = (
            outer.t() @ pairs[mine],
            outer.abs().t() @ pairs[mine].abs(),
        )
    assert not y[route.bounds[-1] :].any()
    if gather:
        back, sizes = (
            t[route.place].view(tokens, each, inside).sum(1) if tokens else t[:0]
            for t in (back, sizes)
        )
    slack = ROUNDING[dtype] * 10
    least = torch.finfo(dtype).smallest_normal
    assert bool(((x.grad.double() - back).abs() <= slack * (sizes + least)).all())
    assert values.grad.dtype == values.dtype
    want, most = (read_neurons(t, indices, axis) for t in (dense, largest))
    assert bool(((values.grad.double() - want).abs() <= slack * (most + least)).all())


@pytest.mark.parametrize("form", ["auto", "additive"])
@pytest.mark.parametrize("seed", range(20))
def test_under_autocast_products_are_those_of_rounded_factors(seed, form):
    choose = random.Random(f"{seed} {form} autocast")
    torch.manual_seed(seed)
    base = base_layer(choose, choose.choice([torch.float32, torch.bfloat16]))
    logical = base.weight.t() if type(base) is Conv1D else base.weight
    axis = choose.choice([ROWS, COLUMNS])
    indices = some_of(logical.shape[axis], choose)
    plain = copy.deepcopy(base).requires_grad_()
    layer = NeftLinear(base, "default", axis, len(indices), indices, form)
    x = inputs(logical.shape[1], choose, choose.choice([torch.float32, torch.bfloat16]))
    x = x.detach().contiguous()
    found = []
    for one in (plain, layer):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = one(own)
        if not found:
            dy = torch.randn(y.shape, dtype=y.dtype)
        y.backward(dy)
        found.append((y.detach(), own.grad))
    (want, want_x), (got, got_x) = found
    for a, b in ((got, want), (got_x, want_x)):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-5)
    grad = read_neurons(plain.weight.grad, indices, axis, type(base) is Conv1D)
    values = layer.neft_values["default"].grad
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, grad.float(), rtol=2**-7, atol=2**-5)
