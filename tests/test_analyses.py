"""`neft analyse` in a finished workspace."""

import json
import math
import re
import shutil

import pytest
import torch
from conftest import edit
from ruamel.yaml import YAML

from neft_core import analyses, config, loading, measures, runs
from neft_core.masks import NeuronMask, NeuronScores
from neft_core.selection import select_neurons
from neft_core.workspace import Workspace


def scores_of(ws) -> NeuronScores:
    return NeuronScores.load(ws.path("scores", "en-fr.safetensors"))


def random_mask(ws, path, **budget):
    select_neurons(scores_of(ws), "random", seed=5, **budget).save(path)
    return str(path)


def members(mask: NeuronMask) -> set[tuple[str, int]]:
    return {(module, i) for module, rows in mask.indices.items() for i in rows.tolist()}


def test_overlap_of_a_run_and_a_file(finished, neft, tmp_path, capsys):
    other = random_mask(finished, tmp_path / "random.safetensors", percent=9)
    found = tmp_path / "found.json"
    assert neft(finished, "analyse", "overlap", "neft", other, "--json", str(found)) == (0, [])
    (entry,) = json.loads(found.read_text())["overlap"]
    mine = members(NeuronMask.load(finished.path("masks", "neft.safetensors")))
    theirs = members(NeuronMask.load(other))
    assert entry["share"] == len(mine & theirs) / len(mine)
    assert entry["chance"] == len(mine) / 96
    assert (entry["first"], entry["second"]) == ("neft", other)


def test_overlap_of_scores_at_several_budgets(finished):
    copy = str(finished.path("scores", "en-fr.safetensors"))
    data, text = analyses.overlap(finished, ["en-fr", copy], [3, 6])
    assert [entry["percent"] for entry in data["overlap"]] == [3, 6]
    assert all(entry["share"] == 1 for entry in data["overlap"])
    assert "| en-fr |" in text


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (
            ["neft", "random"],
            r"has 51 neurons, .*random.safetensors 34; compare masks of one budget",
        ),
        (
            ["neft", "other"],
            r"mask 'other': no such file, and not in .*masks; there: full, lora, neft",
        ),
        (["neft"], r"overlap: got 1 mask; give two at least"),
        (
            ["neft", "full"],
            r"run full: has no mask, as method full selects no neurons",
        ),
        (
            ["en-fr", "no", "--percent", "3"],
            r"scores 'no': no such file, and not in .*; there: en-fr",
        ),
        (["en-fr", "en-fr", "--percent", "3"], r"overlap: got 1 mask; give two at least"),
        (["en-fr", "x", "--percent", "90"], r"scores 'x'"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(finished, neft, tmp_path, names, line):
    if "random" in names:
        names = [names[0], random_mask(finished, tmp_path / "random.safetensors", percent=6)]
    code, lines = neft(finished, "analyse", "overlap", *names)
    assert code == 2
    assert len(lines) == 1
    assert re.search(line, lines[0])


def test_sensitivity_by_place(finished, neft, tmp_path):
    found = tmp_path / "found.json"
    arguments = ("analyse", "sensitivity", "en-fr", "--run", "neft", "--json", str(found))
    assert neft(finished, *arguments) == (0, [])
    data = json.loads(found.read_text())
    scores = scores_of(finished)
    mask = NeuronMask.load(finished.path("masks", "neft.safetensors"))
    modules = {place["where"]: place for place in data["places"]["module"]}
    assert list(modules) == list(scores.groups)
    for module, values in scores.sensitivity.items():
        assert modules[module]["highest"] == float(values.max())
        assert modules[module]["selected"] == len(mask.indices.get(module, []))
    flat = torch.cat(list(scores.sensitivity.values()))
    scaled = (flat.max() - flat) / (flat.max() - flat.min())
    for below, count in data["below"]["scaled"]:
        assert count == int((scaled < below).sum())


def test_utilisation_of_runs_against_the_base(finished, neft, tmp_path):
    """The figures are those of the run's merged weights and states, counted by loops."""
    found = tmp_path / "found.json"
    arguments = ("analyse", "utilisation", "base", "neft", "full", "--rows", "4")
    assert neft(finished, *arguments, "--json", str(found)) == (0, [])
    data = json.loads(found.read_text())["models"]
    values = []
    for name in ("base", "neft"):
        model = loading.load_base(finished) if name == "base" else None
        if model is None:
            model = runs.load_trained(finished, "neft", 1)[0].merge_and_unload()
        values.append(pearson_of(finished, model))
    places = [sorted(range(96), key=lambda i, v=v: -v[i]) for v in values]
    change = [places[1].index(i) - places[0].index(i) for i in range(96)]
    got = data["neft"]
    assert got["average"] == pytest.approx(sum(map(abs, change)) / 96, abs=0.1)
    mask = members(NeuronMask.load(finished.path("masks", "neft.safetensors")))
    order = [(m, i) for m, g in scores_of(finished).groups.items() for i in range(g.count)]
    strong = [i for i in range(96) if abs(change[i]) > 96 * 100_000 / 704_512]
    assert got["types"]["all"]["strongly affected"] == pytest.approx(len(strong), abs=1)
    indirect = sum(order[i] not in mask for i in strong)
    assert got["types"]["all"]["indirectly affected"] == pytest.approx(indirect, abs=1)
    assert data["full"]["types"]["all"]["indirectly affected"] == 0


def pearson_of(ws, model) -> list[float]:
    """Highest Pearson correlation of every candidate, from transformers' own hidden states."""
    import numpy as np

    from neft_core.encoding import load_encoded

    arrays, _ = load_encoded(ws.path("prepared", "en-fr", "dev.safetensors"))
    outputs: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, n=n: outputs[n].append(out[0].mean(0)))
        for n, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for row in range(4):
            first, last = arrays["offsets"][row : row + 2]
            model(torch.from_numpy(arrays["tokens"][first:last].astype(np.int64))[None])
    for hook in hooks:
        hook.remove()
    means = [torch.stack(outputs[n]).double().mean(0).numpy() for n in (0, 1)]
    found = []
    for layer in model.model.layers:
        for weight in (layer.mlp.up_proj.weight, layer.mlp.down_proj.weight.T):
            for w in weight.detach().double().numpy():
                found.append(max(np.corrcoef(w, mean)[0, 1] for mean in means))
    return found


def test_texts_of_a_file(tmp_path):
    """JSON lines keep the lines of a text; only a newline ends a text of the other form."""
    plain, lines = tmp_path / "text.txt", tmp_path / "text.jsonl"
    plain.write_text(" one\u2028two\n\nthree\nfour\n", encoding="utf-8")
    assert measures.held_out(Workspace(tmp_path), plain, 2, "") == ["one\u2028two", "three"]
    lines.write_text('{"text": "one\\ntwo ", "id": 1}\n{"text": " "}\n{"text": "three"}\n')
    assert measures.held_out(Workspace(tmp_path), lines, 9, "") == ["one\ntwo", "three"]


def test_forgetting_on_a_text_file(finished, neft, tmp_path):
    text, found = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("the cat sees\n\n  a red dog\nfish\nnever read\n")
    arguments = (
        "analyse",
        "forgetting",
        "full",
        "neft",
        "neft",
        "--text",
        str(text),
        "--rows",
        "3",
    )
    assert neft(finished, *arguments, "--json", str(found)) == (0, [])
    data = json.loads(found.read_text())
    assert data["texts"] == 3
    _, tokenizer = loading.base_card(finished)

    def by_loops(model) -> float:
        total, count = 0.0, 0
        for line in ("the cat sees", "a red dog", "fish"):
            ids = [1, *tokenizer(line, add_special_tokens=False)["input_ids"], 2]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0]
            for place, token in enumerate(ids[1:]):
                total -= float(torch.log_softmax(logits[place], 0)[token])
                count += 1
        return total / count

    assert data["base"] == pytest.approx(by_loops(loading.load_base(finished)), rel=1e-5)
    for run, seeds in (("full", [1]), ("neft", [1, 2])):
        want = [by_loops(runs.load_trained(finished, run, seed)[0]) for seed in seeds]
        assert data["runs"][run]["losses"] == pytest.approx(want, rel=1e-5)
        mean = sum(want) / len(want)
        assert data["runs"][run]["change"] == pytest.approx(mean - data["base"], abs=1e-5)


def test_unseen_text_is_what_pre_training_never_read(finished, tmp_path):
    """Of two pairs the one with more rows says where unseen ones begin."""
    from neft_core.corpus import generate_splits

    source = {"kind": "generated", "path": config.NO_FILE, "train": 20, "dev": 5, "test": 5}
    names = {"en": "English", "fr": "French", "zh": "Chinese"}
    data = YAML(typ="safe").load(finished.params_file.read_text())
    template = data["tasks"]["en-fr"]
    for pair, rows in ((("en", "fr"), 10), (("en", "zh"), 30)):
        languages = {"source_language": names[pair[0]], "target_language": names[pair[1]]}
        data["tasks"]["-".join(pair)] = {
            "source": source | {"languages": list(pair), "pretrain": rows},
            "format": template["format"] | languages,
        }
    (tmp_path / "params.yaml").write_text(json.dumps(data))
    texts = measures.held_out(Workspace(tmp_path), None, 40, "here")
    assert len(texts) == len(set(texts)) == 40
    seen = set()
    for pair, rows in ((("en", "fr"), 10), (("en", "zh"), 30)):
        made = generate_splits(*pair, seed=1, pretrain=rows, train=20, dev=5, test=5)
        both = (names[pair[0]], names[pair[1]])
        rows = [row for split in made.values() for row in split]
        seen |= {f"{name}: {row[key]}" for row in rows
                 for name, key in zip(both, ("source", "target"), strict=True)}  # fmt: skip
    assert not {line for text in texts for line in text.splitlines()} & seen


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["forgetting", "neft"],
            "--text: the base wasn't built from a generated corpus, so no text of its",
        ),
        (
            ["forgetting", "nef", "--text", "params.yaml"],
            "forgetting: no run 'nef'; known: full, lora",
        ),
        (["forgetting", "neft", "--text", "no.txt"], "no.txt: "),
        (["forgetting", "neft", "--text", "empty.txt"], "empty.txt: holds no text; one a line, or"),
        (
            ["forgetting", "neft", "--text", "pairs.jsonl"],
            "pairs.jsonl:1: 'text' is missing or no string; each line needs one",
        ),
        (
            ["forgetting", "neft", "--text", "half.jsonl"],
            "half.jsonl:1: 'text' holds half a surrogate pair; mend the text",
        ),
        (["utilisation", "base", "--rows", "2"], "utilisation: got one model; give two at least"),
        (
            ["utilisation", "base", "nef", "--rows", "2"],
            "utilisation: no run 'nef'; known: base, tuned",
        ),
        (["utilisation", "base", "neft", "--rows", "0"], "--rows 0: at least 1"),
        (
            ["utilisation", "base", "neft", "--seed", "77"],
            "run neft: has no seed 77; it has [1, 2]",
        ),
        (
            ["utilisation", "base", "neft", "--task", "de-fr"],
            "--task de-fr: unknown; params.yaml has en-fr",
        ),
        (["forgetting", "neft", "--text", "pairs.jsonl", "--rows", "-1"], "--rows -1: at least 1"),
        (["sensitivity", "en-fr", "--run", "lora"], "run lora: has no mask, as method lora"),
        (["sensitivity", "de-fr"], "scores 'de-fr': no such file, and not in "),
    ],
)
def test_questions_without_an_answer(copied, neft, arguments, line):
    (copied.root / "empty.txt").write_text("\n \n")
    (copied.root / "half.jsonl").write_text('{"text": "a \\ud800 b"}\n')
    (copied.root / "pairs.jsonl").write_text('{"source": "one", "target": "un"}\n')
    code, lines = neft(copied, "analyse", *arguments)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"neft: {line}")


def test_a_mask_of_another_layout_is_refused(finished, copied, neft):
    from neft_core.similarity import score_neurons

    edit(copied, ("scoring: {layout: mlp}", "scoring: {layout: mlp+gate}"))
    found = score_neurons(copied.path("base"), copied.path("warmup", "en-fr"), "mlp+gate")
    found.save(copied.path("scores", "en-fr.safetensors"))
    code, lines = neft(copied, "analyse", "sensitivity", "en-fr", "--run", "neft")
    assert code == 2
    assert "neft.safetensors: its candidates differ from those of" in lines[0]
    assert math.isfinite(float(found.sensitivity["model.layers.0.mlp.gate_proj"][0]))
    shutil.rmtree(copied.path("scores"))
    assert neft(copied, "analyse", "sensitivity", "en-fr")[1][0].endswith("there: none")
