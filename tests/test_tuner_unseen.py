"""What others do with a model in training, unseen by its layers: memory used again, casts, walks,
a layer in two places, other processes."""

import copy
import pickle

import pytest
import torch
import torch.multiprocessing
from conftest import tiny_llama
from families import tiny_model
from peft import get_peft_model
from test_methods import mask_for
from test_tuner_peft import IDS, config, out, perturbed
from torch import nn

from neft_core.groups import Group
from neft_core.masks import NeuronMask
from neft_core.neurons import ROWS
from neft_core.tuner import NeftConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def test_values_in_memory_that_is_used_again_are_seen():
    """A tensor may lie where another did, and `.data =` changes no version."""
    model = get_peft_model(tiny_llama(), config())
    values = trained(model)[0]
    own, memory = values.data, bytearray(values.nbytes)
    for change in (1, -1):
        torch.frombuffer(memory, dtype=own.dtype).copy_((own + change).flatten())
        values.data = torch.frombuffer(memory, dtype=own.dtype).view_as(own)
        found = out(model)
    other = get_peft_model(tiny_llama(), config(form="additive"))
    trained(other)[0].sub_(1)
    torch.testing.assert_close(found, out(other), rtol=0, atol=1e-5)


def losses(form: str, between) -> list[float]:
    """Of a training whose optimiser torch doesn't see, as that of kernels on raw pointers."""
    model, found = get_peft_model(tiny_llama(), config(form=form)), []
    parameters = trained(model)
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append(loss.item())
        between(model)
        for parameter in parameters:
            parameter.data.add_(parameter.grad, alpha=-0.5)
            parameter.grad = None
    return found


@pytest.mark.parametrize("between", [lambda model: model(IDS.flip(0)), out], ids=["grad", "none"])
def test_a_look_between_backward_and_step_delays_nothing(between):
    found = losses("auto", between)
    assert len(set(found)) == 4
    torch.testing.assert_close(found, losses("additive", between), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_who_walks_through_experts_finds_the_base(family):
    base = tiny_model(family)
    own = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = perturbed(get_peft_model(base, NeftConfig(mask=mask_for(base, family))))
    out_of = base.config.vocab_size
    with torch.no_grad():
        model(IDS % out_of)
    walked = {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "neft_" not in name
    }
    assert walked.keys() == own.keys()
    assert [name for name in own if not torch.equal(walked[name], own[name])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_the_whole_model_leaves_what_trains_in_fp32(dtype):
    model = get_peft_model(tiny_llama().to(dtype), config())
    model(input_ids=IDS, labels=IDS).loss.backward()
    before = [p.grad.clone() for p in trained(model)]
    model.to(dtype)
    assert {p.dtype for p in trained(model)} == {torch.float32}
    for parameter, gradient in zip(trained(model), before, strict=True):
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-2, atol=1e-3)
    # What does not train follows, and what was made low on purpose stays it.
    model.requires_grad_(False).to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    low = get_peft_model(tiny_llama().to(dtype), config(), autocast_adapter_dtype=False)
    for parameter in trained(low):
        parameter.data = parameter.data.to(dtype)
    assert {p.dtype for p in trained(low.to(dtype))} == {dtype}


def tied_layers(kind: str) -> nn.Module:
    model = tiny_llama().double()
    first, second = (layer.mlp for layer in model.model.layers)
    if kind == "layer":
        second.up_proj = first.up_proj
    else:
        second.up_proj.weight.data = first.up_proj.weight.data
    return model


@pytest.mark.parametrize("kind", ["layer", "memory"])
def test_a_layer_or_memory_in_two_places_has_the_gradient_of_what_is_computed(kind):
    group = Group("model.layers.0.mlp.up_proj", ROWS, 0, 24, 16)
    mask = NeuronMask({group.module: torch.arange(0, 24, 2)}, {group.module: group}, 1)
    base = tied_layers(kind)
    before = base(IDS).logits
    model = get_peft_model(base, NeftConfig(mask=mask))
    assert torch.allclose(out(model), before)
    (values,) = trained(perturbed(model))

    def loss() -> torch.Tensor:
        return model(IDS).logits.square().sum()

    loss().backward()
    with torch.no_grad():
        values[0, 0] += 1e-2  # large, as the norms compute in fp32
        above = loss()
        values[0, 0] -= 2e-2
        below = loss()
    assert values.grad[0, 0].item() == pytest.approx(((above - below) / 2e-2).item(), rel=1e-3)


def look(_rank: int, model: nn.Module) -> None:
    out(model)


@pytest.mark.parametrize("used", [False, True])
def test_another_process_with_the_same_memory_leaves_the_base_alone(used):
    model = perturbed(get_peft_model(tiny_llama(), config()))
    if used:
        before = out(model)
    torch.multiprocessing.spawn(look, args=(model,), nprocs=1)
    if used:
        assert torch.allclose(out(model), before, atol=1e-6)
    own = tiny_llama().state_dict()
    after = model.unload().state_dict()
    assert [name for name in own if not torch.equal(own[name], after[name])] == []


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_alike_and_are_their_own(way, merged):
    model = perturbed(get_peft_model(tiny_llama(), config()))
    before = out(model)
    if merged:
        model.merge_adapter()
    copied = way(model)
    perturbed(copied, seed=1)
    assert torch.equal(out(model), before)
    assert not torch.equal(out(copied), before)
