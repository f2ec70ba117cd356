"""Experts that a checkpoint keeps apart, one weight for each, and the model as a 3-D parameter.

Masks speak of the model's parameter; here is which stored weights are pieces of it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from neft_core.errors import NeftError
from neft_core.groups import Group, Part, Source

Shapes = Mapping[str, tuple[int, ...]]


def in_memory(shapes: Shapes, parts: Iterable[Part], where: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint under the names that the model has in memory.

    Args:
        shapes: name and stored shape of every weight of a checkpoint or a model.
        parts: where the family's roles are.
        where: what messages call the model.

    Returns:
        The same, with the weights of experts apart replaced by the 3-D parameters that they form.

    Raises:
        NeftError: an expert lacks a weight, or its shape is not that of the others.
    """
    shapes = dict(shapes)
    for suffix, pieces in _apart(parts).items():
        for layer, experts in _experts(shapes, pieces).items():
            names = [_name(layer, part, expert) for expert in range(experts) for part in pieces]
            if missing := [name for name in names if name not in shapes]:
                raise NeftError(f"{where}: has no {missing[0]}; the checkpoint is incomplete")
            first = shapes[names[0]]
            if odd := [name for name in names if shapes[name] != first]:
                raise NeftError(
                    f"{where}: {odd[0]} has shape {shapes[odd[0]]}, {names[0]} has {first}; "
                    "the experts of a layer need one shape"
                )
            for name in names:
                del shapes[name]
            rows, *rest = first
            shapes[f"{layer}.{suffix}"] = (experts, len(pieces) * rows, *rest)
    return shapes


def sources(group: Group, shapes: Shapes, parts: Iterable[Part]) -> list[Source]:
    """Where a group's candidates are stored, in the order of the candidates.

    The pieces are the same whether experts are stored together or apart, so those of two
    checkpoints of one model go pairwise.

    Args:
        group: candidates under the name that the model has in memory.
        shapes: name and stored shape of every weight of the checkpoint or the model.
        parts: where the family's roles are.

    Returns:
        One source for a plain weight, else one for each expert and role; their counts add up to
        the group's.
    """
    if not group.experts:
        return [group.source()]
    apart = _apart(parts)
    suffix = next((name for name in apart if group.module.endswith(f".{name}")), None)
    if suffix is None:
        return [group.source(expert) for expert in range(group.experts)]
    layer = group.module.removesuffix(f".{suffix}")
    together = group.parameter in shapes
    found: list[Source] = []
    for expert in range(group.experts):
        whole = group.source(expert)
        for part in apart[suffix]:
            size = group.width // part.of
            offset = part.index * size
            first = max(whole.start, offset) - whole.start
            last = min(whole.start + whole.count, offset + size) - whole.start
            if first >= last:
                continue
            piece = whole.cut(first, last)
            if not together:
                name = _name(layer, part, expert)
                piece = replace(piece, parameter=name, start=piece.start - offset, expert=None)
            found.append(piece)
    return found


def _apart(parts: Iterable[Part]) -> dict[str, Sequence[Part]]:
    """The pieces of each 3-D parameter of which experts may be apart, in their order."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        if part.apart:
            found.setdefault(part.suffix, []).append(part)
    return {suffix: sorted(pieces, key=lambda p: p.index) for suffix, pieces in found.items()}


def _experts(shapes: Shapes, pieces: Sequence[Part]) -> dict[str, int]:
    """Number of experts apart in each layer."""
    found: dict[str, int] = {}
    for part in pieces:
        before, after = map(re.escape, part.apart.split("{}"))
        pattern = re.compile(rf"(.+\.\d+)\.{before}(\d+){after}\.weight")
        for name in shapes:
            if match := pattern.fullmatch(name):
                found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _name(layer: str, part: Part, expert: int) -> str:
    """The weight of one role of an expert apart."""
    return f"{layer}.{part.apart.format(expert)}.weight"
