"""Pairs of a premise and a hypothesis with a label, by rules of meaning, for the task nli.

A rule draws the hypothesis first, and then for each label a premise that gives it. So the label
is independent of the hypothesis, and nothing can be known from the hypothesis alone. Numbers are
exact: who buys three hats doesn't buy five.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import TypeVar

import neft_core.corpus.grammar_de as grammar_de
import neft_core.corpus.grammar_en as grammar_en
import neft_core.corpus.grammar_fr as grammar_fr
from neft_core.corpus.meaning import Adjective, Clause, Noun, Phrase, Relation, Verb, lexicon
from neft_core.corpus.sampler import STAYS_SINGLE, Sampler, adjectives, nouns, places, verbs

GRAMMARS: dict[str, Callable[[Clause], str]] = {
    "en": grammar_en.sentence,
    "fr": grammar_fr.sentence,
    "de": grammar_de.sentence,
}

Word = TypeVar("Word", Noun, Verb)
Premises = dict[str, Clause]
Rule = Callable[[Sampler], tuple[Clause, Premises]]
ENTAILMENT, NEUTRAL, CONTRADICTION = LABELS = ("entailment", "neutral", "contradiction")

# What is more of the one is less of the other.
OPPOSITES = (
    ("young", "old"), ("rich", "poor"), ("happy", "sad"), ("big", "small"), ("heavy", "light"),
    ("clean", "dirty"), ("fast", "slow"), ("interesting", "boring"), ("new", "old"),
)  # fmt: skip
EXCLUSIVE = {"on": "under", "under": "on", "behind": "in front of", "in front of": "behind"}
KINDS = "animal fruit text clothing device vehicle furniture"


def quantity(s: Sampler) -> tuple[Clause, Premises]:
    """Anna buys five red hats. Anna buys more than three hats."""
    verb, noun = _verb_and_noun(s)
    subject = _person(s)
    colour = _attribute(s, noun) if s.chance(0.4) else None
    other = _attribute(s, noun, colour)
    more = s.chance(0.5)
    bound = s.rng.randint(3, 8)
    above, below = s.rng.randint(bound + 1, 10), s.rng.randint(2, bound - 1)
    fitting, failing = (above, below) if more else (below, above)

    def event(determiner: str, count: int, adj: Adjective | None) -> Clause:
        return Clause("act", subject, verb, Phrase(noun, determiner, adj, count))

    vague = event(s.pick(("many", "few")), 1, colour)
    unsaid = event("number", s.pick((fitting, failing)), None) if colour else vague
    true = event("number", fitting, colour or (other if more and s.chance(0.5) else None))
    return event("more" if more else "fewer", bound, colour), {
        ENTAILMENT: true,
        NEUTRAL: s.pick((vague, unsaid)),
        CONTRADICTION: event("number", failing, colour),
    }


def attribute(s: Sampler) -> tuple[Clause, Premises]:
    """Anna buys a red hat at the market. Anna buys a hat."""
    verb, noun = _verb_and_noun(s)
    adj = _attribute(s, noun)
    another = _noun_beside(s, verb, noun)
    wider = grammar_de.words().classes[noun.kind]
    event = Clause("act", _person(s), verb, Phrase(noun, "a"))
    plain, narrow, wide = (
        replace(event, object=Phrase(head, "a", which))
        for head, which in ((noun, None), (noun, adj), (wider, None))
    )
    beside = replace(event, object=Phrase(another, "a"))
    told, denied = s.pick(
        (
            # From the narrower one to the wider; under negation the other way round.
            (plain, (_more(s, narrow), beside, _not(wide))),
            (narrow, (_more(s, narrow), _more(s, plain), _not(plain))),
            (wide, (s.pick((plain, narrow)), _not(plain), _not(_with_other(s, wide)))),
            (_not(plain), (_not(wide), _not(narrow), s.pick((narrow, _more(s, plain))))),
            (_not(narrow), (_not(s.pick((plain, wide))), plain, _more(s, narrow))),
            (_not(wide), (_not(_with_other(s, wide)), _not(plain), s.pick((plain, narrow)))),
        )
    )
    return told, dict(zip(LABELS, denied, strict=True))


def place(s: Sampler) -> tuple[Clause, Premises]:
    """The child plays in the garden every day. The child plays in the garden."""
    verb = s.pick([verb for verb in _known(verbs("nothing")) if len(places(verb)) > 1])
    here, there = s.rng.sample([p for p in places(verb) if grammar_de.words().knows(p)], 2)
    bare = Clause("act", _person(s), verb)
    at, elsewhere = replace(bare, place=here), replace(bare, place=there)
    told, premises = s.pick(
        (
            (at, (_timed(s, at), s.pick((bare, elsewhere)), _not(s.pick((bare, at))))),
            (_not(at), (_not(bare), s.pick((_timed(s, bare), _not(elsewhere))), _timed(s, at))),
            (bare, (s.pick((at, _timed(s, at))), _not(at), _not(_with_other(s, bare)))),
        )
    )
    return told, dict(zip(LABELS, premises, strict=True))


def roles(s: Sampler) -> tuple[Clause, Premises]:
    """Paul helps Anna. Anna helps Paul."""
    verb = s.pick(_known(verbs("person")))
    one, two = _person(s), _person(s)
    while two.head is one.head:
        two = _person(s)
    event = Clause("act", one, verb, two)
    turned = Clause("act", two, verb, one)
    told, premises = s.pick(
        (
            (event, (_more(s, event), _more(s, turned), _not(_with_other(s, event, two)))),
            (
                _not(event),
                (_not(_with_other(s, event, two)), _not(turned), _more(s, event)),
            ),
        )
    )
    return told, dict(zip(LABELS, premises, strict=True))


def comparison(s: Sampler) -> tuple[Clause, Premises]:
    """Paul is younger than Anna. Anna is older than Paul."""
    one, two, adj, opposite, unrelated = _compared(s)

    def than(first: Phrase, word: Adjective, second: Phrase) -> Clause:
        return Clause("be", first, adjective=word, compared=second)

    other = s.pick(
        (
            than(*s.pick(((one, unrelated, two), (two, unrelated, one)))),
            Clause("be", one, adjective=adj, intense=s.chance(0.5)),
            Clause("be", two, adjective=opposite, intense=s.chance(0.5)),
        )
    )
    yes = than(two, opposite, one)
    no = s.pick((than(two, adj, one), than(one, opposite, two)))
    told = than(one, adj, two)
    if s.chance(0.4):
        return _not(told), {ENTAILMENT: no, NEUTRAL: other, CONTRADICTION: yes}
    return told, {ENTAILMENT: yes, NEUTRAL: other, CONTRADICTION: no}


def location(s: Sampler) -> tuple[Clause, Premises]:
    """The old key is on the big table. The key is on the table."""
    relation = s.pick([r for r in lexicon().relations if r.en in EXCLUSIVE])
    opposite = next(r for r in lexicon().relations if r.en == EXCLUSIVE[relation.en])
    both = " ".join(sorted(relation.suits & opposite.suits))
    ground, found = s.pick(_known(nouns(both))), _movable(s)
    other = _movable(s, found)

    def at(where: Relation, noun: Noun, told: bool = True) -> Clause:
        """With an attribute here and there, which changes nothing of what "the" one is."""
        thing, place = (
            Phrase(n, "the", _attribute(s, n) if told and s.chance(0.4) else None)
            for n in (noun, ground)
        )
        return Clause("be", thing, relation=where, ground=place)

    quality = Clause("be", Phrase(found, "the"), adjective=_attribute(s, found))
    told = at(relation, found, told=False)
    true = at(relation, found)
    while true.subject and not (true.subject.adjective or (true.ground and true.ground.adjective)):
        true = at(relation, found)
    false = at(opposite, found)
    if s.chance(0.4):
        beside = s.pick((quality, _not(at(relation, other))))
        return _not(told), {ENTAILMENT: false, NEUTRAL: beside, CONTRADICTION: true}
    beside = s.pick((quality, at(relation, other)))
    return told, {ENTAILMENT: true, NEUTRAL: beside, CONTRADICTION: s.pick((false, _not(true)))}


def quality(s: Sampler) -> tuple[Clause, Premises]:
    """The doctor is very rich. The doctor is not poor."""
    one, two, adj, opposite, unrelated = _compared(s)

    def states(word: Adjective, subject: Phrase = one, very: float = 0.5) -> Clause:
        return Clause("be", subject, adjective=word, intense=s.chance(very))

    together = Phrase(one.head, one.determiner, partner=two)
    beside = s.pick((states(unrelated), states(adj, two), states(opposite, two)))
    told = states(adj, very=0)
    yes = s.pick((states(adj, very=1), states(adj, together)))
    no = s.pick((states(opposite), states(opposite, together)))
    if s.chance(0.4):
        return _not(told), {ENTAILMENT: no, NEUTRAL: beside, CONTRADICTION: yes}
    return told, {ENTAILMENT: yes, NEUTRAL: beside, CONTRADICTION: no}


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (quantity, attribute, place, roles, comparison, location, quality)
}


def distinct(
    rng: random.Random, seen: dict[str, set[str]], patience: int
) -> Iterator[dict[str, dict[str, str]]]:
    """Rows by language, the three labels in turn; no text of them is in `seen`, which grows.

    A draw counts where the hypothesis and all three premises are new, also those that aren't used:
    so which hypotheses are left doesn't depend on the label either. Ends when so many draws in a
    row gave nothing new.
    """
    s, names = Sampler(rng), sorted(RULES)
    while True:
        for label in LABELS:
            for _ in range(patience):
                rule = s.pick(names)
                hypothesis, premises = RULES[rule](s)
                texts = {
                    code: {name: realise(clause) for name, clause in premises.items()}
                    | {"hypothesis": realise(hypothesis)}
                    for code, realise in GRAMMARS.items()
                }
                if all(seen[code].isdisjoint(told.values()) for code, told in texts.items()):
                    break
            else:
                return
            row = {"label": label, "rule": rule}
            for code, told in texts.items():
                seen[code] |= {told[label], told["hypothesis"]}
            yield {
                code: {"premise": told[label], "hypothesis": told["hypothesis"], **row}
                for code, told in texts.items()
            }


def _not(c: Clause) -> Clause:
    return replace(c, negated=True)


def _timed(s: Sampler, c: Clause) -> Clause:
    return replace(c, time=s.pick([adverb for adverb in lexicon().adverbs if adverb.en in TIMES]))


TIMES = {"every day", "every morning", "every evening", "every Sunday", "every Monday", "often"}


def _more(s: Sampler, c: Clause) -> Clause:
    """The same with more said of it: where, when, or with whom together."""
    assert c.verb
    options = [_timed(s, c), _with_other(s, c, c.object)]
    at = [p for p in places(c.verb) if grammar_de.words().knows(p)]
    if at:
        options.append(replace(c, place=s.pick(at)))
    return s.pick(options)


def _with_other(s: Sampler, c: Clause, *no_one_of: Phrase | None) -> Clause:
    """The same of its subject and one more person."""
    assert c.subject
    taken = [c.subject.head, *(phrase.head for phrase in no_one_of if phrase)]
    other = _person(s)
    while other.head in taken:
        other = _person(s)
    return replace(c, subject=Phrase(c.subject.head, c.subject.determiner, partner=other))


def _person(s: Sampler) -> Phrase:
    return s.name() if s.chance(0.6) else Phrase(s.pick(_known(nouns("human job"))), "the")


@cache
def _known(words: tuple[Word, ...]) -> tuple[Word, ...]:
    """Those of which there is a German word."""
    return tuple(word for word in words if grammar_de.words().knows(word))


def _verb_and_noun(s: Sampler) -> tuple[Verb, Noun]:
    """A verb and a noun of a named class that may be its object."""
    kinds = set(KINDS.split())
    noun = s.pick([n for n in _known(nouns(KINDS)) if n.kind not in STAYS_SINGLE])
    fitting = [
        verb
        for verb in _known(verbs("object"))
        if verb.objects & {noun.kind} and noun.kind in kinds
    ]
    return s.pick(fitting), noun


def _noun_beside(s: Sampler, verb: Verb, noun: Noun) -> Noun:
    """Another object of the verb."""
    kinds = " ".join(sorted(verb.objects & set(KINDS.split())))
    found: Noun = s.pick([n for n in _known(nouns(kinds)) if n is not noun])
    return found


def _attribute(s: Sampler, noun: Noun, other_than: Adjective | None = None) -> Adjective:
    options = [
        adj
        for adj in adjectives(noun, attribute=True)
        if grammar_de.words().knows(adj) and adj is not other_than
    ]
    return s.pick(options)


def _movable(s: Sampler, other_than: Noun | None = None) -> Noun:
    options = [n for n in _known(nouns("text clothing object fruit")) if n is not other_than]
    found: Noun = s.pick([n for n in options if adjectives(n, attribute=True)])
    return found


def _compared(s: Sampler) -> tuple[Phrase, Phrase, Adjective, Adjective, Adjective]:
    """Two of a kind, opposite adjectives that suit both, and one that has nothing to do with it."""
    while True:
        if s.chance(0.5):
            one, two = _person(s), _person(s)
        else:
            kind = s.pick(("animal", "text", "clothing", "device", "vehicle", "furniture"))
            one, two = (Phrase(s.pick(_known(nouns(kind))), "the") for _ in "12")
        if one.head is two.head:
            continue
        suiting = [_suiting(phrase) for phrase in (one, two)]
        shared = [adj for adj in suiting[0] if adj in suiting[1] and adj.en_comparative]
        by_name = {adj.en: adj for adj in shared}
        pairs = [pair for pair in OPPOSITES if pair[0] in by_name and pair[1] in by_name]
        if not pairs:
            continue
        first, second = s.pick(pairs)
        if s.chance(0.5):
            first, second = second, first
        taken = {word for pair in OPPOSITES if {first, second} & set(pair) for word in pair}
        others = [adj for adj in shared if adj.en not in taken]
        if others:
            return one, two, by_name[first], by_name[second], s.pick(others)


def _suiting(phrase: Phrase) -> tuple[Adjective, ...]:
    noun = phrase.head if isinstance(phrase.head, Noun) else None
    return tuple(adj for adj in adjectives(noun) if grammar_de.words().knows(adj))
