"""Raw rows: read from local files of several formats, or from the Hugging Face Hub."""

import csv
import difflib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from neft_core.errors import NeftError
from neft_core.rows import (
    FIELDS,
    LABELS,
    Row,
    check_file,
    checked_row,
    form_of,
    json_records,
    text_lines,
)

Columns = Mapping[str, str | int]
Records = Iterator[tuple[str, Mapping[Any, Any]]]  # where it stands, and its columns


def read_local(
    path: str | Path,
    columns: Columns | None = None,
    limit: int | None = None,
    task: str | None = None,
    labels: Mapping[str, str | int] | None = None,
) -> list[Row]:
    """Read rows from a file whose suffix names its format.

    JSON lines (`.jsonl`, `.json`), `.csv`, tab-separated `.tsv` and `.txt` (UTF-8, with a header
    line unless `columns` are numbers; quotes mean nothing between tabs) and `.parquet`.

    Args:
        path: the file.
        columns: our names to the file's: a name, a dotted path into nested columns
            (`{"source": "translation.en", "target": "translation.fr"}`), or a number counted
            from 0 for files without a header. None takes the names of the row forms as they are.
            Other columns are ignored.
        limit: stop after this many rows; None reads all.
        task: the form of the rows, a key of `rows.FIELDS`; None: what the columns say.
        labels: the three labels of nli to what stands for them; None: their names, or 0, 1, 2 as in
            SNLI, MNLI and XNLI.

    Raises:
        NeftError: naming file and line, for anything that is not such a row.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise NeftError(f"{path}: unknown suffix '{path.suffix}'; one of {known} is read")
    _check_columns(columns, str(path), task)
    headerless = columns is not None and any(isinstance(c, int) for c in columns.values())
    if headerless and reader not in (_csv_rows, _tsv_rows):
        raise NeftError(f"{path}: columns are numbers; numbers are for .csv, .tsv and .txt files")
    records = reader(path, headerless)
    return _rows(records, columns, limit, str(path), task, labels)


def read_hub(
    name: str,
    *,
    revision: str | None,
    config: str | None = None,
    split: str,
    columns: Columns | None = None,
    limit: int | None = None,
    task: str | None = None,
    labels: Mapping[str, str | int] | None = None,
) -> list[Row]:
    """Read rows of a data set of the Hugging Face Hub, or of a local directory in its layout.

    Code that comes with a data set is never run.

    Args:
        name: `owner/name` on the Hub, or a directory.
        revision: commit, tag or branch on the Hub; a directory has none.
        config: the data set's configuration where it has several.
        split: the data set's own name of the split, slices such as `train[:1000]` included.
        columns: as in `read_local`, names only.
        limit: stop after this many rows; None reads all.
        task: as in `read_local`.
        labels: as in `read_local`.

    Raises:
        NeftError: the data set, its configuration or split cannot be had, or a row is wrong.
    """
    where = f"hub data set '{name}'"
    _check_columns(columns, where, task)
    local = Path(os.path.expanduser(name))
    is_directory = local.is_dir()
    if not is_directory and (local.is_absolute() or name.startswith((".", "~"))):
        raise NeftError(f"{where}: no such directory; name an existing one, or 'owner/name'")
    import datasets

    try:
        with _quiet():
            found = datasets.load_dataset(
                str(local) if is_directory else name,
                config,
                split=split,
                revision=None if is_directory else revision,
            )
            names = found.column_names
    except Exception as error:  # the library raises a dozen unrelated types, bare ones included
        reason = " ".join(str(error).split())
        if not is_directory and isinstance(error, ConnectionError):
            raise NeftError(
                f"{where}: cannot be reached (offline) and is not in the local cache; download it "
                "once with network, or use source kind 'local'"
            ) from error
        raise NeftError(
            f"{where}: cannot be read, config {config!r}, split {split!r} ({reason[:300]}); "
            "check name, revision, config and split"
        ) from error
    wanted = {str(c).split(".")[0] for c in (columns or {}).values()}
    if wanted and wanted <= set(names):
        found = found.select_columns(sorted(wanted))
    records = ((f"{where} {split} row {i}", record) for i, record in enumerate(found))
    return _rows(records, columns, limit, f"{where} split '{split}'", task, labels)


def _json_rows(path: Path, _headerless: bool) -> Records:
    return json_records(path)


def _table_rows(headerless: bool, lines: Iterator[tuple[str, list[str]]], advice: str) -> Records:
    header: list[str] | None = None
    for where, fields in lines:
        if headerless:
            yield where, dict(enumerate(fields))
        elif header is None:
            header = fields
            if twice := {name for name in header if header.count(name) > 1}:
                raise NeftError(f"{where}: column {min(twice)!r} stands twice; name each once")
        elif len(fields) > len(header):
            raise NeftError(
                f"{where}: {len(fields)} fields, the header has {len(header)}; {advice}"
            )
        else:
            yield where, dict.fromkeys(header) | dict(zip(header, fields, strict=False))


def _tsv_rows(path: Path, headerless: bool) -> Records:
    lines = (
        (f"{path}:{number}", line.rstrip("\r\n").split("\t"))
        for number, line in text_lines(path)
        if line.strip()
    )
    return _table_rows(headerless, lines, "take tabs out of the texts")


def _csv_rows(path: Path, headerless: bool) -> Records:
    def lines() -> Iterator[tuple[str, list[str]]]:
        csv.field_size_limit(2**31 - 1)  # what a C long holds everywhere
        reader = csv.reader((line for _, line in text_lines(path)), strict=True)
        try:
            for fields in reader:
                if fields:
                    yield f"{path}:{reader.line_num}", fields
        except csv.Error as error:
            raise NeftError(
                f"{path}:{reader.line_num}: invalid CSV ({error}); check its quotes"
            ) from error

    return _table_rows(headerless, lines(), "quote what holds a comma")


def _parquet_rows(path: Path, _headerless: bool) -> Records:
    check_file(path)
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NeftError(f"{path}: not a whole Parquet file ({reason}); write it again") from error


_READERS = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".txt": _tsv_rows,
    ".parquet": _parquet_rows,
}


def _rows(
    records: Records,
    columns: Columns | None,
    limit: int | None,
    origin: str,
    task: str | None,
    labels: Mapping[str, str | int] | None,
) -> list[Row]:
    # Text files hold numbers as text.
    known = labels or {name: number for number, name in enumerate(LABELS)}
    meant = {str(value): name for name, value in known.items()}
    rows = []
    for where, record in islice(records, limit):
        named = columns or _columns_of(record, task)
        fields = {name: _value(record, column, where) for name, column in named.items()}
        if "label" in fields:
            fields["label"] = _label(fields["label"], meant, labels is None, where)
        rows.append(checked_row(fields, where, columns))
    if not rows:
        raise NeftError(f"{origin}: no rows; at least one is needed")
    return rows


def _columns_of(record: Mapping[Any, Any], task: str | None) -> Columns:
    needed = FIELDS[task or form_of(record)]
    optional = ["references"] if isinstance(record.get("references"), list) else []
    return {name: name for name in [*needed, *(optional if "target" in needed else [])]}


def _label(value: Any, meant: Mapping[str, str], by_default: bool, where: str) -> str:
    """The label that a value stands for."""
    text = str(value).strip()
    if text in meant:
        return meant[text]
    if by_default and text in LABELS:
        return text
    allowed = ", ".join(f"{name} ({known})" for known, name in meant.items())
    raise NeftError(f"{where}: the label is {value!r}; {allowed} are the labels")


def _value(record: Mapping[Any, Any], column: str | int, where: str) -> Any:
    if column in record:
        return record[column]
    if isinstance(column, int):
        raise NeftError(
            f"{where}: no column {column} (counted from 0); this line has {len(record)}"
        )
    value: Any = record
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            names = list(_names(record))
            nearest = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
            hint = f" (nearest: '{nearest[0]}')" if nearest else ""
            there = ", ".join(f"'{name}'" for name in names[:20]) or "none"
            raise NeftError(f"{where}: no column '{column}'; there are {there}{hint}")
        value = value[part]
    return value


def _names(record: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _check_columns(columns: Columns | None, where: str, task: str | None) -> None:
    if columns is None:
        return
    names = set(columns)
    forms = [FIELDS[task]] if task else list(FIELDS.values())
    fitting = [form for form in forms if names - {"references"} == set(form)]
    if not fitting or ("references" in names and "target" not in names):
        needed = ", or ".join(
            dict.fromkeys(
                " and ".join(f"'{name}'" for name in form)
                + (" (and 'references')" if "target" in form else "")
                for form in forms
            )
        )
        raise NeftError(f"{where}: columns has {sorted(names)}; {needed}")
    if len({isinstance(c, int) for c in columns.values()}) > 1:
        raise NeftError(f"{where}: columns mixes numbers and names; use one kind")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where nobody watches, no retry notices before our one line."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets", "httpx")]
    levels = [logger.level for logger in loggers]
    hide_bars = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        if hide_bars:
            datasets.disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if hide_bars:
            datasets.enable_progress_bars()
