"""Neurons by a probe: a linear classifier on each layer's hidden states, as in the paper's pilot.

The only module that imports scikit-learn.

Shapes: n sentences, L layers, H hidden size, N candidates of a module, C classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neft_core.errors import NeftError
from neft_core.masks import NeuronScores
from neft_core.neurons import candidates, count_parameters, is_tied, layer_of, sources
from neft_core.patterns import Patterns
from neft_core.steps import evaluating
from neft_core.weights import Model, weights


@torch.no_grad()
def sentence_states(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Mapping[str, Tensor]],
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What each layer gives out, averaged over a sentence's tokens; fp32, on the CPU, [n, L, H].

    These are the outputs of the layers themselves: the model's own norm after the last one is not
    applied.

    Args:
        model: a causal language model, on its device.
        layers: names of the layers, such as `model.layers.0`.
        batches: each with `input_ids` and `attention_mask`, [B, T].
        progress: called after each batch with the number done and that of all.
    """
    found: list[Tensor] = []
    with evaluating(model):
        for number, batch in enumerate(batches, start=1):
            real = batch["attention_mask"].bool()
            seen: dict[str, Tensor] = {}
            with _outputs(model, layers, seen):
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            states = torch.stack([seen[name] for name in layers], dim=1).double()  # [B, L, T, H]
            wide = real[:, None, :, None]
            # Padding may hold anything, NaN too: it is left out, not multiplied by zero.
            means = torch.where(wide, states, 0.0).sum(2) / real.sum(1)[:, None, None]
            found.append(means.float().cpu())
            if progress is not None:
                progress(number, len(batches))
    return torch.cat(found)


@contextmanager
def _outputs(model: nn.Module, layers: Sequence[str], seen: dict[str, Tensor]) -> Iterator[None]:
    """While it lasts, a forward pass leaves each layer's output in `seen`."""

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _given: Any, out: Any) -> None:
            seen[name] = out[0] if isinstance(out, tuple) else out

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probe_scores(
    model: Model,
    states: Tensor,
    labels: Sequence[str],
    layout: str | Patterns = "mlp",
    *,
    alpha: float = 1.0,
    config: Any = None,
    provenance: Mapping[str, str] | None = None,
) -> NeuronScores:
    """Score every candidate by how near it is to a direction that tells the classes apart.

    For each layer a ridge classifier learns the labels from the mean hidden states. A neuron's
    score is the largest magnitude, over the classes' coefficient vectors of its layer, of its
    cosine with one. The paper says no more than "the cosine similarity between the neurons and the
    hidden states of probe decision space"; the rest is our reading.

    Args:
        model: a model, its state dict, or a checkpoint's directory.
        states: hidden states by sentence and layer, [n, L, H] (`sentence_states`).
        labels: the class of each sentence, [n].
        layout: which neurons are candidates.
        alpha: ridge penalty.
        config: the model's config, where `model` has none.
        provenance: what else to keep with the scores.

    Returns:
        Scores in [0, 1]; 0 for a zero vector.

    Raises:
        NeftError: fewer than two classes, fewer than two sentences of one, states that do not fit
            the model, or candidates of another length than H.

    Source: Xu et al. 2024, section 3.1.
    """
    here = weights(model, "base", config)
    kind = str(here.config["model_type"])
    groups = candidates(here.shapes, kind, layout, where=here.where)
    layers = list(dict.fromkeys(layer_of(group.module) for group in groups))
    _check(states, labels, len(layers))
    spaces = dict(zip(layers, _directions(states, labels, alpha), strict=True))
    found: dict[str, Tensor] = {}
    for group in groups:
        if group.length != states.shape[2]:
            raise NeftError(
                f"probe: {group.module} has neurons of {group.length} weights, the hidden size is "
                f"{states.shape[2]}; use layout mlp, mlp+gate, attention or all"
            )
        cuts = sources(group, here.shapes, kind)
        with here.opened({source.parameter for source in cuts}) as stored:
            cosines = [
                _cosines(source.read(stored[source.parameter]), spaces[layer_of(group.module)])
                for source in cuts
            ]
        found[group.module] = torch.cat(cosines)
    return NeuronScores(
        found,
        {group.module: group for group in groups},
        count_parameters(here.shapes, is_tied(here.config), here.memory),
        {**(provenance or {}), "model_type": kind, "layout": str(layout), "criterion": "probe"},
    )


def _check(states: Tensor, labels: Sequence[str], layers: int) -> None:
    if len(states) != len(labels) or states.shape[1] != layers:
        raise NeftError(
            f"probe: got states of shape {tuple(states.shape)} for {len(labels)} labels and "
            f"{layers} layers; one state for each sentence and layer is needed"
        )
    counts = {label: list(labels).count(label) for label in dict.fromkeys(labels)}
    if len(counts) < 2:
        raise NeftError(f"probe: got {len(counts)} class; at least two are needed")
    rare = min(counts, key=lambda label: counts[label])
    if counts[rare] < 2:
        raise NeftError(
            f"probe: {len(counts)} classes in {len(labels)} rows, and only one row of {rare!r}; a "
            "task that sorts texts into few classes is needed"
        )


def _directions(states: Tensor, labels: Sequence[str], alpha: float) -> list[Tensor]:
    """Each layer's coefficient vectors, float64, [C, H]; one for two classes."""
    from sklearn.linear_model import RidgeClassifier

    found = []
    for layer in range(states.shape[1]):
        probe = RidgeClassifier(alpha=alpha, solver="cholesky")
        probe.fit(states[:, layer].double().numpy(), np.asarray(labels))
        found.append(torch.from_numpy(np.atleast_2d(probe.coef_)))
    return found


def _cosines(neurons: Tensor, directions: Tensor) -> Tensor:
    """Largest magnitude of the cosines with any direction, float64, [N]."""
    w = neurons.cpu().double()
    size, length = w.norm(dim=1, keepdim=True), directions.norm(dim=1)
    cosines = (w @ directions.T) / torch.where(size == 0, 1.0, size)
    return (cosines / torch.where(length == 0, 1.0, length)).abs().amax(1)
