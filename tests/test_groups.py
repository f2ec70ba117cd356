import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from neft_core.errors import NeftError
from neft_core.groups import COLUMNS, ROWS, Group, Part, read_neurons, write_neurons

HELD = [(axis, transposed) for axis in (ROWS, COLUMNS) for transposed in (False, True)]


def weight(experts: int, out: int, inner: int, transposed: bool) -> torch.Tensor:
    """Stored so; the logical element of expert e, row i, column j is 100 e + 10 i + j."""
    logical = torch.tensor(
        [[[100.0 * e + 10 * i + j for j in range(inner)] for i in range(out)]
         for e in range(max(1, experts))]
    )  # fmt: skip
    stored = logical.transpose(1, 2) if transposed else logical
    return (stored if experts else stored[0]).contiguous()


def by_hand(experts: int, out: int, inner: int, axis: int) -> torch.Tensor:
    """All neurons of that weight one after the other."""
    logical = weight(max(1, experts), out, inner, False)
    rows = logical if axis == ROWS else logical.transpose(1, 2)
    return torch.stack([neuron for matrix in rows for neuron in matrix])


@pytest.mark.parametrize("experts", [0, 1, 3])
@pytest.mark.parametrize(("axis", "transposed"), HELD)
def test_neurons_are_read_and_written_where_they_lie(axis, transposed, experts):
    stored = weight(experts, 4, 5, transposed)
    every = by_hand(experts, 4, 5, axis)
    indices = torch.tensor([0, 2, len(every) - 1])
    values = read_neurons(stored, indices, axis, transposed)
    assert torch.equal(values, every[indices])
    assert values.is_contiguous()
    before = stored.clone()
    write_neurons(stored, -values - 1, indices, axis, transposed)
    assert int((stored != before).sum()) == values.numel()
    assert torch.equal(read_neurons(stored, indices, axis, transposed), -values - 1)
    write_neurons(stored, values, indices, axis, transposed)
    assert torch.equal(stored, before)
    none = torch.empty(0, dtype=torch.int64)
    assert read_neurons(stored, none, axis, transposed).shape == (0, every.shape[1])


def test_a_parameter_is_written_in_its_precision_and_outside_of_gradients():
    parameter = torch.nn.Parameter(torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    write_neurons(parameter, torch.full((1, 4), 1.001), torch.tensor([4]), ROWS, False)
    assert parameter[1, 1].tolist() == [1.0] * 4
    assert parameter.grad_fn is None
    assert parameter.is_leaf


GROUPS = {
    "plain": (Group("m", ROWS, 0, 4, 5), [0, 1, 2, 3]),
    "second part": (Group("m", ROWS, 2, 2, 5), [2, 3]),
    "columns": (Group("m", COLUMNS, 0, 5, 4), [0, 1, 2, 3, 4]),
    "experts": (Group("m", ROWS, 2, 6, 5, experts=3, width=4), [2, 3, 6, 7, 10, 11]),
    "by turns": (Group("m", ROWS, 1, 6, 5, experts=3, width=4, step=2), [1, 3, 5, 7, 9, 11]),
    "experts' columns": (Group("m", COLUMNS, 0, 10, 4, experts=2, width=5), list(range(10))),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", GROUPS)
def test_a_group_by_hand(name, transposed, tmp_path):
    group, want = GROUPS[name]
    group = replace(group, transposed=transposed)
    positions = torch.arange(group.count)
    assert group.indices(positions).tolist() == want
    assert group.indices(positions.flip(0)).tolist() == want[::-1]
    size = max(1, group.experts) * (5 if group.axis else 4)
    for index in range(-2, size + 9):
        assert group.holds(torch.tensor([index])) == (index in want), index
    stored = weight(group.experts, 4, 5, transposed)
    assert group.fits(tuple(stored.shape))
    save_file({group.parameter: stored}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        on_disk = file.get_slice(group.parameter)
        sources = [group.source(e if group.experts else None) for e in range(max(1, group.experts))]
        assert torch.equal(
            torch.cat([source.read(stored) for source in sources]),
            by_hand(group.experts, 4, 5, group.axis)[want],
        )
        for source in sources:
            assert torch.equal(source.read(on_disk), source.read(stored))
            part = source.cut(1, source.count)
            assert torch.equal(part.read(on_disk), source.read(stored)[1:])
            assert source.read(stored).data_ptr() >= stored.data_ptr(), "a view"


def test_what_does_not_fit():
    group = Group("m", ROWS, 1, 6, 5, experts=3, width=4, step=2)
    for shape in ((4, 5), (2, 4, 5), (3, 5, 5), (3, 4, 6), (3, 5, 4)):
        assert not group.fits(shape), shape
    plain = Group("m", ROWS, 2, 2, 5)
    for shape in ((3, 5), (4, 6), (5,), (1, 4, 5)):
        assert not plain.fits(shape), shape
    assert plain.fits((9, 5)), "other parts may follow"


def test_a_part_of_a_shape_that_it_cannot_have():
    part = Part("fc", ROWS, 1, 2)
    for shape, text in (
        ((3, 4, 5), "model: l.0.fc.weight has shape (3, 4, 5); a matrix is needed"),
        ((5, 4), "model: l.0.fc.weight has 5 rows; 2 parts of equal size are needed"),
    ):
        with pytest.raises(NeftError, match=re.escape(text)):
            part.group("l.0", shape, "model")


def test_a_source_names_its_neuron():
    group = Group("m", ROWS, 1, 6, 5, experts=3, width=4, step=2)
    assert group.source(2).words(1) == "row 3 of expert 2"
    assert Group("m", COLUMNS, 0, 5, 4).source().cut(3, 5).words(1) == "column 4"
