"""Linear maps of which only selected neurons are trained.

Three forms give the same map. *In place*: the frozen weight holds the trained values, so the
forward pass is that of the frozen layer, and the backward pass forms the gradient of its input and
of the selected neurons, never that of the whole weight. *Packed*: the same, with trained and other
neurons apart in the weight's memory. *Additive*, for weights that can't be written (quantised,
sharded, shared): what the values differ from the frozen ones is added to the output.

Shapes: T tokens (all leading dimensions), in and out features, k selected neurons with D weights
each (D = in for rows, out for columns). Weights are logical [out, in], a view where the layer
stores [in, out].
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from neft_core.again import factors, formed
from neft_core.groups import ROWS, read_neurons
from neft_core.overlay import Overlay, Pack


def trained_linear(
    x: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    overlay: Overlay,
) -> Tensor:
    """A linear map whose selected neurons stand in its weight; arguments as of `RowLinear`."""
    compiling, pack = torch.compiler.is_compiling(), overlay.pack
    function: Any = RowLinear if overlay.axis == ROWS else ColumnLinear
    if pack is not None:
        if compiling:
            return packed(x, values, bias, indices, overlay.axis, pack)
        function = PackedLinear
    keeper = None if compiling else overlay
    output: Tensor = function.apply(x, values, weight, bias, indices, keeper)
    return output


class RowLinear(torch.autograd.Function):
    """A linear map whose selected rows are trained; needs its input, as every such map must."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        overlay: Overlay | None = None,
    ) -> Tensor:
        """`x @ weight.T + bias`, [..., in] to [..., out].

        Args:
            ctx: autograd's.
            x: [..., in].
            values: the selected neurons, [k, D]; `weight` holds them already.
            weight: [out, in].
            bias: [out].
            indices: the selected rows, [k].
            overlay: what keeps the values in `weight`; without it they stay there until backward.
        """
        sources, ctx.recipe = factors(x)
        keep(ctx, sources, values, weight, indices, overlay)
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, [..., in], and of the selected rows, [k, in]."""
        sources, indices, weight = kept(ctx)
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            x = formed(sources, ctx.recipe)
            grad_values = _outer(grad.index_select(-1, indices), x, ctx.values_dtype)
        return grad_x, grad_values, None, None, None, None


class ColumnLinear(torch.autograd.Function):
    """A linear map whose selected columns are trained; needs the k inputs that they see."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        overlay: Overlay | None = None,
    ) -> Tensor:
        """As that of `RowLinear`, for columns."""
        sources, ctx.recipe = factors(x)
        if ctx.recipe is None:
            sources = [x.index_select(-1, indices)]
        keep(ctx, sources, values, weight, indices, overlay)
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, [..., in], and of the selected columns, [k, out]."""
        sources, indices, weight = kept(ctx)
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            seen = formed(sources, ctx.recipe, indices)
            grad_values = _outer(seen, grad, ctx.values_dtype)
        return grad_x, grad_values, None, None, None, None


class PackedLinear(torch.autograd.Function):
    """A linear map whose weight is packed: its trained neurons are `values`, no copies of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        overlay: Overlay,
    ) -> Tensor:
        """As that of `RowLinear`, for rows or columns; `weight` is what `overlay` has packed."""
        assert overlay.pack is not None
        sources, ctx.recipe = factors(x)
        if ctx.recipe is None and overlay.axis != ROWS:
            sources = [x.index_select(-1, indices)]
        keep(ctx, sources, values, weight, indices, overlay)
        with torch.autocast(x.device.type, enabled=False):
            return packed(x, values, bias, indices, overlay.axis, overlay.pack)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, [..., in], and of the selected neurons, [k, D]."""
        sources, indices, weight = kept(ctx)
        rows, pack = ctx.overlay.axis == ROWS, ctx.overlay.pack
        left = grad.index_select(-1, indices) if rows and len(indices) < grad.shape[-1] else grad
        grad_x = grad_values = None
        if ctx.needs_input_grad[0] and pack is None:
            grad_x = grad @ weight.to(grad.dtype)
        elif ctx.needs_input_grad[0]:
            values, rest = pack.values.to(grad.dtype), pack.rest.to(grad.dtype)
            if rows:
                grad_x = left @ values
                if len(rest):
                    grad_x += grad.index_select(-1, pack.others) @ rest
            else:
                grad_x = _side_by_side(grad, values, rest, pack.place)
        if ctx.needs_input_grad[1]:
            x = formed(sources, ctx.recipe, None if rows else indices)
            grad_values = (
                _outer(left, x, ctx.values_dtype) if rows else _outer(x, grad, ctx.values_dtype)
            )
        return grad_x, grad_values, None, None, None, None


def packed(
    x: Tensor, values: Tensor, bias: Tensor | None, indices: Tensor, axis: int, pack: Pack
) -> Tensor:
    """A linear map of a packed weight in the precision of `x`, [..., in] to [..., out].

    Args:
        x: [..., in].
        values: the selected neurons, [k, D], in the memory of `pack.values`.
        bias: [out].
        indices: rows or columns, [k].
        axis: 0 for rows, 1 for columns.
        pack: the other neurons.
    """
    values, rest = values.to(x.dtype), pack.rest.to(x.dtype)
    if axis == ROWS:
        output = _side_by_side(x, values, rest, pack.place)
    elif len(rest):
        output = x.index_select(-1, indices) @ values + x.index_select(-1, pack.others) @ rest
    else:
        output = x @ values
    return output if bias is None else output + bias.to(x.dtype)


def _side_by_side(x: Tensor, values: Tensor, rest: Tensor, place: Tensor) -> Tensor:
    """`x` times each neuron of both parts, [..., D] to [..., n]."""
    if not len(rest):
        return F.linear(x, values)
    return torch.cat([F.linear(x, values), F.linear(x, rest)], -1).index_select(-1, place)


class Correction(torch.autograd.Function):
    """What selected neurons add to the output of a weight that holds others in their place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, held: Tensor, indices: Tensor, axis: int, whole: bool
    ) -> Tensor:
        """`x @ (values - held).T`, [..., in] to [..., k], or for columns [..., k] to [..., out].

        Args:
            ctx: autograd's.
            x: the input; for columns the part of it that they see.
            values: the selected neurons, [k, D], rounded here to the precision of `held`.
            held: what the weight has in their place, [k, D], or the weight itself.
            indices: rows or columns, [k].
            axis: 0 for rows, 1 for columns.
            whole: `held` is the weight, [out, in].
        """
        ctx.save_for_backward(x, values, held, indices)
        ctx.axis, ctx.whole = axis, whole
        return x @ _change(values, held, indices, axis, whole, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of the selected neurons, [k, D]."""
        x, values, held, indices = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            change = _change(values, held, indices, ctx.axis, ctx.whole, grad.dtype)
            grad_x = grad @ change.t()
        if ctx.needs_input_grad[1]:
            left, right = (grad, x) if ctx.axis == ROWS else (x, grad)
            grad_values = _outer(left, right, values.dtype)
        return grad_x, grad_values, None, None, None, None


def corrected(
    output: Tensor,
    x: Tensor,
    values: Tensor,
    held: Tensor,
    indices: Tensor,
    axis: int,
    whole: bool,
) -> Tensor:
    """The output of a linear map, [..., out], had its weight `values` in the place of `held`."""
    if axis == ROWS:
        part = Correction.apply(x.to(output.dtype), values, held, indices, axis, whole)
        return output.index_add(-1, indices, part)
    seen = x.index_select(-1, indices).to(output.dtype)
    total: Tensor = output + Correction.apply(seen, values, held, indices, axis, whole)
    return total


def _change(
    values: Tensor, held: Tensor, indices: Tensor, axis: int, whole: bool, dtype: torch.dtype
) -> Tensor:
    """The difference of the neurons, as the matrix that an input is multiplied with."""
    if whole:
        held = read_neurons(held, indices, axis)
    precise = torch.promote_types(held.dtype, torch.float32)
    change = (values.to(held.dtype).to(precise) - held.to(precise)).to(dtype)
    return change.t() if axis == ROWS else change


def keep(
    ctx: Any,
    seen: Sequence[Tensor],
    values: Tensor,
    weight: Tensor,
    indices: Tensor,
    overlay: Overlay | None,
) -> None:
    """Save what backward needs. With an overlay, the weight may change in between."""
    ctx.values_dtype = values.dtype
    ctx.overlay = overlay
    if overlay is None:
        ctx.save_for_backward(*seen, indices, weight)
    else:
        ctx.save_for_backward(*seen, indices, values)
        ctx.weight, ctx.edition = weight, overlay.edition
        # A parameter may be in other memory by then.
        ctx.parameter = values if values.is_leaf else None


def kept(ctx: Any) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """What `keep` saved, with the weight as the forward pass saw it."""
    *seen, indices, last = ctx.saved_tensors
    overlay = ctx.overlay
    if overlay is None:
        return seen, indices, last
    if overlay.edition != ctx.edition:
        # Another adapter, or none, had its turn since: a reference model, say.
        overlay.write(ctx.weight, last if ctx.parameter is None else ctx.parameter, indices)
    overlay.stale = True
    return seen, indices, ctx.weight


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The map in the precision of `x`; autocast, if on, has been applied to `x` before."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _outer(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over tokens of the outer products, [..., a] and [..., b] to [a, b]."""
    product = left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])
    return product.to(dtype)
