"""The gate before the alias `champion`: is a trained run better than base and champion?

Better is: on the test split's first metric, by more than a margin, with a small p-value of the
paired bootstrap; and not at the cost of more forgetting than allowed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from neft_core.errors import NeftError
from neft_core.workspace import Workspace

Rows = Sequence[dict[str, Any]]
"""Test rows with `hypothesis` and `references`, as evaluation writes them."""


@dataclass(frozen=True)
class Gate:
    """What a champion must show.

    Attributes:
        alpha: each p-value must be smaller.
        margin: each difference of the metric must be larger, in its points.
        max_forgetting: how much the loss on text of the pre-training kind may rise, in nats per
            token; None: it isn't measured.
        text: that text, one a line; None: rows of the generated corpus that the base hasn't seen.
        texts: how many of them at most.
    """

    alpha: float = 0.05
    margin: float = 0.0
    max_forgetting: float | None = 0.5
    text: Path | None = None
    texts: int = 500

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise NeftError(f"--alpha: got {self.alpha:g}; above 0 and below 1")
        if self.margin < 0:
            raise NeftError(f"--margin: got {self.margin:g}; 0 or more points of the metric")


@dataclass(frozen=True)
class Decision:
    """What the gate decided, and the figures that it decided by.

    Attributes:
        champion: whether the model becomes the champion.
        reasons: why not; none where it does.
        metric: the metric's name.
        comparisons: for `base` and `champion`, what `paired_bootstrap` returned.
        forgetting: rise of the loss on text, in nats per token; None: not measured.
        gate: what was asked for.
    """

    champion: bool
    reasons: tuple[str, ...]
    metric: str
    comparisons: dict[str, dict[str, Any]] = field(default_factory=dict)
    forgetting: float | None = None
    gate: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """A table of the figures and the reasons, in Markdown."""
        from neft_core.metrics import TITLES

        title = TITLES[self.metric]
        lines = [
            f"| against | {title} | its {title} | difference | 95 % interval | p |",
            "|---|---:|---:|---:|---|---:|",
        ]
        for name, found in self.comparisons.items():
            lines.append(
                f"| {name} | {found['score']:.2f} | {found['baseline']:.2f} | "
                f"{found['delta']:+z.2f} | {found['low']:+z.2f} to {found['high']:+z.2f} | "
                f"{found['p_value']:.3f} |"
            )
        if self.forgetting is not None:
            lines += ["", f"forgetting: {self.forgetting:+z.4f} nats per token"]
        said = "becomes champion" if self.champion else "stays challenger"
        lines += ["", f"{said}" + "".join(f"\n- {reason}" for reason in self.reasons)]
        return "\n".join(lines)


def decide(ws: Workspace, run: str, seed: int, champion: Rows | None, gate: Gate) -> Decision:
    """Whether a run's model passes the gate.

    Args:
        ws: the workspace, with the run evaluated.
        run: the run.
        seed: one of its seeds.
        champion: the present champion's answers to the same test rows; None: there is none.
        gate: what is asked for.

    Raises:
        NeftError: the run isn't evaluated, or forgetting can't be measured.
    """
    from neft_core.metrics import OF_TASK, TITLES, paired_bootstrap
    from neft_core.rows import read_rows

    params = ws.params()
    task = params.runs[run].task
    section = params.tasks[task].format
    metric = OF_TASK[section.task][0]
    mine = read_rows(ws.path("evaluation", run, f"seed-{seed}.jsonl"))
    others = {"base": read_rows(ws.path("baseline", task, "base.jsonl"))}
    if champion is not None:
        others["champion"] = list(champion)
    comparisons, reasons = {}, []
    for name, rows in others.items():
        found = paired_bootstrap(
            [row["hypothesis"] for row in mine],
            [row["hypothesis"] for row in rows],
            [row["references"] for row in mine],
            section.target_language,
            samples=params.evaluation.bootstrap,
            metric=metric,
        )
        comparisons[name] = found
        delta, p = float(found["delta"]), float(found["p_value"])
        if delta <= gate.margin:
            least = f", and more than {gate.margin:g} is asked for" if gate.margin else ""
            reasons.append(f"{TITLES[metric]} is {delta:+z.2f} to the {name}'s{least}")
        elif p >= gate.alpha:
            reasons.append(
                f"the difference of {delta:+z.2f} to the {name} may be chance: p = {p:.3f}, "
                f"and less than {gate.alpha:g} is asked for"
            )
    forgetting = None
    if gate.max_forgetting is not None:
        forgetting = _forgetting(ws, run, seed, gate)
        if forgetting > gate.max_forgetting:
            reasons.append(
                f"the loss on other text rises by {forgetting:.4f} nats per token, and at most "
                f"{gate.max_forgetting:g} is allowed"
            )
    asked = asdict(gate) | {"text": gate.text.name if gate.text else None}
    return Decision(not reasons, tuple(reasons), metric, comparisons, forgetting, asked)


def _forgetting(ws: Workspace, run: str, seed: int, gate: Gate) -> float:
    from neft_core import analyses

    try:
        found, _ = analyses.forgetting(ws, [run], text=gate.text, count=gate.texts)
    except NeftError as fault:
        raise NeftError(f"{fault} (or go without: --max-forgetting none)") from None
    losses = found["runs"][run]["losses"]
    return float(losses[ws.params().runs[run].seeds.index(seed)] - found["base"])


def same_questions(first: Rows, second: Rows) -> bool:
    """Whether answers are to the same test rows."""
    keys = ("source", "references")
    return [[row.get(k) for k in keys] for row in first] == [
        [row.get(k) for k in keys] for row in second
    ]
