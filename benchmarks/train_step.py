"""One training step of each method, side by side: time, memory and size of what it trains.

`python -m benchmarks.train_step --shape 29m --percent 9` from the repository's root; `--help` says
the rest. Weights are random, from the shape alone, and the neurons of `neft` and `masked` too: the
cost of a step doesn't depend on which values they have. What is compared, and how the figures are
to be read: docs/results.md, "Training step".

Shapes: B sequences of L tokens, H hidden size.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness

SEED = 0


@dataclass(frozen=True)
class Shape:
    """A Llama, by its sizes; `block` for one decoder layer with the last norm and nothing else."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    block: bool = False


SHAPES = {
    "micro": Shape(16, 24, 2, 2, 2, 32),
    "29m": Shape(512, 1376, 8, 8, 8, 4096),
    "110m": Shape(768, 2048, 12, 12, 12, 16000),
    "1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "7b-block": Shape(4096, 11008, 1, 32, 32, 1, block=True),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
}


@dataclass(frozen=True)
class Spec:
    """What a rival's process has to know.

    Attributes:
        percent: trained parameters of all, at most; more than all candidates have means all.
        layout: whose neurons may be selected.
        rank: of `lora` and `shira`; 0 for the highest with no more parameters than `neft` trains.
        skew: standard deviation of the logarithm of how likely a module's neurons are selected; 0
            for all modules alike.
        clip: norm that the gradient of what trains is clipped to; 0 for none.
        adamw: `fused`, one kernel; `default`, what torch takes for the device.
    """

    method: str
    shape: Shape
    percent: float
    layout: str
    rank: int
    skew: float
    batch: int
    length: int
    dtype: str
    device: str
    threads: int
    clip: float
    adamw: str
    warmup: int


def build(spec: Spec) -> Callable[[str], Any]:
    """The rival of one method, in its process."""
    from benchmarks.rivals import Rival

    return Rival(spec).answer


def compare(specs: Mapping[str, Spec], repeats: int, apart: bool) -> dict[str, Any]:
    """Measure rivals against each other.

    Args:
        specs: by method.
        repeats: timed steps of each.
        apart: one rival after the other instead of interleaved, where they don't fit together.

    Returns:
        By method: facts, memory, spreads of times, and ratios to the others that were there.
    """
    found: dict[str, Any] = {}
    steps: dict[str, list[Any]] = {}
    for group in [[name] for name in specs] if apart else [list(specs)]:
        with harness.workers(build, {name: specs[name] for name in group}) as rivals:
            for name, rival in rivals.items():
                print(f"  {name}", file=sys.stderr, flush=True)
                found[name] = rival.ask("facts") | {"memory": rival.ask("memory")}
            steps |= harness.repeat(rivals, "step", repeats)
    for name, record in found.items():
        mine = steps[name]
        record["steps"] = mine
        for key in mine[0]:
            record[key] = harness.spread(step[key] for step in mine)
        record["tokens_per_second"] = record["tokens"] / record["wall"]["median"]
        record["ratio"] = {
            other: {
                key: harness.ratio([s[key] for s in mine], [s[key] for s in steps[other]])
                for key in ("wall", "cpu")
            }
            for other in found
            if other != name
        }
    return found


def step_table(found: Mapping[str, Any]) -> str:
    """Times and their ratios; ratios by CPU time in brackets."""

    def against(record: Mapping[str, Any], other: str) -> str:
        if other not in record["ratio"]:
            return "1" if record["method"] == other else "-"
        both = record["ratio"][other]
        return f"{both['wall']['median']:.3f} ({both['cpu']['median']:.3f})"

    return harness.table(
        [
            {
                "method": name,
                "trained": f"{r['trained']:,}",
                "tokens/s": f"{r['tokens_per_second']:,.0f}",
                "step ms": f"{1e3 * r['wall']['median']:.1f}",
                "quartiles": f"{1e3 * r['wall']['q1']:.1f}-{1e3 * r['wall']['q3']:.1f}",
                "least": f"{1e3 * r['wall']['min']:.1f}",
                "CPU ms": f"{1e3 * r['cpu']['median']:.1f}",
                "forward": f"{1e3 * r['forward']['median']:.1f}",
                "backward": f"{1e3 * r['backward']['median']:.1f}",
                "update": f"{1e3 * r['update']['median']:.1f}",
                "GFLOP": f"{r['flops'] / 1e9:.1f}",
                "to floor": against(r, "floor"),
                "to full": against(r, "full"),
                "to lora": against(r, "lora"),
            }
            for name, r in found.items()
        ]
    )


PARTS = (
    "parameters", "buffers", "gradients", "states", "kept", "sum", "peak", "resident", "aside",
)  # fmt: skip


def memory_table(found: Mapping[str, Any]) -> str:
    """Memory by part, and the adapter, in MiB."""
    return harness.table(
        [
            {"method": name}
            | {part: f"{r['memory'][part] / 2**20:,.1f}" for part in PARTS}
            | {"adapter": f"{r['adapter'] / 2**20:,.2f}"}
            for name, r in found.items()
        ]
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """All budgets of a command: the record and the tables."""
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    record: dict[str, Any] = {"command": settings, "machine": harness.machine(), "budgets": []}
    text = ["Training step: " + ", ".join(f"{k} {_words(v)}" for k, v in settings.items()), ""]
    for percent in options.percent:
        print(f"{options.shape}, {percent:g} %", file=sys.stderr, flush=True)
        specs = {
            method: Spec(
                method, SHAPES[options.shape], percent, options.layout, options.rank, options.skew,
                options.batch, options.length, options.dtype, options.device, options.threads,
                options.clip, options.adamw, options.warmup,
            )
            for method in options.methods
        }  # fmt: skip
        found = compare(specs, options.repeats, options.apart)
        record["budgets"].append({"percent": percent, "methods": found})
        some = next(iter(found.values()))
        text += [f"### {percent:g} % of {some['parameters']:,} parameters", ""]
        text += [step_table(found), "", "MiB:", "", memory_table(found), ""]
    return record | {"shape": asdict(SHAPES[options.shape])}, "\n".join(text)


def _words(value: Any) -> str:
    return (
        " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
        if isinstance(value, list)
        else str(value)
    )


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    methods = ["floor", "full", "masked", "neft", "lora", "shira"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="29m")
    add("--batch", type=int, default=2)
    add("--length", type=int, default=256, help="tokens of each sequence")
    add("--percent", type=_floats, default=[9.0], help="budgets, such as 0.4,1,3,6,9,12,43")
    add("--layout", choices=["mlp", "mlp+gate", "attention", "all"], default="mlp")
    add("--rank", type=int, default=0, help="of lora and shira; default: parameters as neft has")
    add("--methods", type=lambda text: text.split(","), default=methods, help=",".join(methods))
    add("--repeats", type=int, default=20)
    add("--warmup", type=int, default=3, help="steps before the first that counts")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the frozen weights; with bfloat16 under autocast, what trains is float32",
    )
    add("--device", default="cpu")
    add("--clip", type=float, default=1.0, help="norm of the gradient; 0 for no clipping")
    add("--adamw", choices=["fused", "default"], default="fused", help="for every method")
    add("--skew", type=float, default=0.0, help="spread of the selection over modules")
    add("--apart", action="store_true", help="one method after the other, not interleaved")
    add("--out", type=Path, default=None, help="writes OUT.json and OUT.md")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.methods) - set(methods)):
        parser.error(f"--methods: got {unknown[0]}; allowed are {', '.join(methods)}")
    return options


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(harness.main(arguments, run))
