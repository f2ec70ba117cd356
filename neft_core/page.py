"""Pieces of an HTML page that needs nothing but itself: text, tables, figures, the whole.

Every function here escapes what it is given, unless it is `Html` already.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neft_core import drawing

if TYPE_CHECKING:
    from neft_core.drawing import Figure

MANY = 12
"""Columns beyond which a table is printed small, its words broken where they must."""

CSS = Path(__file__).with_name("report.css")

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>%(title)s</title>
<style>
%(css)s</style>
</head>
<body>
%(body)s
</body>
</html>
"""


LONG = 26
"""Characters of a row's or column's name from which on it may take several lines."""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Html:
    """Anything as HTML: escaped, unless it is HTML."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def fill(form: str, **values: object) -> Html:
    """A form of ours with `{names}`, filled with values, each escaped unless it is HTML."""
    return Html(form.format(**{name: text(value) for name, value in values.items()}))


def join(parts: Iterable[object], between: str = "\n") -> Html:
    """Pieces one after the other."""
    return Html(between.join(text(part) for part in parts))


def table(
    heads: Sequence[tuple[object, bool]],
    rows: Iterable[Sequence[object]],
    *,
    kinds: Sequence[str] = (),
    label: str = "",
) -> Html:
    """A table that scrolls by itself where it is too wide.

    Args:
        heads: for each column its heading, and whether it holds numbers.
        rows: cells; the first of each is the row's name.
        kinds: a CSS class for each row.
        label: what the table shows, for those who hear the page.
    """
    head = join(
        (fill('<th scope="col"{n}>{h}</th>', n=_kinds(n, h), h=h) for h, n in heads), between=""
    )
    lines = []
    for place, row in enumerate(rows):
        cells = [fill('<th scope="row"{n}>{cell}</th>', n=_kinds(False, row[0]), cell=row[0])]
        for (_, numeric), cell in zip(heads[1:], row[1:], strict=True):
            cells.append(fill("<td{n}>{cell}</td>", n=_kinds(numeric), cell=cell))
        kind = kinds[place] if kinds else ""
        mark = fill(' class="{kind}"', kind=kind) if kind else Html()
        lines.append(fill("<tr{mark}>{cells}</tr>", mark=mark, cells=join(cells, "")))
    return fill(
        '<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table{many}>\n'
        "<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>",
        label=label or "table",
        many=Html(' class="many"' if len(heads) > MANY else ""),
        head=head,
        lines=join(lines),
    )


def _kinds(numeric: bool, name: object = "") -> Html:
    """Classes of a cell: of numbers, and of a name too long for one line."""
    long = len(re.sub(r"<[^>]*>", "", text(name))) > LONG
    kinds = " ".join(["n"] * numeric + ["long"] * long)
    return fill(' class="{kinds}"', kinds=kinds) if kinds else Html()


def facts(pairs: Mapping[str, object]) -> Html:
    """Names and values, side by side."""
    items = (fill("<div><dt>{k}</dt><dd>{v}</dd></div>", k=k, v=v) for k, v in pairs.items())
    return fill('<dl class="facts">{items}</dl>', items=join(items, ""))


def paragraph(*parts: object, kind: str = "") -> Html:
    """A paragraph."""
    mark = fill(' class="{kind}"', kind=kind) if kind else Html()
    return fill("<p{mark}>{parts}</p>", mark=mark, parts=join(parts, ""))


def strong(value: object) -> Html:
    """In bold."""
    return fill("<strong>{value}</strong>", value=value)


def code(value: str, length: int = 0) -> Html:
    """A hash or a path; with a length its beginning, the whole when pointed at."""
    if not length or len(value) <= length:
        return fill("<code>{value}</code>", value=value)
    return fill('<code title="{value}">{short}</code>', value=value, short=value[:length])


def details(summary: object, body: object) -> Html:
    """What is shown when asked for."""
    return fill(
        "<details><summary>{summary}</summary>\n{body}\n</details>", summary=summary, body=body
    )


def spread(value: float | None, deviation: float | None, digits: int = 2) -> Html:
    """A mean and its standard deviation, so that numbers below each other stand in line."""
    if value is None:
        return Html("–")
    sd = f"± {deviation:.{digits}f}" if deviation is not None else ""
    return fill('{value} <span class="sd">{sd}</span>', value=f"{value:.{digits}f}", sd=sd)


class Gallery:
    """The figures of a page, which become files too.

    Attributes:
        svgs: for each figure's name its SVG file.
        pngs: and its PNG file.
    """

    def __init__(self) -> None:
        self.svgs: dict[str, str] = {}
        self.pngs: dict[str, bytes] = {}

    def add(self, name: str, figure: "Figure", title: str, caption: str = "") -> Html:
        """Keep a figure, and give the piece of the page that shows it.

        Args:
            name: of its files; letters, digits, `-` and `_`.
            figure: what was drawn.
            title: what it shows.
            caption: how to read it.
        """
        self.svgs[name], self.pngs[name] = drawing.svg(figure), drawing.png(figure)
        said = text(f"{title}. {caption}".strip())
        return fill(
            '<figure id="figure-{name}"{wide}><div class="scroll">{svg}</div>'
            '<figcaption><b>{title}.</b> {caption} <span class="files">'
            '<a href="figures/{name}.svg">SVG</a> <a href="figures/png/{name}.png">PNG</a></span>'
            "</figcaption></figure>",
            name=name,
            wide=Html(' class="wide"' if figure.get_figwidth() > drawing.WIDTH else ""),
            svg=Html(drawing.inline(self.svgs[name], name, said)),
            title=title,
            caption=caption,
        )


def document(title: str, body: object) -> str:
    """The whole page."""
    css = CSS.read_text(encoding="utf-8")
    return _PAGE % {"title": text(title), "css": css, "body": text(body)}
