"""Where neurons lie in a stored weight: the only place that knows rows, columns and experts.

Shapes: N candidates of a module, k of them, D weights in each, E experts, n rows or columns of a
matrix along the neurons' axis. A *logical* weight is [out, in], whatever way the model stores it;
that of a 3-D parameter is its experts' [out, in] matrices one after the other along the neurons'
axis, so that neuron e * n + i is row or column i of expert e.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from neft_core.errors import NeftError

if TYPE_CHECKING:
    from torch import Tensor

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class Group:
    """The candidate neurons of one module: rows or columns of its logical weight.

    In each matrix they are `start`, `start + step`, ...; a plain weight is one matrix.

    Attributes:
        module: name of the module, without `.weight`; of experts, the full name of the parameter.
        axis: 0 where the neurons are rows of the logical [out, in] weight, 1 for columns.
        start: first row or column.
        count: number of neurons, those of all experts together.
        length: weights in each neuron.
        transposed: each matrix is stored as [in, out], as in GPT-2's `Conv1D`.
        experts: matrices of a 3-D parameter; 0 for a plain weight.
        width: rows or columns that each expert's matrix has; 0 for a plain weight.
        step: distance between neighbouring candidates.

    Raises:
        NeftError: another axis, or numbers that no weight's neurons have.
    """

    module: str
    axis: int
    start: int
    count: int
    length: int
    transposed: bool = False
    experts: int = 0
    width: int = 0
    step: int = 1

    def __post_init__(self) -> None:
        numbers = (self.start, self.count, self.length, self.experts, self.width, self.step)
        sound = (
            isinstance(self.module, str)
            and all(type(number) is int and number >= 0 for number in (self.axis, *numbers))
            and self.axis in (ROWS, COLUMNS)
            and self.step > 0
            and (not self.experts or (self.width > 0 and self.count % self.experts == 0))
        )
        if not sound:
            raise NeftError(
                f"{self}: no neurons of a weight; axis is 0 (rows) or 1 (columns), the others are "
                "counts that fit each other"
            )

    @property
    def parameter(self) -> str:
        """Full name of the weight."""
        return self.module if self.experts else f"{self.module}.weight"

    @property
    def each(self) -> int:
        """Candidates in each matrix."""
        return self.count // max(1, self.experts)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight stored with `shape` has all the neurons of this group."""
        if len(shape) != (3 if self.experts else 2):
            return False
        size, length = _sizes(shape, self.axis, self.transposed)
        if length != self.length or size < self.start + self.step * (self.each - 1) + 1:
            return False
        return not self.experts or (shape[0] == self.experts and size == self.width)

    def indices(self, positions: "Tensor") -> "Tensor":
        """Rows or columns of the logical weight that the candidates at `positions` are, [k]."""
        expert, within = positions // self.each, positions % self.each
        return expert * self.width + self.start + self.step * within

    def holds(self, indices: "Tensor") -> bool:
        """Whether all `indices` are candidates of this group."""
        within = (indices % self.width if self.experts else indices) - self.start
        known = (within >= 0) & (within % self.step == 0) & (within // self.step < self.each)
        if self.experts:
            known &= (indices >= 0) & (indices < self.experts * self.width)
        return bool(known.all())

    def source(self, expert: int | None = None) -> "Source":
        """The candidates in the plain weight, or in the matrix of one expert."""
        return Source(
            self.parameter,
            self.start,
            self.each,
            self.step,
            swapped=(self.axis == COLUMNS) != self.transposed,
            expert=expert,
        )


@dataclass(frozen=True)
class Source:
    """A run of a group's candidates in one stored matrix.

    Attributes:
        parameter: full name of the stored weight.
        start: first neuron along the matrix's axis.
        count: number of neurons.
        step: distance between neighbouring ones.
        swapped: the neurons are columns of the matrix as it is stored.
        expert: which matrix of a 3-D parameter; None for a plain weight.
    """

    parameter: str
    start: int
    count: int
    step: int = 1
    swapped: bool = False
    expert: int | None = None

    def words(self, neuron: int) -> str:
        """One of the neurons as messages name it."""
        kind = "column" if self.swapped else "row"
        whose = "" if self.expert is None else f" of expert {self.expert}"
        return f"{kind} {self.start + self.step * neuron}{whose}"

    def cut(self, first: int, last: int) -> "Source":
        """The neurons from `first` to before `last` of these."""
        return replace(self, start=self.start + self.step * first, count=last - first)

    def read(self, stored: Any) -> "Tensor":
        """The neurons, [n, D]: a view of a tensor, or read from a slice of a safetensors file."""
        along = slice(self.start, self.start + self.step * (self.count - 1) + 1)
        index = (slice(None), along) if self.swapped else (along, slice(None))
        if self.expert is not None:
            matrix = stored[(slice(self.expert, self.expert + 1), *index)][0]
        else:
            matrix = stored[index]
        rows: Tensor = (matrix.t() if self.swapped else matrix)[:: self.step]
        return rows


def read_neurons(
    stored: "Tensor", indices: "Tensor", axis: int, transposed: bool = False
) -> "Tensor":
    """A copy of neurons of a stored weight, [k, D].

    Args:
        stored: [out, in], or [in, out] where `transposed`; of experts, one such matrix for each.
        indices: rows (axis 0) or columns (axis 1) of the logical weight, [k].
        axis: 0 for rows, 1 for columns.
        transposed: matrices are stored as [in, out].
    """
    rows = _along(stored.detach(), axis, transposed)
    if stored.dim() == 2:
        if rows.is_contiguous():
            return rows.index_select(0, indices)
        # Columns are picked in each line of memory, in less than half of the time.
        return rows.t().index_select(1, indices).t().contiguous()
    n = rows.shape[1]
    return rows[indices // n, indices % n].contiguous()


def write_neurons(
    stored: "Tensor", values: "Tensor", indices: "Tensor", axis: int, transposed: bool = False
) -> None:
    """Overwrite neurons of a stored weight, in its precision; arguments as of `read_neurons`.

    Args:
        values: what to write, [k, D].
    """
    rows = _along(stored.detach(), axis, transposed)
    rounded = values.detach().to(device=stored.device, dtype=stored.dtype)
    if stored.dim() == 2:
        if rows.is_contiguous():
            rows.index_copy_(0, indices, rounded)
        else:
            rows.t().index_copy_(1, indices, rounded.t().contiguous())
    else:
        n = rows.shape[1]
        rows[indices // n, indices % n] = rounded


def _along(stored: "Tensor", axis: int, transposed: bool) -> "Tensor":
    """A view [..., n, D] with the neurons as rows of each matrix."""
    return stored.transpose(-1, -2) if (axis == COLUMNS) != transposed else stored


def _sizes(shape: tuple[int, ...], axis: int, transposed: bool) -> tuple[int, int]:
    """Neurons along the axis of each matrix, and weights in each."""
    logical = shape[:-3:-1] if transposed else shape[-2:]
    return logical[axis], logical[1 - axis]


@dataclass(frozen=True)
class Part:
    """Where one role sits in a layer: part `index` of `of` equal parts of a weight's axis.

    Attributes:
        suffix: the module after the layer's name; of experts, the 3-D parameter.
        axis: 0 where the neurons are rows of the logical weight, 1 for columns.
        index: which of the parts.
        of: how many equal parts the axis has.
        transposed: each matrix is stored as [in, out].
        interleaved: the parts alternate along the axis instead of following each other.
        experts: the weight is a 3-D parameter, a matrix for each expert.
        apart: the module of one expert, `{}` for its number, in checkpoints that keep experts
            apart; "" where they are together on disk too.
    """

    suffix: str
    axis: int
    index: int = 0
    of: int = 1
    transposed: bool = False
    interleaved: bool = False
    experts: bool = False
    apart: str = ""

    def parameter(self, layer: str) -> str:
        """Full name of the weight in a layer."""
        return f"{layer}.{self.suffix}" + ("" if self.experts else ".weight")

    def group(self, layer: str, shape: tuple[int, ...], where: str) -> Group:
        """The neurons of this role in a layer whose weight is stored with `shape`.

        Raises:
            NeftError: the shape is not one that this part can have.
        """
        name = self.parameter(layer)
        if len(shape) != (3 if self.experts else 2):
            needed = "one matrix for each expert" if self.experts else "a matrix"
            raise NeftError(f"{where}: {name} has shape {shape}; {needed} is needed")
        size, length = _sizes(shape, self.axis, self.transposed)
        each = size // self.of
        if each * self.of != size:
            raise NeftError(
                f"{where}: {name} has {size} rows; {self.of} parts of equal size are needed"
            )
        experts = shape[0] if self.experts else 0
        return Group(
            module=f"{layer}.{self.suffix}",
            axis=self.axis,
            start=self.index * (1 if self.interleaved else each),
            count=each * max(1, experts),
            length=length,
            transposed=self.transposed,
            experts=experts,
            width=size if experts else 0,
            step=self.of if self.interleaved else 1,
        )


def joined(groups: list[Group]) -> list[Group]:
    """Groups with neighbouring parts of the same weight made one."""
    found: list[Group] = []
    for group in groups:
        last = found[-1] if found else None
        if last is not None and last.module == group.module:
            # Parts that alternate fill the axis together; others follow each other.
            found[-1] = replace(last, count=last.count + group.count, step=1)
        else:
            found.append(group)
    return found
