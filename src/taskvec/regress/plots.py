"""The pictures, made with matplotlib, which is imported on use: SVG, colours for every eye, intervals always."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from taskvec.regress.rows import LENGTH, MEAN, SHUFFLED, VANILLA, WRONG, YARDSTICK, RegressRow
from taskvec.regress.tables import FIDELITY, over_seeds, pick
from taskvec.report.pictures import Picture
from taskvec.report.svg import HUES, LOOKS, QUIET, line, panels, svg
from taskvec.results import Metric

Rows = Sequence[RegressRow]
FLOOR = 1e-4
MARKS = {"": "D", WRONG: "x", MEAN: "s", SHUFFLED: "o"}


def length_picture(rows: Rows, *, yardsticks: bool) -> Picture:
    """Error by the number of examples: methods, or (`yardsticks`) the bare model beside classical estimators."""
    learner, wanted = rows[0].learner, YARDSTICK if yardsticks else ""
    some = [row for row in pick(rows, test=LENGTH) if row.control == wanted or row.method == VANILLA]
    names = list(dict.fromkeys(row.method for row in some))
    figure, axes = panels(7.0, 4.0)
    for name, look in zip(sorted(names, key=VANILLA.__ne__), LOOKS[: len(names)], strict=True):
        line(axes, _by_length(pick(some, method=name)), name, look)
    axes.axvline(rows[0].trained, color=QUIET, linestyle=":", linewidth=1)
    axes.set(xlabel="examples", ylabel="mean squared error", yscale="log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], FLOOR))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    kind, beside = ("yardsticks", "classical estimators") if yardsticks else ("methods", "the methods")
    says = f"Error of {learner} by the number of examples, beside {beside}; dotted: the most it was trained on."
    return Picture(f"{learner}-{kind}", f"{learner} and {beside}", says, svg(figure))


def _by_length(rows: Rows) -> list[tuple[int, Metric]]:
    found = [(k, over_seeds(row.mse for row in pick(rows, examples=k))) for k in sorted({row.examples for row in rows})]
    return [(k, metric) for k, metric in found if metric is not None]


def fidelity_picture(rows: Rows) -> Picture:
    """Fidelity of each method and its controls, in both tests."""
    learner = rows[0].learner
    scored = [row for row in rows if row.test in FIDELITY and row.fidelity is not None and row.control != YARDSTICK]
    names = list(dict.fromkeys(row.method for row in scored))
    figure, axes = panels(7.0, 1.2 + 0.5 * max(1, len(names)))
    for (side, test), (control, marker), (place, name) in product(enumerate(FIDELITY), MARKS.items(), enumerate(names)):
        metric = over_seeds(row.fidelity for row in pick(scored, test=test, method=name, control=control))
        if metric is not None:
            y = place + 0.3 * side - 0.15 + 0.05 * list(MARKS).index(control)
            _dot(axes, metric, y, (HUES[1 + side], marker))
    for x, text in ((0, "no task"), (1, "as good as examples")):
        axes.axvline(x, color=QUIET, linestyle=":", linewidth=1)
        axes.annotate(text, (x, -0.8), ha="center", fontsize=8, color=QUIET)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="task fidelity (cut at -2)")
    axes.set_ylim(len(names) - 0.4, -1)
    axes.set_xlim(-2, 1.3)
    says = (
        f"Task fidelity of vectors in {learner}: blue behind no examples, red behind other functions'; filled: the "
        "method, open: its controls (cross: other functions' vectors, square: all functions' together, circle: "
        "shuffled values). Only what stands right of 0 carries the function."
    )
    return Picture(f"{learner}-fidelity", f"{learner}: task fidelity", says, svg(figure))


def _dot(axes: Any, metric: Metric, y: float, look: tuple[str, str]) -> None:
    colour, marker = look
    filled = marker == "D"
    axes.plot([metric.low, metric.high], [y, y], color=colour, linewidth=1.4 if filled else 0.6)
    face = colour if filled else "white"
    axes.plot([metric.value], [y], marker, color=colour, markersize=6 if filled else 4, markerfacecolor=face)
