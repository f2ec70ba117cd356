"""Parts about what training takes and leaves: `cost` and `forgetting`."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from neft_core import figures
from neft_core.config.shown import CostSection, ForgettingSection
from neft_core.files import read_json
from neft_core.findings import Findings, Row, mean, number
from neft_core.page import Gallery, Html
from neft_core.study_runs import (
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


def cost(found: Findings, part: CostSection, gallery: Gallery) -> list[Table | Html]:
    """Seconds and memory before and in training, when the first are earned back; and speed."""
    heads = ["method", "run", "trained parameters", "ms a step", "saved a step (ms)",
             "peak memory (GB)", "before training (s)", "its peak memory (GB)",
             "steps to break even"]  # fmt: skip
    costs, named = found.costs(), found.named(part)
    full = run_of(found, part.full, part.task)
    dear = _step(found, costs, full)
    rows: list[list[Cell]] = []
    bars: dict[str, figures.Value] = {}
    for label, name in part.rows.items():
        run = run_of(found, name, part.task)
        step, row = _step(found, costs, run), row_of(found, part.task, run)
        if step is None or row is None:
            still = row is not None and any("trained" in seed for seed in found.seeds(run))
            why = "nothing trained" if still else failure(found, run)
            rows.append([Cell(label), *absent(run, why, len(heads) - 1)])
            continue
        bars[label] = step
        stages = [entry for stage in found.before(run) for entry in costs.get(stage, [])]
        before = sum(entry["seconds"] for entry in stages)
        saved = _difference(dear, step) if dear is not None and run != full else None
        parameters = number(row["parameters"]) or 0.0
        cells = [Cell(label), Cell(run), Cell(f"{parameters:,.0f}", int(parameters))]
        cells += [spread(step, run=run), spread(saved, "+z.2f", run=run)]
        cells.append(_memory(costs[run], run))
        cells.append(Cell(f"{before:.1f}", round(before, 3)) if stages else Cell("none"))
        cells.append(_memory(stages))
        rows.append([*cells, _break_even(before, saved)])
    notes = [
        f"A step is an update with its share of dev losses; what is saved is told against {full}; "
        "± one standard deviation over seeds. Before training: warm-up and scoring, once for a "
        "task whatever the number of runs, of which each row here pays all. Break even: after so "
        "many steps the time saved has paid for it; what is less than its ± can't be told. On a "
        "CPU peak memory is the process's, with libraries and all that it did before.",
        "Each training, warm-up and scoring was timed when it was made: what another study made "
        "before has its time from there, also where another stage ran beside it (`jobs`). Rows "
        "may so be of different moments, and ± is of one run's seeds, trained one after the other.",
        *part.notes,
    ]
    title = part.title or "Cost of finding neurons, and what training them saves"
    pieces: list[Table | Html] = [table(named, title, heads, rows, notes)]
    if bars:
        figure = figures.bars(
            list(bars),
            {"a step": list(bars.values())},
            label="ms a step",
            horizontal=True,
            unit=".1f",
        )
        caption = "Bars are one standard deviation over seeds."
        drawn = gallery.add(f"study-{named}", figure, "Time of a training step", caption)
        pieces.append(side_by_side(drawn))
    speeds = _speeds(found, part)
    return [*pieces, *([speeds] if speeds else [])]


def _step(found: Findings, costs: Mapping[str, Any], run: str) -> tuple[float, float | None] | None:
    """Milliseconds of a step: mean and deviation over seeds; None where nothing was trained."""
    steps = [seed.get("steps", 0) for seed in found.seeds(run)]
    if run not in costs or len(steps) != len(costs[run]) or not all(steps):
        return None
    pairs = zip(costs[run], steps, strict=True)
    return mean([1000 * entry["seconds"] / count for entry, count in pairs])


def _difference(one: figures.Value, other: figures.Value) -> figures.Value:
    """What one mean is more than another, with the deviation of that over seeds."""
    deviations = [deviation for _, deviation in (one, other) if deviation is not None]
    return one[0] - other[0], math.hypot(*deviations) if deviations else None


def _break_even(before: float, saved: figures.Value | None) -> Cell:
    """After how many steps the milliseconds saved on each have paid for the seconds before."""
    if saved is None:
        return Cell("–")
    value, deviation = saved
    if deviation is not None and abs(value) <= deviation:
        return Cell(f"can't be told: the times differ by {value:+z.2f} ± {deviation:.2f} ms")
    if value <= 0:
        return Cell("never: no faster")
    even = before / value * 1000
    return Cell(f"{even:,.0f}", round(even, 3))


def _memory(entries: Sequence[Mapping[str, float]], run: str | None = None) -> Cell:
    peak = max((entry.get("peak_bytes", 0) for entry in entries), default=0) / 1e9
    return Cell(f"{peak:.2f}", round(peak, 6), run=run) if peak else Cell("–")


def _speeds(found: Findings, part: CostSection) -> Table | None:
    """Tokens a second of each row that `speed` measured."""
    heads = ["generation, tokens a second", "run", "base", "as adapter", "merged", "adapter / base",
             "merged / base"]  # fmt: skip
    rows, said = [], ""
    for label, name in part.rows.items():
        run = run_of(found, name, part.task)
        for key, entry in found.params.speed.items():
            path = found.ws.path("cost", f"speed.{key}.json")
            if entry.run != run or not found.made(path, key, "speed"):
                continue
            data = read_json(path)
            speeds = data["tokens_per_second"]
            said = (
                f"{data['prompts']} prompts in one batch, {data['new_tokens']} tokens each, on a "
                f"{data['device']}; ± one standard deviation over {len(speeds['base'])} "
                "measurements, taken in turns; ratios are medians of these turns."
            )
            forms = ("adapter", "merged")
            rows.append([Cell(label), Cell(run), spread(mean(speeds["base"]), ",.0f")])
            rows[-1] += [spread(mean(speeds[form]), ",.0f", run=run) for form in forms]
            for form in forms:
                ratio = statistics.median(
                    a / b for a, b in zip(speeds[form], speeds["base"], strict=True)
                )
                rows[-1].append(Cell(f"{ratio:.2f}", round(ratio, 4), run=run))
    title = "Speed of generation"
    return Table(f"{found.named(part)}-speed", title, heads, rows, [said]) if rows else None


def forgetting(found: Findings, part: ForgettingSection, gallery: Gallery) -> list[Table | Html]:
    """What each run gained on its task beside what it lost on text of the pre-training kind."""
    metric, named = first_metric(found, part.task, part.metric), found.named(part)
    heads = ["method", "run", "% of model", heading(metric), "gain", "loss before", "loss after",
             "forgotten"]  # fmt: skip
    base = score(row_of(found, part.task, "base"), metric)
    rows: list[list[Cell]] = []
    compared: list[tuple[str, list[Row | None]]] = []
    points: dict[str, list[figures.Place]] = {}
    runs = {label: run_of(found, name, part.task) for label, name in part.rows.items()}
    losses, texts = _losses(found, list(runs.values())), 0
    for label, run in runs.items():
        row, data = row_of(found, part.task, run), losses[run]
        value = score(row, metric)
        if row is None or isinstance(data, str) or value is None or base is None:
            why = data if isinstance(data, str) else failure(found, run)
            rows.append([Cell(label), *absent(run, why, len(heads) - 1)])
            continue
        texts, before = data["texts"], data["base"]
        after = mean(list(data["seeds"].values()))
        gain, change = value[0] - base[0], (after[0] - before, after[1])
        percent = number(row["percent"]) or 0.0
        cells = [Cell(label), Cell(run), Cell(f"{percent:.2f}", percent), spread(value, run=run)]
        cells += [Cell(f"{gain:+z.2f}", round(gain, 6), run=run), Cell(f"{before:.3f}", before)]
        rows.append([*cells, spread(after, ".3f", run=run), spread(change, "+z.3f", run=run)])
        compared.append((label, [row]))
        points[label] = [(gain, *change)]
    notes = [
        f"Gain: {heading(metric)} over the base's. Loss: nats per token on {texts:,} texts of the "
        f"pre-training kind; forgotten is what it rose by. {SPREAD}",
        *part.notes,
    ]
    title = part.title or "What was gained, and what was forgotten"
    pieces: list[Table | Html] = [
        table(named, title, heads, rows, notes, [3]),
        *differences(found, named, title, [part.task], compared),
    ]
    if points:
        figure = figures.lines(
            points,
            x_label=f"gain ({heading(metric)} over the base)",
            y_label="forgotten (nats per token)",
        )
        caption = "Lower right is best. Bars are one standard deviation over seeds."
        drawn = gallery.add(f"study-{named}", figure, "Forgetting and gain", caption)
        pieces.append(side_by_side(drawn))
    return pieces


def _losses(found: Findings, runs: Sequence[str]) -> dict[str, dict[str, Any] | str]:
    """What was measured of each run, on the texts of the first that was; or why nothing was."""
    losses: dict[str, dict[str, Any] | str] = {}
    texts = None
    for run in runs:
        entries = {k: entry for k, entry in found.params.forgetting.items() if entry.run == run}
        files = {key: found.ws.path("evaluation", f"forgetting.{key}.json") for key in entries}
        on = {
            (entries[key].path, entries[key].rows): file
            for key, file in files.items()
            if found.made(file, key, "forgetting")
        }
        texts = texts or next(iter(on), None)
        if texts in on:
            losses[run] = dict(read_json(on[texts]))
        elif on:
            others = (f"{rows:,} of {path}" for path, rows in on)
            losses[run] = f"measured on other texts ({', '.join(others)})"
        else:
            losses[run] = failure(found, run, *entries) if entries else "not measured"
    return losses
