"""The weights of a model by name, whether they are in memory or in a directory."""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neft_core import checkpoints
from neft_core.errors import NeftError

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class InMemory:
    """A model's state dict.

    Attributes:
        where: what messages call the model.
        tensors: the weights by name.
        known: the model's config, {} where there is none.
    """

    where: str
    tensors: Mapping[str, Tensor]
    known: Mapping[str, Any]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The model's config, {} where there is none."""
        return self.known

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The stored shape of each weight."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @cached_property
    def memory(self) -> dict[str, Hashable]:
        """Where weights lie, the same for tied ones, as far as their type tells."""
        plain = {n: t for n, t in self.tensors.items() if type(t) in (Tensor, nn.Parameter)}
        places = {n: (t.device, t.data_ptr(), t.shape) for n, t in plain.items() if not t.is_meta}
        return {name: place for name, place in places.items() if place[1]}

    def place(self, name: str) -> str:  # noqa: ARG002
        """Where a weight is, for messages."""
        return self.where

    @contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Some of the weights.

        Raises:
            NeftError: one has no values here, or is not of floating point.
        """
        yield {name: _checked(self, name, self.tensors[name]) for name in names}


@dataclass(frozen=True)
class OnDisk:
    """A directory in the Hub's layout, with safetensors.

    Attributes:
        directory: where it is.
    """

    directory: Path

    @property
    def where(self) -> str:
        """What messages call the model."""
        return str(self.directory)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The model's `config.json`."""
        return checkpoints.config(self.directory)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The stored shape of each weight."""
        return checkpoints.shapes(self.directory)

    @cached_property
    def memory(self) -> dict[str, Hashable]:
        """Nothing: files don't tell which weights are tied."""
        return {}

    @cached_property
    def _files(self) -> dict[str, Path]:
        return checkpoints.locate(self.directory)

    def place(self, name: str) -> str:
        """Where a weight is, for messages."""
        return str(self._files[name])

    @contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Some of the weights, mapped into memory and not read before they are used.

        Raises:
            NeftError: a file is damaged, or a weight is not of floating point.
        """
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            tensors: dict[str, Tensor] = {}
            for name in names:
                path = self._files[name]
                if path not in files:
                    files[path] = stack.enter_context(checkpoints.opened(path, "pt"))
                tensors[name] = _checked(self, name, files[path].get_tensor(name))
            yield tensors


Weights = InMemory | OnDisk
Model = nn.Module | Mapping[str, Tensor] | str | Path
"""A model, its state dict, or the directory of a checkpoint."""


def weights(model: Model, where: str, config: Any = None) -> Weights:
    """The weights of a model.

    Args:
        model: a model, its state dict, or the directory of a checkpoint.
        where: what messages call a model that is in memory.
        config: of a model that is in memory and has none: an object or a mapping.

    Raises:
        NeftError: `model` is something else.
    """
    if isinstance(model, str | Path):
        return OnDisk(Path(model))
    if isinstance(model, nn.Module):
        return InMemory(where, model.state_dict(), _plain(getattr(model, "config", config)))
    if isinstance(model, Mapping):
        return InMemory(where, model, _plain(config))
    raise NeftError(
        f"{where}: got {type(model).__name__}; give a model, a state dict or the directory of a "
        "checkpoint"
    )


def _plain(config: Any) -> Mapping[str, Any]:
    """A model's config as a mapping."""
    if config is None or isinstance(config, Mapping):
        return config or {}
    found: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return found


def _checked(weights: Weights, name: str, tensor: Tensor) -> Tensor:
    """A weight whose values can be compared."""
    if tensor.is_meta:
        raise NeftError(
            f"{weights.place(name)}: {name} is on the meta device and has no values; load the model"
        )
    if hasattr(tensor, "full_tensor"):
        raise NeftError(
            f"{weights.place(name)}: {name} is sharded over processes; gather the state dict, or "
            "give the directory of a checkpoint"
        )
    if tensor.dtype not in _FLOATS:
        raise NeftError(
            f"{weights.place(name)}: {name} has dtype {str(tensor.dtype).removeprefix('torch.')}; "
            "use a model that is not quantised"
        )
    return tensor.detach()
