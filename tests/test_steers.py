"""It steers: on the packaged model the vectors beat the bare prompt and a random vector of equal norm."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from taskvec.evaluate import Condition, observe, random_like, score
from taskvec.evaluate.scoring import few_shot
from taskvec.lm import LM
from taskvec.methods import Method
from taskvec.methods.function_vector import FunctionVector
from taskvec.methods.hendel import HendelTaskVector
from taskvec.methods.learned import LearnedTaskVector
from taskvec.methods.linear import LinearTaskVector
from taskvec.methods.mean_difference import MeanDifference
from taskvec.results import Metric, Row
from taskvec.tasks import Task
from taskvec.vector import TaskVector

REVIEWS = Path(__file__).parent.parent / "examples" / "reviews.jsonl"


@cache
def past_tense() -> Task:
    return Task.from_jsonl("past_tense")


@cache
def reviews() -> Task:
    return Task.from_jsonl(REVIEWS)


@dataclass(frozen=True)
class Steered:
    """The test rows of the bare prompt, the few-shot prompt, the vector and its random control."""

    zero: Row
    few: Row
    vector: Row
    random: Row


def steered(lm: LM, task: Task, method: Method) -> Steered:
    vector = method.fit(lm, task.train, task.dev, seed=0)
    assert isinstance(vector, TaskVector)
    assert vector.origin is not None
    reference = observe(lm, task.test, few_shot(vector.origin))

    def row(condition: Condition) -> Row:
        return score(lm, task.test, condition, reference=reference).rows[0]

    return Steered(row(None), row(few_shot(vector.origin)), row(vector), row(random_like(vector, seed=0)))


def low(metric: Metric | None) -> float:
    assert metric is not None
    return metric.low


def value(metric: Metric | None) -> float:
    assert metric is not None
    return metric.value


def high(metric: Metric | None) -> float:
    assert metric is not None
    return metric.high


@pytest.mark.real
def test_hendel_at_one_layer_steers(smollm: LM) -> None:
    found = steered(smollm, Task.from_jsonl("past_tense", n_test=40), HendelTaskVector(layer=20))
    for other in (found.zero, found.random):
        assert low(found.vector.first_token_accuracy) > high(other.first_token_accuracy)
        assert value(found.vector.d_ntp_full) < value(other.d_ntp_full)
    assert value(found.few.first_token_accuracy) > 0.8
    assert value(found.few.d_ntp_full) == 0


@pytest.mark.real
@pytest.mark.slow
def test_hendel_steers_at_the_layer_it_chooses(smollm: LM) -> None:
    found = steered(smollm, past_tense(), HendelTaskVector())
    for other in (found.zero, found.random):
        assert low(found.vector.first_token_accuracy) > high(other.first_token_accuracy)
        assert value(found.vector.accuracy) > value(other.accuracy)


@pytest.mark.real
@pytest.mark.slow
def test_a_function_vector_steers_at_the_layer_it_chooses(smollm: LM) -> None:
    found = steered(smollm, past_tense(), FunctionVector(prompts=50, prefilter=60))
    for other in (found.zero, found.random):
        assert low(found.vector.first_token_accuracy) > high(other.first_token_accuracy)
        assert value(found.vector.d_ntp_full) < value(other.d_ntp_full)


@pytest.mark.real
@pytest.mark.slow
def test_learned_steers_and_knows_when_to_stop(smollm: LM) -> None:
    found = steered(smollm, past_tense(), LearnedTaskVector(layer=12, steps=60))
    for other in (found.zero, found.random):
        assert low(found.vector.accuracy) > high(other.accuracy)
        assert low(found.vector.first_token_accuracy) > high(other.first_token_accuracy)
    assert value(found.vector.accuracy) > 0.8 * value(found.few.accuracy)
    assert found.vector.prompt_tokens == found.zero.prompt_tokens < 0.2 * found.few.prompt_tokens


@pytest.mark.real
@pytest.mark.slow
def test_linear_steers_closer_to_few_shot_than_the_mean_difference(smollm: LM) -> None:
    linear = steered(smollm, reviews(), LinearTaskVector())
    mean = steered(smollm, reviews(), MeanDifference())
    for other in (linear.zero, linear.random, mean.vector):
        assert high(linear.vector.d_ntp) < low(other.d_ntp)
        assert high(linear.vector.d_ntp_full) < low(other.d_ntp_full)
