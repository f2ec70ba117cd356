"""Tiny models and rows, built in milliseconds."""

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from absl import logging as absl_logging

os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

torch.set_num_threads(1)

# A shell ignores SIGINT in what it starts in the background, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# rouge-score's logger closes its stream when logging is configured anew, as by Prefect and Alembic,
# unless it is the process's own: pytest's would be gone for all tests that follow.
absl_logging.get_absl_handler().python_handler.setStream(sys.__stderr__)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Integration tests of a file share its servers, so a process; those of the flow have none."""
    for item in items:
        if item.get_closest_marker("integration") and item.path.stem != "test_flow":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


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


TINY_PARAMS = """\
model:
  kind: built
  path: data/none
  vocabulary: 300
  hidden: 16
  intermediate: 24
  layers: 2
  heads: 2
  context: 160
  pretraining: {epochs: 1, batch_size: 16, lr: 3e-3, seed: 1}
tasks:
  en-fr:
    source:
      kind: local
      path: data/pairs
      splits: {train: train.jsonl, pretrain: pretrain.jsonl}
      dev: 6
      test: 8
      seed: 1
    format:
      task: translation
      source_language: English
      target_language: French
      prompt: "English: {source}\\nFrench:"
      max_tokens: 160
compute: {device: cpu, dtype: auto, mixed_precision: auto, threads: 1}
warmup: {steps: 6, lr: 1e-3, batch_size: 8, seed: 1}
scoring: {layout: mlp}
training: {lr: 1e-3, batch_size: 8, epochs: 2, evaluate_every: 4, checkpoint_every: 2}
runs:
  full:
    task: en-fr
    method: {name: full}
  lora:
    task: en-fr
    method: {name: lora, rank: 2}
  neft:
    task: en-fr
    method: {name: neft, policy: lowest, percent: 9}
    seeds: [1, 2]
evaluation: {batch_size: 4, max_new_tokens: 6, bootstrap: 100}
tracking: {experiment: tiny}
"""
"""A pipeline over 60 sentence pairs and a model of 9,000 parameters: seconds a stage."""


def tiny_pairs(count: int, words: str, seed: int = 0) -> list[dict[str, str]]:
    """Distinct pairs whose target is the source, word by word, in capitals."""
    rng = np.random.default_rng(seed)
    names = words.split()
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        text = " ".join(rng.choice(names, 4))
        pairs[text] = text.upper()
    return [{"source": source, "target": target} for source, target in pairs.items()]


def tiny_workspace(folder: Path):
    """A workspace of TINY_PARAMS with its data."""
    from neft_core.rows import write_rows
    from neft_core.workspace import init_workspace

    ws = init_workspace(folder, TINY_PARAMS)
    write_rows(
        folder / "data/pairs/train.jsonl", tiny_pairs(60, "the cat dog sees eats a red fish")
    )
    write_rows(folder / "data/pairs/pretrain.jsonl", tiny_pairs(40, "one two six ten", seed=1))
    return ws


def run_stages(ws, *names: str) -> None:
    """Every stage of the pipeline in this process, or those named, in order."""
    from neft_core.commands import ITEMS
    from neft_core.stages import STAGES

    params = ws.params()
    for name in names or STAGES:
        for item in list(getattr(params, ITEMS[name])) if name in ITEMS else [None]:
            STAGES[name](ws, *([item] if item else []))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A tiny workspace after every stage; only to be read."""
    ws = tiny_workspace(tmp_path_factory.mktemp("finished"))
    run_stages(ws)
    return ws


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """A finished workspace with tasks of every kind; not to be changed."""
    from kinds import make

    made = make(tmp_path_factory.mktemp("kinds"))
    run_stages(made)
    return made


@pytest.fixture
def copied(finished, tmp_path):
    """The finished tiny workspace in a directory of its own, free to be changed."""
    from neft_core.workspace import Workspace

    return Workspace(shutil.copytree(finished.root, tmp_path / "copied"))


@pytest.fixture
def neft(monkeypatch, capsys):
    """`neft` in a workspace, in this process: exit status and the lines on stderr."""
    from neft_core import cli

    def run(ws, *argv: str) -> tuple[int, list[str]]:
        monkeypatch.chdir(ws if isinstance(ws, Path) else ws.root)
        capsys.readouterr()
        return cli.main(argv), capsys.readouterr().err.splitlines()

    return run


def edit(ws, *changes: tuple[str, str]) -> None:
    """Replace texts of the workspace's params.yaml."""
    text = ws.params_file.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    ws.params_file.write_text(text)


@pytest.fixture(autouse=True)
def own_store(monkeypatch):
    """MLflow writes the store that was opened last into the environment of all that follows."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        if name in os.environ:
            monkeypatch.setenv(name, os.environ[name])
        else:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)


@pytest.fixture
def own_precision():
    """Accelerate keeps one precision for a process; a stage has a process of its own."""
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield
    forget()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_ways(monkeypatch):
    """Three ways to warm up: each is a simulation of its own."""
    from neft_core import planner

    monkeypatch.setattr(planner, "WARMUPS", tuple(planner.WARMUPS[i] for i in (0, 3, 6)))
