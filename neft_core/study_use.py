"""Parts about the use of neurons: `rank_change` (Fig. 3), `average_change` (5), `types` (6)."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neft_core import neuron_figures
from neft_core.config.measures import Utilisation
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


def ranks(found: Findings, before: str, after: str, task: str) -> tuple[Ranks, Ranks]:
    """What `utilisation` measured of two runs, or of the base and a run, in the same way.

    Raises:
        NeftError: one was not measured, or failed, or they were measured on other rows.
    """
    first, second = (_measured(found, name, task) for name in (before, after))
    for key, entry in first.items():
        for other, like in second.items():
            if _how(entry) == _how(like):
                return _read(found, before, key), _read(found, after, other)
    told = (_how(next(iter(entries.values()))) for entries in (first, second))
    raise NeftError(f"measured {' and '.join(told)}: not comparable")


def _measured(found: Findings, name: str, task: str) -> dict[str, Utilisation]:
    """The entries that measured a run, or the base, those on the task's own rows first.

    Raises:
        NeftError: there are none, or they failed.
    """
    run = run_of(found, name, task)
    every = found.params.utilisation.items()
    named = {key: entry for key, entry in every if run in ("base", entry.run)}
    made = {
        key: entry
        for key, entry in named.items()
        if found.made(_file(found, key), key, "utilisation")
    }
    if not made:
        raise NeftError(failure(found, run, *named) if named else "not measured in utilisation")
    return dict(sorted(made.items(), key=lambda item: item[1].task != task))


def _how(entry: Utilisation) -> str:
    """What ranks depend on beside the model."""
    each = ", each by itself" if entry.per_example else ""
    return f"on {entry.rows} rows of {entry.task}{each}"


def _file(found: Findings, key: str) -> Path:
    return found.ws.path("evaluation", f"utilisation.{key}.safetensors")


def _read(found: Findings, name: str, key: str) -> Ranks:
    """The ranks of the base, or of a run's seeds, in an entry's file."""
    from neft_core.files import load_tensors
    from neft_core.groups import Group

    tensors, metadata = load_tensors(_file(found, key), "run 'neft run'")
    wanted = [k for k in tensors if (k == "base") == (name == "base")]
    wanted.sort(key=lambda k: int(k.rpartition("-")[2]) if k != "base" else 0)
    groups = [Group(**group) for group in json.loads(metadata["groups"])]
    return Ranks(
        "base" if name == "base" else found.params.utilisation[key].run,
        [tensors[k].long() for k in wanted],
        {group.module: group for group in groups},
    )


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
            first, second = ranks(found, before, after, part.task)
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
                names = part.names[anchor], part.names[label]
                first, second = ranks(found, *names, part.task)
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
