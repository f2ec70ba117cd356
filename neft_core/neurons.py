"""What a neuron is: the candidates of a layout, from the shapes of a model's weights alone.

Shapes: H hidden size, I intermediate size, E experts.
"""

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from neft_core import experts_apart
from neft_core.errors import NeftError
from neft_core.experts_apart import Shapes
from neft_core.groups import COLUMNS, ROWS, Group, Part, Source, joined
from neft_core.patterns import Patterns, matched

LAYOUTS = ("mlp", "mlp+gate", "attention", "all", "rows")
"""`mlp`: rows of up, columns of down; `mlp+gate`: rows of gate too; `attention`: rows of query, key
and value, columns of the output; `all`: both of these; `rows`: the rows of all these weights."""


@dataclass(frozen=True)
class Family:
    """How a family of models names its weights.

    Attributes:
        layers: name of the list of layers, before the layer's number.
        attention: where query, key and value (rows) and the output (columns) are.
        mlps: where gate, up and down are in each kind of MLP that a layer may have; every layer
            has one at least, or several side by side.
        tied: the output head shares the input embedding unless the model's config says otherwise.
    """

    layers: str
    attention: tuple[Part, ...]
    mlps: tuple[Mapping[str, Part], ...]
    tied: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """All roles."""
        return self.attention + tuple(part for mlp in self.mlps for part in mlp.values())


def _attention(
    rows: str, columns: str, module: str = "self_attn", *, transposed: bool = False
) -> tuple[Part, ...]:
    """Projections whose rows are neurons, and the one whose columns are."""
    return (
        *(Part(f"{module}.{name}", ROWS, transposed=transposed) for name in rows.split()),
        Part(f"{module}.{columns}", COLUMNS, transposed=transposed),
    )


def _mlp(up: str, down: str, gate: str = "", *, transposed: bool = False) -> dict[str, Part]:
    """An MLP with a weight for each role."""
    return ({"gate": Part(gate, ROWS)} if gate else {}) | {
        "up": Part(up, ROWS, transposed=transposed),
        "down": Part(down, COLUMNS, transposed=transposed),
    }


def _experts(gate: str, up: str, down: str) -> dict[str, Part]:
    """Experts: [E, 2I, H] with gate before up, and [E, H, I]; the names are those of one apart."""
    fused = Part("mlp.experts.gate_up_proj", ROWS, 0, 2, experts=True, apart=gate)
    return {
        "gate": fused,
        "up": replace(fused, index=1, apart=up),
        "down": Part("mlp.experts.down_proj", COLUMNS, experts=True, apart=down),
    }


_Q_K_V_O = _attention("q_proj k_proj v_proj", "o_proj")
_GATED = _mlp("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")
_4H = _mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_LLAMA = Family("layers", _Q_K_V_O, (_GATED,))
_GEMMA = replace(_LLAMA, tied=True)
_PHI3 = {
    "gate": Part("mlp.gate_up_proj", ROWS, 0, 2),
    "up": Part("mlp.gate_up_proj", ROWS, 1, 2),
    "down": Part("mlp.down_proj", COLUMNS),
}
_EXPERTS = _experts(*(f"mlp.experts.{{}}.{role}_proj" for role in ("gate", "up", "down")))
_SHARED = _mlp(*(f"mlp.shared_expert.{role}_proj" for role in ("up", "down", "gate")))
# [E, H, 2I] with gate and up by turns, and [E, I, H]; together on disk too.
_GPT_OSS = {
    role: replace(part, transposed=True, interleaved=part.of > 1, apart="")
    for role, part in _EXPERTS.items()
}
_MIXTRAL = _experts(*(f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2")))

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Family("layers", _attention("qkv_proj", "o_proj"), (_PHI3,)),
    "gpt2": Family(
        "h",
        _attention("c_attn", "c_proj", "attn", transposed=True),
        (_mlp("mlp.c_fc", "mlp.c_proj", transposed=True),),
        tied=True,
    ),
    "gpt_neox": Family("layers", _attention("query_key_value", "dense", "attention"), (_4H,)),
    "bloom": Family("h", _attention("query_key_value", "dense", "self_attention"), (_4H,), True),
    "opt": Family(
        "layers", _attention("q_proj k_proj v_proj", "out_proj"), (_mlp("fc1", "fc2"),), True
    ),
    "qwen3_moe": Family("layers", _Q_K_V_O, (_EXPERTS, _GATED)),
    "qwen2_moe": Family("layers", _Q_K_V_O, (_EXPERTS, _SHARED, _GATED)),
    "olmoe": Family("layers", _Q_K_V_O, (_EXPERTS,)),
    "mixtral": Family("layers", _Q_K_V_O, (_MIXTRAL,)),
    "gpt_oss": Family("layers", _Q_K_V_O, (_GPT_OSS,)),
}

# Older checkpoints also hold causal masks and rotary tables, which nothing trains.
_BUFFER = re.compile(r"(^|\.)((attn|attention)\.(bias|masked_bias)|inv_freq)$")
_HEADS = ("lm_head.weight", "embed_out.weight")


def family(model_type: str) -> Family:
    """The row of `FAMILIES` for a `model_type`.

    Raises:
        NeftError: the type is not in the table.
    """
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise NeftError(
            f"model_type: got {model_type!r}; known: {known}; for others give the layout as "
            "patterns of modules"
        )
    return FAMILIES[model_type]


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head shares the input embedding, from a model's config.json."""
    known = FAMILIES.get(str(config.get("model_type")))
    return bool(config.get("tie_word_embeddings", known is not None and known.tied))


def candidates(
    shapes: Shapes,
    model_type: str,
    layout: str | Patterns = "mlp",
    where: str = "model",
) -> list[Group]:
    """The neurons that may be selected, by layer and within it query, key, value, output, gate,
    up, down.

    Names are matched by their end, so `model.layers.0...` and `layers.0...` both work. Parts of
    one fused weight that lie side by side become one group. Experts that a checkpoint keeps apart
    are given under the name of the 3-D parameter that they form in memory; `sources` names the
    stored weights.

    Args:
        shapes: name and stored shape of every weight of the checkpoint or the model.
        model_type: the `model_type` of the model's config.
        layout: which neurons are candidates: a name of `LAYOUTS`, patterns, or their text.
        where: what messages call the model, such as its directory.

    Returns:
        One group per module, with the names as the checkpoint has them.

    Raises:
        NeftError: an unknown type or layout, weights that do not have the family's form, or a
            pattern that matches nothing.

    Source: Xu et al. 2024, sections 4.2 and 5.1: their 150,000 x 4096 parameters are rows of
    `up_proj` and columns of `down_proj`.
    """
    if isinstance(layout, str) and layout.startswith("{"):
        layout = Patterns.parse(layout)
    if isinstance(layout, Patterns):
        own = FAMILIES.get(model_type)
        stored = layout.transposed or (own is not None and all(p.transposed for p in own.parts))
        shapes = in_memory(shapes, model_type, where)
        return matched(shapes, replace(layout, transposed=stored), where)
    known = family(model_type)
    if layout not in LAYOUTS:
        raise NeftError(f"layout: got {layout!r}; known: {', '.join(LAYOUTS)}")
    if layout == "mlp+gate" and not any("gate" in mlp for mlp in known.mlps):
        raise NeftError(
            f"layout: got {layout!r}, but models of type {model_type!r} have no gate; use 'mlp'"
        )
    shapes = experts_apart.in_memory(shapes, known.parts, where)
    groups: list[Group] = []
    for layer in _layers(shapes, known, model_type, where):
        groups.extend(_chosen(shapes, layer, known, layout, where))
    return groups


def sources(group: Group, shapes: Shapes, model_type: str) -> list[Source]:
    """Where a group's candidates are stored: `experts_apart.sources` by type."""
    known = FAMILIES.get(model_type)
    return experts_apart.sources(group, shapes, known.parts if known else ())


def in_memory(shapes: Shapes, model_type: str, where: str = "model") -> dict[str, tuple[int, ...]]:
    """Shapes under the names of the model in memory: `experts_apart.in_memory` by type."""
    known = FAMILIES.get(model_type)
    return experts_apart.in_memory(shapes, known.parts if known else (), where)


def layer_of(module: str) -> str:
    """The layer that a module is in, such as `model.layers.0`."""
    match = re.match(r"(?:.*?\.)??[^.]+\.\d+(?=\.)", module)
    return match[0] if match else module


def role_of(module: str) -> str:
    """A module's name within its layer, such as `mlp.up_proj`."""
    return module.removeprefix(layer_of(module) + ".")


def count_parameters(
    shapes: Shapes, tied: bool = False, memory: Mapping[str, Hashable] | None = None
) -> int:
    """Number of parameters of a checkpoint, without buffers and with a tied head counted once.

    Args:
        shapes: name and stored shape of every weight.
        tied: the head shares the input embedding.
        memory: where weights lie, by name; of several in one place one counts.
    """
    places = memory or {}
    counted = {
        places.get(name, name): prod(shape)
        for name, shape in shapes.items()
        if not _BUFFER.search(name) and not (tied and name.endswith(_HEADS))
    }
    return sum(counted.values())


def _layers(shapes: Shapes, known: Family, model_type: str, where: str) -> list[str]:
    """The layers' names, such as `model.layers.0`, by number."""
    # An MLP shows a stack: towers of other kinds share the names of attention.
    parts = [part for mlp in known.mlps for part in mlp.values()]
    endings = "|".join(re.escape(part.parameter("")) for part in parts)
    pattern = re.compile(rf"((?:.+\.)?{known.layers})\.(\d+)(?:{endings})")
    numbers: set[int] = set()
    stacks: set[str] = set()
    for name in shapes:
        if match := pattern.fullmatch(name):
            stacks.add(match[1])
            numbers.add(int(match[2]))
    if not stacks:
        up = known.mlps[0]["up"].parameter(f"{known.layers}.N")
        raise NeftError(
            f"{where}: none of {len(shapes)} weights is named '{up}'; "
            f"check that this is a {model_type!r} model, and not quantised"
        )
    if len(stacks) > 1:
        raise NeftError(
            f"{where}: found several stacks of layers ({', '.join(sorted(stacks))}); "
            "give a model with one"
        )
    (stack,) = stacks
    return [f"{stack}.{number}" for number in sorted(numbers)]


def _chosen(shapes: Shapes, layer: str, known: Family, layout: str, where: str) -> Iterator[Group]:
    """The candidates of one layer."""
    mlps = [
        [mlp["up"], mlp["down"]] if layout == "mlp" else list(mlp.values())
        for mlp in known.mlps
        if any(part.parameter(layer) in shapes for part in mlp.values())
    ]
    for block in mlps:
        _check_mlp(shapes, [_group(shapes, layer, part, where) for part in block], where)
    attention = [list(known.attention)] if layout in ("attention", "all", "rows") else []
    for block in attention + (mlps if layout != "attention" else []):
        parts = [replace(part, axis=ROWS) for part in block] if layout == "rows" else block
        yield from joined([_group(shapes, layer, part, where) for part in parts])


def _group(shapes: Shapes, layer: str, part: Part, where: str) -> Group:
    """The neurons of one role in one layer."""
    name = part.parameter(layer)
    if name not in shapes:
        missing = name.removeprefix(f"{layer}.")
        raise NeftError(f"{where}: {layer} has no {missing}; the checkpoint is incomplete")
    return part.group(layer, shapes[name], where)


def _check_mlp(shapes: Shapes, groups: list[Group], where: str) -> None:
    """Every role has the same number of neurons, of the hidden size each."""
    if len({(group.count, group.length) for group in groups}) != 1:
        sizes = ", ".join(f"{group.module} {shapes[group.parameter]}" for group in groups)
        raise NeftError(
            f"{where}: the weights of an MLP do not fit each other: {sizes}; "
            "use a checkpoint that is not quantised"
        )
