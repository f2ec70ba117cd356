"""The result table from evaluation files written by hand."""

import csv
import json

import pytest
from conftest import TINY_PARAMS, edit

from neft_core.course import DEV_COLUMNS, TRAIN_COLUMNS, write_table
from neft_core.errors import NeftError
from neft_core.files import write_json
from neft_core.metrics import paired_bootstrap
from neft_core.rows import write_rows
from neft_core.summary import summarise
from neft_core.workspace import Workspace

REFERENCES = [f"the {a} {b} sees a {c} now" for a in "xyz" for b in "uv" for c in "pq"]


def hypotheses(wrong: int) -> list[dict]:
    """The references, of which so many have two words that are wrong."""
    rows = []
    for number, text in enumerate(REFERENCES):
        said = text.replace("sees a", "eats the") if number < wrong else text
        rows.append({"source": "s", "target": text, "references": [text], "hypothesis": said})
    return rows


def scores(bleu: float, chrf: float) -> dict:
    return {"bleu": bleu, "chrf": chrf, "bleu_signature": "B", "chrf_signature": "C"}


def add_run(ws, name: str, seeds: dict[int, tuple[float, float, int]], seconds: float) -> None:
    """A run; for each seed its BLEU, its dev loss, and how many of its sentences are wrong."""
    write_json(
        ws.path("evaluation", name, "metrics.json"),
        {"seeds": {str(s): scores(bleu, bleu / 2) for s, (bleu, _, _) in seeds.items()}},
    )
    for seed, (_, loss, wrong) in seeds.items():
        write_rows(ws.path("evaluation", name, f"seed-{seed}.jsonl"), hypotheses(wrong))
        folder = ws.path("train", name, f"seed-{seed}")
        write_json(
            folder / "metrics.json",
            {"best_dev_loss": loss, "trainable_parameters": 1234, "trainable_percent": 12.345},
        )
        write_table(folder / "train.csv", TRAIN_COLUMNS, [(1, 0.5, 2.0, 0.1, 1.0)])
        write_table(folder / "dev.csv", DEV_COLUMNS, [(1, 0.5, loss), (2, 1.0, loss)])
    cost = {str(s): {"seconds": seconds * (1 + n)} for n, s in enumerate(seeds)}
    write_json(ws.path("cost", f"{name}.json"), {"seeds": cost})


def add_baseline(ws, task: str) -> None:
    write_json(
        ws.path("baseline", task, "metrics.json"), {"base": scores(5, 2), "tuned": scores(7, 3)}
    )
    write_rows(ws.path("baseline", task, "base.jsonl"), hypotheses(12))


def by_hand(folder):
    """A workspace of two tasks and four runs, evaluated and not summed up."""
    head, tail = TINY_PARAMS.split("compute:")
    task = head[head.index("  en-fr:") :]
    second = task.replace("en-fr:", "fr-en:")
    runs = "  other:\n    task: fr-en\n    method: {name: lora, rank: 3}\n    seeds: [1]\n"
    text = head + second + "compute:" + tail.replace("evaluation:", runs + "evaluation:", 1)
    (folder / "params.yaml").write_text(text)
    ws = Workspace(folder)
    for name in ("en-fr", "fr-en"):
        add_baseline(ws, name)
    add_run(ws, "full", {1: (30.0, 1.0, 2)}, 10)
    add_run(ws, "lora", {1: (20.0, 2.0, 6)}, 20)
    add_run(ws, "neft", {1: (20.0, 1.0, 2), 2: (26.0, 2.0, 8)}, 4)
    add_run(ws, "other", {1: (9.0, 3.0, 9)}, 5)
    return ws


@pytest.fixture
def ws(tmp_path):
    return by_hand(tmp_path)


def table(ws) -> dict[tuple[str, str], dict[str, str]]:
    with ws.path("summary", "summary.csv").open(newline="") as handle:
        return {(row["task"], row["name"]): row for row in csv.DictReader(handle)}


def p_values(wrong: int, other: int) -> tuple[float, float]:
    """Difference of BLEU and its p-value, asked of the metric itself."""
    mine, theirs = ([r["hypothesis"] for r in hypotheses(n)] for n in (wrong, other))
    out = paired_bootstrap(mine, theirs, [[r] for r in REFERENCES], "French", samples=100)
    return float(out["delta"]), float(out["p_value"])


def test_means_and_deviations_over_seeds(ws):
    summarise(ws)
    row = table(ws)["en-fr", "neft"]
    assert float(row["bleu"]) == 23.0
    assert float(row["chrf"]) == 11.5
    assert float(row["bleu_std"]) == pytest.approx(18**0.5)  # of 20 and 26, with n - 1
    assert float(row["chrf_std"]) == pytest.approx(4.5**0.5)
    assert float(row["dev_loss"]) == 1.5
    assert float(row["seconds"]) == 6.0  # of 4 and 8
    assert (row["seeds"], row["parameters"], row["percent"]) == ("2", "1234", "12.345")
    assert table(ws)["en-fr", "full"]["bleu_std"] == ""


def two_seeds(ws) -> None:
    """Give `full` and `lora` a second seed that says what the first does."""
    for name, numbers in (("full", (30.0, 1.0, 2)), ("lora", (20.0, 2.0, 6))):
        method = "{name: full}" if name == "full" else "{name: lora, rank: 2}"
        edit(ws, (method, f"{method}\n    seeds: [1, 2]"))
        add_run(ws, name, {1: numbers, 2: numbers}, 10)


def test_the_worst_p_of_the_seeds_and_the_mean_difference(ws):
    two_seeds(ws)
    summarise(ws)
    row = table(ws)["en-fr", "neft"]
    same, worse = p_values(2, 2), p_values(8, 2)
    assert same == (0.0, 1.0)
    assert worse[1] < 0.05
    assert float(row["p_full"]) == 1.0
    assert float(row["delta_full"]) == pytest.approx(worse[0] / 2)
    against_base = [p_values(2, 12), p_values(8, 12)]
    assert float(row["p_base"]) == max(p for _, p in against_base)
    lora = [p_values(2, 6), p_values(8, 6)]
    assert float(row["delta_lora"]) == pytest.approx(sum(d for d, _ in lora) / 2)
    assert table(ws)["en-fr", "lora"]["p_lora"] == ""
    assert float(row["delta_base"]) == pytest.approx(sum(d for d, _ in against_base) / 2)
    full = table(ws)["en-fr", "full"]
    assert full["p_full"] == full["delta_full"] == ""
    assert float(full["p_base"]) < 0.05


def test_each_seed_stands_against_the_same_one_of_the_other_run(ws):
    edit(ws, ("{name: full}", "{name: full}\n    seeds: [1, 2]"))
    add_run(ws, "full", {1: (30.0, 1.0, 2), 2: (24.0, 1.0, 8)}, 10)
    summarise(ws)
    row = table(ws)["en-fr", "neft"]
    assert (float(row["delta_full"]), float(row["p_full"])) == p_values(2, 2) == p_values(8, 8)


@pytest.mark.parametrize("seeds", ["[2, 1]", "[3, 2, 1]"])
def test_seeds_are_paired_by_number_and_not_by_place(ws, seeds):
    edit(ws, ("{name: full}", f"{{name: full}}\n    seeds: {seeds}"))
    add_run(ws, "full", {1: (30.0, 1.0, 2), 2: (24.0, 1.0, 8), 3: (9.0, 1.0, 12)}, 10)
    summarise(ws)
    row = table(ws)["en-fr", "neft"]
    assert (float(row["delta_full"]), float(row["p_full"])) == p_values(2, 2) == p_values(8, 8)
    assert row["seeds_full"] == ("" if seeds == "[2, 1]" else "1, 2")


def test_only_seeds_that_both_have_are_compared_and_these_are_told(ws):
    edit(ws, ("{name: lora, rank: 2}", "{name: lora, rank: 2}\n    seeds: [7]"))
    add_run(ws, "lora", {7: (20.0, 2.0, 6)}, 20)
    summarise(ws)
    row = table(ws)["en-fr", "neft"]
    assert (float(row["delta_full"]), float(row["p_full"])) == p_values(2, 2), "seed 2 has no other"
    assert (row["delta_lora"], row["p_lora"]) == ("", "")
    assert (row["seeds_full"], row["seeds_lora"]) == ("1", "none")
    against_base = [p_values(2, 12), p_values(8, 12)]
    assert float(row["p_base"]) == max(p for _, p in against_base), "each seed has the base"
    said = "- Compared in the seeds that both have: lora to full (none); neft to full (1)."
    assert ws.path("summary", "summary.md").read_text().splitlines()[-1] == said


def test_seeds_that_contradict_each_other_show_nothing(ws):
    two_seeds(ws)
    add_run(ws, "neft", {1: (20.0, 1.0, 2), 2: (26.0, 2.0, 11)}, 4)
    summarise(ws)
    up, down = p_values(2, 6), p_values(11, 6)
    assert up[0] > 0 > down[0]
    assert max(up[1], down[1]) < 0.05, "each by itself would be significant"
    row = table(ws)["en-fr", "neft"]
    assert float(row["delta_lora"]) == pytest.approx((up[0] + down[0]) / 2)
    assert float(row["p_lora"]) == 1.0
    assert float(row["p_base"]) == max(p_values(2, 12)[1], p_values(11, 12)[1]), "both are up"


def test_a_task_without_full_has_no_comparison_with_it(ws):
    summarise(ws)
    rows = table(ws)
    assert list(rows) == [
        *(("en-fr", name) for name in ("base", "tuned", "full", "lora", "neft")),
        *(("fr-en", name) for name in ("base", "tuned", "other")),
    ]
    assert rows["fr-en", "other"]["p_full"] == ""
    assert rows["fr-en", "other"]["p_base"] != ""
    metrics = json.loads(ws.path("summary", "metrics.json").read_text())
    assert metrics["fr-en"]["other"].keys() == {"bleu", "chrf", "p_base", "dev_loss", "percent"}
    assert metrics["en-fr"]["neft"]["bleu"] == 23.0
    assert metrics["en-fr"]["base"] == {"bleu": 5, "chrf": 2}


def test_the_table_in_words(ws, capsys):
    summarise(ws)
    text = ws.path("summary", "summary.md").read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    cells = {
        row[1]: row
        for row in (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line
        )
    }
    assert cells["neft"][2:8] == ["neft, lowest 9 %", "1,234", "12.35", "2", "23.00 ± 4.24",
                                  "11.50 ± 2.12"]  # fmt: skip
    assert cells["base"] == ["fr-en", "base", "-", *"-" * 3, "5.00", "2.00", *"-" * 6]
    assert cells["tuned"][2] == "warm-up, 6 steps"
    assert cells["other"][2] == "lora, rank 3"
    assert lines[-3:-1] == ["- `B`", "- `C`"]


def test_curves_of_all_runs_in_one_file(ws):
    summarise(ws)
    with ws.path("summary", "dev.csv").open(newline="") as handle:
        rows = list(csv.reader(handle))
    assert rows[0] == ["run", "seed", "step", "epoch", "loss"]
    assert len(rows) == 1 + 5 * 2
    assert rows[-1] == ["other", "1", "2", "1.0", "3.0"]


def test_a_run_that_is_not_evaluated_is_named(ws):
    ws.path("evaluation", "lora", "metrics.json").unlink()
    with pytest.raises(NeftError, match=r"evaluation/lora/metrics.json: missing or damaged; run"):
        summarise(ws)
    assert not ws.path("summary").exists()
