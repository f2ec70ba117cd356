"""Tables of a study, character by character."""

import csv
import io

from neft_core.page import text
from neft_core.study_tables import Cell, Table, readable

TABLE = Table(
    "t",
    "A | title",
    ["method", "En→Zh", "note"],
    [
        [Cell("NeFT_9%"), Cell("1.50 ± 0.25", 1.5, True, "neft-en-zh", {"sd": 0.25}), Cell("a|b")],
        [Cell("Base"), Cell("0.12", 0.1234567), Cell("<i>")],
        [Cell("bad"), Cell("failed (1)", more={"failed": "no, rows"}), Cell("–")],
    ],
    ["A note."],
)


def test_markdown():
    assert TABLE.markdown("../") == (
        "### A | title\n\n"
        "| method | En→Zh | note |\n"
        "| --- | ---: | --- |\n"
        "| NeFT\\_9% | [**1.50 ± 0.25**](../mlflow.html#neft-en-zh) | a\\|b |\n"
        "| Base | 0.12 | \\<i\\> |\n"
        "| bad | failed (1) | – |\n"
        "\nA note.\n"
    )


def test_markdown_in_a_terminal():
    assert readable("# Study\n\n" + TABLE.markdown("../")) == (
        "Study\n\n"
        "A | title\n\n"
        "method         En→Zh  note\n"
        "NeFT_9%  1.50 ± 0.25  a|b\n"
        "Base            0.12  <i>\n"
        "bad       failed (1)  –\n"
        "\nA note.\n"
    )


def test_csv_has_all_digits_and_what_stands_behind_a_cell():
    rows = list(csv.reader(io.StringIO(TABLE.csv())))
    assert rows == [
        ["method", "En→Zh", "En→Zh sd", "En→Zh failed", "note"],
        ["NeFT_9%", "1.5", "0.25", "", "a|b"],
        ["Base", "0.1234567", "", "", "<i>"],
        ["bad", "failed (1)", "", "no, rows", "–"],
    ]


def test_html_escapes_and_links():
    piece = TABLE.html()
    assert (
        '<td class="n"><a href="mlflow.html#neft-en-zh"><strong>1.50 ± 0.25</strong></a></td>'
        in piece
    )
    assert "<td>&lt;i&gt;</td>" in piece
    assert piece == text(piece)
    assert "<h3>A | title</h3>" in piece
    assert '<p class="note">A note.</p>' in piece
    assert piece.count("<tr>") == 4


def test_a_table_without_rows():
    empty = Table("e", "Empty", ["a", "b"], [])
    assert empty.csv() == "a,b\n"
    assert empty.markdown() == "### Empty\n\n| a | b |\n| --- | --- |\n"
