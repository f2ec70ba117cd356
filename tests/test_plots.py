import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import vl_convert
from conftest import TINY_PARAMS
from dvc_render import VegaRenderer, render_html

from neft_core import drawing
from neft_core.plots import CURVES, PAGE, init_plots
from neft_core.workspace import PIPELINE, init_workspace

RUNS = ("full", "neft", "lora")
SEEDS = ("1", "2")
STEPS = (10, 20, 30)


def rows(revision: str, shift: float = 0.0) -> list[dict[str, str]]:
    """A summary's curves as DVC hands them on: text, one run and seed after the other."""
    return [
        {
            "run": run,
            "seed": seed,
            "step": str(step),
            "loss": str(shift + i + int(seed) / 10 + 1 / step),
            "rev": revision,
        }
        for i, run in enumerate(RUNS)
        for seed in SEEDS
        for step in STEPS
    ]


def renderer(tmp_path: Path, *revisions: str) -> VegaRenderer:
    init_plots(tmp_path / ".dvc")
    points = [row for i, revision in enumerate(revisions) for row in rows(revision, shift=4 * i)]
    return VegaRenderer(
        points,
        "dev loss",
        template="curves",
        template_dir=str(tmp_path / ".dvc" / "plots"),
        x="step",
        y="loss",
        title="Loss on the dev split",
        x_label="step",
        y_label="loss (nats per token)",
        revs_with_datapoints=list(revisions),
    )


def drawn(spec: dict) -> list[tuple[str, str, int]]:
    """(colour, dash, points) of every line that Vega draws."""
    svg = vl_convert.vegalite_to_svg(spec)
    lines = re.findall(r'<path aria-label="[^"]*" role="graphics-symbol"[^>]*>', svg)
    found = []
    for line in lines:
        attribute = dict(re.findall(r'([a-z-]+)="([^"]*)"', line))
        if attribute.get("aria-roledescription") == "line mark":
            count = len(re.findall("[ML]", attribute["d"]))
            found.append((attribute["stroke"], attribute.get("stroke-dasharray", ""), count))
    return found


def scripts(html: str) -> list[str]:
    """The attributes of every script tag."""
    return re.findall(r"<script([^>]*)>", html)


def test_every_run_has_its_colour_and_every_seed_its_line(tmp_path: Path) -> None:
    spec = renderer(tmp_path, "workspace").get_filled_template()
    assert spec["encoding"]["color"]["field"] == "run"
    assert "DVC_METRIC" not in json.dumps(spec)
    lines = drawn(spec)
    # Each run: a line for each seed, and one for their mean; none goes back along x.
    assert len(lines) == len(RUNS) * (len(SEEDS) + 1)
    assert len({colour for colour, _, _ in lines}) == len(RUNS)
    assert {count for _, _, count in lines} == {len(STEPS)}


def test_revisions_differ_in_their_dash(tmp_path: Path) -> None:
    lines = drawn(renderer(tmp_path, "HEAD~1", "workspace").get_filled_template())
    assert len(lines) == 2 * len(RUNS) * (len(SEEDS) + 1)
    assert len({(colour, dash) for colour, dash, _ in lines}) == 2 * len(RUNS)


def test_axes_and_legends_have_titles(tmp_path: Path) -> None:
    svg = vl_convert.vegalite_to_svg(renderer(tmp_path, "workspace").get_filled_template())
    texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
    named = {"Loss on the dev split", "step", "loss (nats per token)", "run", "revision"}
    assert named | set(RUNS) | {"workspace"} <= texts


def test_the_page_loads_nothing_from_outside(tmp_path: Path) -> None:
    curves = renderer(tmp_path, "workspace")
    index = tmp_path / "index.html"
    render_html([curves], index, html_template=tmp_path / ".dvc" / PAGE)
    html = index.read_text("utf-8")
    assert not any("src" in attributes for attributes in scripts(html))
    assert len(scripts(html)) == html.count("</script>") == 2
    assert "<link" not in html
    assert "cdn." not in html
    assert "@import" not in html
    assert "window.vegaEmbed=" in html
    assert not re.search(r"\{(scripts|plot_divs|refresh_tag)\}", html)


def test_the_pipeline_asks_for_the_template() -> None:
    assert PIPELINE.read_text("utf-8").count(f"template: {CURVES.stem}\n") == 2


@pytest.mark.integration
def test_a_new_workspace_plots_offline_and_git_stays_clean(tmp_path: Path) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=n@localhost"]
    folder = tmp_path / "ws"

    def call(*command: str) -> str:
        env = {**os.environ, "DVC_SITE_CACHE_DIR": str(tmp_path / "site")}
        return subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=True
        ).stdout

    folder.mkdir()
    call("git", "init", "-q")
    init_workspace(folder, TINY_PARAMS)
    call("git", "add", "--all")
    call("git", *identity, "commit", "-q", "-m", "new")
    assert ".dvc/plots/curves.json" in call("git", "ls-files")

    summary = folder / "work" / "summary"
    summary.mkdir(parents=True)
    names = ("run", "seed", "step", "loss")
    lines = [",".join(names), *(",".join(row[name] for name in names) for row in rows(""))]
    for name in ("dev.csv", "train.csv"):
        (summary / name).write_text("\n".join(lines) + "\n")
    figures = folder / "reports" / "figures" / "png"
    figures.mkdir(parents=True)
    (figures / "trade-off.png").write_bytes(drawing.png(drawing.canvas()[0]))
    folder = folder.rename(tmp_path / "moved")
    call(sys.executable, "-m", "dvc", "plots", "show")
    html = (folder / "dvc_plots" / "index.html").read_text("utf-8")
    assert "Loss on the dev split" in html
    assert "Loss on the training split" in html
    assert '"field": "run"' in html
    (shown,) = re.findall(r'<img[^>]* src="([^"]*trade-off.png)"', html)
    assert (folder / "dvc_plots" / shown).read_bytes()[:4] == b"\x89PNG"
    assert not any("src" in attributes for attributes in scripts(html))
    assert call("git", "status", "--porcelain") == ""
