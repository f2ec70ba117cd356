"""The result table: base, tuned model and every run side by side, with significance."""

import csv
import os
import statistics
from pathlib import Path
from typing import Any

from neft_core import config
from neft_core.files import read_json, replacing, write_json
from neft_core.workspace import Workspace

COLUMNS = {
    "task": "task",
    "name": "run",
    "method": "method",
    "parameters": "trained parameters",
    "percent": "% of model",
    "seeds": "seeds",
    "bleu": "BLEU",
    "chrf": "chrF",
    "delta_full": "ΔBLEU to full",
    "p_full": "p",
    "delta_base": "ΔBLEU to base",
    "p_base": "p",
    "dev_loss": "dev loss",
    "seconds": "seconds",
}
"""Keys of a row, in order, and their headings."""


def summarise(ws: Workspace) -> None:
    """Stage `summary`: compare everything that was evaluated, and write the tables.

    Significance is sacrebleu's paired bootstrap on BLEU, seed by seed: each seed of a run against
    the same seed (by position) of the task's first run with method `full`, of its first with
    `lora` (in summary.csv and the report alone), and against the base. With several seeds the
    largest p-value stands in the table.
    """
    params = ws.params()
    rows, metrics = [], {}
    for task in params.tasks:
        task_rows = _task_rows(ws, params, task)
        rows += task_rows
        metrics[task] = {
            row["name"]: {
                key: row[key]
                for key in ("bleu", "chrf", "p_full", "p_base", "dev_loss", "percent")
                if row.get(key) is not None
            }
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


def _task_rows(ws: Workspace, params: config.Params, task: str) -> list[dict[str, Any]]:
    runs = {name: run for name, run in params.runs.items() if run.task == task}
    baseline = read_json(ws.path("baseline", task, "metrics.json"))
    base_text = _texts(ws.path("baseline", task, "base.jsonl"))
    rivals = {
        method: next((name for name, run in runs.items() if run.method.name == method), None)
        for method in ("full", "lora")
    }
    rows = []
    for name, method in (("base", "-"), ("tuned", f"warm-up, {params.warmup.steps} steps")):
        rows.append({"task": task, "name": name, "method": method, **_mean([baseline[name]])})
    for name, run in runs.items():
        found = read_json(ws.path("evaluation", name, "metrics.json"))["seeds"]
        trained = [
            read_json(ws.path("train", name, f"seed-{s}", "metrics.json")) for s in run.seeds
        ]
        cost = read_json(ws.path("cost", f"{name}.json"))["seeds"]
        row: dict[str, Any] = {
            "task": task,
            "name": name,
            "method": run.method.words(),
            "parameters": trained[0]["trainable_parameters"],
            "percent": trained[0]["trainable_percent"],
            "seeds": len(run.seeds),
            **_mean([found[str(seed)] for seed in run.seeds]),
            "dev_loss": statistics.mean(result["best_dev_loss"] for result in trained),
            "seconds": statistics.mean(entry["seconds"] for entry in cost.values()),
        }
        texts = [_texts(ws.path("evaluation", name, f"seed-{seed}.jsonl")) for seed in run.seeds]
        _compare(row, "base", texts, [base_text], params, task)
        for method, rival in rivals.items():
            if rival is not None and name != rival:
                folder = ws.path("evaluation", rival)
                seeds = runs[rival].seeds
                other = [_texts(folder / f"seed-{seed}.jsonl") for seed in seeds]
                _compare(row, method, texts, other, params, task)
        rows.append(row)
    return rows


def _compare(
    row: dict[str, Any],
    name: str,
    texts: list[list[dict[str, Any]]],
    others: list[list[dict[str, Any]]],
    params: config.Params,
    task: str,
) -> None:
    """Fill `delta_<name>` and `p_<name>` of a row."""
    from neft_core.metrics import paired_bootstrap

    outcomes = []
    for position, mine in enumerate(texts):
        other = others[position % len(others)]
        outcomes.append(
            paired_bootstrap(
                [entry["hypothesis"] for entry in mine],
                [entry["hypothesis"] for entry in other],
                [entry["references"] for entry in mine],
                params.tasks[task].format.target_language,
                samples=params.evaluation.bootstrap,
            )
        )
    row[f"delta_{name}"] = statistics.mean(float(outcome["delta"]) for outcome in outcomes)
    row[f"p_{name}"] = max(outcome["p_value"] for outcome in outcomes)


def _texts(path: Path) -> list[dict[str, Any]]:
    from neft_core.rows import read_rows

    return read_rows(path)


def _mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of each score, its standard deviation, and the signatures."""
    result: dict[str, Any] = {}
    for key in ("bleu", "chrf"):
        values = [entry[key] for entry in found]
        result[key] = statistics.mean(values)
        result[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        result[f"{key}_signature"] = found[0][f"{key}_signature"]
    return result


def _cell(key: str, row: dict[str, Any]) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    if key in ("bleu", "chrf"):
        spread = row.get(f"{key}_std")
        return f"{value:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
    if key.startswith("delta"):
        return f"{value:+.2f}"
    if key.startswith("p_"):
        return f"{value:.3f}"
    if isinstance(value, float):
        digits = {"percent": 2, "seconds": 0, "dev_loss": 3}[key]
        return f"{value:.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _markdown(rows: list[dict[str, Any]]) -> str:
    """The table with its columns aligned, and the signatures below it."""
    cells = [list(COLUMNS.values())] + [[_cell(key, row) for key in COLUMNS] for row in rows]
    # Of a column of numbers the rule is at least `-:`.
    widths = [max(2, *(len(line[i]) for line in cells)) for i in range(len(COLUMNS))]
    words = ("task", "name", "method")
    lines = []
    for number, line in enumerate(cells):
        padded = [
            text.ljust(width) if key in words else text.rjust(width)
            for key, text, width in zip(COLUMNS, line, widths, strict=True)
        ]
        lines.append("| " + " | ".join(padded) + " |")
        if number == 0:
            rule = [
                "-" * width if key in words else "-" * (width - 1) + ":"
                for key, width in zip(COLUMNS, widths, strict=True)
            ]
            lines.append("| " + " | ".join(rule) + " |")
    signatures = {row[f"{key}_signature"]: None for key in ("bleu", "chrf") for row in rows}
    lines += ["", *(f"- `{signature}`" for signature in signatures)]
    return "\n".join(lines) + "\n"


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    extra = ["delta_lora", "p_lora", "bleu_std", "chrf_std", "bleu_signature", "chrf_signature"]
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, [*COLUMNS, *extra], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _curves(ws: Workspace, params: config.Params, name: str, target: Path) -> None:
    """One file of every run's curve, for `dvc plots`."""
    with target.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        header = False
        for run, entry in params.runs.items():
            for seed in entry.seeds:
                source = ws.path("train", run, f"seed-{seed}", f"{name}.csv")
                with source.open(encoding="utf-8", newline="") as curve:
                    lines = list(csv.reader(curve))
                if not header:
                    writer.writerow(["run", "seed", *lines[0]])
                    header = True
                writer.writerows([run, seed, *line] for line in lines[1:])
