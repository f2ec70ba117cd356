"""Figures from numbers by hand: what is drawn where, and the bytes."""

import itertools
import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from neft_core import drawing, figures, neuron_figures, page

SVG = "{http://www.w3.org/2000/svg}"
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
"""What linear sRGB looks like to an eye. Source: Machado, Oliveira and Fernandes, "A
Physiologically-based Model for Simulation of Color Vision Deficiency", IEEE TVCG 15 (6), 2009,
severity 1.0."""
HOSTILE = "</text><script>a$b_{1}"


def trade_off():
    return figures.trade_off(
        {"lora": [(4e4, 40.0, 1.0), (1e4, 30.0, 2.0)], HOSTILE: [(3e4, 20.0, None)]},
        "BLEU",
        {"base": 9.0},
    )


def texts(figure) -> list[str]:
    """What is written in a figure, in its SVG."""
    root = ET.fromstring(drawing.svg(figure))
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def lying(figure) -> list[tuple[float, float]]:
    """Where each lying bar begins, and how long it is."""
    return [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]


def test_points_stand_in_order_with_their_error_bars():
    axes = trade_off().axes[0]
    assert axes.get_xscale() == "log"
    lora, other = axes.containers
    assert lora.lines[0].get_xydata().tolist() == [[1e4, 30.0], [4e4, 40.0]]
    spans = [segment.tolist() for segment in lora.lines[2][0].get_segments()]
    assert spans == [[[1e4, 28.0], [1e4, 32.0]], [[4e4, 39.0], [4e4, 41.0]]]
    assert not other.has_yerr
    assert axes.lines[0].get_ydata() == [9.0, 9.0]


def test_everything_is_named_and_names_are_only_text():
    said = texts(trade_off())
    assert {"BLEU", "trained parameters (log scale)", "lora", "base", HOSTILE, "20k"} <= set(said)


def test_curves_are_means_with_a_band_from_lowest_to_highest():
    runs = {
        "a": [[(1, 4.0), (2, 3.0)], [(1, 6.0), (2, 2.0), (3, 9.0)]],
        "b": [[(step, float(step % 2)) for step in range(1, 121)]],
    }
    axes = figures.curves(runs, y_label="loss").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1, 5.0], [2, 2.5], [3, 9.0]]
    (band,) = axes.collections
    corners = {(x, y) for x, y in band.get_paths()[0].vertices.tolist()}
    assert {(1, 4.0), (1, 6.0), (2, 2.0), (2, 3.0), (3, 9.0)} == corners
    # 120 steps in 60 spans: each a pair of 1 and 0, in its middle.
    assert axes.lines[1].get_xydata().tolist() == [[n + 0.5, 0.5] for n in range(1, 120, 2)]


def test_stacked_bars_go_on_where_the_last_ended():
    series = {"own": [(3.0, 1.0), (2.0, None)], "before": [(0.0, None), (5.0, None)]}
    figure = figures.bars(["x", "y"], series, label="s", horizontal=True, stacked=True, unit=".1f")
    assert lying(figure) == [(0, 3), (0, 2), (3, 0), (2, 5)]
    assert {"3.0", "7.0", "x", "y", "own", "before"} <= set(texts(figure))
    # The number stands behind the error bar: at 4, not at 3.
    assert [note.xy[0] for note in figure.axes[0].texts] == [4.0, 7.0]


def test_wins_are_counted_end_to_end():
    counts = {"NeFT": [3, 0], "LoRA": [1, 2], "equal": [0, 1]}
    figure = figures.wins(["x", "y"], counts, "tested on")
    (axes,) = figure.axes
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [
        (0, 3), (0, 0), (3, 1), (0, 2), (4, 0), (2, 1),
    ]  # fmt: skip
    said = [(note.get_position(), note.get_text()) for note in axes.texts if note.get_text()]
    assert said == [((0, 1.5), "3"), ((0, 3.5), "1"), ((1, 1), "2"), ((1, 2.5), "1")]
    assert {"x", "y", "NeFT", "LoRA", "equal", "tested on"} <= set(texts(figure))
    few = figures.wins(["x"], {"NeFT": [1], "LoRA": [0]}, "tested on").axes[0]
    assert all(tick == int(tick) for tick in few.get_yticks()), "nobody wins half a time"


def test_what_the_paper_reports_is_dashed_in_the_same_colour():
    series = {"low": [(0, 1.0, 0.1), (3, 2.0, 0.1)], "high": [(0, 1.0, 0.1)]}
    figure = figures.added_neurons(series, "BLEU", {"high": [(3, 5.0, None)]})
    low, high, reported = figure.axes[0].containers
    assert reported.get_label() == "high, the paper's"
    assert reported.lines[0].get_xydata().tolist() == [[3, 5.0]]
    assert reported.lines[0].get_color() == high.lines[0].get_color() != low.lines[0].get_color()
    assert reported.lines[0].get_linestyle() == "--" != high.lines[0].get_linestyle()


def test_bars_in_groups_stand_side_by_side():
    series = {"a": [(5.0, 1.0), (7.0, 2.0)], "b": [(1.0, None), (2.0, None)]}
    axes = neuron_figures.rank_change([0, 0.1, 1], series).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [5, 7, 1, 2]
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert ends[0][1] == pytest.approx(ends[2][0])
    assert ends[0][1] == pytest.approx(0)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0–10", "10–100"]


def test_forms_of_the_paper_say_what_they_are_compared_with():
    five = neuron_figures.average_rank_change({"neft-6": (17172.0, 10.0)}, "neft-3")
    six = neuron_figures.neuron_types(["neft-6"], {"suppressed": [(500.0, None)]}, "neft-3")
    four = figures.added_neurons({"reversed": [(3.0, 27.0, 0.1)]}, "BLEU")
    assert {"Avg(ΔRank) against neft-3", "neft-6", "17.2k"} <= set(texts(five))
    assert {"neurons, against neft-3", "500"} <= set(texts(six))
    assert {"reversed", "added neurons (% of the model's parameters)"} <= set(texts(four))


def test_the_map_has_a_cell_for_each_module_of_each_layer():
    figure = neuron_figures.neuron_map(
        {"m": [[0.0, 0.5], [None, 0.25]], "n": [[1.0, 0.0], [0.0, 0.0]]}, ["0", "1"], ["up", "dn"]
    )
    first, second, bar = figure.axes
    (mesh,) = first.collections
    np.testing.assert_array_equal(mesh.get_array().filled(np.nan), [[0, 0.5], [np.nan, 0.25]])
    assert mesh.get_clim() == second.collections[0].get_clim() == (0, 1)
    assert [note.get_text() for note in first.texts] == ["0", "50", "25"]
    assert first.get_ylim()[0] > first.get_ylim()[1], "the first layer on top"
    assert bar.get_ylabel() == "share selected"


def test_the_distribution_counts_all_that_changed_and_shows_the_cuts():
    values = {"up": [1e-4, 1e-3, 1e-3, 0.0], "down": [1e-2, -1e-17]}
    figure = neuron_figures.distribution(values, {"neft": 1e-3}, bins=2)
    axes = figure.axes[0]
    heights = [shape.get_xy()[:, 1].max() for shape in axes.patches]
    assert heights == [2, 2, 1, 1]  # each kind filled and outlined
    assert {line.get_xdata()[0] for line in axes.lines} == {1e-3}
    assert {"neft →", "0.001", "up", "down"} <= set(texts(figure))


def test_equal_sensitivities_can_be_drawn():
    neuron_figures.distribution({"up": [1e-3, 1e-3]}, {})


def test_an_overlap_stands_above_its_chance():
    figure = neuron_figures.overlap(
        ["a", "b"], [[1.0, 0.5], [None, 1.0]], [[0.2, 0.25], [None, 0.25]]
    )
    assert [t for t in texts(figure) if "." in t] == ["1.00", "0.50", "(0.25)", "1.00"]


def test_the_same_numbers_give_the_same_bytes_whatever_the_users_style(monkeypatch):
    one = trade_off()
    drawn = drawing.svg(one), drawing.png(one)
    assert (drawing.svg(one), drawing.png(one)) == drawn, "written again"
    monkeypatch.setitem(matplotlib.rcParams, "xtick.direction", "in")
    monkeypatch.setitem(matplotlib.rcParams, "text.color", "red")
    other = trade_off()
    assert (drawing.svg(other), drawing.png(other)) == drawn
    assert b"tEXt" not in drawn[1]
    assert "date" not in drawn[0]


def test_in_a_page_colours_are_the_pages_and_ids_do_not_meet():
    alone = drawing.svg(trade_off())
    pieces = [drawing.inline(alone, prefix, "a &lt; b") for prefix in ("one", "two")]
    for piece in pieces:
        ET.fromstring(piece.replace("<svg ", f'<svg xmlns="{SVG[1:-1]}" '))
        assert 'aria-label="a &lt; b"' in piece
        assert not re.search(r"#[0-9a-f]{6}\b", piece), "every colour is one that dark pages change"
        assert "var(--ink)" in piece
        assert "var(--c0)" in piece
        assert "font-family" not in piece
        named = set(re.findall(r' id="([^"]*)"', piece))
        assert named == set(re.findall(r'(?:url\(#|href="#)([^")]*)', piece))
        assert named
    ids = [set(re.findall(r' id="([^"]*)"', piece)) for piece in pieces]
    assert not ids[0] & ids[1]
    assert ">20k</text>" in pieces[0], "no rounding of what is written"


def test_a_family_has_one_colour_and_a_dash_for_each():
    names = {"l4": "lora", "full": "full", "l8": "lora", "n": "neft"}
    looks = figures.styles(names)
    assert looks["l4"].colour == looks["l8"].colour
    assert looks["l4"].dash != looks["l8"].dash
    others = [looks[name] for name in ("l4", "full", "n")]
    assert all(a.colour != b.colour and a.marker != b.marker
               for a, b in itertools.combinations(others, 2))  # fmt: skip


def test_families_beyond_the_colours_differ_in_their_dash():
    looks = figures.styles({str(n): str(n) for n in range(9)})
    assert looks["7"].colour == looks["0"].colour
    assert len({(look.colour, look.dash) for look in looks.values()}) == 9


def theme(dark: bool) -> dict[str, str]:
    """The colours of light or dark pages by name."""
    css = page.CSS.read_text(encoding="utf-8")
    light, other = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    found = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", light))
    return found | dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", other)) if dark else found


def linear(colour: str) -> np.ndarray:
    """sRGB without its curve (IEC 61966-2-1)."""
    c = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* of linear sRGB, seen by daylight (D65)."""
    xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
           [0.0193339, 0.1191920, 0.9503041]] @ rgb / [0.95047, 1, 1.08883]  # fmt: skip
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, between 1 and 21."""
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_distance_and_contrast_by_hand():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert lab(linear("#ff0000")) == pytest.approx([53.24, 80.09, 67.20], abs=0.02)


def test_files_have_the_colours_of_light_pages():
    light = theme(dark=False)
    assert tuple(light[f"c{n}"] for n in range(len(drawing.PALETTE))) == drawing.PALETTE
    assert (light["ink"], light["grid"], light["paper"]) == (
        drawing.INK, drawing.FAINT, drawing.PAPER,
    )  # fmt: skip


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("dark", [False, True])
def test_every_eye_tells_the_colours_of_a_figure_apart(dark, vision):
    """A difference of 2.3 is just seen (Mahy, Van Eycken, Oosterlinck 1994): five times that."""
    colours = theme(dark)
    seen = [
        lab(np.clip(VISIONS[vision] @ linear(colours[f"c{n}"]), 0, 1))
        for n in range(len(drawing.PALETTE))
    ]
    least = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
    assert least > 5 * 2.3


@pytest.mark.parametrize("dark", [False, True])
def test_marks_and_texts_stand_out_from_their_ground(dark):
    """WCAG 2.2: 3 for graphics (1.4.11), 4.5 for text (1.4.3)."""
    colours = theme(dark)
    for number in range(len(drawing.PALETTE)):
        # Bars of wins bear counts in the colour of the ground.
        least = 4.5 if number < 3 else 3
        assert contrast(colours[f"c{number}"], colours["paper"]) > least, number
    for ground, text in itertools.product(("paper", "tint"), ("ink", "soft", "accent")):
        assert contrast(colours[text], colours[ground]) > 4.5, (text, ground)
    # The darkest cell of a map or matrix, with its number.
    share = drawing.shades()(1.0)[3]
    pairs = zip(*(re.findall(r"\w\w", colours[name]) for name in ("c0", "paper")), strict=True)
    mixed = (share * int(c, 16) + (1 - share) * int(p, 16) for c, p in pairs)
    cell = "#" + "".join(f"{round(value):02x}" for value in mixed)
    assert contrast(colours["ink"], cell) > 4.5
