"""`--params` and `--set`, and a deployment's overrides: which params a run uses.

`--set` changes the workspace's params.yaml (comments stay), as `dvc exp run -S` does: the file is
what DVC hashes, so whatever ran is what it says. `--params FILE` with a file that is no
workspace's own runs in a workspace of its own under `.neft/workspaces`, which shares the cache.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import Comment, Format, merge_attrib
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from neft_core import loading
from neft_core.config import NO_FILE, Params, parse_params, read_yaml
from neft_core.errors import NeftError
from neft_core.files import replacing
from neft_core.workspace import (
    Workspace,
    cache_of,
    exclusive,
    find_workspace,
    hold,
    init_workspace,
)


@dataclass(frozen=True)
class Preview:
    """Params with overrides, of which nothing is written.

    Attributes:
        params: checked.
        data: as the file would say them.
        workspace: whose params.yaml they would stand in; None: one that isn't made yet.
        changed: whether they differ from what stands there now.
    """

    params: Params
    data: dict[str, Any]
    workspace: Workspace | None
    changed: bool


def preview(file: Path | None, settings: Sequence[str]) -> Preview:
    """What `apply` would run, without writing anything."""
    ws = _owner(file)
    path = file or (ws or find_workspace()).params_file
    text, changes = _changed(path, settings)
    return Preview(*checked(text, path.name), ws, bool(changes))


def apply(file: Path | None, settings: Sequence[str]) -> Workspace:
    """The workspace to run, its params.yaml changed as asked for.

    Raises:
        NeftError: the outcome isn't valid; the file is then left as it was.
    """
    ws = _owner(file)
    folder = None
    if ws is None:
        assert file is not None
        ws = _private_workspace(file)
        folder = ws.host.root
    text, changes = _changed(ws.params_file, settings, folder)
    checked(text, Params.FILE)
    if changes:
        with replacing(ws.params_file) as temporary:
            temporary.write_text(text, encoding="utf-8")
        for change in changes:
            print(f"{ws.params_file.name}: {change}")
    return ws


def variant(host: Workspace, runs: Sequence[str], settings: Sequence[str]) -> Workspace:
    """A workspace of its own for a choice of runs and for settings; the host's files stay.

    It lies below the host, shares its DVC cache, and is named by what its params say: the same
    choice finds its results again, and another one never touches them.

    Args:
        host: the workspace whose params.yaml is changed.
        runs: names of the runs to keep; none: all.
        settings: changes, each as `KEY=VALUE`.

    Raises:
        NeftError: a run is unknown, or the outcome isn't valid.
    """
    text, _ = _changed(host.params_file, settings)
    document = _round_trip().load(text)
    known = document["runs"]
    for name in runs:
        if name not in known:
            raise NeftError(f"runs: no run '{name}' in params.yaml; there are {', '.join(known)}")
    for name in [name for name in known if runs and name not in runs]:
        del known[name]
        for other, entry in list((document.get("transfers") or {}).items()):
            if entry.get("run") == name:
                del document["transfers"][other]
    absolute(document, host.root)
    text = _dumped(document)
    _, data = checked(text, "overrides")
    mark = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
    folder = host.state("workspaces", f"params-{mark}")
    with exclusive(host.state("workspaces.lock")):
        return init_workspace(folder, text, cache=cache_of(host), pipeline=host.root / "dvc.yaml")


def _owner(file: Path | None) -> Workspace | None:
    """The workspace whose own params.yaml is meant; None for any other file."""
    if file is None:
        return find_workspace()
    if not file.exists():
        raise NeftError(f"--params {file}: not found; name a file like a workspace's params.yaml")
    read_yaml(file)
    path = file.resolve()
    own = path.name == Params.FILE and (path.parent / "dvc.yaml").is_file()
    return Workspace(path.parent) if own else None


def _private_workspace(file: Path) -> Workspace:
    name = file.resolve().parent.name if file.name == Params.FILE else file.stem
    data = read_yaml(file)
    if {"extends", "grid"} & data.keys():
        raise NeftError(f"--params {file}: is a study file; run 'neft study {file}'")
    parse_params(data, file.name)
    document = _round_trip().load(file.read_text(encoding="utf-8"))
    absolute(document, file.resolve().parent)
    ws = private(find_workspace(), name, file, _dumped(document))
    print(f"{file}: runs in its own workspace, {ws.root}")
    return ws


def private(host: Workspace, name: str, file: Path, params: str) -> Workspace:
    """A workspace of a file's own, below another, whose DVC cache it shares.

    Args:
        host: the other.
        name: of its folder.
        file: whose it is; another file of the same name gets another folder.
        params: the text of its params.yaml.
    """
    folder = place(host, name, file)
    with hold(Workspace(folder).state("lock"), str(folder)):  # nobody is running it
        ws = init_workspace(folder, "", cache=cache_of(host))
        with replacing(ws.state("params-file")) as temporary:
            temporary.write_text(str(file.resolve()), encoding="utf-8")
        with replacing(ws.params_file) as temporary:
            temporary.write_text(params, encoding="utf-8")
    return ws


def place(host: Workspace, name: str, file: Path) -> Path:
    """Where a file's own workspace lies, or will lie.

    Raises:
        NeftError: the name would lead elsewhere.
    """
    if name.startswith(".") or "/" in name:
        raise NeftError(f"{file}: its workspace would be called '{name}'; rename the file")
    folder = host.state("workspaces", name)
    owner = Workspace(folder).state("params-file")
    if owner.exists() and owner.read_text(encoding="utf-8") != str(file.resolve()):
        # A file of the same name, elsewhere, was here first.
        mark = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:6]
        return folder.with_name(f"{name}-{mark}")
    return folder


def absolute(node: Any, folder: Path) -> None:
    """Paths of local files keep their meaning where the params file moves to."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "path" and isinstance(value, str) and value != NO_FILE:
                node[key] = _quoted(os.path.normpath(folder / os.path.expanduser(value)))
            elif key == "id" and isinstance(value, str) and (folder / value).is_dir():
                node[key] = _quoted(os.path.normpath(folder / value))
            else:
                absolute(value, folder)
    elif isinstance(node, list):
        for value in node:
            absolute(value, folder)


def _changed(
    path: Path, settings: Sequence[str], folder: Path | None = None
) -> tuple[str, list[str]]:
    """A params file's text with settings applied (see `assign`), and what they changed.

    Raises:
        NeftError: the text would be read as something else.
    """
    wanted = read_yaml(path)
    text = path.read_text(encoding="utf-8")
    if not settings:
        return text, []
    document = _round_trip().load(text)
    changes = [assign(document, setting, folder) for setting in settings]
    for setting in settings:
        assign(wanted, setting, folder)
    text = _dumped(document)
    try:
        same = YAML(typ="safe").load(text) == wanted
    except YAMLError:
        same = False
    if not same:
        raise NeftError(
            f"--set {' --set '.join(settings)}: can't be written into {path.name} so that it is "
            "read as that; edit the file"
        )
    return text, [change for change in changes if change]


def assign(document: Any, setting: str, folder: Path | None = None) -> str:
    """Set a key of nested mappings, `KEY.PATH=VALUE`; what that changed, in words.

    Args:
        document: the outermost mapping.
        setting: what is set.
        folder: where its paths begin; None: they stay as they are.

    Raises:
        NeftError: no value, no YAML, or keys that are not there.
    """
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise NeftError(f"--set {setting}: got no value; write --set key.path=value")
    try:
        wanted = YAML(typ="safe").load(value)
    except (YAMLError, ValueError):  # ValueError: a date or a number that is none
        raise NeftError(f"--set {setting}: the value is no YAML; quote it") from None
    *parents, last = key.split(".")
    if folder:
        holder = {last: wanted}
        absolute(holder, folder)
        wanted = holder[last]
    node = document
    for parent in parents:
        if not isinstance(node, dict) or parent not in node:
            known = ", ".join(map(str, node)) if isinstance(node, dict) else "no keys"
            raise NeftError(f"--set {setting}: no '{parent}' there; known: {known}")
        node = _own(document, node, parent)
    if not isinstance(node, dict):
        raise NeftError(f"--set {setting}: {'.'.join(parents)} holds no keys")
    was = _shown(node[last]) if last in node else "unset"
    if was == _shown(wanted):  # to Python 1, 1.0 and true are equal
        return ""
    node[last] = _quoted(wanted)
    return f"{key}: {was} is now {_shown(wanted)}"


def _own(document: Any, node: Any, key: str) -> Any:
    """What a mapping has at a key, made its own where other places refer to it.

    Aliases and merge keys of YAML are one object in all of their places.
    """
    value = node[key]
    places = [place for place, other in _references(document, set()) if other is value]
    if isinstance(value, dict) and len(places) > 1:
        # Comments stand where the value was written, which is the first place.
        value = node[key] = _copied(value, comments=places[0] == (id(node), key))
    return value


def _references(node: Any, seen: set[int]) -> Iterator[tuple[tuple[int, Any], Any]]:
    """Every place of a document, as its container's identity and the key, with what is there."""
    if not isinstance(node, dict | list) or id(node) in seen:
        return
    seen.add(id(node))
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (id(node), key), value
        yield from _references(value, seen)
    for merged in getattr(node, merge_attrib, ()):
        yield (id(node), "<<"), merged


def _copied(node: Any, comments: bool) -> Any:
    """A copy that shares nothing, and takes the comments along or has none."""
    if isinstance(node, dict):
        made: Any = type(node)()
        for key, value in node.items():
            made[key] = _copied(value, comments)
    elif isinstance(node, list):
        made = type(node)()
        made.extend(_copied(value, comments) for value in node)
    else:
        return node
    if hasattr(node, Format.attrib):
        setattr(made, Format.attrib, getattr(node, Format.attrib))
    if comments and hasattr(node, Comment.attrib):
        setattr(made, Comment.attrib, getattr(node, Comment.attrib))
        delattr(node, Comment.attrib)
    return made


def _quoted(value: Any) -> Any:
    """A value with its texts in quotes but for words, numbers and paths.

    YAML 1.2, which is written here, has others plain between braces too; 1.1, which DVC reads,
    takes no `:` or `?` there.
    """
    if isinstance(value, dict):
        return {_quoted(key): _quoted(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_quoted(entry) for entry in value]
    plain = not isinstance(value, str) or re.fullmatch(r"[\w./ -]*", value)
    return value if plain else DoubleQuotedScalarString(value)


def _shown(value: Any) -> str:
    """A value in one line of YAML, of which JSON is a part."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _dumped(document: Any) -> str:
    buffer = io.StringIO()
    _round_trip().dump(document, buffer)
    return buffer.getvalue()


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def checked(text: str, where: str) -> tuple[Params, dict[str, Any]]:
    """Params, with what only the stages would find out of them: the prompts' placeholders."""
    data = YAML(typ="safe").load(text)
    assert isinstance(data, dict)
    params = parse_params(data, where)
    for task in params.tasks:
        loading.form(params, task)
    return params, data
