"""What a process of several may do; a model's bare copy filled again."""

import psutil
import pytest
import torch
from conftest import tiny_llama

from neft_core import ranks
from neft_core.files import write_json


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some schedulers set it
    monkeypatch.setenv("RANK", "1")
    assert (ranks.world(), ranks.rank(), ranks.main(), ranks.gather("x")) == (1, 0, True, ["x"])


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_main_process_writes(monkeypatch, tmp_path, rank):
    for name, value in {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    write_json(tmp_path / "a" / "b.json", {})
    assert [path.name for path in tmp_path.rglob("*")] == ([] if rank else ["a", "b.json"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_skeleton_takes_no_memory_and_is_the_model_again_when_filled(tied):
    model = tiny_llama(tie_word_embeddings=tied)
    model.model.norm.weight.requires_grad_(False)
    bare = ranks.skeleton(model)
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert [b.data_ptr() for b in bare.buffers()] == [b.data_ptr() for b in model.buffers()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(3, 9)[None]
    expected = model(input_ids=ids).logits
    assert all(parameter.is_meta for parameter in ranks.fill(bare, {}).parameters())
    filled = ranks.fill(bare, state)
    assert torch.equal(filled(input_ids=ids).logits, expected)
    assert (filled.lm_head.weight is filled.model.embed_tokens.weight) == tied
    assert not filled.model.norm.weight.requires_grad


def test_the_network_between_machines_has_a_name():
    held = {one.address for one in psutil.net_if_addrs()[ranks._interface("127.0.0.1")]}
    assert "127.0.0.1" in held
    assert ranks._interface("nowhere.invalid") is ranks._interface("") is None
