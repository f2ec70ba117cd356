"""The layer alone: gradients, precisions, what a step costs and keeps."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from neft_core.groups import read_neurons, write_neurons
from neft_core.layer import NeftLinear
from neft_core.sparse import NeuronLinear
from neft_core.tuner import sync

ROWS, COLUMNS = 0, 1

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(kind: str, out=7, inside=5, dtype=torch.float32) -> tuple[nn.Module, bool]:
    torch.manual_seed(3)
    if kind == "conv1d":
        layer = Conv1D(out, inside)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        return layer.to(dtype), True
    return nn.Linear(inside, out, bias=kind == "bias", dtype=dtype), False


def sparse(kind: str, axis: int, indices, dtype=torch.float32, **sizes) -> NeftLinear:
    layer, _ = linear(kind, dtype=dtype, **sizes)
    rows = torch.tensor(indices)
    return NeftLinear(layer, "default", axis, len(rows), rows)


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_finite_differences(axis, shape, transposed):
    torch.manual_seed(4)
    indices = torch.tensor([1, 4])
    stored = torch.randn((5, 7) if transposed else (7, 5), dtype=torch.float64)
    bias = torch.randn(7, dtype=torch.float64)

    def mapped(x, values):
        weight = stored.clone()
        logical = weight.t() if transposed else weight
        write_neurons(logical, values.detach(), indices, axis)
        return NeuronLinear.apply(x, values, logical, bias, indices, axis)

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 5 if axis == ROWS else 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mapped, (x, values))


@pytest.mark.parametrize("kind", ["plain", "bias", "conv1d"])
@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize("indices", [[3], [0, 2, 4], list(range(5))], ids=["one", "some", "all"])
@pytest.mark.parametrize("layout", ["1d", "2d", "3d", "strided"])
def test_layer_gradients_are_those_of_the_plain_layer(kind, axis, indices, layout):
    torch.manual_seed(5)
    plain, transposed = linear(kind, out=5, dtype=torch.float64)
    layer = sparse(kind, axis, indices, torch.float64, out=5)
    x = torch.randn({"1d": (5,), "2d": (4, 5)}.get(layout, (2, 3, 5)), dtype=torch.float64)
    if layout == "strided":
        x = x.transpose(0, 1)
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    assert inputs[1].is_contiguous() == (layout != "strided")
    # Conv1D itself takes neither vectors nor strided inputs.
    outputs = [plain(inputs[0].reshape(-1, 5)).reshape(x.shape), layer(inputs[1])]
    torch.testing.assert_close(outputs[1], outputs[0])
    for y in outputs:
        (y**2).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    grad = plain.weight.grad.t() if transposed else plain.weight.grad
    want = grad[indices] if axis == ROWS else grad[:, indices].t()
    torch.testing.assert_close(layer.neft_values["default"].grad, want)
    assert layer.base_layer.weight.grad is None


def test_autocast_gives_gradients_in_float32_and_saves_half_the_bytes():
    layer = sparse("bias", ROWS, [0, 2])
    plain, _ = linear("bias")
    x = torch.randn(6, 5)
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        y, want = layer(x), plain(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    y.float().pow(2).sum().backward()
    want.float().pow(2).sum().backward()
    assert layer.neft_values["default"].grad.dtype == torch.float32
    torch.testing.assert_close(
        layer.neft_values["default"].grad, plain.weight.grad[[0, 2]], rtol=0.02, atol=0.02
    )
    assert saved[0].dtype == torch.bfloat16
    # Beside it the indices and the values; of the weight no copy in bfloat16.
    own = {layer.neft_indices["default"].data_ptr(), layer.neft_values["default"].data_ptr()}
    assert {tensor.data_ptr() for tensor in saved[1:3]} == own


def test_precisions_that_do_not_fit_are_refused_as_by_the_plain_layer():
    with pytest.raises(RuntimeError, match=r"float32, the layer's weight torch\.bfloat16"):
        sparse("plain", ROWS, [0], torch.bfloat16)(torch.randn(2, 5))


def test_checkpointing_recomputes_with_the_values_of_its_forward():
    layer = sparse("plain", COLUMNS, [0, 3])
    x = torch.randn(2, 5)
    optimizer = torch.optim.SGD([layer.neft_values["default"]], lr=0.1)
    for _ in range(3):
        y = checkpoint(layer, x, use_reentrant=False)
        want = torch.autograd.grad((layer(x) ** 2).sum(), layer.neft_values["default"])[0]
        (y**2).sum().backward()
        assert torch.equal(layer.neft_values["default"].grad, want)
        optimizer.step()
        optimizer.zero_grad()


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes kept for backward beside parameters and indices."""
    kept = {}
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x)
    assert output.requires_grad
    return sum(kept.values())


def test_columns_keep_only_the_inputs_that_they_see():
    x = torch.randn(4, 50, 64, requires_grad=True)
    columns = sparse("plain", COLUMNS, [3, 9, 20], out=32, inside=64)
    rows = sparse("plain", ROWS, [3, 9, 20], out=32, inside=64)
    plain, _ = linear("plain", out=32, inside=64)
    assert saved_bytes(columns, x) == 4 * 50 * 3 * 4
    assert saved_bytes(rows, x) == saved_bytes(plain, x) == 4 * 50 * 64 * 4


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_a_step_costs_the_frozen_layer_and_the_selected_gradient(axis):
    # 2N forward, 2N for the input's gradient, 2P for the selected: 4N + 2P for each token
    layer = sparse("plain", axis, [3, 9, 20], out=32, inside=64)
    x = torch.randn(4, 50, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    whole, trained = 32 * 64, layer.neft_values["default"].numel()
    assert counter.get_total_flops() == 4 * 50 * (4 * whole + 2 * trained)
    # Where nothing before the layer trains, the input's gradient is not formed.
    with FlopCounterMode(display=False) as counter:
        layer(x.detach()).sum().backward()
    assert counter.get_total_flops() == 4 * 50 * (2 * whole + 2 * trained)


class Largest(TorchDispatchMode):
    """The most numbers in one piece of new memory, however short its life, by kind of number."""

    def __init__(self, own: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.own = {t.untyped_storage().data_ptr() for t in own}
        self.numbers: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for t in tree_leaves(outputs):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.own:
                count = t.untyped_storage().nbytes() // t.element_size()
                self.numbers[t.dtype] = max(count, self.numbers.get(t.dtype, 0))
        return outputs

    @property
    def most(self) -> int:
        return max(self.numbers.values())


def largest(layer: NeftLinear, x: torch.Tensor, autocast: bool = False) -> Largest:
    """Of a step after the first, which keeps the originals."""
    # Asked for in each step, the parameters would have the base's bits each time.
    own = [*layer.parameters(), *layer.buffers()]
    optimizer = torch.optim.AdamW([layer.neft_values["default"]], lr=1e-3, foreach=False)
    for _ in range(3):
        mode = Largest(own)
        with mode:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layer(x)
            y.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return mode


@pytest.mark.parametrize("form", ["in_place", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bias", "conv1d"])
@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_no_step_allocates_what_a_weight_needs_not_even_briefly(axis, kind, dtype, form):
    layer = linear(kind, 48, 64, dtype)[0].requires_grad_(False)
    layer = NeftLinear(layer, "default", axis, 4, torch.tensor([1, 7, 30, 31]), form)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    assert largest(layer, x).most <= 6 * 64, "inputs, outputs and four neurons are smaller"


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_nor_does_a_packed_weight_s(axis):
    layer, _ = linear("bias", 48, 64)
    count = (36, 48)[axis]
    layer = NeftLinear(layer, "default", axis, count, torch.arange(count))
    x = torch.randn(2, 3, 64, requires_grad=True)
    step = largest(layer, x)
    assert layer.overlay.pack is not None
    assert step.most == layer.neft_values["default"].numel() == 48 * 64 * 3 // 4


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_autocast_copies_a_weight_of_float32_as_it_does_for_the_plain_layer(axis):
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer, _ = linear("plain", 48, 64, dtype)
        layer = NeftLinear(layer, "default", axis, 4, torch.tensor([1, 7, 30, 31]))
        x = torch.randn(2, 3, 64, requires_grad=True)
        found[dtype] = largest(layer, x, autocast=True)
    assert found[torch.float32].numbers[torch.bfloat16] == 48 * 64
    assert found[torch.float32].numbers[torch.float32] <= 6 * 64
    assert found[torch.bfloat16].most <= 6 * 64


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_read_and_written_are_the_same(axis, transposed):
    logical = torch.arange(35.0).reshape(7, 5)
    stored = logical.t().contiguous() if transposed else logical.clone()
    indices = torch.tensor([0, 3])
    view = stored.t() if transposed else stored
    values = read_neurons(view, indices, axis)
    assert torch.equal(values, logical[indices] if axis == ROWS else logical.t()[indices])
    write_neurons(view, -values - 1, indices, axis)
    changed = stored.t() if transposed else stored
    want = logical.clone()
    for index in indices.tolist():
        want[(index,) if axis == ROWS else (slice(None), index)] *= -1
        want[(index,) if axis == ROWS else (slice(None), index)] -= 1
    assert torch.equal(changed, want)


def test_the_last_step_reaches_the_weight_with_sync_and_earlier_ones_with_forward():
    layer = sparse("plain", ROWS, [1, 3])
    with torch.no_grad():
        layer.neft_values["default"].add_(1)
    assert not layer.overlay.present
    layer(torch.zeros(1, 5))
    assert torch.equal(layer.base_layer.weight[[1, 3]], layer.neft_values["default"])
    layer.neft_values["default"].data.mul_(2)  # in place and unseen by the version
    sync(layer)
    assert torch.equal(layer.base_layer.weight[[1, 3]], layer.neft_values["default"])
    values = layer.neft_values["default"]
    values.data = values.data + 1  # another tensor
    layer(torch.zeros(1, 5))
    assert torch.equal(layer.base_layer.weight[[1, 3]], layer.neft_values["default"])
    with torch.no_grad():
        layer.base_layer.weight.zero_()  # the base loaded anew
        layer(torch.zeros(1, 5))
    assert torch.equal(layer.base_layer.weight[[1, 3]], layer.neft_values["default"])
    with torch.inference_mode():
        layer.neft_values["default"].add_(1)
        layer(torch.zeros(1, 5))
    assert torch.equal(layer.base_layer.weight[[1, 3]], layer.neft_values["default"])


def test_a_step_between_forward_and_backward_is_an_error_and_not_a_wrong_gradient():
    layer = sparse("plain", ROWS, [1])
    x = torch.randn(2, 5, requires_grad=True)
    first = layer(x)
    with torch.no_grad():
        layer.neft_values["default"].add_(1)
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()
