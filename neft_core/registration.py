"""Make PEFT know the type NEFT as soon as both packages are imported, in either order."""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import Any

TUNER = "neft_core.tuner"
"""The module that registers the type when it is imported."""


class AfterPeft:
    """A finder on `sys.meta_path` that has the tuner imported behind `peft`, and then is gone.

    The other finders find `peft`, and who only asks whether it is installed changes nothing.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module `peft` as the other finders have it; no other module."""
        if name != "peft":
            return None
        for finder in sys.meta_path:
            spec = None if isinstance(finder, AfterPeft) else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._follow(spec.loader)
                return spec
        return None

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            if "neft_core.layer" not in sys.modules:  # else it does this at its end
                import_module(TUNER)

        loader.exec_module = exec_module


def register_with_peft() -> None:
    """Register now where PEFT is imported already, else when it is; imports no library."""
    if "peft" in sys.modules:
        import_module(TUNER)
    elif not any(isinstance(finder, AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterPeft())
