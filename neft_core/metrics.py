"""Scores of generated text, each with the signature that names all that made it.

BLEU and chrF by sacrebleu, ROUGE by rouge-score with words of our own (its tokenizer drops every
character that isn't ASCII), accuracy of labels.

Shapes: N = rows, S = numbers that a metric keeps of a row.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from neft_core.errors import NeftError

_CHINESE = {"chinese", "mandarin", "zh", "zho", "cmn"}

Statistics = npt.NDArray[np.float64]


class Scorer(Protocol):
    """A metric for texts of one language."""

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Statistics:
        """Numbers of each row, of which the score is made, [N, S]."""

    def score(self, statistics: Statistics) -> float:
        """The score of some rows, 0 to 100."""

    def signature(self, **more: object) -> str:
        """What made the score, after `statistics`; with more in it for a resampled one."""


def score_text(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str,
    task: str = "translation",
) -> dict[str, float | str]:
    """Score hypotheses by every metric of a kind of task.

    Args:
        hypotheses: generated texts; an empty one counts as such.
        references: for each hypothesis its gold texts, at least one, not always as many.
        language: name or code of the language they are in; it decides how BLEU makes words.
        task: a key of `OF_TASK`.

    Returns:
        For each metric its score (0 to 100) under its name, and `<name>_signature`.

    Raises:
        NeftError: no hypotheses, another number of references, or none for a hypothesis.
    """
    _check(hypotheses, references)
    scores: dict[str, float | str] = {}
    for name in OF_TASK[task]:
        scorer = METRICS[name](language)
        scores[name] = scorer.score(scorer.statistics(hypotheses, references))
        scores[f"{name}_signature"] = scorer.signature()
    return scores


def paired_bootstrap(
    hypotheses: Sequence[str],
    baseline: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str,
    samples: int = 1000,
    seed: int = 12345,
    metric: str = "bleu",
) -> dict[str, float | int | str]:
    """Test whether a system differs from a baseline, by paired bootstrap resampling.

    The draws, the two-sided p-value and the default seed are those of `sacrebleu --paired-bs`.
    Unlike it, the seed is an argument and not an environment variable, the interval is that of the
    difference, and systems with exactly the same score have p = 1 (there often 1 / 1001).

    Args:
        hypotheses: texts of the system.
        baseline: texts of the baseline, for the same rows.
        references: for each row its gold texts.
        language: as in `score_text`.
        samples: number of resamples.
        seed: of the resamples.
        metric: a key of `METRICS`.

    Returns:
        `score`, `baseline`, `delta` (score minus baseline), `low` and `high` (95 % interval of
        delta over the resamples), `p_value`, and the `signature` with samples and seed.

    Raises:
        NeftError: unknown metric, fewer than one resample, or as `score_text`.

    Source: Koehn 2004; sacrebleu 2.6.0, significance.py.
    """
    made_of = (references, language, samples, seed, metric)
    one, other = resampled(hypotheses, *made_of), resampled(baseline, *made_of)
    return {
        "score": one.score,
        "baseline": other.score,
        **difference(one, other),
        "signature": one.signature,
    }


class Resampled(NamedTuple):
    """A system's score, and those of resamples of its rows.

    Attributes:
        score: of all rows.
        draws: of each resample, [samples].
        signature: what made them, with their number and seed.
    """

    score: float
    draws: Statistics
    signature: str


def resampled(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str,
    samples: int = 1000,
    seed: int = 12345,
    metric: str = "bleu",
) -> Resampled:
    """One system's side of `paired_bootstrap`, whose arguments these are.

    Systems on as many rows are drawn alike; each need be drawn once to be compared with several.

    Raises:
        NeftError: as `paired_bootstrap`.
    """
    if metric not in METRICS:
        raise NeftError(f"metric: got '{metric}'; {', '.join(METRICS)}")
    if samples < 1:
        raise NeftError(f"samples: got {samples}; at least 1")
    _check(hypotheses, references)
    scorer = METRICS[metric](language)
    statistics = scorer.statistics(hypotheses, references)
    draws = np.random.default_rng(seed).choice(len(hypotheses), (samples, len(hypotheses)))
    scores = np.array([scorer.score(statistics[rows]) for rows in draws])
    signature = scorer.signature(bs=samples, seed=str(seed))
    return Resampled(scorer.score(statistics), scores, signature)


def difference(one: Resampled, other: Resampled) -> dict[str, float]:
    """`delta`, `low`, `high` and `p_value` of two systems that were drawn alike."""
    delta, deltas = one.score - other.score, one.draws - other.draws
    samples = len(deltas)
    distances = np.abs(deltas)
    exceeding = int(np.sum(distances - distances.mean() > abs(delta)))
    deltas.sort()
    tail = samples // 40  # 2.5 % at each end
    return {
        "delta": delta,
        "low": float(deltas[tail]),
        "high": float(deltas[samples - 1 - tail]),
        # No difference is no evidence, whatever the resamples (sacrebleu's count takes it for one).
        "p_value": 1.0 if delta == 0 else (exceeding + 1) / (samples + 1),
    }


def rouge_words(text: str) -> list[str]:
    """Words for ROUGE: the same for English as rouge-score's own, and right beyond it.

    Lower-cased runs of letters, digits and the marks that belong to them (accents, vowel signs of
    Devanagari); Chinese characters and Japanese kana each by itself, with its marks. Whatever else
    stands between parts words: apostrophe, hyphen, underscore, danda. Joiners inside a word vanish,
    and so do marks of what is no letter, such as an emoji's.
    """
    words: list[str] = []
    marked = within = False  # whether a mark, and whether a letter, would belong to the last word
    for char in unicodedata.normalize("NFC", text).lower():
        if char in _JOINERS:
            continue
        kind = unicodedata.category(char)[0]
        if kind == "M":
            if marked:
                words[-1] += char
            continue
        marked = kind in "LN"
        alone = _ALONE.match(char) is not None
        if marked and within and not alone:
            words[-1] += char
        elif marked:
            words.append(char)
        within = marked and not alone
    return words


_JOINERS = "\u200c\u200d"
# Written without spaces: Chinese characters with their two old ranges and later planes, kana.
_ALONE = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)


class _Sacrebleu:
    """A metric of sacrebleu, whose score is made of sums over rows."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Statistics:
        """Counts of each row; float64, because float32 rounds large sums."""
        most = max(len(of_row) for of_row in references)
        # As sacrebleu takes them: the first of every row, the second of every row, ...
        streams = [
            [of_row[place] if place < len(of_row) else None for of_row in references]
            for place in range(most)
        ]
        counts = self.metric._extract_corpus_statistics(list(hypotheses), streams)
        return np.array(counts, np.float64)

    def score(self, statistics: Statistics) -> float:
        return float(self.metric._compute_score_from_stats(statistics.sum(0)).score)

    def signature(self, **more: object) -> str:
        signature = self.metric.get_signature()
        for name, value in more.items():
            signature.update(name, value)
        return str(signature)


class _Mean:
    """A metric whose score is the mean of a value of each row."""

    def __init__(self, value: Callable[[str, Sequence[str]], float], made_by: str) -> None:
        self.value = value
        self.made_by = made_by
        self.references = "0"

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Statistics:
        counts = {len(of_row) for of_row in references}
        self.references = str(counts.pop()) if len(counts) == 1 else "var"
        rows = zip(hypotheses, references, strict=True)
        return np.array([[self.value(text, of_row)] for text, of_row in rows], np.float64)

    def score(self, statistics: Statistics) -> float:
        return float(100 * statistics.mean())

    def signature(self, **more: object) -> str:
        resampled = "".join(f"|{name}:{value}" for name, value in more.items())
        return f"nrefs:{self.references}{resampled}|{self.made_by}"


def _bleu(language: str) -> Scorer:
    """BLEU: characters for Chinese, else sacrebleu's default words (13a).

    13a for Hindi too: it parts ASCII punctuation and spaces alone, so a danda stays with its word;
    the better `flores200` must be downloaded. Japanese and Korean words would need MeCab.
    """
    from sacrebleu.metrics import BLEU

    chinese = not _CHINESE.isdisjoint(re.findall("[a-z]+", language.lower()))
    # force: a space before a full stop is the model's own doing, and no cause for a notice.
    return _Sacrebleu(BLEU(tokenize="zh" if chinese else "13a", force=True))


def _chrf(_language: str) -> Scorer:
    from sacrebleu.metrics import CHRF

    return _Sacrebleu(CHRF())


def _rouge(kind: str) -> Callable[[str], Scorer]:
    """F1 of words (`rouge1`), pairs of words (`rouge2`) or the longest common subsequence."""

    def make(_language: str) -> Scorer:
        from importlib.metadata import version

        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], tokenizer=_Words())

        def best(text: str, references: Sequence[str]) -> float:
            return float(scorer.score_multi(references, text)[kind].fmeasure)

        made_by = f"case:lc|tok:unicode|stem:no|f:1|agg:mean|version:{version('rouge-score')}"
        return _Mean(best, made_by)

    return make


class _Words:
    """`rouge_words` as rouge-score takes a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return rouge_words(text)


def _accuracy(_language: str) -> Scorer:
    def right(label: str, accepted: Sequence[str]) -> float:
        return float(label in accepted)

    return _Mean(right, "choice:log-likelihood|length:sum")


METRICS: dict[str, Callable[[str], Scorer]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "accuracy": _accuracy,
}

TITLES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "accuracy": "accuracy",
}
"""Names for people, in the order of the result table."""

OF_TASK = {
    "translation": ("bleu", "chrf"),
    "instruction": ("bleu", "chrf"),
    "summarisation": ("rougeL", "rouge1", "rouge2"),
    "nli": ("accuracy",),
}
"""Metrics of each kind of task; significance is tested on the first."""


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not hypotheses:
        raise NeftError("hypotheses: none; at least one is needed for a score")
    if len(hypotheses) != len(references):
        raise NeftError(
            f"hypotheses: {len(hypotheses)} for {len(references)} rows of references; as many are "
            "needed"
        )
    for number, of_row in enumerate(references, 1):
        if isinstance(of_row, str) or not of_row:
            raise NeftError(f"references row {number}: got {of_row!r}; a list of one or more texts")
