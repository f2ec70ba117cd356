"""`neft study` with what nobody should give it: one line each, exit status 2, nothing lost."""

import resource

import pytest
from conftest import TINY_PARAMS
from test_study_files import COMMON, STUDY

from neft_core import report, study_command
from neft_core.config import parse_params, read_yaml
from neft_core.errors import NeftError
from neft_core.workspace import REPORTS, Workspace, hold


@pytest.fixture
def ws(tmp_path):
    """A workspace with a study, which nothing has run yet."""
    made = Workspace(tmp_path / "ws")
    (made.root / "studies").mkdir(parents=True)
    made.params_file.write_text(TINY_PARAMS)
    (made.root / "dvc.yaml").touch()
    (made.root / "studies" / "common.yaml").write_text(COMMON)
    (made.root / "studies" / "a.yaml").write_text(STUDY)
    return made


def one_line(outcome) -> str:
    code, lines = outcome
    assert code == 2, lines
    assert len(lines) == 1, lines
    return lines[0].removeprefix("neft: ")


TABLE = "- {show: table, tasks: {en-fr: En→Fr}, rows: {Base: base, FT-full: full, NeFT: neft-9}}"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (STUDY, "", "W/studies/a.yaml: holds no mapping; see the README for its sections"),
        (STUDY, "- a\n- b\n", "W/studies/a.yaml: holds no mapping; see"),
        ("study:\n", "tasks: null\nstudy:\n", "a.yaml: grid.0.tasks: got 'en-fr'; known: none"),
        ("study:\n", "model: 3\nstudy:\n", "a.yaml: model: got 3; a mapping of keys is needed"),
        ("study:\n", "model: [1]\nstudy:\n", "a.yaml: model: got [1]; a mapping of keys"),
        ("study:\n", "transfers: 3\nstudy:\n",
         "a.yaml: transfers: got no mapping; give transfers by name"),
        ("study:\n", "null: 3\nstudy:\n", "W/studies/a.yaml: None is no text; names of sections"),
        ("study:\n  title: A table\n  parts:\n    " + TABLE, "study:",
         "a.yaml: study: missing; it is required of a study"),
        ("FT-full: full", "FT-full: 3",
         "a.yaml: study.parts.0.rows.FT-full: got 3; text or a list is needed"),
        ("FT-full: full", "FT-full: []",
         "a.yaml: study.parts.0.rows.FT-full: got []; at least 1 of them"),
        ("FT-full: full", "FT-full: [full, 3]",
         "a.yaml: study.parts.0.rows.FT-full.1: got 3; text is needed"),
        ("FT-full: full", "FT-full: [base, full]",
         "a.yaml: study.parts.0.rows.FT-full: got 'base'; known: full, neft-9"),
        ("{en-fr: En→Fr}", "{en-fr: 3}",
         "a.yaml: study.parts.0.tasks.en-fr: got 3; text is needed"),
        ("{en-fr: En→Fr}", "{en-fr: method}",
         "a.yaml: study.parts.0.tasks: got the heading 'method', of a column that is there;"),
        ("rows:", "metrics: [bleu, bleu], rows:",
         "a.yaml: study.parts.0.metrics: got bleu, bleu; each column once"),
        (TABLE, TABLE.replace("rows:", "name: x, rows:") + "\n    "
         + TABLE.replace("rows:", "name: x, rows:"),
         "a.yaml: study.parts: two would write files named 'x'; give each its own name"),
        (TABLE, TABLE.replace("rows:", "name: table-2, rows:") + "\n    " + TABLE,
         "a.yaml: study.parts: two would write files named 'table-2'; give"),
        (TABLE, TABLE + "\n    - {show: rates, task: en-fr, name: table-differences}",
         "a.yaml: study.parts: two would write files named 'table-differences'; give"),
    ],
)  # fmt: skip
def test_what_a_file_can_not_say(ws, neft, old, new, told):
    assert old in STUDY
    (ws.root / "studies" / "a.yaml").write_text(STUDY.replace(old, new, 1))
    line = one_line(neft(ws, "study", "a"))
    assert line.replace(str(ws.root), "W").startswith(told), line
    assert not (ws.root / ".neft").exists(), "nothing was begun"


def test_a_name_is_told_to_be_unknown_where_a_folder_or_a_dot_is_meant(ws, neft):
    (ws.root / "studies" / "b.yaml").mkdir()
    for name in ("b", "studies", "..", ""):
        assert one_line(neft(ws, "study", name)).startswith(f"study '{name}': unknown; there are a")


@pytest.mark.parametrize("content", [b"\x00\xff\xfe", b"- 1\n", b"a: [\n"])
def test_a_file_that_can_not_be_read_hides_no_other_study(ws, neft, capsys, content):
    (ws.root / "studies" / "broken.yaml").write_bytes(content)
    from neft_core import cli

    assert neft(ws, "study") == (0, [])
    assert cli.main(["study"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["a", "A", "table"] for line in listed)
    assert [line for line in listed if line.split()[:4] == ["broken", "can't", "be", "read:"]]
    assert "studies/broken.yaml: " in one_line(neft(ws, "study", "broken"))
    assert "studies/broken.yaml: " in one_line(neft(ws, "study", "all")), "before any is run"


@pytest.mark.parametrize("name", ["..yaml", "...yaml", "..x.yaml"])
def test_a_study_stays_in_its_own_folder(ws, neft, name):
    (ws.root / "studies" / name).write_text(STUDY)
    line = one_line(neft(ws, "study", f"studies/{name}"))
    assert "its workspace would be called '.'" in line.replace("..x", ".").replace("'..'", "'.'")
    assert not (ws.root / ".neft").exists()


def test_a_study_that_another_process_is_at(ws, neft):
    own = Workspace(ws.root / ".neft" / "workspaces" / "a")
    with hold(own.state("lock"), "other"):
        line = one_line(neft(ws, "study", "a"))
    assert line.startswith(f"{own.root}: process ")
    assert line.endswith(" is at work on it; wait for it, or stop it first")
    assert not own.params_file.exists()


def test_a_workspace_that_can_not_be_written(ws, neft):
    (ws.root / ".neft").write_text("a file in the folder's place")
    line = one_line(neft(ws, "study", "a"))
    assert line.startswith(f"{ws.root}/.neft/workspaces/a/.neft/lock: ")
    assert line.endswith("; use a workspace that you can write")


def test_tables_are_whole_or_the_ones_of_before(copied):
    """As on a disk that is full, at every place where the report writes."""
    part = {"show": "table", "tasks": ["en-fr"], "rows": {"FT": "full"}, "notes": ["n" * 3000]}
    data = read_yaml(copied.params_file) | {"study": {"title": "T", "parts": [part]}}
    parse_params(data, "params.yaml")
    from neft_core.config import yaml_text

    copied.params_file.write_text(yaml_text(data))
    report.report(copied)
    folder = copied.root / REPORTS
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert folder / "study" / "study.md" in before
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 2500):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(NeftError, match="can't be written"):
                report.report(copied)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["figures", "study", "report.html", "a"])
def test_a_study_takes_no_place_of_the_hosts_own_report(tmp_path, name):
    host = Workspace(tmp_path)
    ws = Workspace(host.state("workspaces", name))
    (ws.root / REPORTS).mkdir(parents=True)
    shown = study_command._shortcut(ws)
    assert shown.resolve() == ws.root / REPORTS
    assert (host.root / REPORTS / name).is_symlink() == (shown.parent != ws.root) == (name == "a")
