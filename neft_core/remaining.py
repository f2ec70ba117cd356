"""How long a walk through the stages will still take, by how long its kinds of stages took."""

import json
from collections.abc import Sequence
from pathlib import Path

from neft_core.files import write_json

KEPT = 20
"""Stages of each family whose seconds are remembered."""


class Remaining:
    """Seconds by family of stages, remembered from one walk to the next.

    Args:
        memory: the file that remembers them.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        try:
            self._took: dict[str, list[float]] = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._took = {}
        self._now: dict[str, list[float]] = {}

    def took(self, family: str, seconds: float) -> None:
        """Note a stage that was made."""
        self._now.setdefault(family, []).append(round(seconds, 1))
        self._took[family] = [*self._took.get(family, []), round(seconds, 1)][-KEPT:]
        write_json(self._memory, self._took)

    def seconds(self, families: Sequence[str]) -> tuple[float, int]:
        """Seconds that stages will take, and of how many nothing is known.

        Stages of this walk tell more than remembered ones, which were of other sizes.
        """
        total, unknown = 0.0, 0
        for family in families:
            known = self._now.get(family) or self._took.get(family)
            if known:
                total += sum(known) / len(known)
            else:
                unknown += 1
        return total, unknown

    def words(self, families: Sequence[str]) -> str:
        """The time left as people say it; empty where nothing is known of any stage."""
        total, unknown = self.seconds(families)
        if unknown == len(families):
            return ""
        return f"{'more than' if unknown else 'about'} {duration(total)} left"


def duration(seconds: float) -> str:
    """A rough length of time."""
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
