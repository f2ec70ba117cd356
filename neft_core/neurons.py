"""What a neuron is: the candidates of a layout, from the shapes of a model's weights alone.

Shapes: H hidden size, I intermediate size. A *logical* weight is [out, in], whatever way the
checkpoint stores it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from neft_core.errors import NeftError

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class Group:
    """The candidate neurons of one module: a run of rows or columns of its logical weight.

    Attributes:
        module: name of the module, without `.weight`.
        axis: 0 where the neurons are rows of the logical [out, in] weight, 1 for columns.
        start: first row or column.
        count: number of neurons.
        length: weights in each neuron.
        transposed: the weight is stored as [in, out], as in GPT-2's `Conv1D`.
    """

    module: str
    axis: int
    start: int
    count: int
    length: int
    transposed: bool = False

    def logical(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The [out, in] shape of a weight stored with `shape`."""
        return shape[::-1] if self.transposed else shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight stored with `shape` has all the neurons of this group."""
        if len(shape) != 2:
            return False
        logical = self.logical(shape)
        return logical[self.axis] >= self.start + self.count and (
            logical[1 - self.axis] == self.length
        )


@dataclass(frozen=True)
class Part:
    """Where one role sits in a layer: part `index` of `of` equal parts of a weight's axis."""

    suffix: str
    axis: int
    index: int = 0
    of: int = 1


@dataclass(frozen=True)
class Family:
    """How a family of models names its weights.

    Attributes:
        layers: name of the list of layers, before the layer's number.
        parts: where each role is, in the order of storage.
        transposed: linear weights are stored as [in, out].
        tied: the output head shares the input embedding unless the model's config says otherwise.
    """

    layers: str
    parts: Mapping[str, Part]
    transposed: bool = False
    tied: bool = False


def _plain(layers: str, up: str, down: str, transposed: bool = False, tied: bool = False) -> Family:
    """A family whose MLP has no gate."""
    parts = {"up": Part(up, ROWS), "down": Part(down, COLUMNS)}
    return Family(layers, parts, transposed, tied)


_GATED = Family(
    "layers",
    {
        "gate": Part("mlp.gate_proj", ROWS),
        "up": Part("mlp.up_proj", ROWS),
        "down": Part("mlp.down_proj", COLUMNS),
    },
)
_GEMMA = replace(_GATED, tied=True)

FAMILIES: dict[str, Family] = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Family(
        "layers",
        {
            "gate": Part("mlp.gate_up_proj", ROWS, 0, 2),
            "up": Part("mlp.gate_up_proj", ROWS, 1, 2),
            "down": Part("mlp.down_proj", COLUMNS),
        },
    ),
    "gpt2": _plain("h", "mlp.c_fc", "mlp.c_proj", transposed=True, tied=True),
    "gpt_neox": _plain("layers", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "opt": _plain("layers", "fc1", "fc2", tied=True),
    "bloom": _plain("h", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", tied=True),
}

LAYOUTS: dict[str, tuple[str, ...]] = {
    "mlp": ("up", "down"),
    "mlp+gate": ("gate", "up", "down"),
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
        raise NeftError(f"model_type: got {model_type!r}; known: {known}")
    return FAMILIES[model_type]


def candidates(
    shapes: Mapping[str, tuple[int, ...]],
    model_type: str,
    layout: str = "mlp",
    where: str = "model",
) -> list[Group]:
    """The neurons that may be selected, by layer and within it gate, up, down.

    Names are matched by their end, so `model.layers.0...` and `layers.0...` both work; parts of
    one fused weight that lie side by side become one group.

    Args:
        shapes: name and stored shape of every weight of the checkpoint.
        model_type: the `model_type` of the model's config.
        layout: which neurons are candidates, a key of `LAYOUTS`.
        where: what messages call the model, such as its directory.

    Returns:
        One group per module, with the names as the checkpoint has them.

    Raises:
        NeftError: an unknown type or layout, or weights that do not have the family's form.

    Source: Xu et al. 2024, sections 4.2 and 5.1: their 150,000 x 4096 parameters are rows of
    `up_proj` and columns of `down_proj`.
    """
    known = family(model_type)
    if layout not in LAYOUTS:
        raise NeftError(f"layout: got {layout!r}; known: {', '.join(LAYOUTS)}")
    roles = LAYOUTS[layout]
    absent = [role for role in roles if role not in known.parts]
    if absent:
        raise NeftError(
            f"layout: got {layout!r}, but models of type {model_type!r} have no {absent[0]}; "
            "use 'mlp'"
        )
    groups: list[Group] = []
    for layer in _layers(shapes, known, model_type, where):
        found = [_group(shapes, layer, known, known.parts[role], where) for role in roles]
        if len({(group.count, group.length) for group in found}) != 1:
            sizes = ", ".join(f"{g.module} {shapes[g.module + '.weight']}" for g in found)
            raise NeftError(
                f"{where}: the weights of an MLP do not fit each other: {sizes}; "
                "use a checkpoint that is not quantised"
            )
        groups.extend(_joined(found))
    return groups


def count_parameters(shapes: Mapping[str, tuple[int, ...]], tied: bool = False) -> int:
    """Number of parameters of a checkpoint, without buffers and with a tied head counted once."""
    return sum(
        prod(shape)
        for name, shape in shapes.items()
        if not _BUFFER.search(name) and not (tied and name.endswith(_HEADS))
    )


def _layers(
    shapes: Mapping[str, tuple[int, ...]], known: Family, model_type: str, where: str
) -> list[str]:
    """The layers' names, such as `model.layers.0`, by number."""
    suffixes = "|".join(re.escape(part.suffix) for part in known.parts.values())
    pattern = re.compile(rf"((?:.+\.)?{known.layers})\.(\d+)\.(?:{suffixes})\.weight")
    numbers: set[int] = set()
    stacks: set[str] = set()
    for name in shapes:
        if match := pattern.fullmatch(name):
            stacks.add(match[1])
            numbers.add(int(match[2]))
    if not stacks:
        up = known.parts["up"].suffix
        raise NeftError(
            f"{where}: none of {len(shapes)} weights is named '{known.layers}.N.{up}.weight'; "
            f"check that this is a {model_type!r} model"
        )
    if len(stacks) > 1:
        raise NeftError(
            f"{where}: found several stacks of layers ({', '.join(sorted(stacks))}); "
            "give a model with one"
        )
    (stack,) = stacks
    return [f"{stack}.{number}" for number in sorted(numbers)]


def _group(
    shapes: Mapping[str, tuple[int, ...]], layer: str, known: Family, part: Part, where: str
) -> Group:
    """The neurons of one role in one layer."""
    module = f"{layer}.{part.suffix}"
    shape = shapes.get(f"{module}.weight")
    if shape is None:
        raise NeftError(
            f"{where}: {layer} has no {part.suffix}.weight; the checkpoint is incomplete"
        )
    if len(shape) != 2:
        raise NeftError(f"{where}: {module}.weight has shape {shape}; a matrix is needed")
    logical = shape[::-1] if known.transposed else shape
    count = logical[part.axis] // part.of
    if count * part.of != logical[part.axis]:
        raise NeftError(
            f"{where}: {module}.weight has {logical[part.axis]} rows; "
            f"{part.of} parts of equal size are needed"
        )
    length = logical[1 - part.axis]
    return Group(module, part.axis, part.index * count, count, length, known.transposed)


def _joined(groups: list[Group]) -> list[Group]:
    """Groups with neighbouring parts of the same weight made one."""
    joined = groups[:1]
    for group in groups[1:]:
        last = joined[-1]
        if group.module == last.module:
            joined[-1] = replace(last, count=last.count + group.count)
        else:
            joined.append(group)
    return joined
