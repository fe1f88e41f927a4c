"""Scores: one split, one vector, one row. And what fitting needs of them: choices on dev, costs, origins."""

from taskvec.evaluate.choose import choose, pick
from taskvec.evaluate.controls import ShuffledPairing, random_like
from taskvec.evaluate.fitting import Fitting, at_least_one, single
from taskvec.evaluate.lessons import Lessons, distilled
from taskvec.evaluate.observe import Condition, Observation, encode_answers, need_labels, observe
from taskvec.evaluate.scoring import score, score_observed

__all__ = [
    "Condition",
    "Fitting",
    "Lessons",
    "Observation",
    "ShuffledPairing",
    "at_least_one",
    "choose",
    "distilled",
    "encode_answers",
    "need_labels",
    "observe",
    "pick",
    "random_like",
    "score",
    "score_observed",
    "single",
]
