"""A model's directory in the Hub's layout, read without building the model.

Either one `model.safetensors`, or shards listed in `model.safetensors.index.json`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from neft_core.errors import NeftError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def config(directory: str | Path) -> dict[str, Any]:
    """The model's `config.json`.

    Raises:
        NeftError: it is absent, can't be read, or is not a JSON object.
    """
    return _json(Path(directory) / "config.json")


def locate(directory: str | Path) -> dict[str, Path]:
    """The file that holds each weight, by the weight's name.

    Raises:
        NeftError: no weights, a shard that is absent, or a damaged file.
    """
    directory = Path(directory)
    if (directory / _SINGLE).is_file():
        with opened(directory / _SINGLE) as file:
            return dict.fromkeys(file.keys(), directory / _SINGLE)
    if not (directory / _INDEX).is_file():
        raise NeftError(
            f"{directory}: has neither {_SINGLE} nor {_INDEX}; save the model as safetensors"
        )
    shards = _json(directory / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise NeftError(f"{directory / _INDEX}: has no map of weights; fetch the model again")
    files = {name: directory / shard for name, shard in shards.items()}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise NeftError(f"{path}: no such file, but {_INDEX} names it; fetch the model again")
    return files


def shapes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """The stored shape of each weight, by name, from the files' headers alone.

    Raises:
        NeftError: as `locate`, or a shard lacks a weight that the index promises.
    """
    files = locate(directory)
    found: dict[str, tuple[int, ...]] = {}
    for path in dict.fromkeys(files.values()):
        with opened(path) as file:
            present = set(file.keys())
            for name in (name for name, where in files.items() if where == path):
                if name not in present:
                    raise NeftError(f"{path}: has no {name}; fetch the model again")
                found[name] = tuple(file.get_slice(name).get_shape())
    return found


@contextmanager
def opened(path: Path, framework: str = "numpy") -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        NeftError: it is not a whole safetensors file.
    """
    try:
        file = safe_open(path, framework=framework)
    except SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise NeftError(
            f"{path}: not a whole safetensors file ({reason}); fetch the model again"
        ) from error
    with file as content:
        yield content


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NeftError(f"{path}: no such file; give a model in the Hub's layout") from None
    except OSError as error:
        raise NeftError(
            f"{path}: can't be read ({error.strerror}); give the directory of a model in the Hub's "
            "layout"
        ) from None
    except ValueError as error:
        raise NeftError(f"{path}: not JSON ({error}); fetch the model again") from error
    if not isinstance(content, dict):
        raise NeftError(f"{path}: holds {type(content).__name__}; a JSON object is needed")
    return content
