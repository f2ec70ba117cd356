"""The method as a PEFT tuner: `get_peft_model(model, NeftConfig(mask="mask.safetensors"))`.

Importing this module registers the type NEFT with PEFT, so that `PeftModel.from_pretrained` and
transformers' `load_adapter` know what lies in an adapter's directory; `registration` imports it as
soon as PEFT is there.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import InitVar, asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import Tensor, nn

from neft_core import frozen
from neft_core.errors import NeftError
from neft_core.expert_layer import NeftExperts, add_to_experts
from neft_core.groups import Group
from neft_core.layer import NeftLayer, NeftLinear
from neft_core.masks import NeuronMask
from neft_core.refusals import check_model, leave_out_whole, trains_whole
from neft_core.rounding import Rounding, Tally

_LOG = logging.getLogger(__name__)

FORMS = ("auto", "in_place", "additive")


@dataclass
class NeftConfig(PeftConfig):  # type: ignore[misc]
    """Which neurons an adapter trains.

    Attributes:
        mask: the selected neurons, or the path of their file; not kept in the adapter's files,
            which hold the indices beside the values.
        modules: per module its `axis` (0 rows, 1 columns), `count` of neurons, their `length` and
            whether the weight is `transposed`, how many `experts` a 3-D parameter has, as the mask
            says; and its `size`, the rows or columns in all, lest a wider model take the adapter.
        provenance: what made the mask, the hash of its base model included.
        form: `in_place` writes the neurons into the base's weight, which costs nothing per token;
            `additive` adds their change to the output; `auto` is in place where that is possible.
        modules_to_save: modules that train as a whole, as in every PEFT config; neurons that the
            mask has there are left out.
    """

    # PEFT would match these by its own rules, and keep a whole head or embedding named here.
    target_modules: ClassVar[None] = None

    mask: InitVar[NeuronMask | str | Path | None] = None
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    form: str = "auto"
    modules_to_save: list[str] | None = None

    def __post_init__(self, mask: Any) -> None:
        super().__post_init__()
        self.peft_type = PeftType.NEFT
        if self.form not in FORMS:
            raise NeftError(f"NeftConfig: form: got {self.form!r}; one of {', '.join(FORMS)}")
        if isinstance(mask, str | Path):
            mask = NeuronMask.load(mask)
        if not isinstance(mask, NeuronMask | None):
            found = type(mask).__name__
            raise NeftError(f"NeftConfig: mask: got {found}; a NeuronMask or its file is needed")
        self._mask = mask
        if mask is None:
            self._check_modules()
        else:
            self.provenance = dict(mask.provenance)
            self.modules = {
                name: {
                    "axis": mask.groups[name].axis,
                    "count": len(indices),
                    "length": mask.groups[name].length,
                    "transposed": mask.groups[name].transposed,
                    "experts": mask.groups[name].experts,
                }
                for name, indices in mask.indices.items()
                if len(indices)
            }

    def _check_modules(self) -> None:
        """Refuse what no version of this package wrote."""
        keys = {"axis", "count", "length", "transposed", "experts"}
        entries = self.modules.values() if isinstance(self.modules, dict) else [None]
        if not all(isinstance(entry, dict) and keys <= entry.keys() for entry in entries):
            raise NeftError(
                f"NeftConfig: modules: each needs {', '.join(sorted(keys))}; "
                "the adapter's configuration is damaged"
            )

    def to_dict(self) -> dict[str, Any]:
        """What `adapter_config.json` holds."""
        return asdict(self)

    @property
    def source(self) -> str:
        """Where the neurons come from, for messages."""
        return "adapter" if self._mask is None else self._mask.source

    def indices(self, name: str) -> Tensor | None:
        """The neurons of one of `modules`, [k]; None where they come with the weights."""
        return None if self._mask is None else self._mask.indices[name]

    def group(self, name: str) -> Group | None:
        """The candidates among which the neurons of a module were selected."""
        return None if self._mask is None else self._mask.groups[name]

    def named(self, module: str) -> str | None:
        """The key of `modules` that means a model's module; a prefix of its name may be missing."""
        if trains_whole(self, module):
            return None
        while module not in self.modules:
            _, dot, module = module.partition(".")
            if not dot:
                return None
        return module

    def stacked(self, module: str) -> dict[str, str]:
        """The keys of `modules` that mean 3-D parameters of a model's module, by their own name."""
        keys = [name for name, entry in self.modules.items() if entry["experts"]]
        owners = {name.rpartition(".")[0] for name in keys}
        while module not in owners:
            _, dot, module = module.partition(".")
            if not dot:
                return {}
        parts = [name.rpartition(".") for name in keys]
        return {end: f"{owner}.{end}" for owner, _, end in parts if owner == module}


class NeftModel(BaseTuner):  # type: ignore[misc]
    """A model with trained neurons, as PEFT builds it."""

    prefix = "neft_"
    tuner_layer_cls = NeftLayer
    target_module_mapping: Mapping[str, list[str]] = {}

    def _prepare_adapter_config(
        self,
        peft_config: NeftConfig,
        model_config: Any,  # noqa: ARG002
    ) -> NeftConfig:
        leave_out_whole(peft_config)
        return peft_config

    def _prepare_model(self, peft_config: NeftConfig, model: nn.Module) -> None:
        """Check every module first, so that a refused mask leaves the model whole."""
        for name, size in check_model(peft_config, model).items():
            peft_config.modules[name]["size"] = size
        self._shared = frozen.in_several_places(model)

    @staticmethod
    def _check_target_module_exists(peft_config: NeftConfig, key: str) -> bool:
        return peft_config.named(key) is not None or bool(peft_config.stacked(key))

    def _create_and_replace(
        self,
        peft_config: NeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002
    ) -> None:
        name = peft_config.named(current_key)
        if name is None:
            experts = target if isinstance(target, NeftExperts) else NeftExperts(target)
            if experts is not target:
                self._replace_module(parent, target_name, experts, target)
            active = adapter_name in self.active_adapters
            add_to_experts(experts, peft_config, adapter_name, current_key, self._shared, active)
            return
        entry, indices = peft_config.modules[name], peft_config.indices(name)
        if isinstance(target, NeftLinear):
            target.update_layer(adapter_name, entry["count"], indices, peft_config.inference_mode)
            return
        layer = NeftLinear(
            target,
            adapter_name,
            entry["axis"],
            entry["count"],
            indices,
            form=peft_config.form,
            shared=frozen.memory(getattr(target, "weight", None)) in self._shared,
            inference_mode=peft_config.inference_mode,
        )
        layer.train(target.training)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, name: str, new: nn.Module, _: nn.Module) -> None:
        """Nothing moves: neurons are made where the base is, or on `meta` until they are loaded."""
        setattr(parent, name, new)

    def _post_injection_hook(
        self,
        model: nn.Module,
        config: NeftConfig,  # noqa: ARG002
        adapter_name: str,  # noqa: ARG002
    ) -> None:
        """Let a compiled model take the neurons over before each forward pass."""
        if _before_forward not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(_before_forward)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:  # noqa: ARG002
        """None: a layer that shares its weight never writes it, and gets its own when merged."""
        return []

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Values are fp32 from the start; without `autocast_adapter_dtype` they get the base's.

        A quantised weight's precision is none to train in: there they stay as they are.
        """
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for layer in neft_layers(self.model).values():
            if adapter_name in layer.neft_values and frozen.is_plain(layer.base_layer):
                values = layer.neft_values[adapter_name]
                layer.neft_values[adapter_name] = nn.Parameter(
                    values.detach().to(layer.weight.dtype), requires_grad=values.requires_grad
                )

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **options: Any) -> Iterator[None]:
        """Refuse what transformers would swallow: the weight holds one set of neurons at a time."""
        if options.get("adapter_names") is not None:
            raise NeftError(
                "adapter_names: trained neurons can't differ within a batch; call the model once "
                "for each adapter, after set_adapter"
            )
        yield

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """As PEFT's, but where one layer refuses, none is merged."""
        for layer in neft_layers(self.model).values():
            layer.check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def add_weighted_adapter(self, *_args: Any, **_options: Any) -> None:
        """Not here: see the message."""
        raise NeftError(
            "add_weighted_adapter: neurons aren't mixed into a new adapter; activate several with "
            "base_model.set_adapter([...]), which adds their changes, or merge_and_unload them"
        )

    def _unload_and_optionally_merge(self, merge: bool = True, **options: Any) -> nn.Module:
        layers = neft_layers(self.model)
        if merge:
            for layer in layers.values():
                layer.check_merge(options.get("adapter_names"), options.get("safe_merge", False))
            found = _measured(layers.values(), options.get("adapter_names"))
            if found.mean_error:
                _LOG.info("merge: %s; merging into a base in fp32 loses nothing", found)
        else:
            for layer in layers.values():
                layer.settle()
        # PEFT would look for the weight of a module that has several.
        for name, module in list(self.model.named_modules()):
            if isinstance(module, NeftExperts):
                for part in module.weights.values() if merge else ():
                    part.merge(options.get("safe_merge", False), options.get("adapter_names"))
                self.model.set_submodule(name, module.base_layer)
        plain: nn.Module = super()._unload_and_optionally_merge(merge=merge, **options)
        for key, hook in list(plain._forward_pre_hooks.items()):
            if hook is _before_forward:
                del plain._forward_pre_hooks[key]
        return plain


def neft_layers(model: nn.Module) -> dict[str, NeftLayer]:
    """The layers with trained neurons, by name."""
    return dict(_layers(model, ""))


def _layers(module: nn.Module, name: str) -> Iterator[tuple[str, NeftLayer]]:
    """As `named_modules`, which would put the base's own bits into each weight."""
    if isinstance(module, NeftLayer):
        yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _layers(child, f"{name}.{key}" if name else key)


def measure_merge(model: nn.Module, dtype: torch.dtype | None = None) -> Rounding:
    """What merging the active adapters (or those that are merged) loses by rounding.

    Merging itself loses nothing that a forward pass has seen: neurons stand in the weight in its
    precision all the time. It loses what their values in fp32 have beyond that.

    Args:
        model: with trained neurons, of PEFT or of transformers.
        dtype: of the merged weights; None: each weight's own.
    """
    return _measured(neft_layers(model).values(), None, dtype)


def _measured(
    layers: Iterable[NeftLayer], names: list[str] | None, dtype: torch.dtype | None = None
) -> Rounding:
    tally = Tally(dtype)
    for layer in layers:
        for held, values in layer.changes(names):
            tally.add(held, values)
    return tally.result()


def sync(model: nn.Module) -> None:
    """Write the active adapters' values into the weights now, not at the next forward pass.

    Only a compiled model needs it, after each step of an optimiser that changes parameters without
    torch knowing (kernels on raw pointers, as those of bitsandbytes).
    """
    for layer in neft_layers(model).values():
        layer.refresh(force=True)


@torch.compiler.disable  # type: ignore[misc]
def _before_forward(model: nn.Module, _inputs: Any) -> None:
    """What layers do by themselves, unless they are compiled."""
    for layer in neft_layers(model).values():
        layer.refresh()


def register() -> None:
    """Make PEFT know the type NEFT; its own types are an enum, which has to grow for it."""
    if "NEFT" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "NEFT")
    member._name_ = member._value_ = "NEFT"
    PeftType._member_names_.append("NEFT")
    PeftType._member_map_["NEFT"] = member
    PeftType._value2member_map_["NEFT"] = member
    if "NEFT" not in PeftType.__dict__:
        type.__setattr__(PeftType, "NEFT", member)
    register_peft_method(name="neft", config_cls=NeftConfig, model_cls=NeftModel)


register()
