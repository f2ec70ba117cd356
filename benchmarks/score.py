"""Scoring two checkpoints against merely reading them: time, throughput and memory.

`python -m benchmarks.score --shape 7b-block --dtype bf16/fp32` from the repository's root; `--help`
says the rest. Random checkpoints are written, sharded by layer, and deleted afterwards. Rivals:

- `read`: every weight of both checkpoints is read through safetensors and summed, by torch
- `read-scored`: the same for the weights alone in which the layout has candidates
- `score`: `score_neurons`
- `score-torch`: `score_neurons` without a C compiler

The throughput of all is that of the bytes which the rival itself reads.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness

SEED = 0


@dataclass(frozen=True)
class Shape:
    """A Llama, by its sizes; without embedding and head where `vocab` is 0."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int


SHAPES = {
    "micro": Shape(16, 24, 2, 8),
    "25m": Shape(384, 1024, 8, 16000),
    "400m": Shape(1024, 2816, 24, 32000),
    "7b-block": Shape(4096, 11008, 1, 0),
    "7b-4-blocks": Shape(4096, 11008, 4, 0),
}
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
RIVALS = ("read", "read-scored", "score", "score-torch")


@dataclass(frozen=True)
class Spec:
    """What a rival's process has to know."""

    rival: str
    directories: tuple[str, str]
    layout: str
    threads: int


def write(directory: Path, shape: Shape, dtype: str, seed: int, change: float) -> None:
    """A random checkpoint with one shard for each layer; weights of equal `seed` are alike.

    Args:
        change: standard deviation of what is added to every weight, of another seed.
    """
    import torch
    from safetensors.torch import save_file

    draw, drift = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    files: dict[str, str] = {}

    def save(shard: str, sizes: Mapping[str, tuple[int, int]]) -> None:
        tensors = {}
        for name, size in sizes.items():
            weight = torch.randn(size, generator=draw).mul_(0.02)
            if change:
                weight.add_(torch.randn(size, generator=drift), alpha=change)
            tensors[name] = weight.to(getattr(torch, DTYPES[dtype]))
        save_file(tensors, directory / shard)
        with (directory / shard).open("rb+") as handle:
            os.fsync(handle.fileno())
        files.update(dict.fromkeys(tensors, shard))

    h, i = shape.hidden, shape.intermediate
    directory.mkdir(parents=True)
    for layer in range(shape.layers):
        square = {f"self_attn.{name}_proj": (h, h) for name in "qkvo"}
        sizes = square | {"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
        named = {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}
        save(f"layer-{layer}.safetensors", named)
    if shape.vocab:
        names = ("model.embed_tokens.weight", "lm_head.weight")
        save("ends.safetensors", dict.fromkeys(names, (shape.vocab, h)))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    index = json.dumps({"weight_map": files})
    (directory / "model.safetensors.index.json").write_text(index)


def forget(directories: tuple[str, str]) -> None:
    """Ask the system to drop the files from its cache."""
    for directory in directories:
        for path in Path(directory).glob("*.safetensors"):
            with path.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def build(spec: Spec) -> Callable[[str], dict[str, float]]:
    """A rival: `warm` or `cold` runs it once and tells seconds, bytes and memory."""
    import torch

    from neft_core import checkpoints, sums
    from neft_core.neurons import candidates
    from neft_core.similarity import score_neurons

    torch.set_num_threads(spec.threads)
    scored = {
        group.parameter
        for group in candidates(checkpoints.shapes(spec.directories[0]), "llama", spec.layout)
    }

    def read() -> None:
        total = 0.0
        for directory in spec.directories:
            for path in sorted(Path(directory).glob("*.safetensors")):
                with checkpoints.opened(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        if spec.rival == "read" or name in scored:
                            total += float(file.get_tensor(name).sum())

    def score() -> None:
        score_neurons(*spec.directories, spec.layout)

    if spec.rival == "score":
        sums.compiled()
    elif spec.rival == "score-torch":
        # What the call finds on a machine without a compiler.
        os.environ["CC"] = "/nonexistent"
    work = read if spec.rival.startswith("read") else score
    size = sum(
        _bytes(Path(directory), None if spec.rival == "read" else scored)
        for directory in spec.directories
    )

    def answer(command: str) -> dict[str, float]:
        if command == "cold":
            forget(spec.directories)
        harness.reset_peak()
        before = harness.peak_resident()
        with harness.Clock() as clock:
            work()
        grown = harness.peak_resident() - before
        return {"wall": clock.wall, "cpu": clock.cpu, "bytes": size, "grown": grown}

    return answer


def _bytes(directory: Path, names: set[str] | None) -> int:
    """Stored bytes of some weights, or of all, from the files' headers."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        header.pop("__metadata__", None)
        total += sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if names is None or name in names
        )
    return total


@contextlib.contextmanager
def checkpoints_of(shape: Shape, dtypes: str, folder: Path | None) -> Iterator[tuple[str, str]]:
    """Base and tuned checkpoint in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="neft-score-", dir=folder) as root:
        pair = Path(root) / "base", Path(root) / "tuned"
        for directory, dtype, change in zip(pair, dtypes.split("/"), (0.0, 1e-4), strict=True):
            write(directory, shape, dtype, SEED, change)
        yield str(pair[0]), str(pair[1])


def compare(options: argparse.Namespace, dtypes: str) -> dict[str, Any]:
    """Each rival's figures for one pair of precisions, ratios to reading formed by round."""
    shape = SHAPES[options.shape]
    with checkpoints_of(shape, dtypes, options.folder) as directories:
        specs = {
            rival: Spec(rival, directories, options.layout, options.threads)
            for rival in options.rivals
        }
        command = "cold" if options.cold else "warm"
        with harness.workers(build, specs) as rivals:
            harness.repeat(rivals, "warm", 1)
            answers = harness.repeat(rivals, command, options.repeats)
    found: dict[str, Any] = {}
    for rival, runs in answers.items():
        mine = {key: [run[key] for run in runs] for key in runs[0]}
        found[rival] = {key: harness.spread(values) for key, values in mine.items()}
        for floor in ("read", "read-scored"):
            if floor in answers:
                found[rival][f"of {floor}"] = {
                    clock: harness.ratio([run[clock] for run in answers[floor]], mine[clock])
                    for clock in ("wall", "cpu")
                }
    return found


def score_table(found: Mapping[str, Any]) -> str:
    """One row for each rival."""
    rows = []
    for rival, r in found.items():
        wall = r["wall"]
        row = {
            "rival": rival,
            "MB": f"{r['bytes']['median'] / 1e6:,.0f}",
            "ms (quartiles)": f"{1e3 * wall['median']:,.0f} "
            f"({1e3 * wall['q1']:,.0f}-{1e3 * wall['q3']:,.0f})",
            "CPU ms": f"{1e3 * r['cpu']['median']:,.0f}",
            "GB/s": f"{r['bytes']['median'] / wall['median'] / 1e9:.1f}",
        }
        for floor in ("read", "read-scored"):
            if f"of {floor}" in r:
                shares = r[f"of {floor}"]
                row[f"speed of {floor}, wall / CPU"] = (
                    f"{shares['wall']['median']:.2f} / {shares['cpu']['median']:.2f}"
                )
        rows.append(row | {"MB resident": f"{r['grown']['median'] / 1e6:,.0f}"})
    return harness.table(rows)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """All precisions of a command: the record and the tables."""
    settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
    record: dict[str, Any] = {
        "command": settings,
        "machine": harness.machine(),
        "shape": asdict(SHAPES[options.shape]),
        "dtypes": {},
    }
    text = ["Scoring: " + ", ".join(f"{key} {value}" for key, value in settings.items()), ""]
    for dtypes in options.dtype:
        print(f"{options.shape}, {dtypes}", file=sys.stderr, flush=True)
        found = compare(options, dtypes)
        record["dtypes"][dtypes] = found
        text += [f"### {options.shape}, base/tuned in {dtypes}", "", score_table(found), ""]
    return record, "\n".join(text)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="25m")
    add("--dtype", type=_dtypes, default=["bf16/bf16", "bf16/fp32", "fp32/fp32"],
        help="of base and tuned checkpoint, several with commas")  # fmt: skip
    add("--layout", default="mlp")
    add("--rivals", type=lambda text: text.split(","), default=list(RIVALS), help=",".join(RIVALS))
    add("--repeats", type=int, default=15)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--cold", action="store_true", help="drop the files from the system's cache each time")
    add("--folder", type=Path, default=None, help="where the checkpoints are written for a while")
    add("--out", type=Path, default=None, help="writes OUT.json and OUT.md")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.rivals) - set(RIVALS)):
        parser.error(f"--rivals: got {unknown[0]}; allowed are {', '.join(RIVALS)}")
    return options


def _dtypes(text: str) -> list[str]:
    pairs = text.split(",")
    for pair in pairs:
        if pair.count("/") != 1 or not set(pair.split("/")) <= set(DTYPES):
            raise argparse.ArgumentTypeError(f"got {pair}; two of {', '.join(DTYPES)} with a slash")
    return pairs


if __name__ == "__main__":
    sys.exit(harness.main(arguments, run))
