"""Metrics with intervals, rows, tables and the files they are written to."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.metrics import f1_score

from taskvec.errors import InputError, UnknownName
from taskvec.results import (
    Metric,
    Results,
    Row,
    Verdict,
    average_seeds,
    bootstrap,
    macro_f1,
    mean,
    proportion,
    share_kept,
    table_cells,
)

few_draws = settings(deadline=None, max_examples=15)


def _metric(value: float) -> Metric:
    return Metric(value, value - 0.1, value + 0.1)


def _row(method: str = "learned", task: str = "t", seed: int = 0, **values: Any) -> Row:
    return Row(method, task, seed, 100, **values)


def _floats(values: Any) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's interval by its formula (Wilson 1927), 95 %."""
    z, p = float(norm.ppf(0.975)), count / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


# --- proportions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_a_proportion_has_the_published_wilson_interval(count: int, n: int, low: float, high: float) -> None:
    metric = proportion([True] * count + [False] * (n - count))
    assert metric is not None
    assert metric.value == count / n
    assert [metric.low, metric.high] == pytest.approx([low, high], abs=1e-4)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
@settings(deadline=None, max_examples=40)
def test_a_proportion_follows_wilsons_formula(hits: list[bool]) -> None:
    metric = proportion(np.array(hits))
    assert metric == proportion(hits)
    assert metric is not None
    low, high = _wilson(sum(hits), len(hits))
    assert [metric.low, metric.high] == pytest.approx([low, high], abs=1e-9)
    assert 0 <= metric.low <= metric.value <= metric.high <= 1


def test_no_items_have_no_proportion_and_no_mean() -> None:
    assert proportion([]) is None
    assert mean(_floats([])) is None


# --- bootstrap -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=25))
@few_draws
def test_a_mean_lies_in_its_interval_and_is_the_same_each_time(values: list[float]) -> None:
    metric = mean(_floats(values))
    assert metric is not None
    assert metric.value == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-6)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= metric.low <= metric.value + slack
    assert metric.value - slack <= metric.high <= max(values) + slack
    assert mean(_floats(values)) == metric


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1 / 3, 1e-9])
@pytest.mark.parametrize("n", [1, 2, 7, 129])
def test_constant_values_have_an_interval_without_width(value: float, n: int) -> None:
    metric = mean(np.full(n, value))
    assert metric is not None
    assert metric.low == metric.value == metric.high == pytest.approx(value)


def test_one_item_has_an_interval_without_width() -> None:
    assert mean(_floats([2.5])) == Metric(2.5, 2.5, 2.5)


def test_a_means_interval_is_about_two_standard_errors_each_way() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    metric = mean(values)
    assert metric is not None
    error = values.std() / 20
    assert metric.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert metric.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_the_bootstrap_is_no_business_of_the_global_random_state() -> None:
    values = np.random.default_rng(2).normal(size=30)
    np.random.seed(1)
    before, first = np.random.get_state()[1].tolist(), mean(values)  # type: ignore[index]
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]
    np.random.seed(2)
    assert mean(values) == first


def test_a_bootstrap_resamples_whole_items() -> None:
    """Two columns that move together: their difference is constant, so its interval has no width."""
    a = np.random.default_rng(3).normal(size=40)
    b = a + 1.0
    metric = bootstrap(lambda picked: b[picked].mean(axis=-1) - a[picked].mean(axis=-1), 40)
    assert [metric.low, metric.high] == pytest.approx([1.0, 1.0])


def test_resamples_without_a_value_are_left_out() -> None:
    values = _floats([0.0, 0.0, 0.0, 1.0])

    def statistic(picked: NDArray[np.int64]) -> NDArray[np.float64]:
        total = values[picked].sum(axis=-1)
        return np.where(total > 0, total, np.nan)

    metric = bootstrap(statistic, 4)
    assert metric.value == 1.0
    assert metric.low == 1.0
    assert metric.high in (2.0, 3.0)


# --- macro F1 --------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 5), st.integers(1, 25))
@few_draws
def test_macro_f1_is_that_of_scikit_learn(data: st.DataObject, labels: int, n: int) -> None:
    names = [f"label {i}" for i in range(labels)]
    gold, predicted = (data.draw(st.lists(st.sampled_from(names), min_size=n, max_size=n)) for _ in range(2))
    metric = macro_f1(gold, predicted, [*names, "never seen"])
    assert metric.value == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0.0))
    assert 0 <= metric.low <= metric.high <= 1


def test_macro_f1_by_hand() -> None:
    metric = macro_f1(["a", "a", "b", "c"], ["a", "b", "b", "b"], ["a", "b", "c", "d"])
    assert metric.value == pytest.approx((2 / 3 + 0.5 + 0.0) / 3)  # d occurs nowhere and is left out
    assert metric.low < metric.value < metric.high


def test_perfect_predictions_have_f1_one_without_width() -> None:
    assert macro_f1(["a", "b"] * 5, ["a", "b"] * 5, ["a", "b"]) == Metric(1.0, 1.0, 1.0)


# --- share kept ------------------------------------------------------------------------------------------------------


def test_share_kept_is_the_vectors_part_of_the_few_shot_gain() -> None:
    zero = _floats([0, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    vector = _floats([1, 1, 1, 1, 0, 1, 0, 0, 0, 0])
    few = _floats([1, 1, 1, 1, 1, 1, 1, 1, 1, 0])
    metric = share_kept(zero, vector, few)
    assert metric is not None
    assert metric.value == pytest.approx((0.5 - 0.1) / (0.9 - 0.1))
    assert metric.low < metric.value < metric.high
    assert share_kept(zero, vector, few) == metric


@pytest.mark.parametrize("few", [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
def test_nothing_is_kept_where_few_shot_is_not_above_zero_shot(few: list[float]) -> None:
    assert share_kept(_floats([1, 1, 0]), _floats([1, 1, 1]), _floats(few)) is None


@given(
    st.lists(st.tuples(*[st.floats(0, 1)] * 2), min_size=3, max_size=20), st.sampled_from([0.0, 0.25, 1.0, 1.5, -0.5])
)
@few_draws
def test_share_kept_is_paired_over_items(pairs: list[tuple[float, float]], share: float) -> None:
    """Where each item keeps the same share, every resample does: only a paired bootstrap has no width here."""
    zero = _floats([a for a, _ in pairs])
    few = zero + 0.1 + _floats([b for _, b in pairs])
    metric = share_kept(zero, zero + share * (few - zero), few)
    assert metric is not None
    assert [metric.value, metric.low, metric.high] == pytest.approx([share] * 3, abs=1e-6)


def test_one_item_has_a_share_too() -> None:
    assert share_kept(_floats([0.0]), _floats([0.5]), _floats([1.0])) == Metric(0.5, 0.5, 0.5)


def test_resamples_where_few_shot_gains_nothing_do_not_spoil_the_interval() -> None:
    metric = share_kept(_floats([0, 1, 0, 1]), _floats([1, 1, 0, 0]), _floats([1, 1, 1, 0]))
    assert metric is not None
    assert math.isfinite(metric.low)
    assert math.isfinite(metric.high)


# --- rows and results ------------------------------------------------------------------------------------------------


def _results() -> Results:
    rows = (
        _row("zero-shot", accuracy=_metric(0.2), prompt_tokens=12.0),
        _row("learned", accuracy=_metric(0.8), when_icl_wrong=None, d_ntp_support=7, hyperparameters={"lr": 0.1}),
    )
    examples = ({"method": "learned", "input": "é", "hit": True, "d_ntp": 0.5},)
    return Results(rows, examples, (Verdict("learned", _metric(0.9), "Compile it."),))


def test_the_headline_is_label_accuracy_where_there_are_labels() -> None:
    assert _row(accuracy=_metric(0.5), label_accuracy=_metric(0.0)).headline == _metric(0.0)
    assert _row(accuracy=_metric(0.5)).headline == _metric(0.5)
    assert _row().headline is None


def test_a_metric_prints_its_interval() -> None:
    assert str(Metric(0.5, 0.25, 0.7504)) == "0.500 [0.250, 0.750]"


def test_results_add_up_in_order() -> None:
    a, b = _results(), Results((_row("linear"),), ({"x": 1},), (Verdict("linear", None, "Do not."),))
    both = a + b
    assert [row.method for row in both.rows] == ["zero-shot", "learned", "linear"]
    assert both.examples == (*a.examples, {"x": 1})
    assert [verdict.chosen for verdict in both.verdicts] == ["learned", "linear"]
    assert (len(a.rows), len(b.rows)) == (2, 1)


def test_a_row_is_found_by_its_method_and_the_first_one_wins() -> None:
    both = _results() + Results((_row("learned", seed=5),))
    assert both["learned"].seed == 0
    assert both["zero-shot"].accuracy == _metric(0.2)


def test_a_method_without_a_row_is_an_unknown_name() -> None:
    with pytest.raises(UnknownName, match=r"'hendel'.*zero-shot.*learned"):
        _results()["hendel"]


def test_json_holds_rows_and_verdicts_and_only_metrics_are_value_low_high() -> None:
    plain = json.loads(_results().to_json())
    assert set(plain) == {"rows", "verdicts"}
    for row in plain["rows"]:
        assert set(row) == {f.name for f in fields(Row)}
    learned = plain["rows"][1]
    assert learned["accuracy"] == {"value": 0.8, "low": 0.8 - 0.1, "high": 0.8 + 0.1}
    assert [key for key, value in learned.items() if isinstance(value, dict)] == [
        "accuracy",
        "hyperparameters",
        "found",
    ]
    assert (learned["when_icl_wrong"], learned["d_ntp_support"], learned["seed"]) == (None, 7, 0)
    assert set(plain["verdicts"][0]["kept"]) == {"value", "low", "high"}


def test_json_is_one_line_of_text_as_it_is() -> None:
    text = Results((_row(task="café"),)).to_json()
    assert "café" in text
    assert "\n" not in text


def test_json_never_holds_a_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Results((_row(accuracy=Metric(float("nan"), 0.0, 1.0)),)).to_json()


def test_every_metric_made_here_goes_into_json() -> None:
    metrics: dict[str, Any] = {
        "accuracy": proportion([True, False]),
        "d_ntp": mean(_floats([0.1, 3.0])),
        "macro_f1": macro_f1(["a", "b"], ["b", "a"], ["a", "b"]),
        "agreement": share_kept(_floats([0, 1]), _floats([0, 0]), _floats([1, 1])),
    }
    plain = json.loads(Results((_row(**metrics),)).to_json())["rows"][0]
    for name in metrics:
        assert set(plain[name]) == {"value", "low", "high"}
        assert all(type(number) is float for number in plain[name].values())


# --- averages and tables ---------------------------------------------------------------------------------------------


def test_seeds_are_averaged_within_task_method_and_source() -> None:
    rows = [
        _row("learned", "t", 0, accuracy=Metric(0.5, 0.4, 0.6), query_ms=2.0, fit_labels=10, hyperparameters={"a": 1}),
        _row("learned", "t", 1, accuracy=Metric(0.7, 0.4, 0.9), query_ms=4.0, fit_labels=13, hyperparameters={"a": 2}),
        _row("linear", "t", 0, accuracy=_metric(0.1)),
        _row("learned", "other", 0, accuracy=_metric(0.2)),
        _row("learned", "t", 0, source="folder", accuracy=_metric(0.3)),
        _row("learned", "t", 2, accuracy=Metric(0.9, 0.7, 1.0), query_ms=6.0, fit_labels=13, hyperparameters={"a": 3}),
    ]
    averaged = average_seeds(Results(tuple(rows)))
    assert [(row.method, row.task, row.source) for row in averaged] == [
        ("learned", "t", None),
        ("linear", "t", None),
        ("learned", "other", None),
        ("learned", "t", "folder"),
    ]
    first = averaged[0]
    assert first.accuracy is not None
    assert (first.accuracy.value, first.accuracy.low, first.accuracy.high) == pytest.approx((0.7, 0.5, 2.5 / 3))
    assert (first.query_ms, first.fit_labels, first.n, first.seed) == (4.0, 12, 100, 0)
    assert first.hyperparameters == {"a": 1}
    assert averaged[1:] == rows[2:5]


def test_averaging_keeps_the_type_of_every_field() -> None:
    a = _row(seed=0, fit_queries=3, fit_tokens=1000, d_ntp_support=4, prompt_tokens=3.0, dtype="float32")
    (averaged,) = average_seeds(Results((a, replace(a, seed=1, fit_tokens=2001, prompt_tokens=4.0))))
    assert [type(getattr(averaged, f.name)) for f in fields(Row)] == [type(getattr(a, f.name)) for f in fields(Row)]
    assert (averaged.fit_queries, averaged.d_ntp_support, averaged.prompt_tokens) == (3, 4, 3.5)


def test_a_metric_that_some_seeds_lack_is_averaged_over_the_others() -> None:
    rows = (_row(seed=0), _row(seed=1, when_icl_wrong=_metric(0.2)), _row(seed=2, when_icl_wrong=_metric(0.4)))
    (averaged,) = average_seeds(Results(rows))
    assert averaged.when_icl_wrong is not None
    assert averaged.when_icl_wrong.value == pytest.approx(0.3)
    assert averaged.label_accuracy is None


def test_the_table_has_the_columns_that_apply_and_a_task_column_for_several_tasks() -> None:
    one = table_cells(_results())
    assert one[0][:2] == ["method", "accuracy"]
    assert "label acc." not in one[0]
    assert "task" not in one[0]
    assert [line[0] for line in one[1:]] == ["zero-shot", "learned"]
    assert one[1][1] == "0.20 [0.10, 0.30]"
    two = table_cells(_results() + Results((_row("linear", "other", label_accuracy=_metric(0.5)),)))
    assert two[0][:2] == ["task", "method"]
    assert [line[:2] for line in two[1:]] == [["t", "zero-shot"], ["t", "learned"], ["other", "linear"]]
    assert [line[two[0].index("label acc.")] for line in two[1:]] == ["-", "-", "0.50 [0.40, 0.60]"]
    assert two[1][two[0].index("prompt tokens")] == "12.0"


def test_results_print_as_an_aligned_table_and_the_verdicts() -> None:
    lines = str(_results()).splitlines()
    assert lines[0].startswith("method     accuracy")
    assert lines[1].startswith("zero-shot  0.20 [0.10, 0.30]")
    assert lines[2].startswith("learned    0.80 [0.70, 0.90]")
    assert lines[-1] == "Compile it."
    assert all(line == line.rstrip() for line in lines)
    assert str(Results(())) == ""


# --- parquet ---------------------------------------------------------------------------------------------------------


def test_examples_are_read_back_from_parquet_as_they_were(tmp_path: Path) -> None:
    examples = tuple(
        {"method": m, "input": "é {x}\n", "hit": hit, "d": d, "n": 3, "label": label}
        for m, hit, d, label in [("a", True, 0.1 + 0.2, None), ("b", False, 1e-300, None), ("c", True, 0.0, "yes")]
    )
    Results((), examples).write_examples(tmp_path / "examples.parquet")
    assert pl.read_parquet(tmp_path / "examples.parquet").to_dicts() == list(examples)


def test_a_value_that_comes_late_is_not_lost(tmp_path: Path) -> None:
    examples = tuple({"x": None if i < 500 else 0.5} for i in range(501))
    Results((), examples).write_examples(str(tmp_path / "e.parquet"))
    assert pl.read_parquet(tmp_path / "e.parquet")["x"].to_list() == [None] * 500 + [0.5]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_existing_file_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "e.parquet"
    if kind == "file":
        path.write_bytes(b"mine")
    else:
        path.mkdir()
    with pytest.raises(InputError, match="exists"):
        _results().write_examples(path)
    assert path.is_dir() if kind == "folder" else path.read_bytes() == b"mine"
