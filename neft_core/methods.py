"""What trains in each method, its adapter, and the proof that nothing else moved.

A method is a `Method`: how it prepares a loaded base model, and how its adapter lies in a folder.
`METHODS` maps names to them; a new method is one more entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neft_core.errors import NeftError
from neft_core.files import load_tensors, read_json, save_tensors, write_json
from neft_core.masks import NeuronMask
from neft_core.neurons import candidates
from neft_core.rounding import Tally

Mask = NeuronMask | None
Options = Mapping[str, Any]
Prepare = Callable[[Any, Options, Mask, str], Any]


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        prepare: (model, options, mask, model_type) -> the model, with only what trains requiring
            a gradient; options are the keys of the method in params.yaml.
        save: (model, folder, metadata) writes the adapter; metadata has at least `base`, the hash
            of the base model, and `location` and `revision`, where it comes from.
        load: (base model, options, model_type, folder, hash of the base model) -> the model with a
            folder's adapter.
        merge: (base model, options, model_type, folder, hash, tally) -> the model without what the
            method puts in, with a folder's adapter merged in its precision; the tally gets
            all trained weights.
        file: the name of the file with the adapter's tensors.
    """

    prepare: Prepare
    save: Callable[[Any, Path, Mapping[str, str]], None]
    load: Callable[[Any, Options, str, Path, str], Any]
    merge: Callable[[Any, Options, str, Path, str, Tally], Any]
    file: str


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train_only(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Freeze all but the chosen parameters; those become fp32, unless the base is in fp64."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _full(model: Any, _options: Options, _mask: Mask, _type: str) -> Any:
    train_only(model, lambda _name: True)
    return model


def _in_out(model: Any, _options: Options, _mask: Mask, model_type: str) -> Any:
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    modules = {group.module for group in candidates(stored, model_type, "mlp")}
    train_only(model, lambda name: name.removesuffix(".weight") in modules)
    return model


def _embed(model: Any, _options: Options, _mask: Mask, _type: str) -> Any:
    embedding = model.get_input_embeddings().weight
    stored = embedding.dtype
    names = {name for name, parameter in model.named_parameters() if parameter is embedding}
    train_only(model, names.__contains__)
    # What follows takes the type of its own weights: a LayerNorm on a CPU refuses any other.
    model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: output.to(stored)
    )
    return model


def _neft(model: Any, _options: Options, mask: Mask, _type: str) -> Any:
    from peft import get_peft_model

    from neft_core.tuner import NeftConfig

    return get_peft_model(model, NeftConfig(mask=mask, task_type="CAUSAL_LM"))


def _lora(model: Any, options: Options, _mask: Mask, _type: str) -> Any:
    from peft import LoraConfig, get_peft_model

    rank = options["rank"]
    config = LoraConfig(
        r=rank,
        lora_alpha=options.get("alpha") or 2 * rank,
        lora_dropout=options.get("dropout", 0.0),
        target_modules="all-linear",
        # GPT-2's layers store [in, out]; PEFT warns where it has to find that out itself.
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _save_peft(model: Any, folder: Path, metadata: Mapping[str, str]) -> None:
    """An adapter's directory as PEFT reads it; equal adapters have equal bytes."""
    from peft import get_peft_model_state_dict

    fields = model.peft_config[model.active_adapter].to_dict()
    listed = {key: sorted(value) for key, value in fields.items() if isinstance(value, set)}
    told = dict(metadata)
    named = {
        "base_model_name_or_path": told.pop("location"),
        "revision": told.pop("revision") or None,
    }
    write_json(folder / PEFT_CONFIG, fields | listed | named | {"inference_mode": True})
    # Embeddings don't train, and looking up whether they do would ask the Hub.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_tensors(folder / PEFT_FILE, state, told | {"format": "pt"})


def _read(path: Path, base: str) -> dict[str, Tensor]:
    """An adapter's tensors, which must be of this base model."""
    state, metadata = load_tensors(path, "train the run again")
    if metadata.get("base") != base:
        raise NeftError(f"{path}: trained on another base model; train the run again")
    return state


def _load_peft(model: Any, _options: Options, _type: str, folder: Path, base: str) -> Any:
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    fields = read_json(folder / PEFT_CONFIG)
    state = _read(folder / PEFT_FILE, base)
    # Where the base was when the adapter was trained is of no interest here.
    fields["base_model_name_or_path"] = None
    try:
        model = get_peft_model(model, PeftConfig.from_peft_type(**fields))
        outcome = set_peft_model_state_dict(model, state)
    except (RuntimeError, TypeError, KeyError) as fault:
        reason = str(fault).splitlines()[-1].strip()
        raise NeftError(f"{folder}: not an adapter of this model ({reason})") from fault
    # The base's own weights count as missing too.
    ours = [key for key in outcome.missing_keys if "lora_" in key or "neft_" in key]
    if odd := outcome.unexpected_keys + ours:
        raise NeftError(f"{folder}: {odd[0]} is on one side only; the adapter is of another model")
    return model


def _merge_peft(
    model: Any, options: Options, model_type: str, folder: Path, base: str, tally: Tally
) -> Any:
    from peft.tuners.lora import LoraLayer

    from neft_core.tuner import neft_layers

    model = _load_peft(model, options, model_type, folder, base)
    for layer in neft_layers(model).values():
        for held, values in layer.changes():
            tally.add(held, values)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            change = layer.get_delta_weight(model.active_adapter)
            tally.add(weight, weight.to(change.dtype) + change)
    return model.merge_and_unload()


def _save_parameters(model: nn.Module, folder: Path, metadata: Mapping[str, str]) -> None:
    state = {name: parameter.detach() for name, parameter in trained_parameters(model).items()}
    told = {key: value for key, value in metadata.items() if key not in ("location", "revision")}
    save_tensors(folder / FILE, state, told)


def _load_parameters(
    prepare: Prepare, model: Any, options: Options, model_type: str, folder: Path, base: str
) -> Any:
    state = _read(folder / FILE, base)
    model = prepare(model, options, None, model_type)
    trained = trained_parameters(model)
    if trained.keys() != state.keys():
        odd = sorted(trained.keys() ^ state.keys())[0]
        raise NeftError(f"{folder}: {odd} is on one side only; the adapter is of another model")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state[name])
    return model


def _merge_parameters(
    model: Any, _options: Options, _type: str, folder: Path, base: str, tally: Tally
) -> Any:
    stored = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in _read(folder / FILE, base).items():
            if name not in stored or stored[name].shape != values.shape:
                raise NeftError(f"{folder}: {name} doesn't fit; the adapter is of another model")
            tally.add(stored[name], values)
            stored[name].copy_(values)
    return model


FILE = "adapter.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


def _of_parameters(prepare: Prepare) -> Method:
    """A method that trains parameters of the base itself."""
    load = partial(_load_parameters, prepare)
    return Method(prepare, _save_parameters, load, _merge_parameters, FILE)


METHODS: dict[str, Method] = {
    "full": _of_parameters(_full),
    "in_out": _of_parameters(_in_out),
    "embed": _of_parameters(_embed),
    "lora": Method(_lora, _save_peft, _load_peft, _merge_peft, PEFT_FILE),
    "neft": Method(_neft, _save_peft, _load_peft, _merge_peft, PEFT_FILE),
}


def moved_outside(model: Any, base: nn.Module) -> tuple[int, list[str]]:
    """Compare every weight that `neft` did not select with the base, bit by bit.

    Args:
        model: after training with method `neft`; its adapter is merged and its layers are plain
            afterwards.
        base: the base model, loaded anew in the same type.

    Returns:
        Number of weights compared, and the names of tensors in which one of them differs.
    """
    from neft_core.tuner import neft_layers

    layers = neft_layers(model.get_base_model())
    chosen = {f"{name}{layer.parameter}": layer for name, layer in layers.items()}
    after = dict(model.merge_and_unload().named_parameters())
    compared, moved = 0, []
    for name, before in base.named_parameters():
        same = _bits(after[name].cpu()) == _bits(before)
        free = 0
        if name in chosen:
            free = chosen[name].mark(same)
        compared += same.numel() - free
        if not bool(same.all()):
            moved.append(name)
    return compared, moved


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that -0.0 and NaN are compared as stored."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])
