"""Parts that draw results against what is trained: `trade_off` (Fig. 2) and `added` (Fig. 4)."""

from neft_core import figures
from neft_core.config.shown import AddedSection, TradeOffSection
from neft_core.findings import Findings, number
from neft_core.page import Gallery, Html
from neft_core.study_runs import (
    absent,
    failure,
    first_metric,
    heading,
    row_of,
    run_of,
    score,
    side_by_side,
    spread,
    table,
)
from neft_core.study_tables import Cell, Table


def trade_off(found: Findings, part: TradeOffSection, gallery: Gallery) -> list[Table | Html]:
    """A figure for each task that is tested, and a table of all their points."""
    tasks = part.tested or [part.task]
    named = found.named(part)
    metrics = {task: first_metric(found, task, part.metric) for task in tasks}
    heads = ["method", "run", "trained parameters", "% of model"]
    heads += [f"{heading(metrics[task])}, {task}" for task in tasks]
    lines: dict[str, dict[str, list[figures.Place]]] = {task: {} for task in tasks}
    rows: list[list[Cell]] = []
    for label, names in part.series.items():
        for name in names:
            run = run_of(found, name, part.task)
            of_task = {task: row_of(found, task, run) for task in tasks}
            own = next((row for row in of_task.values() if row), None)
            if own is None:
                rows.append([Cell(label), *absent(run, failure(found, run), 3 + len(tasks))])
                continue
            trained, percent = number(own["parameters"]) or 0.0, number(own["percent"]) or 0.0
            cells = [Cell(label), Cell(run), Cell(f"{trained:,.0f}", int(trained))]
            cells.append(Cell(f"{percent:.2f}", percent))
            for task, row in of_task.items():
                value = score(row, metrics[task])
                cells.append(spread(value, run=run))
                if value is not None and trained:
                    lines[task].setdefault(label, []).append((trained, *value))
            rows.append(cells)
    levels: dict[str, dict[str, float]] = {task: {} for task in tasks}
    for label, name in part.levels.items():
        run = run_of(found, name, part.task)
        cells = [Cell(label), Cell(run)]
        values = {task: score(row_of(found, task, run), metrics[task]) for task in tasks}
        own = next((row for task in tasks if (row := row_of(found, task, run))), None)
        for key, form in (("parameters", ",.0f"), ("percent", ".2f")):
            amount = number(own.get(key)) if own else None
            cells.append(Cell("–") if amount is None else Cell(format(amount, form), amount))
        rows.append([*cells, *(spread(value) for value in values.values())])
        for task, value in values.items():
            if value is not None:
                levels[task][label] = value[0]
    title = part.title or "Trained parameters against results"
    notes = ["± one standard deviation over seeds.", *part.notes]
    pieces: list[Table | Html] = [table(named, title, heads, rows, notes)]
    drawn = [
        gallery.add(
            f"study-{named}" + (f"-{task}" if task != part.task else ""),
            figures.trade_off(lines[task], heading(metrics[task]), levels[task]),
            f"{heading(metrics[task])} on {task} against what is trained on {part.task}",
            "A line is a method at several sizes; bars are one standard deviation over seeds. "
            "The form of the paper's Fig. 2.",
        )
        for task in tasks
        if lines[task]
    ]
    return [*pieces, *([side_by_side(*drawn)] if drawn else [])]


def added(found: Findings, part: AddedSection, gallery: Gallery) -> list[Table | Html]:
    """A line for each way to add neurons to a selection, from that selection on."""
    metric, named = first_metric(found, part.task, part.metric), found.named(part)
    heads = ["added", "run", "added % of model", "% of model", heading(metric), "Δ to the start"]
    start = run_of(found, part.start, part.task)
    first = row_of(found, part.task, start)
    if first is None or (begun := score(first, metric)) is None:
        why = failure(found, start)
        rows = [absent("nothing", f"{start}: {why}", len(heads))]
        return [table(named, part.title or _ADDED, heads, rows, part.notes)]
    base = number(first["percent"]) or 0.0
    rows = [[Cell("nothing"), Cell(start), Cell("0", 0), Cell(f"{base:.2f}", base),
             spread(begun, run=start), Cell("–")]]  # fmt: skip
    series: dict[str, list[figures.Place]] = {}
    for label, names in part.ways.items():
        series[label] = [(0.0, *begun)]
        for name in names:
            run = run_of(found, name, part.task)
            row = row_of(found, part.task, run)
            value = score(row, metric)
            if row is None or value is None:
                rows.append([Cell(label), *absent(run, failure(found, run), 5)])
                continue
            percent = number(row["percent"]) or 0.0
            more = percent - base
            series[label].append((more, *value))
            rows.append(
                [
                    Cell(label),
                    Cell(run),
                    Cell(f"{more:.2f}", round(more, 6)),
                    Cell(f"{percent:.2f}", percent),
                    spread(value, run=run),
                    Cell(f"{value[0] - begun[0]:+.2f}", round(value[0] - begun[0], 6)),
                ]
            )
    notes = ["± one standard deviation over seeds.", *part.notes]
    figure = gallery.add(
        f"study-{named}",
        figures.added_neurons(series, heading(metric)),
        f"Adding neurons to {start}",
        "Bars are one standard deviation over seeds. The form of the paper's Fig. 4.",
    )
    shown = table(named, part.title or _ADDED, heads, rows, notes)
    return [shown, side_by_side(figure)]


_ADDED = "Neurons added to a selection"
