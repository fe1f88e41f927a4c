"""The report's figures, made with plotly, which is imported on use.

Each function returns a `Drawing`: the figure, and one plain sentence that says what to see (its caption and its text
for those who don't see it). Figures carry no text colours: the page sets them, for a dark and a light theme.

plotly reads HTML in every string it is given, so every string from data goes through `plain`.
"""

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from taskvec.report import statistics
from taskvec.report.drawing import Drawing, chart, plain
from taskvec.results import BIAS, CONTROL_SUFFIXES, OTHER_TASK, TASK_MEAN, Metric, Row

if TYPE_CHECKING:
    from taskvec.report.read import Run

CACHED = "-cached"
LAYERED = ("mean-difference", "hendel", "function-vector")
"""Methods whose `dev_accuracy` has one place a layer; mean-difference has one more, for the head's input."""
MANY = 24  # longer names are cut beside an axis; hovering shows them whole


@dataclass(frozen=True)
class Mark:
    """A method's colour and plotly symbol, the same in all figures."""

    colour: str
    symbol: str


# --- marks -----------------------------------------------------------------------------------------------------------

GREY, BLUE, OCHRE, PINK = "#8f949c", "#4992e6", "#b68c09", "#a5479a"
GREEN, RED, VIOLET = "#2f7054", "#ac4e25", "#6850df"
# At least 3:1 on the light and on the dark page, and at least 22 apart (Lab) for people with any kind of colour
# blindness (after Machado et al. 2009). More hues than seven are told apart by nobody: further methods share them.

_KNOWN = {
    GREY: {"zero-shot": "circle", "random": "x", "linear-probe": "square", "calibration": "triangle-down"},
    BLUE: {"few-shot": "square", "lora": "star", "prefix-tuning": "triangle-up", "prompt-tuning": "diamond"},
    OCHRE: {"mean-difference": "diamond", "elicit": "pentagon", "adaptive-ridge": "star"},
    PINK: {"hendel": "triangle-up", "state-vector": "cross"},
    GREEN: {"function-vector": "triangle-down", "i2cl": "hexagon"},
    RED: {"linear": "pentagon", "icv": "diamond"},
    VIOLET: {"learned": "star", "learnable": "hexagon", "adaptive": "cross"},
}
_MARKS = {name: Mark(colour, symbol) for colour, some in _KNOWN.items() for name, symbol in some.items()}
_OPEN = {OTHER_TASK: "x", TASK_MEAN: "square", BIAS: "circle"}
_OTHERS = [Mark(c, s) for s in ("circle", "x", "square", "bowtie") for c in (VIOLET, GREEN, OCHRE, PINK, RED)]


def marks(methods: list[str]) -> dict[str, Mark]:
    """A mark for each method, the known ones' own on every page; a control has its method's colour, and is open."""
    spare, out = count(), dict[str, Mark]()
    for method in methods:
        end = next((end for end in (*CONTROL_SUFFIXES, CACHED) if method.endswith(end)), "")
        original = method.removesuffix(end)
        if original not in _MARKS and original not in out:
            out[original] = _OTHERS[next(spare) % len(_OTHERS)]
        mark = _MARKS.get(original) or out[original]
        out[method] = Mark(mark.colour, f"{_OPEN.get(end, mark.symbol)}-open") if end else mark
    return {method: out[method] for method in methods}


# --- d_ntp and tokens ------------------------------------------------------------------------------------------------


def closeness(run: "Run") -> Drawing | None:
    """Accuracy against d_ntp, all points."""
    found = statistics.points(run)
    if not found:
        return None
    traces = [_distances(run, method, [p for p in found if p.method == method]) for method in run.methods]
    log = min(p.d_ntp for p in found) > 0
    title = f"d_ntp: distance from few-shot, nats{' (log axis)' if log else ''}"
    x = _log_axis([p.d_ntp for p in found]) if log else {"zeroline": False}
    figure = chart(traces, x={"title": title} | x, y=_share("accuracy"))
    return Drawing("closeness", "Closeness to few-shot and accuracy", _correlated(run, len(found)), figure)


def _distances(run: "Run", method: str, some: list[statistics.Point]) -> dict[str, Any]:
    texts = [[plain(p.task), plain(p.method), str(p.seed)] for p in some]
    hover = "<b>%{customdata[1]}</b> on %{customdata[0]}, seed %{customdata[2]}"
    hover += "<br>d_ntp %{x:.3f}, accuracy %{y:.3f}<extra></extra>"
    dots = _dots(run, method, [p.d_ntp for p in some], [p.accuracy for p in some], size=9)
    return dots | {"customdata": texts, "hovertemplate": hover}


def _correlated(run: "Run", n: int) -> str:
    """What the correlations say, pooled and within tasks."""
    found = {c.what: c.rho for c in statistics.correlations(run)}
    pooled, within = found["pooled"], found["pooled, within tasks"]
    if pooled is None:
        return f"{n} points (method, task, seed): too few, or too much alike, for a correlation."
    say = f"{_tendency(pooled)}: Spearman's rho is {_interval(pooled)} over all {n} points (method, task, seed)"
    return f"{say}, and {_interval(within)} on ranks within tasks." if within is not None else f"{say}."


def _tendency(rho: Metric) -> str:
    if rho.high < 0:
        return "Closer to few-shot is more accurate"
    return "Closer to few-shot is less accurate" if rho.low > 0 else "No clear relation"


def tokens(run: "Run") -> Drawing | None:
    """Accuracy against prompt tokens: a small mark for each task, a large one for the mean over tasks. A cached prefix
    is drawn at the tokens that are computed, not read."""
    places = {method: found for method in run.methods if (found := _places(run, method))}
    if not places:
        return None
    aside = _aside(places)
    traces = [t for method, found in places.items() for t in _costing(run, method, found, aside[method])]
    axis = _log_axis([max(x, 1.0) for found in places.values() for _, x, _ in found])
    figure = chart(traces, x={"title": "tokens a query (log axis)"} | axis, y=_share("accuracy"))
    return Drawing("tokens", "What the prompt costs", _read(places), figure)


Places = list[tuple[str, float, float]]


def _places(run: "Run", method: str) -> Places:
    """(task, tokens, accuracy), means over seeds."""
    name = "computed_tokens" if method == "few-shot-cached" else "prompt_tokens"
    out = []
    for task in run.tasks:
        rows = run.rows_of(task, method)
        shares = [row.headline.value for row in rows if row.headline is not None]
        if shares:
            out.append((task, statistics.mean_of(rows, name), float(np.mean(shares))))
    return out


def _costing(run: "Run", method: str, found: Places, aside: float) -> list[dict[str, Any]]:
    """A method's small marks and its large one. Hovering tells the tokens as they are."""
    what = "computed" if method == "few-shot-cached" else "prompt"
    hover = f"<b>%{{customdata[1]}}</b>: %{{customdata[0]}}<br>%{{customdata[2]}} {what} tokens"
    hover += ", accuracy %{y:.3f}<extra></extra>"
    each = _dots(run, method, [x * aside for _, x, _ in found], [y for _, _, y in found], size=7, opacity=0.45)
    each["customdata"] = [[plain(task), plain(method), f"{x:.0f}"] for task, x, _ in found]
    x, y = _mean(found)
    mean = _dots(run, method, [x * aside], [y], size=15)
    mean["customdata"] = [[f"mean over {len(found)} of {len(run.tasks)} tasks", plain(method), f"{x:.0f}"]]
    return [each | {"hovertemplate": hover}, mean | {"hovertemplate": hover}]


def _mean(found: Places) -> tuple[float, float]:
    return float(np.mean([x for _, x, _ in found])), float(np.mean([y for _, _, y in found]))


def _log_axis(values: list[float]) -> dict[str, Any]:
    """A log axis with ticks in plain numbers, 1 2 5 10 20 50 ..., as far as the points go."""
    low, high = np.floor(np.log10(min(values))), np.ceil(np.log10(max(values)))
    powers = np.arange(low, max(high, low + 1) + 1)
    steps = 10.0**powers if len(powers) > 4 else np.outer(10.0**powers, [1, 2, 5]).ravel()
    first = max(int(np.searchsorted(steps, min(values), side="right")) - 1, 0)
    shown = [float(s) for s in steps[first : int(np.searchsorted(steps, max(values))) + 1]]
    room = [float(np.log10(min(shown[0], *values))) - 0.12, float(np.log10(max(shown[-1], *values))) + 0.12]
    return {"type": "log", "tickvals": shown, "ticktext": [f"{s:,.6g}" for s in shown], "range": room}


def _aside(places: dict[str, Places]) -> dict[str, float]:
    """A factor for each method's tokens: marks of methods with as many tokens stand side by side."""
    near: dict[str, list[str]] = {}
    for method, found in places.items():
        near.setdefault(f"{_mean(found)[0]:.2g}", []).append(method)
    return {m: 1.045 ** (i - (len(group) - 1) / 2) for group in near.values() for i, m in enumerate(group)}


def _read(places: dict[str, Places]) -> str:
    means = {method: _mean(found)[0] for method, found in places.items()}
    others = [means[method] for method in means if not method.startswith("few-shot")]
    parts = []
    if "few-shot" in means:
        parts.append(f"few-shot reads {means['few-shot']:.0f} on average")
    if "few-shot-cached" in means:
        parts.append(f"behind a cached prefix it computes {means['few-shot-cached']:.0f}")
    if others:
        low, high = round(min(others)), round(max(others))
        parts.append(f"the other methods read {low}" if low == high else f"the other methods read {low} to {high}")
    marked = "Small marks are tasks, large ones means; marks at one place are spread sideways."
    return f"Tokens a query: {'; '.join(parts)}. {marked}"


# --- tasks -----------------------------------------------------------------------------------------------------------


def bars(run: "Run", task: str, number: int = 0) -> Drawing:
    """One task's accuracies with 95 % intervals by item; a dotted line at few-shot's."""
    found = {method: run.hits(task, method) for method in run.scored}
    means = {method: statistics.by_item(hits) for method, hits in found.items() if hits.size}
    traces = [t for method in run.scored for t in _bar(run, method, means.get(method))]
    x = _share("") | {"range": [0, 1.24]}
    figure = chart(traces, x=x, y=_named(run.scored), height=56 + 26 * len(run.scored))
    if "few-shot" in means:
        at = means["few-shot"].value
        figure.add_shape(type="line", x0=at, x1=at, y0=0, y1=1, yref="paper", line={"width": 1.5, "dash": "dot"})
    return Drawing(f"bars-{number}", task, _best(task, means), figure)


def _bar(run: "Run", method: str, mean: Metric | None) -> list[dict[str, Any]]:
    """A method's bar with its interval, and the number beside it."""
    place, meta = run.scored.index(method), run.methods.index(method)
    text: dict[str, Any] = {"type": "scatter", "mode": "text", "y": [place], "hoverinfo": "skip"}
    text |= {"meta": meta, "cliponaxis": False, "textposition": "middle right"}
    if mean is None:
        return [text | {"x": [0], "text": ["failed"]}]
    hover = "<b>%{customdata}</b> " + f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]<extra></extra>"
    error = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 4}
    error |= {"array": [mean.high - mean.value], "arrayminus": [mean.value - mean.low]}
    bar = {"type": "bar", "orientation": "h", "x": [mean.value], "y": [place], "width": 0.66, "meta": meta}
    bar |= {"marker": _filled(run, method), "error_x": error}
    bar |= {"customdata": [plain(method)], "hovertemplate": hover}
    return [bar, text | {"x": [1.04], "text": [f"{mean.value:.2f}"]}]


def _best(task: str, means: dict[str, Metric]) -> str:
    if not means:
        return f"No method was scored on {task}."
    top = max(metric.value for metric in means.values())
    best = [method for method, metric in means.items() if metric.value == top]
    rest = [f"{name} {means[name].value:.2f}" for name in ("few-shot", "zero-shot") if name in {*means} - {*best}]
    return ", ".join([f"Highest: {joined(best)} with {_interval(means[best[0]])}", *rest]) + "."


def _interval(metric: Metric) -> str:
    return f"{metric.value:.2f} [{metric.low:.2f}, {metric.high:.2f}]"


def layers(run: "Run", task: str, number: int = 0) -> Drawing | None:
    """One task's accuracy on dev by layer, mean over seeds, where a method tried every layer."""
    some = [method for method in run.methods if method in LAYERED]
    curves = {method: curve for method in some if (curve := _curve(run.rows_of(task, method)))}
    if not curves:
        return None
    traces = [t for method, curve in curves.items() for t in _line(run, method, curve)]
    figure = chart(traces, x=_layer_axis(curves), y=_share("accuracy on dev"), height=250)
    return Drawing(f"layers-{number}", task, _peaks(curves), figure)


def _layer_axis(curves: dict[str, list[float]]) -> dict[str, Any]:
    depth = max(len(curve) - _heads(method) for method, curve in curves.items())
    ticks: dict[float, str] = {layer: str(layer) for layer in range(0, depth, -(-depth // 8))}
    if any(_heads(method) for method in curves):
        ticks[depth + 0.5] = "head"
    return {"title": "layer", "tickvals": list(ticks), "ticktext": list(ticks.values()), "zeroline": False}


def _curve(rows: list[Row]) -> list[float] | None:
    """Dev accuracy by layer, mean over seeds. None where the layer was given, not chosen: one place is no curve."""
    lists = [row.found["dev_accuracy"] for row in rows if isinstance(row.found.get("dev_accuracy"), list)]
    lists = [one for one in lists if len(one) > 1 and len(one) == len(lists[0])]
    return [float(v) for v in np.mean(np.array(lists, dtype=float), axis=0)] if lists else None


def _heads(method: str) -> int:
    """How many places at the end of a curve are no layer."""
    return 1 if method == "mean-difference" else 0


def _line(run: "Run", method: str, curve: list[float]) -> list[dict[str, Any]]:
    depth = len(curve) - _heads(method)
    hover = "<b>%{customdata}</b>, layer %{x}: %{y:.3f}<extra></extra>"
    line = _dots(run, method, list(range(depth)), curve[:depth], size=7)
    line |= {"mode": "lines+markers", "customdata": [plain(method)] * depth, "hovertemplate": hover}
    line["line"] = {"color": marks(run.methods)[method].colour, "width": 2}
    if depth == len(curve):
        return [line]
    last = _dots(run, method, [depth + 0.5], [curve[-1]], size=7)
    hover = "<b>%{customdata}</b>, the head's input: %{y:.3f}<extra></extra>"
    return [line, last | {"customdata": [plain(method)], "hovertemplate": hover}]


def _peaks(curves: dict[str, list[float]]) -> str:
    parts = []
    for method, curve in curves.items():
        best = int(np.argmax(curve))
        place = "at the head's input" if best == len(curve) - _heads(method) else f"at layer {best}"
        parts.append(f"{method} {place} ({curve[best]:.2f})")
    return f"Highest on dev: {', '.join(parts)}."


# --- costs -----------------------------------------------------------------------------------------------------------


COSTS = {"fit_seconds": ("Seconds to fit", "s"), "fit_labels": ("Gold labels read", "labels")}


def cost(run: "Run", name: str) -> Drawing | None:
    """What a fit takes, one of `COSTS`: means over tasks and seeds."""
    title, unit = COSTS[name]
    rows = {method: [row for row in run.rows if row.method == method] for method in run.scored}
    means = {method: statistics.mean_of(some, name) for method, some in rows.items()}
    if not means:
        return None
    traces = [_cost_bar(run, place, method, mean, unit) for place, (method, mean) in enumerate(means.items())]
    x = {"title": unit, "range": [0, 1.2 * (max(means.values()) or 1.0)], "nticks": 5}
    figure = chart(traces, x=x, y=_named(list(means)), height=80 + 26 * len(means))
    return Drawing(name.replace("_", "-"), title, _spent(means, unit), figure)


def _cost_bar(run: "Run", place: int, method: str, mean: float, unit: str) -> dict[str, Any]:
    said = _amount(mean)
    bar = {"type": "bar", "orientation": "h", "x": [mean], "y": [place], "width": 0.66, "text": [said]}
    bar |= {"textposition": "outside", "cliponaxis": False, "customdata": [plain(method)]}
    bar |= {"marker": _filled(run, method), "meta": run.methods.index(method)}
    return bar | {"hovertemplate": f"<b>%{{customdata}}</b> {said} {unit}<extra></extra>"}


def _spent(means: dict[str, float], unit: str) -> str:
    said = {method: _amount(mean) for method, mean in means.items()}
    top = _amount(max(means.values()))
    if top == "0":
        return f"No fit takes any {unit}."
    most, none = ([method for method in said if said[method] == amount] for amount in (top, "0"))
    return f"Most: {joined(most)} with {top} {unit} a fit on average{f'; none: {joined(none)}' if none else ''}."


# --- parts -----------------------------------------------------------------------------------------------------------


def _short(text: str) -> str:
    return plain(text if len(text) <= MANY else text[: MANY - 1] + "…")


def _amount(number: float) -> str:
    """Two digits or all whole ones: 0, 0.04, 1.5, 67, 1,796."""
    return f"{number:,.0f}" if number >= 10 or number < 0.005 else f"{number:.2g}"


def joined(names: list[str]) -> str:
    """Names as a sentence lists them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _dots(run: "Run", method: str, x: list[Any], y: list[float], *, size: int, opacity: float = 0.9) -> dict[str, Any]:
    """A scatter of one method. `meta` is the method's number, by which the page shows and hides it."""
    mark = marks(run.methods)[method]
    marker = {"color": mark.colour, "symbol": mark.symbol, "size": size, "opacity": opacity}
    marker["line"] = {"width": 2 if mark.symbol.endswith("-open") else 0}
    trace = {"type": "scatter", "mode": "markers", "x": x, "y": y, "marker": marker, "cliponaxis": False}
    return trace | {"meta": run.methods.index(method)}


def _filled(run: "Run", method: str) -> dict[str, Any]:
    """A bar in the method's colour; only its outline where its mark is open."""
    mark = marks(run.methods)[method]
    outline = {"color": mark.colour, "width": 2}
    return {"color": "rgba(0,0,0,0)", "line": outline} if mark.symbol.endswith("-open") else {"color": mark.colour}


def _named(methods: list[str]) -> dict[str, Any]:
    """An axis with the methods' names, the first on top."""
    axis = {"tickvals": list(range(len(methods))), "ticktext": [_short(method) for method in methods]}
    return axis | {"range": [len(methods) - 0.4, -0.6], "showgrid": False, "zeroline": False}


def _share(title: str) -> dict[str, Any]:
    """An axis from 0 to 1, with room for the marks at its ends."""
    return {"title": title, "range": [-0.04, 1.04], "tickvals": [0, 0.2, 0.4, 0.6, 0.8, 1], "zeroline": False}
