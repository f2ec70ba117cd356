"""Stages between warm-up and training: scores of every kind, and the neurons that runs select."""

import contextlib
import hashlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neft_core import __version__, config, loading
from neft_core.errors import NeftError
from neft_core.files import read_json, write_json
from neft_core.progress import Progress
from neft_core.workspace import Workspace


def score(ws: Workspace, name: str) -> None:
    """Sensitivity of every candidate neuron between the base and the tuned model of a warm-up."""
    from neft_core import models
    from neft_core.masks import NeuronScores
    from neft_core.similarity import score_neurons

    params = ws.params()
    place = loading.device(params)
    card = models.Base.load(ws.path("base"))
    tuned = ws.path("warmup", name)
    origin = read_json(tuned / "provenance.json")
    if not origin["steps"]:
        # Without a warm-up nobody selects from the task's own scores.
        NeuronScores({}, {}, 0, {"base": card.hash}).save(ws.path("scores", f"{name}.safetensors"))
        write_json(ws.path("scores", f"{name}.json"), {"neurons": 0})
        write_json(ws.path("cost", f"score-{name}.json"), {})
        print(f"score {name}: no neurons without a warm-up")
        return
    _check_origin(tuned, origin, card)
    task, section = params.warmed(name)
    began = time.perf_counter()
    found = score_neurons(
        card.directory(ws.root),
        tuned,
        params.scoring.candidates,
        device=place,
        provenance={
            "base": card.hash,
            "steps": str(origin["steps"]),
            "data": origin["data"],
            "seed": str(section.seed),
            "task": task,
            "version": __version__,
            **({"warmup": origin["warmup"]} if "warmup" in origin else {}),
        },
    )
    _save(ws, "score", name, found)
    _cost(ws, name, began)


def _check_origin(tuned: Path, origin: Mapping[str, Any], card: Any) -> None:
    if origin["base"] != card.hash:
        raise NeftError(f"{tuned}: made from another base model; run 'neft run'")


def scores(ws: Workspace, name: str) -> None:
    """Scores of an entry of `scores`, from the base model alone."""
    section = ws.params().scores[name]
    began = time.perf_counter()
    by = _by_gradient if isinstance(section, config.GradientScores) else _by_probe
    found = by(ws, section, name)
    _save(ws, "scores", name, found)
    _cost(ws, name, began)


def _by_gradient(ws: Workspace, section: Any, name: str) -> Any:
    from neft_core.gradients import gradient_scores
    from neft_core.steps import collate

    card, tokenizer = loading.base_card(ws)
    model = loading.load_base(ws)
    arrays, digest = _rows(ws, section.task, "train")
    chosen = _sample(arrays, section.rows, section.seed)
    with _progress(f"scores {name}") as tell:
        return gradient_scores(
            model,
            [
                {key: value.to(model.device) for key, value in batch.items()}
                for rows in _batches(arrays, chosen, section.batch_size)
                for batch in [collate(arrays, rows, tokenizer.pad_token_id)]
            ],
            ws.params().scoring.candidates,
            relative=section.relative,
            **({} if section.memory is None else {"memory": section.memory * 1e9}),
            provenance=_made(card, section, digest) | {"rows": str(len(chosen))},
            progress=tell,
        )


def _by_probe(ws: Workspace, section: Any, name: str) -> Any:
    from neft_core.neurons import candidates, layer_of
    from neft_core.probing import probe_scores, sentence_states

    card, tokenizer = loading.base_card(ws)
    model = loading.load_base(ws)
    arrays, digest = _rows(ws, section.task, "train")
    chosen = _sample(arrays, section.rows, section.seed)
    # What is trained of a row is its answer: for a task with few of them, the class.
    prompts, answers = zip(*(_parted(arrays, row) for row in chosen), strict=True)
    labels = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    order = sorted(range(len(chosen)), key=lambda i: -len(prompts[i]))
    size = section.batch_size
    batches = [
        padded([prompts[i] for i in order[start : start + size]], tokenizer, model.device)
        for start in range(0, len(order), size)
    ]
    layout = ws.params().scoring.candidates
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    groups = candidates(shapes, card.model_type, layout)
    layers = list(dict.fromkeys(layer_of(group.module) for group in groups))
    with _progress(f"scores {name}") as tell:
        states = sentence_states(model, layers, batches, tell)
    return probe_scores(
        model,
        states,
        [labels[i] for i in order],
        layout,
        alpha=section.alpha,
        provenance=_made(card, section, digest) | {"rows": str(len(chosen))},
    )


def activations(ws: Workspace, name: str) -> None:
    """Scores of an entry of `activations`, of base and tuned model on dev rows."""
    from neft_core.activations import activation_scores
    from neft_core.steps import collate

    params = ws.params()
    section = params.activations[name]
    began = time.perf_counter()
    place = loading.device(params)
    card, tokenizer = loading.base_card(ws)
    tuned = ws.path("warmup", section.warmup)
    origin = read_json(tuned / "provenance.json")
    _check_origin(tuned, origin, card)
    # The tuned model's small changes would be lost in half precision.
    before, after = (
        loading.load_as_base(ws, card, params, folder, "float32").to(place)
        for folder in (None, tuned)
    )
    arrays, digest = _rows(ws, section.task, "dev")
    rows = np.arange(min(section.rows, len(arrays["offsets"]) - 1))
    with _progress(f"activations {name}") as tell:
        found = activation_scores(
            before,
            after,
            [
                {key: value.to(place) for key, value in batch.items()}
                for part in _batches(arrays, rows, section.batch_size)
                for batch in [collate(arrays, part, tokenizer.pad_token_id)]
            ],
            params.scoring.candidates,
            provenance=_made(card, section, digest)
            | {"rows": str(len(rows)), "steps": str(origin["steps"])},
            progress=tell,
        )
    _save(ws, "activations", name, found)
    _cost(ws, name, began)


def assign(ws: Workspace) -> None:
    """Tell for each run which scores it selects from, and their hashes.

    DVC sees a run's entry alone, so that new scores or runs leave the others' masks up to date.
    """
    params = ws.params()
    hashes: dict[str, str | None] = {}
    for name in sorted({name for run in params.runs for name in params.scored(run)}):
        path = ws.path("scores", f"{name}.safetensors")
        hashes[name] = None
        if path.is_file():
            with path.open("rb") as handle:
                hashes[name] = hashlib.file_digest(handle, "sha256").hexdigest()
    found = {run: {name: hashes[name] for name in params.scored(run)} for run in params.runs}
    write_json(ws.path("assigned.json"), found)


def select(ws: Workspace, run: str) -> None:
    """The neurons that a run trains; a method without a mask gets an empty one."""
    from neft_core.masks import NeuronMask, NeuronScores
    from neft_core.selection import union

    params = ws.params()
    entry = params.runs[run]
    target = ws.path("masks", f"{run}.safetensors")
    parts = entry.selections(f"{config.Params.FILE}: runs.{run}.method")
    if not parts:
        NeuronMask({}, {}, 0, {"method": entry.method.name}).save(target)
        print(f"select {run}: method {entry.method.name} has no mask")
        return
    read = {
        name: NeuronScores.load(ws.path("scores", f"{name}.safetensors"))
        for name in params.scored(run)
    }
    masks = []
    for where, part in parts:
        try:
            masks += [chosen(part, read[name]) for name in part.read(entry.task)]
        except NeftError as fault:
            raise NeftError(f"{where}.{fault}") from None
    mask = union(masks)
    mask.save(target)
    print(
        f"select {run}: {mask.neurons:,} neurons, {mask.parameters:,} parameters, "
        f"{mask.percent:.2f} % of the model"
    )


def chosen(part: config.Selection, read: Any) -> Any:
    """The mask of one selection from one file of scores.

    Raises:
        NeftError: the budget or threshold doesn't fit; begins with its key.
    """
    from neft_core.selection import select_below, select_neurons

    if part.policy == "threshold":
        scaled = part.below_scaled is not None
        below = part.below_scaled if scaled else part.below
        assert below is not None
        return select_below(read, below, scaled=scaled, any_size=bool(part.any_size))
    budget = {key: getattr(part, key) for key in config.BUDGETS}
    policy = "lowest" if part.policy == "union" else part.policy
    return select_neurons(read, policy, seed=part.seed, per_module=bool(part.per_module), **budget)


def _rows(ws: Workspace, task: str, split: str) -> tuple[Any, str]:
    """An encoded split and its digest."""
    from neft_core.encoding import load_encoded
    from neft_core.steps import digest

    arrays, _ = load_encoded(ws.path("prepared", task, f"{split}.safetensors"))
    return arrays, digest(arrays)


def _sample(arrays: Any, rows: int, seed: int) -> Any:
    """Row numbers drawn without repetition; a larger sample contains a smaller one."""
    return np.random.default_rng(seed).permutation(len(arrays["offsets"]) - 1)[:rows]


def _batches(arrays: Any, rows: Any, size: int) -> Iterator[Any]:
    """Rows of similar length together, longest first."""
    order = rows[np.argsort(-np.diff(arrays["offsets"])[rows], kind="stable")]
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _parted(arrays: Any, row: int) -> tuple[list[int], list[int]]:
    """A row's ids before its last trained piece, and from it on."""
    first, last = (int(offset) for offset in arrays["offsets"][row : row + 2])
    ids = arrays["tokens"][first:last].tolist()
    prompt = int(arrays["prompts"][row])
    return ids[:prompt], ids[prompt:]


def padded(texts: list[list[int]], tokenizer: Any, place: str) -> dict[str, Any]:
    """Token ids as one batch, padded on the right."""
    import torch

    ids = torch.full((len(texts), max(map(len, texts))), tokenizer.pad_token_id)
    attention = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.as_tensor(text)
        attention[row, : len(text)] = 1
    return {"input_ids": ids.to(place), "attention_mask": attention.to(place)}


def _made(card: Any, section: Any, digest: str) -> dict[str, str]:
    """Provenance of scores that an entry of params describes."""
    keys = ("task", "warmup", "seed", "alpha")
    told = {key: str(getattr(section, key)) for key in keys if hasattr(section, key)}
    return {"base": card.hash, "data": digest, "version": __version__, **told}


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """What `progress` of the scorers takes, shown under a label."""
    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def tell(_done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(Progress(label, total, "batch")))
            bars[0].advance()

        yield tell


def _save(ws: Workspace, stage: str, name: str, found: Any) -> None:
    """Write scores, and their quantiles for people."""
    import torch

    found.save(ws.path("scores", f"{name}.safetensors"))
    every = torch.cat(list(found.sensitivity.values()))
    marks = [0.0, 0.25, 0.5, 0.75, 0.91, 1.0]
    # torch's own takes 2**24 values at most, and a large mixture of experts has more neurons.
    quantiles = dict(zip(marks, np.quantile(every.numpy(), marks).tolist(), strict=True))
    write_json(
        ws.path("scores", f"{name}.json"),
        {
            "neurons": len(every),
            "criterion": found.criterion,
            "sensitivity_quantiles": {f"{mark:g}": value for mark, value in quantiles.items()},
        },
    )
    print(f"{stage} {name}: {len(every):,} neurons, median {quantiles[0.5]:.3e}")


def _cost(ws: Workspace, name: str, began: float) -> None:
    """What making scores cost, beside the files that are hashed."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    cost = {"seconds": round(time.perf_counter() - began, 3), "peak_bytes": peak}
    write_json(ws.path("cost", f"score-{name}.json"), cost)
    print(f"scored {name} in {cost['seconds']:.1f} s, {peak / 1e9:.2f} GB at most")
