"""The pictures, made with matplotlib, which is imported on use: SVG, colours for every eye, intervals always."""

from collections.abc import Sequence
from io import StringIO
from itertools import product
from typing import Any

from taskvec.errors import MissingPackage
from taskvec.regress.rows import EXAMPLES, SHUFFLED, VANILLA, YARDSTICK, RegressRow
from taskvec.regress.tables import FIDELITY, over_seeds, pick
from taskvec.report.pictures import Picture
from taskvec.results import Metric

Rows = Sequence[RegressRow]
QUIET, FLOOR = "#5b626d", 1e-4
# Black, and the palette of Okabe and Ito, each with a marker of its own.
_HUES = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8f949c", "#7a5c00")
LOOKS = tuple(zip(_HUES, "os^Dv*Pxh", strict=True))
_STYLE = {"svg.hashsalt": "taskvec", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def length_picture(rows: Rows, *, yardsticks: bool) -> Picture:
    """Error by the number of examples: methods, or (`yardsticks`) the bare model beside classical estimators."""
    learner, wanted = rows[0].learner, YARDSTICK if yardsticks else ""
    some = [row for row in pick(rows, test="length") if row.control == wanted or row.method == VANILLA]
    names = [name for name in dict.fromkeys(row.method for row in some) if name != EXAMPLES]
    figure, axes = _figure(7.0, 4.0)
    for name, look in zip(sorted(names, key=VANILLA.__ne__), LOOKS, strict=False):
        _line(axes, _by_length(pick(some, method=name)), name, look)
    for row in pick(rows, test="other-examples")[:1]:
        axes.axvline(row.examples, color=QUIET, linestyle=":", linewidth=1)
    axes.set(xlabel="examples", ylabel="mean squared error", yscale="log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], FLOOR))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    kind, beside = ("yardsticks", "classical estimators") if yardsticks else ("methods", "the methods")
    says = f"Error of {learner} by the number of examples, beside {beside}; dotted: the most it was trained on."
    return Picture(f"{learner}-{kind}", f"{learner} and {beside}", says, _svg(figure))


def _by_length(rows: Rows) -> list[tuple[int, Metric]]:
    found = [(k, over_seeds(row.mse for row in pick(rows, examples=k))) for k in sorted({row.examples for row in rows})]
    return [(k, metric) for k, metric in found if metric is not None]


def fidelity_picture(rows: Rows) -> Picture:
    """Fidelity of each method and its shuffled control, in both tests."""
    learner = rows[0].learner
    scored = [row for row in rows if row.test == FIDELITY[0] and row.fidelity is not None and not row.control]
    names = list(dict.fromkeys(row.method for row in scored))
    figure, axes = _figure(7.0, 0.9 + 0.42 * len(names))
    for (side, test), control, (place, name) in product(enumerate(FIDELITY), ("", SHUFFLED), enumerate(names)):
        metric = over_seeds(row.fidelity for row in pick(rows, test=test, method=name, control=control))
        if metric is not None:
            _dot(axes, metric, place + 0.3 * side - 0.15, _HUES[1 + side], not control)
    for x, text in ((0, "no task"), (1, "as good as examples")):
        axes.axvline(x, color=QUIET, linestyle=":", linewidth=1)
        axes.annotate(text, (x, -0.8), ha="center", fontsize=8, color=QUIET)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="task fidelity")
    axes.set_ylim(len(names) - 0.4, -1)
    axes.set_xlim(-0.6, 1.3)
    says = (
        f"Task fidelity of vectors in {learner}: blue behind no examples, red behind another function's; open marks "
        "are vectors fitted on shuffled values. Only what stands right of 0 carries the function."
    )
    return Picture(f"{learner}-fidelity", f"{learner}: task fidelity", says, _svg(figure))


def _line(axes: Any, found: list[tuple[int, Metric]], name: str, look: tuple[str, str]) -> None:
    at, (colour, marker) = [k for k, _ in found], look
    axes.plot(at, [m.value for _, m in found], color=colour, label=name, marker=marker, markersize=4, linewidth=1.2)
    axes.fill_between(at, [m.low for _, m in found], [m.high for _, m in found], color=colour, alpha=0.12, linewidth=0)


def _dot(axes: Any, metric: Metric, y: float, colour: str, filled: bool) -> None:
    axes.plot([metric.low, metric.high], [y, y], color=colour, linewidth=1.2, clip_on=True)
    axes.plot([metric.value], [y], "o", color=colour, markersize=6, markerfacecolor=colour if filled else "white")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        wanted = "the package matplotlib, for pictures"
        raise MissingPackage(wanted, "it is not installed", 'run: pip install "taskvec[figures]"') from None
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    out = StringIO()
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
