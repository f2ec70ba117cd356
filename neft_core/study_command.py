"""`neft study`: the studies that there are, and running one or all of them."""

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neft_core.errors import NeftError, say

if TYPE_CHECKING:
    from neft_core.overrides import Preview
    from neft_core.study_files import Expansion, StudyPath
    from neft_core.workspace import Workspace

ALL = "all"
"""In place of a name: every study that stands in no folder of its own."""


def add(parser: argparse.ArgumentParser) -> None:
    """Give `neft study` its options."""
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="a study of the list, the path of a study file, or `all`; without it, the list",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as if the file said so, such as training.epochs=2 (repeatable; for this call alone)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the study, tell what would run"
    )
    parser.set_defaults(command=study)


def study(options: argparse.Namespace) -> int:
    """Run a study, or all; without a name tell which there are."""
    from neft_core import study_files
    from neft_core.workspace import find_workspace

    host = find_workspace().host
    if options.name is None:
        print(_list(study_files.listed(host.root)))
        return 0
    names = [options.name]
    if options.name == ALL:
        names = [name for name in study_files.listed(host.root) if "/" not in name]
    # All are checked before the first one runs.
    found = [study_files.find(name, host.root) for name in names]
    previews = [preview(host, place, options.set) for place in found]
    if options.dry_run:
        for place, (checked, expansion) in zip(found, previews, strict=True):
            print(_dry(place, checked, expansion.changes))
        return 0
    codes = {}
    for number, (place, both) in enumerate(zip(found, previews, strict=True), 1):
        if len(found) > 1:
            print(f"study {number} of {len(found)}: {place.name}", flush=True)
        codes[place.name] = _run(host, place, *both)
    if len(found) > 1:
        failed = [name for name, code in codes.items() if code]
        print(f"{len(found)} studies; with failures: {', '.join(failed) or 'none'}")
    return max(codes.values(), key=lambda code: (code == 1, code))


def _list(titles: dict[str, str]) -> str:
    wide = max(map(len, titles), default=0)
    lines = [f"  {name.ljust(wide)}  {title}" for name, title in titles.items()]
    return "\n".join(["studies (neft study NAME runs one):", *lines])


def preview(
    host: "Workspace", place: "StudyPath", settings: Sequence[str]
) -> "tuple[Preview, Expansion]":
    """The checked params of a study, and what its file stands for."""
    from neft_core import overrides, study_files
    from neft_core.config import yaml_text
    from neft_core.workspace import Workspace

    expansion = study_files.expand(place.file, host.root, settings)
    params, data = overrides.checked(yaml_text(expansion.data), place.file.name)
    folder = overrides.place(host, _folder(place), place.file)
    ws = Workspace(folder) if (folder / "dvc.yaml").is_file() else None
    return overrides.Preview(params, data, ws, changed=True), expansion


def _folder(place: "StudyPath") -> str:
    return place.name.replace("/", "-")


def _dry(place: "StudyPath", checked: "Preview", changes: Sequence[str]) -> str:
    from neft_core.preview import describe

    params = checked.params
    assert params.study is not None
    trainings = sum(len(run.seeds) for run in params.runs.values())
    shown = ", ".join(part.title or part.show for part in params.study.parts)
    lines = [
        f"study {place.name}: {params.study.title}",
        f"{len(params.runs)} runs, {trainings} trainings with all seeds; shows {shown}",
    ]
    return "\n".join([*lines, *changes, describe(checked)])


def ready(
    host: "Workspace", place: "StudyPath", checked: "Preview", expansion: "Expansion"
) -> "Workspace":
    """A study's own workspace below its host, with its params.

    Args:
        host: whose DVC cache and MLflow store it shares.
        place: the study.
        checked: its params, as `preview` gave them.
        expansion: what its file stands for, from there too.
    """
    from neft_core import overrides, study_files
    from neft_core.config import yaml_text

    for change in expansion.changes:
        print(f"{place.file.name}: {change}")
    ws = overrides.private(host, _folder(place), place.file, yaml_text(checked.data))
    study_files.share_base(ws, expansion.unused)
    return ws


def _run(host: "Workspace", place: "StudyPath", checked: "Preview", expansion: "Expansion") -> int:
    """Run one study and show what came of it; its exit status."""
    from flows.pipeline import run_pipeline
    from neft_core.graph import Graph
    from neft_core.repro import StageFailed

    code, told = 0, ""
    try:
        ws = ready(host, place, checked, expansion)
    except NeftError as fault:  # another of `all` may do
        return say(str(fault), 2)
    try:
        run_pipeline(ws, study=True)
    except (NeftError, StageFailed) as fault:
        code, told = (2 if isinstance(fault, NeftError) else 1), str(fault)
    if not Graph(ws).changes("report"):
        _show(ws)
    return say(told, code) if code else 0


def _show(ws: "Workspace") -> None:
    """The tables, and where everything lies."""
    from neft_core import run_links
    from neft_core.pages import near, pages
    from neft_core.study_tables import RUNS_PAGE, readable

    reports = _shortcut(ws)
    run_links.write(ws)
    print("\n" + readable((reports / "study" / "study.md").read_text(encoding="utf-8")))
    for name, what in {
        "study": "these tables (study.md), and each as CSV",
        "report.html": "all of it on one page, with figures",
        RUNS_PAGE: "from the tables' cells to their MLflow runs",
    }.items():
        print(f"  {near(reports / name)}: {what}")
    page = pages(ws)[0]
    print(f"  {page.name}: {page.url}", *([page.line()] if page.command else []), sep="\n    ")


def _shortcut(ws: "Workspace") -> Path:
    """The reports of a private workspace under a name of their own among its host's."""
    from neft_core.config import read_yaml
    from neft_core.study_tables import RUNS_PAGE
    from neft_core.workspace import PIPELINE, REPORTS

    real, link = ws.root / REPORTS, ws.host.root / REPORTS / ws.root.name
    own = {*(Path(out).name for out in read_yaml(PIPELINE)["stages"]["report"]["outs"]), RUNS_PAGE}
    if link.name in own:  # what the host's report has there, or will have
        return real
    with contextlib.suppress(OSError):  # a file in its way, a disk that is full
        if not link.exists():
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(real, link.parent))
    return link if link.resolve() == real.resolve() else real
