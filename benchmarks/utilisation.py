"""Neuron utilisation at full size against merely touching every weight: time and memory.

`python -m benchmarks.utilisation` from the repository's root: the candidates of Llama-2-7b (704,512
neurons of 4,096 weights) against 32 layer means. Random weights are made layer by layer, untimed;
`sum` adds up every value, `utilisation` is what `neft analyse utilisation` computes.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import harness

RIVALS = ("sum", "utilisation")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both over all layers, by precision, and the most memory in use."""
    import torch

    from neft_core.utilisation import utilisation

    torch.set_num_threads(options.threads)
    h, i = options.hidden, options.intermediate
    states = torch.randn(1, 32, h)
    found: dict[str, Any] = {}
    for name in options.dtype:
        harness.reset_peak()
        before = harness.peak_resident()
        seconds = {f"{rival} {kind}": 0.0 for rival in RIVALS for kind in ("wall", "cpu")}
        neurons = 0
        for layer in range(options.layers):
            torch.manual_seed(layer)
            weights = {
                f"model.layers.{layer}.mlp.{role}_proj.weight": torch.randn(shape).to(
                    getattr(torch, name)
                )
                for role, shape in (("up", (i, h)), ("down", (h, i)))
            }
            neurons += 2 * i
            for rival in RIVALS:
                with harness.Clock() as clock:
                    if rival == "sum":
                        for weight in weights.values():
                            float(weight.sum())
                    else:
                        utilisation(weights, states, config={"model_type": "llama"})
                seconds[f"{rival} wall"] += clock.wall
                seconds[f"{rival} cpu"] += clock.cpu
        found[name] = {
            **seconds,
            "neurons": neurons,
            "bytes": 2 * options.layers * i * h * getattr(torch, name).itemsize,
            "grown": harness.peak_resident() - before,
        }
    return found


def report(found: dict[str, Any]) -> str:
    """One row for each precision."""
    return harness.table(
        [
            {
                "weights": name,
                "neurons": f"{entry['neurons']:,}",
                "GB": f"{entry['bytes'] / 1e9:.1f}",
                **{
                    f"{rival} {kind}, s": f"{entry[f'{rival} {kind}']:.1f}"
                    for rival in RIVALS
                    for kind in ("wall", "cpu")
                },
                "ratio, wall / CPU": " / ".join(
                    f"{entry[f'utilisation {kind}'] / entry[f'sum {kind}']:.1f}"
                    for kind in ("wall", "cpu")
                ),
                "MB resident": f"{entry['grown'] / 1e6:,.0f}",
            }
            for name, entry in found.items()
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.utilisation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--hidden", type=int, default=4096)
    add("--intermediate", type=int, default=11008)
    add("--layers", type=int, default=32)
    add("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--out", type=Path, default=None, help="writes OUT.json and OUT.md")
    options = parser.parse_args(argv)
    found = measure(options)
    text = report(found)
    print(text)
    if options.out is not None:
        settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
        record = {"command": settings, "machine": harness.machine(), "found": found}
        harness.write(options.out, record, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
