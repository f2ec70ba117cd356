"""What trains in each method, what its adapter keeps, and the proof that nothing else moved."""

import pytest
import torch
from conftest import tiny_llama

from neft_core.errors import NeftError
from neft_core.files import load_tensors, read_json, save_tensors
from neft_core.masks import NeuronMask, NeuronScores
from neft_core.methods import METHODS, moved_outside, trained_parameters
from neft_core.neurons import candidates, count_parameters
from neft_core.selection import select_neurons

MLP = {f"model.layers.{n}.mlp.{part}_proj.weight" for n in (0, 1) for part in ("up", "down")}
PEFT = "base_model.model."
LORA = {
    f"base_model.model.model.layers.{n}.{place}_proj.lora_{side}.default.weight"
    for n in (0, 1)
    for place in [f"self_attn.{x}" for x in "qkvo"] + [f"mlp.{x}" for x in ("gate", "up", "down")]
    for side in "AB"
}
OPTIONS = {"lora": {"rank": 2, "alpha": None, "dropout": 0.0}}
TOLD = {"base": "abc", "location": "models/tiny", "revision": ""}


def tiny_gpt2(seed: int = 0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=64, n_embd=16, n_inner=24, n_layer=2, n_head=2, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def mask_for(model, model_type: str, share: float = 0.3) -> NeuronMask:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    groups = {group.module: group for group in candidates(shapes, model_type, "mlp")}
    torch.manual_seed(5)
    scores = {name: torch.rand(group.count).double() for name, group in groups.items()}
    provenance = {"model_type": model_type, "layout": "mlp"}
    total = count_parameters(shapes, tied=True)
    return select_neurons(NeuronScores(scores, groups, total, provenance), share=share)


def prepared(name: str, model, model_type: str = "llama"):
    mask = mask_for(model, model_type)
    return METHODS[name].prepare(model, OPTIONS.get(name, {}), mask, model_type)


def autocast(model):
    """As in training: bf16 where frozen weights are, amid which fp32 ones train."""
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


def train_a_little(model, steps: int = 3) -> None:
    torch.manual_seed(7)
    parameters = list(trained_parameters(model).values())
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(steps):
        ids = torch.randint(3, 64, (4, 10))
        with autocast(model):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model):
    model.eval()
    with autocast(model):
        return model(input_ids=torch.arange(3, 33).reshape(2, 15)).logits.float()


@pytest.mark.parametrize(
    ("name", "tied", "expected"),
    [
        ("full", True, {name for name, _ in tiny_llama().named_parameters()}),
        ("in_out", True, MLP),
        ("embed", True, {"model.embed_tokens.weight"}),
        ("embed", False, {"model.embed_tokens.weight"}),
        ("lora", True, LORA),
        ("neft", True, {PEFT + n.replace(".weight", ".neft_values.default") for n in MLP}),
    ],
)
def test_exactly_these_parameters_train(name, tied, expected):
    model = prepared(name, tiny_llama(tie_word_embeddings=tied))
    assert set(trained_parameters(model)) == expected
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_a_little(model)
    moved = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    # The head is the embedding where it is tied.
    allowed = expected | ({"lm_head.weight"} if tied and name in ("full", "embed") else set())
    assert moved <= allowed
    assert expected <= moved


def test_the_head_trains_with_a_tied_embedding_only():
    for tied in (True, False):
        model = prepared("embed", tiny_llama(tie_word_embeddings=tied))
        head = model.lm_head.weight
        before = head.detach().clone()
        train_a_little(model)
        assert head.equal(before) != tied


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_is_fp32_in_a_bf16_model(name):
    model = prepared(name, tiny_llama().bfloat16())
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == (set() if name == "full" else {torch.bfloat16})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_saved_adapter_gives_the_same_logits_again(tmp_path, name, dtype, tied):
    def base():
        return tiny_llama(tie_word_embeddings=tied).to(dtype)

    method = METHODS[name]
    model = prepared(name, base())
    untrained = logits(model)
    train_a_little(model)
    method.save(model, tmp_path, TOLD)
    expected = logits(model)
    assert not expected.equal(untrained)

    torch.manual_seed(99)
    again = method.load(base(), OPTIONS.get(name, {}), "llama", tmp_path, "abc")
    assert logits(again).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_gpt2_trains_and_comes_back(tmp_path, name, dtype):
    method = METHODS[name]
    model = prepared(name, tiny_gpt2().to(dtype), "gpt2")
    train_a_little(model)
    method.save(model, tmp_path, TOLD)
    expected = logits(model)
    again = method.load(tiny_gpt2().to(dtype), OPTIONS.get(name, {}), "gpt2", tmp_path, "abc")
    assert logits(again).equal(expected)
    if name == "in_out":
        assert set(trained_parameters(model)) == {
            f"transformer.h.{n}.mlp.{part}.weight" for n in (0, 1) for part in ("c_fc", "c_proj")
        }
    if name == "neft":
        compared, moved = moved_outside(model, tiny_gpt2().to(dtype))
        assert not moved
        trained = mask_for(tiny_gpt2(), "gpt2").parameters
        assert compared == sum(p.numel() for p in tiny_gpt2().parameters()) - trained


@pytest.mark.parametrize(("name", "drop"), [(n, d) for n in METHODS for d in (True, False)])
def test_an_adapter_of_another_form_is_refused(tmp_path, name, drop):
    method = METHODS[name]
    method.save(prepared(name, tiny_llama()), tmp_path, TOLD)
    state, metadata = load_tensors(tmp_path / method.file, "")
    one = sorted(state)[0]
    value = state.pop(one)
    if not drop:
        state[one] = value
        state[one.replace("layers.0", "layers.7") if "layers.0" in one else f"x.{one}"] = (
            value.clone()
        )
    save_tensors(tmp_path / method.file, state, metadata)
    with pytest.raises(NeftError, match="is on one side only; the adapter is of another model"):
        method.load(tiny_llama(), OPTIONS.get(name, {}), "llama", tmp_path, "abc")


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_of_another_base_is_refused(tmp_path, name):
    method = METHODS[name]
    method.save(prepared(name, tiny_llama()), tmp_path, TOLD)
    with pytest.raises(NeftError, match=f"{method.file}: trained on another base model; train"):
        method.load(tiny_llama(), OPTIONS.get(name, {}), "llama", tmp_path, "other")
    if name in ("lora", "neft"):
        with pytest.raises(NeftError, match=r"not an adapter of this model|use the mask's own"):
            method.load(tiny_llama(hidden_size=32), {}, "llama", tmp_path, "abc")


@pytest.mark.parametrize("name", ["lora", "neft"])
def test_an_adapter_s_directory_is_what_peft_loads(tmp_path, name):
    from peft import PeftModel

    model = prepared(name, tiny_llama())
    train_a_little(model)
    METHODS[name].save(model, tmp_path, TOLD)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert logits(again).equal(logits(model))
    config = read_json(tmp_path / "adapter_config.json")
    assert config["base_model_name_or_path"] == "models/tiny"
    assert str(tmp_path) not in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_untouched_weights_are_counted_and_equal(make):
    kind = "llama" if make is tiny_llama else "gpt2"
    model = prepared("neft", make(), kind)
    train_a_little(model)
    compared, moved = moved_outside(model, make())
    total = sum(p.numel() for p in make().parameters())
    assert moved == []
    assert compared == total - mask_for(make(), kind).parameters


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.0.input_layernorm.weight", (3,)),
        ("model.embed_tokens.weight", (5, 2)),
        ("model.layers.1.mlp.gate_proj.weight", (0, 0)),
        ("model.layers.1.mlp.up_proj.weight", "unselected"),
        ("model.layers.0.mlp.down_proj.weight", "unselected"),
    ],
)
def test_one_bit_of_an_unselected_weight_is_noticed(name, where):
    mask = mask_for(tiny_llama(), "llama")
    model = METHODS["neft"].prepare(tiny_llama(), {}, mask, "llama")
    train_a_little(model)
    parameters = dict(model.named_parameters())
    inner = name.replace(".weight", ".base_layer.weight")
    weight = parameters.get(PEFT + name, parameters.get(PEFT + inner))
    if where == "unselected":
        module = name.removesuffix(".weight")
        chosen = set(mask.indices[module].tolist())
        free = min(set(range(mask.groups[module].count)) - chosen)
        where = (free, 1) if mask.groups[module].axis == 0 else (1, free)
    with torch.no_grad():
        # The last bit of the mantissa.
        weight.view(torch.int32)[where] ^= 1
    assert moved_outside(model, tiny_llama())[1] == [name]


def test_minus_zero_is_another_bit():
    def zeroed():
        model = tiny_llama()
        with torch.no_grad():
            model.model.norm.weight.zero_()
        return model

    model = prepared("neft", zeroed())
    with torch.no_grad():
        model.get_base_model().model.norm.weight.neg_()
    assert moved_outside(model, zeroed())[1] == ["model.norm.weight"]
