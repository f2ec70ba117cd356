"""`--set` and `--params`: what is changed, and that a refusal changes nothing."""

import json
import re
from pathlib import Path

import pytest
from conftest import TINY_PARAMS

from neft_core import overrides, study_files
from neft_core.config import load_params, read_yaml
from neft_core.errors import NeftError
from neft_core.workspace import Workspace, cache_of, init_workspace

TEXT = f"# Ours.\n{TINY_PARAMS}# The end.\n".replace(
    "  full:\n", "\n  # The reference.\n  full:  # all of it\n"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return init_workspace(tmp_path_factory.mktemp("overrides"), TEXT)


@pytest.fixture
def ws(made, monkeypatch):
    made.params_file.write_text(TEXT)
    monkeypatch.chdir(made.root)
    return made


def lines(text: str) -> set[str]:
    return set(text.splitlines())


def test_set_changes_one_line_and_keeps_comments(ws, capsys):
    assert overrides.apply(None, ["runs.full.lr=2e-3", "warmup.steps=7"]) == ws
    text = ws.params_file.read_text()
    assert [line for line in TEXT.splitlines() if "#" in line] == [
        line for line in text.splitlines() if "#" in line
    ]
    params = ws.params()
    assert (params.runs["full"].lr, params.warmup.steps) == (2e-3, 7)
    assert len(lines(text) ^ lines(TEXT)) == 3  # a new line, and one that is another now
    assert capsys.readouterr().out.splitlines() == [
        "params.yaml: runs.full.lr: unset is now 0.002",
        "params.yaml: warmup.steps: 6 is now 7",
    ]


def test_a_whole_run_can_be_set(ws):
    overrides.apply(None, ["runs.more={task: en-fr, method: {name: embed}, seeds: [3]}"])
    assert ws.params().runs["more"].seeds == [3]
    assert list(ws.params().runs) == ["full", "lora", "neft", "more"]


SHARED = (
    TEXT[: TEXT.index("runs:")]
    + """\
runs:
  low: &low  # the first
    task: en-fr
    method: &method {name: neft, percent: 9}  # in percent
    lr: 1e-3  # of both

  # Others.
  slow:
    <<: *low  # as above
    lr: 1e-4
  same: *low
  other:
    task: en-fr
    method: *method
evaluation: {batch_size: 4, max_new_tokens: 6, bootstrap: 100}
# The end.
"""
)
"""Runs that share what they have by YAML's aliases and merge keys."""


@pytest.mark.parametrize("run", ["low", "slow", "same", "other"])
@pytest.mark.parametrize("key", ["method.percent=3", "lr=5e-3"])
def test_what_other_places_refer_to_is_changed_in_one(ws, run, key):
    ws.params_file.write_text(SHARED)
    wanted = ws.params().model_dump()
    name, value = key.split("=")
    entry = wanted["runs"][run]
    (entry if name == "lr" else entry["method"])[name.split(".")[-1]] = float(value)
    overrides.apply(None, [f"runs.{run}.{key}"])
    assert ws.params().model_dump() == wanted
    written = ws.params_file.read_text().splitlines()
    assert {line.partition("#")[2] for line in written} == {
        line.partition("#")[2] for line in SHARED.splitlines()
    }
    for other in ("low", "slow", "same", "other"):  # what was written can be changed again
        overrides.apply(None, [f"runs.{other}.method.percent=4", f"runs.{other}.seeds=[7]"])
        wanted["runs"][other]["method"]["percent"] = 4
        wanted["runs"][other]["seeds"] = [7]
        assert ws.params().model_dump() == wanted


def test_what_would_be_read_as_something_else_is_refused(ws):
    """ruamel.yaml writes the anchor of a mapping of one key in a list before that key."""
    text = SHARED.replace("runs:\n", "runs:\n  one: &one {task: en-fr}\n")
    text = text.replace("*low  # as", "[*low, *one]  # as").replace(
        "  same:", "  two: *one\n  same:"
    )
    ws.params_file.write_text(text)
    with pytest.raises(NeftError, match=r"^--set runs\.one\.lr=1: can't be written into"):
        overrides.apply(None, ["runs.one.lr=1"])
    assert ws.params_file.read_text() == text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("compute.threads=true", "compute.threads: got true; a whole number is needed"),
        ("compute.threads=1.0", "compute.threads: got 1.0; a whole number is needed"),
        ("runs.neft.seeds=[true, 2]", "runs.neft.seeds.0: got true; a whole number is needed"),
    ],
)
def test_what_python_takes_for_equal_is_another_value(ws, setting, message):
    with pytest.raises(NeftError, match=f"^params.yaml: {re.escape(message)}$"):
        overrides.apply(None, [setting])


TEXTS = ["team:a", "team: a", "12:30:00", "/mnt/a:b", "why?", "a?", "? a", "x ?y", "a\x85b",
         "- a", "-", " a ", "---", "yes", "012", "1_000", "1e3", "~", "a b.c/d_e-f", "é",
         "a\nb", "'", '"', "\\", "#", "a #b", "&a", "*a", "!x", "[x", "a,b", "{", "%", "@", "`",
         "|", ">", "<<", "=", "\u2028", "\ufeffx", "2024-01-01"]  # fmt: skip


@pytest.mark.parametrize("value", TEXTS)
def test_a_text_is_read_as_it_was_set(ws, value):
    """Between braces YAML 1.1, which DVC reads, has some in quotes alone."""
    overrides.apply(None, [f"tracking.experiment={json.dumps(value)}"])
    assert read_yaml(ws.params_file)["tracking"]["experiment"] == value


def test_a_list_of_texts_is_read_as_it_was_set(ws):
    overrides.apply(None, ["scoring={layout: patterns, rows: ['x:y', 'layers.?.up']}"])
    assert read_yaml(ws.params_file)["scoring"]["rows"] == ["x:y", "layers.?.up"]


def test_common_texts_stay_plain(ws):
    overrides.apply(None, ["tracking.experiment='data/my runs-2.x'"])
    assert "tracking: {experiment: data/my runs-2.x}\n" in ws.params_file.read_text()


def test_the_same_value_again_writes_nothing(ws, capsys):
    before = ws.params_file.stat().st_mtime_ns
    overrides.apply(None, ["warmup.steps=6"])
    assert ws.params_file.stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("warmup.steps=0", "params.yaml: warmup.steps: got 0; at least 1"),
        ("warmup.stepz=3", "params.yaml: warmup.stepz: unknown key; did you mean 'steps'?"),
        ("warmup.steps=yes please", "params.yaml: warmup.steps: got 'yes please'; a whole number"),
        ("warmup.steps", "--set warmup.steps: got no value; write --set key.path=value"),
        ("=3", "--set =3: got no value; write --set key.path=value"),
        ("warmup.steps={", "--set warmup.steps={: the value is no YAML; quote it"),
        ("warmup.steps=2024-13-45", "--set warmup.steps=2024-13-45: the value is no YAML; quote"),
        ("runs.nefft.lr=1", "--set runs.nefft.lr=1: no 'nefft' there; known: full, lora, neft"),
        ("warmup.steps.a=1", "--set warmup.steps.a=1: warmup.steps holds no keys"),
        ("warmup.steps.a.b=1", "--set warmup.steps.a.b=1: no 'a' there; known: no keys"),
        ("tasks.en-fr.format.prompt='{sorce}'",
         "params.yaml: tasks.en-fr.format.prompt: unknown placeholder {sorce}; "),
        ("tasks.en-fr.format.prompt=Translate!",
         "params.yaml: tasks.en-fr.format.prompt: {source} stands 0 times; once is needed"),
    ],
)  # fmt: skip
def test_a_refusal_leaves_the_file_as_it_was(ws, setting, message):
    for act in (overrides.apply, overrides.preview):
        with pytest.raises(NeftError) as fault:
            act(None, ["training.epochs=9", setting])
        assert str(fault.value).startswith(message)
        assert "\n" not in str(fault.value)
        assert ws.params_file.read_text() == TEXT


def test_a_preview_writes_nothing(ws):
    found = overrides.preview(None, ["warmup.steps=7"])
    assert (found.params.warmup.steps, found.data["warmup"]["steps"]) == (7, 7)
    assert (found.workspace, found.changed) == (ws, True)
    assert not overrides.preview(None, []).changed
    assert ws.params_file.read_text() == TEXT


def test_a_params_file_that_is_no_text(ws):
    ws.params_file.write_bytes(b"a: \xff\n")
    for settings in ([], ["a=1"]):
        with pytest.raises(NeftError, match=r"params\.yaml: not UTF-8 text; mend the YAML"):
            overrides.apply(None, settings)


def test_another_file_runs_in_a_workspace_of_its_own(ws, tmp_path):
    (tmp_path / "ds").mkdir()
    file = tmp_path / "other.yaml"
    file.write_text(TEXT.replace("experiment: tiny", "experiment: mine"))
    own = overrides.apply(file, ["warmup.steps=8"])
    assert own == Workspace(ws.root / ".neft" / "workspaces" / "other")
    source = own.params().tasks["en-fr"].source
    assert source.path == str(tmp_path / "data" / "pairs"), "paths keep their meaning"
    assert own.params().model.path == "data/none"
    assert (own.params().warmup.steps, own.params().tracking.experiment) == (8, "mine")
    assert "# all of it" in own.params_file.read_text()
    assert f"dir = {ws.root}" in (own.root / ".dvc" / "config.local").read_text()
    assert ws.params_file.read_text() == TEXT
    assert file.read_text() == TEXT.replace("experiment: tiny", "experiment: mine")
    moved = overrides.apply(file, ["tasks.en-fr.source.path=data/more"]).params()
    assert moved.tasks["en-fr"].source.path == str(ws.root / "data" / "more")
    # Again with another text: the file is what counts, not what was set last time.
    assert overrides.apply(file, []).params().warmup.steps == 6


def test_files_of_the_same_name_have_a_workspace_each(ws, tmp_path):
    owns = []
    for steps in (7, 8, 7):
        folder = tmp_path / str(steps)
        folder.mkdir(exist_ok=True)
        (folder / "same.yaml").write_text(TEXT.replace("steps: 6", f"steps: {steps}"))
        owns.append(overrides.apply(folder / "same.yaml", []))
    assert owns[0] == owns[2] == Workspace(ws.root / ".neft" / "workspaces" / "same")
    assert owns[1].root.parent == owns[0].root.parent
    assert owns[1].root.name.startswith("same-")
    assert [own.params().warmup.steps for own in owns] == [7, 8, 7]


def test_directories_in_the_hubs_layout_keep_their_meaning(ws, tmp_path):
    (tmp_path / "ds").mkdir()
    source = "kind: hub\n      path: ds\n      id: {}\n      splits: {{train: train}}\n"
    local = TEXT[TEXT.index("kind: local") : TEXT.index("      dev: 6")]
    text = TEXT.replace("kind: built", "kind: local").replace("path: data/none", "path: base")
    start = text.index("  vocabulary")
    text = text[:start] + text[text.index("tasks:") :]
    for name, wanted in (("ds", str(tmp_path / "ds")), ("owner/name", "owner/name")):
        file = tmp_path / "hub.yaml"
        file.write_text(text.replace(local, source.format(name)))
        params = overrides.apply(file, []).params()
        assert params.tasks["en-fr"].source.id == wanted
        assert params.tasks["en-fr"].source.path == str(tmp_path / "ds")
        assert params.model.path == str(tmp_path / "base")


def test_a_path_that_is_set_in_params_yaml_stays_as_it_is_written(ws):
    found = overrides.apply(None, ["tasks.en-fr.source.path=data/more"]).params()
    assert found.tasks["en-fr"].source.path == "data/more"


def test_a_home_that_there_is_not_stays_in_the_path(ws):
    found = overrides.variant(ws, [], ["tasks.en-fr.source.path=~nobody-here/pairs"])
    path = str(ws.root / "~nobody-here/pairs")
    assert found.params().tasks["en-fr"].source.path == path


def test_params_of_another_workspace_run_there(ws, tmp_path):
    other = init_workspace(tmp_path / "w", TEXT)
    assert overrides.apply(other.params_file, ["warmup.steps=9"]) == other
    assert other.params().warmup.steps == 9
    assert ws.params().warmup.steps == 6


def test_yaml_that_would_run_code_is_refused(ws, tmp_path):
    marker = tmp_path / "ran"
    code = f"!!python/object/apply:os.system ['touch {marker}']"
    file = tmp_path / "own.yaml"
    file.write_text(TEXT.replace("steps: 6", f"steps: {code}"))
    for act in (
        lambda: overrides.apply(None, [f"warmup.steps={code}"]),
        lambda: overrides.variant(ws, [], [f"warmup.steps={code}"]),
        lambda: overrides.apply(file, ["warmup.lr=1e-3"]),
        lambda: load_params(file),
        lambda: study_files.expand(file, ws.root, []),
    ):
        with pytest.raises(NeftError):
            act()
        assert not marker.exists()
    assert ws.params().warmup.steps == 6


def test_a_file_that_is_not_there(ws):
    with pytest.raises(NeftError, match=r"zzz\.yaml: not found"):
        overrides.apply(Path("zzz.yaml"), [])


def test_a_wrong_file_makes_no_workspace(ws, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(TEXT.replace("steps: 6", "steps: 0"))
    with pytest.raises(NeftError, match=r"wrong\.yaml: warmup\.steps: got 0; at least 1"):
        overrides.apply(file, [])
    assert not (ws.root / ".neft" / "workspaces" / "wrong").exists()


def test_a_choice_has_a_workspace_of_its_own_that_shares_the_cache(ws):
    (ws.root / "dvc.yaml").write_text((ws.root / "dvc.yaml").read_text() + "# ours\n")
    (ws.root / "dvc.lock").write_text("schema: '2.0'\n")
    files = (ws.params_file, ws.root / "dvc.yaml", ws.root / "dvc.lock")
    before = {path: path.read_bytes() for path in files}
    one = overrides.variant(ws, ["neft"], ["runs.neft.lr=2e-3"])
    other = overrides.variant(ws, ["neft"], ["runs.neft.lr=3e-3"])
    assert overrides.variant(ws, ["neft"], ["runs.neft.lr=2e-3"]) == one != other
    assert {path: path.read_bytes() for path in before} == before
    for found, lr in ((one, 2e-3), (other, 3e-3)):
        assert found.root.parent == ws.root / ".neft" / "workspaces"
        params = found.params()
        assert list(params.runs) == ["neft"]
        assert params.runs["neft"].lr == lr
        assert params.tasks["en-fr"].source.path == str(ws.root / "data/pairs")
        assert cache_of(found) == cache_of(ws) == ws.root / ".dvc" / "cache"
        assert (found.root / "dvc.yaml").read_bytes() == before[ws.root / "dvc.yaml"]
    nested = overrides.variant(one, [], ["runs.neft.lr=4e-3"])
    assert cache_of(nested) == cache_of(ws)


def test_transfers_of_runs_that_are_left_out_go_too(ws):
    rows = "{kind: local, path: data/x, splits: {train: t.jsonl}, dev: 2, test: 2}"
    form = "task: translation, source_language: English, target_language: German, max_tokens: 9"
    setting = f"tasks.de={{source: {rows}, format: {{{form}}}}}"
    moves = "transfers={a: {run: full, task: de}, b: {run: neft, task: de}}"
    found = overrides.variant(ws, ["neft"], [setting, moves])
    assert list(found.params().transfers) == ["b"]


@pytest.mark.parametrize(
    ("runs", "settings", "line"),
    [
        (["../x"], [], "runs: no run '../x' in params.yaml; there are full, lora, neft"),
        (["x"], [], "runs: no run 'x' in params.yaml; there are full, lora, neft"),
        ([], ["runs.neft.rate=1"], "overrides: runs.neft.rate: unknown key; known here"),
        ([], ["runs./../x={task: en-fr, method: {name: full}}"], "--set runs./../x="),
        ([], ["nothing"], "--set nothing: got no value; write --set key.path=value"),
    ],
)
def test_a_choice_that_can_not_be_makes_nothing(ws, runs, settings, line):
    folder = ws.state("workspaces")
    before = sorted(folder.iterdir()) if folder.exists() else []
    with pytest.raises(NeftError) as fault:
        overrides.variant(ws, runs, settings)
    assert str(fault.value).startswith(line)
    assert (sorted(folder.iterdir()) if folder.exists() else []) == before
