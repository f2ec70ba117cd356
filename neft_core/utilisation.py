"""Which neurons a model uses: how each correlates with the hidden states, and how ranks shift.

Shapes: N candidates of a module (M of all together), D weights in each, L layers, n sentences.

Source: Xu et al. 2024, sections 6.1 and 6.2.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neft_core.errors import NeftError
from neft_core.groups import Group
from neft_core.masks import NeuronMask
from neft_core.neurons import candidates, layer_of, sources
from neft_core.patterns import Patterns
from neft_core.weights import Model, weights

EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 1.0)
"""Percentiles of the Pearson order between which rank changes are averaged (Fig. 3)."""

STRONG = 100_000 / 704_512
"""A neuron is strongly affected when its rank moves by more than this share of the candidates."""

_PIECE = 1 << 20


@dataclass(frozen=True)
class Utilisation:
    """How much a model uses each candidate neuron.

    Attributes:
        pearson: the highest correlation with any layer, per module [N], float32.
        groups: the candidates per module.
    """

    pearson: dict[str, Tensor]
    groups: dict[str, Group]

    def ranks(self) -> Tensor:
        """Place of each candidate in the order of correlations, the highest 0; int64, [M].

        Equal ones are ordered by module, then by index.
        """
        values = torch.cat([self.pearson[module] for module in self.groups])
        order = values.sort(descending=True, stable=True).indices
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order))
        return ranks


def utilisation(
    model: Model,
    states: Tensor,
    layout: str | Patterns = "mlp",
    *,
    per_example: bool = False,
    config: Any = None,
    threads: int | None = None,
    piece: int = _PIECE,
    progress: Callable[[int, int], None] | None = None,
) -> Utilisation:
    """Pearson correlation of each neuron's weights with hidden states, the highest of all layers.

    The paper's way takes one vector for each layer: the mean over tokens and sentences. With
    `per_example` the highest layer is taken for each sentence by itself, and those maxima are
    averaged; it costs n times as much.

    Weights are read module by module and compared in pieces, so that memory is bounded by one
    matrix. A vector whose values are all equal correlates with nothing: 0.

    Args:
        model: a model, its state dict, or a checkpoint's directory.
        states: hidden states by sentence and layer, [n, L, D].
        layout: which neurons are candidates.
        per_example: see above.
        config: the model's config, where `model` has none.
        threads: of the computation; torch's own number without it.
        piece: weights to compare at once.
        progress: called after each module with the number done and that of all.

    Raises:
        NeftError: neurons of another length than D, no sentence, or states that are not finite.
    """
    if states.dim() != 3 or not len(states):
        raise NeftError(
            f"utilisation: got states of shape {tuple(states.shape)}; [sentences, layers, hidden "
            "size] is needed, one sentence at least"
        )
    here = weights(model, "model", config)
    kind = str(here.config["model_type"])
    groups = candidates(here.shapes, kind, layout, where=here.where)
    chosen = states.double() if per_example else states.double().mean(0, keepdim=True)
    if not bool(chosen.isfinite().all()):
        raise NeftError("utilisation: a hidden state is not finite; use compute.dtype float32")
    centred = chosen - chosen.mean(2, keepdim=True)
    size = centred.norm(dim=2, keepdim=True)
    units = (centred / torch.where(size == 0, 1.0, size)).float()
    pearson: dict[str, Tensor] = {}
    with ThreadPoolExecutor(threads or torch.get_num_threads()) as pool:
        for done, group in enumerate(groups, start=1):
            if group.length != units.shape[2]:
                raise NeftError(
                    f"utilisation: {group.module} has neurons of {group.length} weights, the "
                    f"hidden size is {units.shape[2]}; use layout mlp, mlp+gate, attention or all"
                )
            cuts = sources(group, here.shapes, kind)
            step = max(1, piece // group.length)
            with here.opened({source.parameter for source in cuts}) as stored:
                pieces = [
                    source.cut(first, min(first + step, source.count)).read(
                        stored[source.parameter]
                    )
                    for source in cuts
                    for first in range(0, source.count, step)
                ]
                found = list(pool.map(lambda w: _highest(w, units), pieces))
            pearson[group.module] = torch.cat(found)
            if progress is not None:
                progress(done, len(groups))
    return Utilisation(pearson, {group.module: group for group in groups})


def _highest(neurons: Tensor, units: Tensor) -> Tensor:
    """Highest correlation of any layer, averaged over examples; float32, [N]."""
    w = neurons.cpu().float()
    n, layers, length = units.shape
    # Units are centred and of size 1: only the neuron's own centred size is left to divide by.
    sides = torch.cat([units.view(n * layers, length), torch.ones(1, length)])
    products = w @ sides.T
    # The norm, unlike a sum of squares, takes no temporary of w's size.
    squares: Tensor = torch.linalg.vector_norm(w, dim=1).square()
    mean = products[:, -1] / length
    centred = squares - length * mean.square()
    # Where the mean is most of the neuron, this difference is mostly rounding.
    if bool((near := centred <= squares / 16).any()):
        rest = w[near].double() - w[near].double().mean(1, keepdim=True)
        flat = rest.abs().amax(1) <= 1e-6 * w[near].abs().amax(1)
        centred[near] = torch.where(flat, torch.inf, rest.square().sum(1)).float()
        products[near, :-1] = (rest @ units.view(n * layers, length).double().T).float()
    highest = products[:, :-1].reshape(-1, n, layers).amax(2).mean(1)
    return (highest / centred.sqrt()).clamp(-1, 1)


def rank_change(before: Tensor, after: Tensor) -> Tensor:
    """dRank of each candidate: positive where it moved down, to a lower correlation; int64, [M].

    Raises:
        NeftError: the two have different numbers of candidates.
    """
    if before.shape != after.shape:
        raise NeftError(
            f"dRank: got {len(before)} and {len(after)} candidates; compare models of one form and "
            "layout"
        )
    return after - before


def average(change: Tensor) -> float:
    """Avg(dRank): the mean of the absolute rank changes."""
    return float(change.abs().double().mean())


def by_bucket(
    change: Tensor, before: Tensor, edges: Sequence[float] = EDGES
) -> list[tuple[float, float, int, float]]:
    """Avg(dRank) between percentiles of the first model's order.

    Args:
        change: dRank of each candidate, [M].
        before: its rank in the model from which the change is told, [M].
        edges: percentiles, ascending, from 0 to 1.

    Returns:
        Lower edge, upper edge, neurons between (rank / M at least the lower, under the upper) and
        their average, 0 where there is none.
    """
    where = before.double() / len(before)
    rows = []
    for low, high in itertools.pairwise(edges):
        inside = change[(where >= low) & (where < high)]
        rows.append((low, high, len(inside), average(inside) if len(inside) else 0.0))
    return rows


def neuron_types(
    change: Tensor, trained: Tensor, groups: Mapping[str, Group], strong: float = STRONG
) -> dict[str, dict[str, int]]:
    """Counts of the paper's neuron types, of the whole model ("all") and of each layer.

    Args:
        change: dRank of each candidate, [M].
        trained: which candidates the training of either model could change, bool, [M].
        groups: the candidates per module.
        strong: share of the candidates by which the rank of a strongly affected neuron moves more.

    Returns:
        For "all" and for each layer: `neurons`, `strongly affected`, of those `suppressed` (moved
        down) and `indirectly affected` (not trained).
    """
    strongly = change.abs() > strong * len(change)
    kinds = {
        "neurons": torch.ones_like(strongly),
        "strongly affected": strongly,
        "suppressed": strongly & (change > 0),
        "indirectly affected": strongly & ~trained,
    }
    places: dict[str, list[int]] = {}
    first = 0
    for module, group in groups.items():
        places.setdefault(layer_of(module), []).extend(range(first, first + group.count))
        first += group.count
    counts = {"all": {name: int(which.sum()) for name, which in kinds.items()}}
    for layer, mine in places.items():
        counts[layer] = {name: int(which[mine].sum()) for name, which in kinds.items()}
    return counts


def trained_neurons(mask: NeuronMask, groups: Mapping[str, Group]) -> Tensor:
    """Which candidates a mask selects, bool, [M].

    Raises:
        NeftError: the mask is of another model or layout.
    """
    found = []
    for module, group in groups.items():
        if mask.groups.get(module) != group:
            raise NeftError(
                f"{mask.source}: made for other candidates in {module}; give a mask of this model "
                "and layout"
            )
        every = group.indices(torch.arange(group.count))
        found.append(torch.isin(every, mask.indices.get(module, every[:0])))
    return torch.cat(found)
