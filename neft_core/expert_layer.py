"""The layer of method `neft` for the experts of a mixture: 3-D parameters with trained neurons.

Each parameter of the experts module is to PEFT a layer of its own, under the parameter's name, with
values, indices, merging and unmerging as a linear layer has them. The forward pass is computed
here, since the module's own would form gradients of whole parameters; without trained neurons, or
with merged ones, the module computes itself.

Shapes: T tokens, c experts for each, E experts. Weights are logical [E, out, in].
"""

from collections.abc import Collection, Hashable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neft_core import frozen
from neft_core.errors import NeftError
from neft_core.groups import write_neurons
from neft_core.layer import NeftLinear
from neft_core.sparse_experts import ExpertsLinear, Route, experts_forward, precision

if TYPE_CHECKING:
    from neft_core.tuner import NeftConfig


class ExpertWeight(NeftLinear):
    """One 3-D parameter of experts, of which selected neurons are trained; arguments as there."""

    def forward(self, *_args: Any, **_options: Any) -> Tensor:
        """Not by itself."""
        raise RuntimeError("experts compute together: call their module")

    def ready(self) -> bool:
        """Bring the weight up to date; whether neurons are to be trained or seen in it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        self.refresh()
        return bool(self._wanted()) and not self.merged

    def mapped(self, x: Tensor, route: Route, gather: bool) -> Tensor:
        """Each expert's linear map of its tokens: see `ExpertsLinear`."""
        weight, names = frozen.matrix(self.base_layer), self._wanted()
        values, indices = (None, None) if self.merged or not names else self._combined(names)
        output: Tensor = ExpertsLinear.apply(
            x, values, weight, indices, self.axis, route, gather, self.overlay, self.in_place
        )
        return output

    @property
    def parameter(self) -> str:
        """The parameter has this layer's name."""
        return ""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter changes the stored parameter by: zero but for its neurons."""
        values, indices = self.neft_values[adapter].detach(), self.neft_indices[adapter]
        part = values - self._held(adapter, indices).to(values.dtype)
        self.settle()
        change = torch.zeros_like(self.base_layer.weight, dtype=values.dtype)
        write_neurons(change, part, indices, self.axis, self.base_layer.transposed)
        return change


class NeftExperts(nn.Module):
    """A frozen experts module with trained neurons; its children are named as its parameters.

    Args:
        experts: a module of transformers that its `use_experts_implementation` has marked.
    """

    base_layer: Any

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer = experts
        self.train(experts.training)
        self.register_state_dict_pre_hook(_settle)
        self.register_load_state_dict_pre_hook(_settle)

    @property
    def weights(self) -> dict[str, ExpertWeight]:
        """The parameters with trained neurons, by name."""
        return {n: part for n, part in self.named_children() if isinstance(part, ExpertWeight)}

    @torch.compiler.disable(reason="experts with trained neurons compute outside of the graph")  # type: ignore[misc]
    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Tokens [T, H], experts of each and their shares [T, c], to [T, H]."""
        weights = self.weights
        ready = [part.ready() for part in weights.values()]
        if not any(ready):
            plain: Tensor = self.base_layer(hidden, chosen, shares)
            return plain
        experts = self.base_layer
        if frozen.is_watched(experts):
            raise NeftError(
                f"{type(experts).__name__}: its call is hooked into, which trained neurons "
                "of experts can't take part in; don't offload it"
            )

        def linear(name: str, x: Tensor, route: Route, gather: bool) -> Tensor:
            weight = getattr(experts, name)
            x = x.to(precision(experts, x, weight))
            # What autocast does has been done.
            with torch.autocast(x.device.type, enabled=False):
                if name in weights:
                    return weights[name].mapped(x, route, gather)
                weight = weight.transpose(1, 2) if experts.is_transposed else weight
                output: Tensor = ExpertsLinear.apply(
                    x, None, weight, None, 0, route, gather, None, True
                )
                return output

        return experts_forward(experts, hidden, chosen, shares, linear)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of every module. The base's parameters come before their adapters, who settle late."""
        if not torch.compiler.is_compiling():
            _settle(self)
        yield from super().named_modules(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> "NeftExperts":
        """Move or cast with the base's own bits in the weights."""
        for part in self.weights.values():
            part.lift()
        super()._apply(fn, recurse)
        return self


def _settle(module: NeftExperts, *_args: Any) -> None:
    """Give the parameters their own bits, as before a state dict is read or loaded."""
    for part in module.weights.values():
        part.settle()


def add_to_experts(
    experts: NeftExperts,
    config: "NeftConfig",
    adapter: str,
    key: str,
    shared: Collection[Hashable],
    active: bool,
) -> None:
    """Trained neurons for the parameters of an experts module that have none so far.

    Args:
        experts: the layer around the module.
        config: which neurons.
        adapter: name of the first adapter.
        key: name of the module in its model.
        shared: memory of parameters that several modules have.
        active: the adapter trains.
    """
    for own, name in config.stacked(key).items():
        if own in experts.weights:
            continue
        entry, base = config.modules[name], experts.base_layer
        layer = ExpertWeight(
            frozen.Stacked(base, own, entry["axis"]),
            adapter,
            entry["axis"],
            entry["count"],
            config.indices(name),
            form=config.form,
            shared=frozen.memory(getattr(base, own)) in shared,
            inference_mode=config.inference_mode,
        )
        if not active:
            layer.requires_grad_(False)
        experts.add_module(own, layer.train(experts.training))


def check_experts(config: "NeftConfig", name: str, module: Any, own: str) -> int:
    """Refuse a module of experts whose parameter `own` can't hold the neurons, by name.

    Returns:
        how many rows or columns its matrices have together.

    Raises:
        NeftError: it is refused.
    """
    experts = module.base_layer if isinstance(module, NeftExperts) else module
    weight = getattr(experts, own, None)
    if not isinstance(weight, Tensor) or not hasattr(experts, "is_transposed"):
        raise NeftError(
            f"{config.source}: {name}: {type(experts).__name__} computes in its own way; "
            "experts that transformers marks by use_experts_implementation are needed, and where "
            "they are quantised, a model loaded with dequantize=True"
        )
    entry, group, shape = config.modules[name], config.group(name), tuple(weight.shape)
    part = frozen.Stacked(experts, own, entry["axis"])
    if not frozen.is_plain(part):
        raise NeftError(
            f"{config.source}: {name} is a quantised {type(weight).__name__} of {weight.dtype} in "
            "this model; load it with dequantize=True, or use a copy in bf16"
        )
    logical = frozen.size(part) if len(shape) == 3 else (0, 0)
    size = logical[entry["axis"]]
    fits = (
        len(shape) == 3
        and entry["transposed"] == part.transposed
        and entry["experts"] == shape[0]
        and entry["length"] == logical[1 - entry["axis"]]
        and size == entry.get("size", size)
        and (group is None or group.fits(shape))
    )
    if not fits:
        raise NeftError(
            f"{config.source}: {name} has shape {shape} and {weight.dtype} in this model; "
            "use the mask's own model"
        )
    return size
