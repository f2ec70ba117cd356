"""What the embedded corpus talks about: one function per construction, each drawing a meaning.

`SIMPLE` serves pre-training, `HELD_OUT` fine-tuning. Words are matched by class, so that one eats
fruit and opens doors. Where Hindi does not tell he from she (under ने, को, के पास and in the bare
copula), neither pronoun is drawn: the target can be known from the source in every direction.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeVar

from neft_core.meaning import (
    HE,
    SHE,
    THEY,
    WE,
    YOU,
    Adjective,
    Adverb,
    Clause,
    I,
    Name,
    Noun,
    Phrase,
    Place,
    Pronoun,
    Verb,
    lexicon,
)

T = TypeVar("T")
OWNERS = (I, YOU, WE, THEY)
# Chinese says the outcome (看见, 弄丢): these take no 不 and no modal.
OUTCOME = frozenset({"see", "lose", "forget", "meet", "bring"})
DEFINITE = ("the", "the", "this", "my", "these")
WHERE = {
    "work": "school hospital library restaurant museum hotel factory shop station university "
    "office market field",
    "sleep": "room house hotel",
    "play": "garden park street room school",
    "dance": "street park room garden",
    "run": "park garden forest street field",
    "walk": "park garden forest street village city",
    "cry": "room garden school street kitchen",
    "laugh": "room garden school street restaurant",
    "study": "library school university room",
    "read": "library school park garden room office",
    "write": "library school garden room office",
    "buy": "market shop",
    "sell": "market shop street",
    "eat": "restaurant kitchen park garden hotel",
    "drink": "restaurant kitchen garden hotel office",
    "cook": "kitchen restaurant",
    "meet": "station market park restaurant library museum hotel",
    "wait for": "station market park restaurant library hotel",
    "sing": "garden room school kitchen",
    "draw": "garden room school park",
}
ANIMAL_FOOD = frozenset({"bread", "meat", "fish", "carrot", "apple", "banana", "water", "milk"})
EPICENE_JOBS = frozenset({"doctor", "engineer", "journalist", "artist", "scientist"})
STAYS_SINGLE = frozenset({"opening", "building", "room", "outdoors", "water"})


PERSONS = "human job"


@cache
def nouns(classes: str) -> tuple[Noun, ...]:
    """Nouns of any of the classes, which may also name single nouns."""
    wanted = classes.split()
    return tuple(noun for noun in lexicon().nouns if noun.kind in wanted or noun.en in wanted)


@cache
def adjectives(kind: str, attribute: bool) -> tuple[Adjective, ...]:
    """Adjectives that suit a class of nouns, before the noun or as predicate."""
    return tuple(
        adj
        for adj in lexicon().adjectives
        if kind in adj.suits and (adj.zh_attribute or not attribute)
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
        verb for verb in lexicon().verbs if fits(verb) and not (avoid_outcome and verb.en in OUTCOME)
    )


@cache
def places(verb: str) -> tuple[Place, ...]:
    """Places where one does this."""
    names = WHERE.get(verb, "").split()
    return tuple(place for place in lexicon().places if place.noun.en in names)


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
        options = adjectives(noun.kind, True)
        return self.pick(options) if options and self.chance(probability) else None

    def person(self, gendered: bool = True, pronoun: bool = True, kin: bool = True) -> Phrase:
        """Draw a person; `gendered=False` leaves out he and she."""
        chance = self.rng.random()
        if pronoun and chance < 0.25:
            return Phrase(self.pick((I, YOU, WE, THEY, HE, SHE) if gendered else OWNERS))
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
            if phrase.head is subject.head or phrase.owner is subject.head is not None:
                if isinstance(phrase.owner, Pronoun) and phrase.head is not subject.head:
                    return phrase
                continue
            return phrase

    def thing(self, noun: Noun, subject: Phrase | None = None, definite: bool = False) -> Phrase:
        """Draw a phrase around a noun, as object."""
        probability = 0.25
        if noun.kind in {"mass_food", "drink", "sound"}:
            own = self.described(noun, probability)
            return Phrase(noun, "mass", own)
        if definite or noun.kind in STAYS_SINGLE:
            determiner = self.pick(DEFINITE)
            if determiner == "these" and noun.kind in STAYS_SINGLE:
                determiner = "this"
        else:
            determiner = self.rng.choices(
                ("a", "the", "this", "my", "these", "number", "many", "few"),
                (30, 20, 12, 14, 6, 10, 4, 4),
            )[0]
        if determiner == "my" and noun.kind in {"water", "outdoors", "landmark"}:
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
        own = self.chance(0.3)
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
        if tense == "progressive" and verb.en == "like" or tense != "present" and verb.en == "like":
            verb = self.pick(verbs("person", True))
        if subject is None:
            # Under ने Hindi shows the gender of the object alone.
            subject = self.person(gendered and tense != "past")
        obj = self.object_of(verb, subject, definite)
        if verb.en in ("eat", "drink") and not given and self.chance(0.2):
            food = [noun for noun in nouns(" ".join(sorted(verb.objects))) if noun.en in ANIMAL_FOOD]
            subject, obj = self.animal(), self.thing(self.pick(food), None, definite)
        place = None
        if verb.en in WHERE and not (verb.en == "meet" and tense == "present"):
            place = self.pick(places(verb.en)) if self.chance(extra) else None
        return Clause(
            "act",
            subject,
            verb,
            obj,
            place=place,
            time=None if verb.en == "like" else self.time(tense, timed),
            tense=tense,
        )

    def time(self, tense: str, probability: float, often: bool = True) -> Adverb | None:
        """Draw an adverb of time that goes with the tense, or none."""
        if not self.chance(probability):
            return None
        if tense == "present" and often and self.chance(0.3):
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
        verb = self.pick([verb for verb in verbs("nothing") if verb.en in WHERE])
        subject = subject or self.person(gendered)
        place = self.pick(places(verb.en)) if self.chance(placed) else None
        with_other = verb.en not in ("cry", "sleep") and self.chance(accompanied)
        return Clause(
            "act",
            subject,
            verb,
            companion=self.other(subject) if with_other else None,
            place=place,
            time=self.time(tense, timed),
            tense=tense,
        )

    def motion(self, tense: str = "present", timed: float = 0.6) -> Clause:
        """Draw a movement to a place."""
        subject = self.person()
        goal = self.pick(lexicon().places)
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
            found = self.motion(tense, timed=0)
        return replace(found, time=self.time(tense, 0.25, often=False))

    def quality(self) -> Clause:
        """Draw a subject and a fitting adjective."""
        chance = self.rng.random()
        if chance < 0.2:
            subject, kind = self.name(), "name"
        else:
            noun = self.pick(nouns(KINDS))
            kind = noun.kind
            own = kind == "kin" or self.chance(0.4) and kind not in NOT_OWNED
            many = not own and kind not in STAYS_SINGLE and self.chance(0.2)
            determiner = "my" if own else "these" if many else self.pick(("the", "this"))
            subject = Phrase(noun, determiner, owner=self.owner() if own else None)
        adjective = self.pick(adjectives(kind, False))
        return Clause("be", subject, adjective=adjective)

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
        own = ground.kind not in NOT_OWNED | {"building"} and self.chance(0.3)
        place = Phrase(
            ground,
            "my" if own else self.pick(("the", "this")),
            self.described(ground, 0.25),
            owner=self.owner() if own else None,
        )
        return Clause("be", relation=relation, ground=place), found


KINDS = (
    "human job kin animal fruit vegetable dish mass_food drink text clothing object device "
    "container furniture opening vehicle building room outdoors water show song"
)
NOT_OWNED = frozenset({"human", "job", "outdoors", "water", "landmark"})
HUGE = frozenset({"elephant", "cow", "horse", "camel", "tiger", "bear", "umbrella", "map"})


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
        place = s.pick([place for place in places(verb.en) if place.noun.en in ANIMAL_PLACES])
        return Clause("act", s.animal(), verb, place=place, time=s.time("present", 0.5))
    return s.activity()


ANIMAL_PLACES = frozenset({"garden", "park", "street", "room", "house", "forest", "field"})


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
    if s.chance(0.4):
        subject = s.name()
    else:
        subject = Phrase(s.pick(nouns("kin")), "my", owner=s.owner())
    gender = subject.gender("fr")
    jobs = [
        noun
        for noun in nouns("job")
        if noun.en in EPICENE_JOBS or noun.fr_gender == gender == noun.hi_gender
    ]
    job = s.pick(jobs)
    options = [adj for adj in adjectives("job", True) if adj.en in JOB_QUALITIES]
    # French leaves the article out before a bare profession alone.
    if s.chance(0.4) and gender == job.fr_gender:
        return Clause("be", subject, object=Phrase(job, "a", s.pick(options)))
    return Clause("be", subject, object=Phrase(job, "bare"))


JOB_QUALITIES = frozenset({"young", "rich", "kind", "intelligent", "brave", "honest", "famous"})
OWNABLE = "cat dog horse cow rabbit sheep goat text clothing object device container vehicle"


def possession(s: Sampler) -> Clause:
    """My brother has two bicycles."""
    return Clause("have", s.person(gendered=False), object=s.counted(s.pick(nouns(OWNABLE))))


def location(s: Sampler) -> Clause:
    """The keys are on the table."""
    found, noun = s.placed()
    if found.relation and found.relation.en not in ("on", "in", "under") and s.chance(0.4):
        return replace(found, subject=s.person(gendered=False))
    own = s.chance(0.5)
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
    return Clause("this", object=Phrase(noun, "my", adjective, owner=s.owner()))


ORDERS = (
    "eat drink read write buy sell wash clean open close cut cook draw repair use choose sing bring"
).split()


def _order(s: Sampler, definite: bool) -> Clause:
    verb = s.pick([verb for verb in verbs("object") if verb.en in ORDERS])
    return Clause("command", verb=verb, object=s.object_of(verb, Phrase(YOU), definite))


def command(s: Sampler) -> Clause:
    """Please open the door!"""  # noqa: D400, D415
    return replace(_order(s, False), polite=s.chance(0.5))


def joint_subject(s: Sampler) -> Clause:
    """Anna and my brother read a book."""
    first = s.name()
    subject = Phrase(first.head, partner=s.other(first))
    return s.act(subject=subject) if s.chance(0.6) else s.activity(subject=subject)


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
        return replace(_order(s, True), negated=True)
    return replace(s.deniable(), negated=True)


def polar_question(s: Sampler) -> Clause:
    """Does Anna drink tea?"""  # noqa: D400, D415
    found = s.quality() if s.chance(0.3) else s.deniable()
    return replace(found, question="polar")


def who_question(s: Sampler) -> Clause:
    """Who reads this book at the library?"""  # noqa: D400, D415
    tense = s.pick(("present", "past"))
    found = s.deniable(tense)
    return replace(found, subject=None, question="subject")


WHAT = frozenset({"eat", "drink", "read", "write", "buy", "sell", "draw", "cook", "cut", "wash"})


def what_question(s: Sampler) -> Clause:
    """What does the farmer sell at the market?"""  # noqa: D400, D415
    tense = s.pick(("present", "past", "future"))
    verb = s.pick([verb for verb in verbs("object", True) if verb.en in WHAT])
    place = s.pick(places(verb.en)) if verb.en in WHERE and s.chance(0.5) else None
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
    """Where does your sister work?"""  # noqa: D400, D415
    tense = s.pick(("present", "past", "future"))
    found = s.activity(tense, tense != "past", placed=0, timed=0, accompanied=0.3)
    time = s.time(tense, 0.6, often=False)
    return replace(found, time=time, question="place")


def past(s: Sampler) -> Clause:
    """The children's teacher wrote two letters yesterday."""
    return s.event("past")


def past_negation(s: Sampler) -> Clause:
    """The student did not read the book yesterday."""
    return replace(s.deniable("past"), negated=True)


def future(s: Sampler) -> Clause:
    """The tourist will visit the museum tomorrow."""
    return s.event("future")


def progressive(s: Sampler) -> Clause:
    """The baker is washing the cups."""
    return s.act("progressive", timed=0.15) if s.chance(0.65) else s.activity("progressive")


def _modal(s: Sampler, modal: str, gendered: bool = True) -> Clause:
    subject = s.person(gendered)
    if s.chance(0.7):
        found = s.act(avoid_outcome=True, subject=subject, timed=0)
        if found.verb and found.verb.en == "like":
            return _modal(s, modal, gendered)
    else:
        found = s.activity(subject=subject, timed=0)
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
    while not found.subject or not found.adjective or found.adjective.kind != "gradable":
        found = s.quality()
    head = found.subject.head
    if isinstance(head, Noun) and head.kind not in {"human", "job", "kin"}:
        rivals = [noun for noun in nouns(head.kind) if noun is not head]
        own = head.kind not in NOT_OWNED and s.chance(0.5)
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
        return Clause("be", subject, adjective=s.pick(adjectives(noun.kind, False)))
    return s.act(subject=subject, timed=0, extra=0)


def object_relative(s: Sampler) -> Clause:
    """The book that Anna reads is interesting."""
    verb = s.pick([verb for verb in verbs("object", True) if verb.en in RELATIVE_OBJECTS])
    noun = s.pick(nouns(" ".join(sorted(verb.objects))))
    doing = Clause("act", s.person(), verb)
    subject = Phrase(noun, "the", relative=doing)
    return Clause("be", subject, adjective=s.pick(adjectives(noun.kind, False)))


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
        place = s.pick(places(name)) if name in WHERE and s.chance(0.7) else None
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
    found = s.act(timed=0, extra=0)
    while other.subject and found.subject and found.subject.head is other.subject.head:
        found = s.act(timed=0, extra=0)
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
    taken = {I: (I, WE), WE: (I, WE), YOU: (YOU,)}.get(subject.head, (THEY,))  # type: ignore[call-overload]
    obj = Phrase(s.pick([pronoun for pronoun in OWNERS if pronoun not in taken]))
    verb = s.pick(verbs("person", True))
    found = Clause("act", subject, verb, obj, time=s.time("present", 0.4, often=False))
    if s.chance(0.3):
        return replace(found, modal=s.pick(("want", "can")), time=None)
    return replace(found, negated=s.chance(0.25))


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
