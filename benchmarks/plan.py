"""What a training step was forecast to need, against what it needs: `python -m benchmarks.plan`.

The forecast sees shapes alone. The step is real: the package's own loss and AdamW on a CPU, each
configuration in a process of its own. `sum` is parameters, gradients, the optimiser's states and
what is kept for backward; `peak` is what torch's allocator held at the highest point of a step.
`step` is seconds: by the rates of `neft plan`'s calibration, against the fastest of some steps.
How the figures are to be read: docs/results.md, "Forecasts".
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.train_step import SHAPES


@dataclass(frozen=True)
class Spec:
    """One configuration; `block` shapes get a vocabulary of 512, so that they are whole models."""

    shape: str
    method: str
    dtype: str
    rows: int
    tokens: int
    checkpointing: bool
    percent: float
    rank: int


STEPS = 3
"""Steps that are timed."""

METHODS = ("full", "in_out", "embed", "lora", "neft")

WARMUPS: dict[str, dict[str, Any]] = {
    "warm-up 8bit": {"states": "8bit"},
    "warm-up in_backward": {"update": "in_backward"},
    "warm-up factored in_backward": {"states": "factored", "update": "in_backward"},
    "warm-up candidates 8bit in_backward": {
        "modules": "candidates", "layout": "mlp", "states": "8bit", "update": "in_backward",
    },
    "warm-up lora": {"modules": "lora", "rank": 64},
}  # fmt: skip
"""Beside `full`, which is the exact warm-up."""


def build(spec: Spec) -> Callable[[str], Any]:
    """Forecast and measurement of one configuration, in its process."""
    return lambda _command: measure(spec)


def measure(spec: Spec) -> dict[str, Any]:
    """Bytes that were forecast and bytes that were seen."""
    import numpy as np
    import torch

    from benchmarks import memory
    from benchmarks.rivals import llama_config
    from neft_core import capacity, forecast, models, steps, warmups
    from neft_core.methods import METHODS as OURS
    from neft_core.optimizers import InBackward, per_parameter
    from neft_core.simulation import Batch

    warnings.filterwarnings("ignore", module="transformers|peft")
    torch.set_num_threads(1)
    shape, dtype = SHAPES[spec.shape], getattr(torch, spec.dtype)
    config = llama_config(shape, 512 if shape.block else shape.vocab)
    half = None if dtype == torch.float32 else torch.bfloat16
    subject = forecast.Subject(config, dtype, half)
    budget = {"percent": spec.percent}
    options: dict[str, dict[str, Any]] = {"lora": {"rank": spec.rank}, "neft": budget}
    way = warmups.Warmup(**WARMUPS[spec.method]) if spec.method in WARMUPS else None
    planned = forecast.Training(
        spec.method,
        Batch(spec.rows, spec.tokens),
        options.get(spec.method, {}),
        checkpointing=spec.checkpointing,
        warmup=way,
    )
    need = forecast.forecast(subject, planned)

    model = models.skeleton(config, dtype, device="cpu")
    if way is None:
        mask = subject.mask("mlp", [budget]) if spec.method == "neft" else None
        model = OURS[spec.method].prepare(model, planned.options, mask, "llama")
    else:
        model = warmups.MODULES[way.modules].prepare(model, way, "llama")
    if spec.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.train().parameters() if p.requires_grad]
    inside = way is not None and way.update == "in_backward"
    make = warmups.STATES[way.states if way else "fp32"]
    optimizer = make(per_parameter(trained) if inside else trained, lr=1e-4)
    updates = InBackward(optimizer, planned.max_grad_norm) if inside else None
    random = np.random.default_rng(0)
    lengths = [spec.tokens, *[spec.tokens - 1] * (spec.rows - 1)]
    arrays: dict[str, np.ndarray] = {
        "tokens": random.integers(0, config.vocab_size, sum(lengths)).astype(np.int32),
        "trained": np.ones(sum(lengths), np.uint8),
        "offsets": np.cumsum([0, *lengths]),
    }
    batch = steps.collate(arrays, range(spec.rows), pad=0)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype=half, enabled=half is not None):
            return steps.loss_sum(model, batch)[0]

    def backward() -> float:
        forward().backward()
        return 0.0

    def step() -> None:
        if updates is not None:
            updates.step(backward)
            return
        backward()
        torch.nn.utils.clip_grad_norm_(trained, planned.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def held() -> dict[str, int]:
        """What is there between two steps; originals that were put aside are not in memory."""
        parts = memory.resident(model, optimizer)
        del parts["aside"]
        if inside:  # one is alive at a time
            parts["gradients"] = max(p.nbytes for p in trained)
        return parts

    def peak() -> int:
        before = held()
        return sum(before.values()) - before["gradients"] + memory.peak_of(step, cpu)

    cpu = torch.device("cpu")
    # The first step has originals in memory still, the second has the optimiser's states.
    highest = max(peak(), peak())
    parts = held()
    with memory.kept_for_backward(model) as kept:
        loss = forward()
        parts["kept"] = kept()
    del loss
    harness.reset_peak()
    step()
    resident = harness.peak_resident()
    least = float("inf")
    for _ in range(STEPS):
        begun = time.perf_counter()
        step()
        least = min(least, time.perf_counter() - begun)
    rates = capacity.calibrate("cpu", half or dtype)
    return {
        "forecast": {"sum": need.step.parts, "kept": need.step.activations, "peak": need.peak},
        "measured": {"sum": sum(parts.values()), "kept": parts["kept"], "peak": highest},
        "seconds": {
            "forecast": rates.seconds(need.step.pass_ + need.step.update),
            "measured": least,
        },
        "resident": resident,
        "parts": parts,
        "step": asdict(need.step),
    }


def row(spec: Spec, found: dict[str, Any]) -> dict[str, str]:
    """A line of the table, in MB and seconds."""
    budget = {"neft": f" {spec.percent:g} %", "lora": f" {spec.rank}"}.get(spec.method, "")
    cells = {
        "method": spec.method + budget,
        "shape": spec.shape,
        "batch": f"{spec.rows}x{spec.tokens}",
        "type": spec.dtype + (", checkpointing" if spec.checkpointing else ""),
    }
    for key in ("kept", "sum", "peak"):
        forecast, measured = found["forecast"][key], found["measured"][key]
        cells[key] = f"{forecast / 1e6:,.1f} / {measured / 1e6:,.1f}"
        cells[f"{key} off"] = f"{100 * (forecast / measured - 1):+.1f} %"
    forecast, measured = found["seconds"]["forecast"], found["seconds"]["measured"]
    cells["step"] = f"{forecast:.3g} / {measured:.3g}"
    cells["of measured"] = f"{forecast / measured:.2f}"
    return cells | {"resident": f"{found['resident'] / 1e6:,.0f}"}


def main() -> None:
    """Forecast and measure every method of some shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["29m"], choices=list(SHAPES))
    everything = [*METHODS, *WARMUPS]
    parser.add_argument("--method", nargs="+", default=everything, choices=everything)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", default=["4x128"], metavar="ROWSxTOKENS")
    parser.add_argument("--checkpointing", nargs="+", type=int, default=[0, 1], choices=[0, 1])
    parser.add_argument("--percent", nargs="+", type=float, default=[9.0], help="budgets of neft")
    parser.add_argument("--rank", type=int, default=16, help="of lora")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    options = parser.parse_args()
    batches = [tuple(map(int, batch.split("x"))) for batch in options.batch]
    specs = [
        Spec(shape, method, dtype, rows, tokens, bool(again), percent, options.rank)
        for shape in options.shape
        for dtype in options.dtype
        for rows, tokens in batches
        for again in options.checkpointing
        for method in options.method
        for percent in (options.percent if method == "neft" else options.percent[:1])
    ]
    rows, records = [], []
    for spec in specs:
        with harness.Worker(spec.method, build, spec) as worker:
            found = worker.ask("measure")
        rows.append(row(spec, found))
        records.append({"spec": asdict(spec)} | found)
        print(*rows[-1].values(), sep="  ", file=sys.stderr, flush=True)
    text = harness.table(rows)
    print(text)
    if options.out:
        harness.write(options.out, {"machine": harness.machine(), "runs": records}, text + "\n")


if __name__ == "__main__":
    main()
