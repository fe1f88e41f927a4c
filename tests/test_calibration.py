"""Calibration against a plain loop (baselines.md, section 9): the model's label distribution over what it says of
nothing, or over its mean on unlabelled queries."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate import observe, score
from taskvec.lm import LM
from taskvec.methods.calibration import Calibrated, Calibration
from taskvec.prompts import Example
from taskvec.tasks import Task
from tests import tiny
from tests.reference import answer, both_families, exact_lm, label_task, open_task, run

LABELS = ("good", "bad", "not good at all")
FREE = ("N/A", "", "[MASK]")


@torch.no_grad()
def distribution(lm: LM, query: str, demos: Sequence[Example] = ()) -> Tensor:
    """p(label | x): the product of each whole label's token probabilities, renormalised over the labels."""
    whole = []
    for label in LABELS:
        head, tail = answer(query, f" {label}", demos)
        logs = run(lm.model, head + tail).logits.double().log_softmax(-1)
        whole.append(sum(float(logs[len(head) - 1 + k, token]) for k, token in enumerate(tail)))
    return torch.tensor(whole, dtype=torch.float64).softmax(-1)


def prior(lm: LM, inputs: Sequence[str], demos: Sequence[Example] = ()) -> Tensor:
    return torch.stack([distribution(lm, text, demos) for text in inputs]).mean(0)


def calibrated(p: Tensor, pbar: Tensor) -> Tensor:
    ratio = p / pbar
    return ratio / ratio.sum()


def fitted(method: Calibration, family: str = "llama", task: Task | None = None, seed: int = 0) -> Calibrated:
    task = task or label_task()
    return method.fit(exact_lm(family), task.train, task.dev, seed=seed)


def probabilities(lm: LM, rival: Calibrated, demos: Sequence[Example] = ()) -> Tensor:
    format = label_task().spec.format
    prompts = [lm.encode(format.prompt(example.input, demos)) for example in label_task().dev.examples]
    return rival.label_logprobs(lm, prompts).exp()


def queries_of(limit: int, seed: int = 0) -> list[str]:
    train = label_task().train
    return [query.input for query in train.queries(train.demonstrations(seed=seed), limit, seed=seed)]


def assert_near(got: Tensor, expected: Sequence[Tensor]) -> None:
    torch.testing.assert_close(got.double(), torch.stack(list(expected)), atol=1e-5, rtol=1e-4)


@both_families
def test_contextual_divides_by_the_mean_distribution_of_content_free_inputs(family: str) -> None:
    lm = exact_lm(family)
    rival, pbar = fitted(Calibration(), family), prior(lm, FREE)
    torch.testing.assert_close(rival.prior.double(), pbar, atol=1e-5, rtol=1e-4)
    dev = label_task().dev
    rows = [distribution(lm, example.input) for example in dev.examples]
    expected = [calibrated(row, pbar) for row in rows]
    assert_near(probabilities(lm, rival), expected)
    assert (torch.stack(expected) - torch.stack(rows)).abs().max() > 0.05
    seen = observe(lm, dev, rival)
    assert seen.labels == tuple(LABELS[int(row.argmax())] for row in expected)


@both_families
@pytest.mark.parametrize("seed", [0, 2])
def test_batch_divides_by_the_mean_of_probabilities_over_train_queries(family: str, seed: int) -> None:
    lm = exact_lm(family)
    rival = fitted(Calibration(how="batch", queries=12), family, seed=seed)
    rows = torch.stack([distribution(lm, text) for text in queries_of(12, seed)])
    torch.testing.assert_close(rival.prior.double(), rows.mean(0), atol=1e-5, rtol=1e-4)
    geometric = rows.log().mean(0).softmax(-1)  # what a mean of logarithms would give
    assert (rows.mean(0) - geometric).abs().max() > 1e-3
    expected = [calibrated(distribution(lm, example.input), rows.mean(0)) for example in label_task().dev.examples]
    assert_near(probabilities(lm, rival), expected)
    assert rival.origin.cost.queries == 12


@pytest.mark.parametrize("how", ["contextual", "batch"])
def test_few_shot_prompts_are_calibrated_behind_the_same_demonstrations(how: Any) -> None:
    lm, task = exact_lm("llama"), label_task()
    demos = task.train.demonstrations(seed=0)
    rival = fitted(Calibration(how=how, queries=8, prompt="few-shot"))
    assert (rival.origin.prompt, rival.origin.shown) == ("few-shot", demos)
    pbar = prior(lm, FREE if how == "contextual" else queries_of(8), demos)
    torch.testing.assert_close(rival.prior.double(), pbar, atol=1e-5, rtol=1e-4)
    expected = [calibrated(distribution(lm, example.input, demos), pbar) for example in task.dev.examples]
    assert_near(observe(lm, task.dev, rival).label_logprobs.exp(), expected)


def test_a_uniform_prior_changes_nothing() -> None:
    lm, task = exact_lm("llama"), label_task()
    rival = replace(fitted(Calibration()), prior=torch.full((3,), 1 / 3, dtype=torch.float64))
    assert_near(probabilities(lm, rival), [distribution(lm, example.input) for example in task.dev.examples])
    assert observe(lm, task.dev, rival).labels == observe(lm, task.dev).labels


def test_the_ratio_of_two_labels_moves_by_one_constant_for_every_query() -> None:
    """A calibration is a bias of the labels' logits: it leaves the ranking of queries by z_k - z_j as it was."""
    lm, task = exact_lm("llama"), label_task()
    before = torch.stack([distribution(lm, example.input) for example in task.dev.examples]).log()
    moved = probabilities(lm, fitted(Calibration())).log() - before
    relative = moved - moved[:, :1]
    torch.testing.assert_close(relative, relative[:1].expand_as(relative), atol=1e-4, rtol=0)
    assert relative.abs().max() > 0.1


@pytest.mark.parametrize("how", ["contextual", "batch"])
@pytest.mark.parametrize("shown", ["zero-shot", "few-shot"])
def test_no_test_or_dev_item_is_read_and_no_label_but_the_demonstrations(
    how: Any, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, task = tiny.fresh_lm("llama"), label_task()
    texts: list[str] = []
    encode = LM.encode

    def watched(self: LM, text: Any) -> Any:
        texts.append(text if isinstance(text, str) else text.text)
        return encode(self, text)

    monkeypatch.setattr(LM, "encode", watched)
    rival = Calibration(how=how, queries=20, prompt=shown).fit(lm, task.train, task.dev)
    asked = {text.split("\n")[-1].removesuffix(" ->") for text in texts if text.endswith(" ->")}
    kept = {example.input for example in (*task.test.examples, *task.dev.examples)}
    assert asked
    assert not asked & kept
    assert asked == (set(FREE) if how == "contextual" else set(queries_of(20)))
    assert rival.origin.cost.labels == (3 if shown == "few-shot" else 0)
    assert rival.origin.cost.queries == (20 if how == "batch" else 0)


def test_the_queries_outputs_and_dev_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), label_task()
    demos = task.train.demonstrations(seed=0)
    hidden = tuple(e if e in set(demos) else replace(e, output="bad") for e in task.train.examples)
    dev = replace(task.dev, examples=(Example("other", "good"),))
    monkeypatch.setattr(type(task.train), "demonstrations", lambda self, *, seed: demos)
    method = Calibration(how="batch", queries=10)
    one, two = method.fit(lm, task.train, task.dev), method.fit(lm, replace(task.train, examples=hidden), dev)
    assert torch.equal(one.prior, two.prior)


def test_it_is_scored_as_a_rival_that_only_chooses_labels() -> None:
    lm, task = exact_lm("llama"), label_task()
    row = score(lm, task.dev, fitted(Calibration())).rows[0]
    pbar = prior(lm, FREE)
    hits = [
        LABELS[int(calibrated(distribution(lm, example.input), pbar).argmax())] == example.output
        for example in task.dev.examples
    ]
    assert row.accuracy is not None
    assert row.in_label_rate is not None
    assert row.accuracy.value == pytest.approx(sum(hits) / len(hits))
    assert row.accuracy == row.label_accuracy
    assert row.in_label_rate.value == 1.0
    assert row.d_ntp_full is None
    assert row.d_ntp is not None
    assert row.method == "calibration"
    assert row.found["prior"] == pytest.approx(dict(zip(LABELS, pbar.tolist(), strict=True)), abs=1e-5)


@pytest.mark.parametrize("how", ["contextual", "batch"])
def test_a_free_text_task_is_refused_before_a_token_is_computed(how: Any) -> None:
    lm, task = tiny.fresh_lm("llama"), open_task()
    with lm.metered() as meter, pytest.raises(InputError, match="a task with labels, for calibration"):
        Calibration(how=how).fit(lm, task.train, task.dev)
    assert meter.tokens == 0


def test_no_queries_are_refused() -> None:
    with pytest.raises(InputError, match=r"calibration\.queries of at least 1"):
        fitted(Calibration(how="batch", queries=0))
