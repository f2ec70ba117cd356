import ctypes
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from test_similarity import llama_weights, memory, write

from neft_core.errors import NeftError
from neft_core.groups import Group
from neft_core.masks import NeuronMask
from neft_core.utilisation import (
    STRONG,
    Utilisation,
    average,
    by_bucket,
    neuron_types,
    rank_change,
    trained_neurons,
    utilisation,
)


def states_of(n=5, layers=2, hidden=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, layers, hidden, generator=generator)


def pearson(a: list[float], b: list[float]) -> float:
    """The textbook's formula, one number after the other."""
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("piece", [48, 1 << 22])
def test_correlations_are_those_of_plain_loops(per_example, piece):
    model, states = tiny_llama(), states_of()
    found = utilisation(model, states, "all", per_example=per_example, piece=piece)
    for module, group in found.groups.items():
        weight = model.get_parameter(group.parameter).detach().double()
        neurons = (weight.t() if group.axis else weight).tolist()
        for i, w in enumerate(neurons):
            if per_example:
                best = [max(pearson(w, h) for h in layers) for layers in states.tolist()]
                want = sum(best) / len(best)
            else:
                want = max(pearson(w, h) for h in states.double().mean(0).tolist())
            assert float(found.pearson[module][i]) == pytest.approx(want, abs=1e-6)


def test_checkpoint_state_dict_and_bf16_agree_with_the_model(tmp_path):
    model, states = tiny_llama(), states_of()
    model.save_pretrained(tmp_path)
    want = utilisation(model, states).pearson
    config = {"model_type": "llama"}
    half = {n: t.bfloat16() for n, t in model.state_dict().items()}
    for other in (tmp_path, str(tmp_path)):
        for module, values in utilisation(other, states).pearson.items():
            torch.testing.assert_close(values, want[module], atol=1e-6, rtol=0)
    for module, values in utilisation(half, states, config=config).pearson.items():
        torch.testing.assert_close(values, want[module], atol=0.02, rtol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_matrices(tmp_path):
    def extra_at_peak(layers: int) -> int:
        model = write(tmp_path / "model", llama_weights(layers, hidden=512, inner=1024), shards=2)
        ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept would hide what is taken
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        utilisation(model, states_of(hidden=512), threads=1)
        return memory("VmHWM") - before

    matrix = 1024 * 512 * 4
    extra_at_peak(2)  # what a first call loads
    few, many = extra_at_peak(2), extra_at_peak(24)
    assert few > matrix / 2, "pages of a file count too"
    assert many < few + 2 * matrix


def test_a_constant_neuron_correlates_with_nothing():
    model = tiny_llama()
    states = states_of()
    with torch.no_grad():
        up = model.model.layers[0].mlp.up_proj.weight
        up[0], up[1], up[2] = 0.0, 0.1, -7e5
        # a large mean with little beside it: the difference of sums would be rounding
        up[3] = 1000 + 0.01 * torch.arange(16)
        up[4] = states.mean(0)[1] * 5 + 3
    got = utilisation(model, states).pearson["model.layers.0.mlp.up_proj"]
    assert got[:3].tolist() == [0, 0, 0]
    mean = states.double().mean(0).tolist()
    want = max(pearson(up[3].double().tolist(), h) for h in mean)
    assert float(got[3]) == pytest.approx(want, abs=1e-5)
    assert float(got[4]) == pytest.approx(1, abs=1e-6)


def groups_of(*sizes: int) -> dict[str, Group]:
    names = [f"model.layers.{n // 2}.mlp.{('up', 'down')[n % 2]}_proj" for n in range(len(sizes))]
    return {
        n: Group(n, i % 2, 0, size, 4) for i, (n, size) in enumerate(zip(names, sizes, strict=True))
    }


def test_ranks_go_from_the_highest_and_ties_by_module_and_index():
    groups = groups_of(3, 2)
    values = [torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.5, 0.9])]
    ranks = Utilisation(dict(zip(groups, values, strict=True)), groups).ranks()
    assert ranks.tolist() == [4, 0, 2, 3, 1]


def test_rank_changes_by_loops():
    generator = torch.Generator().manual_seed(3)
    groups = groups_of(40, 60, 50, 50)
    names = list(groups)
    used = [
        Utilisation(
            {m: torch.rand(g.count, generator=generator) for m, g in groups.items()}, groups
        )
        for _ in range(2)
    ]
    before, after = (u.ranks() for u in used)
    change = rank_change(before, after)
    flat = [[float(v) for m in names for v in u.pearson[m]] for u in used]
    places = [sorted(range(200), key=lambda i, f=f: -f[i]) for f in flat]
    want = [places[1].index(i) - places[0].index(i) for i in range(200)]
    assert change.tolist() == want
    assert average(change) == pytest.approx(sum(map(abs, want)) / 200)
    edges = (0, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 1)
    rows = by_bucket(change, before)
    for (low, high, count, mean), a, b in zip(rows, edges, edges[1:], strict=False):
        mine = [abs(want[i]) for place, i in enumerate(places[0]) if a <= place / 200 < b]
        assert (low, high, count) == (a, b, len(mine))
        assert mean == pytest.approx(sum(mine) / len(mine))
    assert sum(row[2] for row in rows) == 200
    trained = torch.rand(200, generator=generator) < 0.3
    found = neuron_types(change, trained, groups)
    layers = ["model.layers.0"] * 100 + ["model.layers.1"] * 100
    for layer in ("all", "model.layers.0", "model.layers.1"):
        mine = [i for i in range(200) if layer in ("all", layers[i])]
        strong = [i for i in mine if abs(want[i]) > 200 * 100_000 / 704_512]
        assert 0 < len(strong) < len(mine)
        assert found[layer] == {
            "neurons": len(mine),
            "strongly affected": len(strong),
            "suppressed": sum(want[i] > 0 for i in strong),
            "indirectly affected": sum(not trained[i] for i in strong),
        }


def test_the_paper_s_threshold_is_more_than_100_000_of_llama_2_7b():
    groups = {"model.layers.0.up": Group("model.layers.0.up", 0, 0, 704_512, 4)}
    change = torch.zeros(704_512, dtype=torch.int64)
    change[:4] = torch.tensor([100_000, 100_001, -100_001, -100_000])
    found = neuron_types(change, torch.zeros(704_512, dtype=torch.bool), groups, STRONG)["all"]
    assert found["strongly affected"] == 2
    assert found["suppressed"] == 1
    assert found["indirectly affected"] == 2


def test_trained_neurons_are_those_of_the_mask():
    groups = {"a": Group("a", 0, 10, 4, 2), "b": Group("b", 1, 0, 3, 2)}
    mask = NeuronMask({"a": torch.tensor([10, 13])}, groups, 100)
    assert trained_neurons(mask, groups).tolist() == [True, False, False, True, False, False, False]
    other = {"a": Group("a", 0, 0, 4, 2), "b": groups["b"]}
    with pytest.raises(
        NeftError, match="mask: made for other candidates in a; give a mask of this"
    ):
        trained_neurons(mask, other)


@pytest.mark.parametrize(
    ("states", "layout", "text"),
    [
        (states_of(0), "mlp", "utilisation: got states of shape (0, 2, 16); [sentences, layers"),
        (torch.zeros(2, 16), "mlp", "utilisation: got states of shape (2, 16); ["),
        (states_of() * np.nan, "mlp", "utilisation: a hidden state is not finite"),
        (states_of(), "rows", "down_proj has neurons of 24 weights, the hidden size is 16"),
    ],
)
def test_states_that_do_not_fit_are_refused(states, layout, text):
    with pytest.raises(NeftError, match=re.escape(text)):
        utilisation(tiny_llama(), states, layout)


def test_ranks_of_different_models_are_refused():
    with pytest.raises(
        NeftError, match="dRank: got 4 and 5 candidates; compare models of one form"
    ):
        rank_change(torch.arange(4), torch.arange(5))
