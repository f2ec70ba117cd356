"""Section `study`: the question that a study's runs answer, and how the answer is shown."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from neft_core.config.section import Section, refuse

Metric = Literal["bleu", "chrf", "rouge1", "rouge2", "rougeL", "accuracy"]
"""A key of `METRICS` in neft_core/metrics.py."""


class Shown(Section):
    """What every part of a study has."""

    title: str = Field(default="", max_length=200)
    """Heading; empty: the part's own."""
    notes: list[str] = Field(default_factory=list)
    """Sentences below it."""


class TableSection(Shown):
    """A table in the form of the paper's: a method in each row, a task in each column."""

    show: Literal["table"]
    """What is shown."""
    tasks: list[str] | dict[str, str] = Field(min_length=1)
    """Keys of `tasks` whose test splits are the columns; as a mapping with their headings."""
    rows: dict[str, str] = Field(min_length=1)
    """For each label a method of the catalogue, whose run is METHOD-TASK; or a whole run's name;
    or `base` or `tuned`, the models before."""
    trained: str | None = None
    """The task that the runs were trained on; null: each on its column's."""
    metrics: list[Metric] | None = Field(default=None, min_length=1)
    """Columns of each task; null: the first metric of its kind."""
    paper: dict[str, dict[str, float | list[float]]] = Field(default_factory=dict)
    """By label and task what the paper reports where its setting is this one; of several metrics a
    list."""

    @model_validator(mode="after")
    def _known_labels(self) -> "TableSection":
        for label, values in self.paper.items():
            if label not in self.rows:
                raise refuse(f"paper: got the label '{label}'; one of rows")
            for task, value in values.items():
                if task not in self.tasks:
                    raise refuse(f"paper.{label}: got the task '{task}'; one of tasks")
                wanted = len(self.metrics or [1])
                if len(value if isinstance(value, list) else [value]) != wanted:
                    raise refuse(f"paper.{label}.{task}: got {value}; a number for each metric")
        return self


class RatesSection(Shown):
    """Dev losses by method and learning rate: which rate is the best of each."""

    show: Literal["rates"]
    """What is shown."""
    task: str
    """A key of `tasks`."""


PartSection = Annotated[TableSection | RatesSection, Field(discriminator="show")]
"""Each kind of part has its section here, and its function in `PARTS` of study_parts.py."""


class Study(Section):
    """A question, and the tables and figures that answer it."""

    title: str = Field(min_length=1, max_length=200)
    """As the list of studies tells it, and the page."""
    about: str = ""
    """What is asked, and of what; a paragraph."""
    rates: str = ""
    """The rule by which learning rates were chosen, the same for all methods."""
    parts: list[PartSection] = Field(min_length=1)
    """What is shown, in this order."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Written by `neft study`: stages that could not be made, as DVC calls them, and why. What
    needs them is shown as failed."""
