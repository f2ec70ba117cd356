"""params.yaml: what is refused, in which words; that every section says what its keys are."""

import ast
from pathlib import Path

import pytest
from conftest import TINY_PARAMS

from neft_core import config
from neft_core.config import load_params, parse_params, read_yaml
from neft_core.errors import NeftError

ROOT = Path(__file__).resolve().parents[1]
GENERATED = "kind: generated\n      languages: {}\n      pretrain: 4\n      train: 5\n"
LOCAL = (
    "kind: local\n      path: data/pairs\n"
    "      splits: {train: train.jsonl, pretrain: pretrain.jsonl}\n"
)


def refused(tmp_path: Path, *changes: tuple[str, str], text: str = TINY_PARAMS) -> list[str]:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(NeftError) as fault:
        load_params(path)
    return [line.removeprefix(f"{tmp_path}/") for line in str(fault.value).splitlines()]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        # misspelt keys and names
        ("percent: 9", "percnt: 9",
         "runs.neft.method.percnt: unknown key; did you mean 'percent'?"),
        ("lr: 1e-3,", "lr: 1e-3, qqq: 1,", "warmup.qqq: unknown key; known here: lr, batch_size, "
         "accumulation, max_grad_norm, weight_decay, gradient_checkpointing, checkpoint_every, "
         "steps, seed, modules, layout, rank, states, update"),
        ("kind: built", "kind: buit", "model.kind: got 'buit'; allowed are built, local, hub"),
        ("  kind: built\n", "", "model.kind: missing; it is required"),
        ("name: full", "name: ful", "runs.full.method.name: got 'ful'; allowed are full, in_out, "
         "embed, lora, neft"),
        ("layout: mlp", "layout: mpl", "scoring.layout: got 'mpl'; allowed are mlp, "
         "mlp+gate, attention, all, rows, patterns"),
        ("task: en-fr", "task: en-ff", "runs.full.task: got 'en-ff'; did you mean 'en-fr'?"),
        ("task: en-fr", "task: zzz", "runs.full.task: got 'zzz'; known: en-fr"),
        ("  full:", "  full.1:", "runs: got the name 'full.1'; names are lower-case letters, "
         "digits, '_', '-', at most 100"),
        ("  full:", "  1:", "runs.1: got a name that is no text; put it in quotes"),
        # wrong types: YAML's own count, nothing is guessed
        ("rank: 2", "rank: '2'", "runs.lora.method.rank: got '2'; a whole number is needed"),
        ("rank: 2", "rank: true", "runs.lora.method.rank: got true; a whole number is needed"),
        ("rank: 2", "rank: 2.5", "runs.lora.method.rank: got 2.5; a whole number is needed"),
        ("lr: 1e-3", "lr: '1e-3'", "warmup.lr: got '1e-3'; a number is needed"),
        ("lr: 1e-3", "lr: true", "warmup.lr: got true; a number is needed"),
        ("lr: 1e-3", "lr: .inf", "warmup.lr: got inf; a finite number is needed"),
        ("epochs: 2", "epochs: .nan", "training.epochs: got nan; a finite number is needed"),
        ("path: data/pairs", "path: s3://x/y",
         "tasks.en-fr.source.path: got 's3://x/y'; a path on this machine, where a copy lies"),
        ("  full:", f"  {101 * 'f'}:", f"runs: got the name '{101 * 'f'}'; "
         "names are lower-case letters, digits, '_', '-', at most 100"),
        ("path: data/pairs", "path: 7", "tasks.en-fr.source.path: got 7; text is needed"),
        ("seeds: [1, 2]", "seeds: 1", "runs.neft.seeds: got 1; a list is needed"),
        ("seeds: [1, 2]", "seeds: [1, a]", "runs.neft.seeds.1: got 'a'; a whole number is needed"),
        ("{name: full}", "full", "runs.full.method: got 'full'; a mapping of keys is needed"),
        ("scoring: {layout: mlp}", "scoring:", "scoring: got nothing; a mapping of keys is needed"),
        ("  full:", "  base:",
         "runs.base: is what tables call a model before training; rename the run"),
        ("  full:", "  warmup-en-fr:",
         "runs.warmup-en-fr: is what the costs of 'en-fr' are kept under; rename the run"),
        ("  full:", "  score-en-fr:",
         "runs.score-en-fr: is what the costs of 'en-fr' are kept under; rename the run"),
        # out of range
        ("percent: 9", "percent: 140", "runs.neft.method.percent: got 140; at most 100"),
        ("percent: 9", "percent: 0", "runs.neft.method.percent: got 0; more than 0"),
        ("percent: 9", "neurons: 0", "runs.neft.method.neurons: got 0; at least 1"),
        ("percent: 9", "share: 1.5", "runs.neft.method.share: got 1.5; at most 1"),
        ("steps: 6", "steps: 0", "warmup.steps: got 0; at least 1"),
        ("lr: 1e-3", "lr: 0", "warmup.lr: got 0; more than 0"),
        ("seeds: [1, 2]", "seeds: [1, -1]", "runs.neft.seeds.1: got -1; at least 0"),
        ("seeds: [1, 2]", "seeds: []", "runs.neft.seeds: got []; at least 1 of them"),
        ("dtype: auto", "dtype: int8",
         "compute.dtype: got 'int8'; allowed are auto, float32, bfloat16, float16, float64"),
        ("threads: 1", "processes: 0", "compute.processes: got 0; at least 1"),
        ("threads: 1", "threads: 4097", "compute.threads: got 4097; at most 4096"),
        ("bootstrap: 100", "bootstrap: 100001", "evaluation.bootstrap: got 100001; at most 100000"),
        ("seeds: [1, 2]", f"seeds: [1, {2**63}]",
         f"runs.neft.seeds.1: got {2**63}; at most {2**63 - 1}"),
        ("threads: 1", "processes: 2, accelerate_config: a.yaml", "compute.processes: got 2 beside "
         "accelerate_config; num_processes of that file says how many"),
        (LOCAL, GENERATED.format("[en]"),
         "tasks.en-fr.source.languages: got ['en']; translation needs source and target"),
        (LOCAL, GENERATED.format("[en, de]"),
         "tasks.en-fr.source.languages: got 'de'; of translation allowed are en, fr, zh, hi, qmi, "
         "qbs"),
        # what contradicts itself
        ("percent: 9", "neurons: 5, share: 0.5", "runs.neft.method.budget: got neurons and share; "
         "give exactly one of percent, neurons, share"),
        (", percent: 9", "", "runs.neft.method.budget: got none; "
         "give exactly one of percent, neurons, share"),
        ("rank: 2", "rank: 2, percent: 9", "runs.lora.method.percent: unknown key; "
         "known here: name, rank, alpha, dropout"),
        ("warmup: {", "warmup: {modules: lora, ", "warmup.rank: missing; modules: lora needs it"),
        ("warmup: {", "warmup: {rank: 4, ", "warmup.rank: got 4; it is for modules: lora only"),
        ("warmup: {", "warmup: {modules: candidates, ",
         "warmup.layout: missing; modules: candidates needs it"),
        ("warmup: {", "warmup: {modules: candidates, layout: mlp+gate, ",
         "warmup.layout: got 'mlp+gate'; the same as scoring.layout, 'mlp'"),
        ("warmup: {", "warmup: {states: 4bit, ",
         "warmup.states: got '4bit'; allowed are fp32, 8bit, factored"),
        ("warmup: {", "warmup: {update: in_backward, accumulation: 2, ",
         "warmup.accumulation: got 2; update: in_backward keeps no gradient to add to: set 1, or "
         "update: after_backward"),
        ("threads: 1}\nwarmup: {", "threads: 1, processes: 2}\nwarmup: {update: in_backward, ",
         "warmup.update: got 'in_backward' with compute.processes 2; one process, or "
         "after_backward"),
        ("auto, threads: 1}\nwarmup: {", "fp16, threads: 1}\nwarmup: {update: in_backward, ",
         "warmup.update: got 'in_backward' with compute.mixed_precision fp16, which scales all "
         "gradients at once; use bf16"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "runs.neft.seeds: got [1, 1]; each seed once"),
        ("heads: 2", "heads: 3",
         "model.heads: got 3 with hidden 16; hidden / heads must be even"),
        ("max_tokens: 160", "max_tokens: 161",
         "tasks.en-fr.format.max_tokens: got 161; at most model.context, 160"),
        (", pretrain: pretrain.jsonl", "", "model: kind 'built' needs a task with pre-training "
         "rows; set source.pretrain or splits.pretrain of one task"),
        ("      dev: 6\n", "", "tasks.en-fr.source.dev: missing; give splits.dev, or how many rows "
         "to split off"),
        (LOCAL, GENERATED.format("[fr, fr]"),
         "tasks.en-fr.source.languages: got 'fr' twice; source and target must differ"),
        ("device: cpu, dtype: auto, mixed_precision: auto",
         "device: cpu, dtype: bfloat16, mixed_precision: 'no'", None),
    ],
)  # fmt: skip
def test_one_fault_is_one_line(tmp_path, old, new, line):
    if line is None:
        old_method, new_method = "{name: lora, rank: 2}", "{name: in_out}"
        found = refused(tmp_path, (old, new), (old_method, new_method))
        assert found == [
            "params.yaml: compute.mixed_precision: got 'no' with dtype bfloat16 and method in_out "
            "of run lora; set dtype: float32, or mixed_precision: auto"
        ]
    else:
        assert refused(tmp_path, (old, new)) == [f"params.yaml: {line}"]


def test_several_faults_are_several_lines(tmp_path):
    assert refused(
        tmp_path,
        ("steps: 6", "steps: 0"),
        ("epochs: 2", "epochs: x, epoch: 2, patienc: 3"),
        ("rank: 2", "rnk: 2"),
        ("bootstrap: 100", "bootstrap: 1"),
    ) == [
        "params.yaml: warmup.steps: got 0; at least 1",
        "params.yaml: training.epochs: got 'x'; a number is needed",
        "params.yaml: training.epoch: unknown key; did you mean 'epochs'?",
        "params.yaml: training.patienc: unknown key; did you mean 'patience'?",
        "params.yaml: runs.lora.method.rank: missing; it is required",
        "params.yaml: runs.lora.method.rnk: unknown key; did you mean 'rank'?",
        "params.yaml: evaluation.bootstrap: got 1; at least 100",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "params.yaml: holds no mapping; see the README for its sections"),
        ("- a\n", "params.yaml: holds no mapping; see the README for its sections"),
        ("a: 1\nb: [\n", "params.yaml: line 3: did not find expected node content; mend the YAML"),
        ("a: 2024-13-45\n", "params.yaml: month must be in 1..12; mend the YAML"),
        ("a: 1\n\tb: 2\n", "params.yaml: line 2: found"),
        ("a: 1\na: 2\n", 'params.yaml: line 2: found duplicate key "a" with value "2" (original'),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line(tmp_path, text, line):
    (found,) = refused(tmp_path, text=text)
    assert found.startswith(line)


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(NeftError, match=r"params\.yaml: not found; run 'neft init DIR'"):
        read_yaml(tmp_path / "params.yaml")
    with pytest.raises(NeftError, match="Is a directory; give a file that can be read"):
        read_yaml(tmp_path)
    (tmp_path / "params.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(NeftError, match=r"params\.yaml: not UTF-8 text; mend the YAML"):
        read_yaml(tmp_path / "params.yaml")


def test_braces_in_a_message_stay_as_they_are(tmp_path):
    (line,) = refused(tmp_path, ("percent: 9", "'{percent}': 9"))
    assert line.startswith("params.yaml: runs.neft.method.{percent}: unknown key; did you mean")


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted(ROOT.glob("examples/*/params.yaml"))], ids=str
)
def test_every_params_file_of_this_repository_is_valid(path):
    params = load_params(path)
    assert params == parse_params(params.model_dump(), "again")


def test_a_yaml_number_without_a_dot_is_a_number(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(TINY_PARAMS)
    params = load_params(path)
    assert (params.warmup.lr, params.training.epochs) == (1e-3, 2)


def test_every_key_is_documented():
    """A field of a section is followed by the text that explains it."""
    files = Path(config.__file__).parent.glob("*.py")
    nodes = [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
    fields = 0
    for section in (n for n in nodes if isinstance(n, ast.ClassDef)):
        assert ast.get_docstring(section), section.name
        for field, after in zip(section.body, [*section.body[1:], None], strict=True):
            plain = isinstance(field, ast.AnnAssign) and field.target.id.islower()
            if plain and section.name != "Section":
                fields += 1
                said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert said, f"{section.name}.{field.target.id}"
                assert after.value.value.strip()
    assert fields > 60


TAIL = "max_tokens: 160\n"
FORMAT = TINY_PARAMS[TINY_PARAMS.index("      task: translation") : TINY_PARAMS.index("compute:")]
SUMMARISE = (
    "      task: summarisation\n      source_language: English\n      target_language: Chinese\n"
    "      max_input: 100\n      max_tokens: 160\n"
)
NLI = "      task: nli\n      language: French\n      max_tokens: 160\n"
MORE = "evaluation: {batch_size: 4"
WARMUP = "warmup: {steps: 6, lr: 1e-3, batch_size: 8, seed: 1}\n"
NEFT = "method: {name: neft, policy: lowest, percent: 9}"
TUNED = "study:\n  title: a\n  parts:\n    - {show: table, tasks: [en-fr], rows: {Tuned: tuned}}\n"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ([(FORMAT, SUMMARISE.replace("max_input: 100", "max_input: 160"))],
         "tasks.en-fr.format.max_input: got 160; less than max_tokens, 160"),
        ([(FORMAT, SUMMARISE.replace("      max_input: 100\n", ""))],
         "tasks.en-fr.format.max_input: missing; it is required"),
        ([(FORMAT, NLI), (LOCAL, LOCAL + "      columns: {source: a, target: b}\n")],
         "tasks.en-fr.source.columns: got source, target; nli needs premise, hypothesis, label"),
        ([(FORMAT, NLI), (LOCAL, LOCAL + "      labels: {entailment: 1}\n")],
         "tasks.en-fr.source.labels: got entailment; of nli all of entailment, neutral, "
         "contradiction"),
        ([(LOCAL, LOCAL + "      columns: {premise: a}\n")],
         "tasks.en-fr.source.columns: got premise; translation needs source, target"),
        ([(FORMAT, NLI), (LOCAL, GENERATED.format("[en, fr]")), ("dev: 6", "dev: 6")],
         "tasks.en-fr.source.languages: got ['en', 'fr']; nli needs one"),
        ([(FORMAT, NLI), (LOCAL, GENERATED.format("[zh]"))],
         "tasks.en-fr.source.languages: got 'zh'; of nli allowed are en, fr, de"),
        ([(FORMAT, SUMMARISE), (LOCAL, GENERATED.format("[en, qmi]"))],
         "tasks.en-fr.source.languages: got 'qmi'; of summarisation allowed are en, fr, zh, hi"),
        ([(LOCAL, GENERATED.format("[en, fr]").replace("train: 5", "train: 0"))],
         "tasks.en-fr.source.dev: got 6 with train 0; at least 1 of each, or both 0 for a task "
         "that is only tested on"),
        ([("train: train.jsonl", "test: train.jsonl"), ("      dev: 6\n", "")],
         "runs.full.task: got 'en-fr', which has no rows to train on; another, or give it some"),
        ([("train: train.jsonl, ", "")],
         "tasks.en-fr.source.splits.train: missing; give it, or splits.test alone for a task that "
         "is only tested on"),
        ([(WARMUP, "warmup: null\n")],
         "runs.neft.method.scores: got 'en-fr', which needs a warm-up, and warmup is null; "
         "another, or give warmup"),
        ([(WARMUP, "warmup: null\nwarmups: {a: {task: en-fr}}\n")],
         "warmups.a: given with warmup: null, of which it has its other keys; give warmup"),
        ([(WARMUP, "warmup: null\n"), (NEFT, "method: {name: in_out}"),
          (MORE, TUNED + MORE)],
         "study.parts.0.rows.Tuned: got 'tuned', which needs a warm-up, and warmup is null; "
         "another, or give warmup"),
        ([(MORE, "transfers: {a: {run: nefd, task: en-fr}}\n" + MORE)],
         "transfers.a.run: got 'nefd'; did you mean 'neft'?"),
        ([(MORE, "transfers: {a: {run: neft, task: hi-zh}}\n" + MORE)],
         "transfers.a.task: got 'hi-zh'; known: en-fr"),
        ([(MORE, "transfers: {a: {run: neft, task: en-fr}}\n" + MORE)],
         "transfers.a.task: got 'en-fr', on which run neft is tested anyway; another"),
        ([(MORE, "transfers: {a.b: {run: neft, task: en-fr}}\n" + MORE)],
         "transfers: got the name 'a.b'; names are lower-case letters, digits, '_', '-', "
         "at most 100"),
    ],
)  # fmt: skip
def test_one_fault_of_a_task_is_one_line(tmp_path, changes, line):
    assert refused(tmp_path, *changes) == [f"params.yaml: {line}"]


@pytest.mark.parametrize(
    ("german", "told"),
    [
        ("language: German", "Folgerung, neutral, Widerspruch"),
        ("language: English, labels: {entailment: yes, neutral: may be, contradiction: no}",
         "yes, may be, no"),
        ("language: German, labels: {neutral: neutral, entailment: entailment, "
         "contradiction: contradiction}", None),
        ("language: Maori", None),  # has no words at all, which stage `prepare` tells
    ],
)  # fmt: skip
def test_labels_that_a_run_did_not_learn_are_refused(tmp_path, german, told):
    """Else of a run that learnt English words the score would be which German one is likelier."""
    task = (
        "  nli-de:\n    source: {kind: local, path: data/de, splits: {test: test.csv}}\n"
        f"    format: {{task: nli, {german}, max_tokens: 160}}\n"
    )
    text = TINY_PARAMS.replace(FORMAT, NLI.replace("French", "English") + task)
    text = text.replace(MORE, "transfers: {a: {run: neft, task: nli-de}}\n" + MORE)
    if told is None:
        (tmp_path / "params.yaml").write_text(text)
        assert load_params(tmp_path / "params.yaml").transfers
        return
    assert refused(tmp_path, text=text) == [
        f"params.yaml: transfers.a.task: got 'nli-de' with the labels {told}, but run neft learns "
        "entailment, neutral, contradiction; give tasks.nli-de.format.labels those of en-fr"
    ]


def test_the_same_transfer_twice_is_refused(tmp_path):
    task = TINY_PARAMS[TINY_PARAMS.index("  en-fr:") : TINY_PARAMS.index("compute:")]
    twice = "transfers: {a: {run: neft, task: hi-zh}, b: {run: neft, task: hi-zh}}\n"
    found = refused(
        tmp_path, ("compute:", task.replace("en-fr", "hi-zh", 1) + "compute:"), (MORE, twice + MORE)
    )
    assert found == ["params.yaml: transfers.b: the same as transfers.a; give it once"]


@pytest.mark.parametrize("key", ["any_size", "per_module"])
def test_a_false_option_of_a_selection_is_as_if_it_was_not_said(tmp_path, key):
    found = []
    for number, more in enumerate((f", {key}: false", "")):
        file = tmp_path / f"{number}.yaml"
        new = f"runs:\n  low: {{task: en-fr, method: {{name: neft, percent: 9{more}}}}}\n"
        file.write_text(TINY_PARAMS.replace("runs:\n", new, 1))
        found.append(load_params(file).runs["low"].model_dump())
    assert found[0] == found[1]
