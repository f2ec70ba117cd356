"""Summarisation, nli, a task that is only tested on, and transfers, through every stage."""

import csv
import json
import shutil

import pytest
import torch
from conftest import edit, run_stages
from kinds import TASKS, make, references, seed_rows

from neft_core import answering, loading, samples
from neft_core.encoding import load_encoded
from neft_core.errors import NeftError
from neft_core.masks import NeuronScores
from neft_core.metrics import paired_bootstrap
from neft_core.rows import LABELS, read_rows
from neft_core.stages import STAGES
from neft_core.workspace import Workspace


@pytest.fixture
def ws(kinds):
    return kinds


def test_long_inputs_are_cut_and_the_rows_stay(ws):
    stats = json.loads(ws.path("prepared", "sum", "stats.json").read_text())
    assert stats["train"]["truncated"] > 0
    assert not ws.path("corpus", "sum", "limits.json").exists(), "limits count at once"
    assert stats["train"]["kept"] == stats["train"]["rows"] == 100 - 6 - 8
    whole = {row["source"] for row in read_rows(ws.path("corpus", "sum", "test.jsonl"))}
    shown = [row["source"] for row in read_rows(ws.path("prepared", "sum", "references.jsonl"))]
    assert len(shown) == 8
    assert all(any(one.startswith(text) for one in whole) for text in shown)
    assert not set(shown) <= whole


def test_the_label_is_the_likeliest_answer(ws):
    arrays, _ = load_encoded(ws.path("prepared", "nli-en", "labels.safetensors"))
    rows = seed_rows(ws, "nli-full")
    assert len(arrays["offsets"]) - 1 == 3 * len(rows) == 27
    for row in rows:
        found = row["log_likelihoods"]
        assert row["hypothesis"] == max(LABELS, key=found.__getitem__)
        assert set(found) == set(LABELS)
        assert all(value < 0 for value in found.values())
    metrics = json.loads(ws.path("evaluation", "nli-full", "metrics.json").read_text())["seeds"][
        "1"
    ]
    right = sum(row["hypothesis"] == row["target"] for row in rows)
    assert metrics["accuracy"] == pytest.approx(100 * right / 9)
    assert metrics["accuracy_signature"] == "nrefs:1|choice:log-likelihood|length:sum"


def test_a_run_answers_in_its_own_words_in_another_language(ws):
    """Both test files are the same here: with other words the likelihoods would be others."""
    own, moved = seed_rows(ws, "nli-full"), seed_rows(ws, "nli-full.nli-de")
    assert [row["log_likelihoods"] for row in moved] == [row["log_likelihoods"] for row in own]


@pytest.mark.parametrize(("run", "task"), [("sum-full", "sum"), ("nli-full", "nli-en")])
def test_texts_side_by_side_are_those_of_the_evaluation(ws, capsys, run, task):
    samples.show(ws, run, None, None, 9)
    lines = [line.partition(" ") for line in capsys.readouterr().out.splitlines()]
    base = read_rows(ws.path("baseline", task, "base.jsonl"))
    for name, rows, key in (
        ("source", base, "source"), ("base", base, "hypothesis"),
        (run, seed_rows(ws, run), "hypothesis"),
    ):  # fmt: skip
        shown = [text.strip() for first, _, text in lines if first == name]
        assert shown == [row[key].split("\n")[0] for row in rows], name


def test_a_prompt_of_a_summary_is_cut_as_a_row_is(ws, capsys):
    whole = {row["source"] for row in read_rows(ws.path("corpus", "sum", "test.jsonl"))}
    cut = [row for row in seed_rows(ws, "sum-full") if row["source"] not in whole]
    assert cut
    for row in cut:
        (text,) = (one for one in whole if one.startswith(row["source"]))
        text = " ".join([text] * 20)  # more than the model takes
        samples.show(ws, "sum-full", None, text, 1)
        printed = capsys.readouterr().out
        assert f"source     {text}\n" in printed
        assert "reference" not in printed
        assert printed.splitlines()[-1].removeprefix("sum-full").strip() == row["hypothesis"]


def test_a_prompt_of_nli_is_answered_by_a_label(ws, capsys):
    for row in seed_rows(ws, "nli-full"):
        samples.show(ws, "nli-full", None, row["source"], 1)
        printed = capsys.readouterr().out
        assert printed.splitlines()[-1].split() == ["nli-full", row["hypothesis"]]


@pytest.mark.parametrize(
    ("run", "prompt", "line"),
    [
        ("nli-full", "p 1 h 3",
         "got 1 line; nli asks for premise and hypothesis, each in a line of its own"),
        ("nli-full", "p\nh\nx",
         "got 3 lines; nli asks for premise and hypothesis, each in a line of its own"),
        ("sum-full", "\udcff caf", "not UTF-8; give text in that encoding"),
        ("sum-full", " ", "got 0 lines; summarisation asks for source"),
    ],
)  # fmt: skip
def test_a_prompt_that_is_no_question_of_the_task(ws, neft, run, prompt, line):
    code, lines = neft(ws, "generate", "--run", run, "--prompt", prompt)
    assert (code, lines) == (2, [f"neft: --prompt: {line}"])


def test_an_answer_is_the_first_line(ws):
    """A model that says `a`, a new line and `a` in turns, whatever it is asked."""
    model, (card, tokenizer) = loading.load_base(ws), loading.base_card(ws)
    letter, line = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in "a\n")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        seen = torch.zeros_like(model.lm_head.weight)
        seen[:, 0], seen[letter] = 1, torch.eye(16)[1]
        said = torch.zeros_like(seen)
        said[letter, 0], said[line, 1] = 1, 1
        model.model.embed_tokens.weight = torch.nn.Parameter(seen)
        model.lm_head.weight = torch.nn.Parameter(said)
        model.model.norm.weight.fill_(1)
    ids = torch.tensor([[1, line]])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False
    )
    assert found[0, 2:].tolist() == [letter, line, letter]
    rows = read_rows(ws.path("corpus", "sum", "test.jsonl"))[:2]
    answers = answering.answers(
        ws.params(), "sum", model, tokenizer, rows, context=card.context, label="x"
    )
    assert answers == ["a", "a"]


def test_a_task_without_training_rows_is_tested_on_alone(ws):
    assert not ws.path("prepared", "other", "train.safetensors").exists()
    assert [path.name for path in ws.path("warmup", "other").iterdir()] == ["provenance.json"]
    assert NeuronScores.load(ws.path("scores", "other.safetensors")).sensitivity == {}
    metrics = json.loads(ws.path("baseline", "other", "metrics.json").read_text())
    assert list(metrics) == ["base"]


def test_a_transfer_has_every_seed_of_the_run_on_the_other_tasks_rows(ws):
    for seed in (1, 2):
        rows = seed_rows(ws, "neft.other", seed)
        told = read_rows(ws.path("prepared", "other", "references.jsonl"))
        assert [row["source"] for row in rows] == [row["source"] for row in told]
    # The same model as on its own task: texts of the two runs differ, those of one don't.
    assert seed_rows(ws, "neft.other", 1) != seed_rows(ws, "full.other", 1)


def test_the_summary_has_each_kinds_own_metrics(ws):
    text = ws.path("summary", "summary.md").read_text()
    head, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert head[:3] == ["task", "run", "trained on"]
    assert [name for name in head if "ROUGE" in name or name in ("BLEU", "chrF", "accuracy")] == [
        "BLEU", "chrF", "ROUGE-1", "ROUGE-2", "ROUGE-L", "accuracy"
    ]  # fmt: skip
    rows = {(line[0], line[1]): dict(zip(head, line, strict=True)) for line in lines}
    assert ("other", "tuned") not in rows
    assert rows["other", "neft"]["trained on"] == "en-fr"
    assert rows["other", "neft"]["seeds"] == "2"
    assert rows["other", "neft"]["Δ to full"] != "-"
    assert rows["sum", "sum-full"]["BLEU"] == "-"
    assert rows["sum", "sum-full"]["ROUGE-L"] != "-"
    assert rows["nli-en", "nli-full"]["accuracy"] != "-"
    assert "differences and p: BLEU for en-fr, ROUGE-L for sum, accuracy for nli-en" in text
    metrics = json.loads(ws.path("summary", "metrics.json").read_text())
    told = seed_rows(ws, "nli-full")
    base = [row["hypothesis"] for row in read_rows(ws.path("baseline", "nli-en", "base.jsonl"))]
    out = paired_bootstrap(
        [row["hypothesis"] for row in told],
        base,
        [row["references"] for row in told],
        "English",
        100,
        metric="accuracy",
    )
    assert metrics["nli-en"]["nli-full"]["p_base"] == out["p_value"]
    assert "rouge2" in metrics["sum"]["sum-full"]


def test_long_inputs_are_dropped_where_asked(tmp_path):
    ws = make(tmp_path / "dropping")
    edit(ws, ("max_input: 24\n", "max_input: 24\n      long_inputs: drop\n"))
    run_stages(ws, "corpus", "base", "prepare")
    stats = json.loads(ws.path("prepared", "sum", "stats.json").read_text())
    assert stats["train"]["dropped"] > 0
    assert stats["train"]["kept"] == 86 - stats["train"]["dropped"]
    rows = read_rows(ws.path("prepared", "sum", "references.jsonl"))
    assert len(rows) == stats["test"]["kept"] == 8 - stats["test"]["dropped"] < 8


def test_as_many_rows_as_asked_for_are_left_after_the_drop(tmp_path):
    """Of samples that `source.skip` keeps apart too; what is longer doesn't count."""
    ws = make(tmp_path / "dropping")
    told = TASKS[TASKS.index("  sum:") : TASKS.index("  nli-en:")]
    told = told.replace("max_input: 24\n", "max_input: 24\n      long_inputs: drop\n")
    told = told.replace("{train: train.jsonl}", "{train: train.jsonl, test: test.jsonl}")
    first = told.replace("      dev: 6\n", "      dev: 6\n      train: 25\n")
    second = first.replace("  sum:", "  sum-2:").replace(
        "train: 25\n", "train: 25\n      skip: 25\n"
    )
    edit(ws, (TASKS[: TASKS.index("  nli-en:")], first + second))
    data = ws.root / "data/sum"
    text = (data / "train.jsonl").read_text("utf-8")
    (data / "test.jsonl").write_text(text.replace('"text": "', '"text": "z ').replace("我", "你"))
    run_stages(ws, "corpus", "base", "prepare")
    shown = {}
    for task in ("sum", "sum-2"):
        stats = json.loads(ws.path("prepared", task, "stats.json").read_text())
        assert stats["train"]["kept"] == 25
        assert stats["train"]["dropped"] > 0
        assert stats["train"]["over_limit"] > 0
        assert sum(stats["train"][n] for n in ("kept", "dropped", "over_limit")) == 100 - 6
        assert stats["test"]["kept"] == len(references(ws, task)) == 8
        shown[task] = prepared_texts(ws, task)
    assert len(set(shown["sum"])) == len(set(shown["sum-2"])) == 25
    assert not set(shown["sum"]) & set(shown["sum-2"])
    edit(ws, ("skip: 25", "skip: 90"))
    run_stages(ws, "corpus")
    with pytest.raises(
        NeftError, match=r"^task sum-2: train: source.skip 90 leaves none of \d\d rows"
    ):
        STAGES["prepare"](ws, "sum-2")


def prepared_texts(ws, task: str) -> list[tuple[int, ...]]:
    """Token ids of each training row."""
    arrays, _ = load_encoded(ws.path("prepared", task, "train.safetensors"))
    cuts = zip(arrays["offsets"], arrays["offsets"][1:], strict=False)
    return [tuple(arrays["tokens"][start:end].tolist()) for start, end in cuts]


def test_a_hundred_rows_are_trained_on(ws, tmp_path):
    """As in the paper's smallest sets: drawn, held to their length, and all of them seen."""
    small = Workspace(shutil.copytree(ws.root, tmp_path / "small"))
    edit(
        small,
        ("max_input: 24\n", "max_input: 24\n      long_inputs: drop\n"),
        ("columns: {source: text, target: summary}\n      dev: 6\n",
         "columns: {source: text, target: summary}\n      train: 100\n      dev: 6\n"),
        ("runs:\n", "runs:\n  sum-neft: {task: sum, method: {name: neft, percent: 9}}\n"),
    )  # fmt: skip
    data = small.root / "data/sum/train.jsonl"
    text = data.read_text("utf-8")
    data.write_text(text + text.replace('"text": "', '"text": "z ').replace("我", "你"), "utf-8")
    for stage in ("corpus", "prepare", "warmup", "score"):
        STAGES[stage](small, "sum")
    stats = json.loads(small.path("prepared", "sum", "stats.json").read_text())["train"]
    assert (stats["kept"], len(set(prepared_texts(small, "sum")))) == (100, 100)
    assert min(stats["dropped"], stats["over_limit"]) > 0
    for run in ("sum-full", "sum-neft"):
        for stage in ("select", "train", "evaluate"):
            STAGES[stage](small, run)
        folder = small.path("train", run, "seed-1")
        with (folder / "train.csv").open(newline="") as handle:
            steps = [(int(row["step"]), float(row["epoch"])) for row in csv.DictReader(handle)]
        assert steps == [(n, pytest.approx(min(n / 12.5, 1), abs=0.04)) for n in range(1, 14)]
        with (folder / "dev.csv").open(newline="") as handle:
            losses = [float(row["loss"]) for row in csv.DictReader(handle)]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["best_dev_loss"] == min(losses)
        assert len(losses) > 3, "a choice between several"
        scores = json.loads(small.path("evaluation", run, "metrics.json").read_text())["seeds"]["1"]
        assert {"rouge1", "rouge2", "rougeL"} <= scores.keys()


@pytest.mark.parametrize(
    ("file", "row", "task", "line"),
    [
        ("sum/train.jsonl", '{"text": "a b", "summary": ""}\n', "sum",
         "W/data/sum/train.jsonl:101: 'summary' is empty; text is needed"),
        ("nli/train.csv", "a,b,perhaps\n", "nli-en",
         "W/data/nli/train.csv:62: the label is 'perhaps'; entailment (0), neutral (1), "
         "contradiction (2) are the labels"),
        ("nli/train.csv", "a,b,-1\n", "nli-en",
         "W/data/nli/train.csv:62: the label is '-1'; entailment (0), neutral (1), "
         "contradiction (2) are the labels"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_line_with_its_place(tmp_path, neft, file, row, task, line):
    ws = make(tmp_path / "bad")
    path = ws.root / "data" / file
    path.write_text(path.read_text("utf-8") + row, "utf-8")
    code, lines = neft(ws, "stage", "corpus", task)
    assert code == 2
    assert [one.replace(str(ws.root), "W") for one in lines] == [f"neft: {line}"]
    assert not ws.path("corpus", task).exists()


def test_scitldr_goes_through_corpus_and_prepare(tmp_path, shared):
    ws = make(tmp_path / "real")
    data = shared / "data" / "scitldr"
    edit(
        ws,
        ("path: data/sum\n", f"path: {data}\n"),
        ("splits: {train: train.jsonl}\n      columns: {source: text, target: summary}\n"
         "      dev: 6\n      test: 8\n",
         "splits: {train: train.jsonl, dev: dev.jsonl, test: test.jsonl}\n      train: 100\n"
         "      dev: 20\n      test: 30\n"),
        ("max_input: 24", "max_input: 60"),
        ("max_tokens: 96", "max_tokens: 158"),
        ("target_language: Chinese", "target_language: English"),
    )  # fmt: skip
    run_stages(ws, "corpus", "base", "prepare")
    stats = json.loads(ws.path("prepared", "sum", "stats.json").read_text())
    assert [stats[name]["rows"] for name in ("train", "dev", "test")] == [100, 20, 30]
    assert stats["test"]["truncated"] == stats["test"]["kept"] == 30
    rows = read_rows(ws.path("prepared", "sum", "references.jsonl"))
    assert max(len(row["references"]) for row in rows) > 1
