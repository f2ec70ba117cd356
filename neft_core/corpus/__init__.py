"""A parallel corpus in English, French, Chinese and Hindi, made from rules and a lexicon.

The data of the demo and of the tests, at hand without a download. `sampler` and `constructions`
draw a meaning that belongs to no language; `grammar_en`, `grammar_fr`, `grammar_zh` and
`grammar_hi` each say it by the rules of their language.
"""

import random
from collections.abc import Callable, Iterator

from neft_core.corpus import grammar_en, grammar_fr, grammar_hi, grammar_zh
from neft_core.corpus.constructions import SIMPLE as _SIMPLE
from neft_core.corpus.constructions_held_out import HELD_OUT as _HELD_OUT
from neft_core.corpus.meaning import Clause
from neft_core.corpus.sampler import Sampler
from neft_core.errors import NeftError

LANGUAGES = {"en": "English", "fr": "French", "zh": "Chinese", "hi": "Hindi"}
GRAMMARS: dict[str, Callable[[Clause], str]] = {
    "en": grammar_en.sentence,
    "fr": grammar_fr.sentence,
    "zh": grammar_zh.sentence,
    "hi": grammar_hi.sentence,
}
# Distinct word forms in use, to within 5 %; for Chinese, characters.
VOCABULARY = {"en": 600, "fr": 880, "zh": 460, "hi": 890}
SIMPLE = tuple(_SIMPLE)
HELD_OUT = tuple(_HELD_OUT)

# A construction is spent when this many draws in a row gave nothing new: what is left is rarer
# than about one draw in a hundred.
PATIENCE = 100

Sentence = dict[str, str]


def sentence(construction: str, rng: random.Random) -> Sentence:
    """Draw one sentence.

    Args:
        construction: a name in `SIMPLE` or `HELD_OUT`.
        rng: source of all choices.

    Returns:
        The sentence by language code.

    Raises:
        NeftError: no such construction.
    """
    draw = _SIMPLE.get(construction) or _HELD_OUT.get(construction)
    if draw is None:
        raise NeftError(
            f"corpus: no construction {construction!r}; choose from {', '.join(SIMPLE + HELD_OUT)}"
        )
    meaning = draw(Sampler(rng))
    return {code: realise(meaning) for code, realise in GRAMMARS.items()}


def distinct(
    constructions: tuple[str, ...], rng: random.Random, seen: dict[str, set[str]]
) -> Iterator[tuple[str, Sentence]]:
    """Draw sentences, the constructions in equal shares, until nothing new comes.

    A sentence is new when none of its four texts is in `seen`, which grows with each.

    Args:
        constructions: names to draw from.
        rng: source of all choices.
        seen: texts already used, by language code.

    Yields:
        Construction and sentence.
    """
    alive = list(constructions)
    while alive:
        construction = rng.choice(alive)
        for _ in range(PATIENCE):
            drawn = sentence(construction, rng)
            if not any(text in seen[code] for code, text in drawn.items()):
                break
        else:
            alive.remove(construction)
            continue
        for code, text in drawn.items():
            seen[code].add(text)
        yield construction, drawn


def generate_splits(
    source: str,
    target: str,
    *,
    seed: int,
    pretrain: int,
    train: int,
    dev: int,
    test: int,
    constructions: tuple[str, ...] = HELD_OUT,
) -> dict[str, list[dict[str, str]]]:
    """Make the splits of one language pair.

    No text occurs twice, in either language, within or between splits. The same seed and sizes
    give the same meanings for every pair, so the pairs are parallel to each other. Test, dev and
    pretrain do not depend on how many training rows are asked for, and more training rows begin
    with the fewer.

    Args:
        source: language code of the source.
        target: language code of the target.
        seed: seed of all choices.
        pretrain: sentences of the simple constructions.
        train: sentences of `constructions`.
        dev: sentences of `constructions`.
        test: sentences of `constructions`.
        constructions: those of train, dev and test; pretrain never has a held-out one.

    Returns:
        Rows {"source", "target", "construction"} by split: pretrain, train, dev, test.

    Raises:
        NeftError: an unknown or repeated language, an unknown construction, a negative size, or
            more sentences than can be made.
    """
    for name, code in (("source", source), ("target", target)):
        if code not in LANGUAGES:
            raise NeftError(
                f"corpus: {name} language {code!r} is unknown; choose from {', '.join(LANGUAGES)}"
            )
    if source == target:
        raise NeftError(f"corpus: source and target are both {source!r}; choose two languages")
    if unknown := sorted(set(constructions) - set(SIMPLE) - set(HELD_OUT)):
        raise NeftError(
            f"corpus: no construction {unknown[0]!r}; choose from {', '.join(SIMPLE + HELD_OUT)}"
        )
    # Evaluation first: what comes later must keep out of it, so its rows never move.
    plan = (
        ("test", test, constructions),
        ("dev", dev, constructions),
        ("pretrain", pretrain, SIMPLE),
        ("train", train, constructions),
    )
    seen: dict[str, set[str]] = {code: set() for code in LANGUAGES}
    splits: dict[str, list[dict[str, str]]] = {}
    for split, size, names in plan:
        if size < 0:
            raise NeftError(f"corpus: {split} is {size}; give a number of sentences, 0 or more")
        stream = distinct(names, random.Random(f"{seed}/{split}"), seen)
        rows = [
            {"source": drawn[source], "target": drawn[target], "construction": construction}
            for _, (construction, drawn) in zip(range(size), stream, strict=False)
        ]
        if len(rows) < size:
            raise NeftError(
                f"corpus: {split} asks for {size} sentences, only {len(rows)} distinct ones were "
                "found beside the other splits; ask for fewer"
            )
        splits[split] = rows
    return {split: splits[split] for split in ("pretrain", "train", "dev", "test")}


GENERATORS: dict[str, Callable[..., dict[str, list[dict[str, str]]]]] = {
    "translation": generate_splits,
}
"""What makes the splits of each kind of task, called with its languages."""
