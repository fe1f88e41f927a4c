"""What a run's figures can bear: intervals by item and by seed, paired tests, ranks, correlations. Tests, ranks and t
intervals are scipy's; the percentile bootstrap is `results.bootstrap` (scipy's own warns where a statistic is not
defined on some resample, as a rank correlation is not).

Shapes: s seeds, n test items of a task. Test items are shared by all methods and seeds of a task, so methods are
compared item by item, on each item's share of right answers over the seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from taskvec.results import Metric, Row, Values, Verdict, bootstrap, proportion, share_kept

if TYPE_CHECKING:
    from taskvec.report.read import Run

ALPHA = 0.05


def by_item(hits: Values) -> Metric:
    """The mean of (s, n) hits, with a bootstrap interval over items: how much other test items would change it."""
    items = hits.mean(0)
    same = proportion(items > 0.5) if set(items.tolist()) in ({0.0}, {1.0}) else None
    return same or bootstrap(lambda picked: items[picked].mean(axis=-1), len(items))


def by_seed(hits: Values) -> Metric | None:
    """The same with a t interval over seeds: how much other demonstrations would change it. None for one seed."""
    return None if len(hits) < 2 else over(hits.mean(1))


def over(values: Sequence[float] | Values) -> Metric:
    """The mean of two values or more, with a 95 % t interval."""
    from scipy import stats

    centre, spread = float(np.mean(values)), float(stats.sem(values))
    if spread == 0:
        return Metric(centre, centre, centre)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=centre, scale=spread)
    return Metric(centre, float(low), float(high))


def by_task(hits: Sequence[Values]) -> Metric:
    """The mean over tasks of each one's mean, with a t interval over tasks: how much other tasks would change it. Of
    one task, its own interval by item."""
    return by_item(hits[0]) if len(hits) == 1 else over([float(one.mean()) for one in hits])


# --- paired tests ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """Method `a` minus method `b` on the items of every task, over the seeds that both have. `p` is that of a paired
    permutation test, `corrected` after Benjamini and Yekutieli over all pairs."""

    a: str
    b: str
    difference: float
    p: float
    corrected: float

    @property
    def clear(self) -> bool:
        """Is the difference more than chance, all pairs considered?"""
        return self.corrected < ALPHA


@cache
def paired_tests(run: "Run") -> list[Paired]:
    """Every pair of methods that every task has, over the items of all tasks together."""
    pairs = [(a, b, found) for a, b in combinations(run.scored, 2) if (found := _alike(run, a, b)) is not None]
    resamples = enough(len(pairs))
    tests = [(a, b, *paired_permutation(*items, resamples)) for a, b, items in pairs]
    return _corrected([Paired(a, b, difference, p, p) for a, b, difference, p in tests])


def _alike(run: "Run", a: str, b: str) -> tuple[Values, Values] | None:
    """Both methods' shares of right answers over the seeds that both have, item by item; None where a task has none."""
    parts = [_shared_seeds(run.hits_by_seed(task, a), run.hits_by_seed(task, b)) for task in run.tasks]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    return np.concatenate([one for one, _ in found]), np.concatenate([two for _, two in found])


def _shared_seeds(one: dict[int, Values], two: dict[int, Values]) -> tuple[Values, Values] | None:
    """The means of both over their common seeds."""
    seeds = [seed for seed in one if seed in two and one[seed].shape == two[seed].shape]
    means = [np.mean([hits[seed] for seed in seeds], axis=0) for hits in (one, two)] if seeds else []
    return (means[0], means[1]) if means else None


def enough(pairs: int) -> int:
    """Resamples with which one true difference among so many pairs can still be told: the smallest p there is, 2 / (n +
    1), must stay below ALPHA after the correction, which multiplies it by at most pairs x (1 + 1/2 + ... + 1/pairs)."""
    factor = pairs * sum(1 / k for k in range(1, pairs + 1))
    return max(4999, int(4 * factor / ALPHA))


def paired_permutation(a: Values, b: Values, resamples: int = 4999) -> tuple[float, float]:
    """(mean of a - b, two-sided p of a paired permutation test)."""
    from scipy.stats import permutation_test

    n, differ = len(a), a != b
    if differ.sum() < 2:  # one difference is as far from 0 whatever its sign
        return float((a - b).mean()), 1.0
    a, b = a[differ], b[differ]  # an exchange of equals changes nothing

    def statistic(x: Values, y: Values, axis: int) -> Values:
        return np.asarray(np.round((x - y).sum(axis=axis) / n, 12))  # shares of thirds: a tie is a tie

    rng = np.random.default_rng(0)
    found = permutation_test(
        (a, b), statistic, permutation_type="samples", vectorized=True, n_resamples=resamples, rng=rng, batch=500
    )
    return float(found.statistic), float(found.pvalue)


def _corrected(tests: list[Paired]) -> list[Paired]:
    from scipy.stats import false_discovery_control

    if not tests:
        return []
    adjusted = false_discovery_control([test.p for test in tests], method="by")  # by: whatever hangs together
    return [replace(test, corrected=float(p)) for test, p in zip(tests, adjusted, strict=True)]


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
    """One method, task and seed: d_ntp beside accuracy, and both on the items where few-shot is wrong."""

    task: str
    method: str
    seed: int
    d_ntp: float
    accuracy: float
    where_wrong: tuple[float, float] | None = None


def points(run: "Run") -> list[Point]:
    """All points but few-shot's own, whose d_ntp is 0 by definition."""
    out, wrong = [], run.d_ntp_where_wrong
    for row in run.rows:
        if row.method.startswith("few-shot") or row.d_ntp is None or row.headline is None:
            continue
        far = wrong.get((row.task, row.method, row.seed))
        there = (far, row.when_icl_wrong.value) if far is not None and row.when_icl_wrong is not None else None
        out.append(Point(row.task, row.method, row.seed, row.d_ntp.value, row.headline.value, there))
    return out


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho over n points, with a bootstrap interval. None where it is not defined."""

    what: str
    n: int
    rho: Metric | None


POOLED, WITHIN, WRONG = "pooled", "pooled, within tasks", "where few-shot is wrong"


@cache
def correlations(run: "Run") -> list[Correlation]:
    """d_ntp with accuracy: within each task, pooled, and pooled after taking each task's ranks (the part that is not
    about which task is hard). The same on the items where few-shot is wrong, for both.

    Seeds of one method, and methods of one task, share their items: within a task whole methods are resampled, and
    pooled lines resample whole tasks (from three tasks on).
    """
    found = points(run)
    wrong = [replace(p, d_ntp=p.where_wrong[0], accuracy=p.where_wrong[1]) for p in found if p.where_wrong is not None]
    return [*_each_way(found, run.tasks, ""), *_each_way(wrong, run.tasks, f", {WRONG}")]


def _each_way(found: list[Point], tasks: list[str], end: str) -> list[Correlation]:
    some = [task for task in tasks if any(p.task == task for p in found)]
    out = [_correlation(task + end, [p for p in found if p.task == task]) for task in some]
    return [*out, _correlation(POOLED + end, found), _correlation(WITHIN + end, _ranked(found))]


def _ranked(found: list[Point]) -> list[Point]:
    """Points with ranks within their task, scaled so that their mean is 1/2 however many points a task has."""
    from scipy.stats import rankdata

    out = []
    for task in dict.fromkeys(p.task for p in found):
        some = [p for p in found if p.task == task]
        scaled = (rankdata(_pairs(some), axis=0) - 0.5) / len(some)
        out += [replace(p, d_ntp=float(d), accuracy=float(a)) for p, (d, a) in zip(some, scaled, strict=True)]
    return out


def _pairs(some: list[Point]) -> Values:
    return np.array([[p.d_ntp, p.accuracy] for p in some], dtype=float).reshape(-1, 2)


def _correlation(what: str, some: list[Point]) -> Correlation:
    by_task = len({p.task for p in some}) > 2
    clusters = [p.task if by_task else f"{p.task} {p.method}" for p in some]
    return Correlation(what, len(some), spearman(_pairs(some), clusters))


def spearman(pairs: Values, clusters: Sequence[str] | None = None) -> Metric | None:
    """Spearman's rho of (n, 2) pairs, with an interval from resampling whole clusters (None: single pairs). None below
    3 points or where one side is constant."""
    if len(pairs) < 3 or (pairs == pairs[0]).all(axis=0).any():
        return None
    names = list(range(len(pairs))) if clusters is None else list(clusters)
    groups = [np.flatnonzero([name == one for name in names]) for one in dict.fromkeys(names)]

    def rho(picked: Any) -> Values:
        if picked.ndim > 1:
            return np.array([rho(row) for row in picked])
        return np.asarray(_rho(pairs[np.concatenate([groups[i] for i in picked])]))

    return bootstrap(rho, len(groups))


def _rho(pairs: Values) -> float:
    from scipy.stats import rankdata

    x, y = (rankdata(side) - (len(pairs) + 1) / 2 for side in pairs.T)
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread > 0 else float("nan")


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
