"""Whether a training can start here: memory and disk against its forecast, and what would fit."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from neft_core.capacity import copies_share_blocks, free_disk, free_gpu_memory, free_memory
from neft_core.config import Params
from neft_core.errors import NeftError
from neft_core.forecast import Need, Training
from neft_core.planner import MARGIN, SHORT, WHAT_IF, Planner, size
from neft_core.workspace import Workspace

SKIP = "NEFT_CHECK_FIT"
"""Set to 0 to start whatever the forecast says."""


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
    planner = Planner(ws.params(), ws.root, ws, download=not before, least=before)
    try:
        planner.subject  # noqa: B018 - it may be unknown
    except NeftError:
        if before:
            return
        raise
    lines: list[str] = []
    for stage, item in stages:
        if stage == "warmup" and not planner.params.tasks[item].trains:
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
    disk = (1 if copies_share_blocks(planner.root) else 2) * planner.kept(stage, item)
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
    """The first change that fits, or the one that needs least."""
    tried = []
    for change, other in changes(stage, training):
        try:
            asked = wanted(planner.need(other)) * MARGIN
        except NeftError:
            continue
        if asked <= room:
            return f"{change} needs {size(asked)}"
        tried.append((asked, change))
    if not tried:
        return "a smaller model is needed"
    asked, change = min(tried)
    return f"the least that was tried, {change}, needs {size(asked)}"


def changes(stage: str, training: Training) -> Iterator[tuple[str, Training]]:
    """Other ways to do a training, the mildest first, as params.yaml would say them."""
    section = "warmup" if stage == "warmup" else "training"
    gentle: list[tuple[str, Training]] = []
    if not training.checkpointing:
        change = f"{section}.gradient_checkpointing: true"
        gentle.append((change, replace(training, checkpointing=True)))
    if training.batch.rows > 1:
        few = training.smaller()
        change = f"{section}.batch_size: 1 with accumulation: {few.accumulation}"
        gentle.append((change, few))
        if not training.checkpointing:
            both = f"{change} and gradient_checkpointing: true"
            gentle.append((both, replace(few, checkpointing=True)))
    yield from gentle
    if stage == "train":
        least = gentle[-1][1] if gentle else training
        tail = f" with {gentle[-1][0]}" if gentle else ""
        if training.method != "neft":
            for rest, name in (("", training), (tail, least)):
                options = WHAT_IF["neft"]
                yield (
                    f"method neft at {options['percent']:g} %{rest}",
                    replace(name, method="neft", options=options),
                )
