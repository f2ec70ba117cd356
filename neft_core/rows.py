"""What a row is, and rows on disk.

A row is one example, in one of these forms:

    translation, summarisation  {"source": str, "target": str, "references"?: [str, ...]}
    instruction                 {"messages": [{"role": "system|user|assistant", "content": str}]}
    nli                         {"premise": str, "hypothesis": str, "label": one of LABELS}
    text, for pre-training      {"text": str}

`references`, where present, are all accepted targets of a test row, the target among them. In what
evaluation writes, `hypothesis` is the model's answer: there an nli row has `source` and `target`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from neft_core.errors import NeftError
from neft_core.files import replacing

Row = dict[str, Any]

FIELDS = {
    "translation": ("source", "target"),
    "summarisation": ("source", "target"),
    "instruction": ("messages",),
    "nli": ("premise", "hypothesis", "label"),
    "text": ("text",),
}
"""What a row of each kind of task must have."""

LABELS = ("entailment", "neutral", "contradiction")
"""Whether a hypothesis follows from its premise, may be true beside it, or can't be."""


def checked_row(
    fields: Mapping[str, Any], where: str, names: Mapping[str, str | int] | None = None
) -> Row:
    """Take the fields of a row, refusing what is not one.

    A source that is a list of texts, such as sentences, is joined by spaces. A target that is a
    list gives the one to learn, and where there are more, the references.

    Args:
        fields: those of one of the forms, and perhaps `references`. Others are ignored.
        where: file and line, for the message.
        names: what the file calls the fields, for the message.

    Raises:
        NeftError: a text is missing, empty or no text; the turns are none, or out of order; a label
            is none of the three.
    """
    called = {ours: theirs for ours, theirs in (names or {}).items() if isinstance(theirs, str)}
    form = form_of(fields)
    if form == "instruction":
        row: Row = {"messages": _messages(fields["messages"], where)}
    else:
        given = dict(fields)
        if isinstance(given.get("target"), list) and given["target"]:
            if len(given["target"]) > 1:
                given.setdefault("references", given["target"])
            given["target"] = given["target"][0]
        parts = given.get("source")
        if isinstance(parts, list) and all(isinstance(one, str) for one in parts):
            given["source"] = " ".join(one.strip() for one in parts if one.strip())
        row = {name: _text(given.get(name), called.get(name, name), where) for name in FIELDS[form]}
        fields = given
    if form == "nli" and row["label"] not in LABELS:
        raise NeftError(
            f"{where}: '{called.get('label', 'label')}' is {row['label']!r}; "
            f"{', '.join(LABELS)} are the labels"
        )
    references = fields.get("references")
    if references is not None:
        if not isinstance(references, list) or not references:
            raise NeftError(f"{where}: 'references' is no list of texts; give at least one")
        row["references"] = [_text(one, "references", where) for one in references]
    return row


def form_of(fields: Mapping[str, Any]) -> str:
    """The kind of task whose row has these fields; a pair counts as translation."""
    if "messages" in fields:
        return "instruction"
    if "source" in fields or "target" in fields:
        return "translation"
    if "premise" in fields:
        return "nli"
    return "text" if "text" in fields else "translation"


def answers(row: Row) -> list[str]:
    """All that is accepted as an answer: first the one to learn, then the other references."""
    if "messages" not in row:
        first = row["label"] if "label" in row else row.get("target", "")
    else:
        first = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"][-1]
    return list(dict.fromkeys([first, *row.get("references", [])]))


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines, UTF-8, the same bytes for the same rows; whole or not at all."""
    with (
        replacing(Path(path)) as partial,
        open(partial, "w", encoding="utf-8", newline="\n") as file,
    ):
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")


def read_rows(path: str | Path) -> list[Row]:
    """Read what `write_rows` wrote, every key of it.

    Raises:
        NeftError: the file is missing, empty, cut off, or holds what is no row.
    """
    path = Path(path)
    rows = []
    for where, record in json_records(path, whole=True):
        rows.append(record | checked_row(record, where))
    if not rows:
        raise NeftError(f"{path}: the file is empty; run the stage that makes it")
    return rows


def json_records(path: Path, whole: bool = False) -> Iterator[tuple[str, Row]]:
    """Objects of a file of JSON lines, each with its file and line.

    Args:
        path: the file; blank lines are skipped.
        whole: refuse a last line without its newline, as a broken-off write leaves it.

    Raises:
        NeftError: the file is missing, not UTF-8, cut off, or not JSON lines.
    """
    for number, line in text_lines(path):
        where = f"{path}:{number}"
        if whole and not line.endswith("\n"):
            raise NeftError(f"{where}: the file is cut off here; run the stage that makes it")
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise NeftError(f"{where}: a JSON array; JSON lines are read, one object in each line")
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise NeftError(
                f"{where}: invalid JSON ({error.msg} at column {error.colno}); one object in each "
                "line is expected"
            ) from error
        except ValueError as error:  # Python reads 4,300 digits
            raise NeftError(
                f"{where}: invalid JSON (a number of too many digits); write it as text"
            ) from error
        except RecursionError as error:
            raise NeftError(f"{where}: JSON nested too deeply; plain objects are read") from error
        if not isinstance(record, dict):
            found = type(record).__name__
            raise NeftError(f"{where}: a JSON {found}; one object in each line is expected")
        yield where, record


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; only a newline ends one, so U+2028 and the like stay in text.

    Raises:
        NeftError: the file is missing, empty, or not UTF-8.
    """
    check_file(path)
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise NeftError(
                    f"{path}:{number}: invalid UTF-8 (byte 0x{raw[error.start]:02x} at position "
                    f"{error.start + 1} of the line); save the file as UTF-8"
                ) from error
            yield number, line


def check_file(path: Path) -> None:
    """Refuse a file that is not there, or has no content."""
    if not path.is_file():
        raise NeftError(
            f"{path}: no such file; name an existing one or run the stage that makes it"
        )
    if path.stat().st_size == 0:
        raise NeftError(f"{path}: the file is empty; at least one row is needed")


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        found = "missing" if value is None else f"of type {type(value).__name__}"
        raise NeftError(f"{where}: '{name}' is {found}; text is needed")
    if not value.strip():
        raise NeftError(f"{where}: '{name}' is empty; text is needed")
    check_pairs(value, name, where)
    return value


def check_pairs(text: str, name: str, where: str) -> None:
    """Refuse half a surrogate pair, as JSON can say it: no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NeftError(f"{where}: '{name}' holds half a surrogate pair; mend the text") from error


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise NeftError(f"{where}: 'messages' is no list of turns; [{{'role', 'content'}}, ...]")
    turns = []
    expected = ["system", "user"]
    for number, turn in enumerate(value):
        name = f"messages[{number}]"
        if not isinstance(turn, Mapping):
            raise NeftError(f"{where}: {name} is no object; give 'role' and 'content'")
        role = turn.get("role")
        if role not in expected:
            allowed = " or ".join(f"'{one}'" for one in expected)
            raise NeftError(f"{where}: {name}.role is {role!r}; {allowed} is expected here")
        turns.append(
            {"role": role, "content": _text(turn.get("content"), f"{name}.content", where)}
        )
        expected = ["assistant"] if role == "user" else ["user"]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise NeftError(f"{where}: 'messages' has no assistant turn; there is nothing to learn")
    return turns


def asked_and_answered(row: dict[str, Any]) -> dict[str, Any]:
    """What a test row asks, and its references: the form that hypotheses are kept in."""
    references = answers(row)
    asked = [turn["content"] for turn in row.get("messages", [])[:-1]]
    if "premise" in row:
        asked = [row["premise"], row["hypothesis"]]
    source = row["source"] if "source" in row else "\n".join(asked)
    return {"source": source, "target": references[0], "references": references}
