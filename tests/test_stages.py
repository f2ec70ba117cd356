"""Stages on other bases and methods than the tiny pipeline's own."""

import csv
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import edit, run_stages
from operating import environment
from safetensors.torch import load_file, save_file
from test_methods import tiny_gpt2

from neft_core import models, plan_report, runs
from neft_core.files import read_json
from neft_core.overrides import preview
from neft_core.planner import Planner
from neft_core.preview import describe
from neft_core.workspace import Workspace

METHODS = {
    "full": "{name: full}",
    "in_out": "{name: in_out}",
    "embed": "{name: embed}",
    "lora": "{name: lora, rank: 2}",
    "neft": "{name: neft, share: 0.4}",
}


@pytest.fixture(scope="module")
def gpt2(finished, tmp_path_factory):
    """A finished workspace whose base is a tiny GPT-2, with a run of every method."""
    ws = Workspace(shutil.copytree(finished.root, tmp_path_factory.mktemp("gpt2") / "w"))
    (ws.root / "gpt2").mkdir()
    tokenizer = json.loads((ws.path("base") / "config.json").read_text())["vocab_size"]
    model = tiny_gpt2()
    model.resize_token_embeddings(tokenizer)
    model.config.bos_token_id, model.config.eos_token_id = 1, 2
    models.save_checkpoint(model, ws.root / "gpt2")
    for path in ws.path("base").glob("token*"):
        shutil.copy(path, ws.root / "gpt2")
    text = ws.params_file.read_text()
    text = "model: {kind: local, path: gpt2}\n" + text[text.index("tasks:") :]
    entries = "".join(f"  {n}: {{task: en-fr, method: {m}}}\n" for n, m in METHODS.items())
    text = text[: text.index("runs:")] + f"runs:\n{entries}" + text[text.index("evaluation:") :]
    ws.params_file.write_text(text.replace("max_tokens: 160", "max_tokens: 64"))
    run_stages(ws, "base", "prepare", "warmup", "score", "assign", "select", "train", "evaluate")
    return ws


@pytest.mark.parametrize("name", METHODS)
def test_gpt2_goes_through_every_stage(gpt2, name):
    metrics = json.loads(gpt2.path("train", name, "seed-1", "metrics.json").read_text())
    base = load_file(gpt2.root / "gpt2" / "model.safetensors")
    total = sum(tensor.numel() for tensor in base.values())
    assert metrics["trainable_percent"] == pytest.approx(
        100 * metrics["trainable_parameters"] / total
    )
    expected = {"full": total, "embed": base["transformer.wte.weight"].numel(),
                "in_out": 2 * 2 * 16 * 24, "neft": int(2 * 2 * 24 * 0.4) * 16}  # fmt: skip
    if name in expected:
        assert metrics["trainable_parameters"] == expected[name]
    with gpt2.path("train", name, "seed-1", "dev.csv").open(newline="") as handle:
        losses = [float(row["loss"]) for row in csv.DictReader(handle)]
    assert metrics["best_dev_loss"] == min(losses)
    assert losses[-1] < losses[0], "it learns"


def test_gpt2_unselected_weights_are_the_bases_bits(gpt2):
    base = load_file(gpt2.root / "gpt2" / "model.safetensors")
    metrics = json.loads(gpt2.path("train", "neft", "seed-1", "metrics.json").read_text())
    assert metrics["unselected_weights_verified"] == (
        sum(tensor.numel() for tensor in base.values()) - metrics["trainable_parameters"]
    )
    model, _ = runs.load_trained(gpt2, "neft", 1)
    moved = sum(
        int((tensor != base[name]).sum())
        for name, tensor in model.merge_and_unload().named_parameters()
    )
    assert 0.9 * metrics["trainable_parameters"] < moved <= metrics["trainable_parameters"]


def test_scored_weights_stay_fp32_under_the_bases_own_names(gpt2, tmp_path):
    """GPT-2's files on the Hub name no `transformer.`, and a bf16 tuned model would lose digits."""
    ws = Workspace(shutil.copytree(gpt2.root, tmp_path / "w"))
    place = ws.root / "gpt2" / "model.safetensors"
    renamed = {n.removeprefix("transformer."): t for n, t in load_file(place).items()}
    save_file(renamed, place, metadata={"format": "pt"})
    runs_of = ("  in_out: {task: en-fr, method: {name: in_out}}\n",
               "  embed: {task: en-fr, method: {name: embed}}\n")  # fmt: skip
    edit(ws, ("dtype: auto, mixed_precision: auto", "dtype: bfloat16, mixed_precision: 'no'"),
         *((entry, "") for entry in runs_of))  # fmt: skip
    run_stages(ws, "base", "warmup", "score", "select")
    tuned = load_file(ws.path("warmup", "en-fr", "model.safetensors"))
    kinds = {name: tensor.dtype for name, tensor in tuned.items()}
    fp32 = {name for name, kind in kinds.items() if kind == torch.float32}
    assert fp32 == {
        f"transformer.h.{n}.{part}.weight"
        for n in (0, 1)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("run", ["full", "lora", "neft"])
def test_a_trained_run_has_the_dev_loss_that_it_had(finished, run):
    """What is loaded is the best checkpoint: its loss on dev is that of the training's record."""
    from neft_core.encoding import load_encoded
    from neft_core.steps import split_loss

    dev, _ = load_encoded(finished.path("prepared", "en-fr", "dev.safetensors"))
    model, tokenizer = runs.load_trained(finished, run, 1)
    metrics = json.loads(finished.path("train", run, "seed-1", "metrics.json").read_text())
    total, tokens = split_loss(model, dev, 16, tokenizer.pad_token_id, "cpu")
    assert total / tokens == metrics["best_dev_loss"]


def test_base_and_run_side_by_side(finished, neft, capsys):
    from neft_core.samples import show

    show(finished, "neft", None, None, 2)
    out = capsys.readouterr().out
    for word in ("source", "reference", "base", "neft"):
        assert sum(line.startswith(f"{word} ") for line in out.splitlines()) == 2
    show(finished, "full", None, "the cat sees a dog", 5)
    out = capsys.readouterr().out
    assert "source     the cat sees a dog\n" in out
    assert "reference" not in out


def test_without_a_warmup_runs_select_from_other_scores(copied, capsys):
    text = copied.params_file.read_text()
    entries = """\
runs:
  full: {task: en-fr, method: {name: full}}
  gradient: {task: en-fr, method: {name: neft, policy: gradient, percent: 9, scores: first}}
  any: {task: en-fr, method: {name: neft, policy: random, percent: 9, scores: first}}
scores: {first: {criterion: gradient, task: en-fr, rows: 8}}
"""
    text = text[: text.index("runs:")] + entries + text[text.index("evaluation:") :]
    copied.params_file.write_text(text)
    edit(copied, ("warmup: {steps: 6, lr: 1e-3, batch_size: 8, seed: 1}", "warmup: null"))
    steps = "warmup score scores assign select train baseline evaluate summary report"
    run_stages(copied, *steps.split())
    assert "warmup en-fr: none; warmup is null" in capsys.readouterr().out
    assert [p.name for p in copied.path("warmup", "en-fr").iterdir()] == ["provenance.json"]
    assert set(read_json(copied.path("baseline", "en-fr", "metrics.json"))) == {"base"}
    with copied.path("summary", "summary.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["base", "full", "gradient", "any"]
    assert rows["gradient"]["parameters"] == rows["any"]["parameters"] != "0"
    plan = plan_report.text(plan_report.report(Planner(copied.params(), copied.root, copied), None))
    assert "warmup" not in plan
    assert "\nwarm-up" not in plan
    assert "warm-up: none; layout mlp" in describe(preview(copied.params_file, [])).splitlines()


def test_a_dry_run_says_what_would_run(copied, neft, capsys):
    from neft_core.graph import Graph

    edit(copied, ("seeds: [1, 2]", "seeds: [1, 2]\n    lr: 2e-3"))
    lines = describe(preview(copied.params_file, [])).splitlines()
    assert lines[0] == "model: built, 2 layers, hidden 16, intermediate 24, vocabulary 300"
    assert "task en-fr: translation from data/pairs, all training rows" in lines
    assert "run neft: neft, lowest 9 % on en-fr, lr 0.002, 2 epochs, seeds 1, 2" in lines
    stages = [line for line in lines if line.startswith("  ")]
    assert f"params are valid; {len(stages)} stages" in lines
    assert "  corpus@en-fr: made for the first time" in stages
    named = {line.split(": ")[0].strip() for line in stages}
    assert named == {stage.name for stage in Graph(copied).stages}, "as DVC expands them"
    other = Path(shutil.copy(copied.params_file, copied.root / "other.yaml"))
    assert "  corpus@en-fr" in describe(preview(other, [])).splitlines(), "of no workspace yet"


def test_what_trains_is_told_apart_by_its_seed(finished):
    one, two = (
        load_file(finished.path("train", "neft", f"seed-{n}", "adapter_model.safetensors"))
        for n in (1, 2)
    )
    assert one.keys() == two.keys()
    assert not all(torch.equal(one[name], two[name]) for name in one)


OWN_CODE = """\
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).write_text("imported")


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""

TRUSTED = """\
import sys
import weakref
from pathlib import Path
from neft_core import loading, models, stages
from neft_core.errors import NeftError
from neft_core.workspace import Workspace
ws = Workspace(Path.cwd())
for work in (
    lambda: models.read_config(Path("own")),
    lambda: models.load_model(Path("own"), "auto"),
    lambda: stages.base(ws),
):
    try:
        work()
        print("went")
    except NeftError as fault:
        print("refused", "custom code" in str(fault) or "trust_remote_code: true" in str(fault))
    print("marker", Path("marker").exists(), flush=True)
if Path("work/base").exists():
    print(type(loading.load_base(ws)).__name__, Path("marker").exists())
"""


def test_a_models_own_code_runs_only_where_asked_for_and_is_told(finished, tmp_path):
    """Of a directory as the Hub has it, whose code leaves a file behind when it is imported."""
    own = Path(shutil.copytree(finished.path("base"), tmp_path / "own"))
    config = json.loads((own / "config.json").read_text())
    classes = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    mapped = {auto: f"modeling_own.{name}" for auto, name in classes.items()}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": mapped}
    (own / "config.json").write_text(json.dumps(config))
    (own / "modeling_own.py").write_text(OWN_CODE.format(marker=str(tmp_path / "marker")))
    text = finished.params_file.read_text()
    (tmp_path / "dvc.yaml").write_bytes((finished.root / "dvc.yaml").read_bytes())

    def run(trust: str) -> list[str]:
        model = f"model: {{kind: local, path: own, trust_remote_code: {trust}}}\n"
        (tmp_path / "params.yaml").write_text(model + text[text.index("tasks:") :])
        env = environment(tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1")
        line = [sys.executable, "-c", TRUSTED]
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert run("false") == ["refused True", "marker False"] * 3
    said = run("true")
    assert said[:4] == ["refused True", "marker False"] * 2, "what isn't asked for in the call"
    cautions = [line for line in said if line.startswith("CAUTION: Python code that comes with ")]
    assert [line.rpartition(" ")[0] for line in cautions] == [
        f"CAUTION: Python code that comes with the model in {tmp_path}/own may run "
        "(model.trust_remote_code:"
    ]
    assert said.index(cautions[0]) == 4, "before anything ran"
    assert said[-1] == "OwnForCausalLM True"


def test_stages_replace_files_and_never_write_into_them(copied, tmp_path):
    """DVC may link what it keeps in its cache to what a stage made; a stage by hand comes again."""
    folders = [copied.path(), copied.root / "reports"]
    kept = [
        (path, Path(shutil.copy2(path, tmp_path / f"kept-{n}")), tmp_path / f"linked-{n}")
        for n, path in enumerate(p for f in folders for p in f.rglob("*") if p.is_file())
    ]
    for path, _, link in kept:
        os.link(path, link)
    edit(copied, ("seed: 1", "seed: 2"), ("steps: 6", "steps: 5"), ("lr: 1e-3", "lr: 2e-3"))
    run_stages(copied)
    assert sum(path.read_bytes() != before.read_bytes() for path, before, _ in kept) > len(kept) / 3
    for path, before, link in kept:
        assert link.read_bytes() == before.read_bytes(), path


def test_an_evaluation_holds_one_model_at_a_time(copied, monkeypatch):
    from neft_core import testing

    loaded: list[weakref.ref] = []

    def watched(load):
        def run(*given):
            gc.collect()
            assert [model() for model in loaded] == [None] * len(loaded)
            found = load(*given)
            loaded.append(weakref.ref(found[0] if isinstance(found, tuple) else found))
            return found

        return run

    for name in ("load_trained", "load_as_base"):
        monkeypatch.setattr(testing, name, watched(getattr(testing, name)))
    testing.evaluate(copied, "neft")
    testing.baseline(copied, "en-fr")
    assert len(loaded) == 4
