"""One file on disk, two names: the workspace's and the cache's."""

import os
import subprocess
import sys

import pytest

from neft_core import links
from neft_core.workspace import cache_of, init_workspace

PARAMS = "seed: 1\n"


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """Without what this machine's user has told DVC."""
    for name in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def told(ws, level: str = "--local") -> str:
    line = [sys.executable, "-m", "dvc", "config", level, "cache.type"]
    return subprocess.run(line, cwd=ws.root, capture_output=True, text=True).stdout.strip()


def tell(ws, value: str, level: str = "--local") -> None:
    line = [sys.executable, "-m", "dvc", "config", level, "cache.type", value]
    subprocess.run(line, cwd=ws.root, check=True)


@pytest.mark.parametrize(("shares", "kind"), [(True, ""), (False, links.HARD)])
def test_a_workspace_links_where_copies_take_room(tmp_path, monkeypatch, shares, kind):
    monkeypatch.setattr(links, "copies_share_blocks", lambda _: shares)
    ws = init_workspace(tmp_path / "ws", PARAMS)
    assert told(ws) == kind
    assert links.stored_once(ws.root)
    # What somebody chose stays, and is a private workspace's choice too.
    tell(ws, "copy")
    assert init_workspace(ws.root, PARAMS).root == ws.root
    private = init_workspace(tmp_path / "private", PARAMS, cache=cache_of(ws))
    assert (told(ws), told(private)) == ("copy", "copy")
    assert not links.stored_once(ws.root)


def test_what_the_user_tells_every_repository_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(links, "copies_share_blocks", lambda _: False)
    ws = init_workspace(tmp_path / "first", PARAMS)
    tell(ws, "symlink", "--global")
    assert told(init_workspace(tmp_path / "ws", PARAMS)) == ""
    assert links.stored_once(tmp_path / "ws")


def test_a_link_reaches_no_other_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(links, "copies_share_blocks", lambda _: False)
    ws = init_workspace(tmp_path / "ws", PARAMS)
    cache = ws.root / ".dvc/cache"
    cache.mkdir(exist_ok=True)
    monkeypatch.setattr(links, "_device", lambda path: path == cache)
    assert not links.stored_once(ws.root)


def test_whether_copies_share_blocks_is_tried(tmp_path):
    """As `cp --reflink=always` finds it."""
    (tmp_path / "a").write_bytes(os.urandom(4096))
    line = ["cp", "--reflink=always", str(tmp_path / "a"), str(tmp_path / "b")]
    works = subprocess.run(line, capture_output=True).returncode == 0
    assert links.copies_share_blocks(tmp_path) is works
