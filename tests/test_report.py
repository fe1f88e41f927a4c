"""What a run's figures bear: tests and ranks against plain loops and formulas, tables against a parser of their own,
and runs in which there is next to nothing to say."""

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from taskvec.errors import InputError
from taskvec.report import read_run, statistics, tables, write_report
from taskvec.report.read import Failure, Run
from taskvec.report.statistics import Paired, by_item, by_seed, paired_permutation, paired_tests, ranks, spearman
from taskvec.report.tables import Table, all_tables, latex, latex_tables, markdown, markdown_tables, said
from taskvec.results import Metric, Row, Values

Hits = Mapping[str, Mapping[str, Sequence[Sequence[int]]]]
"""1 or 0 by task, method, seed and item."""


ENOUGH = statistics.enough


@pytest.fixture(autouse=True, scope="module")
def _few_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "enough", lambda pairs: 199)
        yield


def floats(values: Any) -> Values:
    return np.asarray(values, dtype=np.float64)


def metric(value: float) -> Metric:
    return Metric(value, value - 0.25, value + 0.25)


def run_of(
    hits: Hits,
    *,
    labelled: Sequence[str] = (),
    chosen: str | Sequence[str] | None = None,
    d_ntp: Mapping[str, float] | None = None,
    failures: Sequence[Failure] = (),
    **values: Any,
) -> Run:
    """A run with these hits; `chosen` is what each seed's random rows are matched to."""
    rows, records, ledger = list[Row](), list[dict[str, Any]](), list[dict[str, Any]]()
    methods = list(dict.fromkeys(method for some in hits.values() for method in some))
    for task, some in hits.items():
        for method, seeds in some.items():
            for seed, items in enumerate(seeds):
                share = metric(sum(items) / len(items))
                near = (d_ntp or {}).get(method)
                row = Row(method, task, seed, len(items), accuracy=share, prompt_tokens=7.0, **values)
                row = replace(row, label_accuracy=share if task in labelled else None)
                row = replace(row, d_ntp=None if near is None else metric(near + seed / 100))
                if method == "random" and chosen is not None:
                    row = replace(row, matched=chosen if isinstance(chosen, str) else chosen[seed])
                names = [method, "few-shot-cached"] if method == "few-shot" else [method]
                rows += [replace(row, method=name) for name in names]
                key = {"method": method, "task": task, "seed": seed}
                ledger.append(key | {"tokens": 10, "passes": 1, "seconds": 1.0 + seed})
                if task in labelled:  # exact answers are all wrong: they must not be what is counted
                    records += [key | {"correct": False, "label_correct": bool(hit)} for hit in items]
                else:
                    records += [key | {"correct": bool(hit), "label_correct": None} for hit in items]
    schema = {"method": pl.String, "task": pl.String, "seed": pl.Int64, "correct": pl.Boolean}
    config: dict[str, Any] = {"suite": {"name": "mine"}, "tasks": {task: {} for task in hits}}
    config["seeds"] = list(range(max((len(seeds) for some in hits.values() for seeds in some.values()), default=1)))
    config["methods"] = {name: {} for name in methods}
    examples = pl.DataFrame(records, schema={**schema, "label_correct": pl.Boolean})
    return Run(Path("nowhere"), config, {}, tuple(rows), tuple(failures), tuple(ledger), examples)


def everything(run: Run) -> None:
    """All there is to say about a run can be said, without a warning, and its tables are rectangles."""
    statistics.paired_tests(run)
    statistics.ranks(run)
    statistics.correlations(run)
    run.verdicts()
    json.dumps(run.to_dict(), allow_nan=False)
    for table in all_tables(run):
        assert table.rows
        assert 0 < table.text <= len(table.header)
        assert {len(row) for row in table.rows} == {len(table.header)}
        assert all(type(cell) is str for row in (table.header, *table.rows) for cell in row)
    markdown_tables(run)
    latex_tables(run)


def coins(n: int, seeds: int, share: float, draw: int) -> list[list[int]]:
    rows = np.random.default_rng(draw).random((seeds, n)) < share
    return [[int(hit) for hit in row] for row in rows]


# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_by_item_is_that_of_the_items_shares() -> None:
    hits = floats(coins(60, 3, 0.7, 1))
    found = by_item(hits)
    assert found.value == pytest.approx(hits.mean())
    other = stats.bootstrap(
        (hits.sum(0) / 3,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(5)
    ).confidence_interval
    assert [found.low, found.high] == pytest.approx([other.low, other.high], abs=0.02)
    again = by_item(np.concatenate([hits, hits, hits]))  # more seeds of the same make no item more certain
    assert [again.low, again.high] == pytest.approx([found.low, found.high])
    assert by_item(floats([[1], [0]])) == Metric(0.5, 0.5, 0.5)


def test_the_interval_of_all_or_none_is_wilsons() -> None:
    """200 of 200 is not certainty: (200 + 1.92) / (200 + 3.84) is its interval's other end's centre."""
    for hits, value in ((np.ones((2, 200)), 1.0), (np.zeros((2, 200)), 0.0)):
        found = by_item(hits)
        assert found.value == value
        assert found.high - found.low == pytest.approx(1.96**2 / (200 + 1.96**2), abs=1e-4)


def test_the_interval_over_tasks_is_students() -> None:
    found = statistics.by_task([floats([[1, 0, 1, 0]]), floats([[1, 1, 1, 1]])])
    assert found.value == pytest.approx(0.75)
    assert found.high == pytest.approx(0.75 + 12.706205 * 0.25)
    one = floats([[1, 0, 1, 0]])
    assert statistics.by_task([one]) == by_item(one)


def test_the_interval_by_seed_is_students_by_hand() -> None:
    found = by_seed(floats([[1, 0, 1, 0, 1, 0, 1, 0, 1, 0], [1] * 6 + [0] * 4, [0] * 3 + [1] * 7]))
    assert found is not None
    # means 0.5, 0.6, 0.7: deviation 0.1, error 0.1 / sqrt(3), t(2) = 4.302653
    assert found.value == pytest.approx(0.6)
    assert [found.low, found.high] == pytest.approx([0.6 - 0.248414, 0.6 + 0.248414], abs=1e-5)
    two = by_seed(floats([[1, 1], [1, 0]]))  # t(1) = 12.706205, error 0.25
    assert two is not None
    assert [two.low, two.high] == pytest.approx([0.75 - 3.176551, 0.75 + 3.176551], abs=1e-5)


def test_one_seed_has_no_interval_and_equal_seeds_none_to_speak_of() -> None:
    assert by_seed(floats([[1, 0, 1]])) is None
    assert by_seed(floats([[1, 0, 1], [0, 1, 1]])) == Metric(2 / 3, 2 / 3, 2 / 3)


# --- paired tests -----------------------------------------------------------------------------------------------------


def brute_force(a: Sequence[float], b: Sequence[float]) -> float:
    """The share of all sign flips whose sum is at least as far from 0."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    far = abs(math.fsum(differences)) - 1e-9
    sums = [abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) for signs in SIGNS[len(a)]]
    return sum(total >= far for total in sums) / len(sums)


SIGNS = {n: list(product((1, -1), repeat=n)) for n in range(1, 8)}
SHARES = st.sampled_from([0.0, 1 / 3, 2 / 3, 1.0])


@example([(1 / 3, 0.0), (1 / 3, 1.0), (2 / 3, 0.0), (0.0, 1 / 3)])  # a sum that is 0 but for rounding
@given(st.integers(2, 7).flatmap(lambda n: st.lists(st.tuples(SHARES, SHARES), min_size=n, max_size=n)))
@settings(deadline=None, max_examples=40)
def test_the_permutation_test_is_brute_force_over_all_sign_flips(pairs: list[tuple[float, float]]) -> None:
    a, b = floats(pairs).T
    difference, p = paired_permutation(a, b)
    assert difference == pytest.approx(a.mean() - b.mean())
    assert p == pytest.approx(brute_force(a.tolist(), b.tolist()))
    assert paired_permutation(b, a) == pytest.approx((-difference, p))


def test_one_item_decides_nothing() -> None:
    assert brute_force([1.0], [0.0]) == 1.0
    assert paired_permutation(floats([1.0]), floats([0.0])) == (1.0, 1.0)
    assert paired_permutation(floats([1.0]), floats([1.0])) == (0.0, 1.0)


def test_with_many_items_it_is_close_to_the_sign_test() -> None:
    # differences of 1 and 0 only: what the signs of 20 differences add up to is a binomial
    for wins, losses in ((14, 6), (17, 3), (10, 10)):
        a = floats([1] * wins + [0] * losses + [1] * 30)
        b = floats([0] * wins + [1] * losses + [1] * 30)
        difference, p = paired_permutation(a, b)
        assert difference == pytest.approx((wins - losses) / 50)
        assert p == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, abs=0.02)
        assert paired_permutation(a, b) == (difference, p)
    least = paired_permutation(np.ones(60), np.zeros(60))[1]
    assert 0 < least <= 0.001  # never 0: what was found is one of the draws


def test_a_method_is_not_told_from_itself() -> None:
    some = floats(coins(30, 1, 0.5, 0)[0])
    assert paired_permutation(some, some.copy()) == (0.0, 1.0)


def by_hand(ps: Sequence[float]) -> list[float]:
    """Benjamini and Yekutieli (2001), theorem 1.3, as adjusted p-values."""
    m = len(ps)
    harmonic = sum(1 / i for i in range(1, m + 1))
    out = list[float]()
    for p in ps:
        ranked = sorted(ps)
        out.append(min(1.0, *(m * harmonic * q / (1 + k) for k, q in enumerate(ranked) if q >= p), 1.0))
    return out


def three_methods(tasks: int = 1) -> Run:
    return run_of({f"t{i}": {m: coins(12, 2, 0.5, 10 * i + j) for j, m in enumerate("abc")} for i in range(tasks)})


def prescribed(monkeypatch: pytest.MonkeyPatch, ps: Sequence[float]) -> None:
    """The tests come out with these p, in order."""
    left = list(ps)
    monkeypatch.setattr(statistics, "paired_permutation", lambda a, b, n: (float((a - b).mean()), left.pop(0)))


def test_correction_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 + 1/2 + 1/3 = 11/6; sorted 0.001, 0.04, 0.5 times 3/1, 3/2, 3/3 of it
    prescribed(monkeypatch, [0.001, 0.5, 0.04])
    found = paired_tests(three_methods())
    assert [(test.a, test.b) for test in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [test.p for test in found] == [0.001, 0.5, 0.04]
    assert [test.corrected for test in found] == pytest.approx([0.0055, 11 / 12, 0.11])
    assert by_hand([0.001, 0.5, 0.04]) == pytest.approx([0.0055, 11 / 12, 0.11])
    assert [test.clear for test in found] == [True, False, False]


@pytest.mark.parametrize("pairs", [1, 3, 36, 91, 190])
def test_one_true_difference_among_all_pairs_can_be_told(pairs: int) -> None:
    """The smallest p there is, 2 / (resamples + 1), stays below ALPHA after the correction."""
    least = 2 / (ENOUGH(pairs) + 1)
    assert by_hand([least, *[1.0] * (pairs - 1)])[0] < statistics.ALPHA


def test_only_seeds_that_both_have_are_compared() -> None:
    """The second seed of b failed: its first is held against a's first alone."""
    run = run_of({"t": {"a": [[1, 1, 0, 0], [0, 0, 0, 0]], "b": [[1, 0, 0, 0]]}})
    (test,) = paired_tests(run)
    assert test.difference == pytest.approx(1 / 4)
    (line,) = (row for row in tables.accuracy(run).rows if row[0] == "b")
    assert line[1].endswith("(1 of 2 seeds)")


def test_differences_are_of_the_items_shares_over_seeds() -> None:
    run = run_of(
        {
            "t": {"a": [[1, 1, 0, 1], [1, 0, 0, 1]], "b": [[0, 1, 0, 0], [0, 0, 0, 1]]},
            "u": {"a": [[1, 1], [1, 1]], "b": [[0, 1], [1, 1]]},
        },
        labelled=["u"],
    )
    (whole,) = paired_tests(run)
    assert whole.difference == pytest.approx((3 / 8 * 4 + 1 / 4 * 2) / 6)
    assert whole.p == pytest.approx(brute_force([1, 0.5, 0, 1, 1, 1], [0, 0.5, 0, 0.5, 0.5, 1]))


def test_clear_is_after_correction() -> None:
    assert Paired("a", "b", 0.1, 0.001, 0.049).clear
    assert not Paired("a", "b", 0.1, 0.001, 0.05).clear


# --- ranks ------------------------------------------------------------------------------------------------------------


def friedman(table: Sequence[Sequence[float]]) -> float:
    """p of Friedman's test, by its formula with the correction for ties."""
    n, k = len(table), len(table[0])
    rows = [[sum(y > x for y in row) + (1 + sum(y == x for y in row)) / 2 for x in row] for row in table]
    sums = [sum(row[j] for row in rows) for j in range(k)]
    statistic = 12 / (n * k * (k + 1)) * sum(total**2 for total in sums) - 3 * n * (k + 1)
    ties = sum(sum(row.count(x) ** 2 - 1 for x in row) for row in table)
    return float(stats.chi2.sf(statistic / (1 - ties / (n * (k**3 - k))), k - 1))


def of_ten(right: int) -> list[int]:
    return [1] * right + [0] * (10 - right)


def run_with(table: Mapping[str, Mapping[str, int]]) -> Run:
    """Each method's right answers out of ten, by task."""
    return run_of({task: {method: [of_ten(k)] for method, k in row.items()} for task, row in table.items()})


def test_ranks_by_hand_with_ties() -> None:
    found = ranks(run_with({"t": {"a": 9, "b": 9, "c": 1}, "u": {"a": 8, "b": 5, "c": 8}}))
    assert found.mean == {"a": 1.5, "b": 2.25, "c": 2.25}
    assert list(found.mean) == ["a", "b", "c"]
    assert found.tasks == 2
    assert found.p == pytest.approx(friedman([[9, 9, 1], [8, 5, 8]]))
    best_last = ranks(run_with({"t": {"a": 1, "b": 2, "c": 3}, "u": {"a": 1, "b": 2, "c": 3}}))
    assert list(best_last.mean.items()) == [("c", 1.0), ("b", 2.0), ("a", 3.0)]
    assert best_last.p == pytest.approx(math.exp(-2))  # chi2 = 4 with 2 degrees of freedom


@given(st.lists(st.lists(st.integers(0, 10), min_size=4, max_size=4), min_size=2, max_size=4))
@settings(deadline=None, max_examples=25)
def test_friedmans_p_is_the_formulas(table: list[list[int]]) -> None:
    found = ranks(run_with({f"t{i}": dict(zip("abcd", row, strict=True)) for i, row in enumerate(table)}))
    assert sum(found.mean.values()) == pytest.approx(10)
    if all(len(set(row)) == 1 for row in table):
        assert found.p is None
    else:
        assert found.p == pytest.approx(friedman(table))


def test_friedman_needs_three_methods_two_tasks_and_a_difference() -> None:
    assert ranks(run_with({"t": {"a": 1, "b": 2}, "u": {"a": 1, "b": 2}})).p is None
    assert ranks(run_with({"t": {"a": 1, "b": 2, "c": 3}})).p is None
    same = ranks(run_with({task: dict.fromkeys("abc", 4) for task in "tu"}))
    assert (same.p, same.mean) == (None, {"a": 2.0, "b": 2.0, "c": 2.0})


def test_a_task_that_a_method_did_not_finish_is_left_out_of_the_ranks() -> None:
    found = ranks(run_with({"t": {"a": 9, "b": 1}, "u": {"a": 1}, "v": {"a": 2, "b": 3}, "w": {"a": 3, "b": 4}}))
    assert found.tasks == 3
    assert found.mean == {"b": pytest.approx(4 / 3), "a": pytest.approx(5 / 3)}
    nothing = ranks(run_with({"t": {"a": 9}, "u": {"b": 1}}))
    assert (nothing.mean, nothing.tasks, nothing.p) == ({}, 0, None)


def test_seeds_that_failed_make_no_tie_into_a_difference() -> None:
    run = run_of({task: {"a": [[1, 1, 0]] * 3, "b": [[1, 0, 1]] * 2, "c": [[0, 1, 1]]} for task in "tu"})
    assert ranks(run).mean == {"a": 2.0, "b": 2.0, "c": 2.0}


# --- correlation ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=20))
@settings(deadline=None, max_examples=40)
def test_spearmans_rho_is_scipys(pairs: list[tuple[int, int]]) -> None:
    found = spearman(floats(pairs))
    if any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        assert found is None
        return
    assert found is not None
    assert found.value == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    assert -1 - 1e-9 <= found.low <= found.high <= 1 + 1e-9


def test_its_interval_is_close_to_scipys_bootstrap() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    found = spearman(np.stack([x, y], axis=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = stats.bootstrap(
            (x, y),
            lambda a, b: stats.spearmanr(a, b).statistic,
            paired=True,
            vectorized=False,
            method="percentile",
            n_resamples=600,
            rng=np.random.default_rng(4),
        ).confidence_interval
    assert found is not None
    assert [found.low, found.high] == pytest.approx([other.low, other.high], abs=0.06)


def test_spearman_of_too_little_is_not_defined() -> None:
    assert spearman(np.zeros((0, 2))) is None
    assert spearman(floats([[1, 2], [2, 1]])) is None
    assert spearman(floats([[1, 2], [2, 2], [3, 2]])) is None
    assert spearman(floats([[1, 2], [2, 3], [3, 4]])) is not None


def row(method: str, task: str, d_ntp: float | None, accuracy: float, wrong: float | None = None, seed: int = 0) -> Row:
    near = None if d_ntp is None else metric(d_ntp)
    icl_wrong = None if wrong is None else metric(wrong)
    return Row(method, task, seed, 10, accuracy=metric(accuracy), d_ntp=near, when_icl_wrong=icl_wrong)


ROWS = (
    row("zero-shot", "t", 2.0, 0.1, 0.0),
    row("few-shot", "t", 0.0, 0.9, 0.0),
    row("few-shot-cached", "t", 0.0, 0.9, 0.0),
    row("linear", "t", 0.5, 0.8, 0.5),
    row("linear", "t", 0.25, 0.85, 0.75, seed=1),
    row("linear-probe", "t", None, 0.6, 0.2),
    row("zero-shot", "u", 9.0, 0.2),
    row("linear", "u", 8.0, 0.3),
    row("learned", "u", 7.0, 0.4),
)


WRONG_ITEMS = pl.DataFrame(
    [
        {"task": "t", "method": method, "seed": seed, "d_ntp": d_ntp, "icl_wrong": wrong}
        for method, seed, far in (("zero-shot", 0, 3.0), ("linear", 0, 1.0), ("linear", 1, 0.5))
        for d_ntp, wrong in ((far - 0.25, True), (far + 0.25, True), (99.0, False))
    ]
)


def test_points_are_all_rows_but_few_shots_and_those_without_d_ntp() -> None:
    run = replace(run_with({"t": {}, "u": {}}), rows=ROWS, examples=WRONG_ITEMS)
    found = statistics.points(run)
    assert [(p.task, p.method, p.seed, p.d_ntp, p.accuracy, p.where_wrong) for p in found] == [
        ("t", "zero-shot", 0, 2.0, 0.1, (3.0, 0.0)),
        ("t", "linear", 0, 0.5, 0.8, (1.0, 0.5)),
        ("t", "linear", 1, 0.25, 0.85, (0.5, 0.75)),
        ("u", "zero-shot", 0, 9.0, 0.2, None),
        ("u", "linear", 0, 8.0, 0.3, None),
        ("u", "learned", 0, 7.0, 0.4, None),
    ]
    labelled = replace(run, rows=(replace(ROWS[0], label_accuracy=metric(0.7)),))
    assert [p.accuracy for p in statistics.points(labelled)] == [0.7]


def test_correlations_within_tasks_pooled_and_where_few_shot_is_wrong() -> None:
    # v has no rows: it has no line
    run = replace(run_with({"v": {}, "t": {}, "u": {}}), rows=ROWS, examples=WRONG_ITEMS)
    found = {c.what: c for c in statistics.correlations(run)}
    assert {what: c.n for what, c in found.items()} == {
        "t": 3,
        "u": 3,
        "pooled": 6,
        "pooled, within tasks": 6,
        "t, where few-shot is wrong": 3,
        "pooled, where few-shot is wrong": 3,
        "pooled, within tasks, where few-shot is wrong": 3,
    }
    rhos = {what: c.rho.value for what, c in found.items() if c.rho is not None}
    assert rhos["t"] == rhos["u"] == rhos["pooled, within tasks"] == pytest.approx(-1)
    assert rhos["pooled"] == pytest.approx(stats.spearmanr([2, 0.5, 0.25, 9, 8, 7], [0.1, 0.8, 0.85, 0.2, 0.3, 0.4])[0])
    assert rhos["pooled, where few-shot is wrong"] == pytest.approx(-1)


def test_ranks_within_tasks_take_away_which_task_is_hard() -> None:
    """Within each task d_ntp says nothing wrong; between them it says everything the wrong way."""
    rows = [row(f"m{i}", "easy", float(i), 0.9 - i / 100) for i in range(5)]
    rows += [row(f"m{i}", "hard", i - 10.0, 0.1 - i / 100) for i in range(3)]
    found = {
        c.what: c.rho for c in statistics.correlations(replace(run_with({"easy": {}, "hard": {}}), rows=tuple(rows)))
    }
    pooled, within = found["pooled"], found["pooled, within tasks"]
    assert pooled is not None
    assert within is not None
    assert pooled.value > 0
    pairs = [((i - 0.5) / 5, (5.5 - i) / 5) for i in range(1, 6)] + [
        ((i - 0.5) / 3, (3.5 - i) / 3) for i in range(1, 4)
    ]
    assert within.value == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    assert within.value < -0.9


def test_ranks_of_small_tasks_are_not_low_ranks() -> None:
    """Tasks of one point, whose d_ntp and accuracy mean nothing, must not make a correlation."""
    rows = [row("m", f"t{i}", float(i), 0.5) for i in range(6)]
    rows += [row(f"m{i}", "big", float(i % 3), 0.5 + (i % 2) / 10) for i in range(6)]
    run = replace(run_with({name: {} for name in (*(f"t{i}" for i in range(6)), "big")}), rows=tuple(rows))
    found = {c.what: c.rho for c in statistics.correlations(run)}
    within, big = found["pooled, within tasks"], found["big"]
    assert within is not None
    assert big is not None
    assert within.value == pytest.approx(big.value, abs=0.05)


def test_whole_tasks_are_resampled_where_points_are_pooled() -> None:
    """Copies of a task's points add no certainty."""
    once = [row(f"m{i}", f"t{t}", i + t / 3, (0.1 * ((i * (t + 2)) % 5))) for t in range(4) for i in range(5)]
    more = [replace(one, seed=seed) for one in once for seed in range(4)]
    widths = list[float]()
    for rows in (once, more):
        run = replace(run_with({f"t{t}": {} for t in range(4)}), rows=tuple(rows))
        (rho,) = (c.rho for c in statistics.correlations(run) if c.what == "pooled")
        assert rho is not None
        widths.append(rho.high - rho.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


# --- verdicts ---------------------------------------------------------------------------------------------------------

FOUR = {"zero-shot": [of_ten(1)] * 2, "few-shot": [of_ten(9)] * 2, "random": [of_ten(1)] * 2}


def test_the_chosen_candidate_is_the_one_most_seeds_chose() -> None:
    table = {"t": {"random": [of_ten(1)] * 3, "a": [of_ten(2)] * 3, "b": [of_ten(3)] * 3}}
    assert statistics.chosen(run_of(table, chosen=["a", "b", "b"]), "t") == "b"
    assert statistics.chosen(run_of(table, chosen=["b", "a", "c"]), "t") == "b"
    assert statistics.chosen(run_of(table, chosen="a"), "t") == "a"
    assert statistics.chosen(run_of(table), "t") is None
    assert statistics.chosen(run_of({"t": {"a": [of_ten(2)]}}), "t") is None


def test_what_is_kept_is_a_share_of_few_shots_gain() -> None:
    run = run_of({"t": {**FOUR, "linear": [of_ten(4), of_ten(6)]}}, chosen="linear")
    kept = statistics.kept(run, "t", "linear")
    assert kept is not None
    assert kept.value == pytest.approx((0.5 - 0.1) / (0.9 - 0.1))
    assert 0 <= kept.low < kept.value < kept.high <= 1
    assert statistics.kept(run, "t", "few-shot") == Metric(1.0, 1.0, 1.0)
    assert statistics.kept(run, "t", "nothing") is None


def test_a_verdict_says_what_is_kept_and_with_how_many_tokens() -> None:
    run = run_of({"t": {**FOUR, "linear": [of_ten(9)] * 2}}, chosen="linear")
    run = replace(run, rows=tuple(replace(r, prompt_tokens=98.6 if "few" in r.method else 7.0) for r in run.rows))
    (verdict,) = statistics.verdicts(run)
    assert verdict.chosen == "linear"
    assert verdict.sentence == (
        "t: linear keeps 100 % of few-shot's gain over zero-shot [100, 100] with 7 instead of 99 prompt tokens."
    )
    assert run.verdicts() == (verdict,)
    assert run.to_dict()["verdicts"] == [asdict(verdict)]


@pytest.mark.parametrize("few", [1, 3])
def test_where_few_shot_is_not_above_zero_shot_it_says_do_not_compile(few: int) -> None:
    hits = {"zero-shot": [of_ten(3)] * 2, "few-shot": [of_ten(few)] * 2, "random": [of_ten(1)] * 2}
    run = run_of({"t": {**hits, "linear": [of_ten(9)] * 2}}, chosen="linear")
    (verdict,) = statistics.verdicts(run)
    assert verdict.kept is None
    assert verdict.sentence == f"t: do not compile: few-shot ({10 * few} %) is not above zero-shot (30 %)."


def test_a_verdict_without_zero_shot_says_so() -> None:
    hits = {name: some for name, some in FOUR.items() if name != "zero-shot"}
    run = run_of({"t": {**hits, "linear": [of_ten(9)] * 2}}, chosen="linear")
    assert [v.sentence for v in statistics.verdicts(run)] == ["t: no verdict: zero-shot or few-shot failed."]


# --- next to nothing --------------------------------------------------------------------------------------------------

LOST = Failure("t", "linear", 0, "RuntimeError: out of memory")
DEGENERATE = {
    "one seed": run_of({"t": {**{k: v[:1] for k, v in FOUR.items()}, "linear": [of_ten(5)]}}, chosen="linear"),
    "everything right": run_of({t: {m: [[1, 1, 1]] * 2 for m in FOUR} for t in "tu"}, chosen="few-shot"),
    "everything wrong": run_of({t: {m: [[0, 0, 0]] * 2 for m in FOUR} for t in "tu"}, chosen="zero-shot"),
    "one item": run_of({t: {"zero-shot": [[0]], "few-shot": [[1]], "random": [[0]]} for t in "tu"}, chosen="few-shot"),
    "one method": run_of({"t": {"zero-shot": [of_ten(3)]}}),
    "a method missing on a task": run_of({"t": {**FOUR, "linear": [of_ten(4)] * 2}, "u": FOUR}, chosen="linear"),
    "a seed missing": run_of({"t": {**FOUR, "linear": [of_ten(4)]}}, chosen="linear", failures=[LOST]),
    "nothing scored": run_of({"t": {}}, failures=[LOST]),
    "nothing at all": run_of({"t": {}}),
    "zero-shot failed": run_of({"t": {k: v for k, v in FOUR.items() if k != "zero-shot"}}, chosen="linear"),
    "random failed": run_of({"t": {k: v for k, v in FOUR.items() if k != "random"}}),
    "no distance": run_of({"t": FOUR}, d_ntp={"zero-shot": 1.0, "random": 1.0}),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_a_run_with_next_to_nothing_in_it_has_its_say(kind: str) -> None:
    everything(DEGENERATE[kind])


def test_nothing_scored_is_a_table_of_failures() -> None:
    assert [table.name for table in all_tables(DEGENERATE["nothing scored"])] == ["correlation", "failed"]
    assert tables.failed(DEGENERATE["nothing scored"]).rows == (("t", "linear", "0", "RuntimeError: out of memory"),)


def test_everything_right_is_no_difference_and_no_correlation() -> None:
    run = DEGENERATE["everything right"]
    assert {(test.difference, test.p, test.corrected) for test in paired_tests(run)} == {(0.0, 1.0, 1.0)}
    assert all(c.rho is None for c in statistics.correlations(run))
    assert ranks(run).p is None
    assert [v.sentence[:16] for v in run.verdicts()] == ["t: do not compil", "u: do not compil"]


def test_a_method_missing_on_a_task_is_compared_on_the_others_alone() -> None:
    run = DEGENERATE["a method missing on a task"]
    assert not any("linear" in (test.a, test.b) for test in paired_tests(run))
    (line,) = (row for row in tables.accuracy(run).rows if row[0] == "linear")
    assert line[2] == "failed"
    assert line[3].startswith("0.400 [")
    assert line[3].endswith("] of 1")


# --- reading a folder -------------------------------------------------------------------------------------------------


ENVIRONMENT = {"packages": {"taskvec": "0.1.0"}, "python": "3.11", "cores": 2, "threads": 1}


def begin(folder: Path, tasks: list[str], methods: list[str]) -> None:
    """A run's folder without a cell."""
    (folder / "cells").mkdir()
    data = {"hash": "e462eb4c", "format": "3981de3f", "shots": 4, "n_test": 3}
    config = {
        "format_version": 1,
        "taskvec": "0.1.0",
        "model": {"id": "m", "revision": None, "fingerprint": "f", "dtype": "torch.float32", "tokenizer": "t"},
        "suite": {"name": "mine", "description": "", "tasks": tasks, "shots": 4, "n_test": 3, "queries": None},
        "tasks": {task: dict(data) for task in tasks},
        "methods": {method: {} for method in methods},
        "seeds": [0, 1],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "env.json").write_text(json.dumps(ENVIRONMENT))


def cell(folder: Path, key: str, rows: Sequence[Row], error: str | None = None, *, name: tuple[str, str, int]) -> None:
    task, method, seed = name
    plain = {
        "cell": {"task": task, "method": method, "seed": seed, "key": key},
        "rows": [r.to_dict() for r in rows],
        "error": error,
        "dev": None,
        "ledger": {"tokens": 5, "passes": 2, "seconds": 0.5},
    }
    (folder / "cells" / f"{key}.json").write_text(json.dumps(plain))
    records = [
        {"method": method, "task": task, "seed": seed, "correct": i == 0, "label_correct": None, "d_ntp": None}
        for i in range(3)
    ]
    pl.DataFrame(records).write_parquet(folder / "cells" / f"{key}.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    begin(tmp_path, ["t", "s"], ["few-shot", "b", "a"])
    names = [("s", "a", 0), ("t", "a", 1), ("t", "b", 0), ("t", "a", 0), ("t", "few-shot", 0), ("t", "b", 1)]
    for i, name in enumerate(names):
        task, method, seed = name
        rows = [Row(method, task, seed, 3, accuracy=metric(0.3), found={"layer": 3})]
        rows += [Row("few-shot-cached", task, seed, 3)] if method == "few-shot" else []
        failed = name == ("t", "b", 1)
        cell(tmp_path, f"{i:04d}", [] if failed else rows, "it failed" if failed else None, name=name)
    return tmp_path


def test_a_folder_is_read_in_the_grids_order(folder: Path) -> None:
    run = read_run(folder)
    assert run.tasks == ["t", "s"]
    assert [(r.task, r.seed, r.method) for r in run.rows] == [
        ("t", 0, "few-shot"),
        ("t", 0, "few-shot-cached"),
        ("t", 0, "b"),
        ("t", 0, "a"),
        ("t", 1, "a"),
        ("s", 0, "a"),
    ]
    assert run.rows[2].accuracy == metric(0.3)
    assert run.failures == (Failure("t", "b", 1, "it failed"),)
    assert [(e["task"], e["method"], e["seed"]) for e in run.ledger][-2:] == [("t", "a", 1), ("s", "a", 0)]
    assert run.ledger[0] == {"task": "t", "method": "few-shot", "seed": 0, "tokens": 5, "passes": 2, "seconds": 0.5}
    assert run.environment == ENVIRONMENT
    assert run.methods == ["few-shot", "few-shot-cached", "b", "a"]
    assert run.scored == ["few-shot", "b", "a"]


def test_hits_are_seeds_by_items_of_cells_that_did_not_fail(folder: Path) -> None:
    run = read_run(folder)
    assert run.hits("t", "a").tolist() == [[1, 0, 0], [1, 0, 0]]
    assert run.hits("t", "b").tolist() == [[1, 0, 0]]  # the failed seed's records are not read
    assert run.hits("s", "b").size == run.hits("t", "few-shot-cached").size == 0
    assert len(run.examples) == 15


def test_labels_are_what_counts_where_there_are_labels() -> None:
    run = run_of({"t": {"a": [[1, 0, 1]]}, "u": {"a": [[0, 1, 1]]}}, labelled=["u"])
    assert run.hits("t", "a").tolist() == [[1, 0, 1]]
    assert run.hits("u", "a").tolist() == [[0, 1, 1]]


def test_what_a_killed_run_left_half_written_is_not_read(folder: Path) -> None:
    before = read_run(folder)
    (folder / "cells" / ".new.abc").mkdir()
    (folder / "cells" / ".new.abc" / "0000.json").write_text("{")
    (folder / "cells" / "ffff.parquet").write_bytes(b"PAR1 half")
    run = read_run(folder)
    assert run.rows == before.rows
    assert run.examples.equals(before.examples)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"wanted a run's folder with config.yaml; found none at"):
            read_run(path)


def test_a_report_writes_what_was_read(folder: Path) -> None:
    run = read_run(folder)
    written = write_report(run)
    assert {"results.json", "tables.md", "tables.tex", "results.parquet"} <= {path.name for path in written}
    assert all(path.is_file() and path.parent == folder for path in written)
    plain = json.loads((folder / "results.json").read_text())
    assert [Row.from_dict(r) for r in plain["rows"]] == list(run.rows)
    assert plain["failed"] == [{"task": "t", "method": "b", "seed": 1, "error": "it failed"}]
    assert plain["ledger"] == list(run.ledger)
    assert plain["tests"] == [asdict(test) for test in paired_tests(run)]
    assert [one["what"] for one in plain["correlations"]] == [c.what for c in statistics.correlations(run)]
    assert not list(folder.glob(".new.*"))
    assert pl.read_parquet(folder / "results.parquet").equals(run.examples)
    assert (folder / "tables.md").read_text() == markdown_tables(run)
    assert (folder / "tables.tex").read_text() == latex_tables(run)
    write_report(read_run(folder))  # a second time, in place


def test_a_run_without_a_cell_is_read_and_reported(tmp_path: Path) -> None:
    begin(tmp_path, ["t"], ["a"])
    run = read_run(tmp_path)
    assert (run.rows, run.failures, run.methods) == ((), (), [])
    everything(run)
    write_report(run)


# --- rows and back ----------------------------------------------------------------------------------------------------

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
METRICS = st.none() | st.builds(Metric, NUMBERS, NUMBERS, NUMBERS)
PLAIN: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
DICTS = st.dictionaries(st.text(max_size=6), PLAIN, max_size=3)


@given(METRICS, METRICS, NUMBERS, st.integers(0, 10**9), DICTS, DICTS, st.text(max_size=5))
@settings(deadline=None, max_examples=60)
def test_a_row_comes_back_from_json(a: Any, b: Any, x: float, k: int, found: Any, settings: Any, name: str) -> None:
    made = Row(name, "t", k, k, accuracy=a, d_ntp=b, fit_seconds=x, fit_tokens=k, found=found, hyperparameters=settings)
    assert Row.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_what_a_fit_found_stays_as_it_was_whatever_its_keys() -> None:
    found = {"value": 1, "low": 0, "high": 2}
    made = Row("m", "t", 0, 1, accuracy=metric(0.5), found=found, hyperparameters=dict(found))
    assert Row.from_dict(made.to_dict()) == made


def test_a_row_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="colour"):
        Row.from_dict({**Row("m", "t", 0, 1).to_dict(), "colour": "red"})


# --- tables: numbers --------------------------------------------------------------------------------------------------


def rich_run() -> Run:
    skills = {"linear": 0.8, "random": 0.1, "zero-shot": 0.2, "few-shot": 0.9, "learned": 0.7}
    hits = {t: {m: coins(20, 3, s, 7 * i + j) for j, (m, s) in enumerate(skills.items())} for i, t in enumerate("tuv")}
    far = {"zero-shot": 3.0, "random": 2.5, "linear": 0.5, "learned": 0.75, "few-shot": 0.0}
    values: dict[str, Any] = {
        "agreement": metric(0.5),
        "fit_tokens": 12345,
        "fit_seconds": 1.25,
        "found": {"layer": 3, "long": [0] * 99},
    }
    return run_of(hits, labelled=["u"], chosen="linear", d_ntp=far, **values)


def test_the_accuracy_table_is_by_item_and_its_mean_is_over_tasks() -> None:
    run = rich_run()
    table = tables.accuracy(run)
    assert table.header == ("method", "t", "u", "v", "mean")
    assert [line[0] for line in table.rows] == ["zero-shot", "few-shot", "random", "linear", "learned"]
    for line in table.rows:
        hits = [run.hits(task, line[0]) for task in "tuv"]
        for text, h in zip(line[1:4], hits, strict=True):
            found = by_item(h)
            assert text == f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
        assert line[4] == said(statistics.by_task(hits))


def test_closeness_has_the_interval_by_seed_and_means_over_seeds() -> None:
    run = rich_run()
    table = tables.closeness(run)
    assert len(table.rows) == 15
    for line in table.rows:
        cells = dict(zip(table.header, line, strict=True))
        task, method = line[:2]
        assert cells["accuracy by seed"] == said(by_seed(run.hits(task, method)))
        rows = run.rows_of(task, method)
        assert cells["d_ntp"] == f"{np.mean([r.d_ntp.value for r in rows if r.d_ntp is not None]):.3f}"
        assert cells["exact"] == f"{np.mean([r.accuracy.value for r in rows if r.accuracy is not None]):.3f}"
        assert (cells["agreement"], cells["macro F1"], cells["d_ntp full"]) == ("0.500", "-", "-")


def test_costs_are_means_over_tasks_and_seeds() -> None:
    table = tables.costs(rich_run())
    assert [line[0] for line in table.rows][:3] == ["zero-shot", "few-shot", "few-shot-cached"]
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert (cells["fit tokens"], cells["fit s"], cells["prompt tokens"], cells["cell s"]) == (
        "12,345",
        "1.2",
        "7.0",
        "2.0",
    )


def test_ranks_tests_and_correlations_are_those_of_statistics() -> None:
    run = rich_run()
    found = ranks(run)
    assert tables.rank_table(run).rows == tuple((m, f"{mean:.2f}") for m, mean in found.mean.items())
    assert f"p = {found.p:.2g}" in tables.rank_table(run).caption
    assert "over 3 tasks" in tables.rank_table(run).caption
    pairs = paired_tests(run)
    assert len(tables.tests(run).rows) == len(pairs) == 10
    for line, test in zip(tables.tests(run).rows, pairs, strict=True):
        assert line == (test.a, test.b, f"{100 * test.difference:+.1f}", f"{test.p:.2g}", f"{test.corrected:.2g}")
    lines = {line[0]: line[1:] for line in tables.correlation_table(run).rows}
    assert lines == {c.what: (str(c.n), said(c.rho)) for c in statistics.correlations(run)}
    assert lines["pooled"][0] == "36"


def test_selected_shows_what_is_short_and_what_random_is_matched_to() -> None:
    table = tables.selected(rich_run())
    assert ("t", "linear", "0", "layer 3") in table.rows
    assert ("t", "random", "2", "layer 3, matched linear") in table.rows
    assert tables.selected(run_of({"t": FOUR})).rows == ()


def test_a_metric_in_a_cell() -> None:
    assert said(None) == "-"
    assert said(Metric(0.12349, -1.0, 12.0)) == "0.123 [-1.000, 12.000]"


@pytest.mark.parametrize("kind", ["rich", *DEGENERATE])
def test_every_row_has_as_many_cells_as_the_header(kind: str) -> None:
    run = rich_run() if kind == "rich" else DEGENERATE[kind]
    for make in (tables.accuracy, tables.closeness, tables.costs, tables.selected, tables.failed):
        assert {len(line) for line in make(run).rows} <= {len(make(run).header)}
    for table in all_tables(run):
        assert len(latex_cells(latex(table))[0]) == len(table.header)


# --- tables: hostile names --------------------------------------------------------------------------------------------

HOSTILE = (
    "a|b",
    "|",
    "<script>alert(1)</script>",
    "</td><img src=x onerror=alert(1)>",
    "back\\slash",
    "ends in \\",
    "a\\|b",
    "50 %",
    "under_score",
    "$x^2$ & #1 ~ {a}",
    "two\nlines\r\nand more",
    "&lt;b&gt; &amp;",
    "\\input{x} \\\\",
    "[0.1, 0.2]",
    "* starred",
    "Foo.__init__() takes *args and **kwargs",
    "`code` [link](javascript:alert(1)) ![x](y)",
)


def flat(text: str) -> str:
    return " ".join(text.split())


def markdown_cells(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text as a parser sees them, each cell as the text a reader sees."""
    from markdown_it import MarkdownIt

    out = list[list[list[str]]]()
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        assert token.type != "html_block"
        if token.type == "table_open":
            out.append([])
        elif token.type == "tr_open":
            out[-1].append([])
        elif token.type == "inline" and out and token.level >= 4:
            parts = token.children or []
            assert not any(part.type == "html_inline" for part in parts), token.content
            out[-1][-1].append(flat("".join(" " if part.type == "softbreak" else part.content for part in parts)))
    return out


def latex_cells(text: str) -> list[list[str]]:
    """The rows of one LaTeX table, split where LaTeX splits them."""
    body = text.split("\\toprule\n")[1].split("\n\\bottomrule")[0].replace("\\midrule\n", "")
    lines = body.split("\n")
    assert all(line.endswith(" \\\\") for line in lines)
    return [re.split(r"(?<!\\)&", line.removesuffix("\\\\")) for line in lines]


NAMES = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^"}
NAMES |= {r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|"}


def latex_read(cell: str) -> str:
    """What LaTeX prints for a cell. Fails for any character that is still active."""
    out = ""
    for part in re.findall(r"\\text[a-z]+\{\}|\\[&%$#_{}]|\{\[\}|\{\*\}|\{\}|.", cell, re.DOTALL):
        if part in NAMES:
            out += NAMES[part]
        elif len(part) > 1:
            out += part.strip("{}") if part[0] == "{" else part[1:]
        else:
            assert part not in "\\&%$#_{}~^\n", f"{part!r} is active in {cell!r}"
            out += part
    return flat(out)


def hostile_table() -> Table:
    rows = tuple((name, name, "0.5") for name in HOSTILE)
    return Table("t", "A caption.", ("method", HOSTILE[0], HOSTILE[4]), rows, text=2)


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_shows_a_name_as_it_is(name: str) -> None:
    (found,) = markdown_cells(markdown(Table("t", "c", ("method", name, "x"), ((name, "1", name),), text=2)))
    assert found == [["method", flat(name), "x"], [flat(name), "1", flat(name)]]


def test_markdown_is_a_table_whatever_the_names() -> None:
    (found,) = markdown_cells(markdown(hostile_table()))
    assert [len(line) for line in found] == [3] * (len(HOSTILE) + 1)
    lines = markdown(hostile_table()).split("\n\n", 1)[1].split("\n")
    assert len(lines) == len(HOSTILE) + 2
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in lines)
    assert not any(re.search(r"(?<!\\)<", line) for line in lines)


def test_latex_prints_names_as_they_are() -> None:
    found = latex_cells(latex(hostile_table()))
    assert len(found) == len(HOSTILE) + 1
    for name, line in zip((None, *HOSTILE), found, strict=True):
        assert len(line) == 3
        if name is not None:
            assert [latex_read(text) for text in line[:2]] == [flat(name)] * 2


def test_no_row_of_latex_begins_with_what_a_line_end_would_take() -> None:
    """`\\\\` takes a star and a bracket that follow it as its own."""
    for line in latex_cells(latex(hostile_table())):
        assert line[0].strip()[:1] not in ("[", "*")


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=3, max_size=3))
@settings(deadline=None, max_examples=100)
def test_any_text_is_one_latex_row(cells: list[str]) -> None:
    (_, line) = latex_cells(latex(Table("t", "c", ("a", "b", "c"), (tuple(cells),))))
    assert len(line) == 3
    assert [latex_read(text) for text in line] == [flat(text) for text in cells]


@given(st.lists(st.text("ab|\\ \n<>`*_&", max_size=8), min_size=3, max_size=3))
@settings(deadline=None, max_examples=100)
def test_any_text_is_one_markdown_row(cells: list[str]) -> None:
    (found,) = markdown_cells(markdown(Table("t", "c", ("a", "b", "c"), (tuple(cells),))))
    assert [len(line) for line in found] == [3, 3]


def hostile_run() -> Run:
    methods = {**FOUR, **{name: [of_ten(5)] * 2 for name in HOSTILE}}
    run = run_of(dict.fromkeys(HOSTILE[:6], methods), chosen=HOSTILE[2], found={HOSTILE[0]: HOSTILE[4]})
    run.config["suite"]["name"] = HOSTILE[2] + HOSTILE[10]
    return replace(run, failures=tuple(Failure(HOSTILE[0], HOSTILE[1], 0, name) for name in HOSTILE))


def test_a_whole_run_of_hostile_names_stays_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    run = hostile_run()
    prescribed(monkeypatch, [0.5] * 10_000)  # what the tests say is not the point, and there are many
    found = markdown_cells(markdown_tables(run))
    assert len(found) == 8
    for table in found:
        assert {len(line) for line in table} == {len(table[0])}
    whole = latex_tables(run)
    assert whole.count(r"\begin{tabular}") == whole.count(r"\end{tabular}") == 8
    for part in whole.split(r"\begin{table}")[1:]:
        assert {len(line) for line in latex_cells(part)} == {len(latex_cells(part)[0])}
        columns = part.split(r"\begin{tabular}{")[1].split("}")[0]
        assert len(columns) == len(latex_cells(part)[0])
