"""Part `overlap`: what selections from different scores have in common, beside chance (Table 5)."""

from typing import TYPE_CHECKING

from neft_core import figures
from neft_core.config.shown import OverlapSection
from neft_core.errors import NeftError
from neft_core.findings import SCORERS, Findings, mean
from neft_core.page import Gallery, Html
from neft_core.study_runs import FAILED, side_by_side, table
from neft_core.study_tables import Cell, Table

if TYPE_CHECKING:
    from neft_core.masks import NeuronMask
    from neft_core.overlaps import Overlap


def overlap(found: Findings, part: OverlapSection, gallery: Gallery) -> list[Table | Html]:
    """A table with a row for each comparison, a column for each budget; and a figure of it."""
    name = found.named(part)
    heads = ["neurons in common", *(f"{percent:g} %" for percent in part.percents)]
    rows: list[list[Cell]] = []
    series: dict[str, list[figures.Place]] = {}
    chances: dict[float, list[tuple[float, float]]] = {p: [] for p in part.percents}
    for label, pairs in part.rows.items():
        cells = [Cell(label)]
        for place, percent in enumerate(part.percents):
            try:
                shares = [_common(found, pair, percent) for pair in pairs]
            except NeftError as fault:
                cells.append(Cell(f"{FAILED}{fault}"))
                continue
            chances[percent] += [(common.chance, common.by_module) for common in shares]
            value, spread = mean([100 * common.share for common in shares])
            paper = part.paper.get(label)
            more = {} if spread is None else {"sd": round(spread, 6)}
            more |= {} if paper is None else {"paper": paper[place]}
            said = f"{value:.1f} %" + (f" ± {spread:.1f}" if spread is not None else "")
            said += f" (paper {paper[place]:g} %)" if paper else ""
            cells.append(Cell(said, round(value, 6), more=more))
            series.setdefault(label, []).append((percent, value, spread))
        rows.append(cells)
    named = {"by chance": 0, "by chance within modules": 1}
    for label, which in named.items():
        cells = [Cell(label)]
        for percent, values in chances.items():
            if not values:
                cells.append(Cell("–"))
                continue
            share, _ = mean([100 * value[which] for value in values])
            cells.append(Cell(f"{share:.1f} %", round(share, 6)))
            if not which:
                series.setdefault(label, []).append((percent, share, None))
        rows.append(cells)
    notes = [
        "Of the neurons that the first of two scores would select, the share that the second "
        "selects too; ± one standard deviation over the pairs compared. By chance: of masks drawn "
        "at random; within modules: of masks that agree in how many neurons each module has, and "
        "in nothing else.",
        *part.notes,
    ]
    pieces: list[Table | Html] = [
        table(name, part.title or "Overlap of selections", heads, rows, notes)
    ]
    if len(part.percents) > 1 and len(series) > 1:
        figure = figures.lines(
            series, x_label="budget (% of the model's parameters)", y_label="in common (%)"
        )
        caption = "Bars are one standard deviation over the pairs compared."
        drawn = gallery.add(f"study-{name}", figure, "Neurons in common by budget", caption)
        pieces.append(side_by_side(drawn))
    return pieces


def _common(found: Findings, pair: list[str], percent: float) -> "Overlap":
    from neft_core.overlaps import overlap

    first, second = (_selected(found, name, percent) for name in pair)
    return overlap(first, second)


def _selected(found: Findings, name: str, percent: float) -> "NeuronMask":
    """What a budget selects by scores, if they were made."""
    from neft_core.masks import NeuronScores
    from neft_core.overlaps import most_sensitive

    if why := found.unmade(name, *SCORERS):
        raise NeftError(why)
    scores = NeuronScores.load(found.ws.path("scores", f"{name}.safetensors"))
    return most_sensitive(scores, percent)
