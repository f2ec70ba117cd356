"""The constructions that pre-training never sees, for fine-tuning: one function draws each.

Each docstring is a sentence of its construction.
"""

from dataclasses import replace

from neft_core.corpus.constructions import Draw, order, possession
from neft_core.corpus.meaning import (
    HE,
    ME,
    SHE,
    THEY,
    WE,
    YOU,
    Clause,
    Noun,
    Phrase,
    Pronoun,
    lexicon,
)
from neft_core.corpus.sampler import (
    MOODS,
    OWNERS,
    PERSONS,
    Sampler,
    adjectives,
    nouns,
    ownable,
    places,
    verbs,
)


def negation(s: Sampler) -> Clause:
    """The doctor does not drink coffee."""
    kind = s.rng.random()
    if kind < 0.2:
        return replace(s.quality(), negated=True)
    if kind < 0.3:
        found = possession(s)
        assert found.object
        return replace(found, object=Phrase(found.object.head, "a"), negated=True)
    if kind < 0.4:
        return replace(order(s, True), negated=True)
    return replace(s.deniable(), negated=True)


def polar_question(s: Sampler) -> Clause:
    """Does Anna drink tea?"""
    found = s.quality() if s.chance(0.3) else s.deniable()
    return replace(found, question="polar")


def who_question(s: Sampler) -> Clause:
    """Who reads this book at the library?"""
    tense = s.pick(("present", "past"))
    found = s.deniable(tense)
    return replace(found, subject=None, question="subject")


WHAT = frozenset({"eat", "drink", "read", "write", "buy", "sell", "choose", "cook", "cut", "wash"})


def what_question(s: Sampler) -> Clause:
    """What does the farmer sell at the market?"""
    tense = s.pick(("present", "past", "future"))
    verb = s.pick([verb for verb in verbs("object", True) if verb.en in WHAT])
    place = s.pick(places(verb)) if verb.places and s.chance(0.5) else None
    return Clause(
        "act",
        s.person(gendered=tense != "past"),
        verb,
        place=place,
        time=s.time(tense, 0.5, often=False),
        tense=tense,
        question="object",
    )


def where_question(s: Sampler) -> Clause:
    """Where does your sister work?"""
    tense = s.pick(("present", "past", "future"))
    found = s.activity(tense, tense != "past", placed=0, timed=0, accompanied=0.3)
    mood = found.verb is not None and found.verb.en in MOODS and tense == "present"
    time = None if mood else s.time(tense, 0.6, often=False)
    return replace(found, time=time, question="place")


# "They read a book" would not tell its tense.
SAME_IN_THE_PAST = frozenset({"read", "cut"})


def past(s: Sampler) -> Clause:
    """The teacher wrote two letters yesterday."""
    while True:
        found = s.event("past")
        if not (found.verb and found.subject and found.subject.person != 2):
            return found
        if found.verb.en not in SAME_IN_THE_PAST:
            return found


def past_negation(s: Sampler) -> Clause:
    """The student did not read the book yesterday."""
    return replace(s.deniable("past"), negated=True)


def future(s: Sampler) -> Clause:
    """The tourist will visit the museum tomorrow."""
    return s.event("future")


def progressive(s: Sampler) -> Clause:
    """The farmer is washing the carrots."""
    return s.act("progressive", timed=0.15) if s.chance(0.65) else s.activity("progressive")


def _modal(s: Sampler, modal: str, gendered: bool = True) -> Clause:
    subject = s.person(gendered)
    if s.chance(0.7):
        found = s.act(avoid_outcome=True, subject=subject, timed=0)
    else:
        found = s.activity(subject=subject, timed=0)
    if found.verb and found.verb.en in MOODS | {"like"}:
        return _modal(s, modal, gendered)
    return replace(found, modal=modal)


def want(s: Sampler) -> Clause:
    """Nina wants to buy this blue dress."""
    return _modal(s, "want")


def can(s: Sampler) -> Clause:
    """The engineer can repair the machine."""
    found = _modal(s, "can")
    return replace(found, negated=s.chance(0.25) and _definite(found.object))


def must(s: Sampler) -> Clause:
    """The student must read three books."""
    return _modal(s, "must", gendered=False)


def _definite(np: Phrase | None) -> bool:
    return np is None or np.determiner in {"", "the", "this", "these", "my", "mass"}


def comparison(s: Sampler) -> Clause:
    """The tiger is bigger than the cat."""
    found = s.quality()
    while not found.subject or not found.adjective or not found.adjective.en_comparative:
        found = s.quality()
    head = found.subject.head
    if isinstance(head, Noun) and head.kind not in {"human", "job", "kin"}:
        rivals = [noun for noun in nouns(head.kind) if noun is not head]
        own = ownable(head) and s.chance(0.5)
        rival = s.pick(rivals or [head])
        determiner = "my" if own else "this" if found.subject.determiner == "the" else "the"
        other = Phrase(rival, determiner, owner=s.owner() if own else None)
        if rival is head and not own:
            return comparison(s)
    else:
        other = s.other(found.subject)
    return replace(found, compared=other)


def _doer(s: Sampler) -> tuple[Noun, Clause]:
    """A person's noun and what this person habitually does, without its subject."""
    noun = s.pick(nouns(PERSONS))
    told = Phrase(noun, "the")
    if s.chance(0.5):
        doing = s.activity(subject=told, timed=0, placed=1, accompanied=0)
    else:
        doing = s.act(subject=told, timed=0, avoid_outcome=True)
    return noun, replace(doing, subject=None)


def subject_relative(s: Sampler) -> Clause:
    """The woman who works at the hospital is kind."""
    noun, doing = _doer(s)
    subject = Phrase(noun, "the", relative=doing)
    if s.chance(0.5):
        return Clause("be", subject, adjective=s.pick(adjectives(noun)))
    return s.act(subject=subject, timed=0, extra=0)


def object_relative(s: Sampler) -> Clause:
    """The book that Anna reads is interesting."""
    verb = s.pick([verb for verb in verbs("object", True) if verb.en in RELATIVE_OBJECTS])
    noun = s.pick(nouns(" ".join(sorted(verb.objects))))
    doing = Clause("act", s.person(), verb)
    subject = Phrase(noun, "the", relative=doing)
    return Clause("be", subject, adjective=s.pick(adjectives(noun)))


RELATIVE_OBJECTS = frozenset(
    {"eat", "drink", "read", "write", "buy", "sell", "repair", "watch", "use", "choose", "wash"}
)
# State, then what it leads to; "not" before what it keeps one from.
REASONS = {
    "tired": "sleep, not work, not dance, not run, not walk, not study",
    "happy": "sing, dance, laugh",
    "sad": "cry, not sing, not laugh, not dance",
    "busy": "not sleep, not play, not dance, not walk, not watch, not cook",
    "lazy": "not work, not study, not run, not clean, not wash",
    "rich": "buy",
    "poor": "sell, not buy, work",
    "kind": "help, thank",
    "honest": "work, help",
    "brave": "help, swim",
    "intelligent": "read, repair, help",
    "angry": "not laugh, not dance, not sing, not play",
}
WEATHER_REASONS = {
    "it rains": "not run, not walk, not play",
    "it snows": "not run, not walk, not work",
    "it is cold": "not swim, not walk, drink",
    "it is hot": "not run, swim, not work",
}


def _named_verb(s: Sampler, text: str, subject: Phrase) -> Clause:
    negated = text.startswith("not ")
    name = text.removeprefix("not ")
    verb = next(verb for verb in lexicon().verbs if verb.en == name)
    if name == "swim" or not verb.objects:
        place = s.pick(places(verb)) if verb.places and s.chance(0.7) else None
        return Clause("act", subject, verb, place=place, negated=negated)
    return Clause("act", subject, verb, s.object_of(verb, subject, negated), negated=negated)


def because(s: Sampler) -> Clause:
    """Anna sleeps because she is tired."""
    subject = s.person(kin=False)
    if s.chance(0.3):
        weather = s.pick(lexicon().weathers)
        found = _named_verb(s, s.pick(WEATHER_REASONS[weather.en].split(", ")), subject)
        return replace(
            found, link="because", second=Clause("be", weather=weather, tense="progressive")
        )
    state = s.pick(list(REASONS))
    found = _named_verb(s, s.pick(REASONS[state].split(", ")), subject)
    adjective = next(adj for adj in lexicon().adjectives if adj.en == state)
    head = subject.head
    pronoun = head if isinstance(head, Pronoun) else HE if subject.gender("fr") == "m" else SHE
    reason = Clause("be", Phrase(pronoun), adjective=adjective, intense=s.chance(0.3))
    return replace(found, link="because", second=reason)


def when(s: Sampler) -> Clause:
    """When it rains, my grandmother reads a book."""
    if s.chance(0.3):
        second = Clause("be", weather=s.pick(lexicon().weathers))
        return replace(_daily(s), link="when", second=second)
    second = s.activity(timed=0, placed=0.3, accompanied=0)
    return replace(_apart(s, second), link="when", second=second)


def _daily(s: Sampler) -> Clause:
    """What one does indoors, whatever the weather."""
    verb = s.pick([verb for verb in verbs("object") if verb.en in INDOORS])
    subject = s.person()
    return Clause("act", subject, verb, s.object_of(verb, subject))


INDOORS = frozenset({"eat", "drink", "read", "write", "clean", "cook", "draw", "repair", "watch"})


def _apart(s: Sampler, other: Clause) -> Clause:
    """An action of somebody else than the subject of the other clause."""
    while True:
        found = s.act(gendered=False, avoid_outcome=True, timed=0, extra=0)
        same = found.subject and other.subject and found.subject.head is other.subject.head
        if not same and found.verb and found.verb.en != "like":
            return found


def condition(s: Sampler) -> Clause:
    """If it rains tomorrow, we will watch a film."""
    weather = s.pick(lexicon().weathers)
    second = Clause("be", weather=weather, time=s.time("future", 0.6), tense="future")
    return replace(_daily(s), tense="future", link="if", second=second)


def coordination(s: Sampler) -> Clause:
    """Anna reads a book and Paul drinks tea."""
    first = s.act(timed=0, extra=0, avoid_outcome=True)
    if s.chance(0.5):
        return replace(first, link="and", second=_apart(s, first))
    subject = s.other(first.subject or s.name())
    second = s.act(timed=0, extra=0, avoid_outcome=True, definite=True, subject=subject)
    if s.chance(0.5) and first.verb and first.subject:
        denied = s.object_of(first.verb, subject, True)
        second = replace(second, verb=first.verb, object=denied)
    return replace(first, link="but", second=replace(second, negated=True))


def pronoun_object(s: Sampler) -> Clause:
    """My friend helps us every day."""
    subject = s.person()
    # Not oneself; and "them" only where it cannot be the subject.
    taken = {0: (ME, WE), 3: (ME, WE), 1: (YOU,)}.get(subject.person, (THEY,))
    obj = Phrase(s.pick([pronoun for pronoun in OWNERS if pronoun not in taken]))
    verb = s.pick(verbs("person", True))
    found = Clause("act", subject, verb, obj, time=s.time("present", 0.4, often=False))
    if s.chance(0.3):
        return replace(found, modal=s.pick(("want", "can")), time=None)
    return replace(found, negated=s.chance(0.25))


HELD_OUT: dict[str, Draw] = {
    draw.__name__: draw
    for draw in (
        negation,
        polar_question,
        who_question,
        what_question,
        where_question,
        past,
        past_negation,
        future,
        progressive,
        want,
        can,
        must,
        comparison,
        subject_relative,
        object_relative,
        because,
        when,
        condition,
        coordination,
        pronoun_object,
    )
}
