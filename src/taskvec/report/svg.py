"""Pictures for papers: SVG by matplotlib, which is imported on use. Colours for every eye, intervals always."""

from collections.abc import Sequence
from io import StringIO
from typing import Any

from taskvec.errors import MissingPackage
from taskvec.results import Metric

QUIET = "#5b626d"
# Black, and the palette of Okabe and Ito, each with a marker of its own.
HUES = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8f949c", "#7a5c00")
LOOKS = tuple(zip(HUES, "os^Dv*Pxh", strict=True))
Look = tuple[str, str]
"""A colour and a marker."""
_STYLE = {"svg.hashsalt": "taskvec", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def panels(width: float, height: float, count: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, side by side (one alone where `count` is 1). Raises `MissingPackage` without
    matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        wanted = "the package matplotlib, for pictures"
        raise MissingPackage(wanted, "it is not installed", 'run: pip install "taskvec[figures]"') from None
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(1, count)


def svg(figure: Any) -> str:
    """The figure as SVG, the same bytes for the same figure."""
    import matplotlib as mpl

    out = StringIO()
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def line(axes: Any, found: Sequence[tuple[int | float, Metric]], name: str, look: Look) -> None:
    """A curve with its band."""
    at, (colour, marker) = [x for x, _ in found], look
    axes.plot(at, [m.value for _, m in found], color=colour, label=name, marker=marker, markersize=4, linewidth=1.2)
    axes.fill_between(at, [m.low for _, m in found], [m.high for _, m in found], color=colour, alpha=0.12, linewidth=0)
