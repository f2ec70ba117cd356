import copy
import re
from dataclasses import replace

import pytest
import torch
from families import EXPERTS, HIDDEN, INNER, shapes_of, tiny_model
from peft import PeftModel, get_peft_model
from test_sparse import Largest
from torch import nn

from neft_core.errors import NeftError
from neft_core.expert_layer import NeftExperts
from neft_core.groups import COLUMNS, ROWS, read_neurons, write_neurons
from neft_core.masks import NeuronMask
from neft_core.methods import moved_outside
from neft_core.neurons import candidates
from neft_core.sparse_experts import ExpertsLinear, Route, by_expert, experts_forward
from neft_core.tuner import NeftConfig

BOTH = ["qwen3_moe", "gpt_oss"]
EXPERT = "model.layers.0.mlp.experts"


def weight(axis: int, seed: int = 0) -> torch.Tensor:
    """[E, out, in] with four neurons in each matrix."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 5) if axis == ROWS else (5, 4)
    return torch.randn(EXPERTS, *shape, generator=generator, dtype=torch.float64)


def test_a_route_by_hand():
    route = Route.sorted(torch.tensor([[2, 0], [0, 3], [2, 1]]), 3)
    assert route.bounds == [0, 2, 3, 5], "number 3 means no expert"
    assert route.tokens.tolist() == [0, 1, 2, 0, 2, 1]
    assert route.place.tolist() == [3, 0, 1, 5, 4, 2]
    assert [route.count(e) for e in range(3)] == [2, 1, 2]


def test_neurons_by_expert():
    found = by_expert(torch.tensor([1, 3, 9, 11]), 3, 4)
    assert [(m.expert, m.rows, m.within.tolist()) for m in found] == [
        (0, slice(0, 2), [1, 3]),
        (2, slice(2, 4), [1, 3]),
    ]
    assert by_expert(torch.empty(0, dtype=torch.int64), 3, 4) == []


ROUTES = {
    "all reached": [[0, 1], [2, 0], [1, 2], [0, 2]],
    "one not reached": [[0, 1], [1, 0], [0, 1], [1, 0]],
    "some none": [[0, 3], [3, 2], [3, 3], [2, 0]],
}


@pytest.mark.parametrize("stand", [True, False])
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize("name", ROUTES)
def test_gradients_are_those_of_finite_differences(name, axis, gather, stand):
    route = Route.sorted(torch.tensor(ROUTES[name]), EXPERTS)
    own = weight(axis)
    indices = torch.tensor([1, 2, 8, 11])
    values = weight(axis, 1)
    values = read_neurons(values, indices, axis).requires_grad_()
    x = torch.randn(4 if gather else 8, own.shape[2], dtype=torch.float64, requires_grad=True)

    def linear(x, values):
        stored = own.clone()
        if stand:
            write_neurons(stored, values, indices, axis)
        return ExpertsLinear.apply(x, values, stored, indices, axis, route, gather, None, stand)

    assert torch.autograd.gradcheck(linear, (x, values), atol=1e-8, rtol=1e-6)
    full = own.clone()
    write_neurons(full, values, indices, axis)
    pairs = x[route.tokens] if gather else x
    for expert in range(EXPERTS):
        mine = route.pairs(expert)
        torch.testing.assert_close(linear(x, values)[mine], pairs[mine] @ full[expert].t())
    assert not linear(x, values)[route.bounds[-1] :].any()


def saved_bytes(run) -> int:
    """What is kept for backward, each storage once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_an_expert_without_selected_neurons_keeps_nothing(axis):
    stored, size = weight(axis), 8
    x = torch.randn(300, stored.shape[2], dtype=torch.float64)
    route = Route.sorted(torch.tensor([[0]] * 10 + [[1]] * 200 + [[2]] * 90), EXPERTS)

    def kept(*neurons):
        indices = torch.tensor(neurons, dtype=torch.int64)
        values = read_neurons(stored, indices, axis).requires_grad_()
        own = (values, indices, stored)
        seen = saved_bytes(
            lambda: ExpertsLinear.apply(x, values, stored, indices, axis, route, True, None, True)
        )
        return seen - sum(t.untyped_storage().nbytes() for t in own[1:])

    of_expert = stored.shape[2] if axis == ROWS else 1
    assert kept(1) == 10 * of_expert * size
    assert kept(9) == 90 * of_expert * size
    if axis == COLUMNS:
        assert kept(0, 1, 8) == (10 * 2 + 90) * size
    else:
        assert kept(0, 1, 8) == 100 * of_expert * size
        assert kept(0, 4, 8) == x.numel() * size, "the input itself, where all is needed"


def test_an_expert_that_no_token_reached_has_no_gradient():
    stored, indices = weight(ROWS), torch.tensor([0, 9])
    values = read_neurons(stored, indices, ROWS).requires_grad_()
    route = Route.sorted(torch.tensor([[0], [1]]), EXPERTS)
    x = torch.randn(2, 5, dtype=torch.float64)
    ExpertsLinear.apply(x, values, stored, indices, ROWS, route, True, None, True).sum().backward()
    assert values.grad[0].abs().sum() > 0
    assert values.grad[1].tolist() == [0.0] * 5


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("model_type", [*BOTH, "mixtral", "qwen2_moe"])
def test_the_forward_is_the_module_s(model_type, implementation):
    experts = tiny_model(model_type).model.layers[0].mlp.experts
    experts.config._experts_implementation = implementation
    hidden, shares = torch.randn(9, HIDDEN), torch.rand(9, 2)
    chosen = torch.randint(0, EXPERTS, (9, 2))

    def linear(name, x, route, gather):
        stored = getattr(experts, name)
        stored = stored.transpose(1, 2) if experts.is_transposed else stored
        return ExpertsLinear.apply(x, None, stored, None, 0, route, gather, None, True)

    got = experts_forward(experts, hidden, chosen, shares, linear)
    torch.testing.assert_close(got, experts(hidden, chosen, shares))


def dense_gradient(experts, adapter) -> torch.Tensor:
    """Of the adapter's neurons, from the gradient of the whole parameter."""
    part = adapter.base_layer
    grad = getattr(experts, part.name).grad
    return read_neurons(grad, adapter.neft_indices["default"], part.axis, part.transposed).float()


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().float(), want.detach().float()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("form", ["in_place", "additive"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", BOTH)
def test_precisions_are_the_module_s_with_autocast_and_without(
    model_type, dtype, implementation, form
):
    base = tiny_model(model_type, dtype=dtype, intermediate_size=16, moe_intermediate_size=16)
    base.config._experts_implementation = implementation
    plain = copy.deepcopy(base).get_submodule(EXPERT)
    model = get_peft_model(base, NeftConfig(mask=expert_mask(base, model_type), form=form))
    compact = model.get_base_model().get_submodule(EXPERT)
    torch.manual_seed(2)
    chosen, failures = torch.rand(9, EXPERTS).topk(2).indices, []
    for kind in (dtype, torch.float32):
        for on in (False, True):
            x, shares = torch.randn(9, HIDDEN, dtype=kind), torch.rand(9, 2, dtype=kind)
            found = []
            for experts in (plain, compact):
                experts.zero_grad()
                hidden = x.clone().requires_grad_()
                with torch.autocast("cpu", torch.bfloat16, enabled=on):
                    try:
                        y = experts(hidden, chosen, shares)
                    except RuntimeError as error:
                        found.append(str(error))
                        continue
                y.float().pow(2).sum().backward()
                found.append((y, hidden.grad))
            if isinstance(found[0], str):
                assert isinstance(found[1], str), found[0]
                failures.append((kind, on))
                continue
            assert not isinstance(found[1], str), found[1]
            (want, want_x), (got, got_x) = found
            low = kind != torch.float32 or dtype != torch.float32 or on
            assert got.dtype == want.dtype
            assert got_x.dtype == want_x.dtype
            # Sums of pairs, and in `batched_mm` of weights too, are rounded in another order.
            assert far(got_x, want_x) < (5e-3 if low else 1e-6)
            exact = implementation != "batched_mm"
            assert far(got, want) < (1e-3 if low else 1e-6)
            for adapter in compact.weights.values():
                assert adapter.neft_values["default"].grad.dtype == torch.float32
                worst = far(adapter.neft_values["default"].grad, dense_gradient(plain, adapter))
                assert worst < ((1e-3 if exact else 8e-3) if low else 1e-6), (kind, on, worst)
    mixed = dtype != torch.float32 and implementation != "grouped_mm"
    assert failures == ([(torch.float32, False)] if mixed else [])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_backward_amid_autocast_has_the_precisions_of_forward(implementation):
    base = tiny_model("gpt_oss", intermediate_size=16)
    base.config._experts_implementation = implementation
    model = get_peft_model(base, NeftConfig(mask=expert_mask(base, "gpt_oss")))
    trained, grads = [p for p in model.parameters() if p.requires_grad], []
    for amid in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS).logits.float().pow(2).sum()
            with torch.autocast("cpu", enabled=amid, dtype=torch.bfloat16):
                grads.append(torch.autograd.grad(loss, trained))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def expert_mask(model, model_type, layout="mlp+gate", seed=0, only="experts") -> NeuronMask:
    generator = torch.Generator().manual_seed(seed)
    groups = {g.module: g for g in candidates(shapes_of(model), model_type, layout)}
    indices = {}
    for module, group in groups.items():
        if only in module:
            chosen = torch.randperm(group.count, generator=generator)[: group.count // 4]
            indices[module] = group.indices(chosen.sort().values)
    return NeuronMask(indices, groups, 10_000, {"model_type": model_type, "layout": layout})


def steps(model, count=3) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    losses = []
    for ids in torch.randint(3, 16, (count, 2, 8), generator=torch.Generator().manual_seed(1)):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


IDS = torch.arange(3, 15)[None]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", BOTH)
def test_an_adapter_of_experts_lives_as_any_other(model_type, dtype, tmp_path):
    """Trains, saves, loads, merges and unmerges to the bit, switches, and leaves the base whole."""
    # torch's grouped products need rows of 16 bytes.
    base = tiny_model(model_type, dtype=dtype, intermediate_size=16, moe_intermediate_size=16)
    own = state(base)
    plain = logits(base)
    model = get_peft_model(copy.deepcopy(base), NeftConfig(mask=expert_mask(base, model_type)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(logits(model).argmax(-1), plain.argmax(-1))
    assert steps(model)[-1] > 0
    trained = logits(model)
    assert not torch.equal(trained, plain)
    # The base's parameters are the base's, whoever reads them.
    stored = {n.replace(".base_layer", ""): t for n, t in
              model.get_base_model().state_dict().items() if "neft_" not in n}  # fmt: skip
    assert all(torch.equal(stored[name], own[name]) for name in own)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), trained)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(again), trained)
    other = expert_mask(base, model_type, seed=5)
    again.add_adapter("other", NeftConfig(mask=other))
    again.set_adapter("other")
    assert torch.equal(logits(again).argmax(-1), plain.argmax(-1)), "new values are the base's"
    steps(again)
    second = logits(again)
    again.set_adapter("default")
    assert torch.equal(logits(again), trained)
    again.merge_adapter()
    torch.testing.assert_close(logits(again), trained, rtol=0.02, atol=0.05)
    again.unmerge_adapter()
    assert torch.equal(logits(again), trained)
    again.set_adapter("other")
    assert torch.equal(logits(again), second)
    again.set_adapter("default")
    again.delete_adapter("other")
    assert same(state(copy.deepcopy(again).unload()), own)
    assert not any(isinstance(m, NeftExperts) for m in again.merge_and_unload().modules())
    compared, moved = moved_outside(model, base)
    assert moved == []
    chosen = expert_mask(base, model_type).parameters
    assert compared == sum(p.numel() for p in base.parameters()) - chosen


@pytest.mark.parametrize("form", ["in_place", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("model_type", BOTH)
def test_no_step_allocates_what_the_experts_need(model_type, autocast, dtype, form):
    """At most one expert's matrix, where it has to be copied or cast."""
    sizes = {"hidden_size": 48, "intermediate_size": 40, "moe_intermediate_size": 40}
    base = tiny_model(model_type, dtype=dtype, **sizes)
    base.config._experts_implementation = "eager"
    mask = expert_mask(base, model_type)
    few = {name: rows[rows % 10 == 0] for name, rows in mask.indices.items()}
    model = get_peft_model(base, NeftConfig(mask=replace(mask, indices=few), form=form))
    experts = model.get_base_model().get_submodule(EXPERT)
    hidden = torch.randn(3, 48, dtype=dtype, requires_grad=True)
    chosen = torch.tensor([[0, 1], [1, 2], [0, 2]])
    shares = torch.rand(3, 2, dtype=dtype)
    own = [*experts.parameters(), *experts.buffers()]
    for _ in range(2):
        step = Largest(own)
        with step:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = experts(hidden, chosen, shares)
            y.sum().backward()
    values = [part.neft_values["default"].numel() for part in experts.weights.values()]
    one = 2 * 40 * 48
    assert max(values) < one / 2
    whole = form == "additive" or (autocast and dtype == torch.float32)
    assert step.most == one if whole else step.most < one / 2, step.numbers


@pytest.mark.parametrize("model_type", BOTH)
def test_a_weight_that_moved_beside_the_mask_is_found(model_type):
    base = tiny_model(model_type)
    mask = expert_mask(base, model_type)
    model = get_peft_model(copy.deepcopy(base), NeftConfig(mask=mask))
    module, name = f"{EXPERT}.down_proj", "down_proj"
    group = mask.groups[module]
    outside = next(i for i in range(group.count) if i not in mask.indices[module])
    experts = model.get_base_model().get_submodule(EXPERT).base_layer
    parameter = getattr(experts, name)
    index = torch.tensor([outside])
    was = read_neurons(parameter, index, group.axis, group.transposed)
    write_neurons(parameter, was + 1e-6, index, group.axis, group.transposed)
    assert moved_outside(model, base)[1] == [module]


@pytest.mark.parametrize("model_type", BOTH)
def test_additive_and_in_place_train_the_same(model_type):
    base = tiny_model(model_type, dtype=torch.float64)
    mask = expert_mask(base, model_type)
    runs = []
    for form in ("in_place", "additive"):
        model = get_peft_model(copy.deepcopy(base), NeftConfig(mask=mask, form=form))
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        runs.append((steps(model), logits(model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-12)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-10, atol=1e-12)


def test_a_move_between_types_keeps_the_base_s_bits():
    base = tiny_model("gpt_oss")
    model = get_peft_model(copy.deepcopy(base), NeftConfig(mask=expert_mask(base, "gpt_oss")))
    steps(model)
    model.double()
    assert same(state(model.unload()), state(copy.deepcopy(base).double()))


def test_only_one_of_two_parameters_may_be_trained():
    base = tiny_model("qwen3_moe", dtype=torch.float64)
    mask = expert_mask(base, "qwen3_moe", only="experts.down_proj")
    model = get_peft_model(copy.deepcopy(base), NeftConfig(mask=mask))
    assert list(model.get_base_model().get_submodule(EXPERT).weights) == ["down_proj"]
    losses = steps(model)
    assert losses[1] != losses[0]
    # A second adapter of the other one.
    second = expert_mask(base, "qwen3_moe", only="experts.gate_up_proj")
    model.add_adapter("up", NeftConfig(mask=second))
    model.set_adapter("up")
    steps(model)
    assert list(model.get_base_model().get_submodule(EXPERT).weights) == [
        "down_proj",
        "gate_up_proj",
    ]
    model.delete_adapter("default")
    assert same(state(model.unload()), state(base))


def test_what_does_not_fit_leaves_the_model_whole():
    base = tiny_model("qwen3_moe")
    mask = expert_mask(base, "qwen3_moe")
    module = f"{EXPERT}.gate_up_proj"

    def refuses(model, mask, text):
        before = [type(m) for m in model.modules()]
        with pytest.raises(NeftError, match=re.escape(text)) as caught:
            get_peft_model(model, NeftConfig(mask=mask))
        assert "\n" not in str(caught.value)
        assert [type(m) for m in model.modules()] == before

    wide = tiny_model("qwen3_moe", moe_intermediate_size=INNER + 4)
    refuses(wide, mask, f"{module} has shape (3, 32, 8) and torch.float32 in this model")
    more = tiny_model("qwen3_moe", num_experts=4, num_local_experts=4)
    refuses(more, mask, f"{module} has shape (4, 24, 8)")
    refuses(tiny_model("llama"), mask, f"{module}: the model has no such module")
    ups = {**mask.groups, module: replace(mask.groups[module], start=INNER, count=36)}
    with pytest.raises(NeftError, match="has indices that are not increasing in its candidates"):
        replace(mask, groups=ups, indices={module: torch.tensor([0])})
    whole = copy.deepcopy(base)
    for layer in whole.model.layers:
        if hasattr(layer.mlp, "experts"):
            own = nn.Module()
            own.gate_up_proj = layer.mlp.experts.gate_up_proj
            own.down_proj = layer.mlp.experts.down_proj
            layer.mlp.experts = own
    refuses(whole, mask, "Module computes in its own way; experts that transformers marks")


def test_experts_with_hooks_are_refused_when_called():
    base = tiny_model("qwen3_moe")
    model = get_peft_model(base, NeftConfig(mask=expert_mask(base, "qwen3_moe")))
    experts = model.get_base_model().get_submodule(EXPERT).base_layer
    experts.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(NeftError, match="Qwen3MoeExperts: its call is hooked into"):
        logits(model)
