"""Which neurons are trained: a policy ranks all candidates, a budget cuts the ranking.

Shapes: N candidates of all modules together, in the order of the scores' modules.
"""

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from neft_core.errors import NeftError
from neft_core.masks import NeuronMask, NeuronScores


def _most(values: Tensor) -> Tensor:
    """The largest first; equal ones by module, then by index."""
    return values.sort(descending=True, stable=True).indices


def _lowest(scores: NeuronScores, seed: int) -> Tensor:  # noqa: ARG001
    """The least similar first; of another criterion, the highest score."""
    return _most(_all(scores))


def _reversed(scores: NeuronScores, seed: int) -> Tensor:  # noqa: ARG001
    """The most similar first; equal ones by module, then by index too."""
    return _all(scores).sort(stable=True).indices


def _random(scores: NeuronScores, seed: int) -> Tensor:
    """Any order, from the seed: the control."""
    try:
        generator = torch.Generator().manual_seed(seed)
    except (TypeError, ValueError, RuntimeError):  # no whole number, or of more than 64 bits
        raise NeftError(f"seed: got {seed!r}; a whole number of 64 bits is needed") from None
    return torch.randperm(len(_all(scores)), generator=generator)


def _magnitude(scores: NeuronScores, seed: int) -> Tensor:  # noqa: ARG001
    """The farthest moved first, whatever the direction: a control."""
    if not scores.magnitude:
        raise NeftError(
            f"{scores.source}: holds no magnitudes; use the scores of a warm-up, made by "
            "'neft stage score'"
        )
    return _most(torch.cat([scores.magnitude[module] for module in scores.groups]))


Ranking = Callable[[NeuronScores, int], Tensor]

POLICIES: dict[str, tuple[Ranking, str | None]] = {
    "lowest": (_lowest, "similarity"),
    "reversed": (_reversed, "similarity"),
    "random": (_random, None),
    "magnitude": (_magnitude, "similarity"),
    "gradient": (_lowest, "gradient"),
    "activation": (_lowest, "activation"),
    "probe": (_lowest, "probe"),
}
"""How each policy ranks: scores and seed in, a permutation of the N candidates out; and which
criterion's scores it takes (None: any, for their candidates alone)."""


def select_neurons(
    scores: NeuronScores,
    policy: str = "lowest",
    *,
    percent: float | None = None,
    neurons: int | None = None,
    share: float | None = None,
    seed: int = 0,
    per_module: bool = False,
) -> NeuronMask:
    """Select neurons: a prefix of one ranking over all modules, without a quota for any.

    Args:
        scores: what every candidate scored.
        policy: the ranking, a key of `POLICIES`.
        percent: the longest prefix whose parameters are at most this percent of all parameters
            of the model, in (0, 100].
        neurons: exactly this many neurons.
        share: the longest prefix with at most this share of the candidates, in (0, 1].
        seed: of the policy `random`; the others do not use it.
        per_module: a quota after all: the same share of each module's candidates (to the nearest
            whole neuron), the first of its own in the ranking.

    Returns:
        The mask; the provenance of the scores with policy, budget and seed.

    Raises:
        NeftError: not exactly one budget, a budget that selects nothing or more than there is,
            an unknown policy, scores of another criterion, or scores that are not numbers.

    Source: Xu et al. 2024, section 4.2 and Table 2 for what percent means.
    """
    _check_scores(scores)
    if policy not in list(POLICIES):  # as a list it has no hash
        raise NeftError(f"policy: got {policy!r}; known: {', '.join(POLICIES)}")
    rank, criterion = POLICIES[policy]
    if criterion not in (None, scores.criterion):
        raise NeftError(
            f"policy: got {policy!r} with scores by {scores.criterion}; give scores by {criterion}"
        )
    given = {"percent": percent, "neurons": neurons, "share": share}
    budgets: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if len(budgets) != 1:
        found = " and ".join(budgets) or "none"
        raise NeftError(f"budget: got {found}; give one of percent, neurons, share")
    ((name, value),) = budgets.items()
    if not isinstance(value, Real):
        raise NeftError(f"{name}: got {value!r}; a number is needed")
    ranking = rank(scores, seed)
    if per_module:
        ranking = _in_turn(scores, ranking)
    chosen = ranking[: _count(scores, ranking, name, float(value))]
    made = {"policy": policy, name: f"{value:g}" if name != "neurons" else str(value)}
    if policy == "random":
        made["selection_seed"] = str(seed)
    if per_module:
        made["per_module"] = "true"
    return _mask(scores, chosen, made)


def select_below(
    scores: NeuronScores, below: float, *, scaled: bool = False, any_size: bool = False
) -> NeuronMask:
    """Select every neuron whose similarity is under a threshold.

    Args:
        scores: what every candidate scored, by similarity.
        below: the threshold; a neuron that has just this similarity is not selected.
        scaled: compare similarities after scaling those of all candidates to [0, 1], the lowest
            to 0 and the highest to 1. As they are, nearly all crowd just under 1.
        any_size: nothing and everything are answers too, as a study of thresholds wants.

    Returns:
        The mask; the provenance of the scores with the threshold.

    Raises:
        NeftError: scores of another criterion, a threshold that selects nothing or everything, or
            similarities that are all equal and can't be scaled.
    """
    _check_scores(scores)
    if scores.criterion != "similarity":
        raise NeftError(
            f"policy: got 'threshold' with scores by {scores.criterion}; give scores by similarity"
        )
    values = _all(scores)
    least, most = (float(edge) for edge in values.aminmax())
    key = "below_scaled" if scaled else "below"
    if not scaled:
        # 1 - below is exact near 1, where 1 - sensitivity would lose what tells neurons apart.
        chosen = values > 1 - below
    elif least < most:
        chosen = (most - values) / (most - least) < below
    else:
        raise NeftError(f"{key}: all {len(values)} similarities are equal; they can't be scaled")
    count = int(chosen.sum())
    if not any_size and count in (0, len(values)):
        what = "no neuron" if count == 0 else f"all {count} neurons"
        low, high = ("0", "1") if scaled else (f"{1 - most:.12g}", f"{1 - least:.12g}")
        raise NeftError(
            f"{key}: got {below:g}, which selects {what}; the similarities go from {low} to "
            f"{high}{' when scaled' if scaled else ''}"
        )
    made = {"policy": "threshold", "below": f"{below:.17g}", "scaled": str(scaled).lower()}
    return _mask(scores, chosen.nonzero().flatten(), made)


def union(masks: Sequence[NeuronMask]) -> NeuronMask:
    """The neurons of any of the masks, a common one once.

    Raises:
        NeftError: there is none, or they are of different models or layouts; names both files.

    Source: Xu et al. 2024, section 5.2.
    """
    if not masks:
        raise NeftError("union: got no mask; give one at least")
    return functools.reduce(NeuronMask.__or__, masks)


def _mask(scores: NeuronScores, chosen: Tensor, made: dict[str, str]) -> NeuronMask:
    """A mask of positions among all candidates."""
    return NeuronMask(
        _by_module(scores, chosen),
        scores.groups,
        scores.total_parameters,
        {**scores.provenance, **made},
        scores.source,
    )


def _in_turn(scores: NeuronScores, ranking: Tensor) -> Tensor:
    """A ranking whose prefixes hold the same share of each module, each module's in its order.

    Of n neurons the i-th, from 0, comes at (i + 1/2) / n, so that shares round to the nearest.
    """
    sizes = torch.tensor([len(scores.sensitivity[module]) for module in scores.groups])
    module = torch.arange(len(sizes)).repeat_interleave(sizes)[ranking]
    place = torch.empty(len(ranking), dtype=torch.float64)
    for number, size in enumerate(sizes.tolist()):
        place[module == number] = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return ranking[place.sort(stable=True).indices]


def _count(scores: NeuronScores, ranking: Tensor, name: str, value: float) -> int:
    """How many neurons of the ranking a budget pays for."""
    lengths = torch.cat(
        [
            torch.full((len(scores.sensitivity[module]),), group.length)
            for module, group in scores.groups.items()
        ]
    )
    cost = lengths[ranking].cumsum(0)
    candidates, parameters = len(cost), int(cost[-1])
    whole = scores.total_parameters
    layout = scores.provenance.get("layout", "mlp")
    limits = {"percent": 100 * parameters / whole, "neurons": candidates, "share": 1.0}
    # A budget may be a count that was divided before: the tolerance is far below one neuron.
    if not 0 < value <= limits[name] * (1 + 1e-12):
        most = limits[name] if name == "neurons" else _floor(limits[name])
        raise NeftError(f"{name}: got {value:g}; at most {most:g} with layout {layout!r}")
    if name == "neurons":
        if value != int(value):
            raise NeftError(f"neurons: got {value:g}; a whole number is needed")
        return int(value)
    if name == "share":
        count = math.floor(value * candidates * (1 + 1e-12))
        least = 1 / candidates
    else:
        affordable = math.floor(value * whole / 100 * (1 + 1e-12))
        count = int(torch.searchsorted(cost, affordable, right=True))
        least = 100 * int(cost[0]) / whole
    if count == 0:
        raise NeftError(f"{name}: got {value:g}, no neuron; at least {least:.3g} for one")
    return count


def _by_module(scores: NeuronScores, chosen: Tensor) -> dict[str, Tensor]:
    """Sorted rows or columns of each module from positions among all candidates."""
    indices: dict[str, Tensor] = {}
    selected = torch.zeros(len(_all(scores)), dtype=torch.bool)
    selected[chosen] = True
    sizes = [len(scores.sensitivity[module]) for module in scores.groups]
    for (module, group), mine in zip(scores.groups.items(), selected.split(sizes), strict=True):
        rows = group.indices(mine.nonzero().flatten())
        if len(rows):
            indices[module] = rows
    return indices


def _all(scores: NeuronScores) -> Tensor:
    """Sensitivities of all candidates, [N], in the order of `groups`."""
    return torch.cat([scores.sensitivity[module] for module in scores.groups])


def _check_scores(scores: Any) -> None:
    """A score that is not a number has no rank, and nothing can be selected of no scores."""
    if not isinstance(scores, NeuronScores):
        found = type(scores).__name__
        raise NeftError(
            f"scores: got {found}; NeuronScores are needed (NeuronScores.load of a file)"
        )
    if not scores.groups:
        raise NeftError(f"{scores.source}: holds no neurons; give scores of a task that trains")
    for module, group in scores.groups.items():
        nan = scores.sensitivity[module].isnan()
        if module in scores.magnitude:
            nan |= scores.magnitude[module].isnan()
        bad = nan.nonzero()
        if len(bad):
            raise NeftError(
                f"scores: {module} neuron {int(group.indices(bad[0]))} is not a number; "
                "run 'neft stage score'"
            )


def _floor(value: float) -> float:
    """Three digits, rounded down, so that the limit in a message is itself allowed."""
    scale = 10.0 ** (2 - math.floor(math.log10(value)))
    return math.floor(value * scale) / scale
