"""Tensors formed again from what the graph keeps: the same bits, no more memory, or none of it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import kept_for_backward
from neft_core.again import Trust, factors, formed
from neft_core.layer import NeftLinear
from neft_core.neurons import COLUMNS, ROWS


def leaf(*shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


PRODUCTS = {
    "units": lambda dtype: nn.functional.silu(leaf(2, 3, 8, dtype=dtype)) * leaf(2, 3, 8, seed=1),
    "norm": lambda dtype: norm(leaf(2, 3, 8, dtype=dtype) + 1, torch.rand(8).to(dtype)),
    "half": lambda dtype: 0.5 * leaf(3, 8, dtype=dtype).tanh() * (leaf(3, 8, seed=2) + 1),
    "column": lambda dtype: leaf(3, 1, dtype=dtype).exp() * leaf(8, dtype=dtype).sin(),
    "number": lambda dtype: leaf(5, 8, dtype=dtype).exp() * torch.tensor(3.0, requires_grad=True),
    "cast": lambda dtype: (leaf(5, 8, dtype=dtype) * leaf(5, 8, dtype=dtype)).to(torch.bfloat16),
    "in place": lambda dtype: leaf(5, 8, dtype=dtype).exp().mul_(leaf(5, 8, dtype=dtype)) * leaf(8),
}


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_is_formed_with_its_own_bits(kind, dtype):
    x = PRODUCTS[kind](dtype)
    kept, recipe = factors(x, Trust())
    assert recipe is not None
    assert all(tensor is not x for tensor in kept)
    again = formed(kept, recipe)
    assert again.dtype == x.dtype
    assert torch.equal(again.expand_as(x), x)
    for indices in (torch.tensor([0, 3, 7]), torch.tensor([5]), torch.tensor([], dtype=torch.long)):
        assert torch.equal(formed(kept, recipe, indices), x.index_select(-1, indices))


def changed(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x.mul_(2)


def changed_inside(change) -> torch.Tensor:
    inner = leaf(3, 8) * leaf(3, 8, seed=1)
    change(inner)
    return (inner * 0.5).to(torch.float64)


def changed_data() -> torch.Tensor:
    x = leaf(3, 8) * leaf(3, 8, seed=1)
    x.data.clamp_(-0.1, 0.1)
    return x


OTHERS = {
    "a leaf": lambda: leaf(3, 8),
    "a sum": lambda: leaf(3, 8) + leaf(3, 8),
    "a view": lambda: (leaf(3, 8) * leaf(3, 8)).view(4, 6),
    "changed unseen": lambda: changed(leaf(3, 8) * leaf(3, 8)),
    "changed inside": lambda: changed_inside(changed),
    "changed inside, detached": lambda: changed_inside(lambda inner: inner.detach().zero_()),
    "changed by its data": changed_data,
    "of a leaf that is not kept": lambda: leaf(3, 8) * torch.ones(8),
    "of one feature": lambda: leaf(3, 1) * leaf(3, 1),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_product_is_kept_itself(kind):
    x = OTHERS[kind]()
    kept, recipe = factors(x, Trust())
    assert recipe is None
    assert kept[0] is x


def test_a_change_that_is_idle_at_first_is_found_later():
    """As one that cuts off what is too large; what isn't finite tells nothing of others."""

    def product(size: float) -> torch.Tensor:
        x = (leaf(3, 8).detach() * size).requires_grad_() * leaf(3, 8, seed=1)
        x.data.clamp_(-50, 50)
        return x

    trust = Trust()
    assert factors(product(1), trust)[1] is not None
    assert factors(product(100), trust)[1] is None
    assert factors(product(1), trust)[1] is None
    broken = Trust()
    assert factors(product(float("nan")), broken)[1] is None
    assert [factors(product(1), broken)[1] is None for _ in range(3)] == [False] * 3


def test_behind_hooks_nothing_is_looked_at():
    # A hook may keep anything, even a tensor of the same shape.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 0, lambda t: t):
        x = leaf(3, 8).exp() * leaf(3, 8, seed=1)
    assert factors(x, Trust())[1] is None


def sides(axis: int) -> tuple[NeftLinear, nn.Linear, torch.Tensor]:
    torch.manual_seed(3)
    plain = nn.Linear(8, 8, bias=False)
    indices = torch.tensor([1, 4, 6])
    return NeftLinear(plain, "default", axis, 3, indices), plain, indices


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_a_layer_keeps_nothing_for_a_product_and_has_the_gradient_of_one_that_does(axis):
    def product() -> torch.Tensor:
        return nn.functional.silu(leaf(2, 3, 8)) * leaf(2, 3, 8, seed=1)

    def graph() -> int:
        with kept_for_backward(frozen) as bytes_kept:
            frozen(product())
            return bytes_kept()

    layer, _, _ = sides(axis)
    frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
    layer(product().detach())  # writes
    with kept_for_backward(layer) as bytes_kept:
        output = layer(product())
        assert bytes_kept() == graph()
    output.square().sum().backward()
    other, _, _ = sides(axis)
    other(product().detach()).square().sum().backward()
    got, want = (one.neft_values["default"].grad for one in (layer, other))
    assert torch.equal(got, want)
    assert want.abs().sum() > 0


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_checkpoints_and_kept_graphs(axis):
    layer, _, _ = sides(axis)
    values = layer.neft_values["default"]
    x = leaf(2, 3, 8)

    def run(x):
        return layer(nn.functional.silu(x) * x).square().sum()

    (want,) = torch.autograd.grad(run(x), values)
    (got,) = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), values)
    assert torch.equal(got, want)
    loss = run(x)
    for _ in range(2):
        (got,) = torch.autograd.grad(loss, values, retain_graph=True)
        assert torch.equal(got, want)
    with torch.autograd.graph.save_on_cpu():
        (got,) = torch.autograd.grad(run(x), values)
    assert torch.equal(got, want)


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_an_input_that_changed_unseen_has_the_gradient_of_what_the_layer_saw(axis):
    layer, plain, indices = sides(axis)
    values = layer.neft_values["default"]

    for x in (changed_data(), leaf(3, 8) * leaf(3, 8, seed=1)):
        (got,) = torch.autograd.grad(layer(x).square().sum(), values)
        weight = plain.weight.detach().clone().requires_grad_()
        seen = nn.functional.linear(x.detach(), weight)
        (whole,) = torch.autograd.grad(seen.square().sum(), weight)
        want = whole[indices] if axis == ROWS else whole[:, indices].t()
        assert torch.allclose(got, want, atol=1e-6)
