"""A function learner of two tiny layers with random weights, and points for it."""

from functools import cache

import torch
from torch import Tensor

from taskvec.prompts import Example, PromptFormat
from taskvec.regress.config import LearnerConfig
from taskvec.regress.functions import FunctionClass
from taskvec.regress.learner import Learner, make_model, squared_error
from taskvec.tasks import Task, TaskSpec
from tests import tiny

CONFIG = LearnerConfig(
    name="mini", function="linear", d=2, points=4, positions=9, layers=2, heads=2, width=16, steps=6, check=2, batch=4
)


@cache
def learner() -> Learner:
    """Random weights, large enough that every head and layer matters."""
    return fresh()


def fresh() -> Learner:
    """One of its own, for tests that change it."""
    model = make_model(CONFIG)
    with tiny.seeded(7):
        tiny.randomize(model)
    return Learner(model, CONFIG)


def points(n: int, seed: int = 0) -> Tensor:
    """n points (n, 2)."""
    return torch.randn(n, CONFIG.d, generator=torch.Generator().manual_seed(seed))


def task(n: int = 60, shots: int = 3) -> Task:
    """A linear function as a task of texts."""
    x = points(n, seed=5)
    y = FunctionClass("linear", CONFIG.d).draw(1, torch.Generator().manual_seed(6))(x[None])[0]
    examples = [Example(" ".join(map(str, a.tolist())), str(b)) for a, b in zip(x, y.tolist(), strict=True)]
    spec = TaskSpec("function", PromptFormat.named("{input} -> {output}\n"), shots, loss=squared_error)
    return Task.from_examples(spec, examples, n_test=12)
