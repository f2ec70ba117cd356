"""Plain lines where nobody looks, a bar in a terminal."""

import io
import sys

import pytest

from neft_core import progress
from neft_core.progress import Progress


def test_few_plain_lines_and_one_at_the_end(capsys, monkeypatch):
    clock = iter(float(n) for n in range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress("train a", 8, "step", done=2) as bar:
        for n in range(6):
            bar.advance(note=f"loss {n}")
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "train a: step 5/8, loss 2, about 12 s left",
        "train a: step 8/8, loss 5, 28 s",
    ]


def test_a_block_that_fails_does_not_say_it_is_done(capsys):
    def fail():
        with Progress("a", 8, "step") as bar:
            bar.advance()
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert capsys.readouterr() == ("", "")


def test_a_bar_in_a_terminal(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("train a", 3, "step") as bar:
        for _ in range(3):
            bar.advance(note="loss 1.0")
    assert "train a: 100%" in sys.stderr.getvalue()
    assert "loss 1.0" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""
