"""What a sentence of the embedded corpus says, before any language: words, phrases, clauses.

The words stand in `lexicon.tsv` beside this file; each line carries one word in the four languages
with what its grammar needs to know of it (gender, measure word, irregular forms).
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar, get_type_hints
from unicodedata import normalize

Word = TypeVar("Word")


@dataclass(frozen=True, eq=False)
class Noun:
    """A common noun; empty forms follow the rules of the language."""

    kind: str
    en: str
    en_plural: str
    fr: str
    fr_plural: str
    fr_gender: str
    zh: str
    measure: str
    hi: str
    hi_gender: str
    hi_forms: str


@dataclass(frozen=True, eq=False)
class Place:
    """A noun where things happen, with the preposition that each language takes there."""

    noun: Noun
    en: str
    fr: str
    zh: str
    hi: str
    hi_goal: str


@dataclass(frozen=True, eq=False)
class Name:
    """A given name and its gender, the same in all languages."""

    en: str
    fr: str
    zh: str
    hi: str
    gender: str


@dataclass(frozen=True, eq=False)
class Adjective:
    """An adjective with the noun classes that it suits and its kind: gradable or colour."""

    en: str
    en_comparative: str
    fr: str
    fr_feminine: str
    fr_before_vowel: str
    fr_position: str
    zh: str
    zh_attribute: str
    hi: str
    suits: frozenset[str]
    kind: str


@dataclass(frozen=True, eq=False)
class Verb:
    """A verb with the classes of its subjects and objects and the places where one does it."""

    en: str
    en_past: str
    fr: str
    fr_present: str
    fr_participle: str
    fr_future: str
    zh: str
    hi: str
    hi_perfective: str
    hi_ergative: str
    hi_object: str
    subjects: frozenset[str]
    objects: frozenset[str]
    places: frozenset[str]


@dataclass(frozen=True, eq=False)
class Adverb:
    """An adverb of time: `kind` is the tense it goes with, or "often" (frequency)."""

    kind: str
    en: str
    fr: str
    zh: str
    hi: str


@dataclass(frozen=True, eq=False)
class Relation:
    """A spatial relation to a ground of the classes that it suits."""

    en: str
    fr: str
    zh: str
    hi: str
    suits: frozenset[str]


@dataclass(frozen=True, eq=False)
class Weather:
    """A clause without a subject: in general, right now (en, hi) and later (hi)."""

    en: str
    en_now: str
    fr: str
    zh: str
    hi: str
    hi_now: str
    hi_future: str


@dataclass(frozen=True, eq=False)
class Pronoun:
    """A personal pronoun. I, you and we are masculine, you is familiar and singular."""

    person: int
    gender: str
    en: str


ME, YOU, HE, SHE, WE, THEY = (
    Pronoun(person, gender, en)
    for person, gender, en in (
        (0, "m", "I"),
        (1, "m", "you"),
        (2, "m", "he"),
        (2, "f", "she"),
        (3, "m", "we"),
        (4, "m", "they"),
    )
)

PLURAL_DETERMINERS = frozenset({"these", "number", "more", "fewer", "many", "few", "generic"})


@dataclass(frozen=True, eq=False)
class Phrase:
    """A noun phrase.

    `determiner` is one of: the, a, this, these, number (with `count`; in English,
    French and German also more and fewer than it), many, few, mass (some),
    generic (in general), bare (a profession), my (with `owner`, a pronoun or a name), or empty for
    names and pronouns.
    """

    head: Noun | Name | Pronoun
    determiner: str = ""
    adjective: Adjective | None = None
    count: int = 1
    owner: Pronoun | Name | None = None
    relative: "Clause | None" = None
    partner: "Phrase | None" = None

    @property
    def person(self) -> int:
        """Row of the verb's table: 0 I, 1 you, 2 he or she, 3 we, 4 they."""
        if isinstance(self.head, Pronoun):
            return 4 if self.partner else self.head.person
        return 4 if self.partner or self.plural else 2

    @property
    def uncountable(self) -> bool:
        """Whether the head is a substance, never in the plural."""
        return isinstance(self.head, Noun) and self.head.kind in {"mass_food", "drink", "sound"}

    @property
    def plural(self) -> bool:
        """Whether the head itself, without its partner, is in the plural."""
        return self.determiner in PLURAL_DETERMINERS and not self.uncountable

    def own_gender(self, language: str) -> str:
        """Gender "m" or "f" of the head."""
        if isinstance(self.head, Noun):
            return self.head.fr_gender if language == "fr" else self.head.hi_gender[0]
        return self.head.gender

    def gender(self, language: str) -> str:
        """Gender "m" or "f" that verbs agree with; a mixed pair is masculine."""
        own = self.own_gender(language)
        return own if self.partner is None or self.partner.gender(language) == own else "m"


@dataclass(frozen=True, eq=False)
class Clause:
    """One predication; `kind` is one of act, be, have, exist, command, this.

    `question` is empty, polar, subject, object or place (the part asked for); `modal` is empty,
    want, can or must; `link` joins a `second` clause: and, but, because, when, if.
    """

    kind: str
    subject: Phrase | None = None
    verb: Verb | None = None
    object: Phrase | None = None
    recipient: Phrase | None = None
    companion: Phrase | None = None
    place: Place | None = None
    goal: Place | None = None
    relation: Relation | None = None
    ground: Phrase | None = None
    adjective: Adjective | None = None
    intense: bool = False
    compared: Phrase | None = None
    time: Adverb | None = None
    tense: str = "present"
    negated: bool = False
    question: str = ""
    modal: str = ""
    polite: bool = False
    weather: Weather | None = None
    link: str = ""
    second: "Clause | None" = None


@dataclass(frozen=True, eq=False)
class Lexicon:
    """All words, by part of speech."""

    nouns: tuple[Noun, ...]
    places: tuple[Place, ...]
    names: tuple[Name, ...]
    adjectives: tuple[Adjective, ...]
    verbs: tuple[Verb, ...]
    adverbs: tuple[Adverb, ...]
    relations: tuple[Relation, ...]
    weathers: tuple[Weather, ...]


@cache
def lexicon() -> Lexicon:
    """Read `lexicon.tsv`."""
    text = normalize("NFC", files("neft_core.corpus").joinpath("lexicon.tsv").read_text("utf-8"))
    rows: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            part, *cells = line.split("\t")
            rows.setdefault(part, []).append(cells)
    nouns = tuple(_word(Noun, cells) for cells in rows["noun"])
    by_name = {noun.en: noun for noun in nouns}
    return Lexicon(
        nouns=nouns,
        places=tuple(Place(by_name[noun], *rest) for noun, *rest in rows["place"]),
        names=tuple(_word(Name, cells) for cells in rows["name"]),
        adjectives=tuple(_word(Adjective, cells) for cells in rows["adjective"]),
        verbs=tuple(_word(Verb, cells) for cells in rows["verb"]),
        adverbs=tuple(_word(Adverb, cells) for cells in rows["adverb"]),
        relations=tuple(_word(Relation, cells) for cells in rows["relation"]),
        weathers=tuple(_word(Weather, cells) for cells in rows["weather"]),
    )


def _word(kind: type[Word], cells: list[str]) -> Word:
    """Fill a word from a line; a set of classes is separated by spaces."""
    columns = zip(get_type_hints(kind).values(), cells, strict=True)
    values: list[Any] = [cell if hint is str else frozenset(cell.split()) for hint, cell in columns]
    return kind(*values)
