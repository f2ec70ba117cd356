import re
from dataclasses import replace

import pytest
import torch
from families import EXPERTS, HIDDEN, INNER, LAYERS, shapes_of, tiny_model
from torch import nn

from neft_core import checkpoints, neurons
from neft_core.errors import NeftError
from neft_core.groups import COLUMNS, ROWS, Group, read_neurons, write_neurons
from neft_core.neurons import candidates, count_parameters, is_tied, sources
from neft_core.patterns import Patterns, scorable

TYPES = sorted(neurons.FAMILIES)
LLAMA, PLAIN = (48, 72, 144, 216, 176), (48, None, 64, 112, 104)
MIXTURE = (144, 216, 144, 360, 304)
COUNTS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
                     "phi3"), LLAMA),
    **dict.fromkeys(("gpt2", "gpt_neox", "opt"), PLAIN),
    "bloom": (128, None, 64, 192, 144),
    "mixtral": MIXTURE,
    "gpt_oss": MIXTURE,
    "olmoe": (144, 216, 48, 264, 240),
    "qwen3_moe": (120, 180, 144, 324, 264),
    "qwen2_moe": (240, 360, 144, 504, 416),
}  # fmt: skip
"""Candidates of the layouts by hand: of a Llama's layer 12 up, 12 down, 12 gate, 24 + 12 + 12 of
query, key and value, 24 output columns; as rows 8 of down and 8 of output."""


@pytest.mark.parametrize("model_type", TYPES)
def test_the_table_fits_the_models_of_transformers(model_type):
    shapes = shapes_of(tiny_model(model_type))
    for layout, count in zip(neurons.LAYOUTS, COUNTS[model_type], strict=True):
        if count is None:
            with pytest.raises(NeftError, match="have no gate"):
                candidates(shapes, model_type, layout)
            continue
        groups = candidates(shapes, model_type, layout)
        assert sum(group.count for group in groups) == count
        assert len({group.module for group in groups}) == len(groups), "one group a module"
        assert all(group.fits(shapes[group.parameter]) for group in groups)
        if layout == "rows":
            whole = sum(torch.Size(shapes[group.parameter]).numel() for group in groups)
            assert sum(group.count * group.length for group in groups) == whole
            assert {group.axis for group in groups} == {ROWS}
        else:
            assert {group.length for group in groups} == {HIDDEN}
        layers = [int(re.findall(r"\d+", group.module)[0]) for group in groups]
        assert layers == sorted(layers)
        assert set(layers) == set(range(LAYERS))


def changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Features of the last axis that differ anywhere."""
    return (before != after).flatten(0, -2).any(0).nonzero().flatten().tolist()


def erased(weight: torch.Tensor, group: Group, neuron: int) -> torch.Tensor:
    """Set one neuron of a weight to zero; what it was, [D]."""
    index = torch.tensor([neuron])
    was = read_neurons(weight, index, group.axis, group.transposed)
    write_neurons(weight, torch.zeros_like(was), index, group.axis, group.transposed)
    return was[0]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_neuron_is_one_feature_of_the_real_layer(model_type):
    """A row makes one output, a column spends one input: whatever way the weight is stored."""
    model = tiny_model(model_type, dtype=torch.float64)
    for group in candidates(shapes_of(model), model_type, "all"):
        if group.experts:
            continue
        layer = model.get_submodule(group.module)
        features = layer.weight.shape[0 if group.transposed else 1]
        x = torch.randn(5, features, dtype=torch.float64)
        for neuron in group.indices(torch.tensor([0, group.count // 2, group.count - 1])).tolist():
            before = layer(x)
            was = erased(layer.weight, group, neuron)
            if group.axis == ROWS:
                assert changed(before, layer(x)) == [neuron]
            else:
                torch.testing.assert_close(before - layer(x), x[:, [neuron]] * was)


@pytest.mark.parametrize("model_type", TYPES)
def test_all_is_attention_and_the_mlp(model_type):
    shapes = shapes_of(tiny_model(model_type))
    gated = any("gate" in mlp for mlp in neurons.FAMILIES[model_type].mlps)
    attention = candidates(shapes, model_type, "attention")
    assert all("att" in neurons.role_of(group.module) for group in attention)
    both = attention + candidates(shapes, model_type, "mlp+gate" if gated else "mlp")
    every = candidates(shapes, model_type, "all")
    assert len(both) == len(every)
    assert all(group in both for group in every)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma"])
def test_up_and_gate_are_told_apart(model_type):
    """The units between are linear in up, and not in gate."""
    for layout, linear in (("mlp", True), ("mlp+gate", False)):
        model = tiny_model(model_type, dtype=torch.float64)
        group = candidates(shapes_of(model), model_type, layout)[0]
        mlp, unit = model.model.layers[0].mlp, 3
        weight = model.get_parameter(group.parameter)
        seen = []
        mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # noqa: B023
        index = torch.tensor([group.start + unit])
        row = read_neurons(weight, index, ROWS, False)
        x = torch.randn(6, HIDDEN, dtype=torch.float64)
        for scale in (0, 1, 2):
            write_neurons(weight, scale * row, index, ROWS, False)
            mlp(x)
        assert changed(seen[0], seen[1]) == changed(seen[1], seen[2]) == [unit]
        bend = (seen[2] - 2 * seen[1] + seen[0])[:, unit].abs().max().item()
        assert bend < 1e-12 if linear else bend > 1e-3


MIXTURES = [name for name in TYPES if any(p.experts for p in neurons.FAMILIES[name].parts)]


def test_mixtures_are_five():
    assert MIXTURES == ["gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]


def units_of(experts: nn.Module, x: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What one expert gives for tokens [T, H], and its units before down, [T, I]."""
    seen = []
    own = type(experts)._apply_gate
    experts._apply_gate = lambda out: seen.append(own(experts, out)) or seen[-1]
    experts.config._experts_implementation = "grouped_mm"
    chosen = torch.full((len(x), 1), expert)
    return experts(x, chosen, torch.ones(len(x), 1)), seen[0]


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_neuron_of_an_expert_is_one_unit_of_its_forward(model_type):
    """Linear in up and not in gate; a column of down spends the unit; other experts see nothing."""
    model = tiny_model(model_type)
    up, down = candidates(shapes_of(model), model_type, "mlp")[:2]
    both = candidates(shapes_of(model), model_type, "mlp+gate")[0]
    ups, every = (group.indices(torch.arange(group.count)) for group in (up, both))
    gates = every[~torch.isin(every, ups)]
    experts = model.model.layers[0].mlp.experts
    x, expert, unit = torch.randn(6, HIDDEN), 1, 4
    for indices, linear in ((ups, True), (gates, False)):
        index = indices[expert * INNER + unit][None]
        row = read_neurons(experts.gate_up_proj, index, up.axis, up.transposed)
        seen = []
        for scale in (0, 2, 1):
            write_neurons(experts.gate_up_proj, scale * row, index, up.axis, up.transposed)
            seen.append([units_of(experts, x, e)[1] for e in range(EXPERTS)])
        for e in range(EXPERTS):
            assert changed(seen[0][e], seen[1][e]) == ([unit] if e == expert else [])
        zero, double, own = (of[expert][:, unit] for of in seen)
        bend = (double - 2 * own + zero).abs().max().item()
        assert bend < 1e-5 if linear else bend > 1e-3
    before = [units_of(experts, x, e) for e in range(EXPERTS)]
    was = erased(experts.down_proj, down, expert * INNER + unit)
    for e in range(EXPERTS):
        spent = before[e][0] - units_of(experts, x, e)[0]
        want = before[e][1][:, [unit]] * was if e == expert else torch.zeros(6, HIDDEN)
        torch.testing.assert_close(spent, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_checkpoint_counts_and_holds_what_its_model_does(model_type, tied, tmp_path):
    """Saved as transformers saves it (experts apart), and with the names of memory."""
    model = tiny_model(model_type, tie_word_embeddings=tied)
    stored = dict(model.named_parameters())
    in_memory = shapes_of(model)
    model.save_pretrained(tmp_path)
    config = checkpoints.config(tmp_path)
    on_disk = checkpoints.shapes(tmp_path)
    assert is_tied(config) == tied
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(on_disk, is_tied(config)) == whole
    assert count_parameters({**on_disk, "lm_head.weight": (16, HIDDEN)}, True) == (
        whole - (0 if tied else 16 * HIDDEN)
    )
    for layout in ("mlp", "all", "rows"):
        groups = candidates(on_disk, model_type, layout)
        assert groups == candidates(in_memory, model_type, layout)
        for group in groups:
            neurons_read = []
            for source in sources(group, on_disk, model_type):
                path = checkpoints.locate(tmp_path)[source.parameter]
                with checkpoints.opened(path, "pt") as file:
                    neurons_read.append(source.read(file.get_slice(source.parameter)))
            weight = stored[group.parameter]
            every = group.indices(torch.arange(group.count))
            assert group.holds(every)
            want = read_neurons(weight, every, group.axis, group.transposed)
            assert torch.equal(torch.cat(neurons_read), want)
            here = sources(group, in_memory, model_type)
            assert [source.count for source in here] == [len(piece) for piece in neurons_read]
            assert torch.equal(torch.cat([s.read(weight.detach()) for s in here]), want)


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


MOE = {
    **{f"layers.0.mlp.experts.{e}.{role}_proj.weight": (INNER, HIDDEN)
       for e in range(2) for role in ("gate", "up")},
    **{f"layers.0.mlp.experts.{e}.down_proj.weight": (HIDDEN, INNER) for e in range(2)},
}  # fmt: skip
GPT2 = {"h.0.mlp.c_fc.weight": (HIDDEN, INNER), "h.0.mlp.c_proj.weight": (INNER, HIDDEN)}


def without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


@pytest.mark.parametrize(
    ("shapes", "model_type", "layout", "text"),
    [
        (llama(1), "mamba", "mlp", "model_type: got 'mamba'; known: bloom, gemma,"),
        (llama(1), "llama", "heads", "layout: got 'heads'; known: mlp, mlp+gate, attention, all, "),
        (
            GPT2,
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
            llama(1),
            "llama",
            "all",
            "model: model.layers.0 has no self_attn.k_proj.weight; the checkpoint is incomplete",
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
        (
            without(MOE, "layers.0.mlp.experts.0.up_proj.weight"),
            "qwen3_moe",
            "mlp",
            "model: has no layers.0.mlp.experts.0.up_proj.weight; the checkpoint is incomplete",
        ),
        (
            MOE | {"layers.0.mlp.experts.1.up_proj.weight": (5, HIDDEN)},
            "qwen3_moe",
            "mlp",
            "experts.1.up_proj.weight has shape (5, 8), layers.0.mlp.experts.0.gate_proj.weight "
            "has (12, 8); the experts of a layer need one shape",
        ),
        (
            {"layers.0.mlp.experts.gate_up_proj": (96, 8), "layers.0.mlp.experts.down_proj": (9,)},
            "gpt_oss",
            "mlp",
            "experts.gate_up_proj has shape (96, 8); one matrix for each expert is needed",
        ),
        (
            {"layers.0.mlp.experts.gate_up_proj_blocks": (3, 24, 2, 16)},
            "gpt_oss",
            "mlp",
            "named 'layers.N.mlp.experts.gate_up_proj'; check that this is a 'gpt_oss' model, and "
            "not quantised",
        ),
        (llama(1), "llama", Patterns(), "layout: has no pattern; give one in rows or in columns"),
        (
            llama(1),
            "mamba",
            Patterns(rows=("mlp.up_proj", "*.up_prj")),
            "layout: '*.up_prj' matches no module of model; did you mean mlp.up_proj",
        ),
        (
            llama(1),
            "llama",
            Patterns(rows=("embed_tokens",)),
            "layout: 'embed_tokens' matches no module of model; modules there: mlp.down_proj, "
            "mlp.gate_proj, mlp.up_proj, self_attn.q_proj",
        ),
        (
            llama(1),
            "llama",
            Patterns(rows=("mlp.*",), columns=("down_proj",)),
            "layout: model.layers.0.mlp.down_proj is in rows and in columns; give it once",
        ),
        (MOE, "qwen3_moe", Patterns(rows=("up_proj",)), "mean mlp.experts.gate_up_proj"),
    ],
)
def test_what_is_not_understood_is_named(shapes, model_type, layout, text):
    with pytest.raises(NeftError, match=re.escape(text)) as caught:
        candidates(shapes, model_type, layout)
    assert "\n" not in str(caught.value)


def test_patterns_name_modules_of_any_model():
    layout = Patterns(rows=("mlp.up_proj", "layers.[02].*.q_proj"), columns=("down_proj",))
    groups = candidates(dict(reversed(llama(11).items())), "mamba", layout)
    assert [group.module.split(".", 2)[2] for group in groups[:4]] == [
        "0.mlp.down_proj",
        "0.mlp.up_proj",
        "0.self_attn.q_proj",
        "1.mlp.down_proj",
    ]
    assert len(groups) == 2 * 11 + 2
    assert groups[0] == Group("model.layers.0.mlp.down_proj", COLUMNS, 0, INNER, HIDDEN)
    assert groups[-1].module == "model.layers.10.mlp.up_proj"


def test_patterns_and_their_text_are_the_same_layout():
    layout = Patterns(("c_fc",), ("mlp.c_proj",), transposed=True)
    assert candidates(GPT2, "mine", layout) == candidates(GPT2, "mine", str(layout))
    assert candidates(GPT2, "mine", layout) == candidates(GPT2, "gpt2")
    # the type of the model says how it stores
    assert candidates(GPT2, "gpt2", replace(layout, transposed=False)) == candidates(GPT2, "gpt2")
    plain = candidates(GPT2, "mine", replace(layout, transposed=False))
    assert (plain[0].count, plain[0].length) == (HIDDEN, INNER)


def test_patterns_reach_experts_of_models_outside_the_table():
    shapes = {"layers.0.ffn.experts.w_in": (3, 10, 4), "layers.0.ffn.experts.w_in_bias": (3, 10)}
    assert candidates(shapes, "mine", Patterns(rows=("w_in",))) == [
        Group("layers.0.ffn.experts.w_in", ROWS, 0, 30, 4, experts=3, width=10)
    ]


def test_any_layout_finds_its_weights_in_fp32():
    shapes = {"embed_tokens.weight": (16, 8), "layers.0.q.weight": (8, 8), "layers.0.q.bias": (8,),
              "layers.0.experts.up": (3, 8, 8), "layers.0.experts.up_bias": (3, 8)}  # fmt: skip
    assert scorable(shapes) == ["layers.0.q.weight", "layers.0.experts.up"]
