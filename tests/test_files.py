"""Whole files or none, the same bytes for the same content, and what a full disk says."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neft_core.errors import NeftError
from neft_core.files import load_tensors, once, read_json, replacing, save_tensors, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_block_that_fails_changes_nothing(tmp_path, kind):
    target = tmp_path / "a"

    def write(text: str, then: type[Exception] | None = None) -> None:
        with replacing(target) as temporary:
            if kind == "folder":
                temporary.mkdir()
                (temporary / text).write_text(text)
            else:
                temporary.write_text(text)
            if then is not None:
                raise then

    for fault in (ValueError, KeyboardInterrupt, None):
        if fault is None:
            write("old")
        else:
            with pytest.raises(fault):
                write("old", fault)
            assert names(tmp_path) == []
    with pytest.raises(ValueError):  # noqa: PT011
        write("new", ValueError)
    assert names(tmp_path) == ["a"]
    assert (names(target) if kind == "folder" else [target.read_text()]) == ["old"]
    write("new")
    assert names(tmp_path) == ["a"]
    assert (names(target) if kind == "folder" else [target.read_text()]) == ["new"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_takes_the_place_of_a_file_and_never_the_other_way(tmp_path, linked):
    target = tmp_path / "a"
    target.write_text("file")
    with replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "work").touch()
    assert target.is_dir()
    if linked:
        target = tmp_path / "link"
        target.symlink_to("a")
    with pytest.raises(NeftError, match=r"/(a|link): a directory, which no file replaces; give an"):
        write_json(target, 1)
    assert names(target) == ["work"]
    assert names(tmp_path) == (["a", "link"] if linked else ["a"])


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".a.123").mkdir()
    (tmp_path / ".a.123" / "x").touch()
    (tmp_path / ".a.124").touch()
    (tmp_path / ".a.124-journal").touch()
    (tmp_path / ".a.b.125").touch()
    (tmp_path / ".a.2024-backup").touch()
    write_json(tmp_path / "a", 1)
    assert names(tmp_path) == [".a.2024-backup", ".a.b.125", "a"]


def test_json_is_the_same_bytes_whatever_the_order(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": "é"})
    write_json(tmp_path / "b", {"a": "é", "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_text("utf-8") == '{\n  "a": "é",\n  "b": 1\n}\n'
    assert read_json(tmp_path / "a") == {"a": "é", "b": 1}


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff"])
def test_json_that_is_damaged_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(NeftError, match=r"a\.json: missing or damaged; run 'neft run'"):
        read_json(tmp_path / "a.json")


def test_tensors_come_back_bit_by_bit_in_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 4).t(),  # not contiguous
        "a": torch.tensor([-0.0, float("nan"), 1e-45]),
        "c": torch.randn(5).bfloat16(),
        "d": torch.arange(3),
        "e": torch.empty(0, 2),
    }
    metadata = {str(n): "v" for n in range(20)}
    code = "from neft_core.files import *; import torch, sys; t = torch.load(sys.argv[1]); "
    code += "save_tensors(__import__('pathlib').Path(sys.argv[2]), t, {str(n): 'v' for n in "
    code += "range(20)})"
    torch.save(dict(reversed(tensors.items())), tmp_path / "t.pt")
    save_tensors(tmp_path / "a", tensors, metadata)
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "t.pt", tmp_path / "b"],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found, told = load_tensors(tmp_path / "a", "")
    assert told == metadata
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        same = found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        assert same[0].equal(same[1])


def test_tensors_that_are_cut_off_or_absent_are_named(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(NeftError, match=r"t\.safetensors: no such file; do this"):
        load_tensors(path, "do this")
    save_tensors(path, {"a": torch.ones(100)}, {})
    whole = path.read_bytes()
    for size in (0, 7, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(NeftError, match=r"t\.safetensors: not a whole .*; do this"):
            load_tensors(path, "do this")


def test_a_place_where_nothing_can_be_made():
    with (
        pytest.raises(NeftError, match=r"/proc/x: can't be written \(No such file or directory\)"),
        replacing(Path("/proc/x")) as folder,
    ):
        folder.mkdir()


@pytest.mark.parametrize("write", ["json", "tensors"])
def test_a_limit_on_sizes_of_files_is_told_and_leaves_nothing(tmp_path, write):
    """A disk that is full is the same refusal; see test_bad_input for that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    act = {
        "json": lambda: write_json(tmp_path / "a", "x" * 20000),
        "tensors": lambda: save_tensors(tmp_path / "a", {"a": torch.ones(20000)}, {}),
    }[write]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(NeftError, match=r"/a: can't be written \(File too large\); free"):
            act()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


def test_a_file_is_read_again_after_it_changed_alone(tmp_path):
    path, seen = tmp_path / "a.txt", []

    def read(place):
        seen.append(place)
        return place.read_text()

    reader = once(read)
    path.write_text("one")
    assert (reader(path), reader(path), len(seen)) == ("one", "one", 2), "too new to be sure of"
    os.utime(path, (1, 1))
    assert (reader(path), reader(path), len(seen)) == ("one", "one", 3)
    path.write_text("two")
    assert reader(path) == "two"
    os.utime(path, (1, 1))
    assert reader(path) == "two"
    with replacing(path) as temporary:
        temporary.write_text("six")
        os.utime(temporary, (1, 1))
    assert reader(path) == "six", "another file of the same size and time"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        reader(path)
