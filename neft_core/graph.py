"""The pipeline's graph as DVC sees it: order, freshness, keys.

The only module that imports DVC.
"""

import contextlib
import json
import logging
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neft_core.config import read_yaml
from neft_core.errors import NeftError
from neft_core.files import once
from neft_core.lockfile import damaged, digest, entry_key, locked
from neft_core.workspace import Workspace, follow_git


@dataclass(frozen=True)
class Stage:
    """One node of the graph: `train@neft` is item `neft` of family `train`.

    Attributes:
        name: of dvc.yaml.
        family: what stands before the `@`.
        item: what stands behind it.
        upstream: stages whose failure is its own.
        after: stages that must have ended, well or not, before it can be made.
    """

    name: str
    family: str
    item: str | None
    upstream: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class Changes:
    """What differs from the stage's last success, each as `path: how`; nothing: up to date."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """Inputs that are not there and that no stage makes."""

    def __bool__(self) -> bool:
        return bool(self.inputs or self.outputs)


PATIENCE = 20
"""How often to ask for DVC's lock, 3 seconds each time, while our own stages need it too."""


class Graph:
    """The stages of a workspace, and what DVC knows of each; for one thread at a time.

    Attributes:
        stages: in an order in which they can be made.
        notes: what was found broken in DVC's own files, and mended.
        shared: several stages are made at once, so one process of DVC waits for another's lock.
        busy: stages that are being made: nobody looks at their files.

    Args:
        workspace: whose dvc.yaml it is.
        shared: see above.
    """

    def __init__(self, workspace: Workspace, shared: bool = False) -> None:
        self.workspace = workspace
        self.shared = shared
        self.busy: set[str] = set()
        self._alone = threading.RLock()
        self._held = False
        self.notes: list[str] = []
        if (workspace.root / ".dvc").is_dir() and follow_git(workspace.root):
            self.notes.append(f"{workspace.root}: a git repository now; DVC uses it from here on")
        self._open()
        with self.reading():
            self.notes += _mend(workspace.root)
        self.refresh()
        with _translated(workspace.root):
            edges = self._repo.index.graph
        above = {
            name: {up.name for up in edges.successors(stage)}
            for name, stage in self._stages.items()
        }
        self._after = {name: set(names) for name, names in above.items()}
        params = None
        stages: list[Stage] = []
        while above:
            name = next(name for name, names in above.items() if names.isdisjoint(above))
            family, _, item = name.partition("@")
            after = upstream = above.pop(name)
            if family == "select" and item:
                # Of all scores that `assign` has seen, those that the run selects from.
                params = params or workspace.params()
                upstream = {params.scorer(name) for name in params.scored(item)}
            both = tuple(sorted(upstream)), tuple(sorted(after))
            stages.append(Stage(name, family, item or None, *both))
        self.stages = tuple(stages)

    def _open(self) -> None:
        from dvc.repo import Repo

        # Bars that flash up for a moment, between the lines of a run.
        logging.getLogger("dvc.progress").setLevel(logging.CRITICAL)
        _parse_once()
        root = self.workspace.root
        if not (root / ".dvc").is_dir():
            raise NeftError(f"{root}: no DVC repository; run 'neft init {root}'")
        with _translated(root):
            self._repo = Repo(str(root))

    def refresh(self) -> None:
        """Read dvc.yaml, dvc.lock and params.yaml again, after another process changed them."""
        with self._alone:
            self._open()
            with self.reading():
                yaml = self.workspace.root / "dvc.yaml"
                found = [s for s in self._repo.index.stages if Path(s.path) == yaml]
            self._stages: dict[str, Any] = {stage.name: stage for stage in found}
            self._made = {out.fs_path for stage in found for out in stage.outs}

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """DVC's files and the workspace's, while no other thread or process of DVC changes them."""
        with self._alone:
            if self._held:
                yield
                return
            with _translated(self.workspace.root), self._lock():
                self._held = True
                try:
                    yield
                finally:
                    self._held = False

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """DVC's lock, for which it waits 3 seconds; more often where we compete for it."""
        from dvc.lock import LockError

        for left in reversed(range(PATIENCE if self.shared or self.busy else 1)):
            try:
                self._repo.lock.lock()
                break
            except LockError:
                if not left:
                    raise
        try:
            yield
        finally:
            self._repo.lock.unlock()

    def changes(self, name: str) -> Changes:
        """What differs from the stage's last success, by content."""
        with self.reading():
            being_made = sorted(self._after[name] & self.busy)
            if being_made:
                return Changes(inputs=(f"{being_made[0]}: being made",))
            stage, known = self._stages[name], name in locked(self.workspace)
            inputs = [line for dep in stage.deps for line in _differences(dep)]
            outputs = [line for out in stage.outs for line in _differences(out)]
            missing = [d.def_path for d in stage.deps if not d.exists and not self._makes(d)]
            if stage.changed_stage() and known:
                inputs.append("dvc.yaml: modified")
        if not known:
            inputs = ["made for the first time"]
            outputs = []
        return Changes(tuple(inputs), tuple(outputs), tuple(missing))

    def fill_in(self, name: str) -> None:
        """Make empty folders where a stage that goes by what is there finds none at all."""
        for dep in self._stages[name].deps:
            if not dep.exists and self._makes(dep) and not Path(dep.fs_path).suffix:
                os.makedirs(dep.fs_path, exist_ok=True)

    def intact(self, name: str) -> bool:
        """Whether the stage's outputs are those of its entry in dvc.lock."""
        with self.reading():
            outs = self._stages[name].outs
            return name not in self.busy and all(
                out.hash_info and not out.workspace_status() for out in outs
            )

    def entry(self, name: str) -> dict[str, Any]:
        """What determines a stage's outputs: its command, hashes of its inputs, and params.

        Computed from the files of the workspace, so known once the upstream stages are made.
        """
        from dvc.dependency import ParamsDependency

        deps, params = {}, {}
        with self.reading():
            stage = self._stages[name]
            for dep in stage.deps:
                if isinstance(dep, ParamsDependency):
                    params.update(dep.get_hash().value)
                else:
                    deps[dep.def_path] = dep.get_hash().value
        return {"cmd": stage.cmd, "deps": deps, "params": params}

    def key(self, name: str) -> str:
        """The key of a stage, before it is made (see `entry_key`)."""
        return entry_key(self.entry(name))

    def origin(self) -> str:
        """The key of the whole graph: every command, every param, every input from outside.

        Equal for two executions that end in the same files; known before the first stage starts.
        """
        from dvc.dependency import ParamsDependency

        parts = {}
        with self.reading():
            for name, stage in self._stages.items():
                values = [
                    [dep.def_path, dep.get_hash().value]
                    for dep in stage.deps
                    if isinstance(dep, ParamsDependency) or (dep.exists and not self._makes(dep))
                ]
                parts[name] = [stage.cmd, values]
        return digest(parts)

    def _makes(self, dep: Any) -> bool:
        """Whether a stage writes the input, or something below it."""
        return any(
            path == dep.fs_path or path.startswith(dep.fs_path + os.sep) for path in self._made
        )

    def drop_damaged(self, name: str) -> list[str]:
        """Delete outputs whose objects in the DVC cache are damaged, and those objects.

        DVC trusts a read-only object unread, and then trusts the copy that it made of it.

        Returns:
            The paths of such outputs.
        """
        dropped = []
        for out in self._stages[name].outs:
            if not (out.use_cache and out.hash_info):
                continue
            bad = damaged(out.hash_info.value, out.cache.oid_to_path)
            for path in bad:
                path.unlink(missing_ok=True)  # another stage's too
            if bad:
                with contextlib.suppress(FileNotFoundError):
                    place = Path(out.fs_path)
                    shutil.rmtree(place) if place.is_dir() else place.unlink()
                dropped.append(out.def_path)
        return dropped


@contextlib.contextmanager
def _translated(root: Path) -> Iterator[None]:
    """DVC's complaints about the user's files and locks as ours."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError

    try:
        yield
    except LockError:
        raise NeftError(
            f"{root}: another DVC process is at work on it; wait for it, or stop it first"
        ) from None
    except DvcException as fault:
        text = " ".join(str(fault).split())
        raise NeftError(f"{root / 'dvc.yaml'}: {text}; mend dvc.yaml or params.yaml") from fault
    except sqlite3.OperationalError as fault:
        # DVC keeps what it knows of files in SQLite.
        if "full" not in str(fault):
            raise
        raise NeftError(f"{root}: no space left for DVC; free some and run again") from fault


def _mend(root: Path) -> list[str]:
    """Set aside files of DVC that a kill left half-written; DVC makes them anew.

    Called with DVC's lock, under which dvc.lock is written in place. Without dvc.lock each stage is
    found again in DVC's run cache.
    """
    notes = []
    lock, busy = root / "dvc.lock", root / ".dvc" / "tmp" / "rwlock"
    from dvc.lock import make_lock
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    whole = True
    try:
        if lock.exists():
            COMPILED_LOCKFILE_SCHEMA(read_yaml(lock))
            # Cut off in a hash it would still be good YAML.
            whole = lock.read_bytes().endswith(b"\n")
    except (NeftError, Invalid):
        whole = False
    if not whole:
        aside = lock.with_name("dvc.lock.damaged")
        lock.replace(aside)
        notes.append(f"{lock}: damaged; kept as {aside.name}, stages come from the DVC cache")
    # DVC has a lock of its own for this list of who is at work.
    with make_lock(f"{busy}.lock", tmp_dir=str(busy.parent)):
        try:
            json.loads(busy.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except ValueError:
            busy.unlink()
            notes.append(f"{busy}: damaged; deleted")
    # DVC takes params from it, and would blame params.yaml.
    assigned = root / "work" / "assigned.json"
    try:
        if assigned.exists() and not isinstance(json.loads(assigned.read_bytes()), dict):
            raise ValueError
    except ValueError:
        assigned.unlink()
        notes.append(f"{assigned}: damaged; deleted")
    return notes


def _differences(item: Any) -> Iterator[str]:
    """`path: how` for each difference of one dependency or output."""
    # Of an output that is gone from the cache too, the loss that the user sees comes first.
    for how in (item.workspace_status() or item.status()).values():
        if isinstance(how, dict):
            yield from (f"{item.def_path}: {key}: {word}" for key, word in how.items())
        else:
            # In a fresh clone nobody deleted it.
            yield f"{item.def_path}: {'missing' if how == 'deleted' else how}"


def _parse_once() -> None:
    """Let DVC parse a params file once for all stages, in place of once for each of their looks."""
    from dvc.utils.serialize import LOADERS, load_yaml

    parse = once(load_yaml)

    def load(path: str, fs: Any, **options: Any) -> Any:
        plain = fs.protocol == "local" and not options
        return parse(path) if plain else load_yaml(path, fs=fs, **options)

    LOADERS.setdefault(".yaml", load)
