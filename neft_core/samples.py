"""`neft generate`: the base's and a run's answers, one under the other."""

from typing import Any

from neft_core import config, evaluation, loading, runs
from neft_core.encoding import encode_prompt
from neft_core.errors import NeftError
from neft_core.rows import asked_and_answered, read_rows
from neft_core.workspace import Workspace


def show(ws: Workspace, run: str, seed: int | None, prompt: str | None, count: int) -> None:
    """Print source, base and fine-tuned text, for a prompt or for test sentences.

    Raises:
        NeftError: the run or seed is unknown or not trained yet.
    """
    params = ws.params()
    chosen = runs.chosen_seed(params, run, seed)
    if count < 1:
        raise NeftError(f"--count {count}: at least 1 sentence")
    entry = params.runs[run]
    form = params.tasks[entry.task].format
    translation = isinstance(form, config.Translation)
    tuned, tokenizer = runs.load_trained(ws, run, chosen)
    if prompt is not None:
        row: dict[str, Any] = (
            {"source": prompt, "target": ""}
            if translation
            else {
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": ""},
                ]
            }
        )
        rows = [row]
    else:
        rows = read_rows(ws.path("corpus", entry.task, "test.jsonl"))[:count]
    how = loading.form(params, entry.task)
    prompts = [encode_prompt(row, how, tokenizer) for row in rows]
    answers = {}
    for name, model in (("base", loading.load_base(ws)), (run, tuned)):
        with loading.autocast(params):
            texts = evaluation.generate(
                model,
                tokenizer,
                prompts,
                batch_size=params.evaluation.batch_size,
                max_new_tokens=params.evaluation.max_new_tokens,
                context=loading.base_card(ws)[0].context,
                label=f"generate {name}",
            )
        answers[name] = [evaluation.first_line(text) for text in texts] if translation else texts
    width = max(len("reference"), len(run))
    for number, row in enumerate(rows):
        shown = asked_and_answered(row)
        print(f"\n{'source':{width}}  {shown['source']}")
        if prompt is None:
            print(f"{'reference':{width}}  {shown['references'][0]}")
        for name, texts in answers.items():
            print(f"{name:{width}}  {texts[number]}")
