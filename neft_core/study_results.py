"""Parts of a study that show results: the table in the paper's form, and learning rates."""

from collections.abc import Iterable, Iterator, Sequence

from neft_core.config.shown import BEFORE
from neft_core.config.study import HEADS, RatesSection, TableSection
from neft_core.findings import Findings, Row, mean, number
from neft_core.metrics import OF_TASK, TITLES
from neft_core.page import Gallery, Html
from neft_core.study_against import Entry, against
from neft_core.study_candidates import Place, best, notes
from neft_core.study_runs import NOTHING, best_in_bold, differences, failed, failures
from neft_core.study_tables import Cell, Table


def table(found: Findings, part: TableSection, _gallery: Gallery) -> list[Table | Html]:
    """Methods against tasks, and their differences to full fine-tuning and to LoRA."""
    reasons: dict[str, int] = {}
    kinds = {task: found.params.tasks[task].format.task for task in part.headings}
    metrics = {task: part.metrics or list(OF_TASK[kind][:1]) for task, kind in kinds.items()}
    titles = [TITLES[m] for m in dict.fromkeys(m for names in metrics.values() for m in names)]
    name = found.named(part)
    title = part.title or "Results"
    heads = [*HEADS]
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
        Table(name, title, heads, best_in_bold(rows, range(3, len(heads))), below),
        *differences(
            found,
            name,
            title,
            list(part.headings.values()),
            [(label, [_row(found, part, label, task) for task in part.headings])
             for label in part.rows],
        ),
        *against(found, name, title, part.against, _entries(found, part), part.headings, metrics),
    ]  # fmt: skip


def _entries(found: Findings, part: TableSection) -> list[Entry]:
    """The rows that stand for runs, with the one that each column shows."""
    entries = []
    for label, asked in part.rows.items():
        runs = {}
        for task in part.headings if asked not in BEFORE else []:
            given = part.runs(label, task, found.params.runs)
            if given:
                runs[task] = best(found, given, task) or given[0]
        entries.append(Entry(label, label, runs))
    return entries


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
        tried = [rate for of, rate in runs if of == method]
        if best in (min(tried), max(tried)) and len(tried) > 1:
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
