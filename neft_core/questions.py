"""The command line of `neft analyse`."""

import argparse
from pathlib import Path

from neft_core.errors import NeftError


def add(parser: argparse.ArgumentParser) -> None:
    """Give `neft analyse` its questions."""
    questions = parser.add_subparsers(required=True, metavar="QUESTION")

    def question(name: str, what: str) -> argparse.ArgumentParser:
        found = questions.add_parser(name, help=what, description=what)
        found.add_argument("--json", type=Path, metavar="FILE", help="all figures as JSON too")
        found.set_defaults(command=ask, question=name)
        return found

    overlap = question("overlap", "what masks have in common, beside what chance would give")
    overlap.add_argument("names", nargs="+", metavar="NAME", help="runs, or files of masks")
    overlap.add_argument(
        "--percent",
        type=float,
        nargs="+",
        default=[],
        help="names are scores: compare what these budgets would select from each",
    )
    places = question("sensitivity", "scores by layer and role, and what a mask selects of each")
    places.add_argument("name", metavar="SCORES", help="a task or warm-up, or a file of scores")
    places.add_argument("--run", metavar="NAME", help="a run that selects from them, or a mask")
    use = question("utilisation", "rank changes and neuron types of runs against the first")
    use.add_argument("names", nargs="+", metavar="NAME", help="runs, base, or tuned")
    use.add_argument("--task", metavar="NAME", help="whose dev rows are read")
    use.add_argument("--rows", type=int, default=200, dest="count", metavar="N")
    use.add_argument("--seed", type=int, help="of the runs (default: the first of each)")
    use.add_argument("--per-example", action="store_true", help="the best layer of each row")
    loss = question("forgetting", "loss on text of the pre-training kind, before and after")
    loss.add_argument("names", nargs="+", metavar="RUN")
    help = "one text a line, or JSON lines with `text`"
    loss.add_argument("--text", type=Path, metavar="FILE", help=help)
    loss.add_argument("--rows", type=int, default=1000, dest="count", metavar="N")


def ask(options: argparse.Namespace) -> None:
    """Answer a question with tables, and as JSON where asked for."""
    from neft_core import analyses
    from neft_core.files import write_json
    from neft_core.workspace import find_workspace

    if getattr(options, "count", 1) < 1:
        raise NeftError(f"--rows {options.count}: at least 1")
    ws = find_workspace()
    if options.question == "overlap":
        found, text = analyses.overlap(ws, options.names, options.percent)
    elif options.question == "sensitivity":
        found, text = analyses.sensitivity(ws, options.name, options.run)
    elif options.question == "forgetting":
        found, text = analyses.forgetting(ws, options.names, text=options.text, count=options.count)
    else:
        found, text = analyses.utilisation(
            ws,
            options.names,
            task=options.task,
            count=options.count,
            seed=options.seed,
            per_example=options.per_example,
        )
    if options.json is not None:
        write_json(options.json, found)
    print(text)
