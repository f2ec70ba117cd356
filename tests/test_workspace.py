"""Workspaces: found, made, held by one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_PARAMS

from neft_core.errors import NeftError
from neft_core.graph import Graph
from neft_core.models import Base
from neft_core.workspace import (
    PIPELINE,
    Workspace,
    find_workspace,
    follow_git,
    hold,
    init_dvc,
    init_from,
    init_workspace,
)


def test_found_from_any_directory_below(finished):
    assert find_workspace(finished.path("train", "full")).root == finished.root


def test_a_path_below_a_home(tmp_path):
    for path, place in (
        ("a/b", tmp_path / "a/b"),
        ("~/a", Path.home() / "a"),
        ("~nobody-here/a", tmp_path / "~nobody-here/a"),
    ):
        assert Workspace(tmp_path).input(path) == place
        assert Base("local", path, "", "", "llama", 1, 1, False).directory(tmp_path) == place


def test_no_workspace(tmp_path):
    with pytest.raises(NeftError) as fault:
        find_workspace(tmp_path)
    assert str(fault.value) == (
        f"{tmp_path}: no workspace here (dvc.yaml and params.yaml); run 'neft init DIR' to make one"
    )


def test_one_process_at_a_time_and_free_after_a_kill(tmp_path):
    lock = tmp_path / "locks" / "a"
    code = (
        "import pathlib, sys, time; from neft_core.workspace import hold\n"
        "with hold(pathlib.Path(sys.argv[1]), 'a'):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    with pytest.raises(NeftError) as fault, hold(lock, "stage train-a"):
        pytest.fail("two at once")
    assert str(fault.value) == (
        f"stage train-a: process {child.pid} is at work on it; wait for it, or stop it first"
    )
    child.kill()
    child.communicate()
    with hold(lock, "a"):
        assert lock.read_text() == str(os.getpid())
    with hold(lock, "a"):
        pass


def test_init_keeps_what_is_there(tmp_path):
    folder = tmp_path / "w"
    ws = init_workspace(folder, "a: 1\n")
    assert (folder / "dvc.yaml").read_bytes() == PIPELINE.read_bytes()
    assert (folder / "data" / "none").read_bytes() == b""
    (folder / "params.yaml").write_text("b: 2\n")
    (folder / ".gitignore").write_text("x\n")
    (folder / "dvc.yaml").write_text("old\n")
    assert init_workspace(folder, "c: 3\n", cache=tmp_path / "cache") == ws
    assert (folder / "params.yaml").read_text() == "b: 2\n"
    assert (folder / ".gitignore").read_text() == "x\n"
    assert (folder / "dvc.yaml").read_bytes() == PIPELINE.read_bytes()
    config = (folder / ".dvc" / "config.local").read_text()
    assert "analytics = False" in config
    assert "check_update = false" in config.lower()
    assert f"dir = {tmp_path / 'cache'}" in config


def test_what_a_killed_process_left_is_nothing_to_dvc(tmp_path):
    from dvc.repo import Repo

    init_workspace(tmp_path, "")
    with Repo(str(tmp_path)) as repo:
        ignored = [
            name
            for name in (".neft.123", ".adapter.safetensors.7", "neft", ".gitignore", "seed.1")
            if repo.dvcignore.is_ignored_file(str(tmp_path / "work" / "train" / name))
        ]
    assert ignored == [".neft.123", ".adapter.safetensors.7"]
    assert init_workspace(tmp_path, "").root == tmp_path
    assert (tmp_path / ".dvcignore").read_text().count(".*.[0-9]*") == 1


def test_a_git_repository_made_later_is_found(tmp_path):
    ws = init_workspace(tmp_path / "w", TINY_PARAMS)
    assert not follow_git(ws.root)
    subprocess.run(["git", "init", "-q"], cwd=ws.root, check=True)
    graph = Graph(ws)
    assert graph.notes == [f"{ws.root}: a git repository now; DVC uses it from here on"]
    assert graph._repo.scm.root_dir == str(ws.root)
    assert Graph(ws).notes == []
    subprocess.run(["git", "add", "-A"], cwd=ws.root, check=True)
    command = ["git", "ls-files", ".dvc"]
    done = subprocess.run(command, cwd=ws.root, check=True, capture_output=True, text=True)
    assert sorted(done.stdout.split()) == [
        ".dvc/.gitignore", ".dvc/config", ".dvc/plots/curves.json"
    ]  # fmt: skip


def test_init_from_a_template(tmp_path):
    template = tmp_path / "t"
    template.mkdir()
    (template / "params.yaml").write_text("a: 1\n")
    (template / "README.md").write_text("how\n")
    ws = init_from(tmp_path / "w", template, None)
    assert ws.params_file.read_text() == "a: 1\n"
    assert (ws.root / "README.md").read_text() == "how\n"
    named = init_from(tmp_path / "v", template.parent / "examples" / "tatoeba-en-fr", None)
    assert named.params().model.kind == "local"
    default = init_from(tmp_path / "u", None, None)
    assert default.params().model.kind == "built"


def test_a_template_that_is_not_there(tmp_path):
    with pytest.raises(NeftError, match=r"zzz: no template \(a folder with params.yaml\); there a"):
        init_from(tmp_path / "w", tmp_path / "zzz", None)
    assert not (tmp_path / "w").exists()


def test_a_place_that_can_not_be_written(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NeftError, match="; choose a directory you can write"):
            init_workspace(place, "")


def test_a_cache_that_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    for place, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "below", "Not a directory"),
        (Path("/proc/x"), "No such file or directory"),
    ):
        with pytest.raises(NeftError, match=rf"{place}: can't hold a cache \({reason}\); give"):
            init_workspace(tmp_path / "w", "", cache=place)
    assert not (tmp_path / "w").exists()


def test_what_dvc_says_is_shown(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[[[")
    with pytest.raises(NeftError, match=r"DVC can't be set up here \(.*config"):
        init_dvc(tmp_path)
