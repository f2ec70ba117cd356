"""Part `sensitivity`: what a selection owes to criterion, threshold and warm-up."""

from neft_core import figures
from neft_core.config.shown import SensitivitySection
from neft_core.errors import NeftError
from neft_core.findings import Findings, Row, mean, number
from neft_core.page import Gallery, Html
from neft_core.study_against import Entry, against
from neft_core.study_runs import (
    FAILED,
    NOTHING,
    SPREAD,
    absent,
    differences,
    failure,
    first_metric,
    heading,
    means,
    row_of,
    run_of,
    score,
    side_by_side,
    spread,
    table,
)
from neft_core.study_tables import Cell, Table


def sensitivity(found: Findings, part: SensitivitySection, gallery: Gallery) -> list[Table | Html]:
    """A row for each selection: what it asked for, what it got, what came of it."""
    metric = first_metric(found, part.task, part.metric)
    named = found.named(part)
    reference = run_of(found, part.reference, part.task) if part.reference else None
    heads = [
        "varied",
        "selection",
        "warm-up steps",
        "neurons",
        "% of model",
        heading(metric),
        "dev loss",
    ]
    heads += ["in common with the reference", "by chance"] if reference else []
    rows: list[list[Cell]] = []
    compared: list[tuple[str, list[Row | None]]] = []
    groups: list[str] = []
    values: list[figures.Value] = []
    still = False
    for label, names in part.groups.items():
        for name in names:
            run = run_of(found, name, part.task)
            row = row_of(found, part.task, run)
            value = score(row, metric)
            if row is None or value is None:
                rows.append([Cell(label), *absent(run, failure(found, run), len(heads) - 1)])
                continue
            said, steps = _asked(found, run)
            neurons = means(found, run, "selected_neurons")
            percent = number(row["percent"]) or 0.0
            cells = [Cell(label), Cell(said), Cell(steps)]
            cells.append(Cell(f"{neurons[0]:,}", int(neurons[0])) if neurons else NOTHING)
            cells.append(Cell(f"{percent:.2f}", percent))
            cells.append(spread(value, run=run))
            cells.append(spread(mean(means(found, run, "best_dev_loss")), ".3f", run=run))
            if reference:
                cells += _common(found, run, reference)
            rows.append(cells)
            still |= any("trained" in seed for seed in found.seeds(run))
            groups.append(_label(found, run).removeprefix("threshold "))
            values.append(value)
            compared.append((_label(found, run), [row]))
    notes = [SPREAD]
    if still:
        notes.append("Where nothing is selected nothing is trained: the base's own results.")
    if reference:
        notes.append(
            f"In common: of the selection's neurons those that {reference} selects too; by chance: "
            "the share of all candidates that it selects."
        )
    title = part.title or "Sensitivity to criterion, threshold and warm-up"
    runs = {name: run_of(found, name, part.task) for name in part.selections()}
    entries = [Entry(name, _label(found, run), {part.task: run}) for name, run in runs.items()]
    on = {part.task: part.task}, {part.task: [metric]}
    pieces: list[Table | Html] = [
        table(named, title, heads, rows, [*notes, *part.notes], [5]),
        *differences(found, named, title, [part.task], compared),
        *against(found, named, title, part.against, entries, *on),
    ]
    if not groups:
        return pieces
    figure = gallery.add(
        f"study-{named}",
        figures.bars(groups, {metric: values}, label=heading(metric), horizontal=True, unit=".1f"),
        f"{heading(metric)} by selection",
        "Bars are one standard deviation over seeds.",
    )
    return [*pieces, side_by_side(figure)]


def _label(found: Findings, run: str) -> str:
    """A run's selection in words, told apart from those of other warm-ups."""
    said, steps = _asked(found, run)
    return said + (f", K {steps}" if steps != "–" else "")


def _asked(found: Findings, run: str) -> tuple[str, str]:
    """A run's selection in words, and the steps of the warm-ups that it goes by."""
    params, entry = found.params, found.params.runs[run]
    steps: dict[str, None] = {}
    for _, part in entry.selections(""):
        for name in part.read(entry.task) if part.policy != "random" else []:
            activations = params.activations.get(name)
            warmup = activations.warmup if activations else name
            if warmup in params.tasks or warmup in params.warmups:
                steps[str(params.warmed(warmup)[1].steps)] = None
    said = entry.method.words().removeprefix("neft, ")
    return said, ", ".join(steps) or "–"


def _common(found: Findings, run: str, reference: str) -> list[Cell]:
    """What a run's mask has of the reference's, and what chance would give."""
    if why := found.unmade(reference, "select"):
        return [Cell(f"{FAILED}{why}"), NOTHING]
    mine, other = found.masks.get(run), found.masks.get(reference)
    if mine is None or other is None or run == reference:
        return [NOTHING, NOTHING]
    try:
        share = mine.overlap(other)
    except NeftError:  # of another layout
        return [NOTHING, NOTHING]
    chance = other.neurons / sum(group.count for group in other.groups.values())
    return [Cell(f"{100 * value:.1f} %", round(100 * value, 6)) for value in (share, chance)]
