import pytest

from neft_core.errors import NeftError
from neft_core.rows import read_rows
from neft_core.splits import sample, split_rows


def pair(source, target, **more):
    return {"source": source, "target": target, **more}


def pairs(count, prefix=""):
    return [pair(f"{prefix}s{i}", f"{prefix}t{i}") for i in range(count)]


def talk(*turns):
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


def given(train, dev=None, test=None, **more):
    return {
        "train": train,
        "dev": dev or [pair("dev s", "dev t")],
        "test": test or [pair("test s", "test t")],
        **more,
    }


def test_given_splits_are_kept_in_their_order():
    rows = given(pairs(5), pairs(3, "d"), pairs(2, "x"), pretrain=pairs(4, "p"))
    splits, stats = split_rows(rows, seed=1)
    assert splits == rows
    assert [stats[name]["kept"] for name in ("train", "dev", "test", "pretrain")] == [5, 3, 2, 4]


def test_duplicates_are_dropped_and_counted_the_first_one_stays_in_place():
    train = [pair("a", "b", n=1), pair("c", "d"), pair(" a", "b "), pair("a", "e")]
    splits, stats = split_rows(given(train), seed=1)
    assert splits["train"] == [pair("a", "b", n=1), pair("c", "d"), pair("a", "e")]
    assert stats["train"] == {
        "read": 4, "duplicates": 1, "merged": 0, "leaked": 0, "over_limit": 0, "kept": 3
    }  # fmt: skip


def test_unicode_forms_of_one_text_are_one_text():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    train = [pair("x", composed), pair("x", decomposed), pair("y", "z")]
    splits, stats = split_rows(given(train, test=[pair("q", decomposed)]), seed=1)
    assert splits["train"] == [pair("y", "z")]
    assert splits["test"] == [pair("q", composed)]
    assert (stats["train"]["duplicates"], stats["train"]["leaked"]) == (1, 1)


@pytest.mark.parametrize(
    "leak", [pair("test s", "new"), pair("new", "test t"), pair("new", "also accepted")]
)
def test_nothing_of_test_is_left_in_dev_train_or_pretrain(leak):
    test = [pair("test s", "test t", references=["test t", "also accepted"])]
    rows = given(
        [leak, pair("a", "b")], [leak, pair("c", "d")], test, pretrain=[leak, pair("e", "f")]
    )
    splits, stats = split_rows(rows, seed=1)
    for name, left in (
        ("train", pair("a", "b")),
        ("dev", pair("c", "d")),
        ("pretrain", pair("e", "f")),
    ):
        assert splits[name] == [left]
        assert stats[name]["leaked"] == 1
    assert splits["test"] == test


def test_nothing_of_dev_is_left_in_train_but_a_target_may_be_anothers_source():
    rows = given([pair("dev s", "1"), pair("2", "dev t"), pair("dev t", "dev s")])
    splits, stats = split_rows(rows, seed=1)
    assert splits["train"] == [pair("dev t", "dev s")]
    assert stats["train"]["leaked"] == 2


def test_targets_of_one_test_source_become_references():
    test = [pair("a", "1"), pair("b", "2"), pair("a", "3"), pair("a", "1")]
    splits, stats = split_rows(given(pairs(3), test=test), seed=1)
    assert splits["test"] == [pair("a", "1", references=["1", "3"]), pair("b", "2")]
    assert (stats["test"]["duplicates"], stats["test"]["merged"]) == (1, 1)
    test = [pair("a", "1", references=["1", "9"]), pair("a", "3", references=["9", "4"])]
    splits, _ = split_rows(given(pairs(3), test=test), seed=1)
    assert splits["test"] == [pair("a", "1", references=["1", "9", "3", "4"])]


@pytest.mark.parametrize("pool", ["all", "train"])
def test_a_pool_is_cut_by_source_without_overlap(pool):
    rows = [pair(f"s{i % 40}", f"t{i}") for i in range(100)]
    splits, stats = split_rows({pool: rows}, dev=5, test=10, seed=3)
    sources = {name: {row["source"] for row in part} for name, part in splits.items()}
    assert len(sources["test"]) == 10
    assert len(splits["dev"]) == 5
    assert len(sources["dev"]) in (2, 3)
    assert sum(len(found) for found in sources.values()) == 40
    assert not sources["train"] & (sources["test"] | sources["dev"])
    assert not sources["dev"] & sources["test"]
    assert len(splits["test"]) == 10
    assert all(len(row["references"]) in (2, 3) for row in splits["test"])
    assert sum(counts["read"] for counts in stats.values()) == 100


def test_only_what_is_missing_is_cut():
    rows = {"train": pairs(20), "test": pairs(4, "x")}
    splits, _ = split_rows(rows, dev=3, seed=1)
    assert splits["test"] == rows["test"]
    assert len(splits["dev"]) == 3
    assert len(splits["train"]) == 17


def test_the_seed_decides_and_nothing_else():
    rows = {"all": pairs(60)}
    one = split_rows(rows, dev=9, test=9, train=20, seed=1)
    assert one == split_rows(rows, dev=9, test=9, train=20, seed=1)
    assert one != split_rows(rows, dev=9, test=9, train=20, seed=2)
    backwards, _ = split_rows({"all": rows["all"][::-1]}, dev=9, test=9, train=20, seed=1)
    assert {name: part[::-1] for name, part in backwards.items()} == one[0]


def test_a_bigger_limit_contains_the_smaller_and_a_new_row_moves_at_most_one():
    def sample(limit, extra=()):
        rows = given([*pairs(200), *extra])
        return [row["source"] for row in split_rows(rows, train=limit, seed=7)[0]["train"]]

    small, big = sample(30), sample(90)
    assert len(small) == 30
    assert set(small) < set(big)
    assert small == sorted(small, key=lambda source: int(source[1:]))
    assert small != [f"s{i}" for i in range(30)]
    assert len(set(small) - set(sample(30, [pair("new", "new")]))) <= 1


def test_skip_gives_a_sample_that_shares_no_row_and_the_two_are_the_larger_one():
    def sample(**limits):
        kept, stats = split_rows(given(pairs(200)), seed=7, **limits)
        assert stats["train"]["over_limit"] == 200 - len(kept["train"])
        return {row["source"] for row in kept["train"]}

    first, second = sample(train=60), sample(train=60, skip=60)
    assert len(first) == len(second) == 60
    assert first.isdisjoint(second)
    assert first | second == sample(train=120)
    assert len(sample(skip=150)) == 50
    with pytest.raises(NeftError, match="split 'train': no rows left"):
        sample(skip=200)


def test_limits_can_count_what_is_left_of_rows_later():
    """Rows that a later stage drops are replaced by the next in the same order."""
    rows = given(pairs(200), dev=pairs(30, "d"), pretrain=pairs(30, "p"))
    limits = {"train": 60, "dev": 9, "pretrain": 5, "skip": 60, "seed": 7}
    held, _ = split_rows(rows, **limits)
    whole, _ = split_rows(rows, **limits, whole=True)
    assert (whole["train"], whole["dev"]) == (rows["train"], rows["dev"])
    assert whole["pretrain"] == held["pretrain"], "which no tokenizer drops"
    assert sample(whole["train"], 60, 7, 60) == held["train"]
    assert sample(whole["dev"], 9, 7) == held["dev"]
    left = whole["train"][::3]
    first, second = sample(left, 20, 7), sample(left, 20, 7, 20)
    assert len(first) == len(second) == 20
    assert not [row for row in first if row in second]
    assert first == split_rows(given(left), train=20, seed=7)[0]["train"]


@pytest.mark.parametrize("limit", [20, 60])
def test_every_row_read_is_accounted_for(limit):
    train = pairs(80) + pairs(10) + [pair("test s", str(i)) for i in range(7)]
    _, stats = split_rows(given(train), train=limit, seed=1)
    assert stats["train"] == {
        "read": 97,
        "duplicates": 10,
        "merged": 0,
        "leaked": 7,
        "over_limit": 80 - limit,
        "kept": limit,
    }


def test_conversations_leak_by_what_is_asked_and_not_by_a_short_answer():
    test = [talk("2+2?", "4", "sure?", "Yes.")]
    train = [
        talk("2+2?", "4", "sure?", "No."),  # the very question
        talk("2+2?", "4", "sure?", "Quite.", "really?", "Yes."),  # the question inside
        talk("is water wet?", "Yes."),
        talk("2+2?", "4"),  # what test takes as given
        talk("is water wet?", "Yes."),
    ]
    splits, stats = split_rows(given(train, [talk("dev?", "d")], test), seed=1)
    assert splits["train"] == [train[2], train[3]]
    assert (stats["train"]["duplicates"], stats["train"]["leaked"]) == (1, 2)


def test_conversations_are_cut_from_a_pool():
    rows = [talk(f"q{i}", f"a{i}") for i in range(20)] + [talk("q3", "another")]
    splits, _ = split_rows({"all": rows}, dev=4, test=19 - 4, seed=1)
    assert len(splits["test"]) == 15
    asked = [{row["messages"][0]["content"] for row in part} for part in splits.values()]
    assert sum(len(part) for part in asked) == 20


@pytest.mark.parametrize(
    ("rows", "sizes", "text"),
    [
        (given([pair("test s", "1")]), {}, "split 'train': no rows left.*1 leaked"),
        (given(pairs(2), [pair("test s", "x")]), {}, "split 'dev': no rows left"),
        (given([]), {}, "split 'train': no rows left"),
        ({"all": pairs(9)}, {"dev": 3}, "split 'test': not given and no size"),
        ({"all": pairs(9)}, {"dev": 4, "test": 5}, "split 'dev': 4 cannot be cut from 4"),
        ({"all": pairs(9)}, {"dev": 4, "test": 9}, "split 'test': 9 cannot be cut from 9"),
        ({"test": pairs(2), "dev": pairs(2)}, {}, "either 'train' or 'all'"),
        ({"train": pairs(2), "all": pairs(2)}, {}, "either 'train' or 'all'"),
        (given(pairs(2), valid=pairs(2)), {}, "split 'valid': unknown"),
        (given(pairs(2)), {"train": 0}, "limit is 0"),
    ],
)
def test_faults_are_one_line(rows, sizes, text):
    with pytest.raises(NeftError, match=text) as caught:
        split_rows(rows, **sizes, seed=1)
    assert "\n" not in str(caught.value)


def test_real_pairs_split_as_their_makers_promise(shared):
    folder = shared / "data" / "tatoeba-en-fr"
    rows = {
        name: read_rows(folder / f"{name}.jsonl") for name in ("train", "dev", "test", "pretrain")
    }
    splits, stats = split_rows(rows, train=20000, seed=1)
    assert (len(splits["train"]), len(splits["test"])) == (20000, 1000)
    # Its makers cleaned train and pretrain of dev and test, but not dev of test.
    assert [stats[name]["leaked"] for name in ("dev", "train", "pretrain")] == [1, 0, 0]
    assert all(sum(list(counts.values())[1:]) == counts["read"] for counts in stats.values())
    held = {row["source"] for name in ("dev", "test") for row in splits[name]}
    held_targets = {t for row in splits["test"] for t in row["references"]}
    held_targets |= {row["target"] for row in splits["dev"]}
    for name in ("train", "pretrain"):
        assert not held & {row["source"] for row in splits[name]}
        assert not held_targets & {row["target"] for row in splits[name]}


def inference(premise, hypothesis, label="neutral"):
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def test_a_premise_stays_in_one_split_with_all_its_hypotheses():
    rows = [inference(f"p{i}", f"h{i}{j}") for i in range(20) for j in range(3)]
    splits, stats = split_rows({"train": rows}, dev=6, test=9, seed=3)
    assert [len(splits[name]) for name in ("test", "dev", "train")] == [9, 6, 45]
    premises = [{row["premise"] for row in splits[name]} for name in ("test", "dev", "train")]
    assert sum(map(len, premises)) == len(set.union(*premises)) == 20
    assert stats["test"]["merged"] == 0


def test_rows_with_a_premise_of_test_are_leaked():
    train = [inference("p", "other"), inference("q", "h")]
    splits, stats = split_rows(
        given(train, dev=[inference("d", "x")], test=[inference("p", "h")]), seed=1
    )
    assert splits["train"] == [inference("q", "h")]
    assert stats["train"]["leaked"] == 1


def test_labels_are_no_answers_that_leak():
    train = [inference(f"p{i}", "h", "entailment") for i in range(4)]
    splits, _ = split_rows(
        given(
            train, dev=[inference("d", "h", "entailment")], test=[inference("t", "h", "entailment")]
        ),
        seed=1,
    )
    assert len(splits["train"]) == 4


def test_test_may_be_all_there_is():
    splits, stats = split_rows({"test": pairs(5)}, test=3, seed=1)
    assert list(splits) == ["test"]
    assert stats["test"]["kept"] == 3
