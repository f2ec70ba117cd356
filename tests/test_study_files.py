"""Study files: what they stand for, and what is wrong with them, each in one line."""

import itertools
import math

import pytest
from conftest import TINY_PARAMS
from ruamel.yaml import YAML

from neft_core import study_files
from neft_core.config import parse_params, read_yaml, yaml_text
from neft_core.config.study import SECOND
from neft_core.errors import NeftError
from neft_core.loading import form
from neft_core.rows import LABELS
from neft_core.study_files import PACKAGED, expand
from neft_core.workspace import PACKAGE, Workspace

STUDIES = {
    name: study_files.find(name, PACKAGE.parent).file
    for name in sorted(study_files.listed(PACKAGE.parent))
}
HEAD = TINY_PARAMS.partition("runs:")[0]
TAIL = "evaluation:" + TINY_PARAMS.partition("evaluation:")[2]
COMMON = f"""{HEAD}{TAIL}
seeds: [1, 2]
methods:
  full: {{method: {{name: full}}, lr: 2e-3}}
  neft-9: {{method: {{name: neft, percent: 9}}, lr: 3e-3}}
  early: {{method: {{name: neft, percent: 9, scores: "{{task}}-early"}}}}
  both:
    method: {{name: neft, policy: union, percent: 3, scores: ["{{task}}", "{{task}}-early"]}}
warmups:
  en-fr-early: {{task: en-fr, steps: 2}}
  other-early: {{task: en-fr, steps: 3}}
"""
STUDY = """\
extends: common.yaml
grid:
  - {tasks: [en-fr], methods: [full, neft-9]}
study:
  title: A table
  parts:
    - {show: table, tasks: {en-fr: En→Fr}, rows: {Base: base, FT-full: full, NeFT: neft-9}}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "common.yaml").write_text(COMMON)
    (tmp_path / "a.yaml").write_text(STUDY)
    return tmp_path


def put(folder, text: str, name: str = "a.yaml"):
    (folder / name).write_text(text)
    return folder / name


def params(path, *settings: str):
    data = expand(path, path.parent, settings).data
    return parse_params(data, path.name)


def test_a_setting_changes_one_task_of_those_that_share_a_format(folder):
    file = PACKAGED / "paper" / "table5.yaml"
    before, after = (
        {
            name: task["format"]["max_tokens"]
            for name, task in expand(file, folder, s).data["tasks"].items()
        }
        for s in ([], ["tasks.en-zh.format.max_tokens=256"])
    )
    assert after == before | {"en-zh": 256}
    assert len(before) > 2


def test_a_grid_stands_for_runs_of_the_catalogue(folder):
    data, changes, unused = expand(folder / "a.yaml", folder)
    assert (changes, unused) == ([], [])
    assert not {"extends", "grid", "methods", "seeds"} & data.keys()
    assert data["runs"] == {
        "full-en-fr": {"task": "en-fr", "method": {"name": "full"}, "lr": 2e-3, "seeds": [1, 2]},
        "neft-9-en-fr": {
            "task": "en-fr",
            "method": {"name": "neft", "percent": 9},
            "lr": 3e-3,
            "seeds": [1, 2],
        },
    }
    assert parse_params(data, "a").study.title == "A table"
    again = YAML(typ="safe").load(yaml_text(data))
    assert again == data
    assert "&" not in yaml_text(data), "DVC reads it too"


def test_a_grid_names_the_text_on_which_its_runs_are_measured(folder):
    grid = "neft-9], forgetting: {path: texts/short.txt, rows: 20}}"
    found = params(put(folder, STUDY.replace("neft-9]}", grid)))
    asked = {name: (entry.run, entry.path, entry.rows) for name, entry in found.forgetting.items()}
    path = str(folder / "texts" / "short.txt")
    assert asked == {name: (name, path, 20) for name in ("full-en-fr", "neft-9-en-fr")}
    twice = "forgetting: {full-en-fr: {run: full-en-fr, path: b.txt}}\n"
    with pytest.raises(
        NeftError, match=r"forgetting\.full-en-fr stands in the file too; give it on"
    ):
        expand(put(folder, twice + STUDY.replace("neft-9]}", grid)), folder)


def test_the_same_run_has_the_same_section_in_every_study(folder):
    """So that DVC finds in its cache what another study made."""
    more = put(folder, STUDY.replace("[full, neft-9]", "[early, neft-9, full]"), "b.yaml")
    one, other = (expand(folder / name, folder).data["runs"] for name in ("a.yaml", more.name))
    assert one.items() <= other.items()


def test_the_task_stands_in_for_its_place(folder):
    found = params(put(folder, STUDY.replace("[full, neft-9]", "[full, neft-9, early, both]")))
    assert found.runs["early-en-fr"].method.scores == "en-fr-early"
    assert found.runs["both-en-fr"].method.scores == ["en-fr", "en-fr-early"]


def test_what_a_study_does_not_name_is_left_out_of_what_it_extends(folder):
    assert params(folder / "a.yaml").warmups == {}
    named = put(folder, STUDY.replace("neft-9]}", "neft-9, early]}"))
    assert list(params(named).warmups) == ["en-fr-early"]
    own = put(folder, STUDY + "warmups: {mine: {task: en-fr, steps: 4}}\n")
    assert list(params(own).warmups) == ["mine"]


def test_a_task_stays_if_the_built_model_learns_from_it(folder):
    task = HEAD[HEAD.index("  en-fr:") : HEAD.index("compute:")]
    without = task.replace("en-fr:", "unused:").replace(", pretrain: pretrain.jsonl", "")
    text = COMMON.replace("compute:", task.replace("en-fr:", "learned:") + without + "compute:", 1)
    put(folder, text, "common.yaml")
    assert list(params(folder / "a.yaml").tasks) == ["en-fr", "learned"]
    local = read_yaml(folder / "common.yaml") | {"model": {"kind": "local", "path": "base"}}
    put(folder, yaml_text(local), "common.yaml")
    assert list(params(folder / "a.yaml").tasks) == ["en-fr"]


def test_tasks_left_out_leave_the_base_the_same(folder):
    """Its inputs are a folder with a file of every task, empty where there is nothing to learn."""
    task = HEAD[HEAD.index("  en-fr:") : HEAD.index("compute:")]
    without = task.replace("en-fr:", "unused:").replace(", pretrain: pretrain.jsonl", "")
    put(folder, COMMON.replace("compute:", without + "compute:", 1), "common.yaml")
    found = expand(folder / "a.yaml", folder)
    assert found.unused == ["unused"]
    ws = Workspace(folder)
    ws.params_file.write_text(yaml_text(found.data))
    place = ws.path("pretrain")
    place.mkdir(parents=True)
    put(place, "rows", "en-fr.jsonl")
    put(place, "of an older file", "gone.jsonl")
    study_files.share_base(ws, found.unused)
    study_files.share_base(ws, found.unused)
    texts = {path.name: path.read_text() for path in place.iterdir()}
    assert texts == {"en-fr.jsonl": "rows", "unused.jsonl": ""}


def test_extending_goes_key_by_key_along_a_chain(folder):
    put(folder, "extends: common.yaml\ntraining: {epochs: 3}\nseeds: [7]\n", "middle.yaml")
    text = STUDY.replace("common.yaml", "middle.yaml") + "training: {batch_size: 4}\n"
    found = params(put(folder, text))
    assert (found.training.epochs, found.training.batch_size, found.training.lr) == (3, 4, 1e-3)
    assert found.runs["full-en-fr"].seeds == [7]
    found = params(put(folder, text.replace("neft-9]}", "neft-9], seeds: [8]}")))
    assert found.runs["full-en-fr"].seeds == [8]


def test_another_kind_takes_the_place_of_the_whole_mapping(folder):
    found = params(put(folder, STUDY + "model: {kind: local, path: base}\n"))
    assert found.model.path == str(folder / "base")
    assert found.model.kind == "local"


def test_paths_are_relative_to_their_own_file(folder):
    (folder / "sub").mkdir()
    path = put(folder, STUDY.replace("common.yaml", "../common.yaml"), "sub/b.yaml")
    assert params(path).tasks["en-fr"].source.path == str(folder / "data" / "pairs")


def test_paths_of_packaged_studies_are_relative_to_the_workspace(tmp_path):
    data = expand(PACKAGED / "paper" / "table2.yaml", tmp_path).data
    assert data["tasks"]["en-zh"]["source"]["path"] == str(tmp_path / "data" / "en-zh")
    assert data["tasks"]["en-bs"]["source"]["path"] == str(tmp_path / "data" / "en-bs")


def test_runs_tested_elsewhere_and_at_several_rates(folder):
    task = HEAD[HEAD.index("  en-fr:") : HEAD.index("compute:")].replace("en-fr:", "fr-en:")
    put(folder, COMMON.replace("compute:", task + "compute:", 1), "common.yaml")
    grid = (
        "{tasks: [en-fr], methods: [full], lr: [1e-3, 2.5e-2], epochs: 4, tested: [en-fr, fr-en]}"
    )
    rows = "rows: {One: full-1e-3-en-fr}"
    text = STUDY.replace("{tasks: [en-fr], methods: [full, neft-9]}", grid)
    found = params(
        put(folder, text.replace("rows: {Base: base, FT-full: full, NeFT: neft-9}", rows))
    )
    assert {n: (r.lr, r.epochs) for n, r in found.runs.items()} == {
        "full-1e-3-en-fr": (1e-3, 4),
        "full-25e-3-en-fr": (0.025, 4),
    }
    assert [(t.run, t.task) for t in found.transfers.values()] == [
        ("full-1e-3-en-fr", "fr-en"),
        ("full-25e-3-en-fr", "fr-en"),
    ]


def test_a_method_with_several_rates_can_be_named_in_every_part(folder):
    rates = "[full, neft-9], lr: [1e-3, 2.5e-2]}"
    curve = "    - {show: trade_off, task: en-fr, series: {A: [full, neft-9]}}\n"
    found = params(put(folder, STUDY.replace("[full, neft-9]}", rates) + curve))
    table = found.study.parts[0]
    assert table.runs("FT-full", "en-fr", found.runs) == ["full-1e-3-en-fr", "full-25e-3-en-fr"]
    assert table.runs("NeFT", "en-fr", found.runs) == ["neft-9-1e-3-en-fr", "neft-9-25e-3-en-fr"]
    assert table.runs("Base", "en-fr", found.runs) == []
    with pytest.raises(NeftError, match=r"parts\.1\.series\.A: got 'ful'; did you mean 'full'\?"):
        params(put(folder, STUDY.replace("[full, neft-9]}", rates) + curve.replace("ful", "fu")))


def test_paths_of_settings_are_relative_to_the_workspace(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("workspace")
    settings = ["tasks.en-fr.source.path=data/more", "runs.full-en-fr.lr=0.5"]
    found, changes, _ = expand(folder / "a.yaml", root, settings)
    assert found["tasks"]["en-fr"]["source"]["path"] == str(root / "data/more")
    assert changes[0].endswith(f'/data/pairs" is now "{root}/data/more"')
    source = "{kind: local, path: data/more, splits: {train: a.csv}, dev: 6, test: 8}"
    found = expand(folder / "a.yaml", root, [f"tasks.en-fr.source={source}"]).data
    assert found["tasks"]["en-fr"]["source"]["path"] == str(root / "data/more")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("methods.ful.lr=1e-3", "no 'ful' there; known: full, neft-9, early, both"),
        ("methods.full.lr.x=1", "methods.full.lr holds no keys"),
    ],
)
def test_a_setting_of_the_study_file_is_refused_by_its_own_fault(folder, setting, told):
    with pytest.raises(NeftError) as caught:
        params(folder / "a.yaml", setting)
    assert str(caught.value) == f"--set {setting}: {told}"


def test_settings_go_into_the_file_or_into_what_came_of_it(folder):
    path = folder / "a.yaml"
    settings = [
        "methods.full.lr=0.5",
        "runs.neft-9-en-fr.lr=0.25",
        "training.epochs=9",
        "seeds=[4]",
    ]
    data, changes, _ = expand(path, folder, settings)
    assert data["runs"]["full-en-fr"]["lr"] == 0.5
    assert data["runs"]["full-en-fr"]["seeds"] == [4]
    assert data["runs"]["neft-9-en-fr"]["lr"] == 0.25
    assert data["training"]["epochs"] == 9
    assert sorted(changes) == [
        "methods.full.lr: 0.002 is now 0.5",
        "runs.neft-9-en-fr.lr: 0.003 is now 0.25",
        "seeds: [1, 2] is now [4]",
        "training.epochs: 2 is now 9",
    ]
    assert path.read_text() == STUDY


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("[full, neft-9]", "[full, neft-99]",
         "a.yaml: grid.0.methods: got 'neft-99'; did you mean 'neft-9'?"),
        ("tasks: [en-fr]", "tasks: [en-fz]",
         "a.yaml: grid.0.tasks: got 'en-fz'; did you mean 'en-fr'?"),
        ("neft-9]}", "neft-9], tested: [zz]}", "a.yaml: grid.0.tested: got 'zz'; known: en-fr"),
        ("neft-9]}", "neft-9], seeds: []}", "a.yaml: grid.0.seeds: got []; at least 1 of them"),
        ("neft-9]}", "neft-9], sed: [1]}",
         "a.yaml: grid.0.sed: unknown key; did you mean 'seeds'?"),
        ("neft-9]}", "neft-9], lr: [0.0]}", "a.yaml: grid.0.lr.0: got 0.0; more than 0"),
        ("[full, neft-9]}", "[full, full]}",
         "a.yaml: grid.0: the run 'full-en-fr' stands in grid.0 too; give it once"),
        ("[full, neft-9]}", "[full, neft-9]}\n  - {tasks: [en-fr], methods: [neft-9]}",
         "a.yaml: grid.1: the run 'neft-9-en-fr' stands in grid.0 too; give it once"),
        ("study:\n", "runs: {full-en-fr: {task: en-fr, method: {name: full}}}\nstudy:\n",
         "a.yaml: grid.0: the run 'full-en-fr' stands in runs too; give it once"),
        ("study:\n", "seeds: []\nstudy:\n", "a.yaml: seeds: got []; at least 1 of them"),
        ("study:\n", "runs: []\nstudy:\n", "a.yaml: runs: got no mapping; give runs by name"),
        ("study:\n", "methods: {bad: {method: {name: lorra}}}\nstudy:\n",
         "a.yaml: methods.bad.method.name: got 'lorra'; allowed are full, in_out, embed, lora,"),
        ("study:\n", "stury:\n", "a.yaml: study: missing; it is required of a study"),
        ("common.yaml", "comon.yaml",
         "a.yaml: extends: got 'comon.yaml', which is not there; name a file"),
        ("common.yaml", "~nobody-here/a.yaml",
         "a.yaml: extends: got '~nobody-here/a.yaml', which is not there; name a file"),
        ("common.yaml", '"a\\0.yaml"',
         "a.yaml: extends: got 'a\\x00.yaml'; the path of one file is needed"),
        ("common.yaml", "[common.yaml]",
         "a.yaml: extends: got ['common.yaml']; the path of one file is needed"),
        ("common.yaml", "a.yaml",
         "a.yaml: extends: a loop, a.yaml -> a.yaml; let one of them extend no other"),
        ("FT-full: full", "FT-full: fulll",
         "a.yaml: study.parts.0.rows.FT-full: got 'fulll'; did you mean 'full'?"),
        ("FT-full: full", "FT-full: [full, neft9]",
         "a.yaml: study.parts.0.rows.FT-full: got 'neft9'; did you mean 'neft-9'?"),
        ("{en-fr: En→Fr}", "[fr-fr]",
         "a.yaml: study.parts.0.tasks: got 'fr-fr'; did you mean 'en-fr'?"),
        ("rows:", "trained: xx, rows:", "a.yaml: study.parts.0.trained: got 'xx'; known: en-fr"),
        ("rows:", "metrics: [rougeL], rows:",
         "a.yaml: study.parts.0.metrics: got 'rougeL'; of translation there are bleu, chrf"),
        ("rows:", "paper: {LoRA: {en-fr: 3.0}}, rows:",
         "a.yaml: study.parts.0.paper: got the label 'LoRA'; one of rows"),
        ("rows:", "paper: {NeFT: {fr-en: 3.0}}, rows:",
         "a.yaml: study.parts.0.paper: NeFT: got the task 'fr-en'; one of tasks"),
        ("rows:", "paper: {NeFT: {en-fr: [3.0, 4.0]}}, rows:",
         "a.yaml: study.parts.0.paper: NeFT: en-fr: got [3.0, 4.0]; a number for each metric"),
        ("show: table", "show: wins, trained: [en-fr], series: {A: [full], B: []}}\n"
         "    - {show: table",
         "a.yaml: study.parts.0.series.B: got []; at least 1 of them"),
        ("show: table", "show: wins, trained: [en-fr], series: {A: [full, full], B: [full]}}\n"
         "    - {show: table", "a.yaml: study.parts.0.series: got 2 and 1 names; as many of each"),
        ("show: table", "show: wins, trained: [en-fr], series: {A: [ful], B: [full]}}\n"
         "    - {show: table", "a.yaml: study.parts.0.series.A: got 'ful'; did you mean 'full'?"),
        ("show: table", "show: wins, trained: [en-fr, en-fr], series: {A: [full], B: [full]}}\n"
         "    - {show: table", "a.yaml: study.parts.0.trained: got en-fr, en-fr; each task once"),
        ("show: table", "show: cost, task: en-fr, rows: {A: full}}\n"
         "    - {show: rates, task: en-fr, name: cost-speed}\n    - {show: table",
         "a.yaml: study.parts: two would write files named 'cost-speed'; give each its own name"),
        ("show: table", "show: tabel",
         "a.yaml: study.parts.0.show: got 'tabel'; allowed are "),
        ("title: A table", "titel: A table",
         "a.yaml: study.titel: unknown key; did you mean 'title'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(folder, old, new, told):
    assert old in STUDY
    with pytest.raises(NeftError) as fault:
        params(put(folder, STUDY.replace(old, new, 1)))
    lines = str(fault.value).splitlines()
    assert any(line.startswith(told) for line in lines), lines


def test_a_study_of_the_package_can_be_extended_by_its_name(tmp_path):
    """On a model and data of one's own; also under the same name."""
    (tmp_path / "studies").mkdir()
    text = "extends: table2\nmodel: {kind: local, path: ../mine}\nseeds: [5]\n"
    path = put(tmp_path / "studies", text, "table2.yaml")
    data = expand(path, tmp_path).data
    found = parse_params(data, path.name)
    assert found.study.title.startswith("Table 2: ")
    assert found.model.path == str(tmp_path / "mine")
    assert found.runs["full-en-zh"].seeds == [5]
    with pytest.raises(NeftError, match=r"study 'tabel1': unknown; did you mean 'table1'\?"):
        expand(put(tmp_path, "extends: tabel1\n", "b.yaml"), tmp_path)


def test_a_longer_loop_is_told_with_its_way(folder):
    put(folder, "extends: c.yaml\n", "b.yaml")
    put(folder, "extends: b.yaml\n", "c.yaml")
    path = put(folder, STUDY.replace("common.yaml", "b.yaml"))
    with pytest.raises(
        NeftError, match=r"^c\.yaml: extends: a loop, a\.yaml -> b\.yaml -> c\.yaml"
    ):
        expand(path, folder)


def test_studies_are_found_by_name_and_by_path(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("ws")
    (root / "studies" / "mine").mkdir(parents=True)
    put(root / "studies", COMMON, "common.yaml")
    put(root / "studies", STUDY.replace("A table", "Ours"), "table2.yaml")
    put(root / "studies", STUDY.replace("common", "../common"), "mine/x.yaml")
    titles = study_files.listed(root)
    assert list(titles)[:2] == ["table2", "mine/x"], "without the one that is extended"
    assert titles["table2"] == "Ours", "a workspace's own comes before the package's"
    assert "paper/table2" in titles
    assert study_files.find("table2", root).file == root / "studies" / "table2.yaml"
    assert study_files.find("mine/x", root).name == "mine/x"
    assert study_files.find("table1", root).file == PACKAGED / "table1.yaml"
    assert study_files.find(str(folder / "a.yaml"), root) == study_files.StudyPath(
        "a", folder / "a.yaml"
    )
    for name, told in (
        ("tabel2", r"study 'tabel2': unknown; did you mean 'table2'\?"),
        ("zzzzzz", r"study 'zzzzzz': unknown; there are table2, mine/x, "),
        ("no/such.yaml", r"study no/such\.yaml: not found; give a study file"),
    ):
        with pytest.raises(NeftError, match=told):
            study_files.find(name, root)


LACKING = {"table1": {("nli-en", "lora")}, "table4": {("en-zh-other", "lora")}}
"""What small studies don't train for the comparison alone, as docs/studies.md says."""


def lacking(found) -> set[tuple[str, str]]:
    """Tasks on which a part shows scores, with full and LoRA where none is trained on them."""
    trained = set()
    for part in found.study.parts:
        if SECOND.get(part.show) == "differences":
            tasks = getattr(part, "trained", None) or getattr(part, "tasks", None) or part.task
            trained |= {tasks} if isinstance(tasks, str) else set(tasks)
    there = {(run.task, run.method.name) for run in found.runs.values()}
    return set(itertools.product(trained, ("full", "lora"))) - there


@pytest.mark.parametrize("name", STUDIES)
def test_packaged_studies_are_valid(name, tmp_path):
    found = parse_params(expand(STUDIES[name], tmp_path).data, name)
    assert found.study.title
    assert found.study.rates, "how learning rates were chosen"
    if name == "cost":
        assert found.jobs == 1, "seconds are told"
    if not name.startswith("tatoeba/"):
        assert lacking(found) == LACKING.get(name, set()), "what scores are compared with"
    if not name.startswith(("paper/", "tatoeba/")):
        assert all(len(run.seeds) == 3 for run in found.runs.values()) or name == "rates"


def test_small_studies_train_about_a_hundred_runs_and_what_they_compare_with_is_among_them(
    tmp_path,
):
    """A training is a run with all its seeds; what several studies ask for is made once."""
    made = {}
    for name in (name for name in STUDIES if "/" not in name):
        found = parse_params(expand(STUDIES[name], tmp_path).data, name)
        for run, entry in found.runs.items():
            of = [found.model, found.compute, found.training, found.tasks[entry.task], entry]
            scores = found.scored(run)
            of += [found.scoring, *(found.scorer(n) for n in scores)] if scores else []
            of += [found.warmed(n) for n in scores if n in found.tasks or n in found.warmups]
            of += [s[n] for s in (found.scores, found.activations) for n in scores if n in s]
            made.setdefault((run, repr(of)), []).append(name)
    said = (PACKAGE.parent / "docs" / "studies.md").read_text(encoding="utf-8")
    assert f"{len(made)} trainings" in said
    assert len(made) <= 100
    together = {run: studies for (run, _), studies in made.items()}
    for run, study in (("full-en-zh", "fig4"), ("full-en-zh", "sensitivity"), *(
        (f"full-{pair}", "table6") for pair in ("en-zh", "fr-zh", "hi-zh")), *(
        ("lora-9-en-zh", name) for name in ("fig4", "sensitivity", "table4"))):  # fmt: skip
        assert {study, "table2"} <= set(together[run])
    assert all({"fig4", "table6"} <= set(together[f"lora-{rank}-en-zh"]) for rank in (3, 6))


def test_wins_that_the_note_on_the_papers_numbers_tells_are_those_of_its_table():
    study = expand(PACKAGED / "paper" / "table6.yaml", PACKAGED).data["study"]
    wins = next(part for part in study["parts"] if part["show"] == "wins")
    label = {method: key for key, method in study["parts"][0]["rows"].items()}
    neft, lora = ([label[name] for name in names] for names in wins["series"].values())
    trained, tested = (dict.fromkeys(wins[key], 0) for key in ("trained", "tested"))
    for part, (one, other) in itertools.product(study["parts"][:3], zip(neft, lora, strict=True)):
        for task in tested:
            better = part["paper"][one][task] > part["paper"][other][task]
            trained[part["trained"]] += better
            tested[task] += better
    assert trained == {"en-zh": 9, "fr-zh": 12, "hi-zh": 2}
    assert tested == {"en-zh": 7, "fr-zh": 8, "hi-zh": 8}
    said = "9 times of 12 trained on En→Zh, 12 of 12 on Fr→Zh, 2 of 12 on Hi→Zh; tested on these 7"
    assert said in wins["notes"][0]


@pytest.mark.parametrize("name", STUDIES)
def test_a_dry_run_needs_no_model_no_data_and_no_network(name, neft, tmp_path):
    ws = Workspace(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    ws.params_file.write_text(TINY_PARAMS)
    assert neft(ws, "study", name, "--dry-run") == (0, [])
    assert not (tmp_path / ".neft").exists()


@pytest.mark.parametrize("name", [n for n in STUDIES if not n.startswith("tatoeba/")])
def test_the_lowest_dev_loss_is_one_of_several(name, tmp_path):
    """Two evaluations of every run at least, three at the paper's scale, where epochs are three."""
    found = parse_params(expand(STUDIES[name], tmp_path).data, name)
    every = found.training.evaluate_every
    for run in found.runs.values():
        rows = found.tasks[run.task].source.train or 392_702  # of XNLI
        epoch = math.ceil(rows / found.training.batch_size)
        steps = math.ceil(epoch * (run.epochs or found.training.epochs))
        assert math.ceil(steps / (every or epoch)) >= (3 if name.startswith("paper/") else 2)


def test_the_papers_table_2_trains_one_selection_at_every_size(tmp_path):
    """Section 5.2: "across various data scales, we fine-tune the same subset of neurons"."""
    found = parse_params(expand(STUDIES["paper/table2"], tmp_path).data, "table2")
    (shown,) = found.study.parts
    for task in shown.tasks:
        (run,) = shown.runs("NeFT_9%", task, found.runs)
        assert found.scored(run) == [task.removesuffix("-100k")]
        assert found.runs[run].task == task


def test_the_papers_table_3_warms_up_on_summaries_for_one_epoch(tmp_path):
    """A hundred rows for a few dozen steps, in batches of 3; the union takes translation's too."""
    found = parse_params(expand(STUDIES["paper/table3"], tmp_path).data, "table3")
    (shown,) = found.study.parts
    for task in shown.tasks:
        (other, warmup) = found.warmed(f"{task}-epoch")
        assert (other, warmup.batch_size) == (task, 3)
        assert warmup.steps == math.ceil(found.tasks[task].source.train / 3)
        for label, scores in (
            ("NeFT_9%", [f"{task}-epoch"]),
            ("NeFT_12%", [f"{task}-epoch"]),
            ("NeFT_9%Union", [f"{task}-epoch", task.removeprefix("sum-")]),
        ):
            (run,) = shown.runs(label, task, found.runs)
            assert found.scored(run) == scores


@pytest.mark.parametrize("name", ["table1", "paper/table1"])
def test_a_run_in_english_is_asked_for_its_own_labels_in_other_languages(name, tmp_path):
    found = parse_params(expand(STUDIES[name], tmp_path).data, name)
    assert {found.tasks[entry.task].format.language for entry in found.transfers.values()} == {
        "French", "German"
    }  # fmt: skip
    for entry in found.transfers.values():
        assert form(found, entry.task).label_texts == {label: label for label in LABELS}


def test_failures_are_written_into_the_params(folder):
    data = expand(folder / "a.yaml", folder).data
    ws = Workspace(folder)
    ws.params_file.write_text(yaml_text(data))
    study_files.note_failures(ws, {"train@full-en-fr": "a:\n  b", "summary": "x @ # : y"})
    assert ws.params().study.failed == {"train@full-en-fr": "a: b", "summary": "x @ # : y"}
    assert read_yaml(ws.params_file)["runs"] == data["runs"]
