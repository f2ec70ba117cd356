"""A workspace: a directory with dvc.yaml and params.yaml, and where its stages' files lie."""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from neft_core import links
from neft_core.config import NO_FILE, Params, load_params
from neft_core.errors import NeftError
from neft_core.plots import PAGE, init_plots

PACKAGE = Path(__file__).parent
PIPELINE = PACKAGE / "pipeline.yaml"
"""The pipeline definition; every workspace's dvc.yaml is this file."""

TEMPORARY = ".*.[0-9]*"
"""Names under which `files.replacing` writes; a killed process may leave them beside outputs."""

REPORTS = "reports"
"""Where the report and its figures lie, from the workspace."""

IGNORED = "/work\n/reports/\n/.neft/\n/mlflow.db*\n/dvc.lock.damaged\n/mlruns/\n/dvc_plots/\n"


@dataclass(frozen=True)
class Workspace:
    """Paths of a workspace; stages hand each other these files and nothing else."""

    root: Path

    @property
    def params_file(self) -> Path:
        """params.yaml."""
        return self.root / Params.FILE

    def params(self) -> Params:
        """The checked params."""
        return load_params(self.params_file)

    @property
    def host(self) -> "Workspace":
        """The workspace below whose `.neft` this one lies; else this one."""
        state = self.root.parent.parent
        own = state.name == ".neft" and self.root.parent.name == "workspaces"
        return Workspace(state.parent) if own else self

    def path(self, *parts: str) -> Path:
        """A stage's file: `work/` and the parts, as dvc.yaml names it."""
        return self.root.joinpath("work", *parts)

    def state(self, *parts: str) -> Path:
        """Files that are nobody's output: checkpoints to resume from, live metrics, locks."""
        return self.root.joinpath(".neft", *parts)

    def input(self, path: str) -> Path:
        """A user's path: relative to the workspace, or absolute.

        `~` stands for a home; where there is none it stays, to be told as what isn't there.
        """
        return self.root / os.path.expanduser(path)


def find_workspace(start: Path | None = None) -> Workspace:
    """The workspace that holds a directory (default: the current one).

    Raises:
        NeftError: no parent directory has both dvc.yaml and params.yaml.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and (folder / Params.FILE).is_file():
            return Workspace(folder)
    raise NeftError(
        f"{here}: no workspace here (dvc.yaml and params.yaml); run 'neft init DIR' to make one"
    )


@contextlib.contextmanager
def hold(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock file while the block runs; it is free again however the process ends.

    Raises:
        NeftError: another process holds it; the message names that process.
    """
    with _opened(lock) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            raise NeftError(
                f"{what}: process {owner} is at work on it; wait for it, or stop it first"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _opened(lock: Path) -> TextIO:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock.open("a+")
    except OSError as fault:
        raise NeftError(f"{lock}: {fault.strerror}; use a workspace that you can write") from None


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Wait for a lock file, and hold it while the block runs."""
    with _opened(lock) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cache_of(workspace: Workspace) -> Path:
    """The directory of a workspace's DVC cache, which may be shared with others."""
    from dvc.config import Config

    own = workspace.root / ".dvc"
    told = Config(str(own))["cache"].get("dir")
    return Path(told) if told else own / "cache"


def init_workspace(
    folder: Path, params: str, *, cache: Path | None = None, pipeline: Path = PIPELINE
) -> Workspace:
    """Make a directory a workspace, as a DVC repository of its own.

    What is there already is kept: dvc.yaml is written anew, params.yaml only where there is none.

    Args:
        folder: the directory; made where missing.
        params: text of its params.yaml.
        cache: a DVC cache directory to share.
        pipeline: what its dvc.yaml is a copy of.

    Raises:
        NeftError: directory or cache can't be written, or dvc fails.
    """
    try:
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise NeftError(
            f"{cache}: can't hold a cache ({fault.strerror}); give a directory you can write"
        ) from None
    try:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / NO_FILE).touch()
        shutil.copyfile(pipeline, folder / "dvc.yaml")
        if not (folder / Params.FILE).exists():
            (folder / Params.FILE).write_text(params, encoding="utf-8")
        ignore = folder / ".gitignore"
        if not ignore.exists():
            ignore.write_text(IGNORED, encoding="utf-8")
    except OSError as fault:
        raise NeftError(f"{folder}: {fault.strerror}; choose a directory you can write") from None
    init_dvc(folder, cache=cache)
    return Workspace(folder.resolve())


def init_from(folder: Path, template: Path | None, cache: Path | None) -> Workspace:
    """Make a workspace of a template: a folder with params.yaml and what else it comes with.

    Args:
        folder: the directory; made where missing.
        template: a folder, or the name of one that comes with the package; None: the default.
        cache: a DVC cache directory to share.

    Raises:
        NeftError: there is no such template, or the directory can't be written.
    """
    if template is None:
        return init_workspace(folder, (PACKAGE / Params.FILE).read_text("utf-8"), cache=cache)
    packaged = PACKAGE / "templates"
    source = next(
        (p for p in (template, packaged / template.name) if (p / Params.FILE).is_file()), None
    )
    if source is None:
        known = ", ".join(sorted(p.parent.name for p in packaged.glob(f"*/{Params.FILE}")))
        raise NeftError(f"{template}: no template (a folder with params.yaml); there are {known}")
    ws = init_workspace(folder, (source / Params.FILE).read_text("utf-8"), cache=cache)
    for file in source.iterdir():
        if file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    return ws


def _lines(file: Path, *wanted: str) -> None:
    """Add to a text file the lines that it lacks."""
    have = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    new = [line for line in wanted if line not in have]
    if new:
        file.write_text("\n".join([*have, *new, ""]), encoding="utf-8")


def init_dvc(folder: Path, *, cache: Path | None = None) -> None:
    """Make a directory a DVC repository without telemetry, unless it is one, and ready for plots.

    Raises:
        NeftError: dvc fails (its last line is shown), or the directory can't be written.
    """
    from dvc.config import Config
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    own = folder / ".dvc"
    # In the middle of somebody's git repository `subdir` would tie the two together.
    git = (folder / ".git").exists()
    logging.getLogger("dvc").setLevel(logging.WARNING)  # it says what we say ourselves
    stored: dict[str, object] = {"dir": str(cache.resolve())} if cache else {}
    try:
        if not own.is_dir():
            Repo.init(str(folder), no_scm=not git).close()
        _lines(own / ".gitignore", "/config.local", "/tmp", "/cache")
        _lines(folder / ".dvcignore", TEMPORARY)
        if not links.settings(own).get("type"):
            if host := cache and links.settings(cache.parent).get("type"):
                stored["type"] = ",".join(host)
            elif not links.copies_share_blocks(own):  # or every checkpoint would be there twice
                stored["type"] = links.HARD
        with Config(str(own.resolve())).edit("local") as settings:
            settings["core"] = {"analytics": False, "check_update": False, "no_scm": not git}
            settings["plots"] = {"html_template": PAGE}
            if stored:
                settings["cache"] = {**settings.get("cache", {}), **stored}
    except (DvcException, OSError) as fault:
        raise NeftError(f"{folder}: DVC can't be set up here ({fault}); check the path") from None
    init_plots(own)


def follow_git(folder: Path) -> bool:
    """Let DVC know of a git repository that was made after the workspace; whether there is one.

    Raises:
        NeftError: DVC's configuration can't be written.
    """
    from dvc.config import Config

    own = folder / ".dvc"
    if not (folder / ".git").exists() or not Config(str(own))["core"].get("no_scm"):
        return False
    init_dvc(folder)
    return True
