"""What the rows say: tables, and the answer in words.

Over seeds a cell is the mean; its interval reaches from the lowest to the highest end of the seeds' 95 % intervals by
function.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from taskvec.regress.rows import EXAMPLES, LENGTH, VANILLA, YARDSTICK, RegressRow
from taskvec.report.statistics import spearman
from taskvec.report.tables import Table
from taskvec.results import Metric

Rows = Sequence[RegressRow]
FIDELITY = ("no-examples", "other-examples")
HALF = 0.5
SHIFTS = ("skewed", "scaled", "orthogonal", "noise", "weights")


def over_seeds(found: Iterable[Metric | None]) -> Metric | None:
    """The mean, and the widest interval."""
    there = [one for one in found if one is not None]
    if not there:
        return None
    mean = float(np.mean([one.value for one in there]))
    return Metric(mean, min(one.low for one in there), max(one.high for one in there))


def pick(rows: Rows, **wanted: object) -> list[RegressRow]:
    """The rows with these values."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def all_tables(rows: Rows) -> list[Table]:
    """Every table that has rows."""
    out = list[Table]()
    for learner in _unique(row.learner for row in rows if row.test != "text"):
        some = pick(rows, learner=learner)
        out += [fidelity_table(some), length_table(some), shift_table(some), alignment_table(some)]
    out.append(text_table(rows))
    return [table for table in out if table.rows]


def fidelity_table(rows: Rows) -> Table:
    """Fidelity and errors where nothing, or another function's examples, stand before the query."""
    lines = []
    for name, some in _named(row for row in rows if row.test in FIDELITY):
        cells = list[str]()
        for test in FIDELITY:
            here = pick(some, test=test)
            cells += [_said(over_seeds(row.fidelity for row in here)), _said(over_seeds(row.mse for row in here))]
        lines.append((name, *cells))
    where = _about(rows)
    caption = (
        f"{where}: task fidelity (at most 0: no task, 1: as good as the examples) and mean squared error, behind no "
        "examples and behind other functions'. Controls are named after their method."
    )
    header = ("vector", "fidelity, no examples", "mse", "fidelity, others' examples", "mse")
    return Table("fidelity", caption, header, tuple(lines))


def length_table(rows: Rows) -> Table:
    """Error by the number of examples."""
    some = pick(rows, test=LENGTH)
    lengths = sorted({row.examples for row in some})
    lines = [
        (name, *(_said(over_seeds(row.mse for row in pick(own, examples=k))) for k in lengths))
        for name, own in _named(some)
    ]
    caption = f"{_about(rows)}: mean squared error by the number of examples."
    if {row.method for row in some if row.control != YARDSTICK} > {VANILLA}:
        caption += " Methods are fitted once, beyond training."
    return Table("length", caption, ("vector", *map(str, lengths)), tuple(lines))


def shift_table(rows: Rows) -> Table:
    """Error under shifts."""
    some = [row for row in rows if row.test in SHIFTS]
    tests = [test for test in SHIFTS if pick(some, test=test)]
    lines = [
        (name, *(_said(over_seeds(row.mse for row in pick(own, test=test))) for test in tests))
        for name, own in _named(some)
    ]
    k = max((row.examples for row in some), default=0)
    caption = f"{_about(rows)}: mean squared error under shifts, behind {k} examples."
    return Table("shifts", caption, ("vector", *tests), tuple(lines))


def alignment_table(rows: Rows) -> Table:
    """How far last states are from those at the best length, beside the error."""
    lengths = sorted({row.examples for row in rows if row.alignment is not None})
    some = [row for row in rows if row.alignment is not None and lengths and row.examples == lengths[-1]]
    parts = {"means": "mean", "covariances": "covariance", "mmd": "mmd", "p": "p"}
    lines = []
    for name, own in _named(some):
        means = [np.mean([getattr(row.alignment, field) for row in own]) for field in parts.values()]
        lines.append((name, *(f"{value:.3f}" for value in means), _said(over_seeds(row.mse for row in own))))
    k = lengths[-1] if lengths else 0
    caption = (
        f"{_about(rows)}: last states behind {k} examples, and those of the bare model at its best length: distance of "
        f"means and of covariances (in units of the spread), two-sample statistic and its p value. {_predicts(some)}"
    )
    return Table("alignment", caption, ("vector", *parts, "mse"), tuple(lines))


def text_table(rows: Rows) -> Table:
    """Numbers as text."""
    some = pick(rows, test="text")
    kinds = _unique(row.function for row in some)
    lines = []
    for name, own in _named(some):
        cells = list[str]()
        for kind in kinds:
            here = pick(own, function=kind)
            unread = sum(row.unparsed for row in here)
            cells += [_said(over_seeds(row.mse for row in here)), f"{unread} of {sum(row.n for row in here)}"]
        lines.append((name, *cells))
    model = some[0].learner if some else ""
    caption = f"{model}, functions of numbers as text: mean squared error, and answers that were no number."
    header = ("method", *(text for kind in kinds for text in (f"{kind}: mse", "no number")))
    return Table("text", caption, header, tuple(lines))


def answer(rows: Rows) -> tuple[str, tuple[str, ...]]:
    """Does a vector carry the task when the task is a function? (the sentence, what stands behind it)."""
    known = _carried(rows)
    kinds = {
        "carried the function": [name for name, metric in known.items() if metric.low > HALF],
        "carried some of it": [name for name, metric in known.items() if 0 < metric.low <= HALF],
        "did not, or not everywhere": [name for name, metric in known.items() if metric.low <= 0],
    }
    said = "; ".join(f"{', '.join(names)} {verb}" for verb, names in kinds.items() if names)
    lead = f"Does a vector carry the function? {said}." if said else "No task fidelity was measured."
    return lead, tuple(_beyond(rows))


def _carried(rows: Rows) -> dict[str, Metric]:
    """Each method's fidelity over both tests, all learners and seeds: the widest interval."""
    beside = (VANILLA, EXAMPLES, "constant")
    tests = [row for row in rows if row.test in FIDELITY and not row.control and row.method not in beside]
    found = {name: over_seeds(row.fidelity for row in some) for name, some in _named(tests)}
    return {name: metric for name, metric in found.items() if metric is not None}


def _beyond(rows: Rows) -> Iterator[str]:
    """What helps behind the most examples, learner by learner."""
    for learner in _unique(row.learner for row in pick(rows, test=LENGTH)):
        some = pick(rows, learner=learner, test=LENGTH, control="")
        longest = max(row.examples for row in some)
        found = {name: over_seeds(row.mse for row in own) for name, own in _named(pick(some, examples=longest))}
        named = sorted((metric.value, name) for name, metric in found.items() if metric is not None)
        order = ", ".join(f"{name} {value:.2f}" for value, name in named)
        yield f"{learner} behind {longest} examples, errors from the lowest: {order}."


def _predicts(rows: Rows) -> str:
    """Does the distance predict the error, over methods and controls at one number of examples?"""
    said = []
    for what, name in (("means", "mean"), ("covariances", "covariance"), ("mmd", "mmd")):
        pairs = np.array([(getattr(row.alignment, name), row.mse.value) for row in rows if row.mse])
        rho = spearman(pairs, [row.method for row in rows]) if len(pairs) > 2 else None
        if rho is not None:
            said.append(f"{what} {rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]")
    over = "over methods, controls and seeds; whole methods are resampled"
    return f"Rank correlation with the error {over}: {', '.join(said)}." if said else ""


def _about(rows: Rows) -> str:
    seeds = len({row.seed for row in rows})
    return f"{rows[0].learner} ({rows[0].function}, {seeds} seeds)" if rows else ""


def _named(rows: Iterable[RegressRow]) -> list[tuple[str, list[RegressRow]]]:
    """Rows by method and control: a control stands under its method."""
    out: dict[str, list[RegressRow]] = {}
    for row in rows:
        name = row.method if row.control in ("", YARDSTICK) else f"{row.method}, {row.control}"
        out.setdefault(name, []).append(row)
    return list(out.items())


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _said(metric: Metric | None) -> str:
    return "-" if metric is None else f"{metric.value:.2f} [{metric.low:.2f}, {metric.high:.2f}]"
