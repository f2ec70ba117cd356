"""Measuring rivals side by side: a process each, interleaved repeats, medians with their spread.

A rival is a `Worker`: a fresh process that builds its own state once and then answers commands, one
at a time, so only one rival computes at any moment, and the peak memory of its process is its own.
Repeats go in rounds. Each round asks every rival once, in an order shuffled anew, so whatever else
the machine does falls on all alike; ratios are formed round by round before their median is taken.
"""

import argparse
import multiprocessing
import os
import platform
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from neft_core.errors import NeftError, say
from neft_core.files import replacing, write_json

Build = Callable[[Any], Callable[[str], Any]]
"""Makes a rival from its plain description, in its process: what answers commands."""


class Worker:
    """A rival in a process of its own.

    Args:
        name: for messages.
        build: a function at the head of its module, called with `spec` in the new process.
        spec: plain data.
    """

    def __init__(self, name: str, build: Build, spec: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, spec), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def ask(self, command: str) -> Any:
        """What the rival answers; the first command waits until it is built.

        Raises:
            NeftError: the rival refused, or its process ended.
            RuntimeError: it failed; with its traceback.
        """
        try:
            self._pipe.send(command)
            outcome, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(timeout=10)
            raise NeftError(
                f"{self.name}: its process ended with {self._process.exitcode}; -9 is most often "
                "the system out of memory, try a smaller shape or batch"
            ) from None
        if outcome == "refused":
            raise NeftError(answer)
        if outcome == "failed":
            raise RuntimeError(f"{self.name}:\n{answer}")
        return answer


def _serve(pipe: Connection, build: Build, spec: Any) -> None:
    """Answer commands until the other side closes."""
    answer: Callable[[str], Any] | None = None
    while True:
        try:
            command = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if answer is None:
                answer = build(spec)
            pipe.send(("done", answer(command)))
        except NeftError as fault:
            pipe.send(("refused", str(fault)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))


@contextmanager
def workers(build: Build, specs: Mapping[str, Any]) -> Iterator[dict[str, Worker]]:
    """A worker for each spec, all alive until the block ends."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(Worker(name, build, spec)) for name, spec in specs.items()}


def rounds(names: Sequence[str], repeats: int, seed: int = 0) -> Iterator[list[str]]:
    """All names in another order for each of the repeats."""
    order = random.Random(seed)
    for _ in range(repeats):
        yield order.sample(names, len(names))


def repeat(rivals: Mapping[str, Worker], command: str, repeats: int) -> dict[str, list[Any]]:
    """What each rival answers to a command, by round; in every round the order is another."""
    answers: dict[str, list[Any]] = {name: [] for name in rivals}
    for order in rounds(list(rivals), repeats):
        for name in order:
            answers[name].append(rivals[name].ask(command))
    return answers


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, quartiles, least value and number of repeats."""
    ordered = sorted(values)
    if len(ordered) > 1:
        low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
    else:
        low = middle = high = ordered[0]
    return {"median": middle, "q1": low, "q3": high, "min": ordered[0], "repeats": len(ordered)}


def ratio(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Spread of one rival's values relative to another's of the same round."""
    return spread(mine / other for mine, other in zip(values, others, strict=True))


class Clock:
    """Seconds of a block, by the wall and of this process on all its cores.

    The second hardly sees what else the machine does; under load it is the one to compare.
    """

    wall: float
    cpu: float

    def __enter__(self) -> "Clock":
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_fault: object) -> None:
        self.wall = time.perf_counter() - self._start[0]
        self.cpu = time.process_time() - self._start[1]


def peak_resident() -> int:
    """The most bytes that this process has had in memory since its start or `reset_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status: no VmHWM")


def reset_peak() -> None:
    """Count `peak_resident` from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def machine() -> dict[str, Any]:
    """What the figures depend on besides the command."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table; its head are the keys of the first row, all but the first align right."""
    columns = list(rows[0])
    widths = [
        max(len(row[column]) for row in [{c: c for c in columns}, *rows]) for column in columns
    ]

    def line(cells: Iterable[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(aligned)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(columns), line(rule), *(line(row[c] for c in columns) for row in rows)])


def write(out: Path, record: Mapping[str, Any], text: str) -> None:
    """`out.json` with everything and `out.md` with the tables."""
    write_json(out.with_name(out.name + ".json"), record)
    with replacing(out.with_name(out.name + ".md")) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(
    arguments: Callable[[list[str] | None], argparse.Namespace],
    run: Callable[[argparse.Namespace], tuple[dict[str, Any], str]],
    argv: list[str] | None = None,
) -> int:
    """Measure, print the tables, write the files; the exit status.

    Args:
        arguments: the command line, parsed; has `threads` and `out`.
        run: the record and its tables in Markdown.
        argv: the command line; None: this process's.
    """
    options = arguments(argv)
    # Read by OpenMP when a rival's process starts: waiting threads must not take a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    try:
        record, text = run(options)
    except NeftError as fault:
        return say(str(fault), 2)
    print(text)
    if options.out is not None:
        write(options.out, record, text)
    return 0
