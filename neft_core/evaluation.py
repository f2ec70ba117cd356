"""Answers of a model for a split: batched greedy generation, or the likeliest of given answers.

Shapes: B = rows of a batch, L = their longest, K = positions whose logits are kept, V = vocabulary.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from neft_core import ranks
from neft_core.encoding import Arrays
from neft_core.errors import NeftError
from neft_core.progress import Progress
from neft_core.steps import collate


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    context: int,
    label: str,
) -> list[str]:
    """Continue prompts greedily.

    Prompts of similar length share a batch, padded on the left; the order of the result is that
    of the prompts. A continuation ends at the end-of-sequence token. Several processes share the
    batches, and each has all the texts afterwards.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt, without padding.
        batch_size: prompts generated at once.
        max_new_tokens: longest continuation, in tokens.
        context: longest sequence of the model, in tokens; 0 where it is not known.
        label: for progress.

    Returns:
        The continuations as text, without special tokens, stripped.

    Raises:
        NeftError: the longest prompt leaves no room for the longest continuation.
    """
    longest = max(map(len, prompts), default=0)
    if context and longest + max_new_tokens > context:
        raise NeftError(
            f"params.yaml: evaluation.max_new_tokens: got {max_new_tokens}; at most "
            f"{context - longest}, as the longest prompt has {longest} tokens and the model "
            f"takes {context}"
        )
    model.eval()
    # The model's own generation_config may penalise or forbid tokens; this is plain greedy.
    model.generation_config = type(model.generation_config)()

    def said(chosen: Sequence[int]) -> list[str]:
        return _continue(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens)

    return _shared([len(prompt) for prompt in prompts], batch_size, said, label)


def _shared(
    lengths: Sequence[int],
    batch_size: int,
    answer: Callable[[Sequence[int]], Sequence[Any]],
    label: str,
) -> list[Any]:
    """Answers for every row, in batches of rows of similar length that all processes share."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found: dict[int, Any] = {}
    with Progress(label, len(lengths), "sentence") as progress:
        for first in range(0, len(batches), ranks.world()):
            # Each process takes a whole batch: another padding could change a text.
            dealt = batches[first : first + ranks.world()]
            if ranks.rank() < len(dealt):
                chosen = dealt[ranks.rank()]
                found |= zip(chosen, answer(chosen), strict=True)
            progress.advance(sum(map(len, dealt)))
    for others in ranks.gather(found):
        found |= others
    return [found[i] for i in range(len(lengths))]


@torch.no_grad()
def log_likelihoods(
    model: Any, arrays: Arrays, *, pad: int, batch_size: int, label: str
) -> npt.NDArray[np.float64]:
    """How likely each row's trained tokens are after its prompt.

    The sum over the tokens of the answer and of the one that ends it: the logarithm of the
    probability that the model gives just this answer. Nothing is divided by the number of tokens.
    That would favour long answers whose later tokens follow from the first; and since the end
    counts, an answer that begins another has no advantage.

    Args:
        model: a causal language model, on its device.
        arrays: rows as `encode_split` returns them.
        pad: the token that fills up short rows.
        batch_size: rows at once.
        label: for progress.

    Returns:
        Natural logarithms, float64, one for each row.
    """
    model.eval()
    device = next(model.parameters()).device
    lengths = np.diff(arrays["offsets"])

    def answer(chosen: Sequence[int]) -> list[float]:
        batch = collate(arrays, np.array(chosen), pad)
        # Logits of prompts aren't needed, and of a large vocabulary they are most of the memory.
        first = int(min(arrays["prompts"][row] for row in chosen)) - 1
        targets = batch["labels"][:, first + 1 :].to(device)  # [B, K]
        kept = torch.arange(first, batch["labels"].shape[1] - 1, device=device)
        logits = model(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            logits_to_keep=kept,
        ).logits  # [B, K, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none"
        )
        return [-float(of_row) for of_row in losses.double().sum(1)]

    return np.array(_shared(lengths.tolist(), batch_size, answer, label), np.float64)


def _continue(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Continue one batch of prompts."""
    batch = _left_padded(prompts, tokenizer.pad_token_id, next(model.parameters()).device)
    output = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    said = output[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Any]:
    """Prompts as one batch."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": attention.to(device)}


@torch.no_grad()
def tokens_per_second(
    models: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    pad: int,
    new_tokens: int,
    repeats: int,
) -> dict[str, list[float]]:
    """Speed of greedy generation, of models in turns, so that a busy machine slows all alike.

    Args:
        models: by name, all on their devices.
        prompts: token ids, in one batch.
        pad: the padding token.
        new_tokens: how many each prompt gets; nothing ends it earlier.
        repeats: measurements of each, after one that isn't counted.

    Returns:
        New tokens of all prompts in a second, for each model and measurement.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            model.eval()
            model.generation_config = type(model.generation_config)()
            device = next(model.parameters()).device
            batch = _left_padded(prompts, pad, device)
            _finish(device)
            began = time.perf_counter()
            model.generate(
                **batch,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
                eos_token_id=None,
            )
            _finish(device)
            if turn:
                seconds = time.perf_counter() - began
                found[name].append(round(len(prompts) * new_tokens / seconds, 1))
    return found


def _finish(device: torch.device) -> None:
    """Wait for what a GPU still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_line(text: str) -> str:
    """A translation or summary is one line: what a model that doesn't stop adds isn't scored."""
    return text.split("\n", 1)[0].strip()
