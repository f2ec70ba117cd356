"""What can be known of a frozen linear layer, also where its weight is packed or sharded.

Shapes: k neurons with D weights each; weights are logical [out, in].
"""

from collections import Counter
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from neft_core.errors import NeftError
from neft_core.groups import ROWS

UNKNOWN = -1
"""Index of a neuron that is not loaded yet."""


class Stacked:
    """A 3-D parameter of experts, seen as the weight of one linear layer.

    Its matrices follow each other along the neurons' axis; stored as [E, out, in], or [E, in, out]
    where `transposed`.
    """

    bias = None

    def __init__(self, experts: nn.Module, name: str, axis: int) -> None:
        self.experts, self.name, self.axis = experts, name, axis
        self.transposed = bool(getattr(experts, "is_transposed", False))

    @property
    def weight(self) -> Tensor:
        """The parameter as it is stored."""
        weight: Tensor = getattr(self.experts, self.name)
        return weight

    @weight.setter
    def weight(self, parameter: nn.Parameter) -> None:
        setattr(self.experts, self.name, parameter)

    @property
    def out_features(self) -> int:
        """Rows of the logical weight."""
        count, out, _ = matrix(self).shape
        return count * out if self.axis == ROWS else out

    @property
    def in_features(self) -> int:
        """Columns of the logical weight."""
        count, _, inside = matrix(self).shape
        return inside if self.axis == ROWS else count * inside

    def parameters(self) -> list[Tensor]:
        """As a module's."""
        return [self.weight]

    def buffers(self) -> list[Tensor]:
        """As a module's."""
        return []


def is_conv1d(layer: Any) -> bool:
    """Whether a layer stores its weight as [in, out], as GPT-2's do."""
    return type(layer).__name__ == "Conv1D"


def is_transposed(layer: Any) -> bool:
    """Whether a layer stores its weight, or each expert's, as [in, out]."""
    return layer.transposed if isinstance(layer, Stacked) else is_conv1d(layer)


def is_plain(layer: Any) -> bool:
    """Whether a layer is a linear map by a stored matrix of floating point, and nothing else."""
    weight: Any = getattr(layer, "weight", None)
    known = is_conv1d(layer) or isinstance(layer, Stacked)
    computes = known or type(layer).forward is nn.Linear.forward
    stored = is_parameter(weight) or type(weight) is Tensor or isinstance(weight, DTensor)
    return bool(computes and stored and weight.is_floating_point() and weight.element_size() > 1)


def is_parameter(weight: Any) -> bool:
    """Whether a weight is a parameter of an ordinary tensor, or stands for one in a forecast."""
    return isinstance(weight, nn.Parameter) and type(weight) in (nn.Parameter, FakeTensor)


def memory(parameter: Any) -> Hashable:
    """Equal for parameters in the same memory, as far as one can see."""
    address = parameter.data_ptr() if type(parameter) is nn.Parameter else 0
    return (parameter.device, address) if address else id(parameter)


def in_several_places(model: nn.Module) -> set[Hashable]:
    """Memory of weights that several places of a model have; a layer may stand in two places."""
    places = [
        child
        for parent in model.modules()
        for child in parent._modules.values()
        if child is not None
    ]
    counts = Counter(
        memory(parameter)
        for module in (model, *places)
        for parameter in module.parameters(recurse=False)
    )
    return {place for place, count in counts.items() if count > 1}


def is_watched(layer: Any) -> bool:
    """Whether somebody hooks into the layer's own call, which has to happen then."""
    if isinstance(layer, Stacked):
        return is_watched(layer.experts)
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)


def matrix(layer: Any) -> Tensor:
    """The stored weight as [out, in], that of experts as [E, out, in]."""
    weight: Tensor = layer.weight
    if isinstance(layer, Stacked):
        return weight.transpose(1, 2) if layer.transposed else weight
    return weight.t() if is_conv1d(layer) else weight


def readable(layer: Any) -> Tensor | None:
    """The weight as [out, in] where its numbers are what they stand for, else None.

    Raises:
        NeftError: it is sharded at this moment.
    """
    if not is_plain(layer):
        return None
    if isinstance(layer.weight, DTensor):
        raise NeftError(
            f"{type(layer).__name__}: its weight is sharded; call the model, whose fully_shard "
            "gathers it (tensor parallelism isn't supported)"
        )
    return matrix(layer)


def size(layer: Any) -> tuple[int, int]:
    """The weight's size, [out, in], also where it is packed."""
    if hasattr(layer, "out_features"):
        return int(layer.out_features), int(layer.in_features)
    out, inside = matrix(layer).shape
    return out, inside


def place(layer: Any) -> tuple[torch.device, torch.dtype]:
    """Device and precision of the layer's computation."""
    tensors = [*layer.parameters(), *layer.buffers()]
    floats = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    dtype = getattr(layer, "compute_dtype", None)
    return tensors[0].device, dtype or (floats[0] if floats else torch.float32)


def has_content(tensor: Tensor) -> bool:
    """Whether a tensor has values: on `meta` and in a forecast it has a shape alone."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def check_indices(adapter: str, indices: Tensor, limit: int) -> None:
    """Refuse indices, [k], that were never loaded or are not increasing in [0, limit).

    Raises:
        NeftError: they are refused.
    """
    if not len(indices) or not has_content(indices):
        return
    if bool((indices == UNKNOWN).any()):
        raise NeftError(
            f"adapter '{adapter}': its neurons aren't loaded; load its weights, or give "
            "NeftConfig a mask"
        )
    if bool((indices.diff() <= 0).any()) or bool(indices[0] < 0) or bool(indices[-1] >= limit):
        raise NeftError(
            f"adapter '{adapter}': its indices are not increasing in [0, {limit}); "
            "it is damaged or of another model"
        )


def check_loaded(adapter: str, values: Tensor, device: torch.device) -> None:
    """Refuse neurons, [k, D], that an adapter's file should have brought to a device and did not.

    Raises:
        NeftError: they are refused.
    """
    if has_content(values):
        absent = len(values) > 0 and bool(values.isnan().all())
    else:
        absent = values.device != device
    if absent:
        raise NeftError(
            f"adapter '{adapter}': its neurons have no values; its file is incomplete or damaged"
        )


def check_trainable(layer: Any, x: Tensor, output: Tensor, values: Tensor) -> None:
    """Refuse to train over a quantised layer where that would go wrong unseen.

    Args:
        layer: the base.
        x: its input, [..., in].
        output: what it answers, [..., out].
        values: the neurons that are trained, [k, D].

    Raises:
        NeftError: it passes no gradient on, or the neurons are in a low precision.
    """
    if x.requires_grad and not output.requires_grad:
        raise NeftError(
            f"{type(layer).__name__}: as it is quantised, no gradient goes through it, and what is "
            "before it would not train; quantise weights alone, not what comes in"
        )
    if values.requires_grad and values.element_size() < torch.float32.itemsize:
        raise NeftError(
            f"trained neurons: they were cast to {str(values.dtype).removeprefix('torch.')}, where "
            "small steps are lost, as TRL does over bitsandbytes; before training set the .data of "
            "each trained parameter to .data.float()"
        )


@torch.inference_mode(False)  # what is found trains others later
@torch.no_grad()
def probe(
    layer: nn.Module,
    indices: Tensor,
    axis: int,
) -> Tensor:
    """Neurons of a weight that can't be read: what the layer answers to unit vectors, [k, D].

    Exact wherever the layer computes with the numbers that its weight stands for.

    Args:
        layer: computes a linear map.
        indices: rows or columns, [k].
        axis: 0 for rows, 1 for columns.
    """
    (out, inside), (device, dtype) = size(layer), place(layer)
    bias = getattr(layer, "bias", None)
    chosen = torch.arange(inside, device=device) if axis == ROWS else indices
    answers = [torch.zeros(0, len(indices) if axis == ROWS else out, dtype=dtype, device=device)]
    mode = layer.training
    try:
        # The same answer whoever asks when: in evaluation bitsandbytes rounds more, and packs anew.
        layer.train()
        kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
        with torch.autocast(kind, enabled=False):
            for some in chosen.split(256):
                units = torch.zeros(len(some), inside, dtype=dtype, device=device)
                units[torch.arange(len(some), device=device), some] = 1
                answer = layer(units)
                if bias is not None:
                    answer = answer - layer(torch.zeros_like(units[:1]))
                answers.append(answer[:, indices] if axis == ROWS else answer)
    finally:
        layer.train(mode)
    found = torch.cat(answers)
    return (found.t() if axis == ROWS else found).contiguous()
