"""What the commands of `neft` do, given their options."""

import argparse
import contextlib
import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from neft_core.errors import NeftError, say

if TYPE_CHECKING:
    from neft_core.workspace import Workspace

ITEMS = {
    "corpus": "tasks",
    "prepare": "tasks",
    "warmup": "tasks",
    "score": "tasks",
    "warmups": "warmups",
    "similarity": "warmups",
    "scores": "scores",
    "activations": "activations",
    "baseline": "tasks",
    "select": "runs",
    "train": "runs",
    "evaluate": "runs",
    "transfer": "transfers",
    "utilisation": "utilisation",
    "forgetting": "forgetting",
    "speed": "speed",
}
"""Section of params that a stage's items come from; the other stages take none."""

CHECKED = {
    "base": "base",
    "warmup": "warmup",
    "warmups": "warmup",
    "scores": "scores",
    "activations": "activations",
    "train": "train",
    "baseline": "baseline",
    "evaluate": "evaluate",
    "transfer": "transfer",
}
"""Stages that are refused where their memory or disk isn't there, and as what they are forecast."""

ARTEFACTS = {
    "summary": "the table above (summary.md, summary.csv) and the curves",
    "train": "adapters, metrics and loss curves of each run and seed",
    "masks": "the selected neurons of each run",
    "evaluation": "hypotheses beside their references",
}
"""What a user looks for after a run, by folder of `work/`."""


def run(options: argparse.Namespace) -> int:
    """Run what is not up to date; the table, where the artefacts are, how to look at them."""
    from neft_core import overrides

    if options.dry_run:
        from neft_core.preview import describe

        print(describe(overrides.preview(options.params, options.set)))
        return 0
    ws = overrides.apply(options.params, options.set)
    _check_fit(ws, options.force)
    from flows.pipeline import run_pipeline
    from neft_core.pages import near, pages
    from neft_core.repro import StageFailed
    from neft_core.workspace import REPORTS

    try:
        result = run_pipeline(ws, force=options.force)
    except StageFailed as fault:
        return say(str(fault), 1)
    if result.table:
        print(f"\n{result.table}")
    print(result.words())
    for name, what in ARTEFACTS.items():
        print(f"  {near(ws.path(name))}: {what}")
    report = ws.root / REPORTS / "report.html"
    if report.is_file():
        print(f"  {near(report)}: all of it on one page, with figures")
    print(f"to look at the runs: {near(Path(sys.executable).parent / 'neft')} ui, or one by one")
    for page in pages(ws):
        print(f"  {page.name}: {page.url}", *([page.line()] if page.command else []), sep="\n    ")
    return 0


def ui(options: argparse.Namespace) -> None:
    """Serve the pages until Ctrl-C."""
    from neft_core.pages import pages, serve
    from neft_core.workspace import find_workspace

    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        serve(pages(find_workspace(), options.mlflow_port, options.prefect_port))


def _check_fit(ws: "Workspace", force: bool) -> None:
    """Refuse what can't fit, of what would run."""
    from neft_core.graph import Graph
    from neft_core.preview import outdated

    graph = Graph(ws)
    due = {stage.name for stage in graph.stages} if force else set(outdated(graph))
    chosen = [
        (CHECKED[stage.family], stage.item or "")
        for stage in graph.stages
        if stage.name in due and stage.family in CHECKED
    ]
    if chosen:
        from neft_core.fit import check

        check(ws, chosen, before=True)


def plan(options: argparse.Namespace) -> None:
    """Print forecasts."""
    from neft_core import overrides, plan_report
    from neft_core.planner import Planner
    from neft_core.workspace import find_workspace

    found = overrides.preview(options.params, options.set)
    # What was prepared is of other params.
    params, ws = found.params, None if found.changed else found.workspace
    if ws is not None:
        root = ws.root
    else:
        root = options.params.resolve().parent if options.params else find_workspace().root
    planner = Planner(params, root, ws, config_file=options.config)
    told = plan_report.report(planner, planner.rates(layer=options.calibrate))
    print(json.dumps(told, indent=2) if options.json else plan_report.text(told))


def stage(options: argparse.Namespace) -> int:
    """Run one stage."""
    from neft_core import preloaded

    argv = ["stage", options.name, *([options.item] if options.item else [])]
    status = preloaded.hand_over(argv)
    if status is not None:
        return status
    from neft_core import launching, processes, ranks
    from neft_core.stages import STAGES
    from neft_core.workspace import find_workspace, hold

    ws = find_workspace()
    if options.name not in STAGES:
        raise NeftError(f"stage '{options.name}': unknown; one of {', '.join(STAGES)}")
    params = ws.params()
    items = ITEMS.get(options.name, "")
    known = list(getattr(params, items)) if items else []
    if options.item not in (known or [None]):
        wants = f"one of {', '.join(known)}" if known else "none"
        got = f"item '{options.item}'" if options.item else "no item"
        raise NeftError(f"stage {options.name}: got {got}; it takes {wants}")
    stage = [part for part in (options.name, options.item) if part]
    name = "-".join(stage)
    processes.end_with_owner()
    if options.name in CHECKED and not ranks.launched():
        from neft_core.fit import check

        check(ws, [(CHECKED[options.name], options.item or "")])
    if not ranks.main() or launching.FAULTS in os.environ:
        held: AbstractContextManager[None] = nullcontext()  # another process holds it
    else:
        held = hold(ws.state("locks", name), f"stage {name}")
    with held:
        if options.name in launching.STAGES and launching.wanted(params.compute):
            try:
                launching.launch(ws, params.compute, stage)
            except launching.LaunchFailed as fault:
                return say(str(fault), 1)
            return 0
        with launching.taking_part(ws, stage):
            STAGES[options.name](ws, *stage[1:])
    return 0


def init(options: argparse.Namespace) -> None:
    """Make a workspace."""
    from neft_core.workspace import init_from

    ws = init_from(options.dir, options.template, options.cache)
    print(f"workspace {ws.root} is ready; next: cd {options.dir} && neft run")


def track(_options: argparse.Namespace) -> None:
    """Bring MLflow up to date."""
    from neft_core.graph import Graph
    from neft_core.tracking import sync
    from neft_core.workspace import find_workspace, hold

    ws = find_workspace()
    with hold(ws.state("lock"), str(ws.root)):
        done = sync(ws, Graph(ws))
    print(f"MLflow at {done.uri}: {done.created} runs new, {done.updated} brought up to date")


def generate(options: argparse.Namespace) -> None:
    """Print texts of base and trained model."""
    from neft_core.samples import show
    from neft_core.workspace import find_workspace

    show(find_workspace(), options.run, options.seed, options.prompt, options.count)


def export(options: argparse.Namespace) -> None:
    """Write a trained run as a checkpoint."""
    from neft_core.exporting import export
    from neft_core.workspace import find_workspace

    ws = find_workspace()
    export(ws, options.run, options.seed, options.to, options.dtype, options.adapter)
