"""Draws words that go together into phrases and clauses, before any language.

Words are matched by class, so that one eats fruit and opens doors. Where Hindi does not tell he
from she (under ने, को, के पास and in the bare copula), neither pronoun is drawn: the target can
be known from the source in every direction.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TypeVar

from neft_core.corpus.meaning import (
    HE,
    ME,
    SHE,
    THEY,
    WE,
    YOU,
    Adjective,
    Adverb,
    Clause,
    Name,
    Noun,
    Phrase,
    Place,
    Pronoun,
    Verb,
    lexicon,
)

T = TypeVar("T")
OWNERS = (ME, YOU, WE, THEY)
# Chinese says the outcome (看见, 弄丢): these take no 不 and no modal.
MOODS = frozenset({"cry", "laugh", "sleep"})
OUTCOME = frozenset({"see", "lose", "forget", "meet", "bring"})
DEFINITE = ("the", "the", "this", "my", "these")
ANIMAL_FOOD = frozenset({"bread", "meat", "fish", "carrot", "apple", "banana", "water", "milk"})
STAYS_SINGLE = frozenset({"opening", "building", "room", "outdoors", "waters"})


PERSONS = "human job"


KINDS = (
    "human job kin animal fruit vegetable dish mass_food drink text clothing object device "
    "container furniture opening vehicle building room outdoors waters show song"
)
NOT_OWNED = frozenset({"human", "job", "outdoors", "waters", "landmark", "building"})
WILD = frozenset({"tiger", "bear", "elephant", "monkey", "mouse"})
NO_GOAL = frozenset({"street", "room", "house"})
HUGE = frozenset({"elephant", "cow", "horse", "camel", "tiger", "bear", "umbrella", "map"})


@cache
def nouns(classes: str) -> tuple[Noun, ...]:
    """Nouns of any of the classes, which may also name single nouns."""
    wanted = classes.split()
    return tuple(noun for noun in lexicon().nouns if noun.kind in wanted or noun.en in wanted)


@cache
def adjectives(noun: Noun | None, attribute: bool = False) -> tuple[Adjective, ...]:
    """Adjectives that suit a noun, or a name, before the noun or as predicate."""
    words = {noun.kind, noun.en} if noun else {"name"}
    return tuple(
        adj
        for adj in lexicon().adjectives
        if words & adj.suits and (adj.zh_attribute or not attribute)
    )


@cache
def adverbs(kind: str) -> tuple[Adverb, ...]:
    """Adverbs of time for a tense, or those of frequency."""
    return tuple(adverb for adverb in lexicon().adverbs if adverb.kind == kind)


@cache
def verbs(role: str, avoid_outcome: bool = False) -> tuple[Verb, ...]:
    """Verbs by what follows them: object, gift, goal, or nothing."""

    def fits(verb: Verb) -> bool:
        special = {"gift": "gift", "goal": "goal", "person": "person"}.get(role)
        if special:
            return special in verb.objects
        if role == "nothing":
            return not verb.objects or verb.en == "swim"
        return bool(verb.objects) and not verb.objects & {"gift", "goal"} and verb.en != "swim"

    return tuple(
        verb
        for verb in lexicon().verbs
        if fits(verb) and not (avoid_outcome and verb.en in OUTCOME)
    )


@cache
def places(verb: Verb) -> tuple[Place, ...]:
    """Places where one does this."""
    return tuple(place for place in lexicon().places if place.noun.en in verb.places)


@cache
def goals() -> tuple[Place, ...]:
    """Places that one goes to."""
    return tuple(place for place in lexicon().places if place.noun.en not in NO_GOAL)


def ownable(noun: Noun) -> bool:
    """Whether somebody may own it: a house or a dog yes, a hospital or a tiger no."""
    if noun.en in ("house", "shop"):
        return True
    return noun.kind not in NOT_OWNED and noun.en not in WILD


class Sampler:
    """Draws phrases and clauses; all its choices come from `rng`."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def chance(self, probability: float) -> bool:
        """Return whether an event of this probability happens."""
        return self.rng.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        """Draw one of the options."""
        return options[int(self.rng.random() * len(options))]

    def name(self) -> Phrase:
        """Draw a given name."""
        return Phrase(self.pick(lexicon().names))

    def owner(self, other_than: Phrase | None = None) -> Pronoun | Name:
        """Draw an owner, who is no other's namesake."""
        if other_than and isinstance(other_than.head, Pronoun) and self.chance(0.5):
            return other_than.head if other_than.head in OWNERS else self.pick(OWNERS)
        owner = self.pick(OWNERS) if self.chance(0.75) else self.pick(lexicon().names)
        same = other_than is not None and owner is other_than.head and isinstance(owner, Name)
        return self.pick(OWNERS) if same else owner

    def described(self, noun: Noun, probability: float) -> Adjective | None:
        """Draw a fitting attribute, or none."""
        options = adjectives(noun, attribute=True)
        return self.pick(options) if options and self.chance(probability) else None

    def person(self, gendered: bool = True, pronoun: bool = True, kin: bool = True) -> Phrase:
        """Draw a person; `gendered=False` leaves out he and she."""
        chance = self.rng.random()
        if pronoun and chance < 0.25:
            return Phrase(self.pick((ME, YOU, WE, THEY, HE, SHE) if gendered else OWNERS))
        if chance < 0.5:
            return self.name()
        if kin and chance < 0.7:
            return Phrase(self.pick(nouns("kin")), "my", owner=self.owner())
        noun = self.pick(nouns(PERSONS))
        determiner = "this" if self.chance(0.15) else "the"
        return Phrase(noun, determiner, self.described(noun, 0.2))

    def other(self, subject: Phrase) -> Phrase:
        """Draw a named person or relative who is not the subject."""
        while True:
            phrase = self.person(pronoun=False)
            namesake = phrase.owner is subject.head and isinstance(phrase.owner, Name)
            if phrase.head is not subject.head and not namesake:
                return phrase

    def thing(self, noun: Noun, subject: Phrase | None = None, definite: bool = False) -> Phrase:
        """Draw a phrase around a noun, as object."""
        probability = 0.25
        if noun.kind in {"mass_food", "drink", "sound"}:
            own = self.described(noun, probability)
            return Phrase(noun, "mass", own)
        if definite or noun.kind in STAYS_SINGLE or noun.en == "cupboard":
            determiner = self.pick(DEFINITE)
            if determiner == "these" and noun.kind in STAYS_SINGLE:
                determiner = "this"
        else:
            determiner = self.rng.choices(
                ("a", "the", "this", "my", "these", "number", "many", "few"),
                (30, 20, 12, 14, 6, 10, 4, 4),
            )[0]
        if determiner == "my" and not ownable(noun):
            determiner = "the"
        return Phrase(
            noun,
            determiner,
            self.described(noun, probability),
            count=self.rng.randint(2, 10) if determiner == "number" else 1,
            owner=self.owner(subject) if determiner == "my" else None,
        )

    def counted(self, noun: Noun, single: bool = True) -> Phrase:
        """Draw a phrase with a number, many or a few, or also one."""
        options = ("number", "number", "number", "many", "few", *(("a", "a") if single else ()))
        determiner = self.pick(options)
        count = self.rng.randint(2, 10) if determiner == "number" else 1
        return Phrase(noun, determiner, self.described(noun, 0.35), count=count)

    def object_of(self, verb: Verb, subject: Phrase, definite: bool = False) -> Phrase:
        """Draw what a verb may act on."""
        if "generic" in verb.objects:
            noun = self.pick(nouns("animal fruit vegetable drink mass_food sound"))
            return Phrase(noun, "generic", self.described(noun, 0.15))
        if "person" in verb.objects:
            return self.other(subject)
        noun = self.pick(nouns(" ".join(sorted(verb.objects))))
        return self.thing(noun, subject, definite)

    def animal(self) -> Phrase:
        """Draw an animal as subject."""
        noun = self.pick(nouns("animal"))
        own = ownable(noun) and self.chance(0.3)
        return Phrase(
            noun,
            "my" if own else "the",
            self.described(noun, 0.3),
            owner=self.owner() if own else None,
        )

    def act(
        self,
        tense: str = "present",
        definite: bool = False,
        gendered: bool = True,
        avoid_outcome: bool = False,
        subject: Phrase | None = None,
        timed: float = 0.4,
        extra: float = 0.25,
    ) -> Clause:
        """Draw a subject, a verb, an object and maybe a place and a time."""
        verb = self.pick(verbs("object", avoid_outcome or tense == "progressive"))
        given = subject is not None
        if tense != "present" and verb.en == "like":
            verb = self.pick(verbs("person", True))
        if subject is None:
            # Under ने Hindi shows the gender of the object alone.
            subject = self.person(gendered and tense != "past")
        obj = self.object_of(verb, subject, definite)
        if verb.en in ("eat", "drink") and not given and self.chance(0.2):
            food = [
                noun for noun in nouns(" ".join(sorted(verb.objects))) if noun.en in ANIMAL_FOOD
            ]
            subject, obj = self.animal(), self.thing(self.pick(food), None, definite)
        place = None
        if verb.places and not (verb.en == "meet" and tense == "present"):
            place = self.pick(places(verb)) if self.chance(extra) else None
        return Clause(
            "act",
            subject,
            verb,
            obj,
            place=place,
            time=None if verb.en == "like" else self.time(tense, timed),
            tense=tense,
        )

    def time(
        self, tense: str, probability: float, often: bool = True, habit: bool = True
    ) -> Adverb | None:
        """Draw an adverb of time that goes with the tense, or none."""
        if not self.chance(probability):
            return None
        if tense == "present" and often and (not habit or self.chance(0.3)):
            return self.pick(adverbs("often"))
        return self.pick(adverbs("now" if tense == "progressive" else tense))

    def activity(
        self,
        tense: str = "present",
        gendered: bool = True,
        subject: Phrase | None = None,
        timed: float = 0.4,
        placed: float = 0.75,
        accompanied: float = 0.2,
    ) -> Clause:
        """Draw a subject, an intransitive verb, and maybe place, company and time."""
        verb = self.pick([verb for verb in verbs("nothing") if verb.places])
        # काम किया and the like stand under ने: see above.
        subject = subject or self.person(gendered and tense != "past")
        place = self.pick(places(verb)) if self.chance(placed) else None
        with_other = verb.en not in ("cry", "sleep") and self.chance(accompanied)
        time = self.time(tense, timed, habit=verb.en not in MOODS)
        if placed and not (place or time or with_other):
            place = self.pick(places(verb))
        return Clause(
            "act",
            subject,
            verb,
            companion=self.other(subject) if with_other else None,
            place=place,
            time=time,
            tense=tense,
        )

    def motion(self, tense: str = "present", timed: float = 0.6) -> Clause:
        """Draw a movement to a place."""
        subject = self.person()
        goal = self.pick(goals())
        return Clause(
            "act",
            subject,
            self.pick(verbs("goal")),
            goal=goal,
            time=self.time(tense, timed),
            tense=tense,
        )

    def giving(self, tense: str = "present", definite: bool = False) -> Clause:
        """Draw a giver, a gift and a recipient."""
        subject = self.person(gendered=tense != "past")
        noun = self.pick(nouns("text clothing object fruit device toy"))
        return Clause(
            "act",
            subject,
            self.pick(verbs("gift")),
            self.thing(noun, subject, definite),
            recipient=self.other(subject),
            time=self.time(tense, 0.2),
            tense=tense,
        )

    def event(self, tense: str = "present", definite: bool = False) -> Clause:
        """Draw any clause with a verb of action."""
        kind = self.rng.random()
        if kind < 0.55:
            return self.act(tense, definite)
        if kind < 0.75:
            return self.activity(tense)
        return self.motion(tense) if kind < 0.87 else self.giving(tense, definite)

    def deniable(self, tense: str = "present") -> Clause:
        """Draw a clause that can be denied or asked: definite objects, no frequency."""
        kind = self.rng.random()
        if kind < 0.6:
            found = self.act(tense, True, avoid_outcome=True, timed=0)
        elif kind < 0.8:
            found = self.activity(tense, timed=0)
        else:
            # 回到 tells an outcome; only 去 is denied.
            found = replace(self.motion(tense, timed=0), verb=verbs("goal")[0])
        # Nobody denies cutting one apple every day.
        single = found.object is not None and tense == "present"
        return replace(found, time=None if single else self.time(tense, 0.25, often=False))

    def quality(self) -> Clause:
        """Draw a subject and a fitting adjective."""
        if self.chance(0.2):
            return Clause("be", self.name(), adjective=self.pick(adjectives(None)))
        noun = self.pick([noun for noun in nouns(KINDS) if adjectives(noun)])
        kind = noun.kind
        own = kind == "kin" or (self.chance(0.4) and ownable(noun))
        many = not own and kind not in STAYS_SINGLE and self.chance(0.2)
        determiner = "my" if own else "these" if many else self.pick(("the", "this"))
        subject = Phrase(noun, determiner, owner=self.owner() if own else None)
        return Clause("be", subject, adjective=self.pick(adjectives(noun)))

    def placed(self) -> tuple[Clause, Noun]:
        """Draw a relation with its ground, and a noun that may be there."""
        relation = self.pick(lexicon().relations)
        ground = self.pick(nouns(" ".join(sorted(relation.suits))))
        if relation.en in ("on", "in"):
            classes = "text clothing fruit object" + (" animal" if relation.en == "on" else "")
        else:
            classes = "animal container" + (" vehicle" if ground.kind == "building" else "")
        found = self.pick(
            [
                noun
                for noun in nouns(classes)
                if noun is not ground and noun.en not in HUGE and noun.en != "cupboard"
            ]
        )
        own = ownable(ground) and self.chance(0.3)
        place = Phrase(
            ground,
            "my" if own else self.pick(("the", "this")),
            self.described(ground, 0.25),
            owner=self.owner() if own else None,
        )
        return Clause("be", relation=relation, ground=place), found
