"""The layer of method `neft`: a linear layer with adapters, each of them a set of trained neurons.

An adapter is `neft_values`, the neurons themselves, fp32 (fp64 in a model of fp64), and
`neft_indices`, which neurons of the weight they are. The neurons of the active adapter stand in the
base layer's weight while it computes. Every other reader finds the base's own bits there: state
dicts, `parameters()`, `unload`, a disabled adapter, a move to another device or precision.

Where several adapters are active (or merged), their changes add up: a neuron of both moves by the
sum of both changes. The bias is nobody's: it stays as it is.

Shapes: k neurons of an adapter with D weights each; weights are logical [out, in].
"""

import warnings
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from neft_core import frozen
from neft_core.errors import NeftError
from neft_core.groups import read_neurons, write_neurons
from neft_core.overlay import Overlay, stamp
from neft_core.registration import register_with_peft
from neft_core.sparse import corrected, trained_linear


class NeftLayer(BaseTunerLayer):  # type: ignore[misc]
    """What every layer with trained neurons is to PEFT."""

    adapter_layer_names = ("neft_values",)
    other_param_names = ("neft_indices",)

    @abstractmethod
    def refresh(self, force: bool = False) -> None:
        """Write what the forward pass will use: the active or merged adapters, or nothing."""

    @abstractmethod
    def settle(self) -> None:
        """Give the weight its own bits, or those of the merged adapters."""

    @abstractmethod
    def check_merge(self, names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refuse what `merge` would, before anything has changed; None: the active adapters."""

    @abstractmethod
    def changes(self, names: list[str] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The base's neurons and the trained ones in their place."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:  # noqa: ARG002
        """No: whole rows and columns have no low rank."""
        return False


class NeftLinear(nn.Module, NeftLayer):
    """A frozen linear layer with trained neurons.

    Attributes:
        in_place: whether the neurons stand in the weight; otherwise the output is corrected.

    Args:
        base_layer: `nn.Linear`, GPT-2's `Conv1D`, or any layer that computes a linear map.
        adapter_name: the first adapter.
        axis: 0 where neurons are rows, 1 for columns.
        count: number of neurons.
        indices: which rows or columns; None: they are loaded later.
        form: `auto`, `in_place` or `additive`.
        shared: another module has the same weight, so it can't be written.
        inference_mode: the adapter doesn't train.
    """

    base_layer: Any
    neft_values: Any
    neft_indices: Any
    # Of PEFT, which has no types: else nn.Module's `__getattr__` speaks for them.
    active_adapters: Any
    get_base_layer: Any
    set_adapter: Any

    def __init__(
        self,
        base_layer: nn.Module | frozen.Stacked,
        adapter_name: str,
        axis: int,
        count: int,
        indices: Tensor | None = None,
        form: str = "auto",
        shared: bool = False,
        inference_mode: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = frozen.size(base_layer)
        self.axis, self.form, self.shared = axis, form, shared
        self.neft_values = nn.ParameterDict({})
        self.neft_indices = BufferDict({}, persistent=True)
        self.overlay = Overlay(axis)
        self.in_place = False
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: Any = adapter_name
        self._written: tuple[Any, ...] = ()
        self._known: dict[str, tuple[object, ...]] = {}
        self._awaited: set[str] = set()
        self._probed: dict[str, tuple[tuple[object, ...], Tensor]] = {}
        # In a list, or it would be a parameter of this module too.
        self._tied: list[nn.Parameter] = []
        self._own: weakref.ref[Tensor] | None = None
        self.register_state_dict_pre_hook(_settle)
        self.register_load_state_dict_pre_hook(_settle)
        self.register_load_state_dict_post_hook(_adopt)
        self._adopt()
        self.update_layer(adapter_name, count, indices, inference_mode)

    def update_layer(
        self, adapter_name: str, count: int, indices: Tensor | None, inference_mode: bool = False
    ) -> None:
        """Add an adapter, or one of this name in the place of the old; it changes nothing yet."""
        self.settle()
        # Its tensors may come to lie where those of one that was deleted did.
        self._known.pop(adapter_name, None)
        (self._awaited.discard if indices is not None else self._awaited.add)(adapter_name)
        self._probed.clear()
        device, dtype = frozen.place(self.base_layer)
        if indices is None:
            length = frozen.size(self.base_layer)[1 - self.axis]
            indices = torch.full((count,), frozen.UNKNOWN, device=device)
            values = torch.full((count, length), torch.nan, dtype=dtype, device=device)
        else:
            indices = indices.to(device, copy=True)
            values = self._held(adapter_name, indices)
        precision = torch.promote_types(values.dtype, torch.float32)
        self.neft_values[adapter_name] = nn.Parameter(values.to(precision, copy=True))
        self.neft_indices[adapter_name] = indices
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] to [..., out], with every optimiser step so far applied."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not torch.compiler.is_compiling():
            self.refresh()
        names = self._wanted()
        if self.merged or not names:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        if not self.in_place:
            return self._additive(x, names, *args, **kwargs)
        weight, kind = frozen.matrix(self.base_layer), x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        elif x.dtype != weight.dtype:
            raise RuntimeError(f"input is {x.dtype}, the layer's weight {weight.dtype}")
        values, indices = self._combined(names)
        return trained_linear(x, values, weight, self.base_layer.bias, indices, self.overlay)

    def refresh(self, force: bool = False) -> None:
        """Write what the forward pass will use; does nothing where that stands there already."""
        names = self._wanted()
        for name in names:
            self._check_known(name)
        base = self.base_layer
        self.in_place = self._owns() and (bool(self.merged) or not frozen.is_watched(base))
        if not (self.in_place and names):
            self.lift()
            return
        parts = [d[name] for name in names for d in (self.neft_values, self.neft_indices)]
        force = force or self.overlay.stale
        # Torch doesn't see `values.data.copy_`, by which averages of weights come for an evaluation
        # and go after it: so what was written for the one doesn't stand for the other.
        here = (names, torch.is_grad_enabled())
        if force or self._written != (*here, *stamp(base.weight, *parts)):
            self.overlay.write(frozen.matrix(base), *self._combined(names), self._trains(names))
            self._written = (*here, *stamp(base.weight, *parts))

    def _trains(self, names: Sequence[str]) -> bool:
        """Whether nobody but an optimiser and this layer is concerned with what is written."""
        if self.merged or len(names) > 1:
            return False
        trained = self.neft_values[names[0]].requires_grad
        return trained and (torch.is_grad_enabled() or self.overlay.aside)

    def settle(self) -> None:
        """Give the weight its own bits, or those of the merged adapters."""
        if self.merged:
            self.refresh()
        else:
            self.lift()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the weight for good, in its precision; `unmerge` restores each bit.

        Raises:
            ValueError: with `safe_merge`, an adapter holds a value that isn't finite.
            NeftError: the weight can't be written, because it is quantised or sharded.
        """
        self.check_merge(adapter_names, safe_merge)
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.neft_values]
        if names and self.shared and not self._tied:
            # The other module that has this weight must not change with it.
            self._tied = [self.base_layer.weight]
            own = self.base_layer.weight.detach().clone()
            self.base_layer.weight = nn.Parameter(own, requires_grad=False)
        self.merged_adapters.extend(names)
        if names:
            self._adopt()
        self.settle()

    def check_merge(self, names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refuse what `merge` would, before anything has changed; None: the active adapters.

        Raises:
            ValueError: as `merge`.
            NeftError: as `merge`.
        """
        chosen = set(self.active_adapters if names is None else names) & set(self.neft_values)
        for name in sorted(chosen - set(self.merged_adapters)):
            self._check_known(name)
            values = self.neft_values[name].to(frozen.place(self.base_layer)[1])
            if safe_merge and not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
        if chosen and frozen.readable(self.base_layer) is None:
            raise NeftError(
                f"{type(self.base_layer).__name__}: a quantised weight can't take merged neurons; "
                "save the adapter, load it over the base in bf16 or fp32 and merge there"
            )

    def unmerge(self) -> None:
        """Give the weight its own bits again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        self.settle()
        if self._tied:
            self.base_layer.weight = self._tied.pop()
        self._adopt()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter changes the stored weight by: zero but for its neurons."""
        values, indices = self.neft_values[adapter].detach(), self.neft_indices[adapter]
        part = values - self._held(adapter, indices).to(values.dtype)
        self.settle()
        change = torch.zeros(frozen.size(self.base_layer), dtype=values.dtype, device=values.device)
        write_neurons(change, part, indices, self.axis)
        return change.t() if frozen.is_conv1d(self.base_layer) else change

    def changes(self, names: list[str] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """What the base has in the place of the neurons, and they themselves, both [k, D].

        Args:
            names: which adapters; None: those that the forward pass uses.
        """
        chosen = self._wanted() if names is None else [n for n in names if n in self.neft_values]
        for name in chosen:
            self._check_known(name)
        if chosen:
            values, indices = self._combined(chosen)
            yield self._held("+".join(chosen), indices), values.detach()

    def mark(self, flags: Tensor) -> int:
        """Set the flags of trained weights, in a tensor of the stored weight's shape; how many."""
        names = self._wanted()
        if not names:
            return 0
        values, indices = self._combined(names)
        on = torch.ones(values.shape, dtype=torch.bool)
        transposed = frozen.is_transposed(self.base_layer)
        write_neurons(flags, on, indices.to(flags.device), self.axis, transposed)
        return values.numel()

    @property
    def parameter(self) -> str:
        """The weight's name, after this layer's."""
        return ".weight"

    def _wanted(self) -> tuple[str, ...]:
        """The adapters that the forward pass uses."""
        if self.merged:
            return tuple(self.merged_adapters)
        if self.disable_adapters:
            return ()
        return tuple(name for name in self.active_adapters if name in self.neft_values)

    def _combined(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Values and indices of one adapter, or those of several with their changes added up."""
        if len(names) == 1:
            return self.neft_values[names[0]], self.neft_indices[names[0]]
        sets = [self.neft_indices[name] for name in names]
        union = torch.cat(sets).unique()
        held = self._held("+".join(names), union)
        total = held.to(self.neft_values[names[0]].dtype)
        for name, indices in zip(names, sets, strict=True):
            places = torch.searchsorted(union, indices)
            change = self.neft_values[name] - held.to(total.dtype)[places]
            total = total.index_add(0, places, change.to(total.dtype))
        return total, union

    def _additive(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.base_layer(x, *args, **kwargs)
        values, indices = self._combined(names)
        if values.is_meta and not output.is_meta:
            raise NeftError(
                "trained neurons: they were offloaded with their layer, and nothing brings them "
                "back; keep that layer on a device, or merge_and_unload before offloading"
            )
        weight = frozen.readable(self.base_layer)
        if weight is None and torch.is_grad_enabled():
            frozen.check_trainable(self.base_layer, x, output, values)
        held = self._held("+".join(names), indices) if weight is None else weight
        return corrected(output, x, values, held, indices, self.axis, weight is not None)

    def _held(self, key: str, indices: Tensor) -> Tensor:
        """What the base has in the place of neurons, [k, D]; `key` tells sets of them apart."""
        replaced = self.overlay.held(indices)
        if replaced is not None:
            return replaced
        self.lift()
        weight = frozen.readable(self.base_layer)
        if weight is not None:
            return read_neurons(weight, indices, self.axis)
        known = self._probed.get(key)
        if known is None or known[0] != stamp(indices):
            rows = frozen.probe(self.base_layer, indices, self.axis)
            known = self._probed[key] = (stamp(indices), rows)
        return known[1]

    def lift(self) -> None:
        """Give the weight its own bits; the next forward pass writes again."""
        self._written = ()
        if self.overlay.present:
            if not self._owns():
                raise NeftError(
                    f"{type(self.base_layer).__name__}: its weight was replaced while trained "
                    "neurons stood in it; call the model's state_dict() before sharding it"
                )
            self.overlay.lift(frozen.matrix(self.base_layer))

    def _owns(self) -> bool:
        """Whether the weight is still the one that may be written.

        A sharded weight is another tensor in each forward pass, and changes to it are lost; one in
        memory that other processes have too would change for them.
        """
        weight = None if self._own is None else self._own()
        if weight is None or weight is not self.base_layer.weight:
            return False
        return self.overlay.present or weight.is_cuda or not weight.is_shared()

    def _adopt(self) -> None:
        """Remember the weight, where neurons may be written into it."""
        base = self.base_layer
        writable = self.merged or not (self.form == "additive" or self.shared)
        plain = frozen.is_plain(base) and frozen.is_parameter(base.weight)
        # Only a part of the weight is here where DeepSpeed partitions it.
        plain = plain and not hasattr(base.weight, "ds_id")
        self._own = weakref.ref(base.weight) if writable and plain else None

    def _check_known(self, name: str) -> None:
        """Refuse indices that were never loaded, or are not those of this weight."""
        indices = self.neft_indices[name]
        now = stamp(indices)
        if self._known.get(name) == now:
            return
        frozen.check_indices(name, indices, frozen.size(self.base_layer)[self.axis])
        if name in self._awaited:
            device, _ = frozen.place(self.base_layer)
            frozen.check_loaded(name, self.neft_values[name], device)
            self._awaited.discard(name)
        self._known[name] = now

    def _apply(self, fn: Any, recurse: bool = True) -> "NeftLinear":
        """Move or cast with the base's own bits in the weight."""
        self.lift()
        self.overlay.forget()
        self._probed.clear()
        self._own = None  # what is watched can't be swapped for another tensor
        before = {name: values.data for name, values in self.neft_values.items()}
        super()._apply(fn, recurse)
        for name, values in before.items():
            _keep_precise(self.neft_values[name], values)
        self._adopt()
        self.settle()
        return self

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of every module. Who walks through a model's parameters finds the base's own bits."""
        # The compiler walks too, between what is written and the forward pass that needs it.
        if not torch.compiler.is_compiling():
            self.settle()
        yield from super().named_modules(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the base's own bits, unless it is merged: it may be of the same memory."""
        self.settle()
        anew: dict[str, Any] = {"_own": None, "_written": (), "_known": {}, "_probed": {}}
        return self.__dict__ | anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt()

    def __repr__(self) -> str:
        return "neft." + super().__repr__()


def _keep_precise(parameter: nn.Parameter, before: Tensor) -> None:
    """Undo the cast of values that train to less than fp32, in which small steps are lost."""
    if parameter.requires_grad and parameter.dtype.itemsize < 4 <= before.dtype.itemsize:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = before.to(parameter.device, torch.float32)
        parameter.grad = None if gradient is None else gradient.float()


def _settle(layer: NeftLinear, *_args: Any) -> None:
    """Before a state dict is read or loaded."""
    layer.settle()


def _adopt(layer: NeftLinear, _keys: Any) -> None:
    """After a state dict was loaded, whose tensors may have become the parameters."""
    layer._adopt()


# Whoever imports this file first has PEFT imported before the tuner can be.
register_with_peft()
