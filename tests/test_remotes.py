"""Results by DVC's remotes: pushed from one clone, pulled into another, up to date there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fabricated
import pytest
from operating import environment, free_port

from neft_core.workspace import IGNORED, init_dvc

pytestmark = pytest.mark.integration

KEYS = {
    "AWS_ACCESS_KEY_ID": "planted-id",
    "AWS_SECRET_ACCESS_KEY": "planted-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def call(folder: Path, env: dict[str, str], *line: str) -> str:
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A git repository whose stages are all made, and its environment."""
    folder = tmp_path_factory.mktemp("made")
    env = environment(folder, **KEYS, GIT_CONFIG_GLOBAL=os.devnull)
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    env |= {f"GIT_{a}_{b}": "x" for a in ("AUTHOR", "COMMITTER") for b in ("NAME", "EMAIL")}
    fabricated.make(folder / "ws")
    (folder / "ws/.gitignore").write_text(IGNORED)
    call(folder / "ws", env, "git", "init", "-q")
    init_dvc(folder / "ws")
    call(folder / "ws", env, sys.executable, "-m", "dvc", "repro", "-q")
    return folder / "ws", env


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_what_one_clone_pushes_another_finds_up_to_date(kind, made, tmp_path):
    if kind == "s3":
        pytest.importorskip("dvc_s3")
        pytest.importorskip("moto")
    template, env = made
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(template, first)
    dvc = (sys.executable, "-m", "dvc")

    def share(url: str, *more: tuple[str, str]) -> None:
        call(first, env, *dvc, "remote", "add", "-d", "team", url)
        for key, value in more:
            call(first, env, *dvc, "remote", "modify", "team", key, value)
        call(first, env, "git", "add", ".")
        call(first, env, "git", "commit", "-q", "-m", "x")
        call(first, env, *dvc, "push", "-q", "--run-cache")
        call(tmp_path, env, "git", "clone", "-q", str(first), str(second))
        assert not (second / "work").exists()
        call(second, env, *dvc, "pull", "-q", "--run-cache")
        said = call(second, env, *dvc, "repro")
        assert "Running stage" not in said
        assert "Data and pipelines are up to date." in said
        for path in first.joinpath("work").rglob("*"):
            if path.is_file():
                assert (second / path.relative_to(first)).read_bytes() == path.read_bytes()
        kept = [p for p in second.rglob("*") if p.is_file() and b"planted" in p.read_bytes()]
        assert kept == [], "keys stay in the environment"

    if kind == "directory":
        share(str(tmp_path / "remote"))
        return
    from stack import store

    port = free_port()
    with store(port):
        url = f"http://127.0.0.1:{port}"
        bucket = (sys.executable, "-m", "neft_core.bucket", "team")
        call(tmp_path, env | {"AWS_ENDPOINT_URL": url}, *bucket)
        share("s3://team/neft", ("endpointurl", url))
