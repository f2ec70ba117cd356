"""What PEFT's own suite asks of every tuner (`tests/testing_common.py`, `test_custom_models.py`).

Asked here in tests of our own; `peft.` is test_tuner_peft.py, `tuner.` test_tuner.py, `trainers.`
test_tuner_trainers.py, the rest is below.

| behaviour | test |
|---|---|
| attributes, adapter's name, frozen base | peft.test_a_new_adapter_changes_nothing_and_freezes_the_rest |
| card, config and weights as files, `safe_serialization` | peft.test_save_and_load, test_saved_as_a_pickle |
| what `push_to_hub` sends | test_what_is_pushed_is_what_is_saved |
| selected adapters, names within names | test_only_the_chosen_adapters_are_saved |
| `from_pretrained(config=)`, `device_map`, `is_trainable`, `AutoPeftModel` | test_ways_to_load |
| several loaded, no missing keys | test_ways_to_load |
| `low_cpu_mem_usage`, injection on meta | peft.test_save_and_load, peft.test_injected_without_memory |
| precision of adapters, `autocast_adapter_dtype` | peft.test_precision_of_the_values, test_added_and_loaded_adapters_keep_the_precision_asked_for |
| forward, merge, unmerge in fp16 and bf16 | test_half_precision_through_merging |
| merge, unmerge, `merge_and_unload`, twice, saved again | peft.test_merge_unmerge_and_unload, peft.test_a_merged_model_comes_back_from_its_files |
| `safe_merge`: NaN, inf, base untouched | peft.test_a_broken_adapter_is_not_merged_safely, test_an_infinite_bias_is_not_merged |
| several merged, in any order | peft.test_several_adapters_at_once_add_their_changes |
| mixed batches, `add_weighted_adapter`, hotswap, LoRA conversion, `PeftMixedModel` | test_what_is_refused_clearly |
| `generate`, beams, positional, half precision, `inputs_embeds` | test_generation |
| training moves values alone, each gets a gradient | peft.test_training_changes_values_and_no_other_parameter |
| gradient checkpointing, reentrant or not; k-bit preparation | peft.test_checkpointing_gives_the_same_gradients, test_prepared_for_training |
| delete: active, inactive, unknown, last, one of three, merged | peft.test_delete_adapters, test_deleting_one_of_several, test_an_adapter_added_in_the_place_of_a_deleted_one_is_checked_anew, test_a_merged_adapter_is_not_deleted |
| disable: equal to the base, after merging, nested, state restored | peft.test_training_changes..., peft.test_a_merged_model_disabled_or_moved, test_disabling_is_nested_and_restored |
| active adapters; adapters on other modules | test_adapters_of_different_modules |
| a name used twice changes nothing | test_a_name_used_twice_changes_nothing |
| `set_requires_grad`, `inference_mode` | peft.test_several_adapters, peft.test_inference_mode |
| `modules_to_save`, in one adapter or both | peft.test_modules_to_save_train_as_a_whole, test_modules_to_save_of_several_adapters |
| the same modules in `modules_to_save` | test_a_module_that_trains_as_a_whole_has_no_neurons_beside, test_neurons_of_a_module_that_another_adapter_trains_as_a_whole_are_refused |
| base's state dict, got and set | peft.test_state_dicts_go_in_and_out |
| status of model and layers; `in_features` | peft.test_the_status_that_peft_reports, test_layers_look_like_linear_ones |
| copies, pickles, compiled | peft.test_a_copy_is_independent, tuner.test_a_compiled_model_trains_as_it_does_otherwise |
| embeddings resized | test_resized_embeddings |
| the README's example | test_the_readme_s_own_code |

PEFT's suite itself, run with this method: `make test-peft`.

Not asked, as they are of other methods: layer indexing by `layers_to_transform` (a mask names its
modules), `bias=` of LoRA (no bias trains), prompt learning, trainable tokens.
"""  # noqa: E501

import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from test_methods import tiny_gpt2
from test_tuner_peft import IDS, config, out, perturbed
from torch import nn

from neft_core import NeftConfig, NeuronMask
from neft_core.errors import NeftError
from neft_core.layer import NeftLinear
from neft_core.neurons import Group
from neft_core.tuner import neft_layers

LM = {"task_type": "CAUSAL_LM"}


def with_two() -> PeftModel:
    """Trained adapters `default` (active) and `b`."""
    model = get_peft_model(tiny_llama(), config(**LM))
    model.add_adapter("b", config(share=0.5, **LM))
    return perturbed(perturbed(model), "b", seed=1).eval()


def deep(*modules: str, keep: list[str] | str | None = None) -> NeftConfig:
    """Rows 1 and 3 of some of the layers of `Deep`."""
    groups = {name: Group(name, 0, 0, 4, 4) for name in modules}
    indices = {name: torch.tensor([1, 3]) for name in modules}
    return NeftConfig(mask=NeuronMask(indices, groups, 60), modules_to_save=keep)


class Deep(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.one(x).tanh()).tanh())


def test_saved_as_a_pickle(tmp_path):
    model = with_two()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "b" / "adapter_model.bin").is_file()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(out(again), out(model))


def test_only_the_chosen_adapters_are_saved(tmp_path):
    model = get_peft_model(tiny_llama(), config())
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(name, config())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len(state) == 2 * len(neft_layers(model))
    assert not (tmp_path / "efaul").exists()


def test_what_is_pushed_is_what_is_saved(tmp_path, monkeypatch):
    """The Hub itself is far away: what would be sent there is looked at instead."""
    from huggingface_hub import HfApi, RepoUrl

    sent = {}

    def commit(self, *, operations, **_options):
        for operation in operations:
            sent[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    url = RepoUrl("https://huggingface.co/me/mine")
    monkeypatch.setattr(HfApi, "create_repo", lambda *_args, **_options: url)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    model = with_two()
    model.push_to_hub("me/mine")
    model.save_pretrained(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert sent[name] == (tmp_path / name).read_bytes()
    assert "README.md" in sent
    assert "model.safetensors" not in sent


def test_ways_to_load(tmp_path):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    model = get_peft_model(type(tiny_llama()).from_pretrained(base), config(**LM))
    perturbed(model).save_pretrained(tmp_path)
    want, given = out(model), config(**LM)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, config=given)
    assert loaded.peft_config["default"] is given
    assert given.inference_mode
    assert torch.equal(out(loaded), want)
    for name in ("other", "yet-another"):
        outcome = loaded.load_adapter(tmp_path, name)
        assert (outcome.missing_keys, outcome.unexpected_keys) == ([], [])
        loaded.set_adapter(name)
        assert torch.equal(out(loaded), want)
    mapped = PeftModel.from_pretrained(tiny_llama(), tmp_path, device_map={"": "cpu"})
    assert torch.equal(out(mapped), want)
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path, is_trainable=True)
    assert torch.equal(out(alone), want)
    assert {n for n, p in alone.named_parameters() if p.requires_grad} == {
        n for n, _ in alone.named_parameters() if "neft_values" in n
    }


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_added_and_loaded_adapters_keep_the_precision_asked_for(
    tmp_path, autocast, low_cpu_mem_usage
):
    with_two().save_pretrained(tmp_path)
    cast = {"autocast_adapter_dtype": autocast}
    load = {**cast, "low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path, **load)
    model.load_adapter(tmp_path / "b", "b", **load)
    model.add_adapter("c", config(), **cast)
    found = {n.rpartition(".")[2]: p.dtype for n, p in model.named_parameters() if "values" in n}
    want = torch.float32 if autocast else torch.bfloat16
    assert found == dict.fromkeys(("default", "b", "c"), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_half_precision_through_merging(dtype, autocast, make):
    kind = "llama" if make is tiny_llama else "gpt2"
    model = get_peft_model(make().to(dtype), config(kind), autocast_adapter_dtype=autocast)
    want = out(perturbed(model).eval())
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert torch.equal(out(model), want)
        model.unmerge_adapter()
        assert torch.equal(out(model), want)
    assert torch.equal(out(model.to(dtype).merge_and_unload()), want)


def test_an_infinite_bias_is_not_merged():
    """The bias is the base's: merging neither reads nor writes it."""
    model = get_peft_model(tiny_gpt2(), config("gpt2"))
    for layer in neft_layers(model).values():
        base = layer.get_base_layer()
        with torch.no_grad():
            base.bias[0] = float("inf")
        before = base.bias.clone()
        layer.merge(safe_merge=True)
        assert torch.equal(base.bias, before)
        assert "bias" not in "".join(n for n, p in layer.named_parameters() if p.requires_grad)


def test_what_is_refused_clearly(tmp_path):
    model = with_two()
    model.save_pretrained(tmp_path)
    want = out(model)
    refused = pytest.raises(NeftError, match="adapter_names: trained neurons can't differ within")
    with refused:
        model(IDS, adapter_names=["default", "b"])
    with refused:
        model.generate(input_ids=IDS, adapter_names=["default", "b"], max_new_tokens=2)
    with pytest.raises(NeftError, match="add_weighted_adapter: neurons aren't mixed into a new"):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "mixed")
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but NEFT was passed"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)
    assert not model.supports_lora_conversion()
    with pytest.raises(ValueError, match="'NEFT' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_llama(), config(), mixed=True)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("c", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Adapter zz not found"):
        model.set_adapter("zz")
    assert torch.equal(out(model), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation(dtype):
    model = with_two().to(dtype)
    merged = copy.deepcopy(model).merge_and_unload()
    for options in ({}, {"num_beams": 3}):
        want = merged.generate(IDS, max_new_tokens=4, **options)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, **options), want)
        assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=4, **options), want)
    embedded = model.get_input_embeddings()(IDS)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded).logits, out(model))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_prepared_for_training():
    base = prepare_model_for_kbit_training(tiny_llama())
    assert not any(p.requires_grad for p in base.parameters())
    model = get_peft_model(base, config()).train()
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(IDS).requires_grad
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain = get_peft_model(tiny_llama(), config())
    plain(input_ids=IDS, labels=IDS).loss.backward()
    for layer, other in zip(neft_layers(model).values(), neft_layers(plain).values(), strict=True):
        assert torch.equal(layer.neft_values["default"].grad, other.neft_values["default"].grad)


def test_deleting_one_of_several():
    model = with_two()
    model.add_adapter("c", config())
    want = out(model)
    model.delete_adapter("c")  # inactive
    assert model.active_adapters == ["default"]
    assert torch.equal(out(model), want)
    model.set_adapter("b")
    second = out(model)
    model.delete_adapter("default")
    assert (model.active_adapters, list(model.peft_config)) == (["b"], ["b"])
    assert torch.equal(out(model), second)
    model.delete_adapter("b")
    for layer in neft_layers(model).values():
        assert not [*layer.neft_values, *layer.neft_indices.keys(), *layer.merged_adapters]
    assert torch.equal(model.base_model(IDS).logits, out(tiny_llama()))


def test_an_adapter_added_in_the_place_of_a_deleted_one_is_checked_anew():
    """Its tensors may lie where the old one's did."""
    rows, x = torch.arange(3000), torch.zeros(1, 4)
    layer = NeftLinear(nn.Linear(4, 4000), "a", 0, len(rows), rows)
    for _ in range(60):
        layer.update_layer("b", len(rows), rows)
        layer.set_adapter("b")
        layer(x)
        layer.set_adapter("a")
        layer.delete_adapter("b")
        layer.update_layer("b", len(rows), None)
        layer.set_adapter("b")
        with pytest.raises(NeftError, match="adapter 'b': its neurons aren't loaded"):
            layer(x)


def test_a_merged_adapter_is_not_deleted():
    model = with_two()
    model.set_adapter("b")
    want = out(model)
    model.merge_adapter()
    told = "Cannot delete adapter(s) ['b'] while they are merged"
    with pytest.raises(ValueError, match=re.escape(told)):
        model.delete_adapter("b")
    model.delete_adapter("default")
    assert torch.equal(out(model), want)
    model.unmerge_adapter()
    assert torch.equal(out(model), want)
    assert torch.equal(out(model.unload()), out(tiny_llama()))


def test_disabling_is_nested_and_restored():
    model, plain = with_two(), out(tiny_llama())
    want = out(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(out(model), plain)
        assert torch.equal(out(model), plain)
    assert torch.equal(out(model), want)
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(out(model), plain)
    model.enable_adapter_layers()
    assert torch.equal(out(model), want)
    next(iter(neft_layers(model).values())).enable_adapters(False)
    told = pytest.warns(UserWarning, match="some adapter layers that are enabled and others that")
    with told, model.disable_adapter():
        assert torch.equal(out(model), plain)
    assert torch.equal(out(model), want)


def test_adapters_of_different_modules():
    model = get_peft_model(Deep(), deep("one", "two"))
    model.add_adapter("b", deep("two", "three"))
    perturbed(perturbed(model), "b", seed=1)
    x = torch.linspace(-1, 1, 8).reshape(2, 4)

    def changed(*chosen: tuple[str, str]) -> torch.Tensor:
        """What a plain model with these changes computes."""
        plain = Deep()
        with torch.no_grad():
            for name, adapter in chosen:
                layer = model.base_model.model.get_submodule(name)
                plain.get_submodule(name).weight.add_(layer.get_delta_weight(adapter))
            return plain(x)

    first, second = [("one", "default"), ("two", "default")], [("two", "b"), ("three", "b")]
    cases = {("default",): first, ("b",): second, ("default", "b"): first + second}
    for adapters, pairs in cases.items():
        model.base_model.set_adapter(list(adapters))
        assert model.active_adapters == list(adapters)
        torch.testing.assert_close(model(x), changed(*pairs))
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(x), changed(*pairs))


def test_a_name_used_twice_changes_nothing():
    model = with_two()
    before, kept = model.state_dict(), model.peft_config["b"]
    before = {name: tensor.clone() for name, tensor in before.items()}
    with pytest.raises(ValueError, match="Adapter with name 'b' already exists"):
        model.add_adapter("b", config())
    assert model.peft_config["b"] is kept
    after = model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_modules_to_save_of_several_adapters():
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    model = get_peft_model(Deep(), deep("one", keep=["three"]))
    model.add_adapter("b", deep("one"))
    model.add_adapter("c", deep("two", keep=["three"]))
    with torch.no_grad():
        model.base_model.model.three.modules_to_save["default"].weight.mul_(2)
    own = model(x)
    model.set_adapter("b")
    torch.testing.assert_close(model(x), Deep()(x))
    assert not torch.equal(own, model(x))
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["default", "c"])
    model.base_model.set_adapter(["default", "b"])
    model.set_adapter("default")
    assert torch.equal(model(x), own)
    torch.testing.assert_close(model.merge_and_unload()(x), own)


def test_a_module_that_trains_as_a_whole_has_no_neurons_beside(tmp_path):
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    model = get_peft_model(Deep(), deep("one", "two", keep=["two"]))
    assert list(neft_layers(model)) == ["base_model.model.one"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "base_model.model.one.neft_values.default",
        "base_model.model.two.modules_to_save.default.weight",
        "base_model.model.two.modules_to_save.default.bias",
    }
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    want = model(x)
    assert not torch.equal(want, Deep()(x))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Deep(), tmp_path)(x), want)
    torch.testing.assert_close(model.merge_and_unload()(x), want)
    with pytest.raises(NeftError, match="mask: all its neurons are in modules_to_save, which"):
        get_peft_model(Deep(), deep("two", keep=["two"]))


def test_a_single_module_that_trains_as_a_whole_needs_no_list(tmp_path):
    model = get_peft_model(Deep(), deep("one", "two", keep="two"))
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    before = model(x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(2)
    assert not torch.equal(model(x), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Deep(), tmp_path)(x), model(x))


def test_a_module_that_trains_as_a_whole_may_end_in_the_name_of_one_with_neurons():
    inner = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.ModuleDict({"one": nn.Linear(4, 4)})})
    model = get_peft_model(inner, deep("one", keep=["two.one"]))
    assert list(neft_layers(model)) == ["base_model.model.one"]


def test_a_module_with_another_adapter_s_neurons_does_not_train_as_a_whole():
    model = get_peft_model(Deep(), deep("one", "two"))
    before = list(model.state_dict())
    with pytest.raises(NeftError, match=r"mask: .*two: neurons of another adapter train in it; "):
        model.add_adapter("b", deep("one", keep=["two"]))
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == before


def test_neurons_of_a_module_that_another_adapter_trains_as_a_whole_are_refused():
    model = get_peft_model(Deep(), deep("one", keep=["two"]))
    before = list(model.state_dict())
    with pytest.raises(NeftError, match=r"mask: two trains as a whole in another adapter of this"):
        model.add_adapter("b", deep("one", "two"))
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == before


def test_layers_look_like_linear_ones():
    for make, kind in ((tiny_llama, "llama"), (tiny_gpt2, "gpt2")):
        for name, layer in neft_layers(get_peft_model(make(), config(kind))).items():
            wide = "down" in name or ("mlp" in name and "c_proj" in name)
            assert (layer.in_features, layer.out_features) == ((24, 16) if wide else (16, 24))
            assert layer.weight is layer.get_base_layer().weight
            assert layer.bias is layer.get_base_layer().bias


@pytest.mark.filterwarnings("ignore:The new embeddings will be")
def test_resized_embeddings(tmp_path):
    """The embeddings are no part of the adapter, unless PEFT is asked to keep them."""
    base = tiny_llama()
    base.resize_token_embeddings(70, mean_resizing=False)
    model = perturbed(get_peft_model(base, config(**LM)))
    model.save_pretrained(tmp_path)
    assert all("neft_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    model.save_pretrained(tmp_path / "all", save_embedding_layers=True)
    state = load_file(tmp_path / "all" / "adapter_model.safetensors")
    assert any("embed_tokens" in name for name in state)
    other = tiny_llama()
    other.resize_token_embeddings(70, mean_resizing=False)
    again = PeftModel.from_pretrained(other, tmp_path / "all")
    assert torch.equal(out(again), out(model))


def test_the_readme_s_own_code(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"## In your own code\n+```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    told = {"base": tiny_llama(), "tuned": tiny_llama(seed=1), "model": tiny_llama()}
    exec(code, told)
    assert NeuronMask.load("mask.safetensors").neurons == told["mask"].neurons > 0
    assert torch.equal(out(told["model"]), out(tiny_llama()))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
