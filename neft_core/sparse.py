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

from neft_core.again import factors, formed, picked
from neft_core.groups import ROWS, read_neurons
from neft_core.overlay import Overlay


def trained_linear(
    x: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    overlay: Overlay,
) -> Tensor:
    """A linear map whose selected neurons stand in its weight; arguments as of `NeuronLinear`."""
    keeper = None if torch.compiler.is_compiling() else overlay
    output: Tensor
    if overlay.pack is None:
        output = NeuronLinear.apply(x, values, weight, bias, indices, overlay.axis, keeper)
    else:
        packed = (*overlay.pack, overlay.axis, keeper)
        output = PackedLinear.apply(x, values, weight, bias, indices, *packed)
    return output


class NeuronLinear(torch.autograd.Function):
    """A linear map whose selected neurons are trained.

    Rows need the whole input for that, as every such map does; columns the k inputs they see.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        axis: int,
        overlay: Overlay | None = None,
    ) -> Tensor:
        """`x @ weight.T + bias`, [..., in] to [..., out].

        Args:
            ctx: autograd's.
            x: [..., in].
            values: the selected neurons, [k, D]; `weight` holds them already.
            weight: [out, in].
            bias: [out].
            indices: the selected rows or columns, [k].
            axis: 0 for rows, 1 for columns.
            overlay: what keeps the values in `weight`; without it they stay there until backward.
        """
        ctx.axis = axis
        keep(ctx, _inputs(ctx, x, indices, overlay), values, weight, indices, overlay)
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, [..., in], and of the selected neurons, [k, D]."""
        sources, indices, weight = kept(ctx)
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            if ctx.axis == ROWS:
                pair = picked(grad, indices), formed(sources, ctx.recipe)
            else:
                pair = formed(sources, ctx.recipe, indices), grad
            grad_values = _outer(*pair, ctx.values_dtype)
        return grad_x, grad_values, *[None] * 5


class PackedLinear(torch.autograd.Function):
    """A linear map of a packed weight: that of its neurons as they lie, put in order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        neurons: Tensor,
        order: Tensor,
        place: Tensor,
        axis: int,
        overlay: Overlay | None,
    ) -> Tensor:
        """`x @ weight.T + bias` as with a weight that isn't packed, [..., in] to [..., out].

        Args:
            ctx: autograd's.
            x: [..., in].
            values: the selected neurons, [k, D], the first of `neurons`.
            weight: [out, in].
            bias: [out].
            indices: rows or columns, [k].
            neurons: see `Pack`, as the next two.
            order: [n].
            place: [n].
            axis: 0 where neurons are rows, 1 for columns.
            overlay: what keeps the weight packed; without it it stays so until backward.
        """
        ctx.axis = axis
        seen = [order, place, *_inputs(ctx, x, indices, overlay)]
        keep(ctx, seen, values, neurons if overlay is None else weight, indices, overlay)
        if axis == ROWS:
            return _in_order(_linear(x, neurons, None), place, indices, bias)
        return _linear(_in_order(x, order, indices), neurons.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, [..., in], and of the selected neurons, [k, D]."""
        (order, place, *sources), indices, weight = kept(ctx)
        pack = None if ctx.overlay is None else ctx.overlay.pack
        neurons = weight if ctx.overlay is None else pack.neurons if pack is not None else None
        rows = ctx.axis == ROWS
        if rows:
            placed = _in_order(grad, order, indices)
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            if neurons is None:
                # Another adapter had its turn since; now the values stand in their places.
                grad_x = grad @ weight.to(grad.dtype)
            elif rows:
                grad_x = placed @ neurons.to(grad.dtype)
            else:
                grad_x = _in_order(F.linear(grad, neurons.to(grad.dtype)), place, indices)
        if ctx.needs_input_grad[1]:
            x = formed(sources, ctx.recipe)
            if not rows and ctx.recipe is not None and len(indices) < len(order):
                x = picked(x, indices)
            pair = (placed[..., : len(indices)], x) if rows else (x, grad)
            grad_values = _outer(*pair, ctx.values_dtype)
        return grad_x, grad_values, *[None] * 8


def _inputs(ctx: Any, x: Tensor, indices: Tensor, overlay: Overlay | None) -> Sequence[Tensor]:
    """What the gradient of the neurons needs of the input; `ctx.recipe` says how it is formed."""
    sources, ctx.recipe = ([x], None) if overlay is None else factors(x, overlay.trust)
    if ctx.recipe is None and ctx.axis != ROWS:
        return [picked(x, indices)]
    return sources


def _in_order(x: Tensor, places: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    """Entries of the last axis at `places`, [..., n], which are all in order if all train."""
    if len(indices) < len(places):
        x = picked(x, places)
    return x if bias is None else x + bias.to(x.dtype)


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
    seen = picked(x, indices).to(output.dtype)
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
    left, right = (t[None] if t.dim() == 1 else t.flatten(0, -2) for t in (left, right))
    return (left.t() @ right).to(dtype)
