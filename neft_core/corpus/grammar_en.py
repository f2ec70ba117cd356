"""English: articles a/an, third person, do-support, inversion in questions."""

from functools import cache

from neft_core.corpus.meaning import Clause, Name, Noun, Phrase, Place, Pronoun, Verb

NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
OBJECT = {"I": "me", "you": "you", "he": "him", "she": "her", "we": "us", "they": "them"}
POSSESSIVE = {"I": "my", "you": "your", "we": "our", "they": "their"}
BE = ("am", "is", "are")
# Consonant sound behind a vowel letter, and the reverse.
A_BEFORE_VOWEL = ("use", "uni")
AN_BEFORE_CONSONANT = ("honest",)


def article(word: str) -> str:
    """Choose a or an by the sound that follows."""
    vowel = word[0] in "aeiou" and not word.startswith(A_BEFORE_VOWEL)
    return "an" if vowel or word.startswith(AN_BEFORE_CONSONANT) else "a"


def _sibilant_s(word: str) -> str:
    if word.endswith(("s", "x", "ch", "sh", "o")) and word not in {"photo"}:
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def plural(noun: Noun) -> str:
    """Return the plural form of a noun."""
    return noun.en_plural or _sibilant_s(noun.en)


def phrase(np: Phrase, case: str = "subject") -> str:
    """Realise a noun phrase; `case` subject or object matters to pronouns alone."""
    head = np.head
    if isinstance(head, Pronoun):
        text = OBJECT[head.en] if case == "object" else head.en
    elif isinstance(head, Name):
        text = head.en
    else:
        noun = plural(head) if np.plural else head.en
        if np.adjective:
            noun = f"{np.adjective.en} {noun}"
        text = f"{_determiner(np, noun)} {noun}".strip()
    if np.relative:
        who = "who" if isinstance(head, Name) or head_is_person(np) else "that"
        text += f" {who} {clause(np.relative)}"
    if np.partner:
        text += f" and {phrase(np.partner, case)}"
    return text


def head_is_person(np: Phrase) -> bool:
    """Whether the head noun names a person."""
    return isinstance(np.head, Noun) and np.head.kind in {"human", "job", "kin"}


def _determiner(np: Phrase, following: str) -> str:
    if np.determiner in {"a", "bare"}:
        return article(following)
    if np.determiner == "number":
        return NUMBERS[np.count - 2]
    if np.determiner in {"more", "fewer"}:
        return f"{np.determiner} than {NUMBERS[np.count - 2]}"
    if np.determiner == "my":
        assert np.owner is not None
        return POSSESSIVE[np.owner.en] if isinstance(np.owner, Pronoun) else f"{np.owner.en}'s"
    return {"few": "a few", "mass": "", "generic": ""}.get(np.determiner, np.determiner)


@cache
def _verb(verb: Verb) -> dict[str, str]:
    first, _, rest = verb.en.partition(" ")
    rest = f" {rest}" if rest else ""
    past = verb.en_past
    if not past:
        past = first + "d" if first.endswith("e") else first + "ed"
        if first.endswith("y") and first[-2] not in "aeiou":
            past = first[:-1] + "ied"
    if first in {"run", "swim", "cut"}:
        ing = first + first[-1] + "ing"
    elif first.endswith("e") and not first.endswith("ee"):
        ing = first[:-1] + "ing"
    else:
        ing = first + "ing"
    return {
        "base": first + rest,
        "s": _sibilant_s(first) + rest,
        "past": past + rest,
        "ing": ing + rest,
    }


def _be(person: int, tense: str = "present") -> str:
    if tense == "past":
        return "was" if person in (0, 2) else "were"
    return BE[0] if person == 0 else BE[1] if person == 2 else BE[2]


def _finite(c: Clause, person: int) -> tuple[str, str]:
    """Auxiliary ("" where none is needed) and main verb."""
    if c.kind == "have":
        forms = {"base": "have", "s": "has", "past": "had", "ing": "having"}
    else:
        assert c.verb is not None
        forms = _verb(c.verb)
    if c.modal in ("can", "must"):
        return c.modal, forms["base"]
    tail = ""
    if c.modal == "want":
        tail = f" to {forms['base']}"
        forms = {"base": "want", "s": "wants", "past": "wanted", "ing": "wanting"}
    if c.tense == "progressive":
        return _be(person), forms["ing"]
    if c.tense == "future":
        return "will", forms["base"] + tail
    if c.negated or c.question not in ("", "subject"):
        do = "did" if c.tense == "past" else "does" if person == 2 else "do"
        return do, forms["base"] + tail
    if c.tense == "past":
        return "", forms["past"] + tail
    return "", forms["s" if person == 2 else "base"] + tail


def _where(place: Place) -> str:
    return f"{place.en} the {place.noun.en}"


def clause(c: Clause) -> str:
    """Realise a clause without its final mark; in a relative clause the gap is left out."""
    if c.weather:
        text = c.weather.en_now if c.tense == "progressive" else c.weather.en
        return f"{text} {c.time.en}" if c.time else text
    if c.kind == "exist":
        assert c.object
        assert c.relation
        assert c.ground
        verb = "are" if c.object.plural else "is"
        return f"there {verb} {phrase(c.object)} {c.relation.en} {phrase(c.ground)}"
    if c.kind == "this":
        assert c.object
        start = "these are" if c.object.plural else "this is"
        return f"{start} {phrase(c.object)}"
    if c.kind == "command":
        assert c.verb
        assert c.object
        text = f"{c.verb.en} {phrase(c.object, 'object')}"
        return f"please {text}" if c.polite else f"do not {text}" if c.negated else text
    person = c.subject.person if c.subject else 2
    if c.kind == "be":
        aux, main = _be(person, c.tense), _complement(c)
    else:
        aux, main = _finite(c, person)
    subject = phrase(c.subject) if c.subject else "who" if c.question else ""
    often = c.time.en if c.time and c.time.kind == "often" else ""
    not_ = "not" if c.negated else ""
    asked = {"object": "what", "place": "where"}.get(c.question, "")
    if c.question in ("polar", "object", "place"):
        order = [asked, aux, subject, not_, often, main]
    else:
        order = [subject, aux, not_, often, main]
    order += [
        phrase(c.object, "object") if c.object else "",
        f"to {phrase(c.recipient, 'object')}" if c.recipient else "",
        f"with {phrase(c.companion, 'object')}" if c.companion else "",
        f"to the {c.goal.noun.en}" if c.goal else "",
        _where(c.place) if c.place else "",
        c.time.en if c.time and not often else "",
    ]
    return " ".join(part for part in order if part)


def _complement(c: Clause) -> str:
    if c.compared and c.adjective:
        return f"{c.adjective.en_comparative} than {phrase(c.compared, 'object')}"
    if c.adjective:
        return f"very {c.adjective.en}" if c.intense else c.adjective.en
    if c.relation and c.ground:
        return f"{c.relation.en} {phrase(c.ground, 'object')}"
    return ""


def sentence(c: Clause) -> str:
    """Realise a whole sentence."""
    text = clause(c).replace("can not", "cannot")
    if c.second:
        other = clause(c.second)
        if c.link in ("when", "if"):
            text = f"{c.link} {other}, {text}"
        else:
            comma = "," if c.link == "but" else ""
            text = f"{text}{comma} {c.link} {other}"
    mark = "?" if c.question else "!" if c.kind == "command" else "."
    return text[0].upper() + text[1:] + mark
