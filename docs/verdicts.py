"""What docs/claims.py asks of the files in docs/results and docs/analysis, and the rule that makes a verdict of it.

A difference between methods is taken within each (task, seed), averaged over seeds, then over tasks; its interval is a
95 % t interval over tasks, for a claim is about tasks in general.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from tables import MODEL, RESULTS, analysed, read, row_of

from taskvec.report.statistics import over
from taskvec.results import Metric, Row

YES, NO, UNSURE, NOT_HERE = "reproduced", "not reproduced", "undecided here", "not testable here"
STRONG = -0.5
"""Above this, a rank correlation is not called strong."""
MARGIN = 0.05
"""So far below few-shot still counts as reaching it."""


@dataclass(frozen=True)
class Found:
    """What was measured, and what follows."""

    measured: str
    verdict: str


# --- what was measured -----------------------------------------------------------------------------------------------


def suite() -> list[Row]:
    """The classification suite's rows: docs/benchmark."""
    return _rows("benchmark")


def tasks() -> list[Row]:
    """The rows of docs/methods/results.md: every method on four word tasks and two sets."""
    return [row for path in sorted(RESULTS.glob("methods_*.json")) for row in _rows(path.stem)]


def transferred() -> list[Row]:
    """The target's rows of every transfer from the larger model to the smaller one."""
    return [row for path in sorted(RESULTS.glob("transfer_down_*.json")) for row in _rows(path.stem)]


def _rows(name: str) -> list[Row]:
    return [Row.from_dict(row) for row in read(name)["rows"]]


def value(row: Row, key: str) -> float | None:
    """A metric or a plain number; `headline` is label accuracy where there are labels."""
    found: Any = getattr(row, key)
    return found.value if isinstance(found, Metric) else found


def difference(rows: Sequence[Row], a: str, b: Iterable[str], key: str) -> tuple[Metric, int]:
    """(a minus the mean of b, how many tasks)."""
    by = {(row.task, row.seed, row.method): value(row, key) for row in rows}
    others, per_task = list(b), dict[str, list[float]]()
    for (task, seed, method), own in by.items():
        theirs = [by.get((task, seed, other)) for other in others]
        if method == a and own is not None and None not in theirs:
            per_task.setdefault(task, []).append(own - float(np.mean(np.array(theirs, dtype=float))))
    if len(per_task) < 2:
        raise ValueError(f"{a} minus {others} was measured on {len(per_task)} tasks: a claim about tasks takes two")
    return over([float(np.mean(some)) for some in per_task.values()]), len(per_task)


def above(rows: Callable[[], list[Row]], a: str, b: Iterable[str], key: str = "headline") -> Callable[[], Found]:
    """Reproduced where the whole interval of a - b is above 0 (for a distance: below); undecided where it holds 0."""

    def find() -> Found:
        found, n = difference(rows(), a, b, key)
        low, high = (-found.high, -found.low) if key.startswith("d_ntp") else (found.low, found.high)
        named = " and ".join(f"`{other}`" for other in b)
        text = f"`{a}` minus {named}: {difference_said(found, key)}, {n} tasks"
        return Found(text, YES if low > 0 else NO if high < 0 else UNSURE)

    return find


def difference_said(found: Metric, key: str) -> str:
    """In nats for a distance, in points for an accuracy."""
    if key.startswith("d_ntp"):
        return f"{key} {found.value:+.2f} nats [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{100 * found.value:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def both(*finds: Callable[[], Found]) -> Callable[[], Found]:
    """Reproduced where each part is, in part where some are; not where none is and one is known not to be."""

    def find() -> Found:
        found = [part() for part in finds]
        verdicts = [part.verdict for part in found]
        measured = "; ".join(dict.fromkeys(part.measured for part in found))
        if len(set(verdicts)) == 1:
            return Found(measured, verdicts[0])
        if YES in verdicts:
            return Found(measured, f"{YES} in part ({verdicts.count(YES)} of {len(found)})")
        return Found(measured, NO if NO in verdicts else UNSURE)

    return find


def not_here(reason: str) -> Callable[[], Found]:
    """What this scale, this data or this version cannot say."""
    return lambda: Found(reason, NOT_HERE)


def adapted(unseen: bool, b: Sequence[str]) -> Callable[[], Found]:
    """`adaptive` minus others on the tasks of its suite that were trained on, or were not."""
    if not (RESULTS / "adaptive_run.json").is_file():
        return not_here("not measured yet")
    found = read("adaptive_run")
    blank = {field.name: None for field in fields(Row)}
    rows = [Row.from_dict(blank | row) for row in found["rows"] if (row["task"] in found["unseen"]) == unseen]

    def find() -> Found:
        part = above(lambda: rows, "adaptive", b)()
        return Found(f"{'unseen' if unseen else 'seen'} tasks: {part.measured}", part.verdict)

    return find


Cell = tuple[str, str]
"""A model and a task of docs/analysis."""


def seen(says: str, gap: Callable[[Cell], float]) -> Callable[[], Found]:
    """A number of each pair of model and task in docs/analysis, over pairs (as if these were independent): reproduced
    where its interval is above 0, not where it is below."""

    def find() -> Found:
        cells = [(model, task) for model in (MODEL, "gemma3-270m") for task in analysed(model)]
        if len(cells) < 2:
            return Found("not measured yet", NOT_HERE)
        found = over([gap(cell) for cell in cells])
        text = f"{says}: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}], {len(cells)} pairs of model and task"
        verdict = YES if found.low > 0 else NO if found.high < 0 else UNSURE
        return Found(f"{text}; asked for: above 0", verdict)

    return find


def number(cell: Cell, name: str, **want: object) -> float:
    """The number in one row of an analysis (tables.row_of)."""
    return row_of(*cell, name, want)[0]


def _path(cell: Cell, way: str, vector: str = "vector") -> float:
    return number(cell, "early/ov", part="variants", way=way, vector=vector)


def _gain(cell: Cell) -> float:
    """The vector's own, over zero-shot."""
    return _path(cell, "itself") - _path(cell, "zero-shot")


def ov_share(cell: Cell) -> float:
    """What the OV path gives beyond random vectors' paths, of the vector's gain."""
    return (_path(cell, "ov") - _path(cell, "ov", "random vector")) / _gain(cell)


def by_jacobian(cell: Cell) -> float:
    """What the Jacobian's image at the last layer gives beyond random vectors' images, of the vector's gain."""
    own, null = (
        number(cell, "early/propagation", measure="accuracy", of=f"J {of} at the last layer") for of in ("v", "random")
    )
    return (own - null) / _gain(cell)


def lost(cell: Cell) -> float:
    """What is lost without the key heads, beyond heads of the same layers, as a share of the accuracy with all."""
    key, random = "key heads", "random heads of the same layers"
    all_, out, null = (
        number(cell, "early/heads", way="vector", heads=heads, percent=percent)
        for heads, percent in ((key, 0), (key, 10), (random, 10))
    )
    return (null - out) / all_


def beyond(measure: str, name: str) -> Callable[[Cell], float]:
    """The vector's, less random vectors', at the vector's own layer."""

    def gap(cell: Cell) -> float:
        own, random = (number(cell, name, measure=measure, of=of, own=True) for of in ("the vector", "random vectors"))
        return own - random

    return gap
