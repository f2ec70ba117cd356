"""German for the generated inferences: cases, three classes of adjective endings, verb second.

Present tense of the third person, negation by kein and nicht; no questions, modals or subordinate
clauses.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from unicodedata import normalize

from neft_core.corpus.meaning import Adjective, Adverb, Clause, Noun, Phrase, Place, Relation, Verb

NUMBERS = ["zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]
# Rows: nominative, accusative, dative; columns: m, f, n, plural.
CASES = ("nominative", "accusative", "dative")
THE = (("der", "die", "das", "die"), ("den", "die", "das", "die"), ("dem", "der", "dem", "den"))
# Endings of ein and kein, and those of adjectives after der, after ein, and without either.
A = (("", "e", "", "e"), ("en", "e", "", "e"), ("em", "er", "em", "en"))
WEAK = (("e", "e", "e", "en"), ("en", "e", "e", "en"), ("en", "en", "en", "en"))
MIXED = (("er", "e", "es", "en"), ("en", "e", "es", "en"), ("en", "en", "en", "en"))
STRONG = (("er", "e", "es", "e"), ("en", "e", "es", "e"), ("em", "er", "em", "en"))


@dataclass(frozen=True)
class Words:
    """What `lexicon_de.tsv` adds to the common lexicon, by English word."""

    nouns: dict[str, tuple[str, ...]]
    classes: dict[str, Noun]
    adjectives: dict[str, tuple[str, ...]]
    verbs: dict[str, tuple[str, ...]]
    places: dict[str, str]
    adverbs: dict[str, str]
    relations: dict[str, str]

    def knows(self, word: Noun | Adjective | Verb | Place | Adverb | Relation) -> bool:
        """Whether a word of the common lexicon has a German one."""
        if isinstance(word, Place):
            return word.noun.en in self.places
        of_kind: dict[type, Collection[str]] = {
            Noun: self.nouns,
            Adjective: self.adjectives,
            Verb: self.verbs,
            Adverb: self.adverbs,
            Relation: self.relations,
        }
        return word.en in of_kind[type(word)]


@cache
def words() -> Words:
    """Read `lexicon_de.tsv`."""
    text = files("neft_core.corpus").joinpath("lexicon_de.tsv").read_text("utf-8")
    rows: dict[str, list[list[str]]] = {}
    for line in normalize("NFC", text).splitlines():
        if not line.startswith("#"):
            part, *cells = line.split("\t")
            rows.setdefault(part, []).append(cells)
    nouns = {cells[0]: tuple(cells[1:]) for cells in rows["noun"]}
    classes = {}
    for kind, en, fr, fr_plural, fr_gender, gender, de, plural in rows["class"]:
        en_plural = en.replace("piece", "pieces") if " of " in en else ""
        classes[kind] = Noun(
            f"any {kind}", en, en_plural, fr, fr_plural, fr_gender, "", "", "", "m", ""
        )
        nouns[en] = (gender, de, plural, "")
    return Words(
        nouns,
        classes,
        {cells[0]: tuple(cells[1:]) for cells in rows["adjective"]},
        {cells[0]: tuple(cells[1:]) for cells in rows["verb"]},
        *({cells[0]: cells[1] for cells in rows[part]} for part in ("place", "adverb", "relation")),
    )


def adjective(word: Adjective, ending: str) -> str:
    """An adjective before its noun."""
    stem, _, short = words().adjectives[word.en]
    return (short or stem).removesuffix("e") + ending


def comparative(word: Adjective) -> str:
    """The comparative: älter, schneller."""
    stem, form, _ = words().adjectives[word.en]
    return form or stem + "er"


def phrase(np: Phrase, case: str = "nominative", negated: bool = False) -> str:
    """Realise a noun phrase; `negated` makes kein of an indefinite one."""
    if isinstance(np.head, Noun):
        text = _noun_phrase(np, np.head, CASES.index(case), negated)
    else:
        text = np.head.en
    return f"{text} und {phrase(np.partner, case)}" if np.partner else text


def _noun_phrase(np: Phrase, noun: Noun, row: int, negated: bool) -> str:
    gender, singular, plural, weak = words().nouns[noun.en]
    column = 3 if np.plural else "mfn".index(gender)
    form = plural if np.plural or (weak and row) else singular
    if np.plural and row == 2 and form[-1] not in "ns":
        form += "n"
    if np.determiner == "a":
        before, endings = ("kein" if negated else "ein") + A[row][column], MIXED
    elif np.determiner == "the":
        before, endings = THE[row][column], WEAK
    else:
        count = NUMBERS[np.count - 2]
        before = {
            "number": count,
            "more": f"mehr als {count}",
            "fewer": f"weniger als {count}",
            "many": "viele",
            "few": "einige",
        }[np.determiner]
        endings = STRONG
    described = adjective(np.adjective, endings[row][column]) if np.adjective else ""
    return " ".join(part for part in (before, described, form) if part)


def _finite(c: Clause, plural: bool) -> str:
    assert c.verb
    infinitive, third, _ = words().verbs[c.verb.en]
    if plural:
        return infinitive
    stem = infinitive.removesuffix("n").removesuffix("e")
    return third or stem + ("et" if stem.endswith(("t", "d")) else "t")


def clause(c: Clause) -> str:
    """Realise a clause without its final mark."""
    assert c.subject
    plural = c.subject.person == 4
    not_ = "nicht" if c.negated else ""
    if c.kind == "be":
        order = [phrase(c.subject), "sind" if plural else "ist", not_, _complement(c)]
        return " ".join(part for part in order if part)
    assert c.verb
    obj, prepositional = "", ""
    if c.object:
        governed = words().verbs[c.verb.en][2]
        kein = c.negated and c.object.determiner == "a"
        not_ = "" if kein else not_
        text = phrase(c.object, "dative" if governed == "dat" else "accusative", kein)
        if governed == "auf":
            prepositional = f"auf {text}"
        else:
            obj = text
    order = [
        phrase(c.subject),
        _finite(c, plural),
        words().adverbs[c.time.en] if c.time else "",
        obj,
        not_,
        prepositional,
        f"mit {phrase(c.companion, 'dative')}" if c.companion else "",
        words().places[c.place.noun.en] if c.place else "",
    ]
    return " ".join(part for part in order if part)


def _complement(c: Clause) -> str:
    if c.relation and c.ground:
        return f"{words().relations[c.relation.en]} {phrase(c.ground, 'dative')}"
    assert c.adjective
    if c.compared:
        return f"{comparative(c.adjective)} als {phrase(c.compared)}"
    return ("sehr " if c.intense else "") + words().adjectives[c.adjective.en][0]


def sentence(c: Clause) -> str:
    """Realise a whole sentence."""
    text = clause(c)
    return text[0].upper() + text[1:] + "."
