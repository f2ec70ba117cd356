"""Sections of the report: training, cost, samples."""

from collections.abc import Iterator, Mapping
from typing import Any

from neft_core import figures
from neft_core.findings import (
    Findings,
    mean,
)
from neft_core.page import Gallery, Html, fill, join, paragraph, spread, table, text

SAMPLES = 5
"""Test rows shown of each task."""

LOSS = "loss (nats per token)"


def training(found: Findings, gallery: Gallery) -> Html | str:
    """Learning curves."""
    pieces = []
    for task in found.tasks:
        own = {run: found.families[run] for run in found.runs(task)}
        looks = figures.styles(own, list(found.families.values()))
        for kind, split in (("train", "training"), ("dev", "dev")):
            runs = found.curves(task, kind)
            if runs:
                several = any(len(seeds) > 1 for seeds in runs.values())
                long = any(len(seed) > 60 for seeds in runs.values() for seed in seeds)
                said = [
                    "Mean of the seeds; the band reaches from the lowest to the highest."
                ] * several
                said += ["Averaged within 60 spans of steps."] * long
                pieces.append(
                    gallery.add(
                        f"{kind}-loss-{task}",
                        figures.curves(runs, y_label=LOSS, style=looks),
                        f"Loss on the {split} split, {task}",
                        " ".join(said),
                    )
                )
    if not pieces:
        return "There are no learning curves yet."
    return fill('<div class="figures">{pieces}</div>', pieces=join(pieces))


def cost(found: Findings, gallery: Gallery) -> Html | str:
    """Time, memory and size of every stage that trains."""
    costs = found.costs()
    if not costs:
        return "No costs were recorded."
    own = {n: e for n, e in costs.items() if n in found.params.runs}
    shared = {n: e for n, e in costs.items() if n not in found.params.runs}
    order = [*shared, *(run for run in found.params.runs if run in own)]
    heads: list[tuple[object, bool]] = [("stage or run", False)]
    heads += [(n, True) for n in ("trained parameters", "steps", "seconds", "tokens / s",
                                  "peak memory", "adapter")]  # fmt: skip
    rows = []
    for name in order:
        entries, seeds = costs[name], found.seeds(name) if name in own else []
        size = found.adapter_bytes(name) if name in own else None
        peak = max((e["peak_bytes"] for e in entries if "peak_bytes" in e), default=None)
        speed = [e["tokens_per_second"] for e in entries if "tokens_per_second" in e]
        rows.append(
            [
                name,
                f"{seeds[0]['trainable_parameters']:,}" if seeds else "–",
                f"{max(s['steps'] for s in seeds):,}" if seeds and "steps" in seeds[0] else "–",
                spread(*mean([e["seconds"] for e in entries]), digits=1),
                f"{mean(speed)[0]:,.0f}" if speed else "–",
                _size(peak),
                _size(size),
            ]
        )
    note = (
        "Seconds are those of one seed, ± one standard deviation. Warm-up and scoring are done "
        "once for a task, whatever the number of runs. On a CPU peak memory is the "
        "process's, with libraries and all that it did before."
    )
    pieces = list(_cost_figures(found, own, shared, gallery))
    return join(
        [
            table(
                heads,
                rows,
                kinds=["reference" if name in shared else "" for name in order],
                label="costs",
            ),
            paragraph(note, kind="note"),
            fill('<div class="figures">{pieces}</div>', pieces=join(pieces)) if pieces else "",
        ]
    )


def _cost_figures(
    found: Findings, own: Mapping[str, Any], shared: Mapping[str, Any], gallery: Gallery
) -> Iterator[Html]:
    names = [run for run in found.params.runs if run in own]
    if not names:
        return
    trained = [mean([entry["seconds"] for entry in own[name]]) for name in names]
    before: list[figures.Value] = []
    for name in names:
        stages = [entry for stage in found.before(name) for entry in shared.get(stage, [])]
        before.append((sum(entry["seconds"] for entry in stages), None))
    series = {"training": trained}
    if any(value for value, _ in before):
        series["warm-up and scoring"] = before
    yield gallery.add(
        "seconds",
        figures.bars(names, series, label="seconds", horizontal=True, stacked=True, unit=",.0f"),
        "Time of a training",
        "With what it needs before it; other runs of the task share that.",
    )
    peaks = [max(e.get("peak_bytes", 0) for e in own[name]) / 1e9 for name in names]
    if any(peaks):
        yield gallery.add(
            "memory",
            figures.bars(
                names,
                {"peak": [(peak, None) for peak in peaks]},
                label="peak memory (GB)",
                horizontal=True,
                unit=".2f",
            ),
            "Peak memory of a training",
        )


def _size(amount: float | None) -> str:
    from neft_core.planner import size

    return size(amount) if amount else "–"


def samples(found: Findings, _gallery: Gallery) -> Html | str:
    """Test rows with what each model made of them."""
    parts = []
    for task in found.tasks:
        rows = found.samples(task, SAMPLES)
        if rows:
            parts += [fill("<h3>{task}</h3>", task=task), *map(_sample, rows)]
    if not parts:
        return "Nothing was generated yet."
    note = (
        "Evenly spaced test rows, not chosen by hand; of each run its first seed. "
        "A tick: the text equals a reference."
    )
    return join([paragraph(note, kind="note"), *parts])


def _sample(row: Mapping[str, Any]) -> Html:
    given = {f"source {row['number']}": row["source"]}
    for place, reference in enumerate(row["references"]):
        given["reference" + (f" {place + 1}" if place else "")] = reference
    item = '<dt class="given">{name}</dt><dd class="given" dir="auto">{said}</dd>'
    lines = [fill(item, name=name, said=said) for name, said in given.items()]
    for name, said in row["texts"].items():
        right = Html(' class="right"') if said.strip() in row["references"] else Html()
        form = '<dt>{name}</dt><dd dir="auto"{right}>{said}</dd>'
        lines.append(fill(form, name=name, right=right, said=text(said or "(nothing)")))
    return fill('<div class="sample"><dl>{lines}</dl></div>', lines=join(lines))
