"""What the report tells of, read from a workspace's files. What isn't there is empty."""

import csv
import hashlib
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neft_core import config, records
from neft_core.errors import NeftError
from neft_core.files import read_json
from neft_core.workspace import Workspace

if TYPE_CHECKING:
    from neft_core.config.study import PartSection
    from neft_core.masks import NeuronMask, NeuronScores

Row = dict[str, str]

WARMERS = ("warmup", "warmups")
SCORERS = ("score", "similarity", "scores", "activations")
"""Stages that tune models to score by, and that score; each name is an item of one of them."""


@dataclass(frozen=True)
class Findings:
    """A workspace's results, by the task that they belong to."""

    ws: Workspace
    params: config.Params
    masks: "Mapping[str, NeuronMask]" = field(default_factory=dict)
    """Of the runs that have selected neurons."""

    @classmethod
    def read(cls, ws: Workspace) -> "Findings":
        """Open a workspace."""
        from neft_core.masks import NeuronMask

        masks: dict[str, NeuronMask] = {}
        found = cls(ws, ws.params(), masks)
        for run in found.params.runs:
            path = ws.path("masks", f"{run}.safetensors")
            if found.made(path, run, "select"):
                mask = NeuronMask.load(path)
                if mask.neurons:
                    masks[run] = mask
        return found

    @property
    def failed(self) -> Mapping[str, str]:
        """Stages of a study that could not be made, as DVC calls them, and why."""
        return self.params.study.failed if self.params.study else {}

    def unmade(self, item: str, *stages: str) -> str | None:
        """Why one of these stages was not made of an item this time; its files are older ones."""
        whys = (self.failed.get(f"{stage}@{item}") for stage in stages)
        return next((why for why in whys if why is not None), None)

    def made(self, path: Path, item: str, *stages: str) -> bool:
        """Whether these stages made a file, of an item, this time."""
        return path.is_file() and self.unmade(item, *stages) is None

    def why_failed(self, run: str | None, task: str) -> str | None:
        """Why a study has no score of a run on a task (of no run: of base and tuned model)."""
        if run is None:
            return self.failed.get(f"baseline@{task}")
        if self.params.runs[run].task == task:
            return self.failed.get(f"evaluate@{run}")
        moved = (n for n, t in self.params.transfers.items() if (t.run, t.task) == (run, task))
        return self.failed.get(f"transfer@{next(moved, None)}")

    def named(self, part: "PartSection") -> str:
        """What the files of a part of the study are called."""
        assert self.params.study is not None
        return self.params.study.part_name(part)

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks to be shown: of a study those that its runs are about, if any; else all.

        A study also has tasks whose pre-training rows alone it needs.
        """
        every = list(self.params.tasks)
        if self.params.study is None:
            return every
        about = {run.task for run in self.params.runs.values()}
        about |= {transfer.task for transfer in self.params.transfers.values()}
        return [task for task in every if task in about] or every

    def runs(self, task: str) -> list[str]:
        """Names of a task's runs."""
        return [name for name, run in self.params.runs.items() if run.task == task]

    @cached_property
    def families(self) -> dict[str, str]:
        """For each run the method, of `neft` with its policy: runs that differ in size alone."""
        return {name: _family(run.method) for name, run in self.params.runs.items()}

    def before(self, run: str) -> list[str]:
        """The stages that a run's mask took, as `costs` names them; of a random one none."""
        found = []
        for _, part in self.params.runs[run].selections(""):
            for name in part.read(self.params.runs[run].task) if part.policy != "random" else []:
                activations = self.params.activations.get(name)
                found += [f"warmup-{activations.warmup if activations else name}", f"score-{name}"]
        return list(dict.fromkeys(found))

    @cached_property
    def table(self) -> list[Row]:
        """Rows of the result table."""
        return _csv(self.ws.path("summary", "summary.csv"))

    def rows(self, task: str) -> list[Row]:
        """The task's rows of the result table."""
        return [row for row in self.table if row.get("task") == task]

    def metrics(self, task: str) -> list[str]:
        """The metrics that a task has, the first of them the one that matters most."""
        rows = self.rows(task)
        return [
            key.removesuffix("_signature")
            for key in (rows[0] if rows else {})
            if key.endswith("_signature") and any(row[key] for row in rows)
        ]

    def curves(self, task: str, kind: str) -> dict[str, list[list[tuple[float, float]]]]:
        """Of each run, for each seed (step, loss); `kind` is `train` or `dev`."""
        runs = self.runs(task)
        found: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for row in self._curves(kind):
            loss = number(row.get("loss"))
            if row.get("run") in runs and loss is not None:
                seeds = found.setdefault(row["run"], {})
                seeds.setdefault(row["seed"], []).append((float(row["step"]), loss))
        return {run: list(found[run].values()) for run in runs if run in found}

    def _curves(self, kind: str) -> list[Row]:
        return _csv(self.ws.path("summary", f"{kind}.csv"))

    def seeds(self, run: str) -> list[dict[str, Any]]:
        """What metrics.json says of each seed of a run."""
        folders = (folder for _, folder in records.seeds(self.ws.path("train", run)))
        files = (folder / "metrics.json" for folder in folders)
        return [read_json(file) for file in files if self.made(file, run, "train")]

    def adapter_bytes(self, run: str) -> float | None:
        """Size of what a run's first seed trained, on disk."""
        for _, folder in records.seeds(self.ws.path("train", run)):
            return sum(path.stat().st_size for path in folder.glob("adapter*")) or None
        return None

    def costs(self) -> dict[str, list[dict[str, float]]]:
        """What each stage that is measured took, of a run for each of its seeds."""
        found = {}
        for path in sorted(self.ws.path("cost").glob("*.json")):
            if path.name.startswith("speed.") or not self._timed(path):
                continue
            data = read_json(path)
            # In the order of `seeds`: in the file 10 stands before 2.
            of_seeds = sorted(data.get("seeds", {}).items(), key=lambda item: int(item[0]))
            found[path.stem] = [entry for _, entry in of_seeds] if "seeds" in data else [data]
        return {name: entries for name, entries in found.items() if any(entries)}

    def _timed(self, path: Path) -> bool:
        """Whether what a file of `cost` tells of was made this time."""
        if path.stem in self.params.runs:
            return self.made(path, path.stem, "train")
        kind, _, item = path.stem.partition("-")
        return self.made(path, item, *(WARMERS if kind == "warmup" else SCORERS))

    def scores(self, task: str) -> "NeuronScores | None":
        """What the task's candidates scored."""
        from neft_core.masks import NeuronScores

        path = self.ws.path("scores", f"{task}.safetensors")
        return NeuronScores.load(path) if self.made(path, task, *SCORERS) else None

    def samples(self, task: str, count: int) -> list[dict[str, Any]]:
        """Test rows, evenly spaced, each with the texts of base, tuned model and every run.

        Returns:
            For each row `source`, `references`, and `texts` by model.
        """
        from neft_core.rows import read_rows

        files: dict[str, Path] = {}
        for name in ("base", "tuned"):
            path = self.ws.path("baseline", task, f"{name}.jsonl")
            files |= {name: path} if self.made(path, task, "baseline") else {}
        for run in self.runs(task):
            seed = self.params.runs[run].seeds[0]
            path = self.ws.path("evaluation", run, f"seed-{seed}.jsonl")
            files |= {run: path} if self.made(path, run, "evaluate") else {}
        said = {name: read_rows(path) for name, path in files.items()}
        if not said:
            return []
        first = next(iter(said.values()))
        length = min(map(len, said.values()))
        places = (
            sorted({(2 * n + 1) * length // (2 * count) for n in range(count)}) if length else []
        )
        return [
            {
                "number": place + 1,
                "source": first[place]["source"],
                "references": first[place]["references"],
                "texts": {name: rows[place]["hypothesis"] for name, rows in said.items()},
            }
            for place in places
        ]

    def base(self) -> dict[str, Any]:
        """The card of the base model."""
        path = self.ws.path("base", "base.json")
        return dict(read_json(path)) if path.is_file() and "base" not in self.failed else {}

    def splits(self, task: str) -> list[records.Split]:
        """The task's data."""
        return [] if self.unmade(task, "corpus") else records.splits(self.ws, {}, task)

    def settings(self) -> dict[str, Any]:
        """params.yaml as it was understood, defaults filled in."""
        return self.params.model_dump(mode="json", exclude={"tracking"})

    def signature(self) -> str:
        """Hash of `settings`."""
        text = json.dumps(self.settings(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _family(method: config.Method) -> str:
    if not isinstance(method, config.Neft):
        return method.name
    parts = (f"{s.policy} by {s.scores}" if s.scores else s.policy for s in method.selections)
    return f"neft {' + '.join(parts)}"


def number(text: str | float | None) -> float | None:
    """A finite number, where there is one."""
    try:
        value = float(text or "nan") if isinstance(text, str) else text
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) else None


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation of more than one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def places(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Layer and part of each module: `model.layers.3.mlp.up_proj` is `up` of layer 3.

    Parts of the same last name keep their whole one.
    """
    split = {}
    for name in names:
        match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
        split[name] = (match[1], match[2]) if match else ("-", name)
    short = {part: part.rpartition(".")[2].removesuffix("_proj") for _, part in split.values()}
    clear = {part: s if list(short.values()).count(s) == 1 else part for part, s in short.items()}
    return {name: (layer, clear[part]) for name, (layer, part) in split.items()}


def shares(mask: "NeuronMask") -> tuple[list[str], list[str], list[list[float | None]]]:
    """Layers, parts, and of each the share of the candidates that a mask selects."""
    where = places(list(mask.groups))
    layers = list(dict.fromkeys(layer for layer, _ in where.values()))
    parts = list(dict.fromkeys(part for _, part in where.values()))
    rows: list[list[float | None]] = [[None] * len(parts) for _ in layers]
    for module, count in mask.by_module().items():
        layer, part = where[module]
        rows[layers.index(layer)][parts.index(part)] = count.selected / max(1, count.candidates)
    return layers, parts, rows


def lowest_selected(mask: "NeuronMask", scores: "NeuronScores") -> float | None:
    """The lowest sensitivity that a mask holds; None for a mask made of other scores."""
    import torch

    if not scores.provenance.items() <= mask.provenance.items():
        return None
    found = []
    for module, chosen in mask.indices.items():
        values, group = scores.sensitivity.get(module), scores.groups.get(module)
        if values is None or group != mask.groups[module]:
            return None
        mine = torch.isin(group.indices(torch.arange(group.count)), chosen)
        found += [float(values[mine].min())] if bool(mine.any()) else []
    return min(found, default=None)


def overlaps(
    masks: "Mapping[str, NeuronMask]",
) -> tuple[list[list[float | None]], list[list[float | None]]]:
    """Share of each mask's neurons that each other has too, and what chance would give.

    A random mask as large as the other has a neuron with probability (its size) / (candidates).
    """
    found: list[list[float | None]] = []
    chance: list[list[float | None]] = []
    for mine in masks.values():
        found.append([])
        chance.append([])
        for other in masks.values():
            try:
                found[-1].append(mine.overlap(other))
                candidates = sum(group.count for group in other.groups.values())
                chance[-1].append(other.neurons / candidates)
            except NeftError:  # of another model or layout
                found[-1].append(None)
                chance[-1].append(None)
    return found, chance


def _csv(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))
