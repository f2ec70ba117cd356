"""Parts of a study that show results: the table in the paper's form, and learning rates."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from neft_core.config.shown import BEFORE
from neft_core.config.study import RatesSection, TableSection
from neft_core.findings import Findings, Row, mean, number
from neft_core.metrics import OF_TASK, TITLES
from neft_core.page import Gallery, Html
from neft_core.study_candidates import Place, best, notes
from neft_core.study_tables import Cell, Table

NOTHING = Cell("–")
"""What was not asked for."""

RIVALS = {"full": "full", "lora": "LoRA"}
"""What every run is compared with."""


def table(found: Findings, part: TableSection, _gallery: Gallery) -> list[Table | Html]:
    """Methods against tasks, and their differences to full fine-tuning and to LoRA."""
    reasons: dict[str, int] = {}
    kinds = {task: found.params.tasks[task].format.task for task in part.headings}
    metrics = {task: part.metrics or list(OF_TASK[kind][:1]) for task, kind in kinds.items()}
    titles = [TITLES[m] for m in dict.fromkeys(m for names in metrics.values() for m in names)]
    name = found.named(part)
    title = part.title or "Results"
    heads = ["method", "trained parameters", "% of model"]
    for task, heading in part.headings.items():
        several = len(titles) > 1
        heads += [f"{heading} {TITLES[m]}" if several else heading for m in metrics[task]]
    rows = [
        [
            Cell(label),
            *_sizes(found, part, label),
            *(
                _score(found, part, label, task, metric, reasons)
                for task in part.headings
                for metric in metrics[task]
            ),
        ]
        for label in part.rows
    ]
    said = f"{', '.join(titles)}: mean over seeds ± one standard deviation (n − 1); bold: the best."
    said += " In brackets what the paper reports." if part.paper else ""
    signatures = {
        row[f"{metric}_signature"]: None
        for task in part.headings
        for metric in metrics[task]
        for row in found.rows(task)
        if row.get(f"{metric}_signature")
    }
    said += f" Signature: {', '.join(signatures)}." if signatures else ""
    below = [*failures(reasons), said, *notes(found, _places(found, part)), *part.notes]
    return [
        Table(name, title, heads, _best_in_bold(rows, 3), below),
        *_differences(found, part, f"{name}-differences", f"{title}: differences"),
    ]


def _places(found: Findings, part: TableSection) -> Iterator[Place]:
    """Every row in every column, with the runs that it may show there."""
    for label in part.rows:
        for task, heading in part.headings.items():
            yield Place(label, heading, task, part.runs(label, task, found.params.runs))


def _sizes(found: Findings, part: TableSection, label: str) -> list[Cell]:
    """What a row's runs train: of some methods it differs from task to task."""
    rows = [row for task in part.headings if (row := _row(found, part, label, task))]
    cells = []
    for key, form in (("parameters", "{:,.0f}"), ("percent", "{:.2f}")):
        values = sorted({value for row in rows if (value := number(row.get(key))) is not None})
        if not values:
            cells.append(NOTHING)
        elif len(values) == 1:
            whole = key == "parameters"
            cells.append(Cell(form.format(values[0]), int(values[0]) if whole else values[0]))
        else:
            cells.append(Cell(f"{form.format(values[0])} – {form.format(values[-1])}"))
    return cells


def _row(found: Findings, part: TableSection, label: str, task: str) -> Row | None:
    """The row of the result table that tells of a label on a task."""
    runs = part.runs(label, task, found.params.runs)
    name = best(found, runs, task) if runs else part.rows[label]
    return next((row for row in found.rows(task) if row["name"] == name), None)


def failed(
    reasons: dict[str, int], reason: str, more: Mapping[str, float | int | str] | None = None
) -> Cell:
    """A cell whose reason stands below the table, under a number; equal reasons have one."""
    number = reasons.setdefault(reason, len(reasons) + 1)
    return Cell(f"failed ({number})", more={"failed": reason} | dict(more or {}))


def failures(reasons: Mapping[str, int]) -> list[str]:
    """The reasons as sentences below a table."""
    return [f"({number}) {reason}" for reason, number in reasons.items()]


def _score(
    found: Findings,
    part: TableSection,
    label: str,
    task: str,
    metric: str,
    reasons: dict[str, int],
) -> Cell:
    """A mean with its deviation, or that it failed."""
    runs = part.runs(label, task, found.params.runs)
    run = best(found, runs, task)
    reported = part.reported(label, task, metric)
    beside = "" if reported is None else f" ({reported:.2f})"
    before = [None] if part.rows[label] in BEFORE else []
    asked = [run] if run else runs or before
    reason = "; ".join(dict.fromkeys(w for r in asked if (w := found.why_failed(r, task))))
    if reason:
        return failed(reasons, reason, _paper(reported))
    row = _row(found, part, label, task)
    value = number(row.get(metric)) if row else None
    if row is None or value is None:
        return Cell(f"–{beside}", more=_paper(reported))
    deviation = number(row.get(f"{metric}_std"))
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    more: dict[str, float | int | str] = {} if deviation is None else {"sd": deviation}
    more |= {"run": run} if run and len(runs) > 1 else {}
    return Cell(f"{value:.2f}{spread}{beside}", value, run=run, more=more | _paper(reported))


def _paper(reported: float | None) -> dict[str, float | int | str]:
    return {} if reported is None else {"paper": reported}


def _best_in_bold(rows: Sequence[Sequence[Cell]], first: int) -> list[list[Cell]]:
    """The rows with the highest value of each column of runs in bold."""
    from dataclasses import replace

    done = [list(row) for row in rows]
    for column in range(first, len(rows[0])):
        values = [row[column].value for row in rows if row[column].run]
        top = max((value for value in values if value is not None), default=None)
        for row in done:
            cell = row[column]
            if cell.run and cell.value is not None and cell.value == top:
                row[column] = replace(cell, best=True)
    return done


def _differences(found: Findings, part: TableSection, name: str, title: str) -> list[Table]:
    """Each run against full fine-tuning and LoRA, with the probability of chance."""
    heads, columns = ["method"], []
    for task, heading in part.headings.items():
        for rival, called in RIVALS.items():
            cells = [_difference(_row(found, part, m, task), rival) for m in part.rows]
            if any(cell.value is not None for cell in cells):
                heads.append(f"{heading}: Δ {called}")
                columns.append(cells)
    if not columns:
        return []
    rows = [
        [Cell(label), *cells]
        for label, *cells in zip(part.rows, *columns, strict=True)
        if any(cell.value is not None for cell in cells)
    ]
    samples = found.params.evaluation.bootstrap
    note = (
        "Difference of the first metric to full fine-tuning, and to the LoRA that trains about as "
        "many parameters; of several alike to the one with the lowest dev loss. p: paired "
        f"bootstrap over the test rows ({samples:,} samples), seed by seed, of which the largest "
        "counts, and 1 where seeds differ in sign; * p < 0.05, ** p < 0.01."
    )
    return [Table(name, title, heads, rows, [note])]


def _difference(row: Row | None, rival: str) -> Cell:
    delta, p = (number((row or {}).get(f"{key}_{rival}")) for key in ("delta", "p"))
    if delta is None or p is None:
        return NOTHING
    mark = "**" if p < 0.01 else "*" if p < 0.05 else ""
    return Cell(f"{delta:+.2f}{mark} (p {p:.3f})".replace("-", "−"), delta, more={"p": p})


def rates(found: Findings, part: RatesSection, _gallery: Gallery) -> list[Table | Html]:
    """Dev losses by method and learning rate."""
    losses: dict[str, dict[float, list[float]]] = {}
    broken: dict[str, dict[float, str]] = {}
    reasons: dict[str, int] = {}
    runs = {}
    for name in found.runs(part.task):
        run = found.params.runs[name]
        method, rate = run.method.words(), run.lr or found.params.training.lr
        runs[method, rate] = name
        of_method = losses.setdefault(method, {})
        reason = found.why_failed(name, part.task)
        if reason is not None:
            broken.setdefault(method, {})[rate] = reason
        else:
            of_method[rate] = [s["best_dev_loss"] for s in found.seeds(name)]
    columns = sorted({rate for _, rate in runs})
    rows, edges = [], []
    for method, by_rate in losses.items():
        means = {rate: mean(values)[0] for rate, values in by_rate.items() if values}
        best = min(means, key=lambda rate: means[rate]) if means else None
        if best is not None and best in (min(means), max(means)):
            edges.append(method)
        cells = [Cell(method)]
        for rate in columns:
            reason = broken.get(method, {}).get(rate)
            cells.append(
                failed(reasons, reason)
                if reason
                else _loss(by_rate.get(rate, []), rate == best, runs.get((method, rate)))
            )
        rows.append([*cells, Cell("–") if best is None else Cell(f"{best:g}", best)])
    said = ["Lowest dev loss in nats per token, mean over seeds; bold: the best of a method."]
    said += [f"The best is the lowest or highest rate that was tried: {_and(edges)}."] * bool(edges)
    said = [*failures(reasons), *said]
    heads = ["method", *(f"{rate:g}" for rate in columns), "best"]
    name = found.named(part)
    return [Table(name, part.title or "Learning rates", heads, rows, [*said, *part.notes])]


def _loss(values: Sequence[float], best: bool, run: str | None) -> Cell:
    if not values:
        return NOTHING
    value, deviation = mean(values)
    spread = "" if deviation is None else f" ± {deviation:.3f}"
    more = {} if deviation is None else {"sd": deviation}
    return Cell(f"{value:.3f}{spread}", value, best, run, more)


def _and(names: Iterable[str]) -> str:
    return "; ".join(names)
