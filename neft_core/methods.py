"""What trains in each method, its adapter, and the proof that nothing else moved.

A method is a `Method`: how it prepares a loaded base model, and which tensors its adapter holds.
`METHODS` maps names to them; a new method is one more entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neft_core import sparse
from neft_core.errors import NeftError
from neft_core.masks import NeuronMask
from neft_core.neurons import candidates

Mask = NeuronMask | None
Prepare = Callable[[Any, Mapping[str, Any], Mask, str], Any]


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        prepare: (model, options, mask, model_type) -> the model, with only what trains requiring
            a gradient; options are the keys of the method in params.yaml.
        adapter: the trained tensors by name, as the adapter file keeps them.
        load: writes an adapter's tensors into a prepared model.
        finish: called after training and after loading, before the model is used.
    """

    prepare: Prepare
    adapter: Callable[[Any], dict[str, Tensor]]
    load: Callable[[Any, dict[str, Tensor]], None]
    finish: Callable[[Any], None] = lambda _model: None


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train_only(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Freeze all but the chosen parameters; those become fp32, unless the base is in fp64."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _full(model: Any, _options: Mapping[str, Any], _mask: Mask, _type: str) -> Any:
    train_only(model, lambda _name: True)
    return model


def _in_out(model: Any, _options: Mapping[str, Any], _mask: Mask, model_type: str) -> Any:
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    modules = {group.module for group in candidates(stored, model_type, "mlp")}
    train_only(model, lambda name: name.removesuffix(".weight") in modules)
    return model


def _embed(model: Any, _options: Mapping[str, Any], _mask: Mask, _type: str) -> Any:
    embedding = model.get_input_embeddings().weight
    stored = embedding.dtype
    names = {name for name, parameter in model.named_parameters() if parameter is embedding}
    train_only(model, names.__contains__)
    # What follows takes the type of its own weights: a LayerNorm on a CPU refuses any other.
    model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: output.to(stored)
    )
    return model


def _neft(model: Any, _options: Mapping[str, Any], mask: Mask, _type: str) -> Any:
    assert mask is not None
    return sparse.attach(model, mask)


def _lora(model: Any, options: Mapping[str, Any], _mask: Mask, _type: str) -> Any:
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


def _lora_adapter(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    return state


def _load_lora(model: Any, state: Mapping[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    outcome = set_peft_model_state_dict(model, dict(state))
    # The base's own weights count as missing too.
    odd = outcome.unexpected_keys + [key for key in outcome.missing_keys if "lora_" in key]
    if odd:
        raise NeftError(f"adapter: {odd[0]} is on one side only; the adapter is of another model")


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in trained_parameters(model).items()}


def _load_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    trained = trained_parameters(model)
    if trained.keys() != state.keys():
        odd = sorted(trained.keys() ^ state.keys())[0]
        raise NeftError(f"adapter: {odd} is on one side only; the adapter is of another model")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state[name])


def _load_sparse(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    sparse.load_sparse_state(model, dict(state))


METHODS: dict[str, Method] = {
    "full": Method(_full, _parameters, _load_parameters),
    "in_out": Method(_in_out, _parameters, _load_parameters),
    "embed": Method(_embed, _parameters, _load_parameters),
    "lora": Method(_lora, _lora_adapter, _load_lora),
    "neft": Method(_neft, sparse.sparse_state, _load_sparse, sparse.sync),
}


def moved_outside(model: nn.Module, base: nn.Module) -> tuple[int, list[str]]:
    """Compare every weight that `neft` did not select with the base, bit by bit.

    Args:
        model: after training with method `neft`; its plain layers are put back.
        base: the base model, loaded anew in the same type.

    Returns:
        Number of weights compared, and the names of tensors in which one of them differs.
    """
    chosen = {
        f"{name}.weight": (layer.indices.cpu(), layer.axis ^ int(layer.transposed))
        for name, layer in sparse.sparse_layers(model)
    }
    after = dict(sparse.detach(model, restore=False).named_parameters())
    compared, moved = 0, []
    for name, before in base.named_parameters():
        same = _bits(after[name].cpu()) == _bits(before)
        free = 0
        if name in chosen:
            indices, stored_axis = chosen[name]
            same.index_fill_(stored_axis, indices, True)
            free = len(indices) * same.numel() // same.shape[stored_axis]
        compared += same.numel() - free
        if not bool(same.all()):
            moved.append(name)
    return compared, moved


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that -0.0 and NaN are compared as stored."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])
