"""How much fine-tuning changed each neuron: one minus a cosine, exact for tiny changes.

Shapes: N neurons, D weights in each.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from neft_core import checkpoints
from neft_core.errors import NeftError
from neft_core.groups import Group, Source
from neft_core.masks import NeuronScores
from neft_core.neurons import (
    candidates,
    count_parameters,
    in_memory,
    is_tied,
    sources,
)
from neft_core.patterns import Patterns

# Weights per piece: three float64 buffers of it stay near the processor's cache.
_PIECE = 1 << 20


def sensitivity(base: Tensor, tuned: Tensor) -> Tensor:
    """One minus the cosine similarity of each neuron before and after tuning.

    Computed in float64 from the part of the displacement that is perpendicular to the neuron, so
    that changes far below the rounding of a cosine near 1 keep their order. A neuron's result
    depends on its own weights alone, to the last bit, however many are given at once.

    Args:
        base: weights before tuning, [N, D].
        tuned: weights after tuning, [N, D].

    Returns:
        Sensitivity in [0, 2], float64, [N]; higher means more changed. Two zero vectors give 0,
        one zero vector gives 1.

    Raises:
        NeftError: the shapes differ, or a value is not finite.

    Source: Xu et al. 2024, Eq. 1.
    """
    if base.dim() != 2 or base.shape != tuned.shape:
        raise NeftError(
            f"sensitivity: got shapes {tuple(base.shape)} and {tuple(tuned.shape)}; "
            "two of the same [N, D] are needed"
        )
    result = _sensitivity(base, tuned)
    if result.isnan().any():
        neuron = int(result.isnan().nonzero()[0])
        raise NeftError(f"sensitivity: neuron {neuron} has a value that is not finite")
    return result


def score(
    base_dir: str | Path,
    tuned_dir: str | Path,
    layout: str | Patterns = "mlp",
    *,
    provenance: Mapping[str, str] | None = None,
    device: str = "cpu",
    piece: int = _PIECE,
    progress: Callable[[int, int], None] | None = None,
) -> NeuronScores:
    """Score every candidate neuron of two checkpoints of one model.

    Reads the weights piece by piece, so memory does not grow with the model. The tuned
    checkpoint needs only the weights that have candidates, and may lack or have a prefix such as
    `transformer.` in its names.

    Args:
        base_dir: the base model, a directory in the Hub's layout with safetensors.
        tuned_dir: the tuned model.
        layout: which neurons are candidates.
        provenance: what else to keep with the scores, such as hashes and steps.
        device: where to compute; the result is the same bits.
        piece: weights to hold at once; the result is the same bits.
        progress: called after each module with the number done and that of all.

    Raises:
        NeftError: the checkpoints are damaged, of different form, or hold values that are not
            finite; names the file and the tensor.

    Source: Xu et al. 2024, Algorithm 1.
    """
    config = checkpoints.config(base_dir)
    model_type = str(config.get("model_type"))
    shapes = checkpoints.shapes(base_dir)
    groups = candidates(shapes, model_type, layout, where=str(base_dir))
    pairs = _pair(groups, shapes, Path(base_dir), Path(tuned_dir), model_type, layout)
    base_files, tuned_files = checkpoints.locate(base_dir), checkpoints.locate(tuned_dir)
    sensitivities: dict[str, Tensor] = {}
    for done, group in enumerate(groups, start=1):
        sensitivities[group.module] = torch.cat(
            [
                _score_source(
                    (base_files[base.parameter], base),
                    (tuned_files[tuned.parameter], tuned),
                    group.length,
                    device,
                    piece,
                )
                for base, tuned in pairs[group.module]
            ]
        )
        if progress is not None:
            progress(done, len(groups))
    return NeuronScores(
        sensitivities,
        {group.module: group for group in groups},
        count_parameters(shapes, is_tied(config)),
        {**(provenance or {}), "model_type": model_type, "layout": str(layout)},
    )


def _sensitivity(base: Tensor, tuned: Tensor) -> Tensor:
    """As `sensitivity`, with NaN for a neuron that has a value that is not finite."""
    w = base.to(torch.float64)
    d = tuned.to(torch.float64) - w
    ww, dw = _sum(w * w), _sum(d * w)
    # d = along * w + a part perpendicular to w; the cosine is parallel / size.
    along = dw / torch.where(ww == 0, 1.0, ww)
    across = d.addcmul_(w, along[:, None], value=-1)
    perpendicular = _sum(across.mul_(across))
    parallel = ww.sqrt() * (1 + along)
    size = (parallel * parallel + perpendicular).sqrt()
    # size - parallel cancels where both are near; perpendicular is their product with the sum.
    short = torch.where(parallel >= 0, perpendicular / (size + parallel), size - parallel)
    # A zero vector has no direction: by definition 0 beside another, 1 beside anything else.
    zero = (size == 0) | ((ww == 0) & size.isfinite())
    return torch.where(zero, ((ww > 0) | (size > 0)).to(torch.float64), short / size)


def _sum(terms: Tensor) -> Tensor:
    """Sum [N, D] over D by halving, in place: [N].

    Element-wise additions in an order that D alone fixes: the library's sums reorder with the
    number of rows, the strides and the threads.
    """
    size = terms.shape[1]
    while size > 1:
        half = (size + 1) // 2
        terms[:, : size - half] += terms[:, half:size]
        size = half
    return terms[:, 0].clone() if size else terms.new_zeros(terms.shape[0])


def _tail(module: str) -> str:
    """A module's name from its list of layers on: `layers.0.mlp.up_proj`."""
    match = re.search(r"[^.]+\.\d+\..*", module)
    return match[0] if match else module


def _pair(
    groups: list[Group],
    shapes: Mapping[str, tuple[int, ...]],
    base_dir: Path,
    tuned_dir: Path,
    model_type: str,
    layout: str | Patterns,
) -> dict[str, list[tuple[Source, Source]]]:
    """Where each module's candidates lie in the base and in the tuned checkpoint, in order."""
    tuned_shapes = checkpoints.shapes(tuned_dir)
    tuned = {
        _tail(group.module): group
        for group in candidates(tuned_shapes, model_type, layout, where=str(tuned_dir))
    }
    base_memory = in_memory(shapes, model_type)
    tuned_memory = in_memory(tuned_shapes, model_type)
    pairs: dict[str, list[tuple[Source, Source]]] = {}
    for group in groups:
        other = tuned.pop(_tail(group.module), None)
        if other is None:
            raise NeftError(
                f"{tuned_dir}: has no {group.parameter}, {base_dir} has; "
                "give two checkpoints of one model"
            )
        here, there = base_memory[group.parameter], tuned_memory[other.parameter]
        if here != there:
            raise NeftError(
                f"{tuned_dir}: {other.parameter} has shape {there}, that of {base_dir} {here}; "
                "give two checkpoints of one model"
            )
        pairs[group.module] = list(
            zip(
                sources(group, shapes, model_type),
                sources(other, tuned_shapes, model_type),
                strict=True,
            )
        )
    if tuned:
        raise NeftError(
            f"{tuned_dir}: has {next(iter(tuned.values())).parameter}, {base_dir} has not; "
            "give two checkpoints of one model"
        )
    return pairs


def _score_source(
    base: tuple[Path, Source], tuned: tuple[Path, Source], length: int, device: str, piece: int
) -> Tensor:
    """Sensitivity of the neurons of one source, [n]; `base` and `tuned` are file and source."""
    count = base[1].count
    result = torch.empty(count, dtype=torch.float64)
    step = max(1, piece // max(1, length))
    with (
        checkpoints.opened(base[0], "pt") as base_file,
        checkpoints.opened(tuned[0], "pt") as tuned_file,
    ):
        slices = [
            base_file.get_slice(base[1].parameter),
            tuned_file.get_slice(tuned[1].parameter),
        ]
        for first in range(0, count, step):
            last = min(first + step, count)
            cuts = [source.cut(first, last) for _, source in (base, tuned)]
            pieces = [cut.read(part).to(device) for cut, part in zip(cuts, slices, strict=True)]
            values = _sensitivity(pieces[0], pieces[1])
            if values.isnan().any():
                _refuse(pieces, [base[0], tuned[0]], cuts)
            result[first:last] = values.cpu()
    return result


def _refuse(pieces: list[Tensor], paths: list[Path], cuts: list[Source]) -> None:
    """Name the file, the tensor and the neuron with a value that is not finite."""
    for weights, path, cut in zip(pieces, paths, cuts, strict=True):
        bad = (~weights.isfinite()).any(dim=1).nonzero()
        if len(bad):
            raise NeftError(
                f"{path}: {cut.parameter} has a value that is not finite in "
                f"{cut.words(int(bad[0]))}; make the model again"
            )
