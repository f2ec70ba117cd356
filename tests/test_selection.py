import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neft_core.errors import NeftError
from neft_core.groups import Group
from neft_core.masks import NeuronMask, NeuronScores
from neft_core.selection import POLICIES, select_below, select_neurons, union


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
        ({"neurons": 1, "policy": ["lowest"]}, "policy: got ['lowest']; known: lowest, reversed"),
        ({"percent": "9"}, "percent: got '9'; a number is needed"),
        ({"neurons": [9]}, "neurons: got [9]; a number is needed"),
        ({"percent": 9, "policy": "random", "seed": 1.5}, "seed: got 1.5; a whole number of 64"),
        ({"percent": 9, "policy": "random", "seed": "a"}, "seed: got 'a'; a whole number"),
        ({"percent": 9, "policy": "random", "seed": 2**64}, "seed: got 18446744073709551616; a"),
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
    sizes = {"magnitude": {"a": torch.tensor([0.1]), "b": torch.tensor([0.1, float("nan")])}}
    scores = replace(scored({"a": ([0.1], 10), "b": ([0.1, 0.2], 10)}, start=4), **sizes)
    with pytest.raises(NeftError, match="scores: b neuron 5 is not a number"):
        select_neurons(scores, "magnitude", neurons=1)


def test_of_no_scores_nothing_is_selected():
    for select in (lambda s: select_neurons(s, percent=1), lambda s: select_below(s, 0.5)):
        with pytest.raises(NeftError, match="scores: holds no neurons; give scores of a task that"):
            select(NeuronScores({}, {}, 0))


@pytest.mark.parametrize("what", ["scores.safetensors", Path("s"), None, {}, "mask"])
def test_what_is_no_scores_is_told(what):
    what = select_neurons(random_scores(), neurons=1) if what == "mask" else what
    text = f"scores: got {type(what).__name__}; NeuronScores are needed (NeuronScores.load of a"
    for select in (lambda s: select_neurons(s, percent=1), lambda s: select_below(s, 0.5)):
        with pytest.raises(NeftError, match=re.escape(text)):
            select(what)


def ranked_by_loops(scores: NeuronScores, better) -> list[tuple[str, int]]:
    """All candidates by repeatedly looking for the best that is left; the first of equal ones."""
    left = [
        (module, i, value)
        for module in scores.groups
        for i, value in enumerate(scores.sensitivity[module].tolist())
    ]
    order = []
    while left:
        best = 0
        for at, entry in enumerate(left):
            if better(entry[2], left[best][2]):
                best = at
        module, i, _ = left.pop(best)
        order.append((module, i))
    return order


@pytest.mark.parametrize(
    ("policy", "better"),
    [
        ("lowest", lambda a, b: a > b),
        ("reversed", lambda a, b: a < b),
        ("magnitude", lambda a, b: (7 * a) % 1 > (7 * b) % 1),
        ("gradient", lambda a, b: a > b),
        ("activation", lambda a, b: a > b),
        ("probe", lambda a, b: a > b),
    ],
)
def test_every_policy_ranks_as_plain_loops_do(policy, better):
    scores = by(random_scores(sizes=(9, 7, 8)), POLICIES[policy][1])
    # ties of three, within and between modules
    for module, place in (("layer0", 2), ("layer0", 7), ("layer2", 1)):
        scores.sensitivity[module][place] = 0.5
        scores.magnitude[module][place] = (7 * 0.5) % 1
    order = ranked_by_loops(scores, better)
    for k in range(1, 25):
        want: dict[str, list[int]] = {}
        for module, i in order[:k]:
            want.setdefault(module, []).append(i)
        got = content(select_neurons(scores, policy, neurons=k))
        assert got == {module: sorted(rows) for module, rows in want.items()}


@pytest.mark.parametrize("policy", ["lowest", "reversed", "random"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.77, 1.0])
def test_the_same_share_of_each_module(policy, share):
    scores = random_scores(sizes=(40, 20, 60))
    mask = select_neurons(scores, policy, share=share, seed=3, per_module=True)
    assert mask.neurons == int(share * 120)
    for module, values in scores.sensitivity.items():
        kept = mask.indices.get(module, torch.empty(0)).tolist()
        assert abs(len(kept) - share * len(values)) <= 1, "of a whole number of neurons"
        if policy != "random":
            order = values.sort(descending=policy == "lowest").indices.tolist()
            assert kept == sorted(order[: len(kept)])
    assert mask.provenance["per_module"] == "true"


def test_of_equal_modules_each_gives_as_many_the_best_ones_first():
    scores = scored({"b": ([0.1, 0.9, 0.5, 0.2], 10), "a": ([0.01, 0.05, 0.02, 0.03], 10)})
    taken = [content(select_neurons(scores, neurons=k, per_module=True)) for k in (1, 2, 3, 4)]
    assert taken == [
        {"b": [1]}, {"b": [1], "a": [1]}, {"b": [1, 2], "a": [1]}, {"b": [1, 2], "a": [1, 3]},
    ]  # fmt: skip


def test_lowest_and_reversed_share_the_candidates_between_them():
    scores = random_scores()
    low, high = (select_neurons(scores, p, neurons=50) for p in ("lowest", "reversed"))
    assert low.overlap(high) == 0
    assert (low | high).neurons == 100


@pytest.mark.parametrize("below", [-1, 0.1, 0.5, 0.999, 1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_thresholds_select_what_loops_select(below, scaled):
    scores = scored({"a": ([0.0, 0.85, 0.5, 2.0, 0.001], 10), "b": ([0.5, 1.0, 0.1], 10)})
    similarity = {m: [1 - v for v in values.tolist()] for m, values in scores.sensitivity.items()}
    everything = [v for values in similarity.values() for v in values]
    least, most = min(everything), max(everything)
    want = {}
    for module, values in similarity.items():
        mine = [(v - least) / (most - least) if scaled else v for v in values]
        if rows := [i for i, v in enumerate(mine) if v < below]:
            want[module] = rows
    mask = select_below(scores, below, scaled=scaled, any_size=True)
    assert content(mask) == want
    assert mask.provenance["policy"] == "threshold"
    assert mask.provenance["scaled"] == str(scaled).lower()


def test_a_threshold_tells_similarities_near_one_apart():
    tiny = [1e-9, 2e-9, 3e-9]
    scores = scored({"a": (tiny, 10)})
    assert content(select_below(scores, 1 - 1.5e-9)) == {"a": [1, 2]}
    assert content(select_below(scores, 0.5, scaled=True)) == {"a": [2]}
    scores = scored({"a": ([0.0, 1e-17, 3e-17], 10)})
    assert content(select_below(scores, 1)) == {"a": [1, 2]}
    # float64 has no similarity between 1 - 1e-17 and 1; scaling still sees the sensitivities
    scores = scored({"a": ([1e-18, 2e-18, 4e-18], 10)})
    assert content(select_below(scores, 0.9, scaled=True)) == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("below", "scaled", "text"),
    [
        (
            0.1,
            False,
            "below: got 0.1, which selects no neuron; the similarities go from 0.2 to 0.9",
        ),
        (1, False, "below: got 1, which selects all 3 neurons; the similarities go from 0.2 to"),
        (
            0,
            True,
            "below_scaled: got 0, which selects no neuron; the similarities go from 0 to 1 when",
        ),
        (1.5, True, "below_scaled: got 1.5, which selects all 3 neurons; the"),
    ],
)
def test_a_threshold_for_nothing_or_everything_is_refused(below, scaled, text):
    scores = scored({"a": ([0.1, 0.5, 0.8], 10)})
    with pytest.raises(NeftError, match=re.escape(text)):
        select_below(scores, below, scaled=scaled)
    assert select_below(scores, below, scaled=scaled, any_size=True).neurons in (0, 3)


def test_equal_similarities_cannot_be_scaled():
    with pytest.raises(NeftError, match="below_scaled: all 2 similarities are equal; they "):
        select_below(scored({"a": ([0.5, 0.5], 10)}), 0.5, scaled=True, any_size=True)


def test_a_union_has_common_neurons_once():
    one, two = random_scores(seed=1), random_scores(seed=2)
    masks = [select_neurons(scores, percent=6) for scores in (one, two)]
    sets = [{(m, i) for m, rows in content(mask).items() for i in rows} for mask in masks]
    joined = union(masks)
    assert {(m, i) for m, rows in content(joined).items() for i in rows} == sets[0] | sets[1]
    assert joined.neurons == len(sets[0] | sets[1]) < 2 * masks[0].neurons
    assert joined.percent == 100 * 10 * joined.neurons / 4000
    assert content(union([masks[0]])) == content(masks[0])
    assert content(union([*masks, masks[0]])) == content(joined)


def test_a_union_of_nothing_is_refused():
    with pytest.raises(NeftError, match="union: got no mask; give one at least"):
        union([])


def test_a_union_of_other_models_or_layouts_is_refused():
    one = replace(random_scores(), source="one.safetensors")
    two = replace(one, provenance={"layout": "all", "base": "abc"}, source="two.safetensors")
    masks = [select_neurons(scores, percent=6) for scores in (one, two)]
    with pytest.raises(NeftError, match=r"one\.safetensors: layout is mlp, that of two\.safetenso"):
        union(masks)
    other = replace(one, provenance={"layout": "mlp", "base": "abd"})
    with pytest.raises(NeftError, match="base is abc, that of"):
        union([masks[0], select_neurons(other, percent=6)])


def test_scores_of_another_criterion_are_refused():
    scores = random_scores()
    with pytest.raises(NeftError, match="policy: got 'probe' with scores by similarity; give scor"):
        select_neurons(scores, "probe", percent=6)
    with pytest.raises(NeftError, match="policy: got 'lowest' with scores by gradient; give"):
        select_neurons(by(scores, "gradient"), percent=6)
    with pytest.raises(NeftError, match="policy: got 'threshold' with scores by gradient; give"):
        select_below(by(scores, "gradient"), 0.5)
    with pytest.raises(NeftError, match="scores: holds no magnitudes; use the scores of a warm-up"):
        select_neurons(scores, "magnitude", percent=6)
    select_neurons(by(scores, "gradient"), "random", percent=6)
