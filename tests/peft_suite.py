"""PEFT's own tests, run with adapters of type NEFT.

`python tests/peft_suite.py` takes the source of the PEFT that is installed from pip's index (or
`--sdist FILE`), runs the tests of its suite that are asked of every method, with the configs and
models of peft_cases.py in the place of its own, and prints what came of each. It needs no model
from the Hub. It ends with 1 where a test fails or is refused that isn't in EXPECTED, or one that
is there passes.
"""

import argparse
import inspect
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import peft_cases
import pytest
import torch
from peft_cases import IN_PLACE_OF_LORA, Named

from neft_core import NeftConfig
from neft_core.errors import NeftError

OUTCOMES = ("passed", "skipped", "refused", "failed")

_MIXED = "a batch has one adapter: the weight holds one set of neurons at a time"
_WEIGHTED = "neurons aren't mixed into a new adapter; several can be active"

EXPECTED: dict[str, tuple[int, str]] = {
    "test_add_adapter_rejects_duplicate_name_without_mutation": (
        1,
        "PEFT's mixed models take its own methods alone",
    ),
    "test_mixed_adapter_batches_length_mismatch_raises": (1, _MIXED),
    "test_mixed_adapter_batches_merged_raises": (1, _MIXED),
    "test_mixed_adapter_batches_mlp": (1, _MIXED),
    "test_mixed_adapter_batches_training_mode_raises": (1, _MIXED),
    "test_multiple_adapters_mixed_modules_to_save_merging_adapters": (1, _WEIGHTED),
    "test_multiple_adapters_same_modules_to_save_merging_adapters_raises": (1, _WEIGHTED),
    "test_requires_grad_lora_emb_conv1d": (1, "an embedding has no neurons"),
    "test_targeting_module_to_save_raises": (1, "refused too, in words of our own"),
}
"""Tests that this method doesn't pass: in how many cases, and why not."""


class Ours:
    """A plugin of pytest that puts our cases into PEFT's tests and counts what comes of them.

    Args:
        lists: by file of tests and name of a list in it, what it holds instead.
        cases: the same by test and argument, for tests that have a list of their own.
    """

    def __init__(
        self, lists: dict[str, dict[str, list[Any]]], cases: dict[str, dict[str, list[Any]]]
    ) -> None:
        self.lists, self.cases = lists, cases
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)
        self.texts: list[tuple[str, str]] = []
        self.others = 0

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        """Change the cases that a file's decorators hold, before they are read."""
        if not isinstance(collector, pytest.Module):
            return
        module = collector.obj
        held = {
            id(getattr(module, name)): cases
            for name, cases in self.lists[module.__name__.rpartition(".")[2]].items()
        }
        for owner in (module, *dict(inspect.getmembers(module, inspect.isclass)).values()):
            for name, function in inspect.getmembers(owner, inspect.isfunction):
                own = self.cases.get(name, {})
                function.pytestmark = [
                    _changed(mark, held, own) for mark in getattr(function, "pytestmark", [])
                ]
        if hasattr(module, "PEFT_MODELS_TO_TEST"):
            module.PEFT_MODELS_TO_TEST[:] = self.lists["test_config"]["PEFT_MODELS_TO_TEST"]
        if hasattr(module, "TestRequiresGrad"):
            plain = module.TestRequiresGrad.check_requires_grad
            module.TestRequiresGrad.check_requires_grad = lambda own, model, *names: plain(
                own,
                model,
                *(re.sub(r"lora_[AB](\.\w+)\.weight", r"neft_values\1", n) for n in names),
            )

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what is asked of other methods alone."""
        every = len(items)
        items[:] = [item for item in items if _is_ours(item)]
        self.others = every - len(items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Have `Named` where a test of LoRA says LoraConfig."""
        if _function(item) not in IN_PLACE_OF_LORA:
            return (yield)
        with mock.patch.object(item.module, "LoraConfig", Named):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        """Count, and tell a refusal from a failure."""
        report = yield
        if report.when == "call" or not report.passed:
            refused = call.excinfo and call.excinfo.errisinstance(NeftError)
            outcome = "refused" if refused else report.outcome
            name = _function(item)
            self.counts[name][outcome] += 1
            if not report.passed:
                self.texts.append((outcome, f"{item.nodeid}\n{report.longreprtext}"))
                lines = str(call.excinfo.value).splitlines() or [call.excinfo.typename]
                self.reasons[name][lines[0]] += 1
        return report


def _changed(mark: Any, held: dict[int, list[Any]], own: dict[str, list[Any]]) -> Any:
    """A decorator with our cases, where it has a list of PEFT's."""
    if mark.name != "parametrize":
        return mark
    names, values = mark.args
    ours = own.get(names, held.get(id(values)))
    return mark if ours is None else pytest.mark.parametrize(names, ours).mark


def _function(item: pytest.Item) -> str:
    return item.name.partition("[")[0]


def _is_ours(item: pytest.Item) -> bool:
    values = item.callspec.params.values() if hasattr(item, "callspec") else []
    given = any(
        value is NeftConfig or value is Named or isinstance(value, Named) for value in values
    )
    return given or _function(item) in IN_PLACE_OF_LORA


def without_diffusers() -> dict[str, ModuleType]:
    """What stands for diffusers where it isn't installed: PEFT's tests only ask for a class."""
    if find_spec("diffusers"):
        return {}
    stand_in = ModuleType("diffusers")
    stand_in.__spec__ = ModuleSpec("diffusers", None)
    stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    return {"diffusers": stand_in}


def source(folder: Path) -> Path:
    """The source of the installed PEFT, from pip's index."""
    wanted = f"peft=={version('peft')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    subprocess.run([*pip, "--dest", str(folder), wanted], check=True)
    (found,) = folder.glob("peft-*.tar.gz")
    return found


def unpack(sdist: Path, folder: Path) -> Path:
    """PEFT's tests as a package; PEFT itself is the one that is installed."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tests,) = folder.glob("peft-*/tests")
    if tests.parent.name != f"peft-{version('peft')}":
        sys.exit(f"{sdist}: is {tests.parent.name}; peft {version('peft')} is installed")
    (tests / "__init__.py").touch()
    (tests / "pytest.ini").write_text("[pytest]\n")
    return tests


def table(ours: Ours) -> list[str]:
    """A line for each test, and why it isn't passed."""
    width = max(map(len, ours.counts), default=0)
    lines = [" " * width + "".join(f"{name:>9}" for name in OUTCOMES)]
    for name, counts in sorted(ours.counts.items()):
        lines.append(f"{name:{width}}" + "".join(f"{counts[o] or '-':>9}" for o in OUTCOMES))
        lines += [f"    {count} x {text[:150]}" for text, count in ours.reasons[name].items()]
        if name in EXPECTED:
            lines.append(f"    expected: {EXPECTED[name][1]}")
    total = sum(ours.counts.values(), Counter[str]())
    lines.append(f"{'all':{width}}" + "".join(f"{total[o]:>9}" for o in OUTCOMES))
    return lines


def differences(ours: Ours, every: bool) -> list[str]:
    """What isn't as EXPECTED says; with `every`, which tests that we name aren't there."""
    found = []
    for name, counts in sorted(ours.counts.items()):
        missed = counts["failed"] + counts["refused"]
        expected, _ = EXPECTED.get(name, (0, ""))
        if missed != expected:
            found.append(f"{name}: {missed} cases not passed; {expected} expected")
    if every:
        named = {*EXPECTED, *IN_PLACE_OF_LORA, *ours.cases}
        found += [f"{name}: did not run" for name in sorted(named - set(ours.counts))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sdist", type=Path, help="PEFT's source, instead of that of pip's index")
    parser.add_argument("--only", default="", help="tests whose name pytest's -k finds")
    parser.add_argument("--texts", action="store_true", help="print tracebacks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tests = unpack(options.sdist or source(folder), folder)
        peft_cases.install()
        made = peft_cases.models(folder / "models")
        ours = Ours(peft_cases.lists(made), peft_cases.cases(made))
        files = [str(tests / f"{name}.py") for name in ours.lists]
        plain = ["-p", "no:terminal", "-p", "no:cacheprovider", "-W", "ignore"]
        only = ["-k", options.only] if options.only else []
        with (
            mock.patch.dict(os.environ, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"),
            mock.patch.dict(sys.modules, without_diffusers()),
        ):
            status = pytest.main([*plain, "-c", str(tests / "pytest.ini"), *only, *files], [ours])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"pytest ended with {status!r}")
    if options.texts:
        print(*(text for outcome, text in ours.texts if outcome != "skipped"), sep="\n\n")
    print(*table(ours), sep="\n")
    print(f"{ours.others} cases that are of other methods alone were left out")
    found = differences(ours, not options.only)
    print(*found, sep="\n")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
