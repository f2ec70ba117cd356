import json
import math
import os
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from neft_core.errors import NeftError
from neft_core.metrics import METRICS, OF_TASK, paired_bootstrap, rouge_words, score_text
from neft_core.rows import answers, read_rows

WORDS = [
    "le",
    "la",
    "un",
    "une",
    "chat",
    "chien",
    "maison",
    "est",
    "sont",
    "grand",
    "petit",
    "dort",
    "mange",
    "vite",
    ",",
    ".",
    "très",
    "bien",
]


def sentences(count, seed):
    pick = random.Random(seed)
    return [" ".join(pick.choices(WORDS, k=pick.randint(4, 14))) for _ in range(count)]


def spoiled(texts, share, seed):
    """Texts in which a share of the words is replaced."""
    pick = random.Random(seed)
    return [
        " ".join(pick.choice(WORDS) if pick.random() < share else w for w in text.split())
        for text in texts
    ]


GOLD = sentences(80, 1)
GOOD = spoiled(GOLD, 0.25, 2)
BAD = spoiled(GOLD, 0.32, 3)
ONE = [[text] for text in GOLD]
TWO = [[text, other] for text, other in zip(GOLD, spoiled(GOLD, 0.1, 4), strict=True)]


def sacrebleu(tmp_path, references, systems, *options, env=None):
    """What sacrebleu's own command line says of the same texts."""
    files = {}
    for kind, texts in (("ref", references), ("sys", systems)):
        files[kind] = []
        for number, lines in enumerate(texts):
            path = tmp_path / f"{kind}{number}"
            path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
            files[kind].append(str(path))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sacrebleu", *files["ref"], "-i", *files["sys"], *options),
            *("-f", "json", "-w", "9", "--force"),
        ],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_scores_and_signatures_are_those_of_the_command_line(tmp_path):
    ours = score_text(GOOD, TWO, "French")
    theirs = sacrebleu(tmp_path, zip(*TWO, strict=True), [GOOD], "-m", "bleu", "chrf")
    assert [one["name"] for one in theirs] == ["BLEU", "chrF2"]
    for name, one in zip(OF_TASK["translation"], theirs, strict=True):
        assert ours[name] == pytest.approx(one["score"], abs=1e-8)
        assert ours[f"{name}_signature"] == one["signature"]
    assert ours["bleu_signature"] == ("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0")


@pytest.mark.parametrize("seed", [12345, 7])
def test_paired_bootstrap_is_that_of_the_command_line(tmp_path, seed):
    close = spoiled(GOLD, 0.27, 5)
    ours = paired_bootstrap(close, GOOD, ONE, "French", seed=seed)
    theirs = sacrebleu(
        tmp_path, [GOLD], [GOOD, close], "--paired-bs", env={"SACREBLEU_SEED": str(seed)}
    )
    base, system = (one["BLEU"] for one in theirs)
    assert ours["baseline"] == pytest.approx(base["score"], abs=1e-6)
    assert ours["score"] == pytest.approx(system["score"], abs=1e-6)
    assert ours["p_value"] == pytest.approx(system["p_value"], abs=1e-6)
    assert 0.01 < ours["p_value"] < 1
    assert f"|bs:1000|seed:{seed}|" in ours["signature"]


def test_hand_values_of_bleu():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 fours, no brevity penalty.
    scores = score_text(["a b c d x f"], [["a b c d e f"]], "en")
    expected = 100 * math.exp(sum(map(math.log, (5 / 6, 3 / 5, 2 / 4, 1 / 3))) / 4)
    assert scores["bleu"] == pytest.approx(expected)
    # All words right and two missing: only the brevity penalty exp(1 - 6/4).
    scores = score_text(["a b c d"], [["a b c d e f"]], "en")
    assert scores["bleu"] == pytest.approx(100 * math.exp(-0.5))
    assert score_text(GOLD, ONE, "fr")["bleu"] == pytest.approx(100)
    assert score_text(GOLD, ONE, "fr")["chrf"] == pytest.approx(100)


def test_rows_may_have_different_numbers_of_references():
    hypotheses = ["the cat sat on the mat", "it is four"]
    references = [["a cat sat on a mat", "the cat sat on the mat"], ["it is four"]]
    scores = score_text(hypotheses, references, "en")
    assert scores["bleu"] == pytest.approx(100)
    assert scores["chrf"] == pytest.approx(100)
    assert "nrefs:var|" in scores["bleu_signature"]
    # The row without a second reference must be as if it stood alone, not beside an empty one:
    # the closest length would be 0 and the short hypothesis would pass unpunished.
    hypotheses, references = ["a b c d"], [["a b c d e f"]]
    alone = score_text(hypotheses, references, "en")["bleu"]
    more = score_text([*hypotheses, "x y z w"], [*references, ["x y z w", "x y z w v"]], "en")
    assert alone == pytest.approx(100 * math.exp(1 - 6 / 4))
    assert more["bleu"] == pytest.approx(100 * math.exp(1 - 10 / 8))


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [
        *((name, "zh") for name in ("Chinese", "zh", "zh-CN", "Simplified Chinese", "cmn_Hans")),
        *((name, "13a") for name in ("French", "hi", "Japanese", "")),
    ],
)
def test_chinese_is_scored_by_characters(language, tokenizer):
    scores = score_text(["我今天很高兴。"], [["我今天很不高兴。"]], language)
    assert f"|tok:{tokenizer}|" in scores["bleu_signature"]
    assert (scores["bleu"] > 40) == (tokenizer == "zh")


def test_hindi_words_are_told_apart():
    scores = score_text(["वह आज घर नहीं जाएगा।"], [["वह आज घर नहीं आएगा।"]], "Hindi")
    assert scores["bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


TEXT_METRICS = [name for name in METRICS if name != "accuracy"]


@pytest.mark.parametrize("metric", TEXT_METRICS)
def test_paired_bootstrap_tells_better_from_worse(metric):
    ours = paired_bootstrap(GOOD, spoiled(GOLD, 0.6, 9), ONE, "fr", samples=200, metric=metric)
    assert ours["p_value"] < 0.05
    assert 0 < ours["low"] < ours["delta"] < ours["high"]
    turned = paired_bootstrap(spoiled(GOLD, 0.6, 9), GOOD, ONE, "fr", samples=200, metric=metric)
    assert turned["p_value"] == ours["p_value"]
    assert [turned[key] for key in ("delta", "low", "high")] == pytest.approx(
        [-ours["delta"], -ours["high"], -ours["low"]]
    )
    assert ours["delta"] == pytest.approx(ours["score"] - ours["baseline"])
    task = "summarisation" if "rouge" in metric else "translation"
    assert ours["score"] == pytest.approx(score_text(GOOD, ONE, "fr", task)[metric])


def test_the_interval_holds_the_middle_95_percent_of_the_resampled_differences():
    from sacrebleu.metrics import BLEU

    ours = paired_bootstrap(GOOD, BAD, ONE, "fr", samples=80, seed=3)
    deltas = []
    for draw in np.random.default_rng(3).choice(len(GOLD), (80, len(GOLD))):
        gold = [[GOLD[i] for i in draw]]
        good, bad = (BLEU().corpus_score([s[i] for i in draw], gold).score for s in (GOOD, BAD))
        deltas.append(good - bad)
    deltas.sort()
    assert [ours["low"], ours["high"]] == pytest.approx([deltas[2], deltas[-3]], abs=1e-9)


def test_a_system_against_itself_is_no_difference():
    ours = paired_bootstrap(GOOD, list(GOOD), TWO, "fr", samples=100)
    assert (ours["delta"], ours["low"], ours["high"], ours["p_value"]) == (0, 0, 0, 1)


def test_equal_scores_of_different_texts_are_no_difference():
    ours = paired_bootstrap(["qqq"] * len(GOLD), ["www zzz"] * len(GOLD), ONE, "fr", samples=100)
    assert (ours["score"], ours["baseline"], ours["p_value"]) == (0, 0, 1)


@pytest.mark.parametrize("language", ["French", "Chinese"])
def test_empty_hypotheses_score_nothing_and_say_nothing(language, capfd, caplog):
    empty = [""] * len(GOLD)
    scores = score_text(empty, ONE, language)
    assert (scores["bleu"], scores["chrf"]) == (0, 0)
    ours = paired_bootstrap(empty, empty, ONE, language, samples=50)
    assert (ours["delta"], ours["p_value"]) == (0, 1)
    assert paired_bootstrap(GOOD, empty, ONE, language, samples=50)["p_value"] < 0.05
    assert paired_bootstrap(GOOD, ["", *BAD[1:]], ONE, language, samples=50)["delta"] > 0
    score_text(["a b ."] * 200, [["a b."]] * 200, language)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_neither_environment_nor_earlier_calls_change_a_result(monkeypatch):
    first = paired_bootstrap(GOOD, BAD, ONE, "fr", samples=100)
    monkeypatch.setenv("SACREBLEU_SEED", "none")
    assert paired_bootstrap(GOOD, BAD, ONE, "fr", samples=100) == first
    assert paired_bootstrap(GOOD, BAD, ONE, "fr", samples=100, seed=0) == paired_bootstrap(
        GOOD, BAD, ONE, "fr", samples=100, seed=0
    )
    assert paired_bootstrap(GOOD, BAD, ONE, "fr", samples=100, seed=0) != first


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: score_text([], [], "fr"), "hypotheses: none"),
        (lambda: paired_bootstrap([], [], [], "fr"), "hypotheses: none"),
        (lambda: score_text(GOOD, ONE[1:], "fr"), "80 for 79 rows of references"),
        (lambda: paired_bootstrap(GOOD, BAD[1:], ONE, "fr"), "79 for 80 rows of references"),
        (lambda: score_text(["a", "b"], [["a"], []], "fr"), r"references row 2: got \[\]"),
        (lambda: score_text(["a"], ["a"], "fr"), "references row 1: got 'a'"),
        (
            lambda: paired_bootstrap(GOOD, BAD, ONE, "fr", metric="ter"),
            "got 'ter'; bleu, chrf, rouge1",
        ),
        (lambda: paired_bootstrap(GOOD, BAD, ONE, "fr", samples=0), "samples: got 0"),
    ],
)
def test_faults_are_one_line(call, text):
    with pytest.raises(NeftError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


# Counted by hand: matches / words of the hypothesis and of the reference, then pairs, then the
# longest common subsequence; F1 = 2 * matches / (words of both).
ROUGE_BY_HAND = [
    ("我今天很高兴。", "我今天不高兴。", (5, 6, 6), (3, 5, 5), (5, 6, 6)),
    ("北京北京", "北京大学在北京", (4, 4, 7), (2, 3, 6), (4, 4, 7)),
    ("2019年iPhone发布", "iPhone 于2019年发布！", (5, 5, 6), (2, 4, 5), (4, 5, 6)),
    ("वह आज घर नहीं जाएगा।", "वह आज घर नहीं आएगा।", (4, 5, 5), (3, 4, 4), (4, 5, 5)),
    ("लड़की किताब पढ़ती है", "लड़की एक किताब पढ़ती है।", (4, 4, 5), (2, 3, 4), (4, 4, 5)),
    ("L'été dernier, l'élève a réussi.", "L'élève a réussi l'été dernier.",
     (7, 7, 7), (5, 6, 6), (4, 7, 7)),
    ("la cote est la", "la côte est là", (2, 4, 4), (0, 3, 3), (2, 4, 4)),
    ("Über die Straße", "über die Brücke", (2, 3, 3), (1, 2, 2), (2, 3, 3)),
    ("the cat the cat", "the cat", (2, 4, 2), (1, 3, 1), (2, 4, 2)),
    ("", "गाना", (0, 0, 1), (0, 0, 0), (0, 0, 1)),
    ("。！", "你好", (0, 0, 2), (0, 0, 1), (0, 0, 2)),
    ("I \u2764\ufe0f cats", "I like cats", (2, 2, 3), (0, 1, 2), (2, 2, 3)),
    ("ग\u0302\u2764\ufe0f घर", "घर", (1, 2, 1), (0, 1, 0), (1, 2, 1)),
    ("葛\U000e0100城", "葛\U000e0100市", (1, 2, 2), (0, 1, 1), (1, 2, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("hypothesis", "reference", "one", "two", "longest"), ROUGE_BY_HAND)
def test_rouge_by_hand(hypothesis, reference, one, two, longest):
    scores = score_text([hypothesis], [[reference]], "any", "summarisation")
    for name, (matches, ours, theirs) in (("rouge1", one), ("rouge2", two), ("rougeL", longest)):
        expected = 200 * matches / (ours + theirs) if matches else 0
        assert scores[name] == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't re-use snake_case!", ["don", "t", "re", "use", "snake", "case"]),
        ("ज़्यादा ज़ोर से", ["ज़्यादा", "ज़ोर", "से"]),
        ("क्\u200dया\u200c", ["क्या"]),
        ("e\u0301te\u0301", ["été"]),
        ("カタカナと漢字々", list("カタカナと漢字々")),
        ("한국어 단어", ["한국어", "단어"]),
        ("５０％ 𠮷野", ["５０", "𠮷", "野"]),
        ("so \u2764\ufe0f good\u2600\ufe0f", ["so", "good"]),
        ("\u0301a -\u0301b", ["a", "b"]),
        ("葛\U000e0100城x\u0302y", ["葛\U000e0100", "城", "x\u0302y"]),
        ("カ\u309aキ", ["カ\u309a", "キ"]),
        ("1\ufe0f\u20e3 葛\u200d\U000e0100", ["1\ufe0f\u20e3", "葛\U000e0100"]),
    ],
)
def test_words_of_rouge(text, words):
    assert rouge_words(text) == [unicodedata.normalize("NFC", word) for word in words]


def test_rouge_of_english_is_rouge_scores_own():
    from rouge_score.rouge_scorer import RougeScorer

    pick = random.Random(5)
    words = [
        "Don't",
        "over-fit",
        "the",
        "cat",
        "3,000",
        "U.S.",
        "naive_bayes",
        "(sat)",
        "a",
        "\u2014",
        "\u2764\ufe0f",
    ]
    kinds = ["rouge1", "rouge2", "rougeL"]
    theirs = RougeScorer(kinds)
    for _ in range(200):
        text, gold = (" ".join(pick.choices(words, k=pick.randint(1, 15))) for _ in "ab")
        ours = score_text([text], [[gold]], "English", "summarisation")
        expected = theirs.score(gold, text)
        assert [ours[k] for k in kinds] == [100 * expected[k].fmeasure for k in kinds]


def test_rouge_takes_the_best_reference_and_the_mean_of_rows():
    hypotheses, references = ["a b", "c d"], [["x", "a b", "a"], ["c e"]]
    scores = score_text(hypotheses, references, "en", "summarisation")
    assert scores["rouge1"] == pytest.approx((100 + 50) / 2)
    assert scores["rougeL_signature"] == (
        "nrefs:var|case:lc|tok:unicode|stem:no|f:1|agg:mean|version:0.1.2"
    )


def test_paired_bootstrap_of_a_mean_by_its_definition():
    labels = ["entailment", "neutral", "contradiction"]
    pick = random.Random(8)
    gold = [pick.choice(labels) for _ in range(60)]
    mine, other = ([g if pick.random() < p else "neutral" for g in gold] for p in (0.9, 0.5))
    ours = paired_bootstrap(mine, other, [[g] for g in gold], "fr", 500, 3, "accuracy")
    right = np.array([[m == g, o == g] for m, o, g in zip(mine, other, gold, strict=True)], float)
    draws = right[np.random.default_rng(3).choice(60, (500, 60))].mean(1) * 100
    deltas = np.sort(draws[:, 0] - draws[:, 1])
    assert ours["delta"] == pytest.approx(100 * (right[:, 0].mean() - right[:, 1].mean()))
    assert [ours["low"], ours["high"]] == pytest.approx([deltas[12], deltas[487]])
    assert ours["p_value"] < 0.05
    assert ours["signature"] == (
        "nrefs:1|bs:500|seed:3|choice:log-likelihood|length:sum"
    )  # fmt: skip
    assert score_text(mine, [[g] for g in gold], "fr", "nli")["accuracy"] == ours["score"]


def test_real_references_score_full(shared):
    rows = read_rows(shared / "data" / "tatoeba-en-fr" / "test.jsonl")[:200]
    scores = score_text(
        [row["references"][-1] for row in rows], [answers(r) for r in rows], "French"
    )
    assert scores["bleu"] == pytest.approx(100)
    assert "nrefs:var|" in scores["bleu_signature"]
