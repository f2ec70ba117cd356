import math
import re
from dataclasses import replace

import pytest
import torch

from neft_core.errors import NeftError
from neft_core.groups import Group
from neft_core.masks import NeuronMask, NeuronScores
from neft_core.selection import POLICIES, select_neurons


def scored(modules: dict[str, tuple[list[float], int]], total=1000, start=0) -> NeuronScores:
    """Scores from sensitivities and a neuron's length per module."""
    return NeuronScores(
        {name: torch.tensor(values, dtype=torch.float64) for name, (values, _) in modules.items()},
        {
            name: Group(name, 0, start, len(values), length)
            for name, (values, length) in modules.items()
        },
        total,
        {"layout": "mlp", "base": "abc"},
    )


def content(mask: NeuronMask) -> dict[str, list[int]]:
    return {module: rows.tolist() for module, rows in mask.indices.items()}


def random_scores(seed=0, sizes=(50, 30, 20), length=10, total=4000) -> NeuronScores:
    generator = torch.Generator().manual_seed(seed)
    return scored(
        {
            f"layer{n}": (torch.rand(size, generator=generator).tolist(), length)
            for n, size in enumerate(sizes)
        },
        total,
    )


def by(scores: NeuronScores, criterion: str) -> NeuronScores:
    """The same numbers as if another criterion had given them, with magnitudes of their own."""
    sizes = {module: (7 * values) % 1 for module, values in scores.sensitivity.items()}
    return replace(scores, provenance=scores.provenance | {"criterion": criterion}, magnitude=sizes)


def test_one_ranking_over_all_modules():
    scores = scored({"b": ([0.1, 0.9, 0.5], 10), "a": ([0.8, 0.05, 0.02], 10)})
    assert content(select_neurons(scores, neurons=2)) == {"b": [1], "a": [0]}
    assert content(select_neurons(scores, neurons=3)) == {"b": [1, 2], "a": [0]}
    assert content(select_neurons(scores, neurons=1)) == {"b": [1]}


def test_ties_go_to_the_earlier_module_and_index():
    # "z" comes first among the modules, though not in the alphabet
    scores = scored({"z": ([0.5, 0.0, 0.5], 10), "a": ([0.5, 0.7, 0.5], 10)})
    assert content(select_neurons(scores, neurons=2)) == {"z": [0], "a": [1]}
    assert content(select_neurons(scores, neurons=3)) == {"z": [0, 2], "a": [1]}
    assert content(select_neurons(scores, neurons=5)) == {"z": [0, 2], "a": [0, 1, 2]}


def test_many_ties_keep_their_order():
    scores = scored({"a": ([0.0] * 5000, 1), "b": ([0.0] * 5000, 1)}, 20_000)
    assert content(select_neurons(scores, neurons=5001)) == {"a": list(range(5000)), "b": [0]}


def test_indices_count_from_the_group_s_start():
    scores = scored({"gate_up": ([0.1, 0.2, 0.3], 10)}, start=100)
    mask = select_neurons(scores, neurons=2)
    assert content(mask) == {"gate_up": [101, 102]}
    assert mask.indices["gate_up"].dtype == torch.int64


def test_agrees_with_sorting_by_hand():
    scores = random_scores()
    order = sorted(
        (-value, position, row)
        for position, module in enumerate(scores.groups)
        for row, value in enumerate(scores.sensitivity[module].tolist())
    )
    for k in (1, 7, 50, 99, 100):
        want: dict[str, list[int]] = {}
        for _, position, row in order[:k]:
            want.setdefault(list(scores.groups)[position], []).append(row)
        got = content(select_neurons(scores, neurons=k))
        assert got == {module: sorted(rows) for module, rows in want.items()}


@pytest.mark.parametrize("percent", [0.25, 1, 3.1, 9, 12.49, 25])
def test_percent_is_the_longest_prefix_that_fits(percent):
    scores = random_scores()
    mask = select_neurons(scores, percent=percent)
    assert mask.percent <= percent
    assert mask.parameters == 10 * math.floor(percent * 4000 / 100 / 10)
    assert mask.neurons == mask.parameters / 10


def test_percent_where_neurons_differ_in_length():
    scores = scored({"a": ([0.9, 0.7], 30), "b": ([0.8, 0.6], 10)})
    # ranked: a0 (30), b0 (10), a1 (30), b1 (10) of 1000
    assert content(select_neurons(scores, percent=3.99)) == {"a": [0]}
    assert content(select_neurons(scores, percent=4)) == {"a": [0], "b": [0]}
    # a prefix: b1 would fit in 5 %, a1 before it does not
    assert content(select_neurons(scores, percent=5)) == {"a": [0], "b": [0]}
    assert select_neurons(scores, percent=8).neurons == 4


def test_budgets_say_the_same_in_three_ways():
    scores = random_scores(sizes=(33, 41, 27), length=7, total=3 * 707)
    for k in range(1, 102):
        mask = select_neurons(scores, neurons=k)
        assert mask.neurons == k
        assert content(select_neurons(scores, share=k / 101)) == content(mask)
        assert content(select_neurons(scores, percent=mask.percent)) == content(mask)


def test_the_paper_s_nine_percent():
    # 150,000 x 4096 of Llama-2-7b are 614.4M, 9.12 %, and 21.3 % of the candidates
    scores = scored({"a": ([0.0] * 704_512, 4096)}, 6_738_415_616)
    mask = select_neurons(scores, neurons=150_000)
    assert mask.parameters == 614_400_000
    assert round(mask.percent, 2) == 9.12
    assert round(mask.neurons / 704_512, 3) == 0.213


def test_larger_budgets_keep_what_smaller_ones_chose():
    scores = random_scores()
    for policy, (_, criterion) in POLICIES.items():
        given = by(scores, criterion or "similarity")
        masks = [select_neurons(given, policy, neurons=k, seed=3) for k in (5, 20, 60)]
        assert masks[0].overlap(masks[1]) == masks[1].overlap(masks[2]) == 1.0


def test_random_takes_as_many_and_depends_on_the_seed_alone():
    scores = random_scores()
    chosen = [select_neurons(scores, "random", percent=6, seed=seed) for seed in (1, 1, 2)]
    assert {mask.neurons for mask in chosen} == {select_neurons(scores, percent=6).neurons}
    assert content(chosen[0]) == content(chosen[1]) != content(chosen[2])
    other = random_scores(seed=5)
    assert content(select_neurons(other, "random", percent=6, seed=1)) == content(chosen[0])
    assert chosen[2].provenance["selection_seed"] == "2"


def test_provenance_says_how():
    made = select_neurons(random_scores(), percent=9).provenance
    assert made == {"layout": "mlp", "base": "abc", "policy": "lowest", "percent": "9"}
    assert select_neurons(random_scores(), neurons=9).provenance["neurons"] == "9"


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({"percent": 140}, "percent: got 140; at most 25 with layout 'mlp'"),
        ({"percent": 0}, "percent: got 0; at most 25 with"),
        ({"percent": float("nan")}, "percent: got nan; at most 25 with"),
        ({"percent": -1}, "percent: got -1; at most 25"),
        ({"percent": 0.2}, "percent: got 0.2, no neuron; at least 0.25 for one"),
        ({"neurons": 101}, "neurons: got 101; at most 100 with layout 'mlp'"),
        ({"neurons": 0}, "neurons: got 0; at most 100"),
        ({"neurons": 1.5}, "neurons: got 1.5; a whole number is needed"),
        ({"share": 1.01}, "share: got 1.01; at most 1 with layout 'mlp'"),
        ({"share": 0.001}, "share: got 0.001, no neuron; at least 0.01 for one"),
        ({}, "budget: got none; give one of percent, neurons, share"),
        ({"share": 0.1, "percent": 3}, "budget: got percent and share; give one of"),
        ({"neurons": 1, "policy": "best"}, "policy: got 'best'; known: lowest, reversed, random"),
    ],
)
def test_budgets_out_of_range_are_named(budget, text):
    with pytest.raises(NeftError, match=re.escape(text)):
        select_neurons(random_scores(), **budget)


def test_the_limit_in_the_message_is_allowed():
    scores = scored({"a": ([0.1, 0.2, 0.3], 10)}, 70)  # 42.857 %
    with pytest.raises(NeftError, match=r"at most 42\.8 with"):
        select_neurons(scores, percent=42.9)
    assert select_neurons(scores, percent=42.8).neurons == 2
    assert select_neurons(scores, percent=100 * 30 / 70).neurons == 3


def test_scores_that_are_not_numbers_are_refused():
    scores = scored({"a": ([0.1], 10), "b": ([0.1, float("nan")], 10)}, start=4)
    with pytest.raises(NeftError, match="scores: b neuron 5 is not a number; run 'neft stage sc"):
        select_neurons(scores, neurons=1)
