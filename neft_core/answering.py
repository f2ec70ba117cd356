"""A model's answers to questions of any kind of task, as its evaluation has them."""

from collections.abc import Mapping, Sequence
from typing import Any

from neft_core import config, loading
from neft_core.rows import LABELS, Row

COLUMNS = {
    "translation": ("source",),
    "summarisation": ("source",),
    "instruction": ("prompt",),
    "nli": ("premise", "hypothesis"),
}
"""What a question of each kind of task consists of."""


def asking(question: Mapping[str, str]) -> Row:
    """A question, by `COLUMNS`, as a row without an answer."""
    if "source" in question:
        return {"source": question["source"], "target": ""}
    if "premise" in question:
        return {**question, "label": ""}
    return {
        "messages": [
            {"role": "user", "content": question["prompt"]},
            {"role": "assistant", "content": ""},
        ]
    }


def answers(
    params: config.Params,
    task: str,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    context: int,
    label: str,
    max_new_tokens: int | None = None,
) -> list[str]:
    """One text for each row: of nli the likeliest label, of a translation or summary one line.

    Args:
        params: of the workspace in which the model was trained.
        task: whose form the questions have.
        model: on its device.
        tokenizer: its tokenizer.
        rows: test rows of the task, or what `asking` makes; long inputs are cut.
        context: longest sequence of the model, in tokens; 0 where it is not known.
        label: for progress.
        max_new_tokens: longest answer, in tokens; None: as in evaluation.
    """
    from neft_core.encoding import encode_prompt, encode_split, limit_sources

    section, how = params.tasks[task].format, loading.form(params, task)
    if isinstance(section, config.Nli):
        arrays, _ = encode_split(
            [{**row, "label": choice} for row in rows for choice in LABELS],
            how,
            tokenizer,
            max_tokens=section.max_tokens,
            where="questions",
            keep_long=True,
        )
        found = likelihoods(params, model, tokenizer, arrays, label)
        return [LABELS[of_row.argmax()] for of_row in found]
    if isinstance(section, config.Summarisation):
        limit = section.max_input
        rows, _ = limit_sources(rows, tokenizer, max_tokens=limit, drop=False, where="questions")
    prompts = [encode_prompt(row, how, tokenizer) for row in rows]
    return generated(
        params,
        task,
        model,
        tokenizer,
        prompts,
        context=context,
        label=label,
        max_new_tokens=max_new_tokens,
    )


def generated(
    params: config.Params,
    task: str,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    context: int,
    label: str,
    max_new_tokens: int | None = None,
) -> list[str]:
    """What the model says to each prompt, but for an instruction its first line.

    Args:
        params: see `answers`, as the others.
        task: whose answers they are.
        model: on its device.
        tokenizer: its tokenizer.
        prompts: token ids.
        context: longest sequence of the model.
        label: for progress.
        max_new_tokens: longest answer.
    """
    from neft_core import evaluation

    with loading.autocast(params):
        texts = evaluation.generate(
            model,
            tokenizer,
            prompts,
            batch_size=params.evaluation.batch_size,
            max_new_tokens=max_new_tokens or params.evaluation.max_new_tokens,
            context=context,
            label=label,
        )
    whole = params.tasks[task].format.task == "instruction"
    return texts if whole else [evaluation.first_line(text) for text in texts]


def likelihoods(
    params: config.Params, model: Any, tokenizer: Any, arrays: dict[str, Any], label: str
) -> Any:
    """Of every row and label in nats, [rows, labels].

    Args:
        params: see `answers`, as the others.
        model: on its device.
        tokenizer: its tokenizer.
        arrays: each row once with each of `LABELS`, as `encode_split` makes them.
        label: for progress.
    """
    from neft_core import evaluation

    with loading.autocast(params):
        found = evaluation.log_likelihoods(
            model,
            arrays,
            pad=tokenizer.pad_token_id,
            batch_size=params.evaluation.batch_size,
            label=label,
        )
    return found.reshape(-1, len(LABELS))
