"""Neuron-level fine-tuning of language models: score, select, train, compare."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from neft_core.registration import register_with_peft

if TYPE_CHECKING:
    from neft_core.masks import NeuronMask as NeuronMask
    from neft_core.masks import NeuronScores as NeuronScores
    from neft_core.selection import select_neurons as select_neurons
    from neft_core.similarity import score_neurons as score_neurons
    from neft_core.tuner import NeftConfig as NeftConfig
    from neft_core.tuner import measure_merge as measure_merge

__version__ = "0.1.0"

_PUBLIC = {
    "NeftConfig": "tuner",
    "NeuronMask": "masks",
    "NeuronScores": "masks",
    "measure_merge": "tuner",
    "score_neurons": "similarity",
    "select_neurons": "selection",
}
"""What the package offers, and the module of each, imported when first asked for."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"neft_core.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register_with_peft()
