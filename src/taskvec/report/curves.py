"""Curves with intervals, drawn twice from the same numbers: as SVG for papers and as plotly charts for a page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from taskvec.report.drawing import Drawing, chart, plain
from taskvec.report.figures import BLUE, GREEN, GREY, OCHRE, PINK, RED, VIOLET
from taskvec.report.svg import LOOKS, line, panels, svg
from taskvec.results import Metric

WIDTH, HEIGHT = 3.7, 3.4
"""Of one panel, in inches."""
_COLOURS = (GREY, BLUE, RED, GREEN, PINK, OCHRE, VIOLET)
_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "star", "hexagon")
_MARKS = tuple(zip(_COLOURS, _SYMBOLS, strict=True))


@dataclass(frozen=True)
class Curve:
    """Values with intervals along an axis. A null is drawn dotted."""

    name: str
    points: tuple[tuple[int | float, Metric], ...]
    null: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over one axis. `ticks` names places 0, 1, ... where the axis has no numbers: points are not joined. Where
    points lie below `floor` the picture ends there, and says so."""

    title: str
    x: str
    curves: tuple[Curve, ...]
    ticks: tuple[str, ...] = ()
    floor: float = -math.inf

    @property
    def cut(self) -> tuple[float, float] | None:
        """The range that is shown where points lie below the floor."""
        found = [m for curve in self.curves for _, m in curve.points]
        top = max((m.high for m in found), default=self.floor)
        top = max(top, self.floor + 1)
        return (self.floor, top + 0.05 * (top - self.floor)) if any(m.value < self.floor for m in found) else None


def as_svg(drawn: Sequence[Panel]) -> str:
    """The panels side by side. Raises `MissingPackage` without matplotlib."""
    figure, axes = panels(WIDTH * len(drawn), HEIGHT, len(drawn))
    for ax, panel in zip([axes] if len(drawn) == 1 else axes, drawn, strict=True):
        for curve, look in zip(panel.curves, cycle(LOOKS)):
            if panel.ticks:
                _points(ax, curve, look)
            else:
                line(ax, curve.points, curve.name, look)
                ax.lines[-1].set_linestyle(":" if curve.null else "-")
        ax.set(xlabel=panel.x, title=panel.title)
        if panel.cut is not None:
            ax.set(ylabel=_below(panel), ylim=panel.cut)
        if panel.ticks:
            ax.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=40, ha="right")
        elif all(isinstance(x, int) for curve in panel.curves for x, _ in curve.points):
            ax.locator_params("x", integer=True)
        if len(panel.curves) > 1:
            ax.legend(frameon=False, fontsize=6)
    return svg(figure)


def _below(panel: Panel) -> str:
    return f"below {panel.floor:g} not shown"


def _points(ax: Any, curve: Curve, look: tuple[str, str]) -> None:
    at, middle = [x for x, _ in curve.points], [m.value for _, m in curve.points]
    colour, marker = look
    style: dict[str, Any] = {"linestyle": "", "markersize": 4, "markerfacecolor": "none" if curve.null else colour}
    ax.errorbar(at, middle, yerr=_spans(curve), color=colour, marker=marker, label=curve.name, **style)


def _spans(curve: Curve) -> tuple[list[float], list[float]]:
    """How far intervals reach down and up."""
    below = [max(0.0, m.value - m.low) for _, m in curve.points]
    return below, [max(0.0, m.high - m.value) for _, m in curve.points]


def as_drawings(name: str, says: str, drawn: Sequence[Panel]) -> list[Drawing]:
    """A plotly chart for each panel, all with one sentence."""
    return [Drawing(f"{name}-{number}", panel.title, says, _chart(panel)) for number, panel in enumerate(drawn)]


def _chart(panel: Panel) -> Any:
    marked = zip(panel.curves, cycle(_MARKS))
    traces = [trace for curve, mark in marked for trace in _traces(panel, curve, mark)]
    x: dict[str, Any] = {"title": plain(panel.x), "zeroline": False}
    if panel.ticks:
        x |= {"tickvals": list(range(len(panel.ticks))), "ticktext": [plain(tick) for tick in panel.ticks]}
    y: dict[str, Any] = {"zeroline": False}
    if panel.cut is not None:
        y |= {"title": _below(panel), "range": panel.cut}
    figure = chart(traces, x=x, y=y, height=340)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    return figure.update_layout(showlegend=len(panel.curves) > 1, legend=legend)


def _traces(panel: Panel, curve: Curve, mark: tuple[str, str]) -> list[dict[str, Any]]:
    colour, symbol = mark
    name, at = plain(curve.name), [x for x, _ in curve.points]
    low, middle, high = ([getattr(m, part) for _, m in curve.points] for part in ("low", "value", "high"))
    hover = "%{y:.3g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}]<extra>" + name + "</extra>"
    shown: dict[str, Any] = {
        "type": "scatter",
        "x": at,
        "y": middle,
        "name": name,
        "mode": "markers" if panel.ticks else "lines+markers",
        "line": {"color": colour, "dash": "dot" if curve.null else "solid"},
        "marker": {"color": colour, "symbol": symbol + ("-open" if curve.null else ""), "size": 7},
        "customdata": list(zip(low, high, strict=True)),
        "hovertemplate": hover,
    }
    if panel.ticks:
        down, up = _spans(curve)
        return [shown | {"error_y": {"type": "data", "array": up, "arrayminus": down, "color": colour}}]
    band: dict[str, Any] = {"type": "scatter", "x": at + at[::-1], "y": high + low[::-1], "mode": "lines"}
    band |= {"fill": "toself", "fillcolor": colour, "opacity": 0.15, "line": {"width": 0}}
    return [band | {"hoverinfo": "skip", "showlegend": False}, shown]
