"""The result table: base, tuned model and every run side by side, with significance."""

import csv
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from neft_core import config
from neft_core.files import read_json, replacing, write_json
from neft_core.metrics import OF_TASK, TITLES, Resampled, difference, resampled
from neft_core.workspace import Workspace

Row = dict[str, Any]

RIVALS = {"full": "full", "lora": "LoRA"}
"""Methods whose runs the others are compared with, as tables call them."""

LIKE = 2
"""Of runs that are compared in size none trains more than so many times the other's parameters."""

LORA = "the LoRA nearest in trained parameters, of those that have half to twice as many"
"""In sentences."""


def columns(rows: list[Row]) -> dict[str, str]:
    """Keys of a row, in order, with their headings; those of metrics and transfers where needed."""
    metrics = [name for name in TITLES if any(name in row for row in rows)]
    tested = {row["metric"] for row in rows}
    one = TITLES[tested.pop()] if len(tested) == 1 else ""
    moved = {"trained_on": "trained on"} if any("trained_on" in row for row in rows) else {}
    return {
        "task": "task",
        "name": "run",
        **moved,
        "method": "method",
        "parameters": "trained parameters",
        "percent": "% of model",
        "seeds": "seeds",
        **{name: TITLES[name] for name in metrics},
        "delta_full": f"Δ{one} to full",
        "p_full": "p",
        "delta_base": f"Δ{one} to base",
        "p_base": "p",
        "dev_loss": "dev loss",
        "seconds": "seconds",
    }


def summarise(ws: Workspace) -> None:
    """Stage `summary`: compare everything that was evaluated, and write the tables.

    Significance is sacrebleu's paired bootstrap on the first metric of the kind of task, seed by
    seed: each seed of a run against the same seed of the run with method `full` on the same task,
    of the one with `lora` that is nearest in trained parameters, if neither has more than twice as
    many (in summary.csv and the report alone), and against the base; of several alike the one with
    the lowest dev loss. Seeds that one of both lacks are left out, and the others told. With
    several seeds the largest p-value stands in the table, and 1 where one seed is better and
    another worse. A run that is tested on another task too has a row there. What a study tells to
    have failed is left out.
    """
    params = ws.params()
    rows: list[Row] = []
    metrics = {}
    for task in params.tasks:
        task_rows = _task_rows(ws, params, task)
        rows += task_rows
        wanted = (*_metrics(params, task), "p_full", "p_base", "dev_loss", "percent")
        metrics[task] = {
            row["name"]: {key: row[key] for key in wanted if row.get(key) is not None}
            for row in task_rows
        }
    with replacing(ws.path("summary")) as folder:
        folder.mkdir()
        (folder / "summary.md").write_text(_markdown(rows), encoding="utf-8")
        _csv(folder / "summary.csv", rows)
        write_json(folder / "metrics.json", metrics)
        for name in ("train", "dev"):
            _curves(ws, params, name, folder / f"{name}.csv")
    if "NEFT_OWNER_PID" not in os.environ:  # `neft run` shows the table at its end
        print(_markdown(rows))


def _metrics(params: config.Params, task: str) -> tuple[str, ...]:
    return OF_TASK[params.tasks[task].format.task]


def _task_rows(ws: Workspace, params: config.Params, task: str) -> list[Row]:
    """Base and tuned model, the runs on a task, and runs of other tasks that were tested on it."""
    names, failed = _metrics(params, task), _failed(params)
    baseline, base = {}, None
    if f"baseline@{task}" not in failed:
        baseline = read_json(ws.path("baseline", task, "metrics.json"))
        base = drawn(ws.path("baseline", task, "base.jsonl"), params, task, names[0])
    rows = []
    warmed = f"warm-up, {params.warmup.steps} steps" if params.warmup else ""
    for name, method in (("base", "-"), ("tuned", warmed)):
        if name in baseline:
            rows.append({"name": name, "method": method, **_mean([baseline[name]], names)})
    # Runs of one task are compared with each other, wherever they are tested.
    tested = [
        (name, name)
        for name, run in params.runs.items()
        if run.task == task and f"evaluate@{name}" not in failed
    ]
    tested += [
        (t.run, f"{t.run}.{t.task}")
        for name, t in params.transfers.items()
        if t.task == task and f"transfer@{name}" not in failed
    ]
    draws = {
        name: {
            seed: drawn(ws.path("evaluation", place, f"seed-{seed}.jsonl"), params, task, names[0])
            for seed in params.runs[name].seeds
        }
        for name, place in tested
    }
    courses = {
        name: [
            read_json(ws.path("train", name, f"seed-{s}", "metrics.json"))
            for s in params.runs[name].seeds
        ]
        for name, _ in tested
    }
    losses = {n: statistics.mean(c["best_dev_loss"] for c in of) for n, of in courses.items()}
    for name, place in tested:
        run, trained = params.runs[name], courses[name]
        found = read_json(ws.path("evaluation", place, "metrics.json"))["seeds"]
        row: Row = {
            "name": name,
            "method": run.method.words(),
            "parameters": trained[0]["trainable_parameters"],
            "percent": trained[0]["trainable_percent"],
            "seeds": len(run.seeds),
            **_mean([found[str(seed)] for seed in run.seeds], names),
        }
        if run.task != task:
            row["trained_on"] = run.task
        else:
            cost = read_json(ws.path("cost", f"{name}.json"))["seeds"]
            row["dev_loss"] = losses[name]
            row["seconds"] = statistics.mean(entry["seconds"] for entry in cost.values())
        if base is not None:
            _compare(row, "base", draws[name], dict.fromkeys(draws[name], base))
        beside = [other for other, _ in tested if params.runs[other].task == run.task]
        for method in RIVALS:
            rivals = [
                n
                for n in beside
                if params.runs[n].method.name == method
                and (method == "full" or _alike(courses[n], trained))
            ]
            if rivals and name not in rivals:
                rival = min(rivals, key=lambda n: (_apart(courses[n], trained), losses[n]))
                _compare(row, method, draws[name], draws[rival])
        rows.append(row)
    return [{"task": task, "metric": names[0], **row} for row in rows]


def _failed(params: config.Params) -> dict[str, str]:
    return params.study.failed if params.study else {}


def _apart(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """How far two runs are from each other in trained parameters."""
    return abs(float(one[0]["trainable_parameters"] - other[0]["trainable_parameters"]))


def _alike(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Whether two runs train about as many parameters."""
    less, more = sorted(float(seeds[0]["trainable_parameters"]) for seeds in (one, other))
    return more <= LIKE * less


def drawn(file: Path, params: config.Params, task: str, metric: str) -> Resampled:
    """Resamples of what a seed said on a task, from its hypotheses beside their references."""
    from neft_core.rows import read_rows

    rows = read_rows(file)
    return resampled(
        [row["hypothesis"] for row in rows],
        [row["references"] for row in rows],
        params.tasks[task].format.target_language,
        samples=params.evaluation.bootstrap,
        metric=metric,
    )


def _compare(
    row: Row, name: str, draws: Mapping[int, Resampled], others: Mapping[int, Resampled]
) -> None:
    """Fill `delta_<name>` and `p_<name>` of a row, by seed; `seeds_<name>` where not of all."""
    both = [seed for seed in draws if seed in others]
    if draws.keys() != others.keys():
        row[f"seeds_{name}"] = ", ".join(map(str, both)) or "none"
    if not both:
        return
    outcomes = [difference(draws[seed], others[seed]) for seed in both]
    deltas = [outcome["delta"] for outcome in outcomes]
    row[f"delta_{name}"] = statistics.mean(deltas)
    # Seeds that contradict each other show nothing, however sure each is of itself.
    opposed = min(deltas) < 0 < max(deltas)
    row[f"p_{name}"] = 1.0 if opposed else max(outcome["p_value"] for outcome in outcomes)


def fewer_seeds(rows: Iterable[Mapping[str, Any]], rivals: Iterable[str] = RIVALS) -> Iterator[str]:
    """Rows that were compared in some of their seeds alone, with these: `neft to full (1, 2)`."""
    for row in rows:
        for name in rivals:
            if seeds := row.get(f"seeds_{name}"):
                yield f"{row['name']} to {name} ({seeds})"


def compared_in(fewer: Iterable[str]) -> list[str]:
    """A sentence about what was compared in some seeds alone; none about nothing."""
    told = "; ".join(dict.fromkeys(fewer))
    return [f"Compared in the seeds that both have: {told}."] if told else []


def _mean(found: list[dict[str, Any]], metrics: tuple[str, ...]) -> Row:
    """Mean over seeds of each score, its standard deviation, and the signatures."""
    result: Row = {}
    for key in metrics:
        values = [entry[key] for entry in found]
        result[key] = statistics.mean(values)
        result[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        result[f"{key}_signature"] = found[0][f"{key}_signature"]
    return result


def _cell(key: str, row: Row) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    if key in TITLES:
        spread = row.get(f"{key}_std")
        return f"{value:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
    if key.startswith("delta"):
        return f"{value:+z.2f}"
    if key.startswith("p_"):
        return f"{value:.3f}"
    if isinstance(value, float):
        digits = {"percent": 2, "seconds": 0, "dev_loss": 3}[key]
        return f"{value:.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _markdown(rows: list[Row]) -> str:
    """The table with its columns aligned, and the signatures below it."""
    keys = columns(rows)
    cells = [list(keys.values())] + [[_cell(key, row) for key in keys] for row in rows]
    # Of a column of numbers the rule is at least `-:`.
    widths = [max(2, *(len(line[i]) for line in cells)) for i in range(len(keys))]
    words = ("task", "name", "trained_on", "method")
    lines = []
    for number, line in enumerate(cells):
        padded = [
            text.ljust(width) if key in words else text.rjust(width)
            for key, text, width in zip(keys, line, widths, strict=True)
        ]
        lines.append("| " + " | ".join(padded) + " |")
        if number == 0:
            rule = [
                "-" * width if key in words else "-" * (width - 1) + ":"
                for key, width in zip(keys, widths, strict=True)
            ]
            lines.append("| " + " | ".join(rule) + " |")
    signatures = {
        row[f"{key}_signature"]: None for key in TITLES for row in rows if f"{key}_signature" in row
    }
    lines += ["", *(f"- `{signature}`" for signature in signatures)]
    tested = {row["task"]: TITLES[row["metric"]] for row in rows}
    if len(set(tested.values())) > 1:
        said = ", ".join(f"{metric} for {task}" for task, metric in tested.items())
        lines.append(f"- differences and p: {said}")
    lines += [f"- {said}" for said in compared_in(fewer_seeds(rows, ["full"]))]
    return "\n".join(lines) + "\n"


def _csv(path: Path, rows: list[Row]) -> None:
    keys = columns(rows)
    # The report takes the first signature of a task for that of its first metric.
    metrics = dict.fromkeys(key for names in OF_TASK.values() for key in names if key in keys)
    extra = ["delta_lora", "p_lora", *(f"seeds_{name}" for name in RIVALS)]
    extra += [f"{key}_{kind}" for kind in ("std", "signature") for key in metrics]
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, [*keys, *extra], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _curves(ws: Workspace, params: config.Params, name: str, target: Path) -> None:
    """One file of every run's curve, for `dvc plots`."""
    failed = _failed(params)
    with target.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        header = False
        for run, entry in params.runs.items():
            for seed in entry.seeds if f"train@{run}" not in failed else []:
                source = ws.path("train", run, f"seed-{seed}", f"{name}.csv")
                with source.open(encoding="utf-8", newline="") as curve:
                    lines = list(csv.reader(curve))
                if not header:
                    writer.writerow(["run", "seed", *lines[0]])
                    header = True
                writer.writerows([run, seed, *line] for line in lines[1:])
