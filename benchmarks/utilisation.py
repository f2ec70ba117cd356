"""Neuron utilisation at full size against merely touching every weight: time and memory.

`python -m benchmarks.utilisation` from the repository's root: the candidates of Llama-2-7b (704,512
neurons of 4,096 weights) against 32 layer means. A checkpoint of random weights is written (6 GB in
bfloat16, 12 in float32), a shard for each layer, and deleted afterwards. Rivals, each in a process
of its own:

- `sum`: every weight is read through safetensors and added up, by torch
- `utilisation`: what `neft analyse utilisation` computes

Memory is what a process's resident memory grows by while it works, files mapped into it included,
beside the size of one matrix as it is stored.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness

RIVALS = ("sum", "utilisation")


@dataclass(frozen=True)
class Spec:
    """What a rival's process has to know."""

    rival: str
    directory: str
    hidden: int
    threads: int


@contextlib.contextmanager
def checkpoint(options: argparse.Namespace, dtype: str) -> Iterator[str]:
    """The directory of a checkpoint of the candidates alone; all layers have the same values."""
    import torch
    from safetensors.torch import save_file

    h, i = options.hidden, options.intermediate
    draw = torch.Generator().manual_seed(0)
    drawn = {
        f"{role}_proj": torch.randn(shape, generator=draw).mul_(0.02).to(getattr(torch, dtype))
        for role, shape in (("up", (i, h)), ("down", (h, i)))
    }
    files: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="neft-utilisation-", dir=options.folder) as root:
        for layer in range(options.layers):
            weights = {
                f"model.layers.{layer}.mlp.{role}.weight": weight for role, weight in drawn.items()
            }
            save_file(weights, Path(root) / f"layer-{layer}.safetensors")
            files |= dict.fromkeys(weights, f"layer-{layer}.safetensors")
        (Path(root) / "config.json").write_text(json.dumps({"model_type": "llama"}))
        index = json.dumps({"weight_map": files})
        (Path(root) / "model.safetensors.index.json").write_text(index)
        yield root


def build(spec: Spec) -> Callable[[str], dict[str, float]]:
    """A rival: each command runs it once and tells seconds and memory."""
    import torch

    from neft_core import checkpoints
    from neft_core.utilisation import utilisation

    torch.set_num_threads(spec.threads)
    states = torch.randn(1, 32, spec.hidden, generator=torch.Generator().manual_seed(1))

    def add_up() -> None:
        for path in sorted(Path(spec.directory).glob("*.safetensors")):
            with checkpoints.opened(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    float(file.get_tensor(name).sum())

    def answer(_command: str) -> dict[str, float]:
        harness.reset_peak()
        before = harness.peak_resident()
        with harness.Clock() as clock:
            if spec.rival == "sum":
                add_up()
            else:
                utilisation(spec.directory, states)
        grown = harness.peak_resident() - before
        return {"wall": clock.wall, "cpu": clock.cpu, "grown": grown}

    return answer


def compare(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Each rival's seconds and memory for one precision; the first, untimed, fills the cache."""
    import torch

    matrix = options.hidden * options.intermediate * getattr(torch, dtype).itemsize
    with checkpoint(options, dtype) as directory:
        specs = {rival: Spec(rival, directory, options.hidden, options.threads) for rival in RIVALS}
        with harness.workers(build, specs) as rivals:
            first = harness.repeat(rivals, "run", 1)
            answers = harness.repeat(rivals, "run", options.repeats)
    found: dict[str, Any] = {
        rival: {
            **{clock: harness.spread([run[clock] for run in runs]) for clock in ("wall", "cpu")},
            "grown": max(run["grown"] for run in [*first[rival], *runs]),
        }
        for rival, runs in answers.items()
    }
    return found | {
        "neurons": 2 * options.layers * options.intermediate,
        "bytes": 2 * options.layers * matrix,
        "matrix": matrix,
    }


def table(found: dict[str, Any]) -> str:
    """One row for each precision."""
    return harness.table(
        [
            {
                "weights": dtype,
                "neurons": f"{entry['neurons']:,}",
                "GB": f"{entry['bytes'] / 1e9:.1f}",
                **{
                    f"{rival} {clock}, s": f"{entry[rival][clock]['median']:.1f}"
                    for rival in RIVALS
                    for clock in ("wall", "cpu")
                },
                "one matrix, MB": f"{entry['matrix'] / 1e6:,.0f}",
                **{f"{rival}, MB more": f"{entry[rival]['grown'] / 1e6:,.0f}" for rival in RIVALS},
            }
            for dtype, entry in found.items()
        ]
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """All precisions of a command: the record and the table."""
    found = {dtype: compare(options, dtype) for dtype in options.dtype}
    settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
    return {"command": settings, "machine": harness.machine(), "found": found}, table(found)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
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
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--folder", type=Path, default=None, help="where the checkpoint is written for a while")
    add("--out", type=Path, default=None, help="writes OUT.json and OUT.md")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(harness.main(arguments, run))
