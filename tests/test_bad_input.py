"""What a user can get wrong ends in one clear line and exit status 2."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import edit, tiny_llama
from safetensors.torch import load_file, save_file

from neft_core import models
from neft_core.workspace import hold

TRAIN = "data/pairs/train.jsonl"


def one_line(outcome: tuple[int, list[str]], ws) -> str:
    code, lines = outcome
    assert len(lines) == 1, lines
    assert code == 2
    assert lines[0].startswith("neft: ")
    root = ws if isinstance(ws, Path) else ws.root
    return lines[0].removeprefix("neft: ").replace(f"{root}/", "")


def use_local_model(ws, folder: Path | None = None) -> Path:
    """Make the built base a local model in the workspace, free to be spoilt."""
    place = ws.root / "own"
    shutil.copytree(folder or ws.path("base"), place)
    (place / "base.json").unlink(missing_ok=True)
    text = ws.params_file.read_text()
    rest = text[text.index("tasks:") :].replace(
        "      splits: {train: train.jsonl, pretrain: pretrain.jsonl}",
        "      splits: {train: train.jsonl}",
    )
    ws.params_file.write_text(f"model: {{kind: local, path: own}}\n{rest}")
    return place


# Data


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, f"{TRAIN}: not found; put it there, or give another folder: "
         "neft run --set tasks.TASK.source.path=DIR"),
        (b"", f"{TRAIN}: the file is empty; at least one row is needed"),
        (b"\n\n", f"{TRAIN}: no rows; at least one is needed"),
        (b'{"source": "a", "target": "b"}\n{"source": "a"}\n',
         f"{TRAIN}:2: no column 'target'; there are 'source'"),
        (b'{"source": "a", "target": ""}\n', f"{TRAIN}:1: 'target' is empty; text is needed"),
        (b'{"source": "a", "target": null}\n',
         f"{TRAIN}:1: 'target' is missing; text is needed"),
        (b'{"source": "a", "target": "b"}\n{"source": "\xff", "target": "b"}\n',
         f"{TRAIN}:2: invalid UTF-8 (byte 0xff at position 13 of the line); save the file as "
         "UTF-8"),
        (b'{"source": "a", "target": "b"}\n{"source": "a", "target"}\n',
         f"{TRAIN}:2: invalid JSON (Expecting ':' delimiter at column 25); one object in each "
         "line is expected"),
    ],
    ids=["missing", "empty", "blank", "no target", "empty target", "null", "UTF-8", "JSON"],
)  # fmt: skip
def test_data(copied, neft, content, line):
    file = copied.root / TRAIN
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    before = {path: path.read_bytes() for path in copied.path("corpus").rglob("*.jsonl")}
    assert one_line(neft(copied, "stage", "corpus", "en-fr"), copied) == line
    assert before == {path: path.read_bytes() for path in copied.path("corpus").rglob("*.jsonl")}


def test_no_folder_of_data_in_a_template(copied, neft):
    shutil.rmtree(copied.root / "data" / "pairs")
    (copied.root / "README.md").touch()
    assert one_line(neft(copied, "stage", "corpus", "en-fr"), copied) == (
        f"{TRAIN}: not found; put it there (README.md tells of the data), or give another "
        "folder: neft run --set tasks.TASK.source.path=DIR"
    )


def test_a_column_that_is_not_there(copied, neft):
    edit(copied, ("      dev: 6", "      columns: {source: source, target: targt}\n      dev: 6"))
    assert one_line(neft(copied, "stage", "corpus", "en-fr"), copied) == (
        f"{TRAIN}:1: no column 'targt'; there are 'source', 'target' (nearest: 'target')"
    )


def test_no_rows_left(copied, neft):
    rows = [json.dumps({"source": f"a {n % 3}", "target": "b"}) for n in range(9)]
    (copied.root / TRAIN).write_text("\n".join(rows) + "\n")
    line = one_line(neft(copied, "stage", "corpus", "en-fr"), copied)
    assert "3" in line
    assert ";" in line


def test_rows_that_are_all_too_long(copied, neft):
    edit(copied, ("max_tokens: 160", "max_tokens: 20"))
    line = one_line(neft(copied, "stage", "prepare", "en-fr"), copied)
    assert line == (
        "task en-fr: train: none of 46 rows fits into max_tokens 20 (longest: 45); raise "
        "max_tokens or give shorter rows"
    )


def test_sequences_longer_than_the_model(copied, neft):
    use_local_model(copied)
    assert neft(copied, "stage", "base")[0] == 0
    edit(copied, ("max_tokens: 160", "max_tokens: 161"))
    assert one_line(neft(copied, "stage", "prepare", "en-fr"), copied) == (
        "params.yaml: tasks.en-fr.format.max_tokens: got 161; at most 160, the model's longest "
        "sequence"
    )
    edit(copied, ("max_new_tokens: 6", "max_new_tokens: 150"))
    line = one_line(neft(copied, "stage", "baseline", "en-fr"), copied)
    assert line.startswith("params.yaml: evaluation.max_new_tokens: got 150; at most 1")


def test_a_second_task_without_pre_training_rows_is_no_fault(copied, neft):
    text = copied.params_file.read_text()
    task = text[text.index("  en-fr:") : text.index("compute:")]
    other = task.replace("en-fr:", "other:").replace(", pretrain: pretrain.jsonl", "")
    copied.params_file.write_text(text.replace("compute:", f"{other}compute:"))
    assert neft(copied, "stage", "corpus", "other") == (0, [])
    assert neft(copied, "stage", "base") == (0, [])


# Models


def test_a_model_directory(copied, neft):
    place = use_local_model(copied)
    whole = (place / "model.safetensors").read_bytes()
    config = (place / "config.json").read_text()

    def said() -> str:
        return one_line(neft(copied, "stage", "base"), copied)

    bad = load_file(place / "model.safetensors")
    bad["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(bad, place / "model.safetensors", metadata={"format": "pt"})
    assert "up_proj.weight holds a value that is not finite; get a sound copy" in said()
    (place / "model.safetensors").write_bytes(whole[:-1])
    assert said().startswith("own/model.safetensors: not a whole safetensors file (")
    (place / "model.safetensors").unlink()
    assert said().startswith("own: no weights; *.safetensors are needed")
    torch.save({}, place / "pytorch_model.bin")
    assert said().startswith("own: only pickled weights (pytorch_model.bin); *.safetensors")
    (place / "model.safetensors").write_bytes(whole)
    (place / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert said() == "own: not a causal language model (BertModel); choose one that is"
    (place / "config.json").unlink()
    assert said().startswith("own/config.json: no such file; give a model in the Hub's layout")
    (place / "config.json").write_text(config)
    for path in place.glob("token*"):
        path.unlink()
    assert said().startswith("own: no usable tokenizer (")
    shutil.rmtree(place)
    assert said() == "own: no such directory; set model.path to a model's directory"


def swap_base(ws, neft, **changes) -> None:
    """Another base than the one that scores, masks and adapters were made with."""
    folder = ws.root / "another"
    folder.mkdir()
    vocabulary = json.loads((ws.path("base") / "config.json").read_text())["vocab_size"]
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": 160} | changes
    models.save_checkpoint(tiny_llama(seed=9, **sizes), folder)
    for path in ws.path("base").glob("token*"):
        shutil.copy(path, folder)
    use_local_model(ws, folder)
    assert neft(ws, "stage", "base") == (0, [])


@pytest.mark.parametrize("changes", [{}, {"intermediate_size": 32}], ids=["weights", "sizes"])
def test_masks_scores_and_adapters_of_another_model(copied, neft, changes):
    made_for = models.Base.load(copied.path("base")).hash
    swap_base(copied, neft, **changes)
    here = models.Base.load(copied.path("base")).hash
    assert one_line(neft(copied, "stage", "train", "neft"), copied) == (
        f"work/masks/neft.safetensors: made for base {made_for[:12]}..., this model is "
        f"{here[:12]}...; run 'neft stage select'"
    )
    for command, file in (
        (("stage", "evaluate", "neft"), "neft/seed-1/adapter_model.safetensors"),
        (("stage", "evaluate", "full"), "full/seed-1/adapter.safetensors"),
        (("generate", "--run", "full"), "full/seed-1/adapter.safetensors"),
    ):
        assert one_line(neft(copied, *command), copied) == (
            f"work/train/{file}: trained on another base model; train the run again"
        )
    assert one_line(neft(copied, "stage", "score", "en-fr"), copied) == (
        "work/warmup/en-fr: made from another base model; run 'neft run'"
    )


def test_a_base_that_lacks_a_weight(copied, neft):
    place = copied.path("base") / "model.safetensors"
    tensors = load_file(place)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, place, metadata={"format": "pt"})
    for stage in (("warmup", "en-fr"), ("train", "lora"), ("baseline", "en-fr")):
        line = one_line(neft(copied, "stage", *stage), copied)
        assert "its weights lack model.layers.1.self_attn.q_proj.weight" in line


# Budgets and params


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ("percent: 0", "runs.neft.method.percent: got 0; more than 0"),
        ("neurons: 0", "runs.neft.method.neurons: got 0; at least 1"),
        ("share: 0.0", "runs.neft.method.share: got 0.0; more than 0"),
        ("percent: 17", "runs.neft.method.percent: got 17; at most 16.9 with layout 'mlp'"),
        ("neurons: 97", "runs.neft.method.neurons: got 97; at most 96 with layout 'mlp'"),
        ("percent: 0.01", "runs.neft.method.percent: got 0.01, no neuron; at least 0.176 for one"),
    ],
)
def test_a_budget_of_nothing_or_of_more_than_there_is(copied, neft, budget, line):
    edit(copied, ("percent: 9", budget))
    outcome = neft(copied, "stage", "select", "neft")
    assert one_line(outcome, copied) == f"params.yaml: {line}"


def test_no_steps_of_warm_up(copied, neft):
    edit(copied, ("steps: 6", "steps: 0"))
    outcome = neft(copied, "stage", "warmup", "en-fr")
    assert one_line(outcome, copied) == "params.yaml: warmup.steps: got 0; at least 1"


def test_several_faults_of_params(copied, neft):
    edit(copied, ("steps: 6", "steps: 0"), ("rank: 2", "rnak: 2"))
    for command in (("stage", "base"), ("run",), ("run", "--dry-run"), ("generate", "--run", "a")):
        assert neft(copied, *command) == (
            2,
            [
                "neft: params.yaml: warmup.steps: got 0; at least 1",
                "neft: params.yaml: runs.lora.method.rank: missing; it is required",
                "neft: params.yaml: runs.lora.method.rnak: unknown key; did you mean 'rank'?",
            ],
        )


def test_yaml_that_is_broken(copied, neft):
    copied.params_file.write_text("a: 1\nb: [\n")
    assert one_line(neft(copied, "stage", "base"), copied) == (
        "params.yaml: line 3: did not find expected node content; mend the YAML"
    )


@pytest.mark.parametrize("method", ["in_out", "embed"])
def test_half_a_precision_without_autocast(copied, neft, method):
    edit(
        copied,
        ("dtype: auto, mixed_precision: auto", "dtype: bfloat16, mixed_precision: 'no'"),
        ("{name: lora, rank: 2}", f"{{name: {method}}}"),
    )
    assert one_line(neft(copied, "stage", "train", "lora"), copied) == (
        "params.yaml: compute.mixed_precision: got 'no' with dtype bfloat16 and method "
        f"{method} of run lora; set dtype: float32, or mixed_precision: auto"
    )


@pytest.mark.usefixtures("own_precision")
@pytest.mark.parametrize("method", ["{name: in_out}", "{name: embed}", "{name: lora, rank: 2}"])
def test_half_a_precision_trains_and_generates(copied, neft, method):
    edit(copied, ("dtype: auto", "dtype: bfloat16"), ("{name: lora, rank: 2}", method))
    for stage in ("select", "train", "evaluate"):
        assert neft(copied, "stage", stage, "lora") == (0, [])


def test_fp16_on_a_cpu(copied, neft):
    edit(copied, ("mixed_precision: auto", "mixed_precision: fp16"))
    assert one_line(neft(copied, "stage", "train", "full"), copied) == (
        "params.yaml: compute.mixed_precision: got fp16; on a CPU no or bf16"
    )


def test_no_gpu(copied, neft):
    if torch.cuda.is_available():
        return
    edit(copied, ("device: cpu", "device: cuda"))
    assert one_line(neft(copied, "stage", "train", "full"), copied) == (
        "params.yaml: compute.device: got cuda; this machine has no usable GPU"
    )


# Training


@pytest.mark.parametrize("stage", [("warmup", "en-fr"), ("train", "full"), ("base",)])
def test_a_loss_that_is_not_finite(copied, neft, monkeypatch, stage):
    from neft_core import training

    whole = training.loss_sum

    def spoilt(model, batch):
        loss, tokens = whole(model, batch)
        spoilt.calls += 1
        return (loss * float("nan") if spoilt.calls > 2 else loss), tokens

    spoilt.calls = 0
    monkeypatch.setattr(training, "loss_sum", spoilt)
    line = one_line(neft(copied, "stage", *stage), copied)
    assert "loss is nan at step 3; lower the learning rate (" in line
    assert not list(copied.path().rglob(".*.[0-9]*"))


# The command line and its surroundings


def test_stages_and_items_that_do_not_exist(copied, neft):
    assert one_line(neft(copied, "stage", "trian", "full"), copied) == (
        "stage 'trian': unknown; one of corpus, base, prepare, warmup, score, warmups, similarity, "
        "scores, activations, assign, select, train, baseline, evaluate, transfer, utilisation, "
        "forgetting, speed, summary, report"
    )
    assert one_line(neft(copied, "stage", "train", "fulll"), copied) == (
        "stage train: got item 'fulll'; it takes one of full, lora, neft"
    )
    assert one_line(neft(copied, "stage", "train"), copied) == (
        "stage train: got no item; it takes one of full, lora, neft"
    )
    assert one_line(neft(copied, "stage", "base", "full"), copied) == (
        "stage base: got item 'full'; it takes none"
    )
    assert one_line(neft(copied, "generate", "--run", "ful"), copied) == (
        "run 'ful': unknown; params.yaml has full, lora, neft"
    )
    assert one_line(neft(copied, "generate", "--run", "neft", "--seed", "7"), copied) == (
        "run neft: has no seed 7; it has [1, 2]"
    )
    assert one_line(neft(copied, "generate", "--run", "neft", "--count", "0"), copied) == (
        "--count 0: at least 1 sentence"
    )


@pytest.mark.parametrize("command", [("stage", "base"), ("run",), ("run", "--dry-run"), ("track",),
                                     ("generate", "--run", "a")])  # fmt: skip
def test_no_workspace(tmp_path, neft, command):
    assert one_line(neft(tmp_path, *command), tmp_path) == (
        f"{tmp_path}: no workspace here (dvc.yaml and params.yaml); run 'neft init DIR' to make one"
    )


def test_a_stage_that_another_process_is_at(copied, neft):
    with hold(copied.state("locks", "train-full"), "stage train-full"):
        assert one_line(neft(copied, "stage", "train", "full"), copied) == (
            f"stage train-full: process {os.getpid()} is at work on it; wait for it, or stop it "
            "first"
        )
        assert neft(copied, "stage", "select", "full") == (0, [])


def test_results_that_are_missing_or_damaged(copied, neft):
    for path, stage in (
        ("base/base.json", ("prepare", "en-fr")),
        ("corpus/en-fr/dev.jsonl", ("prepare", "en-fr")),
        ("prepared/en-fr/train.safetensors", ("train", "full")),
        ("masks/neft.safetensors", ("train", "neft")),
        ("warmup/en-fr/model.safetensors", ("score", "en-fr")),
        ("warmup/en-fr/provenance.json", ("score", "en-fr")),
        ("scores/en-fr.safetensors", ("select", "neft")),
        ("train/lora/seed-1/adapter_model.safetensors", ("evaluate", "lora")),
        ("evaluation/full/metrics.json", ("summary",)),
        ("evaluation/full/seed-1.jsonl", ("summary",)),
        ("cost/full.json", ("summary",)),
    ):
        file = copied.path(*path.split("/"))
        whole = file.read_bytes()
        for content in (whole[: len(whole) // 2], whole[:-1] if whole[-1:] != b"\n" else b"", None):
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)
            line = one_line(neft(copied, "stage", *stage), copied)
            assert path.split("/")[-1] in line or "work/warmup" in line
            assert "; " in line
        file.write_bytes(whole)


# A disk that is full

STAGES = [
    ("corpus", "en-fr"), ("base",), ("prepare", "en-fr"), ("warmup", "en-fr"), ("score", "en-fr"),
    ("select", "neft"), ("train", "full"), ("train", "neft"), ("baseline", "en-fr"),
    ("evaluate", "full"), ("summary",),
]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES, ids=" ".join)
@pytest.mark.parametrize("limit", [100, 3000, 30_000])
def test_files_that_may_not_grow(copied, neft, monkeypatch, stage, limit):
    """As on a disk that is full, and at every place where a stage writes a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        outcome = neft(copied, "stage", *stage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if outcome != (0, []):
        line = one_line(outcome, copied)
        assert "can't be written (File too large); free space or check the path" in line
    else:
        assert limit > 100, "every stage writes more than that"
    assert not list(copied.path().rglob(".*.[0-9]*"))


NAMESPACES = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("mounted", ["tmpfs"] if NAMESPACES.returncode == 0 else [])
def test_a_small_disk(finished, tmp_path, mounted):
    """A tmpfs in a namespace of its own holds the workspace, with little room beside it."""
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, Path(__file__).with_name("full_disk.py"),
         finished.root, tmp_path],
        input="\n".join(map(" ".join, STAGES)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
