"""State vector against plain captures of whole prompts: hooks of this file's own on the output projection."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from taskvec.errors import DataError, InputError, MissingSite
from taskvec.hooks import inject
from taskvec.lm import LM
from taskvec.methods.state_vector import StateVector, optimized, replacing
from taskvec.prompts import Example
from taskvec.sites import Site
from taskvec.vector import Replace, TaskVector
from tests.reference import blocks, both_families, exact_lm, ids, open_task, prompt

WEIGHTS = (1.0, 2.0, 4.0, 8.0, 16.0, 0.0)


def projections(model: Any) -> list[Any]:
    return [b.self_attn.o_proj if hasattr(b, "self_attn") else b.attn.c_proj for b in blocks(model)]


@torch.no_grad()
def heads(model: Any, tokens: Sequence[int], put: dict[tuple[int, int], Tensor] | None = None) -> Tensor:
    """(L, T, w): the projections' inputs of one whole prompt, some replaced: `put[layer, token]`."""
    seen: list[Tensor] = []

    def before(layer: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            rows = [(put or {}).get((layer, t), row) for t, row in enumerate(args[0][0])]
            z = torch.stack([row.to(args[0]) for row in rows])
            seen.append(z)
            return (z[None], *args[1:])

        return hook

    handles = [p.register_forward_pre_hook(before(layer)) for layer, p in enumerate(projections(model))]
    model(torch.tensor([list(tokens)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def separators(demos: Sequence[Example], query: str) -> list[int]:
    """The token that ends each demonstration's question, and the query's, in the whole prompt."""
    return [len(ids(prompt(one, demos[:i]))) - 1 for i, one in enumerate([*(d.input for d in demos), query])]


def states(lm: LM, demos: Sequence[Example], query: str) -> Tensor:
    """(N + 1, L, w) at every separator of the one whole prompt."""
    whole = heads(lm.model, ids(prompt(query, demos)))
    return whole[:, separators(demos, query)].transpose(0, 1)


def stacked(vector: TaskVector) -> Tensor:
    assert all(isinstance(edit.op, Replace) for edit in vector.edits)
    assert [edit.site for edit in vector.edits] == [Site("heads", layer) for layer in range(len(vector.edits))]
    return torch.stack([edit.op.tensors()["vector"] for edit in vector.edits])


def some(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@both_families
def test_one_draw_without_optimisation_is_the_dummys_separator_state(family: str) -> None:
    lm, task = exact_lm(family), open_task()
    demos = task.train.demonstrations(seed=3)
    vector = StateVector(optimize="none", draws=1, depth=2).fit(lm, task.train, task.dev, seed=3)
    candidates = [states(lm, demos, e.input)[-1] for e in task.train.examples if e not in demos]
    errors = [float((stacked(vector).double() - state).abs().max()) for state in candidates]
    assert min(errors) < 1e-5
    assert sorted(errors)[1] > 1e-3  # one dummy, and no other


@both_families
def test_inner_is_the_mean_of_all_separators_of_a_short_prompt(family: str) -> None:
    lm, task = exact_lm(family), open_task()
    demos = task.train.demonstrations(seed=1)
    vector = StateVector(draws=1, depth=1).fit(lm, task.train, task.dev, seed=1)
    candidates = [states(lm, demos, e.input).mean(0)[:2] for e in task.train.examples if e not in demos]
    assert min(float((stacked(vector).double() - state).abs().max()) for state in candidates) < 1e-5


def test_none_is_the_last_state_and_inner_the_mean_of_the_last_seven() -> None:
    rows = some(11)
    assert torch.equal(optimized(rows, "none", 1.0, WEIGHTS), rows[-1])
    torch.testing.assert_close(optimized(rows, "inner", 1.0, WEIGHTS), sum(rows[4:], torch.zeros(2, 3).double()) / 7)


@pytest.mark.parametrize("n", [4, 7, 11])
@pytest.mark.parametrize("lr", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("weights", [WEIGHTS, (1.0, 3.0), tuple(float(i) for i in range(1, 16))])
def test_momentum_is_the_weighted_sum_of_the_last_differences(n: int, lr: float, weights: tuple[float, ...]) -> None:
    rows = some(n)
    average = rows[-7:].mean(0)
    line = [*rows[:-1], average]
    differences = [after - before for before, after in pairwise(line)]
    pairs = list(zip(reversed(weights), reversed(differences), strict=False))
    step = sum((w * d for w, d in pairs), torch.zeros(2, 3).double()) / sum(w for w, _ in pairs)
    torch.testing.assert_close(optimized(rows, "momentum", lr, weights), average + lr * step)


@both_families
def test_replacing_by_its_own_state_changes_nothing(family: str) -> None:
    lm, task = exact_lm(family), open_task()
    text = prompt(task.dev.examples[0].input)
    own = heads(lm.model, ids(text))[:, -1]
    batch = lm.batch([text])
    with torch.no_grad():
        clean = lm.forward(batch)
        with inject(lm, replacing(own, lm.n_layers - 1)):
            torch.testing.assert_close(lm.forward(batch), clean, atol=1e-9, rtol=0)


def test_one_group_averaged_is_that_group() -> None:
    lm, task = exact_lm("llama"), open_task()
    fit = StateVector(depth=2, groups=1, draws=2).fit(lm, task.train, task.dev)
    again = StateVector(depth=2, draws=2).fit(lm, task.train, task.dev)
    assert torch.equal(stacked(fit), stacked(again))


def test_several_groups_are_averaged() -> None:
    lm, task = exact_lm("llama"), open_task()
    demos = task.train.demonstrations(seed=0)
    more = task.train.queries(demos, 3, seed=0)
    vector = StateVector(optimize="none", depth=2, groups=2, draws=1).fit(lm, task.train, task.dev)
    first = [states(lm, demos, e.input)[-1] for e in task.train.examples if e not in demos]
    second = [states(lm, more, e.input)[-1] for e in task.train.examples if e not in more]
    errors = [float((stacked(vector).double() - (a + b) / 2).abs().max()) for a in first for b in second]
    assert min(errors) < 1e-5


def test_divide_and_conquer_reads_the_last_separator_behind_the_groups_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every choice of one dummy demonstration and query from a small train: one of them was drawn."""
    lm, task = exact_lm("llama"), open_task()
    train = replace(task.train, examples=task.train.examples[:6])
    group = torch.randn(1, 3, lm.width(Site("heads", 0)), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(StateVector, "_state", lambda *_: group[0])
    method = StateVector(depth=1, groups=1, draws=1, aggregate="divide-and-conquer")
    vector = method.fit(lm, train, task.dev)
    errors = []
    for dummy in train.examples:
        for query in train.examples:
            at = separators([dummy], query.input)
            put = {(layer, at[0]): group[0, layer] for layer in range(2)}
            expected = heads(lm.model, ids(prompt(query.input, [dummy])), put)[:2, -1]
            errors.append((float((stacked(vector).double() - expected).abs().max()), dummy != query))
    best, other = sorted(errors)[:2]
    assert best[0] < 1e-5
    assert best[1]
    assert other[0] > 1e-3


def test_the_depth_is_the_best_on_dev() -> None:
    lm, task = exact_lm("llama"), open_task()
    vector = StateVector(draws=1, n_dev=6).fit(lm, task.train, task.dev)
    assert vector.origin is not None
    accuracy = vector.origin.found["dev_accuracy"]
    assert isinstance(accuracy, list)
    assert len(accuracy) == lm.n_layers
    assert vector.origin.found["depth"] == len(vector.edits) - 1


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"groups": 99}, DataError, "groups of 3 shots and a dummy"),
        ({"draws": 0}, InputError, "state-vector.draws"),
        ({"weights": (0.0,)}, InputError, "weights with a sum above 0"),
        ({"depth": 3}, MissingSite, "a layer from 0 to 2"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_any_pass(
    settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    lm, task = exact_lm("llama"), open_task()
    with lm.metered() as meter, pytest.raises(error, match=says):
        StateVector(**settings).fit(lm, task.train, task.dev)
    assert meter.tokens == 0
