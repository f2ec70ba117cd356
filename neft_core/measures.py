"""What is measured of trained runs: stages `utilisation`, `forgetting`, `speed`.

`neft analyse` asks the same of models at hand, and prints it.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from neft_core import __version__, config, loading, runs
from neft_core.errors import NeftError
from neft_core.files import save_tensors, write_json
from neft_core.rows import Row, check_pairs, json_records, text_lines
from neft_core.workspace import Workspace


def utilisation(ws: Workspace, name: str) -> None:
    """Ranks of every candidate in the base and in each seed of a run.

    One tensor for each model, `base` and `seed-N`, int32, [M]; the candidates in the metadata.
    """
    import torch

    params = ws.params()
    entry = params.utilisation[name]
    models: dict[str, tuple[str, int | None]] = {"base": ("base", None)}
    models |= {f"seed-{seed}": (entry.run, seed) for seed in params.runs[entry.run].seeds}
    ranks, groups = {}, {}
    for key, (model, seed) in models.items():
        used = used_by(ws, model, entry.task, entry.rows, seed, entry.per_example)
        ranks[key], groups = used.ranks().to(torch.int32), used.groups
        print(f"utilisation {name}: {model}{'' if seed is None else f', seed {seed}'}", flush=True)
    metadata = {
        "kind": "ranks",
        "groups": json.dumps([asdict(group) for group in groups.values()]),
        "run": entry.run,
        "task": entry.task,
        "rows": str(entry.rows),
        "per_example": str(entry.per_example).lower(),
        "base": loading.base_card(ws)[0].hash,
        "version": __version__,
    }
    save_tensors(ws.path("evaluation", f"utilisation.{name}.safetensors"), ranks, metadata)


def forgetting(ws: Workspace, name: str) -> None:
    """Loss on text of the pre-training kind, of the base and of each seed of a run."""
    params = ws.params()
    entry = params.forgetting[name]
    file = None if entry.path == config.NO_FILE else ws.input(entry.path)
    texts = held_out(ws, file, entry.rows, f"params.yaml: forgetting.{name}.path")
    seeds = params.runs[entry.run].seeds
    losses = text_losses(ws, texts, [("base", None), *((entry.run, seed) for seed in seeds)])
    found = {
        "run": entry.run,
        "texts": len(texts),
        "base": losses[0],
        "seeds": {str(seed): loss for seed, loss in zip(seeds, losses[1:], strict=True)},
    }
    write_json(ws.path("evaluation", f"forgetting.{name}.json"), found)
    mean = sum(losses[1:]) / len(seeds)
    print(
        f"forgetting {name}: {losses[0]:.4f} nats per token before, {mean:.4f} after, "
        f"on {len(texts):,} texts"
    )


def speed(ws: Workspace, name: str) -> None:
    """Tokens a second of the base, of a run with its adapter, and of the same merged."""
    from neft_core.encoding import load_encoded
    from neft_core.evaluation import tokens_per_second

    params = ws.params()
    entry = params.speed[name]
    card, tokenizer = loading.base_card(ws)
    arrays, _ = load_encoded(ws.path("prepared", entry.task, "test.safetensors"))
    rows = list(zip(arrays["offsets"], arrays["prompts"], strict=False))[: entry.rows]
    prompts = [arrays["tokens"][start : start + length].tolist() for start, length in rows]
    longest = max(map(len, prompts))
    if card.context and longest + entry.new_tokens > card.context:
        raise NeftError(
            f"params.yaml: speed.{name}.new_tokens: got {entry.new_tokens}; at most "
            f"{card.context - longest}, as the longest prompt has {longest} tokens and the model "
            f"takes {card.context}"
        )
    seed = params.runs[entry.run].seeds[0]
    models = {
        "base": loading.load_base(ws),
        "adapter": runs.load_trained(ws, entry.run, seed)[0],
        "merged": load_plain(ws, entry.run, entry.task, seed),
    }
    with loading.autocast(params):
        found = tokens_per_second(
            models,
            prompts,
            pad=tokenizer.pad_token_id,
            new_tokens=entry.new_tokens,
            repeats=entry.repeats,
        )
    place = loading.device(params)
    write_json(
        ws.path("cost", f"speed.{name}.json"),
        {
            "run": entry.run,
            "device": place,
            "prompts": len(prompts),
            "new_tokens": entry.new_tokens,
            "tokens_per_second": found,
        },
    )
    medians = {form: sorted(speeds)[len(speeds) // 2] for form, speeds in found.items()}
    told = ", ".join(f"{form} {median:,.0f}" for form, median in medians.items())
    print(f"speed {name}: tokens a second: {told}")


def load_plain(ws: Workspace, name: str, task: str, seed: int | None, exact: bool = False) -> Any:
    """A plain model: the base, the tuned one of a task, or a run's with its adapter merged.

    Args:
        ws: the workspace.
        name: `base`, `tuned`, or a run.
        task: of the tuned model.
        seed: of the run; None: its first.
        exact: hold all weights in fp32: merged in half precision, what was trained is rounded.
    """
    params = ws.params()
    if name in ("base", "tuned"):
        folder = ws.path("warmup", task) if name == "tuned" else None
        card, _ = loading.base_card(ws)
        # Frozen weights have the values that training had, also where the base's files had more.
        dtype = "float32" if folder and exact else None
        model = loading.load_as_base(ws, card, params, folder, dtype).to(loading.device(params))
        return model.float() if exact else model
    if name not in params.runs:
        known = ", ".join(params.runs)
        raise NeftError(f"utilisation: no run '{name}'; known: base, tuned, {known}")
    chosen = params.runs[name].seeds[0] if seed is None else seed
    model, _ = runs.load_trained(ws, name, chosen, exact)
    merge: Callable[[], Any] | None = getattr(model, "merge_and_unload", None)
    return merge() if merge else model


def used_by(
    ws: Workspace, name: str, task: str, count: int, seed: int | None, per_example: bool
) -> Any:
    """How much a model (see `load_plain`) uses each candidate, on dev rows of a task."""
    from neft_core import utilisation as core

    model = load_plain(ws, name, task, seed, exact=True)
    states = _states(ws, model, task, count)
    layout = ws.params().scoring.candidates
    return core.utilisation(model, states, layout, per_example=per_example)


def _states(ws: Workspace, model: Any, task: str, count: int) -> Any:
    """Hidden states of dev rows, whole: prompt and target."""
    from neft_core.encoding import load_encoded
    from neft_core.neurons import candidates, layer_of
    from neft_core.probing import sentence_states
    from neft_core.steps import collate

    params = ws.params()
    arrays, _ = load_encoded(ws.path("prepared", task, "dev.safetensors"))
    rows = list(range(min(count, len(arrays["offsets"]) - 1)))
    place = loading.device(params)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    groups = candidates(shapes, model.config.model_type, params.scoring.candidates)
    layers = list(dict.fromkeys(layer_of(group.module) for group in groups))
    batches = [
        {key: value.to(place) for key, value in collate(arrays, rows[i : i + 8], 0).items()}
        for i in range(0, len(rows), 8)
    ]
    return sentence_states(model, layers, batches)


def text_losses(
    ws: Workspace, texts: Sequence[str], models: Sequence[tuple[str, int | None]]
) -> list[float]:
    """Loss of each model on texts, in nats per token.

    Args:
        ws: the workspace.
        texts: whole texts; each of their tokens counts.
        models: `base`, or a run, with a seed.
    """
    from neft_core.pretraining import encode_texts
    from neft_core.steps import split_loss

    params = ws.params()
    card, tokenizer = loading.base_card(ws)
    arrays = encode_texts(texts, tokenizer, card.context or 1024)
    place = loading.device(params)
    found = []
    for name, seed in models:
        model = loading.load_base(ws) if seed is None else runs.load_trained(ws, name, seed)[0]
        total, tokens = split_loss(model.to(place), arrays, 16, tokenizer.pad_token_id, place)
        found.append(total / tokens)
    return found


def held_out(ws: Workspace, file: Path | None, count: int, where: str) -> list[str]:
    """Texts of the pre-training kind that the base has not seen.

    Args:
        ws: the workspace.
        file: one text a line, or JSON lines with `text`; None: pre-training rows that a generated
            corpus would give next.
        count: texts at most.
        where: what asks for them, for messages.

    Raises:
        NeftError: no file, and a base or corpus that has no such rows.
    """
    return _unseen(ws, count, where) if file is None else _texts(file, count)


def _texts(path: Path, count: int) -> list[str]:
    if path.suffix == ".jsonl":
        found = (_text(where, record) for where, record in json_records(path))
    else:
        found = (line.strip() for _, line in text_lines(path))
    texts = list(islice(filter(None, found), count))
    if not texts:
        raise NeftError(f"{path}: holds no text; one a line, or JSON lines with 'text'")
    return texts


def _text(where: str, record: Row) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        raise NeftError(f"{where}: 'text' is missing or no string; each line needs one")
    check_pairs(text, "text", where)
    return text.strip()


def _unseen(ws: Workspace, count: int, where: str) -> list[str]:
    """Texts that the generated corpora of sentence pairs would have given next for pre-training."""
    from neft_core.corpus import HELD_OUT, generate_splits
    from neft_core.tasks import pretraining_texts

    params = ws.params()
    pairs = [
        (task.source, task.format)
        for task in params.tasks.values()
        if isinstance(task.source, config.GeneratedSource)
        and isinstance(task.format, config.Translation)
        and task.source.pretrain
    ]
    if not isinstance(params.model, config.BuiltModel) or not pairs:
        raise NeftError(
            f"{where}: the base wasn't built from a generated corpus, so no text of its "
            "pre-training kind is known; give a file of such texts"
        )
    # Pairs share their meanings: what one has not seen, another may have.
    first = max(source.pretrain for source, _ in pairs)
    each = math.ceil(count / (2 * len(pairs)))
    texts: list[str] = []
    for source, form in pairs:
        splits = generate_splits(
            *source.languages,
            seed=source.seed,
            constructions=tuple(source.constructions or HELD_OUT),
            pretrain=first + each,
            train=0,
            dev=source.dev,
            test=source.test,
        )
        languages = (form.source_language, form.target_language)
        for row in splits["pretrain"][first:]:
            texts += pretraining_texts(row, languages)
    return texts[:count]
