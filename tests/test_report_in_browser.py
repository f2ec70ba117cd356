"""The report's page in a browser: on a desktop and a phone, by day and by night, in print."""

import re
from pathlib import Path

import browser
import pytest
import test_report

from neft_core import drawing, neuron_figures, page
from neft_core.page import Gallery
from neft_core.workspace import REPORTS

tiny = test_report.tiny


@pytest.fixture(scope="module")
def window():
    command = browser.find()
    if command is None:
        pytest.skip("no Chromium here (on the PATH, or named by CHROME)")
    with browser.browser(command) as opened:
        yield opened


def brightness(window, what: str) -> int:
    """Of a colour of the page's body, between 0 and 765."""
    return sum(
        map(int, re.findall(r"\d+", window.value(f"getComputedStyle(document.body).{what}")))
    )


@pytest.mark.integration
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_alone_and_in_its_width(tiny, window, width, dark):
    path = tiny.root / REPORTS / "report.html"
    window.open(path, width, dark=dark)
    assert window.said() == []
    assert window.asked() == [Path(path).resolve().as_uri()]
    assert window.value("document.documentElement.scrollWidth") == width
    assert (brightness(window, "backgroundColor") > 384) != dark
    assert window.value("document.querySelectorAll('figure svg text').length") > 50
    least = window.value(
        "Math.min(...[...document.querySelectorAll('figure svg')].map(s => s.clientWidth))"
    )
    assert least > 150


def cut(window) -> list[str]:
    """Figures that are wider than their place, and what has more than it shows."""
    wider = """[...document.querySelectorAll('figure')].filter(f => f.querySelector('svg')
        .getBoundingClientRect().right > f.getBoundingClientRect().right + 1)"""
    hidden = """[...document.querySelectorAll('.scroll')].filter(s =>
        s.scrollWidth > s.clientWidth && getComputedStyle(s).overflowX !== 'visible')"""
    return window.value(f"[...{wider}, ...{hidden}].map(e => e.innerText)")


@pytest.mark.integration
def test_it_prints_on_white_with_every_figure_and_nothing_cut(tiny, window):
    """A4 leaves 688 pixels between margins; the user likes dark pages. A printed figure has the
    text for those who can't see it."""
    window.open(tiny.root / REPORTS / "report.html", 688, dark=True, media="print")
    assert brightness(window, "backgroundColor") == 765
    assert brightness(window, "color") < 100
    colours = [f"getPropertyValue('--c{n}')" for n in range(len(drawing.PALETTE))]
    root = "getComputedStyle(document.documentElement)"
    assert [window.value(f"{root}.{colour}") for colour in colours] == list(drawing.PALETTE)
    assert window.value("document.documentElement.scrollWidth") == 688
    assert not cut(window)
    figures = len(list((tiny.root / REPORTS / "figures").glob("*.svg")))
    assert window.pdf().count(b"/S /Figure\n/Alt") == figures


@pytest.mark.integration
def test_wide_figures_and_tables_scroll_on_a_phone_and_are_whole_in_print(window, tmp_path):
    gallery = Gallery()
    maps = {str(n): [[0.5, 0.5]] for n in range(8)}
    drawn = [gallery.add(name, neuron_figures.neuron_map(maps, ["0"], ["up", "down"]), name)
             for name in ("one", "two")]  # fmt: skip
    table = page.table([(f"column {n}", False) for n in range(30)], [["a long cell"] * 30])
    body = page.fill('{table}<div class="figures">{all}</div>', table=table, all=page.join(drawn))
    path = tmp_path / "page.html"
    path.write_text(page.document("wide", body))
    window.open(path, 390)
    assert len(cut(window)) == 5, "each figure within its frame, and all three frames"
    assert window.value("document.documentElement.scrollWidth") == 390
    window.open(path, 688, media="print")
    assert not cut(window)
    assert window.value("document.documentElement.scrollWidth") == 688
