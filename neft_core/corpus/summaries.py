"""Short texts with a one-sentence summary, for cross-lingual summarisation.

A text says of three people what each does, and of two people what they are. One person alone is in
both: the text is about that person. The summary says what they do, by what they are instead of
by name, without place, time, company and attributes. So it can be written only by who finds the
name that comes twice; no sentence of the text is the summary, and their order says nothing.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace

import neft_core.corpus.grammar_en as grammar_en
import neft_core.corpus.grammar_fr as grammar_fr
import neft_core.corpus.grammar_hi as grammar_hi
import neft_core.corpus.grammar_zh as grammar_zh
from neft_core.corpus.constructions import EPICENE_JOBS
from neft_core.corpus.meaning import Clause, Name, Noun, Phrase, Pronoun, lexicon
from neft_core.corpus.sampler import Sampler, nouns

GRAMMARS: dict[str, Callable[[Clause], str]] = {
    "en": grammar_en.sentence,
    "fr": grammar_fr.sentence,
    "zh": grammar_zh.sentence,
    "hi": grammar_hi.sentence,
}


def draw(s: Sampler) -> tuple[list[Clause], Clause]:
    """Draw the sentences of a text, and its summary."""
    one, *others = (Phrase(name) for name in s.rng.sample(lexicon().names, 4))
    jobs = [_job(s, one), _job(s, others[2])]
    while jobs[0] is jobs[1]:
        jobs[1] = _job(s, others[2])
    done = _event(s, one)
    sentences = [done, *(_event(s, other) for other in others[:2])]
    sentences += [
        Clause("be", who, object=Phrase(job, "bare"))
        for who, job in ((one, jobs[0]), (others[2], jobs[1]))
    ]
    if s.chance(0.5):
        sentences.append(Clause("act", weather=s.pick(lexicon().weathers), tense="progressive"))
    s.rng.shuffle(sentences)
    thing = done.object
    summary = replace(
        done,
        subject=Phrase(jobs[0], "the"),
        object=replace(thing, adjective=None) if thing else None,
        place=None,
        time=None,
        companion=None,
    )
    return sentences, summary


def distinct(
    rng: random.Random, seen: dict[str, set[str]], patience: int
) -> Iterator[dict[str, tuple[str, str]]]:
    """Texts with their summaries, by language, none of which is in `seen`, which grows.

    Ends when so many draws in a row gave nothing new.
    """
    s = Sampler(rng)
    while True:
        for _ in range(patience):
            sentences, summary = draw(s)
            pairs = {
                code: (
                    ("" if code == "zh" else " ").join(map(realise, sentences)),
                    realise(summary),
                )
                for code, realise in GRAMMARS.items()
            }
            if not any(seen[code] & set(pair) for code, pair in pairs.items()):
                break
        else:
            return
        for code, pair in pairs.items():
            seen[code].update(pair)
        yield pairs


def _job(s: Sampler, who: Phrase) -> Noun:
    """A profession whose word suits the person in every language."""
    gender = who.gender("fr")
    return s.pick(
        [
            noun
            for noun in nouns("job")
            if noun.en in EPICENE_JOBS or noun.fr_gender == gender == noun.hi_gender
        ]
    )


def _event(s: Sampler, who: Phrase) -> Clause:
    """Something that a person does, in which no other is named."""
    while True:
        tense = s.pick(("present", "past"))
        if s.chance(0.8):
            found = s.act(tense, subject=who, timed=0.5, extra=0.5)
        else:
            found = replace(s.motion(tense), subject=who)
        if all(one is who.head for one in _people(found)):
            return found


def _people(part: object) -> Iterator[object]:
    """Names and pronouns in a clause."""
    if isinstance(part, Name | Pronoun):
        yield part
    elif isinstance(part, Clause | Phrase) and is_dataclass(part):
        for field in fields(part):
            yield from _people(getattr(part, field.name))
