"""A study's section with hostile texts: on the page, in Markdown, CSV and figures, in a browser."""

import csv
import shutil
from pathlib import Path
from xml.etree import ElementTree

import browser
import pytest
from markdown_it import MarkdownIt
from test_report import Reader

from neft_core import report, run_links
from neft_core.config import read_yaml, yaml_text
from neft_core.drawing import named
from neft_core.study_tables import readable
from neft_core.summary import summarise
from neft_core.workspace import REPORTS, Workspace

CODE = '</script><script>alert("{x}")</script><img src=http://x.invalid/a onerror=b>&amp;'
PIPES = "a|b||`c`|\\|*d*[e](http://x.invalid)\n# f"
LONG = "Sprachverarbeitungs" * 10
RIGHT = "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u202e"
HAN = "翻译 हिन्दी"
MATH = "_$x_1$ 9 %"
HOSTILE = (CODE, PIPES, LONG, RIGHT, HAN, MATH)

PARTS = [
    {"show": "table", "title": f"{CODE} {PIPES}", "tasks": {"en-fr": f"{PIPES} {CODE}"},
     "rows": dict(zip(HOSTILE, ("base", "tuned", "full", "lora", "neft", ["full", "neft"]),
                      strict=True)),
     "metrics": ["bleu", "chrf"], "paper": {LONG: {"en-fr": [1.5, 2.5]}}, "notes": list(HOSTILE)},
    {"show": "rates", "task": "en-fr", "title": LONG, "notes": [CODE]},
    {"show": "trade_off", "task": "en-fr", "title": RIGHT, "levels": {MATH: "base", CODE: "tuned"},
     "series": {CODE: ["full"], LONG: ["lora"], PIPES: ["neft"], RIGHT: ["neft"], HAN: ["full"]}},
    {"show": "wins", "trained": ["en-fr"], "title": CODE, "notes": [PIPES],
     "series": {CODE: ["full"], LONG: ["neft"]}},
    {"show": "added", "task": "en-fr", "start": "neft", "title": HAN,
     "ways": {text: ["full"] for text in HOSTILE}},
    {"show": "cost", "task": "en-fr", "title": PIPES, "rows": dict.fromkeys(HOSTILE, "neft")},
    {"show": "sensitivity", "task": "en-fr", "title": MATH, "reference": "neft",
     "groups": {text: ["neft"] for text in HOSTILE}},
]  # fmt: skip


def studied(root: Path, **failed: str) -> Workspace:
    """A study in a workspace, its page and files made."""
    ws = Workspace(root)
    data = read_yaml(ws.params_file)
    data["study"] = {"title": f"{CODE} {PIPES}", "about": " ".join(HOSTILE), "rates": PIPES}
    data["study"] |= {"parts": PARTS, "failed": failed}
    ws.params_file.write_text(yaml_text(data))
    summarise(ws)
    report.report(ws)
    run_links.write(ws)
    return ws


@pytest.fixture(scope="module")
def hostile(finished, tmp_path_factory):
    root = shutil.copytree(finished.root, tmp_path_factory.mktemp("study") / "w")
    return studied(root, **{"evaluate@lora": f"{CODE} {PIPES} {LONG}"})


def words(text: str) -> str:
    return " ".join(text.split())


def checked(made: Reader, text: str) -> None:
    """The texts stand there as texts, and nothing that they say is done."""
    for hostile in HOSTILE:
        assert words(hostile) in text
    assert not {tag for tag, _ in made.tags} & {"script", "img", "em", "iframe", "blockquote"}
    assert not [name for _, a in made.tags for name in a if name.startswith("on")]


def test_on_the_page_they_are_text(hostile):
    made = Reader((hostile.root / REPORTS / "report.html").read_text(encoding="utf-8"))
    assert made.open == []
    checked(made, made.text)
    links = {a["href"] for tag, a in made.tags if tag == "a"}
    assert all(link.startswith(("#", "figures/", "mlflow.html#")) for link in links), links
    made = Reader((hostile.root / REPORTS / "mlflow.html").read_text(encoding="utf-8"))
    assert made.open == []
    assert f"MLflow runs: {words(CODE)} {words(PIPES)}" in made.text


def test_in_markdown_they_are_text(hostile):
    """As a renderer that isn't ours reads it."""
    text = (hostile.root / REPORTS / "study" / "study.md").read_text(encoding="utf-8")
    made = Reader(MarkdownIt("commonmark").enable("table").render(text))
    assert made.open == []
    checked(made, made.text)
    assert {tag for tag, _ in made.tags} == {
        "h1", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "a", "strong",
    }  # fmt: skip
    assert {a["href"] for tag, a in made.tags if tag == "a"} == {
        "../mlflow.html#full", "../mlflow.html#neft",
    }  # fmt: skip
    tables = [tag for tag, _ in made.tags if tag == "table"]
    assert len(tables) == len(list((hostile.root / REPORTS / "study").glob("*.csv")))
    told = readable(text)
    assert all(words(hostile) in words(told) for hostile in HOSTILE)
    assert "mlflow.html" not in told


def test_in_csv_they_are_the_texts_themselves(hostile):
    folder = hostile.root / REPORTS / "study"
    with (folder / "table.csv").open(encoding="utf-8", newline="") as handle:
        heads, *rows = csv.reader(handle)
    assert {len(row) for row in rows} == {len(heads)}
    assert [row[0] for row in rows] == list(HOSTILE)
    assert heads[3] == f"{PIPES} {CODE} BLEU"
    reason = rows[3][heads.index(f"{heads[3]} failed")]
    assert reason == " ".join((CODE, PIPES, LONG))


def test_in_figures_they_are_short_and_drawn_without_a_warning(hostile):
    """Warnings are errors in tests; a name that matplotlib would hide is there."""
    files = list((hostile.root / REPORTS / "figures").glob("study-*.svg"))
    assert len(files) == 5
    for path in files:
        tree = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        said = {words("".join(node.itertext())) for node in tree.iter() if node.tag[-4:] == "text"}
        assert len(said) > 5
        if path.stem == "study-added":
            assert said >= {words(named(hostile)) for hostile in HOSTILE}
            height = float(tree.attrib["height"].removesuffix("pt"))
            assert height > 3 * 72 + 30, "room for six names"
        assert max(map(len, said)) < 60


def test_a_name_in_a_figure_by_hand():
    assert named("LoRA r=9") == "LoRA r=9"
    assert named("_a\n b\x07\u202e") == " _a b"
    assert named("0123456789abcdef", 9) == "01234…def"
    assert len(named(LONG)) == 44


@pytest.mark.integration
def test_a_browser_shows_it_alone_in_its_width_and_all_columns(hostile):
    command = browser.find()
    if command is None:
        pytest.skip("no Chromium here (on the PATH, or named by CHROME)")
    first = "[...document.querySelectorAll('#study th:first-child')]"
    with browser.browser(command) as window:
        for name in ("report", "mlflow"):
            path = hostile.root / REPORTS / f"{name}.html"
            for width, media in ((1280, ""), (390, ""), (688, "print")):
                for dark in (False, True):
                    window.open(path, width, dark=dark, media=media)
                    assert window.said() == []
                    assert window.asked() == [path.resolve().as_uri()]
                    assert window.value("document.documentElement.scrollWidth") == width
                    if name == "report":
                        wide = f"Math.max(...{first}.map(cell => cell.offsetWidth))"
                        assert window.value(wide) < 0.6 * width
