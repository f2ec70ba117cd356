"""Tables of a study: cells with what stands behind them, as Markdown, CSV and HTML."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from neft_core.page import Html, fill, join, paragraph, strong, table, text

RUNS_PAGE = "mlflow.html"
"""Beside the report: where a cell's link leads, from there to the MLflow run of each seed."""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: as it is read; Markdown and HTML escape it.
        value: as the CSV has it, with all digits; None: the text.
        best: whether it is in bold.
        run: the run behind it, to whose MLflow runs it links.
        more: further columns of the CSV, such as the standard deviation, by their ending.
    """

    text: str
    value: float | int | None = None
    best: bool = False
    run: str | None = None
    more: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of a study.

    Attributes:
        name: of its file; letters, digits, `-` and `_`.
        title: what it shows.
        heads: headings of the columns, each another; the first column holds the rows' names.
        rows: cells, as many as heads.
        notes: sentences below it.
    """

    name: str
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()

    def _numeric(self) -> list[bool]:
        """For each column, whether it holds numbers."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.heads)
        return [any(cell.value is not None for cell in column) for column in columns]

    def markdown(self, pages: str = "") -> str:
        """As Markdown.

        Args:
            pages: where `RUNS_PAGE` lies, from the file: empty, or a path that ends in `/`.
        """
        lines = [_line(map(_plain, self.heads))]
        lines.append(_line("---:" if numeric else "---" for numeric in self._numeric()))
        for row in self.rows:
            cells = []
            for cell in row:
                said = _plain(cell.text)
                said = f"**{said}**" if cell.best else said
                cells.append(f"[{said}]({pages}{RUNS_PAGE}#{cell.run})" if cell.run else said)
            lines.append(_line(cells))
        notes = "".join(f"\n\n{prose(note)}" for note in self.notes)
        return f"### {prose(self.title)}\n\n" + "\n".join(lines) + notes + "\n"

    def csv(self) -> str:
        """As CSV, values with all digits; deviations and the like in columns of their own."""
        columns = list(zip(*self.rows, strict=True)) if self.rows else [()] * len(self.heads)
        heads: list[str] = []
        lines: list[list[object]] = [[] for _ in self.rows]
        for head, column in zip(self.heads, columns, strict=True):
            more = list(dict.fromkeys(key for cell in column for key in cell.more))
            heads += [head, *(f"{head} {key}" for key in more)]
            for line, cell in zip(lines, column, strict=True):
                line.append(cell.text if cell.value is None else cell.value)
                line += [cell.more.get(key, "") for key in more]
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([heads, *lines])
        return out.getvalue()

    def html(self) -> Html:
        """As a piece of the page."""
        rows = []
        for row in self.rows:
            cells = []
            for cell in row:
                said = strong(cell.text) if cell.best else text(cell.text)
                link = '<a href="{page}#{run}">{said}</a>'
                cells.append(
                    fill(link, page=RUNS_PAGE, run=cell.run, said=said) if cell.run else said
                )
            rows.append(cells)
        heads = list(zip(self.heads, self._numeric(), strict=True))
        notes = [paragraph(note, kind="note") for note in self.notes]
        title = fill("<h3>{title}</h3>", title=self.title)
        return join([title, table(heads, rows, label=self.title), *notes])


def readable(markdown: str) -> str:
    """Markdown for a terminal: without links and marks, columns aligned."""
    markdown = re.sub(r"(?<!\\)\[((?:[^\]\\]|\\.)*)\]\([^)]*\)", r"\1", markdown)
    found: list[str] = []
    for block in re.split(r"((?:^\|.*\n?)+)", markdown, flags=re.MULTILINE):
        if not block.startswith("|"):
            found.append(_unmarked(re.sub(r"^#+ ", "", block, flags=re.MULTILINE)))
            continue
        rows = [re.split(r" \| ", line[2:-2]) for line in block.splitlines()]
        numeric = [cell.endswith(":") for cell in rows.pop(1)]
        rows = [[_unmarked(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, numeric, strict=True)
            )
            found.append("  ".join(cells).rstrip() + "\n")
    return "".join(found)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def prose(said: str) -> str:
    """Text that Markdown takes as it is, as a paragraph or a heading."""
    return re.sub(r"^(\d*)([#|]|[-+.)](?=[ -]|$))", r"\1\\\2", _plain(said, ""))


def _plain(said: str, more: str = "|") -> str:
    """Text that Markdown takes as it is, in a table's cell."""
    return re.sub(rf"([\\*_`\[\]<>&~${more}])", r"\\\1", " ".join(said.split()))


def _unmarked(markdown: str) -> str:
    return re.sub(r"\\([^\w\s]|_)|\*\*", lambda found: found[1] or "", markdown)
