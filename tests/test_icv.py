"""ICV against its formula (baselines.md, section 4): the op line by line, the direction by a plain SVD."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import sqrt
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate import observe, score
from taskvec.hooks import inject
from taskvec.lm import LM
from taskvec.methods.icv import InContextVector, direction
from taskvec.prompts import Example
from taskvec.sites import Site
from taskvec.tasks import Task
from taskvec.vector import AddKeepNorm, TaskVector, Where
from tests import tiny
from tests.reference import best_of, blocks, both_families, exact_lm, ids, label_task, open_task, prompt, run

Change = Callable[[Tensor], Tensor]


# --- the reference ----------------------------------------------------------------------------------------------------


def steered(x: Sequence[float], icv: Sequence[float], strength: float) -> list[float]:
    """x' = |x| normalize(normalize(x) + lambda s normalize(icv)), s = 1 + max(0, cos(x, -icv)): one token, floats."""

    def norm(row: Sequence[float]) -> float:
        return sqrt(sum(value * value for value in row))

    unit_x, unit_v = [a / norm(x) for a in x], [a / norm(icv) for a in icv]
    cosine = sum(-a * b for a, b in zip(unit_x, unit_v, strict=True))
    s = 1 + max(0.0, cosine)
    moved = [a + strength * s * b for a, b in zip(unit_x, unit_v, strict=True)]
    return [norm(x) * a / norm(moved) for a in moved]


def steer(icv: Tensor, strength: float) -> Change:
    """The same for all tokens of a block's MLP, in plain tensors."""
    rows = icv.double().tolist()
    return lambda h: torch.tensor([steered(row, rows, strength) for row in h.detach().double().tolist()]).to(h)


def run_mlp(model: Any, tokens: Sequence[int], change: Mapping[int, Change]) -> Tensor:
    """The logits (T, V) of one prompt with block l's MLP output mapped by `change[l]`."""

    def after(layer: int) -> Callable[..., Tensor]:
        return lambda _, __, output: change[layer](output[0])[None]

    handles = [blocks(model)[layer].mlp.register_forward_hook(after(layer)) for layer in change]
    try:
        logits: Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits


@torch.no_grad()
def last_states(model: Any, text: str) -> Tensor:
    """H (L + 1, d): the embedding and every block's output at the last token of a text alone."""
    tokens = ids(text)
    seen: list[Tensor] = []
    handle = blocks(model)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
    resid = run(model, tokens).resid
    handle.remove()
    return torch.stack([seen[0], *(layer[-1] for layer in resid)])


def gaps(lm: LM, demos: Sequence[Example], texts: str = "bare") -> Tensor:
    """D (n, L + 1, d)."""
    rows = []
    for demo in demos:
        before, after = (demo.input, demo.output)
        if texts == "pair":
            before, after = prompt(demo.input), prompt(demo.input) + f" {demo.output}"
        rows.append(last_states(lm.model, after) - last_states(lm.model, before))
    return torch.stack(rows).double()


def directions(gap: Tensor, rank: int) -> list[Tensor]:
    """mean + the sum of `rank` principal components, for every choice of the components' signs (which an SVD leaves
    open): cut into the layers' rows, the embedding's dropped."""
    flat = gap.flatten(1)
    components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:rank]
    signed = [
        flat.mean(0) + sum((sign * row for sign, row in zip(signs, components, strict=True)), torch.zeros(()))
        for signs in product((1.0, -1.0), repeat=rank)
    ]
    return [row.reshape(gap.shape[1:])[1:] for row in signed]


def rows_of(vector: TaskVector) -> Tensor:
    """icv^l by layer, (L, d)."""
    assert [edit.site.layer for edit in vector.edits] == list(range(len(vector.edits)))
    return torch.stack([edit.op.tensors()["vector"] for edit in vector.edits]).double()


def fitted(method: InContextVector, lm: LM, task: Task, seed: int = 0) -> TaskVector:
    return method.fit(lm, task.train, task.dev, seed=seed)


# --- the op -----------------------------------------------------------------------------------------------------------

vectors = st.lists(st.floats(-10, 10), min_size=5, max_size=5).filter(lambda row: sum(x * x for x in row) > 1e-4)
strengths = st.floats(1e-3, 3.0)


@given(x=vectors, icv=vectors, strength=strengths)
@settings(deadline=None, max_examples=200)
def test_the_op_is_the_formula_line_by_line(x: list[float], icv: list[float], strength: float) -> None:
    cosine = torch.nn.functional.cosine_similarity(torch.tensor([x]), torch.tensor([icv]))
    assume(float(cosine) > -0.999 or abs(2 * strength - 1) > 1e-2)  # else both parts cancel, and rounding decides
    op = AddKeepNorm(torch.tensor(icv, dtype=torch.float64), strength)
    got = op(torch.tensor([x], dtype=torch.float64))
    expected = torch.tensor([steered(x, icv, strength)], dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-6)


@given(x=vectors, icv=vectors, strength=st.floats(1e-3, 0.45))
@settings(deadline=None)
def test_the_norm_stays(x: list[float], icv: list[float], strength: float) -> None:
    h = torch.tensor([x], dtype=torch.float64)
    got = AddKeepNorm(torch.tensor(icv, dtype=torch.float64), strength)(h)
    torch.testing.assert_close(got.norm(), h.norm(), atol=0, rtol=1e-9)


@given(x=vectors, icv=vectors, strength=strengths, scale=st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_the_vectors_own_length_does_not_count(x: list[float], icv: list[float], strength: float, scale: float) -> None:
    h, v = torch.tensor([x], dtype=torch.float64), torch.tensor(icv, dtype=torch.float64)
    one, two = (AddKeepNorm(scaled, strength).apply(h) for scaled in (v, scale * v))
    assume(float(torch.nn.functional.cosine_similarity(h[0], v, dim=0)) > -0.999)
    torch.testing.assert_close(one, two, atol=1e-8, rtol=1e-6)


def test_it_moves_twice_as_far_from_the_opposite_side_and_once_from_the_same() -> None:
    v, across = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 3.0]])
    lifted = AddKeepNorm(v, 0.1)(across)
    torch.testing.assert_close(lifted, 3 * torch.tensor([[0.1, 1.0]]) / sqrt(1.01))
    opposite = torch.tensor([[-1.0, 1e-3]])
    got = AddKeepNorm(v, 0.1)(opposite)  # -1 + 2 * 0.1 = -0.8, then |x| again: the small coordinate grows by 1 / 0.8
    assert float(got[0, 1]) == pytest.approx(1e-3 / 0.8, rel=1e-4)
    same = AddKeepNorm(v, 0.1)(torch.tensor([[1.0, 1e-3]]))  # 1 + 0.1
    assert float(same[0, 1]) == pytest.approx(1e-3 / 1.1, rel=1e-4)


@pytest.mark.parametrize("strength", [1e-9, 0.1])
def test_a_zero_activation_stays_zero_and_a_tiny_strength_changes_nothing(strength: float) -> None:
    h = tiny.random_vector(24, 3).reshape(4, 6).double()
    h[1] = 0.0
    got = AddKeepNorm(tiny.random_vector(6, 4), strength)(h)
    assert torch.equal(got[1], torch.zeros(6, dtype=torch.float64))
    assert torch.isfinite(got).all()
    if strength < 1e-6:
        torch.testing.assert_close(got, h, atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_activations_dtype_is_kept(dtype: torch.dtype) -> None:
    h, v = tiny.random_vector(12, 1).reshape(2, 6).to(dtype), tiny.random_vector(6, 2)
    got = AddKeepNorm(v, 0.1)(h)
    assert got.dtype == dtype
    expected = torch.tensor([steered(row, v.tolist(), 0.1) for row in h.double().tolist()])
    torch.testing.assert_close(got.float(), expected, atol=torch.finfo(dtype).eps * 2, rtol=torch.finfo(dtype).eps * 2)


# --- the direction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [(5, 12), (6, 3)])
def test_the_direction_is_the_mean_and_unit_principal_components(rank: int, shape: tuple[int, int]) -> None:
    d = tiny.random_vector(shape[0] * shape[1], 7).reshape(shape).double() + 0.5
    components = torch.linalg.svd(d - d.mean(0), full_matrices=False).Vh[:rank]
    left = direction(d.float(), rank).double() - d.mean(0)
    along = components @ left
    torch.testing.assert_close(along.abs(), torch.ones(rank, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(components.T @ along, left, atol=1e-5, rtol=0)  # and nothing else is in it


def test_the_directions_sign_is_decided_by_the_data_alone() -> None:
    d = tiny.random_vector(60, 8).reshape(5, 12)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(direction(d, 2), direction(d[order], 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(direction(d + 3.0, 1) - 3.0, direction(d, 1), atol=1e-5, rtol=0)


@both_families
@pytest.mark.parametrize("texts", ["bare", "pair"])
def test_a_layers_row_comes_from_that_blocks_output(family: str, texts: Any) -> None:
    """Without principal components each row is a plain mean: a row of the embedding or of a neighbour would show."""
    lm, task = exact_lm(family), open_task()
    vector = fitted(InContextVector(rank=0, texts=texts), lm, task, seed=1)
    means = gaps(lm, task.train.demonstrations(seed=1), texts).mean(0)
    assert means.shape[0] == lm.n_layers + 1
    assert min(float((a - b).abs().max()) for a, b in zip(means[1:], means, strict=False)) > 0.1
    torch.testing.assert_close(rows_of(vector), means[1:], atol=1e-4, rtol=0)
    for layer, edit in enumerate(vector.edits):
        assert (edit.site, edit.where, edit.strength) == (Site("mlp", layer), Where("all"), 1.0)
        assert isinstance(edit.op, AddKeepNorm)
        assert edit.op.steer == 0.1


@both_families
@pytest.mark.parametrize("rank", [1, 2])
def test_the_direction_is_over_embedding_and_layers_and_the_embeddings_row_is_dropped(family: str, rank: int) -> None:
    """Page 4, steps 1 and 2: H holds the embedding and L layers; principal components of that; then its row drops."""
    lm, task = exact_lm(family), open_task()
    got = rows_of(fitted(InContextVector(rank=rank), lm, task))
    candidates = directions(gaps(lm, task.train.demonstrations(seed=0)), rank)
    assert min(float((got - rows).abs().max()) for rows in candidates) < 1e-4


@both_families
def test_all_layers_share_one_principal_component(family: str) -> None:
    """Whatever stands beside the layers in it: its parts in all layers come from one direction of the demonstrations,
    with one sign."""
    lm, task = exact_lm(family), open_task()
    gap = gaps(lm, task.train.demonstrations(seed=0))
    left = rows_of(fitted(InContextVector(rank=1), lm, task)) - gap.mean(0)[1:]
    centred = gap - gap.mean(0)  # the component is a mix of the centred rows, with the same weights in every layer
    mixes = [torch.linalg.lstsq(centred[:, layer + 1].T, left[layer][:, None]).solution for layer in range(lm.n_layers)]
    for layer, mix in enumerate(mixes):
        torch.testing.assert_close(centred[:, layer + 1].T @ mix, left[layer][:, None], atol=1e-4, rtol=0)
        shift = mix - mixes[0]  # centred rows add up to zero: weights are known up to a constant
        torch.testing.assert_close(shift - shift.mean(), torch.zeros_like(shift), atol=1e-4, rtol=0)


# --- the edit in the model --------------------------------------------------------------------------------------------


@both_families
def test_every_tokens_mlp_output_is_steered(family: str) -> None:
    lm, task = exact_lm(family), open_task()
    vector = fitted(InContextVector(strength=0.3), lm, task)
    change = {layer: steer(row, 0.3) for layer, row in enumerate(rows_of(vector))}
    with torch.no_grad():
        rows = [run_mlp(lm.model, ids(prompt(e.input)), change)[-1] for e in task.dev.examples]
    expected = torch.stack(rows).float()
    assert (observe(lm, task.dev).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(observe(lm, task.dev, vector).logits, expected, atol=1e-4, rtol=0)


def test_generated_tokens_are_steered_too() -> None:
    lm, task = exact_lm("llama"), open_task()
    vector = fitted(InContextVector(strength=0.3), lm, task)
    change = {layer: steer(row, 0.3) for layer, row in enumerate(rows_of(vector))}
    queries = [prompt(example.input) for example in task.dev.examples[:3]]
    expected = []
    for query in queries:
        tokens = ids(query)
        with torch.no_grad():
            for _ in range(5):
                tokens.append(int(run_mlp(lm.model, tokens, change)[-1].argmax()))
        expected.append(lm.before_end(tokens[-5:]))
    with inject(lm, vector):
        assert lm.generate_ids(queries, max_new_tokens=5) == expected


def test_the_residual_stream_as_the_paper_says() -> None:
    lm, task = exact_lm("llama"), open_task()
    vector = fitted(InContextVector(site="resid"), lm, task)
    assert vector.sites == tuple(Site("resid", layer) for layer in range(3))
    change = {layer: steer(row, 0.1) for layer, row in enumerate(rows_of(vector))}
    with torch.no_grad():
        rows = [run(lm.model, ids(prompt(e.input)), change).logits[-1] for e in task.dev.examples]
    torch.testing.assert_close(observe(lm, task.dev, vector).logits, torch.stack(rows).float(), atol=1e-4, rtol=0)


def test_the_strength_is_the_best_of_five_on_dev() -> None:
    lm, task = exact_lm("llama"), label_task()
    vector = fitted(InContextVector(strength=None, n_dev=8), lm, task, seed=2)
    rows, grid = rows_of(vector), (0.05, 0.1, 0.2, 0.4, 0.8)

    def changed(place: int, tokens: list[int], at: int) -> Tensor:
        return run_mlp(lm.model, tokens, {layer: steer(row, grid[place]) for layer, row in enumerate(rows)})

    found = best_of(lm.model, task.dev, 8, changed, len(grid))
    assert len(set(found)) == len(grid)
    best = grid[max(range(len(grid)), key=lambda place: found[place])]
    assert {edit.op.numbers()["steer"] for edit in vector.edits} == {best}
    assert vector.origin is not None
    assert vector.origin.found["strength"] == best
    assert vector.origin.cost.labels == 3 + 8


def test_a_set_strength_reads_no_dev() -> None:
    lm, task = exact_lm("llama"), open_task()
    vector = fitted(InContextVector(strength=0.2), lm, task)
    assert vector.origin is not None
    assert (vector.origin.cost.labels, vector.origin.cost.queries) == (3, 0)
    assert vector.origin.found == {"strength": 0.2}


def test_the_steer_number_survives_saving(tmp_path: Any) -> None:
    lm, task = exact_lm("llama"), open_task()
    vector = fitted(InContextVector(strength=0.12), lm, task)
    vector.save_pretrained(tmp_path / "v")
    loaded = TaskVector.from_pretrained(tmp_path / "v")
    assert [edit.op.numbers() for edit in loaded.edits] == [{"steer": 0.12}] * 3
    assert all(torch.equal(a, b) for a, b in zip(vector.tensors().values(), loaded.tensors().values(), strict=True))
    assert torch.equal(observe(lm, task.dev, loaded).logits, observe(lm, task.dev, vector).logits)
    row = score(lm, task.dev, loaded).rows[0]
    assert (row.method, row.n) == ("icv", len(task.dev))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 4, -1])
def test_a_rank_the_demonstrations_cannot_fill_is_refused(rank: int) -> None:
    """Three demonstrations, centred, have two directions."""
    with pytest.raises(InputError, match=rf"a rank from 0 to 2 .*icv\.rank = {rank}"):
        fitted(InContextVector(rank=rank), exact_lm("llama"), open_task())


@pytest.mark.parametrize("strength", [0.0, -0.1, float("nan")])
def test_a_strength_that_is_not_above_zero_is_refused(strength: float) -> None:
    with pytest.raises(InputError, match=r"icv\.strength"):
        fitted(InContextVector(strength=strength), exact_lm("llama"), open_task())


def test_dev_items_below_one_are_refused() -> None:
    with pytest.raises(InputError, match=r"icv\.n_dev of at least 1"):
        fitted(InContextVector(n_dev=0), exact_lm("llama"), open_task())
