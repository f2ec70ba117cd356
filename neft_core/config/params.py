"""The whole of params.yaml, and what its sections must agree on."""

from typing import ClassVar

from pydantic import Field, model_validator

from neft_core.config.measures import Forgetting, Speed, Utilisation
from neft_core.config.model import BuiltModel, Model
from neft_core.config.runs import (
    KINDS,
    Embed,
    Evaluation,
    InOut,
    Lora,
    Neft,
    Run,
    Tracking,
    Transfer,
)
from neft_core.config.scores import ActivationScores, MoreWarmup, Scores, Scoring
from neft_core.config.section import NAME, Section, known, refuse
from neft_core.config.shown import BEFORE
from neft_core.config.study import Study
from neft_core.config.tasks import Nli, Task, has_pretraining
from neft_core.config.training import Compute, Training, Warmup

MEASURES = ("utilisation", "forgetting", "speed")
"""Sections of what is measured of trained runs."""


class Params(Section):
    """The whole of params.yaml."""

    FILE: ClassVar[str] = "params.yaml"

    model: Model
    """The base model."""
    tasks: dict[str, Task] = Field(min_length=1)
    """Data sets by name."""
    compute: Compute = Compute()
    """Device and precision."""
    jobs: int = Field(default=1, ge=1)
    """Stages that are made at once, each with `compute.threads`; on a GPU one at a time. No result
    depends on it but what stages cost."""
    warmup: Warmup | None
    """The limited-step full fine-tune of every task; null: none is made, for runs that need no
    scores, or those of `scores` alone."""
    warmups: dict[str, MoreWarmup] = Field(default_factory=dict)
    """More warm-ups than each task's own, by name: other steps, seeds, rates."""
    scoring: Scoring = Scoring()
    """Candidates."""
    scores: dict[str, Scores] = Field(default_factory=dict)
    """Scores that need no warm-up, by name."""
    activations: dict[str, ActivationScores] = Field(default_factory=dict)
    """Scores by activations, by name."""
    training: Training
    """Defaults of every run."""
    runs: dict[str, Run] = Field(min_length=1)
    """What to train and compare, by name."""
    transfers: dict[str, Transfer] = Field(default_factory=dict)
    """Which runs to test on which other tasks too, by name."""
    utilisation: dict[str, Utilisation] = Field(default_factory=dict)
    """Whose use of neurons to measure, by name."""
    forgetting: dict[str, Forgetting] = Field(default_factory=dict)
    """Whose loss on text of the pre-training kind to measure, by name."""
    speed: dict[str, Speed] = Field(default_factory=dict)
    """Whose speed of generation to measure, by name."""
    evaluation: Evaluation
    """Generation and scoring."""
    tracking: Tracking = Tracking()
    """MLflow."""
    study: Study | None = None
    """What the runs are compared for, where they are a study's."""

    @model_validator(mode="after")
    def _consistent(self) -> "Params":
        for section in (
            "tasks",
            "runs",
            "warmups",
            "scores",
            "activations",
            "transfers",
            *MEASURES,
        ):
            for name in getattr(self, section):
                if not NAME.fullmatch(name):
                    raise refuse(
                        f"{section}: got the name '{name}'; "
                        "names are lower-case letters, digits, '_', '-', at most 100"
                    )
        for name in BEFORE:
            if name in self.runs:
                raise refuse(
                    f"runs.{name}: is what tables call a model before training; rename the run"
                )
        self._costs_apart()
        self._names_known()
        self._trained_on_tasks_that_train()
        self._transfers_go_elsewhere()
        self._measures_of_runs()
        self._autocast_where_types_differ()
        self._warmup_fits()
        for place, part in enumerate(self.study.parts if self.study else []):
            part.check(f"study.parts.{place}", self)
        if isinstance(self.model, BuiltModel):
            for name, task in self.tasks.items():
                if task.format.max_tokens > self.model.context:
                    raise refuse(
                        f"tasks.{name}.format.max_tokens: got {task.format.max_tokens}; "
                        f"at most model.context, {self.model.context}"
                    )
            if not any(has_pretraining(task.source) for task in self.tasks.values()):
                raise refuse(
                    "model: kind 'built' needs a task with pre-training rows; "
                    "set source.pretrain or splits.pretrain of one task"
                )
        return self

    def _costs_apart(self) -> None:
        """No run's file in `work/cost` is that of a warm-up or of scores."""
        warmups = [*self.tasks, *self.warmups]
        scores = [*warmups, *self.scores, *self.activations]
        taken = {f"warmup-{name}": name for name in warmups}
        taken |= {f"score-{name}": name for name in scores}
        for run in self.runs:
            if run in taken:
                raise refuse(
                    f"runs.{run}: is what the costs of '{taken[run]}' are kept under; rename the "
                    "run"
                )

    def _names_known(self) -> None:
        """Tasks, warm-ups and scores that sections name exist, each name once."""
        for section in ("runs", "warmups", "scores", "activations"):
            for name, entry in getattr(self, section).items():
                known(f"{section}.{name}.task", entry.task, list(self.tasks))
        for name, activation in self.activations.items():
            where = f"activations.{name}.warmup"
            known(where, activation.warmup, [*self.tasks, *self.warmups])
        if self.warmup is None and self.warmups:
            raise refuse(
                f"warmups.{next(iter(self.warmups))}: given with warmup: null, of which it has its "
                "other keys; give warmup"
            )
        makers = {"tasks": "similarity", "warmups": "similarity", "activations": "activation"}
        criteria: dict[str, str] = {}
        for section in ("tasks", "warmups", "scores", "activations"):
            for name, entry in getattr(self, section).items():
                if name in criteria:
                    raise refuse(
                        f"{section}.{name}: the name is taken; tasks, warmups, scores and "
                        "activations share theirs"
                    )
                criteria[name] = makers.get(section) or entry.criterion
        for name, run in self.runs.items():
            for where, part in run.selections(f"runs.{name}.method"):
                for scores in part.read(run.task):
                    known(f"{where}.scores", scores, list(criteria))
                    wanted = part.policy if part.policy in KINDS else "similarity"
                    if part.policy != "random" and criteria[scores] != wanted:
                        raise refuse(
                            f"{where}.scores: got '{scores}', scores by {criteria[scores]}; policy "
                            f"{part.policy} takes scores by {wanted}"
                        )

    def scored(self, run: str) -> list[str]:
        """Names of the scores that a run selects from; none for a method without a mask."""
        entry = self.runs[run]
        names = [n for _, part in entry.selections("") for n in part.read(entry.task)]
        return list(dict.fromkeys(names))

    def scorer(self, scores: str) -> str:
        """The stage that makes scores of a name, as DVC calls it."""
        families = {"tasks": "score", "warmups": "similarity"}
        for section in ("tasks", "warmups", "scores", "activations"):
            if scores in getattr(self, section):
                return f"{families.get(section, section)}@{scores}"
        raise KeyError(scores)

    def warms(self, name: str) -> bool:
        """Whether there is such a warm-up: a task's own, or one of `warmups`."""
        return self.warmup is not None and (name in self.warmups or self.tasks[name].trains)

    def warmed(self, name: str) -> tuple[str, Warmup]:
        """Task and section of a warm-up that is made: a task's own, or one of `warmups`."""
        assert self.warmup is not None
        if name in self.tasks:
            return name, self.warmup
        more = self.warmups[name]
        changes = more.model_dump(exclude_none=True, exclude={"task"})
        return more.task, self.warmup.model_copy(update=changes)

    def _trained_on_tasks_that_train(self) -> None:
        """A task without training rows is tested on, and nothing else."""
        named = [
            (f"{section}.{name}.task", entry.task)
            for section in ("runs", "warmups", "scores", "activations")
            for name, entry in getattr(self, section).items()
        ]
        warmed = [(f"activations.{name}.warmup", a.warmup) for name, a in self.activations.items()]
        for name, run in self.runs.items():
            for where, part in run.selections(f"runs.{name}.method"):
                warmed += [(f"{where}.scores", scores) for scores in part.read(run.task)]
        for where, task in named + warmed:
            if task in self.tasks and not self.tasks[task].trains:
                raise refuse(
                    f"{where}: got '{task}', which has no rows to train on; another, or give it "
                    "some"
                )
        for where, task in warmed:
            self.check_warmed(where, task)

    def check_warmed(self, where: str, name: str) -> None:
        """Refuse a task's own scores, or `tuned`, where no warm-up makes them."""
        if self.warmup is None and (name in self.tasks or name == "tuned"):
            raise refuse(
                f"{where}: got '{name}', which needs a warm-up, and warmup is null; another, or "
                "give warmup"
            )

    def _transfers_go_elsewhere(self) -> None:
        pairs: dict[tuple[str, str], str] = {}
        for name, entry in self.transfers.items():
            known(f"transfers.{name}.run", entry.run, list(self.runs))
            known(f"transfers.{name}.task", entry.task, list(self.tasks))
            if entry.task == self.runs[entry.run].task:
                raise refuse(
                    f"transfers.{name}.task: got '{entry.task}', on which run {entry.run} is "
                    "tested anyway; another"
                )
            first = pairs.setdefault((entry.run, entry.task), name)
            if first != name:
                raise refuse(f"transfers.{name}: the same as transfers.{first}; give it once")
            self._answers_as_trained(f"transfers.{name}.task", entry)

    def _answers_as_trained(self, where: str, entry: Transfer) -> None:
        """A run is scored by the labels' texts that it learnt; others would measure the words."""
        learnt = self.runs[entry.run].task
        own, other = self.tasks[learnt].format, self.tasks[entry.task].format
        if not (isinstance(own, Nli) and isinstance(other, Nli) and own.answers and other.answers):
            return
        if own.answers != other.answers:
            raise refuse(
                f"{where}: got '{entry.task}' with the labels {', '.join(other.answers.values())}, "
                f"but run {entry.run} learns {', '.join(own.answers.values())}; give "
                f"tasks.{entry.task}.format.labels those of {learnt}"
            )

    def _measures_of_runs(self) -> None:
        for section in MEASURES:
            for name, entry in getattr(self, section).items():
                where = f"{section}.{name}"
                known(f"{where}.run", entry.run, list(self.runs))
                if not isinstance(entry, Forgetting):
                    known(f"{where}.task", entry.task, list(self.tasks))
                if isinstance(entry, Utilisation) and not self.tasks[entry.task].trains:
                    raise refuse(
                        f"{where}.task: got '{entry.task}', which has no dev rows; another"
                    )
                method = self.runs[entry.run].method
                if isinstance(entry, Speed) and not isinstance(method, Neft | Lora):
                    raise refuse(
                        f"{where}.run: got '{entry.run}', whose method {method.name} has no "
                        "adapter beside the base; a run of neft or lora"
                    )

    def _warmup_fits(self) -> None:
        """What the warm-up trains is scored; an update in the backward has no loss to unscale."""
        warmup = self.warmup
        if warmup is None:
            return
        if warmup.layout not in (None, self.scoring.layout):
            raise refuse(
                f"warmup.layout: got '{warmup.layout}'; the same as scoring.layout, "
                f"'{self.scoring.layout}'"
            )
        if warmup.update == "in_backward" and self.compute.processes > 1:
            raise refuse(
                "warmup.update: got 'in_backward' with compute.processes "
                f"{self.compute.processes}; one process, or after_backward"
            )
        if warmup.update == "in_backward" and self.compute.mixed_precision == "fp16":
            raise refuse(
                "warmup.update: got 'in_backward' with compute.mixed_precision fp16, which scales "
                "all gradients at once; use bf16"
            )

    def _autocast_where_types_differ(self) -> None:
        """What trains is float32; amid frozen layers of another type it needs autocast."""
        if self.compute.mixed_precision == "no" and self.compute.dtype in ("bfloat16", "float16"):
            if self.warmup is not None and self.warmup.modules == "candidates":
                raise refuse(
                    f"compute.mixed_precision: got 'no' with dtype {self.compute.dtype} and "
                    "warmup.modules candidates; set dtype: float32, or mixed_precision: auto"
                )
            for name, run in self.runs.items():
                if isinstance(run.method, InOut | Embed):
                    raise refuse(
                        f"compute.mixed_precision: got 'no' with dtype {self.compute.dtype} and "
                        f"method {run.method.name} of run {name}; set dtype: float32, or "
                        "mixed_precision: auto"
                    )
