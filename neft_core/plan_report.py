"""`neft plan`: the forecasts of every method and stage as data, and as text."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from neft_core import capacity, config, launching, links, passes
from neft_core.capacity import Rates
from neft_core.errors import NeftError
from neft_core.fit import has_room
from neft_core.forecast import Need, Training
from neft_core.neurons import candidates
from neft_core.planner import MARGIN, WHAT_IF, Planner, other_warmups, size
from neft_core.tracker import Work

SMALL = ("corpus", "prepare", "select", "summary", "report")
"""Stages that need little of anything."""


def report(planner: Planner, rates: Rates | None) -> dict[str, Any]:
    """Everything that is forecast, as plain data.

    Raises:
        NeftError: the model's configuration can't be had, or a budget doesn't fit the model.
    """
    subject, params = planner.subject, planner.params
    rooms = {
        "memory": capacity.free_memory(),
        "gpu_memory": capacity.free_gpu_memory() if planner.gpu else None,
        "disk": capacity.free_disk(planner.root),
    }
    shares = links.stored_once(planner.root)
    stages = list(_stages(planner, rates))
    kept = sum(stage["kept"] for stage in stages)
    return {
        "model": {
            "type": subject.model_type,
            "parameters": subject.parameters,
            "frozen": str(subject.dtype).removeprefix("torch."),
            "autocast": subject.autocast and str(subject.autocast).removeprefix("torch."),
            "device": "cuda" if planner.gpu else "cpu",
        },
        "rows": {task: asdict(planner.rows(task)) for task in params.tasks},
        "processes": launching.copies(params.compute, planner.root),
        "available": rooms,
        "rates": asdict(rates) if rates else None,
        "margin": MARGIN,
        "methods": [_method(planner, rates, *entry) for entry in _methods(planner)],
        "warmups": list(_warmups(planner, rates)),
        "stages": stages,
        "disk": {
            "kept": kept,
            "cache": 0 if shares else kept,
            "scratch": max(stage["scratch"] for stage in stages),
        },
    }


def _methods(planner: Planner) -> Iterator[tuple[list[str], Training]]:
    """Each training that some runs share, then those that no run has."""
    found: dict[str, tuple[list[str], Training]] = {}
    for name in planner.params.runs:
        training, _ = planner.ask("train", name)
        found.setdefault(repr(training), ([], training))[0].append(name)
    yield from found.values()
    first = next(iter(found.values()))[1]
    for method, options in WHAT_IF.items():
        if method not in {training.method for _, training in found.values()}:
            yield [], replace(first, method=method, options=options)


def _method(
    planner: Planner, rates: Rates | None, names: list[str], training: Training
) -> dict[str, Any]:
    task = planner.params.runs[names[0]].task if names else None
    return {
        "runs": names,
        "method": training.method,
        "options": dict(training.options),
        "selected_neurons": planner.need(training).selected,
        "adapter": planner.need(training).kept,
        **_training(planner, rates, task, training),
    }


def _warmups(planner: Planner, rates: Rates | None) -> Iterator[dict[str, Any]]:
    """The chosen way to warm up and the others, for the task that needs most."""
    warmed = [task for task in planner.params.tasks if planner.params.warms(task)]
    if not warmed:
        return
    trainings = {task: planner.training("warmup", task) for task in warmed}
    task = max(trainings, key=lambda name: planner.need(trainings[name]).peak)
    training = trainings[task]
    for chosen, other in [(True, training), *((False, t) for _, t in other_warmups(training))]:
        assert other.warmup is not None
        with contextlib.suppress(NeftError):  # factors don't reach experts
            found = _training(planner, rates, task, other)
            yield {"chosen": chosen, "task": task, **asdict(other.warmup), **found}


def _training(
    planner: Planner, rates: Rates | None, task: str | None, training: Training
) -> dict[str, Any]:
    """What a training needs, in figures that methods and warm-ups share."""
    need = planner.need(training)
    step = need.step
    typical = planner.rows(task).typical if task else None
    return {
        "batch": asdict(training.batch),
        "accumulation": training.accumulation,
        "checkpointing": training.checkpointing,
        "parameters": step.parameters,
        "percent": 100 * step.parameters / planner.subject.parameters,
        "bytes": _parts(need),
        "flops": step.pass_.flops * training.accumulation,
        "seconds": _seconds(rates, planner.step_work(training, typical)),
        "longest_rows": typical is None,
        "fits": has_room(planner, need),
    }


def _parts(need: Need) -> dict[str, int]:
    step = need.step
    return {
        "weights": step.frozen,
        "trained": step.trained,
        "gradients": step.gradients,
        "states": step.states,
        "activations": step.activations,
        "peak": need.peak,
    }


def _stages(planner: Planner, rates: Rates | None) -> Iterator[dict[str, Any]]:
    """Every stage of the pipeline that needs something, with memory, time and disk."""
    params, subject = planner.params, planner.subject
    if isinstance(params.model, config.BuiltModel):
        yield _trained(planner, rates, "base", "")
    warmed = [task for task in params.tasks if params.warms(task)]
    for name in (*warmed, *params.warmups):
        yield _trained(planner, rates, "warmup", name)
    groups = candidates(subject.shapes, subject.model_type, params.scoring.candidates)
    largest = max(group.count * group.length for group in groups)
    scored = sum(group.count * group.length for group in groups)
    neurons = sum(group.count for group in groups)
    for task in warmed:
        # Two values are read in fp32 at most, and compared in float64.
        seconds = _seconds(rates, Work(moved=80 * scored))
        yield _stage("score", task, {"peak": 32 * largest}, seconds, kept=8 * neurons)
    for name, entry in params.scores.items():
        yield _passed(planner, rates, "scores", name, entry.rows, kept=8 * neurons)
    for name, other in params.activations.items():
        yield _passed(planner, rates, "activations", name, other.rows, kept=8 * neurons)
    for run in params.runs:
        yield _trained(planner, rates, "train", run)
    for task in params.tasks:
        asked = passes.asked(planner, task)[0]
        yield _passed(planner, rates, "baseline", task, asked, 1 + (task in warmed))
    tested = [("evaluate", run, run, entry.task) for run, entry in params.runs.items()]
    tested += [("transfer", name, on.run, on.task) for name, on in params.transfers.items()]
    for stage, item, run, task in tested:
        asked = passes.asked(planner, task)[0]
        yield _passed(planner, rates, stage, item, asked, len(params.runs[run].seeds))


def _seconds(rates: Rates | None, work: Work) -> float | None:
    return None if rates is None else rates.seconds(work)


def _stage(
    stage: str,
    item: str,
    parts: dict[str, int],
    seconds: float | None,
    kept: int = 0,
    scratch: int = 0,
) -> dict[str, Any]:
    return {
        "stage": f"{stage} {item}".strip(),
        "bytes": parts,
        "seconds": seconds,
        "kept": kept,
        "scratch": scratch,
    }


def _trained(planner: Planner, rates: Rates | None, stage: str, item: str) -> dict[str, Any]:
    """A stage that trains: its steps, and its dev losses at a third of a step's work each."""
    (training, need), params = planner.ask(stage, item), planner.params
    steps = planner.steps(stage, item)
    seconds = None
    if steps is not None and rates is not None:
        rows = None
        if stage != "base":
            task = params.runs[item].task if stage == "train" else params.warmed(item)[0]
            rows = planner.rows(task)
        typical = rows.typical if rows else None
        seconds = steps * rates.seconds(planner.step_work(training, typical))
        if rows and rows.dev and rows.train and stage == "train":
            every = params.training.evaluate_every or math.ceil(
                rows.train / (training.batch.rows * training.accumulation)
            )
            batches = math.ceil(steps / every) * math.ceil(rows.dev / training.batch.rows)
            share = (typical or training.batch.tokens) / training.batch.tokens / 3
            seconds += batches * rates.seconds(need.step.pass_ * share)
    kept = planner.kept(stage, item)
    return _stage(stage, item, _parts(need), seconds, kept, need.checkpoint)


def _passed(
    planner: Planner,
    rates: Rates | None,
    stage: str,
    item: str,
    rows: int | None,
    times: int = 1,
    kept: int = 0,
) -> dict[str, Any]:
    """A stage that passes rows through models so many times, all at full length."""
    need, seconds = passes.ask(planner, stage, item), None
    if rows is not None and rates is not None:
        once = rates.seconds(need.batch)
        if need.token is not None:
            once += planner.params.evaluation.max_new_tokens * rates.seconds(need.token)
        seconds = times * math.ceil(rows / need.rows) * once
    parts = {"weights": need.weights, "activations": need.peak - need.weights, "peak": need.peak}
    return _stage(stage, item, parts, seconds, kept)


def text(found: dict[str, Any]) -> str:
    """The report as one reads it in a terminal."""
    model, here, disk = found["model"], found["available"], found["disk"]
    longest = any(rows["typical"] is None for rows in found["rows"].values())
    autocast = f", mixed precision {model['autocast']}" if model["autocast"] else ""
    lines = [
        f"model: {model['type']}, {model['parameters']:,} parameters; frozen weights "
        f"{model['frozen']}{autocast}, on {'a GPU' if model['device'] == 'cuda' else 'the CPU'}",
    ]
    for task, rows in found["rows"].items():
        middle = f", {rows['typical']} in the middle" if rows["typical"] else ""
        source = "prepared rows" if middle else "format.max_tokens; nothing prepared yet"
        lines.append(f"task {task}: rows of at most {rows['longest']} tokens{middle} ({source})")
    if model["device"] == "cuda":
        free = here["gpu_memory"]
        lines.append(f"free: {size(free)} of GPU memory" if free else "free: no GPU here")
    lines.append(f"free: {size(here['memory'])} of memory, {size(here['disk'])} of disk")
    if isinstance(several := found["processes"], str):
        lines.append(f"compute.accelerate_config {several}: told of one process; starts unchecked")
    elif several > 1:
        lines.append(f"{several} processes; told of one")
    tasks = len(found["rows"])
    warmups = _table(
        {"warm-up" + f" {entry['task']}" * (tasks > 1): _way(entry), **_columns(entry)}
        for entry in found["warmups"]
    )
    lines += [
        "",
        *_table(
            {"method": _named(entry), "runs": ", ".join(entry["runs"]) or "-", **_columns(entry)}
            for entry in found["methods"]
        ),
        *(["", *warmups] if found["warmups"] else []),
        "(..): not in params; a warm-up's name: its modules, states and update",
        "",
        *_table(_stage_row(stage, longest) for stage in found["stages"]),
        f"{', '.join(SMALL)}: little of anything",
        "",
        "weights: frozen ones, with the originals of trained neurons; trained: values in fp32;",
        "activations: for backward, or to generate; *: computed twice (gradient_checkpointing);",
        "peak: the most at once, less than the sum where gradients come as activations go;",
        "<: were all rows as long as the longest",
        "",
        f"disk: {size(disk['kept'])} in work/, {size(disk['cache'])} in DVC's cache, "
        f"{size(disk['scratch'])} for checkpoints while a stage trains",
    ]
    return "\n".join(lines)


def _named(entry: dict[str, Any]) -> str:
    """A method with its budget, in brackets where no run has it."""
    options = " ".join(
        f"{key}={value:,g}"
        for key, value in entry["options"].items()
        if isinstance(value, int | float) and key in ("rank", "percent", "neurons", "share")
    )
    name = f"{entry['method']} {options}".strip()
    return name if entry["runs"] else f"({name})"


def _way(entry: dict[str, Any]) -> str:
    """A way to warm up, in brackets where params don't choose it."""
    later = entry["update"] == "in_backward"
    rank = f" rank={entry['rank']}" if entry["rank"] else ""
    name = f"{entry['modules']}{rank} {entry['states']}{' in_backward' if later else ''}"
    return name if entry["chosen"] else f"({name})"


def _columns(entry: dict[str, Any]) -> dict[str, str]:
    """What methods and warm-ups have in common."""
    batch, several = entry["batch"], entry["accumulation"]
    again = "*" if entry["checkpointing"] else ""
    return {
        "batch": f"{several}x" * (several > 1) + f"{batch['rows']}x{batch['tokens']}{again}",
        "parameters": f"{entry['parameters']:,}",
        "%": f"{entry['percent']:.2f}",
        **{part: size(amount) for part, amount in entry["bytes"].items()},
        "step": duration(entry["seconds"], entry["longest_rows"]),
        "fits": {True: "yes", False: "no", None: "?"}[entry["fits"]],
    }


def _stage_row(stage: dict[str, Any], longest: bool) -> dict[str, str]:
    parts = ("weights", "trained", "gradients", "states", "activations", "peak")
    return {
        "stage": stage["stage"],
        **{part: _size(stage["bytes"].get(part, 0)) for part in parts},
        "time": duration(stage["seconds"], longest and not stage["stage"].startswith("score ")),
        "disk": _size(stage["kept"]),
        "meanwhile": _size(stage["scratch"]),
    }


def _size(amount: int) -> str:
    return size(amount) if amount else "-"


def _table(rows: Iterator[dict[str, str]]) -> Iterator[str]:
    """Columns as wide as they need; the first to the left, the others to the right."""
    cells = list(rows)
    heads = list(cells[0])
    widths = {head: max(len(head), *(len(row[head]) for row in cells)) for head in heads}
    for row in [{head: head for head in heads}, *cells]:
        first, *others = heads
        line = row[first].ljust(widths[first])
        yield "  ".join([line, *(row[head].rjust(widths[head]) for head in others)])


def duration(seconds: float | None, at_most: bool = False) -> str:
    """Seconds as people say them; `<` before a time that all rows at full length would take."""
    if seconds is None:
        return "?"
    before = "< " if at_most else ""
    if seconds < 1:
        return f"{before}{1000 * seconds:.0f} ms"
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{before}{seconds / length:.1f} {unit}"
    return f"{before}{seconds / 86_400:.1f} days"
