"""Sums, differences, multiples, means and sequences of vectors against plain passes with plain changes."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskvec.errors import InputError, VectorMismatch
from taskvec.evaluate import observe
from taskvec.hooks import inject
from taskvec.methods.prompted import FewShot, ZeroShot
from taskvec.prompts import Example
from taskvec.sites import Site
from taskvec.vector import Add, AddKeepNorm, Affine, Blend, Cost, Edit, Op, Origin, Replace, TaskVector, Where
from taskvec.vector.arithmetic import total
from tests import tiny
from tests.reference import both_families, exact_lm, ids, label_task, open_task, prompt, run

WIDTH = 32
QUERIES = ("red1", "walk12", "film 3")
EVERYWHERE = Where("all")


# --- what is added up -------------------------------------------------------------------------------------------------


def row(seed: int) -> Tensor:
    return tiny.random_vector(WIDTH, seed)


def add(seed: int) -> Add:
    return Add(row(seed))


def affine(seed: int, rank: int = 2, *, bias: bool = False) -> Affine:
    read, write = (0.2 * tiny.random_vector(rank * WIDTH, seed + k).reshape(rank, WIDTH) for k in (100, 200))
    return Affine(read, write, row(seed + 300) if bias else None)


def at(layer: int, op: Op, strength: float = 1.0, where: Where | None = None) -> TaskVector:
    return TaskVector((Edit(Site("resid", layer), op, where or Where(), strength),))


def moved(op: Op, h: Tensor) -> Tensor:
    """f(h) of a map h -> h + f(h), for one token in float64: written out once more, from the ops' fields."""
    if isinstance(op, Add):
        return op.vector.double()
    assert isinstance(op, Affine)
    out = op.write.double().T @ (op.read.double() @ h)
    return out if op.bias is None else out + op.bias.double()


def plain(query: str, *terms: tuple[int, float, Op]) -> Tensor:
    """The last logits of a prompt with h + sum of s f(h) at block l's output at the last token; each f reads the h
    that no other term has touched."""
    model = exact_lm("llama").model

    def change(layer: int) -> Callable[[Tensor], Tensor]:
        def at_last(h: Tensor) -> Tensor:
            shift = sum((s * moved(op, h[-1]) for at, s, op in terms if at == layer), torch.zeros(WIDTH).double())
            return torch.cat([h[:-1], (h[-1] + shift)[None]])

        return at_last

    with torch.no_grad():
        return run(model, ids(prompt(query)), {layer: change(layer) for layer in {term[0] for term in terms}}).logits[
            -1
        ]


@torch.no_grad()
def injected(vectors: Any, queries: Sequence[str] = QUERIES) -> Tensor:
    """The last logits of a batch of prompts inside one `inject`, or inside several one within the other."""
    lm = exact_lm("llama")
    batch = lm.batch([prompt(query) for query in queries])
    nested = vectors if isinstance(vectors, tuple) else (vectors,)
    out = None
    if len(nested) == 2:
        with inject(lm, nested[0]), inject(lm, nested[1]):
            out = lm.forward(batch)
    else:
        with inject(lm, nested[0]):
            out = lm.forward(batch)
    return out[torch.arange(len(queries)), batch.last]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def rows(*terms: tuple[int, float, Op]) -> Tensor:
    return torch.stack([plain(query, *terms) for query in QUERIES])


# --- sums -------------------------------------------------------------------------------------------------------------


def test_adds_at_one_site_melt_into_one_and_act_as_both_one_after_the_other() -> None:
    one, two = at(1, add(1), 0.5), at(1, add(2), -2.0)
    both = one + two
    assert len(both.edits) == 1
    assert isinstance(both.edits[0].op, Add)
    expected = rows((1, 0.5, add(1)), (1, -2.0, add(2)))
    assert (expected - rows()).abs().max() > 0.5
    for vectors in (both, two + one, (one, two), one.then(two)):
        close(injected(vectors), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_affines_at_one_site_melt_into_one_that_adds_up_their_shifts(bias: bool) -> None:
    one, two = affine(1, 2, bias=bias), affine(2, 3)
    both = at(1, one, 0.5) + at(1, two, -1.5)
    (edit,) = both.edits
    assert isinstance(edit.op, Affine)
    assert edit.op.read.shape == (5, WIDTH)
    assert (edit.op.bias is None) == (not bias)
    close(injected(both), rows((1, 0.5, one), (1, -1.5, two)))
    close(injected(at(1, two, -1.5) + at(1, one, 0.5)), injected(both))


def test_an_add_and_an_affine_with_a_bias_melt_into_one_affine() -> None:
    one, two, three = add(1), affine(2, bias=True), affine(3)
    both = at(1, one, 2.0) + at(1, two, 0.5) + at(1, three, -1.0)
    assert [type(edit.op) for edit in both.edits] == [Affine]
    close(injected(both), rows((1, 2.0, one), (1, 0.5, two), (1, -1.0, three)))


def test_edits_at_different_sites_or_places_stay_apart() -> None:
    one, two = at(0, add(1), 0.5) + at(2, affine(2)), at(0, add(3), 1.0, EVERYWHERE)
    assert [(e.site.layer, str(e.where)) for e in (one + two).edits] == [
        (0, "last_prompt"),
        (2, "last_prompt"),
        (0, "all"),
    ]
    close(injected(one), rows((0, 0.5, add(1)), (2, 1.0, affine(2))))
    close(injected(one), injected((at(0, add(1), 0.5), at(2, affine(2)))))
    close(injected(one + two), injected((one, two)))


@both_families
def test_a_sum_of_one_of_each_kind_at_the_unembedding(family: str) -> None:
    """Nothing about a sum depends on the site: the logits move by U (v + W h)."""
    lm, task = exact_lm(family), open_task()
    one, two = (TaskVector((Edit(Site("lm_head_in"), op),)) for op in (add(1), affine(2)))
    expected = []
    for example in task.dev.examples:
        h = run(lm.model, ids(prompt(example.input))).head_in[-1].detach().double()
        expected.append(lm.model.lm_head.weight.detach() @ (h + moved(add(1), h) + moved(affine(2), h)))
    close(observe(lm, task.dev, one + two).logits, torch.stack(expected).float())


operand = st.tuples(
    st.sampled_from(["add", "affine", "biased"]), st.integers(0, 50), st.floats(-2, 2), st.integers(1, 3)
)


def op_of(kind: str, seed: int, rank: int) -> Op:
    return add(seed) if kind == "add" else affine(seed, rank, bias=kind == "biased")


@given(terms=st.lists(operand, min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_melted_op_moves_h_by_the_sum_of_all_shifts(terms: list[tuple[str, int, float, int]], seed: int) -> None:
    h = row(seed).double()
    ops = [(strength, op_of(kind, number, rank)) for kind, number, strength, rank in terms]
    (edit,) = total([[Edit(Site("mlp", 0), op, strength=strength)] for strength, op in ops])
    expected = h + sum((strength * moved(op, h) for strength, op in ops), torch.zeros(WIDTH).double())
    torch.testing.assert_close(edit.op(h[None], edit.strength)[0], expected, atol=1e-4, rtol=1e-4)


@given(terms=st.lists(operand, min_size=2, max_size=4))
@settings(deadline=None, max_examples=30)
def test_sums_neither_depend_on_order_nor_on_brackets(terms: list[tuple[str, int, float, int]]) -> None:
    h = row(7).double()[None]
    parts = [at(0, op_of(kind, number, rank), strength) for kind, number, strength, rank in terms]
    left = parts[0]
    for part in parts[1:]:
        left = left + part
    right = parts[-1]
    for part in reversed(parts[:-1]):
        right = part + right
    one, two = ((edit := vector.edits[0]).op(h, edit.strength) for vector in (left, right))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_a_summand_that_does_nothing_changes_nothing() -> None:
    """Also where the other summand has several edits at one site that act in order: the second affine reads what the
    first wrote. Such a vector may be refused; it may not come to mean something else."""
    sequence = at(1, affine(1)).then(at(1, affine(2)))
    nothing = at(1, Add(torch.zeros(WIDTH)))
    try:
        both = sequence + nothing
    except InputError:
        return
    close(injected(both), injected(sequence))


def test_sums_at_places_that_overlap_do_not_depend_on_order() -> None:
    """`last_prompt` is among `all`: at that token both act. Such a sum may be refused; it may not depend on the order,
    as two affine edits one after the other do."""
    one, two = at(1, affine(1)), at(1, affine(2), 1.0, EVERYWHERE)
    try:
        sums = one + two, two + one
    except InputError:
        return
    close(*(injected(both) for both in sums))


# --- negatives, differences, multiples --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["add", "affine", "biased"])
def test_a_vector_less_itself_is_no_change(kind: str) -> None:
    vector = at(1, op_of(kind, 4, 3), 0.7)
    assert (injected(vector) - injected(TaskVector(()))).abs().max() > 0.1
    close(injected(vector - vector), injected(TaskVector(())))
    close(injected(vector + -vector), injected(TaskVector(())))


@pytest.mark.parametrize("kind", ["add", "affine", "biased"])
def test_a_negative_moves_as_far_the_other_way(kind: str) -> None:
    op = op_of(kind, 4, 3)
    close(injected(-at(1, op, 0.7)), rows((1, -0.7, op)))
    close(injected(at(1, add(9)) - at(1, op, 0.7)), rows((1, 1.0, add(9)), (1, -0.7, op)))
    negative = -at(1, op, 0.7)
    close(injected(-negative), rows((1, 0.7, op)))


@pytest.mark.parametrize("factor", [2.0, -0.5, 0.0])
def test_a_float_scales_from_both_sides(factor: float) -> None:
    vector = at(0, add(1), 0.5) + at(2, affine(2, bias=True), -1.0)
    expected = rows((0, 0.5 * factor, add(1)), (2, -factor, affine(2, bias=True)))
    for scaled in (factor * vector, vector * factor, vector.scaled(factor)):
        close(injected(scaled), expected)


def test_scaling_needs_no_sum() -> None:
    vector = at(1, Replace(row(1)), 0.5)
    assert (2.0 * vector).edits[0].strength == 1.0
    assert (vector * -1.0).edits[0].strength == -0.5


@given(a=st.floats(-2, 2), b=st.floats(-2, 2))
@settings(deadline=None, max_examples=25)
def test_multiples_distribute_over_sums(a: float, b: float) -> None:
    h = row(7).double()[None]
    v, w = at(0, affine(1, bias=True), 0.5), at(0, add(2))
    one, two = a * (v + w), a * v + a * w
    three, four = (a + b) * v, a * v + b * v
    for left, right in ((one, two), (three, four)):
        results = [(edit := vector.edits[0]).op(h, edit.strength) for vector in (left, right)]
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


# --- means ------------------------------------------------------------------------------------------------------------


def test_the_mean_of_adds_and_affines_moves_by_the_mean_shift() -> None:
    parts = at(1, add(1), 2.0), at(1, affine(2), 1.0), at(1, affine(3, bias=True), -1.0)
    mean = TaskVector.mean(parts)
    assert len(mean.edits) == 1
    close(injected(mean), rows((1, 2 / 3, add(1)), (1, 1 / 3, affine(2)), (1, -1 / 3, affine(3, bias=True))))


def test_the_mean_with_an_empty_vector_halves() -> None:
    close(injected(TaskVector.mean([at(1, add(1)), TaskVector(())])), rows((1, 0.5, add(1))))


def test_the_mean_of_replacements_replaces_by_the_mean() -> None:
    values = [row(seed) for seed in (1, 2, 3)]
    mean = TaskVector.mean([at(1, Replace(value), 0.8) for value in values])
    (edit,) = mean.edits
    assert (type(edit.op), edit.strength) == (Replace, 0.8)
    middle = (values[0] + values[1] + values[2]).double() / 3
    lm = exact_lm("llama")
    change = {1: lambda h: torch.cat([h[:-1], (0.2 * h[-1] + 0.8 * middle)[None]])}
    with torch.no_grad():
        expected = torch.stack([run(lm.model, ids(prompt(query)), change).logits[-1] for query in QUERIES])
    close(injected(mean), expected)


def test_the_mean_of_blends_with_equal_scalars_blends_the_mean() -> None:
    mean = TaskVector.mean([at(1, Blend(row(seed), 0.9, 0.2), where=EVERYWHERE) for seed in (1, 2)])
    op = mean.edits[0].op
    assert isinstance(op, Blend)
    assert (op.keep, op.weight) == (0.9, 0.2)
    torch.testing.assert_close(op.vector, (row(1) + row(2)) / 2)


def test_the_mean_of_one_is_itself() -> None:
    for op in (add(1), affine(2, bias=True), Replace(row(3)), Blend(row(4))):
        close(injected(TaskVector.mean([at(1, op, 0.5)])), injected(at(1, op, 0.5)))


@pytest.mark.parametrize(
    "unlike",
    [
        (at(1, Replace(row(1))), at(2, Replace(row(2)))),
        (at(1, Replace(row(1))), at(1, Replace(row(2)), 0.5)),
        (at(1, Replace(row(1))), at(1, Replace(row(2)), 1.0, EVERYWHERE)),
        (at(1, Replace(row(1))), at(1, add(2))),
        (at(1, add(2)), at(1, Replace(row(1)))),
        (at(1, Blend(row(1), 0.5, 0.5)), at(1, Blend(row(2), 0.5, 0.6))),
        (at(1, Replace(row(1))), at(1, Replace(row(2))).then(at(2, Replace(row(3))))),
        (at(1, Replace(row(1))), TaskVector(())),
        (TaskVector(()), at(1, Replace(row(1)))),
    ],
)
def test_vectors_that_set_h_unlike_have_no_mean(unlike: tuple[TaskVector, TaskVector]) -> None:
    with pytest.raises(InputError):
        TaskVector.mean(unlike)


def test_no_vectors_have_no_mean() -> None:
    with pytest.raises(InputError, match="at least one vector"):
        TaskVector.mean([])


# --- what has no sum --------------------------------------------------------------------------------------------------

SETTERS = {"Replace": Replace(row(1)), "Blend": Blend(row(2)), "AddKeepNorm": AddKeepNorm(row(3))}
setters = pytest.mark.parametrize("name", list(SETTERS))


@setters
def test_ops_that_set_h_have_no_sum_and_the_message_says_what_to_do(name: str) -> None:
    one, two = at(1, SETTERS[name]), at(1, add(2))
    tries: list[Callable[[], Any]] = [
        lambda: one + two,
        lambda: two + one,
        lambda: one - two,
        lambda: two - one,
        lambda: -one,
    ]
    for attempt in tries:
        with pytest.raises(InputError) as caught:
            attempt()
        message = str(caught.value)
        assert "\n" not in message
        assert f"add or affine; found {name}; inject one after the other: first.then(second)" in message


def test_add_keep_norm_has_no_mean_either() -> None:
    with pytest.raises(InputError, match=r"found AddKeepNorm; .*first\.then\(second\)"):
        TaskVector.mean([at(1, SETTERS["AddKeepNorm"])] * 2)


# --- one after the other ----------------------------------------------------------------------------------------------


def test_then_acts_in_the_order_told() -> None:
    setting, adding = at(1, Replace(row(1))), at(1, add(2))
    close(injected(adding.then(setting)), injected(setting))
    assert (injected(setting.then(adding)) - injected(setting)).abs().max() > 0.1
    close(injected(setting.then(adding)), injected(at(1, Replace(row(1) + row(2)))))


def test_then_takes_any_ops_and_keeps_them_as_they_are() -> None:
    parts = [at(1, op, 0.5) for op in (add(1), *SETTERS.values(), affine(2))]
    sequence = parts[0].then(*parts[1:])
    assert sequence.edits == tuple(edit for part in parts for edit in part.edits)
    assert parts[0].then().edits == parts[0].edits


def test_affines_one_after_the_other_are_not_their_sum() -> None:
    """The second reads what the first wrote: h + f(h) + g(h + f(h))."""
    one, two = at(1, affine(1)), at(1, affine(2))
    assert (injected(one.then(two)) - injected(one + two)).abs().max() > 1e-3
    close(injected(one.then(two)), injected((one, two)))


# --- per row ----------------------------------------------------------------------------------------------------------


def test_each_row_of_a_batch_gets_its_own() -> None:
    both = at(1, add(1)) + at(1, affine(2, bias=True), 0.5)
    mean = TaskVector.mean([at(0, Replace(row(3))), at(0, Replace(row(4)))])
    got = injected([both, None, mean])
    for i, vector in enumerate((both, TaskVector(()), mean)):
        close(got[i], injected(vector)[i])
    close(got[0], plain(QUERIES[0], (1, 1.0, add(1)), (1, 0.5, affine(2, bias=True))))


# --- origins ----------------------------------------------------------------------------------------------------------


@cache
def origin(kind: str = "open") -> Origin:
    task = label_task() if kind == "labels" else open_task()
    method = FewShot() if kind == "few-shot" else ZeroShot()
    found = method.fit(exact_lm("llama"), task.train, task.dev).origin
    assert found is not None
    return found.model_copy(update={"cost": Cost(labels=3, queries=5, tokens=100, seconds=1.5)})


def owned(number: int, of: Origin | None, **fields: Any) -> TaskVector:
    made = of if of is None else of.model_copy(update=fields)
    return TaskVector(at(1, add(number)).edits, made)


Combine = Callable[[TaskVector, TaskVector], TaskVector]
WAYS: dict[str, Combine] = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "mean": lambda a, b: TaskVector.mean([a, b]),
    "sequence": lambda a, b: a.then(b),
}
ways = pytest.mark.parametrize("way", list(WAYS))


@ways
def test_the_joint_origin_names_the_way_and_its_parts_and_adds_up_the_cost(way: str) -> None:
    made = WAYS[way](owned(1, origin(), method="one", seed=4), owned(2, origin(), method="two")).origin
    assert made is not None
    assert made.method == ("sum" if way == "difference" else way)
    parts: Any = made.hyperparameters["parts"]
    assert [(part["method"], part["seed"]) for part in parts] == [("one", 4), ("two", 0)]
    assert made.cost == Cost(labels=6, queries=10, tokens=200, seconds=3.0)
    assert made.found == {}


@ways
def test_one_tasks_vectors_keep_its_data_hash(way: str) -> None:
    made = WAYS[way](owned(1, origin()), owned(2, origin(), n_test=5)).origin
    assert made is not None
    assert (made.task, made.data_hash) == (origin().task, origin().data_hash)
    assert made.n_test == 5  # items that both kept away


@ways
def test_two_tasks_vectors_have_no_data_hash(way: str) -> None:
    one, two = owned(1, origin()), owned(2, origin("labels"), task="other", max_new_tokens=99)
    made = WAYS[way](one, two).origin
    assert made is not None
    assert origin().data_hash != origin("labels").data_hash
    assert (made.task, made.data_hash, made.labels, made.max_new_tokens) == ("tiny + other", "", None, 99)


@ways
@pytest.mark.parametrize("none", [0, 1])
def test_a_part_without_an_origin_leaves_none(way: str, none: int) -> None:
    both = [owned(1, origin()), owned(2, origin())]
    both[none] = owned(3, None)
    assert WAYS[way](*both).origin is None


@ways
@pytest.mark.parametrize("what", ["model", "template", "prompt"])
def test_vectors_of_different_models_templates_or_prompts_do_not_combine(way: str, what: str) -> None:
    unlike: dict[str, dict[str, Any]] = {
        "model": {"model": origin().model.model_copy(update={"fingerprint": "0" * 64})},
        "template": {"format": origin().format.model_copy(update={"hash": "0" * 64})},
        "prompt": {"prompt": "few-shot"},
    }
    with pytest.raises(VectorMismatch, match=f"one {what} for vectors put together"):
        WAYS[way](owned(1, origin()), owned(2, origin(), **unlike[what]))


def test_few_shot_vectors_combine_behind_the_same_demonstrations_only() -> None:
    few = origin("few-shot")
    assert (owned(1, few) + owned(2, few)).origin is not None
    with pytest.raises(VectorMismatch, match="one prompt"):
        owned(1, few) + owned(2, few, demos=(Example("other", "thing"),))


def test_zero_shot_vectors_combine_whatever_their_demonstrations_were() -> None:
    made = (owned(1, origin()) + owned(2, origin(), demos=(Example("other", "thing"),))).origin
    assert made is not None


def test_a_negative_and_a_multiple_keep_their_origin() -> None:
    vector = owned(1, origin())
    assert (-vector).origin == (2.0 * vector).origin == origin()


def test_a_sum_is_saved_and_loaded_as_any_vector(tmp_path: Any) -> None:
    both = owned(1, origin()) + TaskVector(at(1, affine(2, bias=True), 0.5).edits, origin())
    both.save_pretrained(tmp_path / "v")
    loaded = TaskVector.from_pretrained(tmp_path / "v")
    assert loaded.origin == both.origin
    assert torch.equal(injected(loaded), injected(both))


def test_a_head_inside_an_affine_layer_has_no_sum_in_either_order() -> None:
    wide, narrow = 32, 8
    read, write = torch.eye(2, wide), torch.ones(2, wide)
    layer = TaskVector((Edit(Site("heads", 1), Affine(read, write)),))
    head = TaskVector((Edit(Site("heads", 1, 2), Add(torch.ones(narrow))),))
    for one, two in ((layer, head), (head, layer)):
        with pytest.raises(InputError, match="whose order counts"):
            one + two
    apart = TaskVector((Edit(Site("heads", 2, 2), Add(torch.ones(narrow))),))
    assert len((layer + apart).edits) == 2


@ways
def test_put_together_the_test_items_of_every_part_are_watched(way: str) -> None:
    one, two = owned(1, origin()), owned(2, origin("labels"), task="other")
    made = WAYS[way](one, two).origin
    assert made is not None
    kept = {o.data_hash: o.n_test for o in (origin(), origin("labels"))}
    assert kept.items() <= made.kept_away.items()
