"""Parallel corpora made from rules and a lexicon: sentences, summarised texts, inferences.

The data of the demo and of the tests, at hand without a download. `sampler` and `constructions`
draw a meaning that belongs to no language; `grammar_en`, `grammar_fr`, `grammar_zh`, `grammar_hi`
and `grammar_de` each say it by the rules of their language. `summaries` and `inferences` draw texts
of several meanings.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from neft_core.corpus import (
    constructed,
    grammar_en,
    grammar_fr,
    grammar_hi,
    grammar_zh,
    inferences,
    summaries,
)
from neft_core.corpus.constructions import SIMPLE as _SIMPLE
from neft_core.corpus.constructions_held_out import HELD_OUT as _HELD_OUT
from neft_core.corpus.meaning import Clause
from neft_core.corpus.sampler import Sampler
from neft_core.errors import NeftError

LANGUAGES = {
    "en": "English",
    "fr": "French",
    "zh": "Chinese",
    "hi": "Hindi",
    "qmi": "Tavi (constructed)",
    "qbs": "Besk (constructed)",
}
GRAMMARS: dict[str, Callable[[Clause], str]] = {
    "en": grammar_en.sentence,
    "fr": grammar_fr.sentence,
    "zh": grammar_zh.sentence,
    "hi": grammar_hi.sentence,
    "qmi": constructed.tavi,
    "qbs": constructed.besk,
}
# Distinct word forms in use, to within 5 %; for Chinese, characters.
VOCABULARY = {"en": 600, "fr": 880, "zh": 460, "hi": 890, "qmi": 350, "qbs": 1660}
SIMPLE = tuple(_SIMPLE)
HELD_OUT = tuple(_HELD_OUT)

# A construction is spent when this many draws in a row gave nothing new: what is left is rarer
# than about one draw in a hundred.
PATIENCE = 100

Sentence = dict[str, str]
Row = dict[str, str]


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

    A sentence is new when none of its texts is in `seen`, which grows with each.

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
) -> dict[str, list[Row]]:
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
    _check_pair(source, target, LANGUAGES)
    if unknown := sorted(set(constructions) - set(SIMPLE) - set(HELD_OUT)):
        raise NeftError(
            f"corpus: no construction {unknown[0]!r}; choose from {', '.join(SIMPLE + HELD_OUT)}"
        )
    seen: dict[str, set[str]] = {code: set() for code in LANGUAGES}

    def rows(split: str, names: tuple[str, ...]) -> Iterator[Row]:
        for construction, drawn in distinct(names, random.Random(f"{seed}/{split}"), seen):
            yield {
                "source": drawn[source],
                "target": drawn[target],
                "construction": construction,
            }

    sizes = {"test": test, "dev": dev, "pretrain": pretrain, "train": train}
    return _filled(
        {name: rows(name, SIMPLE if name == "pretrain" else constructions) for name in sizes}, sizes
    )


def generate_summaries(
    source: str, target: str, *, seed: int, pretrain: int, train: int, dev: int, test: int
) -> dict[str, list[Row]]:
    """Make the splits of summarisation from one language to another.

    Like `generate_splits` in all: no text or summary occurs twice, pairs of languages are parallel,
    more training rows begin with the fewer. `pretrain` has sentence pairs.

    Returns:
        Rows {"source", "target"} by split.

    Raises:
        NeftError: as `generate_splits`.
    """
    _check_pair(source, target, summaries.GRAMMARS)
    seen: dict[str, set[str]] = {code: set() for code in LANGUAGES}

    def rows(split: str) -> Iterator[Row]:
        rng = random.Random(f"{seed}/summaries/{split}")
        if split == "pretrain":
            for _, drawn in distinct(SIMPLE, rng, seen):
                yield {"source": drawn[source], "target": drawn[target]}
        for pairs in summaries.distinct(rng, seen, PATIENCE):
            yield {"source": pairs[source][0], "target": pairs[target][1]}

    sizes = {"test": test, "dev": dev, "pretrain": pretrain, "train": train}
    return _filled({name: rows(name) for name in sizes}, sizes)


def generate_inferences(
    language: str, *, seed: int, pretrain: int, train: int, dev: int, test: int
) -> dict[str, list[Row]]:
    """Make the splits of nli in one language.

    Like `generate_splits` in all: no premise or hypothesis occurs twice, languages are parallel,
    more training rows begin with the fewer. The three labels come in turn. `pretrain` has single
    sentences of the same kind.

    Returns:
        Rows {"premise", "hypothesis", "label", "rule"} by split; of pretrain {"text"}.

    Raises:
        NeftError: as `generate_splits`.
    """
    if language not in inferences.GRAMMARS:
        known = ", ".join(inferences.GRAMMARS)
        raise NeftError(f"corpus: language {language!r} is unknown; choose from {known}")
    seen: dict[str, set[str]] = {code: set() for code in inferences.GRAMMARS}

    def rows(split: str) -> Iterator[Row]:
        rng = random.Random(f"{seed}/inferences/{split}")
        for found in inferences.distinct(rng, seen, PATIENCE):
            row = found[language]
            if split == "pretrain":
                yield {"text": row["premise"]}
                yield {"text": row["hypothesis"]}
            else:
                yield row

    sizes = {"test": test, "dev": dev, "pretrain": pretrain, "train": train}
    return _filled({name: rows(name) for name in sizes}, sizes)


def _check_pair(source: str, target: str, known: Iterable[str]) -> None:
    for name, code in (("source", source), ("target", target)):
        if code not in known:
            raise NeftError(
                f"corpus: {name} language {code!r} is unknown; choose from {', '.join(known)}"
            )
    if source == target:
        raise NeftError(f"corpus: source and target are both {source!r}; choose two languages")


def _filled(streams: dict[str, Iterator[Row]], sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Take each split from its stream, in the order of `sizes`.

    That has evaluation first: what comes later must keep out of it, so its rows never move.
    """
    splits: dict[str, list[Row]] = {}
    for split, size in sizes.items():
        if size < 0:
            raise NeftError(f"corpus: {split} is {size}; give a number of rows, 0 or more")
        splits[split] = list(islice(streams[split], size))
        if len(splits[split]) < size:
            raise NeftError(
                f"corpus: {split} asks for {size} rows, only {len(splits[split])} distinct ones "
                "were found beside the other splits; ask for fewer"
            )
    return {split: splits[split] for split in ("pretrain", "train", "dev", "test")}


GENERATORS: dict[str, Callable[..., dict[str, list[Row]]]] = {
    "translation": generate_splits,
    "summarisation": generate_summaries,
    "nli": generate_inferences,
}
"""What makes the splits of each kind of task, called with its languages."""
