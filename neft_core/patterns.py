"""Layouts of one's own: patterns of module names, for models that no family covers."""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from neft_core.errors import NeftError
from neft_core.experts_apart import Shapes
from neft_core.groups import COLUMNS, ROWS, Group, Part

_LAYER = re.compile(r"(?:^|\.)\d+\.")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Patterns:
    """A layout of one's own: which matrices of numbered layers have candidates.

    A pattern is a module's name, or its end after a dot, in which `*`, `?` and `[...]` stand for
    what they do in file names. Head and embedding are in no layer and never match.

    Attributes:
        rows: patterns of modules whose rows are candidates.
        columns: patterns of modules whose columns are candidates.
        transposed: these modules store [in, out].
    """

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    transposed: bool = False

    def __str__(self) -> str:
        """One line, as provenance keeps it."""
        content: dict[str, Any] = {"columns": self.columns, "rows": self.rows}
        return json.dumps(content | ({"transposed": True} if self.transposed else {}))

    @classmethod
    def parse(cls, text: str) -> "Patterns":
        """What `str` wrote."""
        content = json.loads(text)
        return cls(
            tuple(content["rows"]), tuple(content["columns"]), content.get("transposed", False)
        )


def scorable(shapes: Shapes) -> list[str]:
    """Weights in which some layout may have candidates: the matrices of layers, experts' too."""
    return [name for name, shape in shapes.items() if _may_hold_neurons(name, shape)]


def matched(shapes: Shapes, patterns: Patterns, where: str) -> list[Group]:
    """One group for each weight that a pattern names, by the numbers in the names.

    Args:
        shapes: name and stored shape of every weight, as the model has them in memory.
        patterns: which modules.
        where: what messages call the model.

    Raises:
        NeftError: no pattern, one that matches nothing, or a module in rows and in columns.
    """
    modules = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if _may_hold_neurons(name, shape)
    }
    axes: dict[str, int] = {}
    for axis, texts in ((ROWS, patterns.rows), (COLUMNS, patterns.columns)):
        for text in texts:
            found = [m for m in modules if fnmatchcase(m, text) or fnmatchcase(m, f"*.{text}")]
            if not found:
                near = _near(text, modules)
                raise NeftError(f"layout: {text!r} matches no module of {where}; {near}")
            if both := [module for module in found if axes.setdefault(module, axis) != axis]:
                raise NeftError(f"layout: {both[0]} is in rows and in columns; give it once")
    if not axes:
        raise NeftError("layout: has no pattern; give one in rows or in columns")
    in_order = sorted(axes, key=lambda m: [int(t) if t.isdigit() else t for t in _DIGITS.split(m)])
    groups = []
    for module in in_order:
        layer, _, suffix = module.rpartition(".")
        experts = len(modules[module]) == 3
        part = Part(suffix, axes[module], transposed=patterns.transposed, experts=experts)
        groups.append(part.group(layer, modules[module], where))
    return groups


def _may_hold_neurons(name: str, shape: tuple[int, ...]) -> bool:
    """A matrix of a numbered layer, or one matrix for each expert."""
    needed = 2 if name.endswith(".weight") else 3
    return len(shape) == needed and _LAYER.search(name) is not None


def _near(text: str, modules: Iterable[str]) -> str:
    """What may be meant by a pattern without a match."""
    tails = dict.fromkeys(_LAYER.split(module)[-1] for module in modules)
    ends = {tail.rpartition(".")[2]: tail for tail in tails}
    word = text.rpartition(".")[2].strip("*")
    near = difflib.get_close_matches(word, ends, n=3, cutoff=0.5)
    shown = ", ".join([ends[end] for end in near] or list(tails)[:8])
    return f"did you mean {shown}?" if near else f"modules there: {shown}"
