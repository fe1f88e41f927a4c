"""One task, several methods and the controls: fit, choose on dev, score on test, give a verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from taskvec import methods as registry
from taskvec import results
from taskvec.errors import InputError
from taskvec.evaluate import Condition, Observation, need_labels, observe, random_like, score_observed
from taskvec.evaluate.controls import source_controls
from taskvec.evaluate.metrics import kl
from taskvec.lm import LM
from taskvec.methods import Method
from taskvec.progress import track
from taskvec.results import CONTROL_SUFFIXES, SHUFFLED, Metric, Results, Verdict
from taskvec.tasks import Task
from taskvec.vector import TaskVector, VectorSource

PROMPTED = ("zero-shot", "few-shot")
DEFAULT = ("hendel", "linear", "learned")


@dataclass(frozen=True)
class Comparison:
    """The results of one seed, what was fitted by name, and which of the candidates dev chose (None: there was
    none)."""

    results: Results
    fitted: Mapping[str, Condition]
    chosen: str | None
    verdict: Verdict | None
    dev: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def compare(
    lm: LM,
    task: Task,
    methods: Sequence[str | Method] = DEFAULT,
    *,
    vectors: Sequence[TaskVector | VectorSource] = (),
    seeds: Sequence[int] = (0,),
    other: Task | None = None,
) -> Results:
    """The table: zero-shot, few-shot (also with a cached prefix, for cost), mean-difference, the methods, ready-made
    `vectors`, and a random vector of equal norm. One block of rows per seed.

    The random control is matched to the candidate that dev chose (`Row.matched`). A vector source's own controls stand
    beside it (`evaluate.controls`); `other` is a task whose queries' vectors are one of them. Test items are read once,
    by `score`.
    """
    total = Results(())
    for seed in seeds:
        total += compare_once(lm, task, methods, vectors=vectors, seed=seed, other=other).results
    return total


def compare_once(
    lm: LM,
    task: Task,
    methods: Sequence[str | Method],
    *,
    vectors: Sequence[TaskVector | VectorSource] = (),
    seed: int = 0,
    other: Task | None = None,
) -> Comparison:
    """`compare` for one seed, with what was fitted."""
    if seed < 0:
        raise InputError("a seed of 0 or more", str(seed), "name another")
    fitted = _fit_all(lm, task, with_controls(methods), seed)
    fitted |= {f"vector {i}": vector for i, vector in enumerate(vectors)}
    fitted |= _controls(lm, task, fitted, other, seed)
    candidates = [name for name in fitted if is_candidate(name, fitted[name])] or ["mean-difference"]
    few = observe(lm, task.dev, fitted["few-shot"])
    dev = {
        name: dev_score(observe(lm, task.dev, fitted[name]), few) for name in track(candidates, "dev", len(candidates))
    }
    chosen = min(candidates, key=lambda name: (-dev[name][0], dev[name][1], _passes(fitted[name])))
    fitted |= _random(fitted[chosen], seed)
    seen, total = _score_all(lm, task, fitted, seed, chosen)
    verdict = _verdict(total, seen, chosen, getattr(fitted[chosen], "source", None) or chosen)
    return Comparison(replace(total, verdicts=(verdict,)), fitted, chosen, verdict, dev)


def _controls(
    lm: LM, task: Task, fitted: Mapping[str, Condition], other: Task | None, seed: int
) -> dict[str, Condition]:
    """The controls of every vector source."""
    out, train = dict[str, Condition](), other.train if other is not None else None
    for name, source in fitted.items():
        if isinstance(source, VectorSource):
            out |= source_controls(lm, name, source, task.train, train, seed=seed)
    return out


def is_candidate(name: str, condition: Condition) -> bool:
    """Does dev choose among it and others? Vectors and sources; prompts, controls and other rivals stand beside."""
    beside = name in (*PROMPTED, "mean-difference") or name.endswith(CONTROL_SUFFIXES)
    return isinstance(condition, TaskVector | VectorSource) and not beside


def with_controls(methods: Sequence[str | Method]) -> list[Method]:
    """The methods and the controls, each once: controls first. `random` is made later."""
    asked = [registry.make(m) if isinstance(m, str) else m for m in methods if m != "random"]
    names = [m.name for m in asked]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError("each method once", f"{', '.join(twice)} twice", "compare one setting at a time")
    controls = [registry.make(name) for name in (*PROMPTED, "mean-difference") if name not in names]
    return sorted([*controls, *asked], key=lambda method: _order(method.name))


def _order(name: str) -> int:
    """Controls stand first in a table."""
    return registry.CONTROLS.index(name) if name in registry.CONTROLS else len(registry.CONTROLS)


def _fit_all(lm: LM, task: Task, methods: Sequence[Method], seed: int) -> dict[str, Condition]:
    for method in methods:
        if getattr(method, "needs_labels", False):
            need_labels(task.spec, method.name)
    fitted = {}
    for method in track(methods, "fitting", len(methods)):
        fitted[method.name] = method.fit(lm, task.train, task.dev, seed=seed)
        if hasattr(method, "shuffled"):
            fitted[method.name + SHUFFLED] = as_shuffled(method.shuffled().fit(lm, task.train, task.dev, seed=seed))
    return fitted


def as_shuffled(vector: TaskVector) -> TaskVector:
    """A vector that its method's `shuffled()` made, under that control's name."""
    assert vector.origin is not None
    return replace(vector, origin=vector.origin.model_copy(update={"method": vector.origin.method + SHUFFLED}))


def dev_score(seen: Observation, few: Observation) -> tuple[float, float]:
    """(headline accuracy, d_ntp_full) on dev."""
    return float(_hits(seen).mean()), float(kl(few.logits, seen.logits).mean())


def _passes(condition: Condition) -> int:
    origin = condition.origin if condition is not None else None
    return origin.cost.tokens if origin is not None else 0


def _random(condition: Condition, seed: int) -> dict[str, Condition]:
    if isinstance(condition, TaskVector | VectorSource):
        return {"random": random_like(condition, seed=seed)}
    return {}


def _score_all(
    lm: LM, task: Task, fitted: Mapping[str, Condition], seed: int, chosen: str
) -> tuple[dict[str, Observation], Results]:
    order = sorted(fitted, key=_order)
    seen, total = dict[str, Observation](), Results(())
    reference = seen["few-shot"] = observe(lm, task.test, fitted["few-shot"])
    for name in track(order, "test", len(order)):
        if name not in seen:
            seen[name] = observe(lm, task.test, fitted[name])
        part = score_observed(lm, seen[name], fitted[name], reference, seed=seed)
        if name == "random":
            part = matched(part, fitted[chosen], chosen)
        total += _in_block(part, seed)
        if name == "few-shot":
            total += score_observed(lm, seen[name], fitted[name], reference, seed=seed, cached=True)
    return seen, total


def _in_block(part: Results, seed: int) -> Results:
    """One row and its records, both under the block's seed (a ready-made vector was fitted with its own)."""
    row = replace(part.rows[0], seed=seed)
    key = {"method": row.method, "seed": row.seed}
    return replace(part, rows=(row,), examples=tuple(example | key for example in part.examples))


def matched(part: Results, condition: Condition, chosen: str) -> Results:
    """The random control's row: it names the method whose norm it has, and none of its settings and costs."""
    name = condition.origin.method if condition is not None and condition.origin is not None else chosen
    costless: dict[str, Any] = {"fit_labels": 0, "fit_queries": 0, "fit_tokens": 0, "fit_seconds": 0.0, "found": {}}
    row = replace(part.rows[0], method="random", matched=name, source=None, hyperparameters={}, **costless)
    return replace(part, rows=(row,))


def _hits(seen: Observation) -> results.Values:
    gold = [example.output for example in seen.split.examples]
    return np.array([p == g for p, g in zip(seen.predictions, gold, strict=True)], dtype=float)


def _verdict(total: Results, seen: Mapping[str, Observation], chosen: str, name: str) -> Verdict:
    """One sentence: what the chosen candidate keeps of few-shot, and what it saves."""
    kept = results.share_kept(_hits(seen["zero-shot"]), _hits(seen[chosen]), _hits(seen["few-shot"]))
    vector_tokens, few_tokens = (np.mean([len(p) for p in seen[name].prompts]) for name in (chosen, "few-shot"))
    task = seen[chosen].split.spec.name
    if kept is None:
        few, zero = (total[name].headline for name in ("few-shot", "zero-shot"))
        sentence = f"{task}: do not compile: few-shot ({_percent(few)}) is not above zero-shot ({_percent(zero)})."
        return Verdict(name, None, sentence)
    low, high = round(100 * kept.low), round(100 * kept.high)
    zero_accuracy = _hits(seen["zero-shot"]).mean()
    what = "few-shot accuracy" if zero_accuracy == 0 else "few-shot's gain over zero-shot"
    sentence = (
        f"{task}: {name} keeps {round(100 * kept.value)} % of {what} [{low}, {high}] "
        f"with {vector_tokens:.0f} instead of {few_tokens:.0f} prompt tokens."
    )
    return Verdict(name, kept, sentence)


def _percent(metric: Metric | None) -> str:
    return "-" if metric is None else f"{100 * metric.value:.0f} %"
