"""A workspace with a task of every kind, one that is only tested on, and transfers."""

import json
import random
from pathlib import Path

from conftest import TINY_PARAMS, tiny_pairs

from neft_core.rows import read_rows, write_rows
from neft_core.workspace import Workspace, init_workspace

TASKS = """\
  sum:
    source:
      kind: local
      path: data/sum
      splits: {train: train.jsonl}
      columns: {source: text, target: summary}
      dev: 6
      test: 8
    format:
      task: summarisation
      source_language: English
      target_language: Chinese
      max_input: 24
      max_tokens: 96
  nli-en:
    source: {kind: local, path: data/nli, splits: {train: train.csv, test: test.csv}, dev: 6}
    format: {task: nli, language: English, max_tokens: 160}
  nli-de:
    source: {kind: local, path: data/nli, splits: {test: test.csv}}
    format:
      task: nli
      language: German
      labels: {entailment: entailment, neutral: neutral, contradiction: contradiction}
      max_tokens: 160
  other:
    source: {kind: local, path: data/other, splits: {test: test.jsonl}}
    format:
      task: translation
      source_language: English
      target_language: French
      prompt: "English: {source}\\nFrench:"
      max_tokens: 160
"""
RUNS = """\
runs:
  full: {task: en-fr, method: {name: full}}
  neft: {task: en-fr, method: {name: neft, percent: 9}, seeds: [1, 2]}
  sum-full: {task: sum, method: {name: full}}
  nli-full: {task: nli-en, method: {name: full}}
transfers:
  neft-other: {run: neft, task: other}
  full-other: {run: full, task: other}
  nli-full-de: {run: nli-full, task: nli-de}
"""


def make(folder: Path) -> Workspace:
    head, tail = TINY_PARAMS.split("compute:")
    rest = "compute:" + tail[: tail.index("runs:")] + RUNS + tail[tail.index("evaluation:") :]
    text = (head + TASKS + rest).replace("steps: 6", "steps: 2").replace("epochs: 2", "epochs: 1")
    ws = init_workspace(folder, text)
    write_rows(folder / "data/pairs/train.jsonl", tiny_pairs(60, "the cat dog sees eats a red"))
    write_rows(folder / "data/pairs/pretrain.jsonl", tiny_pairs(40, "one two six ten", seed=1))
    write_rows(folder / "data/other/test.jsonl", tiny_pairs(10, "owl fox bee ant"))
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefgh", k=rng.choice((7, 7, 20)))) for _ in range(100)]
    summaries = [{"text": text, "summary": f"我{i}"} for i, text in enumerate(texts)]
    (folder / "data/sum").mkdir()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in summaries]
    (folder / "data/sum/train.jsonl").write_text("".join(lines), "utf-8")
    (folder / "data/nli").mkdir()
    rows = [f"p {i // 3},h {i},{i % 3}\n" for i in range(60)]
    (folder / "data/nli/train.csv").write_text("premise,hypothesis,label\n" + "".join(rows))
    rows = [f"q {i // 3},k {i},{i % 3}\n" for i in range(9)]
    (folder / "data/nli/test.csv").write_text("premise,hypothesis,label\n" + "".join(rows))
    return ws


def seed_rows(ws, place: str, seed: int = 1):
    return read_rows(ws.path("evaluation", place, f"seed-{seed}.jsonl"))


def references(ws, task: str):
    return read_rows(ws.path("prepared", task, "references.jsonl"))
