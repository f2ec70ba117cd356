"""What a study shows: its parts in order, as a section of the page and as files of tables."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from neft_core import (
    study_cost,
    study_curves,
    study_overlap,
    study_results,
    study_sensitivity,
    study_use,
)
from neft_core.config.shown import OnTask, candidates
from neft_core.findings import Findings
from neft_core.page import Gallery, Html, join, paragraph
from neft_core.study_candidates import Place, notes
from neft_core.study_tables import Table, prose

Part = Callable[[Findings, Any, Gallery], list[Table | Html]]
"""Tables and figures of a part, from its section of `study.parts`."""

PARTS: dict[str, Part] = {
    "table": study_results.table,
    "rates": study_results.rates,
    "overlap": study_overlap.overlap,
    "trade_off": study_curves.trade_off,
    "wins": study_curves.wins,
    "rank_change": study_use.rank_change,
    "added": study_curves.added,
    "average_change": study_use.average_change,
    "types": study_use.types,
    "cost": study_cost.cost,
    "forgetting": study_cost.forgetting,
    "sensitivity": study_sensitivity.sensitivity,
}
"""The parts by `show`."""


def made(found: Findings, gallery: Gallery) -> list[Table | Html]:
    """Everything that the study of a workspace shows, in order; nothing where there is none."""
    study = found.params.study
    return [
        piece
        for part in (study.parts if study else [])
        for piece in _noted(found, part, PARTS[part.show](found, part, gallery))
    ]


def _noted(found: Findings, part: object, pieces: list[Table | Html]) -> Iterator[Table | Html]:
    """The pieces; below the first table which of several rates was taken."""
    more = []
    if isinstance(part, OnTask):
        runs, task = found.params.runs, part.task
        more = notes(found, (Place(n, "", task, candidates(n, task, runs)) for n in part.methods()))
    for piece in pieces:
        if isinstance(piece, Table) and more:
            piece, more = replace(piece, notes=[*piece.notes, *more]), []
        yield piece


def section(found: Findings, pieces: list[Table | Html]) -> Html:
    """The study as the page's first section."""
    said = [paragraph(text) for text in _said(found)]
    return join([*said, *(p.html() if isinstance(p, Table) else p for p in pieces)])


def files(found: Findings, pieces: list[Table | Html]) -> dict[str, str]:
    """The tables as files, by name: study.md with all of them, and one CSV for each."""
    study = found.params.study
    if study is None:
        return {}
    tables = [piece for piece in pieces if isinstance(piece, Table)]
    text = "\n\n".join([f"# {prose(study.title)}", *map(prose, _said(found))])
    whole = "\n".join([text + "\n", *(table.markdown("../") for table in tables)])
    return {"study.md": whole} | {f"{table.name}.csv": table.csv() for table in tables}


def _said(found: Findings) -> list[str]:
    """What is asked, and the learning rates with how they were chosen."""
    study = found.params.study
    if study is None:
        return []
    rates: dict[str, dict[float, None]] = {}
    for name, run in found.params.runs.items():
        of_family = rates.setdefault(found.families[name], {})
        of_family[run.lr or found.params.training.lr] = None
    used = "; ".join(f"{name} {', '.join(f'{r:g}' for r in of)}" for name, of in rates.items())
    return [text for text in (study.about, f"{study.rates} Here: {used}.".strip()) if text]
