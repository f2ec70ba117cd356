"""How long a walk through the stages will still take, by how long its kinds of stages took."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from neft_core.errors import NeftError
from neft_core.files import write_json

KEPT = 20
"""Stages of each family whose seconds are remembered."""

TYPICAL = {
    "corpus": 3, "base": 60, "prepare": 6, "warmup": 15, "score": 3, "warmups": 15, "similarity": 3,
    "scores": 8, "activations": 6, "assign": 2, "select": 3, "train": 40, "baseline": 12,
    "evaluate": 15, "transfer": 15, "summary": 12, "report": 15,
}  # fmt: skip
"""Seconds of the small studies' stages on two cores: how families of stages compare, for those of
which none was seen yet."""


class Remaining:
    """Seconds by family of stages, remembered from one walk to the next.

    Args:
        memory: the file that remembers them.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._took: dict[str, list[float]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            told = json.loads(memory.read_text(encoding="utf-8"))
            self._took = {name: [float(s) for s in of] for name, of in told.items() if of}
        self._now: dict[str, list[float]] = {}

    def took(self, family: str, seconds: float) -> None:
        """Note a stage that was made."""
        self._now.setdefault(family, []).append(round(seconds, 1))
        self._took[family] = [*self._took.get(family, []), round(seconds, 1)][-KEPT:]
        # Another study may be at it too, or the disk full: no cause to stop this one.
        with contextlib.suppress(NeftError):
            write_json(self._memory, self._took)

    def seconds(self, families: Sequence[str]) -> tuple[float, bool] | None:
        """Seconds that stages will take, and whether all of them are of families that were seen.

        Stages of this walk tell more than remembered ones, which were of other sizes. What was not
        seen takes as much longer than it typically does as what was seen; None: nothing was.
        """
        known = {name: sum(took) / len(took) for name, took in {**self._took, **self._now}.items()}
        if not known:
            return None
        typical = sum(TYPICAL.get(name, 10) for name in known)
        slower = sum(known.values()) / typical
        total = sum(known.get(name, slower * TYPICAL.get(name, 10)) for name in families)
        return total, known.keys() >= set(families)

    def words(self, families: Sequence[str], jobs: int = 1) -> str:
        """The time left, with so many at once, as people say it; empty where nothing is known."""
        found = self.seconds(families)
        if found is None:
            return ""
        return f"{'about' if found[1] else 'roughly'} {duration(found[0] / jobs)} left"


def duration(seconds: float) -> str:
    """A rough length of time."""
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
