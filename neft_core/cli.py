"""The command line: `neft run | plan | stage | init | track | ui | analyse | generate | export`."""

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from neft_core import __version__, questions
from neft_core.errors import NeftError

if TYPE_CHECKING:
    from neft_core.workspace import Workspace

Command = Callable[[argparse.Namespace], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 for success, 2 for a user's mistake, 1 for a defect, 130 for Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(argv)
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    command: Command = options.command
    if not sys.warnoptions:
        # What libraries will change in their next major version is no news for a user.
        warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        with _interruptible():
            return command(options) or 0
    except NeftError as fault:
        return _say(str(fault), 2)
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as fault:
        where = fault.filename or Path.cwd()
        if fault.errno == errno.ENOSPC:
            return _say(f"{where}: no space left on the disk; free some and run again", 2)
        if fault.errno in (errno.EROFS, errno.EACCES):
            return _say(f"{where}: {fault.strerror}; choose what you can read and write", 2)
        traceback.print_exc()
        return 1
    except KeyboardInterrupt:
        return _say("interrupted; run the same command again to go on", 130)
    except Exception:
        traceback.print_exc()
        return 1


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM in this block is like Ctrl-C: half-written files are removed, children ended."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in a script's background. Children would inherit that, and we ask them to end by it.
        before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(message: str, code: int) -> int:
    for line in message.splitlines():
        # What a stage said in a process of its own has the prefix already.
        print(f"neft: {line.removeprefix('neft: ')}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neft",
        description="Neuron-level fine-tuning of language models: find the neurons that a task "
        "moves, train only those, and compare with full fine-tuning and LoRA.",
    )
    parser.add_argument("--version", action="version", version=f"neft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, what: str, more: str = "") -> argparse.ArgumentParser:
        said = f"{what[0].upper()}{what[1:]}. {more}".rstrip()
        return commands.add_parser(name, help=what, description=said)

    run = command(
        "run",
        "run what is not up to date, then show the results",
        "Interrupted, it goes on from there the next time.",
    )
    run.add_argument(
        "--params",
        type=Path,
        metavar="FILE",
        help="run this file's params, in a workspace of its own below .neft/workspaces",
    )
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="write this into params.yaml first, such as runs.neft.lr=1e-3 (repeatable)",
    )
    run.add_argument("--dry-run", action="store_true", help="check params, tell what would run")
    run.add_argument("--force", action="store_true", help="run every stage anew")
    run.set_defaults(command=_run)

    plan = command("plan", "forecast memory, time and disk of every method")
    plan.add_argument("--params", type=Path, metavar="FILE", help="another params file")
    plan.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as if params.yaml said so (repeatable); the file stays as it is",
    )
    plan.add_argument(
        "--config", type=Path, metavar="FILE", help="the model's config.json; no weights are needed"
    )
    plan.add_argument(
        "--calibrate", action="store_true", help="time a real step of one layer, for better times"
    )
    plan.add_argument("--json", action="store_true", help="all figures, in bytes and seconds")
    plan.set_defaults(command=_plan)

    stage = command(
        "stage",
        "run one stage here and now (what dvc.yaml calls)",
        "Its inputs must be there; nothing is looked up in DVC's cache and nothing is tracked.",
    )
    stage.add_argument("name", metavar="NAME", help="a stage of dvc.yaml, such as train")
    stage.add_argument("item", metavar="ITEM", nargs="?", help="its task or run, where it has any")
    stage.set_defaults(command=_stage)

    init = command("init", "make a workspace: a directory with dvc.yaml and params.yaml")
    init.add_argument("dir", metavar="DIR", type=Path, help="made where missing")
    init.add_argument(
        "--from",
        dest="template",
        type=Path,
        metavar="TEMPLATE",
        help="a folder with params.yaml, or the name of one in examples (default: the demo's)",
    )
    init.add_argument("--cache", type=Path, metavar="DIR", help="a DVC cache to share")
    init.set_defaults(command=_init)

    track = command("track", "bring MLflow up to date with the runs here")
    track.set_defaults(command=_track)

    ui = command("ui", "serve the pages of MLflow and Prefect for the runs here, until Ctrl-C")
    for name, port in (("MLflow", 5000), ("Prefect", 4200)):
        ui.add_argument(
            f"--{name.lower()}-port",
            type=int,
            default=port,
            metavar="PORT",
            help=f"of {name}'s page (default: {port})",
        )
    ui.set_defaults(command=_ui)

    questions.add(command("analyse", "ask masks, scores and trained runs"))

    generate = command("generate", "base and fine-tuned model side by side")
    generate.add_argument("--run", required=True, metavar="NAME", help="a run of params.yaml")
    generate.add_argument("--seed", type=int, help="which seed of it (default: its first)")
    generate.add_argument("--prompt", metavar="TEXT", help="source text; default: test sentences")
    generate.add_argument(
        "--count", type=int, default=5, help="how many test sentences (default: 5)"
    )
    generate.set_defaults(command=_generate)

    export = command(
        "export", "a trained run as a plain checkpoint", "Tells what its precision loses."
    )
    export.add_argument("run", metavar="RUN", help="a run of params.yaml")
    export.add_argument("--seed", type=int, help="which seed of it (default: its first)")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new directory")
    export.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: the base's")
    export.add_argument("--adapter", action="store_true", help="the adapter alone, for peft")
    export.set_defaults(command=_export)
    return parser


def _run(options: argparse.Namespace) -> int:
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
        return _say(str(fault), 1)
    if result.table:
        print(f"\n{result.table}")
    counts = Counter(result.outcomes.values())
    did = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(f"{len(result.outcomes)} stages in {result.seconds:.0f} s: {did}")
    for name, what in ARTEFACTS.items():
        print(f"  {near(ws.path(name))}: {what}")
    report = ws.root / REPORTS / "report.html"
    if report.is_file():
        print(f"  {near(report)}: all of it on one page, with figures")
    print(f"to look at the runs: {near(Path(sys.executable).parent / 'neft')} ui, or one by one")
    for page in pages(ws):
        print(f"  {page.name}: {page.url}", *([page.line()] if page.command else []), sep="\n    ")
    return 0


def _ui(options: argparse.Namespace) -> None:
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
        (CHECKED[stage.family], stage.item)
        for stage in graph.stages
        if stage.name in due and stage.item and stage.family in CHECKED
    ]
    if chosen:
        from neft_core.fit import check

        check(ws, chosen, before=True)


def _plan(options: argparse.Namespace) -> None:
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


def _stage(options: argparse.Namespace) -> int:
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
    if options.name in CHECKED and options.item and not ranks.launched():
        from neft_core.fit import check

        check(ws, [(CHECKED[options.name], options.item)])
    if not ranks.main() or launching.FAULTS in os.environ:
        held: AbstractContextManager[None] = nullcontext()  # another process holds it
    else:
        held = hold(ws.state("locks", name), f"stage {name}")
    with held:
        if options.name in launching.STAGES and launching.wanted(params.compute):
            try:
                launching.launch(ws, params.compute, stage)
            except launching.LaunchFailed as fault:
                return _say(str(fault), 1)
            return 0
        with launching.taking_part(options.name):
            STAGES[options.name](ws, *stage[1:])
    return 0


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
}
"""Section of params that a stage's items come from; the other stages take none."""


CHECKED = {"warmup": "warmup", "warmups": "warmup", "train": "train"}
"""Stages that are refused where their memory or disk isn't there, and as what they are forecast."""

ARTEFACTS = {
    "summary": "the table above (summary.md, summary.csv) and the curves",
    "train": "adapters, metrics and loss curves of each run and seed",
    "masks": "the selected neurons of each run",
    "evaluation": "hypotheses beside their references",
}
"""What a user looks for after a run, by folder of `work/`."""


def _init(options: argparse.Namespace) -> None:
    from neft_core.workspace import init_from

    ws = init_from(options.dir, options.template, options.cache)
    print(f"workspace {ws.root} is ready; next: cd {options.dir} && neft run")


def _track(_options: argparse.Namespace) -> None:
    from neft_core.graph import Graph
    from neft_core.tracking import sync
    from neft_core.workspace import find_workspace, hold

    ws = find_workspace()
    with hold(ws.state("lock"), str(ws.root)):
        done = sync(ws, Graph(ws))
    print(f"MLflow at {done.uri}: {done.created} runs new, {done.updated} brought up to date")


def _generate(options: argparse.Namespace) -> None:
    from neft_core.samples import show
    from neft_core.workspace import find_workspace

    show(find_workspace(), options.run, options.seed, options.prompt, options.count)


def _export(options: argparse.Namespace) -> None:
    from neft_core.exporting import export
    from neft_core.workspace import find_workspace

    ws = find_workspace()
    export(ws, options.run, options.seed, options.to, options.dtype, options.adapter)


if __name__ == "__main__":
    sys.exit(main())
