"""What a row is, and rows on disk.

A row is one example, in one of two forms:

    translation  {"source": str, "target": str, "references"?: [str, ...]}
    instruction  {"messages": [{"role": "system|user|assistant", "content": str}, ...]}

`references`, where present, are all accepted targets of a test row, the target among them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from neft_core.errors import NeftError
from neft_core.files import replacing

Row = dict[str, Any]


def checked_row(fields: Mapping[str, Any], where: str) -> Row:
    """Take the fields of a row, refusing what is not one.

    Args:
        fields: `source`, `target` and perhaps `references`; or `messages`. Others are ignored.
        where: file and line, for the message.

    Raises:
        NeftError: a text is missing, empty or no text; the turns are none, or out of order.
    """
    if "messages" in fields:
        row: Row = {"messages": _messages(fields["messages"], where)}
    else:
        row = {name: _text(fields.get(name), name, where) for name in ("source", "target")}
    references = fields.get("references")
    if references is not None:
        if not isinstance(references, list) or not references:
            raise NeftError(f"{where}: 'references' is no list of texts; give at least one")
        row["references"] = [_text(one, "references", where) for one in references]
    return row


def answers(row: Row) -> list[str]:
    """All that is accepted as an answer: first the one to learn, then the other references."""
    if "target" in row:
        first = row["target"]
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
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NeftError(f"{where}: '{name}' holds half a surrogate pair; mend the text") from error
    return value


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
    source = row["source"] if "source" in row else "\n".join(asked)
    return {"source": source, "target": references[0], "references": references}
