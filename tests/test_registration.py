"""`import neft_core` alone makes PEFT know the type NEFT, in fresh processes, in every order."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from test_tuner_peft import IDS, config, out, perturbed, tiny_llama

ROOT = Path(__file__).resolve().parents[1]

PEFT = "from peft import PeftModel; model = PeftModel.from_pretrained(base(), folder)"
TRANSFORMERS = "model = base(); model.load_adapter(folder)"

ORDERS = {
    "neft first": ["import neft_core", PEFT],
    "peft first": ["import peft", "import neft_core", PEFT],
    "asked before": [
        "import neft_core, importlib.util; assert importlib.util.find_spec('peft').loader",
        "import transformers.utils; assert transformers.utils.is_peft_available()",
        "import neft_core.tuner",
        TRANSFORMERS,
    ],
}

PROGRAM = """
import sys, warnings
folder, ids = {folder!r}, {ids}
def base():
    import torch
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder + "/base")
{lines}
import neft_core.registration, peft, torch
assert not any(isinstance(f, neft_core.registration.AfterPeft) for f in sys.meta_path)
torch.set_num_threads(1)
with torch.no_grad():
    torch.save(model(torch.tensor(ids)).logits, sys.argv[1])
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Each order in a process of its own, all at once; with what they should find."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_llama().save_pretrained(folder / "base")
    model = perturbed(get_peft_model(tiny_llama(), config()))
    model.save_pretrained(folder)
    children = {}
    for name, lines in ORDERS.items():
        text = PROGRAM.format(folder=str(folder), ids=IDS.tolist(), lines="\n".join(lines))
        command = [sys.executable, "-c", text, str(folder / f"{name}.pt")]
        children[name] = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    return folder, out(model), children


@pytest.mark.parametrize("name", ORDERS)
def test_importing_the_package_is_enough(started, name):
    folder, want, children = started
    _, said = children[name].communicate(timeout=120)
    assert children[name].returncode == 0, said
    assert torch.equal(torch.load(folder / f"{name}.pt"), want)


def test_importing_the_package_imports_no_library():
    code = (
        "import sys; before = set(sys.modules); import neft_core, importlib.util as u; "
        "u.find_spec('peft'); new = {n.split('.')[0] for n in set(sys.modules) - before}; "
        "assert not new & {'torch', 'peft', 'transformers', 'numpy'}, new; "
        "import importlib; importlib.reload(neft_core); "
        "assert sum(type(f).__name__ == 'AfterPeft' for f in sys.meta_path) == 1"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
