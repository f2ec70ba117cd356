"""The simple constructions of the embedded corpus, for pre-training: one function draws each.

Each docstring is a sentence of its construction.
"""

from collections.abc import Callable
from dataclasses import replace

from neft_core.corpus.meaning import YOU, Clause, Noun, Phrase
from neft_core.corpus.sampler import (
    STAYS_SINGLE,
    Sampler,
    adjectives,
    nouns,
    ownable,
    places,
    verbs,
)


def action(s: Sampler) -> Clause:
    """The farmer sells three red apples at the market every day."""
    return s.act()


def quantity(s: Sampler) -> Clause:
    """Anna buys three red hats."""
    found = s.act(timed=0.15, extra=0.1)
    while not (found.object and isinstance(found.object.head, Noun)) or (
        found.object.uncountable
        or found.object.determiner == "generic"
        or found.object.head.kind in STAYS_SINGLE | {"human", "job", "kin"}
    ):
        found = s.act(timed=0.15, extra=0.1)
    return replace(found, object=s.counted(found.object.head, single=False))


def activity(s: Sampler) -> Clause:
    """The child plays in the garden."""
    if s.chance(0.15):
        verb = s.pick([verb for verb in verbs("nothing") if "animal" in verb.subjects])
        animal = s.animal()
        tame = isinstance(animal.head, Noun) and ownable(animal.head)
        fitting = ANIMAL_PLACES | {"room", "house"} if tame else ANIMAL_PLACES
        # Not every verb has a place outdoors.
        options = [place for place in places(verb) if place.noun.en in fitting]
        place = s.pick(options) if options else None
        return Clause("act", animal, verb, place=place, time=s.time("present", 0.5))
    return s.activity()


ANIMAL_PLACES = frozenset({"garden", "park", "forest", "field"})


def motion(s: Sampler) -> Clause:
    """Paul goes to the market every Sunday."""
    return s.motion()


def giving(s: Sampler) -> Clause:
    """Marie gives a book to the child."""
    return s.giving()


def description(s: Sampler) -> Clause:
    """This house is very old."""
    found = s.quality()
    intense = found.adjective is not None and found.adjective.kind == "gradable" and s.chance(0.35)
    return replace(found, intense=intense)


def identity(s: Sampler) -> Clause:
    """My sister is a doctor."""
    kin = Phrase(s.pick(nouns("kin")), "my", owner=s.owner())
    subject = s.name() if s.chance(0.4) else kin
    gender = subject.gender("fr")
    jobs = [
        noun
        for noun in nouns("job")
        if noun.en in EPICENE_JOBS or noun.fr_gender == gender == noun.hi_gender
    ]
    job = s.pick(jobs)
    options = [adj for adj in adjectives(job, attribute=True) if adj.en in JOB_QUALITIES]
    # French leaves the article out before a bare profession alone.
    if s.chance(0.4) and gender == job.fr_gender:
        return Clause("be", subject, object=Phrase(job, "a", s.pick(options)))
    return Clause("be", subject, object=Phrase(job, "bare"))


EPICENE_JOBS = frozenset({"doctor", "engineer", "journalist", "artist", "scientist"})
JOB_QUALITIES = frozenset({"young", "rich", "kind", "intelligent", "brave", "honest", "famous"})
OWNABLE = (
    "cat dog horse cow rabbit sheep goat book magazine newspaper letter clothing object device "
    "container vehicle"
)


def possession(s: Sampler) -> Clause:
    """My brother has two bicycles."""
    return Clause("have", s.person(gendered=False), object=s.counted(s.pick(nouns(OWNABLE))))


def location(s: Sampler) -> Clause:
    """The keys are on the table."""
    found, noun = s.placed()
    if found.relation and found.relation.en not in ("on", "in", "under") and s.chance(0.4):
        return replace(found, subject=s.person(gendered=False))
    own = ownable(noun) and s.chance(0.5)
    determiner = "my" if own else s.pick(("the", "this", "these"))
    owner = s.owner() if own else None
    return replace(found, subject=Phrase(noun, determiner, s.described(noun, 0.3), owner=owner))


def existence(s: Sampler) -> Clause:
    """There are three books on the table."""
    found, noun = s.placed()
    return replace(found, kind="exist", object=s.counted(noun))


def presentation(s: Sampler) -> Clause:
    """This is a red apple."""
    noun = s.pick(nouns("animal fruit text clothing object device container furniture vehicle"))
    if s.chance(0.4):
        return Clause("this", object=s.counted(noun))
    if s.chance(0.5):
        return Clause("this", object=Phrase(noun, "a", s.described(noun, 0.8)))
    adjective = s.described(noun, 0.4)
    if not ownable(noun):
        return Clause("this", object=Phrase(noun, "a", adjective))
    return Clause("this", object=Phrase(noun, "my", adjective, owner=s.owner()))


ORDERS = frozenset(
    {
        *("eat", "drink", "read", "write", "buy", "sell", "wash", "clean", "open", "close"),
        *("cut", "cook", "draw", "repair", "use", "choose", "sing", "bring"),
    }
)


def order(s: Sampler, definite: bool) -> Clause:
    """Draw a request."""
    verb = s.pick([verb for verb in verbs("object") if verb.en in ORDERS])
    return Clause("command", verb=verb, object=s.object_of(verb, Phrase(YOU), definite))


def command(s: Sampler) -> Clause:
    """Please open the door!"""
    found = order(s, False)
    # "Drink tea!" alone would be two words.
    mass = found.object is not None and found.object.uncountable
    return replace(found, polite=mass or s.chance(0.5))


def joint_subject(s: Sampler) -> Clause:
    """Anna and my brother read a book."""
    first = s.name()
    subject = Phrase(first.head, partner=s.other(first))
    return s.act(subject=subject) if s.chance(0.6) else s.activity(subject=subject)


Draw = Callable[[Sampler], Clause]
SIMPLE: dict[str, Draw] = {
    draw.__name__: draw
    for draw in (
        action,
        quantity,
        activity,
        motion,
        giving,
        description,
        identity,
        possession,
        location,
        existence,
        presentation,
        command,
        joint_subject,
    )
}
