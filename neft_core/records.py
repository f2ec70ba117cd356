"""What a run's files say of it: metrics by step, final metrics, params, data, mask.

The files are the truth; `tracking` shows them in MLflow. Nothing here knows MLflow.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neft_core.errors import NeftError
from neft_core.rows import read_rows
from neft_core.workspace import Workspace

OF_TRAINING = ("lr", "epochs")
"""Params of section `training` that a run may have its own of."""

SAMPLES = 100
"""Test rows of a run that MLflow shows as a table, at most."""

Entries = Mapping[str, Mapping[str, Any]]
"""Stages and what determines them, as `graph.locked` says."""


@dataclass(frozen=True)
class Point:
    """One value of a metric; of the machine's, with the millisecond since 1970."""

    name: str
    step: int
    value: float
    time: int | None = None

    @property
    def place(self) -> tuple[str, int]:
        """What tells it from the metric's other values: its step, or time."""
        return self.name, self.step if self.time is None else self.time


@dataclass(frozen=True)
class Split:
    """One part of a task's data; the digest is the MD5 that DVC gives the file."""

    name: str
    digest: str
    rows: int
    source: Mapping[str, Any]


def history(folder: Path) -> list[Point]:
    """Metrics by step of a seed's `train.csv` and `dev.csv`, as `train/loss`, `dev/loss` ...

    Those of the machine too, where a training left its live file `system.csv`.

    Raises:
        NeftError: a whole line is not one of numbers.
    """
    points = []
    for kind in ("train", "dev"):
        for row in _rows(folder / f"{kind}.csv"):
            step = int(row.pop("step"))
            points += [Point(f"{kind}/{n}", step, v) for n, v in row.items() if n != "epoch"]
    return points + _system(_rows(folder / "system.csv", key="time"))


def system(workspace: Workspace, run: str, seed: int) -> list[Point]:
    """What the machine did while a seed was trained, by MLflow's names `system/...`."""
    path = workspace.path("cost", f"{run}.json")
    found = read_json(path)["seeds"].get(str(seed), {}) if path.exists() else {}
    return _system(found.get("system", []))


def _system(samples: Sequence[Mapping[str, float]]) -> list[Point]:
    """As points; a step is a second since the first sample."""
    return [
        Point(f"system/{name}", round((sample["time"] - samples[0]["time"]) / 1000), value, time)
        for sample in samples
        for time in [int(sample["time"])]
        for name, value in sample.items()
        if name != "time"
    ]


def _rows(path: Path, key: str = "step") -> list[dict[str, float]]:
    """Rows of numbers, each with a key; a last line without its end is left for later."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    rows, found = csv.DictReader(text[: text.rfind("\n") + 1].splitlines()), []
    for row in rows:
        try:
            found.append({n: float(value) for n, value in row.items() if value and n != key})
            found[-1][key] = int(row[key])
        except (KeyError, TypeError, ValueError):
            raise NeftError(
                f"{path}: line {rows.line_num}: not a row of numbers; delete the file's folder"
            ) from None
    return found


def final(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers and texts of a seed's metrics.json."""
    return _split(read_json(folder / "metrics.json"))


def cost(workspace: Workspace, run: str, seed: int) -> dict[str, float]:
    """Seconds, tokens per second and peak bytes of a seed's training, as `cost/...`."""
    path = workspace.path("cost", f"{run}.json")
    numbers = _split(read_json(path)["seeds"].get(str(seed), {}))[0] if path.exists() else {}
    return {f"cost/{name}": value for name, value in numbers.items()}


def evaluation(
    workspace: Workspace, place: str, seed: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores and their signatures, of a seed on a test split.

    Args:
        workspace: the workspace.
        place: a folder of `work/evaluation`: `RUN`, or `RUN.TASK` for another task's split.
        seed: the seed.

    Returns:
        Scores as `test/...` or `test/TASK/...`; signatures by name, with `TASK.` before it.
    """
    path = workspace.path("evaluation", place, "metrics.json")
    numbers, texts = _split(read_json(path)["seeds"].get(str(seed), {}))
    other = place.partition(".")[2]
    start, before = (f"test/{other}/", f"{other}.") if other else ("test/", "")
    return (
        {start + name: value for name, value in numbers.items()},
        {before + name: text for name, text in texts.items()},
    )


def samples(workspace: Workspace, place: str, task: str, seed: int) -> dict[str, Any] | None:
    """Test rows, evenly spaced, with a seed's answers and the base's, as MLflow keeps a table.

    Args:
        workspace: the workspace.
        place: as for `evaluation`.
        task: whose test split that is.
        seed: the seed.

    Returns:
        `columns` and `data`; None where no answers were kept.
    """
    own = workspace.path("evaluation", place, f"seed-{seed}.jsonl")
    if not own.is_file():
        return None
    mine, base = read_rows(own), workspace.path("baseline", task, "base.jsonl")
    table = [[row["source"], row["references"][0], row["hypothesis"]] for row in mine]
    columns = ["source", "reference", "output"]
    if base.is_file():
        columns.insert(2, "base")
        for line, row in zip(table, read_rows(base), strict=True):
            line.insert(2, row["hypothesis"])
    return {"columns": columns, "data": table[:: max(1, -(-len(table) // SAMPLES))]}


def _split(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    numbers = {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return numbers, {name: value for name, value in values.items() if isinstance(value, str)}


def mask(workspace: Workspace, run: str) -> dict[str, int]:
    """Selected neurons by module, read off the file's header; empty for a run without a mask."""
    path = workspace.path("masks", f"{run}.safetensors")
    if not path.exists():
        return {}
    with path.open("rb") as handle:
        try:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(min(size, path.stat().st_size)))
        except ValueError:
            raise NeftError(f"{path}: not a safetensors file; run 'neft run'") from None
    return {
        name: tensor["shape"][0]
        for name, tensor in sorted(header.items())
        if name != "__metadata__" and tensor["shape"]
    }


def run_params(entries: Entries, run: str, seed: int) -> dict[str, str]:
    """Every param that the run depends on, flat, under the same names for every run.

    Args:
        entries: stages with the params that they ran (or will run) with.
        run: name of the run.
        seed: its seed.
    """
    mine = entries[f"train@{run}"]["params"]
    section = mine[f"runs.{run}"]
    task = section["task"]
    # Rate and epochs stand under one name for every run, whether it has its own or not.
    values: dict[str, Any] = {"run": {k: v for k, v in section.items() if k not in OF_TRAINING}}
    for stage in (f"corpus@{task}", f"prepare@{task}", "base", f"warmup@{task}", f"score@{task}"):
        for name, value in entries.get(stage, {}).get("params", {}).items():
            values[name.replace(f"tasks.{task}", "task")] = value
    values |= {name: value for name, value in mine.items() if name != f"runs.{run}"}
    for name in OF_TRAINING:
        own = section.get(name)
        values[name] = mine.get("training", {}).get(name) if own is None else own
    values["seed"] = seed
    return flat(values)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names and text."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = str(value)
    return found


def splits(workspace: Workspace, entries: Entries, task: str) -> list[Split]:
    """The parts of a task's corpus, with where they came from."""
    source = entries.get(f"corpus@{task}", {}).get("params", {}).get(f"tasks.{task}.source", {})
    found = []
    for path in sorted(workspace.path("corpus", task).glob("*.jsonl")):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "md5").hexdigest()
            handle.seek(0)
            rows = sum(1 for _ in handle)
        found.append(Split(path.stem, digest, rows, source))
    return found


def seeds(folder: Path) -> Iterator[tuple[int, Path]]:
    """The seeds of a run that have a folder, in order."""
    found = [path for path in folder.glob("seed-*") if path.name[5:].isdigit()]
    yield from sorted((int(path.name[5:]), path) for path in found)


def read_json(path: Path) -> dict[str, Any]:
    """Read a mapping from a JSON file.

    Raises:
        NeftError: the file is absent or holds no mapping.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NeftError(f"{path}: not found; run 'neft run' to make it") from None
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise NeftError(f"{path}: not a JSON mapping; run 'neft run' to restore it")
    return data
