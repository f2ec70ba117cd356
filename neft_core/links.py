"""How the workspace and DVC's cache hold the same file: once where the file system can."""

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

HARD = "hardlink,copy"
"""What DVC is told where copies take room. With `reflink` first it leaves the copy
that a stage made."""


def settings(dvc: Path) -> dict[str, Any]:
    """What a DVC directory, or a level above it, says of its cache: `type`, `dir`."""
    from dvc.config import Config

    return dict(Config(str(dvc))["cache"]) if dvc.is_dir() else {}


def copies_share_blocks(folder: Path) -> bool:
    """Whether a copy in this folder takes no room of its own (btrfs, XFS: reflink)."""
    clone = 0x40049409  # FICLONE
    try:
        with (
            tempfile.NamedTemporaryFile(dir=folder) as source,
            tempfile.NamedTemporaryFile(dir=folder) as copy,
        ):
            source.write(b"x" * 4096)
            source.flush()
            fcntl.ioctl(copy.fileno(), clone, source.fileno())
            return True
    except OSError:
        return False


def stored_once(folder: Path) -> bool:
    """Whether what a workspace keeps takes no more room in its DVC cache."""
    told = settings(folder / ".dvc")
    first = (told.get("type") or ["reflink"])[0]
    if first == "reflink":
        return copies_share_blocks(folder)
    cache = Path(told.get("dir") or folder / ".dvc/cache")
    return first == "symlink" or (first == "hardlink" and _device(folder) == _device(cache))


def _device(path: Path) -> int:
    return os.stat(next(p for p in (path, *path.parents) if p.exists())).st_dev
