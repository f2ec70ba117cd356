"""Models and masks that an adapter's neurons can't be put into."""

from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from neft_core import frozen
from neft_core.errors import NeftError
from neft_core.expert_layer import check_experts
from neft_core.layer import NeftLayer, NeftLinear

if TYPE_CHECKING:
    from neft_core.tuner import NeftConfig


def trains_whole(config: "NeftConfig", module: str) -> bool:
    """Whether a module is one of the config's `modules_to_save`, or in one."""
    return any(f".{whole}." in f".{module}." for whole in config.modules_to_save or ())


def leave_out_whole(config: "NeftConfig") -> None:
    """Leave out the neurons of modules that the config has trained as a whole, as PEFT does.

    Raises:
        NeftError: no neurons are left.
    """
    if not config.modules:
        raise NeftError(f"{config.source}: has no neurons; give NeftConfig a mask of some")
    whole: Any = config.modules_to_save
    if isinstance(whole, str):  # a name, not its letters
        config.modules_to_save = [whole]
    config.modules = {
        name: entry for name, entry in config.modules.items() if not trains_whole(config, name)
    }
    if not config.modules:
        raise NeftError(
            f"{config.source}: all its neurons are in modules_to_save, which train as a whole; "
            "name other modules there, or none"
        )


def check_model(config: "NeftConfig", model: nn.Module) -> dict[str, int]:
    """Refuse a model that can't hold the neurons of one of the config's modules.

    Returns:
        how many rows or columns each module's weight has.

    Raises:
        NeftError: it is refused, and nothing has changed.
    """
    sizes, keys = {}, list(dict(model.named_modules()))
    found: dict[str, list[str]] = {name: [] for name in config.modules}
    for key in keys:
        if trains_whole(config, key) and isinstance(model.get_submodule(key), NeftLayer):
            raise NeftError(
                f"{config.source}: {key}: neurons of another adapter train in it; take it out of "
                "modules_to_save, or use a model of its own"
            )
        name = config.named(key)
        if name is not None and not config.modules[name]["experts"]:
            found[name].append(key)
        for own, name in config.stacked(key).items():
            found[name].append(f"{key}.{own}")
    for name, matches in found.items():
        if len(matches) != 1:
            what = f"{len(matches)} such modules" if matches else "no such module"
            raise NeftError(
                f"{config.source}: {name}: the model has {what}; use the mask's own model"
            )
        if config.modules[name]["experts"]:
            owner, _, own = matches[0].rpartition(".")
            sizes[name] = check_experts(config, name, model.get_submodule(owner), own)
        else:
            sizes[name] = check_linear(config, name, model.get_submodule(matches[0]))
    return sizes


def check_linear(config: "NeftConfig", name: str, module: Any) -> int:
    """Refuse a module that can't hold the neurons of one of the config's modules, by name.

    Returns:
        how many rows or columns its weight has.

    Raises:
        NeftError: it is refused.
    """
    entry = config.modules[name]
    if isinstance(module, NeftLinear):
        if module.axis != entry["axis"]:
            raise NeftError(
                f"{config.source}: {name} has neurons of the other axis in this model's adapter; "
                "use masks of one layout"
            )
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise NeftError(
            f"{config.source}: {name} trains as a whole in another adapter of this model "
            "(modules_to_save); use a mask without it"
        )
    elif isinstance(module, BaseTunerLayer):
        raise NeftError(
            f"{config.source}: {name} has an adapter of another method; unload that one first"
        )
    elif isinstance(module, NonDynamicallyQuantizableLinear):
        raise NeftError(
            f"{config.source}: {name} is in a MultiheadAttention, which takes its weight and never "
            "calls it; use a layout without it"
        )
    conv1d = frozen.is_conv1d(module)
    if not (conv1d or hasattr(module, "in_features")):
        raise NeftError(
            f"{config.source}: {name} is a {type(module).__name__} in this model; "
            "a linear layer is needed"
        )
    logical = frozen.size(module)
    size = logical[entry["axis"]]
    shape = logical[::-1] if conv1d else logical
    group = config.group(name)
    fits = (
        entry["transposed"] == conv1d
        and logical[1 - entry["axis"]] == entry["length"]
        and (group is None or group.fits(shape))
        and entry["count"] <= size == entry.get("size", size)
    )
    if not fits:
        raise NeftError(
            f"{config.source}: {name} is a {type(module).__name__} of shape {shape} in this model; "
            "use the mask's own model"
        )
    return size
