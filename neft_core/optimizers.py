"""AdamW, optimisers that need less memory, and updates inside the backward pass.

AdamW keeps two fp32 moments for each trained value, 8 bytes. `Adam8bit` keeps both in 8 bits,
2.03 bytes; `Factored` keeps the sums of the squared gradient over rows and columns, next to
nothing. Both take the step of AdamW where their states allow it: an absolute learning rate, and
decoupled decay. `InBackward` lets any of them step while the gradients come, so that no two stay.

Shapes: a parameter as R rows of n values; b = ceil(n / BLOCK) blocks in each.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256
"""Values that share one scale, at most, and never of two rows: where the gradients of a row stop,
as for a token that no longer comes, its moments beside large ones would stick instead of fading."""
SMALL = 4096
"""Tensors with fewer values keep fp32 moments: norms and biases, which weigh nothing."""
ZERO = 127
"""Position of zero among the signed values of `codebook`."""
_PIECE = 1 << 20
"""Values whose moments are fp32 at once, about."""


def adamw(params: Iterable[Any], lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW in one kernel: a ninth of the time of torch's default on a CPU, and no temporaries."""
    made = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)
    for group in made.param_groups:
        # On a CPU the kernel takes memory as it comes, whatever the order of the gradient's.
        group["fused"] = all(parameter.is_contiguous() for parameter in group["params"])
    # It can skip a step by itself where gradients overflow; without it the scaler has to.
    made._step_supports_amp_scaling = all(group["fused"] for group in made.param_groups)
    return made


@lru_cache(maxsize=8)
def codebook(signed: bool, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The 256 values in [-1, 1] or [0, 1] that 8 bits stand for, and the nearest to each number.

    Dynamic: each power of ten from 1 down to 1e-6 has half as many values as the one above it,
    evenly spaced, so that large values are precise and small ones don't become zero.

    Returns:
        Values, ascending, [256]; the position of the nearest by the bits of an fp16 number, as an
        int16 plus 32,768, [65536]: a look-up is thirty times as fast as a search.

    Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 1.3.
    """
    positive = [1.0]
    for exponent in range(7):
        count = 2 ** (6 - exponent + int(not signed))
        width = 0.9 / count
        positive += [10.0**-exponent * (0.1 + width * (i + 0.5)) for i in range(count)]
    negative = [-value for value in positive[1:]] if signed else []
    values = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float64)
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).double()
    nearest = torch.bucketize(numbers, (values[1:] + values[:-1]) / 2)
    if not signed:
        # A root of zero below a moment that is not zero would be an endless step.
        nearest.clamp_(min=1)
    return values.float().to(device), nearest.to(torch.uint8).to(device)


def quantise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Numbers in 8 bits, block by block relative to the largest of the block.

    Args:
        values: fp32, [R, n].
        signed: whether they may be negative.

    Returns:
        Positions in the codebook, uint8, [R, n]; the largest magnitudes, fp32, [R, b].
    """
    _, nearest = codebook(signed, str(values.device))
    rows, n = values.shape
    size = min(BLOCK, n)
    blocks = nn.functional.pad(values, (0, -n % size)).view(rows, -1, size)
    scales = blocks.abs().amax(dim=2)
    relative = blocks / torch.where(scales == 0, 1.0, scales)[..., None]
    bits = relative.to(torch.float16).view(torch.int16).view(-1).int() + 2**15
    return nearest.index_select(0, bits).view(rows, -1)[:, :n], scales


def dequantise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The numbers that `quantise` kept, fp32, [R, n]."""
    book, _ = codebook(signed, str(codes.device))
    rows, n = codes.shape
    relative = book.index_select(0, codes.reshape(-1).int()).view(rows, n)
    return relative * scales.repeat_interleave(min(BLOCK, n), dim=1)[:, :n]


class _Plain(torch.optim.Optimizer, ABC):
    """Steps every parameter that has a gradient, each by itself."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                # Where torch's own optimisers have it: on the CPU.
                state["step"] = state.get("step", torch.tensor(0.0)) + 1
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                self._update(parameter, state, group["lr"], int(state["step"]))

    @abstractmethod
    def _update(self, parameter: Tensor, state: dict[str, Any], lr: float, step: int) -> None:
        """Move a parameter by its gradient."""


class Adam8bit(_Plain):
    """AdamW with both moments in 8 bits, in blocks of at most 256, by a dynamic codebook.

    Of the second moment the root is kept: half the powers of ten, so 8 bits reach further down.
    The moments of a piece of the parameter at a time are fp32, so the memory for that is bounded.

    Args:
        params: what trains, contiguous.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root.
        weight_decay: decoupled decay towards zero.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.betas, self.eps = betas, eps
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def _update(self, parameter: Tensor, state: dict[str, Any], lr: float, step: int) -> None:
        assert parameter.grad is not None
        n = parameter.shape[-1] if parameter.dim() else 1
        values, grad = parameter.view(-1, n), parameter.grad.reshape(-1, n)
        rows, whole = len(values), parameter.numel() < SMALL
        if "mean" not in state:
            state["mean"] = torch.zeros_like(values, dtype=grad.dtype if whole else torch.uint8)
            state["root"] = torch.zeros_like(state["mean"])
            if not whole:
                state["mean"].fill_(ZERO)
                for name in ("mean", "root"):
                    state[f"{name}_scale"] = grad.new_zeros(rows, math.ceil(n / BLOCK))
        if whole:
            self._adam(values, grad, state["mean"], state["root"], lr, step)
            return
        for start in range(0, rows, height := max(1, _PIECE // n)):
            part = slice(start, start + height)
            moments = {
                name: dequantise(state[name][part], state[f"{name}_scale"][part], name == "mean")
                for name in ("mean", "root")
            }
            self._adam(values[part], grad[part], moments["mean"], moments["root"], lr, step)
            for name, moment in moments.items():
                state[name][part], state[f"{name}_scale"][part] = quantise(moment, name == "mean")

    def _adam(
        self, values: Tensor, grad: Tensor, mean: Tensor, root: Tensor, lr: float, step: int
    ) -> None:
        """AdamW's update in place; `root` is the root of the second moment."""
        first, second = self.betas
        mean.lerp_(grad, 1 - first)
        root.square_().mul_(second).addcmul_(grad, grad, value=1 - second).sqrt_()
        denominator = (root / math.sqrt(1 - second**step)).add_(self.eps)
        values.addcdiv_(mean, denominator, value=-lr / (1 - first**step))


class Factored(_Plain):
    """Adafactor without relative step sizes: a factored second moment, and no first one.

    The mean square of the gradient over each row and over each column stands for that of each
    value; its decay at step t is 1 - t^-0.8, and an update whose root mean square is above 1 is
    scaled down to 1. The learning rate is absolute as in AdamW: Adafactor's own, relative to
    the size of each weight matrix, would shift the changes between modules that are compared.

    Args:
        params: what trains.
        lr: learning rate.
        weight_decay: decoupled decay towards zero.

    Source: Shazeer and Stern 2018, "Adafactor", Algorithms 4 and 5.
    """

    EPS = torch.finfo(torch.float32).eps

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def _update(self, parameter: Tensor, state: dict[str, Any], lr: float, step: int) -> None:
        grad = parameter.grad
        assert grad is not None
        weight = step**-0.8
        if grad.dim() < 2:
            square = state.setdefault("square", torch.zeros_like(grad))
            update = square.lerp_(grad.square(), weight).clamp(min=self.EPS**2)
        else:
            for name, axis in (("rows", -1), ("columns", -2)):
                mean = torch.linalg.vector_norm(grad, dim=axis, keepdim=True).square_()
                mean.div_(grad.shape[axis])
                state.setdefault(name, torch.zeros_like(mean)).lerp_(mean, weight)
            update = state["rows"] @ state["columns"]
            update.div_(state["rows"].mean(dim=-2, keepdim=True).clamp_(min=self.EPS))
            update.clamp_(min=self.EPS**2)
        update.rsqrt_().mul_(grad)
        size = torch.linalg.vector_norm(update) / math.sqrt(update.numel())
        parameter.sub_(update.mul_(lr / size.clamp(min=1.0)))


class InBackward:
    """Steps each parameter once its gradient is whole, inside the backward pass, and drops it.

    So one gradient is alive at a time. The norm of all of them is not known before the last:
    with a limit on it, a step makes two passes, of which the first adds up the norm alone. The
    update is the same, bit for bit, as after a backward pass that keeps all gradients.

    Args:
        optimizer: has one parameter in each of its groups, as `per_parameter` makes them.
        max_norm: what the gradient's norm is clipped to; infinite for one pass without clipping.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm
        self.norms: dict[int, Tensor] = {}
        self.scale: Tensor | None = None
        self.updates = True
        for position, group in enumerate(optimizer.param_groups):
            (parameter,) = group["params"]
            parameter.register_post_accumulate_grad_hook(self._hook(position))

    def step(self, backward: Callable[[], float]) -> tuple[float, Tensor]:
        """One optimiser step.

        Args:
            backward: computes the loss and its gradients, and gives the loss.

        Returns:
            The loss, and the gradient's norm before clipping.
        """
        self.norms, self.scale = {}, None
        if math.isfinite(self.max_norm):
            self.updates = False
            with torch.random.fork_rng():  # dropout is the same in both passes
                backward()
            self.updates = True
            self.scale = (self.max_norm / (self._norm() + 1e-6)).clamp(max=1.0)
        return backward(), self._norm()

    def _norm(self) -> Tensor:
        norms = [self.norms[position] for position in sorted(self.norms)]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def _hook(self, position: int) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if self.scale is None:
                self.norms[position] = torch.linalg.vector_norm(parameter.grad)
            if self.updates:
                if self.scale is not None:
                    parameter.grad.mul_(self.scale)
                groups = self.optimizer.param_groups
                self.optimizer.param_groups = [groups[position]]
                try:
                    self.optimizer.step()
                finally:
                    self.optimizer.param_groups = groups
            parameter.grad = None

        return arrived


def per_parameter(params: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups of one parameter each, so that an optimiser can step them one by one."""
    return [{"params": [parameter]} for parameter in params]
