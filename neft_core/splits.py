"""From raw rows to the splits that are trained and measured on, without leakage between them.

What a row asks (its source) and what it answers (its target) is compared as text, after Unicode
normalisation. For conversations the source is every turn before an answer. For nli it is
premise and hypothesis, and a premise stays in one split.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from typing import Any

from neft_core.errors import NeftError
from neft_core.rows import Row, answers

NAMES = ("test", "dev", "train", "pretrain")  # an earlier one keeps what a later one loses
Stats = dict[str, dict[str, int]]


def split_rows(
    rows_by_split: Mapping[str, list[Row]],
    *,
    train: int | None = None,
    dev: int | None = None,
    test: int | None = None,
    pretrain: int | None = None,
    skip: int = 0,
    seed: int,
    whole: bool = False,
) -> tuple[dict[str, list[Row]], Stats]:
    """Make clean splits: normalised, without duplicates, without leakage, within limits.

    Given splits are kept. A missing `test` or `dev` is cut from the pool, which is `all`, or
    `train` where it is given: sources, each with all its targets, in the order of a seeded hash
    of the source. What remains is `train`. `test` may also be all that there is.

    Then, in each split: texts are stripped and brought to Unicode NFC; a row whose source and
    target both occurred is dropped; rows of `test` with one source become one row with several
    `references`; rows of `dev` that share a source or target with `test` are dropped, and so are
    rows of `train` and `pretrain` that share one with `test` or `dev`. Conversations count as
    leaked by what is asked alone, because short answers ("Yes.") are shared by right.

    A limit keeps the rows that come first in the order of a seeded hash of their text, in the
    order of the file. So a bigger limit contains the smaller one, and rows that come or go
    elsewhere in the file do not reshuffle the sample. Of `train`, `skip` leaves out the first in
    that order: with the limit of another sample, the two share no row.

    Args:
        rows_by_split: rows under `train`, `dev`, `test`, `pretrain`, or under `all`.
        train: at most so many rows; None keeps all.
        dev: as `train`; needed where it is cut from the pool.
        test: as `dev`, counted in distinct sources.
        pretrain: as `train`.
        skip: training rows that are left out before `train` counts.
        seed: of the hash.
        whole: only `pretrain` is held to its limit: who drops rows of the others afterwards calls
            `sample` then, so that as many remain as are asked for. What is cut from the pool is
            cut as ever.

    Returns:
        The rows of each split, and for each split the counts `read`, `duplicates`, `merged` (into
        another's references), `leaked`, `over_limit` and `kept`; the first is the sum of the rest.

    Raises:
        NeftError: unknown split, no pool to cut from, a pool too small, or a split left empty.
    """
    limits = {"train": train, "dev": dev, "test": test, "pretrain": pretrain}
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise NeftError(f"split '{name}': limit is {limit}; at least 1, or none")
    given = {name: [_normalised(row) for row in rows] for name, rows in rows_by_split.items()}
    splits = _complete(given, limits, seed)

    stats: Stats = {}
    held_sources: set[str] = set()
    held_targets: set[str] = set()
    for name in [name for name in NAMES if name in splits]:
        read = splits[name]
        first: dict[tuple[str, str], Row] = {}
        for row in read:
            first.setdefault((_asked(row)[-1], answers(row)[0]), row)
        unique = list(first.values())
        merged = _merged(unique) if name == "test" else unique
        clean = [row for row in merged if not _leaks(row, held_sources, held_targets)]
        kept = clean
        if not whole or name == "pretrain":
            kept = sample(clean, limits[name], seed, skip if name == "train" else 0)
        stats[name] = {
            "read": len(read),
            "duplicates": len(read) - len(unique),
            "merged": len(unique) - len(merged),
            "leaked": len(merged) - len(clean),
            "over_limit": len(clean) - len(kept),
            "kept": len(kept),
        }
        if not kept:
            counts = ", ".join(f"{count} {kind}" for kind, count in stats[name].items())
            raise NeftError(
                f"split '{name}': no rows left ({counts}); give rows that are not in test or dev"
            )
        splits[name] = kept
        if name in ("test", "dev"):
            held_sources.update(text for row in kept for text in _held(row))
            held_targets.update(target for row in kept for target in answers(row))
    return splits, stats


def _complete(
    given: Mapping[str, list[Row]], limits: Mapping[str, int | None], seed: int
) -> dict[str, list[Row]]:
    """Cut what is missing from the pool; splits come in the order of `NAMES`."""
    for name in given:
        if name not in (*NAMES, "all"):
            raise NeftError(f"split '{name}': unknown; train, dev, test, pretrain, or all")
    if set(given) == {"test"}:
        return dict(given)
    if ("all" in given) == ("train" in given):
        raise NeftError(f"splits {sorted(given)}: give either 'train' or 'all', and not both")
    splits = {name: rows for name, rows in given.items() if name != "all"}
    pool = given.get("all", given.get("train", []))
    groups: dict[str, list[Row]] = {}
    for row in pool:
        groups.setdefault(_together(row), []).append(row)
    order = sorted(groups, key=lambda source: _rank(seed, source))
    for name in ("test", "dev"):
        if name in splits:
            continue
        size = limits[name]
        if size is None:
            raise NeftError(f"split '{name}': not given and no size; say how many to cut")
        taken: dict[str, int] = {}
        for source in order:
            if sum(taken.values()) >= size:
                break
            rows = {(_asked(row)[-1], answers(row)[0]) for row in groups[source]}
            taken[source] = len({asked for asked, _ in rows} if name == "test" else rows)
        if len(taken) == len(order):
            raise NeftError(
                f"split '{name}': {size} cannot be cut from {len(order)} sources and leave any "
                "for train; ask for fewer or give more rows"
            )
        splits[name] = [row for row in pool if _together(row) in taken]
        order = order[len(taken) :]
    left = set(order)
    splits["train"] = [row for row in pool if _together(row) in left]
    return {name: splits[name] for name in NAMES if name in splits}


def _normalised(row: Row) -> Row:
    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return unicodedata.normalize("NFC", value).strip()
        if isinstance(value, list):
            return [clean(one) for one in value]
        if isinstance(value, dict):
            return {key: clean(one) for key, one in value.items()}
        return value

    return {key: clean(value) for key, value in row.items()}


def _asked(row: Row) -> list[str]:
    """The source; of a conversation, what stood before each answer; of nli, the premise too."""
    if "source" in row:
        return [row["source"]]
    if "premise" in row:
        return [row["premise"], f"{row['premise']}\n{row['hypothesis']}"]
    if "text" in row:
        return [row["text"]]
    turns = row["messages"]
    return [
        json.dumps([(turn["role"], turn["content"]) for turn in turns[:number]])
        for number, turn in enumerate(turns)
        if turn["role"] == "assistant"
    ]


def _together(row: Row) -> str:
    """What rows of one split share: the whole source, or the premise."""
    return row["premise"] if "premise" in row else _asked(row)[-1]


def _held(row: Row) -> list[str]:
    """What no other split may ask."""
    return _asked(row) if "premise" in row else _asked(row)[-1:]


def _merged(rows: list[Row]) -> list[Row]:
    by_source: dict[str, Row] = {}
    for row in rows:
        first = by_source.setdefault(_asked(row)[-1], row)
        if first is not row:
            references = list(dict.fromkeys(answers(first) + answers(row)))
            by_source[_asked(row)[-1]] = {**first, "references": references}
    return list(by_source.values())


def _leaks(row: Row, sources: set[str], targets: set[str]) -> bool:
    if any(source in sources for source in _asked(row)):
        return True
    return "target" in row and any(target in targets for target in answers(row))


def sample(rows: list[Row], limit: int | None, seed: int, skip: int = 0) -> list[Row]:
    """At most `limit` rows after the first `skip` in the order of a seeded hash, as they stood."""
    if not skip and (limit is None or limit >= len(rows)):
        return rows
    ranks = [_rank(seed, _asked(row)[-1], answers(row)[0]) for row in rows]
    kept = sorted(range(len(rows)), key=ranks.__getitem__)[skip:][:limit]
    return [rows[index] for index in sorted(kept)]


def _rank(seed: int, *texts: str) -> bytes:
    return hashlib.blake2b(repr((seed, *texts)).encode(), digest_size=16).digest()
