"""How figures look, and their bytes: one style for all of them, as SVG and as PNG.

The only module that imports matplotlib. The same figure gives the same bytes.
"""

import functools
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure as Figure

INK, FAINT, PAPER = "#1b1f25", "#d4d8de", "#fdfdfc"
"""Text and axes, grid lines, the ground under marks."""

PALETTE = ("#0072b2", "#c35100", "#00855b", "#c877a7", "#c58400", "#329acf", "#737980")
"""After Okabe and Ito's colours, told apart by colour-blind eyes; grey in place of black, no
yellow, and so dark that they stand out from paper: three to one, the first three, which bear
numbers, 4.5 to one. report.css has those of dark pages."""

DASHES: tuple[Any, ...] = ("-", (0, (4.5, 1.8)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

WIDTH = 4.6
"""Inches; so wide that 9 pt can be read on a phone too."""

_SETTINGS = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "errorbar.capsize": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "neft",
}


@contextmanager
def styled() -> Iterator[None]:
    """In this block figures are made and written in our style, whatever the user's own is.

    Letters that the font lacks are boxes in a PNG; in an SVG a browser finds them elsewhere. That
    is no cause to warn of each.
    """
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context():
        for told in ("Glyph ", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", message=told)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def canvas(
    height: float = 3.0,
    *,
    width: float = WIDTH,
    panels: int = 1,
    share_y: bool = False,
) -> "tuple[Figure, list[Axes]]":
    """An empty figure with panels side by side; call it inside `styled`.

    Args:
        height: inches.
        width: inches.
        panels: how many.
        share_y: whether the panels have one y axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, sharey=share_y, squeeze=False)
    return figure, list(axes[0])


def named(name: str, most: int = 44) -> str:
    """A name as a figure bears it: in one line, without its middle where it is longer than `most`.

    Matplotlib leaves names that begin with `_` out of legends, and XML has no control characters.
    """
    said = " ".join("".join(c for c in name if c.isprintable() or c.isspace()).split())
    if len(said) > most:
        said = f"{said[: most - most // 3 - 1]}…{said[len(said) - most // 3 :]}"
    return f" {said}" if said.startswith("_") else said


def shades(colour: str = PALETTE[0], levels: int = 20) -> "Colormap":
    """From the ground, light or dark, to a colour on which text can still be read."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    ends = [to_rgba(colour, 0.0), to_rgba(colour, 0.55)]
    return LinearSegmentedColormap.from_list("shades", ends, N=levels)


def brief(number: float) -> str:
    """A number in few characters: 0.46, 950, 17.2k, 1.5M."""
    from matplotlib.ticker import EngFormatter

    if abs(number) < 1:
        return f"{number:.2g}"
    small = abs(number) < 1000 and float(number).is_integer()
    return str(EngFormatter(sep="", places=0 if small else 1)(number))


def counted(axis: Any, *, log: bool = False) -> None:
    """Label an axis of counts: 20k, 1.5M; on a log axis at 1, 2 and 5 of each power where few."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    large = EngFormatter(sep="")
    axis.set_major_formatter(lambda value, _: f"{value:g}" if abs(value) < 1 else large(value))
    if log:
        low, high = axis.get_view_interval()
        few = high / max(low, 1e-300) < 300
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axis.set_minor_formatter(NullFormatter())


def svg(figure: "Figure") -> str:
    """The figure as a file of its own: text as text, on white."""
    buffer = io.StringIO()
    with styled():
        _arrange(figure)
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    # Coordinates to the hundredth of a point; not what stands between tags.
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)


def png(figure: "Figure") -> bytes:
    """The figure as pixels, on white."""
    buffer, nameless = io.BytesIO(), {"Software": None}
    with styled():
        _arrange(figure)
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata=nameless)
    return buffer.getvalue()


def _arrange(figure: "Figure") -> None:
    """Place everything once: a second time it would end a hair's breadth elsewhere."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def inline(text: str, prefix: str, label: str) -> str:
    """An SVG file as part of a page: its colours and font are the page's, its ids its own.

    Args:
        text: what `svg` gave.
        prefix: what tells its ids from those of the page's other figures.
        label: what the figure shows, for those who can't see it; HTML-escaped already.
    """
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    body = text[text.index(">") + 1 :]
    body = re.sub(r"<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    # The ground: the page has its own.
    body = re.sub(r'<g id="patch_1">.*?</g>', "", body, count=1, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", body))
    body = re.sub(
        r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]!s}"' if m[1] in used else "", body
    )
    body = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", body)
    body = _variables().sub(lambda m: _VARIABLES[m[0].lower()], body)
    body = body.replace(" font-family: 'DejaVu Sans';", "").replace("xlink:href", "href")
    body = re.sub(r"\s*\n\s*", "\n", body)
    width = float(box[1].split()[2])
    room = (
        f"max-width: {1.55 * width:.0f}px; min-width: {min(width, 720) if width > 380 else 0:.0f}px"
    )
    head = f'<svg viewBox="{box[1]}" style="{room}" role="img" aria-label="{label}">'
    return head + body.strip()


_VARIABLES = {INK: "var(--ink)", FAINT: "var(--grid)", PAPER: "var(--paper)"} | {
    colour: f"var(--c{number})" for number, colour in enumerate(PALETTE)
}


@functools.cache
def _variables() -> re.Pattern[str]:
    return re.compile("|".join(_VARIABLES), re.IGNORECASE)
