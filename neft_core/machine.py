"""What the machine does while a training runs: MLflow's system metrics, sampled beside it.

A thread of the training's process asks the system. It touches no tensor and draws no random number,
so what is trained keeps its bits.
"""

import contextlib
import csv
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EVERY = 1.0
"""Seconds between two samples, at first."""

MOST = 120
"""Samples that are kept; with more, every second one is dropped, and as many come from then on."""

MEGABYTE = 1e6
"""Bytes, as MLflow counts."""

Sample = dict[str, float]
"""Values by MLflow's names without `system/`, and `time` in milliseconds since 1970."""


@contextlib.contextmanager
def sampled(file: Path | None, device: Any) -> Iterator[list[Sample]]:
    """Sample CPU, memory and the GPU while this block runs.

    Args:
        file: a CSV file that grows by a row for each sample; what it held is gone.
        device: torch's, on which the block computes.

    Yields:
        The samples, complete after the block; the first is always kept.
    """
    import psutil

    samples: list[Sample] = []
    every, ended = [EVERY], threading.Event()
    look = _looking(device)
    psutil.cpu_percent()  # it keeps for each thread what the CPU did before
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)

    def take() -> None:
        samples.append(look())
        if file is not None:
            with file.open("a", encoding="utf-8", newline="") as handle:
                writer = csv.writer(handle)
                if not handle.tell():
                    writer.writerow(samples[-1])
                writer.writerow(samples[-1].values())
        if len(samples) > MOST:
            del samples[1::2]
            every[0] *= 2

    def work() -> None:
        psutil.cpu_percent()
        # A full disk, or a GPU that doesn't answer, must not end a training.
        with contextlib.suppress(Exception):
            while not ended.wait(every[0]):
                take()

    thread = threading.Thread(target=work, name="machine", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
        if not samples:
            with contextlib.suppress(Exception):
                take()


def _looking(device: Any) -> Any:
    """What takes a sample; shares of the CPU are those since the sample before."""
    import psutil

    process = psutil.Process()

    def look() -> Sample:
        memory = psutil.virtual_memory()
        found = {
            "time": time.time_ns() // 1_000_000,
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": round(memory.used / MEGABYTE, 1),
            "system_memory_usage_percentage": memory.percent,
            "process_memory_usage_megabytes": round(process.memory_info().rss / MEGABYTE, 1),
        }
        return {**found, **(_gpu(device) if device.type == "cuda" else {})}

    return look


def _gpu(device: Any) -> Sample:
    """Of the GPU that computes; how busy it is only where `nvidia-ml-py` is installed."""
    import torch

    free, whole = torch.cuda.mem_get_info(device)
    name = f"gpu_{device.index or 0}"
    found = {
        f"{name}_memory_usage_megabytes": round((whole - free) / MEGABYTE, 1),
        f"{name}_memory_usage_percentage": round(100 * (whole - free) / whole, 1),
    }
    with contextlib.suppress(Exception):  # without the package, or on a part of a GPU
        found[f"{name}_utilization_percentage"] = float(torch.cuda.utilization(device))
    return found
