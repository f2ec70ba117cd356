import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neft_core import sums as module
from neft_core.sums import LANES, compiled, sums

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of the user's that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "neft"


# Compiled anew, whatever this process has asked for before.
anew = compiled.__wrapped__


@pytest.fixture(scope="module")
def kernel():
    found = compiled()
    assert found is not None
    return found


def by_hand(a: list[float], b: list[float]) -> float:
    """A dot product in the documented order, in Python's floats."""
    lanes = [0.0] * LANES
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        lanes[i % LANES] += x * y
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[i] + lanes[i + half] for i in range(half)]
    return lanes[0]


def pair(n, d, first=torch.float32, second=torch.float32):
    generator = torch.Generator().manual_seed(n * d)
    base, drift = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return base.to(first), (base + 0.1 * drift).to(second)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 40, 333])
def test_the_order_of_additions(width):
    base, tuned = pair(5, width)
    got = sums(base, tuned)
    for n, (w, v) in enumerate(zip(base.tolist(), tuned.tolist(), strict=True)):
        d = [y - x for x, y in zip(w, v, strict=True)]
        assert got[:, n].tolist() == [by_hand(w, w), by_hand(d, w), by_hand(d, d)]


def test_nothing_adds_up_to_nothing():
    assert sums(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (3, 0)
    assert sums(torch.zeros(2, 0), torch.zeros(2, 0)).tolist() == [[0, 0]] * 3


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@needs_compiler
@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_compiled_sums_have_the_same_bits(kernel, first, second):
    # Around the sizes of strips, widths and lanes of the C code.
    for n, d in [(1, 1), (3, 127), (2, 513), (300, 31), (64, 33), (2050, 70), (4100, 17)]:
        base, tuned = pair(n, d, first, second)
        want = sums(base, tuned)
        assert torch.equal(sums(base, tuned, kernel), want)
        columns = base.t().contiguous().t(), tuned.t().contiguous().t()
        assert torch.equal(sums(*columns, kernel), want)
        assert torch.equal(sums(base, columns[1], kernel), want)
        assert torch.equal(sums(base[::2], tuned[::2], kernel), want[:, ::2])
        cut = [part[n // 3 :] for part in columns]
        assert torch.equal(sums(*cut, kernel), want[:, n // 3 :])


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_compiled_sums_keep_what_is_not_finite(kernel, value):
    base, tuned = pair(70, 40)
    tuned[3, 17] = value
    for kind in ((base, tuned), (base.t().contiguous().t(), tuned.t().contiguous().t())):
        got = sums(*kind, kernel)
        assert not got[2, 3].isfinite()
        assert got[:, :3].isfinite().all()
        assert got[:, 4:].isfinite().all()


def test_without_a_compiler_there_is_no_kernel(monkeypatch):
    for command in ("/nonexistent/cc", "false"):
        monkeypatch.setenv("CC", command)
        assert anew() is None


@needs_compiler
def test_a_kernel_with_other_bits_is_not_used(monkeypatch, tmp_path, cache):
    # A compiler that gets the order of additions wrong.
    script = tmp_path / "cc"
    script.write_text(
        "#!/bin/sh\n"
        'for word; do case "$word" in */sums.c) source=$word;; esac; done\n'
        f'sed "s/LANES 16/LANES 8/" "$source" > {tmp_path}/wrong.c\n'
        f'exec cc $(echo "$@" | sed "s#$source#{tmp_path}/wrong.c#")\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    assert anew() is None
    assert (tmp_path / "wrong.c").exists()
    assert list(cache.iterdir()) == []


@needs_compiler
def test_what_was_compiled_is_kept_for_the_next_process(monkeypatch, tmp_path, cache):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    assert anew(False) is None, "nothing is kept yet"
    assert anew() is not None
    (kept,) = cache.iterdir()
    assert kept.suffix == ".so"
    assert cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(module.subprocess, "run", None)
    for wanted in (False, True):
        assert torch.equal(anew(wanted)(*pair(3, 40)), sums(*pair(3, 40)))
    monkeypatch.setattr(module, "_processor", lambda: "another")
    assert anew(False) is None, "that of another processor's"
    assert os.listdir(tmp_path / "tmp") == []
    assert [path.suffix for path in Path(module.__file__).parent.glob("sums.*")].count(".so") == 0


@needs_compiler
def test_what_is_kept_is_not_trusted(monkeypatch, cache):
    assert anew() is not None
    (kept,) = cache.iterdir()
    kept.unlink()
    kept.write_bytes(b"")  # damaged; this process would go on with what it has open
    ask = "from neft_core.sums import compiled; print(compiled(False))"
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert told.stdout == "None\n"
    assert not kept.exists()
    assert anew() is not None
    cache.chmod(0o777)
    assert anew(False) is None, "others could have written it"
    assert anew() is not None, "in a temporary folder"
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert anew(False) is None
    assert anew() is not None
