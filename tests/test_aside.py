"""Tensors put aside: their bits, where they lie, and what is left of it."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from neft_core.aside import put_aside


def mapped(tensor: torch.Tensor) -> str:
    """What the system has mapped where a tensor lies; "" for plain memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, *fields = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in area.split("-"))
        if first <= tensor.data_ptr() < last:
            return fields[4] if len(fields) > 4 else ""
    raise AssertionError("no such memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_bits_in_a_file_that_nobody_sees(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tensor = torch.randn(70, 50).to(dtype)
    tensor[0, :4] = torch.tensor([0.0, -0.0, float("nan"), float("-inf")])
    open_files = len(os.listdir("/proc/self/fd"))
    aside = put_aside(tensor.t())
    assert aside.shape == (50, 70)
    assert torch.equal(aside.t().contiguous().view(torch.uint8), tensor.view(torch.uint8))
    where = mapped(aside)
    assert where.startswith(str(tmp_path))
    assert where.endswith("(deleted)")
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_files
    del aside
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_without_room_it_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    tensor = torch.randn(3)
    assert put_aside(tensor) is tensor


def test_nothing_is_put_nowhere():
    empty = torch.empty(0, 5)
    assert put_aside(empty) is empty
