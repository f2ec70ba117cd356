"""What masks have in common, beside what chance would give; where scores and masks lie.

Shapes: M candidates of a model, k selected ones.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import torch

from neft_core.errors import NeftError
from neft_core.masks import NeuronMask, NeuronScores
from neft_core.neurons import layer_of, role_of
from neft_core.selection import POLICIES, select_below, select_neurons


class Overlap(NamedTuple):
    """What two masks have in common: A of a neurons and B of b, of M candidates.

    Attributes:
        share: of the first's neurons that the second has too, |A & B| / a.
        chance: that share for random masks of these sizes, b / M.
        deviation: standard deviation of the share of random masks,
            sqrt(b / a * (1 - a / M) * (1 - b / M) / (M - 1)).
        by_module: the expected share of masks that are random within each module, with as many
            neurons there as these: what agreeing on the modules alone would give.
    """

    share: float
    chance: float
    deviation: float
    by_module: float


def overlap(first: NeuronMask, second: NeuronMask) -> Overlap:
    """What two masks have in common.

    Raises:
        NeftError: a first mask without neurons, masks of unequal budgets (weights that are apart by
            a neuron or more), or of different models or layouts.

    Source: Xu et al. 2024, Table 5, for masks of one size.
    """
    share = first.overlap(second)
    a, b = first.neurons, second.neurons
    longest = max(group.length for group in first.groups.values())
    if a != b and abs(first.parameters - second.parameters) >= longest:
        raise NeftError(
            f"{first.source}: has {a:,} neurons, {second.source} {b:,}; compare masks of one budget"
        )
    mine, theirs = first.by_module(), second.by_module()
    total = sum(count.candidates for count in mine.values())
    common = sum(
        mine[module].selected * theirs[module].selected / mine[module].candidates for module in mine
    )
    # The number in common of two random masks is hypergeometric.
    spread = sqrt(b / a * (1 - a / total) * (1 - b / total) / (total - 1)) if total > 1 else 0.0
    return Overlap(share, b / total, spread, common / a)


def most_sensitive(scores: NeuronScores, percent: float) -> NeuronMask:
    """What a budget selects by scores of any criterion, by the policy that is made for it.

    Raises:
        NeftError: as `selection.select_neurons`.
    """
    by = {criterion: policy for policy, (_, criterion) in reversed(POLICIES.items())}
    return select_neurons(scores, str(by[scores.criterion]), percent=percent)


def overlaps(masks: Mapping[str, NeuronMask]) -> dict[tuple[str, str], Overlap]:
    """`overlap` of every pair of masks, in the order given.

    Raises:
        NeftError: fewer than two masks, or as `overlap`.
    """
    if len(masks) < 2:
        raise NeftError(f"overlap: got {len(masks)} mask; give two at least")
    names = list(masks)
    return {
        (a, b): overlap(masks[a], masks[b]) for i, a in enumerate(names) for b in names[i + 1 :]
    }


class Place(NamedTuple):
    """Scores of the candidates in one module, or of a whole layer or role.

    Attributes:
        where: name of the layer, or of the role within it.
        candidates: how many.
        median: of their scores.
        mean: of their scores.
        highest: of their scores.
        selected: of them, by a mask; 0 without one.
    """

    where: str
    candidates: int
    median: float
    mean: float
    highest: float
    selected: int

    @property
    def share(self) -> float:
        """Selected ones among the candidates."""
        return self.selected / self.candidates


def profile(scores: NeuronScores, mask: NeuronMask | None = None) -> dict[str, list[Place]]:
    """Scores by `layer`, by `role` within the layers, and by `module`.

    Raises:
        NeftError: the mask is of other candidates.
    """
    if mask is not None and mask.groups != scores.groups:
        raise NeftError(
            f"{mask.source}: its candidates differ from those of {scores.source}; give a mask that "
            "was selected from these scores"
        )
    counts = {} if mask is None else {m: len(rows) for m, rows in mask.indices.items()}
    found: dict[str, list[Place]] = {}
    for kind, name in (("layer", layer_of), ("role", role_of), ("module", str)):
        members: dict[str, list[str]] = {}
        for module in scores.groups:
            members.setdefault(name(module), []).append(module)
        found[kind] = [_place(where, modules, scores, counts) for where, modules in members.items()]
    return found


def _place(
    where: str, modules: Sequence[str], scores: NeuronScores, counts: Mapping[str, int]
) -> Place:
    values = torch.cat([scores.sensitivity[module] for module in modules])
    return Place(
        where,
        len(values),
        float(values.median()),
        float(values.mean()),
        float(values.max()),
        sum(counts.get(module, 0) for module in modules),
    )


def below_counts(
    scores: NeuronScores, thresholds: Sequence[float], *, scaled: bool
) -> list[tuple[float, int]]:
    """How many neurons each threshold of the similarity would select.

    Raises:
        NeftError: scores of another criterion, or similarities that are all equal when scaled.
    """
    return [
        (below, select_below(scores, below, scaled=scaled, any_size=True).neurons)
        for below in thresholds
    ]
