"""Whether a stage can start here: memory and disk against its forecast, and what would fit."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from neft_core import launching, links, passes
from neft_core.capacity import free_disk, free_gpu_memory, free_memory
from neft_core.config import BuiltModel, Params
from neft_core.errors import NeftError
from neft_core.forecast import Need, Training
from neft_core.passes import Pass
from neft_core.planner import MARGIN, SHORT, WHAT_IF, Planner, other_warmups, size
from neft_core.simulation import Batch
from neft_core.workspace import Workspace

SKIP = "NEFT_CHECK_FIT"
"""Set to 0 to start whatever the forecast says."""

TRAININGS = ("base", "warmup", "train")
"""Stages that train; the others are those of `passes`."""

SECTIONS = {"base": "model", "warmup": "warmup"}
"""Sections of params that refusals name; of a run its own."""

BATCHES = "model.pretraining.batch_size"

LISTED = 4
"""Changes that a refusal of a warm-up names, at most."""


def check(ws: Workspace, stages: Iterable[tuple[str, str]], *, before: bool = False) -> None:
    """Refuse to start what can't fit.

    Args:
        ws: the workspace.
        stages: names and items.
        before: other stages run first; rows that aren't prepared count as short, and a model
            that isn't here yet is left out.

    Raises:
        NeftError: one line for each stage that lacks memory or disk here.
    """
    if os.environ.get(SKIP) == "0":
        return
    params = ws.params()
    chosen = [(stage, item) for stage, item in stages if _holds(params, stage, item)]
    if not chosen:
        return
    planner = Planner(params, ws.root, ws, download=not before, least=before)
    try:
        planner.subject  # noqa: B018 - it may be unknown
    except NeftError:
        if before:
            return
        raise
    lines: list[str] = []
    largest: dict[str, tuple[str, str, Pass]] = {}
    for stage, item in chosen:
        try:
            if _plenty(planner, stage, item):
                continue
            if stage in TRAININGS:
                lines += refusals(planner, stage, item)
                continue
            need = passes.ask(planner, stage, item)
            # What the same key of params sets is told once, of the stage that needs most.
            if need.key not in largest or need.peak > largest[need.key][2].peak:
                largest[need.key] = stage, item, need
        except NeftError:
            raise
        except Exception as fault:  # code that comes with a model may look at values
            name = f"{stage} {item}".strip()
            print(f"{name}: can't be forecast ({type(fault).__name__}); starts unchecked")
    for stage, item, need in largest.values():
        lines += _lacks(planner, stage, item, need)
    if lines:
        raise NeftError("\n".join(f"{line} ({SKIP}=0 starts anyway)" for line in lines))


def _holds(params: Params, stage: str, item: str) -> bool:
    """Whether a stage holds a model in memory at all."""
    if stage == "base":
        return isinstance(params.model, BuiltModel)
    return stage != "warmup" or params.warms(item)


def _plenty(planner: Planner, stage: str, item: str) -> bool:
    """Whether there is so much that no simulation is needed; trainings of runs have one anyway."""
    if stage in ("warmup", "train"):
        return False
    if stage == "base":
        batch = planner.training(stage, item).batch
        most = passes.bound(planner.subject, batch.rows, batch.tokens)
        # Weights, and checkpoints of weights and states.
        if 64 * planner.subject.parameters > free_disk(planner.root):
            return False
    else:
        most = passes.most(planner, stage, item)
    several = _copies(planner, stage)
    return all(
        room is None or (isinstance(several, int) and several * most <= room)
        for _, room, _ in _rooms(planner, stage)
    )


def refusals(planner: Planner, stage: str, item: str) -> Iterator[str]:
    """One line for each thing that a training stage lacks here."""
    if stage == "base":
        training = planner.training(stage, item)
        training = replace(training, batch=_known_texts(planner, training.batch))
        need = planner.need(training)
    else:
        training, need = planner.ask(stage, item)
    where = f"{Params.FILE}: {SECTIONS.get(stage, f'runs.{item}')}"
    for kind, room, wanted in _rooms(planner, stage):
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


def _known_texts(planner: Planner, batch: Batch) -> Batch:
    """The batch of pre-training, no larger than the texts that are there.

    The tokenizer isn't made yet: a text has at least a token for each word, and two around. Where
    the texts aren't there, they count as one, and short.
    """
    from neft_core import pretraining

    found: list[str] = []
    if planner.data is not None and not planner.least:
        with contextlib.suppress(NeftError):  # the stage will tell
            found = pretraining.all_texts(planner.data, planner.params)
    longest = max((len(text.split()) + 2 for text in found), default=SHORT)
    rows = min(batch.rows, max(1, len(found)))
    return replace(batch, rows=rows, tokens=min(batch.tokens, max(SHORT, longest)))


def _lacks(planner: Planner, stage: str, item: str, need: Pass) -> Iterator[str]:
    """A line where a stage that trains nothing lacks memory."""
    for kind, room, wanted in _rooms(planner, stage):
        if room is None or wanted(need) * MARGIN <= room:
            continue
        remedy = "a smaller model is needed"
        for words, less in passes.smaller(planner, stage, item, need):
            asked = wanted(less) * MARGIN
            if asked <= room:
                remedy = f"would fit: {words} ({size(asked)})"
                break
            remedy = f"the least that was tried, {words}, needs {size(asked)}"
        yield (
            f"{Params.FILE}: {need.key}: {stage} {item} needs {size(wanted(need) * MARGIN)} of "
            f"{kind} with {need.rows} rows of {need.tokens} tokens, {size(room)} available; "
            f"{remedy}"
        )
        return


def _copies(planner: Planner, stage: str) -> int | str:
    """As `launching.copies`, of a stage: some have one process whatever params say."""
    if stage not in launching.STAGES:
        return 1
    return launching.copies(planner.params.compute, planner.root)


def _rooms(
    planner: Planner, stage: str
) -> list[tuple[str, int | None, Callable[[Need | Pass], int]]]:
    """Kinds of memory, what is free of each, and what a need takes of it."""
    copies = _copies(planner, stage)
    if isinstance(copies, str):
        return []  # it may divide what a process holds, or reach other machines

    def held(need: Need | Pass) -> int:
        # Each process keeps its gradients a second time, in the buckets that are exchanged.
        if copies > 1 and isinstance(need, Need):
            return need.peak + need.step.gradients
        return need.peak

    if not planner.gpu:
        return [("memory", free_memory(), lambda need: copies * held(need))]
    return [
        ("GPU memory", free_gpu_memory(), held),
        ("memory", free_memory(), lambda need: copies * need.host),
    ]


def has_room(planner: Planner, need: Need) -> bool | None:
    """Whether a training of such a need fits on its device; None where that isn't known."""
    for _, room, wanted in _rooms(planner, "train"):
        return None if room is None else wanted(need) * MARGIN <= room
    return None


def _remedy(
    planner: Planner,
    stage: str,
    training: Training,
    room: int,
    wanted: Callable[[Need | Pass], int],
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
    if stage == "base":
        few = ((f"{BATCHES}: {n}", n) for n in passes.halves(training.batch.rows))
        batch = training.batch
        found = first((words, replace(training, batch=replace(batch, rows=n))) for words, n in few)
    else:
        found = first((said(section, keys), other) for keys, other in exact(training))
    for options in cheaper(training) if stage != "base" else ():
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
