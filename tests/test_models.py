"""Checkpoint directories: what is refused, and what is loaded."""

import json
import shutil

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file
from test_methods import tiny_gpt2

from neft_core import hub, models
from neft_core.errors import NeftError

TEXTS = ["the cat sees a dog", "one two three"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A whole tiny model in the Hub's layout."""
    folder = tmp_path_factory.mktemp("model")
    models.save_checkpoint(tiny_llama(vocab_size=300), folder)
    models.build_tokenizer(TEXTS, 300, 64).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "m")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(act, folder) -> str:
    with pytest.raises(NeftError) as fault:
        act(folder)
    assert "\n" not in str(fault.value)
    return str(fault.value).replace(str(folder), "m")


def load(folder):
    return models.load_model(folder, torch.float32)


def test_no_directory(tmp_path):
    text = refusal(models.inspect, tmp_path / "none")
    assert text == "m: no such directory; set model.path to a model's directory"


def test_no_weights_or_pickled_ones(folder):
    (folder / "model.safetensors").unlink()
    needed = "; *.safetensors are needed, pickle is never loaded"
    assert refusal(models.inspect, folder) == f"m: no weights{needed}"
    (folder / "pytorch_model.bin").touch()
    assert refusal(models.inspect, folder) == (
        f"m: only pickled weights (pytorch_model.bin){needed}"
    )
    (folder / "pytorch_model.bin").unlink()
    (folder / "consolidated.00.pth").touch()
    assert refusal(models.inspect, folder) == (
        f"m: only pickled weights (consolidated.00.pth){needed}"
    )


def test_weights_that_are_cut_off(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        text = refusal(models.inspect, folder)
        assert text.startswith("m/model.safetensors: not a whole safetensors file (")
        assert text.endswith("; fetch the model again")


def test_config_that_is_absent_or_no_config(folder):
    for content, start in (
        (None, "m/config.json: no such file; give a model in the Hub's layout"),
        ("{", "m/config.json: not JSON ("),
        ("[]", "m/config.json: holds list; a JSON object is needed"),
        ("{}", "m: not a causal language model (model_type 'None'); choose one that is"),
    ):
        (folder / "config.json").unlink(missing_ok=True)
        if content is not None:
            (folder / "config.json").write_text(content)
        assert refusal(models.inspect, folder).startswith(start)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5For"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "nonsense", "architectures": None}, "model_type 'nonsense'"),
    ],
)
def test_what_is_no_causal_language_model(folder, changes, found):
    change_config(folder, **changes)
    text = refusal(models.inspect, folder)
    assert text.startswith(f"m: not a causal language model ({found}")


def test_code_of_its_own_is_not_run_unasked(folder):
    change_config(folder, auto_map={"AutoModelForCausalLM": "x.Y"})
    assert refusal(models.inspect, folder) == (
        "m: needs Python code of its own; set model.trust_remote_code: true if you trust its "
        "authors"
    )


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite(folder, value):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value

    change_weights(folder, change)
    assert refusal(models.inspect, folder) == (
        "m/model.safetensors: model.layers.1.mlp.up_proj.weight holds a value that is not finite; "
        "get a sound copy"
    )


def test_weights_that_lack_what_the_config_asks_for_are_not_made_up(folder):
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert refusal(load, folder) == (
        "m: its weights lack model.layers.1.mlp.up_proj.weight in the shape that config.json asks "
        "for; fetch the model again"
    )


def test_weights_of_another_shape_than_the_config_says(folder):
    change_config(folder, intermediate_size=32)
    assert "lack model.layers.0.mlp.down_proj.weight in the shape" in refusal(load, folder)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": "x"}, {"hidden_size": 15}])
def test_a_config_that_the_library_refuses(folder, changes):
    change_config(folder, **changes)
    assert refusal(load, folder).startswith("m: can't be loaded (")


def test_a_shard_that_is_missing(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (n > 9)}-of-00002.safetensors" for n, name in enumerate(names)}
    for file in set(files.values()):
        chosen = {name: tensors[name] for name in names if files[name] == file}
        save_file(chosen, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = models.inspect(folder)
    assert whole[1] == sum(p.numel() for p in tiny_llama(vocab_size=300).parameters())
    # Mistral's own form of the weights lies beside the shards; nobody loads it.
    save_file(tensors, folder / "consolidated.safetensors")
    assert models.inspect(folder) == whole
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: no such file" in refusal(models.inspect, folder)


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"]])
def test_no_tokenizer(folder, left):
    for path in folder.glob("*token*"):
        if path.name not in left:
            path.unlink()
    if left:
        (folder / left[0]).write_text('{"tokenizer_class": "LlamaTokenizer"}')
    text = refusal(models.load_tokenizer, folder)
    assert text.startswith("m: no usable tokenizer (")
    assert text.endswith("; add its files")


def test_a_tokenizer_that_is_damaged(folder):
    (folder / "tokenizer.json").write_text("{")
    assert refusal(models.load_tokenizer, folder).startswith("m: no usable tokenizer (")


def test_a_hub_model_offline():
    with pytest.raises(NeftError) as fault:
        hub.fetch("nobody/none", "main")
    assert str(fault.value) == (
        "model 'nobody/none': the Hub can't be reached and the local cache lacks it; connect once, "
        "or set model.kind: local and model.path to a directory"
    )


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_saved_and_loaded_bit_by_bit(tmp_path, make):
    model = make()
    models.save_checkpoint(model, tmp_path)
    kind, parameters, context, digest = models.inspect(tmp_path)
    assert (kind, context) == (model.config.model_type, 64)
    assert parameters == sum(p.numel() for p in model.parameters())
    again = load(tmp_path)
    assert all(v.equal(again.state_dict()[k]) for k, v in model.state_dict().items())
    assert models.load_model(tmp_path, torch.bfloat16).dtype == torch.bfloat16
    change_weights(tmp_path, lambda tensors: next(iter(tensors.values())).view(-1)[:1].add_(1e-6))
    assert models.inspect(tmp_path)[3] != digest


def test_scored_weights_keep_their_precision(tmp_path):
    kept = "model.layers.0.mlp.up_proj.weight"
    models.save_checkpoint(tiny_llama(), tmp_path, [kept], torch.bfloat16)
    kinds = {
        name: tensor.dtype for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    assert kinds.pop(kept) == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}


def test_the_card_comes_back(tmp_path):
    card = models.Base("local", "base", "", "abc", "llama", 12, 64, False)
    card.save(tmp_path)
    assert models.Base.load(tmp_path) == card
    assert card.directory(tmp_path) == tmp_path / "base"
    (tmp_path / "base.json").write_text('{"kind": "local"}')
    with pytest.raises(NeftError, match=r"base\.json: missing or damaged; run 'neft run'"):
        models.Base.load(tmp_path)
