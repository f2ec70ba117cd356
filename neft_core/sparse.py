"""Training the selected neurons in place: the frozen weight holds them, compact masters train.

A layer keeps its own weight, of which the selected rows or columns are overwritten with the
trained values; so the forward pass is that of the frozen layer, and the backward pass forms the
gradient of its input and of the selected neurons, never that of the whole weight. The optimiser
sees one fp32 parameter per layer and nothing else: no decay, momentum or clipping reaches what is
not selected.

Shapes: T tokens (all leading dimensions), in and out features, k selected neurons with D weights
each (D = in for rows, out for columns). Weights are logical [out, in], a view where the layer
stores [in, out].
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from neft_core.errors import NeftError
from neft_core.groups import ROWS
from neft_core.masks import NeuronMask


class RowLinear(torch.autograd.Function):
    """A linear map whose selected rows are trained; saves its input, as every such map must."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor
    ) -> Tensor:
        """`x @ weight.T + bias`: [..., in] to [..., out]; `values` are in `weight` already."""
        ctx.save_for_backward(x, weight, indices)
        ctx.values_dtype = values.dtype
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, [..., in], and of the selected rows, [k, in]."""
        x, weight, indices = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_values = _outer(grad.index_select(-1, indices), x, ctx.values_dtype)
        return grad_x, grad_values, None, None, None


class ColumnLinear(torch.autograd.Function):
    """A linear map whose selected columns are trained; saves the k inputs that they see."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor
    ) -> Tensor:
        """`x @ weight.T + bias`: [..., in] to [..., out]; `values` are in `weight` already."""
        ctx.save_for_backward(x.index_select(-1, indices), weight)
        ctx.values_dtype = values.dtype
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, [..., in], and of the selected columns, [k, out]."""
        seen, weight = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_values = _outer(seen, grad, ctx.values_dtype)
        return grad_x, grad_values, None, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The map in the precision of `x`; autocast, if on, has been applied to `x` before."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _outer(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over tokens of the outer products, [..., a] and [..., b] to [a, b]."""
    product = left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])
    return product.to(dtype)


def read_values(weight: Tensor, indices: Tensor, axis: int, transposed: bool) -> Tensor:
    """A copy of the neurons `indices` of a stored weight, [k, D]."""
    logical = weight.detach().t() if transposed else weight.detach()
    chosen = logical.index_select(axis, indices)
    return (chosen if axis == ROWS else chosen.t()).contiguous()


@torch.no_grad()
def write_values(
    weight: Tensor, values: Tensor, indices: Tensor, axis: int, transposed: bool
) -> None:
    """Overwrite the neurons `indices` of a stored weight, in its precision.

    Args:
        weight: [out, in], or [in, out] where `transposed`.
        values: what to write, [k, D].
        indices: rows (axis 0) or columns (axis 1) of the logical weight, [k].
        axis: 0 for rows, 1 for columns.
        transposed: the weight is stored as [in, out].
    """
    logical = weight.t() if transposed else weight
    rounded = values.to(device=weight.device, dtype=weight.dtype)
    logical.index_copy_(axis, indices, rounded if axis == ROWS else rounded.t())


class SparseLinear(nn.Module):
    """A frozen linear layer with trained neurons.

    Attributes:
        base: the layer, whose weight holds the current values.
        values: the trained neurons, [k, D], fp32 (fp64 in a model of fp64).
        indices: which rows or columns of the logical weight they are, [k].
        originals: what the base had in their place, bit by bit, [k, D].
    """

    indices: Tensor
    originals: Tensor

    def __init__(self, base: nn.Module, axis: int, indices: Tensor, transposed: bool) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.axis = axis
        self.transposed = transposed
        weight = self._weight()
        indices = indices.to(weight.device)
        originals = read_values(weight, indices, axis, transposed)
        precision = torch.promote_types(weight.dtype, torch.float32)
        self.values = nn.Parameter(originals.to(precision, copy=True))
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("originals", originals, persistent=False)
        self._written = self._state()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], with every optimiser step so far applied."""
        if self._state() != self._written:
            self.sync()
        weight = self._weight()
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        elif x.dtype != weight.dtype:
            raise RuntimeError(f"input is {x.dtype}, the layer's weight {weight.dtype}")
        function = RowLinear if self.axis == ROWS else ColumnLinear
        logical = weight.t() if self.transposed else weight
        output: Tensor = function.apply(x, self.values, logical, self.base.bias, self.indices)
        return output

    def sync(self) -> None:
        """Write the values into the base's weight."""
        self._write(self.values)

    def restore(self) -> None:
        """Put the originals back into the base's weight."""
        self._write(self.originals)

    def _write(self, values: Tensor) -> None:
        write_values(self._weight(), values.detach(), self.indices, self.axis, self.transposed)
        self._written = self._state()

    def _weight(self) -> Tensor:
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def _state(self) -> tuple[int, ...]:
        """Changes with every in-place change or move of the values or the weight."""
        weight = self._weight()
        return (
            self.values._version,
            self.values.data_ptr(),
            weight._version,
            weight.data_ptr(),
        )


def attach(model: nn.Module, mask: NeuronMask) -> nn.Module:
    """Make the mask's neurons the only trainable parameters of a model, in place.

    A module's name in the mask may lack a prefix that the model has. Layers without a selected
    neuron stay as they are, frozen. The model computes what it did before.

    An optimiser that changes parameters without torch knowing (kernels on raw pointers, as those
    of bitsandbytes) needs `sync` after each of its steps; all others need it only after the last.

    Returns:
        The same model.

    Raises:
        NeftError: a module of the mask is absent, not linear, or of another shape, or the model
            has trained neurons already.
    """
    if next(sparse_layers(model), None) is not None:
        raise NeftError("model: has trained neurons already; detach them first")
    modules = dict(model.named_modules())
    chosen = {name: rows for name, rows in mask.indices.items() if len(rows)}
    # All checks come first, so that a refused mask leaves the model whole.
    found = {_find(modules, name, mask): (name, rows) for name, rows in chosen.items()}
    model.requires_grad_(False)
    for full_name, (name, rows) in found.items():
        group = mask.groups[name]
        layer = SparseLinear(modules[full_name], group.axis, rows, group.transposed)
        layer.train(modules[full_name].training)
        model.set_submodule(full_name, layer)
    return model


def sync(model: nn.Module) -> None:
    """Write all trained values into the model's weights: before evaluating or saving them."""
    for _, layer in sparse_layers(model):
        layer.sync()


def detach(model: nn.Module, restore: bool) -> nn.Module:
    """Put the plain layers back, in place, still frozen.

    Args:
        model: a model that `attach` changed.
        restore: give the weights the bits that they had before `attach`; otherwise they keep the
            trained values, rounded to their precision.

    Returns:
        The same model.
    """
    for name, layer in list(sparse_layers(model)):
        if restore:
            layer.restore()
        else:
            layer.sync()
        model.set_submodule(name, layer.base)
    return model


def sparse_state(model: nn.Module) -> dict[str, Tensor]:
    """What was trained: `MODULE.values` [k, D] and `MODULE.indices` [k] for each layer, copied."""
    state: dict[str, Tensor] = {}
    for name, layer in sparse_layers(model):
        state[f"{name}.values"] = layer.values.detach().clone()
        state[f"{name}.indices"] = layer.indices.clone()
    return state


def load_sparse_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Continue from a `sparse_state` of the same mask.

    Raises:
        NeftError: the state is of other modules, neurons or shapes; the model is unchanged then.
    """
    layers = dict(sparse_layers(model))
    expected = {f"{name}.{part}" for name in layers for part in ("values", "indices")}
    if different := sorted(expected ^ set(state)):
        side = "lacks" if different[0] in expected else "has"
        raise NeftError(f"adapter: {side} {different[0]}; it was made with another mask")
    for name, layer in layers.items():
        indices, values = state[f"{name}.indices"], state[f"{name}.values"]
        same = torch.equal(indices.to(layer.indices.device), layer.indices)
        if not same or values.shape != layer.values.shape:
            raise NeftError(f"adapter: {name} has other neurons; it was made with another mask")
    for name, layer in layers.items():
        with torch.no_grad():
            layer.values.copy_(state[f"{name}.values"])
        layer.sync()


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """The layers with trained neurons, by name."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            yield name, module


def _find(modules: dict[str, nn.Module], name: str, mask: NeuronMask) -> str:
    """The model's name for a module of the mask, checked."""
    ends = [full for full in modules if full == name or full.endswith(f".{name}")]
    if len(ends) != 1:
        found = "no such module" if not ends else f"{len(ends)} such modules"
        raise NeftError(f"{mask.source}: {name}: the model has {found}; use the mask's own model")
    module, group, rows = modules[ends[0]], mask.groups[name], mask.indices[name]
    conv1d = type(module).__name__ == "Conv1D"
    weight = getattr(module, "weight", None)
    if not (conv1d or isinstance(module, nn.Linear)) or not isinstance(weight, Tensor):
        raise NeftError(
            f"{mask.source}: {name} is a {type(module).__name__} in this model; "
            "a linear layer is needed"
        )
    if not weight.is_floating_point() or conv1d != group.transposed or not group.fits(weight.shape):
        raise NeftError(
            f"{mask.source}: {name} has shape {tuple(weight.shape)} and {weight.dtype} in this "
            "model; use the mask's own model, not quantised"
        )
    first, last = group.start, group.start + group.count
    if rows[0] < first or rows[-1] >= last or (rows.diff() <= 0).any():
        raise NeftError(
            f"{mask.source}: {name} has indices that are not increasing in [{first}, {last}); "
            "run 'neft stage select'"
        )
    return ends[0]
