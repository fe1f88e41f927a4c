"""One plotly figure on a page, and its sentence. plotly is imported on use, and reads HTML in every string it is given:
every string from data goes through `plain`."""

from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Drawing:
    """A figure, and one sentence that says what to see. `name` is unique on a page."""

    name: str
    title: str
    says: str
    figure: Any


def plain(text: str) -> str:
    """A string from data for plotly: what looks like HTML stays text, and one line."""
    return escape(" ".join(text.split()), quote=False)


def chart(traces: list[dict[str, Any]], *, x: dict[str, Any], y: dict[str, Any], height: int = 420) -> Any:
    """A plotly figure in the page's style."""
    import plotly.graph_objects as go

    axis = {"automargin": True, "ticks": "", "showline": False}
    layout = {
        "template": "none",
        "height": height,
        "showlegend": False,
        "hovermode": "closest",
        "bargap": 0.3,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8, "pad": 6},
        "xaxis": axis | x | _titled(x),
        "yaxis": axis | y | _titled(y),
    }
    return go.Figure(data=traces, layout=layout)


def _titled(axis: dict[str, Any]) -> dict[str, Any]:
    return {"title": {"text": axis["title"], "standoff": 12, "font": {"size": 12.5}} if axis.get("title") else None}
