"""The figures of a comparison: numbers in, a matplotlib figure out.

Each takes names and plain numbers and knows neither files nor params, so that it draws one
workspace's results as well as a study's table. `drawing.svg` and `drawing.png` turn what comes back
into files. A value with its spread is `(mean, deviation)`, the deviation None where there is none.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from neft_core.drawing import (
    DASHES,
    INK,
    MARKERS,
    PALETTE,
    PAPER,
    brief,
    canvas,
    counted,
    named,
    styled,
)

if TYPE_CHECKING:
    from neft_core.drawing import Axes, Figure

Value = tuple[float, float | None]
Place = tuple[float, float, float | None]
"""Where a point lies along x, and its value."""


class Style(NamedTuple):
    """How a name looks in every figure."""

    colour: str
    dash: Any
    marker: str


def styles(families: Mapping[str, str], order: Sequence[str] = ()) -> dict[str, Style]:
    """A look for every name: a colour and a marker for a family, a dash for each in it.

    Where colours don't suffice, families of one colour differ in their dash.

    Args:
        families: the family of each name, such as the method of a run.
        order: families that come first, so that they keep their colours in every figure.
    """
    order = list(dict.fromkeys([*order, *families.values()]))
    seen = dict.fromkeys(order, 0)
    found = {}
    for name, family in families.items():
        place = order.index(family)
        dash = DASHES[(seen[family] + place // len(PALETTE)) % len(DASHES)]
        found[name] = Style(PALETTE[place % len(PALETTE)], dash, MARKERS[place % len(MARKERS)])
        seen[family] += 1
    return found


def _looks(names: Sequence[str], given: Mapping[str, Style] | None) -> dict[str, Style]:
    own = styles({name: name for name in names})
    return {name: (given or {}).get(name, own[name]) for name in names}


def legend(figure: "Figure", axes: "Axes", columns: int = 4) -> None:
    """The names of the lines or bars, above the axes; many of them make the figure higher."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    columns = max(1, min(columns, 62 // (longest + 7)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.18 * max(0, rows - 3))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def lines(
    series: Mapping[str, Sequence[Place]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    levels: Mapping[str, float] | None = None,
    style: Mapping[str, Style] | None = None,
) -> "Figure":
    """Lines through points with error bars.

    Args:
        series: for each line its points (x, mean, deviation), in any order.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        log_x: whether x is logarithmic; it counts things then.
        levels: named heights, as dashed lines across.
        style: how each line looks; by default each has a colour of its own.
    """
    looks = _looks(list(series), style)
    with styled():
        figure, (axes,) = canvas()
        for number, (name, height) in enumerate((levels or {}).items()):
            dash = DASHES[1 + number % (len(DASHES) - 1)]
            axes.axhline(height, color=INK, linewidth=0.9, linestyle=dash, label=named(name))
        for name, points in series.items():
            x, mean, spread = zip(*sorted(points, key=lambda p: p[:2]), strict=True)
            axes.errorbar(
                x,
                mean,
                yerr=[s or 0 for s in spread] if any(spread) else None,
                color=looks[name].colour,
                linestyle=looks[name].dash,
                marker=looks[name].marker,
                markeredgecolor=PAPER,
                markeredgewidth=0.6,
                label=named(name),
            )
        if log_x:
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            axes.set_xlim(low / 1.15, high * 1.15)
            counted(axes.xaxis, log=True)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.margins(y=0.12)
        legend(figure, axes)
    return figure


def trade_off(
    series: Mapping[str, Sequence[Place]],
    metric: str,
    levels: Mapping[str, float] | None = None,
    style: Mapping[str, Style] | None = None,
) -> "Figure":
    """A metric against what is trained, a line for each method.

    Args:
        series: for each method (trained parameters, mean, deviation) of its budgets or ranks.
        metric: its name.
        levels: scores of models that have no place along x, such as the base.
        style: how each method looks.
    """
    return lines(
        series,
        x_label="trained parameters (log scale)",
        y_label=metric,
        log_x=True,
        levels=levels,
        style=style,
    )


def wins(groups: Sequence[str], counts: Mapping[str, Sequence[int]], across: str) -> "Figure":
    """How often each of two methods has the higher score (the form of Fig. 2).

    Args:
        groups: what is counted apart, such as language pairs.
        counts: for each method, and for a draw, a count in each group.
        across: what the groups are.

    Source: Xu et al. 2024, Fig. 2, of whose drawing the text tells labels and pairs alone.
    """
    values = {name: [(float(count), None) for count in of] for name, of in counts.items()}
    figure = bars(groups, values, label="times it scores higher", across=across, stacked=True)
    (axes,) = figure.axes
    with styled():
        axes.locator_params(axis="y", integer=True)
        ends = [0] * len(groups)
        for of in counts.values():
            for place, count in enumerate(of):
                y = ends[place] + count / 2
                ends[place] += count
                axes.text(place, y, str(count or ""), ha="center", va="center", color=PAPER)
    return figure


def added_neurons(
    series: Mapping[str, Sequence[Place]],
    metric: str,
    reported: Mapping[str, Sequence[Place]] | None = None,
) -> "Figure":
    """A metric against how much was added to a first selection (the form of Fig. 4).

    Args:
        series: for each way to add, such as lowest and reversed: (added percent of the model's
            parameters, mean, deviation).
        metric: its name.
        reported: what the paper reports of some of them, dashed beside them.

    Source: Xu et al. 2024, Fig. 4.
    """
    beside = {f"{name}, the paper's": points for name, points in (reported or {}).items()}
    families = {name: name for name in series}
    return lines(
        {**series, **beside},
        x_label="added neurons (% of the model's parameters)",
        y_label=metric,
        style=styles(families | dict(zip(beside, reported or {}, strict=True))),
    )


def bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[Value]],
    *,
    label: str,
    across: str = "",
    horizontal: bool = False,
    stacked: bool = False,
    unit: str = "",
) -> "Figure":
    """Bars in groups, with error bars; lying ones bear their numbers.

    Args:
        groups: names of the groups, in order.
        series: for each colour, a value for each group.
        label: what the length of a bar is, with its unit.
        across: what the groups are.
        horizontal: whether bars lie: for long names.
        stacked: whether a group's bars are parts of one, end to end.
        unit: format of the numbers at lying bars, such as `.1f`; by default 1.2k, 3M.
    """
    thick = 0.74 / (1 if stacked else len(series))
    names = [named(group, 28) for group in groups]
    rows = len(groups) * (1 if stacked else max(1, 0.8 * len(series)))
    with styled():
        figure, (axes,) = canvas(0.9 + 0.24 * rows + 0.2 * (len(series) > 1) if horizontal else 3.0)
        draw = axes.barh if horizontal else axes.bar
        ends = [0.0] * len(groups)
        reach: dict[float, float] = {}
        for number, (name, values) in enumerate(series.items()):
            shift = 0 if stacked else thick * (number - (len(series) - 1) / 2)
            places = [place + shift for place in range(len(groups))]
            lengths = [mean for mean, _ in values]
            shape: dict[str, Any] = (
                {"left" if horizontal else "bottom": list(ends)} if stacked else {}
            )
            draw(places, lengths, thick, color=PALETTE[number % 7], label=named(name), **shape)
            if stacked:
                ends = [end + length for end, length in zip(ends, lengths, strict=True)]
            tips = ends if stacked else lengths
            spreads = [(p, t, s) for p, t, (_, s) in zip(places, tips, values, strict=True) if s]
            for place, tip, spread in spreads:
                x, y = (tip, place) if horizontal else (place, tip)
                error: dict[str, Any] = {"xerr" if horizontal else "yerr": spread}
                axes.errorbar(x, y, **error, color=INK, linewidth=0.9)
                reach[place] = max(reach.get(place, 0.0), tip + spread)
            if horizontal and (not stacked or number == len(series) - 1):
                for place, tip in zip(places, tips, strict=True):
                    axes.annotate(
                        format(tip, unit) if unit else brief(tip),
                        (max(tip, reach.get(place, 0.0)), place),
                        (3, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=8 if len(groups) == rows else 7.5,
                    )
        if horizontal:
            axes.set_yticks(range(len(groups)), names)
            axes.invert_yaxis()
            axes.set(xlabel=named(label, 60), ylabel=across)
            axes.margins(x=0.14)
            axes.grid(visible=False, axis="y")
            if not unit:
                counted(axes.xaxis)
        else:
            tilted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
            axes.set_xticks(range(len(groups)), names, **(tilted if len(groups) > 6 else {}))
            axes.set(xlabel=across, ylabel=label)
            axes.grid(visible=False, axis="x")
            counted(axes.yaxis)
        if len(series) > 1:
            legend(figure, axes)
    return figure


def curves(
    runs: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    *,
    y_label: str,
    style: Mapping[str, Style] | None = None,
    bins: int = 60,
) -> "Figure":
    """Learning curves: the mean of a run's seeds, and from the lowest to the highest as band.

    Args:
        runs: for each run, for each of its seeds (step, value).
        y_label: what the value is, with its unit.
        style: how each run looks.
        bins: longer curves are averaged within so many spans of steps.
    """
    looks = _looks(list(runs), style)
    last = max((step for seeds in runs.values() for seed in seeds for step, _ in seed), default=1)
    with styled():
        figure, (axes,) = canvas()
        for name, seeds in runs.items():
            spans: dict[int, list[list[tuple[float, float]]]] = {}
            width = last / bins if max(map(len, seeds)) > bins else 0
            for seed in seeds:
                of_seed: dict[int, list[tuple[float, float]]] = {}
                for step, value in seed:
                    of_seed.setdefault(int((step - 1) / width) if width else int(step), []).append(
                        (step, value)
                    )
                for span, points in of_seed.items():
                    spans.setdefault(span, []).append(points)
            x, low, mean, high = [], [], [], []
            for _, found in sorted(spans.items()):
                means = [sum(v for _, v in points) / len(points) for points in found]
                steps = [step for points in found for step, _ in points]
                x.append(sum(steps) / len(steps))
                low.append(min(means))
                mean.append(sum(means) / len(means))
                high.append(max(means))
            colour = looks[name].colour
            if len(seeds) > 1:
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            mark = looks[name].marker if len(x) == 1 else None
            axes.plot(
                x, mean, color=colour, linestyle=looks[name].dash, marker=mark, label=named(name)
            )
        axes.set(xlabel="step", ylabel=y_label)
        axes.margins(x=0.02)
        counted(axes.xaxis)
        legend(figure, axes)
    return figure
