"""How much what a neuron gives out changed, on text: base against tuned model.

Shapes: N candidates of a module, D weights in each, T tokens of a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neft_core.errors import NeftError
from neft_core.groups import COLUMNS, Group, read_neurons
from neft_core.masks import NeuronScores
from neft_core.neurons import candidates, count_parameters, is_tied
from neft_core.patterns import Patterns
from neft_core.similarity import one_minus_cosine, sensitivity
from neft_core.steps import evaluating
from neft_core.weights import weights


@torch.no_grad()
def activation_scores(
    base: nn.Module,
    tuned: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    layout: str | Patterns = "mlp",
    *,
    provenance: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NeuronScores:
    """Score every candidate by one minus the cosine of its activations before and after tuning.

    A neuron's activations are what it gives out at each token that is no padding: a row w gives the
    number w.x, a column w the vector x_j w, x being the module's input. Each model sees its own
    inputs. The sums over tokens are float64.

    Memory: both models, and the base's inputs or outputs of every module for one batch.

    Args:
        base: the base model, on its device.
        tuned: the tuned model, on the same device.
        batches: each with `input_ids` and `attention_mask`, [B, T].
        layout: which neurons are candidates.
        provenance: what else to keep with the scores.
        progress: called after each batch with the number done and that of all.

    Raises:
        NeftError: no batch, models of different form, an activation that is not finite, or experts
            whose neurons are in one 3-D parameter.
    """
    known = weights(base, "base").config
    shapes, others = (
        {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        for model in (base, tuned)
    )
    kind = str(known["model_type"])
    groups = candidates(shapes, kind, layout)
    if groups != candidates(others, kind, layout, where="tuned"):
        raise NeftError("tuned: its candidates differ from the base's; give two of one model")
    if experts := [group.module for group in groups if group.experts]:
        raise NeftError(
            f"activation: {experts[0]} holds experts, whose activations aren't seen one by one; "
            "use scores by similarity or gradient"
        )
    if not batches:
        raise NeftError("activation: got no rows; give some")
    sums = {g.module: torch.zeros(3, g.count, dtype=torch.float64) for g in groups}
    with evaluating(base, tuned):
        for number, batch in enumerate(batches, start=1):
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            real = batch["attention_mask"].bool()
            add_batch((base, tuned), groups, inputs, real, sums)
            if progress is not None:
                progress(number, len(batches))
    return NeuronScores(
        {g.module: _score(g, sums[g.module], base, tuned) for g in groups},
        {g.module: g for g in groups},
        count_parameters(shapes, is_tied(known)),
        {
            **(provenance or {}),
            "model_type": kind,
            "layout": str(layout),
            "criterion": "activation",
        },
    )


def add_batch(
    models: tuple[nn.Module, nn.Module],
    groups: Sequence[Group],
    inputs: Mapping[str, Tensor],
    real: Any,
    sums: dict[str, Tensor],
) -> None:
    """Add a batch to the sums of each module's a.a, d.a and d.d, [3, N].

    Args:
        models: base and tuned model.
        groups: the modules' candidates.
        inputs: of the models' forward passes.
        real: index of the tokens that count.
        sums: float64, changed in place.
    """
    before: dict[str, Tensor] = {}
    with _watched(models[0], groups, real, before.__setitem__):
        models[0](**inputs)

    def compare(module: str, after: Tensor) -> None:
        a = before.pop(module).double()
        d = after.double() - a
        found = torch.stack([(a * a).sum(0), (d * a).sum(0), (d * d).sum(0)])
        sums[module] += found.cpu()

    with _watched(models[1], groups, real, compare):
        models[1](**inputs)


@contextmanager
def _watched(
    model: nn.Module, groups: Sequence[Group], real: Any, see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While it lasts, `see` gets each module's numbers w.x or x_j of its candidates, [T, N]."""

    def watch(group: Group) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            whole = given[0] if group.axis == COLUMNS else out
            last = group.start + group.step * (group.count - 1) + 1
            see(group.module, whole[..., group.start : last : group.step][real])

        return model.get_submodule(group.module).register_forward_hook(hook)

    handles = [watch(group) for group in groups]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _score(group: Group, sums: Tensor, base: nn.Module, tuned: nn.Module) -> Tensor:
    """One module's scores from a.a, d.a and d.d over all tokens, a being the base's numbers."""
    aa, da, dd = sums
    if not bool(sums.isfinite().all()):
        raise NeftError(
            f"activation: {group.module} gives out values that are not finite; make the models "
            "again"
        )
    along = da / torch.where(aa == 0, 1.0, aa)
    found = one_minus_cosine(aa, along, (dd - along * da).clamp(min=0))
    if group.axis == COLUMNS:
        # The cosine of x_j w and y_j v is that of x and y times that of w and v.
        every = group.indices(torch.arange(group.count))
        w, v = (
            read_neurons(
                model.get_parameter(group.parameter).cpu(), every, group.axis, group.transposed
            )
            for model in (base, tuned)
        )
        turned = sensitivity(w, v)
        found = found + turned - found * turned
    return found
