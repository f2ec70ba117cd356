"""How a training went, step by step, and the checkpoints from which it goes on."""

import csv
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from neft_core.errors import NeftError
from neft_core.files import load_tensors, read_json, replacing, save_tensors, write_json

TRAIN_COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm")
DEV_COLUMNS = ("step", "epoch", "loss")


@dataclass
class Course:
    """How a training went."""

    train: list[tuple[float, ...]] = field(default_factory=list)
    """Rows of TRAIN_COLUMNS."""
    dev: list[tuple[float, ...]] = field(default_factory=list)
    """Rows of DEV_COLUMNS."""
    step: int = 0
    """Steps done."""
    best_step: int = 0
    """Step with the lowest dev loss; the last one where there is no dev split."""
    stopped_early: bool = False
    """Whether patience ended it."""
    seconds: float = 0.0
    """Time at work, over every process that had a part in it."""
    tokens: int = 0
    """Tokens of the rows seen."""

    @property
    def best_loss(self) -> float | None:
        """Lowest dev loss."""
        return min((row[2] for row in self.dev), default=None)


def best_file(folder: Path, step: int) -> Path:
    """Where the best values of a training lie: those after a step."""
    return folder / f"best-{step}.safetensors"


def save_checkpoint(folder: Path, course: Course, tensors: Mapping[str, Tensor]) -> None:
    """Write all that the next step depends on, then drop what it replaces."""
    target = folder / f"checkpoint-{course.step}"
    best = best_file(folder, course.best_step)
    with replacing(target) as temporary:
        temporary.mkdir()
        save_tensors(temporary / "state.safetensors", tensors, {})
        write_json(temporary / "course.json", asdict(course))
        files = [temporary / "state.safetensors", best]
        sums = {file.name: _sum(file) for file in files if file.exists()}
        write_json(temporary / "sums.json", sums)
    keep_only(folder, target, best)


def keep_only(folder: Path, *kept: Path) -> None:
    """Remove checkpoints and best values but these."""
    for old in {*folder.glob("checkpoint-*")} - {*kept}:
        shutil.rmtree(old)
    for old in {*folder.glob("best-*.safetensors")} - {*kept}:
        old.unlink()


def load_checkpoint(folder: Path, label: str) -> tuple[Course, dict[str, Tensor]] | None:
    """The newest whole checkpoint, if there is one; a damaged one is told and left out."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for checkpoint in reversed(found):
        try:
            tensors, _ = load_tensors(checkpoint / "state.safetensors", "")
            course = Course(**read_json(checkpoint / "course.json"))
            # Bits may turn, and pages be lost with the power, in files of the right form.
            places = {"state.safetensors": checkpoint}
            whole = all(
                _sum(places.get(name, folder) / name) == total
                for name, total in read_json(checkpoint / "sums.json").items()
            )
        except (NeftError, OSError, TypeError):
            whole = False
        if whole:
            for rows in (course.train, course.dev):
                rows[:] = [tuple(row) for row in rows]
            return course, tensors
        print(f"{label}: {checkpoint.name} is damaged; left out", flush=True)
    return None


def _sum(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file, all or nothing."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(columns)
        writer.writerows(rows)
