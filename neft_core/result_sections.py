"""Sections of the report: the result tables, and what they say in a sentence."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from neft_core import figures
from neft_core.findings import Findings, Row, mean, number
from neft_core.metrics import TITLES
from neft_core.page import Gallery, Html, code, fill, join, paragraph, spread, strong, table
from neft_core.summary import LORA, compared_in, fewer_seeds


def heading(name: str) -> str:
    """A metric's name as tables show it."""
    return TITLES.get(name, name)


def verdict(found: Findings) -> Html:
    """The runs of each task by their score, in one sentence."""
    lines = []
    of_tasks = ((task, *of) for task in found.params.tasks for of in _trained(found, task).items())
    for task, origin, runs in of_tasks:
        metrics = found.metrics(task)
        if not metrics:
            continue
        metric = metrics[0]
        best, *others = sorted(runs, key=lambda row: -(number(row[metric]) or 0.0))
        said = [
            fill("{name} {score}", name=strong(row["name"]), score=_score(row, metric))
            for row in others
        ]
        base = next((row for row in found.rows(task) if row["name"] == "base"), None)
        lines.append(
            fill(
                "<li>{task}: {best} reaches {score} {metric} with {percent} % of the parameters "
                "trained{others}{base}.</li>",
                task=task if origin == task else f"{task}, trained on {origin}",
                best=strong(best["name"]),
                score=_score(best, metric),
                metric=heading(metric),
                percent=f"{number(best['percent']) or 0.0:.3g}",
                others=fill("; then {said}", said=join(said, ", ")) if said else "",
                base=f"; the base model, untrained, {_score(base, metric)}" if base else "",
            )
        )
    return fill('<ul class="verdict">{lines}</ul>', lines=join(lines)) if lines else Html()


def results(found: Findings, gallery: Gallery) -> Html | str:
    """The result table of each task, and its metric against what is trained."""
    parts = []
    for task in found.tasks:
        if rows := found.rows(task):
            parts += [fill("<h3>{task}</h3>", task=task), _results(found, task, rows)]
            parts += list(_trade_off(found, task, gallery))
    if not parts:
        return "There is no result table yet."
    bootstrap = found.params.evaluation.bootstrap
    note = (
        "Scores and losses are means over seeds, ± one standard deviation (n − 1). Bold: the best "
        "of the runs trained on the same task. Δ: difference (of BLEU, ROUGE-L or accuracy) to "
        f"that task's full fine-tuning, to {LORA} (of several alike the one with the lowest dev "
        "loss) and to the base; significance by paired bootstrap over the test rows "
        f"({bootstrap:,} samples), seed by seed, of which the largest p counts, and 1 where seeds "
        "differ in sign. * p < 0.05, ** p < 0.01; without a mark the difference may be chance."
    )
    notes = [
        paragraph(said, kind="note") for said in (note, *compared_in(fewer_seeds(found.table)))
    ]
    return join([*parts, *notes, _signatures(found)])


def _signatures(found: Findings) -> Html:
    keys = dict.fromkeys(key for row in found.table for key in row if key.endswith("_signature"))
    said = {row[key]: None for key in keys for row in found.table if row[key]}
    return paragraph("Signatures: ", join(map(code, said), " · "), kind="note") if said else Html()


def _trained(found: Findings, task: str) -> dict[str, list[Row]]:
    """Rows of runs, without base and tuned model, by the task that they were trained on."""
    groups: dict[str, list[Row]] = {}
    for row in found.rows(task):
        if row["name"] in found.params.runs:
            groups.setdefault(row.get("trained_on") or task, []).append(row)
    return groups


def _score(row: Row, metric: str) -> str:
    value = number(row[metric])
    return "–" if value is None else f"{value:.2f}"


def _results(found: Findings, task: str, rows: Sequence[Row]) -> Html:
    metrics, runs = found.metrics(task), set(found.params.runs)
    deltas = [n for n in ("full", "lora", "base") if any(row.get(f"delta_{n}") for row in rows)]
    trained = _trained(found, task)
    tops = {
        (origin, m): max(number(row[m]) or 0.0 for row in of_origin)
        for origin, of_origin in trained.items()
        for m in metrics
    }
    losses = (number(row["dev_loss"]) for row in trained.get(task, []))
    lowest = min(filter(None, losses), default=None)
    highest = max((number(row[m]) or 0.0 for row in rows for m in metrics[:1]), default=0.0)
    heads: list[tuple[object, bool]] = [("run", False)]
    heads += [(heading(metric), True) for metric in metrics]
    heads += [(f"Δ to {name}", True) for name in deltas]
    heads += [(name, True) for name in ("dev loss", "trained parameters", "% of model", "seeds")]
    seeds = {
        run: [s["best_dev_loss"] for s in found.seeds(run) if s.get("best_dev_loss")]
        for run in found.runs(task)
    }
    lines, kinds = [], []
    for row in rows:
        own = row["name"] in runs
        parameters, percent = number(row["parameters"]), number(row["percent"])
        method = row["method"] if row["method"] not in ("-", row["name"]) else ""
        origin = row.get("trained_on") or task
        if origin != task:
            method = f"{method} trained on {origin}".strip()
        line: list[object] = [
            fill("{name} <small>{method}</small>", name=row["name"], method=method)
        ]
        for metric in metrics:
            value = number(row[metric])
            shown = spread(value, number(row.get(f"{metric}_std")))
            best = own and value is not None and value == tops[origin, metric]
            cell = strong(shown) if best else shown
            if metric == metrics[0] and value is not None and highest > 0:
                wide = f"{100 * max(value, 0) / highest:.1f}%"
                cell = fill(
                    '<span class="track">{cell}<i class="level" style="width:{wide}"></i></span>',
                    cell=cell,
                    wide=wide,
                )
            line.append(cell)
        line += [_delta(row, name) for name in deltas]
        loss = number(row["dev_loss"])
        sd = mean(seeds[row["name"]])[1] if own and seeds.get(row["name"]) else None
        shown = spread(loss, sd, 3)
        line += [
            strong(shown) if own and loss is not None and loss == lowest else shown,
            f"{parameters:,.0f}" if parameters is not None else "–",
            f"{percent:.2f}" if percent is not None else "–",
            row["seeds"] or "–",
        ]
        lines.append(line)
        kinds.append("" if own else "reference")
    for place in range(len(kinds) - 1):
        if kinds[place] == "reference" and not kinds[place + 1]:
            kinds[place] += " last-reference"
    return table(heads, lines, kinds=kinds, label=f"results of {task}")


def _delta(row: Row, name: str) -> Html:
    delta, p = number(row.get(f"delta_{name}")), number(row.get(f"p_{name}"))
    if delta is None:
        return Html("–")
    mark = "" if p is None or p >= 0.05 else "*" if p >= 0.01 else "**"
    said = f"p = {p:.3f}" if p is not None else ""
    return fill(
        '<span title="{said}">{delta}<span class="mark">{mark}</span></span>',
        said=said,
        delta=f"{delta:+z.2f}".replace("-", "−"),
        mark=mark,
    )


def _trade_off(found: Findings, task: str, gallery: Gallery) -> Iterator[Html]:
    trained, metrics = _trained(found, task), found.metrics(task)
    pieces = []
    for (origin, rows), metric in product(trained.items(), metrics):
        moved = origin != task
        series: dict[str, list[figures.Place]] = {}
        for row in rows:
            parameters, value = number(row["parameters"]), number(row[metric])
            if parameters and value is not None:
                place = (parameters, value, number(row.get(f"{metric}_std")))
                series.setdefault(found.families[row["name"]], []).append(place)
        levels = {
            row["name"]: value
            for row in found.rows(task)
            if row["name"] == "base" and (value := number(row[metric])) is not None
        }
        if series:
            pieces.append(
                gallery.add(
                    f"trade-off-{task}-{metric}" + (f"-from-{origin}" if moved else ""),
                    figures.trade_off(series, heading(metric), levels, _family_styles(found)),
                    f"{heading(metric)} against trained parameters, {task}"
                    + (f", trained on {origin}" if moved else ""),
                    "A line is a method at several sizes; bars are one standard deviation over "
                    "seeds.",
                )
            )
    if pieces:
        yield fill('<div class="figures">{pieces}</div>', pieces=join(pieces))


def _family_styles(found: Findings) -> Mapping[str, figures.Style]:
    """For a method the colour of its runs."""
    return figures.styles({family: family for family in found.families.values()})
