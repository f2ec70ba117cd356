"""The compact way against the reference: dense weights whose gradients are masked, and AdamW.

The reference keeps a copy of each trained weight in fp32 (fp64 in a model of fp64), which AdamW
moves, and rounds it to the model's precision after each update.
"""

import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from families import shapes_of, tiny_model
from peft import get_peft_model
from torch import Tensor, nn

from neft_core import neurons
from neft_core.groups import ROWS, write_neurons
from neft_core.masks import NeuronMask
from neft_core.neurons import candidates
from neft_core.patterns import Patterns
from neft_core.tuner import NeftConfig, neft_layers

pytestmark = pytest.mark.usefixtures("one_thread")

FEW, MANY, LR = 4, 100, 1e-2
TOKENS = 14
"""In each step: two sequences of seven."""
CASES = [
    (model_type, layout)
    for model_type in sorted(neurons.FAMILIES)
    for layout in neurons.LAYOUTS
    if layout != "mlp+gate" or any("gate" in mlp for mlp in neurons.FAMILIES[model_type].mlps)
]
OWN = [
    # of a family that the table doesn't have
    ("starcoder2", Patterns(("mlp.c_fc", "self_attn.[qk]_proj"), ("self_attn.o_proj", "c_proj"))),
    ("gpt2", Patterns(("attn.c_attn",), ("c_fc", "attn.c_proj"), transposed=True)),
    ("mixtral", Patterns(("experts.down_proj",), ("experts.gate_up_proj",))),
]
"""Layouts of one's own, `mlp` turned round among them."""
QUICK = [
    ("llama", "mlp"),
    ("phi3", "mlp+gate"),
    ("bloom", "attention"),
    ("gpt2", "all"),
    ("gemma", "rows"),
    ("qwen3_moe", "all"),
    ("gpt_oss", "mlp+gate"),
]
"""Each layout and each kind of weight once: linear, fused, transposed, tied, experts of both forms.
These are trained for a hundred steps by `make test`, the others by `make test-slow`."""
HUNDRED = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


class Run(NamedTuple):
    """What a training gave: its losses, and the trained weights as AdamW has them, by parameter."""

    losses: list[float]
    weights: dict[str, Tensor]


def some_neurons(model, model_type, layout, seed=0) -> NeuronMask:
    """A third of the candidates; of one module none, of one all."""
    generator = torch.Generator().manual_seed(seed)
    groups = candidates(shapes_of(model), model_type, layout)
    indices = {}
    for number, group in enumerate(groups[1:]):
        count = group.count if number == 0 else max(1, group.count // 3)
        chosen = torch.randperm(group.count, generator=generator)[:count].sort().values
        indices[group.module] = group.indices(chosen)
    total = sum(parameter.numel() for parameter in model.parameters())
    return NeuronMask(indices, {g.module: g for g in groups}, total, {"model_type": model_type})


def flags(model, mask) -> dict[str, Tensor]:
    """Which stored weights the mask selects, by parameter."""
    found = {}
    for module, indices in mask.indices.items():
        group = mask.groups[module]
        flag = torch.zeros_like(model.get_parameter(group.parameter), dtype=torch.bool)
        true = torch.ones(len(indices), group.length, dtype=torch.bool)
        write_neurons(flag, true, indices, group.axis, group.transposed)
        assert int(flag.sum()) == true.numel()
        found[group.parameter] = flag
    assert sum(int(flag.sum()) for flag in found.values()) == mask.parameters
    return found


def batches_of(count: int) -> list[Tensor]:
    """Token ids, [2, 7] each."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 16, (2, 7), generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean over tokens, in fp64 where the model is: transformers' own loss is in fp32 always."""
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def dense(
    base: nn.Module, chosen: dict[str, Tensor], batches: list[Tensor], turned: bool = False
) -> Run:
    """The reference; `turned`: with its sums, over tokens and over experts, in another order."""
    model = copy.deepcopy(base).requires_grad_(False)
    if turned:
        batches = [ids.flip(0) for ids in batches]
        model.config._experts_implementation = "batched_mm"
    weights = {name: model.get_parameter(name).requires_grad_() for name in chosen}
    precise = torch.promote_types(base.dtype, torch.float32)
    masters = {n: nn.Parameter(w.detach().to(precise, copy=True)) for n, w in weights.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=LR, weight_decay=0.0)
    losses = []
    for ids in batches:
        loss = loss_of(model, ids)
        loss.backward()
        for name, weight in weights.items():
            masters[name].grad = weight.grad.mul(chosen[name]).to(precise)
            weight.grad = None
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(masters[name])
        losses.append(loss.item())
    return Run(losses, {name: master.detach() for name, master in masters.items()})


def compact(base: nn.Module, mask: NeuronMask, batches: list[Tensor]) -> tuple[Run, nn.Module]:
    """The way of this package, and the model with what it trained merged."""
    model = get_peft_model(copy.deepcopy(base), NeftConfig(mask=mask))
    values = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in values) == mask.parameters
    optimizer = torch.optim.AdamW(values, lr=LR, weight_decay=0.0)
    losses = []
    for ids in batches:
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {}
    for module, layer in neft_layers(model.base_model.model).items():
        group, trained = mask.groups[module], layer.neft_values["default"].detach()
        weight = base.get_parameter(group.parameter).detach().to(trained.dtype, copy=True)
        write_neurons(weight, trained, mask.indices[module], group.axis, group.transposed)
        weights[group.parameter] = weight
    return Run(losses, weights), model.merge_and_unload()


def check_unselected(base, merged, chosen, run: Run) -> None:
    """Each weight that isn't selected has its bits; each that is has what was trained."""
    after = dict(merged.named_parameters())
    assert run.weights.keys() == chosen.keys()
    for name, before in base.named_parameters():
        if name not in chosen:
            assert torch.equal(after[name], before), f"{name} has moved"
            continue
        flag = chosen[name]
        assert torch.equal(after[name][~flag], before[~flag]), f"{name} has moved where not chosen"
        assert torch.equal(after[name], run.weights[name].to(before.dtype)), name
        moved = (run.weights[name] != before)[flag]
        assert moved.float().mean() > 0.5, f"{name} hardly trained"


def distance(one: Run, other: Run) -> tuple[float, float]:
    """The largest differences of a loss and of a weight."""
    pairs = zip(one.losses, other.losses, strict=True)
    weights = [(w - other.weights[name]).abs().max().item() for name, w in one.weights.items()]
    return max(abs(a - b) for a, b in pairs), max(weights)


def arithmetic_allows(base: nn.Module, mask: NeuronMask) -> bool:
    """Whether equal bits can be had on this machine.

    They can where the gradients of some rows or columns are summed in the order in which those of
    the whole weight are, which the kernels of a processor choose by shapes, and where AdamW moves a
    number in the same way wherever it stands. Experts sum a token's gradients in an order of their
    own.
    """
    generator = torch.Generator().manual_seed(3)
    for module, group in mask.groups.items():
        if group.experts:
            return False
        chosen = mask.indices.get(module)
        if chosen is None:
            continue
        shape = base.get_parameter(group.parameter).shape
        out, into = reversed(shape) if group.transposed else shape
        grad = torch.randn(TOKENS, out, generator=generator).to(base.dtype)
        x = torch.randn(TOKENS, into, generator=generator).to(base.dtype)
        wholes = grad.t() @ x, (x.t() @ grad).t()
        if group.axis == ROWS:
            part = grad[:, chosen].t() @ x
            parts = [whole[chosen] for whole in wholes]
        else:
            part = x[:, chosen].t() @ grad
            parts = [whole[:, chosen].t() for whole in wholes]
        if not all(torch.equal(part, of_whole) for of_whole in parts):
            return False
        moved, of_whole = stepped(part), stepped(wholes[0])
        of_whole = of_whole[chosen] if group.axis == ROWS else of_whole[:, chosen].t()
        if not torch.equal(moved, of_whole):
            return False
    return True


def stepped(gradient: Tensor) -> Tensor:
    """Ones, after two updates by AdamW."""
    precise = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    weight = nn.Parameter(torch.ones_like(precise))
    optimizer = torch.optim.AdamW([weight], lr=LR, weight_decay=0.0)
    for factor in (1.0, 0.3):
        weight.grad = factor * precise
        optimizer.step()
    return weight.detach()


def case(model_type: str, layout: str, dtype: torch.dtype) -> tuple[nn.Module, NeuronMask]:
    base = tiny_model(model_type, dtype=dtype)
    base.config._experts_implementation = "eager"
    return base, some_neurons(base, model_type, layout)


def compare(model_type: str, layout: str, dtype: torch.dtype, steps: int) -> None:
    """Train both ways: bits are equal where they can be, else what differs is rounding."""
    base, mask = case(model_type, layout, dtype)
    chosen, batches = flags(base, mask), batches_of(steps)
    want = dense(base, chosen, batches)
    got, merged = compact(base, mask, batches)
    check_unselected(base, merged, chosen, got)
    assert got.losses[-1] != got.losses[0]
    loss, weight = distance(got, want)
    if arithmetic_allows(base, mask):
        assert (loss, weight) == (0, 0)
    elif dtype == torch.float64:
        assert loss < 1e-12
        assert weight < 1e-10
    else:
        # AdamW divides by the size of a gradient, and so magnifies the rounding of tiny ones. How
        # far, the reference itself shows when its sums are in another order; ten times that is
        # still far below what a wrong gradient does.
        control = distance(dense(base, chosen, batches, turned=True), want)
        least = torch.finfo(dtype).eps
        assert loss <= 10 * max(control[0], least)
        assert weight <= 10 * max(control[1], least)


@pytest.mark.parametrize(("model_type", "layout"), CASES + OWN)
def test_the_compact_way_is_the_masked_way(model_type, layout):
    compare(model_type, layout, torch.float64, FEW)


STORED = ["gpt2", "qwen3_moe", "gpt_oss"]
"""A model for each way to store weights that Llama doesn't have."""


def adapted(model_type: str, **options):
    base = tiny_model(model_type, **options)
    return get_peft_model(base, NeftConfig(mask=some_neurons(base, model_type, "all")))


def gradients(run, model) -> list[torch.Tensor]:
    for ids in batches_of(2):
        run(input_ids=ids, labels=ids).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("model_type", STORED)
def test_checkpointing_changes_no_gradient(model_type, use_reentrant):
    models = [adapted(model_type).train() for _ in range(2)]
    for model in models:
        model.config.use_cache = False
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    want = gradients(models[0], models[0])
    models[1].prepare_model_for_gradient_checkpointing(models[1])
    models[1].gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    got = gradients(models[1], models[1])
    assert all(grad.any() for grad in want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss"])
def test_compiled_layers_have_the_same_gradients(model_type):
    torch._dynamo.reset()
    models = [adapted(model_type, **{"n_layer": 1, "num_hidden_layers": 1}) for _ in range(2)]
    inner = models[1].get_base_model()
    whole = model_type == "gpt2"
    for layer in inner.transformer.h if whole else inner.model.layers:
        layer.compile(backend="aot_eager", fullgraph=whole)
    torch._dynamo.utils.counters.clear()
    want, got = (gradients(model, model) for model in models)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    # Attention and what lies around the experts is in graphs, experts are not.
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 1
    assert bool(counters["graph_break"]) != whole
    if not whole:
        torch._dynamo.reset()
        inner.model.layers[0].compile(backend="aot_eager", fullgraph=True)
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match="trained neurons compute outside of the graph"
        ):
            gradients(models[1], models[1])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("model_type", "layout"), HUNDRED)
def test_a_hundred_steps(model_type, layout, dtype):
    compare(model_type, layout, getattr(torch, dtype), MANY)


@pytest.fixture(scope="module")
def trained():
    """A model in bf16, trained for a few steps: base, merged, flags, run."""
    base, mask = case("phi3", "mlp", torch.bfloat16)
    run, merged = compact(base, mask, batches_of(FEW))
    return base, merged, flags(base, mask), run


@pytest.mark.parametrize("inside", [True, False], ids=["beside selected ones", "elsewhere"])
def test_the_smallest_move_of_an_unselected_weight_is_caught(trained, inside):
    base, merged, chosen, run = trained
    check_unselected(base, merged, chosen, run)
    moved = copy.deepcopy(merged)
    if inside:
        name = next(name for name, flag in chosen.items() if not flag.all())
        place = tuple((~chosen[name]).nonzero()[-1].tolist())
    else:
        name = next(name for name, _ in moved.named_parameters() if name not in chosen)
        place = (3, 5)
    with torch.no_grad():
        weight = moved.get_parameter(name)
        weight[place] = torch.nextafter(weight[place], torch.tensor(9.0, dtype=weight.dtype))
    with pytest.raises(AssertionError, match=f"{name} has moved"):
        check_unselected(base, moved, chosen, run)


def test_a_neuron_too_many_is_caught():
    base, mask = case("gpt2", "mlp", torch.float32)
    module, indices = list(mask.indices.items())[-1]
    free = set(range(mask.groups[module].count)) - set(indices.tolist())
    more = torch.tensor(sorted([*indices.tolist(), min(free)]))
    run, merged = compact(
        base, replace(mask, indices={**mask.indices, module: more}), batches_of(FEW)
    )
    with pytest.raises(AssertionError, match=f"{module}.weight has moved where not chosen"):
        check_unselected(base, merged, flags(base, mask), run)
