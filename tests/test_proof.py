"""The compact way against the reference: dense weights whose gradients are masked, and AdamW."""

import copy

import pytest
import torch
from families import shapes_of, tiny_model
from peft import get_peft_model

from neft_core import neurons
from neft_core.groups import write_neurons
from neft_core.masks import NeuronMask
from neft_core.neurons import candidates
from neft_core.patterns import Patterns
from neft_core.tuner import NeftConfig

STEPS, LR = 4, 1e-2
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


def flags(model, mask) -> dict[str, torch.Tensor]:
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


def train(model, parameters, batches, masks=None) -> list[float]:
    """Losses of a few steps."""
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for parameter, flag in zip(parameters, masks or (), strict=False):
            parameter.grad.mul_(flag)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batches_of(count=STEPS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 16, (2, 7), generator=generator) for _ in range(count)]


@pytest.mark.parametrize(("model_type", "layout"), CASES + OWN)
def test_the_compact_way_is_the_masked_way(model_type, layout):
    base = tiny_model(model_type, dtype=torch.float64)
    base.config._experts_implementation = "eager"
    mask = some_neurons(base, model_type, layout)
    chosen = flags(base, mask)
    dense = copy.deepcopy(base).requires_grad_(False)
    weights = [dense.get_parameter(name).requires_grad_() for name in chosen]
    want = train(dense, weights, batches_of(), list(chosen.values()))

    compact = get_peft_model(copy.deepcopy(base), NeftConfig(mask=mask))
    values = [parameter for parameter in compact.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in values) == mask.parameters
    got = train(compact, values, batches_of())
    assert got == pytest.approx(want, rel=1e-12)
    assert got[-1] != got[0]

    after = dict(compact.merge_and_unload().named_parameters())
    for name, before in base.named_parameters():
        flag = chosen.get(name, torch.zeros_like(before, dtype=torch.bool))
        assert torch.equal(after[name][~flag], before[~flag]), name
        if name in chosen:
            assert torch.equal(dense.get_parameter(name)[~flag], before[~flag]), name
            torch.testing.assert_close(
                after[name][flag], dense.get_parameter(name)[flag], rtol=1e-9, atol=1e-11
            )
            moved = (after[name] != before)[flag]
            assert moved.float().mean() > 0.5, f"{name} hardly trained"


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
