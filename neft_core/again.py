"""Tensors that a backward pass needs and need not keep: products of what the graph keeps anyway.

A neuron's gradient needs the layer's input. In most models that is a product, SiLU(gate) * up or a
norm's weight * (x * scale), of which autograd keeps the factors for its own gradient. So these are
held, which costs no memory, and multiplied again, which gives the same bits; unless something was
changed in place on the way that autograd didn't see, which `Trust` finds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neft_core.frozen import has_content


class Product(NamedTuple):
    """Of two recipes."""

    left: "Recipe"
    right: "Recipe"


class Copy(NamedTuple):
    """In another precision, or on another device."""

    dtype: torch.dtype
    device: torch.device
    of: "Recipe"


Recipe = int | Product | Copy
"""How to form a tensor; a number stands for the factor at that place."""


class Trust:
    """Which recipes give the very tensor; each is tried at its first, second, fourth, eighth use.

    Autograd sees neither what changes in place by `.data` nor, of a product inside another, what
    changes by `detach()` or under `no_grad`. Such a recipe isn't used any more. It may be idle at
    first, as one that cuts off what is too large: so trying goes on, ever more rarely.
    """

    def __init__(self) -> None:
        self._uses: dict[Recipe, int] = {}
        self._broken: set[Recipe] = set()

    def deserves(self, recipe: Recipe, kept: Sequence[Tensor], x: Tensor) -> bool:
        """Whether `x` is formed of `kept` in this way; what has no content is believed."""
        if recipe in self._broken:
            return False
        if not has_content(x) or not x.numel():
            return True
        uses = self._uses[recipe] = self._uses.get(recipe, 0) + 1
        if uses & (uses - 1):
            return True
        same = torch.equal(formed(kept, recipe), x)
        if not same and bool(torch.isfinite(x).all()):  # NaN is never the same
            self._broken.add(recipe)
        return same


def as_it_is(tensor: Tensor) -> Tensor:
    """What autograd's hooks on saved tensors give back, if they only count what is saved."""
    return tensor


def factors(x: Tensor, trust: Trust) -> tuple[list[Tensor], Recipe | None]:
    """What the graph keeps of which `x` is formed; `x` itself, without a recipe, where nothing."""
    found: list[Tensor] = []
    # What was done to it in place, unseen by autograd, is in no recipe.
    if x.is_inference() or x._version or x.shape[-1] < 2:
        return [x], None
    recipe = _recipe(x.grad_fn, found)
    if recipe is None or not trust.deserves(recipe, found, x):
        return [x], None
    return found, recipe


def formed(kept: Sequence[Tensor], recipe: Recipe | None, indices: Tensor | None = None) -> Tensor:
    """The tensor of which `kept` are the factors, or its entries `indices` along the last axis.

    Without a recipe it is what was kept in place of the tensor, or of those entries.
    """
    if recipe is None:
        return kept[0]
    if isinstance(recipe, Product):
        return formed(kept, recipe.left, indices) * formed(kept, recipe.right, indices)
    if isinstance(recipe, Copy):
        return formed(kept, recipe.of, indices).to(recipe.device, recipe.dtype)
    factor = kept[recipe]
    if indices is None or not factor.dim() or factor.shape[-1] == 1:
        return factor
    return picked(factor, indices)


def picked(x: Tensor, indices: Tensor) -> Tensor:
    """The entries `indices` of the last axis, [..., k]; of [..., n]."""
    if x.dim() < 3:
        return x.index_select(-1, indices)
    # On a CPU torch takes ten to twenty times as long with more than two axes.
    found: Tensor = x.flatten(0, -2).index_select(1, indices).unflatten(0, x.shape[:-1])
    return found


def _recipe(node: Any, found: list[Tensor]) -> Recipe | None:
    """How a node of the graph formed its output; the factors are added to `found`."""
    kind = "" if node is None else node.name()
    if kind == "ToCopyBackward0":
        made, of = node._input_metadata[0], _recipe(node.next_functions[0][0], found)
        return None if of is None else Copy(made.dtype, made.device, of)
    if kind != "MulBackward0":
        return None
    (before, _), (other, _) = node.next_functions
    left = _factor(node, "self", before, found)
    right = None if left is None else _factor(node, "other", other, found)
    return None if left is None or right is None else Product(left, right)


def _factor(node: Any, which: str, before: Any, found: list[Tensor]) -> Recipe | None:
    """A factor that a node saved, or that the node `before` formed."""
    saved = getattr(node, f"_raw_saved_{which}")
    if saved.data is None:
        return _recipe(before, found)
    # What lies behind hooks, such as those of checkpointing, only they can read.
    if saved.unpack_hook not in (None, as_it_is):
        return None
    try:
        found.append(getattr(node, f"_saved_{which}"))
    except RuntimeError:  # it was changed in place since, or is freed
        return None
    return len(found) - 1
