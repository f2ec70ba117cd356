"""Linear maps of which only selected neurons are trained, and what stands in their weights.

Two forms give the same map. *In place*: the frozen weight holds the trained values, so the forward
pass is that of the frozen layer, and the backward pass forms the gradient of its input and of the
selected neurons, never that of the whole weight. *Additive*, for weights that can't be written
(quantised, sharded, shared): what the values differ from the frozen ones is added to the output.

Shapes: T tokens (all leading dimensions), in and out features, k selected neurons with D weights
each (D = in for rows, out for columns). Weights are logical [out, in], a view where the layer
stores [in, out].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from neft_core.groups import ROWS, read_neurons, write_neurons


def stamp(*tensors: Tensor) -> tuple[int, ...]:
    """Differs after every in-place change or move of one of the tensors that torch knows of."""
    return tuple(
        number
        for tensor in tensors
        for number in (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    )


class Overlay:
    """Neurons that stand in a weight in place of its own, and the bits that they replaced.

    Attributes:
        axis: 0 where the neurons are rows, 1 for columns.
        present: they stand there now; otherwise the weight has all of its own bits.
        indices: which neurons of the weight they are, [k].
        originals: what the weight has in their place, [k, D].
        edition: counts the changes of the weight.
        stale: a gradient was formed, so an optimiser may have changed the values unseen by torch.
    """

    indices: Tensor
    originals: Tensor

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.present = False
        self.edition = 0
        self.stale = False
        self._known: tuple[int, ...] = ()
        self._own: tuple[int, ...] = ()

    def write(self, weight: Tensor, values: Tensor, indices: Tensor) -> None:
        """Put values in the place of the neurons `indices`, and of no others."""
        if self.present and self._known != stamp(indices):
            self.lift(weight)
        if not self.present and (self._known, self._own) != (stamp(indices), stamp(weight)):
            self.indices, self._known = indices.clone(), stamp(indices)
            self.originals = read_neurons(weight, indices, self.axis)
        write_neurons(weight, values.detach(), indices, self.axis)
        self.present = True
        self.edition += 1
        self.stale = False

    def lift(self, weight: Tensor) -> None:
        """Give the weight all of its own bits again."""
        if self.present:
            write_neurons(weight, self.originals, self.indices, self.axis)
            self.present = False
            self.edition += 1
            self._own = stamp(weight)

    def held(self, indices: Tensor) -> Tensor | None:
        """The weight's own neurons `indices`, [k, D], where they have been replaced by others."""
        if self.present and torch.equal(self.indices, indices):
            return self.originals
        return None

    def forget(self) -> None:
        """The weight, which has its own bits, is about to move."""
        self._known = ()


class RowLinear(torch.autograd.Function):
    """A linear map whose selected rows are trained; saves its input, as every such map must."""

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
        keep(ctx, x, values, weight, indices, overlay)
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, [..., in], and of the selected rows, [k, in]."""
        x, indices, weight = kept(ctx)
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_values = _outer(grad.index_select(-1, indices), x, ctx.values_dtype)
        return grad_x, grad_values, None, None, None, None


class ColumnLinear(torch.autograd.Function):
    """A linear map whose selected columns are trained; saves the k inputs that they see."""

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
        keep(ctx, x.index_select(-1, indices), values, weight, indices, overlay)
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, [..., in], and of the selected columns, [k, out]."""
        seen, _, weight = kept(ctx)
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_values = _outer(seen, grad, ctx.values_dtype)
        return grad_x, grad_values, None, None, None, None


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
    seen: Tensor,
    values: Tensor,
    weight: Tensor,
    indices: Tensor,
    overlay: Overlay | None,
) -> None:
    """Save what backward needs. With an overlay, the weight may change in between."""
    ctx.values_dtype = values.dtype
    ctx.overlay = overlay
    if overlay is None:
        ctx.save_for_backward(seen, indices, weight)
    else:
        ctx.save_for_backward(seen, indices, values)
        ctx.weight, ctx.edition = weight, overlay.edition


def kept(ctx: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `keep` saved, with the weight as the forward pass saw it."""
    seen, indices, last = ctx.saved_tensors
    overlay = ctx.overlay
    if overlay is None:
        return seen, indices, last
    if overlay.edition != ctx.edition:
        # Another adapter, or none, had its turn since: a reference model, say.
        overlay.write(ctx.weight, last, indices)
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
