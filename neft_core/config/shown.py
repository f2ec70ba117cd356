"""What every part of a study has, and the parts that analyse its runs."""

import re
from collections.abc import Collection, Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field, model_validator

from neft_core.config.section import Section, known, refuse

if TYPE_CHECKING:
    from neft_core.config.params import Params

BEFORE: Final = ("base", "tuned")
"""Rows of the models before any run."""

Names = Annotated[list[str], Field(min_length=1)]
"""Methods of the catalogue, whose run is METHOD-TASK with the part's task, or whole runs' names. A
method that a grid gave several rates has a run for each, of which the best is shown."""

RATE: Final = r"-\d+e-?\d+"
"""The rate in METHOD-RATE-TASK, as `rate_part` writes it after a dash."""


def rate_part(rate: float) -> str:
    """A rate as a part of a name, where a dot can't stand: 3e-2."""
    _, digits, exponent = Decimal(str(rate)).normalize().as_tuple()
    return f"{''.join(map(str, digits))}e{exponent}"


def candidates(name: str, task: str, runs: Collection[str]) -> list[str]:
    """The runs that a name means: of a method with several rates one for each.

    Args:
        name: a method of the catalogue, or a whole run's name.
        task: the one that the runs were trained on.
        runs: all that there are.
    """
    if f"{name}-{task}" in runs:
        return [f"{name}-{task}"]
    swept = re.compile(f"{re.escape(name)}{RATE}-{re.escape(task)}")
    return [run for run in runs if swept.fullmatch(run)] or [run for run in runs if run == name]


def methods_on(task: str, runs: Collection[str]) -> list[str]:
    """The names that `candidates` knows on a task, but for whole runs'."""
    short = [run.removesuffix(f"-{task}") for run in runs]
    return list(dict.fromkeys([*short, *(re.sub(f"{RATE}$", "", name) for name in short)]))


class Shown(Section):
    """What every part of a study has."""

    title: str = Field(default="", max_length=200)
    """Heading; empty: the part's own."""
    name: str = Field(default="", pattern=r"^[a-z0-9_-]*$")
    """Of its files; empty: what is shown, with a number where there are several."""
    notes: list[str] = Field(default_factory=list)
    """Sentences below it."""

    def check(self, where: str, params: "Params") -> None:
        """Refuse names that params don't know; `where` are the keys of this section."""


class OnTask(Shown):
    """A part about runs that were trained on one task."""

    task: str
    """A key of `tasks`: the one that the runs were trained on."""
    metric: str | None = None
    """A metric of the task's kind; null: its first."""

    def _methods(self) -> Iterator[tuple[str, str]]:
        """Keys, and the methods or runs that they name."""
        yield from ()

    def methods(self) -> list[str]:
        """The methods or runs that it names."""
        return list(dict.fromkeys(name for _, name in self._methods()))

    def check(self, where: str, params: "Params") -> None:
        """The task and its metric are known, and the runs are of that task."""
        from neft_core.metrics import OF_TASK

        known(f"{where}.task", self.task, list(params.tasks))
        if self.metric is not None:
            known(
                f"{where}.metric", self.metric, list(OF_TASK[params.tasks[self.task].format.task])
            )
        runs = [name for name, run in params.runs.items() if run.task == self.task]
        for key, name in self._methods():
            if not candidates(name, self.task, runs):
                known(f"{where}.{key}", name, methods_on(self.task, runs))


def once_of(against: Collection[str], rows: Collection[str]) -> None:
    """Refuse what `against` names that is no row of its part, or named twice."""
    for name in against:
        known("against", name, rows)
    if len(set(against)) < len(against):
        raise refuse(f"against: got {', '.join(against)}; each row once")


class OverlapSection(Shown):
    """Neurons that selections from different scores have in common (Table 5)."""

    show: Literal["overlap"]
    """What is shown."""
    rows: dict[str, Annotated[list[Names], Field(min_length=1)]] = Field(min_length=1)
    """For each label pairs of scores that are compared, such as one for each seed of a warm-up:
    tasks, or keys of `warmups`, `scores` or `activations`."""
    percents: list[Annotated[float, Field(gt=0, le=100)]] = Field(
        default=[3.0, 6.0, 9.0, 12.0], min_length=1
    )
    """Budgets: what each of the scores would select, in percent of all parameters."""
    paper: dict[str, list[float]] = Field(default_factory=dict)
    """By label what the paper reports at each budget, in percent."""

    @model_validator(mode="after")
    def _pairs(self) -> "OverlapSection":
        for label, pairs in self.rows.items():
            for pair in pairs:
                if len(pair) != 2 or pair[0] == pair[1]:
                    raise refuse(f"rows.{label}: got {pair}; two different scores are compared")
        for label, values in self.paper.items():
            if label not in self.rows or len(values) != len(self.percents):
                raise refuse(f"paper.{label}: got {values}; a label of rows, a number for a budget")
        return self

    def check(self, where: str, params: "Params") -> None:
        """The scores are known."""
        names = [*params.tasks, *params.warmups, *params.scores, *params.activations]
        for label, pairs in self.rows.items():
            for pair in pairs:
                for name in pair:
                    known(f"{where}.rows.{label}", name, names)
                    if name in params.tasks and not params.tasks[name].trains:
                        raise refuse(
                            f"{where}.rows.{label}: got '{name}', which has no rows to train on, "
                            "so no scores; another"
                        )
                    params.check_warmed(f"{where}.rows.{label}", name)


class TradeOffSection(OnTask):
    """What is trained against what comes of it, a line for each method (Table 6)."""

    show: Literal["trade_off"]
    """What is shown."""
    series: dict[str, Names] = Field(min_length=1)
    """For each line its points: the same method at several sizes."""
    tested: list[str] | None = Field(default=None, min_length=1)
    """Tasks on which they are tested, a figure each; null: the one they were trained on."""
    levels: dict[str, str] = Field(default={"base": "base"})
    """Lines across, by label: a method or run, or `base` or `tuned`."""

    def _methods(self) -> Iterator[tuple[str, str]]:
        for label, names in self.series.items():
            yield from ((f"series.{label}", name) for name in names)
        for label, name in self.levels.items():
            if name not in BEFORE:
                yield f"levels.{label}", name

    def check(self, where: str, params: "Params") -> None:
        """Tested tasks are known too."""
        super().check(where, params)
        for task in self.tested or []:
            known(f"{where}.tested", task, list(params.tasks))
        for label, name in self.levels.items():
            params.check_warmed(f"{where}.levels.{label}", name)


class RankChangeSection(OnTask):
    """How far neurons move in the order of use, by where they were (Fig. 3)."""

    show: Literal["rank_change"]
    """What is shown."""
    pairs: dict[str, Names] = Field(min_length=1)
    """For each label the run whose order counts, and the one that it is compared with; the same
    twice compares its seeds. Both are measured in `utilisation`."""

    @model_validator(mode="after")
    def _two(self) -> "RankChangeSection":
        for label, pair in self.pairs.items():
            if len(pair) != 2:
                raise refuse(f"pairs.{label}: got {pair}; two runs are compared")
        return self

    def _methods(self) -> Iterator[tuple[str, str]]:
        for label, pair in self.pairs.items():
            yield from ((f"pairs.{label}", name) for name in pair)


class AddedSection(OnTask):
    """A selection, and what is added to it in several ways (Fig. 4)."""

    show: Literal["added"]
    """What is shown."""
    start: str
    """The run to which neurons are added."""
    ways: dict[str, Names] = Field(min_length=1)
    """For each way to add the runs that have more."""
    paper: dict[str, float] = Field(default_factory=dict)
    """By name, as in `start` and `ways`, what the paper reports where its setting is this one."""
    against: list[str] = Field(default_factory=list)
    """Names, as in `start` and `ways`, with each of which every other run is compared, seed by
    seed."""

    @model_validator(mode="after")
    def _reported_of_names(self) -> "AddedSection":
        for name in self.paper:
            if name not in self.methods():
                raise refuse(f"paper: got '{name}'; one that start or ways name")
        once_of(self.against, self.methods())
        return self

    def _methods(self) -> Iterator[tuple[str, str]]:
        yield "start", self.start
        for label, names in self.ways.items():
            yield from ((f"ways.{label}", name) for name in names)


class AnchoredSection(OnTask):
    """Runs whose use of neurons is compared with that of others."""

    names: dict[str, str] = Field(min_length=2)
    """Runs by label, each measured in `utilisation`; `base` is the base model."""
    anchors: dict[str, Names] = Field(min_length=1)
    """For each label from which is told the labels that are compared with it; the label itself
    compares its seeds."""

    @model_validator(mode="after")
    def _labels(self) -> "AnchoredSection":
        for anchor, others in self.anchors.items():
            for label in (anchor, *others):
                if label not in self.names:
                    raise refuse(f"anchors.{anchor}: got the label '{label}'; one of names")
        return self

    def _methods(self) -> Iterator[tuple[str, str]]:
        for label, name in self.names.items():
            if name != "base":
                yield f"names.{label}", name


class AverageChangeSection(AnchoredSection):
    """How far neurons move in the order of use, on average (Fig. 5)."""

    show: Literal["average_change"]
    """What is shown."""
    paper: dict[str, dict[str, float]] = Field(default_factory=dict)
    """By anchor and label what the paper reports where its setting is this one."""

    @model_validator(mode="after")
    def _reported_of_labels(self) -> "AverageChangeSection":
        for anchor, values in self.paper.items():
            for label in values:
                if label not in self.anchors.get(anchor, []):
                    raise refuse(f"paper.{anchor}: got the label '{label}'; one of its anchor's")
        return self


class TypesSection(AnchoredSection):
    """How many neurons are strongly affected, suppressed, indirectly affected (Fig. 6)."""

    show: Literal["types"]
    """What is shown."""


class CostSection(OnTask):
    """What finding neurons costs, and when training them alone has paid for it."""

    show: Literal["cost"]
    """What is shown."""
    rows: dict[str, str] = Field(min_length=1)
    """Runs by label."""
    full: str = "full"
    """The run whose steps cost what the others save from."""

    def _methods(self) -> Iterator[tuple[str, str]]:
        yield "full", self.full
        yield from ((f"rows.{label}", name) for label, name in self.rows.items())


class ForgettingSection(OnTask):
    """What runs gained on their task, and what they forgot."""

    show: Literal["forgetting"]
    """What is shown."""
    rows: dict[str, str] = Field(min_length=1)
    """Runs by label, each measured in `forgetting`."""

    def _methods(self) -> Iterator[tuple[str, str]]:
        yield from ((f"rows.{label}", name) for label, name in self.rows.items())


class SensitivitySection(OnTask):
    """What a selection owes to its criterion, its threshold, and the length of the warm-up."""

    show: Literal["sensitivity"]
    """What is shown."""
    groups: dict[str, Names] = Field(min_length=1)
    """By what is varied, the runs."""
    reference: str | None = None
    """The run whose neurons each selection is compared with."""
    against: list[str] = Field(default_factory=list)
    """Names, as in `groups`, with each of which every other run is compared, seed by seed."""

    @model_validator(mode="after")
    def _against_runs(self) -> "SensitivitySection":
        once_of(self.against, self.selections())
        return self

    def selections(self) -> list[str]:
        """What the groups name, each once."""
        return list(dict.fromkeys(name for names in self.groups.values() for name in names))

    def _methods(self) -> Iterator[tuple[str, str]]:
        for label, names in self.groups.items():
            yield from ((f"groups.{label}", name) for name in names)
        if self.reference is not None:
            yield "reference", self.reference


AnalysisSection = (
    OverlapSection
    | TradeOffSection
    | RankChangeSection
    | AddedSection
    | AverageChangeSection
    | TypesSection
    | CostSection
    | ForgettingSection
    | SensitivitySection
)
"""Parts that analyse runs."""
