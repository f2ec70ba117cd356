"""The report of real, hand-written, hostile and half-empty workspaces."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from conftest import edit
from test_summary import by_hand

from neft_core import (
    findings,
    page,
    report,
    result_sections,
    run_links,
    sections,
)
from neft_core.findings import Findings
from neft_core.groups import Group
from neft_core.masks import NeuronMask, NeuronScores
from neft_core.page import Gallery, Html
from neft_core.rows import read_rows, write_rows
from neft_core.summary import summarise
from neft_core.workspace import REPORTS, Workspace

HOSTILE = '</dd></svg><script>alert("{x}")</script><img src=http://x.invalid/a onerror=b>&amp;'

STUDY = """
study:
  title: "<script>study</script>"
  about: "<img src=http://x.invalid/b>"
  parts:
    - show: table
      tasks: {en-fr: "<b>En"}
      rows: {Base: base, "<i>F": full, L: lora, N: neft}
      paper: {L: {en-fr: 1.5}}
  failed: {evaluate@lora: "<script>no</script>"}
"""


class Reader(HTMLParser):
    """What a page holds: tags with their attributes, and its text."""

    def __init__(self, whole: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.open: list[str] = []
        self.feed(whole)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "use", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


def rendered(ws) -> Reader:
    return Reader((ws.root / REPORTS / "report.html").read_text(encoding="utf-8"))


def cells(piece: str) -> dict[str, list[str]]:
    """The rows of the tables in a piece of a page, by their first cell."""
    found = {}
    for row in re.findall(r"<tr.*?</tr>", piece, re.DOTALL):
        texts = [
            re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)
        ]
        found[texts[0]] = texts[1:]
    return found


@pytest.fixture(scope="module")
def tiny(finished, tmp_path_factory):
    """The tiny workspace with two masks, a study, hostile texts, and its report."""
    ws = Workspace(shutil.copytree(finished.root, tmp_path_factory.mktemp("report") / "w"))
    edit(ws, ("English: {source}", "<script>{source}</script>"))
    with ws.params_file.open("a") as handle:
        handle.write(STUDY)
    path = ws.path("evaluation", "full", "seed-1.jsonl")
    write_rows(path, [{**row, "hypothesis": HOSTILE} for row in read_rows(path)])
    shutil.copy(ws.path("masks", "neft.safetensors"), ws.path("masks", "lora.safetensors"))
    report.report(ws)
    run_links.write(ws)
    return ws


def test_every_section_is_there_with_its_figures(tiny):
    made = rendered(tiny)
    assert made.open == [], "every element is closed"
    assert [a.get("id") for tag, a in made.tags if tag == "section"] == [
        "study", "results", "training", "neurons", "cost", "samples", "what-was-run",
    ]  # fmt: skip
    assert not any(a.get("class") == "absent" for _, a in made.tags)
    names = {a["id"].removeprefix("figure-") for tag, a in made.tags if tag == "figure"}
    folder = tiny.root / REPORTS / "figures"
    assert names == {path.stem for path in folder.glob("*.svg")}
    assert names == {path.stem for path in (folder / "png").iterdir()}
    assert {"trade-off-en-fr-bleu", "dev-loss-en-fr", "train-loss-en-fr", "sensitivity-en-fr",
            "neuron-map", "overlap", "seconds", "memory"} <= names  # fmt: skip
    for target in (a["href"] for tag, a in made.tags if tag == "a"):
        where = tiny.root / REPORTS / target.partition("#")[0]
        assert where.is_file() or target[1:] in {a.get("id") for _, a in made.tags}, target
    ids = [a["id"] for _, a in made.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_a_studys_cells_lead_to_each_runs_place(tiny):
    links = {a["href"] for tag, a in rendered(tiny).tags if tag == "a"}
    made = Reader((tiny.root / REPORTS / "mlflow.html").read_text(encoding="utf-8"))
    places = {a["id"] for _, a in made.tags if "id" in a}
    targets = {link.removeprefix("mlflow.html#") for link in links if link.startswith("mlflow")}
    assert targets == {"full", "lora", "neft"}, "lora's by its difference to full in the summary"
    assert places == {"full", "lora", "neft"}
    assert "neft (neft, lowest 9 %, en-fr): not in MLflow" in made.text
    text = rendered(tiny).text
    assert "failed (1)" in text
    assert "(1) <script>no</script>" in text


def test_texts_of_data_are_only_text(tiny):
    made = rendered(tiny)
    assert HOSTILE in made.text
    assert "<script>{source}</script>" in made.text, "params"
    assert not {tag for tag, _ in made.tags} & {"script", "img", "iframe", "object", "link"}
    assert not [name for _, a in made.tags for name in a if name.startswith("on")]


def test_it_needs_nothing_but_itself(tiny):
    whole = (tiny.root / REPORTS / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in whole
    assert "@import" not in whole
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", whole))
    made = Reader(whole)
    assert not [a for _, a in made.tags if "src" in a]
    links = [a["href"] for _, a in made.tags if "href" in a]
    assert all(link.startswith(("#", "figures/", "mlflow.html#")) for link in links)
    assert all(a.get("aria-label") for tag, a in made.tags if tag == "svg")


def test_it_tells_what_made_the_numbers(tiny):
    text = rendered(tiny).text
    found = Findings.read(tiny)
    assert found.signature()[:12] in text
    assert found.base()["hash"][:16] in text
    for split in found.splits("en-fr"):
        assert split.digest in text
    mask = found.masks["neft"]
    assert f"{mask.neurons:,} {mask.parameters:,} {mask.percent:.2f}" in text
    edit(tiny, ("experiment: tiny", "experiment: other"))
    assert Findings.read(tiny).signature() == found.signature()
    edit(tiny, ("bootstrap: 100", "bootstrap: 101"))
    assert Findings.read(tiny).signature() != found.signature()
    edit(tiny, ("bootstrap: 101", "bootstrap: 100"), ("experiment: other", "experiment: tiny"))


def test_again_it_has_the_same_bytes(tiny):
    folder = tiny.root / REPORTS
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report.report(tiny)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_is_missing_is_said_in_a_line(tiny, tmp_path):
    ws = Workspace(tmp_path)
    shutil.copy(tiny.params_file, tmp_path)
    report.report(ws)
    made = rendered(ws)
    assert sum(a.get("class") == "absent" for _, a in made.tags) == len(report.SECTIONS)
    assert "There is no result table yet." in made.text
    assert "No run selects neurons, and none were scored." in made.text
    assert list((ws.root / REPORTS / "figures" / "png").iterdir()) == []


# Results


@pytest.fixture
def written(tmp_path):
    ws = by_hand(tmp_path)
    summarise(ws)
    return Findings.read(ws)


def test_the_best_run_is_bold_and_the_base_is_not(written):
    piece = str(result_sections.results(written, Gallery()))
    best = re.findall(r"<strong>(.*?)</strong>", piece)
    assert [re.sub("<[^>]+>", "", text).split()[0] for text in best] == [
        "30.00", "15.00", "1.000", "9.00", "4.50", "3.000",
    ]  # fmt: skip


def test_a_row_has_means_deviations_and_marks(written):
    piece = str(result_sections.results(written, Gallery()))
    table = cells(piece.split("<h3>fr-en</h3>")[0])
    assert table["run"] == ["BLEU", "chrF", "Δ to full", "Δ to lora", "Δ to base", "dev loss",
                            "trained parameters", "% of model", "seeds"]  # fmt: skip
    row = next(r for r in written.rows("en-fr") if r["name"] == "neft")
    deltas = [
        f"{float(row[f'delta_{name}']):+z.2f}".replace("-", "−")
        for name in ("full", "lora", "base")
    ]
    marks = [
        "*" * sum(float(row[f"p_{n}"]) < p for p in (0.05, 0.01)) for n in ("full", "lora", "base")
    ]
    assert table["neft neft, lowest 9 %"] == [
        "23.00 ± 4.24", "11.50 ± 2.12", *(d + m for d, m in zip(deltas, marks, strict=True)),
        "1.500 ± 0.707", "1,234", "12.35", "2",
    ]  # fmt: skip
    assert "**" in marks
    assert table["base"] == ["5.00", "2.00", *"–" * 7]
    assert table["full"][2] == "–"
    assert f"p = {float(row['p_base']):.3f}" in piece


def test_the_verdict_orders_the_runs(written):
    text = re.sub("<[^>]+>", "", result_sections.verdict(written))
    assert (
        "en-fr: full reaches 30.00 BLEU with 12.3 % of the parameters trained; "
        "then neft 23.00, lora 20.00; the base model, untrained, 5.00." in text
    )
    assert "fr-en: other reaches 9.00 BLEU" in text


def test_the_trade_off_has_a_line_for_each_method(written):
    gallery = Gallery()
    result_sections.results(written, gallery)
    assert gallery.svgs.keys() == {
        f"trade-off-{task}-{metric}" for task in ("en-fr", "fr-en") for metric in ("bleu", "chrf")
    }
    drawn = gallery.svgs["trade-off-en-fr-bleu"]
    assert all(f">{name}</text>" in drawn for name in ("base", "full", "lora", "neft lowest"))


def test_runs_of_another_task_are_told_apart(tmp_path):
    """All three of en-fr are tested on fr-en too, where they have more than its own run."""
    ws = by_hand(tmp_path)
    moved = "".join(f"  {n}-moved: {{run: {n}, task: fr-en}}\n" for n in ("full", "lora", "neft"))
    edit(ws, ("evaluation:", f"transfers:\n{moved}evaluation:"))
    for name in ("full", "lora", "neft"):
        place = ws.path("evaluation", name)
        shutil.copytree(place, place.with_name(f"{name}.fr-en"))
    summarise(ws)
    found = Findings.read(ws)
    said = re.sub("<[^>]+>", "", str(result_sections.verdict(found))).replace(".;", ";")
    assert "fr-en: other reaches 9.00 BLEU with 12.3 % of the parameters trained; the base" in said
    assert "fr-en, trained on en-fr: full reaches 30.00 BLEU" in said
    gallery = Gallery()
    piece = str(result_sections.results(found, gallery)).split("<h3>fr-en</h3>")[1]
    best = re.findall(r"<strong>(.*?)</strong>", piece)
    assert [re.sub("<[^>]+>", "", text).split()[0] for text in best] == [
        "9.00", "4.50", "3.000", "30.00", "15.00",
    ]  # fmt: skip
    assert "full trained on en-fr" in cells(piece)
    own, other = (gallery.svgs[f"trade-off-fr-en-bleu{name}"] for name in ("", "-from-en-fr"))
    names = ("full", "lora", "neft lowest")
    assert [name for name in names if f">{name}</text>" in own] == ["lora"], "of its own run"
    assert [name for name in names if f">{name}</text>" in other] == list(names)


def test_a_study_leaves_out_tasks_that_none_of_its_runs_is_about(tmp_path):
    ws = by_hand(tmp_path)
    edit(ws, ("  other:\n    task: fr-en\n", "  other:\n    task: en-fr\n"))
    summarise(ws)

    def shown() -> list[str]:
        return re.findall(
            "<h3>(.*?)</h3>", str(result_sections.results(Findings.read(ws), Gallery()))
        )

    assert shown() == ["en-fr", "fr-en"], "no study"
    with ws.params_file.open("a") as handle:
        handle.write(STUDY)
    assert shown() == ["en-fr"]
    edit(ws, ("evaluation:", "transfers: {moved: {run: other, task: fr-en}}\nevaluation:"))
    assert shown() == ["en-fr", "fr-en"]


# Neurons

UP, DOWN = Group("m.layers.0.up_proj", 0, 0, 4, 8), Group("m.layers.1.up_proj", 0, 10, 6, 8, step=2)
GROUPS = {group.module: group for group in (UP, DOWN)}


def mask(first: list[int], second: list[int], **provenance: str) -> NeuronMask:
    chosen = zip((UP.module, DOWN.module), (first, second), strict=True)
    indices = {module: torch.tensor(which, dtype=torch.int64) for module, which in chosen}
    return NeuronMask(indices, GROUPS, 100, {"base": "b", **provenance})


def test_shares_of_layers_and_parts():
    layers, parts, rows = findings.shares(mask([0, 3], [12]))
    assert (layers, parts, rows) == (["0", "1"], ["up"], [[0.5], [1 / 6]])


def test_parts_of_one_name_keep_their_whole_one():
    names = ["h.0.mlp.up_proj", "h.0.shared.up_proj", "h.0.mlp.down_proj", "head"]
    assert findings.places(names) == {
        names[0]: ("0", "mlp.up_proj"),
        names[1]: ("0", "shared.up_proj"),
        names[2]: ("0", "down"),
        "head": ("-", "head"),
    }


def test_overlaps_and_chance_by_hand():
    masks = {"a": mask([0, 1], [10, 12]), "b": mask([1], []), "other": mask([1], [], layout="x")}
    found, chance = findings.overlaps(masks)
    assert found == [[1, 0.25, None], [1, 1, None], [None, None, 1]]
    assert chance[0] == [0.4, 0.1, None]


def test_the_cut_is_the_lowest_that_a_mask_holds():
    values = {UP.module: torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)}
    values[DOWN.module] = torch.arange(6).double() / 10
    scores = NeuronScores(values, GROUPS, 100)
    assert findings.lowest_selected(mask([0, 3], [18, 20]), scores) == 0.3
    assert findings.lowest_selected(mask([], [12]), scores) == 0.1
    early = NeuronScores(values, GROUPS, 100, {"steps": "5"})
    assert findings.lowest_selected(mask([0], [12]), early) is None, "a cut in other scores"
    assert findings.lowest_selected(mask([0], [12], steps="5"), early) == 0.1
    other = NeuronScores(scores.sensitivity, GROUPS | {DOWN.module: replace(DOWN, start=11)}, 100)
    assert findings.lowest_selected(mask([0], [12]), other) is None


# Samples and costs


def test_samples_are_spread_over_the_test_rows(tiny):
    rows = Findings.read(tiny).samples("en-fr", 4)
    assert [row["number"] for row in rows] == [2, 4, 6, 8]
    whole = read_rows(tiny.path("evaluation", "neft", "seed-1.jsonl"))
    assert [row["texts"]["neft"] for row in rows] == [whole[n]["hypothesis"] for n in (1, 3, 5, 7)]
    # What lora's evaluation left was made before it failed.
    assert list(rows[0]["texts"]) == ["base", "tuned", "full", "neft"]
    assert len(Findings.read(tiny).samples("en-fr", 50)) == 8


def test_what_base_and_corpus_left_before_they_failed_is_not_told(finished, tmp_path):
    ws = Workspace(shutil.copytree(finished.root, tmp_path / "w"))
    found = Findings.read(ws)
    assert found.base()["model_type"] == "llama"
    assert [split.name for split in found.splits("en-fr")]
    with ws.params_file.open("a") as handle:
        handle.write(STUDY.replace("evaluate@lora", "base"))
    assert Findings.read(ws).base() == {}
    edit(ws, ("failed: {base", "failed: {corpus@en-fr"))
    assert Findings.read(ws).splits("en-fr") == []
    report.report(ws)
    assert "corpus@en-fr: <script>no</script>" in rendered(ws).text


def test_a_text_that_equals_a_reference_is_ticked():
    row = {
        "number": 1,
        "source": "s",
        "references": ["a", "b"],
        "texts": {"x": " b", "y": "c", "z": ""},
    }
    piece = sections._sample(row)
    assert re.findall(r'<dt>(\w)</dt><dd dir="auto"( class="right")?>(.*?)</dd>', piece) == [
        ("x", ' class="right"', " b"), ("y", "", "c"), ("z", "", "(nothing)"),
    ]  # fmt: skip


def test_costs_of_every_stage_that_is_measured(tiny):
    piece = str(sections.cost(Findings.read(tiny), Gallery()))
    table = cells(piece)
    assert list(table) == ["stage or run", "score-en-fr", "warmup-en-fr", "full", "lora", "neft"]
    assert table["neft"][0] == "816"
    assert "±" in table["neft"][2]
    assert "±" not in table["full"][2]
    assert table["score-en-fr"][0] == table["score-en-fr"][5] == "–"


def test_a_mask_costs_the_stages_that_it_was_made_of(written):
    text = written.ws.params_file.read_text()
    runs = """\
  several:
    task: en-fr
    method:
      name: neft
      parts:
        - {policy: lowest, percent: 3}
        - {policy: random, percent: 1}
        - {policy: activation, scores: acts, share: 0.1}
  control: {task: en-fr, method: {name: neft, policy: random, percent: 3}}
evaluation:"""
    more = "warmups: {early: {task: en-fr, steps: 3}}\n"
    more += "activations: {acts: {task: en-fr, warmup: early}}\n"
    written.ws.params_file.write_text(text.replace("evaluation:", runs, 1) + more)
    found = Findings.read(written.ws)
    assert found.before("several") == ["warmup-en-fr", "score-en-fr", "warmup-early", "score-acts"]
    assert found.before("control") == found.before("lora") == []
    assert found.families["several"] == "neft lowest + random + activation by acts"


# The page


def test_only_html_passes_unescaped():
    assert page.text("<b>&") == "&lt;b&gt;&amp;"
    assert page.text(Html("<b>")) == "<b>"
    assert page.fill("<i>{x}{y}</i>", x="{y}<", y=Html("<u>")) == "<i>{y}&lt;<u></i>"
    assert page.join(["<", Html("<br>")], "|") == "&lt;|<br>"
    assert "&lt;" in page.table([("<", False)], [["<"]])
