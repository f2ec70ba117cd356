import copy
import re
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from neft_core.errors import NeftError
from neft_core.groups import Group, read_neurons, write_neurons
from neft_core.layer import NeftLinear
from neft_core.masks import NeuronMask
from neft_core.neurons import candidates
from neft_core.sparse import ColumnLinear, RowLinear
from neft_core.tuner import NeftConfig, neft_layers, sync

ROWS, COLUMNS = 0, 1


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def linear(kind: str, out=7, inside=5, dtype=torch.float32) -> tuple[nn.Module, bool]:
    torch.manual_seed(3)
    if kind == "conv1d":
        layer = Conv1D(out, inside)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        return layer.to(dtype), True
    return nn.Linear(inside, out, bias=kind == "bias", dtype=dtype), False


def sparse(kind: str, axis: int, indices, dtype=torch.float32, **sizes) -> NeftLinear:
    layer, _ = linear(kind, dtype=dtype, **sizes)
    rows = torch.tensor(indices)
    return NeftLinear(layer, "default", axis, len(rows), rows)


@pytest.mark.parametrize("function", [RowLinear, ColumnLinear])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_finite_differences(function, shape, transposed):
    torch.manual_seed(4)
    axis = ROWS if function is RowLinear else COLUMNS
    indices = torch.tensor([1, 4])
    stored = torch.randn((5, 7) if transposed else (7, 5), dtype=torch.float64)
    bias = torch.randn(7, dtype=torch.float64)

    def mapped(x, values):
        weight = stored.clone()
        logical = weight.t() if transposed else weight
        write_neurons(logical, values.detach(), indices, axis)
        return function.apply(x, values, logical, bias, indices)

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 5 if axis == ROWS else 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mapped, (x, values))


@pytest.mark.parametrize("kind", ["plain", "bias", "conv1d"])
@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize("indices", [[3], [0, 2, 4], list(range(5))], ids=["one", "some", "all"])
@pytest.mark.parametrize("layout", ["1d", "2d", "3d", "strided"])
def test_layer_gradients_are_those_of_the_plain_layer(kind, axis, indices, layout):
    torch.manual_seed(5)
    plain, transposed = linear(kind, out=5, dtype=torch.float64)
    layer = sparse(kind, axis, indices, torch.float64, out=5)
    x = torch.randn({"1d": (5,), "2d": (4, 5)}.get(layout, (2, 3, 5)), dtype=torch.float64)
    if layout == "strided":
        x = x.transpose(0, 1)
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    assert inputs[1].is_contiguous() == (layout != "strided")
    # Conv1D itself takes neither vectors nor strided inputs.
    outputs = [plain(inputs[0].reshape(-1, 5)).reshape(x.shape), layer(inputs[1])]
    torch.testing.assert_close(outputs[1], outputs[0])
    for y in outputs:
        (y**2).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    grad = plain.weight.grad.t() if transposed else plain.weight.grad
    want = grad[indices] if axis == ROWS else grad[:, indices].t()
    torch.testing.assert_close(layer.neft_values["default"].grad, want)
    assert layer.base_layer.weight.grad is None


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


def test_the_last_step_reaches_the_weight_with_sync_and_earlier_ones_with_forward():
    layer = sparse("plain", ROWS, [1, 3])
    with torch.no_grad():
        layer.neft_values["default"].add_(1)
    assert not layer.overlay.present
    layer(torch.zeros(1, 5))
    assert torch.equal(layer.base_layer.weight[[1, 3]], layer.neft_values["default"])
    layer.neft_values["default"].data.mul_(2)  # in place and unseen by the version
    sync(layer)
    assert torch.equal(layer.base_layer.weight[[1, 3]], layer.neft_values["default"])
    values = layer.neft_values["default"]
    values.data = values.data + 1  # another tensor
    layer(torch.zeros(1, 5))
    assert torch.equal(layer.base_layer.weight[[1, 3]], layer.neft_values["default"])
    with torch.no_grad():
        layer.base_layer.weight.zero_()  # the base loaded anew
        layer(torch.zeros(1, 5))
    assert torch.equal(layer.base_layer.weight[[1, 3]], layer.neft_values["default"])
    with torch.inference_mode():
        layer.neft_values["default"].add_(1)
        layer(torch.zeros(1, 5))
    assert torch.equal(layer.base_layer.weight[[1, 3]], layer.neft_values["default"])


def test_a_step_between_forward_and_backward_is_an_error_and_not_a_wrong_gradient():
    layer = sparse("plain", ROWS, [1])
    x = torch.randn(2, 5, requires_grad=True)
    first = layer(x)
    with torch.no_grad():
        layer.neft_values["default"].add_(1)
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


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


def test_autocast_gives_gradients_in_float32_and_saves_half_the_bytes():
    layer = sparse("bias", ROWS, [0, 2])
    plain, _ = linear("bias")
    x = torch.randn(6, 5)
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        y, want = layer(x), plain(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    y.float().pow(2).sum().backward()
    want.float().pow(2).sum().backward()
    assert layer.neft_values["default"].grad.dtype == torch.float32
    torch.testing.assert_close(
        layer.neft_values["default"].grad, plain.weight.grad[[0, 2]], rtol=0.02, atol=0.02
    )
    assert saved[0].dtype == torch.bfloat16
    # Beside it the indices and the values; of the weight no copy in bfloat16.
    own = {layer.neft_indices["default"].data_ptr(), layer.neft_values["default"].data_ptr()}
    assert {tensor.data_ptr() for tensor in saved[1:3]} == own


def test_precisions_that_do_not_fit_are_refused_as_by_the_plain_layer():
    with pytest.raises(RuntimeError, match=r"float32, the layer's weight torch\.bfloat16"):
        sparse("plain", ROWS, [0], torch.bfloat16)(torch.randn(2, 5))


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


def test_checkpointing_recomputes_with_the_values_of_its_forward():
    layer = sparse("plain", COLUMNS, [0, 3])
    x = torch.randn(2, 5)
    optimizer = torch.optim.SGD([layer.neft_values["default"]], lr=0.1)
    for _ in range(3):
        y = checkpoint(layer, x, use_reentrant=False)
        want = torch.autograd.grad((layer(x) ** 2).sum(), layer.neft_values["default"])[0]
        (y**2).sum().backward()
        assert torch.equal(layer.neft_values["default"].grad, want)
        optimizer.step()
        optimizer.zero_grad()


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes kept for backward beside parameters and indices."""
    kept = {}
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x)
    assert output.requires_grad
    return sum(kept.values())


def test_columns_keep_only_the_inputs_that_they_see():
    x = torch.randn(4, 50, 64, requires_grad=True)
    columns = sparse("plain", COLUMNS, [3, 9, 20], out=32, inside=64)
    rows = sparse("plain", ROWS, [3, 9, 20], out=32, inside=64)
    plain, _ = linear("plain", out=32, inside=64)
    assert saved_bytes(columns, x) == 4 * 50 * 3 * 4
    assert saved_bytes(rows, x) == saved_bytes(plain, x) == 4 * 50 * 64 * 4


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_a_step_costs_the_frozen_layer_and_the_selected_gradient(axis):
    # 2N forward, 2N for the input's gradient, 2P for the selected: 4N + 2P for each token
    layer = sparse("plain", axis, [3, 9, 20], out=32, inside=64)
    x = torch.randn(4, 50, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    whole, trained = 32 * 64, layer.neft_values["default"].numel()
    assert counter.get_total_flops() == 4 * 50 * (4 * whole + 2 * trained)
    # Where nothing before the layer trains, the input's gradient is not formed.
    with FlopCounterMode(display=False) as counter:
        layer(x.detach()).sum().backward()
    assert counter.get_total_flops() == 4 * 50 * (2 * whole + 2 * trained)


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
    short = NeuronMask(
        {name.removeprefix("transformer."): rows for name, rows in mask.indices.items()},
        {n.removeprefix("transformer."): group for n, group in mask.groups.items()},
        1,
    )
    first = next(iter(adapter_state(attach(model, short))))
    assert first == "base_model.model.transformer.h.0.mlp.c_fc.neft_values"


def test_a_mask_that_does_not_fit_leaves_the_model_whole():
    model = tiny("llama")
    mask = some_mask(model)
    up = "model.layers.0.mlp.up_proj"

    def with_(indices=None, module=up, **group) -> NeuronMask:
        changed = replace(mask.groups[up], module=module, **group)
        rows = torch.tensor(indices or [0])
        return NeuronMask(
            {**mask.indices, module: rows}, {**mask.groups, module: changed}, 1, source="m.st"
        )

    short = {"mlp.up_proj": replace(mask.groups[up], module="mlp.up_proj")}
    two = NeuronMask({"mlp.up_proj": torch.tensor([0])}, short, 1, source="m.st")
    for wrong, text in (
        (with_(module="model.layers.7.mlp.up_proj"), "m.st: model.layers.7.mlp.up_proj: the model"),
        (two, "mlp.up_proj: the model has 2 such modules"),
        (with_(module="model.norm"), "model.norm is a LlamaRMSNorm in this model; a linear"),
        (with_(length=17), f"{up} is a Linear of shape (24, 16) in this model; use the mask's own"),
        (with_(transposed=True), f"{up} is a Linear of shape (24, 16)"),
        (with_([3, 3]), f"{up} has indices that are not increasing in [0, 24)"),
        (with_([24]), "not increasing in [0, 24); run 'neft stage select'"),
        (with_([-1]), "not increasing in [0, 24)"),
    ):
        with pytest.raises(NeftError, match=re.escape(text)):
            attach(model, wrong)
        assert not any(isinstance(m, NeftLinear) for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(NeftError, match=re.escape("no such module")):
        attach(tiny("gpt2"), mask)


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_read_and_written_are_the_same(axis, transposed):
    logical = torch.arange(35.0).reshape(7, 5)
    stored = logical.t().contiguous() if transposed else logical.clone()
    indices = torch.tensor([0, 3])
    view = stored.t() if transposed else stored
    values = read_neurons(view, indices, axis)
    assert torch.equal(values, logical[indices] if axis == ROWS else logical.t()[indices])
    write_neurons(view, -values - 1, indices, axis)
    changed = stored.t() if transposed else stored
    want = logical.clone()
    for index in indices.tolist():
        want[(index,) if axis == ROWS else (slice(None), index)] *= -1
        want[(index,) if axis == ROWS else (slice(None), index)] -= 1
    assert torch.equal(changed, want)


def test_fused_weights_train_from_the_group_s_start():
    # Phi-3: the rows of up come after those of the gate
    module = nn.ModuleDict({"gate_up_proj": nn.Linear(4, 12, bias=False)})
    group = Group("gate_up_proj", ROWS, 6, 6, 4)
    mask = NeuronMask({"gate_up_proj": torch.tensor([6, 11])}, {"gate_up_proj": group}, 48)
    model = attach(module, mask)
    layer = module["gate_up_proj"]
    assert torch.equal(layer.neft_values["default"], layer.base_layer.weight[[6, 11]])
    outside = replace(mask, indices={"gate_up_proj": torch.tensor([5])})
    with pytest.raises(NeftError, match=re.escape("not increasing in [6, 12)")):
        attach(model.unload(), outside)


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
