"""What PEFT's own tests ask of a tuner, asked of this one."""

import copy
import json
import pickle
import re

import pytest
import torch
from conftest import tiny_llama
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from test_methods import mask_for, tiny_gpt2
from torch import nn

from neft_core import NeftConfig, NeuronMask, NeuronScores
from neft_core.errors import NeftError
from neft_core.layer import NeftLinear
from neft_core.masks import NeuronMask as Mask
from neft_core.neurons import Group
from neft_core.tuner import NeftModel, neft_layers

IDS = torch.arange(3, 33).reshape(2, 15)


def config(kind: str = "llama", share: float = 0.3, **options) -> NeftConfig:
    base = tiny_llama() if kind == "llama" else tiny_gpt2()
    return NeftConfig(mask=mask_for(base, kind, share), **options)


@torch.no_grad()
def perturbed(model: nn.Module, adapter: str = "default", seed: int = 0) -> nn.Module:
    """As after a training: values that are not the base's."""
    generator = torch.Generator().manual_seed(seed)
    for layer in neft_layers(model).values():
        if adapter in layer.neft_values:
            values = layer.neft_values[adapter]
            values.add_(torch.randn(values.shape, generator=generator).to(values.dtype) * 0.1)
    return model


@torch.no_grad()
def out(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(params=["llama", "gpt2"])
def make(request):
    return tiny_llama if request.param == "llama" else tiny_gpt2


@pytest.fixture
def kind(make):
    return "llama" if make is tiny_llama else "gpt2"


def test_the_public_names():
    assert Mask is NeuronMask
    assert NeuronScores.__name__ == "NeuronScores"
    assert PeftType.NEFT == "NEFT" == PeftType("NEFT").value
    assert config().peft_type is PeftType.NEFT
    assert pickle.loads(pickle.dumps(PeftType.NEFT)) is PeftType.NEFT
    import neft_core

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        neft_core.nothing  # noqa: B018


def test_a_new_adapter_changes_nothing_and_freezes_the_rest(make, kind):
    model = get_peft_model(make(), config(kind), adapter_name="mine")
    assert torch.equal(out(model), out(make()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.endswith("neft_values.mine")}
    assert model.get_nb_trainable_parameters()[0] == mask_for(make(), kind).parameters
    assert "neft.NeftLinear" in repr(model)


def test_training_changes_values_and_no_other_parameter(make, kind):
    model = get_peft_model(make(), config(kind))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model(IDS)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("neft_values" in name), name
    with model.disable_adapter():
        assert torch.equal(out(model), out(make()))
    assert not torch.equal(out(model), out(make()))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(tmp_path, make, kind, low_cpu_mem_usage):
    model = perturbed(get_peft_model(make(), config(kind, task_type="CAUSAL_LM")))
    out(model)
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    state = load_file(tmp_path / "adapter_model.safetensors")
    parts = {name.rpartition(".")[2]: tensor.dtype for name, tensor in state.items()}
    assert parts == {"neft_values": torch.float32, "neft_indices": torch.int64}
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "NEFT"
    assert "mask" not in saved
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, NeftConfig)
    # Beside what the mask says, how many rows or columns there are in all.
    sizes = {name: entry.pop("size") for name, entry in loaded.modules.items()}
    assert loaded.modules == config(kind).modules
    for name, size in sizes.items():
        shape = make().get_submodule(name).weight.shape
        assert size == shape[loaded.modules[name]["axis"] ^ (kind == "gpt2")]
    assert loaded.provenance == mask_for(make(), kind).provenance

    again = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(out(again), out(model))
    assert not any(p.requires_grad for p in again.parameters())
    want = model.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in again.state_dict().items())
    again.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    again.set_adapter("other")
    assert torch.equal(out(again), out(model))
    assert {p.device.type for p in again.parameters()} == {"cpu"}


def test_injected_without_memory():
    model = inject_adapter_in_model(config(), tiny_llama(), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in model.named_parameters() if "neft_values" in n} == {"meta"}


def test_state_dicts_go_in_and_out(make, kind):
    model = perturbed(get_peft_model(make(), config(kind)))
    out(model)
    state = get_peft_model_state_dict(model)
    assert not any("default" in name for name in state)
    other = get_peft_model(make(), config(kind), adapter_name="b")
    outcome = set_peft_model_state_dict(other, state, adapter_name="b")
    assert outcome.unexpected_keys == []
    assert torch.equal(out(other), out(model))

    base = get_base_model_state_dict(model)
    assert base.keys() == make().state_dict().keys()
    assert all(torch.equal(tensor, base[name]) for name, tensor in make().state_dict().items())
    # Another base under the same adapter: its own bits are kept from then on.
    changed = {name: tensor + 1 for name, tensor in base.items()}
    out(model)
    set_base_model_state_dict(model, changed)
    out(model)
    unloaded = model.unload().state_dict()
    assert all(torch.equal(unloaded[name], tensor) for name, tensor in changed.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_unmerge_and_unload(make, kind, dtype, safe_merge):
    base = make().to(dtype)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = perturbed(get_peft_model(base, config(kind)))
    want, plain = out(model), out(make().to(dtype))
    assert not torch.equal(want, plain)
    model.merge_adapter(safe_merge=safe_merge)
    assert torch.equal(out(model), want)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(out(model), want)
    model.unmerge_adapter()
    assert all(
        torch.equal(tensor, before[name.replace(".base_layer", "")])
        for name, tensor in base.state_dict().items()
        if "neft_" not in name
    )
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(out(model), want)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe_merge)
    assert torch.equal(out(merged), want)
    assert merged.state_dict().keys() == before.keys()
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert not hasattr(merged, "peft_config")
    untouched = model.unload()
    assert torch.equal(out(untouched), plain)
    assert all(torch.equal(t, before[name]) for name, t in untouched.state_dict().items())


def test_a_merged_model_comes_back_from_its_files(tmp_path):
    merged = perturbed(get_peft_model(tiny_llama(), config())).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert torch.equal(out(again), out(merged))


def test_a_merged_model_disabled_or_moved():
    model = perturbed(get_peft_model(tiny_llama(), config()))
    want = out(model)
    model.merge_adapter()
    model.to(torch.float64)
    torch.testing.assert_close(out(model), want.double(), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(out(model), out(tiny_llama()).double(), rtol=1e-4, atol=1e-5)


def test_a_broken_adapter_is_not_merged_safely():
    model = get_peft_model(tiny_llama(), config())
    for layer in neft_layers(model).values():
        with torch.no_grad():
            layer.neft_values["default"][0, 0] = float("nan")
        before = layer.get_base_layer().weight.clone()
        with pytest.raises(ValueError, match="NaNs detected"):
            layer.merge(safe_merge=True)
        assert torch.equal(layer.get_base_layer().weight, before)
        assert not layer.merged


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_where_one_layer_is_broken_none_is_merged(way):
    model = perturbed(get_peft_model(tiny_llama(), config()))
    layers = list(neft_layers(model).values())
    before = [layer.get_base_layer().weight.clone() for layer in layers]
    with torch.no_grad():
        layers[-1].neft_values["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        getattr(model, way)(safe_merge=True)
    assert list(neft_layers(model).values()) == layers
    for layer, weight in zip(layers, before, strict=True):
        assert not layer.merged
        assert torch.equal(layer.get_base_layer().weight, weight)


def test_several_adapters(make, kind):
    model = perturbed(get_peft_model(make(), config(kind)))
    first = out(model)
    model.add_adapter("b", config(kind, share=0.5))
    perturbed(model, "b", seed=1)
    assert torch.equal(out(model), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".b"))
    model.set_adapter("b")
    second = out(model)
    assert not torch.equal(first, second)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    model.set_adapter("default")
    assert torch.equal(out(model), first)
    one = copy.deepcopy(model).merge_and_unload(adapter_names=["b"])
    assert torch.equal(out(one), second)
    model.set_requires_grad("b", True)
    assert all(p.requires_grad for n, p in model.named_parameters() if n.endswith(".b"))


def both_changes(make, kind) -> nn.Module:
    """A plain model with the changes of adapters `default` and `b` added up."""
    model = get_peft_model(make(), config(kind))
    model.add_adapter("b", config(kind, share=0.5))
    perturbed(perturbed(model), "b", seed=1)
    plain = make()
    with torch.no_grad():
        for name, layer in neft_layers(model.get_base_model()).items():
            weight = plain.get_submodule(name).weight
            for adapter in ("default", "b"):
                weight.add_(layer.get_delta_weight(adapter))
    return plain


def test_several_adapters_at_once_add_their_changes(make, kind):
    want = out(both_changes(make, kind))
    model = get_peft_model(make(), config(kind))
    model.add_adapter("b", config(kind, share=0.5))
    perturbed(perturbed(model), "b", seed=1)
    model.base_model.set_adapter(["default", "b"])
    torch.testing.assert_close(out(model), want, rtol=1e-5, atol=1e-5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "neft_values" in n)
    merged = model.merge_and_unload(adapter_names=["b", "default"])
    torch.testing.assert_close(out(merged), want, rtol=1e-5, atol=1e-5)


def test_both_adapters_at_once_have_the_dense_gradient():
    model = get_peft_model(tiny_llama(), config())
    model.add_adapter("b", config(share=0.5))
    perturbed(perturbed(model), "b", seed=1)
    model.base_model.set_adapter(["default", "b"])
    plain = both_changes(tiny_llama, "llama")
    plain(input_ids=IDS, labels=IDS).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in neft_layers(model.get_base_model()).items():
        dense = plain.get_submodule(name).weight.grad
        for adapter in ("default", "b"):
            rows = layer.neft_indices[adapter]
            want = dense[rows] if layer.axis == 0 else dense[:, rows].t()
            got = layer.neft_values[adapter].grad
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_delete_adapters():
    model = get_peft_model(tiny_llama(), config())
    model.add_adapter("b", config(share=0.5))
    perturbed(model, "b")
    model.set_adapter("b")
    out(model)
    with pytest.raises(ValueError, match="Adapter c does not exist"):
        model.delete_adapter("c")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("b")
    assert model.active_adapters == ["default"]
    assert torch.equal(out(model), out(tiny_llama()))
    for layer in neft_layers(model).values():
        assert set(layer.neft_values) == set(layer.neft_indices.keys()) == {"default"}
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert torch.equal(model.base_model(IDS).logits, out(tiny_llama()))


def test_a_second_get_peft_model_warns_and_begins_anew():
    base = tiny_llama()
    model = perturbed(get_peft_model(base, config()))
    out(model)
    with (
        pytest.warns(UserWarning, match="for a second time"),
        pytest.warns(UserWarning, match="multiple adapters"),
    ):
        again = get_peft_model(base, config())
    assert torch.equal(out(again), out(tiny_llama()))
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["up_proj"])).base_model.model
    with (
        pytest.warns(UserWarning, match="for a second time"),
        pytest.warns(UserWarning, match="multiple adapters"),
        pytest.raises(NeftError, match="adapter of another method; unload that one first"),
    ):
        get_peft_model(lora, config())


def test_precision_of_the_values():
    for dtype, cast, want in (
        (torch.bfloat16, True, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float64, True, torch.float64),
    ):
        model = get_peft_model(tiny_llama().to(dtype), config(), autocast_adapter_dtype=cast)
        found = {p.dtype for n, p in model.named_parameters() if "neft_values" in n}
        assert found == {want}
        model(input_ids=IDS, labels=IDS).loss.backward()
    injected = inject_adapter_in_model(config(), tiny_llama().bfloat16())
    assert {x.neft_values["default"].dtype for x in neft_layers(injected).values()} == {
        torch.float32
    }


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    grads = []
    for on in (False, True):
        model = perturbed(get_peft_model(tiny_llama(), config())).train()
        if on:
            model.prepare_model_for_gradient_checkpointing(model)
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append([p.grad for n, p in model.named_parameters() if "neft_values" in n])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_inference_mode():
    model = get_peft_model(tiny_llama(), config(inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, out(tiny_llama()))


def test_the_status_that_peft_reports():
    model = get_peft_model(tiny_llama(), config())
    model.add_adapter("b", config())
    status = get_model_status(model)
    assert status.peft_types == {"default": "NEFT", "b": "NEFT"}
    assert status.num_adapter_layers == 4
    assert status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "b": False}
    assert {layer.module_type for layer in get_layer_status(model)} == {"neft.NeftLinear"}
    assert status.merged_adapters == []


def test_a_copy_is_independent():
    model = perturbed(get_peft_model(tiny_llama(), config()))
    want = out(model)
    twin = copy.deepcopy(model)
    perturbed(twin, seed=5)
    assert not torch.equal(out(twin), want)
    assert torch.equal(out(model), want)
    assert torch.equal(out(twin.unload()), out(tiny_llama()))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(out(again), want)
    assert torch.equal(out(again.unload()), out(tiny_llama()))


def test_transformers_loads_adds_and_switches(tmp_path):
    perturbed(get_peft_model(tiny_llama(), config())).save_pretrained(tmp_path)
    want = out(PeftModel.from_pretrained(tiny_llama(), tmp_path))
    model = tiny_llama()
    model.load_adapter(str(tmp_path))
    assert torch.equal(out(model), want)
    model.disable_adapters()
    assert torch.equal(out(model), out(tiny_llama()))
    model.enable_adapters()
    assert torch.equal(out(model), want)
    with pytest.warns(UserWarning, match="multiple adapters"):
        model.add_adapter(config(share=0.5), "b")
    assert model.active_adapters() == ["b"]
    assert torch.equal(out(model), out(tiny_llama()))
    model.set_adapter("default")
    assert torch.equal(out(model), want)
    state = model.get_adapter_state_dict("default")
    assert {name.rpartition(".")[2] for name in state} == {"neft_values", "neft_indices"}
    model.delete_adapter("b")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").is_file()
    again = tiny_llama()
    again.load_adapter(str(tmp_path / "again"))
    assert torch.equal(out(again), want)


def test_modules_to_save_train_as_a_whole(tmp_path):
    mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    group = Group("0", 0, 0, 8, 6)
    mask = NeuronMask({"0": torch.tensor([1, 5])}, {"0": group}, 83)
    model = get_peft_model(mlp, NeftConfig(mask=mask, modules_to_save=["2"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition("model.")[2] for n in trained} == {
        "0.neft_values.default",
        "2.modules_to_save.default.weight",
        "2.modules_to_save.default.bias",
    }
    model.save_pretrained(tmp_path)
    assert any("2.weight" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_weights_that_were_never_loaded_are_refused(tmp_path):
    get_peft_model(tiny_llama(), config()).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), loaded)
    with pytest.raises(NeftError, match="adapter 'default': its neurons aren't loaded; load its"):
        model(IDS)
    with model.disable_adapter():
        assert torch.equal(out(model), out(tiny_llama()))
    state = load_file(tmp_path / "adapter_model.safetensors")
    wrong = {n: t + 24 if "indices" in n and "up_proj" in n else t for n, t in state.items()}
    set_peft_model_state_dict(model, wrong)
    with pytest.raises(NeftError, match=re.escape("are not increasing in [0, 24); it is damaged")):
        model(IDS)
    set_peft_model_state_dict(model, state)
    assert torch.equal(out(model), out(tiny_llama()))


def test_configs_that_say_nothing_or_nonsense(tmp_path):
    with pytest.raises(NeftError, match="adapter: has no neurons; give NeftConfig a mask"):
        get_peft_model(tiny_llama(), NeftConfig())
    with pytest.raises(NeftError, match="form: got 'dense'; one of auto, in_place, additive"):
        NeftConfig(form="dense")
    with pytest.raises(NeftError, match="no such file"):
        NeftConfig(mask=tmp_path / "none.safetensors")
    mask_for(tiny_llama(), "llama").save(tmp_path / "mask.safetensors")
    assert NeftConfig(mask=str(tmp_path / "mask.safetensors")).modules == config().modules
    with pytest.raises(NeftError, match=r"the model has no such module; use the mask's own model"):
        get_peft_model(tiny_gpt2(), config())
    assert issubclass(NeftModel, nn.Module)
    assert NeftLinear.adapter_layer_names == ("neft_values",)
