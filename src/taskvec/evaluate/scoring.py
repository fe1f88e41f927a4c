"""score: one condition on one split, as one row with every field of the design's table."""

from dataclasses import asdict
from typing import Any

import numpy as np

from taskvec import results
from taskvec.evaluate.cost import QueryCost, cached_query_cost, query_cost
from taskvec.evaluate.metrics import d_ntp, head_gain, hidden_error, kl, label_logit_error
from taskvec.evaluate.observe import Condition, Observation, first_tokens, observe
from taskvec.lm import LM
from taskvec.results import Metric, Results, Row
from taskvec.tasks import Dev, Test
from taskvec.vector import Origin, TaskVector


def score(
    lm: LM, split: Test | Dev, condition: Condition = None, *, reference: Observation | None = None, seed: int = 0
) -> Results:
    """One row: accuracy with intervals, closeness to few-shot, cost.

    `condition` is what `fit` returned; None is the bare zero-shot prompt. `reference` is few-shot on the same split;
    where it is not given, it is run with the demonstrations that the condition's origin names, and without any the
    fields that compare with few-shot are None.
    """
    origin = condition.origin if condition is not None else None
    if reference is None and origin is not None and origin.demos:
        reference = observe(lm, split, few_shot(origin))
    return score_observed(lm, observe(lm, split, condition), condition, reference, seed=seed)


def few_shot(origin: Origin) -> TaskVector:
    """The few-shot prompt with an origin's demonstrations: a vector without edits."""
    return TaskVector((), origin.model_copy(update={"method": "few-shot", "prompt": "few-shot"}))


def score_observed(
    lm: LM,
    seen: Observation,
    condition: Condition,
    reference: Observation | None,
    *,
    seed: int,
    cached: bool = False,
) -> Results:
    """The row of an observation already made. `cached`: the query's cost behind a cached prefix."""
    origin = condition.origin if condition is not None else None
    examples = _examples(lm, seen, reference)
    row = Row(
        method=_method(condition) + ("-cached" if cached else ""),
        task=seen.split.spec.name,
        seed=origin.seed if origin is not None else seed,
        n=len(seen.split),
        source=getattr(condition, "source", None),
        dtype=str(lm.dtype).removeprefix("torch."),
        hyperparameters=dict(origin.hyperparameters) if origin is not None else {},
        found=dict(origin.found) if origin is not None else {},
        **_metrics(lm, seen, examples),
        **_fit_cost(origin),
        **asdict(_query_cost(lm, seen, condition, cached=cached)),
    )
    key = {"method": row.method, "task": row.task, "seed": row.seed, "source": row.source}
    return Results((row,), tuple({**key, **example} for example in examples))


def _method(condition: Condition) -> str:
    if condition is None:
        return "zero-shot"
    return condition.origin.method if condition.origin is not None else "hand-made"


def _query_cost(lm: LM, seen: Observation, condition: Condition, *, cached: bool) -> QueryCost:
    cost = cached_query_cost(lm, seen.prompts) if cached else None
    return cost if cost is not None else query_cost(lm, seen.prompts, condition)


def _fit_cost(origin: Origin | None) -> dict[str, Any]:
    return {} if origin is None else {f"fit_{name}": value for name, value in origin.cost.model_dump().items()}


def _examples(lm: LM, seen: Observation, reference: Observation | None) -> list[dict[str, Any]]:
    """One record per example: what was asked, what was answered, and the terms of every mean."""
    labels = seen.labels or [None] * len(seen.split)
    rows = zip(seen.split.examples, seen.texts, seen.logits, seen.golds, labels, strict=True)
    known = seen.split.spec.labels or ()
    records = [
        {
            "input": example.input,
            "output": example.output,
            "answer": text,
            "correct": text == example.output,
            "first_token_correct": int(row.argmax()) == ids[0],
            "label": label,
            "label_correct": None if label is None else label == example.output,
            "in_label_set": None if label is None else text in known,
        }
        for example, text, row, ids, label in rows
    ]
    if reference is not None:
        for name, values in _apart(lm, seen, reference).items():
            for record, value in zip(records, values, strict=True):
                record[name] = value
    return records


def _apart(lm: LM, seen: Observation, reference: Observation) -> dict[str, list[Any]]:
    """How far each example is from few-shot."""
    support, both = _support(lm, seen), (reference.logits, seen.logits)
    nothing: list[Any] = [None] * len(seen.split)
    states = [one.states for one in (reference, seen) if one.states is not None]
    return {
        "d_ntp": d_ntp(*both, support).tolist() if support else nothing,
        "d_ntp_full": kl(*both).tolist() if seen.open else nothing,
        "label_logit_error": label_logit_error(*both, support).tolist() if support else nothing,
        "hidden_error": hidden_error(*states).tolist() if len(states) == 2 else nothing,
        "agrees": [one == other for one, other in zip(seen.predictions, reference.predictions, strict=True)],
        "icl_wrong": [
            said != example.output for said, example in zip(reference.predictions, seen.split.examples, strict=True)
        ],
    }


def _support(lm: LM, seen: Observation) -> list[int]:
    """The tokens d_ntp is over: labels' first tokens (none if two labels share one), or those of all outputs."""
    tokens = [ids[0] for ids in first_tokens(lm, seen.split)]
    distinct = list(dict.fromkeys(tokens))
    clash = seen.split.spec.labels is not None and len(distinct) < len(tokens)
    return [] if clash or len(distinct) < 2 else distinct


def _bound(lm: LM, seen: Observation, error: Metric | None) -> float | None:
    """What d_ntp cannot exceed at this hidden error: a quarter of ||U_c||^2 times it. None where the support's logits
    are no linear map of the state (a soft cap, a head of its own kind)."""
    support = _support(lm, seen)
    if error is None or seen.states is None or not support:
        return None
    rows = lm.model.get_output_embeddings().weight[support].detach().float().cpu()
    linear, found = seen.states @ rows.T, seen.logits[:, support]
    off = (linear - found) - (linear - found).mean(-1, keepdim=True)
    if float(off.abs().max()) > 1e-2 * float((found - found.mean(-1, keepdim=True)).abs().max()):
        return None
    return head_gain(rows) * error.value / 4


def _metrics(lm: LM, seen: Observation, examples: list[dict[str, Any]]) -> dict[str, Any]:
    def column(name: str) -> list[Any]:
        return [record[name] for record in examples if record.get(name) is not None]

    gold, labels = [record["output"] for record in examples], seen.split.spec.labels
    hit = "correct" if labels is None else "label_correct"
    wrong = [record[hit] for record in examples if record.get("icl_wrong")]
    narrow, error = column("d_ntp"), results.mean(np.array(column("hidden_error")))
    return {
        "accuracy": results.proportion(column("correct")),
        "first_token_accuracy": results.proportion(column("first_token_correct")),
        "label_accuracy": results.proportion(column("label_correct")),
        "macro_f1": results.macro_f1(gold, seen.labels, labels) if seen.labels and labels else None,
        "in_label_rate": results.proportion(column("in_label_set")),
        "d_ntp": results.mean(np.array(narrow)),
        "d_ntp_support": len(_support(lm, seen)) if narrow else None,
        "d_ntp_full": results.mean(np.array(column("d_ntp_full"))),
        "label_logit_error": results.mean(np.array(column("label_logit_error"))),
        "hidden_error": error,
        "d_ntp_bound": _bound(lm, seen, error),
        "agreement": results.proportion(column("agrees")),
        "when_icl_wrong": results.proportion(wrong),
    }
