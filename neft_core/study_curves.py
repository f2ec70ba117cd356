"""Parts that show results by what is trained: `trade_off`, `wins` (Fig. 2), `added` (Fig. 4)."""

from collections.abc import Sequence

from neft_core import figures
from neft_core.config.shown import BEFORE, AddedSection, TradeOffSection, candidates
from neft_core.config.study import WinsSection
from neft_core.findings import Findings, Row, number
from neft_core.page import Gallery, Html
from neft_core.study_against import Entry, against
from neft_core.study_candidates import Place, notes
from neft_core.study_runs import (
    FAILED,
    SPREAD,
    absent,
    differences,
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
    compared: list[tuple[str, list[Row | None]]] = []
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
            compared.append((run, list(of_task.values())))
    levels: dict[str, dict[str, float]] = {task: {} for task in tasks}
    for label, name in part.levels.items():
        run = run_of(found, name, part.task)
        cells = [Cell(label), Cell(run)]
        values = {task: score(row_of(found, task, run), metrics[task]) for task in tasks}
        own = next((row for task in tasks if (row := row_of(found, task, run))), None)
        for key, form in (("parameters", ",.0f"), ("percent", ".2f")):
            amount = number(own.get(key)) if own else None
            cells.append(Cell("–") if amount is None else Cell(format(amount, form), amount))
        link = None if name in BEFORE else run
        rows.append([*cells, *(spread(value, run=link) for value in values.values())])
        for task, value in values.items():
            if value is not None:
                levels[task][label] = value[0]
    title = part.title or "Trained parameters against results"
    pieces: list[Table | Html] = [
        table(named, title, heads, rows, [SPREAD, *part.notes], range(4, len(heads))),
        *differences(found, named, title, tasks, compared),
    ]
    drawn = [
        gallery.add(
            f"study-{named}" + (f"-{task}" if task != part.task else ""),
            figures.trade_off(lines[task], heading(metrics[task]), levels[task]),
            f"{heading(metrics[task])} on {task} against what is trained on {part.task}",
            "A line is a method at several sizes; bars are one standard deviation over seeds.",
        )
        for task in tasks
        if lines[task]
    ]
    return [*pieces, *([side_by_side(*drawn)] if drawn else [])]


def wins(found: Findings, part: WinsSection, gallery: Gallery) -> list[Table | Html]:
    """Which of two methods has the higher mean at each level: a table, and the counts as bars."""
    named, (first, second) = found.named(part), part.series
    levels = list(zip(*part.series.values(), strict=True))
    heads = ["tested on", "trained on", f"{first} higher", f"{second} higher", "equal"]
    heads += [f"{one} − {other}" for one, other in levels]
    pairs = [(here, task) for task in part.trained for here in part.tested or [task]]
    cells = {pair: [_compared(found, part, level, *pair) for level in levels] for pair in pairs}

    def counts(here: str, task: str) -> list[int]:
        """How often the first, the second, neither is higher; empty: on any task."""
        those = [pair for pair in pairs if here in ("", pair[0]) and task in ("", pair[1])]
        values = [c.value for pair in those for c in cells[pair] if c.value is not None]
        return [sum(v > 0 for v in values), sum(v < 0 for v in values), values.count(0)]

    def row(here: str, task: str, more: Sequence[Cell]) -> list[Cell]:
        told = [Cell(str(count), count) for count in counts(here, task)]
        return [Cell(here or "all"), Cell(task or "all"), *told, *more]

    sides = {"tested on": [(here, "") for here in dict.fromkeys(here for here, _ in pairs)]}
    if part.tested and len(part.trained) > 1:
        sides["trained on"] = [("", task) for task in part.trained]
    rows = [row(*pair, of) for pair, of in cells.items()]
    if len(pairs) > len(part.trained) > 1:
        rows += [row(*at, [Cell("–")] * len(levels)) for side in sides.values() for at in side]
    given = (Place(name, task, task, candidates(name, task, found.params.runs))
             for task in part.trained for level in levels for name in level)  # fmt: skip
    said = "; ".join(" and ".join(_size(found, name, part.trained) for name in of) for of in levels)
    told = [
        "Counted is which has the higher mean over seeds, however little; to its run a difference "
        f"links. Compared are, with the parameters that they train: {said}.",
        *notes(found, given),
        *part.notes,
    ]
    drawn = []
    for across, side in sides.items():
        columns = zip(*(counts(*at) for at in side), strict=True)
        bars = dict(zip((first, second, "equal"), columns, strict=True))
        bars = {name: of for name, of in bars.items() if any(of) or name != "equal"}
        if any(map(any, bars.values())):
            drawn.append(
                gallery.add(
                    f"study-{named}-{across.partition(' ')[0]}",
                    figures.wins([here or task for here, task in side], bars, across),
                    f"{first} against {second}, by the task that runs were {across}",
                    "After the paper's Fig. 2, whose text leaves open which tests it counts.",
                )
            )
    title = part.title or f"How often {first} scores higher than {second}"
    tested = list(dict.fromkeys(here for here, _ in pairs))
    compared = [
        (run, [row_of(found, here, run) if (here, task) in pairs else None for here in tested])
        for task in part.trained
        for level in levels
        for run in (run_of(found, name, task) for name in level)
    ]
    pieces: list[Table | Html] = [
        table(named, title, heads, rows, told),
        *differences(found, named, title, tested, compared),
    ]
    return [*pieces, *([side_by_side(*drawn)] if drawn else [])]


def _compared(
    found: Findings, part: WinsSection, level: Sequence[str], here: str, task: str
) -> Cell:
    """By how much the first of two methods, trained on `task`, scores higher on `here`."""
    metric = first_metric(found, here, part.metric)
    runs = [run_of(found, name, task) for name in level]
    one, other = (score(row_of(found, here, run), metric) for run in runs)
    if one is None or other is None:
        whys = dict.fromkeys(why for run in runs if (why := found.why_failed(run, here)))
        return Cell(FAILED + "; ".join(whys) if whys else "not there")
    difference = round(one[0] - other[0], 6)
    return Cell(f"{difference:+z.2f}", difference, run=runs[difference < 0])


def _size(found: Findings, name: str, tasks: Sequence[str]) -> str:
    """A method with how many parameters it trains, where a result of it is there."""
    for task in tasks:
        row = row_of(found, task, run_of(found, name, task))
        if row and (size := number(row["parameters"])) is not None:
            return f"{name} ({size:,.0f})"
    return name


def added(found: Findings, part: AddedSection, gallery: Gallery) -> list[Table | Html]:
    """A line for each way to add neurons to a selection, from that selection on."""
    metric, named = first_metric(found, part.task, part.metric), found.named(part)
    heads = ["added", "run", "added % of model", "% of model", heading(metric), "Δ to the start"]
    heads += ["the paper's"] if part.paper else []
    start = run_of(found, part.start, part.task)
    first = row_of(found, part.task, start)
    if first is None or (begun := score(first, metric)) is None:
        why = failure(found, start)
        rows = [absent("nothing", f"{start}: {why}", len(heads))]
        return [table(named, part.title or _ADDED, heads, rows, part.notes)]
    base = number(first["percent"]) or 0.0
    rows = [[Cell("nothing"), Cell(start), Cell("0", 0), Cell(f"{base:.2f}", base),
             spread(begun, run=start), Cell("–"), *_reported(part, part.start)]]  # fmt: skip
    compared: list[tuple[str, list[Row | None]]] = [(start, [first])]
    series: dict[str, list[figures.Place]] = {}
    reported: dict[str, list[figures.Place]] = {}
    for label, names in part.ways.items():
        series[label] = [(0.0, *begun)]
        told: list[figures.Place] = []
        for name in names:
            run = run_of(found, name, part.task)
            row = row_of(found, part.task, run)
            value = score(row, metric)
            if row is None or value is None:
                missing = absent(run, failure(found, run), 5)
                rows.append([Cell(label), *missing, *_reported(part, name)])
                continue
            percent = number(row["percent"]) or 0.0
            more = percent - base
            series[label].append((more, *value))
            if name in part.paper:
                told.append((more, part.paper[name], None))
            rows.append(
                [
                    Cell(label),
                    Cell(run),
                    Cell(f"{more:.2f}", round(more, 6)),
                    Cell(f"{percent:.2f}", percent),
                    spread(value, run=run),
                    Cell(f"{value[0] - begun[0]:+z.2f}", round(value[0] - begun[0], 6), run=run),
                    *_reported(part, name),
                ]
            )
            compared.append((run, [row]))
        if told:
            first_told = [(0.0, part.paper[part.start], None)] if part.start in part.paper else []
            reported[label] = [*first_told, *told]
    figure = gallery.add(
        f"study-{named}",
        figures.added_neurons(series, heading(metric), reported),
        f"Adding neurons to {start}",
        "Bars are one standard deviation over seeds. The form of the paper's Fig. 4.",
    )
    title = part.title or _ADDED
    runs = {name: run_of(found, name, part.task) for name in part.methods()}
    entries = [Entry(name, run, {part.task: run}) for name, run in runs.items()]
    on = {part.task: part.task}, {part.task: [metric]}
    return [
        table(named, title, heads, rows, [SPREAD, *part.notes], [4]),
        *differences(found, named, title, [part.task], compared),
        *against(found, named, title, part.against, entries, *on),
        side_by_side(figure),
    ]


def _reported(part: AddedSection, name: str) -> list[Cell]:
    """The paper's number in a column of its own, where the part has one."""
    if not part.paper:
        return []
    value = part.paper.get(name)
    return [Cell("–") if value is None else Cell(f"{value:.2f}", value)]


_ADDED = "Neurons added to a selection"
