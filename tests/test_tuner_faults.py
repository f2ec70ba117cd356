"""What breaks in upon a training: Ctrl-C, inference mode, values changed unseen, odd masks."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from conftest import tiny_llama
from families import shapes_of, tiny_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_overlay import KINDS, dense, inputs, layer_of, plain
from test_tuner import Packed, pair, tied
from test_tuner_peft import IDS, config, out, perturbed
from torch.utils._python_dispatch import TorchDispatchMode

from neft_core.errors import NeftError
from neft_core.layer import NeftLinear
from neft_core.masks import NeuronMask
from neft_core.neurons import COLUMNS, ROWS, candidates
from neft_core.tuner import NeftConfig, neft_layers

pytestmark = pytest.mark.usefixtures("one_thread")


class CtrlC(TorchDispatchMode):
    """Ctrl-C while an operation runs: Python raises it as soon as the operation is done.

    Views take no time that a signal could come in.
    """

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.left -= not func.is_view
        if self.left == 0:
            self.left = -1
            raise KeyboardInterrupt
        return found


def use(layer: NeftLinear, how: str) -> None:
    """Writes, packs, lifts and writes again."""
    optimizer = torch.optim.SGD([layer.neft_values["default"]], lr=0.1)
    for step in range(2):
        if how == "merge":
            layer.merge()
            layer.unmerge()
        layer(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer(inputs(step))
        if how == "disable":
            layer.enable_adapters(False)
            layer(inputs(step))
            layer.enable_adapters(True)


@pytest.mark.parametrize(("axis", "transposed"), [KINDS[0], KINDS[3]])
@pytest.mark.parametrize("share", [0.3, 0.75])
@pytest.mark.parametrize("how", ["train", "disable", "merge"])
def test_ctrl_c_leaves_what_can_be_gone_on_with(axis, transposed, share, how):
    base, after, hit = plain(transposed), 0, True
    while hit:
        layer, after = layer_of(axis, transposed, share), after + 1
        with torch.no_grad():
            layer.neft_values["default"].add_(1)
        try:
            with CtrlC(after):
                use(layer, how)
            hit = False
        except KeyboardInterrupt:
            hit = True
        if layer.merged:
            layer.unmerge()
        layer.enable_adapters(True)
        want = torch.nn.functional.linear(inputs(), dense(layer, base), base.bias)
        torch.testing.assert_close(layer(inputs()), want)
        layer.settle()
        assert torch.equal(layer.base_layer.weight, base.weight), after
    assert after > 30


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_evaluated_in_inference_mode_between_steps(share):
    models = [get_peft_model(tiny_llama(), config(share=share)) for _ in range(2)]
    for model, mode in zip(models, (torch.inference_mode, torch.no_grad), strict=True):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(4):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with mode():
                model(IDS)
                with model.disable_adapter():
                    assert torch.equal(model(IDS).logits, out(tiny_llama()))
    assert torch.equal(*map(out, models))
    for model in models:
        assert torch.equal(out(model.unload()), out(tiny_llama()))


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_a_packed_weight_is_looked_at_in_inference_mode(axis):
    plain_layer, rows = pair(axis, torch.float32)
    layer = NeftLinear(Packed(plain_layer), "default", axis, 3, rows).double().float()
    with torch.inference_mode():
        layer(torch.ones(4, 6))
    layer(torch.ones(4, 6)).sum().backward()
    assert layer.neft_values["default"].grad.any()


def test_averaged_values_come_and_go_unseen_by_torch():
    """As averages of weights do it: `.data.copy_`, which no version counter sees."""
    model = get_peft_model(tiny_llama(), config())
    trained = [p for p in model.parameters() if p.requires_grad]
    averaged = perturbed(copy.deepcopy(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    want = [p.grad.clone() for p in trained]
    own = [p.detach().clone() for p in trained]
    model.zero_grad()
    others = [p for p in averaged.parameters() if p.requires_grad]
    for parameter, other in zip(trained, others, strict=True):
        parameter.data.copy_(other)
    assert torch.equal(out(model), out(averaged))
    for parameter, other in zip(trained, own, strict=True):
        parameter.data.copy_(other)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(trained, want, strict=True))


def test_a_merged_tied_weight_is_no_parameter_of_its_own():
    base, mask = tied()
    model = perturbed(get_peft_model(base, NeftConfig(mask=mask)))
    names = list(model.state_dict())
    model.merge_adapter()
    assert list(model.state_dict()) == names
    again = copy.deepcopy(model)
    again.unmerge_adapter()
    inner = again.get_base_model()
    assert inner.lm_head.base_layer.weight is inner.get_input_embeddings().weight


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter's folder, and a way to load it."""
    perturbed(get_peft_model(tiny_llama(), config())).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("part", "told"),
    [("neft_values", "its neurons have no values"), ("neft_indices", "its neurons aren't loaded")],
)
def test_an_adapter_without_some_tensors_is_told(adapter, part, told, low_cpu_mem_usage):
    """Else neurons would be zero."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if name.endswith(part))
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, file)
    model = PeftModel.from_pretrained(tiny_llama(), adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    with pytest.raises(NeftError, match=f"adapter 'default': {told}"):
        out(model)


@pytest.mark.parametrize("wrong", [3, {}, [torch.tensor([1])]])
def test_what_is_no_mask_is_told(wrong):
    with pytest.raises(NeftError, match=r"^NeftConfig: mask: got (int|dict|list); a NeuronMask or"):
        NeftConfig(mask=wrong)


def test_a_configuration_that_no_version_wrote_is_told(adapter):
    file = adapter / "adapter_config.json"
    content = json.loads(file.read_text())
    without = {n: {**entry, "axis": 0} for n, entry in content["modules"].items()}
    for entry in without.values():
        del entry["axis"]
    for modules in (without, list(without)):
        file.write_text(json.dumps({**content, "modules": modules}))
        with pytest.raises(NeftError, match="modules: each needs axis, count, experts, length"):
            PeftModel.from_pretrained(tiny_llama(), adapter)
    file.write_text(json.dumps({**content, "unknown": 1}))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .*unknown"):
        PeftModel.from_pretrained(tiny_llama(), adapter)


@pytest.mark.parametrize(
    ("family", "layout", "wider"),
    [
        ("llama", "mlp", {"intermediate_size": 48}),
        ("gpt2", "mlp", {"n_inner": 48}),
        ("phi3", "mlp+gate", {"intermediate_size": 48}),
        ("qwen3_moe", "mlp+gate", {"moe_intermediate_size": 48}),
    ],
)
def test_a_wider_model_does_not_take_an_adapter(family, layout, wider, tmp_path):
    """Each neuron would find a place in it, of the right length, and mean nothing there."""
    base = tiny_model(family)
    groups = candidates(shapes_of(base), family, layout)
    some = {group.module: group.indices(torch.arange(0, group.count, 3)) for group in groups}
    mask = NeuronMask(some, {group.module: group for group in groups}, 1)
    get_peft_model(base, NeftConfig(mask=mask)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_model(family), tmp_path)
    with pytest.raises(NeftError, match=r"adapter: .* in this model; use the mask's own model"):
        PeftModel.from_pretrained(tiny_model(family, **wider), tmp_path)


@pytest.mark.parametrize("before", [True, False])
def test_offloaded_neurons_are_told(before):
    """Else Accelerate's offloading computes with whatever lies in memory."""
    base = tiny_llama()
    if before:
        cpu_offload(base, torch.device("cpu"))
    model = perturbed(get_peft_model(base, config()))
    if not before:
        cpu_offload(model, torch.device("cpu"))
    with pytest.raises(NeftError, match="trained neurons: they were offloaded with their layer"):
        out(model)


@pytest.mark.parametrize("trained", [False, True])
def test_a_base_that_is_overwritten_unseen_by_torch_stays_as_it_is_then(trained):
    model, other = get_peft_model(tiny_llama(), config()), tiny_llama(seed=5)
    perturbed(model)
    out(model)
    if trained:
        model(input_ids=IDS, labels=IDS).loss.backward()
    new = {f"base_model.model.{name}": tensor for name, tensor in other.state_dict().items()}
    for name, parameter in model.named_parameters():
        if "neft_values" not in name:
            parameter.data.copy_(new[name.replace(".base_layer", "")])
    out(model)
    assert torch.equal(out(model.unload()), out(other))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_moved_by_swapping_tensors(share):
    model = get_peft_model(tiny_llama(), config(share=share))
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(out(model), out(tiny_llama()))
    assert all(layer.in_place for layer in neft_layers(model).values())
    assert torch.equal(out(model.unload()), out(tiny_llama()))
