"""Sections `scoring`, `warmups`, `scores`, `activations`: candidates, and what is known of each."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from neft_core.config.section import Section, Seed, refuse
from neft_core.patterns import Patterns


class MoreWarmup(Section):
    """One more warm-up of a task: as `warmup` says but for the keys given here."""

    task: str
    """A key of `tasks`."""
    steps: int | None = Field(default=None, ge=1)
    """K: optimiser steps."""
    lr: float | None = Field(default=None, gt=0, le=1)
    """Learning rate at the first step."""
    batch_size: int | None = Field(default=None, ge=1)
    """Rows in a micro-batch."""
    seed: Seed | None = None
    """Seed of the order of rows."""


class GradientScores(Section):
    """Scores without any warm-up: how far a gradient step in the base's weights turns a neuron."""

    criterion: Literal["gradient"]
    """What is scored."""
    task: str
    """A key of `tasks`; its training rows are used."""
    rows: int = Field(default=512, ge=1)
    """Training rows, drawn by the seed; all of them where there are fewer."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at once."""
    relative: bool = False
    """Divide by the size of the neuron: the angle, to first order."""
    memory: float | None = Field(default=None, gt=0)
    """GB (10^9 bytes) for the summed gradients; less takes more passes over the rows, with the same
    result. null: 4 bytes for each candidate's weight, and one pass."""
    seed: Seed = 1
    """Seed of the rows."""


class ProbeScores(Section):
    """Scores by linear probes on the hidden states of prompts, for tasks with few answers."""

    criterion: Literal["probe"]
    """What is scored."""
    task: str
    """A key of `tasks`; its training rows are used, their targets are the classes."""
    rows: int = Field(default=2000, ge=4)
    """Training rows, drawn by the seed; all of them where there are fewer."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at once."""
    alpha: float = Field(default=1.0, gt=0)
    """Ridge penalty."""
    seed: Seed = 1
    """Seed of the rows."""


Scores = Annotated[GradientScores | ProbeScores, Field(discriminator="criterion")]


class ActivationScores(Section):
    """Scores by how much a warm-up changed what neurons give out on text."""

    task: str
    """A key of `tasks`; its dev rows are used."""
    warmup: str
    """The tuned model: a task, whose own warm-up is meant, or a key of `warmups`."""
    rows: int = Field(default=200, ge=1)
    """Dev rows; all of them where there are fewer."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at once."""


class Scoring(Section):
    """Which neurons are candidates."""

    layout: Literal["mlp", "mlp+gate", "attention", "all", "rows", "patterns"] = "mlp"
    """`mlp`: rows of up, columns of down (the paper's); `mlp+gate`: rows of gate too; `attention`:
    rows of query, key and value, columns of the output; `all`: both of these; `rows`: rows of all
    these weights; `patterns`: what `rows` and `columns` name."""
    rows: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Of `patterns`: modules whose rows are candidates. A name, or its end after a dot, with `*`,
    `?` and `[...]` as in file names: `mlp.up_proj`, `layers.[0-3].*.q_proj`."""
    columns: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Of `patterns`: modules whose columns are candidates."""
    transposed: bool = False
    """Of `patterns`: these modules store [in, out]; known for the model types of the table."""

    @model_validator(mode="after")
    def _patterns_alone(self) -> "Scoring":
        given = [key for key in ("rows", "columns", "transposed") if getattr(self, key)]
        if self.layout == "patterns" and not (self.rows or self.columns):
            raise refuse("layout: got 'patterns' without any; give some in rows or columns")
        if self.layout != "patterns" and given:
            raise refuse(f"{given[0]}: given with layout '{self.layout}'; set layout: patterns")
        return self

    @property
    def candidates(self) -> str | Patterns:
        """The layout as `neurons.candidates` takes it."""
        if self.layout != "patterns":
            return self.layout
        return Patterns(tuple(self.rows), tuple(self.columns), self.transposed)
