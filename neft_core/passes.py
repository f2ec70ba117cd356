"""What stages need that pass rows through models and train none: answers, and scores of a base."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from neft_core import config, forecast
from neft_core.forecast import Subject
from neft_core.neurons import candidates
from neft_core.planner import SHORT, Planner
from neft_core.tracker import Work

ANSWERS = ("baseline", "evaluate", "transfer")
"""Stages that answer a test split."""


@dataclass(frozen=True)
class Pass:
    """What such a stage needs.

    Attributes:
        key: where params say how many rows it takes at once.
        rows: how many that are, at most.
        tokens: of the longest of them, with its continuation.
        weights: bytes of its models.
        peak: the most that the device holds.
        host: the most that main memory holds.
        batch: work of a batch.
        token: work of one more token of each row, where it generates.
    """

    key: str
    rows: int
    tokens: int
    weights: int
    peak: int
    host: int
    batch: Work
    token: Work | None = None


def ask(
    planner: Planner, stage: str, item: str, rows: int | None = None, memory: float | None = None
) -> Pass:
    """What a stage needs; of answers asked once for equal ones.

    Args:
        planner: of params and machine.
        stage: one of `ANSWERS`, `scores` or `activations`.
        item: the stage's.
        rows: taken at once; None: as params say.
        memory: GB for the sums of gradients; None: as params say.
    """
    if stage in ANSWERS:
        return _answers(planner, stage, item, rows)
    return _scores(planner, stage, item, rows, memory)


def halves(rows: int) -> Iterator[int]:
    """Half as many rows, half of these, and so on to one."""
    while rows > 1:
        rows //= 2
        yield rows


def smaller(planner: Planner, stage: str, item: str, need: Pass) -> Iterator[tuple[str, Pass]]:
    """Changes of params that leave a stage's result as it is, and what it needs then."""
    for rows in halves(need.rows):
        yield f"{need.key}: {rows}", ask(planner, stage, item, rows)
    section = planner.params.scores.get(item) if stage == "scores" else None
    if isinstance(section, config.GradientScores) and section.memory is None:
        layout, subject = planner.params.scoring.candidates, planner.subject
        groups = candidates(subject.shapes, subject.model_type, layout)
        one = max(4 * group.count * group.length for group in groups) / 1e9
        words = f"{{batch_size: 1, memory: {one:.3g}}}"
        yield f"scores.{item}: {words}", ask(planner, stage, item, 1, one)


def bound(subject: Subject, rows: int, tokens: int, kept: int = 0) -> float:
    """Bytes that nothing done with a model comes near, told without a simulation.

    In values of 4 bytes (8 in float64): 8 for each weight, as two models, a gradient, sums and an
    optimiser's states take fewer; for each token 8 for every number that a matrix reads or writes
    (with experts, as often as a token has one), and 4 for every score of attention in every layer.

    Args:
        subject: the model.
        rows: at once.
        tokens: of the longest.
        kept: rows whose hidden states of every layer are kept.
    """
    told = subject.config.get_text_config()
    layers, heads = (
        getattr(told, key, math.inf) for key in ("num_hidden_layers", "num_attention_heads")
    )
    width = sum(sum(shape) for shape in subject.shapes.values() if len(shape) > 1)
    width *= getattr(told, "num_experts_per_tok", 1)
    values = 8 * subject.parameters + (8 * rows * tokens + 2 * kept) * width
    return max(4, subject.dtype.itemsize) * (values + 4 * layers * heads * rows * tokens**2)


def most(planner: Planner, stage: str, item: str) -> float:
    """The bound of a stage's need."""
    params = planner.params
    if stage in ANSWERS:
        task, _ = _answered(params, stage, item)
        _, longest, new = asked(planner, task)
        return bound(planner.subject, params.evaluation.batch_size, longest + new)
    section = params.scores[item] if stage == "scores" else params.activations[item]
    longest = planner.rows(section.task).longest
    return bound(planner.subject, section.batch_size, longest, section.rows)


def asked(planner: Planner, task: str) -> tuple[int | None, int, int]:
    """A task's questions as its test has them: how many, tokens of the longest, and of answers.

    Of `nli` each row comes with each label, the longest is whole, and its answer has the positions
    whose logits are kept. Before `prepare` it is known no better than params tell.
    """
    params = planner.params
    likeliest = isinstance(params.tasks[task].format, config.Nli)
    new = SHORT if likeliest else params.evaluation.max_new_tokens
    folder = planner.data.path("prepared", task) if planner.data else None
    file = folder / f"{'labels' if likeliest else 'test'}.safetensors" if folder else None
    if file is None or not file.is_file():
        known = planner.rows(task)
        return known.test and (3 if likeliest else 1) * known.test, known.longest, new
    import numpy as np

    from neft_core.encoding import load_encoded

    arrays, _ = load_encoded(file)
    prompts, lengths = arrays["prompts"], np.diff(arrays["offsets"])
    if not likeliest:
        return len(prompts), int(prompts.max()), new
    order, size = np.argsort(-lengths, kind="stable"), params.evaluation.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    kept = max(int(lengths[batch].max() - prompts[batch].min()) for batch in batches)
    return len(prompts), int(lengths.max()), kept


def _answered(params: config.Params, stage: str, item: str) -> tuple[str, str]:
    """The task whose test a stage answers, and the run that does; of the base alone none."""
    if stage == "baseline":
        return item, ""
    if stage == "transfer":
        return params.transfers[item].task, params.transfers[item].run
    return params.runs[item].task, item


def _answers(planner: Planner, stage: str, item: str, rows: int | None) -> Pass:
    params = planner.params
    task, run = _answered(params, stage, item)
    training = planner.training("train", run) if run else None
    count, longest, new = asked(planner, task)
    size = rows or params.evaluation.batch_size
    size = min(size, count or size)
    likeliest = isinstance(params.tasks[task].format, config.Nli)
    model = (training.method, training.options) if training else None
    key = repr((model, likeliest, size, longest, new))
    known, subject = planner.answers, planner.subject
    if key not in known and likeliest:
        known[key] = *forecast.likelihood(subject, training, size, longest, min(new, longest)), None
    elif key not in known:
        known[key] = forecast.generation(subject, training, size, longest, new)
    weights, peak, batch, token = known[key]
    tokens = longest if likeliest else longest + new
    return Pass("evaluation.batch_size", size, tokens, weights, peak, weights, batch, token)


def _scores(
    planner: Planner, stage: str, item: str, rows: int | None, memory: float | None
) -> Pass:
    params, subject = planner.params, planner.subject
    section = params.scores[item] if stage == "scores" else params.activations[item]
    layout = params.scoring.candidates
    known = planner.rows(section.task)
    have = known.train if stage == "scores" else known.dev
    every = min(section.rows, have or section.rows)
    size = min(rows or section.batch_size, every)
    after = 0
    if isinstance(section, config.GradientScores):
        room = memory or section.memory or math.inf
        weights, peak, work = forecast.gradients(subject, known.batch(size), layout, 1e9 * room)
    elif stage == "scores":
        weights, peak, work, kept = forecast.states(subject, size, known.longest, layout)
        after = 2 * kept * every // size  # once more when all are put together
    else:
        weights, peak, work = forecast.activations(subject, size, known.longest, layout)
    host = weights + after
    if not planner.gpu:
        peak = host = max(peak, host)
    key = f"{stage}.{item}.batch_size"
    return Pass(key, size, known.longest, weights, peak, host, work)
