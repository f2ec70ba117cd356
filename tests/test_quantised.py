"""Trained neurons over bases that bitsandbytes and torchao have quantised, on a CPU."""

import json
import logging
import re

import pytest
import torch
from conftest import tiny_llama
from families import tiny_model
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file, save_file
from test_methods import mask_for
from test_sparse_experts import expert_mask
from test_tuner import Packed, train, values
from test_tuner_peft import IDS, out, perturbed
from test_tuner_trainers import QUIET
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Mxfp4Config, TorchAoConfig

from neft_core import score_neurons, select_neurons
from neft_core.errors import NeftError
from neft_core.frozen import probe
from neft_core.groups import COLUMNS, ROWS, read_neurons
from neft_core.layer import NeftLinear
from neft_core.masks import NeuronMask
from neft_core.neurons import Group
from neft_core.tuner import NeftConfig, neft_layers

BITSANDBYTES = {
    "int8": {"load_in_8bit": True},
    "fp4": {"load_in_4bit": True},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}
KINDS = [*BITSANDBYTES, "torchao"]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
ROUNDING = {"int8": 0.02}
"""What is relative to the largest where the base rounds its input too; else 1e-5."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def quantisation(kind: str):
    """A configuration for transformers; skips without the library."""
    if kind in BITSANDBYTES:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        return BitsAndBytesConfig(**BITSANDBYTES[kind])
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(**SIZES).save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    quantisation(request.param)
    return request.param


@pytest.fixture
def load(checkpoint, kind):
    """Loads the base anew, quantised as the kind says."""

    def load(dtype: torch.dtype = torch.float32, **options):
        chosen = quantisation(kind)
        for name, value in options.items():
            setattr(chosen, name, value)
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=chosen, dtype=dtype
        ).eval()

    return load


def config(share: float = 0.3, **options) -> NeftConfig:
    return NeftConfig(mask=mask_for(tiny_llama(**SIZES), "llama", share), **options)


@torch.no_grad()
def dense(layer: nn.Module) -> torch.Tensor:
    """The weight that a quantised layer stands for, by the library that packed it."""
    if type(layer).__name__ == "Linear8bitLt":
        codes, scales = layer.weight.data, layer.state.SCB
        return codes.float() * (layer.weight.SCB if scales is None else scales)[:, None] / 127
    if type(layer).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.dequantize().float()


def dequantised(model: nn.Module) -> nn.Module:
    """The same model with ordinary layers."""
    plain = tiny_llama(**SIZES).eval()
    with torch.no_grad():
        for name, layer in plain.named_modules():
            packed = model.get_submodule(name)
            if isinstance(layer, nn.Linear) and type(packed.weight) is not nn.Parameter:
                layer.weight.copy_(dense(packed))
    return plain


def near(found: torch.Tensor, wanted: torch.Tensor, kind: str) -> None:
    """Equal up to what the kind rounds, measured by the largest."""
    limit = ROUNDING.get(kind, 1e-5) * wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit)


def quantised_layers(model: nn.Module) -> int:
    return sum(
        isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter
        for module in model.modules()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_has_the_quantised_base_s_bits(load, dtype):
    base = load(dtype)
    assert quantised_layers(base) == 14
    want = out(base)
    model = get_peft_model(base, config())
    assert torch.equal(out(model), want)
    layers = neft_layers(model).values()
    assert not any(layer.in_place for layer in layers)
    assert {value.dtype for value in values(model).values()} == {torch.float32}
    for layer in layers:
        held = read_neurons(
            dense(layer.get_base_layer()), layer.neft_indices["default"], layer.axis
        )
        error = (layer.neft_values["default"].detach() - held).abs().max()
        assert error <= held.abs().max() * (2**-8 if dtype == torch.bfloat16 else 1e-4)
    assert torch.equal(out(model.unload()), want)


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize("module", ["up_proj", "down_proj"])
def test_gradients_of_a_layer_are_those_of_the_dense_weight(load, kind, axis, module):
    packed = getattr(load().model.layers[0].mlp, module)
    rows = torch.tensor([0, 3, 17, 40])
    layer = NeftLinear(packed, "default", axis, 4, rows)
    weight = dense(packed).requires_grad_()
    x = torch.randn(2, 5, packed.in_features, generator=torch.Generator().manual_seed(1))
    sides = []
    for linear in (layer, lambda x: nn.functional.linear(x, weight)):
        seen = x.clone().requires_grad_()
        y = linear(seen)
        (y * torch.arange(y.numel()).reshape(y.shape).sin()).sum().backward()
        sides.append((y.detach(), seen.grad))
    for found, wanted in zip(*sides, strict=True):
        near(found, wanted, kind)
    # The neurons see the input itself, however the base rounds it.
    wanted = read_neurons(weight.grad, rows, axis)
    torch.testing.assert_close(layer.neft_values["default"].grad, wanted, rtol=1e-5, atol=1e-5)


def test_training_is_that_of_the_dense_weights_with_masked_gradients(load, kind):
    base = load()
    reference = get_peft_model(dequantised(base), config(form="in_place"))
    whole = dequantised(base)
    packed = dequantised(base).state_dict()
    model = get_peft_model(base, config())
    start = values(model)
    ids = {"input_ids": IDS, "labels": IDS}
    for one in (model, whole):
        one(**ids).loss.backward()
    for name, layer in neft_layers(model).items():
        weight = whole.get_submodule(name.removeprefix("base_model.model.")).weight
        wanted = read_neurons(weight.grad, layer.neft_indices["default"], layer.axis)
        near(layer.neft_values["default"].grad, wanted, kind)
    model.zero_grad()
    losses = [train(one, 6, torch.optim.SGD) for one in (model, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=ROUNDING.get(kind, 1e-5))
    assert losses[0][-1] != losses[0][0]
    for name, wanted in values(reference).items():
        # Small changes of values that are rounded to fp32.
        moved = wanted - start[name]
        limit = max(ROUNDING.get(kind, 1e-4) * moved.abs().max().item(), 1e-8)
        torch.testing.assert_close(values(model)[name], wanted, rtol=0, atol=limit)
        assert moved.abs().max() > 1e-6
    for name, weight in dequantised(model.unload()).state_dict().items():
        assert torch.equal(weight, packed[name]), name


def test_saved_and_loaded_over_a_base_quantised_anew(load, tmp_path):
    model = get_peft_model(load(), config())
    train(model)
    want = out(model.eval())
    assert not torch.equal(want, out(load()))
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        assert torch.equal(out(PeftModel.from_pretrained(load(), tmp_path, **options)), want)
    own = load()
    own.load_adapter(tmp_path)
    assert torch.equal(out(own), want)


def test_loaded_with_its_base(load, kind, checkpoint, tmp_path):
    base = load()
    base.name_or_path = base.config._name_or_path = str(checkpoint)
    model = perturbed(get_peft_model(base, config(base_model_name_or_path=str(checkpoint))))
    model.save_pretrained(tmp_path)
    again = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation(kind), dtype=torch.float32
    )
    assert torch.equal(out(again), out(model))


def test_what_a_weight_stands_for_is_the_same_whoever_asks_when(load):
    """In training and evaluation, under autocast, before and after a forward pass."""
    base = load(torch.float32)
    layer = base.model.layers[0].mlp.up_proj
    rows = torch.tensor([0, 5, 9])
    found = []
    for mode in (True, False):
        layer.train(mode)
        found.append(probe(layer, rows, ROWS))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(probe(layer, rows, ROWS))
        assert layer.training == mode
    out(base)
    found.append(probe(layer, rows, ROWS))
    assert all(torch.equal(one, found[0]) for one in found)
    torch.testing.assert_close(found[0], dense(layer)[rows], rtol=1e-4, atol=1e-6)


def test_several_adapters_disabled_switched_and_deleted(load):
    base = load()
    plain = out(base)
    model = perturbed(get_peft_model(base, config()))
    first = out(model)
    model.add_adapter("b", config(share=0.5))
    perturbed(model, "b", seed=1)
    with model.disable_adapter():
        assert torch.equal(out(model), plain)
    assert torch.equal(out(model), first)
    model.set_adapter("b")
    second = out(model)
    model.base_model.set_adapter(["default", "b"])
    both = out(model)
    assert not torch.equal(both, first)
    assert not torch.equal(both, second)
    model.set_adapter("default")
    model.delete_adapter("b")
    assert torch.equal(out(model), first)


def test_merging_is_refused_and_possible_over_the_dequantised_base(load, kind, tmp_path):
    base = load()
    model = perturbed(get_peft_model(base, config()))
    want = out(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NeftError, match="a quantised weight can't take merged neurons") as told:
            merge()
        assert "\n" not in str(told.value)
    assert torch.equal(out(model), want)
    model.save_pretrained(tmp_path)
    plain = model.unload()
    reference = dequantised(plain)
    if kind in BITSANDBYTES:
        plain = plain.dequantize()
        for name, weight in reference.state_dict().items():
            torch.testing.assert_close(
                plain.state_dict()[name].float(), weight, rtol=1e-3, atol=1e-4
            )
    merged = PeftModel.from_pretrained(reference, tmp_path).merge_and_unload()
    assert quantised_layers(merged) == 0
    near(out(merged), want, kind)


def test_where_one_weight_can_t_be_written_none_is():
    torch.manual_seed(0)
    plain = nn.Linear(6, 9)
    base = nn.Sequential(plain, Packed(nn.Linear(9, 5)))
    groups = {"0": Group("0", ROWS, 0, 9, 6), "1": Group("1", ROWS, 0, 5, 9)}
    mask = NeuronMask({name: torch.tensor([1, 3]) for name in groups}, groups, 99)
    before = plain.weight.detach().clone()
    model = perturbed(get_peft_model(base, NeftConfig(mask=mask)))
    x = torch.randn(3, 6)
    want = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NeftError, match="Packed: a quantised weight can't take merged neurons"):
            merge()
        assert not any(layer.merged for layer in neft_layers(model).values())
        assert torch.equal(model(x), want)
    only = NeuronMask({"0": mask.indices["0"]}, {"0": groups["0"]}, 99)
    model.add_adapter("plain", NeftConfig(mask=only))
    perturbed(model, "plain")
    model.set_adapter("plain")
    want = model(x)
    merged = model.merge_and_unload(adapter_names=["plain"])
    torch.testing.assert_close(merged(x), want)
    assert not torch.equal(merged[0].weight, before)


def test_prepared_for_training_and_checkpointed(load):
    grads = []
    for prepare in (False, True):
        base = load()
        if prepare:
            prepare_model_for_kbit_training(base, True, {"use_reentrant": False})
        model = get_peft_model(base, config()).train()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_values_are_fp32_whatever_precision_is_asked_for(load):
    model = get_peft_model(load(torch.bfloat16), config(), autocast_adapter_dtype=False)
    assert {value.dtype for value in values(model).values()} == {torch.float32}


def test_values_cast_to_a_low_precision_are_told(load):
    model = get_peft_model(load(), config())
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(torch.bfloat16)
    out(model)
    with pytest.raises(NeftError, match=re.escape("they were cast to bfloat16, where small steps")):
        train(model)
    for parameter in trained:
        parameter.data = parameter.data.float()
    train(model)


@pytest.mark.parametrize("kind", ["int8", "nf4"], indirect=True)
def test_trl_trains_over_a_quantised_base(load, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset

    from neft_core.models import build_tokenizer

    rows = torch.randint(3, 64, (12, 10), generator=torch.Generator().manual_seed(2))
    settings = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **QUIET,
    )
    trainer = trl.SFTTrainer(
        load(),
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=build_tokenizer(["a b c"], 300, 64),
        peft_config=config(task_type="CAUSAL_LM"),
    )
    with pytest.raises(NeftError, match="as TRL does over bitsandbytes"):
        trainer.train()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    before = values(trainer.model)
    trainer.train()
    after = values(trainer.model)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    trainer.save_model(str(tmp_path / "final"))
    again = PeftModel.from_pretrained(load(), tmp_path / "final")
    assert torch.equal(out(again), out(trainer.model.eval()))


@pytest.mark.parametrize("kind", ["torchao"], indirect=True)
def test_a_base_that_quantises_inputs_is_not_trained(kind):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    base = tiny_llama(**SIZES)
    quantize_(base, Int8DynamicActivationInt8WeightConfig())
    want = out(base)
    model = get_peft_model(base, config())
    assert torch.equal(out(model), want)
    assert torch.isfinite(out(perturbed(model))).all()
    with pytest.raises(NeftError, match="as it is quantised, no gradient goes through it"):
        model(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_of_a_quantised_model_train_in_place(kind, family, tmp_path):
    """Both libraries leave 3-D parameters as they are."""
    dense = tiny_model(family, head_dim=8)
    dense.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation(kind), dtype=torch.float32
    )
    assert quantised_layers(base)
    ids = IDS % 13 + 3
    with torch.no_grad():
        plain = base(ids).logits
        model = get_peft_model(base, NeftConfig(mask=expert_mask(dense, family)))
        near(model(ids).logits, plain, kind)
        tuned = perturbed(model)(ids).logits
        assert all(layer.in_place for layer in neft_layers(model).values())
        assert (tuned - plain).abs().max() > 0.05 * plain.abs().max()
        near(model.merge_and_unload()(ids).logits, tuned, kind)


def test_quantised_experts_are_refused():
    base = tiny_model("gpt_oss")
    mask = expert_mask(base, "gpt_oss")
    experts = base.model.layers[0].mlp.experts
    own = experts.gate_up_proj
    experts.gate_up_proj = nn.Parameter(own.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(NeftError, match=r"is a quantised Parameter of torch.float8_e4m3fn in this"):
        get_peft_model(base, NeftConfig(mask=mask))
    experts.gate_up_proj = own
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    base.model.layers[0].mlp.experts = Mxfp4GptOssExperts(base.config)
    told = "Mxfp4GptOssExperts computes in its own way.*a model loaded with dequantize=True"
    with pytest.raises(NeftError, match=told):
        get_peft_model(base, NeftConfig(mask=mask))


@pytest.mark.parametrize("kind", ["torchao"], indirect=True)
def test_experts_that_torchao_quantised_are_refused(kind):
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    base = tiny_model("gpt_oss")
    mask = expert_mask(base, "gpt_oss")
    one = {r"re:.*experts\.gate_up_proj": Int8WeightOnlyConfig()}
    quantize_(base, FqnToConfig(one), filter_fn=None)
    with pytest.raises(NeftError, match="is a quantised Int8Tensor"):
        get_peft_model(base, NeftConfig(mask=mask))


def test_gpt_oss_in_mxfp4_is_dequantised_saved_and_trained(tmp_path):
    """As its checkpoints come: blocks of 32 numbers of 4 bits, with an exponent for each block."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    base = tiny_model("gpt_oss", dtype=torch.bfloat16, **sizes)
    base.save_pretrained(tmp_path / "mxfp4")
    file = tmp_path / "mxfp4" / "model.safetensors"
    weights = load_file(file)
    generator = torch.Generator().manual_seed(1)
    for name in [n for n in weights if n.endswith("experts.gate_up_proj") or "down_proj" in n]:
        if name.endswith("bias"):
            continue
        experts, inside, out = weights.pop(name).shape
        shape = (experts, out, inside // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        weights[f"{name}_blocks"] = blocks
        weights[f"{name}_scales"] = torch.full(shape, 124, dtype=torch.uint8)
    save_file(weights, file, {"format": "pt"})
    settings = json.loads((tmp_path / "mxfp4" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (tmp_path / "mxfp4" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(NeftError, match="and not quantised"):
        score_neurons(tmp_path / "mxfp4", tmp_path / "mxfp4", layout="mlp")
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mxfp4", quantization_config=Mxfp4Config(dequantize=True), dtype="bfloat16"
    )
    # Otherwise transformers 5.23 writes bf16 weights under the names of blocks.
    plain.save_pretrained(tmp_path / "base", save_original_format=False)
    assert "quantization_config" not in json.loads((tmp_path / "base/config.json").read_text())
    scores = score_neurons(tmp_path / "base", tmp_path / "base", layout="mlp")
    mask = select_neurons(scores, policy="lowest", percent=9)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="bfloat16")
    model = get_peft_model(again, NeftConfig(mask=mask))
    ids = IDS % 13 + 3
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0.02, atol=0.02)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert any(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
