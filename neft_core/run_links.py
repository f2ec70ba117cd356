"""A page beside a study's report, where its cells' links lead: each run's MLflow runs.

MLflow chooses the ids of its runs, so the report, which is the same each time, can't name them.
"""

from neft_core.files import replacing
from neft_core.page import code, document, fill, join
from neft_core.pages import pages, run_page
from neft_core.study_tables import RUNS_PAGE
from neft_core.tracking import run_ids
from neft_core.workspace import REPORTS, Workspace


def write(ws: Workspace) -> None:
    """Write the page, of what was delivered to MLflow last."""
    found, lines = run_ids(ws), []
    for run, section in ws.params().runs.items():
        seeds = [
            fill('<a href="{url}">seed {seed}</a>', url=run_page(ws, ids), seed=seed)
            for seed, ids in found.get(run, {}).items()
        ]
        lines.append(
            fill(
                '<li id="{run}"><strong>{run}</strong> ({method}, {task}): {seeds}</li>',
                run=run,
                method=section.method.words(),
                task=section.task,
                seeds=join(seeds, ", ") if seeds else "not in MLflow",
            )
        )
    served = ""
    if pages(ws)[0].command:
        served = fill("<p>Served by {ui} in {place}.</p>", ui=code("neft ui"), place=ws.host.root)
    study = ws.params().study
    body = fill(
        '<main><section><h1>{title}</h1>\n{served}\n<ul class="runs">{lines}</ul></section></main>',
        title=f"MLflow runs: {study.title}" if study else "MLflow runs",
        served=served,
        lines=join(lines),
    )
    with replacing(ws.root / REPORTS / RUNS_PAGE) as temporary:
        temporary.write_text(document("MLflow runs", body), encoding="utf-8")
