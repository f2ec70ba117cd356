"""How much fine-tuning changed each neuron: one minus a cosine, exact for tiny changes.

Shapes: N neurons, D weights in each.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neft_core.errors import NeftError
from neft_core.groups import Group, Source
from neft_core.masks import NeuronScores
from neft_core.neurons import candidates, count_parameters, in_memory, is_tied, sources
from neft_core.patterns import Patterns
from neft_core.sums import Kernel, across, compiled, sums
from neft_core.weights import Model, Weights, weights

# Weights per piece: what torch makes of them on a CPU stays small; the compiled sums make nothing
# and want few calls; another device wants to be filled.
_PIECE, _PIECE_COMPILED, _PIECE_ELSEWHERE = 1 << 22, 1 << 24, 1 << 26
# Fewer weights are scored in the time that the compiler takes, if nothing is kept of before.
_WORTH_COMPILING = 1 << 26
# d.d - (d.w)^2 / w.w loses this much precision at most before the part is summed by itself.
_LOSS = 16


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
    result: Tensor = _compared(base, tuned)[0]
    if result.isnan().any():
        neuron = int(result.isnan().nonzero()[0])
        raise NeftError(f"sensitivity: neuron {neuron} has a value that is not finite")
    return result


def score_neurons(
    base: Model,
    tuned: Model,
    layout: str | Patterns = "mlp",
    *,
    model_type: str | None = None,
    config: Any = None,
    provenance: Mapping[str, str] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    piece: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NeuronScores:
    """Score every candidate neuron of a model before and after tuning.

    Each of the two is a model, its state dict, or a checkpoint: a directory in the Hub's layout
    with safetensors, sharded or not. A checkpoint is read one weight at a time, so memory does not
    grow with the model. The tuned model needs only the weights that have candidates, and may lack
    or have a prefix such as `transformer.` in its names.

    Args:
        base: the base model.
        tuned: the tuned model.
        layout: which neurons are candidates.
        model_type: the `model_type` of the models' config, where neither has a config.
        config: the models' config, an object or a mapping, where neither has one.
        provenance: what else to keep with the scores, such as hashes and steps.
        device: where to compute.
        threads: of a computation on a CPU; torch's own number without it.
        piece: weights to hold at once. Neither it nor `threads` changes a bit of the result.
        progress: called after each module with the number done and that of all.

    Raises:
        NeftError: the models are of different form, damaged, quantised, have an adapter, or hold
            values that are not finite; names the file and the weight. A device that isn't here, or
            no number of threads.

    Source: Xu et al. 2024, Algorithm 1.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise NeftError(f"threads: got {threads!r}; a whole number from 1 on is needed")
    _check_device(device)
    given = {"model_type": model_type} if model_type and config is None else config
    here, there = weights(base, "base", given), weights(tuned, "tuned", given)
    known = here.config or there.config
    if "model_type" not in known:
        raise NeftError(f"{here.where}: has no model_type; give model_type or config")
    for model in (there, here):
        if any(".base_layer." in name for name in model.shapes):
            raise NeftError(f"{model.where}: still has an adapter; call merge_and_unload() first")
    kind = str(known["model_type"])
    groups = candidates(here.shapes, kind, layout, where=here.where)
    pairs = _pair(groups, here, there, kind, layout)
    on_cpu = torch.device(device).type == "cpu"
    workers = (threads or torch.get_num_threads()) if on_cpu else 1
    large = sum(group.count * group.length for group in groups) >= _WORTH_COMPILING
    kernel = compiled(large) if on_cpu else None
    usual = _PIECE if on_cpu else _PIECE_ELSEWHERE
    if kernel is not None:
        usual = max(usual, _PIECE_COMPILED // workers)
    scorer = _Scorer(here, there, device, piece or usual, kernel)
    sensitivities: dict[str, Tensor] = {}
    magnitudes: dict[str, Tensor] = {}
    with ThreadPoolExecutor(workers) as pool:
        for done, group in enumerate(groups, start=1):
            sensitivities[group.module], magnitudes[group.module] = scorer.score(
                group, pairs[group.module], pool
            )
            if progress is not None:
                progress(done, len(groups))
    return NeuronScores(
        sensitivities,
        {group.module: group for group in groups},
        count_parameters(here.shapes, is_tied(known), here.memory),
        {**(provenance or {}), "model_type": kind, "layout": str(layout)},
        magnitudes,
    )


def _check_device(device: str) -> None:
    """Refuse a device that can't compute here, before anything is read."""
    try:
        torch.zeros((), dtype=torch.float64, device=device).item()
    except (AssertionError, RuntimeError, TypeError) as fault:
        reason = str(fault).splitlines()[0]
        raise NeftError(
            f"device: got {device!r} ({reason}); give one that is here, as cpu"
        ) from None


def _compared(base: Tensor, tuned: Tensor, kernel: Kernel | None = None) -> Tensor:
    """Sensitivity and size of the displacement, [2, N]; NaN in both for values not finite."""
    ww, dw, dd = sums(base, tuned, kernel)
    # d = along * w + a part perpendicular to w; the cosine is parallel / size.
    along = dw / torch.where(ww == 0, 1.0, ww)
    perpendicular = dd - along * dw
    cancels = perpendicular * _LOSS < dd
    if cancels.any():
        perpendicular[cancels] = across(base[cancels], tuned[cancels], along[cancels])
    return torch.stack((one_minus_cosine(ww, along, perpendicular), dd.sqrt()))


def one_minus_cosine(ww: Tensor, along: Tensor, perpendicular: Tensor) -> Tensor:
    """One minus the cosine of w and w + d, without a difference of near numbers.

    Args:
        ww: w.w, float64, [N].
        along: d.w / w.w, [N].
        perpendicular: squared size of d - along w, [N].
    """
    parallel = ww.sqrt() * (1 + along)
    size = (parallel * parallel + perpendicular).sqrt()
    # size - parallel cancels where both are near; perpendicular is their product with the sum.
    short = torch.where(parallel >= 0, perpendicular / (size + parallel), size - parallel)
    # A zero vector has no direction: by definition 0 beside another, 1 beside anything else.
    zero = (size == 0) | ((ww == 0) & size.isfinite())
    return torch.where(zero, ((ww > 0) | (size > 0)).to(torch.float64), short / size)


@dataclass(frozen=True)
class _Scorer:
    """Two models, and with what they are compared."""

    base: Weights
    tuned: Weights
    device: str
    piece: int
    kernel: Kernel | None

    def score(
        self, group: Group, pairs: list[tuple[Source, Source]], pool: ThreadPoolExecutor
    ) -> Tensor:
        """Sensitivity and magnitude of one module's candidates, [2, count]."""
        step = max(1, self.piece // max(1, group.length))
        with (
            self.base.opened({base.parameter for base, _ in pairs}) as before,
            self.tuned.opened({tuned.parameter for _, tuned in pairs}) as after,
        ):

            def one(cuts: tuple[Source, Source]) -> Tensor:
                base, tuned = cuts
                w = base.read(before[base.parameter]).to(self.device)
                v = tuned.read(after[tuned.parameter]).to(self.device)
                values = _compared(w, v, self.kernel)
                if values.isnan().any():
                    _refuse((self.base, base, w), (self.tuned, tuned, v))
                return values.cpu()

            return torch.cat(list(pool.map(one, _cut(pairs, step))), dim=1)


def _cut(pairs: list[tuple[Source, Source]], step: int) -> Iterator[tuple[Source, Source]]:
    """Pieces of at most `step` neurons, the same of both models."""
    for base, tuned in pairs:
        for first in range(0, base.count, step):
            last = min(first + step, base.count)
            yield base.cut(first, last), tuned.cut(first, last)


def _tail(module: str) -> str:
    """A module's name from its list of layers on: `layers.0.mlp.up_proj`."""
    match = re.search(r"[^.]+\.\d+\..*", module)
    return match[0] if match else module


def _pair(
    groups: list[Group], base: Weights, tuned: Weights, model_type: str, layout: str | Patterns
) -> dict[str, list[tuple[Source, Source]]]:
    """Where each module's candidates lie in the base and in the tuned model, in order."""
    others = {
        _tail(group.module): group
        for group in candidates(tuned.shapes, model_type, layout, where=tuned.where)
    }
    base_shapes = in_memory(base.shapes, model_type)
    tuned_shapes = in_memory(tuned.shapes, model_type)
    pairs: dict[str, list[tuple[Source, Source]]] = {}
    for group in groups:
        other = others.pop(_tail(group.module), None)
        if other is None:
            raise NeftError(
                f"{tuned.where}: has no {group.parameter}, {base.where} has; "
                "give two checkpoints of one model"
            )
        here, there = base_shapes[group.parameter], tuned_shapes[other.parameter]
        if here != there:
            raise NeftError(
                f"{tuned.where}: {other.parameter} has shape {there}, that of {base.where} {here}; "
                "give two checkpoints of one model"
            )
        own, its = (
            sources(found, model.shapes, model_type)
            for found, model in ((group, base), (other, tuned))
        )
        pairs[group.module] = list(zip(own, its, strict=True))
    if others:
        raise NeftError(
            f"{tuned.where}: has {next(iter(others.values())).parameter}, {base.where} has not; "
            "give two checkpoints of one model"
        )
    return pairs


def _refuse(*sides: tuple[Weights, Source, Tensor]) -> None:
    """Name the file, the weight and the neuron with a value that is not finite."""
    for model, cut, neurons in sides:
        bad = (~neurons.isfinite()).any(dim=1).nonzero()
        if len(bad):
            raise NeftError(
                f"{model.place(cut.parameter)}: {cut.parameter} has a value that is not finite in "
                f"{cut.words(int(bad[0]))}; make the model again"
            )
