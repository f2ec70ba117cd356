"""What the parts of a study read of its runs: results, and why some are missing."""

from collections.abc import Sequence
from typing import Any

from neft_core.config.shown import candidates
from neft_core.findings import Findings, Row, number
from neft_core.metrics import OF_TASK, TITLES
from neft_core.page import Html, fill, join
from neft_core.study_candidates import best
from neft_core.study_results import failed, failures
from neft_core.study_tables import Cell, Table

FAILED = "failed: "
"""How a cell begins in which something failed, until its reason stands below the table."""


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


def table(
    name: str,
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    notes: Sequence[str] = (),
) -> Table:
    """A table with the reasons for what failed below it."""
    reasons: dict[str, int] = {}

    def told(cell: Cell) -> Cell:
        if not cell.text.startswith(FAILED):
            return cell
        return failed(reasons, cell.text.removeprefix(FAILED))

    lines = [list(map(told, row)) for row in rows]
    return Table(name, title, heads, lines, [*failures(reasons), *notes])


def means(found: Findings, run: str, key: str) -> Sequence[float]:
    """A number of each seed's metrics.json."""
    return [entry[key] for entry in found.seeds(run) if key in entry]


def side_by_side(*drawn: Html) -> Html:
    """Figures of a part."""
    return fill('<div class="figures">{drawn}</div>', drawn=join(drawn))
