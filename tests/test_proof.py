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
from neft_core.tuner import NeftConfig

STEPS, LR = 4, 1e-2
CASES = [
    (model_type, layout)
    for model_type in sorted(neurons.FAMILIES)
    for layout in neurons.LAYOUTS
    if layout != "mlp+gate" or any("gate" in mlp for mlp in neurons.FAMILIES[model_type].mlps)
]


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


@pytest.mark.parametrize(("model_type", "layout"), CASES)
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
