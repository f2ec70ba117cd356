"""What this machine has: free memory and disk, and how fast it computes, by a short calibration."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neft_core.tracker import Work


@dataclass(frozen=True)
class Rates:
    """How fast a device is.

    Attributes:
        flops: operations of a matrix product in a second.
        moved: bytes of a copy, read and written, in a second.
        call: seconds to start an operation.
        overlap: operations are started while others compute, as on a GPU.
    """

    flops: float
    moved: float
    call: float
    overlap: bool = False

    def seconds(self, work: Work) -> float:
        """How long some work takes at least."""
        computing = work.flops / self.flops + work.moved / self.moved
        starting = work.calls * self.call
        return max(computing, starting) if self.overlap else computing + starting

    def slower(self, factor: float) -> "Rates":
        """Rates with which everything takes `factor` times as long."""
        return Rates(self.flops / factor, self.moved / factor, self.call * factor, self.overlap)


def free_memory() -> int:
    """Bytes of memory that this process can still have: the system's, or its cgroup's if less."""
    available = 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = 1024 * int(line.split()[1])
    if not available:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([available, *_cgroup_rooms()])


def _cgroup_rooms() -> list[int]:
    """Limit less use of the cgroups (versions 2 and 1) that this process is in."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the group's own path may not be mounted: its limit is at the root then.
        for folder in {root / group.lstrip("/"), root}:
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names)
                rooms.append(max(0, limit - used + _reclaimable(folder)))
    return rooms


def _reclaimable(folder: Path) -> int:
    """Page cache counted as used, which the system gives back."""
    for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def free_gpu_memory() -> int | None:
    """Bytes of the GPU's memory that are free; None without a GPU."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def calibrate(device: str, dtype: Any, size: int = 1024) -> Rates:
    """Measure rates of a device in about a second: a matrix product, a copy, many small calls.

    Args:
        device: `cpu` or `cuda`.
        dtype: the type of products.
        size: side of the matrices; eight times that on a GPU.
    """
    import torch

    gpu = device == "cuda"
    side = 8 * size if gpu else size
    a = torch.ones(side, side, device=device, dtype=dtype)
    c = torch.empty(16 * size * size, device=device)
    d, small = torch.ones_like(c), torch.ones(8, device=device)

    def once(action: Callable[[], object], times: int = 1) -> float:
        """Least seconds of an action; repeated, since others use the machine too."""
        least = float("inf")
        begun = time.perf_counter()
        while time.perf_counter() - begun < 0.25 or least == float("inf"):
            if gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(times):
                action()
            if gpu:
                torch.cuda.synchronize()
            least = min(least, (time.perf_counter() - started) / times)
        return least

    return Rates(
        flops=2 * side**3 / once(lambda: a @ a),
        moved=2 * c.nbytes / once(lambda: c.copy_(d)),
        call=once(lambda: small + small, 100),
        overlap=gpu,
    )
