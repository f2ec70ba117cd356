"""`neft run --dry-run`: what the params ask for, and what would run."""

from collections.abc import Mapping
from typing import Any

from neft_core import config
from neft_core.config import MEASURES, Params
from neft_core.graph import Graph
from neft_core.lockfile import changed_params, locked
from neft_core.overrides import Preview
from neft_core.workspace import PIPELINE


def describe(preview: Preview) -> str:
    """Model, tasks and runs in words, then the stages; of a workspace, which are out of date."""
    params = preview.params
    lines = [f"model: {_model(params.model)}"]
    for name, task in params.tasks.items():
        lines.append(f"task {name}: {task.format.task} from {_source(task.source)}")
    warmup, steps = params.warmup, "none"
    if warmup is not None:
        rows = warmup.batch_size * warmup.accumulation
        steps = f"{warmup.steps} steps of {rows} rows at lr {warmup.lr:g}"
    lines.append(f"warm-up: {steps}; layout {params.scoring.candidates}")
    for name, more in params.warmups.items():
        _, section = params.warmed(name)
        lines.append(f"warm-up {name} of {more.task}: {section.steps} steps, seed {section.seed}")
    for name, entry in params.scores.items():
        lines.append(f"scores {name} by {entry.criterion} of {entry.rows} rows of {entry.task}")
    for name, act in params.activations.items():
        lines.append(
            f"scores {name} by activations of {act.warmup} on {act.rows} rows of {act.task}"
        )
    for name, run in params.runs.items():
        epochs = run.epochs or params.training.epochs
        lines.append(
            f"run {name}: {run.method.words()} on {run.task}, "
            f"lr {run.lr or params.training.lr:g}, {epochs:g} epochs, "
            f"seeds {', '.join(map(str, run.seeds))}"
        )
    for moved in params.transfers.values():
        lines.append(f"transfer: {moved.run} is tested on {moved.task} too")
    for kind in MEASURES:
        measured = [entry.run for entry in getattr(params, kind).values()]
        lines += [f"{kind} of {', '.join(measured)}"] if measured else []
    stages = _stages(params)
    lines.append(f"params are valid; {len(stages)} stages")
    if preview.workspace is not None:
        data = preview.data if preview.changed else None
        reasons = outdated(Graph(preview.workspace), data)
        known = locked(preview.workspace)
        new = "made for the first time"
        stages = [
            f"{name}: {reasons.get(name, 'up to date' if name in known else new)}"
            for name in stages
        ]
    return "\n".join(lines + [f"  {stage}" for stage in stages])


def outdated(graph: Graph, data: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Stages that are out of date, and why.

    Args:
        graph: the workspace's.
        data: what params.yaml would say; None: what it says.
    """
    known = locked(graph.workspace)
    stale: dict[str, str] = {}
    for stage in graph.stages:
        changes = graph.changes(stage.name)
        reasons = [*changes.inputs, *changes.outputs]
        if data is not None and stage.name in known:
            reasons = [line for line in reasons if not line.startswith(f"{Params.FILE}: ")]
            reasons += [
                f"{Params.FILE}: {key}: modified" for key in changed_params(known[stage.name], data)
            ]
        reasons += [f"{name} runs" for name in stage.upstream if name in stale]
        if reasons:
            stale[stage.name] = reasons[0]
    return stale


def _model(model: config.BuiltModel | config.LocalModel | config.HubModel) -> str:
    if isinstance(model, config.BuiltModel):
        return (
            f"built, {model.layers} layers, hidden {model.hidden}, "
            f"intermediate {model.intermediate}, vocabulary {model.vocabulary}"
        )
    if isinstance(model, config.HubModel):
        return f"{model.id} at revision {model.revision}, from the Hub"
    return f"directory {model.path}"


def _source(source: config.GeneratedSource | config.LocalSource | config.HubSource) -> str:
    rows = f"{source.train:,} training rows" if source.train else "all training rows"
    if isinstance(source, config.GeneratedSource):
        return f"the generated corpus {'-'.join(source.languages)}, {rows}"
    place = f"Hub data set {source.id}" if isinstance(source, config.HubSource) else source.path
    return f"{place}, {rows}"


def _stages(params: Params) -> list[str]:
    """Stage names as dvc.yaml's foreach expands them."""
    names = []
    for name, stage in config.read_yaml(PIPELINE)["stages"].items():
        section = stage.get("foreach", "").removeprefix("${").removesuffix("}")
        items = list(getattr(params, section)) if section else []
        names += [f"{name}@{item}" for item in items] if section else [name]
    return names
