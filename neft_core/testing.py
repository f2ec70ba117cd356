"""Stages that answer and score a test split: base and tuned model, runs, runs on other tasks."""

from pathlib import Path
from typing import Any

from neft_core import answering, config, ranks
from neft_core.files import replacing, write_json
from neft_core.loading import base_card, device, load_as_base
from neft_core.runs import load_trained
from neft_core.workspace import Workspace


def baseline(ws: Workspace, task: str) -> None:
    """Answer and score the test split with the base and, where there is one, the tuned model."""
    params = ws.params()
    card, tokenizer = base_card(ws)
    models: dict[str, Path | None] = {"base": None}
    if params.warms(task):
        models["tuned"] = ws.path("warmup", task)
    metrics = {}
    with replacing(ws.path("baseline", task)) as folder:
        folder.mkdir()
        for name, directory in models.items():
            model = load_as_base(ws, card, params, directory).to(device(params))
            metrics[name] = _evaluate(
                ws, task, model, tokenizer, folder / f"{name}.jsonl", f"baseline {task}, {name}"
            )
            del model  # before the next comes
        write_json(folder / "metrics.json", metrics)


def evaluate(ws: Workspace, run: str) -> None:
    """Answer and score the test split with every seed of a run."""
    _every_seed(ws, run, ws.params().runs[run].task, ws.path("evaluation", run), f"evaluate {run}")


def transfer(ws: Workspace, name: str) -> None:
    """Answer and score the test split of another task with every seed of a run."""
    entry = ws.params().transfers[name]
    target = ws.path("evaluation", f"{entry.run}.{entry.task}")
    _every_seed(ws, entry.run, entry.task, target, f"transfer {entry.run} to {entry.task}")


def _every_seed(ws: Workspace, run: str, task: str, target: Path, label: str) -> None:
    metrics = {}
    with replacing(target) as folder:
        folder.mkdir()
        for seed in ws.params().runs[run].seeds:
            model, tokenizer = load_trained(ws, run, seed)
            metrics[str(seed)] = _evaluate(
                ws,
                task,
                model,
                tokenizer,
                folder / f"seed-{seed}.jsonl",
                f"{label}, seed {seed}",
            )
            del model  # before the next comes
        write_json(folder / "metrics.json", {"seeds": metrics})


def _evaluate(
    ws: Workspace, task: str, model: Any, tokenizer: Any, target: Path, label: str
) -> dict[str, Any]:
    from neft_core.metrics import OF_TASK, TITLES, score_text
    from neft_core.rows import read_rows, write_rows

    section = ws.params().tasks[task].format
    rows = read_rows(ws.path("prepared", task, "references.jsonl"))
    answer = _chosen if isinstance(section, config.Nli) else _generated
    answers = answer(ws, task, model, tokenizer, label)
    if not ranks.main():
        return {}
    rows = [row | found for row, found in zip(rows, answers, strict=True)]
    scores = score_text(
        [row["hypothesis"] for row in rows],
        [row["references"] for row in rows],
        section.target_language,
        section.task,
    )
    write_rows(target, rows)
    found = (
        f"{TITLES[name]} {scores[name]:.2f}" for name in TITLES if name in OF_TASK[section.task]
    )
    print(f"{label}: {', '.join(found)}")
    return dict(scores)


def _generated(
    ws: Workspace, task: str, model: Any, tokenizer: Any, label: str
) -> list[dict[str, Any]]:
    """What the model says to each prompt."""
    from neft_core.encoding import load_encoded

    arrays, _ = load_encoded(ws.path("prepared", task, "test.safetensors"))
    starts = zip(arrays["offsets"], arrays["prompts"], strict=False)
    prompts = [arrays["tokens"][start : start + length].tolist() for start, length in starts]
    context = base_card(ws)[0].context
    texts = answering.generated(
        ws.params(), task, model, tokenizer, prompts, context=context, label=label
    )
    return [{"hypothesis": text} for text in texts]


def _chosen(
    ws: Workspace, task: str, model: Any, tokenizer: Any, label: str
) -> list[dict[str, Any]]:
    """The label that the model finds likeliest for each row; of equal ones the first."""
    from neft_core.encoding import load_encoded
    from neft_core.rows import LABELS

    arrays, _ = load_encoded(ws.path("prepared", task, "labels.safetensors"))
    found = answering.likelihoods(ws.params(), model, tokenizer, arrays, label)
    return [
        {
            "hypothesis": LABELS[of_row.argmax()],
            "log_likelihoods": dict(zip(LABELS, of_row.round(6).tolist(), strict=True)),
        }
        for of_row in found
    ]
