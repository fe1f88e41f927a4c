"""What a run's figures can bear: intervals by item and by seed, paired tests, ranks, correlations. All from scipy.

Shapes: s seeds, n test items of a task. Test items are shared by all methods and seeds of a task, so methods are
compared item by item, on each item's share of right answers over the seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from taskvec.results import Metric, Row, Values, Verdict, bootstrap, share_kept

if TYPE_CHECKING:
    from taskvec.report.read import Run

RESAMPLES = 4999
ALPHA = 0.05


def by_item(hits: Values) -> Metric:
    """The mean of (s, n) hits, with a bootstrap interval over items: how much other test items would change it."""
    items = hits.mean(0)
    return bootstrap(lambda picked: items[picked].mean(axis=-1), len(items))


def by_seed(hits: Values) -> Metric | None:
    """The same with a t interval over seeds: how much other demonstrations would change it. None for one seed."""
    from scipy import stats

    means = hits.mean(1)
    if len(means) < 2:
        return None
    centre, spread = float(means.mean()), float(stats.sem(means))
    if spread == 0:
        return Metric(centre, centre, centre)
    low, high = stats.t.interval(0.95, len(means) - 1, loc=centre, scale=spread)
    return Metric(centre, float(low), float(high))


# --- paired tests ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """Method `a` minus method `b` on a task's items (`all tasks`: on those of every task). `p` is that of a paired
    permutation test, `corrected` after Benjamini and Yekutieli over all pairs of the same family."""

    task: str
    a: str
    b: str
    difference: float
    p: float
    corrected: float

    @property
    def clear(self) -> bool:
        """Is the difference more than chance, all pairs considered?"""
        return self.corrected < ALPHA


ALL = "all tasks"


@cache
def paired_tests(run: "Run") -> list[Paired]:
    """Every pair of methods on every task, and over all tasks together: two families of tests."""
    alone = [test for task in run.tasks for test in _pairs(task, _items(run, [task]))]
    return _corrected(alone) + _corrected(list(_pairs(ALL, _items(run, run.tasks))))


def _items(run: "Run", tasks: list[str]) -> dict[str, Values]:
    """Each method's share of right answers over its seeds, item by item, of the methods that every task has."""
    out = dict[str, Values]()
    for method in run.scored:
        hits = [run.hits(task, method) for task in tasks]
        if all(h.size for h in hits):
            out[method] = np.concatenate([h.mean(0) for h in hits])
    return out


def _pairs(task: str, items: dict[str, Values]) -> Iterator[Paired]:
    for a, b in combinations(items, 2):
        if len(items[a]) == len(items[b]):
            difference, p = paired_permutation(items[a], items[b])
            yield Paired(task, a, b, difference, p, p)


def paired_permutation(a: Values, b: Values) -> tuple[float, float]:
    """(mean of a - b, two-sided p of a paired permutation test)."""
    from scipy.stats import permutation_test

    if len(a) < 2 or not (a - b).any():
        return float((a - b).mean()), 1.0

    def statistic(x: Values, y: Values, axis: int) -> Values:
        return np.asarray(np.round((x - y).mean(axis=axis), 12))  # shares of thirds: a tie is a tie

    rng = np.random.default_rng(0)
    found = permutation_test(
        (a, b), statistic, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES, rng=rng, batch=500
    )
    return float(found.statistic), float(found.pvalue)


def _corrected(tests: list[Paired]) -> list[Paired]:
    from scipy.stats import false_discovery_control

    if not tests:
        return []
    adjusted = false_discovery_control([test.p for test in tests], method="by")  # by: whatever hangs together
    return [Paired(t.task, t.a, t.b, t.difference, t.p, float(p)) for t, p in zip(tests, adjusted, strict=True)]


# --- ranks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """The methods' mean ranks over tasks, best first, and the p of Friedman's test that they differ at all (None for
    fewer than three methods or two tasks)."""

    mean: dict[str, float]
    tasks: int
    p: float | None


def ranks(run: "Run") -> Ranks:
    """Ranks by accuracy within each task that all methods finished (1 is best; ties share)."""
    from scipy.stats import rankdata

    rows = [[run.hits(task, method) for method in run.scored] for task in run.tasks]
    means = np.array([[hits.mean() for hits in row] for row in rows if all(hits.size for hits in row)])
    if not means.size:
        return Ranks({}, 0, None)
    mean = rankdata(-means, axis=1).mean(0)
    order = np.argsort(mean, kind="stable")
    return Ranks({run.scored[i]: float(mean[i]) for i in order}, len(means), _friedman(means))


def _friedman(means: Values) -> float | None:
    """The p that the methods (columns) differ over the tasks (rows) by chance."""
    from scipy.stats import friedmanchisquare

    few = means.shape[0] < 2 or means.shape[1] < 3
    return None if few or (means == means[:, :1]).all() else float(friedmanchisquare(*means.T).pvalue)


# --- d_NTP against accuracy ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One method, task and seed: d_ntp beside accuracy, and beside accuracy where few-shot is wrong."""

    task: str
    method: str
    seed: int
    d_ntp: float
    accuracy: float
    when_icl_wrong: float | None


def points(run: "Run") -> list[Point]:
    """All points but few-shot's own, whose d_ntp is 0 by definition."""
    out = []
    for row in run.rows:
        if row.method.startswith("few-shot") or row.d_ntp is None or row.headline is None:
            continue
        wrong = row.when_icl_wrong.value if row.when_icl_wrong is not None else None
        out.append(Point(row.task, row.method, row.seed, row.d_ntp.value, row.headline.value, wrong))
    return out


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho over n points, with a bootstrap interval over points. None where it is not defined."""

    what: str
    n: int
    rho: Metric | None


def correlations(run: "Run") -> list[Correlation]:
    """d_ntp with accuracy: within each task, pooled, pooled after taking each task's ranks (the part that is not
    about which task is hard), and pooled with accuracy where few-shot is wrong."""
    found = points(run)
    tasks = [task for task in run.tasks if any(p.task == task for p in found)]
    out = [_correlation(task, [p for p in found if p.task == task]) for task in tasks]
    out.append(_correlation("pooled", found))
    out.append(_within(tasks, found))
    wrong = [p for p in found if p.when_icl_wrong is not None]
    pairs = np.array([[p.d_ntp, p.when_icl_wrong] for p in wrong], dtype=float).reshape(-1, 2)
    out.append(Correlation("pooled, where few-shot is wrong", len(pairs), spearman(pairs)))
    return out


def _correlation(what: str, some: list[Point]) -> Correlation:
    pairs = np.array([[p.d_ntp, p.accuracy] for p in some], dtype=float).reshape(-1, 2)
    return Correlation(what, len(pairs), spearman(pairs))


def _within(tasks: list[str], found: list[Point]) -> Correlation:
    """Pooled ranks within tasks, scaled to 0..1."""
    from scipy.stats import rankdata

    parts = []
    for task in tasks:
        pairs = np.array([[p.d_ntp, p.accuracy] for p in found if p.task == task], dtype=float)
        parts.append(rankdata(pairs, axis=0) / len(pairs))
    pairs = np.concatenate(parts) if parts else np.zeros((0, 2))
    return Correlation("pooled, within tasks", len(pairs), spearman(pairs))


def spearman(pairs: Values) -> Metric | None:
    """Spearman's rho of (n, 2) pairs with a bootstrap interval. None below 3 points or where one side is constant."""
    if len(pairs) < 3 or (pairs == pairs[0]).all(axis=0).any():
        return None
    from scipy.stats import rankdata

    def rho(picked: Any) -> Values:
        ranked = rankdata(pairs[picked], axis=-2)
        centred = ranked - ranked.mean(axis=-2, keepdims=True)
        spread = np.sqrt((centred**2).sum(axis=-2).prod(axis=-1))
        return np.asarray(np.divide(centred.prod(axis=-1).sum(axis=-1), spread, out=_nan(spread), where=spread > 0))

    return bootstrap(rho, len(pairs))


def _nan(like: Any) -> Values:
    return np.full(np.shape(like), np.nan)


# --- verdicts --------------------------------------------------------------------------------------------------------


def chosen(run: "Run", task: str) -> str | None:
    """The candidate that dev chose most often: the one the random rows are matched to."""
    matched = [row.matched for row in run.rows_of(task, "random") if row.matched is not None]
    return max(dict.fromkeys(matched), key=matched.count) if matched else None


def kept(run: "Run", task: str, method: str) -> Metric | None:
    """(method - zero-shot) / (few-shot - zero-shot) over the seeds' mean hits, paired over items."""
    parts = [run.hits(task, name) for name in ("zero-shot", method, "few-shot")]
    if any(part.size == 0 for part in parts):
        return None
    zero, vector, few = (part.mean(0) for part in parts)
    return share_kept(zero, vector, few)


def verdicts(run: "Run") -> list[Verdict]:
    """One sentence a task: what the candidate that dev chose keeps of few-shot, and with how many tokens."""
    out = []
    for task in run.tasks:
        method = chosen(run, task)
        if method is not None:
            share = kept(run, task, method)
            out.append(Verdict(method, share, _sentence(run, task, method, share)))
    return out


def _sentence(run: "Run", task: str, method: str, share: Metric | None) -> str:
    means = {
        name: float(run.hits(task, name).mean()) for name in ("zero-shot", "few-shot") if run.hits(task, name).size
    }
    if share is None:
        if len(means) < 2:
            return f"{task}: no verdict: zero-shot or few-shot failed."
        few, zero = round(100 * means["few-shot"]), round(100 * means["zero-shot"])
        return f"{task}: do not compile: few-shot ({few} %) is not above zero-shot ({zero} %)."
    low, high = round(100 * share.low), round(100 * share.high)
    few_tokens, tokens = (mean_of(run.rows_of(task, name), "prompt_tokens") for name in ("few-shot", method))
    return (
        f"{task}: {method} keeps {round(100 * share.value)} % of few-shot's gain over zero-shot [{low}, {high}] "
        f"with {tokens:.0f} instead of {few_tokens:.0f} prompt tokens."
    )


def mean_of(rows: list[Row], name: str) -> float:
    """The mean of a plain number over rows."""
    return float(np.mean([getattr(row, name) for row in rows])) if rows else float("nan")
