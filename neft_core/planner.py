"""What the params ask of memory, disk and time, before anything is loaded."""

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from neft_core import config, loading
from neft_core.capacity import Rates, calibrate, free_gpu_memory
from neft_core.config import Params
from neft_core.errors import NeftError
from neft_core.forecast import Need, Subject, Training, forecast, measure
from neft_core.simulation import Batch
from neft_core.tracker import Work
from neft_core.warmups import Warmup
from neft_core.workspace import Workspace

MARGIN = 1.05
"""What is asked for beyond a forecast: kernels' own memory, and gaps between blocks."""

SHORT = 8
"""Tokens of a row that is as good as nothing."""

WHAT_IF: dict[str, dict[str, Any]] = {
    "full": {},
    "in_out": {},
    "embed": {},
    "lora": {"rank": 16},
    "neft": {"percent": 9.0},
}
"""Methods, and their options where no run has them."""

WARMUPS: tuple[dict[str, Any], ...] = (
    {},
    {"update": "in_backward"},
    {"states": "8bit"},
    {"states": "8bit", "update": "in_backward"},
    {"states": "factored", "update": "in_backward"},
    {"modules": "candidates"},
    {"modules": "candidates", "states": "8bit", "update": "in_backward"},
    {"modules": "candidates", "states": "factored", "update": "in_backward"},
    {"modules": "lora", "rank": 64},
)
"""Ways to warm up, as keys of params.yaml: the exact one, then what keeps less and less of it."""


@dataclass(frozen=True)
class Rows:
    """A task's rows as far as they are known.

    Attributes:
        train, dev, test: how many; None where only the data tells.
        longest: tokens of the longest training row, or what the params allow.
        typical: tokens of a row in the middle; None before `prepare`.
        trained: most tokens with a loss in a row; None: all.
        prompt: tokens of the longest prompt of the test rows.
    """

    train: int | None
    dev: int | None
    test: int | None
    longest: int
    typical: int | None = None
    trained: int | None = None
    prompt: int | None = None

    def batch(self, size: int) -> Batch:
        """The largest micro-batch."""
        size = min(size, self.train or size)
        trained = None if self.trained is None else size * self.trained
        return Batch(size, self.longest, trained, padded=size > 1)


class Planner:
    """Forecasts for one set of params on one machine.

    Args:
        params: checked.
        root: where relative paths start.
        data: the workspace whose prepared rows and base model count; None: params alone.
        config_file: the model's config.json, where it is not where params say.
        download: a Hub model's config.json may be fetched.
        least: rows that aren't prepared count as short: what can't fit then, can't fit at all.
    """

    def __init__(
        self,
        params: Params,
        root: Path,
        data: Workspace | None = None,
        *,
        config_file: Path | None = None,
        download: bool = True,
        least: bool = False,
    ) -> None:
        self.params, self.root, self.data, self.least = params, root, data, least
        self._config_file, self._download = config_file, download
        self._needs: dict[str, Need] = {}
        self.answers: dict[str, tuple[int, int, Work, Work | None]] = {}  # of `passes`
        wanted = params.compute.device
        self.gpu = wanted != "cpu" and (wanted == "cuda" or free_gpu_memory() is not None)

    @cached_property
    def subject(self) -> Subject:
        """The base model."""
        import torch

        compute, choice = self.params.compute, self.params.model
        kind = loading.precision(compute, not self.gpu)
        return Subject(
            self._config(),
            getattr(torch, loading.frozen_type(compute, not self.gpu)),
            {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind),
            self.gpu,
            getattr(choice, "trust_remote_code", False),
        )

    def _config(self) -> Any:
        from neft_core import hub, models

        choice = self.params.model
        trust = getattr(choice, "trust_remote_code", False)
        if self._config_file is not None:
            return models.read_config(self._config_file, trust_remote_code=trust)
        if isinstance(choice, config.BuiltModel):
            sizes = {"vocabulary", "hidden", "intermediate", "layers", "heads", "context"}
            return models.llama_config(**choice.model_dump(include=sizes))
        if isinstance(choice, config.LocalModel):
            path = self.root / os.path.expanduser(choice.path)
            if not path.is_dir():
                raise NeftError(
                    f"{path}: no such directory; give a model's directory, or its config.json "
                    "with --config FILE"
                )
        else:
            revision = self._resolved(choice) or choice.revision
            path = hub.config(choice.id, revision, download=self._download)
            path = path.parent if trust else path
        return models.read_config(path, trust_remote_code=trust)

    def _resolved(self, choice: config.HubModel) -> str:
        """The commit that stage `base` found; empty before it ran."""
        from neft_core import models

        try:
            card = models.Base.load(self.data.path("base")) if self.data else None
        except NeftError:
            return ""
        return card.revision if card and card.location == choice.id else ""

    def rows(self, task: str) -> Rows:
        """What is known of a task's rows: of prepared data where there is some."""
        section = self.params.tasks[task]
        source, longest = section.source, section.format.max_tokens
        known = Rows(source.train, source.dev, source.test, SHORT if self.least else longest)
        folder = self.data.path("prepared", task) if self.data else None
        if folder is None or not section.trains or not (folder / "train.safetensors").is_file():
            return known
        import numpy as np

        from neft_core.encoding import load_encoded

        train, dev, test = (
            load_encoded(folder / f"{name}.safetensors")[0] for name in ("train", "dev", "test")
        )
        lengths = np.diff(train["offsets"])
        trained = np.add.reduceat(train["trained"].astype(np.int64), train["offsets"][:-1])
        return Rows(
            len(lengths),
            len(dev["offsets"]) - 1,
            len(test["offsets"]) - 1,
            int(lengths.max()),
            int(np.median(lengths)),
            int(trained.max()),
            int(np.max(test["prompts"])),
        )

    def training(self, stage: str, item: str) -> Training:
        """What a stage trains: `base`, `warmup` of a task, `train` of a run."""
        params = self.params
        if stage == "base":
            assert isinstance(params.model, config.BuiltModel)
            how = params.model.pretraining
            tokens = SHORT if self.least else params.model.context
            return Training("full", Batch(how.batch_size, tokens))
        section: config.Optimisation = params.training
        if stage == "warmup":
            task, section = params.warmed(item)
        else:
            task = params.runs[item].task
        rows = self.rows(task)
        shared: dict[str, Any] = {
            "batch": rows.batch(section.batch_size),
            "checkpointing": section.gradient_checkpointing,
            "accumulation": section.accumulation,
            "layout": params.scoring.candidates,
            "max_grad_norm": loading.optimisation(section)["max_grad_norm"],
        }
        if stage == "warmup":
            chosen = section.model_dump(include={*Warmup.__annotations__})
            return Training("full", warmup=Warmup(**chosen), **shared)
        method = params.runs[item].method
        if isinstance(method, config.Neft):
            options = _budgets(params.runs[item])
        else:
            options = method.model_dump(exclude_none=True, exclude={"name"})
        return Training(
            method.name, options=options, dev=rows.batch(2 * section.batch_size), **shared
        )

    def need(self, training: Training) -> Need:
        """What a training needs; asked once for equal ones."""
        key = repr(training)
        if key not in self._needs:
            self._needs[key] = forecast(self.subject, training)
        return self._needs[key]

    def ask(self, stage: str, item: str) -> tuple[Training, Need]:
        """A stage's training and what it needs.

        Raises:
            NeftError: the budget doesn't fit the model.
        """
        training = self.training(stage, item)
        try:
            return training, self.need(training)
        except NeftError as fault:
            if stage != "train":
                raise
            raise NeftError(f"{Params.FILE}: runs.{item}.method.{fault}") from None

    def kept(self, stage: str, item: str) -> int:
        """Bytes that a training stage leaves in `work/`."""
        subject, params = self.subject, self.params
        if stage == "base":
            return 4 * subject.parameters
        seeds = len(params.runs[item].seeds) if stage == "train" else 1
        return seeds * self.ask(stage, item)[1].kept

    def steps(self, stage: str, item: str) -> int | None:
        """Optimiser steps of a training stage, over all seeds; None where rows aren't known."""
        params = self.params
        if stage == "warmup":
            return params.warmed(item)[1].steps
        if stage == "base":
            assert isinstance(params.model, config.BuiltModel)
            counts = [
                (1 if task.format.task == "nli" else 2) * task.source.pretrain
                for task in params.tasks.values()
                if task.source.pretrain is not None and task.format.task != "instruction"
            ]
            how = params.model.pretraining
            return how.epochs * math.ceil(sum(counts) / how.batch_size)
        run, section = params.runs[item], params.training
        rows = self.rows(run.task).train
        if rows is None:
            return None
        per_epoch = math.ceil(rows / (section.batch_size * section.accumulation))
        return len(run.seeds) * max(1, round((run.epochs or section.epochs) * per_epoch))

    def rates(self, *, layer: bool = False) -> Rates | None:
        """How fast the device is; None where it is not in this machine.

        Args:
            layer: correct them by a real step of one layer of the model.
        """
        import torch

        if self.gpu and free_gpu_memory() is None:
            return None
        device = "cuda" if self.gpu else "cpu"
        torch.set_num_threads(self.params.compute.threads)
        found = calibrate(device, self.subject.autocast or self.subject.dtype)
        if not layer:
            return found
        one = self.subject.one_layer()
        training = Training(
            "full", Batch(1, min(256, self.rows(next(iter(self.params.tasks))).longest))
        )
        step = forecast(one, training).step
        return found.slower(
            measure(one, training, device) / found.seconds(step.pass_ + step.update)
        )

    def step_work(self, training: Training, typical: int | None) -> Work:
        """Work of an optimiser step: of typical rows where they are known, else of the longest."""
        step = self.need(training).step
        share = 1.0 if typical is None else typical / training.batch.tokens
        return step.pass_ * (share * training.accumulation) + step.update


def _budgets(run: config.Run) -> dict[str, Any]:
    """What a run may select: which neurons, doesn't matter; how many, does.

    Of several selections `parts` has the budget of each, as if they had nothing in common; of a
    threshold, which only scores can tell, all candidates.
    """
    found = [
        {key: value for key in config.BUDGETS if (value := getattr(part, key)) is not None}
        or {"share": 1.0}
        for _, part in run.selections("")
        for _ in part.read(run.task)
    ]
    return found[0] if len(found) == 1 else {"parts": found}


def other_warmups(training: Training) -> Iterator[tuple[dict[str, Any], Training]]:
    """The ways of `WARMUPS` but the chosen one, with the keys of params.yaml that differ."""
    chosen, batch, several = training.warmup, training.batch, training.accumulation
    assert chosen is not None
    for keys in WARMUPS:
        if keys.get("modules") == "candidates":
            if not isinstance(training.layout, str):
                continue  # patterns are no layout that a warm-up takes
            keys = {**keys, "layout": training.layout}
        way = Warmup(**keys)
        if way == chosen:
            continue
        changed = {k: v for k, v in asdict(way).items() if v != getattr(chosen, k)}
        other = replace(training, warmup=way)
        if way.update == "in_backward" and several > 1:
            # It keeps no gradient to add to, so all rows of a step come at once.
            rows, trained = several * batch.rows, batch.trained and several * batch.trained
            other = replace(
                other, accumulation=1, batch=replace(batch, rows=rows, trained=trained, padded=True)
            )
            changed |= {"batch_size": rows, "accumulation": 1}
        yield changed, other


def size(amount: float) -> str:
    """Bytes as people say them: `107.8 GB`."""
    if amount < 1000:
        return f"{amount:.0f} bytes"
    power = min(4, int(math.log10(amount)) // 3)
    return f"{amount / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
