"""Linear TV's own additions: leave-one-out by explicit refits, the intercept by scikit-learn, labels only by hand."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskvec import methods
from taskvec.errors import InputError
from taskvec.evaluate import observe, score
from taskvec.evaluate.ridge import RIDGES, degrees_of_freedom, leave_one_out, ridge_dual
from taskvec.lm import LM
from taskvec.methods.linear import LinearTaskVector
from taskvec.prompts import Example, PromptFormat
from taskvec.tasks import Task, TaskSpec
from taskvec.vector import Affine, TaskVector
from tests import tiny
from tests.reference import (
    HEAD_IN,
    answer,
    both_families,
    exact_lm,
    head_states,
    ids,
    label_task,
    open_task,
    pairs,
    prompt,
    run,
)

LABELS = ("good", "bad", "not good at all")
PATH = [0.01, 0.3, 2.0, 50.0]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refit(h: Tensor, y: Tensor, ridge: float, *, intercept: bool) -> tuple[Tensor, Tensor]:
    """(W, b) of ridge with rows as queries, an explicit d x d solve; an intercept is not penalised."""
    centre, shift = (h.mean(0), y.mean(0)) if intercept else (torch.zeros_like(h[0]), torch.zeros_like(y[0]))
    x, z = h - centre, y - shift
    w: Tensor = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ z).T
    return w, shift - w @ centre


def left_out_error(h: Tensor, y: Tensor, ridge: float, *, intercept: bool) -> float:
    """N explicit refits, each asked for the query it did not see."""
    errors = []
    for j in range(len(h)):
        rest = [i for i in range(len(h)) if i != j]
        w, b = refit(h[rest], y[rest], ridge, intercept=intercept)
        errors.append((y[j] - w @ h[j] - b).square().sum())
    return float(torch.stack(errors).mean())


@cache
def states(family: str, labels: bool = False) -> tuple[Tensor, Tensor]:
    """H and Y of the 10 queries that `queries=10` draws with seed 0, by the reference."""
    task = label_task() if labels else open_task()
    demos = task.train.demonstrations(seed=0)
    zero, few = pairs(exact_lm(family).model, task.train.queries(demos, 10, seed=0), demos)
    return head_states(zero), head_states(few) - head_states(zero)


def fitted(method: LinearTaskVector, family: str = "llama", labels: bool = False) -> tuple[TaskVector, Affine]:
    task = label_task() if labels else open_task()
    vector = method.fit(exact_lm(family), task.train, task.dev)
    (edit,) = vector.edits
    assert edit.site == HEAD_IN
    assert isinstance(edit.op, Affine)
    return vector, edit.op


def found(vector: TaskVector) -> dict[str, Any]:
    assert vector.origin is not None
    return dict(vector.origin.found)


# --- leave one out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5), (2, 9)])
@pytest.mark.parametrize("intercept", [False, True])
def test_leave_one_out_equals_n_explicit_refits(shape: tuple[int, int], intercept: bool) -> None:
    h, y = gaussian(*shape, seed=1) + 0.7, gaussian(*shape, seed=2) - 1.3
    x, z = (h - h.mean(0), y - y.mean(0)) if intercept else (h, y)
    expected = [left_out_error(h, y, ridge, intercept=intercept) for ridge in PATH]
    assert leave_one_out(x, z, PATH, intercept=intercept) == pytest.approx(expected, rel=1e-8)


def test_the_intercept_counts_in_the_leverage() -> None:
    """Without it the errors would be too small: centring has already looked at the query that is left out."""
    h, y = gaussian(6, 4, seed=1), gaussian(6, 4, seed=2)
    x, z = h - h.mean(0), y - y.mean(0)
    without, right = (leave_one_out(x, z, [2.0], intercept=flag)[0] for flag in (False, True))
    assert without < 0.95 * right


def test_one_eigendecomposition_gives_the_whole_path(monkeypatch: pytest.MonkeyPatch) -> None:
    h, y = gaussian(7, 12, seed=1), gaussian(7, 12, seed=2)
    alone = [leave_one_out(h, y, [ridge])[0] for ridge in PATH]
    decompose, calls = torch.linalg.eigh, []

    def counted(matrix: Tensor) -> Any:
        calls.append(matrix.shape)
        return decompose(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    assert leave_one_out(h, y, PATH) == pytest.approx(alone, rel=1e-12)
    assert calls == [(7, 7)]


@both_families
@pytest.mark.parametrize("intercept", [False, True])
def test_loo_takes_the_ridge_with_the_least_left_out_error_on_the_queries(family: str, intercept: bool) -> None:
    h, y = states(family)
    scale = float(h.square().sum(1).mean())
    ridges = [ridge * scale for ridge in RIDGES]
    errors = [left_out_error(h, y, ridge, intercept=intercept) for ridge in ridges]
    best = ridges[errors.index(min(errors))]
    vector, op = fitted(LinearTaskVector(queries=10, ridge="loo", intercept=intercept), family)
    assert found(vector)["ridge"] == pytest.approx(best, rel=1e-5)
    w, b = refit(h, y, best, intercept=intercept)
    fresh = gaussian(6, h.shape[1]) * h.std()
    torch.testing.assert_close(op(fresh) - fresh, fresh @ w.T + b, atol=1e-4 * float(h.std()), rtol=1e-3)


def test_loo_candidates_span_decades_of_the_mean_squared_norm() -> None:
    assert len(RIDGES) > 5
    assert list(RIDGES) == sorted(RIDGES)
    assert RIDGES[0] <= 1e-3
    assert RIDGES[-1] >= 1e3


def test_loo_reads_no_label_and_no_dev() -> None:
    lm, task = exact_lm("llama"), open_task()
    demos = set(task.train.demonstrations(seed=0))
    hidden = tuple(e if e in demos else replace(e, output="red") for e in task.train.examples)
    dev = replace(task.dev, examples=(Example("other", "thing"),))
    method = LinearTaskVector(queries=10, ridge="loo", intercept=True)
    one, two = method.fit(lm, task.train, task.dev), method.fit(lm, replace(task.train, examples=hidden), dev)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors().values(), two.tensors().values(), strict=True))
    assert one.origin is not None
    assert (one.origin.cost.labels, one.origin.cost.queries) == (3, 10)


@pytest.mark.parametrize(("text", "value"), [("loo", "loo"), ("2.5", 2.5), ("7", 7.0), ("1e-3", 1e-3)])
def test_a_ridge_is_parsed_as_loo_or_as_a_number(text: str, value: Any) -> None:
    method: Any = methods.make("linear", {"ridge": text})
    assert method.ridge == value
    assert type(method.ridge) is type(value)


def test_a_ridge_named_on_the_command_line_fits_as_the_field_does() -> None:
    lm, task = exact_lm("llama"), open_task()
    for text, value in (("loo", "loo"), ("2.5", 2.5)):
        made = methods.make("linear", {"ridge": text, "queries": "10", "intercept": "true"})
        expected = LinearTaskVector(ridge=value, queries=10, intercept=True)  # type: ignore[arg-type]
        assert made == expected
        assert made.fit(lm, task.train, task.dev) is not None


@pytest.mark.parametrize("text", ["gcv", "LOO ", "5;6"])
def test_another_word_for_a_ridge_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"for linear\.ridge"):
        methods.make("linear", {"ridge": text})


# --- intercept --------------------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("ridge", [0.5, 20.0])
def test_the_intercept_solution_is_scikit_learns_ridge(family: str, ridge: float) -> None:
    from sklearn.linear_model import Ridge

    h, y = states(family)
    model = Ridge(alpha=ridge, solver="cholesky").fit(h.numpy(), y.numpy())
    vector, op = fitted(LinearTaskVector(queries=10, ridge=ridge, intercept=True), family)
    assert op.bias is not None
    fresh = gaussian(6, h.shape[1]) * h.std() + h.mean(0)
    expected = torch.from_numpy(model.predict(fresh.numpy()))
    torch.testing.assert_close(op(fresh) - fresh, expected, atol=1e-4 * float(h.std()), rtol=1e-3)
    assert found(vector)["ridge"] == ridge


def test_without_an_intercept_it_is_scikit_learns_ridge_without_one() -> None:
    from sklearn.linear_model import Ridge

    h, y = states("llama")
    model = Ridge(alpha=5.0, fit_intercept=False).fit(h.numpy(), y.numpy())
    _, op = fitted(LinearTaskVector(queries=10))
    assert op.bias is None
    fresh = gaussian(6, h.shape[1]) * h.std()
    torch.testing.assert_close(op(fresh) - fresh, torch.from_numpy(model.predict(fresh.numpy())), atol=1e-3, rtol=1e-3)


def test_with_an_intercept_it_becomes_the_mean_difference_as_the_ridge_grows() -> None:
    h, y = states("llama")
    _, op = fitted(LinearTaskVector(queries=10, ridge=1e12, intercept=True))
    fresh = gaussian(6, h.shape[1]) * h.std()
    torch.testing.assert_close(op(fresh) - fresh, y.mean(0).expand(6, -1), atol=1e-3, rtol=0)


# --- what is reported -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
@pytest.mark.parametrize("ridge", [1e-6, 3.0, 1e6])
def test_degrees_of_freedom_are_the_trace(shape: tuple[int, int], ridge: float) -> None:
    h = gaussian(*shape, seed=5)
    gram = h @ h.T
    trace = float((gram @ torch.linalg.inv(gram + ridge * torch.eye(len(h), dtype=h.dtype))).trace())
    assert degrees_of_freedom(h, ridge) == pytest.approx(trace, rel=1e-6)
    assert 0 < trace <= 7 + 1e-6


@pytest.mark.parametrize("intercept", [False, True])
def test_found_holds_the_ridge_its_degrees_of_freedom_and_its_size(intercept: bool) -> None:
    h, _ = states("llama")
    x = h - h.mean(0) if intercept else h
    gram = x @ x.T
    trace = float((gram @ torch.linalg.inv(gram + 5.0 * torch.eye(10, dtype=h.dtype))).trace())
    vector, _ = fitted(LinearTaskVector(queries=10, intercept=intercept))
    assert found(vector)["ridge"] == 5.0
    assert found(vector)["degrees_of_freedom"] == pytest.approx(trace, rel=1e-4)
    assert found(vector)["ridge_over_norm"] == pytest.approx(5.0 / float(h.square().sum(1).mean()), rel=1e-5)


# --- labels only ------------------------------------------------------------------------------------------------------


def columns() -> list[int]:
    return [answer("red1", f" {label}")[1][0] for label in LABELS]


@both_families
@pytest.mark.parametrize("intercept", [False, True])
def test_labels_only_keeps_the_labels_logits_with_a_map_of_rank_k(family: str, intercept: bool) -> None:
    lm, task = exact_lm(family), label_task()
    whole, _ = fitted(LinearTaskVector(queries=10, intercept=intercept), family, labels=True)
    small, op = fitted(LinearTaskVector(queries=10, intercept=intercept, labels_only=True), family, labels=True)
    one, two = (observe(lm, task.dev, vector).logits for vector in (whole, small))
    torch.testing.assert_close(one[:, columns()], two[:, columns()], atol=1e-4, rtol=0)
    assert (one - two).abs().max() > 0.1  # other tokens' logits are not kept
    assert op.read.shape == op.write.shape == (3, 32)
    assert int(torch.linalg.matrix_rank(op.read.double().T @ op.write.double())) == 3


@both_families
def test_labels_only_is_zero_shot_and_a_ridge_on_label_logit_differences(family: str) -> None:
    """Section 3, identity 2: K outputs, no state of the few-shot run in it."""
    lm, task = exact_lm(family), label_task()
    demos = task.train.demonstrations(seed=0)
    zero, few = pairs(lm.model, task.train.queries(demos, 10, seed=0), demos)
    h = head_states(zero)
    z_zero, z_few = (torch.stack([r.logits[-1, columns()] for r in runs]) for runs in (zero, few))
    w, _ = refit(h, z_few - z_zero, 5.0, intercept=False)
    with torch.no_grad():
        tests = [run(lm.model, ids(prompt(q.input))) for q in task.dev.examples]
    expected = torch.stack([r.logits[-1, columns()] for r in tests]) + head_states(tests) @ w.T
    vector, _ = fitted(LinearTaskVector(queries=10, labels_only=True), family, labels=True)
    got = observe(lm, task.dev, vector).logits[:, columns()]
    torch.testing.assert_close(got, expected.float(), atol=1e-3, rtol=1e-4)


def test_labels_only_predicts_first_tokens_as_the_whole_map_and_keeps_d_ntp() -> None:
    lm, task = exact_lm("llama"), label_task()
    scored = [
        score(lm, task.dev, fitted(LinearTaskVector(queries=10, labels_only=flag), labels=True)[0]).rows[0]
        for flag in (False, True)
    ]
    assert scored[0].d_ntp is not None
    assert scored[1].d_ntp is not None
    assert scored[0].d_ntp.value == pytest.approx(scored[1].d_ntp.value, abs=1e-5)


def test_labels_only_needs_labels() -> None:
    lm, task = tiny.fresh_lm("llama"), open_task()
    with lm.metered() as meter, pytest.raises(InputError, match="labels_only"):
        LinearTaskVector(labels_only=True).fit(lm, task.train, task.dev)
    assert meter.tokens == 0


@pytest.mark.parametrize("site", ["resid[2]", "mlp[1]"])
def test_labels_only_needs_the_unembeddings_input(site: str) -> None:
    with pytest.raises(InputError, match=r"lm_head_in.*labels_only"):
        LinearTaskVector(labels_only=True, site=site).fit(exact_lm("llama"), label_task().train, label_task().dev)


def sharing_task() -> Task:
    """Two of the labels begin with one token."""
    names = ("good", "good at all", "bad")
    examples = [Example(f"red{i}", names[i % 3]) for i in range(40)]
    assert answer("red1", " good")[1][0] == answer("red1", " good at all")[1][0]
    return Task.from_examples(TaskSpec("sharing", PromptFormat.named("arrow"), 3, names), examples, n_test=8)


def test_labels_only_refuses_labels_with_a_shared_first_token() -> None:
    task = sharing_task()
    with pytest.raises(InputError, match="first tokens of their own"):
        LinearTaskVector(queries=10, labels_only=True).fit(exact_lm("llama"), task.train, task.dev)


# --- identities of section 9 on the dual solve ------------------------------------------------------------------------

seeds, ridges = st.integers(0, 1000), st.floats(0.05, 50.0)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def dual(h: Tensor, y: Tensor, ridge: float) -> Tensor:
    """W (d, d) with W h = (h H') A."""
    return ridge_dual(h, y, ridge).T @ h


def data(size: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    return gaussian(*size, seed=seed), gaussian(*size, seed=seed + 5000)


@given(size=sizes, seed=seeds, ridge=ridges)
@settings(deadline=None, max_examples=40)
def test_dual_equals_primal(size: tuple[int, int], seed: int, ridge: float) -> None:
    h, y = data(size, seed)
    torch.testing.assert_close(dual(h, y, ridge), refit(h, y, ridge, intercept=False)[0], atol=1e-9, rtol=1e-8)


@given(size=sizes, seed=seeds, ridge=ridges)
@settings(deadline=None, max_examples=40)
def test_every_query_twice_with_twice_the_ridge_is_the_same_map(size: tuple[int, int], seed: int, ridge: float) -> None:
    h, y = data(size, seed)
    twice = dual(torch.cat([h, h]), torch.cat([y, y]), 2 * ridge)
    torch.testing.assert_close(twice, dual(h, y, ridge), atol=1e-9, rtol=1e-8)


@given(size=sizes, seed=seeds, ridge=ridges, c=st.floats(0.1, 10.0), sign=st.sampled_from([1.0, -1.0]))
@settings(deadline=None, max_examples=40)
def test_scaled_states_with_the_squared_scale_of_the_ridge_are_the_same_map(
    size: tuple[int, int], seed: int, ridge: float, c: float, sign: float
) -> None:
    h, y = data(size, seed)
    scaled = dual(sign * c * h, sign * c * y, c * c * ridge)
    torch.testing.assert_close(scaled, dual(h, y, ridge), atol=1e-9, rtol=1e-8)


@given(size=sizes, seed=seeds, ridge=ridges)
@settings(deadline=None, max_examples=40)
def test_rotated_states_rotate_the_map(size: tuple[int, int], seed: int, ridge: float) -> None:
    h, y = data(size, seed)
    q = torch.linalg.qr(gaussian(size[1], size[1], seed=seed + 9000)).Q
    torch.testing.assert_close(dual(h @ q.T, y @ q.T, ridge), q @ dual(h, y, ridge) @ q.T, atol=1e-9, rtol=1e-8)


@given(size=sizes, seed=seeds, ridge=ridges)
@settings(deadline=None, max_examples=40)
def test_the_direct_map_onto_few_shot_states_is_w_plus_p_and_not_w_plus_the_identity(
    size: tuple[int, int], seed: int, ridge: float
) -> None:
    h, y = data(size, seed)
    p = h.T @ torch.linalg.inv(h @ h.T + ridge * torch.eye(len(h), dtype=h.dtype)) @ h
    w, direct = dual(h, y, ridge), dual(h, h + y, ridge)
    torch.testing.assert_close(direct, w + p, atol=1e-9, rtol=1e-8)
    assert (direct - w - torch.eye(size[1], dtype=h.dtype)).abs().max() > 1e-6


# --- methods.fit paths ------------------------------------------------------------------------------------------------


def test_a_vector_with_a_bias_is_saved_and_loaded(tmp_path: Any) -> None:
    lm: LM = exact_lm("llama")
    vector, _ = fitted(LinearTaskVector(queries=10, ridge="loo", intercept=True, labels_only=True), labels=True)
    vector.save_pretrained(tmp_path / "v")
    loaded = TaskVector.from_pretrained(tmp_path / "v")
    assert found(loaded) == found(vector)
    dev = label_task().dev
    assert torch.equal(observe(lm, dev, loaded).logits, observe(lm, dev, vector).logits)
