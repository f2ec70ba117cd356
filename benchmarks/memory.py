"""Where the memory of a training step goes, in bytes, counted by storage and not estimated.

A storage counts once, however many tensors look at it. The parts besides what is kept for backward
outlast a step; the peak is what torch's allocator held at the step's highest point.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from neft_core.again import as_it_is
from neft_core.tuner import neft_layers


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    return sum(
        {
            part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
            for tensor in tensors
            for part in _dense(tensor)
        }.values()
    )


def _dense(tensor: Tensor) -> tuple[Tensor, ...]:
    """What a tensor is stored in; sparse ones are two dense ones."""
    return (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)


def resident(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Bytes that stay between steps, by part.

    Returns:
        `parameters`: all of them, frozen or trained; `buffers`: what else the model holds, such as
        originals, masks and indices; `gradients`: of what trains; `states`: of the optimiser;
        `aside`: originals that were put aside, in a file or in the memory of a GPU's host.
    """
    # Walking by `model.parameters()` would give neurons' weights their own bits again.
    held = reachable(model)
    parameters = [tensor for tensor in held if isinstance(tensor, nn.Parameter)]
    overlays = [layer.overlay for layer in neft_layers(model).values()]
    aside = [overlay.originals for overlay in overlays if overlay.aside]
    states = [] if optimizer is None else list(optimizer.state.values())
    return {
        "parameters": storage_bytes(parameters),
        "buffers": storage_bytes(held) - storage_bytes([*parameters, *aside]),
        "gradients": sum(p.numel() * p.element_size() for p in parameters if p.requires_grad),
        "states": storage_bytes(
            value for state in states for value in state.values() if isinstance(value, Tensor)
        ),
        "aside": storage_bytes(aside),
    }


def reachable(model: nn.Module) -> list[Tensor]:
    """Every tensor that a model holds, however: in buffers, attributes, containers, own objects."""
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, _ELSEWHERE):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
            waiting.append(vars(item))
        else:
            waiting += gc.get_referents(item)
    return found


_ELSEWHERE = (type, ModuleType, FunctionType, BuiltinFunctionType, CodeType)
"""What leads from a model to the whole program."""


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the bytes that a forward pass in this block keeps for the backward pass.

    Weights are not counted, whatever keeps them; copies of weights are.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in reachable(model)}
    # Held until the block ends, so no storage takes the address of one before it.
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in _dense(tensor.detach()):
            address = part.untyped_storage().data_ptr()
            if address not in known:
                kept.setdefault(address, part)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, as_it_is):
        yield lambda: storage_bytes(kept.values())
    kept.clear()


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `step` had allocated above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = highest = 0
    for _, change in changes:
        held += change
        highest = max(highest, held)
    return highest
