"""Sections `runs`, `transfers`, `evaluation`, `tracking`: what is trained, tested and shown."""

from typing import Annotated, Final, Literal

from pydantic import Field, field_validator, model_validator

from neft_core.config.section import Section, Seed, refuse


class Plain(Section):
    """A method that its name describes whole."""

    name: str
    """Name of the method."""

    def words(self) -> str:
        """As tables say it."""
        return self.name


class Full(Plain):
    """Every parameter trains."""

    name: Literal["full"]
    """Name of the method."""


class InOut(Plain):
    """up_proj and down_proj of every MLP train."""

    name: Literal["in_out"]
    """Name of the method."""


class Embed(Plain):
    """The input embedding trains (with the head, where it is tied)."""

    name: Literal["embed"]
    """Name of the method."""


class Lora(Section):
    """LoRA on every linear module of each layer, the head excepted."""

    name: Literal["lora"]
    """Name of the method."""
    rank: int = Field(ge=1)
    """Rank r of the two factors."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale is alpha / rank; null: 2 * rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the first factor."""

    def words(self) -> str:
        """As tables say it: `lora, rank 8`, and what is not by default."""
        said = f"lora, rank {self.rank}"
        if self.alpha not in (None, 2 * self.rank):
            said += f", alpha {self.alpha:g}"
        return said + (f", dropout {self.dropout:g}" if self.dropout else "")


class Selection(Section):
    """Which neurons: a policy with its budget, over the scores of one warm-up or criterion."""

    policy: Literal[
        "lowest",
        "reversed",
        "union",
        "threshold",
        "random",
        "magnitude",
        "gradient",
        "activation",
        "probe",
    ] = "lowest"
    """`lowest` similarity (the paper's); `reversed`: the highest; `union`: the lowest of each of
    several scores; `threshold`: all below one; `random` and `magnitude` (largest change) as
    controls; `gradient`, `activation`, `probe`: the highest of those scores."""
    percent: float | None = Field(default=None, gt=0, le=100)
    """Budget: share of all the model's parameters, in percent; of `union` for each."""
    neurons: int | None = Field(default=None, ge=1)
    """Budget: number of neurons."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Budget: share of the candidates."""
    below: float | None = Field(default=None, ge=-1, le=2)
    """Of `threshold`, in place of a budget: neurons with a similarity under this are selected."""
    below_scaled: float | None = Field(default=None, ge=0, le=2)
    """Of `threshold`: the same after the similarities of all candidates are scaled to [0, 1]."""
    any_size: Literal[True] | None = None
    """Of `threshold`: selecting nothing or everything is an answer, not a mistake."""
    scores: str | list[str] | None = None
    """Whose scores: a task or a warm-up of `warmups`, or an entry of `scores` or `activations`;
    null: the run's task. Of `union`: two or more."""
    seed: Seed = 1
    """Seed of policy `random`."""
    per_module: Literal[True] | None = None
    """The same share of each module's candidates is taken, in place of one ranking of all."""

    @field_validator("any_size", "per_module", mode="before")
    @classmethod
    def _false_is_none(cls, value: object) -> object:
        """What is said of the default changes no run."""
        return None if value is False else value

    @model_validator(mode="after")
    def _one_budget(self) -> "Selection":
        if isinstance(self, Neft) and self.parts is not None:
            return self
        kinds = ("below", "below_scaled") if self.policy == "threshold" else BUDGETS
        given = [k for k in (*BUDGETS, "below", "below_scaled") if getattr(self, k) is not None]
        if len(given) != 1 or given[0] not in kinds:
            found = " and ".join(given) or "none"
            other = " with policy threshold" if self.policy == "threshold" else ""
            raise refuse(f"budget: got {found}{other}; give exactly one of {', '.join(kinds)}")
        if self.any_size and self.policy != "threshold":
            raise refuse(f"any_size: got true with policy {self.policy}; it is of threshold")
        if self.per_module and self.policy == "threshold":
            raise refuse(
                "per_module: got true with policy threshold, which ranks nothing; leave it out"
            )
        several = self.scores if isinstance(self.scores, list) else []
        if self.policy == "union" and len(set(several)) < 2:
            raise refuse("scores: policy union needs two different ones at least, in a list")
        if self.policy != "union" and isinstance(self.scores, list):
            raise refuse(f"scores: got a list with policy {self.policy}; give one, or use union")
        if self.policy in KINDS and self.scores is None:
            raise refuse(
                f"scores: missing; policy {self.policy} needs an entry of {KINDS[self.policy]}"
            )
        return self

    def read(self, task: str) -> list[str]:
        """Names of the scores that it selects from."""
        if isinstance(self.scores, list):
            return list(dict.fromkeys(self.scores))
        return [self.scores or task]

    def words(self) -> str:
        """As tables say it: `lowest 9 %`, `union of a, b 6 %`, `random 9 %, seed 2`."""
        amount = {
            "percent": "{:g} %",
            "neurons": "{} neurons",
            "share": "{:g} of candidates",
            "below": "below {:g}",
            "below_scaled": "below {:g} scaled",
        }
        budget = next(
            text.format(value)
            for key, text in amount.items()
            if (value := getattr(self, key)) is not None
        )
        if self.per_module:
            budget += ", per module"
        if isinstance(self.scores, list):
            return f"{self.policy} of {', '.join(self.scores)}, {budget}"
        said = f"{self.policy} {budget}" + (f" by {self.scores}" if self.scores else "")
        drawn = self.policy == "random" and self.seed != type(self).model_fields["seed"].default
        return said + (f", seed {self.seed}" if drawn else "")


class Neft(Selection):
    """The selected neurons train."""

    name: Literal["neft"]
    """Name of the method."""
    parts: list[Selection] | None = Field(default=None, min_length=1)
    """Several selections joined, a common neuron once, such as `[{policy: lowest, percent: 3},
    {policy: reversed, percent: 4}]`; in place of a policy and a budget here."""

    @model_validator(mode="after")
    def _parts_alone(self) -> "Neft":
        beside = sorted(self.model_fields_set - {"name", "parts"})
        if self.parts is not None and beside:
            raise refuse(f"{beside[0]}: given beside parts; give it within one of them")
        return self

    @property
    def selections(self) -> list[Selection]:
        """The selections that are joined; one where there are no parts."""
        return [self] if self.parts is None else self.parts

    def words(self) -> str:
        """As tables say it: `neft, lowest 3 % + reversed 4 %`."""
        if self.parts is None:
            return f"neft, {super().words()}"
        return "neft, " + " + ".join(part.words() for part in self.parts)


BUDGETS: Final = ("percent", "neurons", "share")
"""Keys that say how much a policy selects."""

KINDS: Final = {"gradient": "scores", "probe": "scores", "activation": "activations"}
"""Policies that take scores of their own, and the section that makes them."""


Method = Annotated[Full | InOut | Embed | Lora | Neft, Field(discriminator="name")]


class Run(Section):
    """One method with its budget on one task; every seed of it is trained in one process."""

    task: str
    """A key of `tasks`."""
    method: Method
    """What trains."""
    seeds: list[Seed] = Field(default=[1], min_length=1)
    """Seeds of the order of rows and of new parameters."""
    lr: float | None = Field(default=None, gt=0, le=1)
    """Learning rate; null: `training.lr`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows; null: `training.epochs`."""

    def selections(self, where: str) -> list[tuple[str, Selection]]:
        """The selections of a method that has some, each with its keys in the file."""
        if not isinstance(self.method, Neft):
            return []
        if self.method.parts is None:
            return [(where, self.method)]
        return [(f"{where}.parts.{i}", part) for i, part in enumerate(self.method.parts)]

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise refuse(f"got {value}; each seed once")
        return value


class Transfer(Section):
    """A run tested on another task than it was trained on; adding one evaluates, and no more."""

    run: str
    """A key of `runs`."""
    task: str
    """A key of `tasks`, not the run's own."""


class Evaluation(Section):
    """Generation and scoring of the test split."""

    batch_size: int = Field(ge=1)
    """Rows generated at once."""
    max_new_tokens: int = Field(ge=1)
    """Longest hypothesis in tokens."""
    bootstrap: int = Field(default=1000, ge=100, le=100_000)
    """Samples of the paired bootstrap against the full fine-tune and the base."""


class Tracking(Section):
    """Where MLflow keeps the runs; MLFLOW_TRACKING_URI chooses the server."""

    experiment: str = Field(default="neft", min_length=1)
    """Name of the MLflow experiment."""
