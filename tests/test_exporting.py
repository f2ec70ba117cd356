"""`neft export`: what it writes loads without this package and computes what was trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_stages, tiny_llama
from families import tiny_model
from safetensors.torch import load_file, save_file
from test_methods import OPTIONS, mask_for, train_a_little
from test_stages import METHODS as METHODS_OF_RUNS

from neft_core import models, runs
from neft_core.exporting import FACTS, export, write_merged
from neft_core.methods import METHODS, PEFT_FILE
from neft_core.rounding import Tally
from neft_core.workspace import Workspace

ALONE = """
import sys, torch
for name in ("neft_core", "peft"):
    sys.modules[name] = None
try:
    import neft_core.tuner
except ImportError:
    pass
else:
    sys.exit("neft_core can be imported")
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = torch.arange(3, 13)
    if (Path(folder) / "tokenizer.json").exists():
        text = "the cat sees a red dog"
        ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text).input_ids)
    with torch.no_grad():
        found[folder] = (str(model.dtype), ids, model.eval()(ids[None]).logits)
torch.save(found, sys.argv[1])
"""
"""Loads checkpoints where neither this package nor PEFT can be imported."""


def seen_alone(folders: list[Path], file: Path) -> dict[Path, tuple]:
    """Precision, token ids and logits of checkpoints, as one process without us has them."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(file), *map(str, folders)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {Path(folder): seen for folder, seen in torch.load(file).items()}


def workspace(finished, folder: Path, model, methods: dict[str, str]) -> Workspace:
    """A workspace on a local base, with runs of these methods trained."""
    ws = Workspace(shutil.copytree(finished.root, folder / "w"))
    (ws.root / "model").mkdir()
    models.save_checkpoint(model, ws.root / "model")
    for path in ws.path("base").glob("token*"):
        shutil.copy(path, ws.root / "model")
    text = ws.params_file.read_text()
    text = "model: {kind: local, path: model}\n" + text[text.index("tasks:") :]
    entries = "".join(f"  {n}: {{task: en-fr, method: {m}}}\n" for n, m in methods.items())
    text = text[: text.index("runs:")] + f"runs:\n{entries}" + text[text.index("evaluation:") :]
    ws.params_file.write_text(text.replace("max_tokens: 160", "max_tokens: 64"))
    run_stages(ws, "base", "prepare", "warmup", "score", "select", "train")
    return ws


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    """A run of every method on a base in bf16, trained in fp32."""
    vocabulary = json.loads((finished.path("base") / "config.json").read_text())["vocab_size"]
    model = tiny_llama(vocab_size=vocabulary, max_position_embeddings=160).bfloat16()
    return workspace(finished, tmp_path_factory.mktemp("bf16"), model, METHODS_OF_RUNS)


@pytest.fixture(scope="module")
def exported(trained):
    """Every run in the base's precision, and in fp32; with what a process without us sees."""
    folders = {}
    for run in METHODS_OF_RUNS:
        for dtype in (None, "fp32"):
            folders[run, dtype] = trained.root / "out" / f"{run}-{dtype}"
            export(trained, run, None, folders[run, dtype], dtype, adapter=False)
    seen = seen_alone(list(folders.values()), trained.root / "found.pt")
    return {key: (folder, *seen[folder]) for key, folder in folders.items()}


def plain(ws: Workspace, run: str) -> torch.nn.Module:
    """The run's model in fp32 with its adapter merged, by PEFT alone."""
    model, _ = runs.load_trained(ws, run, 1)
    model.get_input_embeddings()._forward_hooks.clear()  # of method embed
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


@pytest.mark.parametrize("run", METHODS_OF_RUNS)
def test_every_method_loads_without_the_package(trained, exported, run):
    for dtype, name in ((None, torch.bfloat16), ("fp32", torch.float32)):
        folder, stored, ids, logits = exported[run, dtype]
        assert stored == str(name)
        want = plain(trained, run).eval()
        with torch.no_grad():
            for parameter in want.parameters():
                parameter.data = parameter.data.to(name)
            assert torch.equal(logits, want(ids[None]).logits)
        state = load_file(folder / "model.safetensors")
        base = load_file(trained.root / "model" / "model.safetensors")
        assert state.keys() == base.keys()
        assert {tensor.dtype for tensor in state.values()} == {name}
        merged = dict(want.named_parameters())
        assert all(torch.equal(tensor, merged[key]) for key, tensor in state.items())
        same = {key for key, tensor in state.items() if torch.equal(tensor, base[key].to(name))}
        assert len(same) < len(state)
        if run == "neft":
            assert same == {k for k in state if "up_proj" not in k and "down_proj" not in k}


def test_the_files_beside_the_weights(trained, exported):
    folder = exported["neft", None][0]
    base = trained.root / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    before, after = (json.loads((place / "config.json").read_text()) for place in (base, folder))
    assert after == before
    assert json.loads((exported["neft", "fp32"][0] / "config.json").read_text()) == before | {
        "dtype": "float32"
    }
    files = {path.name for path in folder.iterdir()}
    assert {"README.md", FACTS, "config.json", "model.safetensors"} < files
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags: [neft]\n---\n")
    facts = json.loads((folder / FACTS).read_text())
    assert facts["base"]["hash"] in card
    assert facts["training"]["method"] == facts["method"]["name"] == "neft"
    assert str(trained.root) not in card + (folder / FACTS).read_text()


def check_losses(ws: Workspace, run: str, folder: Path) -> None:
    """Compare what an export in bf16 tells with counts over the base's files."""
    facts = json.loads((folder / FACTS).read_text())["rounding"]
    base = load_file(models.Base.load(ws.path("base")).directory(ws.root) / "model.safetensors")
    exact = dict(plain(ws, run).named_parameters())
    names = {key for key in base if not torch.equal(exact[key], base[key].float())}
    pairs = [(base[key], exact[key].detach()) for key in names]
    changed = [new != old.float() for old, new in pairs]
    lost = [(new != old.float()) & (new.bfloat16() == old.bfloat16()) for old, new in pairs]
    assert facts["dtype"] == "bfloat16"
    assert facts["changed"] == sum(int(x.sum()) for x in changed)
    assert facts["lost"] == sum(int(x.sum()) for x in lost)
    # Of neurons: the rows, or columns, that hold a change.
    inside = [(x.any(0, keepdim=True) & x.any(-1, keepdim=True)).expand_as(x) for x in changed]
    errors = [(new.bfloat16().float() - new)[x] for (_, new), x in zip(pairs, inside, strict=True)]
    errors = torch.cat(errors).abs().double()
    assert facts["largest_error"] == errors.max().item()
    assert facts["mean_error"] * facts["weights"] == pytest.approx(errors.sum().item())
    assert 0 < facts["changed"] <= facts["weights"]
    moved = sum((new - old.float()).abs().double().sum().item() for old, new in pairs)
    assert facts["mean_change"] * facts["weights"] == pytest.approx(moved)


@pytest.mark.parametrize("run", METHODS_OF_RUNS)
def test_losses_are_those_of_counting(trained, exported, run):
    check_losses(trained, run, exported[run, None][0])
    effect = json.loads((exported[run, None][0] / FACTS).read_text())["effect"]
    whole = json.loads((exported[run, "fp32"][0] / FACTS).read_text())
    assert whole["effect"]["loss_trained"] == pytest.approx(effect["loss_trained"])
    assert whole["effect"]["loss_exported"] == pytest.approx(effect["loss_trained"], rel=1e-5)
    assert effect["loss_exported"] != effect["loss_trained"]
    assert whole["effect"]["largest_logit_difference"] < 1e-4 < effect["largest_logit_difference"]
    assert whole["rounding"]["largest_error"] == whole["rounding"]["lost"] == 0


@pytest.mark.parametrize("run", ["full", "lora", "neft"])
def test_a_base_in_fp32_is_rounded_once(copied, run):
    folder = copied.root / run
    export(copied, run, None, folder, "bf16", adapter=False)
    check_losses(copied, run, folder)
    merged = dict(plain(copied, run).named_parameters())
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, merged[name].bfloat16())


def test_a_tally_by_hand():
    tally = Tally(torch.bfloat16)
    base = torch.tensor([1.0, 1.0, -2.0, 0.0], dtype=torch.bfloat16)
    tally.add(base, torch.tensor([1.0, 1.0 + 2**-9, -2.0 - 2**-6, 1e39 / 10]))
    tally.add(base[:0], torch.zeros(0))
    found = tally.result()
    # bf16 has steps of 2**-7 above 1 and of 2**-6 above 2.
    assert (found.weights, found.changed, found.lost, found.overflown) == (4, 3, 1, 0)
    assert found.dtype == "bfloat16"
    half = Tally(torch.float16)
    half.add(base, torch.tensor([1.0, 1.0, -2.0, 1e5]))
    assert half.result().overflown == 1
    small = Tally(torch.bfloat16)
    small.add(base[:2], torch.tensor([1.0 + 2**-9, 1.0 - 2**-8]))
    found = small.result()
    assert (found.mean_change, found.mean_error, found.largest_error) == (
        (2**-9 + 2**-8) / 2, 2**-9 / 2, 2**-9,
    )  # fmt: skip
    assert str(found).startswith("bfloat16 gives 50.0 % of 2 changed weights the base's bits again")


def test_an_adapter_alone(trained, capsys):
    from peft import PeftModel

    for run in ("neft", "lora"):
        target = trained.root / "adapters" / run
        export(trained, run, 1, target, None, adapter=True)
        assert {path.name for path in target.iterdir()} == {
            "README.md", FACTS, "adapter_config.json", PEFT_FILE,
        }  # fmt: skip
        fields = json.loads((target / "adapter_config.json").read_text())
        base = models.load_model(Path(fields["base_model_name_or_path"]), torch.float32)
        model, ids = PeftModel.from_pretrained(base, target), torch.arange(3, 13)[None]
        with torch.no_grad():
            want = runs.load_trained(trained, run, 1)[0](ids).logits
            assert torch.equal(model(ids).logits, want)
    assert f"export lora, seed 1: {target}" in capsys.readouterr().out


def test_what_is_refused(trained, neft, monkeypatch):
    taken = trained.root / "taken"
    taken.mkdir()
    cases = {
        ("neft", "--to", "taken"): "taken: exists already; give a new directory with --to",
        ("neft", "--to", "work/train/neft/m"): "work/train/neft/m: work/ is the pipeline's; give",
        ("neft", "--to", "reports/m"): "reports/m: reports/ is the pipeline's; give another",
        ("none", "--to", "new"): "run 'none': unknown; params.yaml has full, in_out, embed",
        ("neft", "--to", "new", "--seed", "9"): "run neft: has no seed 9; it has [1]",
        ("full", "--to", "new", "--adapter"): "--adapter: run full has method full, which trains",
        ("neft", "--to", "new", "--adapter", "--dtype", "fp32"): "--dtype: an adapter keeps the",
    }
    for argv, said in cases.items():
        code, lines = neft(trained, "export", *argv)
        assert (code, len(lines)) == (2, 1), lines
        assert lines[0].startswith(f"neft: {said}")
    with pytest.raises(SystemExit) as stopped:
        neft(trained, "export", "neft", "--to", "new", "--dtype", "int8")
    assert stopped.value.code == 2
    assert not (trained.root / "new").exists()


def test_values_beyond_the_precision_leave_nothing(trained, neft, tmp_path):
    ws = Workspace(shutil.copytree(trained.root, tmp_path / "w"))
    file = ws.path("train", "neft", "seed-1", PEFT_FILE)
    state = load_file(file)
    next(tensor for name, tensor in state.items() if "values" in name)[0, 0] = 1e5
    save_file(state, file, {"base": models.Base.load(ws.path("base")).hash})
    code, lines = neft(ws, "export", "neft", "--to", "out/new", "--dtype", "fp16")
    assert (code, len(lines)) == (2, 1)
    assert "has a value that is not finite in float16; use fp32 or bf16" in lines[0]
    assert [path.name for path in (ws.root / "out").iterdir() if "new" in path.name] == []
    shutil.rmtree(ws.path("prepared"))
    code, lines = neft(ws, "export", "neft", "--to", "out/new")
    assert (code, lines) == (0, [])
    assert json.loads((ws.root / "out/new" / FACTS).read_text())["effect"] is None


LAYOUTS = [
    (method, family)
    for method, families in {
        "neft": "gpt2 phi3 bloom gemma opt qwen3_moe mixtral gpt_oss",
        "full": "gpt2 phi3 qwen3_moe mixtral gpt_oss",
    }.items()
    for family in families.split()
]
"""Transposed, fused and tied weights, experts apart on disk and together in both forms."""


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Of each of `LAYOUTS`: its folder, tally, merged model, and logits trained and seen alone."""
    ids, entries = torch.arange(3, 13)[None], {}
    for method, family in LAYOUTS:
        folder = tmp_path_factory.mktemp(f"{method}-{family}")
        for place in ("base", "adapter", "merged"):
            (folder / place).mkdir()
        base = tiny_model(family)
        models.save_checkpoint(base, folder / "base")
        mask = mask_for(base, family, 0.4)
        model = METHODS[method].prepare(base, OPTIONS.get(method, {}), mask, family)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            trained = model(ids).logits
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        told = {"base": "x", "location": "y", "revision": ""}
        METHODS[method].save(model, folder / "adapter", told)
        again = models.load_model(folder / "base", torch.float32)
        tally = Tally()
        merged = METHODS[method].merge(again, {}, family, folder / "adapter", "x", tally)
        card = models.Base("local", "base", "", "x", family, 0, 0, False)
        write_merged(card, folder / "base", method, {}, folder / "adapter", folder / "merged")
        entries[method, family] = folder, tally.result(), count, merged.eval(), trained
    folders = [entry[0] / "merged" for entry in entries.values()]
    seen = seen_alone(folders, tmp_path_factory.mktemp("seen") / "found.pt")
    return {key: (*entry, seen[entry[0] / "merged"][2]) for key, entry in entries.items()}


@pytest.mark.parametrize(("method", "family"), LAYOUTS)
def test_every_layout_loads_without_the_package(layouts, method, family):
    folder, tally, count, merged, trained, alone = layouts[method, family]
    before, after = (load_file(folder / p / "model.safetensors") for p in ("base", "merged"))
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    moved = sum(int((after[key] != before[key]).sum()) for key in before)
    assert tally.weights == count
    assert tally.changed == moved > 0
    with torch.no_grad():
        assert torch.equal(alone, merged(torch.arange(3, 13)[None]).logits)
        base = models.load_model(folder / "base", torch.float32)(torch.arange(3, 13)[None]).logits
    torch.testing.assert_close(alone, trained, rtol=1e-4, atol=1e-5)
    assert (alone - base).abs().max() > 0.01
    tied = {"gpt2", "bloom", "gemma", "opt"}
    assert any(key.startswith("lm_head") for key in after) == (family not in tied)


def test_one_line_tells_what_a_merge_loses(caplog):
    from peft import get_peft_model

    from neft_core import NeftConfig, measure_merge

    base = tiny_llama().bfloat16()
    model = get_peft_model(base, NeftConfig(mask=mask_for(base, "llama")))
    train_a_little(model)
    found = measure_merge(model)
    assert found.weights == model.get_nb_trainable_parameters()[0]
    assert found.dtype == "bfloat16"
    assert measure_merge(model, torch.float32).mean_error == 0
    model.merge_adapter()
    assert measure_merge(model) == found
    model.unmerge_adapter()
    with caplog.at_level("INFO", "neft_core"):
        model.merge_and_unload()
    assert [record.message for record in caplog.records] == [
        f"merge: {found}; merging into a base in fp32 loses nothing"
    ]
