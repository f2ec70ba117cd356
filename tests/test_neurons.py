import re

import pytest
import torch

from neft_core import neurons
from neft_core.errors import NeftError
from neft_core.neurons import Group, candidates, count_parameters

HIDDEN, INNER, LAYERS = 8, 12, 2


def tiny_shapes(model_type: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a real, tiny model of transformers, built without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {
            "n_embd": HIDDEN,
            "n_inner": INNER,
            "n_layer": LAYERS,
            "n_head": 2,
            "vocab_size": 16,
        },
        "opt": {"hidden_size": HIDDEN, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN},
        "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 2},
    }.get(model_type, {})
    common = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type in ("gpt2", "bloom"):
        common = {"vocab_size": 16}
    config = AutoConfig.for_model(model_type, **{**common, **sizes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("model_type", sorted(neurons.FAMILIES))
def test_the_table_fits_the_models_of_transformers(model_type):
    shapes = tiny_shapes(model_type)
    groups = candidates(shapes, model_type)
    inner = 4 * HIDDEN if model_type == "bloom" else INNER
    assert len(groups) == 2 * LAYERS
    assert all(f"{group.module}.weight" in shapes for group in groups)
    assert [group.axis for group in groups] == [0, 1] * LAYERS
    assert {(group.count, group.length) for group in groups} == {(inner, HIDDEN)}
    assert all(group.fits(shapes[f"{group.module}.weight"]) for group in groups)


def llama(layers: int, prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (16, HIDDEN)}
    for n in range(layers):
        for name, shape in (
            ("mlp.down_proj", (HIDDEN, INNER)),
            ("mlp.gate_proj", (INNER, HIDDEN)),
            ("mlp.up_proj", (INNER, HIDDEN)),
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
        ):
            shapes[f"{prefix}layers.{n}.{name}.weight"] = shape
    return shapes


def test_the_paper_s_arithmetic():
    shapes = {
        name: tuple({HIDDEN: 4096, INNER: 11008}.get(size, size) for size in shape)
        for name, shape in llama(32).items()
    }
    groups = candidates(shapes, "llama")
    assert sum(group.count for group in groups) == 704_512
    assert {group.length for group in groups} == {4096}


def test_layers_are_in_the_order_of_their_numbers():
    shapes = dict(reversed(llama(11).items()))
    modules = [group.module for group in candidates(shapes, "llama")]
    assert modules[:2] == ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    assert [int(re.findall(r"\d+", name)[0]) for name in modules[::2]] == list(range(11))


def test_gate_joins_the_candidates():
    groups = candidates(llama(1, prefix=""), "llama", "mlp+gate")
    assert groups == [
        Group("layers.0.mlp.gate_proj", 0, 0, INNER, HIDDEN),
        Group("layers.0.mlp.up_proj", 0, 0, INNER, HIDDEN),
        Group("layers.0.mlp.down_proj", 1, 0, INNER, HIDDEN),
    ]


def test_fused_up_starts_after_the_gate_and_joins_it():
    shapes = {
        "layers.0.mlp.gate_up_proj.weight": (2 * INNER, HIDDEN),
        "layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
    }
    down = Group("layers.0.mlp.down_proj", 1, 0, INNER, HIDDEN)
    assert candidates(shapes, "phi3") == [
        Group("layers.0.mlp.gate_up_proj", 0, INNER, INNER, HIDDEN),
        down,
    ]
    both = Group("layers.0.mlp.gate_up_proj", 0, 0, 2 * INNER, HIDDEN)
    assert candidates(shapes, "phi3", "mlp+gate") == [both, down]


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_is_stored_transposed_with_and_without_prefix(prefix):
    shapes = {
        f"{prefix}h.0.mlp.c_fc.weight": (HIDDEN, INNER),
        f"{prefix}h.0.mlp.c_proj.weight": (INNER, HIDDEN),
    }
    assert candidates(shapes, "gpt2") == [
        Group(f"{prefix}h.0.mlp.c_fc", 0, 0, INNER, HIDDEN, transposed=True),
        Group(f"{prefix}h.0.mlp.c_proj", 1, 0, INNER, HIDDEN, transposed=True),
    ]


def test_parameters_leave_out_buffers_and_a_tied_head():
    shapes = {
        "wte.weight": (10, 4),
        "h.0.attn.bias": (1, 1, 6, 6),
        "h.0.attn.masked_bias": (),
        "h.0.attn.c_attn.bias": (12,),
        "layers.0.attention.rotary_emb.inv_freq": (4,),
        "lm_head.weight": (10, 4),
    }
    assert count_parameters(shapes) == 40 + 12 + 40
    assert count_parameters(shapes, tied=True) == 40 + 12


@pytest.mark.parametrize(
    ("shapes", "model_type", "layout", "text"),
    [
        (llama(1), "mamba", "mlp", "model_type: got 'mamba'; known: bloom, gemma,"),
        (llama(1), "llama", "heads", "layout: got 'heads'; known: mlp, mlp+gate"),
        (
            tiny_shapes("gpt2"),
            "gpt2",
            "mlp+gate",
            "layout: got 'mlp+gate', but models of type 'gpt2' have no gate; use 'mlp'",
        ),
        (llama(1), "gpt2", "mlp", "model: none of 5 weights is named 'h.N.mlp.c_fc.weight'"),
        (llama(1) | llama(1, "draft."), "llama", "mlp", "several stacks of layers (draft.layers,"),
        (
            {"layers.3.mlp.up_proj.weight": (INNER, HIDDEN)},
            "llama",
            "mlp",
            "model: layers.3 has no mlp.down_proj.weight; the checkpoint is incomplete",
        ),
        (
            llama(1) | {"model.layers.0.mlp.up_proj.weight": (INNER * HIDDEN // 2, 1)},
            "llama",
            "mlp",
            "model.layers.0.mlp.up_proj (48, 1), model.layers.0.mlp.down_proj (8, 12)",
        ),
        (
            {
                "layers.0.mlp.gate_up_proj.weight": (7, HIDDEN),
                "layers.0.mlp.down_proj.weight": (HIDDEN, 3),
            },
            "phi3",
            "mlp",
            "gate_up_proj.weight has 7 rows; 2 parts of equal size are needed",
        ),
    ],
)
def test_what_is_not_understood_is_named(shapes, model_type, layout, text):
    with pytest.raises(NeftError, match=re.escape(text)) as caught:
        candidates(shapes, model_type, layout)
    assert "\n" not in str(caught.value)
