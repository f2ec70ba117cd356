"""Figures of neurons: which are selected, what they scored, how their use changed.

Numbers in, a matplotlib figure out, as in `figures`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from neft_core.drawing import DASHES, FAINT, INK, canvas, counted, named, shades, styled
from neft_core.figures import Value, bars, legend, styles

if TYPE_CHECKING:
    from neft_core.drawing import Figure


def neuron_map(
    masks: Mapping[str, Sequence[Sequence[float | None]]],
    layers: Sequence[str],
    modules: Sequence[str],
) -> "Figure":
    """Where the selected neurons are: layers down, modules across, a panel for each mask.

    Args:
        masks: for each, the share of the candidates that is selected, [layers][modules], in
            [0, 1]; None where a layer has no such module.
        layers: names of the layers, the first on top.
        modules: names of the modules of a layer.
    """
    import numpy as np

    told = len(layers) <= 16
    cell = 0.42 if told else 0.3
    top = max((s for rows in masks.values() for row in rows for s in row if s is not None),
              default=1.0) or 1.0  # fmt: skip
    with styled():
        width = max(2.4, 1.3 + len(masks) * (0.22 + cell * max(2, len(modules))))
        figure, panels = canvas(
            1.0 + len(layers) * (0.24 if told else 0.15),
            width=width,
            panels=len(masks),
            share_y=True,
        )
        for axes, (name, rows) in zip(panels, masks.items(), strict=True):
            values = np.array([[np.nan if s is None else s for s in row] for row in rows])
            cells = axes.pcolormesh(
                values, cmap=shades(), vmin=0, vmax=top, edgecolor=FAINT, linewidth=0.4
            )
            axes.set_xticks(np.arange(len(modules)) + 0.5, modules)
            axes.tick_params(length=0)
            axes.tick_params(axis="x", rotation=0 if max(map(len, modules)) < 6 else 60)
            axes.set_title(named(name, 24), fontsize=8.5)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            if told:
                for (y, x), share in np.ndenumerate(values):
                    if not np.isnan(share):
                        axes.text(x + 0.5, y + 0.5, f"{100 * share:.0f}", fontsize=7.5,
                                  ha="center", va="center")  # fmt: skip
        every = 1 if told else 4
        panels[0].set_yticks(np.arange(0, len(layers), every) + 0.5, layers[::every])
        panels[0].invert_yaxis()
        panels[0].set_ylabel("layer")
        bar = figure.colorbar(cells, ax=panels, pad=0.03, aspect=26)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        bar.set_label("share selected")
        bar.outline.set_edgecolor(FAINT)
        bar.ax.grid(visible=False)
    return figure


def distribution(
    values: Mapping[str, Sequence[float]], cuts: Mapping[str, float], *, bins: int = 60
) -> "Figure":
    """How the sensitivity of the candidates is spread, and where selections cut.

    Args:
        values: sensitivities (1 - similarity) of the candidates of each kind of module; those of
            0 or less have no place on a logarithmic axis and are left out.
        cuts: for each selection the lowest sensitivity that it holds.
        bins: how many bars.
    """
    import numpy as np

    kinds = {name: np.asarray(some, dtype=float) for name, some in values.items()}
    kinds = {name: some[some > 0] for name, some in kinds.items()}
    every = np.concatenate(list(kinds.values()))
    edges = np.geomspace(every.min(), max(every.max(), every.min() * 1.01), bins + 1).tolist()
    with styled():
        figure, (axes,) = canvas()
        for name, look in styles({name: name for name in kinds}).items():
            axes.hist(kinds[name], edges, histtype="stepfilled", color=look.colour, alpha=0.3)
            axes.hist(kinds[name], edges, histtype="step", color=look.colour, label=named(name))
        axes.set_xscale("log")
        axes.margins(y=0.12)
        for number, (name, cut) in enumerate(sorted(cuts.items(), key=lambda item: item[1])):
            axes.axvline(cut, color=INK, linewidth=1, linestyle=DASHES[1])
            axes.annotate(f"{named(name)} \N{RIGHTWARDS ARROW}", (cut, 0.97 - 0.09 * (number % 8)),
                          (-3, 0), xycoords=("data", "axes fraction"), va="top", ha="right",
                          textcoords="offset points", fontsize=8)  # fmt: skip
        axes.set(xlabel="sensitivity: 1 − cosine similarity (log scale)", ylabel="neurons")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda _value, _: "")
        counted(axes.yaxis)
        legend(figure, axes)
    return figure


def overlap(
    names: Sequence[str],
    shares: Sequence[Sequence[float | None]],
    chance: Sequence[Sequence[float | None]],
) -> "Figure":
    """Which part of a mask another mask has too, beside what chance would give.

    Args:
        names: of the masks.
        shares: [rows][columns]: of the row's neurons, the share that the column has too; None
            where the two can't be compared.
        chance: the same for a random mask of the column's size.
    """
    import numpy as np

    values = np.array([[np.nan if s is None else s for s in row] for row in shares], dtype=float)
    said = [named(name, 28) for name in names]
    side = max(1.8, 0.62 * len(names))
    with styled():
        figure, (axes,) = canvas(1.1 + 0.72 * side, width=max(3.2, 1.3 + side))
        axes.pcolormesh(values, cmap=shades(), vmin=0, vmax=1, edgecolor=FAINT, linewidth=0.4)
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                by_chance = chance[y][x]
                if share is not None:
                    axes.text(x + 0.5, y + 0.42, f"{share:.2f}", ha="center", va="center")
                if share is not None and by_chance is not None and x != y:
                    axes.text(x + 0.5, y + 0.74, f"({by_chance:.2f})", fontsize=7,
                              ha="center", va="center")  # fmt: skip
        axes.set_xticks(np.arange(len(names)) + 0.5, said, rotation=35, ha="right",
                        rotation_mode="anchor")  # fmt: skip
        axes.set_yticks(np.arange(len(names)) + 0.5, said)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set(xlabel="is also in", ylabel="share of")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return figure


def rank_change(edges: Sequence[float], series: Mapping[str, Sequence[Value]]) -> "Figure":
    """Avg(dRank) by percentile bucket of the Pearson order (the form of Fig. 3).

    Args:
        edges: of the buckets, in [0, 1], one more than there are buckets.
        series: for each pair of models compared, a value for each bucket, the top first.

    Source: Xu et al. 2024, Fig. 3.
    """
    buckets = [f"{100 * a:g}–{100 * b:g}" for a, b in itertools.pairwise(edges)]
    return bars(
        buckets, series, label="Avg(ΔRank), places", across="percentile of the Pearson order (%)"
    )


def average_rank_change(values: Mapping[str, Value], anchor: str) -> "Figure":
    """Avg(dRank) of several models against one (a panel of Fig. 5).

    Args:
        values: of each model.
        anchor: the model that all are compared with.

    Source: Xu et al. 2024, Fig. 5.
    """
    return bars(
        list(values),
        {anchor: list(values.values())},
        label=f"Avg(ΔRank) against {anchor}",
        horizontal=True,
    )


def neuron_types(
    groups: Sequence[str], counts: Mapping[str, Sequence[Value]], anchor: str
) -> "Figure":
    """How many neurons are of each type (a panel of Fig. 6).

    Args:
        groups: the models, or the layers, that are counted.
        counts: for each type (strongly affected, suppressed, indirectly affected) a count in each.
        anchor: the model that all are compared with.

    Source: Xu et al. 2024, Fig. 6.
    """
    return bars(groups, counts, label=f"neurons, against {anchor}", horizontal=True)
