"""Scores of generated text, each with the signature that names all that made it (sacrebleu)."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from neft_core.errors import NeftError

_CHINESE = {"chinese", "mandarin", "zh", "zho", "cmn"}


def score_text(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], language: str
) -> dict[str, float | str]:
    """Score hypotheses by every metric of `METRICS`.

    Args:
        hypotheses: generated texts; an empty one counts as such.
        references: for each hypothesis its gold texts, at least one, not always as many.
        language: name or code of the language they are in; it decides how BLEU makes words.

    Returns:
        For each metric its corpus score (0 to 100) under its name, and `<name>_signature`.

    Raises:
        NeftError: no hypotheses, another number of references, or none for a hypothesis.
    """
    streams = _streams(hypotheses, references)
    scores: dict[str, float | str] = {}
    for name, make in METRICS.items():
        metric = make(language)
        scores[name] = float(metric.corpus_score(list(hypotheses), streams).score)
        scores[f"{name}_signature"] = str(metric.get_signature())
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
    if metric not in METRICS:
        raise NeftError(f"metric: got '{metric}'; {', '.join(METRICS)}")
    if samples < 1:
        raise NeftError(f"samples: got {samples}; at least 1")
    scorer = METRICS[metric](language)
    system_stats = _statistics(scorer, hypotheses, references)
    baseline_stats = _statistics(scorer, baseline, references)
    score, base = (_score(scorer, stats) for stats in (system_stats, baseline_stats))

    draws = np.random.default_rng(seed).choice(len(hypotheses), (samples, len(hypotheses)))
    deltas = np.array(
        [_score(scorer, system_stats[i]) - _score(scorer, baseline_stats[i]) for i in draws]
    )
    distances = np.abs(deltas)
    exceeding = int(np.sum(distances - distances.mean() > abs(score - base)))
    deltas.sort()
    tail = samples // 40  # 2.5 % at each end

    signature = scorer.get_signature()
    signature.update("bs", samples)
    signature.update("seed", str(seed))
    return {
        "score": score,
        "baseline": base,
        "delta": score - base,
        "low": float(deltas[tail]),
        "high": float(deltas[samples - 1 - tail]),
        # No difference is no evidence, whatever the resamples (sacrebleu's count takes it for one).
        "p_value": 1.0 if score == base else (exceeding + 1) / (samples + 1),
        "signature": str(signature),
    }


def _bleu(language: str) -> Any:
    """BLEU: characters for Chinese, else sacrebleu's default words (13a).

    13a for Hindi too: it parts ASCII punctuation and spaces alone, so a danda stays with its word;
    the better `flores200` must be downloaded. Japanese and Korean words would need MeCab.
    """
    from sacrebleu.metrics import BLEU

    chinese = not _CHINESE.isdisjoint(re.findall("[a-z]+", language.lower()))
    # force: a space before a full stop is the model's own doing, and no cause for a notice.
    return BLEU(tokenize="zh" if chinese else "13a", force=True)


def _chrf(_language: str) -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


METRICS: dict[str, Callable[[str], Any]] = {"bleu": _bleu, "chrf": _chrf}


def _streams(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> list[list[str | None]]:
    """References as sacrebleu takes them: the first of every row, the second of every row, ..."""
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
    most = max(len(of_row) for of_row in references)
    return [
        [of_row[place] if place < len(of_row) else None for of_row in references]
        for place in range(most)
    ]


def _statistics(
    scorer: Any, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> npt.NDArray[np.float64]:
    """Counts of each row, whose sums make the score; float64, because float32 rounds large ones."""
    streams = _streams(hypotheses, references)
    return np.array(scorer._extract_corpus_statistics(list(hypotheses), streams), np.float64)


def _score(scorer: Any, stats: npt.NDArray[np.float64]) -> float:
    return float(scorer._compute_score_from_stats(stats.sum(0)).score)
