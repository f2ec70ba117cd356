"""What a terminal shows of a run: the log without Prefect's own lines, and one line of progress."""

import contextlib
import contextvars
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

from neft_core.errors import NeftError
from neft_core.repro import StageFailed

_LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine")


class Console(logging.Filter):
    """Drops what Prefect says where our own line says it, and addresses that end with the run.

    Args:
        lasting: whether the server's pages can be opened afterwards.
    """

    def __init__(self, lasting: bool) -> None:
        super().__init__()
        self._lasting = lasting
        self._shown = False
        self._one = threading.Lock()
        self.terminal = sys.stderr.isatty()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown; the line of progress makes room for it."""
        fault = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        text = str(record.msg)
        wanted = not (
            isinstance(fault, NeftError | StageFailed | KeyboardInterrupt)
            or text.startswith(("Finished in state", "Beginning flow run", "Crash detected!"))
            or (text.startswith("View at ") and not self._lasting)
        )
        if wanted:
            self.clear()
        return wanted

    def state(self, text: str) -> None:
        """Show how far the stage at work is, in place of what was shown before."""
        line = f"{time.strftime('%H:%M:%S')} {text}"[: shutil.get_terminal_size().columns - 1]
        with self._one:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
            self._shown = True

    def clear(self) -> None:
        """Remove the line of progress."""
        with self._one:
            if self._shown:
                print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
                self._shown = False


_CURRENT: contextvars.ContextVar[Console | None] = contextvars.ContextVar("console", default=None)


def on_state(said: Callable[[str], str]) -> Callable[[str], None] | None:
    """What takes the states of progress, worded as told, where a terminal shows them."""
    found = _CURRENT.get()
    if found is None or not found.terminal:
        return None
    return lambda text: found.state(said(text))


@contextlib.contextmanager
def console(lasting: bool) -> Iterator[None]:
    """Keep Prefect's own lines out of the log of a run that somebody watches."""
    found = Console(lasting)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(found)
    token = _CURRENT.set(found)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        found.clear()
        for logger in loggers:
            logger.removeFilter(found)
