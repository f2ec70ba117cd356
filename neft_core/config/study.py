"""Section `study`: the question that a study's runs answer, and how the answer is shown."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from neft_core.config.measures import Texts
from neft_core.config.runs import Method
from neft_core.config.section import Section, Seed, known, refuse
from neft_core.config.shown import (
    BEFORE,
    AnalysisSection,
    Names,
    Shown,
    candidates,
    methods_on,
    once_of,
)

if TYPE_CHECKING:
    from neft_core.config.params import Params


HEADS = ("method", "trained parameters", "% of model")
"""What stands over a table's first columns."""


class TableSection(Shown):
    """A table in the form of the paper's: a method in each row, a task in each column."""

    show: Literal["table"]
    """What is shown."""
    tasks: list[str] | dict[str, str] = Field(min_length=1)
    """Keys of `tasks` whose test splits are the columns; as a mapping with their headings."""
    rows: dict[str, str | Names] = Field(min_length=1)
    """For each label a method of the catalogue, whose run is METHOD-TASK; or a whole run's name;
    or `base` or `tuned`, the models before. Of several (a list, or a method that a grid gave
    several rates) each column has the one with the lowest dev loss, mean over seeds; of equal ones
    the first."""
    trained: str | None = None
    """The task that the runs were trained on; null: each on its column's."""
    metrics: list[str] | None = Field(default=None, min_length=1)
    """Columns of each task; null: the first metric of its kind."""
    paper: dict[str, dict[str, float | list[float]]] = Field(default_factory=dict)
    """By label and task what the paper reports where its setting is this one; of several metrics a
    list."""
    against: list[str] = Field(default_factory=list)
    """Labels of rows with each of which every other is compared, seed by seed; not of `base` and
    `tuned`, which have no seeds."""

    @model_validator(mode="after")
    def _known_labels(self) -> "TableSection":
        for key, names in (("metrics", self.metrics or []), ("tasks", self.headings.values())):
            if len(set(names)) < len(names):
                raise refuse(f"{key}: got {', '.join(names)}; each column once")
        if taken := set(self.headings.values()) & set(HEADS):
            raise refuse(
                f"tasks: got the heading '{min(taken)}', of a column that is there; another"
            )
        for label, values in self.paper.items():
            if label not in self.rows:
                raise refuse(f"paper: got the label '{label}'; one of rows")
            for task, value in values.items():
                if task not in self.tasks:
                    raise refuse(f"paper: {label}: got the task '{task}'; one of tasks")
                wanted = len(self.metrics or [1])
                if len(value if isinstance(value, list) else [value]) != wanted:
                    raise refuse(f"paper: {label}: {task}: got {value}; a number for each metric")
        once_of(self.against, [label for label, asked in self.rows.items() if asked not in BEFORE])
        return self

    def check(self, where: str, params: "Params") -> None:
        """Tasks are known, and each row has a run in some column."""
        from neft_core.metrics import OF_TASK

        for task in [*self.tasks, *([self.trained] if self.trained else [])]:
            known(f"{where}.{'trained' if task == self.trained else 'tasks'}", task, params.tasks)
        for task in self.tasks:
            kind = params.tasks[task].format.task
            for metric in self.metrics or []:
                if metric not in OF_TASK[kind]:
                    raise refuse(
                        f"{where}.metrics: got '{metric}'; of {kind} there are "
                        f"{', '.join(OF_TASK[kind])}"
                    )
        for label, asked in self.rows.items():
            for method in [asked] if isinstance(asked, str) else asked:
                on = [self.trained or task for task in self.tasks]
                params.check_warmed(f"{where}.rows.{label}", method)
                if asked in BEFORE or any(candidates(method, t, params.runs) for t in on):
                    continue
                names = {
                    name: None
                    for task in on
                    for name in methods_on(
                        task, [n for n, run in params.runs.items() if run.task == task]
                    )
                }
                before = BEFORE if isinstance(asked, str) else ()
                known(f"{where}.rows.{label}", method, [*names, *before])

    @property
    def headings(self) -> dict[str, str]:
        """For each task its heading."""
        return self.tasks if isinstance(self.tasks, dict) else {t: t for t in self.tasks}

    def runs(self, label: str, task: str, runs: Collection[str]) -> list[str]:
        """The runs that a row names in a task's column; several are candidates for it."""
        asked = self.rows[label]
        names = [asked] if isinstance(asked, str) else asked
        found = [run for name in names for run in candidates(name, self.trained or task, runs)]
        return list(dict.fromkeys(found))

    def reported(self, label: str, task: str, metric: str) -> float | None:
        """What the paper reports, where it is given."""
        value = self.paper.get(label, {}).get(task)
        if isinstance(value, list):
            return dict(zip(self.metrics or [metric], value, strict=True))[metric]
        return value


class WinsSection(Shown):
    """How often each of two methods scores higher than the other, level by level (Fig. 2)."""

    show: Literal["wins"]
    """What is shown."""
    series: dict[str, Names] = Field(min_length=2, max_length=2)
    """Two methods at several sizes, as many of each: what stands at the same place is compared."""
    trained: list[str] = Field(min_length=1)
    """Keys of `tasks`: those that the runs were trained on."""
    tested: list[str] | None = Field(default=None, min_length=1)
    """Keys of `tasks` on which each of the runs is tested; null: the one that it was trained on."""
    metric: str | None = None
    """A metric of the tasks' kind; null: its first."""

    @model_validator(mode="after")
    def _levels(self) -> "WinsSection":
        first, second = self.series.values()
        if len(first) != len(second):
            raise refuse(f"series: got {len(first)} and {len(second)} names; as many of each")
        for key, names in (("trained", self.trained), ("tested", self.tested or [])):
            if len(set(names)) < len(names):
                raise refuse(f"{key}: got {', '.join(names)}; each task once")
        return self

    def check(self, where: str, params: "Params") -> None:
        """Tasks, the metric and the runs of each task are known."""
        from neft_core.metrics import OF_TASK

        for key, names in (("trained", self.trained), ("tested", self.tested or [])):
            for task in names:
                known(f"{where}.{key}", task, list(params.tasks))
        for task in self.tested or self.trained:
            if self.metric is not None:
                of_kind = OF_TASK[params.tasks[task].format.task]
                known(f"{where}.metric", self.metric, list(of_kind))
        for task in self.trained:
            runs = [name for name, run in params.runs.items() if run.task == task]
            for label, names in self.series.items():
                for name in names:
                    if not candidates(name, task, runs):
                        known(f"{where}.series.{label}", name, methods_on(task, runs))


class RatesSection(Shown):
    """Dev losses by method and learning rate: which rate is the best of each."""

    show: Literal["rates"]
    """What is shown."""
    task: str
    """A key of `tasks`."""

    def check(self, where: str, params: "Params") -> None:
        """The task is known, and no two of its runs stand in one place."""
        known(f"{where}.task", self.task, params.tasks)
        places: dict[tuple[str, float], str] = {}
        for name, run in params.runs.items():
            rate = run.lr or params.training.lr
            if run.task != self.task:
                continue
            other = places.setdefault((run.method.words(), rate), name)
            if other != name:
                raise refuse(
                    f"{where}.task: runs {other} and {name} are both {run.method.words()} at "
                    f"rate {rate:g}; of a task with such a part give each method a rate once"
                )


PartSection = Annotated[
    TableSection | WinsSection | RatesSection | AnalysisSection, Field(discriminator="show")
]
"""Each kind of part has its section here, and its function in `PARTS` of study_parts.py."""


SECOND = dict.fromkeys(
    ("table", "trade_off", "wins", "added", "forgetting", "sensitivity"), "differences"
) | {"cost": "speed", "types": "layers"}
"""The parts with a second table, and how the name of its file ends."""


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

    @model_validator(mode="after")
    def _names_once(self) -> "Study":
        names = [self.part_name(part) for part in self.parts]
        names += [f"{self.part_name(p)}-{SECOND[p.show]}" for p in self.parts if p.show in SECOND]
        names += [f"{self.part_name(p)}-against" for p in self.parts if getattr(p, "against", [])]
        for name in names:
            if names.count(name) > 1:
                raise refuse(f"parts: two would write files named '{name}'; give each its own name")
        return self

    def part_name(self, part: PartSection) -> str:
        """What a part's files are called: what it shows, with a number where there are several."""
        alike = [other for other in self.parts if other.show == part.show]
        place = next(n for n, other in enumerate(alike, 1) if other is part)
        show = part.show.replace("_", "-")
        return part.name or (f"{show}-{place}" if len(alike) > 1 else show)


class Catalogued(Section):
    """A method that a grid can name; `{task}` in it stands for the task's name."""

    method: Method
    """What trains."""
    lr: float | None = Field(default=None, gt=0, le=1)
    """Learning rate; null: `training.lr`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows; null: `training.epochs`."""


class Grid(Section):
    """Runs METHOD-TASK of some methods on some tasks."""

    tasks: list[str] = Field(min_length=1)
    """Keys of `tasks`."""
    methods: list[str] = Field(min_length=1)
    """Keys of `methods`."""
    seeds: list[Seed] | None = Field(default=None, min_length=1)
    """Of each run; null: the file's."""
    lr: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(default=None, min_length=1)
    """Learning rates, each of which is a run METHOD-RATE-TASK; null: the method's own."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows; null: the method's own."""
    tested: list[str] = Field(default_factory=list)
    """Keys of `tasks` that every run is tested on beside its own."""
    forgetting: Texts | None = None
    """Text on which every run's forgetting is measured; null: it isn't."""


class StudyFile(Section):
    """What a study file has beside the sections of params.yaml, and params.yaml has not."""

    methods: dict[str, Catalogued] = Field(default_factory=dict)
    """Methods by name: the same under one name in every study."""
    seeds: list[Seed] = Field(default=[1], min_length=1)
    """Of every run of the grid."""
    grid: list[Grid] = Field(default_factory=list)
    """Runs, beside those of `runs`."""
