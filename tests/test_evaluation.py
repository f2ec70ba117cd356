"""Batched generation against one prompt at a time."""

import numpy as np
import pytest
import torch
from conftest import tiny_llama

from neft_core.errors import NeftError
from neft_core.evaluation import first_line, generate, log_likelihoods


class Numbers:
    """A tokenizer whose text is the ids themselves; 0 pads, 2 ends."""

    pad_token_id = 0
    eos_token_id = 2

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(str(int(i)) for i in row if int(i) not in (0, 1, 2)) for row in rows]


def prompts(count: int = 11) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 14, (count,), generator=generator).tolist()
    return [[1, *torch.randint(3, 64, (n,), generator=generator).tolist()] for n in lengths]


@torch.no_grad()
def one_by_one(model, prompt: list[int], new: int) -> str:
    """Greedy decoding with a whole forward pass for each token: no batch, padding, or cache."""
    ids, said = list(prompt), []
    for _ in range(new):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == 2:
            break
        ids.append(token)
        said.append(token)
    return " ".join(str(i) for i in said if i not in (0, 1))


def run(model, given, **changes):
    options = {"batch_size": 4, "max_new_tokens": 8, "context": 64, "label": "t"} | changes
    return generate(model, Numbers(), given, **options)


def model_that_stops():
    """A tiny model with larger weights, so that answers differ, and with a liking for the end."""
    model = tiny_llama(seed=3, tie_word_embeddings=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
        model.lm_head.weight[2] *= 2
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
def test_equals_generating_one_by_one_without_padding(batch_size):
    model, given = model_that_stops(), prompts()
    expected = [one_by_one(model, prompt, 8) for prompt in given]
    lengths = {len(text.split()) for text in expected}
    assert len(set(expected)) > 8, "prompts whose answers differ make the order visible"
    assert 8 in lengths
    assert min(lengths) < 8, "some must stop at the end token before the limit"
    assert run(model, given, batch_size=batch_size) == expected


def test_what_generation_config_asks_for_changes_nothing():
    model, given = model_that_stops(), prompts(4)
    expected = run(model, given)
    for name, value in {"repetition_penalty": 5.0, "suppress_tokens": [9], "top_p": 0.1}.items():
        setattr(model.generation_config, name, value)
    assert run(model, given) == expected


def test_no_prompts_no_texts():
    assert run(tiny_llama(), []) == []


def test_a_prompt_and_its_continuation_must_fit_the_model():
    longest = max(map(len, prompts()))
    assert len(run(tiny_llama(), prompts(), max_new_tokens=64 - longest)) == 11
    with pytest.raises(NeftError) as fault:
        run(tiny_llama(), prompts(), max_new_tokens=65 - longest)
    assert str(fault.value) == (
        f"params.yaml: evaluation.max_new_tokens: got {65 - longest}; at most {64 - longest}, as "
        f"the longest prompt has {longest} tokens and the model takes 64"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [("a b\nc", "a b"), ("a ", "a"), ("", ""), ("\nb", ""), ("x\u2028y", "x\u2028y")],
)
def test_a_translation_is_one_line(text, line):
    assert first_line(text) == line


def answers_of_lengths(count: int = 9) -> dict[str, np.ndarray]:
    """Prompts with answers of one to four tokens; those after the prompt are trained."""
    rng = np.random.default_rng(2)
    prompt, answer = rng.integers(1, 9, count), rng.integers(1, 5, count)
    lengths = prompt + answer
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    trained = [np.arange(n) >= p for n, p in zip(lengths, prompt, strict=True)]
    return {
        "tokens": rng.integers(3, 64, offsets[-1]).astype(np.int32),
        "trained": np.concatenate(trained).astype(np.uint8),
        "offsets": offsets,
        "prompts": prompt.astype(np.int32),
    }


@torch.no_grad()
def log_probability(model, ids: list[int], prompt: int) -> float:
    """Of the tokens after the prompt, each by a pass over what stands before it."""
    total = 0.0
    for place in range(prompt, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double()
        total += float(logits.log_softmax(0)[ids[place]])
    return total


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_log_likelihoods_are_those_of_one_row_and_token_at_a_time(batch_size):
    model, arrays = model_that_stops(), answers_of_lengths()
    parts = np.split(arrays["tokens"], arrays["offsets"][1:-1])
    expected = [
        log_probability(model, part.tolist(), int(prompt))
        for part, prompt in zip(parts, arrays["prompts"], strict=True)
    ]
    found = log_likelihoods(model, arrays, pad=0, batch_size=batch_size, label="t")
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert len({round(one, 3) for one in expected}) == len(expected)


def test_the_probabilities_of_all_answers_of_a_length_sum_to_one():
    model = model_that_stops()
    ids = np.array([[1, 5, one] for one in range(64)], np.int32)
    arrays = {
        "tokens": ids.ravel(),
        "trained": np.tile([0, 0, 1], 64).astype(np.uint8),
        "offsets": np.arange(65) * 3,
        "prompts": np.full(64, 2, np.int32),
    }
    found = log_likelihoods(model, arrays, pad=0, batch_size=10, label="t")
    assert np.exp(found).sum() == pytest.approx(1, abs=1e-5)
