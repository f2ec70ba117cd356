"""Two constructed languages for pairs with little data: Tavi and Besk.

They are nobody's languages: words are drawn from sounds by a hash of the English word, and the
grammar is this file. They stand where the paper has Maori and Bosnian, and what a model can do in
them says nothing of these. Tavi (code qmi) has open syllables and particles, the verb comes first,
adjectives follow: so far like Maori. Besk (qbs) has endings for case, gender, number and person,
and no definite article: so far like Bosnian. Codes from qaa to qtz are for private use in ISO 639.

Both tell apart all that English does.
"""

import hashlib
from functools import cache
from itertools import count

from neft_core.corpus.meaning import Clause, Name, Noun, Phrase, Place, Pronoun, lexicon

SOUNDS = {
    "qmi": (("h", "k", "l", "m", "n", "p", "r", "t", "v", ""), ("a", "e", "i", "o", "u"), ("",)),
    "qbs": (
        ("b", "br", "d", "g", "gr", "k", "kr", "l", "m", "n", "p", "r", "s", "st", "t", "v", "z"),
        ("a", "e", "i", "o", "u"),
        ("", "", "n", "r", "s", "k", "l"),
    ),
}
"""Of each language: how a syllable begins, its vowel, how it ends."""


def _draw(language: str, key: str, syllables: int) -> str:
    """A word from the digest of a key."""
    digest = hashlib.blake2b(f"{language} {key}".encode(), digest_size=16).digest()
    parts = SOUNDS[language]
    spots = [parts[place % 3] for place in range(3 * syllables)]
    return "".join(
        options[byte % len(options)] for options, byte in zip(spots, digest, strict=False)
    )


@cache
def _words(language: str) -> dict[tuple[str, str], str]:
    """Part of speech and English word to the word; no two are alike."""
    book = lexicon()
    keys = [("noun", noun.en) for noun in book.nouns]
    keys += [("adjective", adj.en) for adj in book.adjectives]
    keys += [("verb", verb.en) for verb in book.verbs]
    keys += [("adverb", adverb.en) for adverb in book.adverbs]
    keys += [("relation", relation.en) for relation in book.relations]
    keys += [("weather", weather.en) for weather in book.weathers]
    keys += [("pronoun", word) for word in ("I", "you", "he", "she", "we", "they")]
    keys += [("number", str(number)) for number in range(2, 11)]
    keys += [("particle", word) for word in PARTICLES]
    taken: set[str] = set()
    found = {}
    for key in dict.fromkeys(keys):
        syllables = {"particle": 1, "number": 2, "pronoun": 1}.get(key[0], 2)
        for attempt in count():
            # After some tries a longer one; a stem of Besk ends in a consonant for its endings.
            word = _draw(language, f"{key} {attempt}", syllables + attempt // 8)
            if language == "qbs" and key[0] in ("noun", "adjective", "verb"):
                word = word.rstrip("aeiou")
            if len(word) > 1 and word not in taken:
                break
        taken.add(word)
        found[key] = word
    return found


PARTICLES = (
    "a", "the", "this", "these", "many", "few", "very", "more", "than", "not", "polite", "ask",
    "who", "what", "where", "progressive", "past", "future", "want", "can", "must", "object",
    "to", "with", "at", "is", "have", "there", "of", "and", "but", "because", "when", "if",
    "that",
)  # fmt: skip


def _say(language: str, part: str, word: str) -> str:
    return _words(language)[part, word]


def _sentence(text: str, c: Clause) -> str:
    text = " ".join(text.split())
    mark = "?" if c.question else "!" if c.kind == "command" else "."
    return text[0].upper() + text[1:] + mark


def _t(word: str) -> str:
    return _say("qmi", "particle", word)


def _tavi_phrase(np: Phrase) -> str:
    head = np.head
    if isinstance(head, Pronoun):
        text = _say("qmi", "pronoun", head.en)
    elif isinstance(head, Name):
        text = head.en
    else:
        adj = _say("qmi", "adjective", np.adjective.en) if np.adjective else ""
        before, after = "", ""
        if np.determiner == "number":
            before = _say("qmi", "number", str(np.count))
        elif np.determiner == "my":
            owner = np.owner
            of = owner.en if isinstance(owner, Name) else _say("qmi", "pronoun", owner.en)  # type: ignore[union-attr]
            after = f"{_t('of')} {of}"
        elif np.determiner == "bare":
            before = _t("a")
        elif np.determiner not in ("mass", "generic"):
            before = _t(np.determiner)
        text = f"{before} {_say('qmi', 'noun', head.en)} {adj} {after}"
        if np.determiner == "generic" and np.plural:
            text = f"{_say('qmi', 'noun', head.en)} {text}"  # said twice for all of a kind
    if np.relative:
        text += f" {_t('that')} {_tavi(np.relative)}"
    return f"{text} {_t('and')} {_tavi_phrase(np.partner)}" if np.partner else text


def _tavi_place(place: Place, particle: str) -> str:
    return f"{_t(particle)} {_t('the')} {_say('qmi', 'noun', place.noun.en)}"


def _tavi_predicate(c: Clause) -> str:
    """What comes first."""
    if c.kind == "act" or c.kind == "command":
        assert c.verb
        return _say("qmi", "verb", c.verb.en)
    if c.kind == "have":
        return _t("have")
    if c.kind == "exist":
        return _t("there")
    if c.adjective:
        adj = _say("qmi", "adjective", c.adjective.en)
        if c.compared:
            return f"{_t('more')} {adj}"
        return f"{adj} {_t('very')}" if c.intense else adj
    return _t("is")


def _tavi(c: Clause) -> str:
    if c.weather:
        now = _t("progressive") if c.tense == "progressive" else ""
        time = _say("qmi", "adverb", c.time.en) if c.time else ""
        return f"{now} {_say('qmi', 'weather', c.weather.en)} {time}"
    tense = "" if c.tense == "present" else _t(c.tense)
    marked = c.kind in ("act", "command", "have")
    obj = _tavi_phrase(c.object) if c.object else _t("what") if c.question == "object" else ""
    parts = [
        _t("ask") if c.question == "polar" else "",
        _t("polite") if c.polite else "",
        _t("not") if c.negated else "",
        tense,
        _t(c.modal) if c.modal else "",
        _tavi_predicate(c),
        _t("who") if c.question == "subject" else _tavi_phrase(c.subject) if c.subject else "",
        _t("this") if c.kind == "this" and c.object and not c.object.plural else "",
        _t("these") if c.kind == "this" and c.object and c.object.plural else "",
        f"{_t('object')} {obj}" if obj and marked else obj,
        f"{_t('to')} {_tavi_phrase(c.recipient)}" if c.recipient else "",
        f"{_t('with')} {_tavi_phrase(c.companion)}" if c.companion else "",
        f"{_t('than')} {_tavi_phrase(c.compared)}" if c.compared else "",
        f"{_say('qmi', 'relation', c.relation.en)} {_tavi_phrase(c.ground)}"
        if c.relation and c.ground
        else "",
        _tavi_place(c.goal, "to") if c.goal else "",
        _tavi_place(c.place, "at") if c.place else "",
        _t("where") if c.question == "place" else "",
        _say("qmi", "adverb", c.time.en) if c.time else "",
    ]
    return " ".join(part for part in parts if part)


def tavi(c: Clause) -> str:
    """Realise a sentence in Tavi: a reason, time or condition follows with its particle."""
    text = _tavi(c)
    if c.second:
        text += f" {_t(c.link)} {_tavi(c.second)}"
    return _sentence(text, c)


# Endings of nouns in a, o and without: nominative, accusative, dative, genitive; then the plural.
NOUN = {
    "m": ("", "u", "om", "og", "i", "e", "im", "ih"),
    "f": ("a", "an", "oj", "as", "ar", "are", "aim", "ah"),
    "n": ("o", "o", "em", "os", "ora", "ora", "orim", "orih"),
}
ADJECTIVE = {
    "m": ("i", "eg", "em", "eg", "ij", "ije", "ijem", "ijeh"),
    "f": ("aja", "uju", "ejo", "eje", "aje", "aje", "ajem", "ajeh"),
    "n": ("oje", "oje", "em", "ego", "aja", "aja", "ajim", "ajih"),
}
PERSON = ("um", "esh", "et", "emo", "ut")
CASE = {"nominative": 0, "accusative": 1, "dative": 2, "genitive": 3}


def _gender(noun: Noun) -> str:
    return "mfn"[_draw("qbs", f"gender {noun.en}", 2).encode()[0] % 3]


def _b(word: str) -> str:
    return _say("qbs", "particle", word)


def _besk_phrase(np: Phrase, case: str = "nominative") -> str:
    head = np.head
    spot = CASE[case]
    if isinstance(head, Pronoun):
        text = _say("qbs", "pronoun", head.en) + ("", "ga", "mu", "ge")[spot]
    elif isinstance(head, Name):
        text = head.en + ("" if spot == 0 else "-" + ("", "u", "om", "og")[spot])
    else:
        gender, row = _gender(head), spot + (4 if np.plural else 0)
        noun = _say("qbs", "noun", head.en) + NOUN[gender][row]
        ending = ADJECTIVE[gender][row]
        adj = _say("qbs", "adjective", np.adjective.en) + ending if np.adjective else ""
        before, after = "", ""
        if np.determiner == "number":
            before = _say("qbs", "number", str(np.count))
        elif np.determiner == "my":
            owner = np.owner
            if isinstance(owner, Name):
                after = f"{owner.en}-og"
            else:
                before = _say("qbs", "pronoun", owner.en) + "v" + ending  # type: ignore[union-attr]
        elif np.determiner in ("this", "these"):
            before = _b(np.determiner) + ending
        elif np.determiner in ("many", "few"):
            before = _b(np.determiner)
        elif np.determiner == "a":
            before = _b("a") + ending
        elif np.determiner == "generic":
            before = _b("these")
        elif np.determiner == "bare":
            noun += "k"
        text = f"{before} {adj} {noun} {after}"
    if np.relative:
        text += f", {_b('that')} {_besk(np.relative)},"
    return f"{text} {_b('and')} {_besk_phrase(np.partner, case)}" if np.partner else text


def _besk_verb(c: Clause, person: int) -> str:
    if c.kind == "command":
        assert c.verb
        return _say("qbs", "verb", c.verb.en) + "i"
    if c.kind == "act":
        assert c.verb
        stem = _say("qbs", "verb", c.verb.en)
    else:
        stem = _b({"have": "have", "exist": "there"}.get(c.kind, "is")) + "s"
    if c.modal:
        return f"{_b(c.modal)}m{PERSON[person]} {stem}ati"
    before = f"{_b('future')} " if c.tense == "future" else ""
    infix = {"past": "av", "progressive": "iv"}.get(c.tense, "")
    return before + stem + infix + PERSON[person]


def _besk(c: Clause) -> str:
    if c.weather:
        now = _b("progressive") if c.tense == "progressive" else ""
        time = _say("qbs", "adverb", c.time.en) if c.time else ""
        return f"{now} {_say('qbs', 'weather', c.weather.en)} {time}"
    person = c.subject.person if c.subject else 2
    subject = _besk_phrase(c.subject) if c.subject else ""
    if c.kind == "exist" and c.object:
        subject = _besk_phrase(c.object)
    if c.kind == "this" and c.object:
        subject = _b("these" if c.object.plural else "this") + "o"
    adj = ""
    if c.adjective and c.subject:
        plural = c.subject.person > 2 or c.subject.plural
        head = c.subject.head
        gender = _gender(head) if isinstance(head, Noun) else head.gender
        adj = _say("qbs", "adjective", c.adjective.en) + ADJECTIVE[gender][4 * plural]
        adj = f"{_b('more')} {adj}" if c.compared else f"{_b('very')} {adj}" if c.intense else adj
    case = "accusative" if c.kind in ("act", "command", "have") else "nominative"
    obj = _besk_phrase(c.object, case) if c.object and c.kind != "exist" else ""
    parts = [
        _b("ask") if c.question == "polar" else "",
        _b("what") if c.question == "object" else _b("where") if c.question == "place" else "",
        _b("polite") if c.polite else "",
        _b("who") if c.question == "subject" else subject,
        _say("qbs", "adverb", c.time.en) if c.time else "",
        _b("not") if c.negated else "",
        _besk_verb(c, person),
        adj,
        obj,
        _besk_phrase(c.recipient, "dative") if c.recipient else "",
        f"{_b('with')} {_besk_phrase(c.companion, 'genitive')}" if c.companion else "",
        f"{_b('than')} {_besk_phrase(c.compared, 'genitive')}" if c.compared else "",
        f"{_say('qbs', 'relation', c.relation.en)} {_besk_phrase(c.ground, 'dative')}"
        if c.relation and c.ground
        else "",
        f"{_b('to')} {_besk_phrase(Phrase(c.goal.noun, 'the'), 'accusative')}" if c.goal else "",
        f"{_b('at')} {_besk_phrase(Phrase(c.place.noun, 'the'), 'dative')}" if c.place else "",
    ]
    return " ".join(part for part in parts if part)


def besk(c: Clause) -> str:
    """Realise a sentence in Besk: when and if come first, other links follow."""
    text = _besk(c)
    if c.second:
        other = f"{_b(c.link)} {_besk(c.second)}"
        text = f"{other}, {text}" if c.link in ("when", "if") else f"{text}, {other}"
    return _sentence(text.replace(" ,", ",").replace(",,", ","), c)
