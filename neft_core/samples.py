"""`neft generate`: the base's and a run's answers, one under the other."""

from neft_core import answering, loading, runs
from neft_core.errors import NeftError
from neft_core.rows import Row, asked_and_answered, read_rows
from neft_core.workspace import Workspace


def show(ws: Workspace, run: str, seed: int | None, prompt: str | None, count: int) -> None:
    """Print source, base and fine-tuned text, for a prompt or for test sentences.

    Raises:
        NeftError: the run or seed is unknown or not trained yet, the run was changed since, or the
            prompt is no question of its task.
    """
    params = ws.params()
    chosen = runs.chosen_seed(params, run, seed)
    runs.check_current(ws, run)
    if count < 1:
        raise NeftError(f"--count {count}: at least 1 sentence")
    task = params.runs[run].task
    kind = params.tasks[task].format.task
    if prompt is not None:
        rows = [_asked(prompt, kind)]
    elif "source" in answering.COLUMNS[kind]:  # as evaluation has them, none that it left out
        rows = read_rows(ws.path("prepared", task, "references.jsonl"))[:count]
    else:
        rows = read_rows(ws.path("corpus", task, "test.jsonl"))[:count]
    tuned, tokenizer = runs.load_trained(ws, run, chosen)
    answers = {
        name: answering.answers(
            params,
            task,
            model,
            tokenizer,
            rows,
            context=loading.base_card(ws)[0].context,
            label=f"generate {name}",
        )
        for name, model in (("base", loading.load_base(ws)), (run, tuned))
    }
    width = max(len("reference"), len(run))
    for number, row in enumerate(rows):
        shown = asked_and_answered(row)
        print(f"\n{'source':{width}}  {shown['source']}")
        if prompt is None:
            print(f"{'reference':{width}}  {shown['references'][0]}")
        for name, texts in answers.items():
            print(f"{name:{width}}  {texts[number]}")


def _asked(prompt: str, kind: str) -> Row:
    """A prompt as a row; where a question has two texts, each has its line."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NeftError("--prompt: not UTF-8; give text in that encoding") from error
    columns = answering.COLUMNS[kind]
    texts = [prompt] if len(columns) == 1 else prompt.splitlines()
    texts = [text for text in texts if text.strip()]
    if len(texts) != len(columns):
        found = f"{len(texts)} line{'s' * (len(texts) != 1)}"
        how = ", each in a line of its own" if len(columns) > 1 else ""
        raise NeftError(f"--prompt: got {found}; {kind} asks for {' and '.join(columns)}{how}")
    return answering.asking(dict(zip(columns, texts, strict=True)))
