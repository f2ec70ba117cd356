"""Trained neurons in the memory of a frozen weight, and the bits that they replaced.

They stand there in one of two ways. *In place*: the weight holds a copy of the values, each neuron
at its own place. *Packed*, where most neurons of a weight are trained: the weight's memory holds
the values themselves, one after the other, and behind them the other neurons; no copy of either.
The adapter's parameter then is that memory, until the weight gets its own bits back.

Shapes: n neurons along the axis of a weight, k of them trained, D weights each; weights are logical
[out, in], a view where the layer stores [in, out].
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from neft_core.again import Trust
from neft_core.aside import put_aside
from neft_core.groups import read_neurons, write_neurons

PACKED = 0.75
"""Share of a weight's neurons from which on they are packed: without their copy they need, with
gradients and two states, 3k in the place of 4k, and a weight that trains as a whole needs 3n."""


class Pack(NamedTuple):
    """How neurons lie in a packed weight.

    Attributes:
        neurons: all of them, those that train first, [n, D].
        order: which neuron of the weight each of these is, [n].
        place: where each neuron of the weight is among these, [n].
    """

    neurons: Tensor
    order: Tensor
    place: Tensor


def stamp(*tensors: Tensor) -> tuple[object, ...]:
    """Differs after every in-place change or move of one of the tensors that torch knows of.

    Memory is known by a weak reference: an address alone may be another tensor's soon. It means
    nothing in another process, and is never copied.
    """
    return tuple(
        part
        for tensor in tensors
        for part in (
            StorageWeakRef(tensor.untyped_storage()),
            tensor.data_ptr(),
            0 if tensor.is_inference() else tensor._version,
        )
    )


P = ParamSpec("P")


def _lasting(method: Callable[P, None]) -> Callable[P, None]:
    """What a method keeps can be trained with, also where it ran in inference mode."""

    @functools.wraps(method)
    def normal(*args: P.args, **options: P.kwargs) -> None:
        with torch.inference_mode(False), torch.no_grad():
            method(*args, **options)

    return normal


class Overlay:
    """Neurons that stand in a weight in place of its own, and the bits that they replaced.

    While an adapter trains, these bits are needed by nobody, and are put aside; so they are once
    more when two updates come in a row. They come back when the weight gets its own bits.

    Attributes:
        axis: 0 where the neurons are rows, 1 for columns.
        present: they stand there now; otherwise the weight has all of its own bits.
        pack: how they stand there if packed.
        indices: which neurons of the weight they are, [k].
        originals: what the weight has in their place, [k, D].
        aside: those are put aside.
        edition: counts the changes of the weight.
        stale: a gradient was formed, so an optimiser may change the values unseen by torch.
        trust: how the layer's input may be formed again for backward.
    """

    indices: Tensor
    originals: Tensor

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.present = self.aside = self.stale = False
        self.pack: Pack | None = None
        self.edition, self.trust = 0, Trust()
        # No one asked for the weight's own bits since the last update.
        self._calm = True
        self._owner: Tensor | None = None
        self._known: tuple[object, ...] = ()

    @_lasting
    def write(self, weight: Tensor, values: Tensor, indices: Tensor, trains: bool = False) -> None:
        """Put values in the place of the neurons `indices`, and of no others.

        Whatever ends it in the middle, Ctrl-C say, `lift` still gives the weight its own bits.

        Args:
            weight: [out, in].
            values: [k, D].
            indices: rows or columns, [k].
            trains: these are the values that are being trained, and what they replace is needed by
                nobody else until `lift`.
        """
        other = self.pack is not None and not (trains and values is self._owner)
        if self.present and (other or self._known != stamp(indices)):
            self.lift(weight)
        if not self.present:
            # Always anew: torch doesn't see all that others do with the weight in the meantime.
            self.indices, self._known = indices.clone(), ()
            self.originals, self.aside = read_neurons(weight, indices, self.axis), False
            self._known = stamp(indices)
        self._calm |= self.present
        self.present = True
        self.edition += 1
        if trains and self._calm:
            if not self.aside:
                self.originals, self.aside = put_aside(self.originals), True
            if self.pack is None and self._packs(weight, values):
                self._fill(weight, values)
        if self.pack is None:
            write_neurons(weight, values.detach(), indices, self.axis)
        elif values.data_ptr() != self.pack.neurons.data_ptr():
            # Somebody gave the parameter other memory.
            self._take_in(values)
        # The optimiser's step for a gradient that is still there comes after this.
        self.stale = values.is_leaf and values.grad is not None

    @_lasting
    def lift(self, weight: Tensor) -> None:
        """Give the weight all of its own bits again."""
        if not self.present:
            return
        if self.pack is not None and self._owner is not None:
            # Values that have got other memory stay there.
            k = len(self.indices)
            if self._owner.data_ptr() == self.pack.neurons.data_ptr():
                self._owner.data = self.pack.neurons[:k].clone()
            rest, others = self.pack.neurons[k:].clone(), self.pack.order[k:]
            self.pack = self._owner = None
            write_neurons(weight, rest, others, self.axis)
        write_neurons(weight, self.originals, self.indices, self.axis)
        self.present = self._calm = False
        self.edition += 1
        self.forget()

    def held(self, indices: Tensor) -> Tensor | None:
        """The weight's own neurons `indices`, [k, D], where they have been replaced by others."""
        if self.present and torch.equal(self.indices, indices):
            return self.originals.to(indices.device)
        return None

    def forget(self) -> None:
        """Know nothing of the weight, which has its own bits: it may be about to move."""
        self._known, self.aside = (), False
        if hasattr(self, "originals"):
            del self.originals

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": ()}

    def _packs(self, weight: Tensor, values: Tensor) -> bool:
        """Whether the weight's memory can be that of the values, and it is worth while."""
        return (
            weight.dim() == 2
            and isinstance(values, nn.Parameter)
            and (values.dtype, values.device) == (weight.dtype, weight.device)
            and len(values) >= PACKED * weight.shape[self.axis]
            and _flat(weight) is not None
            # Not a part of someone's buffer, who would look for it there.
            and values.untyped_storage().nbytes() == values.nbytes
        )

    def _fill(self, weight: Tensor, values: Tensor) -> None:
        """Pack a weight, and let the values be its memory."""
        n, flat = weight.shape[self.axis], _flat(weight)
        assert flat is not None
        numbers = torch.arange(n, device=weight.device).index_fill(0, self.indices, n)
        others = numbers.sort().values[: n - len(self.indices)]
        rest, order = read_neurons(weight, others, self.axis), torch.cat([self.indices, others])
        neurons, place = flat.view(n, -1), order.argsort()
        behind = neurons[len(values) :]
        # From here to the copy nothing may end it, and nothing takes time.
        self.pack, self._owner = Pack(neurons, order, place), values
        behind.copy_(rest)
        self._take_in(values)

    def _take_in(self, values: Tensor) -> None:
        """Give the parameter the memory of the first neurons, with its own values in it."""
        assert self.pack is not None
        home = self.pack.neurons[: len(values)]
        home.copy_(values.detach())
        values.data = home


def _flat(weight: Tensor) -> Tensor | None:
    """A weight's memory in its order, where it is one piece."""
    stored = weight.detach() if weight.is_contiguous() else weight.detach().t()
    return stored.view(-1) if stored.is_contiguous() else None
