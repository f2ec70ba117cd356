"""What the parts of a study read of its runs: results, differences, and why some are missing."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from neft_core.config.shown import candidates
from neft_core.findings import Findings, Row, number
from neft_core.metrics import OF_TASK, TITLES
from neft_core.page import Html, fill, join
from neft_core.study_candidates import best
from neft_core.study_tables import Cell, Table
from neft_core.summary import LORA, RIVALS, compared_in, fewer_seeds

FAILED = "failed: "
"""How a cell begins in which something failed, until its reason stands below the table."""

NOTHING = Cell("–")
"""What was not asked for."""

SPREAD = "± one standard deviation over seeds; bold: the best."
"""Below tables of scores."""


def run_of(found: Findings, name: str, task: str) -> str:
    """The run that a part means: METHOD-TASK, or its whole name; of several rates the best."""
    runs = candidates(name, task, found.params.runs)
    return best(found, runs, task) or next(iter(runs), name)


def failure(found: Findings, run: str, *measured: str) -> str:
    """Why a run's results, or a measurement of it, are missing, in words for a cell."""
    items = (run, *measured)
    reasons = [why for stage, why in found.failed.items() if stage.partition("@")[2] in items]
    return f"{FAILED}{reasons[0]}" if reasons else "not there"


def row_of(found: Findings, task: str, run: str) -> Row | None:
    """A run's row among the results on a task's test split; `base` and `tuned` have theirs."""
    return next((row for row in found.rows(task) if row["name"] == run), None)


def first_metric(found: Findings, task: str, wanted: str | None) -> str:
    """The metric that a part means."""
    return wanted or OF_TASK[found.params.tasks[task].format.task][0]


def heading(metric: str) -> str:
    """A metric as tables name it."""
    return TITLES[metric]


def score(row: Row | None, metric: str) -> tuple[float, float | None] | None:
    """Mean and deviation over seeds."""
    value = number(row.get(metric)) if row else None
    return None if value is None or row is None else (value, number(row.get(f"{metric}_std")))


def spread(value: tuple[float, float | None] | None, form: str = ".2f", **more: Any) -> Cell:
    """A cell of a mean with its deviation."""
    if value is None:
        return Cell("–")
    mean, deviation = value
    if deviation is None:
        return Cell(format(mean, form), mean, **more)
    said = f"{mean:{form}} ± {deviation:{form.lstrip('+')}}"
    return Cell(said, mean, more={"sd": deviation}, **more)


def absent(label: str, why: str, columns: int) -> list[Cell]:
    """A row of something that isn't there."""
    return [Cell(label), Cell(why), *(Cell("–") for _ in range(columns - 2))]


def failed(
    reasons: dict[str, int], reason: str, more: Mapping[str, float | int | str] | None = None
) -> Cell:
    """A cell whose reason stands below the table, under a number; equal reasons have one."""
    place = reasons.setdefault(reason, len(reasons) + 1)
    return Cell(f"failed ({place})", more={"failed": reason} | dict(more or {}))


def failures(reasons: Mapping[str, int]) -> list[str]:
    """The reasons as sentences below a table."""
    return [f"({place}) {reason}" for reason, place in reasons.items()]


def table(
    name: str,
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    notes: Sequence[str] = (),
    scores: Collection[int] = (),
) -> Table:
    """A table with the reasons for what failed below it; in columns of scores the best is bold."""
    reasons: dict[str, int] = {}

    def told(cell: Cell) -> Cell:
        if not cell.text.startswith(FAILED):
            return cell
        return failed(reasons, cell.text.removeprefix(FAILED))

    lines = best_in_bold([list(map(told, row)) for row in rows], scores)
    return Table(name, title, heads, lines, [*failures(reasons), *notes])


def best_in_bold(rows: Sequence[Sequence[Cell]], columns: Collection[int]) -> list[list[Cell]]:
    """The rows with the highest value of some columns in bold, among runs."""
    done = [list(row) for row in rows]
    for column in columns:
        values = [row[column].value for row in rows if row[column].run]
        top = max((value for value in values if value is not None), default=None)
        for row in done:
            cell = row[column]
            if cell.run and cell.value is not None and cell.value == top:
                row[column] = replace(cell, best=True)
    return done


def differences(
    found: Findings,
    name: str,
    title: str,
    headings: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Row | None]]],
) -> list[Table]:
    """A table of runs against full fine-tuning and LoRA; none where there is neither.

    Args:
        found: the results.
        name: of the table beside which it stands.
        title: its title.
        headings: of the tasks that the runs are tested on.
        rows: by label, on each of the tasks, a run's row of the result table. What stands there
            twice is told once.
    """
    heads, columns = ["method"], []
    rows = [row for place, row in enumerate(rows) if row not in rows[:place]]
    for place, heading in enumerate(headings):
        for rival, called in RIVALS.items():
            cells = [_difference(of_task[place], rival) for _, of_task in rows]
            if any(cell.value is not None for cell in cells):
                heads.append(f"{heading}: Δ {called}")
                columns.append(cells)
    lines = [
        [Cell(label), *cells]
        for (label, _), *cells in zip(rows, *columns, strict=True)
        if any(cell.value is not None for cell in cells)
    ]
    samples = found.params.evaluation.bootstrap
    measured = [row for _, of_task in rows for row in of_task if row]
    firsts = dict.fromkeys(first for first, *_ in OF_TASK.values())
    tested = [TITLES[first] for first in firsts if any(row.get(first) for row in measured)]
    note = (
        f"Difference of {' and '.join(tested)} to full fine-tuning, and to {LORA}; of several "
        "alike to the one with the lowest dev loss. p: paired bootstrap over the test rows "
        f"({samples:,} samples), seed by seed, of which the largest counts, and 1 where seeds "
        "differ in sign; * p < 0.05, ** p < 0.01."
    )
    notes = [note, *compared_in(fewer_seeds(measured))]
    shown = Table(f"{name}-differences", f"{title}: differences", heads, lines, notes)
    return [shown] if lines else []


def _difference(row: Row | None, rival: str) -> Cell:
    delta, p = (number((row or {}).get(f"{key}_{rival}")) for key in ("delta", "p"))
    if row is None or delta is None or p is None:
        return NOTHING
    return compared(delta, p, row["name"])


def compared(delta: float, p: float, run: str) -> Cell:
    """A cell of a run's difference to another, and how sure it is."""
    mark = "**" if p < 0.01 else "*" if p < 0.05 else ""
    said = f"{delta:+z.2f}{mark} (p {p:.3f})".replace("-", "−")
    return Cell(said, delta, run=run, more={"p": p})


def means(found: Findings, run: str, key: str) -> Sequence[float]:
    """A number of each seed's metrics.json."""
    return [entry[key] for entry in found.seeds(run) if key in entry]


def side_by_side(*drawn: Html) -> Html:
    """Figures of a part."""
    return fill('<div class="figures">{drawn}</div>', drawn=join(drawn))
