"""Hypotheses of a model for a split, by batched greedy generation."""

from collections.abc import Sequence
from typing import Any

import torch

from neft_core import ranks
from neft_core.errors import NeftError
from neft_core.progress import Progress


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
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    texts: dict[int, str] = {}
    with Progress(label, len(prompts), "sentence") as progress:
        for first in range(0, len(batches), ranks.world()):
            # Each process takes a whole batch: another padding could change a text.
            dealt = batches[first : first + ranks.world()]
            if ranks.rank() < len(dealt):
                chosen = dealt[ranks.rank()]
                said = _continue(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens)
                texts |= zip(chosen, said, strict=True)
            progress.advance(sum(map(len, dealt)))
    for others in ranks.gather(texts):
        texts |= others
    return [texts[i] for i in range(len(prompts))]


def _continue(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Continue one batch of prompts."""
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=attention.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def first_line(text: str) -> str:
    """A translation is one line: what a model that doesn't stop adds below it isn't scored."""
    return text.split("\n", 1)[0].strip()
