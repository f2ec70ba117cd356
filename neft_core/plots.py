"""What `dvc plots` needs: the template of our curves, and a page that works without network."""

import functools
import shutil
from pathlib import Path

from neft_core.files import replacing

CURVES = Path(__file__).with_name("curves.json")
"""How the curves are drawn; every workspace's .dvc/plots/curves.json is this file."""

PAGE = "tmp/plots.html"
"""DVC's `plots.html_template`, from .dvc: relative, so that a workspace can be moved."""

_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Plots</title>
{refresh_tag}
<style>
:root { color-scheme: light; }
body { background: white; color: black; font-family: sans-serif; }
table { border-spacing: 15px; }
@media print { details { display: none; } }
</style>
<script>%s</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def init_plots(dvc: Path) -> None:
    """Write the template and the page into a DVC repository.

    DVC's own page loads Vega from a CDN and stays blank without it. Ours, a megabyte, lies where
    DVC keeps what git ignores; the template is for git, so that other tools of DVC find it too.

    Args:
        dvc: the repository's `.dvc`.

    Raises:
        NeftError: the files can't be written.
    """
    with replacing(dvc / "plots" / CURVES.name) as temporary:
        shutil.copyfile(CURVES, temporary)
    with replacing(dvc / PAGE) as temporary:
        temporary.write_text(_HTML % _vega(), encoding="utf-8")


@functools.cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script, of one version with the template."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
