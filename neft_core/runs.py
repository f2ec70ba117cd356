"""Stages that train a model: warm-up, runs; and a trained run loaded again."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from neft_core import __version__, config, ranks
from neft_core.errors import NeftError
from neft_core.files import replacing, write_json
from neft_core.loading import (
    arithmetic,
    base_card,
    device,
    load_as_base,
    optimisation,
    placement,
)
from neft_core.lockfile import changed_params, locked
from neft_core.untrained import COST, keep_base, trains_nothing
from neft_core.workspace import Workspace


def warmup(ws: Workspace, name: str) -> None:
    """K steps of fine-tuning; the candidates of every layout stay in fp32.

    A task that is only tested on gets an empty folder, as every one where params have no warm-up.
    """
    params = ws.params()
    if not params.warms(name):
        with replacing(ws.path("warmup", name)) as folder:
            folder.mkdir()
            write_json(folder / "provenance.json", {"steps": 0})
        if ranks.main():
            write_json(ws.path("cost", f"warmup-{name}.json"), {})
        why = "warmup is null" if params.warmup is None else "the task is only tested on"
        print(f"warmup {name}: none; {why}")
        return
    task, section = params.warmed(name)
    state = ws.state("checkpoints", f"warmup-{name}")
    _, cost = warm_up(ws, task, section, ws.path("warmup", name), state)
    if ranks.main():
        write_json(ws.path("cost", f"warmup-{name}.json"), cost)
        shutil.rmtree(state, ignore_errors=True)


def warm_up(
    ws: Workspace, task: str, section: config.Warmup, target: Path, state: Path
) -> tuple[Any, dict[str, float]]:
    """Fine-tune the base as a section of params says, and write the tuned model with its origin.

    Args:
        ws: the workspace with the base and the prepared task.
        task: the rows to train on.
        section: how to.
        target: the directory to write: the checkpoint, train.csv, provenance.json.
        state: where an interrupted warm-up goes on from.

    Returns:
        How it went, and what it cost.
    """
    import torch

    from neft_core import models, training, warmups
    from neft_core.course import TRAIN_COLUMNS, write_table
    from neft_core.encoding import load_encoded
    from neft_core.methods import trained_parameters
    from neft_core.patterns import scorable
    from neft_core.steps import Recipe, digest, fingerprint

    params = ws.params()
    card, tokenizer = base_card(ws)
    train, _ = load_encoded(ws.path("prepared", task, "train.safetensors"))
    model = load_as_base(ws, card, params)
    stored = model.dtype
    # The model's own names: those in the base's files may lack a prefix.
    scored = scorable({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    choice = warmups.Warmup(**section.model_dump(include={*warmups.Warmup.__annotations__}))
    torch.manual_seed(section.seed)
    model = warmups.MODULES[choice.modules].prepare(model, choice, card.model_type)
    recipe = Recipe(steps=section.steps, seed=section.seed, **optimisation(section))
    inputs = fingerprint(
        section.model_dump(),
        arithmetic(params),
        card.hash,
        digest(train),
        __version__,
    )
    trainer = training.Trainer(
        model,
        trained_parameters(model),
        recipe,
        train,
        None,
        pad=tokenizer.pad_token_id,
        folder=state / inputs,
        label=f"warmup {target.name}",
        optimizer=warmups.STATES[choice.states],
        in_backward=choice.update == "in_backward",
        **placement(params),
    )
    course = trainer.run()
    tuned, cost = trainer.release(), _cost(course, trainer)
    if not ranks.main():
        return course, cost
    tuned = warmups.MODULES[choice.modules].finish(tuned.cpu(), scored)
    origin = {"base": card.hash, "steps": course.step, "data": digest(train), **_by()}
    if choice != warmups.Warmup():
        origin["warmup"] = warmups.describe(choice)
    with replacing(target) as folder:
        folder.mkdir()
        models.save_checkpoint(tuned, folder, scored, stored)
        write_table(folder / "train.csv", TRAIN_COLUMNS, course.train)
        write_json(folder / "provenance.json", origin)
    return course, cost


def _by() -> dict[str, str]:
    return {"version": __version__}


def _cost(course: Any, trainer: Any) -> dict[str, float]:
    return {
        "seconds": round(course.seconds, 3),
        "tokens_per_second": round(course.tokens / max(course.seconds, 1e-9), 1),
        "peak_bytes": trainer.peak_bytes(),
    }


def train(ws: Workspace, run: str) -> None:
    """Train every seed of a run; for `neft`, prove that no other weight moved."""
    from neft_core.encoding import load_encoded
    from neft_core.masks import NeuronMask

    entry = ws.params().runs[run]
    card, tokenizer = base_card(ws)
    mask = NeuronMask.load(ws.path("masks", f"{run}.safetensors"))
    _check_mask(ws, mask, card, entry)
    splits = {
        name: load_encoded(ws.path("prepared", entry.task, f"{name}.safetensors"))[0]
        for name in ("train", "dev")
    }
    costs = {}
    with replacing(ws.path("train", run)) as folder:
        folder.mkdir()
        for seed in entry.seeds:
            if mask.neurons or not _masked(entry):
                costs[str(seed)], course, result = _train_seed(
                    ws, run, seed, card, tokenizer.pad_token_id, mask, splits, folder
                )
            else:
                told, target = partial(_told, ws, run, seed, card), folder / f"seed-{seed}"
                course, result = keep_base(ws, splits["dev"], tokenizer.pad_token_id, target, told)
                costs[str(seed)] = COST
            if not ranks.main():
                continue
            print(
                f"train {run}, seed {seed}: dev loss {result['best_dev_loss']:.4f} at step "
                f"{course.best_step}, {result['trainable_parameters']:,} parameters "
                f"({result['trainable_percent']:.2f} %), {course.seconds:.0f} s"
            )
        write_json(ws.path("cost", f"{run}.json"), {"seeds": costs})
    if ranks.main():
        shutil.rmtree(ws.state("checkpoints", f"train-{run}"), ignore_errors=True)


def _check_mask(ws: Workspace, mask: Any, card: Any, entry: config.Run) -> None:
    from neft_core.checkpoints import shapes

    if _masked(entry):
        if not mask.neurons and not any(part.any_size for _, part in entry.selections("")):
            raise NeftError(f"{mask.source}: has no neurons; run 'neft stage select'")
        mask.check(base_hash=card.hash, shapes=shapes(card.directory(ws.root)))


def _masked(entry: config.Run) -> bool:
    return isinstance(entry.method, config.Neft)


def _told(ws: Workspace, run: str, seed: int, card: Any, course: Any, dtype: str) -> dict[str, Any]:
    """What metrics.json says of every training."""
    entry = ws.params().runs[run]
    return {
        "run": run,
        "task": entry.task,
        "method": entry.method.name,
        "seed": seed,
        "dtype": dtype.removeprefix("torch."),
        "steps": course.step,
        "best_step": course.best_step,
        "best_dev_loss": course.best_loss,
        "stopped_early": course.stopped_early,
        "base": card.hash,
        **_by(),
    }


def _train_seed(
    ws: Workspace,
    run: str,
    seed: int,
    card: Any,
    pad: int,
    mask: Any,
    splits: Mapping[str, Any],
    folder: Path,
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    import torch

    from neft_core import machine, training
    from neft_core.course import DEV_COLUMNS, TRAIN_COLUMNS, write_table
    from neft_core.methods import METHODS, moved_outside, trained_parameters
    from neft_core.steps import Recipe, digest, fingerprint, steps_in_epoch

    params = ws.params()
    entry, section = params.runs[run], params.training
    options = entry.method.model_dump()
    method = METHODS[entry.method.name]
    torch.manual_seed(seed)
    model = load_as_base(ws, card, params)
    dtype = str(model.dtype)
    model = method.prepare(model, options, mask, card.model_type)
    shared = optimisation(section) | ({"lr": entry.lr} if entry.lr else {})
    rows = len(splits["train"]["offsets"]) - 1
    per_epoch = steps_in_epoch(rows, section.batch_size, section.accumulation)
    recipe = Recipe(
        steps=max(1, round((entry.epochs or section.epochs) * per_epoch)),
        seed=seed,
        evaluate_every=section.evaluate_every or 0,
        patience=section.patience or 0,
        **shared,
    )
    digests = {name: digest(arrays) for name, arrays in splits.items()}
    inputs = fingerprint(
        options,
        recipe.__dict__,
        arithmetic(params),
        card.hash,
        digests,
        mask.provenance,
        __version__,
    )
    trained = trained_parameters(model)
    live = ws.state("live", "train", run, f"seed-{seed}")
    trainer = training.Trainer(
        model,
        trained,
        recipe,
        splits["train"],
        splits["dev"],
        pad=pad,
        folder=ws.state("checkpoints", f"train-{run}", f"seed-{seed}-{inputs}"),
        live=live,
        label=f"train {run}, seed {seed}",
        **placement(params),
    )
    with machine.sampled(
        live / "system.csv" if ranks.main() else None, trainer.accelerator.device
    ) as samples:
        course = trainer.run()
    model = trainer.release()
    cost = _cost(course, trainer) | {"system": samples}
    if not ranks.main():
        return cost, course, {}
    count = sum(parameter.numel() for parameter in trained.values())
    result: dict[str, Any] = {
        **_told(ws, run, seed, card, course, dtype),
        "trainable_parameters": count,
        "trainable_percent": 100 * count / card.parameters,
        "lr": recipe.lr,
    }
    target = folder / f"seed-{seed}"
    target.mkdir()
    metadata = {"method": entry.method.name, "base": card.hash, "seed": str(seed), **_by()}
    method.save(model, target, metadata | {"location": card.location, "revision": card.revision})
    if _masked(entry):
        compared, moved = moved_outside(model, load_as_base(ws, card, params))
        if moved:
            raise RuntimeError(f"{run}: unselected weights moved in {', '.join(moved[:3])}")
        result["unselected_weights_verified"] = compared
        result["selected_neurons"] = mask.neurons
        print(f"train {run}, seed {seed}: {compared:,} unselected weights equal the base's bits")
    write_table(target / "train.csv", TRAIN_COLUMNS, course.train)
    write_table(target / "dev.csv", DEV_COLUMNS, course.dev)
    write_json(target / "metrics.json", result)
    return cost, course, result


def chosen_seed(params: config.Params, run: str, seed: int | None) -> int:
    """The seed that a command means: the one given, else the run's first.

    Raises:
        NeftError: the run or the seed is unknown.
    """
    if run not in params.runs:
        raise NeftError(f"run '{run}': unknown; params.yaml has {', '.join(params.runs)}")
    seeds = params.runs[run].seeds
    if seed is not None and seed not in seeds:
        raise NeftError(f"run {run}: has no seed {seed}; it has {seeds}")
    return seeds[0] if seed is None else seed


def check_current(ws: Workspace, run: str) -> None:
    """Refuse a run whose weights are of other params; on what device is all the same.

    Raises:
        NeftError: naming the section that was changed.
    """
    entry = locked(ws).get(f"train@{run}")
    changed = changed_params(entry, config.read_yaml(ws.params_file)) if entry else []
    if changed := [key for key in changed if key != "compute"]:
        raise NeftError(
            f"run {run}: {changed[0]} was changed since it was trained; run 'neft run' first"
        )


def load_trained(ws: Workspace, run: str, seed: int, exact: bool = False) -> tuple[Any, Any]:
    """A run's model with its adapter, and its tokenizer.

    Args:
        ws: the workspace.
        run: its name.
        seed: one of its seeds.
        exact: hold frozen weights in fp32 too, with the values that they had in training.

    Raises:
        NeftError: the run isn't trained, or its adapter is of another base model.
    """
    from neft_core.methods import METHODS

    params = ws.params()
    method = params.runs[run].method
    card, tokenizer = base_card(ws)
    model = load_as_base(ws, card, params)
    if exact:
        model = model.float()
    if trains_nothing(ws.path("train", run, f"seed-{seed}")):
        return model.to(device(params)), tokenizer
    model = METHODS[method.name].load(
        model,
        method.model_dump(),
        card.model_type,
        ws.path("train", run, f"seed-{seed}"),
        card.hash,
    )
    return model.to(device(params)), tokenizer
