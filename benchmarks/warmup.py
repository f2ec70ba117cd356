"""What cheaper warm-ups cost: overlap of their selections with the exact one's, memory, time.

    python benchmarks/warmup.py overlap WORKSPACE [TASK] --steps 50 100 300 --seeds 1 2 --out DIR
    python benchmarks/warmup.py cost --out DIR

`overlap` reads a workspace whose stages `base` and `prepare` are made, with its warm-up params;
what lies in DIR already isn't made again. `cost` measures steps of a Llama with random weights.
Both print a Markdown table and write JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

PERCENTS = (3, 6, 9, 12)

VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "in backward, two passes": {"update": "in_backward"},
    "in backward, no clipping": {"update": "in_backward", "max_grad_norm": None},
    "8bit": {"states": "8bit"},
    "factored": {"states": "factored"},
    "8bit, in backward, no clipping": {
        "states": "8bit", "update": "in_backward", "max_grad_norm": None,
    },
    "factored, in backward, no clipping": {
        "states": "factored", "update": "in_backward", "max_grad_norm": None,
    },
    "candidates": {"modules": "candidates", "layout": "mlp"},
    "candidates, 8bit, in backward, no clipping": {
        "modules": "candidates", "layout": "mlp", "states": "8bit", "update": "in_backward",
        "max_grad_norm": None,
    },
    "candidates, factored, in backward, no clipping": {
        "modules": "candidates", "layout": "mlp", "states": "factored", "update": "in_backward",
        "max_grad_norm": None,
    },
    "lora 16": {"modules": "lora", "rank": 16},
    "lora 16, lr x3": {"modules": "lora", "rank": 16, "lr": 3},
    "lora 64": {"modules": "lora", "rank": 64},
}  # fmt: skip
"""Changes to the warm-up params by name; `lr` is a factor."""


def section_of(base: Any, name: str, **changes: Any) -> Any:
    """The workspace's warm-up params with a variant's changes."""
    from neft_core import config

    variant = dict(VARIANTS[name])
    factor = variant.pop("lr", 1)
    data = base.model_dump(exclude={"modules", "layout", "rank", "states", "update"})
    return config.Warmup(**{**data, **variant, **changes, "lr": data["lr"] * factor})


def overlap(options: argparse.Namespace) -> dict[str, Any]:
    """Warm up and score in every way; overlaps with the exact selection of the same seed and K."""
    from neft_core import loading, runs, similarity
    from neft_core.masks import NeuronScores
    from neft_core.selection import select_neurons
    from neft_core.workspace import find_workspace

    ws = find_workspace(options.workspace)
    task = options.task or next(iter(ws.params().tasks))
    card, _ = loading.base_card(ws)
    masks: dict[tuple[str, int, int], dict[int, Any]] = {}
    losses: dict[tuple[str, int, int], float] = {}
    for steps in options.steps:
        wanted = [(name, seed) for seed in options.seeds for name in options.variants]
        for name, seed in dict.fromkeys([*wanted, ("exact", options.other_seed)]):
            words = name.replace(",", "").replace(" ", "-")
            file = options.out / f"{words}-{steps}-{seed}.safetensors"
            if not file.exists():
                with tempfile.TemporaryDirectory(dir=options.out) as temporary:
                    section = section_of(ws.params().warmup, name, steps=steps, seed=seed)
                    folder = Path(temporary)
                    course, _ = runs.warm_up(ws, task, section, folder / "tuned", folder / "state")
                    tail = [row[2] for row in course.train[-10:]]
                    similarity.score_neurons(
                        card.directory(ws.root),
                        folder / "tuned",
                        ws.params().scoring.layout,
                        provenance={"loss": f"{statistics.mean(tail):.4f}"},
                    ).save(file)
            scores = NeuronScores.load(file)
            masks[name, steps, seed] = {p: select_neurons(scores, percent=p) for p in PERCENTS}
            losses[name, steps, seed] = float(scores.provenance["loss"])
    rows: dict[str, Any] = {}
    for steps in options.steps:
        for name in options.variants:
            pairs = [(masks[name, steps, s], masks["exact", steps, s]) for s in options.seeds]
            label = name
            if name == "exact":
                label = "exact, other seed"
                pairs = [(masks[name, steps, s], masks[name, steps, options.other_seed])
                         for s in options.seeds if s != options.other_seed]  # fmt: skip
            shares = {p: [a[p].overlap(b[p]) for a, b in pairs] for p in PERCENTS}
            loss = [losses[name, steps, s] for s in options.seeds]
            rows[f"{label} | {steps}"] = {"overlap": shares, "loss": loss}
    print("| warm-up | K | " + " | ".join(f"{p} %" for p in PERCENTS) + " | loss |")
    print("|---|---:|" + "---:|" * (len(PERCENTS) + 1))
    one = next(iter(masks.values()))
    candidates = sum(group.count for group in one[PERCENTS[0]].groups.values())
    chance = [f"{100 * one[p].neurons / candidates:.0f}" for p in PERCENTS]
    print("| chance | | " + " | ".join(chance) + " | |")
    for label, row in rows.items():
        cells = [" / ".join(f"{100 * v:.1f}" for v in row["overlap"][p]) for p in PERCENTS]
        print(f"| {label} | " + " | ".join(cells) + f" | {statistics.mean(row['loss']):.3f} |")
    return rows


def cost(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes by part and peak of a step, and its CPU time, on a Llama with random weights.

    The peak is that of torch's CPU allocator, from the profiler's record of each allocation in
    one step, over what was allocated before it. Time is CPU time of the process on one thread,
    variants by turns; the median of the ratios to the exact one of the same turn.
    """
    import gc

    import numpy as np
    import torch

    from neft_core import config, loading, models, steps, training, warmups
    from neft_core.methods import trained_parameters

    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    h = options.hidden
    sizes = {"vocabulary": 4000, "hidden": h, "intermediate": h * 8 // 3, "heads": h // 64}
    sizes["layers"] = options.layers
    length = options.tokens // 8
    count = 8 * length * 64
    arrays = {
        "tokens": rng.integers(3, 4000, count).astype(np.int32),
        "trained": np.ones(count, np.uint8),
        "offsets": np.arange(0, count + 1, length, dtype=np.int64),
    }
    base = config.Warmup(steps=1000, lr=1e-4, batch_size=8)
    rows: dict[str, Any] = {}

    def trainer_of(name: str, folder: str) -> Any:
        section = section_of(base, name)
        choice = warmups.Warmup(**section.model_dump(include={*warmups.Warmup.__annotations__}))
        model: Any = models.build_llama(**sizes, context=length, seed=1)
        model = warmups.MODULES[choice.modules].prepare(model, choice, "llama")
        recipe = steps.Recipe(steps=1000, seed=1, **loading.optimisation(section))
        trainer = training.Trainer(
            model, trained_parameters(model), recipe, arrays, None, pad=0, folder=Path(folder),
            label=name, optimizer=warmups.STATES[choice.states],
            in_backward=choice.update == "in_backward",
        )  # fmt: skip
        forecast = warmups.memory(warmups.shapes_of(model), choice)
        return trainer, forecast

    plan = steps.plan_steps(np.diff(arrays["offsets"]), base_recipe(steps))
    seconds: dict[str, list[float]] = {name: [] for name in options.variants}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for name in options.variants:
                trainer, forecast = trainer_of(name, folder)
                trainer._step(next(plan))
                if turn == 0:
                    rows[name] = {**forecast, **measured(trainer, next(plan))}
                started = time.process_time()
                for _ in range(2):
                    trainer._step(next(plan))
                seconds[name].append((time.process_time() - started) / 2)
                del trainer
                gc.collect()
    exact = rows["exact"]
    head = ("weights", "frozen", "gradients", "states", "peak")
    print("| warm-up | " + " | ".join(head) + " | of exact | time of exact |")
    print("|---|" + "---:|" * (len(head) + 2))
    for name, row in rows.items():
        ratios = [s / e for s, e in zip(seconds[name], seconds["exact"], strict=True)]
        row["seconds"], row["time ratio"] = seconds[name], statistics.median(ratios)
        cells = " | ".join(f"{row[key] / 2**20:.1f}" for key in head)
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        share = row["peak"] / exact["peak"]
        print(f"| {name} | {cells} | {share:.2f} | {row['time ratio']:.2f} ({spread}) |")
    return rows


def base_recipe(steps: Any) -> Any:
    """Steps of eight rows."""
    return steps.Recipe(lr=1e-4, steps=1000, batch_size=8, seed=1)


def measured(trainer: Any, micro_batches: Any) -> dict[str, int]:
    """Bytes that are alive before a step, and the most in it; the parts as they are counted."""
    import torch

    from benchmarks import memory

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    live = {"most": 0}
    trained = list(trainer.trained.values())

    def count(parameter: Any) -> None:
        # This hook comes after the one that drops the gradient: here is what stays, and the own.
        alive = size(p.grad for p in trained if p.grad is not None and p is not parameter)
        live["most"] = max(live["most"], alive + size([parameter]))

    hooks = [p.register_post_accumulate_grad_hook(count) for p in trained]
    weights = size(trainer.raw_model.parameters())
    states = [v for p in trained for v in trainer.optimizer.state[p].values()]
    peak = memory.peak_of(lambda: trainer._step(micro_batches), torch.device("cpu"))
    for hook in hooks:
        hook.remove()
    return {
        "frozen": weights - size(trained),
        "measured gradients": live["most"],
        "measured states": size(states),
        "peak": weights + size(states) + peak,
    }


def main() -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("overlap")
    one.add_argument("workspace", type=Path)
    one.add_argument("task", nargs="?")
    one.add_argument("--steps", type=int, nargs="+", default=[50, 100, 300])
    one.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    one.add_argument("--other-seed", type=int, default=2, help="of the exact warm-up beside it")
    one.set_defaults(measure=overlap)
    two = commands.add_parser("cost")
    two.add_argument("--tokens", type=int, default=64, help="in a step")
    two.add_argument("--turns", type=int, default=5)
    two.add_argument("--hidden", type=int, default=768, help="a multiple of 192")
    two.add_argument("--layers", type=int, default=4)
    two.set_defaults(measure=cost)
    for command in (one, two):
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("DO_NOT_TRACK", "true")
    rows = options.measure(options)
    name = options.measure.__name__
    (options.out / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
