"""`import neft_core` alone makes PEFT know the type NEFT, in fresh processes, in every order."""

import subprocess
import sys
from pathlib import Path

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


def test_importing_the_package_is_enough(tmp_path):
    """Each order in a process of its own, all at once."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model = perturbed(get_peft_model(tiny_llama(), config()))
    model.save_pretrained(tmp_path)
    children = {}
    for name, lines in ORDERS.items():
        text = PROGRAM.format(folder=str(tmp_path), ids=IDS.tolist(), lines="\n".join(lines))
        command = [sys.executable, "-c", text, str(tmp_path / f"{name}.pt")]
        children[name] = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said = {name: child.communicate(timeout=900)[1] for name, child in children.items()}
    for name, child in children.items():
        assert child.returncode == 0, f"{name}: {said[name]}"
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), out(model)), name


def test_importing_the_package_imports_no_library():
    code = (
        "import sys; before = set(sys.modules); import neft_core, importlib.util as u; "
        "u.find_spec('peft'); new = {n.split('.')[0] for n in set(sys.modules) - before}; "
        "assert not new & {'torch', 'peft', 'transformers', 'numpy'}, new; "
        "import importlib; importlib.reload(neft_core); "
        "assert sum(type(f).__name__ == 'AfterPeft' for f in sys.meta_path) == 1"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
