"""Parts of a study that analyse its runs, in a tiny workspace, against plain loops."""

import csv
import io
import itertools
import json
import re
import shutil
import statistics

import browser
import pytest
import test_report_in_browser
import test_study_page
from conftest import edit, run_stages

from neft_core import study_parts
from neft_core.files import load_tensors, read_json, write_json
from neft_core.findings import Findings
from neft_core.masks import NeuronMask, NeuronScores
from neft_core.page import Gallery
from neft_core.study_tables import Table
from neft_core.workspace import Workspace

RUNS = """\
  low-3-en-fr: {task: en-fr, method: {name: neft, percent: 3}, seeds: [1, 2], epochs: 1}
  low-6-en-fr: {task: en-fr, method: {name: neft, percent: 6}, seeds: [1, 2], epochs: 1}
  mixed-en-fr:
    task: en-fr
    epochs: 1
    seeds: [1, 2]
    method: {name: neft, parts: [{percent: 3}, {policy: reversed, percent: 3}]}
  none-en-fr:
    task: en-fr
    method: {name: neft, policy: threshold, below: -1, any_size: true}
  scaled-en-fr:
    task: en-fr
    epochs: 1
    method: {name: neft, policy: threshold, below_scaled: 0.5, scores: late}
warmups:
  late: {task: en-fr, steps: 12}
  other: {task: en-fr, seed: 2}
utilisation:
  low-3: {run: low-3-en-fr, task: en-fr, rows: 4}
  low-6: {run: low-6-en-fr, task: en-fr, rows: 4}
  full: {run: full, task: en-fr, rows: 4}
forgetting:
  low-6: {run: low-6-en-fr, path: text.txt}
speed:
  low-6: {run: low-6-en-fr, task: en-fr, rows: 2, new_tokens: 3, repeats: 2}
study:
  title: All parts
  parts:
    - {show: overlap, rows: {longer: [[en-fr, late]], seeds: [[en-fr, other], [late, other]]},
       percents: [3, 6], paper: {longer: [63, 68]}}
    - {show: trade_off, task: en-fr, series: {NeFT: [low-3, low-6], LoRA: [lora]},
       levels: {base: base, full: full}}
    - {show: rank_change, task: en-fr, pairs: {more: [low-3, low-6], seeds: [low-3, low-3]}}
    - {show: added, task: en-fr, start: low-3, ways: {lowest: [low-6], reversed: [mixed]},
       against: [low-6],
       paper: {low-6: 28.67, mixed: 27.0}}
    - show: average_change
      task: en-fr
      names: {low 3: low-3, low 6: low-6, base: base, mixed: mixed}
      anchors: {low 3: [low 6, low 3, mixed], base: [low 3]}
    - show: types
      task: en-fr
      names: {low 3: low-3, low 6: low-6, full: full, base: base}
      anchors: {low 3: [low 6, full], base: [low 3]}
    - {show: cost, task: en-fr, rows: {FT-full: full, NeFT 6: low-6, LoRA: lora, none: none,
       mixed: mixed}}
    - {show: forgetting, task: en-fr, rows: {NeFT 6: low-6, LoRA: lora}, metric: chrf}
    - {show: sensitivity, task: en-fr, reference: low-6,
       against: [low-3, low-6], groups: {threshold: [none, scaled], budget: [low-3, low-6]}}
evaluation:"""


@pytest.fixture(scope="module")
def studied(finished, tmp_path_factory):
    """The finished tiny workspace with more runs and a study of them; only to be read."""
    root = tmp_path_factory.mktemp("studied") / "ws"
    ws = Workspace(shutil.copytree(finished.root, root))
    (ws.root / "text.txt").write_text("the cat sees\na red dog\nfish\n")
    edit(ws, ("evaluation:", RUNS))
    from neft_core.stages import STAGES

    for name in ("late", "other"):
        STAGES["warmups"](ws, name)
        STAGES["similarity"](ws, name)
    STAGES["assign"](ws)
    for name in ("low-3", "low-6", "mixed", "none", "scaled"):
        for stage in ("select", "train", "evaluate"):
            STAGES[stage](ws, f"{name}-en-fr")
    run_stages(ws, "utilisation", "forgetting", "speed", "summary")
    told_apart(ws)
    run_stages(ws, "report")
    return ws


def told_apart(ws) -> None:
    """So small a model says nothing right: let each row of the summary have scores of its own."""
    path = ws.path("summary", "summary.csv")
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    for place, row in enumerate(rows):
        row |= {"bleu": 11.5 + 3 * place, "chrf": 60.25 - 2 * place}
        row |= {"bleu_std": 0.125 * place, "chrf_std": 0.25 * place}
        if row["name"] not in ("base", "tuned", "full"):
            row |= {"delta_full": -1.5 * place, "p_full": 0.004 * place}
        if row["name"] not in ("base", "tuned", "lora"):
            row |= {"delta_lora": 0.25 * place, "p_lora": 0.5}
    with path.open("w") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def changed(studied, tmp_path):
    """A copy of it that may be changed."""
    return Workspace(shutil.copytree(studied.root, tmp_path / "changed"))


def made(ws) -> dict[str, Table]:
    pieces = study_parts.made(Findings.read(ws), Gallery())
    return {piece.name: piece for piece in pieces if isinstance(piece, Table)}


def shown(tables: dict[str, Table]) -> dict[str, list[dict[str, str]]]:
    """Every table's CSV, by name."""
    return {name: list(csv.DictReader(io.StringIO(t.csv()))) for name, t in tables.items()}


@pytest.fixture(scope="module")
def cells(studied):
    return made(studied)


@pytest.fixture(scope="module")
def tables(cells):
    return shown(cells)


def lowest(ws, name: str, percent: float) -> set[tuple[str, int]]:
    """The most sensitive neurons that a budget pays for, by sorting a list."""
    scores = NeuronScores.load(ws.path("scores", f"{name}.safetensors"))
    every = [(-value, place, module, index)
             for place, (module, values) in enumerate(scores.sensitivity.items())
             for index, value in enumerate(values.tolist())]  # fmt: skip
    count = int(percent / 100 * scores.total_parameters / 16)
    return {(module, index) for _, _, module, index in sorted(every)[:count]}


def test_overlap_by_sets(studied, tables):
    longer, seeds, chance, within = tables["overlap"]
    for percent in (3, 6):
        mine, late, other = (lowest(studied, n, percent) for n in ("en-fr", "late", "other"))
        share = 100 * len(mine & late) / len(mine)
        assert float(longer[f"{percent} %"]) == pytest.approx(share)
        shares = [100 * len(a & other) / len(other) for a in (mine, late)]
        assert float(seeds[f"{percent} %"]) == pytest.approx(statistics.mean(shares))
        assert float(seeds[f"{percent} % sd"]) == pytest.approx(statistics.stdev(shares), abs=1e-5)
        assert float(chance[f"{percent} %"]) == pytest.approx(100 * len(mine) / 96)
    assert (longer["3 % paper"], longer["6 % paper"]) == ("63.0", "68.0")
    assert within["neurons in common"] == "by chance within modules"


def summary(ws, run: str) -> dict[str, str]:
    lines = csv.DictReader(io.StringIO(ws.path("summary", "summary.csv").read_text()))
    return next(row for row in lines if row["name"] == run)


def test_points_of_the_trade_off_are_the_results(studied, tables):
    rows = {row["run"]: row for row in tables["trade-off"]}
    assert list(rows) == ["low-3-en-fr", "low-6-en-fr", "lora", "base", "full"]
    for run, row in rows.items():
        result = summary(studied, run)
        assert float(row["BLEU, en-fr"]) == float(result["bleu"])
        assert row["BLEU, en-fr sd"] == result["bleu_std"]
        if run != "base":
            assert float(row["trained parameters"]) == float(result["parameters"])


def test_what_was_added_is_told_from_the_start(studied, tables):
    rows = {row["run"]: row for row in tables["added"]}
    assert [row["added"] for row in tables["added"]] == ["nothing", "lowest", "reversed"]
    percents = {run: float(summary(studied, run)["percent"]) for run in rows}
    scores = {run: float(summary(studied, run)["bleu"]) for run in rows}
    for run, row in rows.items():
        assert float(row["% of model"]) == percents[run]
        assert float(row["added % of model"]) == pytest.approx(
            percents[run] - percents["low-3-en-fr"], abs=1e-5
        )
        if run != "low-3-en-fr":
            delta = scores[run] - scores["low-3-en-fr"]
            assert float(row["Δ to the start"]) == pytest.approx(delta, abs=1e-5)
    assert [row["the paper's"] for row in tables["added"]] == ["–", "28.67", "27.0"]


def ranks(ws, name: str) -> dict[str, list[int]]:
    path = ws.path("evaluation", f"utilisation.{name}.safetensors")
    return {key: values.tolist() for key, values in load_tensors(path, "")[0].items()}


def changes(ws, first: tuple[str, str], second: tuple[str, str]) -> list[int]:
    before, after = (ranks(ws, name)[key] for name, key in (first, second))
    return [b - a for a, b in zip(before, after, strict=True)]


def test_rank_changes_by_loops(studied, tables):
    more, seeds = tables["rank-change"]
    edges = (0, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 1)
    for low, high in itertools.pairwise(edges):
        head, values, own = f"{100 * low:g}–{100 * high:g} %", [], []
        for seed in ("seed-1", "seed-2"):
            order = ranks(studied, "low-3")[seed]
            change = changes(studied, ("low-3", seed), ("low-6", seed))
            mine = [abs(c) for c, r in zip(change, order, strict=True) if low <= r / 96 < high]
            values.append(statistics.mean(mine or [0]))
            if seed == "seed-1":
                change = changes(studied, ("low-3", "seed-1"), ("low-3", "seed-2"))
                own = [abs(c) for c, r in zip(change, order, strict=True) if low <= r / 96 < high]
        assert float(more[head]) == pytest.approx(statistics.mean(values))
        assert float(more[f"{head} sd"]) == pytest.approx(statistics.stdev(values))
        assert float(seeds[head]) == pytest.approx(statistics.mean(own or [0]))


def test_average_change_by_loops_and_what_was_not_measured(studied, tables):
    rows = {(row["against"], row["run"]): row for row in tables["average-change"]}
    assert rows["low 3", "mixed"]["Avg(ΔRank)"] == "not measured in utilisation"
    pairs = {("low 3", "low 6"): [(("low-3", s), ("low-6", s)) for s in ("seed-1", "seed-2")],
             ("low 3", "another seed"): [(("low-3", "seed-1"), ("low-3", "seed-2"))],
             ("base", "low 3"): [(("low-3", "base"), ("low-3", s))
                                 for s in ("seed-1", "seed-2")]}  # fmt: skip
    for place, compared in pairs.items():
        means = [statistics.mean(map(abs, changes(studied, a, b))) for a, b in compared]
        assert float(rows[place]["Avg(ΔRank)"]) == pytest.approx(statistics.mean(means))
        share = 100 * statistics.mean(means) / 96
        assert float(rows[place]["% of candidates"]) == pytest.approx(share)


def test_use_on_other_rows_is_not_compared(changed):
    head = "low-6: {run: low-6-en-fr, task: en-fr, rows: "
    edit(changed, (f"{head}4}}", f"{head}3, per_example: true}}"))
    found = shown(made(changed))
    told = "on 4 rows of en-fr and on 3 rows of en-fr, each by itself: not comparable"
    assert found["rank-change"][0]["0–1 %"] == f"measured {told}"
    rows = {(row["against"], row["run"]): row for row in found["average-change"]}
    assert rows["low 3", "low 6"]["Avg(ΔRank)"] == f"measured {told}"
    assert float(rows["base", "low 3"]["Avg(ΔRank)"]) > 0
    assert float(rows["low 3", "another seed"]["Avg(ΔRank)"]) > 0


def test_of_several_measurements_those_on_the_same_rows_are_compared(changed, tables):
    """The first of low-3 is on other rows; its file has the ranks of another run."""
    place = changed.path("evaluation")
    shutil.copy(place / "utilisation.full.safetensors", place / "utilisation.odd.safetensors")
    edit(changed, ("utilisation:\n",
                   "utilisation:\n  odd: {run: low-3-en-fr, task: en-fr, rows: 3}\n"))  # fmt: skip
    found = shown(made(changed))
    for name in ("rank-change", "average-change", "types"):
        assert found[name][0] == tables[name][0], "low-3 against low-6"


def test_neuron_types_by_loops(studied, tables):
    rows = {(row["against"], row["run"]): row for row in tables["types"]}
    masks = {name: NeuronMask.load(studied.path("masks", f"{name}-en-fr.safetensors"))
             for name in ("low-3", "low-6")}  # fmt: skip
    places = [(m, i) for m, group in masks["low-3"].groups.items() for i in range(group.count)]
    for label, other, changed in (("low 6", "low-6", {"low-3", "low-6"}), ("full", "full", None)):
        # Of a run with one seed that is compared with both of the other's.
        seeds = [("seed-1", "seed-1"), ("seed-2", "seed-2" if other == "low-6" else "seed-1")]
        counts = []
        for a, b in seeds:
            change = changes(studied, ("low-3", a), (other, b))
            strong = [n for n, c in enumerate(change) if abs(c) > 96 * 100_000 / 704_512]
            free = [n for n in strong if changed is not None and not any(
                places[n][1] in masks[m].indices.get(places[n][0], []).tolist()
                if places[n][0] in masks[m].indices else False for m in changed)]  # fmt: skip
            down = [n for n in strong if change[n] > 0]
            counts.append((96, len(strong), len(down), len(free)))
        row = rows["low 3", label]
        for head, values in zip(
            ("neurons", "strongly affected", "suppressed", "indirectly affected"),
            zip(*counts, strict=True), strict=True,
        ):  # fmt: skip
            assert float(row[head]) == pytest.approx(statistics.mean(values))
    layers = tables["types-layers"]
    assert {(row["against"], row["run"]) for row in layers} == set(rows)
    for row in layers:
        counts = [float(row[f"layer {layer}"]) for layer in (0, 1)]
        whole = rows[row["against"], row["run"]]
        assert sum(counts) == pytest.approx(float(whole[row["type"]]))


def test_break_even_from_recorded_costs(changed):
    """By hand: full takes 4 ms a step, low-6 3 ms; 5 s of warm-up and scoring pay after 5,000."""
    cost = changed.path("cost")
    write_json(cost / "warmup-en-fr.json", {"seconds": 4.5, "peak_bytes": 3e9})
    write_json(cost / "score-en-fr.json", {"seconds": 0.5, "peak_bytes": 2e9})
    for run, ms in (("full", [4.0]), ("low-6-en-fr", [2.5, 3.5]), ("lora", [5.0]),
                    ("mixed-en-fr", [3.0, 5.5])):  # fmt: skip
        steps = read_json(changed.path("train", run, "seed-1", "metrics.json"))["steps"]
        entries = {str(n): {"seconds": steps * value / 1000, "peak_bytes": 1e9}
                   for n, value in enumerate(ms, start=1)}  # fmt: skip
        write_json(cost / f"{run}.json", {"seeds": entries})
    speeds = {"base": [100.0, 200.0], "adapter": [50.0, 100.0], "merged": [110.0, 200.0]}
    path = cost / "speed.low-6.json"
    write_json(path, read_json(path) | {"tokens_per_second": speeds})
    found = shown(made(changed))
    full, low, lora, none, mixed = found["cost"]
    assert float(low["ms a step"]) == pytest.approx(3)
    assert float(low["ms a step sd"]) == pytest.approx(statistics.stdev([2.5, 3.5]))
    assert float(low["saved a step (ms)"]) == pytest.approx(1)
    assert float(low["saved a step (ms) sd"]) == pytest.approx(statistics.stdev([2.5, 3.5]))
    assert float(low["before training (s)"]) == 5
    assert float(low["its peak memory (GB)"]) == 3
    assert float(low["steps to break even"]) == pytest.approx(5000)
    assert lora["steps to break even"] == "never: no faster"
    told = "can't be told: the times differ by -0.25 ± 1.77 ms"
    assert mixed["steps to break even"] == told, "seeds 2.5 ms apart"
    assert (lora["before training (s)"], full["steps to break even"]) == ("none", "–")
    assert none["trained parameters"] == "nothing trained"
    (speed,) = found["cost-speed"]
    assert (float(speed["adapter / base"]), float(speed["merged / base"])) == (0.5, 1.05)


def test_forgetting_beside_gain(studied, tables):
    low, lora = tables["forgetting"]
    found = read_json(studied.path("evaluation", "forgetting.low-6.json"))
    losses = list(found["seeds"].values())
    assert float(low["loss before"]) == found["base"]
    assert float(low["forgotten"]) == pytest.approx(statistics.mean(losses) - found["base"])
    assert float(low["forgotten sd"]) == pytest.approx(statistics.stdev(losses))
    gain = float(summary(studied, "low-6-en-fr")["chrf"]) - float(summary(studied, "base")["chrf"])
    assert float(low["gain"]) == pytest.approx(gain, abs=1e-5)
    assert lora["% of model"] == "not measured"


def test_a_run_without_a_mask_has_no_count_of_neurons(changed):
    edit(changed, ("groups: {threshold: [none, scaled], budget: [low-3, low-6]}",
                   "groups: {budget: [low-3, low-6, full]}"))  # fmt: skip
    table = made(changed)["sensitivity"]
    assert [row[3].text == "–" for row in table.rows] == [False, False, True]
    assert float(table.rows[2][4].text) == 100
    assert not any("nothing is trained" in note for note in table.notes)


def test_what_was_forgotten_of_other_texts_is_not_compared(changed, tables):
    path = changed.path("evaluation", "forgetting.low-6.json")
    write_json(changed.path("evaluation", "forgetting.lora.json"), read_json(path))
    more = "  lora: {run: lora, path: text.txt, rows: 2}\n"
    edit(changed, ("forgetting:\n", f"forgetting:\n{more}"))
    low, lora = shown(made(changed))["forgetting"]
    assert low == tables["forgetting"][0]
    assert (lora["run"], lora["% of model"]) == (
        "lora", "measured on other texts (2 of text.txt)",
    )  # fmt: skip
    assert lora["forgotten"] == "–"
    # A further measurement, on the texts of the first row, is the one that counts.
    write_json(changed.path("evaluation", "forgetting.same.json"), read_json(path))
    edit(changed, ("speed:\n", "  same: {run: lora, path: text.txt}\nspeed:\n"))
    low, lora = shown(made(changed))["forgetting"]
    assert low == tables["forgetting"][0]
    assert lora["forgotten"] == low["forgotten"]


def test_sensitivity_tells_what_each_selection_got(studied, tables):
    none, scaled, low3, low6 = tables["sensitivity"]
    assert (none["selection"], none["neurons"], none["dev loss sd"]) == (
        "threshold below -1", "0", "",
    )  # fmt: skip
    assert float(none["BLEU"]) == float(summary(studied, "none-en-fr")["bleu"])
    assert (none["warm-up steps"], scaled["warm-up steps"]) == ("6", "12")
    masks = {name: NeuronMask.load(studied.path("masks", f"{name}-en-fr.safetensors"))
             for name in ("scaled", "low-3", "low-6")}  # fmt: skip
    sets = {name: {(m, i) for m, rows in mask.indices.items() for i in rows.tolist()}
            for name, mask in masks.items()}  # fmt: skip
    for row, name in ((scaled, "scaled"), (low3, "low-3"), (low6, "low-6")):
        assert int(row["neurons"]) == len(sets[name])
        if name != "low-6":
            share = 100 * len(sets[name] & sets["low-6"]) / len(sets[name])
            assert float(row["in common with the reference"]) == pytest.approx(share)
            assert float(row["by chance"]) == pytest.approx(100 * len(sets["low-6"]) / 96)


RUN_OF = {"more": "low-6-en-fr", "seeds": "low-3-en-fr", "low 3": "low-3-en-fr",
          "low 6": "low-6-en-fr", "another seed": "low-3-en-fr", "full": "full"}  # fmt: skip


def test_cells_about_a_run_lead_to_it_and_the_best_is_bold(cells):
    """Columns that link, each to the run of its row; and of scores the one that none exceeds."""
    linked = {
        "trade-off": ["BLEU, en-fr"],
        "rank-change": list(cells["rank-change"].heads[1:]),
        "added": ["BLEU", "Δ to the start"],
        "average-change": ["Avg(ΔRank)", "% of candidates"],
        "types": ["strongly affected", "suppressed", "indirectly affected"],
        "types-layers": ["layer 0", "layer 1"],
        "cost": ["ms a step", "saved a step (ms)", "peak memory (GB)"],
        "cost-speed": ["as adapter", "merged", "adapter / base", "merged / base"],
        "forgetting": ["chrF", "gain", "loss after", "forgotten"],
        "sensitivity": ["BLEU", "dev loss"],
    }
    more = ("-differences", "-against")
    assert {name for name in cells if not name.endswith(more)} == {*linked, "overlap"}
    best = {}
    for name, heads in linked.items():
        table = cells[name]
        columns = [list(column) for column in zip(*table.rows, strict=True)]
        links = [head for head, column in zip(table.heads, columns, strict=True)
                 if any(cell.run for cell in column)]  # fmt: skip
        assert links == heads, name
        for row in table.rows:
            (run,) = {cell.run for cell in row if cell.run} or {None}
            texts = {cell.text for cell in row}
            named = {RUN_OF.get(text, text) for text in texts}
            assert run is None or run in named or name == "sensitivity", (name, run, texts)
            about = [cell for cell, head in zip(row, table.heads, strict=True) if head in heads]
            assert "base" in named or all(cell.run for cell in about if cell.value is not None)
        for head, column in zip(table.heads, columns, strict=True):
            bold = {cell.run for cell in column if cell.best}
            best |= {(name, head): bold} if bold else {}
    assert best == {
        ("trade-off", "BLEU, en-fr"): {"low-6-en-fr"},
        ("added", "BLEU"): {"mixed-en-fr"},
        ("forgetting", "chrF"): {"low-6-en-fr"},
        ("sensitivity", "BLEU"): {"scaled-en-fr"},
    }


def test_every_score_is_told_against_full_and_lora(studied, tables):
    runs = {
        "trade-off": ["low-3-en-fr", "low-6-en-fr", "lora"],
        "added": ["low-3-en-fr", "low-6-en-fr", "mixed-en-fr"],
        "forgetting": {"NeFT 6": "low-6-en-fr"},
        "sensitivity": {"threshold below -1, K 6": "none-en-fr",
                        "threshold below 0.5 scaled by late, K 12": "scaled-en-fr",
                        "lowest 3 %, K 6": "low-3-en-fr", "lowest 6 %, K 6": "low-6-en-fr"},
    }  # fmt: skip
    for name, of in runs.items():
        rows = {row["method"]: row for row in tables[f"{name}-differences"]}
        assert list(rows) == list(of)
        for label, row in rows.items():
            result = summary(studied, of[label] if isinstance(of, dict) else label)
            for rival in ("full", "lora"):
                delta, p = (result[f"{key}_{rival}"] for key in ("delta", "p"))
                head = f"en-fr: Δ {rival if rival == 'full' else 'LoRA'}"
                assert row[head] == (delta or "–")
                assert row[f"{head} p"] == p


def test_figures_lie_beside_the_report(studied):
    drawn = {path.stem for path in (studied.root / "reports/figures").glob("study-*.svg")}
    assert drawn == {
        "study-overlap", "study-trade-off", "study-rank-change", "study-added", "study-cost",
        "study-average-change-1", "study-average-change-2", "study-types-1", "study-types-2",
        "study-forgetting", "study-sensitivity",
    }  # fmt: skip
    svg = (studied.root / "reports/figures/study-added.svg").read_text()
    assert all(f">{way}, the paper's<" in svg for way in ("lowest", "reversed"))
    page = (studied.root / "reports/report.html").read_text()
    text = (studied.root / "reports/study/study.md").read_text()
    for title in (
        "Overlap of selections",
        "Speed of generation",
        "Types of neurons by layer",
    ):
        assert title in page
        assert f"### {title}\n" in text
    assert "the base's own results" in text


@pytest.mark.integration
def test_a_browser_shows_every_part_in_its_width_and_prints_it_whole(studied):
    """With those of test_study_page.py these are all kinds of parts."""
    kinds = {part["show"] for part in test_study_page.PARTS}
    assert kinds | {part.show for part in studied.params().study.parts} == set(study_parts.PARTS)
    command = browser.find()
    if command is None:
        pytest.skip("no Chromium here (on the PATH, or named by CHROME)")
    path = studied.root / "reports" / "report.html"
    drawn = {f"figure-{p.stem}" for p in (studied.root / "reports/figures").glob("study-*.svg")}
    shown = "[...document.querySelectorAll('#study figure')]"
    with browser.browser(command) as window:
        for width, media in ((1280, ""), (390, ""), (688, "print")):
            window.open(path, width, media=media)
            assert window.said() == []
            assert window.asked() == [path.resolve().as_uri()]
            assert window.value("document.documentElement.scrollWidth") == width
            assert set(window.value(f"{shown}.map(f => f.id)")) == drawn
            wide = f"{shown}.map(f => f.querySelector('svg').clientWidth)"
            assert min(window.value(wide)) > 150
        assert not test_report_in_browser.cut(window)


def fail(ws, failed: dict[str, str], *runs: str) -> None:
    """Let stages have failed, and the summary leave out runs."""
    text = ws.params_file.read_text()
    ws.params_file.write_text(
        text.replace("  parts:\n", f"  failed: {json.dumps(failed)}\n  parts:\n", 1)
    )
    path = ws.path("summary", "summary.csv")
    kept = [row for row in csv.DictReader(io.StringIO(path.read_text())) if row["name"] not in runs]
    with path.open("w") as handle:
        writer = csv.DictWriter(handle, kept[0])
        writer.writeheader()
        writer.writerows(kept)


def test_what_failed_says_why(changed):
    shutil.rmtree(changed.path("evaluation", "low-6-en-fr"))
    changed.path("evaluation", "utilisation.low-6.safetensors").unlink()
    stages = ("train@low-6-en-fr", "evaluate@low-6-en-fr", "utilisation@low-6")
    fail(changed, dict.fromkeys(stages, "no memory"), "low-6-en-fr")
    found = shown(made(changed))
    told = {name: [row for row in found[name] if "low-6-en-fr" in row.values()
                   or {"low 6", "more"} & set(row.values())]
            for name in ("trade-off", "added", "rank-change", "average-change", "types", "cost",
                         "forgetting", "sensitivity")}  # fmt: skip
    for name, rows in told.items():
        assert rows, name
        assert "failed (1)" in rows[0].values(), name
        assert "no memory" in rows[0].values(), name


def test_files_of_a_time_before_are_not_shown_where_a_stage_failed(changed):
    """A stage that is skipped keeps the files that it made when it last ran."""
    assert {"full", "low-6-en-fr", "warmup-late", "score-late"} <= set(
        Findings.read(changed).costs()
    )
    late = ["warmups@late", "similarity@late", "select@scaled-en-fr"]
    low = ["select@low-6-en-fr", "utilisation@low-6", "forgetting@low-6", "speed@low-6"]
    runs = ["full", "low-6-en-fr", "scaled-en-fr"]
    stages = [*late, *low, *(f"{stage}@{run}" for run in runs for stage in ("train", "evaluate"))]
    fail(changed, dict.fromkeys(stages, "loss is nan"), *runs)
    found = shown(made(changed))
    longer, seeds, chance, within = found["overlap"]
    for row in (longer, seeds):
        assert (row["3 %"], row["6 %"]) == ("failed (1)", "failed (1)")
    assert chance["3 %"] == within["3 %"] == "–"
    (more,) = (row for row in found["rank-change"] if row["compared"] == "more")
    assert more["0–1 %"] == "failed (1)"
    assert found["average-change"][0]["Avg(ΔRank)"] == "failed (1)"
    assert found["types"][0]["neurons"] == "failed (1)"
    assert found["forgetting"][0]["% of model"] == "failed (1)"
    assert "cost-speed" not in found
    costs = {row["method"]: row for row in found["cost"]}
    assert costs["FT-full"]["trained parameters"] == "failed (1)"
    assert float(costs["LoRA"]["ms a step"]) > 0
    assert costs["LoRA"]["saved a step (ms)"] == costs["LoRA"]["steps to break even"] == "–"
    rows = {row["selection"]: row for row in found["sensitivity"]}
    assert rows["lowest 3 %"]["in common with the reference"] == "failed (1)"
    assert rows["lowest 3 %"]["by chance"] == "–"
    read = Findings.read(changed)
    assert set(read.masks) == {"low-3-en-fr", "mixed-en-fr", "neft"}
    assert not {*runs, "warmup-late", "score-late"} & set(read.costs())
    assert {"warmup-other", "score-other", "lora"} <= set(read.costs())
    assert read.seeds("full") == []
    assert {"lora", "neft"} <= read.samples("en-fr", 1)[0]["texts"].keys()
    assert not set(runs) & read.samples("en-fr", 1)[0]["texts"].keys()


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("[[en-fr, late]]", "[[en-fr, lat]]", "study.parts.0.rows.longer: got 'lat'; did you mean"),
        ("[[en-fr, late]]", "[[en-fr, en-fr]]", "rows.longer: got .*; two different scores"),
        ("paper: {longer: [63, 68]}", "paper: {longer: [63]}", "paper.longer: got .*; a label of"),
        ("NeFT: [low-3, low-6]", "NeFT: [low-33]", "study.parts.1.series.NeFT: got 'low-33'; did"),
        ("more: [low-3, low-6]", "more: [low-3]", "pairs.more: got .*; two runs are compared"),
        ("mixed: 27.0", "mixe: 27.0", "parts.3.paper: got 'mixe'; one that start or ways name"),
        ("start: low-3", "start: lo", "study.parts.3.start: got 'lo'; "),
        ("anchors: {low 3: [low 6, low 3", "anchors: {low: [low 6, low 3", "got the label 'low'"),
        ("metric: chrf", "metric: rouge1", "study.parts.7.metric: got 'rouge1'; known: bleu, chrf"),
        ("show: cost, task: en-fr", "show: cost, task: en", "study.parts.6.task: got 'en'; "),
    ],
)
def test_names_that_are_not_there_are_refused(changed, neft, old, new, line):
    edit(changed, (old, new))
    code, lines = neft(changed, "stage", "report")
    assert code == 2
    assert len(lines) == 1
    assert re.search(line, lines[0])
