"""Each method against its formula: plain loops over single prompts, plain transformers, hooks of this file's own."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from taskvec import methods
from taskvec.errors import InputError, MissingSite, TaskvecError, UnknownName
from taskvec.evaluate import observe, score
from taskvec.evaluate.ridge import ridge_dual
from taskvec.lm import LM
from taskvec.methods.function_vector import FunctionVector
from taskvec.methods.hendel import HendelTaskVector
from taskvec.methods.learnable import LearnableTaskVector
from taskvec.methods.learned import LearnedTaskVector
from taskvec.methods.linear import LinearTaskVector
from taskvec.methods.mean_difference import MeanDifference
from taskvec.methods.prompted import FewShot, ZeroShot
from taskvec.prompts import Example
from taskvec.replay import Ask
from taskvec.sites import Site
from taskvec.tasks import Dev, Task, answer_nll
from taskvec.vector import Add, Affine, Edit, Origin, Replace, TaskVector, Where
from tests import tiny
from tests.reference import (
    HEAD_IN,
    answer,
    best_of,
    blocks,
    both_families,
    exact_lm,
    head_states,
    ids,
    label_task,
    open_task,
    pairs,
    plus,
    prompt,
    put,
    run,
)


def only_edit(vector: TaskVector) -> Edit:
    assert len(vector.edits) == 1
    return vector.edits[0]


def origin_of(vector: TaskVector) -> Origin:
    assert vector.origin is not None
    return vector.origin


def dev_of(task: Task, queries: Sequence[Example]) -> Dev:
    return Dev(task.spec, tuple(queries))


# --- Hendel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "seed"), [("llama", 1), ("llama", 5), ("gpt2", 4), ("gpt2", 7)])
def test_hendel_replaces_by_the_mean_dummy_state_at_the_layer_best_on_dev(family: str, seed: int) -> None:
    lm, task = exact_lm(family), label_task()
    demos = task.train.demonstrations(seed=seed)
    dummies = task.train.queries(demos, 2, seed=seed)
    with torch.no_grad():
        runs = [run(lm.model, ids(prompt(dummy.input, demos))) for dummy in dummies]
    thetas = [torch.stack([r.resid[layer][-1] for r in runs]).mean(0) for layer in range(lm.n_layers)]

    def changed(layer: int, tokens: list[int], at: int) -> Tensor:
        return run(lm.model, tokens, {layer: put(at, thetas[layer])}).logits

    found = best_of(lm.model, task.dev, 10, changed, lm.n_layers)
    assert len({accuracy for accuracy, _ in found}) > 1
    best = max(range(lm.n_layers), key=lambda layer: found[layer])
    edit = only_edit(HendelTaskVector(n_dev=10).fit(lm, task.train, task.dev, seed=seed))
    assert (edit.site, edit.where, edit.strength) == (Site("resid", best), Where(), 1.0)
    assert isinstance(edit.op, Replace)
    torch.testing.assert_close(edit.op.vector.double(), thetas[best], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dummies", [1, 5])
def test_hendel_at_a_named_layer_averages_so_many_dummies_and_reads_no_dev(dummies: int) -> None:
    lm, task = exact_lm("llama"), open_task()
    demos = task.train.demonstrations(seed=0)
    with torch.no_grad():
        runs = [run(lm.model, ids(prompt(d.input, demos))) for d in task.train.queries(demos, dummies, seed=0)]
    vector = HendelTaskVector(layer=1, dummies=dummies).fit(lm, task.train, task.dev)
    torch.testing.assert_close(
        only_edit(vector).op.tensors()["vector"].double(),
        torch.stack([r.resid[1][-1] for r in runs]).mean(0),
        atol=1e-5,
        rtol=1e-5,
    )
    assert (origin_of(vector).cost.labels, origin_of(vector).cost.queries) == (3, dummies)


def test_hendel_at_the_last_block_predicts_the_same_for_every_query() -> None:
    lm, task = exact_lm("llama"), open_task()
    seen = observe(lm, task.dev, HendelTaskVector(layer=2).fit(lm, task.train, task.dev))
    assert (observe(lm, task.dev).logits.std(0) > 1e-2).any()
    torch.testing.assert_close(seen.logits, seen.logits[:1].expand_as(seen.logits), atol=1e-5, rtol=0)


# --- mean difference --------------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("seed", [0, 1])
def test_mean_difference_adds_the_mean_at_the_site_best_on_dev(family: str, seed: int) -> None:
    lm, task = exact_lm(family), label_task()
    demos = task.train.demonstrations(seed=seed)
    zero, few = pairs(lm.model, task.train.queries(demos, 7, seed=seed), demos)
    thetas = [
        torch.stack([b.resid[layer][-1] - a.resid[layer][-1] for a, b in zip(zero, few, strict=True)]).mean(0)
        for layer in range(lm.n_layers)
    ]
    thetas.append((head_states(few) - head_states(zero)).mean(0))

    def changed(place: int, tokens: list[int], at: int) -> Tensor:
        if place < lm.n_layers:
            return run(lm.model, tokens, {place: plus(at, thetas[place])}).logits
        logits: Tensor = lm.model.lm_head(plus(at, thetas[place])(run(lm.model, tokens).head_in))
        return logits

    found = best_of(lm.model, task.dev, 10, changed, lm.n_layers + 1)
    assert len({accuracy for accuracy, _ in found}) > 1
    best = max(range(lm.n_layers + 1), key=lambda place: found[place])
    edit = only_edit(MeanDifference(queries=7, n_dev=10).fit(lm, task.train, task.dev, seed=seed))
    assert edit.site == (Site("resid", best) if best < lm.n_layers else HEAD_IN)
    assert isinstance(edit.op, Add)
    torch.testing.assert_close(edit.op.vector.double(), thetas[best], atol=1e-5, rtol=1e-5)


def test_mean_difference_at_the_head_is_one_bias_of_the_logits() -> None:
    lm, task = exact_lm("llama"), open_task()
    demos = task.train.demonstrations(seed=0)
    zero, few = pairs(lm.model, task.train.queries(demos, 6, seed=0), demos)
    bias = lm.model.lm_head.weight @ (head_states(few) - head_states(zero)).mean(0)
    vector = MeanDifference(site="lm_head_in", queries=6).fit(lm, task.train, task.dev)
    moved = observe(lm, task.dev, vector).logits - observe(lm, task.dev).logits
    assert bias.abs().max() > 0.5
    torch.testing.assert_close(moved, bias.detach().float().expand_as(moved), atol=1e-4, rtol=0)


# --- linear -----------------------------------------------------------------------------------------------------------


def primal(h: Tensor, y: Tensor, ridge: float) -> Tensor:
    """W = Y'H (H'H + lam I)^-1 with rows as queries: an explicit d x d solve."""
    solved: Tensor = torch.linalg.solve(h.T @ h + ridge * torch.eye(h.shape[1], dtype=h.dtype), h.T @ y)
    return solved.T


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def linear_data(family: str) -> tuple[Tensor, Tensor]:
    """H and H_icl of the 10 queries that `LinearTaskVector(queries=10)` draws with seed 0, by the reference."""
    task = open_task()
    demos = task.train.demonstrations(seed=0)
    zero, few = pairs(exact_lm(family).model, task.train.queries(demos, 10, seed=0), demos)
    return head_states(zero), head_states(few)


def affine_of(vector: TaskVector) -> Affine:
    op = only_edit(vector).op
    assert isinstance(op, Affine)
    return op


@both_families
@pytest.mark.parametrize("ridge", [0.5, 5.0, 500.0])
def test_linear_is_the_primal_ridge_map(family: str, ridge: float) -> None:
    lm, task = exact_lm(family), open_task()
    vector = LinearTaskVector(queries=10, ridge=ridge).fit(lm, task.train, task.dev)
    h, few = linear_data(family)
    w = primal(h, few - h, ridge)
    assert only_edit(vector).site == HEAD_IN
    assert affine_of(vector).read.shape == (10, h.shape[1])
    fresh = gaussian(20, h.shape[1]) * h.std()
    torch.testing.assert_close(affine_of(vector)(fresh) - fresh, fresh @ w.T, atol=1e-4 * float(h.std()), rtol=1e-4)


@both_families
def test_linear_changes_the_head_to_u_plus_uw_and_only_at_its_site(family: str) -> None:
    lm, task = exact_lm(family), open_task()
    vector = LinearTaskVector(queries=10).fit(lm, task.train, task.dev)
    h, few = linear_data(family)
    u, w = lm.model.lm_head.weight.detach(), primal(h, few - h, 5.0)
    with torch.no_grad():
        states = head_states([run(lm.model, ids(prompt(q.input))) for q in task.dev.examples])
    expected = (states @ (u + u @ w).T).float()
    torch.testing.assert_close(observe(lm, task.dev, vector).logits, expected, atol=1e-3, rtol=1e-4)
    elsewhere = TaskVector((replace(vector.edits[0], site=Site("resid", lm.n_layers - 1)),))
    assert (observe(lm, task.dev, elsewhere).logits - expected).abs().max() > 0.1


def test_linear_on_labels_is_a_ridge_that_distils_label_logit_differences() -> None:
    lm, task = exact_lm("llama"), label_task()
    demos = task.train.demonstrations(seed=0)
    zero, few = pairs(lm.model, task.train.queries(demos, 10, seed=0), demos)
    columns = [answer(task.dev.examples[0].input, f" {label}")[1][0] for label in ("good", "bad", "not good at all")]
    assert len(set(columns)) == 3
    h = head_states(zero)
    z_zero, z_few = (torch.stack([r.logits[-1, columns] for r in runs]) for runs in (zero, few))
    w = primal(h, z_few - z_zero, 5.0)  # K x d: no state of the few-shot run in it
    with torch.no_grad():
        tests = [run(lm.model, ids(prompt(q.input))) for q in task.dev.examples]
    expected = torch.stack([r.logits[-1, columns] for r in tests]) + head_states(tests) @ w.T
    vector = LinearTaskVector(queries=10).fit(lm, task.train, task.dev)
    got = observe(lm, task.dev, vector).logits[:, columns]
    torch.testing.assert_close(got, expected.float(), atol=1e-3, rtol=1e-4)


def test_linear_reproduces_few_shot_on_its_queries_as_the_ridge_vanishes() -> None:
    lm, task = exact_lm("llama"), open_task()
    h, few = linear_data("llama")
    queries = dev_of(task, task.train.queries(task.train.demonstrations(seed=0), 10, seed=0))
    vector = LinearTaskVector(queries=10, ridge=1e-7).fit(lm, task.train, task.dev)
    torch.testing.assert_close(affine_of(vector)(h), few, atol=1e-3, rtol=1e-3)
    near = score(lm, queries, vector).rows[0]
    far = score(lm, queries, ZeroShot().fit(lm, task.train, task.dev)).rows[0]
    assert near.d_ntp_full is not None
    assert far.d_ntp_full is not None
    assert near.d_ntp_full.value < 1e-5 < 0.1 < far.d_ntp_full.value


def test_linear_is_zero_shot_as_the_ridge_grows() -> None:
    lm, task = exact_lm("llama"), label_task()
    vector = LinearTaskVector(queries=10, ridge=1e9).fit(lm, task.train, task.dev)
    torch.testing.assert_close(observe(lm, task.dev, vector).logits, observe(lm, task.dev).logits, atol=1e-4, rtol=0)
    zero = ZeroShot().fit(lm, task.train, task.dev)
    got, expected = (score(lm, task.dev, v).rows[0].d_ntp for v in (vector, zero))
    assert got is not None
    assert expected is not None
    assert got.value == pytest.approx(expected.value, abs=1e-4)


def test_linear_does_not_read_the_queries_outputs_nor_dev() -> None:
    lm, task = exact_lm("llama"), open_task()
    demos = set(task.train.demonstrations(seed=0))
    hidden = tuple(e if e in demos else replace(e, output="red") for e in task.train.examples)
    dev = dev_of(task, [Example("other", "thing")])
    one = LinearTaskVector(queries=10).fit(lm, task.train, task.dev)
    two = LinearTaskVector(queries=10).fit(lm, replace(task.train, examples=hidden), dev)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors().values(), two.tensors().values(), strict=True))


@pytest.mark.parametrize(("site", "where"), [("resid[1]", "last_prompt"), ("mlp[0]", "each_last")])
def test_linear_fits_and_applies_at_the_site_it_is_told(site: str, where: str) -> None:
    lm, task = exact_lm("llama"), open_task()
    vector = LinearTaskVector(queries=10, site=site, where=where).fit(lm, task.train, task.dev)
    assert (only_edit(vector).site, only_edit(vector).where) == (Site.parse(site), Where.parse(where))
    if site == "resid[1]":
        demos = task.train.demonstrations(seed=0)
        zero, few = pairs(lm.model, task.train.queries(demos, 10, seed=0), demos)
        h, icl = (torch.stack([r.resid[1][-1] for r in runs]) for runs in (zero, few))
        torch.testing.assert_close(affine_of(vector)(h) - h, h @ primal(h, icl - h, 5.0).T, atol=1e-3, rtol=1e-3)


def test_ridge_dual_equals_primal_and_has_rank_n() -> None:
    h, y = gaussian(7, 12, seed=1), gaussian(7, 12, seed=2)
    w = primal(h, y, 3.0)
    torch.testing.assert_close(ridge_dual(h, y, 3.0).T @ h, w, atol=1e-10, rtol=0)
    assert int(torch.linalg.matrix_rank(w)) == 7
    h, y = gaussian(20, 12, seed=3), gaussian(20, 12, seed=4)  # more queries than the width
    torch.testing.assert_close(ridge_dual(h, y, 3.0).T @ h, primal(h, y, 3.0), atol=1e-10, rtol=0)


def test_ridge_invariances() -> None:
    h, y, fresh = gaussian(7, 12, seed=1), gaussian(7, 12, seed=2), gaussian(3, 12, seed=3)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(gaussian(12, 12, seed=4)).Q

    def moved(h: Tensor, y: Tensor, ridge: float, x: Tensor = fresh) -> Tensor:
        return Affine(read=h, write=ridge_dual(h, y, ridge))(x) - x

    base = moved(h, y, 3.0)
    assert base.abs().max() > 0.1
    assert (moved(h, y[order], 3.0) - base).abs().max() > 0.1  # pairing matters
    same = {
        "permuted": moved(h[order], y[order], 3.0),
        "doubled": moved(torch.cat([h, h]), torch.cat([y, y]), 6.0),
        "scaled": moved(3 * h, 3 * y, 27.0),
        "rotated": moved(h @ q.T, y @ q.T, 3.0, fresh @ q.T) @ q,
    }
    for name, got in same.items():
        torch.testing.assert_close(got, base, atol=1e-10, rtol=0, msg=name)
    outside = fresh - fresh @ torch.linalg.pinv(h) @ h  # orthogonal to every query
    torch.testing.assert_close(moved(h, y, 3.0, outside), torch.zeros_like(outside), atol=1e-10, rtol=0)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_linear_refuses_a_ridge_that_is_not_positive(ridge: float) -> None:
    with pytest.raises(InputError, match="ridge above 0"):
        LinearTaskVector(ridge=ridge).fit(exact_lm("llama"), open_task().train, open_task().dev)


# --- learned ----------------------------------------------------------------------------------------------------------


def loss_of(
    model: Any,
    example: Example,
    thetas: Mapping[tuple[int, int], Tensor],
    demos: Sequence[Example] = (),
) -> Tensor:
    """Mean NLL per token of the whole answer and its terminator; theta (l, p) added at block l, p tokens from the
    prompt's end."""
    head, tail = answer(example.input, f" {example.output}\n", demos)
    changes: dict[int, Callable[[Tensor], Tensor]] = {}
    for layer in {layer for layer, _ in thetas}:
        here = [(position, theta) for (at, position), theta in thetas.items() if at == layer]

        def change(h: Tensor, here: list[tuple[int, Tensor]] = here) -> Tensor:
            for position, theta in here:
                h = plus(len(head) + position, theta)(h)
            return h

        changes[layer] = change
    logits = run(model, head + tail, changes).logits
    return cross_entropy(logits[len(head) - 1 : -1].float(), torch.tensor(tail))


def mean_loss(
    model: Any, examples: Sequence[Example], thetas: Mapping[tuple[int, int], Tensor], demos: Sequence[Example] = ()
) -> Tensor:
    return torch.stack([loss_of(model, example, thetas, demos) for example in examples]).mean()


def thetas_of(vector: TaskVector) -> dict[tuple[int, int], Tensor]:
    out = {}
    for edit in vector.edits:
        assert isinstance(edit.op, Add)
        assert edit.site.layer is not None
        out[edit.site.layer, edit.where.positions[0] if edit.where.positions else -1] = edit.op.vector
    return out


@dataclass
class Optimizers:
    """What was built in AdamW's place: each with its parameter groups and its number of steps."""

    built: list[torch.optim.Optimizer]
    steps: list[int]

    @property
    def groups(self) -> list[list[dict[str, Any]]]:
        return [optimizer.param_groups for optimizer in self.built]


def watch(monkeypatch: pytest.MonkeyPatch, kind: Any = torch.optim.AdamW) -> Optimizers:
    """Record the optimisers a fit builds; `kind` may be another one than AdamW."""
    seen = Optimizers([], [])

    def build(groups: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = kind(groups, **options)
        number = len(seen.built)
        seen.built.append(optimizer)
        seen.steps.append(0)
        step = optimizer.step

        def counted() -> None:
            seen.steps[number] += 1
            step()

        optimizer.step = counted  # type: ignore[assignment, method-assign]
        return optimizer

    monkeypatch.setattr(torch.optim, "AdamW", build)
    return seen


@both_families
@pytest.mark.parametrize("shown", ["zero-shot", "few-shot"])
def test_learned_first_step_follows_the_gradient_through_whole_prompts(
    family: str, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain gradient descent with rate 1 from theta = 0: after one step theta is minus the gradient."""
    lm, task = exact_lm(family), open_task()
    watch(monkeypatch, torch.optim.SGD)
    method = LearnedTaskVector(
        layer=(0, 2), positions=(-1, -2), prompt=shown, lr=1.0, steps=1, batch=99, queries=6, check=1
    )
    vector = method.fit(lm, task.train, task.dev)
    drawn = task.train.demonstrations(seed=0)
    examples, demos = task.train.queries(drawn, 6, seed=0), drawn if shown == "few-shot" else ()
    places = [(layer, position) for layer in (0, 2) for position in (-1, -2)]
    zeros = {place: torch.zeros(32, requires_grad=True) for place in places}
    gradients = torch.autograd.grad(mean_loss(lm.model, examples, zeros, demos), list(zeros.values()))
    got = thetas_of(vector)
    assert list(got) == places
    for place, gradient in zip(places, gradients, strict=True):
        # the last block's output at an earlier token reaches no logit of the answer
        assert (gradient.norm() > 1e-3) == (place != (2, -2))
        torch.testing.assert_close(-got[place], gradient, atol=1e-5, rtol=1e-4)
    assert origin_of(vector).prompt == shown
    assert origin_of(vector).shown == demos


def test_learned_is_adamw_on_the_whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), open_task()
    examples = task.train.queries(task.train.demonstrations(seed=0), 6, seed=0)
    theta = torch.zeros(32, requires_grad=True)
    optimizer = torch.optim.AdamW([theta], lr=0.05, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        mean_loss(lm.model, examples, {(1, -1): theta}).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    lm.model.zero_grad()
    seen = watch(monkeypatch)
    vector = LearnedTaskVector(layer=1, lr=0.05, weight_decay=0.1, steps=5, batch=6, queries=6, check=5).fit(
        lm, task.train, task.dev
    )
    assert theta.abs().max() > 0.1
    torch.testing.assert_close(thetas_of(vector)[1, -1], theta.detach(), atol=1e-4, rtol=0)
    assert seen.steps == [5]
    assert origin_of(vector).cost.labels == 6 + len(task.dev)


@pytest.mark.parametrize("layers", [1, (0, 2)])
def test_learned_trains_one_vector_per_layer_and_position_and_nothing_else(
    layers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, task = exact_lm("llama"), open_task()
    seen = watch(monkeypatch)
    method = LearnedTaskVector(layer=layers, positions=(-1, -2), steps=1, batch=4, queries=4)
    vector = method.fit(lm, task.train, task.dev)
    count = 2 * (2 if isinstance(layers, tuple) else 1)
    assert len(seen.groups) == 1
    assert sum(p.numel() for group in seen.groups[0] for p in group["params"]) == count * 32
    assert sum(t.numel() for t in vector.tensors().values()) == count * 32
    assert [str(e.where) for e in vector.edits] == ["last_prompt", "at(-2)"] * (count // 2)


def test_learned_rate_is_a_hundredth_of_the_sites_rms(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), open_task()
    examples = task.train.queries(task.train.demonstrations(seed=0), 5, seed=0)
    with torch.no_grad():
        runs = [run(lm.model, ids(prompt(e.input))) for e in examples]
    rms = [float(torch.stack([r.resid[layer][-1] for r in runs]).square().mean().sqrt()) for layer in (0, 2)]
    assert abs(rms[0] / rms[1] - 1) > 0.2
    seen = watch(monkeypatch)
    for factor in (0.01, 0.5):
        LearnedTaskVector(layer=(0, 2), steps=1, batch=5, queries=5, lr_rms=factor).fit(lm, task.train, task.dev)
        assert [group["lr"] for group in seen.groups[-1]] == pytest.approx([factor * r for r in rms], rel=1e-4)
    LearnedTaskVector(layer=(0, 2), steps=1, batch=5, queries=5, lr=0.25).fit(lm, task.train, task.dev)
    assert [group["lr"] for group in seen.groups[-1]] == [0.25, 0.25]


def test_learned_target_is_the_answer_with_its_terminator_under_the_tasks_own_loss() -> None:
    lm, task = exact_lm("llama"), open_task()
    targets: list[str] = []

    def watched(logits: Tensor, target: Tensor) -> Tensor:
        assert logits.shape[0] == len(target)
        targets.append(lm.decode(target.tolist()))
        loss: Tensor = 2.0 * answer_nll(logits, target)
        return loss

    train = replace(task.train, spec=replace(task.spec, loss=watched))
    LearnedTaskVector(layer=1, steps=1, batch=99, queries=6, check=1, n_dev=2).fit(lm, train, task.dev)
    examples = task.train.queries(task.train.demonstrations(seed=0), 6, seed=0)
    assert sorted(targets) == sorted(f" {example.output}\n" for example in examples)


def trajectory(lm: LM, task: Task, steps: int, **settings: Any) -> list[tuple[float, Tensor]]:
    """(dev loss by the reference, theta) after 1, 2, ... steps: one fit each, looked at once, at its end."""
    out = []
    for k in range(1, steps + 1):
        vector = LearnedTaskVector(layer=1, steps=k, check=k, **settings).fit(lm, task.train, task.dev)
        theta = thetas_of(vector)[1, -1]
        with torch.no_grad():
            loss = mean_loss(lm.model, task.dev.examples[: settings["n_dev"]], {(1, -1): theta})
        out.append((float(loss), theta))
    return out


def test_learned_keeps_the_step_with_the_lowest_dev_loss_and_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), open_task()
    settings: dict[str, Any] = {"lr": 5.0, "batch": 2, "queries": 4, "n_dev": 5}
    path = trajectory(lm, task, 8, **settings)
    losses = [loss for loss, _ in path]
    best = losses.index(min(losses))
    assert 0 < best < 7  # else the rate makes this test say nothing
    seen = watch(monkeypatch)
    patient = LearnedTaskVector(layer=1, steps=8, check=1, patience=99, **settings).fit(lm, task.train, task.dev)
    assert torch.equal(thetas_of(patient)[1, -1], path[best][1])
    assert seen.steps == [8]
    for patience in (1, 2):
        # by hand: stop after so many looks in a row that are not below the lowest before them
        lows = [loss < min(losses[:k], default=float("inf")) for k, loss in enumerate(losses)]
        stop = next((k for k in range(8) if k + 1 >= patience and not any(lows[k + 1 - patience : k + 1])), 7)
        vector = LearnedTaskVector(layer=1, steps=8, check=1, patience=patience, **settings).fit(
            lm, task.train, task.dev
        )
        assert seen.steps[-1] == stop + 1
        kept = losses.index(min(losses[: stop + 1]))
        assert torch.equal(thetas_of(vector)[1, -1], path[kept][1])


def test_learned_sweep_halves_its_layers_at_every_look_and_returns_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), open_task()
    seen = watch(monkeypatch)
    settings: dict[str, Any] = {"steps": 6, "batch": 8, "queries": 8, "check": 2, "n_dev": 5, "patience": 99}
    swept = LearnedTaskVector(**settings).fit(lm, task.train, task.dev)
    assert sorted(seen.steps) == [2, 4, 6]  # 3 layers, then 2, then 1
    assert [group[0]["params"][0].numel() for group in seen.groups] == [32, 32, 32]
    ((layer, _),) = thetas_of(swept)
    alone = LearnedTaskVector(layer=layer, **settings).fit(lm, task.train, task.dev)
    # a layer's run does not depend on the others that train beside it
    torch.testing.assert_close(thetas_of(swept)[layer, -1], thetas_of(alone)[layer, -1], atol=1e-4, rtol=0)
    with torch.no_grad():
        after_two = {
            k: float(
                mean_loss(
                    lm.model,
                    task.dev.examples[:5],
                    thetas_of(
                        LearnedTaskVector(layer=k, **{**settings, "steps": 2}).fit(lm, task.train, task.dev),
                    ),
                )
            )
            for k in range(3)
        }
    assert seen.steps[max(after_two, key=lambda k: after_two[k])] == 2  # the worst went first


def test_learned_lowers_the_loss_of_answers_it_has_not_seen() -> None:
    lm, task = exact_lm("llama"), label_task()
    vector = LearnedTaskVector(layer=2, steps=40, check=5, batch=20, queries=20, lr_rms=0.1).fit(
        lm, task.train, task.dev
    )
    with torch.no_grad():
        before = mean_loss(lm.model, task.test.examples, {})
        after = mean_loss(lm.model, task.test.examples, thetas_of(vector))
    assert after < 0.9 * before


def test_learned_at_the_last_block_is_a_bias_of_the_normalised_logits() -> None:
    """Section 8, identity 3: scores = (rms(h) z + U(gamma theta)) / rms(h + theta), before a bias-free RMSNorm."""
    lm, task = exact_lm("llama"), open_task()
    vector = LearnedTaskVector(layer=2, steps=4, lr=0.3, batch=4, queries=4).fit(lm, task.train, task.dev)
    theta = thetas_of(vector)[2, -1].double()
    assert theta.norm() > 1
    gamma, u = lm.model.model.norm.weight.detach(), lm.model.lm_head.weight.detach()

    def rms(h: Tensor) -> Tensor:
        root: Tensor = (h.square().mean() + lm.model.config.rms_norm_eps).sqrt()
        return root

    rows = []
    with torch.no_grad():
        for example in task.dev.examples:
            clean = run(lm.model, ids(prompt(example.input)))
            h, z = clean.resid[2][-1], clean.logits[-1]
            rows.append((rms(h) * z + u @ (gamma * theta)) / rms(h + theta))
    got = observe(lm, task.dev, vector).logits
    torch.testing.assert_close(got, torch.stack(rows).float(), atol=1e-4, rtol=1e-4)


def test_learned_at_a_blocks_output_is_learned_at_the_next_blocks_input() -> None:
    """Section 8, identity 4: the released code's site is ours, one block on."""
    lm, task = exact_lm("llama"), open_task()
    vector = LearnedTaskVector(layer=1, steps=4, lr=0.3, batch=4, queries=4).fit(lm, task.train, task.dev)
    theta = thetas_of(vector)[1, -1]

    def before(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (plus(args[0].shape[1] - 1, theta)(args[0][0])[None], *args[1:])

    handle = blocks(lm.model)[2].register_forward_pre_hook(before)
    with torch.no_grad():
        expected = torch.stack([run(lm.model, ids(prompt(e.input))).logits[-1] for e in task.dev.examples])
    handle.remove()
    assert (observe(lm, task.dev).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(observe(lm, task.dev, vector).logits, expected.float(), atol=1e-4, rtol=0)


def test_learned_starts_uniformly_within_init() -> None:
    lm, task = exact_lm("llama"), open_task()
    starts = [
        thetas_of(
            LearnedTaskVector(layer=(0, 1), lr=1e-30, init=0.1, steps=1, queries=2, n_dev=2).fit(
                lm, task.train, task.dev, seed=seed
            )
        )
        for seed in (0, 0, 1)
    ]
    values = torch.cat(list(starts[0].values()))
    assert 0.09 < values.abs().max() <= 0.1
    assert abs(float(values.mean())) < 0.03
    assert values.std() == pytest.approx(0.1 / 3**0.5, rel=0.2)
    assert not torch.equal(starts[0][0, -1], starts[0][1, -1])
    assert torch.equal(starts[0][0, -1], starts[1][0, -1])
    assert not torch.equal(starts[0][0, -1], starts[2][0, -1])


def test_learned_presets_are_the_papers_and_the_codes_values() -> None:
    paper, code = LearnedTaskVector.paper(layer=16), LearnedTaskVector.code(layer=16)
    assert (paper.lr, code.lr) == (1e-3, 5e-3)
    for preset in (paper, code):
        assert (preset.weight_decay, preset.init, preset.batch, preset.steps) == (0.01, 0.1, 1, 1000)
        assert (preset.positions, preset.layer, preset.patience) == ((-1,), 16, 2)
    assert LearnedTaskVector.paper(lr=0.5, steps=3) == replace(LearnedTaskVector.paper(), lr=0.5, steps=3)


def test_learned_presets_use_their_rate_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), open_task()
    seen = watch(monkeypatch)
    LearnedTaskVector.paper(layer=1, steps=2).fit(lm, task.train, task.dev)
    LearnedTaskVector.code(layer=1, steps=2).fit(lm, task.train, task.dev)
    assert [group[0]["lr"] for group in seen.groups] == [1e-3, 5e-3]


def test_learned_refuses_a_rate_that_leaves_no_finite_loss() -> None:
    lm, task = exact_lm("llama"), open_task()
    with pytest.raises(InputError, match="no finite dev loss"):
        LearnedTaskVector(layer=1, lr=float("inf"), steps=2, queries=2, n_dev=2).fit(lm, task.train, task.dev)


def test_learned_positions_before_every_prompt_are_an_error_not_a_zero_vector() -> None:
    lm, task = exact_lm("llama"), open_task()
    with pytest.raises(InputError, match="-50 in a prompt of"):
        LearnedTaskVector(layer=1, positions=(-50,), steps=1, queries=2).fit(lm, task.train, task.dev)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (HendelTaskVector(dummies=0), "hendel.dummies of at least 1; found 0"),
        (HendelTaskVector(n_dev=0), "hendel.n_dev of at least 1"),
        (MeanDifference(queries=-1), "mean-difference.queries of at least 1; found -1"),
        (MeanDifference(n_dev=0), "mean-difference.n_dev"),
        (LinearTaskVector(queries=0), "linear.queries"),
        (LearnedTaskVector(steps=0), "learned.steps"),
        (LearnedTaskVector(batch=0), "learned.batch"),
        (LearnedTaskVector(queries=0), "learned.queries"),
        (LearnedTaskVector(check=0), "learned.check"),
        (LearnedTaskVector(n_dev=0), "learned.n_dev"),
        (LearnedTaskVector(sweep=0), "learned.sweep"),
        (LearnedTaskVector(layer=()), "at least one layer"),
        (LearnedTaskVector(positions=()), "positions counted from the prompt's end"),
        (LearnedTaskVector(positions=(0,)), "positions counted from the prompt's end"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hyperparameters_that_mean_nothing_are_refused(method: methods.Method, message: str) -> None:
    with pytest.raises(InputError, match=message):
        method.fit(exact_lm("llama"), open_task().train, open_task().dev)


@pytest.mark.parametrize(
    "method", [HendelTaskVector(layer=3), MeanDifference(site="resid[3]"), LearnedTaskVector(layer=3)]
)
def test_a_layer_the_model_has_not_is_refused(method: methods.Method) -> None:
    with pytest.raises(MissingSite, match="a layer from 0 to 2"):
        method.fit(exact_lm("llama"), open_task().train, open_task().dev)


@pytest.mark.parametrize("family", ["gpt2", "mpt"])
def test_what_is_proved_about_a_model_once_is_no_part_of_the_first_fits_cost(family: str) -> None:
    lm, task = tiny.fresh_lm(family), open_task()
    first, second = (HendelTaskVector(layer=1).fit(lm, task.train, task.dev) for _ in range(2))
    assert origin_of(first).cost.tokens == origin_of(second).cost.tokens > 0


# --- the two prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 3])
def test_zero_shot_and_few_shot_edit_nothing_and_stand_on_their_prompts(seed: int) -> None:
    lm, task = exact_lm("llama"), open_task()
    demos = task.train.demonstrations(seed=seed)
    for method, shown in ((ZeroShot(), ()), (FewShot(), demos)):
        vector = method.fit(lm, task.train, task.dev, seed=seed)
        assert isinstance(vector, TaskVector)
        assert vector.edits == ()
        assert origin_of(vector).demos == demos
        with torch.no_grad():
            rows = [run(lm.model, ids(prompt(e.input, shown))).logits[-1] for e in task.dev.examples]
        torch.testing.assert_close(observe(lm, task.dev, vector).logits, torch.stack(rows).float(), atol=1e-5, rtol=0)


# --- the registry -----------------------------------------------------------------------------------------------------


def test_listing_methods_imports_none_and_no_torch() -> None:
    program = (
        "import sys, taskvec, taskvec.methods as m; print(*m.names()); "
        "sys.exit(str([n for n in sys.modules if n.startswith('taskvec.methods.') or n in ('torch', 'transformers')]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
    assert done.stdout.split() == list(methods.METHODS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_registered_method_is_a_frozen_dataclass_of_that_name(name: str) -> None:
    method = methods.make(name)
    assert methods.get(name) is type(method)
    assert method.name == name
    assert isinstance(method, methods.Method)
    assert type(method).__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert type(method).__doc__
    assert all(getattr(method, f.name) == f.default for f in fields(method))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("learned", {"layer": "12"}, LearnedTaskVector(layer=12)),
        ("learned", {"layer": "3,5"}, LearnedTaskVector(layer=(3, 5))),
        ("learned", {"layer": "3, 5", "lr": "1e-3"}, LearnedTaskVector(layer=(3, 5), lr=1e-3)),
        ("learned", {"layer": "None", "lr": "none"}, LearnedTaskVector()),
        ("learned", {"positions": "-1,-2"}, LearnedTaskVector(positions=(-1, -2))),
        ("learned", {"prompt": "few-shot"}, LearnedTaskVector(prompt="few-shot")),
        ("learned", {"positions": "-2"}, LearnedTaskVector(positions=(-2,))),
        ("hendel", {"layer": "", "dummies": "5"}, HendelTaskVector(dummies=5)),
        ("linear", {"ridge": "10", "site": "heads[1,2]"}, LinearTaskVector(ridge=10.0, site="heads[1,2]")),
        ("linear", {"where": "at(-1,-2)"}, LinearTaskVector(where="at(-1,-2)")),
        ("mean-difference", {"site": "resid[4]"}, MeanDifference(site="resid[4]")),
        ("zero-shot", {}, ZeroShot()),
    ],
)  # fmt: skip
def test_fields_are_parsed_from_text(name: str, settings: dict[str, str], expected: methods.Method) -> None:
    assert methods.make(name, settings) == expected


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("learned", {"layer": "x"}, r"for learned\.layer; found 'x'"),
        ("learned", {"layer": "3,x"}, r"for learned\.layer; found '3,x'"),
        ("learned", {"steps": "1.5"}, r"for learned\.steps; found '1.5'"),
        ("learned", {"steps": "none"}, r"for learned\.steps"),
        ("learned", {"positions": ""}, r"for learned\.positions"),
        ("learned", {"prompt": "chat"}, r"'zero-shot' or 'few-shot'"),
        ("linear", {"ridge": "big"}, r"for linear\.ridge; found 'big'"),
        (
            "linear",
            {"rigde": "5"},
            r"a field of linear: ridge, queries, .*pairing; found 'rigde'",
        ),
        ("linear", {"name": "mine"}, r"a field of linear"),
        ("zero-shot", {"shots": "5"}, r"a field of zero-shot: it has none; found 'shots'"),
    ],
)
def test_bad_fields_are_named_in_the_error(name: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        methods.make(name, settings)


def test_an_unknown_method_names_those_there_are() -> None:
    with pytest.raises(UnknownName, match=r"'lerned'; did you mean learned\? name one of: zero-shot, .*random"):
        methods.get("lerned")
    with pytest.raises(UnknownName):
        methods.make("hendel-task-vector")


@dataclass(frozen=True)
class ThirdParty:
    """A method of another package."""

    name: ClassVar[str] = "their-method"
    depth: int = 1

    def fit(self, lm: Any, train: Any, dev: Any, *, seed: int = 0) -> TaskVector:
        return TaskVector(())


def test_a_third_partys_entry_point_is_found_and_cannot_shadow_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("their_package")
    module.ThirdParty = ThirdParty  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_package", module)

    def found(*, group: str) -> list[EntryPoint]:
        if group != "taskvec.methods":
            return []
        return [EntryPoint(name, "their_package:ThirdParty", group) for name in ("their-method", "hendel")]

    monkeypatch.setattr(methods, "entry_points", found)
    assert methods.names() == [*methods.METHODS, "their-method"]
    assert methods.get("their-method") is ThirdParty
    assert methods.make("their-method", {"depth": "3"}) == ThirdParty(depth=3)
    assert methods.get("hendel") is HendelTaskVector
    with pytest.raises(InputError, match=r"for their-method\.depth"):
        methods.make("their-method", {"depth": "deep"})


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (LearnedTaskVector(lr=-0.05), r"learned\.lr above 0"),
        (LearnedTaskVector(lr=0.0), r"learned\.lr above 0"),
        (LearnedTaskVector(lr_rms=-1.0), r"learned\.lr_rms above 0"),
        (LearnedTaskVector(weight_decay=-1.0), r"learned\.weight_decay of 0 or more"),
        (LearnedTaskVector(patience=0), r"learned\.patience of at least 1"),
        (LearnedTaskVector(positions=(-50,)), "-50 in a prompt of"),
        (HendelTaskVector(layer=99), "a layer from 0 to 2"),
        (MeanDifference(site="resid[99]"), "a layer from 0 to 2"),
        (MeanDifference(site="embed"), "a site that demonstrations change"),
        (LinearTaskVector(site="embed"), "a site that demonstrations change"),
        (LinearTaskVector(where="role(separator)"), "tokens that a zero-shot prompt has"),
        (FunctionVector(where="role(nonsense)"), "tokens that a zero-shot prompt has"),
    ],
)
def test_what_cannot_work_is_refused_before_any_pass(method: Any, said: str) -> None:
    lm, task = exact_lm("llama"), open_task()
    with pytest.raises(TaskvecError, match=said), lm.metered() as meter:
        method.fit(lm, task.train, task.dev)
    assert meter.passes == 0


def test_labels_only_is_refused_before_any_pass_where_labels_share_a_first_token() -> None:
    lm = exact_lm("llama")
    task = tiny.tiny_task(shots=3, labels=True)
    spec = replace(task.spec, labels=("red", "red blue"), outputs=("red", "red blue"))
    train = replace(task.train, spec=spec)
    with pytest.raises(InputError, match="first tokens of their own"), lm.metered() as meter:
        LinearTaskVector(labels_only=True).fit(lm, train, task.dev)
    assert meter.passes == 0


@pytest.mark.parametrize("method", [FunctionVector(), LearnableTaskVector()])
def test_one_shot_has_no_labels_to_shuffle(method: Any) -> None:
    lm, task = exact_lm("llama"), tiny.tiny_task(shots=1)
    with pytest.raises(InputError, match="at least two shots"), lm.metered() as meter:
        method.fit(lm, task.train, task.dev)
    assert meter.passes == 0


def test_a_teacher_that_stops_by_an_end_token_teaches_the_stop() -> None:
    lm = exact_lm("llama")
    red, blue = (lm.tokenizer(word, add_special_tokens=False).input_ids for word in ("red", "blue"))
    ask = Ask(max_new=20, done=lambda _, text: "blue" in text)
    with_end = import_module("taskvec.evaluate.lessons")._with_end
    assert with_end(lm, 0, red, ask) == (*red, min(lm.end_ids, default=0))
    assert with_end(lm, 0, [], ask) == (min(lm.end_ids, default=0),)
    assert with_end(lm, 0, red + blue, ask) == (*red, *blue)  # its terminator stands in it
    assert with_end(lm, 0, red[:1] * 20, ask) == (red[0],) * 20  # cut, not ended
