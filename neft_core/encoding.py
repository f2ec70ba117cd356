"""Rows to token ids, and which of them are trained.

Shapes: T = tokens of all rows one after another, N = rows.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neft_core.errors import NeftError
from neft_core.files import replacing
from neft_core.rows import Row, check_file
from neft_core.tasks import TASKS, Form, Piece

Arrays = dict[str, npt.NDArray[Any]]


class Encoded(NamedTuple):
    """Token ids of one row, and for each whether its loss counts."""

    ids: list[int]
    trained: list[bool]


def encode(row: Row, form: Form, tokenizer: Any) -> Encoded:
    """Encode a row for training: prompt, target and the tokens that end it.

    A beginning-of-sequence token comes first if the tokenizer has one and the text does not start
    with it. Trained are targets, or the assistant's turns, each with the token that ends it.

    Args:
        row: in the form that the task takes.
        form: the task and its prompt.
        tokenizer: of transformers, or alike.

    Raises:
        NeftError: the tokenizer has no end-of-sequence token or no chat template, or the template
            refuses the conversation or rewrites earlier turns.
    """
    encoded, _ = next(_encoded([row], form, tokenizer, "row"))
    return encoded


def encode_prompt(row: Row, form: Form, tokenizer: Any) -> list[int]:
    """Encode all that precedes the last trained piece: exactly the first ids of `encode`."""
    encoded, prompt = next(_encoded([row], form, tokenizer, "row"))
    return encoded.ids[:prompt]


def encode_split(
    rows: Sequence[Row],
    form: Form,
    tokenizer: Any,
    *,
    max_tokens: int,
    where: str,
    keep_long: bool = False,
) -> tuple[Arrays, dict[str, int]]:
    """Encode the rows of a split.

    Args:
        rows: the split.
        form: the task and its prompt.
        tokenizer: of transformers, or alike.
        max_tokens: the longest row, in tokens.
        where: the split's name or file, for messages.
        keep_long: keep rows with more than `max_tokens`, as evaluation needs all; only their
            prompts must fit.

    Returns:
        `tokens` int32 [T], `trained` uint8 [T] (1 where the loss counts), `offsets` int64 [N+1]
        (row i is `tokens[offsets[i]:offsets[i+1]]`), `prompts` int32 [N] (tokens of its prompt);
        and the counts `rows`, `too_long`, `kept`, `tokens`, `trained_tokens`, `longest`.

    Raises:
        NeftError: no row fits, a prompt does not where it must, or as `encode`.
    """
    kept: list[tuple[Encoded, int]] = []
    too_long = 0
    longest = 0
    for number, (encoded, prompt) in enumerate(_encoded(rows, form, tokenizer, where), 1):
        longest = max(longest, len(encoded.ids))
        too_long += len(encoded.ids) > max_tokens
        if keep_long and prompt > max_tokens:
            raise NeftError(
                f"{where} row {number}: its prompt has {prompt} tokens, max_tokens is "
                f"{max_tokens}; raise it or take the row out"
            )
        if keep_long or len(encoded.ids) <= max_tokens:
            kept.append((encoded, prompt))
    if not kept:
        raise NeftError(
            f"{where}: none of {len(rows)} rows fits into max_tokens {max_tokens} (longest: "
            f"{longest}); raise max_tokens or give shorter rows"
        )
    lengths = [len(encoded.ids) for encoded, _ in kept]
    arrays: Arrays = {
        "tokens": np.concatenate([np.array(encoded.ids, np.int32) for encoded, _ in kept]),
        "trained": np.concatenate([np.array(encoded.trained, np.uint8) for encoded, _ in kept]),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "prompts": np.array([prompt for _, prompt in kept], np.int32),
    }
    stats = {
        "rows": len(rows),
        "too_long": too_long,
        "kept": len(kept),
        "tokens": sum(lengths),
        "trained_tokens": int(arrays["trained"].sum()),
        "longest": longest,
    }
    return arrays, stats


def limit_sources(
    rows: Sequence[Row], tokenizer: Any, *, max_tokens: int, drop: bool, where: str
) -> tuple[list[Row], dict[str, int]]:
    """Hold the sources of rows to a length, the text around them in the prompt not counted.

    Args:
        rows: rows with a source.
        tokenizer: of transformers, a fast one.
        max_tokens: the longest source, in tokens.
        drop: leave longer rows out; else keep as much of their beginning as fits.
        where: the split's name or file, for messages.

    Returns:
        The rows, and how many sources were too long, as `dropped` or `truncated`.

    Raises:
        NeftError: no row is left, or the tokenizer can't tell where its tokens stand.
    """
    kept: list[Row] = []
    lengths = [len(ids) for ids in _tokenised([row["source"] for row in rows], tokenizer, False)]
    for row, length in zip(rows, lengths, strict=True):
        if length <= max_tokens:
            kept.append(row)
        elif not drop:
            kept.append(row | {"source": _beginning(row["source"], tokenizer, max_tokens)})
    if not kept:
        raise NeftError(
            f"{where}: none of {len(rows)} sources has at most max_input {max_tokens} tokens "
            f"(shortest: {min(lengths)}); raise max_input, or set long_inputs: truncate"
        )
    too_long = sum(length > max_tokens for length in lengths)
    return kept, {"dropped" if drop else "truncated": too_long}


def _beginning(text: str, tokenizer: Any, max_tokens: int) -> str:
    """As many whole characters of a text as make at most so many tokens."""
    if not tokenizer.is_fast:
        raise NeftError(
            "tokenizer: it can't tell where its tokens stand in a text; set long_inputs: drop"
        )
    count = max_tokens
    while True:
        found = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        if len(found["input_ids"]) <= max_tokens:
            return text.rstrip()
        # Where the first token left out begins; a cut word may make more tokens than the whole.
        text = text[: found["offset_mapping"][count][0]]
        count -= 1


def save_encoded(path: str | Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    """Write what `encode_split` made, the same bytes for the same content; whole or not at all.

    Args:
        path: a safetensors file.
        arrays: as `encode_split` returns them.
        metadata: of JSON values.
    """
    from safetensors.numpy import save

    # One key: safetensors writes several in an order that differs from process to process.
    content = save(arrays, metadata={"neft": json.dumps(metadata, sort_keys=True)})
    with replacing(Path(path)) as partial:
        partial.write_bytes(content)


def load_encoded(path: str | Path) -> tuple[Arrays, dict[str, Any]]:
    """Read what `save_encoded` wrote.

    Raises:
        NeftError: the file is missing, cut off, or something else.
    """
    from safetensors import SafetensorError, safe_open

    check_file(Path(path))
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = json.loads((file.metadata() or {}).get("neft", "{}"))
    except SafetensorError as error:
        raise NeftError(
            f"{path}: cut off or no safetensors file ({error}); run the stage that makes it"
        ) from error
    if set(arrays) != {"tokens", "trained", "offsets", "prompts"}:
        raise NeftError(
            f"{path}: holds {sorted(arrays)} and no encoded split; run the stage that makes it"
        )
    return arrays, metadata


def _encoded(
    rows: Sequence[Row], form: Form, tokenizer: Any, where: str
) -> Iterator[tuple[Encoded, int]]:
    """Encode rows with few calls to the tokenizer; with each its number of prompt tokens."""
    if tokenizer.eos_token_id is None:
        raise NeftError("tokenizer: it has no end-of-sequence token; answers could not end")
    of_rows = []
    for number, row in enumerate(rows, 1):
        try:
            of_rows.append(TASKS[form.task](row, form, tokenizer))
        except KeyError as error:
            raise NeftError(
                f"{where} row {number}: no {error}; rows of task '{form.task}' are needed"
            ) from error
    ids_of = _ids_of(of_rows, tokenizer)
    bos = tokenizer.bos_token_id
    for pieces in of_rows:
        ids: list[int] = []
        trained: list[bool] = []
        prompt = 0
        for place, piece in enumerate(pieces):
            if piece.trained:
                prompt = len(ids)
            new = next(ids_of)
            if place == 0 and bos is not None and new[:1] != [bos]:
                new = [bos, *new]
            if piece.closed:
                new = [*new, tokenizer.eos_token_id]
            ids += new
            trained += [piece.trained] * len(new)
        yield Encoded(ids, trained), prompt


def _ids_of(of_rows: list[list[Piece]], tokenizer: Any) -> Iterator[list[int]]:
    """Ids of each piece in order, special tokens parsed unless the piece is literal."""
    first = tokenizer.convert_ids_to_tokens(_tokenised(["a"], tokenizer, literal=True)[0][0])
    # Tokenizers of this kind put a space before every text: what follows brings none of its own.
    spaced = first.startswith(("▁", "Ġ"))
    texts: dict[bool, list[str]] = {True: [], False: []}
    for pieces in of_rows:
        for place, piece in enumerate(pieces):
            cut = spaced and place > 0 and piece.text.startswith(" ")
            texts[piece.literal].append(piece.text[cut:])
    ids = {literal: iter(_tokenised(part, tokenizer, literal)) for literal, part in texts.items()}
    for pieces in of_rows:
        for piece in pieces:
            yield next(ids[piece.literal])


def _tokenised(texts: list[str], tokenizer: Any, literal: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=literal,
        return_attention_mask=False,
        verbose=False,
    )
    return list(encoded["input_ids"])
