"""The parts `table` and `rates` of a study, from evaluation files written by hand."""

import json

import pytest
from conftest import TINY_PARAMS
from test_summary import add_baseline, add_run, p_values

from neft_core import study_parts
from neft_core.config import read_yaml, yaml_text
from neft_core.errors import NeftError
from neft_core.findings import Findings
from neft_core.page import Gallery
from neft_core.report import report
from neft_core.study_runs import differences
from neft_core.study_tables import Table
from neft_core.summary import summarise
from neft_core.workspace import Workspace

METHODS = {
    "full": {"name": "full"},
    "lora-2": {"name": "lora", "rank": 2},
    "lora-9": {"name": "lora", "rank": 9},
    "neft": {"name": "neft", "percent": 9},
}
ROWS = {"Base": "base", "FT-full": "full", "LoRA_2": "lora-2", "LoRA_9": "lora-9", "NeFT": "neft"}


def made(folder, parts, failed=None, lr=None):
    """A workspace of two tasks, each with four runs, all of the first tested on the second too."""
    data = read_yaml(folder / "params.yaml")
    data["tasks"]["fr-en"] = data["tasks"]["en-fr"]
    data["runs"] = {
        f"{name}-{task}": {"task": task, "method": method, "seeds": [1, 2]}
        for task in data["tasks"]
        for name, method in METHODS.items()
    }
    for name, rate in (lr or {}).items():
        data["runs"][name]["lr"] = rate
    data["transfers"] = {
        f"{name}-moved": {"run": f"{name}-en-fr", "task": "fr-en"} for name in METHODS
    }
    study = {"title": "By hand", "about": "Why?", "rates": "One.", "parts": parts}
    data["study"] = study | {"failed": failed or {}}
    (folder / "params.yaml").write_text(yaml_text(data))
    return Workspace(folder)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "params.yaml").write_text(TINY_PARAMS)
    for task, more in (("en-fr", 0.0), ("fr-en", 100.0)):
        ws = Workspace(tmp_path)
        add_baseline(ws, task)
        # BLEU, dev loss and wrong sentences of both seeds.
        add_run(ws, f"full-{task}", {1: (30 + more, 1.0, 2), 2: (34 + more, 1.5, 2)}, 1)
        add_run(ws, f"lora-2-{task}", {1: (10 + more, 3.0, 9), 2: (14 + more, 3.5, 9)}, 1)
        add_run(ws, f"lora-9-{task}", {1: (20 + more, 2.0, 6), 2: (22 + more, 2.5, 6)}, 1)
        add_run(ws, f"neft-{task}", {1: (31 + more, 1.0, 4), 2: (35 + more, 1.0, 4)}, 1)
        for name, size in (("full", 9088), ("lora-2", 50), ("lora-9", 950), ("neft", 816)):
            for seed in (1, 2):
                path = ws.path("train", f"{name}-{task}", f"seed-{seed}", "metrics.json")
                said = json.loads(path.read_text())
                said |= {"trainable_parameters": size, "trainable_percent": size / 90.88}
                path.write_text(json.dumps(said))
    for name in METHODS:
        place = ws.path("evaluation", f"{name}-en-fr")
        moved = ws.path("evaluation", f"{name}-en-fr.fr-en")
        moved.mkdir()
        for path in place.iterdir():
            (moved / path.name).write_bytes(path.read_bytes())
    return tmp_path


def shown(ws):
    """The tables of the study, by name: texts of each row by its label."""
    summarise(ws)
    tables = study_parts.made(Findings.read(ws), Gallery())
    return {
        table.name: {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
        | {"heads": list(table.heads[1:]), "notes": list(table.notes)}
        for table in tables
        if isinstance(table, Table)
    }


TABLE = {"show": "table", "name": "t", "tasks": {"en-fr": "En", "fr-en": "Fr"}, "rows": ROWS}


def test_the_table_by_hand(folder):
    ws = made(folder, [TABLE | {"paper": {"NeFT": {"en-fr": 28.7}, "Base": {"fr-en": 0.5}}}])
    found = shown(ws)["t"]
    assert found["heads"] == ["trained parameters", "% of model", "En", "Fr"]
    assert found["Base"] == ["–", "–", "5.00", "5.00 (0.50)"]
    assert found["FT-full"] == ["9,088", "100.00", "32.00 ± 2.83", "132.00 ± 2.83"]
    assert found["LoRA_9"] == ["950", "10.45", "21.00 ± 1.41", "121.00 ± 1.41"]
    assert found["NeFT"] == ["816", "8.98", "33.00 ± 2.83 (28.70)", "133.00 ± 2.83"]
    assert found["notes"][-1].endswith("In brackets what the paper reports. Signature: B.")


def test_bold_is_the_best_run_and_links_to_it(folder):
    ws = made(folder, [TABLE])
    summarise(ws)
    table = study_parts.made(Findings.read(ws), Gallery())[0]
    best = [(row[0].text, cell.run) for row in table.rows for cell in row if cell.best]
    assert best == [("NeFT", "neft-en-fr"), ("NeFT", "neft-fr-en")]
    base = table.rows[0]
    assert [cell.run for cell in base] == [None] * 5
    assert table.rows[1][3].value == 32.0
    assert table.rows[1][3].more == {"sd": pytest.approx(8**0.5)}


def test_differences_to_full_and_to_the_lora_of_like_size(folder):
    found = shown(made(folder, [TABLE]))["t-differences"]
    assert found["heads"] == ["En: Δ full", "En: Δ LoRA", "Fr: Δ full", "Fr: Δ LoRA"]

    def said(wrong: int, other: int) -> str:
        delta, p = p_values(wrong, other)
        mark = "**" if p < 0.01 else "*" if p < 0.05 else ""
        return f"{delta:+z.2f}{mark} (p {p:.3f})".replace("-", "−")

    # Of 816 parameters, 950 are nearer than 50; what is wrong in the sentences is known.
    assert found["NeFT"] == [said(4, 2), said(4, 6)] * 2
    assert found["LoRA_2"][:2] == [said(9, 2), "–"]
    assert not {"Base", "FT-full"} & set(found), "no LoRA has half of 9,088"
    assert "the LoRA nearest in trained parameters, of those that have" in found["notes"][0]
    assert found["NeFT"][0].startswith("−")
    told = study_parts.made(Findings.read(Workspace(folder)), Gallery())[1]
    assert [cell.run for cell in told.rows[-1][1:]] == ["neft-en-fr"] * 2 + ["neft-fr-en"] * 2
    assert told.notes[0].startswith("Difference of BLEU to full fine-tuning, ")
    assert not any(cell.best for row in told.rows for cell in row)


@pytest.mark.parametrize(
    ("size", "told"), [(475, True), (474, False), (1900, True), (1901, False), (0, False)]
)
def test_a_lora_of_another_size_is_no_rival(folder, size, told):
    """One has 950 parameters, the other 50."""
    ws = made(folder, [TABLE])
    path = ws.path("train", "neft-en-fr", "seed-1", "metrics.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_parameters": size}))
    found = shown(ws)["t-differences"]
    assert found["heads"] == ["En: Δ full", *["En: Δ LoRA"] * told, "Fr: Δ full", "Fr: Δ LoRA"]
    assert "–" not in found["NeFT"], "of the other task NeFT has 816"


def test_differences_are_of_seeds_that_both_have(folder):
    ws = made(folder, [TABLE])
    data = read_yaml(ws.params_file)
    data["runs"]["neft-en-fr"]["seeds"] = [2]
    (folder / "params.yaml").write_text(yaml_text(data))
    said = "Compared in the seeds that both have: neft-en-fr to full (2); neft-en-fr to lora (2)."
    assert shown(ws)["t-differences"]["notes"][1:] == [said]
    report(ws)
    assert said in (folder / "reports" / "report.html").read_text()


def test_differences_name_the_metric_that_they_are_of(folder):
    """Of summaries it isn't the column that stands first."""
    found = Findings.read(made(folder, [TABLE]))
    scores = {"rouge1": "30.0", "rougeL": "29.0", "delta_full": "-2.0", "p_full": "0.01"}
    rows = [("NeFT", [{"name": "neft-en-fr", "bleu": "", **scores}])]
    (told,) = differences(found, "t", "T", ["Summaries"], rows)
    assert told.notes[0].startswith("Difference of ROUGE-L to full fine-tuning, ")


def test_runs_of_one_task_tested_on_others(folder):
    part = {"show": "table", "trained": "en-fr", "tasks": ["en-fr", "fr-en"], "rows": ROWS}
    found = shown(made(folder, [part]))["table"]
    assert found["NeFT"][2:] == ["33.00 ± 2.83"] * 2, "the same texts on both, by hand"
    assert found["Base"][2:] == ["5.00", "5.00"]


def test_a_whole_run_can_be_named_and_has_no_other_column(folder):
    part = TABLE | {"rows": {"One": "neft-en-fr", "Two": "full"}, "metrics": ["bleu", "chrf"]}
    found = shown(made(folder, [part]))["t"]
    assert found["heads"][2:] == ["En BLEU", "En chrF", "Fr BLEU", "Fr chrF"]
    assert found["One"][2:4] == ["33.00 ± 2.83", "16.50 ± 1.41"]
    # It was moved there by a transfer; without one there would be nothing.
    assert found["One"][4] == "33.00 ± 2.83"
    data = read_yaml(folder / "params.yaml")
    del data["transfers"]["neft-moved"]
    (folder / "params.yaml").write_text(yaml_text(data))
    assert shown(Workspace(folder))["t"]["One"][4:] == ["–", "–"]


def test_what_failed_is_shown_with_its_reason_and_the_rest_goes_on(folder):
    failed = {
        "train@neft-en-fr": "no memory",
        "evaluate@neft-en-fr": "no memory",
        "transfer@neft-moved": "no memory",
        "evaluate@lora-9-fr-en": "no, disk",
        "baseline@fr-en": "no memory",
    }
    ws = made(folder, [TABLE | {"paper": {"NeFT": {"en-fr": 28.7}}}], failed)
    for path in ("train/neft-en-fr", "evaluation/neft-en-fr", "evaluation/lora-9-fr-en"):
        for file in ws.path(path).rglob("*.*"):
            file.unlink()
    (ws.path("baseline", "fr-en") / "metrics.json").unlink()
    found = shown(ws)["t"]
    assert found["NeFT"] == ["816", "8.98", "failed (1)", "133.00 ± 2.83"]
    assert found["LoRA_9"][2:] == ["21.00 ± 1.41", "failed (2)"]
    assert found["Base"][2:] == ["5.00", "failed (1)"]
    assert found["notes"][:2] == ["(1) no memory", "(2) no, disk"]


def test_rates_by_hand(folder):
    rates = {"full-en-fr": 1e-3, "lora-2-en-fr": 1e-2, "lora-9-en-fr": 3e-2, "neft-en-fr": 1e-2}
    part = {"show": "rates", "task": "en-fr"}
    failed = {"evaluate@lora-9-en-fr": "no memory"}
    found = shown(made(folder, [part], failed, rates))["rates"]
    assert found["heads"] == ["0.001", "0.01", "0.03", "best"]
    assert found["full"] == ["1.250 ± 0.354", "–", "–", "0.001"]
    assert found["neft, lowest 9 %"] == ["–", "1.000 ± 0.000", "–", "0.01"]
    assert found["lora, rank 9"] == ["–", "–", "failed (1)", "–"]
    assert found["notes"][-1].endswith("bold: the best of a method."), "one rate has no edge"


def test_runs_that_differ_in_more_than_words_have_rows_of_their_own(folder):
    data = read_yaml(made(folder, [{"show": "rates", "task": "en-fr"}]).params_file)
    random = {"name": "neft", "policy": "random", "percent": 9}
    methods = {
        "full": random,
        "neft": random | {"seed": 2},
        "lora-2": METHODS["lora-9"] | {"alpha": 18},
        "lora-9": METHODS["lora-9"] | {"alpha": 5, "dropout": 0.1},
    }
    for name, method in methods.items():
        data["runs"][f"{name}-en-fr"]["method"] = method
    (folder / "params.yaml").write_text(yaml_text(data))
    found = shown(Workspace(folder))["rates"]
    assert {label: row[0] for label, row in found.items() if label not in ("heads", "notes")} == {
        "neft, random 9 %": "1.250 ± 0.354",
        "neft, random 9 %, seed 2": "1.000 ± 0.000",
        "lora, rank 9": "3.250 ± 0.354",
        "lora, rank 9, alpha 5, dropout 0.1": "2.250 ± 0.354",
    }


def test_runs_of_one_place_are_refused(folder):
    ws = made(folder, [TABLE, {"show": "rates", "task": "en-fr"}])
    data = read_yaml(ws.params_file)
    data["runs"]["again"] = data["runs"]["lora-9-en-fr"] | {"epochs": 3, "lr": 1e-3}
    data["runs"]["elsewhere"] = data["runs"]["again"] | {"task": "fr-en"}
    data["runs"]["faster"] = data["runs"]["again"] | {"lr": 2e-3}
    (folder / "params.yaml").write_text(yaml_text(data))
    with pytest.raises(NeftError) as fault:
        ws.params()
    assert str(fault.value).endswith(
        "params.yaml: study.parts.1.task: runs lora-9-en-fr and again are both lora, rank 9 at "
        "rate 0.001; of a task with such a part give each method a rate once"
    )
    del data["runs"]["again"]
    (folder / "params.yaml").write_text(yaml_text(data))
    assert "faster" in ws.params().runs


def test_a_rate_between_others_needs_no_further_one(folder):
    data = read_yaml(made(folder, [{"show": "rates", "task": "en-fr"}]).params_file)
    runs = data["runs"]
    for name, rate in (("full", 2e-3), ("lora-2", 1e-3), ("lora-9", 6e-3)):
        runs[f"{name}-en-fr"] |= {"method": METHODS["full"], "lr": rate}
    (folder / "params.yaml").write_text(yaml_text(data))
    found = shown(Workspace(folder))["rates"]
    assert found["full"] == ["3.250 ± 0.354", "1.250 ± 0.354", "2.250 ± 0.354", "0.002"]
    assert found["notes"][-1].endswith("bold: the best of a method.")


def test_a_rate_that_failed_was_tried_too(folder):
    """Of rates 0.001, 0.002 and 0.006 the highest that has a loss is the best."""
    failed = {"evaluate@lora-9-en-fr": "loss is nan"}
    data = read_yaml(made(folder, [{"show": "rates", "task": "en-fr"}], failed).params_file)
    for name, rate in (("full", 2e-3), ("lora-2", 1e-3), ("lora-9", 6e-3)):
        data["runs"][f"{name}-en-fr"] |= {"method": METHODS["full"], "lr": rate}
    (folder / "params.yaml").write_text(yaml_text(data))
    found = shown(Workspace(folder))["rates"]
    assert found["full"] == ["3.250 ± 0.354", "1.250 ± 0.354", "failed (1)", "0.002"]
    assert found["notes"][-1].endswith("bold: the best of a method.")
    data["runs"]["full-en-fr"]["lr"] = 7e-3
    (folder / "params.yaml").write_text(yaml_text(data))
    found = shown(Workspace(folder))["rates"]
    assert found["notes"][-1] == "The best is the lowest or highest rate that was tried: full."


def test_the_page_and_the_files(folder):
    ws = made(folder, [TABLE])
    summarise(ws)
    report(ws)
    reports = ws.root / "reports"
    page = (reports / "report.html").read_text()
    assert page.index('<section id="study">') < page.index('<section id="results">')
    assert "<h1>By hand</h1>" in page
    assert "<p>Why?</p>" in page
    assert 'href="mlflow.html#neft-en-fr"' in page
    study = (reports / "study" / "study.md").read_text()
    rates = "One. Here: full 0.001; lora 0.001; neft lowest 0.001."
    assert study.startswith(f"# By hand\n\nWhy?\n\n{rates}\n\n### Results\n\n| method |")
    assert "[**33.00 ± 2.83**](../mlflow.html#neft-en-fr)" in study
    assert {path.name for path in (reports / "study").iterdir()} == {
        "study.md", "t.csv", "t-differences.csv",
    }  # fmt: skip


# BLEU, dev loss and wrong sentences of both seeds, by run.
SWEPT = {
    "full-3e-4-en-fr": {1: (20, 1.5, 5), 2: (22, 1.5, 5)},
    "full-1e-3-en-fr": {1: (30, 1.0, 2), 2: (34, 1.5, 2)},
    "full-3e-3-en-fr": {1: (40, 1.0, 0), 2: (44, 2.0, 0)},
    "full-3e-4-fr-en": {1: (50, 1.0, 3), 2: (54, 1.0, 3)},
    "full-1e-3-fr-en": {1: (60, 1.0, 1), 2: (64, 1.0, 1)},
    "neft-en-fr": {1: (31, 1.0, 4), 2: (35, 1.0, 4)},
    "neft-fr-en": {1: (31, 1.0, 4), 2: (35, 1.0, 4)},
}
FAIR = {"show": "table", "name": "t", "tasks": {"en-fr": "En", "fr-en": "Fr"}}
FAIR |= {"rows": {"Base": "base", "FT": "full", "NeFT": "neft"}}


def swept(folder, *parts, failed=None):
    """A workspace in which `full` was given several rates."""
    data = read_yaml(made(folder, list(parts), failed).params_file)
    data["runs"] = {}
    for name, seeds in SWEPT.items():
        method, *rate = name[: -len("-en-fr")].split("-", 1)
        data["runs"][name] = {"task": name[-5:], "method": METHODS[method], "seeds": [1, 2]}
        data["runs"][name] |= {"lr": float(rate[0])} if rate else {}
        add_run(Workspace(folder), name, seeds, 1)
    data["transfers"] = {}
    (folder / "params.yaml").write_text(yaml_text(data))
    return Workspace(folder)


def test_of_several_rates_each_column_has_the_best(folder):
    ws = swept(folder, FAIR)
    found = shown(ws)
    # 1.25 is less than 1.5 twice over, though one seed's 1.0 is not; of equal losses the first.
    assert found["t"]["FT"][2:] == ["32.00 ± 2.83", "52.00 ± 2.83"]
    assert found["t"]["notes"][-2:] == [
        "Of several candidates the one with the lowest dev loss is shown, mean over its seeds: "
        "FT: full-1e-3 (En), full-3e-4 (Fr).",
        "Its rate is the lowest or the highest tried: FT (Fr).",
    ]
    delta, p = p_values(4, 2)
    assert found["t-differences"]["NeFT"][0].startswith(f"{delta:+z.2f}".replace("-", "−"))
    assert found["t-differences"]["NeFT"][0].endswith(f"(p {p:.3f})")
    delta, p = p_values(4, 3)
    assert found["t-differences"]["NeFT"][1].startswith(f"{delta:+z.2f}".replace("-", "−"))
    table = study_parts.made(Findings.read(ws), Gallery())[0]
    assert [cell.run for cell in table.rows[1][3:]] == ["full-1e-3-en-fr", "full-3e-4-fr-en"]
    assert [[cell.best for cell in row[3:]] for row in table.rows[1:]] == [
        [False, True], [True, False],
    ]  # fmt: skip
    assert table.csv().splitlines()[0].endswith(",En,En sd,En run,Fr,Fr sd,Fr run")
    assert ",full-1e-3-en-fr,52.0," in table.csv()
    assert ",full-3e-4-fr-en" in table.csv()
    assert table.rows[2][3].more.keys() == {"sd"}, "one run alone needs no telling"


def test_candidates_can_be_listed(folder):
    ws = swept(folder, FAIR | {"rows": {"FT": ["full-3e-3", "full-3e-4"], "All": ["full", "neft"]}})
    found = shown(ws)["t"]
    assert found["FT"][2:] == ["42.00 ± 2.83", "52.00 ± 2.83"]
    assert found["All"][2:] == ["33.00 ± 2.83", "52.00 ± 2.83"]
    # Of Fr there is one candidate in the first row.
    assert "FT: full-3e-3 (En); All: neft (En), full-3e-4 (Fr)." in found["notes"][-2]


def test_a_rate_is_at_an_edge_only_of_rates_that_were_tried_for_its_method(folder):
    ws = swept(folder, FAIR | {"rows": {"All": ["full", "neft"]}})
    data = read_yaml(ws.params_file)
    data["runs"]["neft-en-fr"]["lr"] = 1e-1  # alone, and the highest of all
    (folder / "params.yaml").write_text(yaml_text(data))
    found = shown(ws)["t"]
    assert "All: neft (En), full-3e-4 (Fr)." in found["notes"][-2]
    assert found["notes"][-1] == "Its rate is the lowest or the highest tried: All (Fr)."


def test_costs_are_in_the_order_of_seeds(folder):
    ws = Workspace(folder)
    ws.path("cost").mkdir(parents=True, exist_ok=True)
    entries = {"10": {"seconds": 40}, "2": {"seconds": 10}}
    (ws.path("cost") / "full.json").write_text(json.dumps({"seeds": entries}))
    found = Findings.read(made(folder, [TABLE])).costs()["full"]
    assert [entry["seconds"] for entry in found] == [10, 40]


def test_candidates_that_failed_do_not_count(folder):
    failed = {
        "evaluate@full-1e-3-en-fr": "no memory",
        "evaluate@full-3e-4-fr-en": "loss nan",
        "evaluate@full-1e-3-fr-en": "no memory",
    }
    found = shown(swept(folder, FAIR, failed=failed))["t"]
    assert found["FT"][2:] == ["21.00 ± 1.41", "failed (1)"], "both others have 1.5: the first"
    assert found["notes"][0] == "(1) loss nan; no memory"
    assert found["notes"][-1] == "Failed, so no candidates: full-1e-3-en-fr (no memory)."


def test_other_parts_take_the_best_rate_too(folder):
    part = {"show": "trade_off", "task": "en-fr", "series": {"A": ["full"], "B": ["neft"]}}
    found = shown(swept(folder, part))["trade-off"]
    assert found["A"][0] == "full-1e-3-en-fr"
    assert found["A"][-1] == "32.00 ± 2.83"
    assert found["notes"][-1].endswith("mean over its seeds: full: full-1e-3.")


WINS = {"show": "wins", "trained": ["en-fr", "fr-en"], "tested": ["en-fr", "fr-en"],
        "series": {"A": ["neft", "lora-2"], "B": ["full", "lora-9"]}}  # fmt: skip


def counted(ws):
    """Rows of the part `wins`, its notes, and its figures."""
    summarise(ws)
    gallery = Gallery()
    pieces = study_parts.made(Findings.read(ws), gallery)
    table, told = (piece for piece in pieces if isinstance(piece, Table))
    assert told.name == "wins-differences"
    assert table.heads[2:] == ["A higher", "B higher", "equal", "neft − full", "lora-2 − lora-9"]
    for row in table.rows:  # a difference leads to the run that is higher
        for cell, pair in zip(row[5:], zip(*WINS["series"].values(), strict=True), strict=True):
            higher = pair[(cell.value or 0) < 0]
            assert cell.run == (None if cell.value is None else f"{higher}-{row[1].text}")
    return [[cell.text for cell in row] for row in table.rows], table.notes, gallery.svgs


def test_wins_by_hand(folder):
    """NeFT leads full by 1 everywhere; LoRA's ranks are 9 apart, and equal where one gets 119 and
    123, the other 120 and 122. Nothing that was trained on fr-en is tested on en-fr."""
    ws = made(folder, [WINS])
    add_run(ws, "lora-2-fr-en", {1: (119, 3.0, 9), 2: (123, 3.5, 9)}, 1)
    rows, notes, drawn = counted(ws)
    assert rows == [
        ["en-fr", "en-fr", "1", "1", "0", "+1.00", "-9.00"],
        ["fr-en", "en-fr", "1", "1", "0", "+1.00", "-9.00"],
        ["en-fr", "fr-en", "0", "0", "0", "not there", "not there"],
        ["fr-en", "fr-en", "1", "0", "1", "+1.00", "+0.00"],
        ["en-fr", "all", "1", "1", "0", "–", "–"],
        ["fr-en", "all", "2", "1", "1", "–", "–"],
        ["all", "en-fr", "2", "2", "0", "–", "–"],
        ["all", "fr-en", "1", "0", "1", "–", "–"],
    ]
    assert notes[0].endswith(": neft (816) and full (9,088); lora-2 (50) and lora-9 (950).")
    assert list(drawn) == ["study-wins-tested", "study-wins-trained"]
    assert all(">equal<" in svg for svg in drawn.values())


def test_wins_are_told_against_full_and_lora_on_each_task(folder):
    """What was trained on fr-en is not tested on en-fr: nothing is told of it there."""
    found = shown(made(folder, [WINS]))
    told = found["wins-differences"]
    heads = ["en-fr: Δ full", "en-fr: Δ LoRA", "fr-en: Δ full", "fr-en: Δ LoRA"]
    assert told["heads"] == heads
    runs = [name for name in told if name not in ("heads", "notes")]
    order = ("neft", "lora-2", "lora-9")  # of full's size there is no other
    assert runs == [f"{name}-{task}" for task in ("en-fr", "fr-en") for name in order]
    same = shown(made(folder, [TABLE]))["t-differences"]
    assert told["neft-en-fr"][:2] == same["NeFT"][:2]
    assert told["neft-fr-en"] == ["–", "–", *same["NeFT"][2:]]
    assert "–" not in told["neft-en-fr"], "it was moved"


def test_wins_on_what_was_trained_leave_out_what_failed(folder):
    part = {key: value for key, value in WINS.items() if key != "tested"}
    failed = {"evaluate@full-fr-en": "no memory"}
    ws = made(folder, [part], failed)
    for path in ws.path("evaluation", "full-fr-en").iterdir():
        path.unlink()
    rows, notes, drawn = counted(ws)
    assert rows == [
        ["en-fr", "en-fr", "1", "1", "0", "+1.00", "-9.00"],
        ["fr-en", "fr-en", "0", "1", "0", "failed (1)", "-9.00"],
    ]
    assert notes[0] == "(1) no memory"
    (svg,) = drawn.values()
    assert ">equal<" not in svg, "nobody is"


def test_a_run_tested_elsewhere_is_chosen_by_its_own_dev_loss(folder):
    part = FAIR | {"trained": "en-fr", "rows": {"FT": ["full", "lora-9"]}}
    found = shown(made(folder, [part], {"transfer@full-moved": "no memory"}))["t"]
    assert found["FT"][2:] == ["32.00 ± 2.83", "21.00 ± 1.41"]
    assert "FT: full (En), lora-9 (Fr)." in found["notes"][-2]
    assert found["notes"][-1] == "Failed, so no candidates: full-en-fr (no memory)."
