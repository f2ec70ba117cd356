"""Whole models with trained neurons against dense training, and their ways back to the base."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from neft_core.errors import NeftError
from neft_core.groups import ROWS, Group, read_neurons
from neft_core.layer import NeftLinear
from neft_core.masks import NeuronMask
from neft_core.neurons import candidates
from neft_core.tuner import NeftConfig, neft_layers, sync

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config)
    config = GPT2Config(
        vocab_size=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def some_mask(model: nn.Module, seed=1, chance=0.3) -> NeuronMask:
    """About 30 % of the candidates; none in the last module."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    groups = {group.module: group for group in candidates(shapes, model.config.model_type)}
    generator = torch.Generator().manual_seed(seed)
    indices = {}
    for group in list(groups.values())[:-1]:
        chosen = torch.rand(group.count, generator=generator) < chance
        indices[group.module] = chosen.nonzero().flatten() + group.start
    return NeuronMask(indices, groups, sum(p.numel() for p in model.parameters()))


def attach(model: nn.Module, mask: NeuronMask, **options) -> nn.Module:
    return get_peft_model(model, NeftConfig(mask=mask, **options))


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(model)
    return {name: tensor.clone() for name, tensor in state.items()}


def batches(steps: int, size=4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(32, (size, 12), generator=generator) for _ in range(steps)]


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def selected(mask: NeuronMask, name: str, weight: torch.Tensor) -> torch.Tensor:
    """True where a stored weight belongs to the mask, written out by element."""
    inside = torch.zeros_like(weight, dtype=torch.bool)
    module = name.removesuffix(".weight")
    if name.endswith(".weight") and module in mask.indices:
        by_rows = (mask.axis[module] == ROWS) != mask.groups[module].transposed
        for index in mask.indices[module].tolist():
            inside[(index,) if by_rows else (slice(None), index)] = True
    return inside


def train_dense(model, mask, tokens, lr=1e-2):
    """The reference: full gradients, zeroed where nothing is selected."""
    chosen = {n: selected(mask, n, p) for n, p in model.named_parameters()}
    trained = [p for n, p in model.named_parameters() if chosen[n].any()]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses = []
    for batch in tokens:
        loss = loss_of(model, batch)
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parameter.grad[~chosen[name]] = 0
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def train_compact(model, tokens, lr=1e-2):
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    losses = []
    for batch in tokens:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trains_as_dense_training_with_masked_gradients(family, dtype, tolerance):
    base = tiny(family).to(dtype)
    mask = some_mask(base)
    dense, compact = copy.deepcopy(base), attach(copy.deepcopy(base), mask)
    tokens = batches(100)
    want, got = train_dense(dense, mask, tokens), train_compact(compact, tokens)
    assert got == pytest.approx(want, rel=tolerance)
    assert got[-1] < got[0] - 0.1
    compact = compact.merge_and_unload()
    assert [n for n, _ in compact.named_parameters()] == [n for n, _ in base.named_parameters()]
    moved = 0
    for (name, before), after, reference in zip(
        base.named_parameters(), compact.parameters(), dense.parameters(), strict=True
    ):
        inside = selected(mask, name, before)
        assert torch.equal(after[~inside], before[~inside])
        torch.testing.assert_close(after[inside], reference[inside], rtol=0, atol=tolerance)
        moved += int((after != before).sum())
    assert moved > 0.99 * mask.parameters


def test_only_the_selected_neurons_are_trainable():
    model = tiny("llama")
    mask = some_mask(model)
    attach(model, mask)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == mask.parameters
    wrapped = list(neft_layers(model))
    assert wrapped == list(mask.indices)
    assert "model.layers.1.mlp.down_proj" not in wrapped


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["plain", "bf16", "autocast"])
def test_attaching_changes_no_bit_of_the_output(family, mode):
    model = tiny(family)
    if mode == "bf16":
        model.bfloat16()
    tokens = batches(1)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), torch.no_grad():
        before = model(tokens).logits
        after = attach(model, some_mask(model))(tokens).logits
    assert torch.equal(before, after)


def test_a_mask_without_neurons_is_refused():
    model = tiny("llama")
    mask = some_mask(model)
    for indices in ({}, {name: rows[:0] for name, rows in mask.indices.items()}):
        with pytest.raises(NeftError, match="mask: has no neurons; give NeftConfig a mask of some"):
            attach(model, replace(mask, indices=indices))
        assert not neft_layers(model)


def test_one_neuron_in_the_whole_model():
    model = tiny("gpt2")
    name = "transformer.h.1.mlp.c_proj"
    mask = replace(some_mask(model), indices={name: torch.tensor([7])})
    before = {n: p.clone() for n, p in model.named_parameters()}
    tuned = attach(model, mask)
    train_compact(tuned, batches(3))
    model = tuned.merge_and_unload()
    changed = {n: (p != before[n]).nonzero() for n, p in model.named_parameters()}
    assert [n for n, where in changed.items() if len(where)] == [f"{name}.weight"]
    assert set(changed[f"{name}.weight"][:, 0].tolist()) == {7}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_back_restores_every_bit(family, dtype):
    base = tiny(family).to(dtype)
    before = {n: p.clone() for n, p in base.named_parameters()}

    def same(model):
        after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
        for name, weight in before.items():
            assert torch.equal(after[name].view(torch.uint8), weight.view(torch.uint8)), name

    model = attach(base, some_mask(base))
    train_compact(model, batches(5), lr=0.1)
    tokens = batches(1)[0]
    with model.disable_adapter():
        model(tokens)
        same(base)
    model(tokens)
    model.state_dict()
    same(base)
    model(tokens)
    model.merge_adapter()
    assert not torch.equal(model(tokens).logits, tiny(family).to(dtype)(tokens).logits)
    model.unmerge_adapter()
    same(base)
    model(tokens)
    assert model.unload() is base
    assert list(dict(base.named_parameters())) == list(before)
    assert not base._forward_pre_hooks
    same(base)


def test_a_model_of_bfloat16_trains_masters_of_float32():
    model = tiny("llama").bfloat16()
    mask = some_mask(model)
    name = "model.layers.0.mlp.up_proj"
    model = attach(model, mask)
    layer = model.get_base_model().get_submodule(name)
    before = layer.neft_values["default"].detach().clone()
    assert layer.neft_values["default"].dtype == torch.float32
    # Each step is far below the rounding of bfloat16; the masters add them up.
    train_compact(model, batches(40), lr=1e-5)
    moved = layer.neft_values["default"].detach() - before
    assert 1e-5 < moved.abs().mean() < 40 * 1e-5
    assert (moved != 0).float().mean() > 0.99
    sync(model)
    weight = layer.base_layer.weight[mask.indices[name]]
    assert torch.equal(weight, layer.neft_values["default"].bfloat16())
    untouched = (weight == layer.overlay.originals).float().mean()
    assert 0.5 < untouched < 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_of_float16_trains_with_scaled_losses(family):
    model = tiny(family).half()
    model = attach(model, some_mask(model))
    values = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in values} == {torch.float32}
    optimizer = torch.optim.AdamW(values, lr=1e-2, weight_decay=0.0)
    # Too large at first: steps with infinite gradients are left out.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    tokens, before = batches(1)[0], [p.detach().clone() for p in values]
    losses, scales = [], []
    for _ in range(25):
        loss = loss_of(model, tokens)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scales.append(scaler.get_scale())
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() < scales[-1]:
            assert all(torch.equal(p, was) for p, was in zip(values, before, strict=True))
        else:
            losses.append(loss.item())
            before = [p.detach().clone() for p in values]
    assert scales[-1] < scales[0]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_in_float16_are_the_plain_model_s(family):
    dense = tiny(family).half()
    mask, tokens = some_mask(dense), batches(1)[0]
    model = attach(copy.deepcopy(dense), mask)
    for one in (dense, model):
        (loss_of(one, tokens) * 256).backward()
    for name, layer in neft_layers(model).items():
        part = name.removeprefix("base_model.model.")
        grad = dense.get_submodule(part).weight.grad
        want = read_neurons(grad.float(), mask.indices[part], layer.axis, family == "gpt2")
        torch.testing.assert_close(layer.neft_values["default"].grad, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_micro_batches_add_up(family):
    tokens = batches(1, size=8)[0]
    grads = []
    for parts in (1, 2, 8):
        model = tiny(family).double()
        model = attach(model, some_mask(model))
        for part in tokens.chunk(parts):
            (loss_of(model, part) / parts).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, two, eight in zip(*grads, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(eight, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_changes_nothing(family):
    weights = []
    for on in (False, True):
        model = tiny(family)
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.config.use_cache = False
        model = attach(model, some_mask(model)).train()
        train_compact(model, batches(5))
        weights.append(adapter_state(model))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_state_continues_training_bit_by_bit():
    tokens = batches(6)
    whole = tiny("llama")
    mask = some_mask(whole)

    def descend(model, part):
        values = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(values, lr=0.05)
        for batch in part:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = attach(whole, mask)
    descend(whole, tokens)
    first, second = attach(tiny("llama"), mask), attach(tiny("llama"), mask)
    descend(first, tokens[:3])
    set_peft_model_state_dict(second, adapter_state(first))
    descend(second, tokens[3:])
    want, got = adapter_state(whole), adapter_state(second)
    assert list(got) == list(want)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_names_may_lack_the_model_s_prefix():
    model = tiny("gpt2")
    mask = some_mask(model)
    names = {name: name.removeprefix("transformer.") for name in mask.groups}
    short = NeuronMask(
        {names[name]: rows for name, rows in mask.indices.items()},
        {names[n]: replace(group, module=names[n]) for n, group in mask.groups.items()},
        1,
    )
    first = next(iter(adapter_state(attach(model, short))))
    assert first == "base_model.model.transformer.h.0.mlp.c_fc.neft_values"


def test_a_mask_that_does_not_fit_leaves_the_model_whole():
    model = tiny("llama")
    mask = some_mask(model)
    up = "model.layers.0.mlp.up_proj"

    def with_(module=up, **group) -> NeuronMask:
        changed = replace(mask.groups[up], module=module, **group)
        rows = {**mask.indices, module: torch.tensor([0])}
        return NeuronMask(rows, {**mask.groups, module: changed}, 1, source="m.st")

    short = {"mlp.up_proj": replace(mask.groups[up], module="mlp.up_proj")}
    two = NeuronMask({"mlp.up_proj": torch.tensor([0])}, short, 1, source="m.st")
    for wrong, text in (
        (with_(module="model.layers.7.mlp.up_proj"), "m.st: model.layers.7.mlp.up_proj: the model"),
        (two, "mlp.up_proj: the model has 2 such modules"),
        (with_(module="model.norm"), "model.norm is a LlamaRMSNorm in this model; a linear"),
        (with_(length=17), f"{up} is a Linear of shape (24, 16) in this model; use the mask's own"),
        (with_(transposed=True), f"{up} is a Linear of shape (24, 16)"),
    ):
        with pytest.raises(NeftError, match=re.escape(text)):
            attach(model, wrong)
        assert not any(isinstance(m, NeftLinear) for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(NeftError, match=re.escape("no such module")):
        attach(tiny("gpt2"), mask)


def test_a_projection_that_multi_head_attention_never_calls_is_refused():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    name = "0.self_attn.out_proj"
    mask = NeuronMask({name: torch.tensor([1])}, {name: Group(name, ROWS, 0, 8, 8)}, 500)
    text = f"{name} is in a MultiheadAttention, which takes its weight and never calls it; use a"
    with pytest.raises(NeftError, match=re.escape(text)):
        attach(model, mask)


def test_fused_weights_train_from_the_group_s_start():
    # Phi-3: the rows of up come after those of the gate
    module = nn.ModuleDict({"gate_up_proj": nn.Linear(4, 12, bias=False)})
    group = Group("gate_up_proj", ROWS, 6, 6, 4)
    mask = NeuronMask({"gate_up_proj": torch.tensor([6, 11])}, {"gate_up_proj": group}, 48)
    attach(module, mask)
    layer = module["gate_up_proj"]
    assert torch.equal(layer.neft_values["default"], layer.base_layer.weight[[6, 11]])
    with pytest.raises(NeftError, match=re.escape("not increasing in [6, 12)")):
        replace(mask, indices={"gate_up_proj": torch.tensor([5])})


def test_a_copied_model_trains_its_own_weights():
    model = tiny("llama")
    tuned = attach(model, some_mask(model))
    twin = copy.deepcopy(tuned)
    train_compact(twin, batches(2))
    assert all(layer.in_place for layer in neft_layers(twin).values())
    sync(model)
    assert torch.equal(
        model.get_submodule("model.layers.0.mlp.up_proj").base_layer.weight,
        tiny("llama").get_submodule("model.layers.0.mlp.up_proj").weight,
    )
