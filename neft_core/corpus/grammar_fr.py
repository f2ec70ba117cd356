"""French: gender and number agreement, adjective position, elision and contraction.

Words are joined uncontracted ("de le hôpital") and the sentence is contracted at the end, so that
every l', d', qu', du, au and aux comes from one place.
"""

import re
from functools import cache

from neft_core.corpus.meaning import Adjective, Clause, Name, Noun, Phrase, Place, Pronoun, Verb

NUMBERS = ["deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix"]
SUBJECT = {"I": "je", "you": "tu", "he": "il", "she": "elle", "we": "nous", "they": "ils"}
CLITIC = {"I": "me", "you": "te", "we": "nous", "they": "les"}
TONIC = {"I": "moi", "you": "toi", "he": "lui", "she": "elle", "we": "nous", "they": "eux"}
# masculine, feminine, plural
POSSESSIVE = {
    "I": ("mon", "ma", "mes"),
    "you": ("ton", "ta", "tes"),
    "we": ("notre", "notre", "nos"),
    "they": ("leur", "leur", "leurs"),
}
ETRE = ("suis", "es", "est", "sommes", "sont")
AVOIR = ("ai", "as", "a", "avons", "ont")
MODAL = {
    "want": ("veux", "veux", "veut", "voulons", "veulent"),
    "can": ("peux", "peux", "peut", "pouvons", "peuvent"),
    "must": ("dois", "dois", "doit", "devons", "doivent"),
}
FUTURE = ("ai", "as", "a", "ons", "ont")
CEST = "c'est"
VOWEL = "aeiouâàéèêëîïôûœhAEIOUÉ"
ELISION = re.compile(rf"\b([Ll]e|[Ll]a|[Jj]e|[MmTt]e|[Nn]e|[Dd]e|[Qq]ue) (?=[{VOWEL}])(?!huit)")
CONTRACTION = (("de le ", "du "), ("de les ", "des "), ("à le ", "au "), ("à les ", "aux "))


def contract(text: str) -> str:
    """Apply elision (le ami -> l'ami, si il -> s'il) and contraction (de le -> du)."""
    text = ELISION.sub(lambda match: match[1][:-1] + "'", text).replace("si il", "s'il")
    for apart, joined in CONTRACTION:
        text = re.sub(rf"\b{apart}", joined, text)
    return text


def plural(word: str) -> str:
    """Form the regular plural of a noun or adjective."""
    if word.endswith(("s", "x")) or word == "bon marché":
        return word
    return word + ("x" if word.endswith(("au", "eu")) and word != "bleu" else "s")


def adjective(adj: Adjective, gender: str, many: bool, following: str = "") -> str:
    """Inflect an adjective; before a masculine vowel beau becomes bel."""
    if gender == "f":
        form = adj.fr_feminine or (adj.fr if adj.fr.endswith("e") else adj.fr + "e")
    elif not many and following and following[0] in VOWEL and adj.fr_before_vowel:
        form = adj.fr_before_vowel
    else:
        form = adj.fr
    return plural(form) if many else form


def noun_form(noun: Noun, many: bool) -> str:
    """Return the singular or plural form of a noun."""
    return (noun.fr_plural or plural(noun.fr)) if many else noun.fr


def _determiner(np: Phrase, following: str) -> str:
    many, feminine = np.plural, np.own_gender("fr") == "f"
    vowel = following[0] in VOWEL
    match np.determiner:
        case "the":
            return "la" if feminine else "le"
        case "a":
            return "une" if feminine else "un"
        case "this":
            return "cette" if feminine else "cet" if vowel else "ce"
        case "these":
            return "ces"
        case "number":
            return NUMBERS[np.count - 2]
        case "more":
            return f"plus de {NUMBERS[np.count - 2]}"
        case "fewer":
            return f"moins de {NUMBERS[np.count - 2]}"
        case "many":
            return "beaucoup de"
        case "few":
            return "quelques"
        case "mass":
            return "de la" if feminine else "de le"
        case "generic":
            return "les" if many else "la" if feminine else "le"
        case "my":
            assert np.owner is not None
            if isinstance(np.owner, Name):
                return "la" if feminine else "le"
            forms = POSSESSIVE[np.owner.en]
            return forms[2] if many else forms[1] if feminine and not vowel else forms[0]
    return ""


def phrase(np: Phrase, case: str = "subject", partitive: bool = True) -> str:
    """Realise a noun phrase, not yet contracted; pronouns other than subjects are tonic.

    `partitive=False` is for the object of a negated verb: pas de thé.
    """
    head = np.head
    if isinstance(head, Pronoun):
        text = SUBJECT[head.en] if case == "subject" else TONIC[head.en]
    elif isinstance(head, Name):
        text = head.fr
    else:
        text = noun_form(head, np.plural)
        if np.adjective:
            adj = adjective(np.adjective, head.fr_gender, np.plural, text)
            text = f"{adj} {text}" if np.adjective.fr_position == "pre" else f"{text} {adj}"
        if np.determiner in ("mass", "a") and not partitive:
            text = f"de {text}"
        else:
            text = f"{_determiner(np, text)} {text}".strip()
        if isinstance(np.owner, Name):
            text += f" de {np.owner.fr}"
    if np.relative:
        text += f" {'que' if np.relative.subject else 'qui'} {clause(np.relative)}"
    if np.partner:
        text += f" et {phrase(np.partner, case)}"
    return text


@cache
def present(verb: Verb) -> tuple[str, ...]:
    """Conjugate in the present: je, tu, il, nous, ils."""
    if verb.fr_present:
        return tuple(verb.fr_present.split(","))
    stem = verb.fr[:-2]
    soft = {"g": stem + "e", "c": stem[:-1] + "ç"}.get(stem[-1], stem)
    return stem + "e", stem + "es", stem + "e", soft + "ons", stem + "ent"


@cache
def future(verb: Verb) -> tuple[str, ...]:
    """Conjugate in the future: je, tu, il, nous, ils."""
    stem = verb.fr_future or verb.fr
    return tuple(stem + ending for ending in FUTURE)


def participle(verb: Verb) -> str:
    """Return the past participle, masculine singular."""
    return verb.fr_participle or verb.fr[:-2] + ("é" if verb.fr.endswith("er") else "i")


def imperative(verb: Verb) -> str:
    """Return the familiar imperative: mange, bois, ouvre."""
    form = present(verb)[1]
    return form[:-1] if form.endswith("es") else form


def _verb(c: Clause, person: int) -> tuple[str, str]:
    """Finite form and what follows it after pas."""
    if c.kind == "be":
        return ETRE[person], ""
    if c.kind == "have":
        return AVOIR[person], ""
    assert c.verb is not None
    if c.modal:
        return MODAL[c.modal][person], c.verb.fr
    match c.tense:
        case "progressive":
            return ETRE[person], f"en train de {c.verb.fr}"
        case "future":
            return future(c.verb)[person], ""
        case "past" if c.goal:
            done = participle(c.verb)
            if c.subject and c.subject.gender("fr") == "f":
                done += "e"
            return ETRE[person], done + ("s" if person > 2 else "")
        case "past":
            return AVOIR[person], participle(c.verb)
    return present(c.verb)[person], ""


def _where(place: Place) -> str:
    return f"{place.fr} {'la' if place.noun.fr_gender == 'f' else 'le'} {place.noun.fr}"


def _goal(place: Place) -> str:
    return f"à {'la' if place.noun.fr_gender == 'f' else 'le'} {place.noun.fr}"


def clause(c: Clause) -> str:
    """Realise a clause, not yet contracted, without its final mark."""
    if c.weather:
        return f"{c.weather.fr} {c.time.fr}" if c.time else c.weather.fr
    if c.kind == "exist":
        assert c.object
        assert c.relation
        assert c.ground
        return f"il y a {phrase(c.object)} {c.relation.fr} {phrase(c.ground)}"
    if c.kind == "this":
        assert c.object
        return f"{'ce sont' if c.object.plural else CEST} {phrase(c.object)}"
    if c.kind == "command":
        assert c.verb
        assert c.object
        verb = imperative(c.verb)
        start = f"ne {verb} pas" if c.negated else verb
        text = f"{start} {phrase(c.object, 'object', not c.negated)}"
        return f"{text}, s'il te plaît" if c.polite else text
    person = c.subject.person if c.subject else 2
    finite, rest = _verb(c, person)
    clitic, obj = "", ""
    if c.object and isinstance(c.object.head, Pronoun):
        clitic = CLITIC[c.object.head.en]
        if c.modal:
            rest, clitic = f"{clitic} {rest}", ""
    elif c.object:
        obj = phrase(c.object, "object", not c.negated)
    start = {
        "polar": "est-ce que",
        "object": "qu'est-ce que",
        "place": "où est-ce que",
        "subject": "qui",
    }.get(c.question, "")
    order = [
        start,
        phrase(c.subject) if c.subject else "",
        "ne" if c.negated else "",
        clitic,
        finite,
        "pas" if c.negated else "",
        c.time.fr if c.time and c.time.kind == "often" else "",
        rest,
        obj,
        _complement(c, person),
        f"à {phrase(c.recipient, 'object')}" if c.recipient else "",
        f"avec {phrase(c.companion, 'object')}" if c.companion else "",
        _goal(c.goal) if c.goal else "",
        _where(c.place) if c.place else "",
        c.time.fr if c.time and c.time.kind != "often" else "",
    ]
    return " ".join(part for part in order if part)


def _complement(c: Clause, person: int) -> str:
    if c.adjective:
        assert c.subject
        text = adjective(c.adjective, c.subject.gender("fr"), person > 2)
        if c.compared:
            return f"plus {text} que {phrase(c.compared, 'object')}"
        return f"très {text}" if c.intense else text
    if c.relation and c.ground and c.kind == "be":
        return f"{c.relation.fr} {phrase(c.ground, 'object')}"
    return ""


LINK = {"and": " et", "but": ", mais", "because": " parce que", "when": "quand", "if": "si"}


def sentence(c: Clause) -> str:
    """Realise a whole sentence."""
    text = clause(c)
    if c.second:
        other, link = clause(c.second), LINK[c.link]
        text = f"{link} {other}, {text}" if c.link in ("when", "if") else f"{text}{link} {other}"
    text = contract(text)
    mark = " ?" if c.question else " !" if c.kind == "command" else "."
    return text[0].upper() + text[1:] + mark
