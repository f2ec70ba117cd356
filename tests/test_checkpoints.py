import json
import re

import pytest
import torch
from safetensors.torch import save_file

from neft_core import checkpoints
from neft_core.errors import NeftError


def sharded(directory):
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, directory / "1.safetensors")
    save_file({"b": torch.zeros(4)}, directory / "2.safetensors")
    index = {"weight_map": {"b": "2.safetensors", "a": "1.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shapes_of_one_file_and_of_shards(tmp_path):
    sharded(tmp_path)
    assert checkpoints.shapes(tmp_path) == {"a": (2, 3), "b": (4,)}
    assert checkpoints.locate(tmp_path)["b"] == tmp_path / "2.safetensors"
    save_file({"c": torch.zeros(5, 1)}, tmp_path / "model.safetensors")
    assert checkpoints.shapes(tmp_path) == {"c": (5, 1)}


def test_damaged_directories_are_named(tmp_path):
    def refuses(text, read=checkpoints.shapes):
        with pytest.raises(NeftError, match=re.escape(text)) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)

    refuses(f"{tmp_path}: has neither model.safetensors nor model.safetensors.index.json; save")
    refuses(f"{tmp_path}/config.json: no such file;", checkpoints.config)
    (tmp_path / "config.json").write_text("{")
    refuses(f"{tmp_path}/config.json: not JSON (", checkpoints.config)
    (tmp_path / "config.json").write_text("[]")
    refuses(f"{tmp_path}/config.json: holds list; a JSON object", checkpoints.config)
    index = sharded(tmp_path)
    index["weight_map"]["z"] = "2.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(f"{tmp_path}/2.safetensors: has no z; fetch")
    for no_map in ([], ["a"], {"a": 1}, None):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": no_map}))
        refuses(f"{tmp_path}/model.safetensors.index.json: has no map of weights; fetch the model")
    sharded(tmp_path)
    (tmp_path / "1.safetensors").unlink()
    refuses(f"{tmp_path}/1.safetensors: no such file, but model.safetensors.index.json names it;")
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    refuses(f"{tmp_path}/model.safetensors: not a whole safetensors file (")
