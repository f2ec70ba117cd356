"""Which stages a change of params concerns, of a workspace in which nothing else is to be made."""

import shutil

import pytest
from conftest import edit
from test_registry import commit

from neft_core.graph import Graph
from neft_core.workspace import Workspace

END = {"summary", "report"}
TESTED = {"baseline@en-fr", "evaluate@full", "evaluate@lora", "evaluate@neft"}


@pytest.fixture(scope="module")
def made(finished, tmp_path_factory):
    """A finished workspace as DVC knows it."""
    ws = Workspace(shutil.copytree(finished.root, tmp_path_factory.mktemp("made") / "ws"))
    commit(ws)
    return ws


def stale(ws: Workspace) -> set[str]:
    graph = Graph(ws)
    return {stage.name for stage in graph.stages if graph.changes(stage.name)}


@pytest.mark.parametrize(
    ("change", "concerned"),
    [
        (("target_language: French", "target_language: Chinese"),
         {"corpus@en-fr", "prepare@en-fr"} | TESTED | END),
        (("max_new_tokens: 6", "max_new_tokens: 7"), TESTED | END),
        (("warmup: {steps: 6,", "warmup: {steps: 7,"), {"warmup@en-fr"} | END),
        (("experiment: tiny", "experiment: other"), END),
    ],
    ids=["language", "evaluation", "warmup", "experiment"],
)  # fmt: skip
def test_a_change_concerns_what_reads_it(made, change, concerned):
    assert stale(made) == set()
    edit(made, change)
    try:
        assert stale(made) == concerned
    finally:
        edit(made, change[::-1])
