"""Workspaces whose stages write a run's files in the pipeline's form, without computing anything.

`python fabricated.py NAME [ITEM]` is such a stage; variables, or the same names in a file
`fake.json` of the workspace, make it slow or fail.
"""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]

PARAMS = """\
model: {kind: built, path: data/none, vocabulary: 300, hidden: 8, intermediate: 8, layers: 1,
        heads: 1, context: 128, pretraining: {epochs: 1, batch_size: 2, lr: 1e-3}}
tasks:
  en-fr:
    source: {kind: generated, path: data/none, languages: [en, fr], pretrain: 5, train: 5, dev: 5,
             test: 5}
    format: {task: translation, source_language: English, target_language: French, max_tokens: 64}
compute: {device: cpu}
scoring: {layout: mlp}
warmup: {steps: 5, lr: 1e-3, batch_size: 2}
training: {lr: 1e-3, batch_size: 2, epochs: 1}
runs:
  full: {task: en-fr, method: {name: full}}
  neft: {task: en-fr, method: {name: neft, share: 0.5}, seeds: [1, 2], lr: 3e-3}
evaluation: {batch_size: 2, max_new_tokens: 8}
"""


def make(root: Path) -> None:
    """Write dvc.yaml, params.yaml and the stages; the caller makes it a DVC repository."""
    (root / "data").mkdir(parents=True)
    (root / "data/none").touch()
    (root / "params.yaml").write_text(PARAMS)
    text = (PROJECT / "neft_core/pipeline.yaml").read_text()
    (root / "dvc.yaml").write_text(
        re.sub(r"neft stage", f"{sys.executable} {Path(__file__).resolve()}", text)
    )


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _tensors(path: Path, lengths: dict[str, int]) -> None:
    header: dict[str, object] = {"__metadata__": {"kind": "mask"}}
    end = 0
    for name, n in lengths.items():
        header[name] = {"dtype": "I64", "shape": [n], "data_offsets": [end, end + 8 * n]}
        end += 8 * n
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def _told(name: str, otherwise: str) -> str:
    file = Path("fake.json")
    own = json.loads(file.read_text()) if file.exists() else {}
    return str(own.get(name, os.environ.get(name, otherwise)))


def train(work: Path, run: str) -> None:
    """Two seeds with a row each step, live ones as they come."""
    steps, delay = int(_told("FAKE_STEPS", "4")), float(_told("FAKE_DELAY", "0"))
    cost = {}
    for seed in (1, 2) if run == "neft" else (1,):
        live = Path(f".neft/live/train/{run}/seed-{seed}")
        shutil.rmtree(live, ignore_errors=True)
        out = work / "train" / run / f"seed-{seed}"
        history = {"dev": "step,epoch,loss\n0,0.0,3.5\n", "train": "step,epoch,loss,lr,grad_norm\n"}
        _put(live / "dev.csv", history["dev"])
        for step in range(1, steps + 1):
            norm = "nan" if step == 2 else "0.5"
            history["train"] += f"{step},{step / steps},{2 / step},{1e-3 * step},{norm}\n"
            _put(live / "train.csv", history["train"])
            time.sleep(delay)
        history["dev"] += f"{steps},1.0,2.5\n"
        for name, text in history.items():
            _put(out / f"{name}.csv", text)
            _put(live / f"{name}.csv", text)
        numbers = {"trainable_parameters": 10, "best_dev_loss": 2.5, "best_step": steps}
        _put(out / "metrics.json", json.dumps({**numbers, "adapter_sha256": "abc"}))
        peft = run == "neft"
        _tensors(out / f"adapter{'_model' if peft else ''}.safetensors", {"w": 4})
        if peft:
            _put(out / "adapter_config.json", "{}")
        cost[str(seed)] = {
            "seconds": 1.5,
            "tokens_per_second": 100,
            "peak_bytes": 5,
            "system": [{"time": 1000 * n, "cpu_utilization_percentage": n} for n in (10, 13)],
        }
    _put(work / f"cost/{run}.json", json.dumps({"seeds": cost}))


def _answers(who: str) -> str:
    return "".join(
        json.dumps(row | {"source": f"s{n}", "references": [f"r{n}", "x"]}) + "\n"
        for n in range(150)
        for row in [{"target": f"r{n}", "hypothesis": f"{who} {n}"}]
    )


def stage(name: str, item: str) -> None:
    """Write one stage's outputs."""
    work = Path("work")
    print(f"{name} {item}".strip() + ": works", flush=True)
    with Path("ran.log").open("a") as log:
        log.write(f"{name} {item}\n")
    if _told("FAKE_FAIL", "") == f"{name} {item}":
        print("data/x.jsonl: line 7: no target; add one", file=sys.stderr)
        sys.exit(2)
    if name == "corpus":
        for split in ("train", "dev", "test"):
            _put(work / f"corpus/{item}/{split}.jsonl", f'{{"source": "{split}"}}\n' * 3)
        _put(work / f"pretrain/{item}.jsonl", "{}\n")
    elif name == "base":
        _put(work / "base/model.txt", "base")
    elif name == "warmup":
        _put(work / f"warmup/{item}/model.txt", "tuned")
        _put(work / f"cost/warmup-{item}.json", "{}")
    elif name == "score":
        layout = re.search("layout: .*", Path("params.yaml").read_text())
        _put(work / f"scores/{item}.safetensors", layout[0])
        _put(work / f"scores/{item}.json", "{}")
        _put(work / f"cost/score-{item}.json", "{}")
    elif name == "assign":
        section = re.search(r"(?ms)^runs:\n(.*?)(?:^\S|\Z)", Path("params.yaml").read_text())
        runs = re.findall(r"(?m)^  (\w+):", section[1])
        scores = {path.stem: path.read_text() for path in work.glob("scores/*.safetensors")}
        _put(work / "assigned.json", json.dumps(dict.fromkeys(runs) | {"neft": scores}))
    elif name == "select":
        _tensors(work / f"masks/{item}.safetensors", {"up": 3, "down": 2} if item == "neft" else {})
    elif name == "train":
        train(work, item)
    elif name in ("evaluate", "transfer"):
        run, _, other = item.partition("-")
        place = f"{run}.{other}" if other else run
        scores = {"bleu": 21.5, "bleu_signature": "nrefs:1", "chrf": 40.0, "chrf_signature": "nc:6"}
        found = sorted((work / "train" / run).glob("seed-*"))
        seeds = {path.name[5:]: scores for path in found}
        _put(work / f"evaluation/{place}/metrics.json", json.dumps({"seeds": seeds}))
        for path in found:
            _put(work / f"evaluation/{place}/{path.name}.jsonl", _answers(path.name))
    elif name == "summary":
        _put(work / "summary/summary.md", "| run | BLEU |\n|---|---|\n| neft | 21.5 |\n")
        _put(work / "summary/metrics.json", "{}")
        for csv in ("train", "dev"):
            _put(work / f"summary/{csv}.csv", "step,loss\n1,2.0\n")
    elif name == "report":
        _put(Path("reports/report.html"), "<p>21.5</p>")
        _put(Path("reports/figures/png/bleu.png"), "drawn")
        _put(Path("reports/study/study.md"), "# T\n")
    elif name == "baseline":
        _put(work / f"baseline/{item}/base.jsonl", _answers("base"))
    else:
        assert name == "prepare"
        _put(work / f"prepared/{item}/out.json", "{}")


if __name__ == "__main__":
    stage(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
