"""The time left: means by family, and typical proportions where a family was never seen."""

import pytest

from neft_core.remaining import TYPICAL, Remaining, duration


def test_nothing_is_known_at_first(tmp_path):
    clock = Remaining(tmp_path / "a" / "seconds.json")
    assert clock.seconds(["train"]) is None
    assert clock.words(["train"]) == ""


def test_means_of_this_walk_come_before_remembered_ones(tmp_path):
    path = tmp_path / "seconds.json"
    first = Remaining(path)
    for seconds in (10.0, 30.0):
        first.took("train", seconds)
    assert first.seconds(["train", "train"]) == (40.0, True)
    second = Remaining(path)
    assert second.seconds(["train"]) == (20.0, True)
    second.took("train", 100.0)
    assert second.seconds(["train"]) == (100.0, True)
    assert Remaining(path).seconds(["train"]) == (pytest.approx(140 / 3), True)
    assert second.words(["train"] * 3) == "about 5 min left"
    assert second.words(["train"] * 3, 4) == "about 75 s left"


def test_a_family_that_was_not_seen_is_as_much_slower_as_the_others(tmp_path):
    clock = Remaining(tmp_path / "seconds.json")
    clock.took("corpus", 2.0 * TYPICAL["corpus"])
    clock.took("select", 2.0 * TYPICAL["select"])
    total = 2.0 * (TYPICAL["corpus"] + TYPICAL["train"])
    assert clock.seconds(["corpus", "train"]) == (pytest.approx(total), False)
    assert clock.words(["train"]).startswith("roughly ")


@pytest.mark.parametrize("text", ['{"train": [1', "[]", '{"train": 3}', '{"train": ["x"]}', "3"])
def test_a_damaged_memory_is_forgotten(tmp_path, text):
    path = tmp_path / "seconds.json"
    path.write_text(text)
    clock = Remaining(path)
    assert clock.seconds(["train"]) is None
    clock.took("train", 4.0)
    assert Remaining(path).seconds(["train"]) == (4.0, True)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "5 s"), (12, "10 s"), (88, "90 s"), (91, "2 min"), (3600, "60 min"),
     (5399, "1 h 30 min"), (7260, "2 h 01 min")],
)  # fmt: skip
def test_lengths_of_time(seconds, said):
    assert duration(seconds) == said


def test_a_memory_that_can_not_be_written_stops_nothing(tmp_path):
    (tmp_path / "a").write_text("a file in the folder's place")
    clock = Remaining(tmp_path / "a" / "seconds.json")
    clock.took("train", 10.0)
    assert clock.seconds(["train"]) == (10.0, True)
