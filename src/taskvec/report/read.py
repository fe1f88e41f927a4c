"""A run's folder, read: rows, failures, ledgers, per-example records.

Shapes: s seeds, n test items.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from taskvec.errors import InputError
from taskvec.results import Metric, Results, Row, Values, Verdict
from taskvec.results import mean as mean_over


@dataclass(frozen=True)
class Failure:
    """A cell that failed, and why."""

    task: str
    method: str
    seed: int
    error: str


@dataclass(frozen=True, eq=False)
class Run:
    """Everything a report is made from. `examples` has one record per (method, task, seed, test item)."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    ledger: tuple[dict[str, Any], ...]
    examples: pl.DataFrame

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the suite's order."""
        return list(self.config["tasks"])

    @cached_property
    def methods(self) -> list[str]:
        """The methods that have rows: controls first, then as asked for."""
        order = ["zero-shot", "few-shot", "few-shot-cached", "mean-difference", "random"]
        found = dict.fromkeys(row.method for row in self.rows)
        return sorted(found, key=lambda name: order.index(name) if name in order else len(order))

    @property
    def scored(self) -> list[str]:
        """The methods whose answers were scored: all but the row that only says what a cached prefix costs."""
        return [name for name in self.methods if name != "few-shot-cached"]

    def rows_of(self, task: str, method: str) -> list[Row]:
        """The rows of all seeds."""
        return [row for row in self.rows if (row.task, row.method) == (task, method)]

    def hits(self, task: str, method: str) -> Values:
        """1 where the headline prediction is right, else 0: (s, n), seeds and items in order."""
        some = self.examples.filter((pl.col("task") == task) & (pl.col("method") == method))
        labelled = some["label_correct"].null_count() == 0
        column = "label_correct" if labelled and len(some) else "correct"
        seeds = some["seed"].unique(maintain_order=True).to_list()
        return np.array([some.filter(pl.col("seed") == seed)[column].to_numpy() for seed in seeds], dtype=float)

    def hits_by_seed(self, task: str, method: str) -> dict[int, Values]:
        """The same, a seed at a time: (n,)."""
        seeds = self.examples.filter((pl.col("task") == task) & (pl.col("method") == method))["seed"]
        return dict(zip(seeds.unique(maintain_order=True).to_list(), self.hits(task, method), strict=True))

    def d_ntp(self, task: str, method: str) -> Metric | None:
        """The mean d_ntp over seeds, with an interval by item; None where it is not defined."""
        if not {"d_ntp", "input"} <= set(self.examples.columns):
            return None
        some = self.examples.filter((pl.col("task") == task) & (pl.col("method") == method))
        by_item = some.group_by("input", maintain_order=True).agg(pl.col("d_ntp").mean())["d_ntp"]
        return None if by_item.null_count() or not len(by_item) else mean_over(by_item.to_numpy())

    @cached_property
    def d_ntp_where_wrong(self) -> dict[tuple[str, str, int], float]:
        """The mean d_ntp of the items where few-shot is wrong, by (task, method, seed)."""
        if not {"d_ntp", "icl_wrong"} <= set(self.examples.columns):
            return {}
        wrong = self.examples.filter(pl.col("icl_wrong") & pl.col("d_ntp").is_not_null())
        means = wrong.group_by("task", "method", "seed").agg(pl.col("d_ntp").mean())
        return {(row["task"], row["method"], row["seed"]): row["d_ntp"] for row in means.to_dicts()}

    def results(self) -> Results:
        """The rows, with a verdict a task."""
        from taskvec.report.statistics import verdicts

        return Results(self.rows, (), tuple(verdicts(self)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: rows, verdicts, failed cells, ledger, paired tests, correlations."""
        from taskvec.report.statistics import correlations, paired_tests

        failed = [vars(failure) for failure in self.failures]
        tests, found = ([asdict(one) for one in some] for some in (paired_tests(self), correlations(self)))
        said = {"failed": failed, "ledger": list(self.ledger), "tests": tests, "correlations": found}
        return {**self.results().to_dict(), **said}

    def verdicts(self) -> tuple[Verdict, ...]:
        """A verdict a task."""
        return self.results().verdicts


def read_run(path: str | Path) -> Run:
    """Read a run's folder, finished or not. Raises `InputError` where it is none."""
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise InputError("a run's folder with config.yaml", f"none at {path}", "check the path")
    config = yaml.safe_load((path / "config.yaml").read_text("utf-8"))
    environment = json.loads((path / "env.json").read_text("utf-8"))
    cells = sorted(_cells(path), key=_place(config))
    rows = tuple(Row.from_dict(row) for cell in cells for row in cell["rows"])
    failures = tuple(Failure(*_name(cell), cell["error"]) for cell in cells if cell["error"])
    keys = ("task", "method", "seed")
    ledger = tuple(dict(zip(keys, _name(cell), strict=True)) | cell["ledger"] for cell in cells)
    return Run(path, config, environment, rows, failures, ledger, _examples(path, cells))


def _cells(path: Path) -> Iterable[dict[str, Any]]:
    for file in (path / "cells").glob("*.json"):
        yield json.loads(file.read_text("utf-8"))


def _name(cell: dict[str, Any]) -> tuple[str, str, int]:
    return cell["cell"]["task"], cell["cell"]["method"], cell["cell"]["seed"]


def _place(config: dict[str, Any]) -> Any:
    tasks, methods = list(config["tasks"]), list(config["methods"])
    return lambda cell: (tasks.index(cell["cell"]["task"]), cell["cell"]["seed"], methods.index(cell["cell"]["method"]))


def _examples(path: Path, cells: Iterable[dict[str, Any]]) -> pl.DataFrame:
    files = [path / "cells" / f"{cell['cell']['key']}.parquet" for cell in cells if not cell["error"]]
    frames = [pl.read_parquet(file) for file in files if file.is_file()]
    if not frames:
        return pl.DataFrame(schema={"method": pl.String, "task": pl.String, "seed": pl.Int64})
    return pl.concat(frames, how="diagonal_relaxed")
