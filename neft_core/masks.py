"""Scores and masks: what every neuron of a model scored, and the set of those selected, as files.

Both are safetensors files: one tensor per module, and in the metadata the provenance (flat text:
base, tuned, layout, steps ...), the candidates and the number of the model's parameters. The same
content gives the same bytes.

Shapes: N candidates of a module, k selected ones.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neft_core.contents import REMEDY, check_mask, check_scores
from neft_core.errors import NeftError
from neft_core.files import load_tensors, save_tensors
from neft_core.groups import Group
from neft_core.neurons import candidates, in_memory

_OWN_KEYS = ("kind", "groups", "total_parameters")
_MAGNITUDE = "|magnitude"


@dataclass(frozen=True, eq=False)
class NeuronScores:
    """How much each candidate neuron changed, or how much it means to a task.

    Attributes:
        sensitivity: per module [N], float64, on the CPU; by default one minus the cosine
            similarity, otherwise what `criterion` says. More is selected first.
        groups: the candidates per module; their order is the order of modules in a ranking.
        total_parameters: number of parameters of the whole model.
        provenance: what made the scores: `base` and `tuned` (hashes), `layout`, `model_type`,
            `criterion` where it is another than similarity, steps, data, seed, version.
        magnitude: size of the displacement, per module [N], float64; empty where nothing was tuned.
        source: the file that they were read from, for messages.

    Raises:
        NeftError: one of these has another form, or a module other scores than candidates.
    """

    sensitivity: dict[str, Tensor]
    groups: dict[str, Group]
    total_parameters: int
    provenance: dict[str, str] = field(default_factory=dict)
    magnitude: dict[str, Tensor] = field(default_factory=dict)
    source: str = "scores"

    def __post_init__(self) -> None:
        check_scores(self)
        object.__setattr__(self, "provenance", _text(self.provenance))

    @property
    def criterion(self) -> str:
        """What was scored: `similarity`, `gradient`, `activation` or `probe`."""
        return self.provenance.get("criterion", "similarity")

    @property
    def axis(self) -> dict[str, int]:
        """0 for a module whose neurons are rows, 1 for columns."""
        return {module: group.axis for module, group in self.groups.items()}

    def save(self, path: str | Path) -> None:
        """Write the file, all or nothing."""
        sizes = {module + _MAGNITUDE: tensor for module, tensor in self.magnitude.items()}
        _write(Path(path), "scores", self.sensitivity | sizes, self)

    @classmethod
    def load(cls, path: str | Path) -> "NeuronScores":
        """Read a file of scores.

        Raises:
            NeftError: the file is absent, damaged or of another kind.
        """
        tensors, groups, total, provenance = _read(Path(path), "scores")
        return cls(
            {m: tensors[m] for m in tensors if not m.endswith(_MAGNITUDE)},
            groups,
            total,
            provenance,
            {m: tensors[m + _MAGNITUDE] for m in groups if m + _MAGNITUDE in tensors},
            source=str(path),
        )


class Count(NamedTuple):
    """Selected neurons among the candidates of one module."""

    selected: int
    candidates: int


@dataclass(frozen=True, eq=False)
class NeuronMask:
    """A set of selected neurons.

    Attributes:
        indices: rows or columns of the logical weight per module, sorted, [k], int64; a module
            without a selected neuron may be absent.
        groups: the candidates per module.
        total_parameters: number of parameters of the whole model.
        provenance: what made the mask: that of its scores, with policy, budget and seed.
        source: the file that it was read from, for messages.

    Raises:
        NeftError: one of these has another form, or neurons are not among the candidates.
    """

    indices: dict[str, Tensor]
    groups: dict[str, Group]
    total_parameters: int
    provenance: dict[str, str] = field(default_factory=dict)
    source: str = "mask"

    def __post_init__(self) -> None:
        check_mask(self)
        object.__setattr__(self, "provenance", _text(self.provenance))

    @property
    def axis(self) -> dict[str, int]:
        """0 for a module whose neurons are rows, 1 for columns."""
        return {module: self.groups[module].axis for module in self.indices}

    @property
    def neurons(self) -> int:
        """Number of selected neurons."""
        return sum(len(rows) for rows in self.indices.values())

    @property
    def parameters(self) -> int:
        """Number of parameters that the selected neurons train."""
        return sum(len(rows) * self.groups[name].length for name, rows in self.indices.items())

    @property
    def percent(self) -> float:
        """Trained parameters of all parameters of the model, in percent."""
        return 100 * self.parameters / self.total_parameters if self.total_parameters else 0.0

    def by_module(self) -> dict[str, Count]:
        """Selected and candidate neurons of every module that has candidates."""
        nothing = torch.empty(0)
        return {
            module: Count(len(self.indices.get(module, nothing)), group.count)
            for module, group in self.groups.items()
        }

    def __or__(self, other: "NeuronMask") -> "NeuronMask":
        """Neurons in either mask, a common one once."""
        return self._combine(other, "|", lambda a, b: torch.cat((a, b)).unique(sorted=True))

    def __and__(self, other: "NeuronMask") -> "NeuronMask":
        """Neurons in both masks."""
        return self._combine(other, "&", lambda a, b: a[torch.isin(a, b)])

    def __sub__(self, other: "NeuronMask") -> "NeuronMask":
        """Neurons of this mask that are not in the other."""
        return self._combine(other, "-", lambda a, b: a[~torch.isin(a, b)])

    def overlap(self, other: "NeuronMask") -> float:
        """Share of this mask's neurons that the other has too: |A & B| / |A|, in [0, 1].

        Raises:
            NeftError: this mask has no neurons, or the masks are of different models or layouts.

        Source: Xu et al. 2024, Table 5.
        """
        if not self.neurons:
            raise NeftError(f"{self.source}: has no neurons; an overlap needs at least one")
        return (self & other).neurons / self.neurons

    def check(
        self,
        base_hash: str | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Refuse the mask for a model that it was not made for.

        Args:
            base_hash: hash of the model's weights, compared with `base` of the provenance.
            shapes: name and stored shape of the model's weights.

        Raises:
            NeftError: the hash differs, or a module is absent or of another shape.
        """
        made_for = self.provenance.get("base")
        if base_hash is not None and made_for is not None and base_hash != made_for:
            raise NeftError(
                f"{self.source}: made for base {_short(made_for)}, this model is "
                f"{_short(base_hash)}; {REMEDY['mask']}"
            )
        if shapes is not None:
            self._check_shapes(shapes)

    def _check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the candidates with those of a model."""
        shapes = in_memory(shapes, self.provenance.get("model_type", ""), self.source)
        for module, group in self.groups.items():
            shape = shapes.get(group.parameter)
            if shape is None or not group.fits(shape):
                found = "has no such module" if shape is None else f"has shape {shape} there"
                raise NeftError(
                    f"{self.source}: made for {group.count} neurons of {group.length} weights in "
                    f"{module}, this model {found}; {REMEDY['mask']}"
                )
        if "model_type" in self.provenance and "layout" in self.provenance:
            here = candidates(shapes, self.provenance["model_type"], self.provenance["layout"])
            if here != list(self.groups.values()):
                raise NeftError(
                    f"{self.source}: made for {sum(g.count for g in self.groups.values())} "
                    f"candidates in {len(self.groups)} modules, this model has "
                    f"{sum(g.count for g in here)} in {len(here)}; {REMEDY['mask']}"
                )

    def save(self, path: str | Path) -> None:
        """Write the file, all or nothing."""
        _write(Path(path), "mask", self.indices, self)

    @classmethod
    def load(cls, path: str | Path) -> "NeuronMask":
        """Read a mask.

        Raises:
            NeftError: the file is absent, damaged or of another kind.
        """
        tensors, groups, total, provenance = _read(Path(path), "mask")
        return cls(tensors, groups, total, provenance, source=str(path))

    def _combine(
        self, other: object, sign: str, join: Callable[[Tensor, Tensor], Tensor]
    ) -> "NeuronMask":
        """A set operation module by module; provenance that differs is written with the sign."""
        if not isinstance(other, NeuronMask):
            found = type(other).__name__
            raise NeftError(f"{self.source}: '{sign}' got {found}; another NeuronMask is needed")
        for key in ("base", "model_type", "layout"):
            mine, theirs = self.provenance.get(key), other.provenance.get(key)
            if mine != theirs:
                raise NeftError(
                    f"{self.source}: {key} is {_short(str(mine))}, that of {other.source} is "
                    f"{_short(str(theirs))}; compare masks of one model and layout"
                )
        if self.groups != other.groups:
            raise NeftError(
                f"{self.source}: its candidates differ from those of {other.source}; "
                "compare masks of one model and layout"
            )
        nothing = torch.empty(0, dtype=torch.int64)
        joined = {
            module: join(self.indices.get(module, nothing), other.indices.get(module, nothing))
            for module in self.groups
        }
        provenance = {
            key: mine if mine == theirs else f"({mine}) {sign} ({theirs})"
            for key in sorted({*self.provenance, *other.provenance})
            for mine, theirs in [(self.provenance.get(key), other.provenance.get(key))]
        }
        return NeuronMask(
            indices={module: rows for module, rows in joined.items() if len(rows)},
            groups=self.groups,
            total_parameters=self.total_parameters,
            provenance={key: str(value) for key, value in provenance.items()},
            source=f"({self.source} {sign} {other.source})",
        )


def _text(provenance: Mapping[Any, Any]) -> dict[str, str]:
    """Provenance as files keep it, so that it is the same before and after."""
    return {str(key): str(value) for key, value in provenance.items()}


def _short(text: str) -> str:
    """A hash as messages show it; other words are shorter anyway."""
    return text if len(text) <= 16 else f"{text[:12]}..."


def _write(
    path: Path, kind: str, tensors: Mapping[str, Tensor], owner: NeuronScores | NeuronMask
) -> None:
    """Write a temporary file beside `path`, then rename it."""
    taken = sorted(set(_OWN_KEYS) & set(owner.provenance))
    if taken:
        raise ValueError(f"provenance uses the reserved key {taken[0]!r}")
    metadata = {
        **owner.provenance,
        "kind": kind,
        "groups": json.dumps([asdict(group) for group in owner.groups.values()]),
        "total_parameters": str(owner.total_parameters),
    }
    save_tensors(path, tensors, metadata)


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Group], int, dict[str, str]]:
    """Tensors in the order of groups, groups, total parameters and provenance of a file."""
    remedy = REMEDY[kind]
    tensors, metadata = load_tensors(path, remedy)
    found = metadata.pop("kind", "other tensors")
    if found != kind:
        raise NeftError(f"{path}: holds {found}, {kind} expected; {remedy}")
    try:
        entries = json.loads(metadata.pop("groups"))
        groups = {entry["module"]: Group(**entry) for entry in entries}
        total = int(metadata.pop("total_parameters"))
        if len(groups) < len(entries):
            raise ValueError("a module twice")
    except NeftError as fault:
        raise NeftError(f"{path}: {fault}; {remedy}") from None
    except (KeyError, TypeError, ValueError):
        raise NeftError(
            f"{path}: its metadata is damaged, or of another version; {remedy}"
        ) from None
    names = dict.fromkeys((*groups, *tensors))
    return {name: tensors[name] for name in names if name in tensors}, groups, total, metadata
