"""Hindi: verb last, oblique before postpositions, agreement with subject or (under ने) object.

The corpus takes तुम for "you"; elder relatives take the honorific plural.
"""

from functools import cache

from neft_core.corpus.meaning import YOU, Clause, Name, Noun, Phrase, Place, Pronoun, Verb

NUMBERS = ["दो", "तीन", "चार", "पाँच", "छह", "सात", "आठ", "नौ", "दस"]
DIRECT = {"I": "मैं", "you": "तुम", "he": "वह", "she": "वह", "we": "हम", "they": "वे"}
OBLIQUE = {"I": "मुझ", "you": "तुम", "he": "उस", "she": "उस", "we": "हम", "they": "उन"}
DATIVE = {
    "I": "मुझे",
    "you": "तुम्हें",
    "he": "उसे",
    "she": "उसे",
    "we": "हमें",
    "they": "उन्हें",
}
ERGATIVE = {
    "I": "मैंने",
    "you": "तुमने",
    "he": "उसने",
    "she": "उसने",
    "we": "हमने",
    "they": "उन्होंने",
}
# Masculine singular; inflected like an adjective.
POSSESSIVE = {
    "I": "मेरा",
    "you": "तुम्हारा",
    "he": "उसका",
    "she": "उसका",
    "we": "हमारा",
    "they": "उनका",
}
AUXILIARY = ("हूँ", "हो", "है", "हैं", "हैं")
VOWEL_SIGNS = "ािीुूेैोौ"


def inflect(word: str, gender: str, changed: bool) -> str:
    """Inflect words in -ā: `changed` is the plural or the oblique (बड़ा, बड़े, बड़ी)."""
    return " ".join(_inflect_one(part, gender, changed) for part in word.split(" "))


def _inflect_one(word: str, gender: str, changed: bool) -> str:
    if word in ("नया", "हुआ"):  # नए, नई; हुए, हुई
        stem = word.removesuffix("या").removesuffix("आ")
        return stem + ("ई" if gender == "f" else "ए") if gender == "f" or changed else word
    if not word.endswith("ा"):
        return word
    return word[:-1] + ("ी" if gender == "f" else "े" if changed else "ा")


@cache
def noun_forms(noun: Noun) -> tuple[str, str, str, str]:
    """Return singular, plural, oblique singular and oblique plural."""
    word, stem = noun.hi, noun.hi[:-1]
    if noun.hi_forms:
        plural, oblique, oblique_plural = noun.hi_forms.split(",")
        return word, plural, oblique, oblique_plural
    if noun.hi_gender[0] == "m":
        if word.endswith("ा"):
            return word, stem + "े", stem + "े", stem + "ों"
        return word, word, word, _oblique_plural(word)
    if word.endswith("िया"):
        return word, word + "ँ", word, stem + "ों"
    if word.endswith("ी"):
        return word, stem + "ियाँ", word, stem + "ियों"
    return word, word + "ें", word, word + "ों"


def _oblique_plural(word: str) -> str:
    if word.endswith("ी"):
        return word[:-1] + "ियों"
    if word.endswith("ू"):
        return word[:-1] + "ुओं"
    return word + ("ओं" if word[-1] in VOWEL_SIGNS else "ों")


def honorific(np: Phrase) -> bool:
    """Whether the head takes plural agreement out of respect."""
    return isinstance(np.head, Noun) and np.head.hi_gender.endswith("h")


def _many(np: Phrase) -> bool:
    """Plural in agreement: also तुम and the honorific."""
    return np.person in (1, 3, 4) or honorific(np)


def _determiner(np: Phrase, oblique: bool, subject: Phrase | None) -> str:
    changed = oblique or np.plural or honorific(np)
    gender = np.own_gender("hi")
    match np.determiner:
        case "a":
            return "एक"
        case "this":
            return "इस" if oblique else "यह"
        case "these":
            return "इन" if oblique else "ये"
        case "number":
            return NUMBERS[np.count - 2]
        case "many":
            return "बहुत " + inflect("सारा", gender, True)
        case "few":
            return "कुछ"
        case "my":
            owner = np.owner
            assert owner is not None
            if isinstance(owner, Name):
                return f"{owner.hi} {inflect('का', gender, changed)}"
            own = subject is not None and subject.head is owner and not subject.partner
            return inflect("अपना" if own else POSSESSIVE[owner.en], gender, changed)
    return ""


def phrase(
    np: Phrase, oblique: bool = False, subject: Phrase | None = None, counted: bool = True
) -> str:
    """Realise a noun phrase; what the `subject` owns is अपना; `counted=False` leaves out एक."""
    head = np.head
    if isinstance(head, Pronoun):
        text = OBLIQUE[head.en] if oblique else DIRECT[head.en]
    elif isinstance(head, Name):
        text = head.hi
    else:
        text = noun_forms(head)[2 * oblique + np.plural]
        if np.adjective:
            adj = inflect(np.adjective.hi, head.hi_gender[0], oblique or np.plural or honorific(np))
            text = f"{adj} {text}"
        if counted:
            text = f"{_determiner(np, oblique, subject)} {text}".strip()
    return f"{text} और {phrase(np.partner, oblique, subject)}" if np.partner else text


def marked(np: Phrase, postposition: str, subject: Phrase | None = None) -> str:
    """Realise a phrase before a postposition; pronouns fuse with it (मुझे, मेरे पास)."""
    if isinstance(np.head, Pronoun) and not np.partner:
        key = np.head.en
        if postposition == "को":
            return DATIVE[key]
        if postposition == "ने":
            return ERGATIVE[key]
        if postposition == "से":
            return OBLIQUE[key] + "से"
        if postposition in ("का", "की"):
            return inflect(POSSESSIVE[key], "f" if postposition == "की" else "m", False)
        return f"{inflect(POSSESSIVE[key], 'm', True)} {postposition.removeprefix('के ')}"
    return f"{phrase(np, True, subject)} {postposition}"


def object_marker(verb: Verb, np: Phrase) -> str:
    """Postposition of the object: the verb's own, or को for an animal."""
    animal = isinstance(np.head, Noun) and np.head.kind == "animal"
    return verb.hi_object or ("को" if animal and verb.en == "see" else "")


def perfective(verb: Verb, gender: str, many: bool) -> str:
    """Perfective participle; conjuncts with a noun of their own (मदद की) never change."""
    if verb.hi_perfective:
        masculine, feminine, plural = verb.hi_perfective.split(",")
        if masculine == feminine:
            return masculine
    else:
        stem, vowel = verb.hi, verb.hi[-1] in VOWEL_SIGNS
        masculine = stem + ("या" if vowel else "ा")
        feminine = stem + ("ई" if vowel else "ी")
        plural = stem + ("ए" if vowel else "े")
    if gender == "f":
        return feminine + ("ं" if many else "")
    return plural if many else masculine


def imperative(stem: str) -> str:
    """Form the तुम imperative: पढ़ो, खाओ, पियो, दो."""
    if stem.endswith("दे"):
        return stem[:-1] + "ो"
    if stem.endswith("ी"):
        return stem[:-1] + "ियो"
    return stem + ("ओ" if stem[-1] in VOWEL_SIGNS else "ो")


def future(stem: str, person: int, gender: str, many: bool) -> str:
    """Form the future: पढ़ूँगा, पढ़ोगे, पढ़ेगा, पढ़ेंगे."""
    row = 3 if many and person != 1 else person
    if row == 1:
        form = imperative(stem) + "गे"
    elif stem.endswith("दे"):
        form = stem[:-1] + {0: "ूँगा", 2: "ेगा", 3: "ेंगे"}[row]
    elif stem[-1] in VOWEL_SIGNS:
        base = stem[:-1] + "ि" if stem.endswith("ी") else stem
        form = base + {0: "ऊँगा", 2: "एगा", 3: "एँगे"}[row]
    else:
        form = stem + {0: "ूँगा", 2: "ेगा", 3: "ेंगे"}[row]
    return form[:-1] + "ी" if gender == "f" else form


def _verb(c: Clause, verb: Verb, subject: Phrase | None) -> list[str]:
    """Verb group as two parts, between which the negation stands, and the auxiliary."""
    light, _, stem = verb.hi.rpartition(" ")
    person = 2 if subject is None else 4 if honorific(subject) else subject.person
    gender = subject.gender("hi") if subject else "m"
    many = subject is not None and _many(subject)
    auxiliary = AUXILIARY[person]
    free = c.object if c.object and not object_marker(verb, c.object) else None
    if c.tense == "past":
        if verb.hi_ergative:
            gender = free.gender("hi") if free else "m"
            many = free is not None and free.plural
        light, _, form = perfective(verb, gender, many).rpartition(" ")
        return [light, form]
    if c.modal == "must":
        if free:
            infinitive = inflect(stem + "ना", free.gender("hi"), free.plural)
            return [light, infinitive, "हैं" if free.plural else "है"]
        return [light, stem + "ना", "है"]
    if c.modal == "want":
        return [f"{light} {stem}ना".strip(), inflect("चाहता", gender, many), auxiliary]
    if c.modal == "can":
        return [light, stem, inflect("सकता", gender, many), auxiliary]
    if c.tense == "future":
        return [light, future(stem, person, gender, many)]
    if c.tense == "progressive":
        return [light, stem, inflect("रहा", gender, many), auxiliary]
    return [light, inflect(stem + "ता", gender, many), auxiliary]


def _place(place: Place, postposition: str) -> str:
    return f"{noun_forms(place.noun)[2]} {postposition}".strip()


def _subject(c: Clause, subject: Phrase | None) -> str:
    if c.question == "subject":
        return "किसने" if c.tense == "past" and c.verb and c.verb.hi_ergative else "कौन"
    if subject is None:
        return ""
    if c.kind == "have":
        return marked(subject, "के पास")
    if c.modal == "must":
        return marked(subject, "को")
    if c.tense == "past" and c.verb and c.verb.hi_ergative:
        return marked(subject, "ने")
    return phrase(subject)


def _act(c: Clause, subject: Phrase | None, resumed: str) -> list[str]:
    assert c.verb
    obj = "क्या" if c.question == "object" else ""
    if c.object:
        marker = object_marker(c.verb, c.object)
        obj = marked(c.object, marker, subject) if marker else phrase(c.object, False, subject)
    light, *verb = _verb(c, c.verb, subject)
    who = resumed or _subject(c, subject)
    asked = c.question == "subject"
    return [
        "" if asked else who,
        c.time.hi if c.time else "",
        marked(c.companion, "के साथ", subject) if c.companion else "",
        _place(c.place, c.place.hi) if c.place else "",
        _place(c.goal, c.goal.hi_goal) if c.goal else "",
        marked(c.recipient, "को", subject) if c.recipient else "",
        obj,
        # Question words stand before the verb.
        who if asked else "कहाँ" if c.question == "place" else "",
        light,
        "नहीं" if c.negated else "",
        *verb,
    ]


def _be(c: Clause, subject: Phrase, resumed: str) -> list[str]:
    gender, many = subject.gender("hi"), _many(subject)
    auxiliary = AUXILIARY[4 if honorific(subject) else subject.person]
    if c.object:
        complement = phrase(c.object)
    elif c.adjective:
        complement = inflect(c.adjective.hi, gender, many)
        if c.compared:
            complement = f"{marked(c.compared, 'से')} ज़्यादा {complement}"
        elif c.intense:
            complement = "बहुत " + complement
    else:
        assert c.relation
        assert c.ground
        complement = marked(c.ground, c.relation.hi)
    return [
        resumed or phrase(subject),
        c.time.hi if c.time else "",
        complement,
        "नहीं" if c.negated else "",
        auxiliary,
    ]


def clause(c: Clause, subject: Phrase | None = None) -> str:
    """Realise a clause without its final mark; `subject` is that of a relative clause."""
    if c.weather:
        if c.tense == "future":
            return f"{c.time.hi if c.time else ''} {c.weather.hi_future}".strip()
        return c.weather.hi_now if c.tense == "progressive" else c.weather.hi
    if c.kind == "exist":
        assert c.object
        assert c.relation
        assert c.ground
        parts = [marked(c.ground, c.relation.hi), phrase(c.object), _is(c.object)]
    elif c.kind == "this":
        assert c.object
        parts = ["ये" if c.object.plural else "यह", phrase(c.object), _is(c.object)]
    elif c.kind == "command":
        parts = _command(c)
    else:
        resumed, start = "", ""
        told = c.subject or subject
        if c.subject and c.subject.relative:
            start, resumed = _correlative(c.subject, c.subject.relative), "वह"
        if c.kind == "have":
            assert c.object
            assert told
            negation = "नहीं" if c.negated else ""
            parts = [
                _subject(c, told),
                phrase(c.object, counted=not c.negated),
                negation,
                _is(c.object),
            ]
        elif c.kind == "be":
            assert told
            parts = [start, *_be(c, told, resumed)]
        elif c.subject is None and c.question != "subject":
            parts = _act(c, told, " ")[1:]
        else:
            parts = [start, *_act(c, told, resumed)]
    text = " ".join(part for part in parts if part)
    return f"क्या {text}" if c.question == "polar" else text


def _is(np: Phrase) -> str:
    return "हैं" if np.plural else "है"


def _correlative(np: Phrase, relative: Clause) -> str:
    """जो आदमी अस्पताल में काम करता है, ...: the relative clause comes first with its noun."""
    assert isinstance(np.head, Noun)
    return f"जो {np.head.hi} {clause(relative, np)},"


def _command(c: Clause) -> list[str]:
    assert c.verb
    assert c.object
    light, _, stem = c.verb.hi.rpartition(" ")
    marker = object_marker(c.verb, c.object)
    you = Phrase(YOU)
    return [
        "कृपया" if c.polite else "",
        marked(c.object, marker, you) if marker else phrase(c.object, False, you),
        light,
        "मत" if c.negated else "",
        imperative(stem),
    ]


def sentence(c: Clause) -> str:
    """Realise a whole sentence."""
    text = clause(c)
    if c.second:
        other = clause(c.second)
        match c.link:
            case "when":
                text = f"जब {other}, तब {text}"
            case "if":
                text = f"अगर {other}, तो {text}"
            case "because":
                text = f"{text} क्योंकि {other}"
            case "but":
                text = f"{text}, लेकिन {other}"
            case _:
                text = f"{text} और {other}"
    return text + ("?" if c.question else "!" if c.kind == "command" else "।")
