"""Neurons in the weight, beside it, and what happens to the weight in between."""

import copy
import shutil

import pytest
import torch
from conftest import tiny_llama
from peft import get_peft_model
from test_methods import mask_for, tiny_gpt2
from test_tuner_peft import IDS, config, out, perturbed
from torch import nn

from neft_core.errors import NeftError
from neft_core.layer import NeftLinear
from neft_core.masks import NeuronMask
from neft_core.neurons import COLUMNS, ROWS, Group
from neft_core.tuner import NeftConfig, neft_layers, sync


def train(model: nn.Module, steps: int = 5, optimizer=torch.optim.AdamW, **options) -> list[float]:
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    losses = []
    for step in range(steps):
        ids = (IDS * (step + 1)) % 61 + 3
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "neft_values" in n}


class Packed(nn.Module):
    """A linear layer whose weight is kept in 8 bits, one scale for each row."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = plain.weight.shape
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (plain.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = plain.bias

    def dense(self) -> torch.Tensor:
        return self.weight * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dense(), self.bias)


def pair(axis: int, dtype=torch.float64, bias: bool = True) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(1)
    layer = nn.Linear(6, 9, bias=bias, dtype=dtype)
    return layer, torch.tensor([0, 2, 5])


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize("bias", [True, False])
def test_the_additive_form_is_the_same_map(axis, bias):
    plain, rows = pair(axis, bias=bias)
    layers = [
        NeftLinear(copy.deepcopy(plain), "default", axis, 3, rows, form=form)
        for form in ("in_place", "additive")
    ]
    found = []
    for layer in layers:
        with torch.no_grad():
            layer.neft_values["default"] += torch.linspace(0, 1, 3, dtype=torch.float64)[:, None]
        x = torch.arange(24.0, dtype=torch.float64).reshape(2, 2, 6).sin().requires_grad_()
        y = layer(x)
        (y**2).sum().backward()
        found.append((y, x.grad, layer.neft_values["default"].grad))
    assert [layer.in_place for layer in layers] == [True, False]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: layers[1](x), (x.detach().requires_grad_(),))
    assert torch.equal(layers[1].base_layer.weight, plain.weight)


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_weight_gets_a_correction(axis, bias):
    plain, rows = pair(axis, torch.float32, bias)
    packed = Packed(plain)
    layer = NeftLinear(packed, "default", axis, 3, rows)
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), packed(x))
    dense = packed.dense()
    held = dense[rows] if axis == ROWS else dense[:, rows].t()
    torch.testing.assert_close(layer.neft_values["default"].detach(), held, rtol=0, atol=1e-6)
    with torch.no_grad():
        layer.neft_values["default"].copy_(torch.randn(held.shape))
        if axis == ROWS:
            dense[rows] = layer.neft_values["default"]
        else:
            dense[:, rows] = layer.neft_values["default"].t()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, plain.bias))
    with pytest.raises(NeftError, match="Packed: a quantised weight can't take merged neurons"):
        layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), packed(x))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_both_forms_train_alike(make):
    kind = "llama" if make is tiny_llama else "gpt2"
    models = [get_peft_model(make(), config(kind, form=form)) for form in ("auto", "additive")]
    losses = [train(model, 20, optimizer=torch.optim.SGD) for model in models]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] != losses[0][0]
    for a, b in zip(*(values(model).values() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    merged = [out(model.merge_and_unload()) for model in models]
    torch.testing.assert_close(*merged, rtol=1e-4, atol=1e-5)


def test_the_additive_form_rounds_to_the_weight_s_precision():
    models = [
        perturbed(get_peft_model(tiny_llama().bfloat16(), config(form=form)))
        for form in ("auto", "additive")
    ]
    torch.testing.assert_close(*(out(model).float() for model in models), rtol=0.02, atol=0.02)


def tied() -> tuple[nn.Module, NeuronMask]:
    model = tiny_llama(tie_word_embeddings=True)
    rows = torch.tensor([4, 9])
    return model, NeuronMask({"lm_head": rows}, {"lm_head": Group("lm_head", ROWS, 0, 64, 16)}, 1)


def test_a_tied_head_trains_without_its_embedding():
    base, mask = tied()
    model = get_peft_model(base, NeftConfig(mask=mask))
    embedding = base.get_input_embeddings().weight.detach().clone()
    train(model)
    want = out(model)
    assert torch.equal(base.get_input_embeddings().weight, embedding)
    assert not torch.equal(want, out(tied()[0]))
    model.merge_adapter()
    torch.testing.assert_close(out(model), want)
    assert torch.equal(base.get_input_embeddings().weight, embedding)
    model.unmerge_adapter()
    assert base.lm_head.base_layer.weight is base.get_input_embeddings().weight
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(out(merged), want)
    assert not merged.config.tie_word_embeddings


def test_who_hooks_into_a_layer_is_still_called():
    base = tiny_llama()
    model = perturbed(get_peft_model(base, config()))
    want = out(model)
    seen = []
    inner = base.model.layers[0].mlp.down_proj
    handle = inner.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(out(model), want, rtol=1e-4, atol=1e-5)
    assert seen == [1]
    assert not inner.in_place
    handle.remove()
    assert torch.equal(out(model), want)
    assert inner.in_place


def test_another_forward_pass_may_come_before_the_backward_pass():
    """A reference model by disabled adapters, as preference training has it."""
    model = get_peft_model(tiny_llama(), config())
    model.add_adapter("b", config(share=0.5))
    perturbed(perturbed(model), "b", seed=1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(out(model), out(tiny_llama()))
    model.set_adapter("b")
    out(model)
    model.state_dict()
    model.set_adapter("default")
    loss.backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(got) == len(want) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Unseen(torch.optim.Optimizer):
    """Changes parameters as kernels on raw pointers do: torch's version counters don't see it."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(group["lr"] * parameter.grad)


def test_an_optimiser_that_torch_does_not_see():
    seen, unseen = (get_peft_model(tiny_llama(), config()) for _ in range(2))
    assert train(seen, optimizer=torch.optim.SGD) == train(unseen, optimizer=Unseen)
    assert torch.equal(out(seen), out(unseen))


def test_fused_and_foreach_optimisers_are_seen():
    models = [get_peft_model(tiny_llama(), config()) for _ in range(2)]
    losses = [
        train(model, **options)
        for model, options in zip(models, [{"fused": True}, {"foreach": True}], strict=True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 5


def test_whoever_walks_through_the_parameters_finds_the_base():
    base = tiny_llama()
    model = perturbed(get_peft_model(base, config()))
    before = dict(tiny_llama().named_parameters())
    for _ in range(2):
        want = out(model)
        layer = base.model.layers[0].mlp.up_proj
        assert not torch.equal(layer.weight, before["model.layers.0.mlp.up_proj.weight"])
        for name, parameter in base.named_parameters():
            if "neft" not in name:
                assert torch.equal(parameter, before[name.replace(".base_layer", "")])
        assert torch.equal(out(model), want)


def test_a_state_dict_of_the_whole_model_is_of_base_and_values():
    model = perturbed(get_peft_model(tiny_llama(), config()))
    want = out(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for assign in (False, True):
        other = get_peft_model(tiny_llama(seed=4), config())
        out(other)
        other.load_state_dict(state, assign=assign)
        assert torch.equal(out(other), want)
        assert torch.equal(out(other.unload()), out(tiny_llama()))


def test_moving_and_casting():
    model = perturbed(get_peft_model(tiny_llama(), config()))
    want = out(model)
    model.double()
    torch.testing.assert_close(out(model), want.double(), rtol=1e-4, atol=1e-5)
    assert all(layer.in_place for layer in neft_layers(model).values())
    model.float()
    assert torch.equal(out(model), want)
    model.bfloat16()
    out(model)
    base = model.unload()
    assert torch.equal(out(base), out(tiny_llama().bfloat16()))


def test_a_weight_replaced_in_use_is_told():
    layer, rows = pair(ROWS, torch.float32)
    layer = NeftLinear(layer, "default", ROWS, 3, rows)
    with torch.no_grad():
        layer.neft_values["default"] += 1
    layer(torch.zeros(1, 6))
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().clone())
    with pytest.raises(NeftError, match="its weight was replaced while trained neurons stood in"):
        layer(torch.zeros(1, 6))


def test_adapters_of_both_axes_are_refused():
    linear = nn.Sequential(nn.Linear(4, 5))
    masks = [
        NeuronMask({"0": torch.tensor([1])}, {"0": Group("0", axis, 0, count, length)}, 25)
        for axis, count, length in ((ROWS, 5, 4), (COLUMNS, 4, 5))
    ]
    model = get_peft_model(linear, NeftConfig(mask=masks[0]))
    with pytest.raises(NeftError, match="0 has neurons of the other axis in this model's adapter"):
        model.add_adapter("b", NeftConfig(mask=masks[1]))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("form", ["in_place", "additive"])
@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_autocast_in_both_forms(form, axis):
    plain, rows = pair(axis, torch.float32)
    layer = NeftLinear(copy.deepcopy(plain), "default", axis, 3, rows, form=form)
    x = torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = layer(x), plain(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    y.float().pow(2).sum().backward()
    assert layer.neft_values["default"].grad.dtype == torch.float32


def compiled(model: nn.Module, how: str) -> nn.Module:
    if how == "whole":
        return torch.compile(model, backend="aot_eager")
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["whole", "each layer"])
def test_a_compiled_model_trains_as_it_does_otherwise(how):
    torch._dynamo.reset()
    models = [get_peft_model(tiny_llama(), config()) for _ in range(2)]
    run = compiled(models[1], how)
    torch._dynamo.utils.counters.clear()
    want = train(models[0], 3)
    optimizer = torch.optim.AdamW([p for p in models[1].parameters() if p.requires_grad], lr=1e-2)
    got = []
    for step in range(3):
        ids = (IDS * (step + 1)) % 61 + 3
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        got.append(loss.item())
    assert got == pytest.approx(want, rel=1e-6)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == (1 if how == "whole" else 2)
    assert not counters["graph_break"]
    for a, b in zip(*(values(model).values() for model in models), strict=True):
        torch.testing.assert_close(a, b)
    # What an optimiser did unseen reaches a compiled model by `sync`.
    for parameter in models[1].parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    sync(models[1])
    layer = neft_layers(models[1])["base_model.model.model.layers.0.mlp.up_proj"]
    rows = layer.neft_indices["default"]
    assert torch.equal(layer.base_layer.weight[rows], layer.neft_values["default"])


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_to_machine_code():
    torch._dynamo.reset()
    models = [get_peft_model(tiny_llama(), config()) for _ in range(2)]
    for layer in models[1].get_base_model().model.layers:
        layer.mlp.compile(backend="inductor", fullgraph=True)
    want, got = (train(model, 3) for model in models)
    assert got == pytest.approx(want, rel=1e-6)
    for a, b in zip(*(values(model).values() for model in models), strict=True):
        torch.testing.assert_close(a, b)


def test_every_neuron_of_a_module():
    base = tiny_llama()
    mask = mask_for(base, "llama", share=1.0)
    model = get_peft_model(base, NeftConfig(mask=mask))
    dense = tiny_llama()
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_("up_proj" in name or "down_proj" in name)
    assert train(model, 10) == pytest.approx(train(dense, 10), rel=1e-5)


def test_values_that_are_not_finite_stay_in_their_adapter():
    model = get_peft_model(tiny_llama(), config())
    with torch.no_grad():
        next(iter(neft_layers(model).values())).neft_values["default"].fill_(float("nan"))
    assert out(model).isnan().any()
    with model.disable_adapter():
        assert torch.equal(out(model), out(tiny_llama()))
    assert torch.equal(out(model.unload()), out(tiny_llama()))
