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
        refuted = f", {verdicts.count(NO)} refuted" if NO in verdicts else ""
        if YES in verdicts:
            return Found(measured, f"{YES} in part ({verdicts.count(YES)} of {len(found)}{refuted})")
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
MODELS = (MODEL, "gemma3-270m")


def seen(says: str, gap: Callable[[Cell], float], least: float = 0.0) -> Callable[[], Found]:
    """A number of docs/analysis, the mean over models within each task, then over tasks: reproduced where its interval
    is above `least`, not where it is below."""

    def find() -> Found:
        gaps = {(model, task): gap((model, task)) for model in MODELS for task in analysed(model)}
        by_task, by_model = (
            {one: float(np.mean([v for cell, v in gaps.items() if cell[at] == one])) for one in dict.fromkeys(names)}
            for at, names in ((1, [task for _, task in gaps]), (0, [model for model, _ in gaps]))
        )
        if len(by_task) < 2:
            return Found("not measured yet", NOT_HERE)
        found = over(list(by_task.values()))
        text = f"{says}: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}], {len(by_task)} tasks"
        own = (f"{model} {mean:.2f}" for model, mean in by_model.items())
        verdict = YES if found.low > least else NO if found.high < least else UNSURE
        return Found(f"{text} ({', '.join(own)}); asked for: above {least:g}", verdict)

    return find


def number(cell: Cell, name: str, **want: object) -> float:
    """The number in one row of an analysis (tables.row_of)."""
    return row_of(*cell, name, want)[0]


def _path(cell: Cell, way: str, vector: str = "vector") -> float:
    return number(cell, "early/ov", part="variants", way=way, vector=vector)


def by_ov(cell: Cell) -> float:
    """Accuracy by the OV path alone, less by random vectors'."""
    return _path(cell, "ov") - _path(cell, "ov", "random vector")


def needs_ov(cell: Cell) -> float:
    """What taking the OV path out costs, beyond taking random vectors' paths out."""
    return _path(cell, "without ov", "random vector") - _path(cell, "without ov")


def by_jacobian(cell: Cell) -> float:
    """Accuracy by the Jacobian's image at the last layer, less by a random vector's image."""
    own, null = (
        number(cell, "early/propagation", measure="accuracy", of=f"J {of} at the last layer") for of in ("v", "random")
    )
    return own - null


def lost(cell: Cell) -> float:
    """Accuracy lost without the key heads, beyond without heads of the same layers."""
    key, random = "key heads", "random heads of the same layers"
    out, null = (number(cell, "early/heads", way="vector", heads=heads, percent=10) for heads in (key, random))
    return null - out


def turned(cell: Cell) -> float:
    """What rotation adds to the share in the outputs' span, beyond what it adds to random vectors'."""
    own, null = (
        number(cell, "early/rotation", measure="alignment of Qv", of=of, own=True)
        - number(cell, "early/rotation", measure="alignment of v", of=of, own=True)
        for of in ("the vector", "random vectors")
    )
    return own - null


def late_cosine(cell: Cell) -> float:
    """cos(v, Qv) at the late vector's layer: 1 where a vector is not rotated."""
    return number(cell, "late/rotation", measure="cos(v, Qv)", of="the vector", own=True)
