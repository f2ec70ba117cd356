"""Counting what runs: the bytes of living tensors, and the work of each operation.

It sees real tensors and fake ones alike.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Work:
    """What is computed.

    Attributes:
        flops: multiplications and additions of matrix products and attention.
        moved: bytes that all other operations read and write.
        calls: operations.
    """

    flops: int = 0
    moved: int = 0
    calls: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.moved + other.moved, self.calls + other.calls)

    def __mul__(self, times: float) -> "Work":
        return Work(*(round(times * n) for n in (self.flops, self.moved, self.calls)))


class Tracker(TorchDispatchMode):
    """Counts the bytes of living tensors and the work of what runs inside it.

    Attributes:
        live: bytes of all tensors that were made or `hold` inside, each storage once.
        peak: the highest `live` so far.
        work: of all operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.work = Work()
        self._known: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made outside."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known[key] = weakref.ref(storage, partial(self._drop, key, size))
                self.live += size
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int, _gone: Any) -> None:
        del self._known[key]
        self.live -= size

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it made."""
        out = _run(func, args, kwargs or {})
        made = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        self.hold(made)
        self.work += _work(func, args, kwargs or {}, out, made)
        return out


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation; the shape function of grouped products (experts) knows bfloat16 alone."""
    dtype = args[0].dtype if args and isinstance(args[0], Tensor) else None
    if func is torch.ops.aten._grouped_mm.default and dtype != torch.bfloat16:
        return func(*(a.bfloat16() for a in args[:2]), *args[2:], **kwargs).to(dtype)
    return func(*args, **kwargs)


_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def _work(func: Any, args: Any, kwargs: Any, out: Any, made: list[Tensor]) -> Work:
    """Of one operation; a view costs nothing."""
    packet = func._overloadpacket
    if packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
        return Work(flops=int(flops), calls=1)
    if packet._qualified_op_name.removeprefix("aten::").startswith(_ATTENTION):
        backward = "backward" in packet._qualified_op_name
        query, key = args[1:3] if backward else args[:2]
        product = 2 * query.numel() * key.shape[-2]
        # Two products forward; five backward, one of them the scores again.
        return Work(flops=product * (5 if backward else 2), calls=1)
    if func is torch.ops.aten._grouped_mm.default:
        return Work(flops=2 * args[0].numel() * args[1].shape[-1], calls=1)
    if func.is_view or not made:
        return Work()
    leaves = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    return Work(moved=sum(t.numel() * t.element_size() for t in (*leaves, *made)), calls=1)
