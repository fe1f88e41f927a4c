"""Results as plain rows: metrics with intervals, costs, and the examples they were computed from. No torch here."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taskvec.errors import InputError, UnknownName

SHUFFLED, OTHER_TASK, TASK_MEAN, BIAS = "-shuffled", "-other-task", "-task-mean", "-bias"
"""They end the name of a query-dependent method's control: vectors of other queries of the task, of another task's
queries, the mean over the task's training queries, and what is written whatever the query."""
CONTROL_SUFFIXES = (SHUFFLED, OTHER_TASK, TASK_MEAN, BIAS)
Values = NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class Metric:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Row:
    """One method on one task with one seed: the fields of the table in docs/architecture.md ("What a score says").

    A metric is None where it does not apply (no labels, no few-shot reference, no item where few-shot is wrong).
    """

    method: str
    task: str
    seed: int
    n: int
    source: str | None = None
    matched: str | None = None
    accuracy: Metric | None = None
    first_token_accuracy: Metric | None = None
    label_accuracy: Metric | None = None
    macro_f1: Metric | None = None
    in_label_rate: Metric | None = None
    d_ntp: Metric | None = None
    d_ntp_support: int | None = None
    d_ntp_full: Metric | None = None
    label_logit_error: Metric | None = None
    hidden_error: Metric | None = None
    d_ntp_bound: float | None = None
    agreement: Metric | None = None
    when_icl_wrong: Metric | None = None
    fit_labels: int = 0
    fit_queries: int = 0
    fit_tokens: int = 0
    fit_seconds: float = 0.0
    prompt_tokens: float = 0.0
    computed_tokens: float = 0.0
    query_ms: float = 0.0
    dtype: str = ""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> Metric | None:
        """The metric methods are chosen by: label accuracy where there are labels, else accuracy."""
        return self.label_accuracy if self.label_accuracy is not None else self.accuracy

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Row":
        """What `to_dict` gave."""
        parts: dict[str, Any] = {
            name: Metric(**v) if name in _METRICS and v is not None else v for name, v in plain.items()
        }
        return cls(**parts)


_METRICS = {f.name for f in fields(Row) if f.type == Metric | None}


@dataclass(frozen=True)
class Verdict:
    """Does the chosen method pay? `kept` = (vector - zero-shot) / (few-shot - zero-shot); None where that has no
    meaning."""

    chosen: str
    kept: Metric | None
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Results:
    """Rows, the per-example records behind them, and verdicts. Results add up with `+`."""

    rows: tuple[Row, ...]
    examples: tuple[dict[str, Any], ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    def __add__(self, other: "Results") -> "Results":
        return Results(self.rows + other.rows, self.examples + other.examples, self.verdicts + other.verdicts)

    def __getitem__(self, method: str) -> Row:
        """The first row of that method. Raises `UnknownName` where there is none."""
        for row in self.rows:
            if row.method == method:
                return row
        raise UnknownName("a method with a row", repr(method), f"the rows are of {[row.method for row in self.rows]}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: `rows` and `verdicts`."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
        }

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def write_examples(self, path: str | Path) -> None:
        """The per-example records as parquet, so that any figure can be recomputed. Refuses to overwrite."""
        import polars as pl

        if Path(path).exists():
            raise InputError("a new parquet file", f"{path} exists", "name another file")
        pl.DataFrame(list(self.examples), infer_schema_length=None).write_parquet(path)

    def __str__(self) -> str:
        return "\n".join(["", *_text_table(table_cells(self)), *("\n" + v.sentence for v in self.verdicts)]).strip("\n")


# --- intervals -------------------------------------------------------------------------------------------------------


def proportion(hits: Sequence[bool] | NDArray[np.bool_]) -> Metric | None:
    """The share of hits, with Wilson's 95 % interval (it keeps its coverage near 0 and 1). None for no items."""
    from scipy.stats import binomtest

    if len(hits) == 0:
        return None
    count = int(np.sum(hits))
    interval = binomtest(count, len(hits)).proportion_ci(0.95, method="wilson")
    return Metric(count / len(hits), float(interval.low), float(interval.high))


def mean(values: Values) -> Metric | None:
    """The mean over items with a percentile bootstrap interval. None for no items."""
    if len(values) == 0:
        return None
    return bootstrap(lambda picked: values[picked].mean(axis=-1), len(values))


def bootstrap(statistic: Callable[[NDArray[np.int64]], Any], n: int) -> Metric:
    """A statistic of n paired items with a percentile bootstrap interval.

    `statistic` takes item numbers (..., n) and reduces the last axis. Resamples where it is not finite are left out.
    The resampling has a fixed seed of its own: the same items give the same interval.
    """
    value = float(statistic(np.arange(n)))
    # not scipy.stats.bootstrap: it draws the same, but warns of BCa where a resample is not finite, and refuses n = 1
    drawn = np.asarray(statistic(np.random.default_rng(0).integers(0, n, (RESAMPLES, n))), dtype=float)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
    return Metric(value, float(low), float(high))


def macro_f1(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> Metric:
    """F1 averaged over the labels that occur (in gold or predictions), with a bootstrap interval."""
    g = np.array([[label == item for label in labels] for item in gold])
    p = np.array([[label == item for label in labels] for item in predicted])

    def statistic(picked: NDArray[np.int64]) -> Values:
        hits, total = (g & p)[picked].sum(axis=-2), g[picked].sum(axis=-2) + p[picked].sum(axis=-2)
        f1 = np.divide(2 * hits, total, out=np.zeros(total.shape), where=total > 0)
        return np.asarray(f1.sum(axis=-1) / (total > 0).sum(axis=-1))

    return bootstrap(statistic, len(gold))


def share_kept(zero: Values, vector: Values, few: Values) -> Metric | None:
    """(vector - zero-shot) / (few-shot - zero-shot) over the same items, with a paired bootstrap interval.

    None where few-shot is not above zero-shot: there is nothing to keep.
    """
    if few.mean() <= zero.mean():
        return None

    def statistic(picked: NDArray[np.int64]) -> Values:
        gain, whole = ((x[picked].mean(axis=-1) - zero[picked].mean(axis=-1)) for x in (vector, few))
        return np.asarray(np.divide(gain, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0))

    return bootstrap(statistic, len(zero))


# --- tables ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "method": "method",
    "accuracy": "accuracy",
    "first_token_accuracy": "first token",
    "label_accuracy": "label acc.",
    "d_ntp": "d_ntp",
    "d_ntp_full": "d_ntp full",
    "agreement": "agreement",
    "prompt_tokens": "prompt tokens",
    "computed_tokens": "computed",
    "query_ms": "ms/query",
    "fit_seconds": "fit s",
}


def table_cells(results: Results) -> list[list[str]]:
    """Header and body of the table people read: one line per (task, method), averaged over seeds."""
    rows = average_seeds(results)
    shown = [key for key in COLUMNS if any(getattr(row, key) is not None for row in rows)]
    tasks = len({row.task for row in rows}) > 1
    header = (["task"] if tasks else []) + [COLUMNS[key] for key in shown]
    return [header] + [([row.task] if tasks else []) + [_cell(getattr(row, key)) for key in shown] for row in rows]


def average_seeds(results: Results) -> list[Row]:
    """One row per (task, method). An interval is the mean of the seeds' intervals: seeds share the test items, so more
    seeds do not make it narrower."""
    groups: dict[tuple[str, str, str | None], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row.task, row.method, row.source), []).append(row)
    return [_averaged(rows) for rows in groups.values()]


def _averaged(rows: list[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]
    columns = {f.name: [getattr(row, f.name) for row in rows if getattr(row, f.name) is not None] for f in fields(Row)}
    means: dict[str, Any] = {
        name: _mean_of(values) for name, values in columns.items() if name not in ("seed", "n") and values
    }
    return replace(rows[0], **{name: value for name, value in means.items() if value is not None})


def _mean_of(values: list[Any]) -> Any:
    """The mean of metrics or numbers; None for anything else."""
    if isinstance(values[0], Metric):
        return Metric(*(float(np.mean([getattr(v, part) for v in values])) for part in ("value", "low", "high")))
    if not isinstance(values[0], int | float):
        return None
    return round(float(np.mean(values))) if isinstance(values[0], int) else float(np.mean(values))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Metric):
        return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _text_table(cells: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
