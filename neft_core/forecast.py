"""Forecasts for one model: what a training, an answer or a score needs, from shapes alone."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch

from neft_core import models, simulation
from neft_core.activations import add_batch
from neft_core.gradients import pass_scores, passes
from neft_core.masks import NeuronMask, NeuronScores
from neft_core.methods import METHODS
from neft_core.neurons import candidates, layer_of
from neft_core.optimizers import adamw
from neft_core.patterns import Patterns, scorable
from neft_core.probing import sentence_states
from neft_core.selection import select_neurons
from neft_core.simulation import Batch, Step
from neft_core.tracker import Tracker, Work
from neft_core.warmups import MODULES, STATES, Warmup


@dataclass(frozen=True)
class Subject:
    """The model that forecasts are for, and its numbers.

    Attributes:
        config: of transformers.
        dtype: of frozen weights.
        autocast: of mixed precision; None without.
        gpu: it computes on a GPU.
        trust_remote_code: its own Python code may run.
    """

    config: Any
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    gpu: bool = False
    trust_remote_code: bool = False

    @property
    def model_type(self) -> str:
        """The architecture's name."""
        return str(self.config.model_type)

    def model(self) -> Any:
        """A new skeleton of it."""
        return models.skeleton(self.config, self.dtype, trust_remote_code=self.trust_remote_code)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored shape of every weight by name, a tied one under both names."""
        return {name: tuple(tensor.shape) for name, tensor in self.model().state_dict().items()}

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.model().parameters())

    def one_layer(self) -> "Subject":
        """The same model with one layer and few words."""
        small = copy.deepcopy(self.config)
        small.update({"num_hidden_layers": 1, "vocab_size": 512})
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(small, key, None)
        if getattr(small, "layer_types", None):
            small.layer_types = small.layer_types[:1]
        return replace(self, config=small)

    def mask(self, layout: str | Patterns, budgets: Sequence[Mapping[str, Any]]) -> NeuronMask:
        """As many neurons as budgets buy together; which ones isn't known yet, so any."""
        groups = {g.module: g for g in candidates(self.shapes, self.model_type, layout)}
        flat = {name: torch.zeros(g.count, dtype=torch.float64) for name, g in groups.items()}
        scores = NeuronScores(flat, groups, self.parameters, {"layout": str(layout)})
        masks = [select_neurons(scores, "random", **budget) for budget in budgets]
        if len(masks) == 1:
            return masks[0]
        every = sum(group.count for group in groups.values())
        together = min(every, sum(mask.neurons for mask in masks))
        return select_neurons(scores, "random", neurons=together)


@dataclass(frozen=True)
class Training:
    """A training that is to be forecast.

    Attributes:
        method: a key of `METHODS`; of a warm-up `full`.
        batch: its micro-batch.
        options: the method's keys in params.yaml.
        layout: whose neurons are candidates.
        checkpointing: activations are computed twice.
        accumulation: micro-batches in a step.
        dev: the batch of a dev loss, where it has one.
        warmup: the way to warm up, where it is one.
        max_grad_norm: what the gradient's norm is clipped to.
    """

    method: str
    batch: Batch
    options: Mapping[str, Any] = field(default_factory=dict)
    layout: str | Patterns = "mlp"
    checkpointing: bool = False
    accumulation: int = 1
    dev: Batch | None = None
    warmup: Warmup | None = None
    max_grad_norm: float = 1.0

    def smaller(self) -> "Training":
        """The same steps, one row at a time."""
        rows = self.batch.rows
        return replace(
            self,
            batch=replace(self.batch, rows=1),
            accumulation=rows * self.accumulation,
            dev=self.dev and replace(self.dev, rows=2),
        )


@dataclass(frozen=True)
class Need:
    """What a training needs.

    Attributes:
        step: its bytes and work by part.
        peak: the most that the device holds, of a step or a dev loss.
        host: the most that main memory holds, before and after it.
        kept: bytes of what it leaves behind, for each seed: an adapter, or a tuned model.
        checkpoint: bytes on disk while it trains: the new checkpoint, and the best values, beside
            the old.
        selected: neurons, with method `neft`.
    """

    step: Step
    peak: int
    host: int
    kept: int
    checkpoint: int
    selected: int = 0


def prepared(subject: Subject, training: Training) -> tuple[Any, NeuronMask | None]:
    """A skeleton with only what trains requiring a gradient, and the mask that it has.

    Raises:
        NeftError: the budget doesn't fit the model, or the warm-up doesn't.
    """
    way, mask = training.warmup, None
    if way is not None:
        return MODULES[way.modules].prepare(subject.model(), way, subject.model_type), None
    if training.method == "neft":
        mask = subject.mask(training.layout, training.options.get("parts") or [training.options])
    method = METHODS[training.method]
    return method.prepare(subject.model(), training.options, mask, subject.model_type), mask


def forecast(subject: Subject, training: Training) -> Need:
    """What a training needs.

    Raises:
        NeftError: the budget doesn't fit the model, or the warm-up doesn't.
    """
    model, mask = prepared(subject, training)
    way = training.warmup or Warmup()
    step = simulation.simulate_step(
        model,
        training.batch,
        autocast=subject.autocast,
        checkpointing=training.checkpointing,
        optimizer=partial(STATES[way.states], lr=1e-4),
        accumulating=training.accumulation > 1,
        in_backward=training.max_grad_norm if way.update == "in_backward" else None,
        dev=training.dev,
    )
    selected = mask.neurons if mask else 0
    kept = step.trained + 8 * selected  # and where each neuron is
    finish = 0
    if training.warmup is not None:
        kept, finish = finished(subject, training)
    best = step.trained if training.dev else 0
    peak, host = step.peak, max(step.frozen + step.trained, finish)
    if not subject.gpu:
        peak = host = max(peak, finish + step.states)
    return Need(
        step=step,
        peak=peak,
        host=host,
        kept=kept,
        checkpoint=2 * (step.trained + best + step.states),
        selected=selected,
    )


def finished(subject: Subject, training: Training) -> tuple[int, int]:
    """Bytes of a warm-up's tuned model on disk, and the most that memory holds to write it."""
    assert training.warmup is not None
    model, scored = prepared(subject, training)[0], set(scorable(subject.shapes))
    with Tracker() as tracker:
        tracker.hold([*model.parameters(), *model.buffers()])
        tuned = MODULES[training.warmup.modules].finish(model, scored).state_dict()
        # As `models.save_checkpoint` writes it.
        written = {n: t if n in scored else t.to(subject.dtype) for n, t in tuned.items()}
    once = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in written.values()}
    return sum(once.values()), tracker.peak


def measure(subject: Subject, training: Training, device: str) -> float:
    """Seconds of a real step with random weights; for models that are small."""
    model = models.skeleton(subject.config, subject.dtype, device=device)
    model = METHODS[training.method].prepare(model, training.options, None, subject.model_type)
    model.train()
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.zeros(training.batch.rows, training.batch.tokens, dtype=torch.int64, device=device)
    least = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        with torch.autocast(device, dtype=subject.autocast, enabled=subject.autocast is not None):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - begun)
    return least


def generation(
    subject: Subject, training: Training | None, rows: int, prompt: int, new: int
) -> tuple[int, int, Work, Work]:
    """As `simulate_generation`, with a trained (or the plain) model."""
    model = prepared(subject, training)[0] if training else subject.model()
    return simulation.simulate_generation(model, rows, prompt, new, autocast=subject.autocast)


def likelihood(
    subject: Subject, training: Training | None, rows: int, tokens: int, answer: int
) -> tuple[int, int, Work]:
    """As `simulate_pass`, of `evaluation.log_likelihoods`.

    Args:
        subject: the base.
        training: of the model, where it isn't the plain one.
        rows: at once.
        tokens: of the longest row.
        answer: positions whose logits are kept.
    """
    model = prepared(subject, training)[0] if training else subject.model()

    def run(model: Any) -> None:
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        kept = torch.arange(tokens - answer, tokens)
        logits = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=kept
        ).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
        torch.nn.functional.cross_entropy(logits, ids[:, :answer], reduction="none")

    with torch.no_grad():
        return simulation.simulate_pass(model, run, autocast=subject.autocast)


def gradients(
    subject: Subject, batch: Batch, layout: str | Patterns, memory: float
) -> tuple[int, int, Work]:
    """As `simulate_pass`, of `gradient_scores`; the work is of a micro-batch in all passes.

    The first pass keeps most for backward, as its modules are the model's first; another may have
    the largest sums. Of two micro-batches the second finds sums that the first made.

    Args:
        subject: the base.
        batch: a micro-batch.
        layout: whose neurons are candidates.
        memory: bytes that the sums may take.
    """
    kind = subject.model_type
    parts = passes(candidates(subject.shapes, kind, layout), memory)
    largest = max(parts, key=lambda part: sum(group.count * group.length for group in part))
    found = []
    for part in parts[:1] if largest is parts[0] else (parts[0], largest):

        def run(model: Any, part: Any = part) -> None:
            losses = ((simulation.loss_of(model, batch, None, [])[0], 1) for _ in range(2))
            pass_scores(model, part, losses, relative=False, kind=kind)

        found.append(simulation.simulate_pass(subject.model(), run))
    weights, _, work = found[0]
    return weights, max(peak for _, peak, _ in found), work * (len(parts) / 2)


def states(
    subject: Subject, rows: int, tokens: int, layout: str | Patterns
) -> tuple[int, int, Work, int]:
    """As `simulate_pass`, of `probing.sentence_states`, and the bytes of what it returns."""
    model = subject.model()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    groups = candidates(shapes, subject.model_type, layout)
    layers = list(dict.fromkeys(layer_of(group.module) for group in groups))

    kept = 0

    def run(model: Any) -> None:
        nonlocal kept
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kept = sentence_states(model, layers, [batch]).nbytes

    return *simulation.simulate_pass(model, run), kept


def activations(
    subject: Subject, rows: int, tokens: int, layout: str | Patterns
) -> tuple[int, int, Work]:
    """As `simulate_pass`, of `activation_scores`: both models, in fp32."""
    exact = replace(subject, dtype=torch.float32, autocast=None)
    groups = candidates(exact.shapes, exact.model_type, layout)

    def run(pair: Any) -> None:
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        every = torch.zeros(rows * tokens, dtype=torch.int64)
        sums = {g.module: torch.zeros(3, g.count, dtype=torch.float64) for g in groups}
        add_batch((pair[0], pair[1]), groups, inputs, (every, every), sums)

    with torch.no_grad():
        return simulation.simulate_pass(torch.nn.ModuleList([exact.model(), exact.model()]), run)
