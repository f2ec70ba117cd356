"""Neuron-level fine-tuning of language models: score, select, train, compare."""

__version__ = "0.1.0"
