"""The harness of the benchmarks, and each benchmark once on a micro shape."""

import json
import os

import pytest

from benchmarks import harness
from neft_core.errors import NeftError


def build(spec):
    """A rival for the tests: counts, refuses, fails or dies on demand."""
    count = spec["start"]

    def answer(command):
        nonlocal count
        if command == "refuse":
            raise NeftError("rival: got refuse; say count")
        if command == "fail":
            raise KeyError(command)
        if command == "die":
            os._exit(7)
        count += 1
        return {"count": count, "pid": os.getpid()}

    return answer


def test_rivals_answer_in_turn_in_processes_of_their_own():
    with harness.workers(build, {"a": {"start": 0}, "b": {"start": 10}}) as rivals:
        answers = harness.repeat(rivals, "count", 3)
        assert [a["count"] for a in answers["a"]] == [1, 2, 3]
        assert [a["count"] for a in answers["b"]] == [11, 12, 13]
        assert len({a["pid"] for both in answers.values() for a in both} | {os.getpid()}) == 3
        with pytest.raises(NeftError, match=r"^rival: got refuse; say count$"):
            rivals["a"].ask("refuse")
        with pytest.raises(RuntimeError, match="KeyError: 'fail'"):
            rivals["a"].ask("fail")
        assert rivals["a"].ask("count")["count"] == 4
        with pytest.raises(NeftError, match=r"^b: its process ended with 7; "):
            rivals["b"].ask("die")


def test_each_round_asks_every_rival_once_in_another_order():
    orders = list(harness.rounds(["a", "b", "c", "d"], 50, seed=1))
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    assert len({tuple(order) for order in orders}) > 10
    assert orders == list(harness.rounds(["a", "b", "c", "d"], 50, seed=1))


def test_spread_by_hand():
    assert harness.spread([4.0, 1.0, 2.0, 3.0, 10.0]) == {
        "median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "repeats": 5,
    }  # fmt: skip
    assert harness.spread([2.0])["q3"] == 2.0


def test_ratios_are_formed_round_by_round():
    # The machine was ten times slower in the last round, for both.
    assert harness.ratio([1.0, 1.0, 10.0], [2.0, 2.0, 20.0])["median"] == 0.5
    assert harness.ratio([1.0, 3.0, 10.0], [2.0, 2.0, 20.0])["q3"] == 1.0


def test_the_peak_of_memory_starts_again():
    harness.reset_peak()
    before = harness.peak_resident()
    block = bytearray(b"x" * (64 << 20))
    during = harness.peak_resident()
    assert during - before >= len(block)
    del block
    harness.reset_peak()
    assert harness.peak_resident() < during - (32 << 20)


def test_a_table_and_its_files(tmp_path):
    rows = [{"method": "neft", "ms": "9.1"}, {"method": "full fine-tuning", "ms": "12.0"}]
    text = harness.table(rows)
    assert text == (
        "| method           |   ms |\n"
        "| :--------------- | ---: |\n"
        "| neft             |  9.1 |\n"
        "| full fine-tuning | 12.0 |"
    )
    harness.write(tmp_path / "out" / "step-0.4", {"machine": harness.machine()}, text)
    assert (tmp_path / "out" / "step-0.4.md").read_text() == text
    record = json.loads((tmp_path / "out" / "step-0.4.json").read_text())
    assert record["machine"]["torch"].startswith("2.")
