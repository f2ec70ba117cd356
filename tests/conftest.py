"""Tiny models and rows, built in milliseconds."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

torch.set_num_threads(1)


def tiny_llama(seed: int = 0, **changes):
    """A Llama of two layers and 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def tiny_rows(rows: int, seed: int = 0, longest: int = 12) -> dict[str, np.ndarray]:
    """An encoded split of random rows; the second half of each is trained."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, longest + 1, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(3, 64, offsets[-1]).astype(np.int32)
    trained = np.concatenate([np.arange(n) >= n // 2 for n in lengths]).astype(np.uint8)
    return {"tokens": tokens, "trained": trained, "offsets": offsets}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the checkout; skips where there is none."""
    for folder in Path(__file__).resolve().parents:
        if (folder / "shared" / "data").is_dir():
            return folder / "shared"
    pytest.skip("no folder 'shared' with real data beside the checkout")
