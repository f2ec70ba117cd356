"""Differences between the rows of a part, seed by seed: what `against` asks for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from neft_core.files import read_json
from neft_core.findings import Findings, mean
from neft_core.metrics import Resampled, difference
from neft_core.study_runs import FAILED, NOTHING, compared, heading, row_of, spread, table
from neft_core.study_tables import Cell, Table
from neft_core.summary import compared_in, drawn

Drawing = Callable[[str, str, int, str], Resampled]
"""Resamples by task, run, seed and metric."""

LOSS = "Δ dev loss"
"""Heading of the dev losses, which only runs have that were trained on the task."""


class Entry(NamedTuple):
    """A row of a part.

    Attributes:
        name: as `against` names it.
        label: as tables call it.
        runs: by task that is tested the run; a task without one is left out.
    """

    name: str
    label: str
    runs: Mapping[str, str]


class Pair(NamedTuple):
    """Two rows on a task, in a metric: the first less the second."""

    task: str
    metric: str
    one: Entry
    other: Entry

    @property
    def runs(self) -> tuple[str, str]:
        """What is compared."""
        return self.one.runs[self.task], self.other.runs[self.task]


def against(
    found: Findings,
    name: str,
    title: str,
    wanted: Sequence[str],
    rows: Sequence[Entry],
    headings: Mapping[str, str],
    metrics: Mapping[str, Sequence[str]],
) -> list[Table]:
    """A table of every row less each wanted one; none where nothing is wanted.

    Args:
        found: the results.
        name: of the table beside which it stands.
        title: its title.
        wanted: names of rows.
        rows: all of the part that stand for runs.
        headings: of the tasks that are tested.
        metrics: of each task those that are compared.
    """
    pairs = list(_pairs(wanted, rows, headings, metrics))
    if not pairs:
        return []
    seeds = sorted({seed for pair in pairs for seed in _seeds(found, pair)})
    several = len({pair.metric for pair in pairs}) > 1
    lead = ["tested on"] * (len(headings) > 1) + ["metric"] * several
    delta = "Δ" if several else f"Δ {heading(pairs[0].metric)}"
    heads = [*lead, "method", "against", delta, *(f"seed {s}" for s in seeds), LOSS]
    draws = _drawing(found)
    lines = []
    for pair in pairs:
        said = {"tested on": headings[pair.task], "metric": heading(pair.metric)}
        cells = [*(said[key] for key in lead), pair.one.label, pair.other.label]
        lines.append([*map(Cell, cells), *_told(found, pair, seeds, draws)])
    if all(line[-1] == NOTHING for line in lines):
        heads, lines = heads[:-1], [line[:-1] for line in lines]
    labels = "; ".join(row.label for want in wanted for row in rows if row.name == want)
    notes = _notes(found, pairs, heads)
    return [table(f"{name}-against", f"{title}: against {labels}", heads, lines, notes)]


def _pairs(
    wanted: Sequence[str],
    rows: Sequence[Entry],
    headings: Mapping[str, str],
    metrics: Mapping[str, Sequence[str]],
) -> Iterator[Pair]:
    """What is compared: task by task and metric by metric, of what each has a run of."""
    named = {row.name: row for row in rows}
    for task in headings:
        for metric in metrics[task]:
            for name in wanted:
                for row in rows:
                    runs = [entry.runs.get(task) for entry in (row, named[name])]
                    if None not in runs and runs[0] != runs[1]:
                        yield Pair(task, metric, row, named[name])


def _seeds(found: Findings, pair: Pair) -> list[int]:
    """Those that both runs have."""
    one, other = (found.params.runs[run].seeds for run in pair.runs)
    return [seed for seed in one if seed in other]


def _told(found: Findings, pair: Pair, seeds: Sequence[int], draws: Drawing) -> list[Cell]:
    """The cells of a pair: the mean, each seed, and the dev loss."""
    rest = [NOTHING] * (len(seeds) + 1)
    whys = dict.fromkeys(why for run in pair.runs if (why := found.why_failed(run, pair.task)))
    if whys:
        return [Cell(FAILED + "; ".join(whys)), *rest]
    if not all(row_of(found, pair.task, run) for run in pair.runs):
        return [Cell("not there"), *rest]
    both = _seeds(found, pair)
    if not both:
        return [Cell("no seed in common"), *rest]
    run = pair.runs[0]
    outcomes = {}
    for seed in both:
        one, other = (draws(pair.task, name, seed, pair.metric) for name in pair.runs)
        outcomes[seed] = difference(one, other)
    deltas = mean([outcome["delta"] for outcome in outcomes.values()])
    cells = [_signed(deltas, "+z.2f", run)]
    for seed in seeds:
        outcome = outcomes.get(seed)
        cells.append(compared(outcome["delta"], outcome["p_value"], run) if outcome else NOTHING)
    return [*cells, _dev_loss(found, pair)]


def _dev_loss(found: Findings, pair: Pair) -> Cell:
    """By how much dev losses differ; runs that were trained on another task have none here."""
    if any(found.params.runs[run].task != pair.task for run in pair.runs):
        return NOTHING
    apart = {}
    for seed in _seeds(found, pair):
        one, other = (
            read_json(found.ws.path("train", run, f"seed-{seed}", "metrics.json"))["best_dev_loss"]
            for run in pair.runs
        )
        apart[seed] = one - other
    cell = _signed(mean(list(apart.values())), "+z.3f", pair.runs[0])
    each = {f"seed {seed}": value for seed, value in apart.items()}
    return replace(cell, more={**each, **cell.more})


def _signed(value: tuple[float, float | None], form: str, run: str) -> Cell:
    cell = spread(value, form, run=run)
    return replace(cell, text=cell.text.replace("-", "−"))


def _drawing(found: Findings) -> Drawing:
    """Resamples of what a seed of a run said on a task, each made once."""

    @cache
    def of_seed(task: str, run: str, seed: int, metric: str) -> Resampled:
        place = run if found.params.runs[run].task == task else f"{run}.{task}"
        file = found.ws.path("evaluation", place, f"seed-{seed}.jsonl")
        return drawn(file, found.params, task, metric)

    return of_seed


def _notes(found: Findings, pairs: Sequence[Pair], heads: Sequence[str]) -> list[str]:
    samples = found.params.evaluation.bootstrap
    said = (
        "The method less what it stands against, each seed with the same seed: mean over them ± "
        "one standard deviation, then every seed by itself. p: paired bootstrap over the test "
        f"rows ({samples:,} samples); * p < 0.05, ** p < 0.01, however many are compared."
    )
    if LOSS in heads:
        said += f" {LOSS}: nats per token, less is better."
    fewer = []
    for pair in pairs:
        both = _seeds(found, pair)
        if both and any(set(found.params.runs[run].seeds) != set(both) for run in pair.runs):
            fewer.append(f"{' and '.join(pair.runs)} ({', '.join(map(str, both))})")
    return [said, *compared_in(fewer)]
