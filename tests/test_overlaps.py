import itertools
import math
import re
import statistics
from dataclasses import replace

import pytest
import torch
from test_selection import content, random_scores, scored

from neft_core.errors import NeftError
from neft_core.overlaps import below_counts, most_sensitive, overlap, overlaps, profile
from neft_core.selection import select_below, select_neurons


def masks_of(count: int, **budget):
    return {str(s): select_neurons(random_scores(seed=s), **budget) for s in range(count)}


def test_the_share_is_counted_neuron_by_neuron():
    masks = masks_of(3, neurons=40)
    found = overlaps(masks)
    assert list(found) == [("0", "1"), ("0", "2"), ("1", "2")]
    sets = {k: {(m, i) for m, rows in content(v).items() for i in rows} for k, v in masks.items()}
    for (a, b), common in found.items():
        assert common.share == len(sets[a] & sets[b]) / 40
        assert common.chance == 0.4
        counts = {m: [sum(x == m for x, _ in sets[k]) for k in (a, b)] for m in masks["0"].groups}
        sizes = {m: g.count for m, g in masks["0"].groups.items()}
        by_module = sum(x * y / sizes[m] for m, (x, y) in counts.items()) / 40
        assert common.by_module == pytest.approx(by_module)


def test_chance_is_that_of_all_pairs_of_masks():
    """Every mask of 2 among 5 candidates against one of them: mean and deviation of the share."""
    shares = [len({0, 1} & set(pair)) / 2 for pair in itertools.combinations(range(5), 2)]
    mean = sum(shares) / len(shares)
    deviation = math.sqrt(sum((share - mean) ** 2 for share in shares) / len(shares))
    scores = scored({"a": ([0.5, 0.4, 0.3, 0.2, 0.1], 10)})
    mask = select_neurons(scores, neurons=2)
    found = overlap(mask, mask)
    assert found.share == 1
    assert found.chance == pytest.approx(mean)
    assert found.deviation == pytest.approx(deviation)
    assert found.by_module == pytest.approx(mean)


def test_one_budget_buys_other_numbers_of_neurons_of_two_lengths():
    values = [0.9, 0.8, 0.7, 0.6], [0.4, 0.3, 0.2, 0.1]
    short, long = (
        scored({"a": (values[n], 10), "b": (values[1 - n], 20)}, total=400) for n in (0, 1)
    )
    masks = {"short": most_sensitive(short, 10), "long": most_sensitive(long, 10)}
    masks["both"] = most_sensitive(short, 15) - select_neurons(short, neurons=2)
    assert [content(mask) for mask in masks.values()] == [
        {"a": [0, 1, 2, 3]},
        {"b": [0, 1]},
        {"a": [2, 3], "b": [0]},
    ]
    found = overlaps(masks)
    assert [one.share for one in found.values()] == [0, 0.5, 0.5]
    # Every mask of the second's size among the 8 candidates.
    for (first, second), one in found.items():
        a, b = (masks[name].neurons for name in (first, second))
        mine, sets = set(range(a)), itertools.combinations(range(8), b)
        shares = [len(mine & set(other)) / a for other in sets]
        assert one.chance == pytest.approx(statistics.mean(shares))
        assert one.deviation == pytest.approx(statistics.pstdev(shares))
    assert found["short", "long"].by_module == 0
    assert found["short", "both"].by_module == pytest.approx(4 * 2 / 4 / 4)


def test_modules_that_agree_explain_a_share():
    """Two masks that chose the same module, random within it."""
    scores = scored({"a": ([0.9, 0.9, 0.0, 0.0], 10), "b": ([0.0] * 4, 10)})
    other = scored({"a": ([0.0, 0.9, 0.9, 0.0], 10), "b": ([0.0] * 4, 10)})
    found = overlap(*(select_neurons(s, neurons=2) for s in (scores, other)))
    assert (found.share, found.chance, found.by_module) == (0.5, 0.25, 0.5)


def test_masks_that_cannot_be_compared_are_refused():
    one = replace(select_neurons(random_scores(), neurons=40), source="one")
    two = replace(select_neurons(random_scores(1), neurons=39), source="two")
    with pytest.raises(NeftError, match="one: has 40 neurons, two 39; compare masks of one budget"):
        overlap(one, two)
    none = select_below(random_scores(), -1, any_size=True)
    with pytest.raises(NeftError, match="scores: has no neurons; an overlap needs at least one"):
        overlap(none, none)
    other = replace(one, provenance={"layout": "all"}, source="three")
    with pytest.raises(NeftError, match="one: base is abc, that of three is None"):
        overlap(one, other)
    with pytest.raises(NeftError, match="overlap: got 1 mask; give two at least"):
        overlaps({"a": one})


def layered(seed=0):
    scores = random_scores(seed, sizes=(6, 4, 5, 5))
    names = [f"model.layers.{n}.mlp.{role}" for n in (0, 1) for role in ("up_proj", "down_proj")]
    pairs = dict(zip(names, scores.groups, strict=True))
    return replace(
        scores,
        sensitivity={n: scores.sensitivity[old] for n, old in pairs.items()},
        groups={n: replace(scores.groups[old], module=n) for n, old in pairs.items()},
    )


def test_a_profile_by_layer_role_and_module():
    scores = layered()
    mask = select_neurons(scores, neurons=7)
    found = profile(scores, mask)
    members = {
        "layer": lambda m: m[: len("model.layers.0")],
        "role": lambda m: m[len("model.layers.0.") :],
        "module": lambda m: m,
    }
    for kind, name in members.items():
        want: dict[str, list[float]] = {}
        chosen: dict[str, int] = {}
        for module, values in scores.sensitivity.items():
            want.setdefault(name(module), []).extend(values.tolist())
            rows = content(mask).get(module, [])
            chosen[name(module)] = chosen.get(name(module), 0) + len(rows)
        assert [place.where for place in found[kind]] == list(want)
        for place in found[kind]:
            values = sorted(want[place.where])
            assert place.candidates == len(values)
            assert place.median == values[(len(values) - 1) // 2]
            assert place.mean == pytest.approx(sum(values) / len(values))
            assert place.highest == values[-1]
            assert place.selected == chosen[place.where]
            assert place.share == chosen[place.where] / len(values)
    assert all(place.selected == 0 for place in profile(scores)["module"])
    with pytest.raises(NeftError, match="its candidates differ from those of scores; give a mask"):
        profile(random_scores(), mask)


def test_counts_below_thresholds():
    scores = scored({"a": ([0.1, 0.2, 0.6, 1.1], 10)})
    assert below_counts(scores, [0.0, 0.5, 0.85, 1.0], scaled=False) == [
        (0.0, 1), (0.5, 2), (0.85, 3), (1.0, 4),
    ]  # fmt: skip
    assert below_counts(scores, [0.0, 0.4, 0.6, 1.0], scaled=True) == [
        (0.0, 0), (0.4, 1), (0.6, 2), (1.0, 3),
    ]  # fmt: skip
    with pytest.raises(NeftError, match=re.escape("below_scaled: all 2 similarities are equal")):
        below_counts(scored({"a": ([0.5, 0.5], 10)}), [0.5], scaled=True)
    assert torch.is_tensor(scores.sensitivity["a"])
