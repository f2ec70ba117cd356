"""The house rules, read from the source: who imports whom, and that its parts agree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "neft_core"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FLOWS = {f"flows.{path.stem}": path for path in sorted((ROOT / "flows").glob("*.py"))}

CORE = {"groups", "experts_apart", "patterns", "neurons", "contents", "masks",
        "checkpoints", "sums", "weights", "similarity", "selection", "frozen", "sparse",
        "sparse_experts", "layer", "expert_layer", "tuner", "registration", "refusals",
        "rounding", "optimizers", "simulation", "tracker", "again", "aside", "overlay", "steps",
        "gradients", "activations", "probing", "utilisation", "overlaps"}  # fmt: skip
"""The numerical core, which takes plain arguments."""

DATA = {"rows", "data", "splits", "tasks", "encoding", "metrics"} | {
    name for name in MODULES if name.split(".")[0] == "corpus"
}

OWNERS = {
    "transformers": {"models"},
    "tokenizers": {"models"},
    "huggingface_hub": {"hub"},
    "datasets": {"data"},
    "accelerate": {"training", "ranks"},
    "peft": {"layer", "methods", "refusals", "tuner"},
    "sacrebleu": {"metrics"},
    "matplotlib": {"drawing"},
    "sklearn": {"probing"},
    "rouge_score": {"metrics"},
    "mlflow": {"mlflow_store", "registry", "served", "serving"},
    "psutil": {"machine", "ranks", "servers"},
    "dvc": {"graph", "links", "workspace"},
    "prefect": set(FLOWS),
}
"""Libraries and the only modules that import them."""

HEAVY = {"torch", "transformers", "mlflow", "prefect", "datasets", "accelerate", "peft", "dvc",
         "matplotlib", "sacrebleu", "rouge_score", "nltk", "numpy", "pandas", "pyarrow", "sklearn",
         "sqlalchemy"}  # fmt: skip

LONG = {
    "layer": "what PEFT asks of a layer is one class",
    "models": "all that knows transformers",
    "corpus.grammar_hi": "one language's grammar",
    "corpus.sampler": "all constructions draw from one sampler",
}
"""Files of more than 350 lines, and why."""


REGISTERING = {("tuner", "register()"), ("served", "set_model(Answering())")} | {
    (name, "register_with_peft()") for name in ("__init__", "layer")
}
"""What importing a module may do."""


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Modules that a file imports: anywhere, or when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_only else ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path, top_only: bool = False) -> set[str]:
    """Modules of this package among them, by their own name."""
    names = (name for name in imports(path, top_only) if name.startswith("neft_core."))
    return {name.removeprefix("neft_core.") for name in names} & set(MODULES)


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def test_the_rules_speak_of_modules_that_exist():
    named = CORE | DATA | set(LONG) | set().union(*OWNERS.values())
    assert named <= set(MODULES) | set(FLOWS)


@pytest.mark.parametrize("name", sorted(CORE | DATA))
def test_core_and_data_take_plain_arguments(name):
    named = {other.split(".")[0] for other in ours(MODULES[name])}
    assert not named & {"config", "workspace", "stages", "runs", "cli", "overrides"}


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_owner(library):
    users = {n for n, path in {**MODULES, **FLOWS}.items() if library in libraries(path)}
    assert users <= OWNERS[library]
    assert users


def test_imports_make_no_circle():
    """Each module is imported after what it imports at its head: there is such an order."""
    above = {name: ours(path, top_only=True) - {name} for name, path in MODULES.items()}
    while above:
        free = {name for name, needs in above.items() if not needs & above.keys()}
        assert free, f"a circle among {sorted(above)}"
        above = {name: needs for name, needs in above.items() if name not in free}


def test_stages_are_at_the_top():
    users = {name for name, path in MODULES.items() if "stages" in ours(path)}
    assert users == {"commands"}
    assert {name for name, path in MODULES.items() if "cli" in ours(path)} == {"preloaded"}


@pytest.mark.parametrize("path", [*MODULES.values(), *FLOWS.values()], ids=lambda p: p.stem)
def test_nothing_happens_at_import(path):
    """A module's body defines things; flows/__init__.py sets variables that Prefect reads, and PEFT
    knows the tuner as soon as both are imported."""
    if path.parent.name == "flows" and path.stem == "__init__":
        return
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign,
               ast.AnnAssign)  # fmt: skip
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        told = (path.stem, ast.unparse(node)) in REGISTERING
        guard = isinstance(node, ast.If) and ast.unparse(node.test) in (
            "TYPE_CHECKING", "__name__ == '__main__'",
        )  # fmt: skip
        assert isinstance(node, allowed) or text or guard or told, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    "command", [["-c", "import argparse, neft_core"], ["-m", "neft_core.cli", "-h"]]
)
def test_the_command_line_starts_without_anything_heavy(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in lines if "|" in line}
    assert "argparse" in loaded
    assert not loaded & HEAVY


def test_dvc_yaml_params_and_stages_agree():
    from neft_core.commands import ITEMS
    from neft_core.config import Params
    from neft_core.stages import STAGES

    pipeline = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert set(pipeline) == set(STAGES)
    for name, entry in pipeline.items():
        item = entry.get("foreach", "").removeprefix("${").removesuffix("}")
        assert ITEMS.get(name, "") == item, name
        body = entry.get("do", entry)
        assert body["cmd"] == f"neft stage {name}" + (" ${key}" if item else "")
        assert body["desc"], name
        for key in body["params"]:
            if isinstance(key, str):
                assert key.split(".")[0] in Params.model_fields, key
            else:  # the whole of params.yaml, or of a file that another stage makes
                assert set(key) <= {"params.yaml"} | {out for other in pipeline.values() for out in
                                                      other.get("do", other)["outs"]}  # fmt: skip
        made = [path for path in body["outs"] if not path.startswith(("work/", "reports/"))]
        assert made == [], "outputs lie under work/ and reports/"


def test_what_a_stage_needs_another_stage_makes():
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    bodies = {name: entry.get("do", entry) for name, entry in stages.items()}
    made = [path.split("${")[0] for body in bodies.values() for path in body["outs"]]
    for name, body in bodies.items():
        for path in body.get("deps", []):
            if path.startswith("work/"):
                start = path.split("${")[0]
                assert any(start.startswith(m) or m.startswith(start) for m in made), (name, path)


def test_files_stay_short():
    lengths = {n: len(p.read_text(encoding="utf-8").splitlines()) for n, p in MODULES.items()}
    assert {name for name, length in lengths.items() if length > 350} == set(LONG)


def test_every_module_says_what_it_is():
    for path in [*MODULES.values(), *FLOWS.values()]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
    assert not {"utils", "common", "base", "helpers", "misc"} & set(MODULES)
