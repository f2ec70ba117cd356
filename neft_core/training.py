"""The training loop, on Accelerate: one for pre-training, warm-up and every method."""

import csv
import hashlib
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neft_core.errors import NeftError
from neft_core.files import load_tensors, read_json, replacing, save_tensors, write_json
from neft_core.progress import Progress
from neft_core.steps import (
    Arrays,
    Recipe,
    collate,
    learning_rate,
    loss_sum,
    mean_loss,
    plan_steps,
    steps_in_epoch,
)

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


class Trainer:
    """One training: a prepared model, its rows, and a folder to resume from.

    Args:
        model: only what trains requires a gradient.
        trained: what trains, by name.
        recipe: its course.
        train: rows to train on.
        dev: rows that choose the best checkpoint, or None.
        pad: the padding token.
        folder: checkpoints; an interrupted training goes on from here.
        live: a folder for train.csv and dev.csv, which grow while it trains.
        label: for progress and messages.
        mixed_precision: `no`, `bf16` or `fp16`, as Accelerate has it.
        cpu: stay on the CPU.
    """

    def __init__(
        self,
        model: Any,
        trained: Mapping[str, nn.Parameter],
        recipe: Recipe,
        train: Arrays,
        dev: Arrays | None,
        *,
        pad: int,
        folder: Path,
        live: Path | None = None,
        label: str,
        mixed_precision: str = "no",
        cpu: bool = True,
    ) -> None:
        from accelerate import Accelerator

        self.recipe, self.train_rows, self.dev_rows = recipe, train, dev
        self.pad, self.folder, self.live, self.label = pad, folder, live, label
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision)
        self.trained = dict(trained)
        optimizer = torch.optim.AdamW(
            self.trained.values(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        if recipe.gradient_checkpointing:
            # Reentrant checkpointing gives no gradient behind a frozen embedding.
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.raw_model = model
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.course = Course()

    def run(self) -> Course:
        """Train to the end, from the last checkpoint where there is one.

        The model holds the best weights afterwards.

        Raises:
            NeftError: a loss is not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.recipe.seed)
        self._resume()
        course, recipe = self.course, self.recipe
        self._rewrite_live()
        rows = len(self.train_rows["offsets"]) - 1
        per_epoch = steps_in_epoch(rows, recipe.batch_size, recipe.accumulation)
        every = recipe.evaluate_every or per_epoch
        plan = plan_steps(np.diff(self.train_rows["offsets"]), recipe)
        for _ in range(course.step):
            next(plan)
        self.model.train()
        started = time.monotonic()
        earlier = course.seconds
        with Progress(self.label, recipe.steps, "step", course.step) as progress:
            while course.step < recipe.steps and not course.stopped_early:
                loss, norm = self._step(next(plan))
                course.step += 1
                epoch = course.step / per_epoch
                rate = learning_rate(recipe, course.step - 1)
                self._record("train", (course.step, epoch, loss, rate, norm))
                last = course.step == recipe.steps
                if self.dev_rows is not None and (last or course.step % every == 0):
                    self._evaluate(epoch)
                if last or course.stopped_early or course.step % recipe.checkpoint_every == 0:
                    course.seconds = earlier + time.monotonic() - started
                    self._checkpoint()
                best = "" if course.best_loss is None else f", best dev {course.best_loss:.3f}"
                progress.advance(note=f"loss {loss:.3f}{best}")
        if self.dev_rows is None:
            course.best_step = course.step
        elif course.best_step != course.step:
            self._restore(self._best_file(course.best_step))
        return course

    def release(self) -> Any:
        """The model as it was given, without Accelerate's wrapping; its memory is freed."""
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        return model

    def peak_bytes(self) -> int:
        """Peak memory so far: of the GPU where there is one, else of this process."""
        if self.accelerator.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def _step(self, micro_batches: list[np.ndarray]) -> tuple[float, float]:
        """One optimiser step; its loss and the gradient's norm before clipping."""
        device = self.accelerator.device
        batches = [collate(self.train_rows, rows, self.pad) for rows in micro_batches]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            moved = {name: values.to(device) for name, values in batch.items()}
            loss, _ = loss_sum(self.model, moved)
            self.accelerator.backward(loss / tokens)
            total += loss.item()
            self.course.tokens += int(batch["attention_mask"].sum())
        if not math.isfinite(total):
            raise NeftError(
                f"{self.label}: loss is {total} at step {self.course.step + 1}; "
                f"lower the learning rate ({self.recipe.lr:g}) or look at the data"
            )
        norm = self.accelerator.clip_grad_norm_(self.trained.values(), self.recipe.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.course.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / tokens, float(norm)

    def _evaluate(self, epoch: float) -> None:
        course = self.course
        assert self.dev_rows is not None
        size = 2 * self.recipe.batch_size
        loss = mean_loss(self.model, self.dev_rows, size, self.pad, self.accelerator.device)
        if not math.isfinite(loss):
            raise NeftError(
                f"{self.label}: dev loss is {loss} at step {course.step}; lower the learning rate"
            )
        if course.best_loss is None or loss < course.best_loss:
            course.best_step = course.step
            save_tensors(self._best_file(course.step), self._values(), {})
        self._record("dev", (course.step, epoch, loss))
        since = sum(row[0] > course.best_step for row in course.dev)
        course.stopped_early = bool(self.recipe.patience) and since >= self.recipe.patience

    def _values(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def _best_file(self, step: int) -> Path:
        return self.folder / f"best-{step}.safetensors"

    def _record(self, name: str, row: tuple[float, ...]) -> None:
        getattr(self.course, name).append(row)
        if self.live is not None:
            with (self.live / f"{name}.csv").open("a", encoding="utf-8", newline="") as handle:
                csv.writer(handle).writerow(row)

    def _rewrite_live(self) -> None:
        """Bring the live metrics to the state of the checkpoint."""
        if self.live is None:
            return
        for name, columns in (("train", TRAIN_COLUMNS), ("dev", DEV_COLUMNS)):
            write_table(self.live / f"{name}.csv", columns, getattr(self.course, name))

    def _checkpoint(self) -> None:
        """Write all that the next step depends on, then drop what it replaces."""
        course = self.course
        tensors = {f"value/{name}": value for name, value in self._values().items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = torch.as_tensor(value)
        tensors["rng"] = torch.get_rng_state()
        target = self.folder / f"checkpoint-{course.step}"
        with replacing(target) as temporary:
            temporary.mkdir()
            save_tensors(temporary / "state.safetensors", tensors, {})
            write_json(temporary / "course.json", asdict(course))
            files = [temporary / "state.safetensors", self._best_file(course.best_step)]
            sums = {file.name: _sum(file) for file in files if file.exists()}
            write_json(temporary / "sums.json", sums)
        for old in self.folder.glob("checkpoint-*"):
            if old != target:
                shutil.rmtree(old)
        for old in self.folder.glob("best-*.safetensors"):
            if old != self._best_file(course.best_step):
                old.unlink()

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint; a damaged one is told and left out."""
        found = sorted(self.folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        for folder in reversed(found):
            try:
                tensors, _ = load_tensors(folder / "state.safetensors", "")
                saved = Course(**read_json(folder / "course.json"))
                # Bits may turn, and pages be lost with the power, in files of the right form.
                places = {"state.safetensors": folder}
                whole = all(
                    _sum(places.get(name, self.folder) / name) == total
                    for name, total in read_json(folder / "sums.json").items()
                )
            except (NeftError, OSError, TypeError):
                whole = False
            if not whole:
                print(f"{self.label}: {folder.name} is damaged; left out", flush=True)
                continue
            self.course = saved
            for rows in (saved.train, saved.dev):
                rows[:] = [tuple(row) for row in rows]
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(tensors[f"value/{name}"])
                    # AdamW's own names; it keeps the step count on the CPU.
                    self.optimizer.state[parameter] = {
                        "step": tensors[f"step/{name}"],
                        "exp_avg": tensors[f"exp_avg/{name}"].to(parameter.device),
                        "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(parameter.device),
                    }
            torch.set_rng_state(tensors["rng"])
            print(f"{self.label}: goes on after step {saved.step}", flush=True)
            return

    def _restore(self, file: Path) -> None:
        tensors, _ = load_tensors(file, "train the run again")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[name])


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


def digest(arrays: Arrays) -> str:
    """SHA-256 of an encoded split."""
    whole = hashlib.sha256()
    for name in ("tokens", "trained", "offsets"):
        whole.update(np.ascontiguousarray(arrays[name]).tobytes())
    return whole.hexdigest()


def fingerprint(*parts: Any) -> str:
    """A short hash of everything that a training's course depends on: names its checkpoints."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
