"""Study files: where they lie, and what params they stand for.

A study is one params file with a section `study`, written shorter: it may extend another file, and
a grid of methods and tasks stands for runs. `expand` gives the params.
"""

import difflib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import PydanticCustomError

from neft_core.config import StudyFile, check_section, read_yaml, yaml_text
from neft_core.config.section import known
from neft_core.config.shown import rate_part
from neft_core.errors import NeftError
from neft_core.files import replacing
from neft_core.workspace import PACKAGE, Workspace

PACKAGED = PACKAGE / "studies"
"""The studies that come with the package."""

FOLDER = "studies"
"""Where a workspace has its own."""

FILES = (".yaml", ".yml")
"""How a path ends, and no name."""

CATALOGUE = ("tasks", "warmups", "scores", "activations")
"""Sections of which a file that is extended may hold more than a study uses."""

VARIANTS = ("kind", "name", "criterion")
"""Keys that say which of several forms a mapping has."""


@dataclass(frozen=True)
class StudyPath:
    """Where a study stands.

    Attributes:
        name: as a user calls it, such as `table2` or `paper/table2`.
        file: its file.
    """

    name: str
    file: Path


class Expansion(NamedTuple):
    """What a study file stands for.

    Attributes:
        data: the content of params.yaml, unchecked but for the study's own keys.
        changes: what settings changed, a line each.
        unused: tasks of files that it extends that it doesn't use.
    """

    data: dict[str, Any]
    changes: list[str]
    unused: list[str]


def find(name: str, root: Path) -> StudyPath:
    """A study by its name, or by the path of its file.

    Args:
        name: what the user gave.
        root: the workspace, whose own studies come before those of the package.

    Raises:
        NeftError: there is none; the nearest name is told.
    """
    if name.endswith(FILES):
        if not Path(name).is_file():
            raise NeftError(
                f"study {name}: not found; give a study file, or a name of `neft study`"
            )
        return StudyPath(Path(name).stem, Path(name))
    for folder in _folders(root):
        if (folder / f"{name}.yaml").is_file():
            return StudyPath(name, folder / f"{name}.yaml")
    names = list(listed(root))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}"
    raise NeftError(f"study '{name}': unknown; {hint}")


def listed(root: Path) -> dict[str, str]:
    """Names of all studies with their titles; files without one are there to be extended.

    In place of a title a file that can't be read has the reason.
    """
    found: dict[str, str] = {}
    for folder in _folders(root):
        for path in sorted(folder.rglob("*.yaml"), key=lambda p: (len(p.parts), p)):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if not path.is_file():
                continue
            try:
                section = read_yaml(path).get("study")
            except NeftError as fault:
                section = {"title": f"can't be read: {fault}"}
            if name not in found and isinstance(section, Mapping) and "title" in section:
                found[name] = str(section["title"])
    return found


def _named_file(name: str, file: Path, root: Path) -> Path:
    """The file of another study, by its name; of the same name, that of the package."""
    found = find(name, root).file
    same = found.resolve() == file.resolve()
    return PACKAGED / f"{name}.yaml" if same else found


def _folders(root: Path) -> Iterable[Path]:
    own = root / FOLDER
    return [own, PACKAGED] if own.is_dir() and own.resolve() != PACKAGED.resolve() else [PACKAGED]


def expand(file: Path, root: Path, settings: Sequence[str] = ()) -> Expansion:
    """The params that a study file stands for.

    Args:
        file: the study file. What it extends is another, by path or by name. Paths in it are
            relative to it; in one that comes with the package, to the workspace.
        root: the workspace.
        settings: `KEY=VALUE` each, of the file with what it extends, else of the params. Paths in
            them are relative to the workspace.

    Raises:
        NeftError: a fault in the file, in one that it extends, or in a setting.
    """
    from neft_core.overrides import assign

    data, own = _read(file, root)
    later, changes = [], []
    for setting in settings:
        try:
            changes.append(assign(data, setting, root))
        except NeftError:
            if setting.partition("=")[0].partition(".")[0] in StudyFile.model_fields:
                raise
            later.append(setting)
    said = {key: data.pop(key) for key in StudyFile.model_fields if key in data}
    head = check_section(StudyFile, said, file.name)
    if data.get("study") is None:
        raise NeftError(f"{file.name}: study: missing; it is required of a study")
    measured = ["forgetting"] if any(cell.forgetting for cell in head.grid) else []
    for section in ("runs", "transfers", *measured):
        if not isinstance(data.setdefault(section, {}), dict):
            raise NeftError(f"{file.name}: {section}: got no mapping; give {section} by name")
    _fill_grid(data, head, said.get("methods", {}), file.name)
    offered = _mapping(data, "tasks")
    _leave_out_unused(data, own)
    unused = [name for name in offered if name not in data["tasks"]]
    changes += [assign(data, setting, root) for setting in later]
    return Expansion(data, [line for line in changes if line], unused)


def _read(
    file: Path, root: Path, before: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file with what it extends, key by key; and the file alone."""
    from neft_core.overrides import absolute

    data = read_yaml(file)
    packaged = file.resolve().is_relative_to(PACKAGED.resolve())
    absolute(data, root if packaged else file.resolve().parent)
    base = data.pop("extends", None)
    if base is None:
        return data, data
    if not isinstance(base, str) or "\0" in base:
        raise NeftError(f"{file.name}: extends: got {base!r}; the path of one file is needed")
    named = not base.endswith(FILES)
    path = _named_file(base, file, root) if named else file.parent / os.path.expanduser(base)
    chain = (*before, file.resolve())
    if path.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain, path))
        raise NeftError(f"{file.name}: extends: a loop, {names}; let one of them extend no other")
    if not path.is_file():
        raise NeftError(f"{file.name}: extends: got '{base}', which is not there; name a file")
    return _merged(_read(path, root, chain)[0], data), data


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings, key by key; where both have a value, the second's."""
    if any(key in over and base.get(key, over[key]) != over[key] for key in VARIANTS):
        return dict(over)
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        result[key] = _merged(base[key], value) if both else value
    return result


def _fill_grid(
    data: dict[str, Any], head: StudyFile, methods: Mapping[str, Any], where: str
) -> None:
    """Write the grid's runs, where else they are tested, and what they forgot is measured on."""
    runs, transfers, tasks = data["runs"], data["transfers"], _mapping(data, "tasks")
    made: dict[str, str] = dict.fromkeys(runs, "runs")
    for place, cell in enumerate(head.grid):
        rates: Sequence[float | None] = cell.lr or [None]
        for key, names, all_names in (
            ("tasks", cell.tasks, tasks),
            ("tested", cell.tested, tasks),
            ("methods", cell.methods, methods),
        ):
            for name in names:
                _known(f"{where}: grid.{place}.{key}", name, all_names)
        for task in cell.tasks:
            for method in cell.methods:
                for rate in rates:
                    entry = dict(methods[method])
                    name = (
                        f"{method}-{task}" if rate is None else f"{method}-{rate_part(rate)}-{task}"
                    )
                    entry |= {} if rate is None else {"lr": rate}
                    entry |= {} if cell.epochs is None else {"epochs": cell.epochs}
                    if name in made:
                        raise NeftError(
                            f"{where}: grid.{place}: the run '{name}' stands in {made[name]} too; "
                            "give it once"
                        )
                    made[name] = f"grid.{place}"
                    seeds = cell.seeds or head.seeds
                    runs[name] = {"task": task, **_named(entry, task), "seeds": seeds}
                    for other in cell.tested:
                        if other != task:
                            transfers[f"{name}-on-{other}"] = {"run": name, "task": other}
                    if cell.forgetting is not None:
                        if name in data["forgetting"]:
                            raise NeftError(
                                f"{where}: grid.{place}.forgetting: forgetting.{name} stands in "
                                "the file too; give it once"
                            )
                        data["forgetting"][name] = {"run": name, **cell.forgetting.model_dump()}


def _mapping(data: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """A section of the file; what is no mapping there, the check of params tells."""
    found = data.get(section)
    return found if isinstance(found, Mapping) else {}


def _known(where: str, name: str, names: Collection[str]) -> None:
    try:
        known(where, name, names)
    except PydanticCustomError as fault:
        raise NeftError(fault.message()) from None


def _named(node: Any, task: str) -> Any:
    """A method of the catalogue for a task: `{task}` stands for its name."""
    if isinstance(node, dict):
        return {key: _named(value, task) for key, value in node.items()}
    if isinstance(node, list):
        return [_named(value, task) for value in node]
    return node.replace("{task}", task) if isinstance(node, str) else node


def _leave_out_unused(data: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Of what other files offer, keep what is named, and what a built model learns from."""
    offered = {section: dict(_mapping(data, section)) for section in CATALOGUE}
    used = set(_texts({key: value for key, value in data.items() if key not in offered}))
    built = _mapping(data, "model").get("kind") == "built"
    kept: dict[tuple[str, str], Any] = {}
    found = True
    while found:
        found = False
        for section, entries in offered.items():
            for name, entry in entries.items():
                wanted = name in used or name in _mapping(own, section)
                wanted = wanted or (section == "tasks" and built and _pretrains(entry))
                if wanted and (section, name) not in kept:
                    kept[section, name] = entry
                    used |= set(_texts(entry)) if section != "tasks" else set()
                    found = True
    for section, entries in offered.items():
        if isinstance(data.get(section), dict):
            data[section] = {n: e for n, e in entries.items() if (section, n) in kept}


def _pretrains(task: Any) -> bool:
    source = task.get("source") if isinstance(task, Mapping) else None
    if not isinstance(source, Mapping):
        return False
    splits = source.get("splits")
    return bool(source.get("pretrain") or (isinstance(splits, Mapping) and splits.get("pretrain")))


def _texts(node: Any) -> Iterable[str]:
    """Every text in nested mappings and lists, keys too."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)


def share_base(ws: Workspace, unused: Iterable[str]) -> None:
    """Let a built base be the same to DVC in every study, so that it is made once.

    It depends on the folder of pre-training rows, where tasks without any have an empty file. Tasks
    that are not used have none such.
    """
    folder, tasks = ws.path("pretrain"), ws.params().tasks
    for left in folder.glob("*.jsonl"):
        if left.stem not in tasks:
            left.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for name in unused:
        (folder / f"{name}.jsonl").touch()


def note_failures(ws: Workspace, failed: Mapping[str, str]) -> None:
    """Write into a study's own params.yaml which stages could not be made, and why."""
    data = read_yaml(ws.params_file)
    data["study"]["failed"] = {name: " ".join(text.split()) for name, text in failed.items()}
    with replacing(ws.params_file) as temporary:
        temporary.write_text(yaml_text(data), encoding="utf-8")
