"""What stands in a weight while it trains, packed or in place, and what comes back of it."""

import copy
import gc
import os
import pickle
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama
from peft import get_peft_model
from test_aside import mapped
from test_methods import mask_for
from test_tuner_peft import IDS, out, perturbed
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks import rivals, train_step
from benchmarks.memory import kept_for_backward, reachable, storage_bytes
from neft_core.layer import NeftLinear
from neft_core.neurons import COLUMNS, ROWS
from neft_core.overlay import PACKED, Overlay
from neft_core.tuner import NeftConfig, neft_layers

IN, OUT = 8, 12
KINDS = [(axis, transposed) for axis in (ROWS, COLUMNS) for transposed in (False, True)]


def plain(transposed=False, dtype=torch.float32, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    layer = Conv1D(OUT, IN) if transposed else nn.Linear(IN, OUT)
    nn.init.normal_(layer.bias)
    return layer.to(dtype).requires_grad_(False)


def some(axis: int, share: float) -> torch.Tensor:
    n = OUT if axis == ROWS else IN
    torch.manual_seed(4)
    return torch.randperm(n)[: round(share * n)].sort().values


def layer_of(axis, transposed=False, share=1.0, dtype=torch.float32, **options) -> NeftLinear:
    indices = some(axis, share)
    base = plain(transposed, dtype)
    return NeftLinear(base, "default", axis, len(indices), indices, **options)


def dense(layer: NeftLinear, base: nn.Module) -> torch.Tensor:
    """The weight [out, in] with an adapter's values in it, by another way than the layer's."""
    weight = (base.weight.t() if type(base) is Conv1D else base.weight).detach().clone()
    indices = layer.neft_indices["default"]
    if layer.axis == ROWS:
        weight[indices] = layer.neft_values["default"].detach().to(weight.dtype)
    else:
        weight[:, indices] = layer.neft_values["default"].detach().to(weight.dtype).t()
    return weight


def inputs(step=0, dtype=torch.float32) -> torch.Tensor:
    return torch.linspace(-1, 1 + step, 3 * 4 * IN, dtype=dtype).sin().view(3, 4, IN)


def descend(layer: NeftLinear, steps: int, dtype=torch.float32, lr=0.1) -> None:
    optimizer = torch.optim.AdamW([layer.neft_values["default"]], lr=lr, weight_decay=0.0)
    for step in range(steps):
        layer(inputs(step, dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def in_one_memory(layer: NeftLinear) -> bool:
    first, second = layer.neft_values["default"], layer.base_layer.weight
    return first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize(("axis", "transposed"), KINDS)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("product", [False, True])
def test_a_weight_trains_as_a_dense_one_with_masked_gradients(axis, transposed, share, product):
    layer = layer_of(axis, transposed, share, torch.float64)
    base = plain(transposed, torch.float64)
    weight = dense(layer, base).requires_grad_()
    flag = torch.zeros_like(weight, dtype=torch.bool)
    flag[(slice(None),) * axis + (some(axis, share),)] = True
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    own = torch.optim.AdamW([layer.neft_values["default"]], lr=0.1, weight_decay=0.0)
    for step in range(5):
        x = inputs(step, torch.float64).requires_grad_()
        y = inputs(step, torch.float64).requires_grad_()
        seen = [x, y]
        if product:  # whose factors autograd keeps, of which the layer forms its input again
            seen = [one * (one.detach() + 1).requires_grad_() for one in seen]
        want, got = nn.functional.linear(seen[0], weight, base.bias), layer(seen[1])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        for output in (want, got):
            output.square().mean().backward()
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-11, atol=1e-13)
        weight.grad[~flag] = 0
        grad = weight.grad if axis == ROWS else weight.grad.t()
        values = layer.neft_values["default"]
        torch.testing.assert_close(values.grad, grad[some(axis, share)], rtol=1e-11, atol=1e-13)
        for one in (optimizer, own):
            one.step()
            one.zero_grad()
    assert in_one_memory(layer) == (layer.overlay.pack is not None) == (share >= PACKED)
    torch.testing.assert_close(dense(layer, base), weight.detach(), rtol=1e-9, atol=1e-11)
    layer.settle()
    assert not in_one_memory(layer)
    assert torch.equal(layer.base_layer.weight, base.weight)
    torch.testing.assert_close(dense(layer, base), weight.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("share", [0.75, 1.0])
@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_gradcheck_of_a_packed_weight(axis, share):
    layer = layer_of(axis, False, share, torch.float64)
    x = inputs(0, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    assert layer.overlay.pack is not None

    def of_values(values):
        with torch.no_grad():
            layer.neft_values["default"].copy_(values)
        output = layer(x.detach())
        (grad,) = torch.autograd.grad(output.square().sum(), layer.neft_values["default"])
        return output.square().sum().detach(), grad

    values = layer.neft_values["default"].detach().clone()
    _, grad = of_values(values)
    for where in [(0, 0), (2, 3), (5, 1)]:
        ends = []
        for sign in (1, -1):
            moved = values.clone()
            moved[where] += sign * 1e-6
            ends.append(of_values(moved)[0])
        assert float((ends[0] - ends[1]) / 2e-6) == pytest.approx(float(grad[where]), rel=1e-6)


def test_bfloat16_has_masters_of_its_own_and_is_never_packed():
    layer = layer_of(ROWS, dtype=torch.bfloat16)
    descend(layer, 3, torch.bfloat16)
    assert layer.overlay.aside
    assert layer.overlay.pack is None
    layer.settle()
    assert torch.equal(layer.base_layer.weight, plain(dtype=torch.bfloat16).weight)


def test_originals_are_put_aside_while_training_and_only_then():
    layer = layer_of(ROWS, share=0.5)
    with torch.no_grad():
        layer(inputs())
    assert not layer.overlay.aside
    descend(layer, 2)
    assert layer.overlay.aside
    assert mapped(layer.overlay.originals).endswith("(deleted)")
    layer.settle()
    assert not layer.overlay.aside
    frozen = layer_of(ROWS, inference_mode=True)
    frozen(inputs())
    assert frozen.overlay.present
    assert not frozen.overlay.aside
    assert frozen.overlay.pack is None


def test_a_loop_that_looks_at_the_weights_each_step_moves_nothing_away():
    """HF's Trainer walks through the parameters between any two steps."""
    layers = [layer_of(axis, share=0.8) for axis in (ROWS, ROWS)]
    optimizers = [torch.optim.SGD([one.neft_values["default"]], lr=0.1) for one in layers]
    for step in range(4):
        for one, optimizer in zip(layers, optimizers, strict=True):
            one(inputs(step)).square().mean().backward()
            if one is layers[0]:
                list(one.parameters())
            optimizer.step()
            optimizer.zero_grad()
    layers[0](inputs())
    assert not layers[0].overlay.aside
    assert layers[0].overlay.pack is None
    assert layers[1].overlay.aside
    values = [one.neft_values["default"] for one in layers]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    # Two updates in a row, and it is put aside again.
    for step in range(2):
        layers[0](inputs(step)).square().mean().backward()
        optimizers[0].step()
    layers[0](inputs())
    assert layers[0].overlay.aside
    assert layers[0].overlay.pack is not None


EVENTS = [
    "step", "step", "look", "off", "state", "copy", "pickle", "merge", "other", "eval", "data",
    "load", "cast",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
def test_whatever_comes_in_whatever_order(seed, share):
    """After every event the layer computes with its values, and the base has its own bits."""
    axis, transposed = KINDS[seed % 4]
    layer, base = layer_of(axis, transposed, share), plain(transposed)
    layer.update_layer("other", 2, some(axis, 1.0)[:2])
    generator = torch.Generator().manual_seed(seed)
    packed = 0
    for number in torch.randint(len(EVENTS), (25,), generator=generator).tolist():
        event, values = EVENTS[number], layer.neft_values["default"]
        if event == "step":
            layer(inputs(number)).square().mean().backward()
            with torch.no_grad():
                values.sub_(0.1 * values.grad)
            values.grad = None
        elif event == "look":
            assert torch.equal(dict(layer.named_parameters())["base_layer.weight"], base.weight)
        elif event == "off":
            layer.enable_adapters(False)
            torch.testing.assert_close(layer(inputs()), base(inputs()))
            layer.enable_adapters(True)
        elif event == "state":
            before = values.detach().clone()
            state = layer.state_dict()
            assert torch.equal(state["neft_values.default"], before)
            assert torch.equal(state["base_layer.weight"], base.weight)
        elif event == "copy":
            twin = copy.deepcopy(layer)
            descend(twin, 3)
            layer = copy.deepcopy(layer)
            assert layer.overlay.pack is None
        elif event == "pickle":
            layer = pickle.loads(pickle.dumps(layer))
            assert layer.overlay.pack is None
        elif event == "merge":
            layer.merge()
            torch.testing.assert_close(layer(inputs()), layer.base_layer(inputs()))
            layer.unmerge()
        elif event == "other":
            layer.set_adapter("other")
            layer(inputs()).sum().backward()
            layer.set_adapter("default")
        elif event == "eval":
            with torch.no_grad():
                values.add_(0.01)
                layer(inputs())
        elif event == "data":
            values.data = values.data + 0.01
        elif event == "load":
            state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
            state["neft_values.default"] += 0.01
            layer.load_state_dict(state)
        elif event == "cast":
            layer.double().float()
        weight = dense(layer, base)
        want = nn.functional.linear(inputs(), weight, base.bias)
        torch.testing.assert_close(layer(inputs()), want, rtol=1e-4, atol=1e-5)
        packed += layer.overlay.pack is not None
    layer.settle()
    assert torch.equal(layer.base_layer.weight, base.weight)
    assert bool(packed) == (share >= PACKED)


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize("hooks", [False, True])
def test_a_reference_pass_between_forward_and_backward(axis, share, hooks):
    layer = layer_of(axis, share=share)
    descend(layer, 2)
    x = inputs().requires_grad_()
    values = layer.neft_values["default"]
    want = torch.autograd.grad(layer(x).square().sum(), [x, values])
    # Behind hooks a saved parameter is another tensor, in the memory that it had.
    with kept_for_backward(layer) if hooks else nullcontext():
        loss = layer(x).square().sum()
    layer.enable_adapters(False)
    layer(inputs())
    layer.enable_adapters(True)
    got = torch.autograd.grad(loss, [x, values], retain_graph=True)
    layer(inputs())
    again = torch.autograd.grad(loss, [x, values])
    for found in (got, again):
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one, other)


def test_a_step_between_forward_and_backward_is_told():
    layer = layer_of(ROWS)
    loss = layer(inputs()).square().sum()
    with torch.no_grad():
        layer.neft_values["default"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_values_in_somebody_s_buffer_stay_there():
    layer = layer_of(ROWS)
    values = layer.neft_values["default"]
    buffer = torch.zeros(values.numel() + 5)
    buffer[5:] = values.detach().flatten()
    values.data = buffer[5:].view(values.shape)
    descend(layer, 2)
    assert layer.overlay.pack is None
    assert values.data_ptr() == buffer[5:].data_ptr()


def test_autocast_of_a_packed_weight():
    layer = layer_of(COLUMNS, share=0.8)
    descend(layer, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(inputs())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert layer.neft_values["default"].grad.dtype == torch.float32
    want = nn.functional.linear(inputs(), dense(layer, plain()), plain().bias)
    torch.testing.assert_close(output.float(), want, rtol=0.03, atol=0.03)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_of_packed_weights():
    torch._dynamo.reset()
    models = []
    for _ in range(2):
        base = tiny_llama(num_hidden_layers=1)
        tuned = get_peft_model(base, NeftConfig(mask=mask_for(base, "llama", 0.8)))
        models.append(perturbed(tuned))
    losses = []
    for model, run in ((models[0], models[0]),
                       (models[1], torch.compile(models[1], backend="aot_eager"))):  # fmt: skip
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(3):
            loss = run(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert any(layer.overlay.pack is not None for layer in neft_layers(model).values())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)


def test_memory_stays_flat_over_many_steps():
    base = tiny_llama()
    mask = mask_for(base, "llama", share=0.8)
    first = next(iter(mask.indices))
    mask = replace(mask, indices=mask.indices | {first: mask.indices[first][:3]})
    model = get_peft_model(base, NeftConfig(mask=mask))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    gc.collect()
    counts = []
    for step in range(60):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (4, 59):
            gc.collect()
            with open("/proc/self/maps") as areas:
                mapped = sum("deleted" in area for area in areas)
            held = storage_bytes(reachable(model))
            counts.append((held, mapped, len(os.listdir("/proc/self/fd"))))
    assert counts[0] == counts[1]
    assert torch.equal(out(model.unload()), out(tiny_llama()))


SHAPE = train_step.Shape(64, 172, 4, 4, 4, 256)


@pytest.mark.parametrize(
    ("layout", "percent"),
    [("mlp", p) for p in (3.0, 9.0, 20.0, 28.0, 32.0, 36.0, 43.0)]
    + [("mlp+gate", 36.0), ("all", 9.0), ("all", 60.0), ("all", 99.0)],
)
def test_never_more_memory_than_with_masked_gradients(layout, percent):
    peaks = {}
    for method in ("masked", "neft"):
        spec = train_step.Spec(
            method, SHAPE, percent, layout, 0, 0.0, 2, 32, "float32", "cpu", 1, 1.0, "fused", 1
        )  # fmt: skip
        peaks[method] = rivals.Rival(spec).answer("memory")["peak"]
    assert peaks["neft"] <= peaks["masked"]


def test_an_overlay_starts_with_nothing():
    overlay = Overlay(ROWS)
    assert not overlay.present
    assert overlay.held(torch.tensor([0])) is None
