"""The training loop, on Accelerate: one for pre-training, warm-up and every method."""

import csv
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neft_core import ranks, sharing
from neft_core.course import (
    DEV_COLUMNS,
    TRAIN_COLUMNS,
    Course,
    best_file,
    keep_only,
    load_checkpoint,
    save_checkpoint,
    write_table,
)
from neft_core.errors import NeftError
from neft_core.files import load_tensors, save_tensors
from neft_core.optimizers import InBackward, adamw, per_parameter
from neft_core.progress import Progress
from neft_core.steps import (
    Arrays,
    Recipe,
    collate_share,
    deal,
    learning_rate,
    loss_sum,
    plan_steps,
    split_loss,
    steps_in_epoch,
    trained_tokens,
)


class Trainer:
    """One training: a prepared model, its rows, and a folder to resume from.

    Args:
        model: only what trains requires a gradient.
        trained: what trains, by name.
        recipe: its course.
        train: rows to train on.
        dev: rows that choose the best checkpoint, or None.
        pad: the padding token.
        folder: checkpoints; an interrupted training goes on from here. Processes share it.
        live: a folder for train.csv and dev.csv, which grow while it trains.
        label: for progress and messages.
        mixed_precision: `no`, `bf16` or `fp16`, as Accelerate has it.
        cpu: stay on the CPU.
        optimizer: called with parameters, `lr` and `weight_decay`.
        in_backward: step each parameter in the backward pass (see `InBackward`).

    Raises:
        NeftError: a way to share, or a number of micro-batches, that these can't take.
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
        optimizer: Callable[..., torch.optim.Optimizer] = adamw,
        in_backward: bool = False,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.recipe, self.train_rows, self.dev_rows = recipe, train, dev
        self.pad, self.folder, self.live, self.label = pad, folder, live, label
        # A step need not reach every parameter (experts); buffers are alike without exchange.
        ddp = DistributedDataParallelKwargs(
            find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no" if sharing.deepspeed(cpu) else mixed_precision,
            kwargs_handlers=[ddp],
        )
        self._deepspeed = self.accelerator.distributed_type == "DEEPSPEED"
        if in_backward and (recipe.accumulation > 1 or self.accelerator.num_processes > 1):
            raise NeftError(
                f"{label}: updates in the backward pass keep no gradient to add to; "
                "use one micro-batch in a step, and one process"
            )
        shared = self.accelerator.distributed_type in ("FSDP", "DEEPSPEED")
        if shared and optimizer is not adamw:
            raise NeftError(f"{label}: its small states need whole parameters; use states: fp32")
        values = list(trained.values())
        made = optimizer(
            per_parameter(values) if in_backward else values,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
        )
        sharing.check(self.accelerator, recipe, label, values, mixed_precision)
        if self._deepspeed:
            sharing.autocast(model, self.accelerator.device, mixed_precision)
        if recipe.gradient_checkpointing:
            # Reentrant checkpointing gives no gradient behind a frozen embedding.
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.raw_model = model
        # Sharding changes a model for good: its bare form is kept aside.
        self._skeleton = ranks.skeleton(model) if self.accelerator.is_fsdp2 else None
        self.model, self.optimizer = self.accelerator.prepare(model, made)
        self.in_backward = InBackward(self.optimizer, recipe.max_grad_norm) if in_backward else None
        # Sharding puts other tensors in the place of those given.
        wrapped = "._checkpoint_wrapped_module"
        now = {name.replace(wrapped, ""): p for name, p in model.named_parameters()}
        self.trained = {name: now[name] for name in trained}
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
            ranks.wait()  # for the main process to have written it
            file = best_file(self.folder, course.best_step)
            self._load(load_tensors(file, "train the run again")[0])
        ranks.wait()  # for all to have read it
        return course

    def release(self) -> Any:
        """The model as it was given, whole, without Accelerate's wrapping; its memory is freed.

        Of a sharded model only the main process gets the weights.
        """
        if self._skeleton is None:
            model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            if self._deepspeed:
                sharing.bare(model)
        else:
            model = ranks.fill(self._skeleton, self.accelerator.get_state_dict(self.model))
        self.accelerator.free_memory()
        return model

    def peak_bytes(self) -> int:
        """Peak memory so far of the process that used most: of its GPU, else its own."""
        if self.accelerator.device.type == "cuda":
            peak = int(torch.cuda.max_memory_allocated())
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak *= 1 if sys.platform == "darwin" else 1024
        return int(max(self._gather(peak)))

    def _step(self, micro_batches: list[np.ndarray]) -> tuple[float, float]:
        """One optimiser step; its loss and the gradient's norm before clipping.

        Each process takes its share of the step's rows. Processes' gradients are averaged, so a
        loss is divided by the tokens of all of them and multiplied by their number.
        """
        accelerator, course = self.accelerator, self.course
        processes, rank = accelerator.num_processes, accelerator.process_index
        if rank:
            # The first process draws one sequence from the seed; the others' depend on the step
            # alone, so that a training resumes with any number of processes.
            seeds = np.random.SeedSequence([self.recipe.seed, course.step, rank])
            torch.manual_seed(int(seeds.generate_state(1)[0]))
        rows = np.concatenate(micro_batches)
        tokens = trained_tokens(self.train_rows, rows)
        shares = deal(micro_batches, rank, processes)
        course.tokens += int(np.diff(self.train_rows["offsets"])[rows].sum())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, course.step)

        def backward() -> float:
            total = 0.0
            for number, share in enumerate(shares, 1):
                last = number == len(shares)
                # Gradients are exchanged once a step.
                with nullcontext() if last else accelerator.no_sync(self.model):
                    batch = collate_share(self.train_rows, share, rows, self.pad)
                    moved = {name: values.to(accelerator.device) for name, values in batch.items()}
                    accelerator.sync_gradients = last  # else DeepSpeed would step after each
                    loss, _ = loss_sum(self.model, moved)
                    if self.in_backward is not None:  # nothing may move after a loss like that
                        self._check_loss(loss.item())
                    accelerator.backward(loss / tokens * processes)
                total += loss.item()
            return total

        if self.in_backward is not None:
            total, norm = self.in_backward.step(backward)
        else:
            total = sum(self._gather(backward()))
            self._check_loss(total)
            norm = accelerator.clip_grad_norm_(self.trained.values(), self.recipe.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return total / tokens, float(ranks.whole(norm))

    def _check_loss(self, total: float) -> None:
        if not math.isfinite(total):
            raise NeftError(
                f"{self.label}: loss is {total} at step {self.course.step + 1}; "
                f"lower the learning rate ({self.recipe.lr:g}) or look at the data"
            )

    def _gather(self, value: float) -> list[float]:
        """A number of every process, by rank."""
        if self.accelerator.num_processes == 1:
            return [value]
        mine = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        values: list[float] = self.accelerator.gather(mine).tolist()
        return values

    def _evaluate(self, epoch: float) -> None:
        """The dev loss, the same number in every process; so all of them decide alike."""
        course, accelerator = self.course, self.accelerator
        assert self.dev_rows is not None
        total, tokens = split_loss(
            self.model,
            self.dev_rows,
            2 * self.recipe.batch_size,
            self.pad,
            accelerator.device,
            accelerator.process_index,
            accelerator.num_processes,
        )
        loss = sum(self._gather(total)) / sum(self._gather(tokens))
        if not math.isfinite(loss):
            raise NeftError(
                f"{self.label}: dev loss is {loss} at step {course.step}; lower the learning rate"
            )
        if course.best_loss is None or loss < course.best_loss:
            course.best_step = course.step
            values = self._values()
            if ranks.main():
                save_tensors(best_file(self.folder, course.step), values, {})
        self._record("dev", (course.step, epoch, loss))
        since = sum(row[0] > course.best_step for row in course.dev)
        course.stopped_early = bool(self.recipe.patience) and since >= self.recipe.patience

    def _values(self) -> dict[str, Tensor]:
        """What trains, unsharded; all processes have to ask together."""
        return {name: ranks.whole(parameter.detach()) for name, parameter in self.trained.items()}

    def _record(self, name: str, row: tuple[float, ...]) -> None:
        getattr(self.course, name).append(row)
        if self.live is not None and ranks.main():
            with (self.live / f"{name}.csv").open("a", encoding="utf-8", newline="") as handle:
                csv.writer(handle).writerow(row)

    def _rewrite_live(self) -> None:
        """Bring the live metrics to the state of the checkpoint."""
        if self.live is None or not ranks.main():
            return
        for name, columns in (("train", TRAIN_COLUMNS), ("dev", DEV_COLUMNS)):
            write_table(self.live / f"{name}.csv", columns, getattr(self.course, name))

    def _checkpoint(self) -> None:
        """Write all that the next step depends on: whole tensors, whatever they are split into."""
        if self._deepspeed:
            if ranks.main():
                keep_only(self.folder, best_file(self.folder, self.course.best_step))
            return  # it keeps its states in flat parts of its own
        tensors = {f"value/{name}": value for name, value in self._values().items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = ranks.whole(torch.as_tensor(value))
        tensors["rng"] = torch.get_rng_state()
        if ranks.main():
            save_checkpoint(self.folder, self.course, tensors)

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint, with any number of processes."""
        if self._deepspeed:
            if ranks.main():  # what another way to share left is not of this training
                keep_only(self.folder)
            return
        found = load_checkpoint(self.folder, self.label)
        steps = ranks.gather(found[0].step if found else 0)
        if len(set(steps)) > 1:
            raise NeftError(
                f"{self.folder}: its checkpoints are after step {steps[0]} to one process and "
                f"{max(steps, key=lambda step: step != steps[0])} to another; share the workspace"
            )
        if found is None:
            return
        self.course, tensors = found
        self._load({name: tensors[f"value/{name}"] for name in self.trained})
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if name and kind != "value":
                parameter = self.trained[name]
                # Fused optimisers keep the step count beside the parameter, others on the CPU.
                home = parameter.device if self.optimizer.defaults.get("fused") else "cpu"
                split = value.to(home) if kind == "step" else ranks.split_as(value, parameter)
                self.optimizer.state[parameter][kind] = split
        torch.set_rng_state(tensors["rng"])
        print(f"{self.label}: goes on after step {self.course.step}", flush=True)

    @torch.no_grad()
    def _load(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(ranks.split_as(values[name], parameter))
