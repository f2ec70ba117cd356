"""Key `against` of a study's parts: differences between rows, against sacrebleu's own bootstrap."""

import csv
import io
import statistics

import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from test_study_results import TABLE, folder, made, swept
from test_summary import REFERENCES, add_run, hypotheses

from neft_core import study_parts
from neft_core.config import read_yaml, yaml_text
from neft_core.errors import NeftError
from neft_core.findings import Findings
from neft_core.page import Gallery
from neft_core.study_tables import Table
from neft_core.summary import summarise
from neft_core.workspace import Workspace

__all__ = ["folder"]

WRONG = {"full": {1: 2, 2: 3}, "neft": {1: 6, 2: 4}, "lora-9": {1: 5, 2: 9}}
"""How many sentences of each seed are wrong."""


def apart(ws, runs: dict[str, dict[int, int]], task: str = "en-fr") -> None:
    """Let seeds differ; a dev loss is 1 and a hundredth for each wrong sentence."""
    for name, seeds in runs.items():
        of_seeds = {seed: (30.0, 1 + wrong / 100, wrong) for seed, wrong in seeds.items()}
        add_run(ws, f"{name}-{task}", of_seeds, 1)


def table(ws, name: str) -> Table:
    summarise(ws)
    pieces = study_parts.made(Findings.read(ws), Gallery())
    return next(piece for piece in pieces if isinstance(piece, Table) and piece.name == name)


def lines(shown: Table) -> list[dict[str, str]]:
    """The table's CSV."""
    return list(csv.DictReader(io.StringIO(shown.csv())))


def told_by_sacrebleu(wrong: int, other: int, metric=None) -> tuple[float, float]:
    """Difference and p of its `--paired-bs`, whose first system is what others stand against."""
    systems = [
        (name, [row["hypothesis"] for row in hypotheses(number)])
        for name, number in (("other", other), ("one", wrong))
    ]
    asked = {"metric": metric or BLEU()}
    test = PairedTest(systems, asked, [REFERENCES], test_type="bs", n_samples=100)
    (found,) = (of for name, of in test()[1].items() if name != "System")
    return found[1].score - found[0].score, found[1].p_value


def test_each_seed_is_told_as_sacrebleu_does(folder, monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    part = TABLE | {"tasks": {"en-fr": "En"}, "against": ["FT-full", "LoRA_9"]}
    ws = made(folder, [part])
    apart(ws, WRONG)
    shown = table(ws, "t-against")
    assert shown.heads == ["method", "against", "Δ BLEU", "seed 1", "seed 2", "Δ dev loss"]
    rows = {(row["method"], row["against"]): row for row in lines(shown)}
    assert list(rows) == [
        ("LoRA_2", "FT-full"), ("LoRA_9", "FT-full"), ("NeFT", "FT-full"),
        ("FT-full", "LoRA_9"), ("LoRA_2", "LoRA_9"), ("NeFT", "LoRA_9"),
    ]  # fmt: skip
    for other, name in (("FT-full", "full"), ("LoRA_9", "lora-9")):
        row = rows["NeFT", other]
        deltas = []
        for seed in (1, 2):
            delta, p = told_by_sacrebleu(WRONG["neft"][seed], WRONG[name][seed])
            assert float(row[f"seed {seed}"]) == pytest.approx(delta, abs=1e-9)
            assert float(row[f"seed {seed} p"]) == pytest.approx(p, abs=1e-12)
            deltas.append(delta)
        assert float(row["Δ BLEU"]) == pytest.approx(statistics.mean(deltas))
        assert float(row["Δ BLEU sd"]) == pytest.approx(statistics.stdev(deltas))
        losses = [(WRONG["neft"][seed] - WRONG[name][seed]) / 100 for seed in (1, 2)]
        assert float(row["Δ dev loss"]) == pytest.approx(statistics.mean(losses))
        assert float(row["Δ dev loss sd"]) == pytest.approx(statistics.stdev(losses))
        assert [float(row[f"Δ dev loss seed {s}"]) for s in (1, 2)] == pytest.approx(losses)
    assert float(rows["NeFT", "LoRA_9"]["seed 1"]) < 0 < float(rows["NeFT", "LoRA_9"]["seed 2"])
    turned = [
        float(rows[pair]["seed 1"]) for pair in (("LoRA_9", "FT-full"), ("FT-full", "LoRA_9"))
    ]
    assert turned[0] == -turned[1]
    shared = [cell.run for cell in shown.rows[-1][2:]]
    assert shared == ["neft-en-fr"] * 4, "every number leads to the run that it tells of"


def test_how_a_difference_is_written(folder):
    ws = made(folder, [TABLE | {"against": ["FT-full"]}])
    apart(ws, WRONG)
    shown = table(ws, "t-against")
    assert shown.heads[0] == "tested on"
    assert shown.title == "Results: against FT-full"
    cells = [cell.text for cell in shown.rows[2]]
    assert cells[:3] == ["En", "NeFT", "FT-full"]
    deltas = [told_by_sacrebleu(WRONG["neft"][s], WRONG["full"][s]) for s in (1, 2)]
    mean, spread = (of(delta for delta, _ in deltas) for of in (statistics.mean, statistics.stdev))
    assert cells[3] == f"−{-mean:.2f} ± {spread:.2f}"
    for cell, (delta, p) in zip(cells[4:6], deltas, strict=True):
        mark = "**" if p < 0.01 else "*" if p < 0.05 else ""
        assert cell == f"−{-delta:.2f}{mark} (p {p:.3f})"
    assert cells[6] == "+0.025 ± 0.021"
    assert "(100 samples)" in shown.notes[0]
    assert "same seed" in shown.notes[0]


def test_every_metric_of_the_part_is_told(folder):
    part = TABLE | {"tasks": ["en-fr"], "metrics": ["bleu", "chrf"], "against": ["FT-full"]}
    ws = made(folder, [part])
    apart(ws, WRONG)
    shown = table(ws, "t-against")
    assert shown.heads[:4] == ["metric", "method", "against", "Δ"]
    (row,) = (r for r in lines(shown) if r["metric"] == "chrF" and r["method"] == "NeFT")
    delta, p = told_by_sacrebleu(WRONG["neft"][1], WRONG["full"][1], CHRF())
    assert (float(row["seed 1"]), float(row["seed 1 p"])) == pytest.approx((delta, p))


def test_seeds_are_paired_by_number_and_others_are_left_out(folder):
    ws = made(folder, [TABLE | {"tasks": ["en-fr"], "against": ["FT-full"]}])
    data = read_yaml(ws.params_file)
    data["runs"]["neft-en-fr"]["seeds"] = [3, 2]
    data["runs"]["lora-9-en-fr"]["seeds"] = [7]
    data["transfers"] = {}
    ws.params_file.write_text(yaml_text(data))
    apart(ws, WRONG | {"neft": {3: 0, 2: 4}, "lora-9": {7: 9}})
    shown = table(ws, "t-against")
    rows = {row["method"]: row for row in lines(shown)}
    delta, _ = told_by_sacrebleu(WRONG["neft"][2], WRONG["full"][2])
    assert float(rows["NeFT"]["seed 2"]) == pytest.approx(delta)
    assert float(rows["NeFT"]["Δ BLEU"]) == pytest.approx(delta), "one seed has no deviation"
    assert (rows["NeFT"]["seed 1"], rows["NeFT"]["Δ BLEU sd"]) == ("–", "")
    assert rows["LoRA_9"]["Δ BLEU"] == "no seed in common"
    assert list(rows["NeFT"]).count("seed 3") == 0
    said = "Compared in the seeds that both have: neft-en-fr and full-en-fr (2)."
    assert shown.notes[-1] == said


def test_runs_tested_elsewhere_have_no_dev_loss_there(folder):
    part = TABLE | {"trained": "en-fr", "tasks": ["fr-en"], "against": ["FT-full"]}
    ws = made(folder, [part])
    shown = table(ws, "t-against")
    assert shown.heads == ["method", "against", "Δ BLEU", "seed 1", "seed 2"]
    delta, _ = told_by_sacrebleu(4, 2)
    assert float(lines(shown)[-1]["seed 1"]) == pytest.approx(delta)


def test_of_several_rates_the_best_is_compared(folder):
    part = {"show": "table", "name": "t", "tasks": ["en-fr"], "rows": {"FT": "full", "N": "neft"}}
    ws = swept(folder, part | {"against": ["FT"]})
    (row,) = lines(table(ws, "t-against"))
    delta, _ = told_by_sacrebleu(4, 2)  # of three rates the second
    assert float(row["seed 1"]) == pytest.approx(delta)


def test_what_failed_is_told_and_the_rest_is_compared(folder):
    failed = {"evaluate@lora-9-en-fr": "no memory"}
    ws = made(folder, [TABLE | {"tasks": ["en-fr"], "against": ["FT-full"]}], failed)
    for path in ws.path("evaluation", "lora-9-en-fr").iterdir():
        path.unlink()
    shown = table(ws, "t-against")
    rows = {row["method"]: row for row in lines(shown)}
    assert (rows["LoRA_9"]["Δ BLEU"], rows["LoRA_9"]["seed 1"]) == ("failed (1)", "–")
    assert shown.notes[0] == "(1) no memory"
    assert rows["NeFT"]["seed 1 p"]


ADDED = {"show": "added", "task": "en-fr", "start": "lora-2", "ways": {"up": ["neft", "full"]}}
VARIED = {"show": "sensitivity", "task": "en-fr", "groups": {"a": ["full", "neft"], "b": ["neft"]}}


@pytest.mark.parametrize(
    ("part", "asked", "told"),
    [
        (ADDED, ["full"], [("lora-2-en-fr", "full-en-fr"), ("neft-en-fr", "full-en-fr")]),
        (VARIED, ["full"], [("lowest 9 %, K 6", "full")]),
    ],
)
def test_other_parts_name_runs(folder, part, asked, told):
    ws = made(folder, [part | {"against": asked, "name": "p"}])
    apart(ws, WRONG)
    rows = lines(table(ws, "p-against"))
    assert [(row["method"], row["against"]) for row in rows] == told
    delta, p = told_by_sacrebleu(WRONG["neft"][2], WRONG["full"][2])
    assert float(rows[-1]["seed 2"]) == pytest.approx(delta)
    assert float(rows[-1]["seed 2 p"]) == pytest.approx(p)


@pytest.mark.parametrize(
    ("part", "asked", "told"),
    [
        (TABLE, ["LoRA_8"], "against: got 'LoRA_8'; did you mean 'LoRA_9'?"),
        (TABLE, ["Base"], "against: got 'Base'; known: FT-full, LoRA_2, LoRA_9, NeFT"),
        (TABLE, ["NeFT", "NeFT"], "against: got NeFT, NeFT; each row once"),
        (ADDED, ["nefd"], "against: got 'nefd'; did you mean 'neft'?"),
        (VARIED, ["lora-2"], "against: got 'lora-2'; known: full, neft"),
    ],
)
def test_a_row_that_is_not_there_is_refused(folder, neft, part, asked, told):
    ws = made(folder, [part | {"against": asked}])
    (folder / "dvc.yaml").touch()
    code, out = neft(ws, "stage", "summary")
    assert code == 2
    assert len(out) == 1
    assert told in out[0]


def test_its_file_has_a_name_of_its_own(folder):
    parts = [TABLE | {"against": ["NeFT"]}, {"show": "rates", "task": "en-fr", "name": "t-against"}]
    with pytest.raises(NeftError, match="parts: two would write files named 't-against'"):
        made(folder, parts).params()
    assert Workspace(made(folder, [TABLE, parts[1]]).root).params(), "without it the name is free"
