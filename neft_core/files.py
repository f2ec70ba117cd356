"""Files written whole or not at all, with the same bytes for the same content."""

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from neft_core import ranks
from neft_core.errors import NeftError

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, a file or a folder, that takes its place at the end.

    When the block fails, the temporary is removed and `path` stays as it was. Of several
    processes only the main one writes: another's temporary is thrown away.

    Raises:
        NeftError: the system refuses, for instance because the disk is full; a file would take
            the place of a folder.
    """
    if not ranks.main():
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch) / path.name
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*"):
                # A killed process left it; the stage's lock rules out a living one.
                if re.fullmatch(_TEMPORARY, left.suffix):
                    _remove(left)
        with _told(path, only=_DISK, temporary=temporary):
            yield temporary
        with _told(path):
            if temporary.is_dir():
                _remove(path)
            elif path.is_dir():
                raise NeftError(f"{path}: a directory, which no file replaces; give another name")
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            _remove(temporary)


_TEMPORARY = r"\.\d+(-journal|-wal|-shm)?"
"""Suffix of a temporary name: a process, and what SQLite writes beside it."""

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextlib.contextmanager
def _told(path: Path, only: tuple[int, ...] = (), temporary: Path | None = None) -> Iterator[None]:
    """Say a refusal of the system in one line.

    Args:
        path: what is written.
        only: the numbers of the refusals to say; none: all.
        temporary: a name of which all are said.
    """
    try:
        yield
    except Exception as fault:
        number = _system_error(fault)
        own = isinstance(fault, OSError) and fault.filename == str(temporary)
        if (number is None and not isinstance(fault, OSError)) or (
            only and number not in only and not own
        ):
            raise
        reason = os.strerror(number) if number else fault
        raise NeftError(
            f"{path}: can't be written ({reason}); free space or check the path"
        ) from fault


def _system_error(fault: Exception) -> int | None:
    """The number of the system's error, where there is one."""
    if isinstance(fault, OSError):
        return fault.errno
    # Libraries in Rust (safetensors, tokenizers) raise types of their own.
    told = re.search(r"\(os error (\d+)\)", str(fault))
    return int(told[1]) if told else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON with sorted keys, all or nothing."""
    with replacing(path) as temporary:
        text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        NeftError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise NeftError(f"{path}: missing or damaged; run 'neft run' to make it again") from None


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, all or nothing.

    The header is sorted: the library writes metadata in another order each time, so that equal
    content would have different hashes.
    """
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    blob = save(whole, dict(metadata))
    size = int.from_bytes(blob[:8], "little")
    header = json.dumps(json.loads(blob[8 : 8 + size]), sort_keys=True, separators=(",", ":"))
    text = header.encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.write(memoryview(blob)[8 + size :])


def load_tensors(path: Path, remedy: str) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Tensors and metadata of a safetensors file.

    Args:
        path: the file.
        remedy: what the user can do when it can't be read.

    Raises:
        NeftError: the file is absent or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise NeftError(f"{path}: no such file; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except SafetensorError as fault:
        reason = str(fault).splitlines()[0]
        raise NeftError(f"{path}: not a whole safetensors file ({reason}); {remedy}") from None


FRESH = 1e8
"""Nanoseconds in which a file may change again and have the same time and size."""

P = TypeVar("P", str, Path)
T = TypeVar("T")


def once(read: Callable[[P], T]) -> Callable[[P], T]:
    """A reader that reads a file again only after it changed. What it gives is not to be changed.

    Args:
        read: what is read at a path, from the file alone.
    """
    known: dict[P, tuple[tuple[int, int, int], T]] = {}

    def reader(path: P) -> T:
        found = os.stat(path)
        stamp = found.st_ino, found.st_size, found.st_mtime_ns
        if path in known and known[path][0] == stamp:
            return known[path][1]
        value = read(path)
        known.pop(path, None)
        if time.time_ns() - found.st_mtime_ns > FRESH:
            known[path] = stamp, value
        return value

    return reader
