"""Parts about the use of neurons: `rank_change` (Fig. 3), `average_change` (5), `types` (6)."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

from neft_core import neuron_figures
from neft_core.config.shown import (
    AnchoredSection,
    AverageChangeSection,
    RankChangeSection,
    TypesSection,
)
from neft_core.errors import NeftError
from neft_core.findings import Findings, mean
from neft_core.page import Gallery, Html
from neft_core.study_runs import (
    absent,
    failure,
    run_of,
    side_by_side,
    spread,
    table,
)
from neft_core.study_tables import Cell, Table

if TYPE_CHECKING:
    from torch import Tensor

    from neft_core.groups import Group

SEEDS = "The seeds of one run against each other show what chance in training does."


@dataclass(frozen=True)
class Ranks:
    """The order of use of a run's seeds.

    Attributes:
        run: its name, or `base`.
        seeds: rank of every candidate for each seed, int64, [M].
        groups: the candidates per module.
    """

    run: str
    seeds: "list[Tensor]"
    groups: "Mapping[str, Group]"

    @property
    def link(self) -> str | None:
        """Where cells about it lead; the base was not trained."""
        return None if self.run == "base" else self.run


def ranks(found: Findings, name: str, task: str) -> Ranks:
    """What `utilisation` measured of a run, or of the base.

    Raises:
        NeftError: it was not measured, or failed.
    """
    from neft_core.files import load_tensors
    from neft_core.groups import Group

    run = run_of(found, name, task)
    for key, entry in found.params.utilisation.items():
        mine = entry.task == task if name == "base" else entry.run == run
        path = found.ws.path("evaluation", f"utilisation.{key}.safetensors")
        if mine and found.made(path, key, "utilisation"):
            tensors, metadata = load_tensors(path, "run 'neft run'")
            wanted = [k for k in tensors if (k == "base") == (name == "base")]
            wanted.sort(key=lambda k: int(k.rpartition("-")[2]) if k != "base" else 0)
            groups = [Group(**group) for group in json.loads(metadata["groups"])]
            return Ranks(
                "base" if name == "base" else run,
                [tensors[k].long() for k in wanted],
                {group.module: group for group in groups},
            )
    named = [key for key, entry in found.params.utilisation.items() if entry.run == run]
    raise NeftError(failure(found, run, *named) if named else "not measured in utilisation")


def pairs(before: Ranks, after: Ranks) -> "list[tuple[Tensor, Tensor]]":
    """Ranks to compare: seed by seed, of one run each seed with every other; of the base with all.

    Raises:
        NeftError: one seed, and nothing else, to compare with itself.
    """
    if before.run == after.run:
        if len(before.seeds) < 2:
            raise NeftError("one seed; nothing to compare it with")
        return list(combinations(before.seeds, 2))
    most = max(len(before.seeds), len(after.seeds))
    many = [
        (ranks.seeds * most)[:most] if len(ranks.seeds) == 1 else ranks.seeds
        for ranks in (before, after)
    ]
    return list(zip(*many, strict=False))


def rank_change(found: Findings, part: RankChangeSection, gallery: Gallery) -> list[Table | Html]:
    """Avg(dRank) by percentile of the first run's order."""
    from neft_core import utilisation as core

    edges, named = core.EDGES, found.named(part)
    heads = [
        "compared",
        *(f"{100 * a:g}–{100 * b:g} %" for a, b in pairwise(edges)),
    ]
    rows: list[list[Cell]] = []
    series: dict[str, list[tuple[float, float | None]]] = {}
    candidates = 0
    for label, (before, after) in part.pairs.items():
        try:
            first, second = (ranks(found, name, part.task) for name in (before, after))
            of_seeds = [
                core.by_bucket(core.rank_change(a, b), a, edges) for a, b in pairs(first, second)
            ]
        except NeftError as fault:
            rows.append(absent(label, str(fault), len(heads)))
            continue
        candidates = len(first.seeds[0])
        values = [mean([row[3] for row in bucket]) for bucket in zip(*of_seeds, strict=True)]
        series[label] = values
        rows.append([Cell(label), *(spread(v, ",.1f", run=second.link) for v in values)])
    title = part.title or "How far neurons move in the order of use, by where they were"
    notes = [
        f"Avg(ΔRank) of {candidates:,} candidates by percentile of the first run's Pearson order, "
        f"the most used first; ± one standard deviation over seeds. {SEEDS}",
        *part.notes,
    ]
    pieces: list[Table | Html] = [table(named, title, heads, rows, notes)]
    if series:
        figure = gallery.add(
            f"study-{named}",
            neuron_figures.rank_change(edges, series),
            "Avg(ΔRank) by percentile",
            "Bars are one standard deviation over seeds. The form of the paper's Fig. 3.",
        )
        pieces.append(side_by_side(figure))
    return pieces


def average_change(
    found: Findings, part: AverageChangeSection, gallery: Gallery
) -> list[Table | Html]:
    """Avg(dRank) of several runs against each anchor."""
    from neft_core import utilisation as core

    named = found.named(part)
    heads = ["against", "run", "Avg(ΔRank)", "% of candidates"]
    heads += ["the paper's"] if part.paper else []
    rows: list[list[Cell]] = []
    drawn: list[Html] = []

    def measure(before: Ranks, after: Ranks) -> tuple[float, float | None]:
        return mean([core.average(core.rank_change(a, b)) for a, b in pairs(before, after)])

    for number, (anchor, values) in enumerate(_against(found, part, measure), start=1):
        bars = {}
        for label, (value, of) in values.items():
            if isinstance(value, str):
                rows.append([Cell(anchor), *absent(label, value, len(heads) - 1)])
                continue
            share = 100 * value[0] / len(of.seeds[0])
            bars[label] = value
            cells = [spread(value, ",.1f", run=of.link), Cell(f"{share:.2f}", share, run=of.link)]
            if part.paper:
                told = part.paper.get(anchor, {}).get(label)
                cells.append(Cell("–") if told is None else Cell(f"{told:,.0f}", told))
            rows.append([Cell(anchor), Cell(label), *cells])
        if bars:
            drawn.append(
                gallery.add(
                    f"study-{named}-{number}",
                    neuron_figures.average_rank_change(bars, anchor),
                    f"Avg(ΔRank) against {anchor}",
                    "Bars are one standard deviation over seeds. The form of the paper's Fig. 5.",
                )
            )
    title = part.title or "How far neurons move in the order of use"
    notes = [f"± one standard deviation over seeds. {SEEDS}", *part.notes]
    shown = table(named, title, heads, rows, notes)
    return [shown, *([side_by_side(*drawn)] if drawn else [])]


def types(found: Findings, part: TypesSection, gallery: Gallery) -> list[Table | Html]:
    """Counts of the neuron types against each anchor, of the whole model and by layer."""
    from neft_core import utilisation as core

    def measure(before: Ranks, after: Ranks) -> dict[str, dict[str, tuple[float, float | None]]]:
        trained = _trained(found, before) | _trained(found, after)
        counts = [
            core.neuron_types(core.rank_change(a, b), trained, before.groups)
            for a, b in pairs(before, after)
        ]
        return {
            where: {
                kind: mean([float(count[where][kind]) for count in counts])
                for kind in counts[0][where]
            }
            for where in counts[0]
        }

    named = found.named(part)
    kinds: list[str] = []
    rows: list[list[Cell]] = []
    layers: list[list[Cell]] = []
    places: list[str] = []
    drawn: list[Html] = []
    for number, (anchor, values) in enumerate(_against(found, part, measure), start=1):
        bars: dict[str, list[Any]] = {}
        shown = []
        for label, (value, of) in values.items():
            if isinstance(value, str):
                rows.append([Cell(anchor), *absent(label, value, 5)])
                continue
            whole = dict(value.pop("all"))
            every, _ = whole.pop("neurons")
            kinds = list(whole)
            shown.append(label)
            cells = [Cell(f"{every:,.0f}", int(every))]
            cells += [spread(count, ",.1f", run=of.link) for count in whole.values()]
            rows.append([Cell(anchor), Cell(label), *cells])
            for kind, count in whole.items():
                bars.setdefault(kind, []).append(count)
                places = [where.rpartition(".")[2] for where in value]
                of_layers = (counts[kind] for counts in value.values())
                cells = [spread(count, ",.1f", run=of.link) for count in of_layers]
                layers.append([Cell(anchor), Cell(label), Cell(kind), *cells])
        if shown:
            drawn.append(
                gallery.add(
                    f"study-{named}-{number}",
                    neuron_figures.neuron_types(shown, bars, anchor),
                    f"Neuron types against {anchor}",
                    "Bars are one standard deviation over seeds. The form of the paper's Fig. 6.",
                )
            )
    kinds = kinds or ["strongly affected", "suppressed", "indirectly affected"]
    title = part.title or "Types of neurons"
    notes = [
        f"Strongly affected: the rank moves by more than {100 * core.STRONG:.1f} % of the "
        "candidates (the paper's 100,000 of 704,512); of those suppressed: moved down; indirectly "
        f"affected: trained in neither run. ± one standard deviation over seeds. {SEEDS}",
        *part.notes,
    ]
    pieces: list[Table | Html] = [
        table(named, title, ["against", "run", "neurons", *kinds], rows, notes),
        *([side_by_side(*drawn)] if drawn else []),
    ]
    if layers:
        heads = ["against", "run", "type", *(f"layer {place}" for place in places)]
        pieces.append(table(f"{named}-layers", f"{title} by layer", heads, layers))
    return pieces


def _against(
    found: Findings, part: AnchoredSection, measure: Callable[[Ranks, Ranks], Any]
) -> list[tuple[str, dict[str, tuple[Any, Ranks]]]]:
    """For each anchor and label what is measured, or why it isn't; and the label's own ranks."""
    result = []
    for anchor, others in part.anchors.items():
        values: dict[str, tuple[Any, Any]] = {}
        for label in others:
            shown = "another seed" if label == anchor else label
            try:
                first = ranks(found, part.names[anchor], part.task)
                second = ranks(found, part.names[label], part.task)
                values[shown] = measure(first, second), second
            except NeftError as fault:
                values[shown] = str(fault), None
        result.append((anchor, values))
    return result


def _trained(found: Findings, of: Ranks) -> "Tensor":
    """Which candidates a run's training could change: none of the base's, a mask's, or all."""
    import torch

    from neft_core.utilisation import trained_neurons

    if of.run in found.masks:
        return trained_neurons(found.masks[of.run], of.groups)
    # Of a run that selects none, or of one that has no mask because it changes all.
    still = of.run == "base" or found.params.runs[of.run].method.name == "neft"
    return torch.full((len(of.seeds[0]),), not still)
