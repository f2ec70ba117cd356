"""Selection without a warm-up: how far a gradient step would turn each neuron.

Shapes: N candidates of a module, D weights in each.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neft_core.errors import NeftError
from neft_core.frozen import has_content
from neft_core.groups import Group, Source
from neft_core.masks import NeuronScores
from neft_core.neurons import candidates, count_parameters, is_tied, sources
from neft_core.patterns import Patterns
from neft_core.steps import evaluating, loss_sum
from neft_core.weights import weights

_PIECE = 1 << 22


def gradient_scores(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    layout: str | Patterns = "mlp",
    *,
    relative: bool = False,
    memory: float = math.inf,
    provenance: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NeuronScores:
    """Score every candidate by the gradient of the loss over some batches, in the base's weights.

    With g the neuron's part of the summed gradient, the score is the size of the part of -g that is
    perpendicular to the neuron w. To first order a step along -g turns w by that size divided by
    |w|, which is the score when `relative`.

    The gradient of one weight exists at a time: as soon as it is there it is added, in fp32 (fp64
    for a model in fp64), to a sum over the batches and dropped. The sums of all candidates take 4
    bytes a weight; under `memory` the modules are scored in several passes over the batches, with
    the same result.

    Args:
        model: a causal language model, on its device.
        batches: each with `input_ids`, `attention_mask` and `labels`, [B, T]; the loss is the mean
            over the trained tokens of all of them.
        layout: which neurons are candidates.
        relative: divide by the size of the neuron.
        memory: bytes that the sums may take; one module's are the least.
        provenance: what else to keep with the scores.
        progress: called after each batch with the number done and that of all passes.

    Raises:
        NeftError: no batch, no trained token, a gradient that is not finite, or a layout that does
            not fit the model.
    """
    known = weights(model, "model").config
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    kind = str(known["model_type"])
    groups = candidates(shapes, kind, layout)
    parts = passes(groups, memory)
    total = len(parts) * len(batches)
    found: dict[str, Tensor] = {}
    with evaluating(model):
        for number, part in enumerate(parts):

            def losses(earlier: int = number * len(batches)) -> Iterator[tuple[Tensor, int]]:
                for position, batch in enumerate(batches, start=1):
                    yield loss_sum(model, batch)
                    if progress is not None:
                        progress(earlier + position, total)

            found |= pass_scores(model, part, losses(), relative, kind)
    return NeuronScores(
        found,
        {group.module: group for group in groups},
        count_parameters(shapes, is_tied(known)),
        {
            **(provenance or {}),
            "model_type": kind,
            "layout": str(layout),
            "criterion": "gradient",
            "relative": str(relative).lower(),
        },
    )


def pass_scores(
    model: nn.Module,
    groups: Sequence[Group],
    losses: Iterable[tuple[Tensor, int]],
    relative: bool,
    kind: str,
) -> dict[str, Tensor]:
    """Scores of the modules of one pass.

    Args:
        model: see `gradient_scores`.
        groups: the modules' candidates.
        losses: sums of a batch's losses and how many tokens they are of, formed when asked for.
        relative: see `gradient_scores`.
        kind: the `model_type`.

    Raises:
        NeftError: no trained token, or a gradient that is not finite.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    tokens = 0
    with _summing(model, groups, shapes, kind) as gradients:
        for loss, trained in losses:
            loss.backward()
            tokens += trained
        if not tokens:
            raise NeftError("gradient: the rows have no trained token; give rows with one")
        return {
            group.module: _turned(model, group, gradients, tokens, relative, kind)
            for group in groups
        }


def passes(groups: Sequence[Group], memory: float) -> list[list[Group]]:
    """Groups in order, as many in a pass as their sums have room, one at least."""
    found: list[list[Group]] = []
    used = math.inf
    for group in groups:
        size = 4 * group.count * group.length
        if used + size > memory or not found:
            found.append([])
            used = 0
        found[-1].append(group)
        used += size
    return found


@contextmanager
def _summing(
    model: nn.Module, groups: Sequence[Group], shapes: Mapping[str, tuple[int, ...]], kind: str
) -> Iterator[dict[tuple[str, int], Tensor]]:
    """While it lasts, gradients of these candidates are added up by module and source."""
    sums: dict[tuple[str, int], Tensor] = {}
    parameters = dict(model.named_parameters())
    wanted: dict[str, list[tuple[tuple[str, int], Source]]] = {}
    for group in groups:
        for number, source in enumerate(sources(group, shapes, kind)):
            wanted.setdefault(source.parameter, []).append(((group.module, number), source))
    trained = {name: p.requires_grad for name, p in parameters.items()}
    before = {name: parameters[name].grad for name in wanted}

    def adding(name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            for key, source in wanted[name]:
                part = source.read(gradient)
                if key in sums:
                    sums[key] += part
                else:
                    sums[key] = part.to(torch.promote_types(part.dtype, torch.float32), copy=True)
            parameter.grad = None

        return add

    handles: list[Any] = []
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in wanted)
        for name in wanted:
            parameters[name].grad = None
        handles = [
            parameters[name].register_post_accumulate_grad_hook(adding(name)) for name in wanted
        ]
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(trained[name])
        for name, gradient in before.items():
            parameters[name].grad = gradient


def _turned(
    model: nn.Module,
    group: Group,
    gradients: Mapping[tuple[str, int], Tensor],
    tokens: int,
    relative: bool,
    kind: str,
) -> Tensor:
    """Sizes of the perpendicular parts of one module's candidates, float64, [count]."""
    stored = model.get_parameter(group.parameter).detach()
    cuts = sources(group, {group.parameter: tuple(stored.shape)}, kind)
    sizes = []
    for number, source in enumerate(cuts):
        # An expert that no token reached has no gradient.
        whole = gradients.get((group.module, number))
        for first in range(0, source.count, step := max(1, _PIECE // group.length)):
            last = min(first + step, source.count)
            w = source.cut(first, last).read(stored).double()
            g = torch.zeros_like(w) if whole is None else whole[first:last].double() / tokens
            if has_content(g) and not bool(g.isfinite().all()):
                raise NeftError(
                    f"gradient: {group.parameter} has a gradient that is not finite; use "
                    "compute.mixed_precision no or bf16"
                )
            ww = (w * w).sum(1)
            along = (g * w).sum(1) / torch.where(ww == 0, 1.0, ww)
            size = (g - along[:, None] * w).square().sum(1).sqrt()
            # A zero vector has no direction to be turned from.
            sizes.append((size / torch.where(ww == 0, 1.0, ww).sqrt() if relative else size).cpu())
    return torch.cat(sizes)
