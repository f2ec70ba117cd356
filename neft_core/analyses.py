"""`neft analyse`: questions to masks, scores and trained runs of a workspace.

Each function reads the workspace's files and gives what it found, for JSON, and a text of tables.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neft_core import config, measures, runs
from neft_core.errors import NeftError
from neft_core.workspace import Workspace

Found = tuple[dict[str, Any], str]

THRESHOLDS = tuple(n / 10 for n in range(1, 10))


def overlap(ws: Workspace, names: Sequence[str], percents: Sequence[float]) -> Found:
    """What masks have in common, beside what chance would give.

    Args:
        ws: the workspace.
        names: runs or files of masks; with percents, names or files of scores.
        percents: budgets at which the most sensitive neurons of each of the scores are compared.
    """
    from neft_core.overlaps import most_sensitive, overlaps

    tables = []
    if percents:
        read = {name: _scores(ws, name) for name in names}
        for percent in percents:
            masks = {name: most_sensitive(scores, percent) for name, scores in read.items()}
            tables.append((percent, overlaps(masks)))
    else:
        masks = {name: _mask(ws, name) for name in names}
        tables.append((0.0, overlaps(masks)))
    entries, rows = [], []
    for percent, found in tables:
        for (first, second), common in found.items():
            entries.append({"first": first, "second": second, **common._asdict()})
            if percent:
                entries[-1]["percent"] = percent
            rows.append(
                [first, second, *([f"{percent:g} %"] if percent else [])]
                + [f"{100 * value:.1f} %" for value in (common.share, common.chance)]
                + [f"{100 * common.deviation:.2f} %", f"{100 * common.by_module:.1f} %"]
            )
    header = ["first", "second", *(["budget"] if percents else [])]
    header += ["of the first's in common", "by chance", "± of chance", "by chance within modules"]
    return {"overlap": entries}, table(header, rows)


def sensitivity(ws: Workspace, name: str, run: str | None) -> Found:
    """Scores by layer, role and module, with the share that a run's mask selects of each.

    Args:
        ws: the workspace.
        name: of the scores, or their file.
        run: a run that selects from them, or the file of a mask.
    """
    from neft_core.overlaps import below_counts, profile

    scores = _scores(ws, name)
    mask = _mask(ws, run) if run else None
    found = profile(scores, mask)
    data: dict[str, Any] = {
        "criterion": scores.criterion,
        "places": {
            kind: [place._asdict() | {"share": place.share} for place in places]
            for kind, places in found.items()
        },
    }
    parts = []
    for kind in ("layer", "role"):
        header = [kind, "candidates", "median", "mean", "highest"] + (["selected"] if mask else [])
        rows = [
            [p.where, f"{p.candidates:,}", *(f"{v:.3e}" for v in (p.median, p.mean, p.highest))]
            + ([f"{100 * p.share:.1f} %"] if mask else [])
            for p in found[kind]
        ]
        parts.append(table(header, rows))
    if scores.criterion == "similarity":
        total = sum(place.candidates for place in found["layer"])
        counts = {
            kind: below_counts(scores, THRESHOLDS, scaled=kind == "scaled")
            for kind in ("raw", "scaled")
        }
        data["below"] = counts
        rows = [
            [f"{below:g}", f"{raw:,}", f"{scaled:,}", f"{100 * scaled / total:.1f} %"]
            for (below, raw), (_, scaled) in zip(counts["raw"], counts["scaled"], strict=True)
        ]
        parts.append(table(["similarity below", "raw", "scaled to [0, 1]", "of candidates"], rows))
    return data, "\n\n".join(parts)


def utilisation(
    ws: Workspace,
    names: Sequence[str],
    *,
    task: str | None,
    count: int,
    seed: int | None,
    per_example: bool,
) -> Found:
    """Rank changes and neuron types of runs against the first of them.

    Args:
        ws: the workspace.
        names: runs, `base`, or `tuned` (the warm-up's model of the task).
        task: whose dev rows are read; None: that of the first run.
        count: how many of them.
        seed: of the runs; None: the first of each.
        per_example: see `utilisation.utilisation`.

    Raises:
        NeftError: the task or a run's seed is unknown.
    """
    from neft_core import utilisation as core

    params = ws.params()
    task = task or _task(ws, names)
    if task not in params.tasks:
        raise NeftError(f"--task {task}: unknown; params.yaml has {', '.join(params.tasks)}")
    for name in names:
        if name in params.runs:
            runs.chosen_seed(params, name, seed)
    ranks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        used = measures.used_by(ws, name, task, count, seed, per_example)
        ranks[name], groups = used.ranks(), used.groups
        print(f"utilisation: {name}, on {task}", flush=True)
    anchor, *others = ranks
    if not others:
        raise NeftError("utilisation: got one model; give two at least")
    data: dict[str, Any] = {"anchor": anchor, "task": task, "rows": count, "models": {}}
    averages, buckets, kinds = [], [], []
    for name in others:
        change = core.rank_change(ranks[anchor], ranks[name])
        trained = _trained(ws, anchor, groups) | _trained(ws, name, groups)
        found: dict[str, Any] = {
            "average": core.average(change),
            "buckets": core.by_bucket(change, ranks[anchor]),
            "types": core.neuron_types(change, trained, groups),
        }
        data["models"][name] = found
        total = len(change)
        averages.append(
            [name, f"{found['average']:,.0f}", f"{100 * found['average'] / total:.2f} %"]
        )
        buckets.append([name, *(f"{bucket[3]:,.0f}" for bucket in found["buckets"])])
        kinds += [
            [name, layer, *(f"{number:,}" for number in counts.values())]
            for layer, counts in found["types"].items()
        ]
    edges = [f"{100 * high:g} %" for high in core.EDGES[1:]]
    kind_names = list(next(iter(data["models"].values()))["types"]["all"])
    text = [
        f"against {anchor}, {len(ranks[anchor]):,} candidates",
        table(["model", "Avg(dRank)", "of candidates"], averages),
        "Avg(dRank) by percentile of the anchor's order, up to",
        table(["model", *edges], buckets),
        table(["model", "layer", *kind_names], kinds),
    ]
    return data, "\n\n".join(text)


def forgetting(ws: Workspace, names: Sequence[str], *, text: Path | None, count: int) -> Found:
    """Loss on text of the pre-training kind, of the base and of each run's seeds.

    Args:
        ws: the workspace.
        names: runs; one that is named twice counts once.
        text: a file, one text a line; None: pre-training rows of the generated corpus that the
            built base has not seen.
        count: texts at most.

    Raises:
        NeftError: no file, and a base or corpus that has no such rows.
    """
    import statistics

    names = list(dict.fromkeys(names))
    texts = measures.held_out(ws, text, count, "--text")
    params = ws.params()
    for name in names:
        if name not in params.runs:
            raise NeftError(f"forgetting: no run '{name}'; known: {', '.join(params.runs)}")
    models = [(name, seed) for name in names for seed in params.runs[name].seeds]
    before, *after = measures.text_losses(ws, texts, [("base", None), *models])
    data: dict[str, Any] = {"texts": len(texts), "base": before, "runs": {}}
    rows = [["base", "-", f"{before:.4f}", "-"]]
    for name in names:
        losses = [loss for (run, _), loss in zip(models, after, strict=True) if run == name]
        mean = statistics.mean(losses)
        data["runs"][name] = {"losses": losses, "change": mean - before}
        rows.append([name, str(len(losses)), f"{mean:.4f}", f"{mean - before:+z.4f}"])
    header = ["model", "seeds", "loss (nats per token)", "change"]
    return data, f"{len(texts):,} texts\n\n{table(header, rows)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are aligned to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        padded = [values[0].ljust(widths[0])]
        padded += [v.rjust(w) for v, w in zip(values[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(map(line, [cells[0], rule, *cells[1:]]))


def _scores(ws: Workspace, name: str) -> Any:
    from neft_core.masks import NeuronScores

    path = ws.path("scores", f"{name}.safetensors")
    return NeuronScores.load(path if path.is_file() else _file(name, "scores", path.parent))


def _mask(ws: Workspace, name: str) -> Any:
    from neft_core.masks import NeuronMask

    run = ws.params().runs.get(name)
    if run and not isinstance(run.method, config.Neft):
        raise NeftError(f"run {name}: has no mask, as method {run.method.name} selects no neurons")
    path = ws.path("masks", f"{name}.safetensors")
    return NeuronMask.load(path if path.is_file() else _file(name, "mask", path.parent))


def _file(name: str, kind: str, folder: Path) -> Path:
    """A user's own file of scores or of a mask."""
    if not Path(name).is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.safetensors"))) or "none"
        raise NeftError(f"{kind} '{name}': no such file, and not in {folder}; there: {known}")
    return Path(name)


def _task(ws: Workspace, names: Sequence[str]) -> str:
    params = ws.params()
    tasks = [params.runs[name].task for name in names if name in params.runs]
    return (tasks or list(params.tasks))[0]


def _trained(ws: Workspace, name: str, groups: Any) -> Any:
    """Which candidates a model's training could change: none of the base's, a run's own, or all."""
    import torch

    from neft_core.utilisation import trained_neurons

    run = ws.params().runs.get(name)
    if run and isinstance(run.method, config.Neft):
        return trained_neurons(_mask(ws, name), groups)
    every = sum(group.count for group in groups.values())
    return torch.full((every,), name != "base")
