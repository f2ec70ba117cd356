"""Sections `utilisation`, `forgetting`, `speed`: what else is measured of trained runs."""

from pydantic import Field

from neft_core.config.section import Section


class Utilisation(Section):
    """How much each candidate neuron is used, by the base and by every seed of a run."""

    run: str
    """A key of `runs`."""
    task: str
    """A key of `tasks`; its dev rows are read."""
    rows: int = Field(default=200, ge=1)
    """Dev rows; all of them where there are fewer."""
    per_example: bool = False
    """Take the best layer for each row by itself and average those; false: of the mean row, as the
    paper does."""


class Texts(Section):
    """Text of the pre-training kind."""

    path: str = Field(min_length=1)
    """A UTF-8 file with one text a line, or JSON lines (.jsonl) with `text`; `data/none`: what the
    generated corpus would have given next for the pre-training of a built model."""
    rows: int = Field(default=1000, ge=1)
    """Texts at most."""


class Forgetting(Texts):
    """Loss on text of the pre-training kind, of the base and of every seed of a run."""

    run: str
    """A key of `runs`."""


class Speed(Section):
    """How fast a run's first seed generates beside the base: as adapter, and merged."""

    run: str
    """A key of `runs`, of method `neft` or `lora`."""
    task: str
    """A key of `tasks`; its test prompts are continued."""
    rows: int = Field(default=32, ge=1)
    """Prompts, continued at once; all of them where there are fewer."""
    new_tokens: int = Field(default=32, ge=1)
    """Tokens that each gets, ended or not."""
    repeats: int = Field(default=5, ge=1)
    """Times that each form generates, in turns with the others."""
