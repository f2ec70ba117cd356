"""The generated summaries and inferences, German, and the two constructed languages."""

import random
import re
from collections import Counter
from typing import NamedTuple

import pytest
from test_grammars import ADJECTIVE, PLACE, RELATION, TIME, act, n, name, the

from neft_core import corpus
from neft_core.corpus import constructed, grammar_de, grammar_en, inferences, summaries
from neft_core.corpus.meaning import Clause, Phrase, lexicon
from neft_core.corpus.sampler import Sampler
from neft_core.errors import NeftError

GERMAN = [
    (act(the("man"), "eat", the("apple", "a", "grand")), "Der Mann isst einen großen Apfel."),
    (act(name("Anna"), "buy", n(3, "hat", "rouge"), place=PLACE["market"]),
     "Anna kauft drei rote Hüte auf dem Markt."),
    (act(the("nurse"), "read", the("book", "the", "intéressant"), time=TIME["every evening"]),
     "Die Krankenschwester liest jeden Abend das interessante Buch."),
    (act(name("Paul"), "read", the("book", "a", "intéressant")),
     "Paul liest ein interessantes Buch."),
    (act(name("Paul"), "buy", the("hat", "a"), negated=True), "Paul kauft keinen Hut."),
    (act(name("Paul"), "buy", the("hat", "a", "vert"), negated=True),
     "Paul kauft keinen grünen Hut."),
    (act(the("child"), "play", place=PLACE["garden"], negated=True),
     "Das Kind spielt nicht im Garten."),
    (act(the("girl"), "help", the("student")), "Das Mädchen hilft dem Studenten."),
    (act(the("girl"), "help", the("boy"), negated=True), "Das Mädchen hilft dem Jungen nicht."),
    (act(name("Emma"), "wait for", the("guest"), negated=True), "Emma wartet nicht auf den Gast."),
    (act(Phrase(name("Marie").head, partner=the("teacher")), "see", the("elephant", "a")),
     "Marie und der Lehrer sehen einen Elefanten."),
    (act(name("Emma"), "draw", Phrase(the("tree").head, "more", None, 4)),
     "Emma zeichnet mehr als vier Bäume."),
    (act(name("Emma"), "see", the("car", "many", "cher")), "Emma sieht viele teure Autos."),
    (Clause("be", the("novel"), relation=RELATION["behind"], ground=the("tree", "the", "grand")),
     "Der Roman ist hinter dem großen Baum."),
    (Clause("be", the("cat"), adjective=ADJECTIVE["jeune"], compared=the("dog"), negated=True),
     "Die Katze ist nicht jünger als der Hund."),
    (Clause("be", name("Nina"), adjective=ADJECTIVE["riche"], intense=True),
     "Nina ist sehr reich."),
]  # fmt: skip


@pytest.mark.parametrize(("meaning", "text"), GERMAN, ids=[text for _, text in GERMAN])
def test_german_written_by_hand(meaning, text):
    assert grammar_de.sentence(meaning) == text


def test_german_weak_nouns_and_dative_plurals():
    boys = the("boy", "many")
    assert [grammar_de.phrase(boys, case) for case in grammar_de.CASES] == [
        "viele Jungen", "viele Jungen", "viele Jungen"
    ]  # fmt: skip
    assert grammar_de.phrase(n(2, "child"), "dative") == "zwei Kindern"
    assert grammar_de.phrase(n(2, "car"), "dative") == "zwei Autos"
    assert grammar_de.phrase(the("student"), "accusative") == "den Studenten"


def every_german_word():
    words = grammar_de.words()
    known = lexicon()
    by_part = (
        (words.nouns.keys() - {noun.en for noun in words.classes.values()}, known.nouns),
        (words.adjectives, known.adjectives),
        (words.verbs, known.verbs),
        (words.adverbs, known.adverbs),
        (words.relations, known.relations),
    )
    return [(set(german), {word.en for word in common}) for german, common in by_part]


def test_every_german_word_is_of_the_common_lexicon():
    for german, common in every_german_word():
        assert german <= common


@pytest.fixture(scope="module")
def inferred():
    return corpus.generate_inferences("en", seed=3, pretrain=100, train=3000, dev=90, test=900)


def accuracy(splits, text) -> float:
    """Of a classifier of bags of words, trained on train, on test."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(CountVectorizer(token_pattern=r"\S+"), LogisticRegression(max_iter=300))
    model.fit([text(r) for r in splits["train"]], [r["label"] for r in splits["train"]])
    return model.score([text(r) for r in splits["test"]], [r["label"] for r in splits["test"]])


def test_nothing_is_known_from_the_hypothesis_alone(inferred):
    # 900 rows: a standard deviation of 1.6 % around a third.
    assert accuracy(inferred, lambda row: row["hypothesis"]) < 0.333 + 3 * 0.016


def test_words_of_both_without_their_order_are_not_enough(inferred):
    def both(row):
        return " ".join(
            f"{key[0]}:{w}" for key in ("premise", "hypothesis") for w in row[key].split()
        )

    assert 0.45 < accuracy(inferred, both) < 0.7


def test_labels_are_balanced_also_within_each_rule(inferred):
    for rows in (inferred["train"], inferred["test"]):
        assert set(Counter(row["label"] for row in rows).values()) == {len(rows) // 3}
    found = Counter((row["rule"], row["label"]) for row in inferred["train"])
    assert len(found) == 3 * len(inferences.RULES)
    for rule in inferences.RULES:
        counts = [found[rule, label] for label in inferences.LABELS]
        assert max(counts) < 1.4 * min(counts), (rule, counts)


def test_no_text_of_inferences_occurs_twice(inferred):
    rows = [row for part in ("train", "dev", "test") for row in inferred[part]]
    texts = [row[key] for row in rows for key in ("premise", "hypothesis")]
    texts += [row["text"] for row in inferred["pretrain"]]
    assert len(set(texts)) == len(texts) == 2 * 3990 + 100


NUMBER = {word: number for number, word in enumerate(grammar_en.NUMBERS, 2)}


def test_labels_of_quantities_are_those_of_arithmetic(inferred):
    """The rule again, from the English text alone."""
    checked = Counter()
    for row in inferred["train"]:
        if row["rule"] != "quantity":
            continue
        found = re.fullmatch(r"(.*) (more|fewer) than (\w+) (.*)\.", row["hypothesis"])
        start, which, bound, what = found.groups()
        same = re.fullmatch(rf"{re.escape(start)} (\w+) (.*)\.", row["premise"])
        count = NUMBER.get(same[1])
        noun, told = what.split()[-1], same[2].split()[-1]
        assert noun == told or what.endswith(same[2]) or same[2].endswith(what)
        fits = count is not None and (count > NUMBER[bound]) == (which == "more")
        if count is None:  # many, a few
            expected = "neutral"
        elif same[2] == what:
            expected = "entailment" if fits else "contradiction"
        elif same[2].endswith(what):  # some of them, of which there are enough
            expected = "entailment" if fits and which == "more" else "?"
        else:
            expected = "neutral"  # a colour is asked for that isn't told
        assert row["label"] == expected, row
        checked[row["label"]] += 1
    assert min(checked.values()) > 150


def test_labels_of_comparisons_are_those_of_an_order(inferred):
    turned: dict[str, set[str]] = {}
    for one, two in inferences.OPPOSITES:
        forms = [
            next(a.en_comparative for a in reversed(lexicon().adjectives) if a.en == w)
            for w in (one, two)
        ]
        for this, other in (forms, forms[::-1]):
            turned.setdefault(this, {this}).add(other)
    pattern = re.compile(r"(.+?) is (not )?((?:more )?\w+) than (.+)\.")
    checked = Counter()
    for row in inferred["train"]:
        if row["rule"] != "comparison":
            continue
        hypothesis = pattern.fullmatch(row["hypothesis"].lower())
        premise = pattern.fullmatch(row["premise"].lower())
        if premise is None or premise[3] not in turned[hypothesis[3]]:
            expected = "neutral"
        else:
            swapped = premise[1] == hypothesis[4]
            opposite = premise[3] != hypothesis[3]
            agree = (swapped == opposite) != bool(hypothesis[2])
            expected = "entailment" if agree else "contradiction"
        assert row["label"] == expected, row
        checked[expected] += 1
    assert min(checked.values()) > 80


class Said(NamedTuple):
    """That something is so of someone, or isn't; each word more claims more."""

    so: bool
    whom: str
    claims: frozenset[str]


CONTRARY = (
    "young old", "new old", "rich poor", "happy sad", "big small", "heavy light", "clean dirty",
    "fast slow", "interesting boring", "on under", "behind before",
)  # fmt: skip
CONTRARY_TO = {
    word: {other for pair in CONTRARY if word in pair.split() for other in pair.split()} - {word}
    for words in CONTRARY
    for word in words.split()
}
NAMED = {"clothing": "garment", "furniture": "piece of furniture"}
"""Classes of nouns by other names than the lexicon's."""


def claims_of_being(text: str) -> set[str]:
    """Very rich; on the big table, which is the table."""
    place = re.fullmatch(r"(\w+) the (?:\w+ )?(\w+)", text.replace("in front of", "before"))
    if place:
        return {f"{place[1]} {place[2]}"}
    return {text, text.removeprefix("very ")}


def claims_of_doing(text: str) -> set[str]:
    """Often buys a red hat; plays in the garden every day; wait for the guest."""
    claims = set()
    for when in re.findall(r"^often |(?: every \w+)$", text):
        claims.add(when.strip())
        text = text.replace(when, "")
    where = re.search(r" (?:in|at) the \w+$", text)
    if where:
        claims.add(where[0].strip())
        text = text.removesuffix(where[0])
    verb, _, what = text.partition(" ")
    bases = {entry.en.split()[0] for entry in lexicon().verbs}
    ends = ((r"", ""), ("s$", ""), ("es$", ""), ("ies$", "y"))
    (base,) = {re.sub(end, stem, verb) for end, stem in ends} & bases
    claims.add(base)
    what = what.removeprefix("for ")
    thing = re.fullmatch(r"an? (?:(?!piece)(\w+) )?(\w+|piece of furniture)", what)
    if thing:
        adjective, noun = thing.groups()
        kinds = {entry.kind for entry in lexicon().nouns if entry.en == noun}
        claims |= {f"some {word}" for word in (adjective, noun) if word}
        claims |= {f"some {NAMED.get(kind, kind)}" for kind in kinds}
    elif what:
        claims.add(what)
    return claims


def said(text: str) -> list[Said]:
    """What an English sentence says of each of its subjects."""
    text = re.sub(r"^The ", "the ", text.removesuffix("."))
    name = r"[A-Z]\w+(?: [A-Z]\w+)?"
    thing = rf"(the (?:\w+ )?\w+|{name})"
    found = re.fullmatch(rf"{thing}(?: and {thing})? (?:is|are)( not)? (.+)", text)
    claims_of = claims_of_being
    if not found:
        person = rf"(the \w+|{name})"
        found = re.fullmatch(rf"{person}(?: and {person})?(?: (?:do|does)( not))? (.+)", text)
        claims_of = claims_of_doing
    *who, negated, rest = found.groups()
    claims = frozenset(claims_of(rest))
    # Which attribute "the" one has beside changes nothing of who it is.
    return [Said(not negated, re.sub(r"^the .* ", "the ", one), claims) for one in who if one]


def excluded(given: frozenset[str], asked: frozenset[str]) -> bool:
    """Whether not both can be so: rich and poor, on the table and under the table."""
    words = [claim.split(" ", 1) for claim in given]
    against = {" ".join([no, *rest]) for word, *rest in words for no in CONTRARY_TO.get(word, ())}
    return not against.isdisjoint(asked)


def judged(premise: str, hypothesis: str) -> str:
    """The label, from what both sentences say."""
    (asked,) = said(hypothesis)
    for given in said(premise):
        if given.whom != asked.whom:
            continue
        if given.so and given.claims >= asked.claims:
            return "entailment" if asked.so else "contradiction"
        if not given.so and given.claims <= asked.claims:
            return "contradiction" if asked.so else "entailment"
        if given.so and excluded(given.claims, asked.claims):
            return "contradiction" if asked.so else "entailment"
    return "neutral"


@pytest.mark.parametrize("rule", ["attribute", "place", "roles", "location", "quality"])
def test_labels_are_those_of_what_the_sentences_say(inferred, rule):
    """The rule again, from the English text alone."""
    checked = Counter()
    for row in inferred["train"]:
        if row["rule"] == rule:
            assert judged(row["premise"], row["hypothesis"]) == row["label"], row
            checked[row["label"]] += 1
    assert min(checked[label] for label in inferences.LABELS) > 50


def test_languages_of_inferences_are_parallel():
    splits = [
        corpus.generate_inferences(code, seed=4, pretrain=4, train=60, dev=9, test=30)
        for code in ("en", "fr", "de")
    ]
    for part in ("train", "dev", "test"):
        told = [[(row["label"], row["rule"]) for row in rows[part]] for rows in splits]
        assert told[0] == told[1] == told[2]
    assert len({rows["test"][0]["premise"] for rows in splits}) == 3
    more = corpus.generate_inferences("de", seed=4, pretrain=4, train=200, dev=9, test=30)
    assert more["train"][:60] == splits[2]["train"]
    assert all(more[part] == splits[2][part] for part in ("pretrain", "dev", "test"))


@pytest.fixture(scope="module")
def summarised():
    return {
        code: corpus.generate_summaries(
            code, target, seed=3, pretrain=50, train=400, dev=40, test=200
        )
        for code, target in (("en", "zh"), ("fr", "zh"), ("hi", "zh"), ("zh", "en"))
    }


def test_a_text_says_which_event_is_its_summary(summarised):
    """Found again from the text alone: the name that comes twice, by profession, and no more."""
    names = [one.en for one in lexicon().names]
    jobs = [noun.en for noun in lexicon().nouns if noun.kind == "job"]
    summaries_ = [row["target"] for row in summarised["zh"]["train"]]
    for row, summary in zip(summarised["en"]["train"], summaries_, strict=True):
        sentences = re.findall(r"[^.]+\.", row["source"])
        counts = {who: sum(who in one for one in sentences) for who in names}
        twice = [who for who, count in counts.items() if count == 2]
        assert len(twice) == 1, row
        assert sum(counts.values()) == 5
        (event,) = [s for s in sentences if twice[0] in s and not re.search(r" is (a|an) \w+\.", s)]
        (job,) = [j for s in sentences if twice[0] in s for j in jobs if s.endswith(f"is a {j}.")
                  or s.endswith(f"is an {j}.")]  # fmt: skip
        words = summary.rstrip(".").split()
        assert words[:2] == ["The", job]
        assert set(words[2:]) - {"a", "an"} <= set(event.rstrip(".").split()), (event, summary)


def test_no_sentence_of_a_text_is_its_summary_nor_does_their_order_tell(summarised):
    from neft_core.metrics import score_text

    rows = summarised["en"]["test"]
    gold = [[row["target"]] for row in summarised["zh"]["test"]]
    places = Counter()
    first = []
    for row, (summary,) in zip(rows, gold, strict=True):
        sentences = [one.strip() for one in re.findall(r"[^.]+\.", row["source"])]
        assert summary not in sentences
        first.append(sentences[0])
        who = next(w for w in (one.en for one in lexicon().names) if row["source"].count(w) == 2)
        places[[who in one for one in sentences].index(True)] += 1
    assert places[0] < 0.55 * len(rows)
    assert score_text(first, gold, "en", "summarisation")["rouge2"] < 25


def test_pairs_of_summaries_are_parallel_and_nothing_leaks(summarised):
    for part in ("train", "dev", "test"):
        targets = [[row["target"] for row in summarised[c][part]] for c in ("en", "fr", "hi")]
        assert targets[0] == targets[1] == targets[2]
    for splits in summarised.values():
        rows = [row for part in ("train", "dev", "test") for row in splits[part]]
        for side in ("source", "target"):
            assert len({row[side] for row in rows}) == len(rows)
        said = {row["target"] for row in rows}
        assert not said & {row["target"] for row in splits["pretrain"]}


def test_thousands_of_both_can_be_drawn():
    rng = random.Random(0)
    texts = {summaries.draw(Sampler(rng))[1] for _ in range(300)}
    assert len(texts) == 300
    splits = corpus.generate_summaries("fr", "hi", seed=1, pretrain=0, train=3000, dev=1, test=1)
    assert len(splits["train"]) == 3000


@pytest.mark.parametrize("language", ["qmi", "qbs"])
def test_constructed_languages_tell_apart_what_english_does(language):
    rng = random.Random(11)
    told = {}
    for _ in range(60):
        for construction in corpus.SIMPLE + corpus.HELD_OUT:
            row = corpus.sentence(construction, rng)
            assert told.setdefault(row[language], row["en"]) == row["en"]
            assert not re.search(r"  | [.,?!]|,,", row[language]), row[language]
    words = constructed._words(language)
    assert len(set(words.values())) == len(words)


def test_constructed_sentences_by_their_own_rules():
    """Verb first and unchanged in Tavi; endings for person, number and case in Besk."""
    words = constructed._words("qmi")
    one = act(name("Anna"), "read", the("book", "this"))
    verb, book = words["verb", "read"], words["noun", "book"]
    this, obj = words["particle", "this"], words["particle", "object"]
    assert constructed.tavi(one) == f"{verb.capitalize()} Anna {obj} {this} {book}."
    past = constructed.tavi(act(name("Anna"), "read", the("book", "this"), tense="past"))
    assert past == f"{words['particle', 'past'].capitalize()} {verb} Anna {obj} {this} {book}."

    words = constructed._words("qbs")
    stem, noun = words["verb", "help"], words["noun", "child"]
    gender = constructed._gender(the("child").head)
    nominative, accusative, plural = (constructed.NOUN[gender][i] for i in (0, 1, 4))
    told = constructed.besk(act(name("Anna"), "help", the("child")))
    assert told == f"Anna {stem}et {noun}{accusative}."
    turned = constructed.besk(act(the("child"), "help", name("Anna")))
    assert turned == f"{noun.capitalize()}{nominative} {stem}et Anna-u."
    many = constructed.besk(act(the("child", "these"), "help", name("Anna")))
    assert f"{noun}{plural} {stem}ut" in many


def test_constructed_languages_are_named_as_what_they_are():
    assert all("constructed" in corpus.LANGUAGES[code] for code in ("qmi", "qbs"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corpus.generate_inferences("hi", seed=1, pretrain=0, train=1, dev=1, test=1),
         "language 'hi' is unknown; choose from en, fr, de"),
        (lambda: corpus.generate_summaries("de", "zh", seed=1, pretrain=0, train=1, dev=1, test=1),
         "source language 'de' is unknown; choose from en, fr, zh, hi"),
        (lambda: corpus.generate_summaries("zh", "zh", seed=1, pretrain=0, train=1, dev=1, test=1),
         "source and target are both 'zh'; choose two languages"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, message):
    with pytest.raises(NeftError, match=re.escape(message)):
        call()
