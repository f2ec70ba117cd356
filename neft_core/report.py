"""The report: one page of what a workspace found, and its figures as files."""

import hashlib
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from neft_core import __version__, neuron_sections, page, result_sections, sections, study_parts
from neft_core.config import yaml_text
from neft_core.files import replacing
from neft_core.findings import Findings
from neft_core.page import Gallery, Html, code, facts, fill, join, paragraph, table
from neft_core.study_tables import Table
from neft_core.workspace import REPORTS, Workspace

Section = Callable[[Findings, Gallery], Html | str]
"""Its piece of the page, or why there is none, as text."""

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "sacrebleu", "safetensors")
"""What decides numbers."""

SECTIONS: dict[str, Section] = {
    "Results": result_sections.results,
    "Training": sections.training,
    "Neurons": neuron_sections.neurons,
    "Cost": sections.cost,
    "Samples": sections.samples,
}


def report(ws: Workspace) -> None:
    """Stage `report`: the page and its figures, of what lies in `work/`.

    Nothing in them tells of the time, so equal results give equal bytes.
    """
    found, gallery = Findings.read(ws), Gallery()
    study = study_parts.made(found, gallery)
    whole = _page(found, gallery, study)
    target = ws.root / REPORTS
    with replacing(target / "figures") as folder:
        (folder / "png").mkdir(parents=True)
        for name, drawn in gallery.svgs.items():
            (folder / f"{name}.svg").write_text(drawn, encoding="utf-8")
            (folder / "png" / f"{name}.png").write_bytes(gallery.pngs[name])
    with replacing(target / "study") as folder:
        folder.mkdir(parents=True)
        for name, said in study_parts.files(found, study).items():
            (folder / name).write_text(said, encoding="utf-8")
    with replacing(target / "report.html") as temporary:
        temporary.write_text(whole, encoding="utf-8")
    print(f"report: {Path(REPORTS, 'report.html')}, {len(gallery.svgs)} figures")


def _page(found: Findings, gallery: Gallery, study: list[Table | Html]) -> str:
    made: dict[str, Html | str] = {}
    if found.params.study:
        made["Study"] = study_parts.section(found, study)
    made |= {title: section(found, gallery) for title, section in SECTIONS.items()}
    made["What was run"] = provenance(found)
    params, base = found.params, found.base()
    title = f"{', '.join(params.tasks)}: {len(params.runs)} runs compared"
    if params.study:
        title = params.study.title
    links = (fill('<a href="#{id}">{title}</a>', id=_id(name), title=name) for name in made)
    tuned = sum(len(run.seeds) for run in params.runs.values())
    seconds = sum(e.get("seconds", 0) for entries in found.costs().values() for e in entries)
    known = {
        "base model": base.get("model_type", "–"),
        "parameters": f"{base['parameters']:,}" if "parameters" in base else "–",
        "trainings": f"{tuned} ({len(params.runs)} runs, all seeds)",
        "time training": _duration(seconds),
        "signature": code(found.signature(), 12),
    }
    head = fill(
        '<header><p class="eyebrow">Neuron-level fine-tuning</p><h1>{title}</h1>\n'
        '{verdict}\n{facts}</header>\n<nav aria-label="sections"><div>{links}</div></nav>',
        title=title,
        verdict=result_sections.verdict(found),
        facts=facts(known),
        links=join(links, ""),
    )
    body = [
        fill(
            '<section id="{id}"><h2>{title}</h2>\n{piece}</section>',
            id=_id(name),
            title=name,
            piece=piece if isinstance(piece, Html) else paragraph(piece, kind="absent"),
        )
        for name, piece in made.items()
    ]
    foot = fill("<footer>Made by neft {version}.</footer>", version=__version__)
    return page.document(title, join([head, fill("<main>{body}</main>", body=join(body)), foot]))


def _id(title: str) -> str:
    return title.lower().replace(" ", "-")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def provenance(found: Findings) -> Html:
    """All that made the numbers: data, model, masks, params, versions."""
    card = {n.replace("_", " "): v for n, v in found.base().items() if v not in ("", False)}
    if card:
        card |= {"hash": code(card["hash"], 16), "parameters": f"{card['parameters']:,}"}
    parts = [fill("<h3>Base model</h3>\n{facts}", facts=facts(card))] if card else []
    for title, piece in (
        ("Data", _data(found)),
        ("Runs", _runs(found)),
        ("Masks", _masks(found)),
    ):
        if piece:
            parts.append(fill("<h3>{title}</h3>\n{piece}", title=title, piece=piece))
    parts.append(fill("<h3>Versions</h3>\n{facts}", facts=facts(_versions())))
    said = fill("<pre>{text}</pre>", text=yaml_text(found.settings()))
    note = (
        "The signature is the SHA-256 of params.yaml with its defaults filled in, as below, except "
        "for where results are tracked. Hashes of data are MD5, as DVC has them."
    )
    parts += [paragraph(note, kind="note"), page.details("params.yaml, defaults filled in", said)]
    return join(parts)


def _data(found: Findings) -> Html | None:
    rows = [
        [task, split.name, f"{split.rows:,}", code(split.digest)]
        for task in found.params.tasks
        for split in found.splits(task)
    ]
    heads = [("task", False), ("split", False), ("rows", True), ("MD5", False)]
    return table(heads, rows, label="data") if rows else None


def _runs(found: Findings) -> Html | None:
    rows = []
    for run in found.params.runs:
        for seed in found.seeds(run):
            rate = seed.get("lr")
            rows.append(
                [
                    run,
                    seed.get("seed", "–"),
                    f"{rate:g}" if rate is not None else "–",
                    seed.get("steps", "–"),
                    seed.get("best_step", "–"),
                    seed.get("dtype", "–"),
                    code(str(seed.get("base", "–")), 12),
                    seed.get("version", "–"),
                ]
            )
    heads = [("run", False), ("seed", True), ("lr", True), ("steps", True), ("best step", True),
             ("dtype", False), ("base", False), ("neft", False)]  # fmt: skip
    return (
        page.details(f"{len(rows)} trainings", table(heads, rows, label="runs")) if rows else None
    )


def _masks(found: Findings) -> Html | None:
    rows = []
    for run, mask in found.masks.items():
        digest = hashlib.md5(
            found.ws.path("masks", f"{run}.safetensors").read_bytes(), usedforsecurity=False
        ).hexdigest()
        said = mask.provenance
        rows.append(
            [
                run,
                said.get("policy", "–"),
                said.get("layout", "–"),
                f"{mask.neurons:,}",
                f"{mask.parameters:,}",
                f"{mask.percent:.2f}",
                code(digest),
                said.get("steps", "–"),
                code(said.get("data", "–"), 12),
            ]
        )
    heads = [("run", False), ("policy", False), ("layout", False), ("neurons", True),
             ("parameters", True), ("% of model", True), ("MD5", False), ("warm-up steps", True),
             ("warm-up rows", False)]  # fmt: skip
    return table(heads, rows, label="masks") if rows else None


def _versions() -> dict[str, str]:
    known = {"neft": __version__, "Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            known[name] = "–"
    return known
