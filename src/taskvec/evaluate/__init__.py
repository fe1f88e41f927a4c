"""Scores: one split, one vector, one row. And what fitting needs of them: choices on dev, costs, origins."""

from taskvec.evaluate.choose import choose, pick
from taskvec.evaluate.controls import ShuffledPairing, random_like
from taskvec.evaluate.fitting import (
    Fitting,
    above_zero,
    at_least_one,
    changed_by_context,
    longest_answer,
    never_negative,
    single,
)
from taskvec.evaluate.lessons import Lessons, distilled
from taskvec.evaluate.observe import Condition, Observation, encode_answers, need_labels, observe, reaching
from taskvec.evaluate.scoring import score, score_observed

__all__ = [
    "Condition",
    "Fitting",
    "Lessons",
    "Observation",
    "ShuffledPairing",
    "above_zero",
    "at_least_one",
    "changed_by_context",
    "choose",
    "distilled",
    "encode_answers",
    "longest_answer",
    "need_labels",
    "never_negative",
    "observe",
    "pick",
    "random_like",
    "reaching",
    "score",
    "score_observed",
    "single",
]
