import re

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from test_gradients import batches_of
from test_methods import tiny_gpt2

from neft_core.errors import NeftError
from neft_core.probing import probe_scores, sentence_states

LAYERS = ["model.layers.0", "model.layers.1"]


def states_and_labels(classes: int, n: int = 30):
    """States of two layers of 16 numbers, in which the class shifts some."""
    rng = np.random.default_rng(0)
    labels = [f"c{i % classes}" for i in range(n)]
    shift = rng.normal(size=(classes, 2, 16))
    states = rng.normal(size=(n, 2, 16)) + shift[[int(label[1:]) for label in labels]]
    return torch.tensor(states, dtype=torch.float32), labels


def ridge_by_hand(x: np.ndarray, labels: list[str], alpha: float) -> np.ndarray:
    """Coefficients of one-against-the-rest regression on -1 and 1, from the normal equations."""
    names = sorted(set(labels))
    names = names[1:] if len(names) == 2 else names
    targets = np.array([[1.0 if label == name else -1.0 for name in names] for label in labels])
    xc, yc = x - x.mean(0), targets - targets.mean(0)
    return np.linalg.solve(xc.T @ xc + alpha * np.eye(x.shape[1]), xc.T @ yc).T


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("alpha", [1.0, 7.0])
def test_scores_are_largest_cosines_with_ridge_directions(classes, alpha):
    model = tiny_llama()
    states, labels = states_and_labels(classes)
    scores = probe_scores(model, states, labels, "all", alpha=alpha)
    assert scores.criterion == "probe"
    for layer in (0, 1):
        space = ridge_by_hand(states[:, layer].double().numpy(), labels, alpha)
        for name, axis in (("mlp.up_proj", 0), ("mlp.down_proj", 1), ("self_attn.o_proj", 1)):
            module = f"model.layers.{layer}.{name}"
            weight = model.get_parameter(f"{module}.weight").detach().double().numpy()
            neurons = weight.T if axis else weight
            for i, w in enumerate(neurons):
                cosines = [w @ c / np.linalg.norm(w) / np.linalg.norm(c) for c in space]
                want = max(abs(cosine) for cosine in cosines)
                assert float(scores.sensitivity[module][i]) == pytest.approx(want, rel=1e-6)


def test_a_neuron_along_the_direction_scores_one_and_a_zero_one_zero():
    model = tiny_llama()
    states, labels = states_and_labels(2)
    direction = ridge_by_hand(states[:, 0].double().numpy(), labels, 1.0)[0]
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[3] = -2 * torch.tensor(direction, dtype=torch.float32)
        weight[4] = 0
    found = probe_scores(model, states, labels).sensitivity["model.layers.0.mlp.up_proj"]
    assert float(found[3]) == pytest.approx(1, abs=1e-6)
    assert float(found[4]) == 0


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_states_are_each_sentence_s_mean_before_the_last_norm(make):
    model, batches = make().double(), batches_of(rows=5, size=5)
    layers = LAYERS if make is tiny_llama else ["transformer.h.0", "transformer.h.1"]
    got = sentence_states(model, layers, batches)
    assert got.shape == (5, 2, 16)
    (batch,) = batches
    for i, real in enumerate(batch["attention_mask"].sum(1).tolist()):
        with torch.no_grad():
            out = model(batch["input_ids"][i : i + 1, :real], output_hidden_states=True)
        # transformers' first hidden states are the embedding, the last are normed
        want = out.hidden_states[1][0].mean(0).float()
        torch.testing.assert_close(got[i, 0], want)
        assert not torch.allclose(got[i, 1], out.hidden_states[2][0].mean(0).float())
    split = sentence_states(model, layers, batches_of(rows=5, size=2))
    torch.testing.assert_close(split, got)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (["a"] * 30, "probe: got 1 class; at least two are needed"),
        (["a"] * 29 + ["b"], "probe: 2 classes in 30 rows, and only one row of 'b'; a task that"),
        ([str(i) for i in range(30)], "probe: 30 classes in 30 rows, and only one row of '0'"),
        (["a", "b"], "probe: got states of shape (30, 2, 16) for 2 labels and 2 layers; one state"),
    ],
)
def test_labels_that_teach_nothing_are_refused(labels, text):
    with pytest.raises(NeftError, match=re.escape(text)):
        probe_scores(tiny_llama(), states_and_labels(2)[0], labels)


def test_neurons_of_another_length_are_refused():
    states, labels = states_and_labels(2)
    with pytest.raises(
        NeftError, match="down_proj has neurons of 24 weights, the hidden size is 16"
    ):
        probe_scores(tiny_llama(), states, labels, "rows")
