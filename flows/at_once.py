"""Work that goes on in threads while one thread decides what comes next."""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class AtOnce(Generic[T, R]):
    """So many pieces of work at once; a single one in the thread that starts it.

    Attributes:
        stop: set where the block is left by Ctrl-C or a cancel: what goes on ends as soon as it
            can, and then the block does. With any other exception it goes on to its own end.

    Args:
        jobs: how many.
    """

    def __init__(self, jobs: int) -> None:
        self.stop = threading.Event()
        self._jobs = jobs
        self._pool = ThreadPoolExecutor(jobs) if jobs > 1 else None
        self._going: dict[Future[R], T] = {}

    def __enter__(self) -> "AtOnce[T, R]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _fault: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self.stop.set()
        if self._pool is not None:
            self._pool.shutdown()

    def __len__(self) -> int:
        """How many go on."""
        return len(self._going)

    @property
    def full(self) -> bool:
        """Whether none can be started now."""
        return len(self._going) == self._jobs

    def start(self, what: T, work: Callable[[], R]) -> None:
        """Start one; with a single job it has ended when this returns."""
        if self._pool is None:
            done: Future[R] = Future()
            self._going[done] = what
            try:
                done.set_result(work())
            except Exception as fault:
                done.set_exception(fault)
        else:
            # Prefect knows by the context which flow its tasks belong to.
            context = contextvars.copy_context()
            self._going[self._pool.submit(context.run, work)] = what

    def ended(self) -> list[tuple[T, Future[R]]]:
        """What has ended since last asked, after waiting for one at least."""
        done, _ = wait(self._going, return_when=FIRST_COMPLETED)
        return [(self._going.pop(future), future) for future in list(self._going) if future in done]
