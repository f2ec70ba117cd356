"""Whether a training can start here: memory and disk against its forecast, and what would fit."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from neft_core import links
from neft_core.capacity import free_disk, free_gpu_memory, free_memory
from neft_core.config import Params
from neft_core.errors import NeftError
from neft_core.forecast import Need, Training
from neft_core.planner import MARGIN, SHORT, WHAT_IF, Planner, other_warmups, size
from neft_core.workspace import Workspace

SKIP = "NEFT_CHECK_FIT"
"""Set to 0 to start whatever the forecast says."""

LISTED = 4
"""Changes that a refusal of a warm-up names, at most."""


def check(ws: Workspace, stages: Iterable[tuple[str, str]], *, before: bool = False) -> None:
    """Refuse to start what can't fit.

    Args:
        ws: the workspace.
        stages: names and items of trainings.
        before: other stages run first; rows that aren't prepared count as short, and a model
            that isn't here yet is left out.

    Raises:
        NeftError: one line for each stage that lacks memory or disk here.
    """
    if os.environ.get(SKIP) == "0":
        return
    params = ws.params()
    planner = Planner(params, ws.root, ws, download=not before, least=before)
    try:
        planner.subject  # noqa: B018 - it may be unknown
    except NeftError:
        if before:
            return
        raise
    lines: list[str] = []
    for stage, item in stages:
        if stage == "warmup" and not params.warms(item):
            continue
        try:
            lines += refusals(planner, stage, item)
        except NeftError:
            raise
        except Exception as fault:  # code that comes with a model may look at values
            print(f"{stage} {item}: can't be forecast ({type(fault).__name__}); starts unchecked")
    if lines:
        raise NeftError("\n".join(f"{line} ({SKIP}=0 starts anyway)" for line in lines))


def refusals(planner: Planner, stage: str, item: str) -> Iterator[str]:
    """One line for each thing that a training stage lacks here."""
    training, need = planner.ask(stage, item)
    section = "warmup" if stage == "warmup" else f"runs.{item}"
    where = f"{Params.FILE}: {section}"
    for kind, room, wanted in _rooms(planner):
        if room is not None and wanted(need) * MARGIN > room:
            batch = training.batch
            rows = f"with {batch.rows} rows of {batch.tokens} tokens"
            if batch.tokens <= SHORT:
                rows = "however short the rows"
            yield (
                f"{where}: needs {size(wanted(need) * MARGIN)} of {kind} {rows}, "
                f"{size(room)} available; {_remedy(planner, stage, training, room, wanted)}"
            )
            break
    disk = (1 if links.stored_once(planner.root) else 2) * planner.kept(stage, item)
    room = free_disk(planner.root)
    if (disk + need.checkpoint) * MARGIN > room:
        yield (
            f"{where}: needs {size((disk + need.checkpoint) * MARGIN)} of disk, "
            f"{size(need.checkpoint)} of it for checkpoints while it trains, {size(room)} "
            f"available in {planner.root}; free some, or use a disk with more"
        )


def _rooms(planner: Planner) -> list[tuple[str, int | None, Callable[[Need], int]]]:
    """Kinds of memory, what is free of each, and what a need takes of it."""
    compute = planner.params.compute
    if compute.accelerate_config is not None:
        return []  # it may shard, and reach other machines
    several = compute.processes

    def held(need: Need) -> int:
        # Each process keeps its gradients a second time, in the buckets that are exchanged.
        return need.peak + (need.step.gradients if several > 1 else 0)

    if planner.gpu:
        main: Callable[[Need], int] = lambda need: several * need.host  # noqa: E731
        return [("GPU memory", free_gpu_memory(), held), ("memory", free_memory(), main)]
    return [("memory", free_memory(), lambda need: several * held(need))]


def _remedy(
    planner: Planner, stage: str, training: Training, room: int, wanted: Callable[[Need], int]
) -> str:
    """What would fit, or what of all that was tried needs least."""
    tried: list[tuple[float, str]] = []

    def first(options: Iterable[tuple[str, Training]]) -> list[str]:
        for words, other in options:
            try:
                asked = wanted(planner.need(other)) * MARGIN
            except NeftError:
                continue
            tried.append((asked, words))
            if asked <= room:
                return [f"{words} ({size(asked)})"]
        return []

    section = "warmup" if stage == "warmup" else "training"
    found = first((said(section, keys), other) for keys, other in exact(training))
    for options in cheaper(training):
        if len(found) < (LISTED if stage == "warmup" else 1):
            found += first(options)
    if found:
        return f"would fit: {', or '.join(found)}"
    if not tried:
        return "a smaller model is needed"
    asked, words = min(tried)
    return f"the least that was tried, {words}, needs {size(asked)}"


def exact(training: Training) -> list[tuple[dict[str, Any], Training]]:
    """Changes that leave a training's steps as they are, the mildest first."""
    gentle: list[tuple[dict[str, Any], Training]] = [({}, training)]
    if not training.checkpointing:
        gentle.append(({"gradient_checkpointing": True}, replace(training, checkpointing=True)))
    # An update in the backward pass keeps no gradient that another micro-batch could add to.
    whole = training.warmup is not None and training.warmup.update == "in_backward"
    if training.batch.rows > 1 and not whole:
        few = training.smaller()
        keys = {"batch_size": 1, "accumulation": few.accumulation}
        gentle += [(keys | more, replace(few, checkpointing=t.checkpointing)) for more, t in gentle]
    return gentle[1:]


def cheaper(training: Training) -> Iterator[list[tuple[str, Training]]]:
    """Other ways to the same end: each as it is, then with all exact changes."""
    if training.warmup is not None:
        for keys, other in other_warmups(training):
            options = [(said("warmup", keys), other)]
            yield options + [(said("warmup", keys | more), t) for more, t in exact(other)[-1:]]
    elif training.method != "neft":
        neft = replace(training, method="neft", options=WHAT_IF["neft"])
        words = f"method neft at {neft.options['percent']:g} %"
        options = [(words, neft)]
        yield options + [(f"{words} with {said('training', m)}", t) for m, t in exact(neft)[-1:]]


def said(section: str, keys: Mapping[str, Any]) -> str:
    """Changes as params.yaml has them."""
    pairs = [f"{key}: {_yaml(value)}" for key, value in keys.items()]
    return f"{section}.{pairs[0]}" if len(pairs) == 1 else f"{section}: {{{', '.join(pairs)}}}"


def _yaml(value: Any) -> str:
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
