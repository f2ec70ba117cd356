"""Two processes, DDP and FSDP2, against one; and that the comparison would see a moved weight."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_methods import mask_for
from test_sparse_models import selected
from two_processes import (
    OTHERS,
    WAYS,
    model_for,
    other_base,
    other_model,
    results,
    tiny_llama,
    train,
)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-W", "ignore", str(HERE / "two_processes.py")]
    children = [
        subprocess.Popen([*command, str(rank), "2", str(folder)], cwd=HERE) for rank in (0, 1)
    ]
    assert [child.wait(timeout=600) for child in children] == [0, 0]
    return folder


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name, ways in {**WAYS, **OTHERS}.items() for way in ways]
)
def test_two_processes_train_as_one(trained, name, way):
    found = load_file(trained / f"{way}-{name}.safetensors")
    if name in OTHERS:
        model, base = other_model(name), other_base(name).state_dict()
    else:
        model = model_for(getattr(torch, name))
        base = tiny_llama(tie_word_embeddings=False).to(getattr(torch, name)).state_dict()
    want = results(model, train(model, 0, 1))
    assert set(found) == set(want)
    close = {"float32": 1e-5, "bfloat16": 2e-2}.get(name, 1e-10)
    torch.testing.assert_close(found["losses"], want["losses"], rtol=close, atol=close)
    assert found["losses"][-1] != found["losses"][0]
    for key, tensor in found.items():
        if "neft_values" in key:
            if name != "bfloat16":
                # AdamW divides by the size of a gradient, also of one that is all rounding.
                slack = 1e-3 if name == "float32" else 1e-10
                torch.testing.assert_close(tensor, want[key], rtol=slack, atol=slack)
        elif key != "losses" and "neft_indices" not in key:
            plain = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            assert torch.equal(tensor, base[plain]), f"{key} moved"


def test_a_moved_weight_would_be_seen(trained):
    """Full gradients move weights outside the mask: the check above has something to catch."""
    model = tiny_llama(tie_word_embeddings=False)
    mask = mask_for(model, "llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, 0, 1, steps=1)
    outside = {
        name: ~selected(mask, name, p) & (p != before[name]) for name, p in model.named_parameters()
    }
    assert all(moved.any() for moved in outside.values())
