"""Of several runs that a study may show in one place, such as one for each rate, the best."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from neft_core.findings import Findings, mean


class Place(NamedTuple):
    """Where a study shows a run.

    Attributes:
        row: what the row is called.
        column: what the column is called; empty where there is one alone.
        task: the one on which runs are tested there.
        runs: the candidates.
    """

    row: str
    column: str
    task: str
    runs: Sequence[str]


def best(found: Findings, runs: Sequence[str], task: str) -> str | None:
    """The run with the lowest dev loss, mean over its seeds; of equal ones the first.

    Args:
        found: the results.
        runs: the candidates. One alone needs no results.
        task: the one on which they are tested; without results there a candidate doesn't count.
    """
    if len(runs) < 2:
        return next(iter(runs), None)
    tested = {row["name"] for row in found.rows(task)}
    losses = {
        run: mean([seed["best_dev_loss"] for seed in found.seeds(run)])[0]
        for run in runs
        if run in tested
    }
    return min(losses, key=lambda run: losses[run], default=None)


def notes(found: Findings, places: Iterable[Place]) -> list[str]:
    """Sentences about the candidates: which were taken, which failed."""
    taken: dict[str, dict[str, list[str]]] = {}
    edges: list[str] = []
    failed: dict[str, str] = {}
    for place in places:
        if len(place.runs) < 2:
            continue
        run = best(found, place.runs, place.task)
        if run is None:
            continue
        why = {name: found.why_failed(name, place.task) for name in place.runs}
        failed |= {name: reason for name, reason in why.items() if reason}
        taken.setdefault(place.row, {}).setdefault(_short(found, run), []).append(place.column)
        entries = {name: found.params.runs[name] for name in place.runs}
        alike = [entry for entry in entries.values() if entry.method == entries[run].method]
        rates = [entry.lr or found.params.training.lr for entry in (entries[run], *alike)]
        if min(rates) < max(rates) and rates[0] in (min(rates), max(rates)):
            edges.append(_named(place.row, [place.column]))
    if not taken:
        return []
    said = [
        f"{row}: {', '.join(_named(run, columns) for run, columns in of_row.items())}"
        for row, of_row in taken.items()
    ]
    lines = [
        "Of several candidates the one with the lowest dev loss is shown, mean over its seeds: "
        f"{'; '.join(said)}."
    ]
    lines += [f"Its rate is the lowest or the highest tried: {'; '.join(edges)}."] * bool(edges)
    broken = "; ".join(f"{run} ({reason})" for run, reason in failed.items())
    return [*lines, *[f"Failed, so no candidates: {broken}."] * bool(failed)]


def _short(found: Findings, run: str) -> str:
    """A run's name without its task's, which the column tells."""
    return run.removesuffix(f"-{found.params.runs[run].task}")


def _named(name: str, columns: Sequence[str]) -> str:
    inside = ", ".join(filter(None, columns))
    return f"{name} ({inside})" if inside else name
