"""The rule of docs/claims.md: what follows from intervals, and from several parts."""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs"))
    return importlib.import_module("verdicts")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["YES", "YES"], "reproduced"),
        (["NO", "NO"], "not reproduced"),
        (["UNSURE", "UNSURE"], "undecided here"),
        (["NOT_HERE", "NOT_HERE"], "not testable here"),
        (["NO", "UNSURE"], "not reproduced"),
        (["YES", "UNSURE"], "reproduced in part (1 of 2)"),
        (["YES", "NO", "YES"], "reproduced in part (2 of 3, 1 refuted)"),
    ],
)
def test_a_claim_of_parts(verdicts: Any, parts: list[str], expected: str) -> None:
    finds = [partial(verdicts.Found, name, getattr(verdicts, name)) for name in parts]
    found = verdicts.both(*finds)()
    assert found.verdict == expected
    assert all(name in found.measured for name in parts)


@pytest.mark.parametrize(
    ("shift", "least", "verdict"), [(1.0, 0.0, "YES"), (-1.0, 0.0, "NO"), (0.0, 0.0, "UNSURE"), (1.0, 2.0, "NO")]
)
def test_numbers_of_analyses_are_averaged_over_models_then_over_tasks(
    verdicts: Any, monkeypatch: pytest.MonkeyPatch, shift: float, least: float, verdict: str
) -> None:
    small, large = verdicts.MODELS
    numbers = {("a", small): 0.1, ("a", large): -0.1, ("b", small): 0.2, ("b", large): 0.0, ("c", small): -0.1}
    tasks = {small: ["a", "b", "c"], large: ["a", "b"]}  # c was measured on one model
    monkeypatch.setattr(verdicts, "analysed", lambda model: tasks[model])
    found = verdicts.seen("it", lambda cell: shift + numbers[cell[1], cell[0]], least)()
    means = shift + np.array([0.0, 0.1, -0.1])
    low, high = stats.t.interval(0.95, 2, loc=means.mean(), scale=stats.sem(means))
    assert f"it: {means.mean():.2f} [{low:.2f}, {high:.2f}], 3 tasks" in found.measured
    assert found.verdict == getattr(verdicts, verdict)


def test_one_task_says_nothing_of_tasks(verdicts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "analysed", lambda model: ["a"])
    assert verdicts.seen("it", lambda cell: 1.0)().verdict == verdicts.NOT_HERE
