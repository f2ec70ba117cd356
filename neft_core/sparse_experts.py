"""Experts of which only selected neurons are trained: the linear maps of 3-D parameters.

The pairs of a token and one of its experts are sorted by expert, so that each expert's matrix meets
its tokens at once. Forward is that of the frozen experts; backward forms the gradient of the input
and of the selected neurons. An expert without selected neurons keeps nothing for backward, and one
that no token reached has a zero gradient.

Shapes: T tokens, c experts for each, S = T * c pairs, E experts, k selected neurons of all experts
with D weights each. Weights are logical [E, out, in], a view where the model stores [E, in, out].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neft_core.frozen import has_content
from neft_core.groups import ROWS
from neft_core.overlay import Overlay
from neft_core.sparse import keep, kept

Linear = Callable[[str, Tensor, "Route", bool], Tensor]

EAGER = ("eager", None)
"""The implementations by which an experts module of transformers computes in its own code."""
CAST = (*EAGER, "batched_mm")
"""Those whose products autocast casts; the others, `grouped_mm` above all, which is the default,
compute in the weight's own precision, with autocast and without."""


@dataclass(frozen=True, eq=False)
class Route:
    """Which token meets which expert, sorted by expert.

    Attributes:
        tokens: the token of each pair, [S].
        place: where each pair of the original order [T * c] is in the sorted one, [S].
        experts: the expert of each pair, [S].
        bounds: first pair of each expert, and the end of the last: E + 1 numbers.
        each_token: experts of each token, c.
    """

    tokens: Tensor
    place: Tensor
    experts: Tensor
    bounds: list[int]
    each_token: int

    @classmethod
    def sorted(cls, chosen: Tensor, experts: int) -> "Route":
        """From the experts of each token, [T, c]; a number from `experts` on means none."""
        flat = chosen.reshape(-1)
        ids, order = flat.sort(stable=True)
        edges = torch.arange(experts + 1, device=flat.device, dtype=ids.dtype)
        bounds = _bounds(ids, edges)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        each = chosen.shape[-1]
        return cls(order // each, place, ids.clamp(max=experts - 1), bounds, each)

    def pairs(self, expert: int) -> slice:
        """Those of an expert."""
        return slice(self.bounds[expert], self.bounds[expert + 1])

    def count(self, expert: int) -> int:
        """How many those are."""
        return self.bounds[expert + 1] - self.bounds[expert]


@dataclass(frozen=True, eq=False)
class Selected:
    """The selected neurons of one expert.

    Attributes:
        expert: its number.
        rows: which of all k selected neurons are its own.
        within: rows or columns of its matrix that they are.
    """

    expert: int
    rows: slice
    within: Tensor


def by_expert(indices: Tensor, experts: int, width: int) -> list[Selected]:
    """Sorted neurons of all experts, [k], apart; experts without any are left out."""
    edges = torch.arange(experts + 1, device=indices.device) * width
    bounds = _bounds(indices, edges)
    return [
        Selected(e, slice(first, last), indices[first:last] - e * width)
        for e, (first, last) in enumerate(pairwise(bounds))
        if first < last
    ]


def _bounds(ids: Tensor, edges: Tensor) -> list[int]:
    """How many of some sorted numbers are below each edge; in a forecast, as if evenly spread."""
    if not has_content(ids):
        return [len(ids) * e // (len(edges) - 1) for e in range(len(edges))]
    below: list[int] = torch.searchsorted(ids, edges).tolist()
    return below


class ExpertsLinear(torch.autograd.Function):
    """Each expert's linear map of its own tokens, with selected rows or columns trained."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor | None,
        weight: Tensor,
        indices: Tensor | None,
        axis: int,
        route: Route,
        gather: bool,
        overlay: Overlay | None,
        stand: bool,
    ) -> Tensor:
        """The sorted pairs' outputs, [S, out].

        Args:
            ctx: autograd's.
            x: tokens [T, in] where `gather`, else the sorted pairs' inputs [S, in].
            values: the selected neurons, [k, D]; None: the weight is frozen as a whole.
            weight: [E, out, in].
            indices: the selected neurons, sorted, [k].
            axis: 0 where they are rows of the experts' matrices, 1 for columns.
            route: which pair is whose.
            gather: the inputs of pairs are to be taken from their tokens.
            overlay: what keeps the values in `weight`; without it they stay there until backward.
            stand: `weight` holds the values; else they are put into a copy of one expert's matrix
                at a time.
        """
        pairs = x.index_select(0, route.tokens) if gather else x
        ctx.axis, ctx.route, ctx.gather, ctx.stand = axis, route, gather, stand
        ctx.width, ctx.frozen = x.shape[-1], values is None
        if values is None or indices is None:
            ctx.selected, ctx.weight = [], weight
            return _by_expert(pairs, weight, route, True)
        ctx.selected = by_expert(indices, len(weight), weight.shape[1 + axis])
        seen = _seen(x, pairs, ctx) if ctx.needs_input_grad[1] else x[:0]
        if stand:
            keep(ctx, [seen], values, weight, indices, overlay)
            return _by_expert(pairs, weight, route, True)
        ctx.values_dtype = values.dtype
        ctx.save_for_backward(seen, indices, weight, values)
        return _by_expert(pairs, weight, route, True, (values, ctx.selected, axis))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, as it was given, and of the selected neurons, [k, D]."""
        # Some call this amid autocast too, but here precisions are those of the forward pass.
        with torch.autocast(grad.device.type, enabled=False):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """See `ExpertsLinear.backward`."""
    route, standing, seen = ctx.route, None, grad
    if ctx.frozen:
        weight = ctx.weight
    elif ctx.stand:
        (seen,), indices, weight = kept(ctx)
    else:
        seen, indices, weight, values = ctx.saved_tensors
        standing = (values, ctx.selected, ctx.axis)
    grad_x = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_x = _by_expert(grad, weight, route, False, standing)
        if ctx.gather:
            pairs = grad_x.index_select(0, route.place)
            grad_x = pairs.view(-1, route.each_token, pairs.shape[-1]).sum(1)
    if ctx.needs_input_grad[1]:
        length = ctx.width if ctx.axis == ROWS else grad.shape[-1]
        grad_values = grad.new_zeros(len(indices), length, dtype=ctx.values_dtype)
        for mine, inputs in _inputs(ctx, seen):
            outer = grad[route.pairs(mine.expert)]
            if ctx.axis == ROWS:
                product = outer.index_select(1, mine.within).t() @ inputs
            else:
                product = inputs.t() @ outer
            grad_values[mine.rows] = product.to(ctx.values_dtype)
    return grad_x, grad_values, None, None, None, None, None, None, None


def _by_expert(
    pairs: Tensor,
    weight: Tensor,
    route: Route,
    forward: bool,
    standing: tuple[Tensor, list[Selected], int] | None = None,
) -> Tensor:
    """Each expert's pairs through its matrix, [S, in] to [S, out], or back, [S, out] to [S, in].

    Args:
        pairs: sorted by expert.
        weight: [E, out, in].
        route: which pair is whose.
        forward: from in to out.
        standing: neurons that stand in place of those of `weight`: values, which they are, axis.
    """
    output = pairs.new_empty(len(pairs), weight.shape[1 if forward else 2])
    own = {mine.expert: mine for mine in standing[1]} if standing else {}
    for expert, matrix in enumerate(weight):
        if not route.count(expert):
            continue
        if standing and expert in own:
            values, _, axis = standing
            part = values[own[expert].rows].detach().to(matrix.dtype)
            matrix = matrix.index_copy(axis, own[expert].within, part if axis == ROWS else part.t())
        mine, matrix = route.pairs(expert), matrix.to(pairs.dtype)
        torch.mm(pairs[mine], matrix.t() if forward else matrix, out=output[mine])
    output[route.bounds[-1] :] = 0
    return output


def _seen(x: Tensor, pairs: Tensor, ctx: Any) -> Tensor:
    """What the gradient of the selected neurons needs, in one tensor."""
    route = ctx.route
    reached = [mine for mine in ctx.selected if route.count(mine.expert)]
    if ctx.axis != ROWS:
        parts = [pairs[route.pairs(m.expert)].index_select(1, m.within).flatten() for m in reached]
        return torch.cat(parts) if parts else x.new_empty(0)
    needed = sum(route.count(mine.expert) for mine in reached)
    # The input itself costs nothing where something else keeps it, and less where it is smaller.
    ctx.whole = needed >= len(x)
    if ctx.whole:
        return x
    parts = [pairs[route.pairs(mine.expert)] for mine in reached]
    return torch.cat(parts) if parts else x[:0]


def _inputs(ctx: Any, seen: Tensor) -> Iterator[tuple[Selected, Tensor]]:
    """For each expert that was reached, what `_seen` kept: [pairs, in], or [pairs, k of it]."""
    route, first = ctx.route, 0
    for mine in ctx.selected:
        count = route.count(mine.expert)
        if not count:
            continue
        if ctx.axis != ROWS:
            last = first + count * len(mine.within)
            yield mine, seen[first:last].view(count, -1)
        elif ctx.whole and ctx.gather:
            last = first
            yield mine, seen.index_select(0, route.tokens[route.pairs(mine.expert)])
        elif ctx.whole:
            last = first
            yield mine, seen[route.pairs(mine.expert)]
        else:
            last = first + count
            yield mine, seen[first:last]
        first = last


def precision(experts: Any, x: Tensor, weight: Tensor) -> torch.dtype:
    """In which precision an experts module of transformers multiplies its input with a weight.

    Raises:
        RuntimeError: the input has another than the weight, and nobody casts it.
    """
    if experts.config._experts_implementation not in CAST:
        return weight.dtype
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    if x.dtype != weight.dtype:
        raise RuntimeError(f"input is {x.dtype}, the experts' weight {weight.dtype}")
    return x.dtype


def experts_forward(
    experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, linear: Linear
) -> Tensor:
    """What an experts module of transformers computes, whichever way it is told to.

    Args:
        experts: the module: `has_gate`, `has_bias`, `is_transposed` say how it is built, its
            `_apply_gate` what lies between the maps.
        hidden: tokens, [T, H].
        chosen: experts of each token, [T, c].
        weights: their shares, [T, c].
        linear: name of a parameter, input, route and whether to gather -> the pairs' outputs.
    """
    route = Route.sorted(chosen, experts.num_experts)
    # With mixed precisions, as under autocast, the ways differ in where they round.
    eager = experts.config._experts_implementation in EAGER

    def mapped(name: str, x: Tensor, gather: bool) -> Tensor:
        output = linear(name, x, route, gather)
        if experts.has_bias:
            total = output + getattr(experts, f"{name}_bias")[route.experts]
            output = total if eager else total.to(output.dtype)
        return output

    if experts.has_gate:
        units = experts._apply_gate(mapped("gate_up_proj", hidden, True))
    else:
        units = experts.act_fn(mapped("up_proj", hidden, True))
    output = mapped("down_proj", units, False)
    if experts.has_post_expert_norm:
        output = experts.post_expert_norm(output)
    # In the order of tokens again, so that each token's sum has a fixed order.
    ordered = output.index_select(0, route.place) * weights.reshape(-1, 1)
    if eager:
        ordered = ordered.to(hidden.dtype)
    return ordered.view(-1, route.each_token, ordered.shape[-1]).sum(1).to(hidden.dtype)
