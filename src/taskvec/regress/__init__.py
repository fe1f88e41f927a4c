"""Functional regression: transformers that learn functions in context, and whether a vector carries the function.

learner = Learner.from_pretrained("linear-d3")      # an LM: sites, inject, capture, replay and methods serve it
with inject(learner, vector):
    learner.predict([learner.points(xs, ys, query)])
"""

from taskvec.regress.config import LearnerConfig, load_config
from taskvec.regress.functions import FunctionClass, Functions
from taskvec.regress.learner import Learner, squared_error
from taskvec.regress.training import train

__all__ = [
    "FunctionClass",
    "Functions",
    "Learner",
    "LearnerConfig",
    "load_config",
    "squared_error",
    "train",
]
