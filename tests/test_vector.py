"""Ops against loops, strengths, dtypes, gradients; places; task vectors as plain data."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskvec.errors import InputError, VectorMismatch
from taskvec.sites import Site
from taskvec.vector import (
    LAST_PROMPT,
    OPS,
    Add,
    AddKeepNorm,
    Affine,
    Blend,
    Edit,
    Op,
    Replace,
    TaskVector,
    Where,
)

WIDTH, RANK = 6, 2


def _noise(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def _ops(dtype: torch.dtype = torch.float32, grad: bool = False) -> dict[str, Op]:
    def part(*shape: int, seed: int) -> Tensor:
        return _noise(*shape, seed=seed, dtype=dtype).requires_grad_(grad)

    return {
        "add": Add(part(WIDTH, seed=1)),
        "replace": Replace(part(WIDTH, seed=2)),
        "blend": Blend(part(WIDTH, seed=3), keep=0.75, weight=-1.5),
        "affine": Affine(part(RANK, WIDTH, seed=4), part(RANK, WIDTH, seed=5), part(WIDTH, seed=6)),
        "affine-no-bias": Affine(part(RANK, WIDTH, seed=4), part(RANK, WIDTH, seed=5)),
        "add-keep-norm": AddKeepNorm(part(WIDTH, seed=7)),
    }


def _row(op: Op, row: list[float]) -> list[float]:
    """op(h) for one token, in loops over Python floats (float64)."""
    parts = {name: tensor.detach().double().tolist() for name, tensor in op.tensors().items()}
    width = range(len(row))
    if isinstance(op, Add):
        return [row[i] + parts["vector"][i] for i in width]
    if isinstance(op, Replace):
        return [float(x) for x in parts["vector"]]
    if isinstance(op, Blend):
        return [op.keep * row[i] + op.weight * parts["vector"][i] for i in width]
    if isinstance(op, Affine):
        out = list(row)
        for r in range(len(parts["read"])):
            seen = sum(parts["read"][r][j] * row[j] for j in width)
            for i in width:
                out[i] += seen * parts["write"][r][i]
        bias = parts.get("bias", [0.0] * len(row))
        return [out[i] + bias[i] for i in width]
    assert isinstance(op, AddKeepNorm)
    moved = [row[i] + parts["vector"][i] for i in width]
    ratio = sum(x * x for x in row) ** 0.5 / sum(x * x for x in moved) ** 0.5
    return [ratio * x for x in moved]


def _loops(op: Op, h: Tensor, strength: float = 1.0) -> Tensor:
    """h + strength (op(h) - h), token by token, in float64."""
    rows = [[float(x) for x in row] for row in h.double().tolist()]
    edited = [_row(op, row) for row in rows]
    pairs = zip(rows, edited, strict=True)
    return torch.tensor(
        [[x + strength * (y - x) for x, y in zip(row, new, strict=True)] for row, new in pairs], dtype=torch.float64
    )


names = pytest.mark.parametrize("name", list(_ops()))
strengths = pytest.mark.parametrize("strength", [1.0, 0.5, -1.0, 2.0, 1e-3])


@names
@strengths
def test_an_op_with_a_strength_is_what_the_loops_say(name: str, strength: float) -> None:
    op, h = _ops()[name], _noise(4, WIDTH, seed=9)
    torch.testing.assert_close(op(h, strength).double(), _loops(op, h, strength), rtol=1e-5, atol=1e-5)


@names
def test_strength_zero_gives_back_the_very_same_tensor(name: str) -> None:
    h = _noise(3, WIDTH)
    assert _ops()[name](h, 0.0) is h


@names
def test_strength_one_is_the_plain_op_bit_for_bit(name: str) -> None:
    op, h = _ops()[name], _noise(3, WIDTH, scale=1e6)
    assert torch.equal(op(h), op.apply(h))
    assert torch.equal(op(h, 1.0), op.apply(h))


def test_replacing_at_strength_one_leaves_no_trace_of_large_activations() -> None:
    op, h = _ops()["replace"], _noise(3, WIDTH, scale=1e9)
    assert torch.equal(op(h), op.tensors()["vector"].expand(3, WIDTH))


@names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_the_activations_dtype_is_kept(name: str, dtype: torch.dtype, strength: float) -> None:
    h = _noise(3, WIDTH, dtype=dtype)
    out = _ops()[name](h, strength)
    assert (out.dtype, out.shape) == (dtype, h.shape)


@names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_half_precision_is_computed_in_float32_and_rounded_once(name: str, dtype: torch.dtype, strength: float) -> None:
    op, h = _ops()[name], _noise(64, WIDTH, dtype=dtype)
    assert torch.equal(op(h, strength), op(h.float(), strength).to(dtype))


@pytest.mark.parametrize("name", ["blend", "affine", "add-keep-norm"])
def test_half_precision_arithmetic_would_have_been_noticed(name: str) -> None:
    op, half = _ops(torch.bfloat16)[name], _noise(64, WIDTH, dtype=torch.bfloat16)
    assert not torch.equal(op.apply(half), op(half))


@names
def test_float64_is_computed_in_float64(name: str) -> None:
    op, h = _ops(torch.float64)[name], _noise(4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(op(h, 0.7), _loops(op, h, 0.7), rtol=1e-14, atol=1e-14)


@names
@strengths
def test_nothing_is_written_in_place(name: str, strength: float) -> None:
    op, h = _ops()[name], _noise(3, WIDTH)
    before, parts = h.clone(), {key: tensor.clone() for key, tensor in op.tensors().items()}
    op(h, strength)
    assert torch.equal(h, before)
    assert all(torch.equal(tensor, parts[key]) for key, tensor in op.tensors().items())
    assert h._version == 0


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_tensor_of_the_op_and_the_activation(name: str, dtype: torch.dtype) -> None:
    op, h = _ops(grad=True)[name], _noise(3, WIDTH, dtype=dtype).requires_grad_(True)
    loss = (op(h, 0.5).float() * _noise(3, WIDTH, seed=8)).sum()
    for grad in torch.autograd.grad(loss, [h, *op.tensors().values()]):
        assert bool(grad.isfinite().all())
        assert float(grad.abs().sum()) > 0


@names
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    op, h = _ops(torch.float64, grad=True)[name], _noise(2, WIDTH, dtype=torch.float64).requires_grad_(True)
    kind, numbers = type(op), op.numbers()

    def edited(h: Tensor, *parts: Tensor) -> Tensor:
        return kind(**dict(zip(op.tensors(), parts, strict=True)), **numbers)(h, 0.7)

    assert torch.autograd.gradcheck(edited, (h, *op.tensors().values()))


def test_replacing_fully_cuts_the_gradient_to_the_activation() -> None:
    op, h = _ops(grad=True)["replace"], _noise(2, WIDTH).requires_grad_(True)
    to_h, to_vector = torch.autograd.grad(op(h).sum(), [h, op.tensors()["vector"]], allow_unused=True)
    assert to_h is None or not bool(to_h.any())
    assert torch.equal(to_vector, torch.full((WIDTH,), 2.0))


@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans())
@settings(deadline=None, max_examples=30)
def test_low_rank_affine_is_the_full_matrix(seed: int, rank: int, with_bias: bool) -> None:
    read, write = _noise(rank, WIDTH, seed=seed), _noise(rank, WIDTH, seed=seed + 1)
    bias = _noise(WIDTH, seed=seed + 2) if with_bias else None
    h = _noise(3, WIDTH, seed=seed + 3)
    full = torch.eye(WIDTH) + sum((torch.outer(read[r], write[r]) for r in range(rank)), torch.zeros(WIDTH, WIDTH))
    expected = h @ full + (0.0 if bias is None else bias)
    torch.testing.assert_close(Affine(read, write, bias)(h), expected, rtol=1e-4, atol=1e-4)


rows = st.lists(st.floats(-1e4, 1e4, width=32), min_size=WIDTH, max_size=WIDTH)


@given(st.lists(rows, min_size=1, max_size=3), rows)
@settings(deadline=None, max_examples=80)
def test_add_keep_norm_keeps_each_norm_and_takes_the_sums_direction(h: list[list[float]], v: list[float]) -> None:
    states, vector = torch.tensor(h), torch.tensor(v)
    out, moved = AddKeepNorm(vector)(states), states + vector
    assert bool(out.isfinite().all())
    for row, new, sum_ in zip(states, out, moved, strict=True):
        if float(sum_.norm()) < 1e-12:
            continue
        torch.testing.assert_close(new.norm(), row.norm(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            new * sum_.norm(), sum_ * row.norm(), rtol=1e-3, atol=1e-3 * float(row.norm()) + 1e-9
        )


@pytest.mark.parametrize("size", [0.0, 1.0, 3.0, 10.0, 1e4, 1e10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_add_keep_norm_keeps_a_zero_sum_at_zero_whatever_its_size(size: float, dtype: torch.dtype) -> None:
    h = torch.full((2, WIDTH), size, dtype=dtype)
    assert torch.equal(AddKeepNorm(-h[0])(h), torch.zeros(2, WIDTH, dtype=dtype))


def test_add_keep_norm_keeps_a_zero_activation_at_zero() -> None:
    assert torch.equal(AddKeepNorm(_noise(WIDTH))(torch.zeros(2, WIDTH)), torch.zeros(2, WIDTH))


@names
@pytest.mark.parametrize("width", [1, WIDTH - 1, WIDTH + 1])
def test_another_width_is_refused_by_name(name: str, width: int) -> None:
    op = _ops()[name]
    assert op.width == WIDTH
    with pytest.raises(VectorMismatch, match=f"width {WIDTH}; found width {width}"):
        op(_noise(3, width))


def test_the_closed_set_of_ops() -> None:
    expected = {"add": Add, "replace": Replace, "blend": Blend, "affine": Affine, "add-keep-norm": AddKeepNorm}
    assert expected == OPS
    with pytest.raises(TypeError, match="Op has no apply"):
        Op().apply(_noise(1, WIDTH))


def test_parts_are_listed_by_field_name() -> None:
    ops = _ops()
    assert list(ops["affine"].tensors()) == ["read", "write", "bias"]
    assert list(ops["affine-no-bias"].tensors()) == ["read", "write"]
    assert (ops["blend"].numbers(), ops["add"].numbers()) == ({"keep": 0.75, "weight": -1.5}, {})


def test_numbers_given_as_integers_are_listed_too() -> None:
    op = Blend(_noise(WIDTH))
    object.__setattr__(op, "keep", 1)  # past beartype, which only the tests have
    assert op.numbers() == {"keep": 1.0, "weight": 0.5}


# --- where -----------------------------------------------------------------------------------------------------------

# plain values: beartype draws random numbers when it checks a tuple, which Hypothesis forbids inside a strategy
wheres = st.one_of(
    st.tuples(st.sampled_from(["last_prompt", "each_last", "all"])),
    st.tuples(st.just("role"), st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)),
    st.tuples(st.just("at"), st.just(""), st.lists(st.integers(-(10**4), 10**4), min_size=1, max_size=4).map(tuple)),
)


@given(wheres)
@settings(deadline=None, max_examples=80)
def test_every_place_is_read_back_from_its_name(parts: tuple[Any, ...]) -> None:
    where = Where(*parts)
    assert Where.parse(str(where)) == where
    assert Where.parse(where) is where


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("last_prompt", Where()),
        ("each_last", Where("each_last")),
        ("all", Where("all")),
        (" role( separator ) ", Where("role", role="separator")),
        ("at(0)", Where("at", positions=(0,))),
        ("at( -2, 3 )", Where("at", positions=(-2, 3))),
    ],
)
def test_places_are_written_as_documented(text: str, where: Where) -> None:
    assert Where.parse(text) == where
    assert str(where) == text.replace(" ", "")


@pytest.mark.parametrize(
    "text",
    [
        *("", "last", "lastprompt", "every", "role", "role()", "role(a,b)", "at", "at()", "at(1,)", "at(x)", "at(1.5)"),
        *("at(--1)", "all()", "All", "role(a)b", "at(1)at(2)", "last_prompt\n", "role(a-b)"),
    ],
)
def test_an_unknown_place_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="wanted last_prompt, each_last, all, role"):
        Where.parse(text)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Where("at"),
        lambda: Where("role"),
        lambda: Where("role", role="two words"),
        lambda: Where("role", role="a)"),
        lambda: Where("last_prompt", role="separator"),
        lambda: Where("all", positions=(1,)),
    ],
)
def test_a_place_without_a_name_cannot_be_built(build: Callable[[], Where]) -> None:
    with pytest.raises(InputError):
        build()


def test_only_each_last_and_all_act_after_the_prompt() -> None:
    texts = ["last_prompt", "each_last", "all", "role(a)", "at(-1)"]
    assert [text for text in texts if Where.parse(text).every_step] == ["each_last", "all"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("last_prompt", (4,)),
        ("each_last", (4,)),
        ("all", (0, 1, 2, 3, 4)),
        ("role(input)", (1, 3)),
        ("role(nothing)", ()),
        ("at(0,2)", (0, 2)),
        ("at(-1,-5)", (4, 0)),
        ("at(5,-6,100)", ()),
        ("at(4,5)", (4,)),
    ],
)
def test_places_name_the_prompts_tokens(text: str, tokens: tuple[int, ...]) -> None:
    assert Where.parse(text).tokens(5, {"input": (1, 3), "other": (0,)}) == tokens


@given(st.integers(1, 30), st.lists(st.integers(-40, 40), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_positions_mean_what_list_indices_mean(length: int, positions: list[int]) -> None:
    prompt = list(range(length))
    expected: list[int] = []
    for position in positions:
        try:
            expected.append(prompt[position])
        except IndexError:
            continue
    assert list(Where("at", positions=tuple(positions)).tokens(length, {})) == expected


# --- task vectors ----------------------------------------------------------------------------------------------------


def _vector() -> TaskVector:
    ops = _ops()
    edits = (
        Edit(Site("resid", 3), ops["add"]),
        Edit(Site("attn", 1), ops["affine"], Where("all"), 0.5),
        Edit(Site("resid", 3), ops["blend"], Where("each_last"), -2.0),
    )
    return TaskVector(edits, source="somewhere")


def test_an_edit_is_at_the_last_prompt_token_with_strength_one_unless_said_otherwise() -> None:
    edit = _vector().edits[0]
    assert (edit.where, edit.strength, LAST_PROMPT) == (Where("last_prompt"), 1.0, Where("last_prompt"))


def test_scaled_multiplies_strengths_and_leaves_the_rest() -> None:
    vector = _vector()
    scaled = vector.scaled(-0.5)
    assert [edit.strength for edit in scaled.edits] == [-0.5, -0.25, 1.0]
    assert [edit.strength for edit in vector.edits] == [1.0, 0.5, -2.0]
    assert [(e.site, e.op, e.where) for e in scaled.edits] == [(e.site, e.op, e.where) for e in vector.edits]
    assert (scaled.source, scaled.origin) == ("somewhere", None)


def test_tensors_are_named_by_edit_and_field() -> None:
    vector = _vector()
    tensors = vector.tensors()
    assert list(tensors) == ["0.vector", "1.read", "1.write", "1.bias", "2.vector"]
    op: Any = vector.edits[1].op
    assert tensors["1.write"] is op.write


def test_sites_are_listed_once_in_the_order_of_the_edits() -> None:
    assert _vector().sites == (Site("resid", 3), Site("attn", 1))
    assert TaskVector(()).sites == ()


@pytest.mark.parametrize("thing", [Where(), _vector(), _vector().edits[0], _ops()["blend"]])
def test_vectors_and_their_parts_cannot_be_changed(thing: Any) -> None:
    field = next(iter(vars(thing)))
    with pytest.raises(AttributeError):
        setattr(thing, field, None)
