"""What trained weights lose when they are stored in a lower precision."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """What a precision keeps of trained weights. Sizes are absolute values."""

    dtype: str
    """The precision, as torch calls it; several are joined by `+`."""
    weights: int
    """Trained weights."""
    changed: int
    """Those that training moved."""
    lost: int
    """Moved ones that get the base's bits again."""
    overflown: int
    """Finite ones that are no longer."""
    mean_change: float
    """How far training moved a trained weight."""
    mean_error: float
    """How far rounding moves it."""
    largest_error: float

    def __str__(self) -> str:
        share = 100 * self.lost / max(1, self.changed)
        return (
            f"{self.dtype} gives {share:.1f} % of {self.changed:,} changed weights the base's bits "
            f"again, and moves a weight by {self.mean_error:.1e} (at most "
            f"{self.largest_error:.1e}), where training moved it by {self.mean_change:.1e}"
        )


class Tally:
    """Sums up tensor by tensor.

    Args:
        dtype: of the stored weights; None: that of each base tensor.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._dtypes: list[str] = []
        self._weights = self._changed = self._lost = self._overflown = 0
        self._change = self._error = self._largest = 0.0

    def add(self, base: Tensor, trained: Tensor) -> None:
        """Count the weights of one tensor.

        Args:
            base: before training.
            trained: after it, of the same shape, in the precision of training.
        """
        if not trained.numel():
            return
        trained = trained.detach()
        base = base.detach().to(trained.device)
        dtype = self.dtype or base.dtype
        stored = trained.to(dtype)
        changed = trained != base.to(trained.dtype)
        error = (stored.to(trained.dtype) - trained).abs()
        change = (trained - base.to(trained.dtype)).abs()
        self._weights += trained.numel()
        self._changed += int(changed.sum())
        self._lost += int((changed & (stored == base.to(dtype))).sum())
        self._overflown += int((trained.isfinite() & error.isinf()).sum())
        self._change += change.sum(dtype=torch.float64).item()
        self._error += error.sum(dtype=torch.float64).item()
        self._largest = max(self._largest, error.max().item())
        name = str(dtype).removeprefix("torch.")
        if name not in self._dtypes:
            self._dtypes.append(name)

    def result(self) -> Rounding:
        """What was counted so far."""
        each = max(1, self._weights)
        return Rounding(
            "+".join(self._dtypes),
            self._weights,
            self._changed,
            self._lost,
            self._overflown,
            self._change / each,
            self._error / each,
            self._largest,
        )
