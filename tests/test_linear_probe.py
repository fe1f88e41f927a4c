"""The linear probe against scikit-learn on the reference's states."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from taskvec.errors import InputError, MissingSite
from taskvec.evaluate import observe, score
from taskvec.lm import LM
from taskvec.methods.linear_probe import LinearProbe, Probe
from taskvec.prompts import Example
from taskvec.tasks import Task, Train
from tests import tiny
from tests.reference import answer, both_families, exact_lm, head_states, ids, label_task, open_task, prompt, run

LABELS = ("good", "bad", "not good at all")


@torch.no_grad()
def states(lm: LM, examples: Sequence[Example], layer: int | None = None) -> Tensor:
    """Zero-shot states at the last prompt token: the unembedding's input, or a block's output."""
    runs = [run(lm.model, ids(prompt(example.input))) for example in examples]
    return head_states(runs) if layer is None else torch.stack([r.resid[layer][-1] for r in runs]).double()


def sklearns(h: Tensor, targets: Sequence[str], asked: Tensor, folds: int = 5) -> tuple[list[str], Any, Any]:
    """(predictions, probabilities by sorted class, the model) of cross-validated regression on standardised states."""
    from sklearn.linear_model import LogisticRegressionCV

    centre, spread = h.mean(0), h.std(0)
    least = min(list(targets).count(name) for name in set(targets))
    grid = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegressionCV(Cs=grid, cv=min(folds, least), max_iter=1000)
        model.fit(((h - centre) / spread).numpy(), [LABELS.index(name) for name in targets])
    x = ((asked - centre) / spread).numpy()
    return [LABELS[int(i)] for i in model.predict(x)], model.predict_proba(x), model


def few_shot_labels(lm: LM, examples: Sequence[Example], demos: Sequence[Example]) -> list[str]:
    """The likeliest whole label behind the demonstrations."""
    out = []
    for example in examples:
        scores = []
        for label in LABELS:
            head, tail = answer(example.input, f" {label}", demos)
            with torch.no_grad():
                logs = run(lm.model, head + tail).logits.log_softmax(-1)
            scores.append(sum(float(logs[len(head) - 1 + k, token]) for k, token in enumerate(tail)))
        out.append(LABELS[int(np.argmax(scores))])
    return out


def only(task: Task, *names: str) -> Train:
    """The train split with these outputs alone."""
    return replace(task.train, examples=tuple(e for e in task.train.examples if e.output in names))


def fitted(method: LinearProbe, family: str = "llama", train: Train | None = None, seed: int = 0) -> Probe:
    task = label_task()
    return method.fit(exact_lm(family), train or task.train, task.dev, seed=seed)


def drawn(limit: int, seed: int = 0, train: Train | None = None) -> tuple[Example, ...]:
    train = train or label_task().train
    return train.queries(train.demonstrations(seed=seed), limit, seed=seed)


# --- the classifier ---------------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize(("site", "layer"), [("lm_head_in", None), ("resid[1]", 1)])
def test_it_predicts_what_scikit_learn_does_on_standardised_states(family: str, site: str, layer: int | None) -> None:
    lm, dev = exact_lm(family), label_task().dev
    examples = drawn(18, seed=1)
    asked = states(lm, dev.examples, layer)
    predicted, probability, model = sklearns(
        states(lm, examples, layer), [example.output for example in examples], asked
    )
    probe = fitted(LinearProbe(queries=18, site=site), family, seed=1)
    seen = observe(lm, dev, probe)
    assert list(seen.labels or ()) == predicted
    expected = torch.from_numpy(probability)  # classes in the labels' order
    torch.testing.assert_close(seen.label_logprobs.double().exp(), expected, atol=1e-3, rtol=0)
    assert probe.origin.found == {"C": pytest.approx(float(model.C_[0])), "items": 18}


def test_two_classes_are_scikit_learns_one_row() -> None:
    lm, task = exact_lm("llama"), label_task()
    train = only(task, "good", "bad")
    examples = drawn(14, train=train)
    assert len({example.output for example in examples}) == 2
    predicted, probability, _ = sklearns(
        states(lm, examples), [example.output for example in examples], states(lm, task.dev.examples)
    )
    seen = observe(lm, task.dev, fitted(LinearProbe(queries=14), train=train))
    assert list(seen.labels or ()) == predicted
    got = seen.label_logprobs[:, :2].double().exp()
    torch.testing.assert_close(got, torch.from_numpy(probability), atol=1e-3, rtol=0)


@pytest.mark.parametrize("missing", LABELS)
def test_a_label_without_items_is_never_predicted(missing: str) -> None:
    lm, task = exact_lm("llama"), label_task()
    assert any(example.output == missing for example in task.dev.examples)
    probe = fitted(LinearProbe(queries=18), train=only(task, *(name for name in LABELS if name != missing)))
    seen = observe(lm, task.dev, probe)
    assert missing not in (seen.labels or ())
    assert (seen.label_logprobs[:, LABELS.index(missing)].exp() < 1e-12).all()
    far = replace(probe, weight=1000 * probe.weight)  # whatever the states
    assert missing not in (observe(lm, task.dev, far).labels or ())


@pytest.mark.parametrize("name", LABELS)
def test_targets_of_one_class_predict_that_class(name: str) -> None:
    lm, task = exact_lm("llama"), label_task()
    probe = fitted(LinearProbe(queries=6), train=only(task, name))
    seen = observe(lm, task.dev, probe)
    assert set(seen.labels or ()) == {name}
    assert probe.origin.found["C"] is None
    torch.testing.assert_close(seen.label_logprobs[:, LABELS.index(name)], torch.zeros(len(task.dev)))


def test_a_class_with_a_single_item_needs_no_cross_validation() -> None:
    lm, task = exact_lm("llama"), label_task()
    examples = only(task, "good", "bad").examples
    rare = [example for example in examples if example.output == "bad"][:1]
    train = replace(task.train, examples=tuple(e for e in examples if e.output == "good")[:8] + tuple(rare))
    probe = fitted(LinearProbe(queries=0), train=train)
    assert probe.origin.found["C"] is None
    assert set(observe(lm, task.dev, probe).labels or ()) <= {"good", "bad"}


# --- the targets ------------------------------------------------------------------------------------------------------


def test_few_shot_targets_are_the_few_shot_prompts_predictions() -> None:
    lm, task = exact_lm("gpt2"), label_task()
    for seed in range(6):  # a seed whose predictions are not all alike
        examples, demos = drawn(18, seed), task.train.demonstrations(seed=seed)
        targets = few_shot_labels(lm, examples, demos)
        if min(targets.count(name) for name in set(targets)) >= 2 and len(set(targets)) > 1:
            break
    else:
        pytest.fail("no seed with predictions of two kinds")
    probe = fitted(LinearProbe(target="few-shot", queries=18), "gpt2", seed=seed)
    seen = observe(lm, task.dev, probe)
    predicted, _, _ = sklearns(states(lm, examples), targets, states(lm, task.dev.examples))
    assert list(seen.labels or ()) == predicted
    assert (probe.origin.cost.labels, probe.origin.cost.queries) == (3, 18)


def test_few_shot_targets_read_no_gold_label_beyond_the_demonstrations(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), label_task()
    demos = task.train.demonstrations(seed=0)
    hidden = tuple(e if e in set(demos) else replace(e, output="bad") for e in task.train.examples)
    dev = replace(task.dev, examples=(Example("other", "good"),))
    monkeypatch.setattr(Train, "demonstrations", lambda self, *, seed: demos)
    method = LinearProbe(target="few-shot", queries=12)
    one, two = method.fit(lm, task.train, task.dev), method.fit(lm, replace(task.train, examples=hidden), dev)
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)
    gold = LinearProbe(queries=12).fit(lm, replace(task.train, examples=hidden), dev)
    assert not torch.equal(gold.bias, LinearProbe(queries=12).fit(lm, task.train, task.dev).bias)


def test_gold_targets_count_as_labels_read() -> None:
    probe = fitted(LinearProbe(queries=12))
    assert (probe.origin.cost.labels, probe.origin.cost.queries) == (12, 0)


def test_no_queries_means_the_demonstrations_alone() -> None:
    lm = exact_lm("llama")
    task = tiny.tiny_task(shots=9, labels=True)
    demos = task.train.demonstrations(seed=0)
    assert {[d.output for d in demos].count(name) for name in LABELS} == {3}
    probe = LinearProbe(queries=0).fit(lm, task.train, task.dev)
    predicted, _, _ = sklearns(states(lm, demos), [demo.output for demo in demos], states(lm, task.dev.examples))
    assert list(observe(lm, task.dev, probe).labels or ()) == predicted
    assert probe.origin.found["items"] == 9
    assert (probe.origin.cost.labels, probe.origin.cost.queries) == (9, 0)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["gold", "few-shot"])
def test_it_is_scored_as_a_rival_that_only_chooses_labels(target: Any) -> None:
    lm, task = exact_lm("llama"), label_task()
    probe = fitted(LinearProbe(queries=18, target=target))
    row = score(lm, task.test, probe).rows[0]
    seen = observe(lm, task.test, probe)
    hits = [label == example.output for label, example in zip(seen.labels or (), task.test.examples, strict=True)]
    assert row.accuracy is not None
    assert row.in_label_rate is not None
    assert row.accuracy.value == pytest.approx(sum(hits) / len(hits))
    assert row.accuracy == row.label_accuracy
    assert row.in_label_rate.value == 1.0
    assert row.d_ntp_full is None
    assert row.d_ntp is not None
    assert row.agreement is not None
    assert row.method == "linear-probe"
    assert seen.texts == seen.labels


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["gold", "few-shot"])
def test_a_free_text_task_is_refused_before_a_token_is_computed(target: Any) -> None:
    lm, task = tiny.fresh_lm("llama"), open_task()
    with lm.metered() as meter, pytest.raises(InputError, match="a task with labels, for linear-probe"):
        LinearProbe(target=target).fit(lm, task.train, task.dev)
    assert meter.tokens == 0


@pytest.mark.parametrize(("queries", "target"), [(-1, "gold"), (0, "few-shot"), (-1, "few-shot")])
def test_a_number_of_queries_that_means_nothing_is_refused(queries: int, target: Any) -> None:
    with pytest.raises(InputError, match=r"linear-probe\.queries"):
        fitted(LinearProbe(queries=queries, target=target))


@pytest.mark.parametrize("folds", [0, 1])
def test_fewer_than_two_folds_are_refused(folds: int) -> None:
    with pytest.raises(InputError, match=r"linear-probe\.folds"):
        fitted(LinearProbe(folds=folds, queries=18))


def test_a_site_the_model_has_not_is_refused() -> None:
    with pytest.raises(MissingSite, match="a layer from 0 to 2"):
        fitted(LinearProbe(site="resid[7]"))
