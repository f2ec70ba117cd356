"""Progress of long work: a bar in a terminal, plain lines elsewhere."""

import os
import sys
import time
from types import TracebackType

from tqdm import tqdm

OVERWRITE = "NEFT_OVERWRITE"
"""Variable that asks for one line, overwritten, where output is read by who has a terminal."""

LINE_EVERY = 10.0
"""Seconds between plain lines."""

STATE_EVERY = 0.5
"""Seconds between states of one line, for whoever shows them in a terminal."""


class Progress:
    """Counts units of work under a label.

    Args:
        label: what is at work, such as `train full, seed 1`.
        total: units in all.
        unit: what is counted.
        done: units that an earlier, interrupted process did.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done, self._first, self._note = done, done, ""
        self._start = self._last = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=label, unit=unit, initial=done) if terminal else None
        self._overwrite = bool(os.environ.get(OVERWRITE))

    def __enter__(self) -> "Progress":
        return self

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count units; the note (a loss, say) stands behind the count."""
        self._done += units
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(units)
            return
        now = time.monotonic()
        every = STATE_EVERY if self._overwrite else LINE_EVERY
        if now - self._last >= every and self._done < self._total:
            rate = (self._done - self._first) / (now - self._start)
            left = (self._total - self._done) / rate if rate > 0 else 0.0
            self._print(f"about {left:.0f} s left", end="\r" if self._overwrite else "\n")
            self._last = now

    def _print(self, rest: str, end: str = "\n") -> None:
        parts = [f"{self._unit} {self._done}/{self._total}", self._note, rest]
        print(f"{self._label}: {', '.join(p for p in parts if p)}", end=end, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print(f"{time.monotonic() - self._start:.0f} s")
