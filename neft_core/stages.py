"""The stages of the pipeline: files and params in, files out.

Each is one function of a workspace and an item (a task, or a run). Nothing else in the package
knows about files and params together; what a stage reads and writes stands in dvc.yaml.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neft_core import config, loading, measures, runs, scoring, testing
from neft_core.config import Params
from neft_core.errors import NeftError
from neft_core.files import read_json, replacing, write_json
from neft_core.report import report
from neft_core.summary import summarise
from neft_core.workspace import Workspace


def corpus(ws: Workspace, task: str) -> None:
    """Raw rows to clean splits, without duplicates and without leakage."""
    from neft_core.rows import write_rows
    from neft_core.splits import split_rows

    section = ws.params().tasks[task]
    source = section.source
    stats: dict[str, Any]
    if isinstance(source, config.GeneratedSource):
        splits = _generated(source, section.format.task)
        stats = {name: {"kept": len(rows)} for name, rows in splits.items()}
    else:
        read = _read_local if isinstance(source, config.LocalSource) else _read_hub
        found = {
            name: read(ws, source, part, _form_of(section, name))
            for name, part in source.splits.model_dump().items()
            if part is not None
        }
        splits, stats = split_rows(
            found,
            train=source.train,
            dev=source.dev,
            test=source.test,
            pretrain=source.pretrain,
            skip=source.skip,
            seed=source.seed,
            whole=_drops(section.format),
        )
    with replacing(ws.path("corpus", task)) as folder:
        folder.mkdir()
        for name in SPLITS:
            if name in splits:
                write_rows(folder / f"{name}.jsonl", splits[name])
        write_json(folder / "stats.json", stats)
        if _drops(section.format) and not isinstance(source, config.GeneratedSource):
            # What `prepare` samples once it knows which rows the tokenizer leaves.
            limits = source.model_dump(include={*SPLITS, "skip", "seed"})
            write_json(folder / "limits.json", limits)
    pretrain: list[dict[str, Any]] = []
    if not isinstance(section.format, config.Instruction):
        languages = _languages(section.format)
        pretrain = [row | {"languages": languages} for row in splits.get("pretrain", [])]
    write_rows(ws.path("pretrain", f"{task}.jsonl"), pretrain)
    for name, counts in stats.items():
        print(f"corpus {task}: {name}: {_counted(counts)}")


def _counted(counts: Mapping[str, int]) -> str:
    """Counts in words, such as `46 kept, 0 too long`."""
    return ", ".join(
        f"longest {n:,}" if key == "longest" else f"{n:,} {key.replace('_', ' ')}"
        for key, n in counts.items()
    )


SPLITS = ("train", "dev", "test")
"""Of a task that is only tested on, the last alone."""


def _languages(form: config.Translation | config.Summarisation | config.Nli) -> list[str]:
    """Names of the languages of a task's texts, for pre-training."""
    if isinstance(form, config.Nli):
        return [form.language, form.language]
    return [form.source_language, form.target_language]


def _drops(form: Any) -> bool:
    """Whether rows are left out for their length in tokens, so that limits count later."""
    return isinstance(form, config.Summarisation) and form.long_inputs == "drop"


def _form_of(section: config.Task, part: str) -> str:
    """The form of the rows of a part: plain texts pre-train a model for nli."""
    kind = section.format.task
    return "text" if part == "pretrain" and kind == "nli" else kind


def _generated(source: config.GeneratedSource, kind: str) -> dict[str, list[dict[str, Any]]]:
    from neft_core import corpus

    options: dict[str, Any] = source.model_dump(include={"pretrain", *SPLITS, "seed"})
    if kind == "translation":
        options["constructions"] = tuple(source.constructions or corpus.HELD_OUT)
    splits = corpus.GENERATORS[kind](*source.languages, **options)
    return {name: rows for name, rows in splits.items() if rows}


def _read_local(ws: Workspace, source: Any, part: str, form: str) -> list[dict[str, Any]]:
    from neft_core import data

    place = ws.input(source.path)
    if place.is_file() and part != (source.splits.train or source.splits.test):
        raise NeftError(f"{place}: is one file; for a split '{part}' give source.path a folder")
    file = place if place.is_file() else place / part
    if not file.is_file():
        # Templates come with one.
        see = " (README.md tells of the data)" if (ws.root / "README.md").is_file() else ""
        raise NeftError(
            f"{file}: not found; put it there{see}, or give another folder: "
            "neft run --set tasks.TASK.source.path=DIR"
        )
    return data.read_local(file, **_as_read(source, form))


def _as_read(source: Any, form: str) -> dict[str, Any]:
    """What columns hold the rows of a form; plain texts have their own."""
    columns = None if form == "text" else source.columns or None
    return {"columns": columns, "task": form, "labels": source.labels}


def _read_hub(ws: Workspace, source: Any, part: str, form: str) -> list[dict[str, Any]]:
    from neft_core import data

    local = ws.input(source.id)
    return data.read_hub(
        str(local) if local.is_dir() else source.id,
        revision=source.revision,
        config=source.config,
        split=part,
        **_as_read(source, form),
    )


def base(ws: Workspace) -> None:
    """Resolve, check and hash the base model, or build and pre-train the small one."""
    from neft_core import hub, models

    params = ws.params()
    choice = params.model
    with replacing(ws.path("base")) as folder:
        folder.mkdir()
        revision, trust = "", False
        if isinstance(choice, config.BuiltModel):
            _pretrain(ws, params, choice, folder)
            directory, location = folder, "work/base"
        elif isinstance(choice, config.HubModel):
            directory = hub.fetch(choice.id, choice.revision)
            # The cache's snapshot directories bear the commit as name.
            location, revision, trust = choice.id, directory.name, choice.trust_remote_code
        else:
            directory, location = ws.input(choice.path), choice.path
            trust = choice.trust_remote_code
        model_type, parameters, context, digest = models.inspect(directory, trust_remote_code=trust)
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
    from neft_core import pretraining

    how = choice.pretraining
    pretraining.build(
        pretraining.all_texts(ws, params),
        folder,
        vocabulary=choice.vocabulary,
        sizes=choice.model_dump(include={"hidden", "intermediate", "layers", "heads", "context"}),
        resume=ws.state("checkpoints", "base"),
        **how.model_dump(),
        **loading.placement(params),
    )


def prepare(ws: Workspace, task: str) -> None:
    """Rows to token sequences in the base's tokenizer."""
    from neft_core import encoding
    from neft_core.rows import LABELS, asked_and_answered, read_rows, write_rows

    params = ws.params()
    form = params.tasks[task].format
    found, tokenizer = loading.base_card(ws)
    if found.context and form.max_tokens > found.context:
        raise NeftError(
            f"params.yaml: tasks.{task}.format.max_tokens: got {form.max_tokens}; "
            f"at most {found.context}, the model's longest sequence"
        )
    limits = ws.path("corpus", task) / "limits.json"
    stats = {}
    with replacing(ws.path("prepared", task)) as folder:
        folder.mkdir()
        for name in SPLITS if params.tasks[task].trains else SPLITS[-1:]:
            where = f"task {task}: {name}"
            read = read_rows(ws.path("corpus", task, f"{name}.jsonl"))
            rows, counts = _limited(read, form, tokenizer, where)
            if limits.is_file():
                rows, counts["over_limit"] = _sampled(rows, read_json(limits), name, where)
            arrays, stats[name] = encoding.encode_split(
                rows,
                loading.form(params, task),
                tokenizer,
                max_tokens=form.max_tokens,
                where=where,
                keep_long=name == "test",
            )
            stats[name] |= counts
            encoding.save_encoded(folder / f"{name}.safetensors", arrays, {})
        write_rows(folder / "references.jsonl", map(asked_and_answered, rows))
        if isinstance(form, config.Nli):
            # Every test row three times, once with each answer, whose likelihoods are compared.
            answered = [row | {"label": label} for row in rows for label in LABELS]
            arrays, _ = encoding.encode_split(
                answered,
                loading.form(params, task),
                tokenizer,
                max_tokens=form.max_tokens,
                where=f"task {task}: test",
                keep_long=True,
            )
            encoding.save_encoded(folder / "labels.safetensors", arrays, {})
        write_json(folder / "stats.json", stats)
    for name, counts in stats.items():
        print(f"prepare {task}: {name}: {_counted(counts)}")


def _limited(
    rows: list[dict[str, Any]], form: Any, tokenizer: Any, where: str
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows with their inputs held to a summarisation's limit, and how many were not."""
    from neft_core import encoding

    if not isinstance(form, config.Summarisation):
        return rows, {}
    drop = form.long_inputs == "drop"
    return encoding.limit_sources(
        rows, tokenizer, max_tokens=form.max_input, drop=drop, where=where
    )


def _sampled(
    rows: list[dict[str, Any]], limits: Mapping[str, Any], name: str, where: str
) -> tuple[list[dict[str, Any]], int]:
    """As many rows of a split as its source asks for, and how many that leaves out."""
    from neft_core.splits import sample

    skip = limits["skip"] if name == "train" else 0
    kept = sample(rows, limits[name], limits["seed"], skip)
    if not kept:
        raise NeftError(
            f"{where}: source.skip {skip} leaves none of {len(rows)} rows with at most max_input "
            "tokens; skip fewer"
        )
    return kept, len(rows) - len(kept)


STAGES: dict[str, Callable[..., None]] = {
    "corpus": corpus,
    "base": base,
    "prepare": prepare,
    "warmup": runs.warmup,
    "score": scoring.score,
    "warmups": runs.warmup,
    "similarity": scoring.score,
    "scores": scoring.scores,
    "activations": scoring.activations,
    "assign": scoring.assign,
    "select": scoring.select,
    "train": runs.train,
    "baseline": testing.baseline,
    "evaluate": testing.evaluate,
    "transfer": testing.transfer,
    "utilisation": measures.utilisation,
    "forgetting": measures.forgetting,
    "speed": measures.speed,
    "summary": summarise,
    "report": report,
}
"""Stage name to function; the functions of single stages take no item."""
