"""What a training's steps are made of: rows dealt out ahead, batches, losses, learning rates.

Rows are planned ahead: a step is a list of micro-batches of row numbers, fixed by the seed. So a
training resumes at any step with nothing but its tensors, and splitting a step into micro-batches
changes no row of it. The loss of a step is the mean over its trained tokens.

Shapes: B rows of a micro-batch, T tokens of its longest row.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Arrays = Mapping[str, np.ndarray]
"""An encoded split: `tokens` int32 and `trained` uint8 [sum of T], `offsets` int64 [rows + 1]."""


@dataclass(frozen=True)
class Recipe:
    """Everything that a training's course depends on, besides model and data."""

    lr: float
    """Peak learning rate."""
    steps: int
    """Optimiser steps in all."""
    batch_size: int
    """Rows in a micro-batch."""
    seed: int
    """Seed of the order of rows and of dropout."""
    accumulation: int = 1
    """Micro-batches in a step."""
    lr_warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    max_grad_norm: float = 1.0
    """Norm that the gradient of what trains is clipped to; infinite: none."""
    weight_decay: float = 0.0
    """Decoupled decay towards zero of what trains."""
    evaluate_every: int = 0
    """Steps between dev losses; 0: after each epoch."""
    patience: int = 0
    """Dev losses without improvement before training stops; 0: never."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""


def plan_steps(lengths: np.ndarray, recipe: Recipe) -> Iterator[list[np.ndarray]]:
    """The row numbers of each step, endlessly: epoch after epoch, each newly shuffled.

    Rows of similar length share a step, so that little is padded: each epoch is shuffled, sorted
    by length within windows of 32 steps, and the steps are shuffled again. A step's rows, longest
    first, are dealt out to its micro-batches.

    Args:
        lengths: tokens of each row, [rows].
        recipe: batch size, accumulation and seed are used.
    """
    size = recipe.batch_size * recipe.accumulation
    epoch = 0
    while True:
        rng = np.random.default_rng([recipe.seed, epoch])
        order = rng.permutation(len(lengths))
        window = 32 * size
        steps = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(-lengths[part], kind="stable")]
            steps += [part[i : i + size] for i in range(0, len(part), size)]
        for chosen in rng.permutation(len(steps)):
            rows = steps[chosen]
            yield [rows[i : i + recipe.batch_size] for i in range(0, len(rows), recipe.batch_size)]
        epoch += 1


def steps_in_epoch(rows: int, recipe_batch: int, accumulation: int) -> int:
    """Optimiser steps of one pass over the rows."""
    return math.ceil(rows / (recipe_batch * accumulation))


def collate(arrays: Arrays, rows: Sequence[int] | np.ndarray, pad: int) -> dict[str, Tensor]:
    """Rows as one padded micro-batch.

    Returns:
        `input_ids` and `attention_mask` int64 [B, T]; `labels` int64 [B, T], -100 where no loss.
    """
    offsets = arrays["offsets"]
    longest = max(int(offsets[r + 1] - offsets[r]) for r in rows)
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    attention = np.zeros_like(ids)
    labels = np.full_like(ids, -100)
    for i, row in enumerate(rows):
        part = slice(int(offsets[row]), int(offsets[row + 1]))
        length = part.stop - part.start
        ids[i, :length] = arrays["tokens"][part]
        attention[i, :length] = 1
        labels[i, :length] = np.where(arrays["trained"][part] > 0, ids[i, :length], -100)
    batch = {"input_ids": ids, "attention_mask": attention, "labels": labels}
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def trained_tokens(arrays: Arrays, rows: np.ndarray) -> int:
    """Tokens with a loss in these rows; the first token of a row has none."""
    offsets = arrays["offsets"]
    return sum(int((arrays["trained"][offsets[r] + 1 : offsets[r + 1]] > 0).sum()) for r in rows)


def deal(micro_batches: list[np.ndarray], rank: int, processes: int) -> list[np.ndarray]:
    """One process's micro-batches of a step: as many as every other's, some perhaps empty.

    The rows of all processes are those of the step, and no micro-batch has more than planned.
    """
    if processes == 1:
        return micro_batches
    rows = np.concatenate(micro_batches)
    share = math.ceil(len(rows) / processes)
    return np.array_split(rows[rank::processes], math.ceil(share / len(micro_batches[0])))


def collate_share(
    arrays: Arrays, share: np.ndarray, rows: np.ndarray, pad: int
) -> dict[str, Tensor]:
    """A dealt micro-batch; where it is empty, the step's shortest row without a loss."""
    if len(share):
        return collate(arrays, share, pad)
    batch = collate(arrays, rows[-1:], pad)
    batch["labels"].fill_(-100)
    return batch


def loss_sum(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Summed cross-entropy over a micro-batch's trained tokens, and their number.

    Only their logits are turned to fp32 (fp64 stays): one pass over [trained tokens, vocabulary].
    """
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    targets = batch["labels"][:, 1:]
    chosen = targets != -100
    logits = output.logits[:, :-1][chosen]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = nn.functional.cross_entropy(logits, targets[chosen], reduction="sum")
    return total, int(chosen.sum())


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """While it lasts, models are in evaluation mode; whatever ends it, they go back to theirs."""
    before = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


@torch.no_grad()
def split_loss(
    model: nn.Module,
    arrays: Arrays,
    batch_size: int,
    pad: int,
    device: Any,
    rank: int = 0,
    processes: int = 1,
) -> tuple[float, int]:
    """Summed cross-entropy over the trained tokens of a process's share, and their number.

    Batches are dealt out whole. Sharded models want every process to compute as many, so one that
    is short of a batch computes the first once more, for nothing.
    """
    order = np.argsort(-np.diff(arrays["offsets"]), kind="stable")
    starts = range(0, len(order), batch_size)
    total, count = 0.0, 0
    with evaluating(model):
        for number in range(rank, processes * math.ceil(len(starts) / processes), processes):
            mine = number < len(starts)
            start = starts[number] if mine else 0
            batch = collate(arrays, order[start : start + batch_size], pad)
            loss, tokens = loss_sum(model, {k: v.to(device) for k, v in batch.items()})
            if mine:
                total, count = total + loss.item(), count + tokens
    return total, count


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of a step (the first is 0): linear rise, then linear decay to zero."""
    if step < recipe.lr_warmup:
        return recipe.lr * (step + 1) / recipe.lr_warmup
    return recipe.lr * (recipe.steps - step) / max(1, recipe.steps - recipe.lr_warmup)


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
