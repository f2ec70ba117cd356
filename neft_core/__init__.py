"""Neuron-level fine-tuning of language models: score, select, train, compare."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "NeftConfig": "tuner",
    "NeuronMask": "masks",
    "NeuronScores": "masks",
}
"""Public names and the modules that define them; loaded when asked for."""


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
