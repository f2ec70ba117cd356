"""Sections of the report: which neurons are selected, and what masks have in common."""

from collections.abc import Iterator

from neft_core import neuron_figures
from neft_core.findings import Findings, lowest_selected, overlaps, places, shares
from neft_core.page import Gallery, Html, fill, join, paragraph

PANELS = 6
"""Masks in one figure of maps."""

MASKS = 12
"""Masks that are compared with each other."""


def neurons(found: Findings, gallery: Gallery) -> Html | str:
    """What all candidates scored, where the selected ones are, what masks have in common."""
    pieces = [*_distributions(found, gallery), *_maps(found, gallery), *_overlap(found, gallery)]
    if not pieces:
        return "No run selects neurons, and none were scored."
    shown = fill('<div class="figures">{pieces}</div>', pieces=join(pieces))
    if len(found.masks) > 1:
        return shown
    lone = paragraph("Fewer than two runs select neurons: no overlap.", kind="absent")
    return join([shown, lone])


def _distributions(found: Findings, gallery: Gallery) -> Iterator[Html]:
    for task in found.params.tasks:
        scores = found.scores(task)
        if scores is None:
            continue
        kinds: dict[str, list[float]] = {}
        parts = places(list(scores.sensitivity))
        for module, values in scores.sensitivity.items():
            kinds.setdefault(parts[module][1], []).extend(values.tolist())
        every = sorted(value for values in kinds.values() for value in values)
        still = sum(value <= 0 for value in every)
        if still == len(every):
            continue
        cuts = {
            run: cut
            for run in found.runs(task)
            if run in found.masks
            and found.masks[run].provenance.get("policy") == "lowest"
            and (cut := lowest_selected(found.masks[run], scores)) is not None
        }
        said = (
            f"{len(every):,} candidates after {scores.provenance.get('steps', '?')} warm-up steps; "
            f"median similarity {1 - every[len(every) // 2]:.6g}."
        )
        if cuts:
            said += " Right of a dashed line: the neurons that the run selects."
        if still:
            said += f" {still:,} that did not change are left out."
        yield gallery.add(
            f"sensitivity-{task}",
            neuron_figures.distribution(kinds, cuts),
            f"How much the candidates changed, {task}",
            said,
        )


def _maps(found: Findings, gallery: Gallery) -> Iterator[Html]:
    groups: dict[tuple[str, ...], dict[str, list[list[float | None]]]] = {}
    axes: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    for run, mask in found.masks.items():
        layers, parts, rows = shares(mask)
        key = (*layers, "", *parts)
        axes[key] = layers, parts
        groups.setdefault(key, {})[run] = rows
    count = 0
    for key, masks in groups.items():
        layers, parts = axes[key]
        names = list(masks)
        size = max(2, min(PANELS, 24 // len(parts)))
        for start in range(0, len(names), size):
            count += 1
            some = {name: masks[name] for name in names[start : start + size]}
            yield gallery.add(
                "neuron-map" + (f"-{count}" if count > 1 else ""),
                neuron_figures.neuron_map(some, layers, parts),
                "Where the selected neurons are",
                "Share of each module's candidates that a mask holds, in percent. One shade "
                "all over is what chance would give.",
            )


def _overlap(found: Findings, gallery: Gallery) -> Iterator[Html]:
    names = list(found.masks)[:MASKS]
    if len(names) < 2:
        return
    values, chance = overlaps({name: found.masks[name] for name in names})
    caption = (
        "Of the neurons of the mask at the left, the share that the mask below has too; in "
        "brackets what a random mask of its size would have."
    )
    if len(found.masks) > len(names):
        caption += f" The first {len(names)} of {len(found.masks)} masks."
    figure = neuron_figures.overlap(names, values, chance)
    yield gallery.add("overlap", figure, "Neurons that masks have in common", caption)
