"""State vector against plain captures of whole prompts: hooks of this file's own on the output projection."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from taskvec.errors import DataError, InputError, MissingSite
from taskvec.hooks import inject
from taskvec.lm import LM
from taskvec.methods.state_vector import StateVector, optimized, replacing
from taskvec.prompts import Example, Prompt
from taskvec.sites import Site
from taskvec.tasks import Task
from taskvec.vector import Replace, TaskVector, Where
from tests import tiny
from tests.reference import best_of, blocks, both_families, exact_lm, ids, label_task, open_task, prompt

WEIGHTS = (1.0, 2.0, 4.0, 8.0, 16.0, 0.0)
# a bias on the projection; Conv1D; head sizes that are not width / heads, with grouped queries
every_shape = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3"])


def projections(model: Any) -> list[Any]:
    return [b.self_attn.o_proj if hasattr(b, "self_attn") else b.attn.c_proj for b in blocks(model)]


def heads(model: Any, tokens: Sequence[int], put: dict[tuple[int, int], Tensor] | None = None) -> Tensor:
    """(L, T, w): the projections' inputs of one whole prompt, some replaced: `put[layer, token]`."""
    return attend(model, tokens, put)[0]


@torch.no_grad()
def attend(
    model: Any, tokens: Sequence[int], put: dict[tuple[int, int], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The same, and the prompt's logits (T, V)."""
    seen: list[Tensor] = []

    def before(layer: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            rows = [(put or {}).get((layer, t), row) for t, row in enumerate(args[0][0])]
            z = torch.stack([row.to(args[0]) for row in rows])
            seen.append(z)
            return (z[None], *args[1:])

        return hook

    handles = [p.register_forward_pre_hook(before(layer)) for layer, p in enumerate(projections(model))]
    logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return torch.stack(seen), logits


def separators(demos: Sequence[Example], query: str) -> list[int]:
    """The token that ends each demonstration's question, and the query's, in the whole prompt."""
    return [len(ids(prompt(one, demos[:i]))) - 1 for i, one in enumerate([*(d.input for d in demos), query])]


def states(lm: LM, demos: Sequence[Example], query: str) -> Tensor:
    """(N + 1, L, w) at every separator of the one whole prompt."""
    whole = heads(lm.model, ids(prompt(query, demos)))
    return whole[:, separators(demos, query)].transpose(0, 1)


@dataclass(frozen=True)
class Shown:
    """One whole prompt of a fit, read back from its text."""

    demos: tuple[Example, ...]
    query: str


def watch(monkeypatch: pytest.MonkeyPatch, n: int) -> list[Shown]:
    """The prompts with exactly `n` demonstrations that are encoded from here on, in order, repeated ones too."""
    seen: list[Shown] = []
    encode = LM.encode

    def watched(lm: LM, text: Any) -> Any:
        if isinstance(text, Prompt) and text.text.count(" ->") == n + 1:
            *rows, query = text.text.split("\n")
            parts = [row.split(" -> ") for row in rows]
            seen.append(Shown(tuple(Example(one, two) for one, two in parts), query.removesuffix(" ->")))
        return encode(lm, text)

    monkeypatch.setattr(LM, "encode", watched)
    return seen


def plain_v(rows: Sequence[Tensor], how: str) -> Tensor:
    """V from s_1 .. s_N and, last, s_dummy, with the paper's weights and rate 1: loops over the list."""
    if how == "none":
        return rows[-1]
    last = rows[-7:]
    average = sum(last[1:], last[0]) / len(last)
    if how == "inner":
        return average
    total, norm = torch.zeros_like(average), 0.0
    for w, (before, after) in zip(reversed(WEIGHTS), reversed(list(pairwise([*rows[:-1], average]))), strict=False):
        total, norm = total + w * (after - before), norm + w
    return average + total / norm


def mean(tensors: Sequence[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0]) / len(tensors)


def close(got: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), expected.double(), atol=atol, rtol=1e-5)


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


@pytest.mark.parametrize(("family", "seed"), [("llama", 0), ("llama", 3), ("gpt2", 1), ("gemma3", 0)])
@pytest.mark.parametrize("aggregate", ["average", "divide-and-conquer"])
def test_the_depth_is_the_best_on_dev(family: str, seed: int, aggregate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With divide and conquer it is chosen for the groups' average too, and kept for what replaces it."""
    lm, task = exact_lm(family), label_task()
    seen = watch(monkeypatch, 3)
    method = StateVector(draws=1, groups=2, n_dev=8, aggregate=aggregate)
    vector = method.fit(lm, task.train, task.dev, seed=seed)
    average = mean([mean(list(states(lm, one.demos, one.query))) for one in seen])
    monkeypatch.undo()

    def changed(depth: int, tokens: list[int], at: int) -> Tensor:
        return attend(lm.model, tokens, {(layer, at): average[layer] for layer in range(depth + 1)})[1]

    scores = best_of(lm.model, task.dev, 8, changed, lm.n_layers)
    best = max(range(lm.n_layers), key=lambda depth: scores[depth])
    assert vector.origin is not None
    assert len(vector.edits) == best + 1
    assert vector.origin.found["depth"] == best
    assert vector.origin.found["dev_accuracy"] == pytest.approx([accuracy for accuracy, _ in scores])
    differs = (stacked(vector).double() - average[: best + 1]).abs().max() > 1e-3
    assert bool(differs) == (aggregate == "divide-and-conquer")


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


# --- whole fits, their prompts read back ------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("how", ["none", "inner", "momentum"])
def test_a_groups_vector_is_averaged_over_draws_of_whole_prompts(
    family: str, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, task = exact_lm(family), open_task()
    demos = task.train.demonstrations(seed=2)
    seen = watch(monkeypatch, 3)
    vector = StateVector(optimize=how, depth=2, draws=4).fit(lm, task.train, task.dev, seed=2)
    assert len(seen) == 4
    assert seen[0].demos == demos
    for one in seen:
        assert set(one.demos) == set(demos)
        assert len(one.demos) == 3
        assert one.query in {e.input for e in task.train.examples} - {demo.input for demo in demos}
    assert len({one.demos for one in seen}) > 1  # orders
    assert len({one.query for one in seen}) > 1  # a dummy of its own each
    expected = mean([plain_v(list(states(lm, one.demos, one.query)), how) for one in seen])
    close(stacked(vector), expected[:3], atol=3e-5)
    assert [(edit.where, edit.strength) for edit in vector.edits] == [(Where(), 1.0)] * 3


@pytest.mark.parametrize("how", ["none", "inner", "momentum"])
def test_a_prompt_of_nine_demonstrations_uses_its_last_six(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), tiny.tiny_task(shots=9)
    seen = watch(monkeypatch, 9)
    vector = StateVector(optimize=how, depth=1, draws=1).fit(lm, task.train, task.dev)
    (one,) = seen
    rows = list(states(lm, one.demos, one.query))
    assert len(rows) == 10
    close(stacked(vector), plain_v(rows, how)[:2], atol=3e-5)


def test_groups_share_no_demonstration_and_are_averaged_with_equal_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), open_task()
    seen = watch(monkeypatch, 3)
    vector = StateVector(depth=2, draws=2, groups=4).fit(lm, task.train, task.dev, seed=1)
    groups = [seen[2 * g : 2 * g + 2] for g in range(4)]
    shown = [{demo.input for one in group for demo in one.demos} for group in groups]
    assert [len(inputs) for inputs in shown] == [3] * 4
    assert len(set().union(*shown)) == 12
    assert seen[0].demos == task.train.demonstrations(seed=1)
    vectors = [mean([plain_v(list(states(lm, one.demos, one.query)), "inner") for one in group]) for group in groups]
    close(stacked(vector), mean(vectors))
    assert vector.origin is not None
    assert vector.origin.cost.labels == 12


@every_shape
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_divide_and_conquer_is_the_plain_two_stages(family: str, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """First each group's vector; then prompts of one dummy demonstration a group, separator g of layers 0 to `depth`
    replaced by group g's vector, their own last separator read."""
    lm, task = exact_lm(family), open_task()
    method = StateVector(depth=depth, draws=2, groups=4, aggregate="divide-and-conquer")
    first, second = watch(monkeypatch, 3), watch(monkeypatch, 4)
    vector = method.fit(lm, task.train, task.dev, seed=5)
    monkeypatch.undo()
    # a dummy prompt's own text is encoded once, whole, so only the groups' prompts have three demonstrations
    assert (len(first), len(second)) == (8, 2)
    groups = [
        mean([plain_v(list(states(lm, one.demos, one.query)), "inner") for one in first[2 * g : 2 * g + 2]])
        for g in range(4)
    ]
    finals = []
    for one in second:
        inputs = [*(demo.input for demo in one.demos), one.query]
        assert len(set(inputs)) == 5
        assert set(one.demos) <= set(task.train.examples)
        *places, last = separators(one.demos, one.query)
        put = {
            (layer, at): group[layer] for at, group in zip(places, groups, strict=True) for layer in range(depth + 1)
        }
        tokens = ids(prompt(one.query, one.demos))
        assert last == len(tokens) - 1
        finals.append(heads(lm.model, tokens, put)[:, -1])
    assert len(vector.edits) == depth + 1
    close(stacked(vector), mean(finals)[: depth + 1], atol=3e-5)
    # a state enters the last one through layers behind it: layer 0's own is that of the dummies alone
    plain = mean([heads(lm.model, ids(prompt(one.query, one.demos)))[:, -1] for one in second])
    moved = (mean(finals) - plain)[: depth + 1].abs().amax(-1)
    assert moved[0] == 0.0
    assert (moved[1:] > 1e-3).all()


@every_shape
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_applied_it_is_the_attention_of_its_layers_computed_from_the_state(family: str, depth: int) -> None:
    lm, task = exact_lm(family), open_task()
    width = lm.width(Site("heads", 0))
    state = torch.randn(3, width, generator=torch.Generator().manual_seed(depth))
    state = torch.cat([state, state[:1]])[: lm.n_layers]
    for example in task.dev.examples[:3]:
        text = prompt(example.input)
        last = len(ids(text)) - 1
        expected = attend(lm.model, ids(text), {(layer, last): state[layer] for layer in range(depth + 1)})[1]
        batch = lm.batch([text])
        with torch.no_grad():
            clean = lm.forward(batch)[0]
            with inject(lm, replacing(state, depth)):
                got = lm.forward(batch)[0]
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
        assert torch.equal(got[:-1], clean[:-1])
        assert (got[-1] - clean[-1]).abs().max() > 0.1


# --- edges ------------------------------------------------------------------------------------------------------------


def cut(task: Task, n: int) -> Task:
    return replace(task, train=replace(task.train, examples=task.train.examples[:n]))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("aggregate", ["average", "divide-and-conquer"])
def test_train_may_be_as_small_as_the_groups_and_one_dummy(groups: int, aggregate: Any) -> None:
    lm, least = exact_lm("llama"), 3 * groups + 1
    method = StateVector(depth=1, draws=2, groups=groups, aggregate=aggregate)
    enough, short = cut(open_task(), least), cut(open_task(), least - 1)
    assert len(method.fit(lm, enough.train, enough.dev).edits) == 2
    with lm.metered() as meter, pytest.raises(DataError, match=rf"{least} train examples .*found {least - 1}"):
        method.fit(lm, short.train, short.dev)
    assert meter.tokens == 0


def test_one_demonstration_has_one_difference_and_the_papers_last_weight_is_zero() -> None:
    """The one difference is V_avg - s_1, and the paper's weight for it is 0: nothing is added to the average."""
    rows = some(2)
    torch.testing.assert_close(optimized(rows, "momentum", 1.0, WEIGHTS), (rows[0] + rows[1]) / 2)
    lm, task = exact_lm("llama"), tiny.tiny_task(shots=1)
    vector = StateVector(optimize="momentum", depth=1, draws=1).fit(lm, task.train, task.dev)
    assert stacked(vector).isfinite().all()


def test_a_fit_depends_on_its_seed_alone() -> None:
    lm, task = exact_lm("llama"), open_task()
    method = StateVector(depth=1, draws=3, groups=2, aggregate="divide-and-conquer")
    one, same, other = (stacked(method.fit(lm, task.train, task.dev, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
