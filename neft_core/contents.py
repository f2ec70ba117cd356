"""What scores and masks may hold, whether a file or somebody's own code made them.

Shapes: N candidates of a module, k selected ones.
"""

from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neft_core.errors import NeftError
from neft_core.groups import Group

if TYPE_CHECKING:
    from neft_core.masks import NeuronMask, NeuronScores

REMEDY = {"scores": "run 'neft stage score'", "mask": "run 'neft stage select'"}


def check_scores(scores: "NeuronScores") -> None:
    """Refuse scores that are not [N] for each module of the candidates.

    Raises:
        NeftError: they are refused.
    """
    _check(scores, "scores", sensitivity=scores.sensitivity, magnitude=scores.magnitude)
    for module, group in scores.groups.items():
        if module not in scores.sensitivity:
            raise NeftError(f"{scores.source}: {module} has no scores; {REMEDY['scores']}")
        for tensors in (scores.sensitivity, scores.magnitude):
            if module in tensors and tensors[module].shape != (group.count,):
                raise NeftError(
                    f"{scores.source}: {module} has scores of shape "
                    f"{tuple(tensors[module].shape)}, but {group.count} candidates; "
                    f"{REMEDY['scores']}"
                )


def check_mask(mask: "NeuronMask") -> None:
    """Refuse indices that are not those of candidates, increasing, [k], int64.

    Raises:
        NeftError: they are refused.
    """
    _check(mask, "mask", indices=mask.indices)
    for module, indices in mask.indices.items():
        group = mask.groups[module]
        if indices.dim() != 1 or indices.dtype != torch.int64:
            raise NeftError(
                f"{mask.source}: {module} has indices of shape {tuple(indices.shape)} and "
                f"{indices.dtype}; numbers of neurons are needed, [k], torch.int64"
            )
        if not group.holds(indices) or bool((indices.diff() <= 0).any()):
            last = group.start + group.count
            among = "its candidates" if group.experts else f"[{group.start}, {last})"
            raise NeftError(
                f"{mask.source}: {module} has indices that are not increasing in {among}; "
                f"{REMEDY['mask']}"
            )


def _check(owner: Any, kind: str, **by_module: Any) -> None:
    """What both have: groups, the number of parameters, provenance, and tensors by module."""
    where, groups, total = owner.source, owner.groups, owner.total_parameters
    held = {**by_module, "groups": groups, "provenance": owner.provenance}
    for key, value in held.items():
        if not isinstance(value, Mapping):
            raise NeftError(f"{where}: {key}: got {type(value).__name__}; a dict is needed")
    for module, group in groups.items():
        if not isinstance(group, Group) or group.module != module:
            found = f"that of {group.module}" if isinstance(group, Group) else type(group).__name__
            raise NeftError(f"{where}: groups: {module}: got {found}; its own Group is needed")
    if not isinstance(total, Integral) or total < bool(groups):
        raise NeftError(
            f"{where}: total_parameters: got {total!r}, not a model's number of parameters; "
            f"{REMEDY[kind]}"
        )
    for key, tensors in by_module.items():
        for module, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                found = type(tensor).__name__
                raise NeftError(f"{where}: {key}: {module}: got {found}; a tensor is needed")
            if module not in groups:
                raise NeftError(
                    f"{where}: {module} has {key}, but no candidates in groups; {REMEDY[kind]}"
                )
