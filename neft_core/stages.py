"""The stages of the pipeline: files and params in, files out.

Each is one function of a workspace and an item (a task, or a run). Nothing else in the package
knows about files and params together; what a stage reads and writes stands in dvc.yaml.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neft_core import __version__, config
from neft_core.config import Params
from neft_core.errors import NeftError
from neft_core.files import read_json, replacing, write_json
from neft_core.summary import summarise
from neft_core.workspace import Workspace


def corpus(ws: Workspace, task: str) -> None:
    """Raw rows to clean splits, without duplicates and without leakage."""
    from neft_core import data

    source = ws.params().tasks[task].source
    stats: dict[str, Any]
    if isinstance(source, config.GeneratedSource):
        from neft_core.corpus import generate_splits

        sizes = {name: getattr(source, name) for name in ("pretrain", "train", "dev", "test")}
        splits = generate_splits(*source.languages, seed=source.seed, **sizes)
        stats = {name: {"kept": len(rows)} for name, rows in splits.items()}
    else:
        read = _read_local if isinstance(source, config.LocalSource) else _read_hub
        found = {
            name: read(ws, source, part)
            for name, part in source.splits.model_dump().items()
            if part is not None
        }
        if "dev" not in found and "test" not in found and "pretrain" not in found:
            found = {"all": found["train"]}
        splits, stats = data.split_rows(
            found,
            train=source.train,
            dev=source.dev,
            test=source.test,
            pretrain=source.pretrain,
            seed=source.seed,
        )
    with replacing(ws.path("corpus", task)) as folder:
        folder.mkdir()
        for name in ("train", "dev", "test"):
            data.write_rows(folder / f"{name}.jsonl", splits[name])
        write_json(folder / "stats.json", stats)
    data.write_rows(ws.path("pretrain", f"{task}.jsonl"), splits.get("pretrain", []))
    for name, counts in stats.items():
        print(f"corpus {task}: {name}: " + ", ".join(f"{n} {k}" for k, n in counts.items()))


def _read_local(ws: Workspace, source: Any, part: str) -> list[dict[str, Any]]:
    from neft_core import data

    folder = ws.input(source.path)
    if not folder.exists():
        raise NeftError(f"{folder}: not found; put the data there, or set source.path")
    return data.read_local(folder / part if folder.is_dir() else folder, source.columns)


def _read_hub(ws: Workspace, source: Any, part: str) -> list[dict[str, Any]]:
    from neft_core import data

    local = ws.input(source.id)
    return data.read_hub(
        str(local) if local.is_dir() else source.id,
        revision=source.revision,
        config=source.config,
        split=part,
        columns=source.columns,
    )


def base(ws: Workspace) -> None:
    """Resolve, check and hash the base model, or build and pre-train the small one."""
    from neft_core import models

    params = ws.params()
    choice = params.model
    with replacing(ws.path("base")) as folder:
        folder.mkdir()
        revision, trust = "", False
        if isinstance(choice, config.BuiltModel):
            _pretrain(ws, params, choice, folder)
            directory, location = folder, "work/base"
        elif isinstance(choice, config.HubModel):
            directory = models.fetch(choice.id, choice.revision)
            # The cache's snapshot directories bear the commit as name.
            location, revision, trust = choice.id, directory.name, choice.trust_remote_code
        else:
            directory, location = ws.input(choice.path), choice.path
            trust = choice.trust_remote_code
        if trust:
            print(f"base: runs Python code that comes with the model in {directory}")
        model_type, parameters, context, digest = models.inspect(
            directory, trust_remote_code=trust
        )
        models.load_tokenizer(directory, trust_remote_code=trust)
        models.Base(
            kind=choice.kind,
            location=location,
            revision=revision,
            hash=digest,
            model_type=model_type,
            parameters=parameters,
            context=context,
            trust_remote_code=trust,
        ).save(folder)
    print(f"base: {model_type}, {parameters:,} parameters, hash {digest[:12]}")


def _pretrain(ws: Workspace, params: Params, choice: config.BuiltModel, folder: Path) -> None:
    from neft_core import data, models, tasks, training

    texts: list[str] = []
    for name, task in params.tasks.items():
        rows = data.read_rows(ws.path("pretrain", f"{name}.jsonl"))
        form = task.format
        if isinstance(form, config.Translation):
            for row in rows:
                texts += tasks.pretraining_texts(row, form.source_language, form.target_language)
    tokenizer = models.build_tokenizer(texts, choice.vocabulary, choice.context)
    arrays = tasks.encode_texts(texts, tokenizer, max_tokens=choice.context)
    model = models.build_llama(
        len(tokenizer),
        choice.hidden,
        choice.intermediate,
        choice.layers,
        choice.heads,
        choice.context,
        choice.pretraining.seed,
    )
    how = choice.pretraining
    per_epoch = training.steps_in_epoch(len(texts), how.batch_size, 1)
    steps = how.epochs * per_epoch
    recipe = training.Recipe(
        lr=how.lr,
        steps=steps,
        batch_size=how.batch_size,
        seed=how.seed,
        lr_warmup=max(1, steps // 20),
        checkpoint_every=500,
    )
    inputs = training.fingerprint(choice.model_dump(), tasks.digest(arrays), __version__)
    trainer = training.Trainer(
        model,
        dict(model.named_parameters()),
        recipe,
        arrays,
        None,
        pad=tokenizer.pad_token_id,
        folder=ws.state("checkpoints", "base", inputs),
        label="base",
        **_placement(params),
    )
    trainer.run()
    models.save_checkpoint(trainer.release().cpu(), folder)
    tokenizer.save_pretrained(str(folder))
    trainer.forget()


def prepare(ws: Workspace, task: str) -> None:
    """Rows to token sequences in the base's tokenizer."""
    from neft_core import data, tasks

    form = ws.params().tasks[task].format
    found, tokenizer = _base(ws)
    if found.context and form.max_tokens > found.context:
        raise NeftError(
            f"params.yaml: tasks.{task}.format.max_tokens: got {form.max_tokens}; "
            f"at most {found.context}, the model's longest sequence"
        )
    stats = {}
    with replacing(ws.path("prepared", task)) as folder:
        folder.mkdir()
        for name in ("train", "dev", "test"):
            rows = data.read_rows(ws.path("corpus", task, f"{name}.jsonl"))
            arrays, stats[name] = tasks.encode_split(
                rows, **form_arguments(form), tokenizer=tokenizer, for_test=name == "test"
            )
            tasks.save_encoded(folder / f"{name}.safetensors", arrays, {})
        data.write_rows(folder / "references.jsonl", tasks.references(rows, form.task))
        write_json(folder / "stats.json", stats)
    for name, counts in stats.items():
        print(f"prepare {task}: {name}: " + ", ".join(f"{n:,} {k}" for k, n in counts.items()))


def form_arguments(form: Any) -> dict[str, Any]:
    """The keyword arguments of tasks.py for a `format` section."""
    prompt = form.prompt
    if isinstance(form, config.Translation):
        prompt = prompt.replace("{source_language}", form.source_language)
        prompt = prompt.replace("{target_language}", form.target_language)
    return {"task": form.task, "prompt": prompt, "max_tokens": form.max_tokens}


def _base(ws: Workspace) -> tuple[Any, Any]:
    """The base's card and its tokenizer."""
    from neft_core import models

    card = models.Base.load(ws.path("base"))
    directory = card.directory(ws.root)
    return card, models.load_tokenizer(directory, trust_remote_code=card.trust_remote_code)


def _placement(params: Params) -> dict[str, Any]:
    """Accelerate's placement: `cpu` and `mixed_precision`."""
    cpu = _device(params) == "cpu"
    precision = params.compute.mixed_precision
    if precision == "auto":
        precision = "no" if cpu else "bf16"
    return {"cpu": cpu, "mixed_precision": precision}


def _device(params: Params) -> str:
    """`cpu` or `cuda`; settles the number of CPU threads, so that sums repeat bit by bit."""
    import torch

    torch.set_num_threads(params.compute.threads)
    wanted = params.compute.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise NeftError("params.yaml: compute.device: got cuda; this machine has no usable GPU")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def load_base(ws: Workspace) -> Any:
    """The base model, on its device."""
    params = ws.params()
    return _load(ws, _base(ws)[0], params).to(_device(params))


def _load(ws: Workspace, card: Any, params: Params, directory: Path | None = None) -> Any:
    """A model in the type of frozen weights: the base, or another of its architecture."""
    import torch

    from neft_core import models

    name = params.compute.dtype
    if name == "auto":
        name = "float32" if _device(params) == "cpu" else "bfloat16"
    return models.load_model(
        directory or card.directory(ws.root),
        getattr(torch, name),
        trust_remote_code=card.trust_remote_code,
    )


def _optimisation(section: Any) -> dict[str, Any]:
    """The fields that every training section shares with a recipe."""
    return section.model_dump(include=set(config.Optimisation.model_fields))


def warmup(ws: Workspace, task: str) -> None:
    """K steps of full fine-tuning; the candidates of every layout stay in fp32."""
    from neft_core import models, tasks, training
    from neft_core.methods import METHODS, trained_parameters
    from neft_core.checkpoints import shapes

    params = ws.params()
    card, tokenizer = _base(ws)
    section = params.warmup
    train = tasks.load_encoded(ws.path("prepared", task, "train.safetensors"))
    model = _load(ws, card, params)
    stored = model.dtype
    model = METHODS["full"].prepare(model, {}, None, card.model_type)
    recipe = training.Recipe(steps=section.steps, seed=section.seed, **_optimisation(section))
    inputs = training.fingerprint(
        section.model_dump(), params.compute.model_dump(), card.hash, tasks.digest(train), __version__
    )
    trainer = training.Trainer(
        model,
        trained_parameters(model),
        recipe,
        train,
        None,
        pad=tokenizer.pad_token_id,
        folder=ws.state("checkpoints", f"warmup-{task}", inputs),
        label=f"warmup {task}",
        **_placement(params),
    )
    course = trainer.run()
    from neft_core.neurons import candidates

    directory = card.directory(ws.root)
    scored = [g.module for g in candidates(shapes(directory), card.model_type, "mlp+gate")]
    with replacing(ws.path("warmup", task)) as folder:
        folder.mkdir()
        models.save_checkpoint(trainer.release().cpu(), folder, scored, stored)
        training.write_table(folder / "train.csv", training.TRAIN_COLUMNS, course.train)
        write_json(
            folder / "provenance.json",
            {"base": card.hash, "steps": course.step, "data": tasks.digest(train), **_by()},
        )
    write_json(ws.path("cost", f"warmup-{task}.json"), _cost(course, trainer))
    trainer.forget()


def _by() -> dict[str, str]:
    return {"version": __version__}


def _cost(course: Any, trainer: Any) -> dict[str, float]:
    return {
        "seconds": round(course.seconds, 3),
        "tokens_per_second": round(course.tokens / max(course.seconds, 1e-9), 1),
        "peak_bytes": trainer.peak_bytes(),
    }


def score(ws: Workspace, task: str) -> None:
    """Sensitivity of every candidate neuron between base and tuned model."""
    import torch

    from neft_core import models, similarity

    params = ws.params()
    _device(params)
    card = models.Base.load(ws.path("base"))
    tuned = ws.path("warmup", task)
    origin = read_json(tuned / "provenance.json")
    if origin["base"] != card.hash:
        raise NeftError(f"{tuned}: made from another base model; run 'neft run'")
    scores = similarity.score(
        card.directory(ws.root),
        tuned,
        params.scoring.layout,
        model_type=card.model_type,
        provenance={
            "base": card.hash,
            "steps": str(origin["steps"]),
            "data": origin["data"],
            "seed": str(params.warmup.seed),
            "task": task,
            **_by(),
        },
    )
    scores.save(ws.path("scores", f"{task}.safetensors"))
    every = torch.cat(list(scores.sensitivity.values()))
    marks = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.91, 1.0], dtype=torch.float64)
    quantiles = dict(zip(marks.tolist(), torch.quantile(every, marks).tolist(), strict=True))
    write_json(
        ws.path("scores", f"{task}.json"),
        {
            "neurons": len(every),
            "sensitivity_quantiles": {f"{mark:g}": value for mark, value in quantiles.items()},
        },
    )
    print(f"score {task}: {len(every):,} neurons, median sensitivity {quantiles[0.5]:.3e}")


def select(ws: Workspace, run: str) -> None:
    """The neurons that a run trains; a method without a mask gets an empty one."""
    from neft_core.masks import NeuronMask, NeuronScores
    from neft_core.selection import select as choose

    entry = ws.params().runs[run]
    source = ws.path("scores", f"{entry.task}.safetensors")
    target = ws.path("masks", f"{run}.safetensors")
    method = entry.method
    if not isinstance(method, config.Neft):
        empty = NeuronMask({}, {}, 0, {"method": method.name})
        empty.save(target)
        print(f"select {run}: method {method.name} has no mask")
        return
    scores = NeuronScores.load(source)
    budget = {key: getattr(method, key) for key in ("percent", "neurons", "share")}
    try:
        mask = choose(scores, method.policy, seed=method.seed, **budget)
    except NeftError as fault:
        raise NeftError(f"params.yaml: runs.{run}.method.{fault}") from None
    mask.save(target)
    print(
        f"select {run}: {mask.neurons:,} neurons, {mask.parameters:,} parameters, "
        f"{mask.percent:.2f} % of the model"
    )


def train(ws: Workspace, run: str) -> None:
    """Train every seed of a run; for `neft`, prove that no other weight moved."""
    from neft_core import tasks, training
    from neft_core.masks import NeuronMask

    params = ws.params()
    entry = params.runs[run]
    card, tokenizer = _base(ws)
    mask = NeuronMask.load(ws.path("masks", f"{run}.safetensors"))
    _check_mask(ws, mask, card, entry)
    splits = {
        name: tasks.load_encoded(ws.path("prepared", entry.task, f"{name}.safetensors"))
        for name in ("train", "dev")
    }
    costs = {}
    with replacing(ws.path("train", run)) as folder:
        folder.mkdir()
        trainers = []
        for seed in entry.seeds:
            trainer, course, result = _train_seed(
                ws, run, seed, card, tokenizer.pad_token_id, mask, splits, folder
            )
            costs[str(seed)] = _cost(course, trainer)
            trainers.append(trainer)
            print(
                f"train {run}, seed {seed}: dev loss {result['best_dev_loss']:.4f} at step "
                f"{course.best_step}, {result['trainable_parameters']:,} parameters "
                f"({result['trainable_percent']:.2f} %), {course.seconds:.0f} s"
            )
        write_json(ws.path("cost", f"{run}.json"), {"seeds": costs})
    for trainer in trainers:
        trainer.forget()


def _check_mask(ws: Workspace, mask: Any, card: Any, entry: config.Run) -> None:
    from neft_core.checkpoints import shapes

    if isinstance(entry.method, config.Neft):
        if not mask.neurons:
            raise NeftError(f"{mask.source}: has no neurons; run 'neft stage select'")
        mask.check(base_hash=card.hash, shapes=shapes(card.directory(ws.root)))


def _train_seed(
    ws: Workspace,
    run: str,
    seed: int,
    card: Any,
    pad: int,
    mask: Any,
    splits: Mapping[str, Any],
    folder: Path,
) -> tuple[Any, Any, dict[str, Any]]:
    import torch

    from neft_core import tasks, training
    from neft_core.files import save_tensors
    from neft_core.methods import METHODS, moved_outside, trained_parameters

    params = ws.params()
    entry, section = params.runs[run], params.training
    options = entry.method.model_dump()
    method = METHODS[entry.method.name]
    torch.manual_seed(seed)
    model = _load(ws, card, params)
    dtype = str(model.dtype).removeprefix("torch.")
    model = method.prepare(model, options, mask, card.model_type)
    shared = _optimisation(section) | ({"lr": entry.lr} if entry.lr else {})
    rows = len(splits["train"]["offsets"]) - 1
    per_epoch = training.steps_in_epoch(rows, section.batch_size, section.accumulation)
    recipe = training.Recipe(
        steps=max(1, round((entry.epochs or section.epochs) * per_epoch)),
        seed=seed,
        evaluate_every=section.evaluate_every or 0,
        patience=section.patience or 0,
        **shared,
    )
    digests = {name: tasks.digest(arrays) for name, arrays in splits.items()}
    inputs = training.fingerprint(
        options, recipe.__dict__, params.compute.model_dump(), card.hash, digests,
        mask.provenance, __version__,
    )
    trained = trained_parameters(model)
    trainer = training.Trainer(
        model,
        trained,
        recipe,
        splits["train"],
        splits["dev"],
        pad=pad,
        folder=ws.state("checkpoints", f"train-{run}", f"seed-{seed}-{inputs}"),
        label=f"train {run}, seed {seed}",
        **_placement(params),
    )
    course = trainer.run()
    model = trainer.release()
    method.finish(model)
    adapter = method.adapter(model)
    count = sum(parameter.numel() for parameter in trained.values())
    result: dict[str, Any] = {
        "run": run,
        "task": entry.task,
        "method": entry.method.name,
        "seed": seed,
        "trainable_parameters": count,
        "trainable_percent": 100 * count / card.parameters,
        "lr": recipe.lr,
        "dtype": dtype,
        "steps": course.step,
        "best_step": course.best_step,
        "best_dev_loss": course.best_loss,
        "stopped_early": course.stopped_early,
        "base": card.hash,
        **_by(),
    }
    if isinstance(entry.method, config.Neft):
        compared, moved = moved_outside(model, _load(ws, card, params))
        if moved:
            raise RuntimeError(f"{run}: unselected weights moved in {', '.join(moved[:3])}")
        result["unselected_weights_verified"] = compared
        result["selected_neurons"] = mask.neurons
        print(f"train {run}, seed {seed}: {compared:,} unselected weights are the base's, bit by bit")
    target = folder / f"seed-{seed}"
    target.mkdir()
    metadata = {"method": entry.method.name, "base": card.hash, "seed": str(seed), **_by()}
    save_tensors(target / "adapter.safetensors", adapter, metadata)
    training.write_table(target / "train.csv", training.TRAIN_COLUMNS, course.train)
    training.write_table(target / "dev.csv", training.DEV_COLUMNS, course.dev)
    write_json(target / "metrics.json", result)
    return trainer, course, result


def load_trained(ws: Workspace, run: str, seed: int) -> tuple[Any, Any]:
    """A run's model with its adapter, and its tokenizer.

    Raises:
        NeftError: the run isn't trained, or its adapter is of another base model.
    """
    from neft_core.files import load_tensors
    from neft_core.masks import NeuronMask
    from neft_core.methods import METHODS

    params = ws.params()
    entry = params.runs[run]
    card, tokenizer = _base(ws)
    mask = NeuronMask.load(ws.path("masks", f"{run}.safetensors"))
    _check_mask(ws, mask, card, entry)
    path = ws.path("train", run, f"seed-{seed}", "adapter.safetensors")
    tensors, metadata = load_tensors(path, f"run 'neft stage train {run}'")
    if metadata.get("base") != card.hash:
        raise NeftError(f"{path}: trained on another base model; run 'neft stage train {run}'")
    method = METHODS[entry.method.name]
    model = _load(ws, card, params)
    model = method.prepare(model, entry.method.model_dump(), mask, card.model_type)
    method.load(model, tensors)
    method.finish(model)
    return model.to(_device(params)), tokenizer


def baseline(ws: Workspace, task: str) -> None:
    """Generate and score the test split with the base and the tuned model."""
    params = ws.params()
    card, tokenizer = _base(ws)
    metrics = {}
    with replacing(ws.path("baseline", task)) as folder:
        folder.mkdir()
        for name, directory in (("base", None), ("tuned", ws.path("warmup", task))):
            model = _load(ws, card, params, directory).to(_device(params))
            metrics[name] = _evaluate(
                ws, task, model, tokenizer, folder / f"{name}.jsonl", f"baseline {task}, {name}"
            )
        write_json(folder / "metrics.json", metrics)


def evaluate(ws: Workspace, run: str) -> None:
    """Generate and score the test split with every seed of a run."""
    entry = ws.params().runs[run]
    metrics = {}
    with replacing(ws.path("evaluation", run)) as folder:
        folder.mkdir()
        for seed in entry.seeds:
            model, tokenizer = load_trained(ws, run, seed)
            label = f"evaluate {run}, seed {seed}"
            target = folder / f"seed-{seed}.jsonl"
            metrics[str(seed)] = _evaluate(ws, entry.task, model, tokenizer, target, label)
        write_json(folder / "metrics.json", {"seeds": metrics})


def _evaluate(
    ws: Workspace, task: str, model: Any, tokenizer: Any, target: Path, label: str
) -> dict[str, Any]:
    from neft_core import data, evaluation, tasks
    from neft_core.metrics import score_text

    params = ws.params()
    form = params.tasks[task].format
    folder = ws.path("prepared", task)
    rows = data.read_rows(folder / "references.jsonl")
    prompts = tasks.prompts_of(tasks.load_encoded(folder / "test.safetensors"))
    hypotheses = evaluation.generate(
        model,
        tokenizer,
        prompts,
        batch_size=params.evaluation.batch_size,
        max_new_tokens=params.evaluation.max_new_tokens,
        label=label,
    )
    if form.task == "translation":
        hypotheses = [evaluation.first_line(text) for text in hypotheses]
    scores = score_text(hypotheses, [row["references"] for row in rows], form.target_language)
    pairs = zip(rows, hypotheses, strict=True)
    data.write_rows(target, [row | {"hypothesis": text} for row, text in pairs])
    print(f"{label}: BLEU {scores['bleu']:.2f}, chrF {scores['chrf']:.2f}")
    return dict(scores)


STAGES: dict[str, Callable[..., None]] = {
    "corpus": corpus,
    "base": base,
    "prepare": prepare,
    "warmup": warmup,
    "score": score,
    "select": select,
    "train": train,
    "baseline": baseline,
    "evaluate": evaluate,
    "summary": summarise,
}
"""Stage name to function; the functions of single stages take no item."""
