"""Sums over the weights of neurons, in one order of additions: the same bits wherever they run.

Weight i of a neuron belongs to lane i mod 16. A lane adds its products in the order of i; then lane
l + 8 is added to lane l, of the eight left l + 4 to l, and so on. Nothing but D decides the order:
not how neurons are cut into pieces, how they lie in storage, threads, or the processor.

`sums.c` does the same in one pass over memory. It is compiled where a C compiler is at hand, kept
in the user's cache, and used only when it gives the bits of the code here on a sample.

Shapes: N neurons, D weights in each.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

LANES = 16
_WIDTH = 2048
"""As in `sums.c`."""

_SOURCE = Path(__file__).with_name("sums.c")
# Products and sums stay apart, or the bits would change. The second choice is for compilers that do
# not know the options of the first.
_OPTIONS = (("-march=native", "-mprefer-vector-width=512"), ())
_COMPILED = {torch.float32: "float", torch.bfloat16: "bf16"}


def sums(base: Tensor, tuned: Tensor, kernel: "Kernel | None" = None) -> Tensor:
    """Of each neuron w and its displacement d = v - w: w.w, d.w and d.d.

    Args:
        base: w of each neuron, [N, D], floating point.
        tuned: v of each neuron, [N, D].
        kernel: what to compute with on a CPU; the result is the same bits.

    Returns:
        The sums, float64, [3, N].
    """
    if kernel is not None and kernel.takes(base) and kernel.takes(tuned):
        return kernel(base, tuned)
    return _added(lambda w, d: (w * w, d * w, d * d), base, tuned)


def across(base: Tensor, tuned: Tensor, along: Tensor) -> Tensor:
    """Squared size of d - along * w of each neuron, with the same names; float64, [N]."""

    def terms(w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        part = d - along[:, None] * w
        return (part * part,)

    return _added(terms, base, tuned)[0]


def _added(
    terms: Callable[[Tensor, Tensor], tuple[Tensor, ...]], base: Tensor, tuned: Tensor
) -> Tensor:
    """Sums over D of each of the K terms that `terms` makes of w and d, [K, N].

    Goes by 16 weights of all neurons, so that what it allocates is small and used again.
    """
    lanes: list[Tensor] = []
    for w, v in zip(base.split(LANES, 1), tuned.split(LANES, 1), strict=True):
        wide = w.to(torch.float64)
        products = terms(wide, v.to(torch.float64) - wide)
        lanes = lanes or [torch.zeros_like(product) for product in products]
        for lane, product in zip(lanes, products, strict=True):
            lane.narrow(1, 0, product.shape[1]).add_(product)
    found = base.new_zeros(len(lanes), len(base), LANES, dtype=torch.float64)
    for whole, lane in zip(found, lanes, strict=True):
        whole.narrow(1, 0, lane.shape[1]).copy_(lane)
    half = LANES
    while half > 1:
        half //= 2
        found = found[..., :half] + found[..., half:]
    return found[..., 0]


class Kernel:
    """`sums` compiled, for neurons on a CPU of at most 32 bits a weight."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        for kind in ("rows", "columns"):
            for base, first in _COMPILED.items():
                for tuned, second in _COMPILED.items():
                    function = library[f"{kind}_{first}_{second}"]
                    function.argtypes = [
                        *[ctypes.c_void_p] * 2,
                        *[ctypes.c_size_t] * 4,
                        *[ctypes.c_void_p] * (2 if kind == "columns" else 1),
                    ]
                    function.restype = None
                    self._functions[kind, base, tuned] = function

    @staticmethod
    def takes(neurons: Tensor) -> bool:
        """Whether it is made for these."""
        return neurons.device.type == "cpu" and neurons.dtype.itemsize <= 4

    def __call__(self, base: Tensor, tuned: Tensor) -> Tensor:
        """As `sums`."""
        pair = [part if part.dtype in _COMPILED else part.float() for part in (base, tuned)]
        if all(part.stride(0) == 1 for part in pair):
            kind, along = "columns", 1
        else:
            kind, along = "rows", 0
            pair = [part if part.stride(1) == 1 else part.contiguous() for part in pair]
        steps = [part.stride(along) * part.element_size() for part in pair]
        n, d = base.shape
        made = [torch.zeros(3, n, dtype=torch.float64)]
        if kind == "columns":
            made.append(torch.empty(3 * LANES * _WIDTH, dtype=torch.float64))
        function = self._functions[kind, pair[0].dtype, pair[1].dtype]
        addresses = [tensor.data_ptr() for tensor in made]
        function(pair[0].data_ptr(), pair[1].data_ptr(), n, d, *steps, *addresses)
        return made[0]


@functools.cache
def compiled(anew: bool = True) -> Kernel | None:
    """The compiled sums, kept in the user's cache for the next process.

    Args:
        anew: compile them where none are kept, which takes about a second.

    Returns:
        None without a C compiler (`CC`, or `cc`), and where their bits differ.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    with tempfile.TemporaryDirectory(prefix="neft-") as temporary:
        folder = _cache() or Path(temporary)
        for options in _OPTIONS:
            command = [*compiler, "-O3", "-ffp-contract=off", "-shared", "-fPIC", *options]
            made_of = f"{command} {_processor()}".encode() + _SOURCE.read_bytes()
            library = folder / f"sums-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
            try:
                if not library.exists():
                    if not anew:
                        continue
                    part = library.with_suffix(f".{os.getpid()}")
                    subprocess.run(
                        [*command, str(_SOURCE), "-o", str(part)],
                        check=True, capture_output=True, timeout=60,
                    )  # fmt: skip
                    part.replace(library)
                kernel = Kernel(ctypes.CDLL(str(library)))
            except (OSError, subprocess.SubprocessError):
                library.unlink(missing_ok=True)  # damaged, as after a power cut
                continue
            if _agrees(kernel):
                return kernel
            library.unlink(missing_ok=True)
            break
    return None


def _cache() -> Path | None:
    """The package's folder in the user's cache; None where we can't write to it, or others can."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "neft"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    mine = found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return folder if mine and os.access(folder, os.W_OK) else None


def _processor() -> str:
    """What decides which machine code runs; machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return str(sorted({line for line in lines if line.startswith(("model name", "flags", "Feat"))}))


def _agrees(kernel: Kernel) -> bool:
    """Whether it gives the same bits as `sums` does by itself."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = torch.randn(2, _WIDTH + 70, 150, generator=generator)
    for first in _COMPILED:
        for second in _COMPILED:
            rows = base.to(first), tuned.to(second)
            columns = base.t().to(first).t(), tuned.t().to(second).t()
            for pair in (rows, columns):
                if not torch.equal(kernel(*pair), sums(*pair)):
                    return False
    return True
