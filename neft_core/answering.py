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
    kind = params.tasks[task].format.task
    with loading.autocast(params):
        if kind == "nli":
            return _chosen(params, task, model, tokenizer, rows, label)
        longest = max_new_tokens or params.evaluation.max_new_tokens
        return _generated(params, task, model, tokenizer, rows, label, context, longest)


def _generated(
    params: config.Params,
    task: str,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    label: str,
    context: int,
    max_new_tokens: int,
) -> list[str]:
    from neft_core import evaluation
    from neft_core.encoding import encode_prompt, limit_sources

    section, how = params.tasks[task].format, loading.form(params, task)
    if isinstance(section, config.Summarisation):
        limit = section.max_input
        rows, _ = limit_sources(rows, tokenizer, max_tokens=limit, drop=False, where="questions")
    texts = evaluation.generate(
        model,
        tokenizer,
        [encode_prompt(row, how, tokenizer) for row in rows],
        batch_size=params.evaluation.batch_size,
        max_new_tokens=max_new_tokens,
        context=context,
        label=label,
    )
    return texts if section.task == "instruction" else list(map(evaluation.first_line, texts))


def _chosen(
    params: config.Params,
    task: str,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    label: str,
) -> list[str]:
    from neft_core import evaluation
    from neft_core.encoding import encode_split

    arrays, _ = encode_split(
        [{**row, "label": choice} for row in rows for choice in LABELS],
        loading.form(params, task),
        tokenizer,
        max_tokens=params.tasks[task].format.max_tokens,
        where="questions",
        keep_long=True,
    )
    found = evaluation.log_likelihoods(
        model,
        arrays,
        pad=tokenizer.pad_token_id,
        batch_size=params.evaluation.batch_size,
        label=label,
    ).reshape(-1, len(LABELS))
    return [LABELS[of_row.argmax()] for of_row in found]
