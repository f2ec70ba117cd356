"""What DVC's files say: dvc.lock of stages, and the keys that follow; objects of the cache."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neft_core.config import read_yaml
from neft_core.files import once
from neft_core.workspace import Workspace


def locked(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """What dvc.lock says of each stage's last success: `cmd`, `deps`, `params`, `outs`.

    Deps and outs are mappings from path to hash, params from name to value.
    """
    path = workspace.root / "dvc.lock"
    return _read(path) if path.exists() else {}


@once
def _read(path: Path) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "cmd": entry["cmd"],
            "deps": {dep["path"]: dep.get("md5") for dep in entry.get("deps", [])},
            "params": {
                key: value
                for values in entry.get("params", {}).values()
                for key, value in values.items()
            },
            "outs": {out["path"]: out.get("md5") for out in entry.get("outs", [])},
        }
        for name, entry in read_yaml(path).get("stages", {}).items()
    }


def changed_params(entry: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """Keys of a stage's params that a params file has otherwise than at its last success."""
    return [key for key, value in entry["params"].items() if _value(data, key) != value]


def _value(data: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key; None where there is none."""
    found: Any = data
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def entry_key(entry: dict[str, Any]) -> str:
    """SHA-256 of a stage's command, hashes of its inputs, and params.

    The same before the stage is made (`Graph.entry`) and after (`locked`).
    """
    return digest({part: entry[part] for part in ("cmd", "deps", "params")})


def digest(value: Any) -> str:
    """SHA-256 of a value of JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def damaged(oid: str, path_of: Callable[[str], str]) -> list[Path]:
    """Objects that are not what their name says: the object itself, and those of a directory."""
    path = Path(path_of(oid))
    if not path.exists():
        return []
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "md5").hexdigest()
    if found != oid.removesuffix(".dir"):
        return [path]
    if not oid.endswith(".dir"):
        return []
    inside = json.loads(path.read_text(encoding="utf-8"))
    return [bad for file in inside for bad in damaged(file["md5"], path_of)]
