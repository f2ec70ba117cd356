"""The small built model: a Llama and its tokenizer, pre-trained on a parallel corpus.

A base model that knows something, so that fine-tuning has something to add to: each pair is a
text in both directions, all of its tokens trained.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neft_core import __version__, config, models, tasks, training
from neft_core.config import Params
from neft_core.rows import read_rows
from neft_core.steps import Recipe, digest, fingerprint, steps_in_epoch
from neft_core.workspace import Workspace


def encode_texts(texts: Sequence[str], tokenizer: Any, longest: int) -> dict[str, np.ndarray]:
    """Texts between beginning and end token, each cut to the longest sequence.

    Returns:
        An encoded split (see `steps.Arrays`) with every token trained.
    """
    rows = [
        [t for t in (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id) if t is not None][
            :longest
        ]
        for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ]
    tokens = np.concatenate([np.array(row, np.int32) for row in rows])
    return {
        "tokens": tokens,
        "trained": np.ones(len(tokens), np.uint8),
        "offsets": np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
    }


def all_texts(ws: Workspace, params: Params) -> list[str]:
    """All texts on which a built base learns, of the tasks that have some."""
    found: list[str] = []
    for name, task in params.tasks.items():
        if task.format.task != "instruction" and config.has_pretraining(task.source):
            for row in read_rows(ws.path("pretrain", f"{name}.jsonl")):
                found += tasks.pretraining_texts(row, tuple(row["languages"]))
    return found


def build(
    texts: Sequence[str],
    folder: Path,
    *,
    vocabulary: int,
    sizes: dict[str, int],
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    resume: Path,
    mixed_precision: str,
    cpu: bool,
) -> None:
    """Learn a tokenizer, pre-train a Llama on the texts, and write both in the Hub's layout.

    Args:
        texts: what it learns.
        folder: an existing directory for the checkpoint.
        vocabulary: tokens of the tokenizer.
        sizes: `hidden`, `intermediate`, `layers`, `heads`, `context`.
        epochs: passes over the texts.
        batch_size: texts in a step.
        lr: peak learning rate; warmed up over 5 % of the steps, then linear decay.
        seed: of the initial weights and the order of texts.
        resume: where an interrupted pre-training goes on from.
        mixed_precision: as Accelerate has it.
        cpu: stay on the CPU.
    """
    tokenizer = models.build_tokenizer(texts, vocabulary, sizes["context"])
    arrays = encode_texts(texts, tokenizer, sizes["context"])
    model: Any = models.build_llama(vocabulary=len(tokenizer), seed=seed, **sizes)
    steps = epochs * steps_in_epoch(len(texts), batch_size, 1)
    recipe = Recipe(
        lr=lr,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        lr_warmup=max(1, steps // 20),
        checkpoint_every=500,
    )
    inputs = (sizes, vars(recipe), digest(arrays), mixed_precision, cpu, __version__)
    trainer = training.Trainer(
        model,
        dict(model.named_parameters()),
        recipe,
        arrays,
        None,
        pad=tokenizer.pad_token_id,
        folder=resume / fingerprint(*inputs),
        label="base",
        mixed_precision=mixed_precision,
        cpu=cpu,
    )
    trainer.run()
    models.save_checkpoint(trainer.release().cpu(), folder)
    tokenizer.save_pretrained(str(folder))
    shutil.rmtree(resume, ignore_errors=True)
