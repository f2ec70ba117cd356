import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neft_core.errors import NeftError
from neft_core.graph import Graph, _translated
from neft_core.lockfile import entry_key, locked
from neft_core.preview import outdated
from neft_core.repro import StageFailed, reproduce
from neft_core.workspace import Workspace, init_dvc

PIPELINE = """
stages:
  last:
    cmd: sh last.sh
    deps: [work/part, last.sh]
    params: [size, nested.lr]
    outs: [work/last]
  part:
    foreach: [b, a]
    do:
      cmd: sh part.sh ${item}
      deps: [input, part.sh]
      outs: ["work/part/${item}"]
"""
PART = """
mkdir -p work/part/$1
echo part $1
echo once >> log-$1
cat input > work/part/$1/copy
echo $1 > work/part/$1/name
"""
LAST = "cat work/part/*/* > work/last\n"


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new workspace and one whose stages are all made."""
    folder = tmp_path_factory.mktemp("templates")
    root = folder / "new"
    root.mkdir()
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "params.yaml").write_text("size: 3\nnested: {lr: 1e-3, other: 0.00002}\n")
    (root / "input").write_text("some rows\n")
    (root / "part.sh").write_text(PART)
    (root / "last.sh").write_text(LAST)
    init_dvc(root)
    shutil.copytree(root, folder / "made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(folder / "site"))
        make(Workspace(folder / "made"), *ALL)
    return folder


@pytest.fixture
def ws(templates: Path, tmp_path: Path) -> Workspace:
    return Workspace(Path(shutil.copytree(templates / "new", tmp_path / "ws")))


@pytest.fixture
def made(templates: Path, tmp_path: Path) -> Workspace:
    return Workspace(Path(shutil.copytree(templates / "made", tmp_path / "made")))


def make(ws: Workspace, *names: str) -> tuple[list[str], list[str]]:
    graph, told = Graph(ws), list[str]()
    return [reproduce(graph, name, told.append) for name in names], told


ALL = ("part@b", "part@a", "last")


def test_order_and_edges(ws: Workspace) -> None:
    stages = Graph(ws).stages
    assert [(s.name, s.family, s.item, s.upstream) for s in stages] == [
        ("part@b", "part", "b", ()),
        ("part@a", "part", "a", ()),
        ("last", "last", None, ("part@a", "part@b")),
    ]


def test_what_other_params_would_make_stale(made: Workspace) -> None:
    graph, now = Graph(made), {"size": 3, "nested": {"lr": 1e-3, "other": 5}}
    assert outdated(graph) == outdated(graph, now) == {}
    assert outdated(graph, now | {"size": 4}) == {"last": "params.yaml: size: modified"}
    assert outdated(graph, {"size": 3}) == {"last": "params.yaml: nested.lr: modified"}
    (made.root / "params.yaml").write_text("size: 9\nnested: {lr: 1e-3}\n")
    (made.root / "input").write_text("other rows\n")
    graph.refresh()
    assert outdated(graph)["last"] == "params.yaml: size: modified"
    assert outdated(graph, now)["last"] == "part@a runs", "set back, but the rows changed"


def test_freshness(ws: Workspace) -> None:
    assert all(Graph(ws).changes(name).inputs == ("made for the first time",) for name in ALL)
    assert make(ws, *ALL) == (["ran"] * 3, ["part b", "part a"])
    graph = Graph(ws)
    assert not any(graph.changes(name) for name in ALL)
    assert make(ws, "part@a") == (["unchanged"], [])

    (ws.root / "params.yaml").write_text("size: 4\nnested: {lr: 1e-3, other: 7}\n")
    graph.refresh()
    assert graph.changes("last").inputs == ("params.yaml: size: modified",)
    assert not graph.changes("part@a")
    assert graph.intact("last")

    (ws.root / "input").write_text("other rows\n")
    graph.refresh()
    assert graph.changes("part@a").inputs == ("input: modified",)
    assert make(ws, *ALL)[0] == ["ran"] * 3

    (ws.root / "input").write_text("some rows\n")
    assert make(ws, "part@a") == (["restored"], [])
    assert (ws.root / "work/part/a/copy").read_text() == "some rows\n"


def test_files_are_parsed_once_for_many_looks(
    made: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hundred runs else most of a core goes into it while they train."""
    from dvc.utils.serialize import _yaml

    parse, parsed = _yaml.parse_yaml, []
    for name in ("params.yaml", "dvc.lock"):
        os.utime(made.root / name, (1, 1))
    graph = Graph(made)
    monkeypatch.setattr(
        _yaml, "parse_yaml", lambda text, path: parsed.append(path) or parse(text, path)
    )
    origin = graph.origin()
    for _ in range(5):
        assert not graph.changes("last")
        assert graph.origin() == origin
    assert len(parsed) <= 1
    (made.root / "params.yaml").write_text("size: 4\nnested: {lr: 1e-3, other: 7}\n")
    assert graph.changes("last").inputs == ("params.yaml: size: modified",)
    assert graph.origin() != origin


def test_a_key_is_the_same_before_and_after(ws: Workspace) -> None:
    make(ws, "part@a", "part@b")
    graph = Graph(ws)
    before = graph.key("last")
    assert before != graph.key("part@a") != graph.key("part@b")
    origin = graph.origin()
    make(ws, "last")
    after = locked(ws)["last"]
    assert entry_key(after) == before == Graph(ws).key("last")
    assert after["params"] == {"size": 3, "nested.lr": 1e-3}
    assert Graph(ws).origin() == origin
    (ws.root / "input").write_text("x")
    assert Graph(ws).key("part@a") != graph.key("last")
    assert Graph(ws).origin() != origin


@pytest.mark.parametrize("harm", ["delete", "truncate", "same size", "delete directory"])
def test_lost_outputs_are_restored(made: Workspace, harm: str) -> None:
    target = made.root / "work/part/a/copy"
    if harm == "delete":
        target.unlink()
    elif harm == "delete directory":
        shutil.rmtree(target.parent)
    else:
        target.write_text("some r" if harm == "truncate" else "SOME ROWS\n")
    graph = Graph(made)
    assert not graph.intact("part@a")
    assert graph.changes("last").inputs
    word = "missing" if harm == "delete directory" else "modified"
    assert make(made, "part@a") == (
        ["restored"],
        [f"work/part/a: {word}; restored from the DVC cache"],
    )
    assert target.read_text() == "some rows\n"
    assert not Graph(made).changes("last")
    assert (made.root / "log-a").read_text() == "once\n"


@pytest.mark.parametrize("harm", ["truncate", "same size", "delete"])
def test_lost_outputs_are_made_again_where_the_cache_is_damaged_too(
    made: Workspace, harm: str
) -> None:
    good = (made.root / "work/part/a/copy").read_bytes()
    objects = [p for p in (made.root / ".dvc/cache/files").rglob("*") if p.is_file()]
    (same,) = [p for p in objects if p.read_bytes() == good]
    mode = same.stat().st_mode
    same.chmod(0o644)
    if harm == "delete":
        same.unlink()
    else:
        same.write_bytes(good[:3] if harm == "truncate" else good.upper())
        same.chmod(mode)
    shutil.rmtree(made.root / "work/part/a")
    outcomes, _ = make(made, "part@a")
    assert outcomes == ["ran"]
    assert (made.root / "work/part/a/copy").read_bytes() == good
    assert (made.root / "log-a").read_text() == "once\nonce\n"
    assert not Graph(made).changes("part@a")
    assert make(made, "last")[0] == ["unchanged"]


@pytest.mark.parametrize("end", [-4, 1, 12])
def test_a_half_written_lock_file_loses_nothing(made: Workspace, end: int) -> None:
    lock = made.root / "dvc.lock"
    whole = lock.read_bytes()
    lock.write_bytes(whole[: whole.index(b"md5", 300) + end])
    (made.root / ".dvc/tmp/rwlock").write_text('{"read"')
    graph = Graph(made)
    found = [lock, made.root / ".dvc/tmp/rwlock"]
    assert [note.split("; ")[0] for note in graph.notes] == [f"{file}: damaged" for file in found]
    assert "ran" not in [reproduce(graph, name, print) for name in ALL]
    assert len(locked(made)) == 3
    assert (made.root / "log-a").read_text() == "once\n"


@pytest.mark.parametrize("content", ['{"neft": {"sco', "[]", ""])
def test_damaged_params_that_a_stage_made_are_made_again(made: Workspace, content: str) -> None:
    file = made.root / "work/assigned.json"
    file.write_text("{}")
    assert Graph(made).notes == []
    file.write_text(content)
    assert Graph(made).notes == [f"{file}: damaged; deleted"]
    assert not file.exists()


@pytest.mark.parametrize(
    ("script", "kind", "text"),
    [
        ("echo 10 of 20; echo 'data/x.jsonl: line 7: no target; add one' >&2; exit 2",
         NeftError, "data/x.jsonl: line 7: no target; add one"),
        ("echo Traceback >&2; echo 'ValueError: odd' >&2; exit 1",
         StageFailed, "stage 'last': ValueError: odd"),
        ("exit 1", StageFailed, "stage 'last': ended with status 1 without a word"),
        ("kill -9 $$", StageFailed,
         "stage 'last': killed by SIGKILL, as when memory runs out; run again"),
        ("exit 139", StageFailed, "stage 'last': killed by SIGSEGV; run again"),
        ("true", StageFailed, "stage 'last': output 'work/last' does not exist"),
        ("echo 'OSError: [Errno 28] No space left on device' >&2; exit 1",
         NeftError, "no space left on device in stage 'last'; free some and run again"),
        ("echo 'sqlite3.OperationalError: database or disk is full' >&2; exit 1",
         NeftError, "no space left on device in stage 'last'; free some and run again"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure(
    made: Workspace, script: str, kind: type[Exception], text: str
) -> None:
    (made.root / "last.sh").write_text(script + "\n")
    with pytest.raises(kind) as fault:
        make(made, "last")
    assert str(fault.value).endswith(text)
    assert "\n" not in str(fault.value)


def test_a_disk_too_full_for_dvcs_own_database(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute("PRAGMA max_page_count = 1")
        with (
            pytest.raises(NeftError, match="no space left for DVC; free some and run again"),
            _translated(tmp_path),
        ):
            database.execute("CREATE TABLE more (x)")


def test_a_stage_that_another_dvc_process_works_on(made: Workspace) -> None:
    (made.root / "last.sh").write_text("touch began; sleep 60\n")
    began = made.root / "began"
    dvc = [sys.executable, "-m", "dvc", "repro", "-s", "last"]
    with subprocess.Popen(dvc, cwd=made.root, start_new_session=True) as other:
        try:
            while not began.exists():
                assert other.poll() is None
                time.sleep(0.05)
            with pytest.raises(NeftError) as fault:
                make(made, "last")
        finally:
            os.killpg(other.pid, signal.SIGKILL)
    assert str(fault.value) == (
        f"stage 'last': another DVC process ({other.pid}) is at work on it; "
        "wait for it, or stop it first"
    )


def test_a_missing_input_is_named(ws: Workspace) -> None:
    (ws.root / "input").unlink()
    with pytest.raises(NeftError, match=r"^input: not found; stage 'part@a' reads it"):
        make(ws, "part@a")


def test_a_missing_param_is_the_users_mistake(made: Workspace) -> None:
    (made.root / "params.yaml").write_text("size: 3\n")
    with pytest.raises(
        NeftError, match=r"stage 'last': Parameters 'nested\.lr' are missing"
    ) as fault:
        make(made, "last")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("dvc.yaml", "stages: {a: {cmd: x, outs: ['${nope}']}}", "dvc.yaml: .*nope"),
        ("dvc.yaml", "stages: [", "dvc.yaml: .*YAML"),
        ("params.yaml", "a: [", "params.yaml"),
    ],
)
def test_broken_definitions(ws: Workspace, file: str, text: str, found: str) -> None:
    (ws.root / file).write_text(text)
    with pytest.raises(NeftError, match=found) as fault:
        make(ws, "part@a")
    assert "\n" not in str(fault.value)


def test_a_place_without_dvc(tmp_path: Path) -> None:
    with pytest.raises(NeftError, match="no DVC repository; run 'neft init"):
        Graph(Workspace(tmp_path))


def test_stages_find_the_commands_beside_this_interpreter_and_their_owner(made: Workspace) -> None:
    (made.root / "last.sh").write_text("command -v dvc; echo $NEFT_OWNER_PID; echo > work/last\n")

    told = make(made, "last")[1]
    assert told == [str(Path(sys.executable).parent / "dvc"), str(os.getpid())]
