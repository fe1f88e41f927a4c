"""Numbers as text: functions that any language model is asked for, as the linear task vector paper does
(arXiv 2605.20730).

    x: [0.1234, -1.2345]
    y: 0.4321

Inputs have `DECIMALS` decimals, and values are those of the rounded inputs. The paper's ReLU functions have another
scale: y = sum of a_i relu(w_i'x) over 100 units with a_i ~ N(0, 1/100), so predicting 0 leaves d / 2; ours leave d.
Beside the methods stand the references that the paper lacks: predict 0, the mean of the demonstrations, least squares
on them. What is not a number counts as 0, as in the released code, and is counted.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from taskvec import methods as registry
from taskvec.evaluate import Condition, observe
from taskvec.evaluate.shared import shared_work
from taskvec.lm import LM
from taskvec.methods import Method
from taskvec.prompts import Example, PromptFormat
from taskvec.regress.functions import FunctionClass, generator_of
from taskvec.regress.rows import SHUFFLED, YARDSTICK, RegressRow
from taskvec.results import mean
from taskvec.tasks import Task, TaskSpec

FORMAT = PromptFormat.named("x: {input}\ny: {output}\n\n")
DECIMALS = 4
METHODS = ("zero-shot", "few-shot", "mean-difference", "linear")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class TextSizes:
    """Demonstrations, test items, unlabelled queries of `linear` and `mean-difference`."""

    shots: int = 12
    n_test: int = 60
    queries: int = 64


def text_task(family: FunctionClass, sizes: TextSizes, *, seed: int) -> Task:
    """One function of the class as a task of texts: the same function for demonstrations, queries and test."""
    generator = generator_of(seed, "text")
    count = 3 * sizes.n_test + sizes.shots + sizes.queries  # at most 40 % are test, 20 % dev
    x = torch.randn(1, 2 * count, family.d, generator=generator, dtype=torch.float64)
    x = ((x * 10**DECIMALS).round() / 10**DECIMALS).unique(dim=1)
    x = x[:, torch.randperm(x.shape[1], generator=generator)[:count]]
    y = family.draw(1, generator)(x.float())[0]
    examples = [Example(_listed(row.tolist()), f"{value:.{DECIMALS}f}") for row, value in zip(x[0], y, strict=True)]
    spec = TaskSpec(f"{family.kind} of {family.d} numbers", FORMAT, sizes.shots)
    return Task.from_examples(spec, examples, n_test=sizes.n_test)


def text_rows(
    lm: LM,
    family: FunctionClass,
    *,
    seed: int,
    sizes: TextSizes = TextSizes(),
    methods: Sequence[str] = METHODS,
) -> list[RegressRow]:
    """Squared errors of the methods, their shuffled control, and the references."""
    task = text_task(family, sizes, seed=seed)
    values = np.array([float(example.output) for example in task.test.examples])
    settings = {name: {"queries": str(sizes.queries)} for name in ("linear", "mean-difference") if name in methods}
    out = list[RegressRow]()
    with shared_work(lm):
        for method, control in _asked(registry.make_all(list(methods), settings, {})):
            condition: Condition = method.fit(lm, task.train, task.dev, seed=seed)
            read = [number(text) for text in observe(lm, task.test, condition).texts]
            wrong = np.array([0.0 if found is None else found for found in read]) - values
            out.append(_row(lm, family, (method.name, control), wrong, (sizes.shots, seed), read.count(None)))
    for name, guessed in _references(task, seed).items():
        out.append(_row(lm, family, (name, YARDSTICK), guessed - values, (sizes.shots, seed)))
    return out


def _asked(methods: Sequence[Method]) -> Iterator[tuple[Method, str]]:
    """Methods, and their shuffled controls."""
    for method in methods:
        yield method, ""
        if hasattr(method, "shuffled"):
            yield method.shuffled(), SHUFFLED


def number(text: str) -> float | None:
    """The first number of an answer; None where there is none, or one too large for a float."""
    found = _NUMBER.search(text)
    value = math.inf if found is None else float(found[0])
    return value if math.isfinite(value) else None


def _references(task: Task, seed: int) -> dict[str, NDArray[np.float64]]:
    """Predict 0; the mean of the demonstrations; least squares on them."""
    demos, tests = task.train.demonstrations(seed=seed), task.test.examples
    x, asked = (np.array([_numbers(example.input) for example in some]) for some in (demos, tests))
    y = np.array([float(demo.output) for demo in demos])
    fitted, *_ = np.linalg.lstsq(x, y, rcond=None)
    flat = np.zeros(len(tests))
    return {"zero": flat, "mean of the demonstrations": flat + y.mean(), "least squares": asked @ fitted}


def _row(
    lm: LM,
    family: FunctionClass,
    method: tuple[str, str],
    wrong: NDArray[np.float64],
    at: tuple[int, int],
    unparsed: int = 0,
) -> RegressRow:
    return RegressRow(
        method=method[0],
        control=method[1],
        learner=lm.id,
        function=family.kind,
        test="text",
        examples=at[0],
        seed=at[1],
        n=len(wrong),
        mse=mean(np.square(wrong)),
        fidelity=None,
        variance=family.variance,
        unparsed=unparsed,
    )


def _listed(row: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.{DECIMALS}f}" for value in row) + "]"


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.strip("[]").split(",")]
