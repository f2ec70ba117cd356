"""A training step without its memory: which bytes it would hold, and what it would compute.

The step runs on fake tensors, which have shapes and no content, so what it keeps for backward and
what it holds at its peak come out of the model's own code, for any family and method, in about a
second for a model of 7B. A fake tensor is of the CPU here, whatever device the step is for: the
kernels differ, the tensors between them hardly.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neft_core.again import as_it_is
from neft_core.optimizers import InBackward, per_parameter
from neft_core.tracker import Tracker, Work


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        rows: B.
        tokens: T, of the longest row.
        trained: tokens that have a loss; None: all but each row's first.
        padded: rows differ in length, so attention needs a mask.
    """

    rows: int
    tokens: int
    trained: int | None = None
    padded: bool = True

    @property
    def labels(self) -> int:
        """Tokens that have a loss."""
        return self.rows * (self.tokens - 1) if self.trained is None else self.trained


@dataclass(frozen=True)
class Step:
    """Bytes of a training step by part, its peak, and its work.

    Attributes:
        parameters: how many train.
        frozen: weights that don't train, and the model's buffers.
        trained: what trains.
        gradients: theirs.
        states: the optimiser's.
        activations: what the forward pass keeps for the backward pass, weights apart.
        peak: the most that is held at once; less than the sum of the parts where gradients come
            as activations go, more where an operation needs memory of its own.
        pass_: forward and backward of one micro-batch.
        update: the optimiser's step.
    """

    parameters: int
    frozen: int
    trained: int
    gradients: int
    states: int
    activations: int
    peak: int
    pass_: Work
    update: Work

    @property
    def parts(self) -> int:
        """Sum of the parts."""
        return self.frozen + self.trained + self.gradients + self.states + self.activations


@contextmanager
def fake(model: nn.Module) -> Iterator[Tracker]:
    """Give a model on the meta device fake tensors of the CPU, for good.

    Yields:
        A tracker that holds the model's tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    made: dict[int, Tensor] = {}

    def like(tensor: Tensor) -> Tensor:
        # A tied parameter stays one.
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty
        return made[id(tensor)]

    tracker = Tracker()
    places = list(_places(model))
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        # Layers that look whether their weights moved ask for addresses.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        for store, name, tensor in places:
            store[name] = like(tensor)
        with tracker:
            tracker.hold(made.values())
            # Layers that look after a weight meet the new one, as when a state dict was assigned.
            model.load_state_dict({}, strict=False)
            yield tracker


def _places(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where a model's tensors are kept: parameters, buffers, and plain attributes."""
    for module in model.modules():
        kept = vars(module)
        stores = [kept, *(value for value in kept.values() if type(value) is dict)]
        for store in stores:
            for name, value in store.items():
                if isinstance(value, Tensor):
                    yield store, name, value


Optimizer = Callable[[Any], torch.optim.Optimizer]
"""Makes an optimiser of parameters, or of groups of them."""


def simulate_step(
    model: Any,
    batch: Batch,
    *,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    optimizer: Optimizer,
    accumulating: bool = False,
    in_backward: float | None = None,
    dev: Batch | None = None,
) -> Step:
    """A training step of `training.Trainer`, and a dev loss.

    Args:
        model: prepared, on the meta device, with only what trains requiring a gradient; it is
            spent afterwards.
        batch: its micro-batch.
        autocast: the type of mixed precision.
        checkpointing: compute activations twice instead of keeping them.
        optimizer: made of what trains.
        accumulating: gradients of an earlier micro-batch wait.
        in_backward: where `InBackward` updates, the norm to which it clips.
        dev: the batch of a dev loss, where there is one.
    """
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    _make_tables(optimizer)
    with fake(model) as tracker:
        everything = {id(t): t for _, _, t in _places(model)}.values()
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = _bytes(trained)
        # A forward pass first: layers may make something then that is there while a step begins.
        model.eval()
        with torch.no_grad():
            loss_of(model, dev or Batch(1, 2), autocast, [])
        loss_peak = tracker.peak
        model.train()
        alone = in_backward is not None
        groups = per_parameter(trained) if alone else trained
        made: Any = _OneOfEachShape(optimizer(groups), tracker)
        # The first step makes the states that every later one begins with.
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        before, work = tracker.live, tracker.work
        if not alone:
            nn.utils.clip_grad_norm_(trained, 1.0)
        made.step()
        states = tracker.live - before
        update = _since(tracker, work)
        tallest = 0 if alone else tracker.peak
        gradients = max(map(_size, trained), default=0) if alone else weights
        if alone or not accumulating:
            for parameter in trained:
                parameter.grad = None
        tracker.peak, work = tracker.live, tracker.work
        kept = 0

        def backward() -> float:
            nonlocal kept
            loss, kept = loss_of(model, batch, autocast, everything)
            loss.backward()
            return 0.0

        if in_backward is None:
            backward()
            pass_ = _since(tracker, work)
        else:
            InBackward(made, in_backward).step(backward)
            pass_ = _since(tracker, work) + update * -1
        for parameter in trained:
            parameter.grad = None
        return Step(
            parameters=sum(p.numel() for p in trained),
            frozen=tracker.live - weights - states,
            trained=weights,
            gradients=gradients,
            states=states,
            activations=kept,
            peak=max(tallest, tracker.peak, loss_peak + states),
            pass_=pass_,
            update=update,
        )


def _make_tables(optimizer: Optimizer) -> None:
    """Let an optimiser make now what it keeps for all of its kind: with content."""
    parameter = nn.Parameter(torch.zeros(128, 128))
    parameter.grad = torch.zeros_like(parameter)
    optimizer([parameter]).step()


class _OneOfEachShape:
    """An optimiser that steps each parameter by itself: one stands for all of its shape."""

    def __init__(self, optimizer: torch.optim.Optimizer, tracker: Tracker) -> None:
        self.optimizer, self.tracker = optimizer, tracker
        self.param_groups = optimizer.param_groups
        # For each shape: a parameter, its update's work, and the bytes that it needs meanwhile.
        self.stepped: dict[torch.Size, tuple[nn.Parameter, Work, int]] = {}

    def step(self) -> None:
        """One update of all that have a gradient."""
        state, tracker, most = self.optimizer.state, self.tracker, 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.shape not in self.stepped:
                    self.stepped[parameter.shape] = parameter, *self._step(group, parameter)
                else:
                    like, work, _ = self.stepped[parameter.shape]
                    before = tracker.work
                    if parameter not in state:
                        state[parameter] = {name: t.clone() for name, t in state[like].items()}
                    tracker.work = before + work
                most = max(most, self.stepped[parameter.shape][2])
        # Beside all states, which the first step makes one after the other.
        tracker.peak = max(tracker.peak, tracker.live + most)

    def _step(self, group: dict[str, Any], parameter: nn.Parameter) -> tuple[Work, int]:
        tracker = self.tracker
        work, peak, tracker.peak = tracker.work, tracker.peak, tracker.live
        self.optimizer.param_groups = [{**group, "params": [parameter]}]
        self.optimizer.step()
        meanwhile = tracker.peak - tracker.live
        tracker.peak = max(peak, tracker.peak)
        return _since(tracker, work), meanwhile


def simulate_pass(
    model: Any, run: Callable[[Any], Any], *, autocast: torch.dtype | None = None
) -> tuple[int, int, Work]:
    """Bytes of the model and at the peak of what is done with it, and its work.

    Args:
        model: a prepared or plain model on the meta device; it is spent afterwards.
        run: what is done with it.
        autocast: the type of mixed precision.
    """
    model.eval()
    with fake(model) as tracker, _autocast(autocast):
        weights = tracker.live
        run(model)
        return weights, tracker.peak, tracker.work


def simulate_generation(
    model: Any, rows: int, prompt: int, new: int, *, autocast: torch.dtype | None = None
) -> tuple[int, int, Work, Work]:
    """Bytes of the model and at the peak of generating with a cache, and works of two passes.

    One pass reads the prompts, the other makes the last token, behind a cache of all before it.

    Args:
        model: see `simulate_pass`.
        rows: generated at once.
        prompt: tokens of the longest prompt.
        new: of the longest continuation.
        autocast: the type of mixed precision.
    """
    model.eval()
    with fake(model) as tracker, torch.no_grad(), _autocast(autocast):
        weights = tracker.live
        ids, mask = torch.zeros(2, rows, prompt + new, dtype=torch.int64)

        def read(first: int, last: int, cache: Any = None) -> tuple[Any, Work]:
            before, given = tracker.work, {"past_key_values": cache} if first else {}
            given |= {"input_ids": ids[:, first:last], "attention_mask": mask[:, :last]}
            said = model(use_cache=True, logits_to_keep=1, **given)
            return said.past_key_values, _since(tracker, before)

        reading, highest = read(0, prompt)[1], tracker.peak
        last = max(prompt, prompt + new - 2)
        cache, _ = read(0, last)
        tracker.peak = tracker.live
        _, token = read(last, last + 1, cache)
        return weights, max(highest, tracker.peak), reading, token


def loss_of(
    model: Any, batch: Batch, autocast: torch.dtype | None, weights: Iterable[Tensor]
) -> tuple[Tensor, int]:
    """The loss as `steps.loss_sum` forms it, and the bytes that it keeps besides weights."""
    own = {tensor.untyped_storage()._cdata for tensor in weights}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids = torch.zeros(batch.rows, batch.tokens, dtype=torch.int64)
    mask = torch.ones_like(ids) if batch.padded else None
    with torch.autograd.graph.saved_tensors_hooks(pack, as_it_is):
        with _autocast(autocast):
            logits = model(input_ids=ids, attention_mask=mask).logits
        if autocast is not None:
            logits = logits.float()  # as Accelerate does
        # Which tokens have a loss depends on content; how many doesn't.
        targets = torch.zeros(batch.labels, dtype=torch.int64)
        chosen = logits[:, :-1][targets, targets].float()
        loss = nn.functional.cross_entropy(chosen, targets, reduction="sum")
    activations = _bytes(tensor for key, tensor in kept.items() if key not in own)
    kept.clear()  # backward frees what it has used
    return loss, activations


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(map(_size, tensors))


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _since(tracker: Tracker, earlier: Work) -> Work:
    return tracker.work + earlier * -1
