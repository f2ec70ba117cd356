"""The command line: `neft run | study | plan | stage | init | track | ui | up | promote ...`."""

import argparse
import contextlib
import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from neft_core import __version__, commands, operations, questions, study_command
from neft_core.errors import NeftError, say

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
        return say(str(fault), 2)
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as fault:
        where = fault.filename or Path.cwd()
        if fault.errno == errno.ENOSPC:
            return say(f"{where}: no space left on the disk; free some and run again", 2)
        if fault.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return say(f"{where}: {fault.strerror}; choose what you can read and write", 2)
        if fault.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR):
            return say(f"{where}: {fault.strerror}; give another path", 2)
        traceback.print_exc()
        return 1
    except KeyboardInterrupt:
        return say("interrupted; run the same command again to go on", 130)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neft",
        description="Neuron-level fine-tuning of language models: find the neurons that a task "
        "moves, train only those, and compare with full fine-tuning and LoRA.",
    )
    parser.add_argument("--version", action="version", version=f"neft {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, what: str, more: str = "") -> argparse.ArgumentParser:
        said = f"{what[0].upper()}{what[1:]}. {more}".rstrip()
        return subparsers.add_parser(name, help=what, description=said)

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
    run.set_defaults(command=commands.run)

    study_command.add(
        command(
            "study",
            "run an experiment of the paper's kind, and show its tables and figures",
            "A study is a params file that says what is compared. It runs in a workspace of its "
            "own below .neft/workspaces, which shares what other studies made. Interrupted, it "
            "goes on from there. A run that fails is shown as failed, and tried again next time.",
        )
    )

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
    plan.set_defaults(command=commands.plan)

    stage = command(
        "stage",
        "run one stage here and now (what dvc.yaml calls)",
        "Its inputs must be there; nothing is looked up in DVC's cache and nothing is tracked.",
    )
    stage.add_argument("name", metavar="NAME", help="a stage of dvc.yaml, such as train")
    stage.add_argument("item", metavar="ITEM", nargs="?", help="its task or run, where it has any")
    stage.set_defaults(command=commands.stage)

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
    init.set_defaults(command=commands.init)

    track = command("track", "bring MLflow up to date with the runs here")
    track.set_defaults(command=commands.track)

    ui = command("ui", "serve the pages of MLflow and Prefect for the runs here, until Ctrl-C")
    for name, port in (("MLflow", 5000), ("Prefect", 4200)):
        ui.add_argument(
            f"--{name.lower()}-port",
            type=int,
            default=port,
            metavar="PORT",
            help=f"of {name}'s page (default: {port})",
        )
    ui.set_defaults(command=commands.ui)

    operations.add(command)

    questions.add(command("analyse", "ask masks, scores and trained runs"))

    generate = command("generate", "base and fine-tuned model side by side")
    generate.add_argument("--run", required=True, metavar="NAME", help="a run of params.yaml")
    generate.add_argument("--seed", type=int, help="which seed of it (default: its first)")
    generate.add_argument(
        "--prompt",
        metavar="TEXT",
        help="source text (of nli a line with the premise, one with the hypothesis); default: test "
        "sentences",
    )
    generate.add_argument(
        "--count", type=int, default=5, help="how many test sentences (default: 5)"
    )
    generate.set_defaults(command=commands.generate)

    export = command(
        "export", "a trained run as a plain checkpoint", "Tells what its precision loses."
    )
    export.add_argument("run", metavar="RUN", help="a run of params.yaml")
    export.add_argument("--seed", type=int, help="which seed of it (default: its first)")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new directory")
    export.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: the base's")
    export.add_argument("--adapter", action="store_true", help="the adapter alone, for peft")
    export.set_defaults(command=commands.export)
    return parser


if __name__ == "__main__":
    sys.exit(main())
