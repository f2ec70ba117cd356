"""Which of several processes this one is, and what only one of them may do.

`accelerate launch` starts the processes of a stage and tells each its place by environment
variables; without it there is one process, and nothing here does anything.
"""

import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def launched() -> bool:
    """Whether a launcher started this process, as one of several or alone."""
    return "LOCAL_RANK" in os.environ


def world() -> int:
    """Number of processes that share this stage."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launched() else 1


def rank() -> int:
    """This process among them, from 0."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def local() -> int:
    """This process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def main() -> bool:
    """Whether this process writes files and tells how it goes: one does, the others compute."""
    return rank() == 0


def join(cpu: bool) -> None:
    """Meet the other processes; each takes its own device."""
    if world() > 1:
        from accelerate import PartialState

        apart = os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]
        if apart and (name := _interface(os.environ.get("MASTER_ADDR", ""))):
            # Gloo would tell other machines the address of the host's name, which many systems give
            # the loopback interface.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        PartialState(cpu=cpu)


def _interface(host: str) -> str | None:
    """The name of the network interface by which this machine reaches another, or itself."""
    import psutil

    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            mine = probe.getsockname()[0]
    except OSError:
        return None
    for name, held in psutil.net_if_addrs().items():
        if mine in (one.address.partition("%")[0] for one in held):
            return str(name)
    return None


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, in each of them."""
    if world() == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def wait() -> None:
    """Until every process has come here."""
    gather(None)


def leave() -> None:
    """Part from the other processes, at the end of a stage."""
    if world() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def whole(tensor: "Tensor") -> "Tensor":
    """A tensor of which each process may hold a part, gathered; all have to ask together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_as(value: "Tensor", like: "Tensor") -> "Tensor":
    """A whole tensor, put where another lies and split as that one is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device)
    if isinstance(like, DTensor):
        value = distribute_tensor(value, like.device_mesh, like.placements)
    return value


def skeleton(model: "nn.Module") -> "nn.Module":
    """A copy of a model that has no memory for its parameters and shares its buffers."""
    import copy

    from torch import nn

    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(model, memo)


def fill(bare: "nn.Module", state: "Mapping[str, Tensor]") -> "nn.Module":
    """Give a skeleton its weights; a process that has none leaves it bare."""
    from torch import nn

    if state:
        filled = {
            id(parameter): nn.Parameter(state[name], parameter.requires_grad)
            for name, parameter in bare.named_parameters()
        }
        for module in bare.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = filled[id(parameter)]
    return bare
