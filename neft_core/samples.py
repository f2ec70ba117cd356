"""`neft generate`: the base's and a run's answers, one under the other."""

from neft_core import config, data, evaluation, stages, tasks
from neft_core.errors import NeftError
from neft_core.workspace import Workspace


def show(ws: Workspace, run: str, seed: int | None, prompt: str | None, count: int) -> None:
    """Print source, base and fine-tuned text, for a prompt or for test sentences.

    Raises:
        NeftError: the run or seed is unknown or not trained yet.
    """
    params = ws.params()
    if run not in params.runs:
        raise NeftError(f"run '{run}': unknown; params.yaml has {', '.join(params.runs)}")
    entry = params.runs[run]
    chosen = entry.seeds[0] if seed is None else seed
    if chosen not in entry.seeds:
        raise NeftError(f"run {run}: has no seed {chosen}; it has {entry.seeds}")
    form = params.tasks[entry.task].format
    translation = isinstance(form, config.Translation)
    tuned, tokenizer = stages.load_trained(ws, run, chosen)
    if prompt is not None:
        row = (
            {"source": prompt, "target": ""}
            if translation
            else {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]}
        )
        rows = [row]
    else:
        rows = data.read_rows(ws.path("corpus", entry.task, "test.jsonl"))[:count]
    prompts = [
        tasks.encode_prompt(row, **stages.form_arguments(form), tokenizer=tokenizer) for row in rows
    ]
    answers = {}
    for name, model in (("base", stages.load_base(ws)), (run, tuned)):
        texts = evaluation.generate(
            model,
            tokenizer,
            prompts,
            batch_size=params.evaluation.batch_size,
            max_new_tokens=params.evaluation.max_new_tokens,
            label=f"generate {name}",
        )
        answers[name] = [evaluation.first_line(text) for text in texts] if translation else texts
    references = tasks.references(rows, form.task)
    width = max(len("reference"), len(run))
    for number, (row, reference) in enumerate(zip(rows, references, strict=True)):
        print()
        source = row.get("source") or tasks.last_question(row)
        print(f"{'source':{width}}  {source}")
        if prompt is None:
            print(f"{'reference':{width}}  {reference['references'][0]}")
        for name, texts in answers.items():
            print(f"{name:{width}}  {texts[number]}")
