"""The embedded corpus: sizes, distinct and stable splits, parallel pairs, mistakes."""

import random
import re
import subprocess
import sys

import pytest

from neft_core import corpus
from neft_core.errors import NeftError


@pytest.fixture(scope="module")
def splits():
    return corpus.generate_splits(
        "en", "fr", seed=7, pretrain=20000, train=28500, dev=500, test=1000
    )


def test_sizes_and_groups(splits):
    assert {name: len(rows) for name, rows in splits.items()} == {
        "pretrain": 20000, "train": 28500, "dev": 500, "test": 1000,
    }  # fmt: skip
    assert {row["construction"] for row in splits["pretrain"]} == set(corpus.SIMPLE)
    for name in ("train", "dev", "test"):
        assert {row["construction"] for row in splits[name]} == set(corpus.HELD_OUT)
    assert not set(corpus.SIMPLE) & set(corpus.HELD_OUT)


@pytest.mark.parametrize("side", ["source", "target"])
def test_no_text_occurs_twice(splits, side):
    texts = [row[side] for rows in splits.values() for row in rows]
    assert len(texts) == len(set(texts)) == 50000


def small(source="en", target="zh", **sizes):
    return corpus.generate_splits(
        source, target, **{"seed": 5, "pretrain": 60, "train": 80, "dev": 20, "test": 30} | sizes
    )


def test_pairs_are_parallel_to_each_other():
    english, french, back = small("en", "zh"), small("fr", "zh"), small("zh", "en")
    for name, rows in english.items():
        assert [row["target"] for row in rows] == [row["target"] for row in french[name]]
        assert [row["source"] for row in rows] == [row["target"] for row in back[name]]


def test_more_training_rows_leave_the_rest_unchanged():
    less, more = small(), small(train=500)
    assert more["train"][:80] == less["train"]
    assert all(less[name] == more[name] for name in ("pretrain", "dev", "test"))


def test_seed_changes_the_sentences():
    assert small()["test"] != small(seed=6)["test"]


def test_same_in_every_process():
    code = (
        "from neft_core.corpus import generate_splits as g; import hashlib; "
        "s = g('hi', 'fr', seed=5, pretrain=60, train=80, dev=20, test=30); "
        "print(hashlib.sha256(repr(s).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("0", "1", "77")
    }  # fmt: skip
    assert len(digests) == 1


def test_caller_chooses_the_constructions():
    rows = small(constructions=("past", "future"))
    assert {row["construction"] for row in rows["train"]} == {"past", "future"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "de"}, "source language 'de' is unknown; choose from en, fr, zh, hi, qmi, qbs"),
        ({"target": "mi"}, "target language 'mi' is unknown; choose from en, fr, zh, hi, qmi, qbs"),
        ({"target": "en"}, "source and target are both 'en'; choose two languages"),
        ({"dev": -1}, "dev is -1; give a number of rows, 0 or more"),
        ({"constructions": ("past", "passive")}, "no construction 'passive'; choose from action,"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(NeftError, match=re.escape(message)):
        small(**change)


def test_more_than_can_be_made_says_how_many_there_are():
    with pytest.raises(NeftError, match=r"train asks for 100000 rows, only \d{4,5} distinct"):
        small(constructions=("identity",), train=100_000)


def test_unknown_construction():
    with pytest.raises(NeftError, match="no construction 'passive'; choose from action, quantity"):
        corpus.sentence("passive", random.Random(0))
