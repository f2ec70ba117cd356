"""Warm-ups: which modules train, what the optimiser remembers, and when it steps.

The exact one, all parameters by AdamW after a full backward pass, keeps 16 bytes for each
parameter. Each of three choices makes it smaller, in any combination: `MODULES`, `STATES`, and an
update inside the backward pass. What each costs in fidelity is in docs/results.md.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import nn

from neft_core.errors import NeftError
from neft_core.methods import METHODS, train_only
from neft_core.neurons import candidates
from neft_core.optimizers import BLOCK, SMALL, Adam8bit, Factored, adamw


@dataclass(frozen=True)
class Warmup:
    """One way to warm up; the default is the exact one."""

    modules: str = "all"
    """What trains, a key of `MODULES`."""
    layout: str | None = None
    """Whose modules train with `candidates`, a key of `neurons.LAYOUTS`."""
    rank: int | None = None
    """Rank of `lora`."""
    states: str = "fp32"
    """What the optimiser keeps, a key of `STATES`."""
    update: str = "after_backward"
    """When it steps: `after_backward` or `in_backward`."""


@dataclass(frozen=True)
class Modules:
    """Which modules train.

    Attributes:
        prepare: (model, warm-up, model_type) -> the model, with only what trains, in fp32,
            requiring a gradient.
        finish: (trained model, names of the scored weights) -> the tuned model, plain, with the
            scored weights in fp32 where they changed.
    """

    prepare: Callable[[Any, Warmup, str], Any]
    finish: Callable[[Any, Iterable[str]], Any] = lambda model, _scored: model


def _all(model: Any, _warmup: Warmup, _type: str) -> Any:
    train_only(model, lambda _name: True)
    return model


def _candidates(model: Any, warmup: Warmup, model_type: str) -> Any:
    assert warmup.layout is not None
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = {group.parameter for group in candidates(stored, model_type, warmup.layout)}
    train_only(model, names.__contains__)
    return model


def _lora(model: Any, warmup: Warmup, model_type: str) -> Any:
    if any(parameter.dim() == 3 for parameter in model.parameters()):
        raise NeftError(
            "params.yaml: warmup.modules: got lora, which doesn't reach the experts of this model; "
            "use candidates"
        )
    return METHODS["lora"].prepare(model, {"rank": warmup.rank}, None, model_type)


@torch.no_grad()
def _merged(model: Any, scored: Iterable[str]) -> Any:
    """The factors added to the weights in fp32: a bf16 weight would lose most of them."""
    kept = set(scored)
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            weight = layer.get_base_layer().weight
            merged = weight.float() + layer.get_delta_weight("default").float()
            weight.data = merged if f"{name}.weight" in kept else merged.to(weight.dtype)
    return model.unload()


MODULES: dict[str, Modules] = {
    "all": Modules(_all),
    "candidates": Modules(_candidates),
    "lora": Modules(_lora, _merged),
}
"""What may train, by name."""

STATES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fp32": adamw,
    "8bit": Adam8bit,
    "factored": Factored,
}
"""What the optimiser may keep, by name: called with parameters, `lr` and `weight_decay`."""


def describe(warmup: Warmup) -> str:
    """A warm-up in a few words: `candidates of mlp, states 8bit, update in_backward`."""
    what = {"candidates": f" of {warmup.layout}", "lora": f" of rank {warmup.rank}"}
    train = warmup.modules + what.get(warmup.modules, "")
    return f"{train}, states {warmup.states}, update {warmup.update}"


def memory(shapes: Iterable[tuple[int, ...]], warmup: Warmup) -> dict[str, int]:
    """Bytes of what trains, by part; frozen weights and activations are not in it.

    A prepared model on the meta device gives the shapes without memory (`shapes_of`).

    Args:
        shapes: of each trained parameter.
        warmup: its states and update are used.

    Returns:
        `weights`, the fp32 values that train; `gradients`, the most that are alive at once;
        `states`, of the optimiser.
    """
    sizes = list(shapes)
    values = [prod(shape) for shape in sizes]
    alive = max(values, default=0) if warmup.update == "in_backward" else sum(values)
    per_parameter = {"fp32": _fp32, "8bit": _8bit, "factored": _factored}[warmup.states]
    # Each parameter also counts its steps, in fp32.
    states = sum(per_parameter(shape) + 4 for shape in sizes)
    return {"weights": 4 * sum(values), "gradients": 4 * alive, "states": states}


def _fp32(shape: tuple[int, ...]) -> int:
    return 8 * prod(shape)


def _8bit(shape: tuple[int, ...]) -> int:
    n = prod(shape)
    return 8 * n if n < SMALL else 2 * n + 8 * (n // shape[-1]) * ceil(shape[-1] / BLOCK)


def _factored(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return 4 * prod(shape)
    return 4 * prod(shape[:-2]) * (shape[-2] + shape[-1])


def shapes_of(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of what trains in a prepared model."""
    return [tuple(p.shape) for p in model.parameters() if p.requires_grad]
