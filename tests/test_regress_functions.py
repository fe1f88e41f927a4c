"""What learners learn, and what they are measured by, against plain loops of the tests' own: function classes and
inputs, settings, classical estimators, distances of states, task fidelity, numbers as text."""

import inspect
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from taskvec.errors import InputError, UnknownName
from taskvec.prompts import Example
from taskvec.regress.alignment import PERMUTATIONS, Alignment, alignment, bures, two_sample
from taskvec.regress.config import LearnerConfig, builtin_configs, checked, load_config
from taskvec.regress.fidelity import fidelity
from taskvec.regress.functions import KINDS, FunctionClass, Inputs, Kind, draw_inputs
from taskvec.regress.reference import averaging, estimated, estimators, references, zero
from taskvec.regress.text import TextSizes, number, text_task

COUNT, N, D = 5, 7, 4
each_kind = pytest.mark.parametrize("kind", KINDS)
PLAIN: dict[str, Any] = {
    **{"name": "mini", "function": "linear", "d": 2, "points": 3, "positions": 5},
    **{"layers": 2, "heads": 2, "width": 16, "steps": 10},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def small(kind: Kind) -> FunctionClass:
    return FunctionClass(kind, D, sparsity=2, hidden=6, depth=3)


# --- the classes of functions ----------------------------------------------------------------------------------------


def dot(w: Sequence[float], x: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(w, x, strict=True))


def linear_by_hand(family: FunctionClass, x: list[Any], drawn: torch.Generator) -> list[Any]:
    w = torch.randn(COUNT, family.d, generator=drawn).tolist()
    moved = [[family.mean + family.spread * one for one in row] for row in w]
    return [[dot(moved[f], point) for point in x[f]] for f in range(COUNT)]


def sparse_by_hand(family: FunctionClass, x: list[Any], drawn: torch.Generator) -> list[Any]:
    w = torch.randn(COUNT, family.d, generator=drawn).tolist()
    order = torch.rand(COUNT, family.d, generator=drawn).argsort(1).tolist()
    kept = [[w[f][i] if order[f][i] < family.sparsity else 0.0 for i in range(family.d)] for f in range(COUNT)]
    return [[dot(kept[f], point) for point in x[f]] for f in range(COUNT)]


def relu_by_hand(family: FunctionClass, x: list[Any], drawn: torch.Generator) -> list[Any]:
    inner = torch.randn(COUNT, family.d, family.hidden, generator=drawn).tolist()
    outer = torch.randn(COUNT, family.hidden, 1, generator=drawn).tolist()

    def value(f: int, point: Sequence[float]) -> float:
        units = [max(0.0, dot([row[u] for row in inner[f]], point)) for u in range(family.hidden)]
        return math.sqrt(2 / family.hidden) * dot([a for (a,) in outer[f]], units)

    return [[value(f, point) for point in x[f]] for f in range(COUNT)]


def tree_by_hand(family: FunctionClass, x: list[Any], drawn: torch.Generator) -> list[Any]:
    """Level by level: the nodes of a level stand behind those of the levels above, from left to right."""
    asked = torch.randint(family.d, (COUNT, 2**family.depth - 1), generator=drawn).tolist()
    leaves = torch.randn(COUNT, 2**family.depth, generator=drawn).tolist()

    def value(f: int, point: Sequence[float]) -> float:
        levels = [asked[f][2**level - 1 : 2 ** (level + 1) - 1] for level in range(family.depth)]
        turns = ""
        for level in levels:
            turns += "1" if point[level[int(turns or "0", 2)]] > 0 else "0"
        found: float = leaves[f][int(turns, 2)]
        return found

    return [[value(f, point) for point in x[f]] for f in range(COUNT)]


BY_HAND: dict[Kind, Callable[[FunctionClass, list[Any], torch.Generator], list[Any]]] = {
    "linear": linear_by_hand,
    "sparse-linear": sparse_by_hand,
    "relu": relu_by_hand,
    "tree": tree_by_hand,
}


@each_kind
@pytest.mark.parametrize("seed", [0, 1])
def test_functions_are_those_of_the_formula(kind: Kind, seed: int) -> None:
    x = normal(COUNT, N, D)
    expected = torch.tensor(BY_HAND[kind](small(kind), x.tolist(), generator(seed)))
    found = small(kind).draw(COUNT, generator(seed))(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_linear_weights_take_the_classs_mean_and_spread() -> None:
    family = FunctionClass("linear", D, mean=-0.75, spread=1.25)
    w = family.draw(4000, generator())(torch.eye(D).expand(4000, D, D))
    assert float(w.mean()) == pytest.approx(-0.75, abs=0.05)
    assert float(w.std()) == pytest.approx(1.25, abs=0.05)


def test_a_sparse_function_has_so_many_weights_and_all_coordinates_take_part() -> None:
    family = FunctionClass("sparse-linear", 5, sparsity=2)
    w = family.draw(3000, generator())(torch.eye(5).expand(3000, 5, 5))
    assert set((w != 0).sum(1).tolist()) == {2}
    assert ((w != 0).float().mean(0) - 2 / 5).abs().max() < 0.05  # five standard errors


def test_a_sparse_function_of_few_numbers_keeps_them_all() -> None:
    w = FunctionClass("sparse-linear", 2, sparsity=3).draw(50, generator())(torch.eye(2).expand(50, 2, 2))
    assert bool((w != 0).all())


def test_a_tree_asks_for_signs_alone() -> None:
    x = normal(COUNT, N, D)
    tree = small("tree").draw(COUNT, generator())
    assert torch.equal(tree(x), tree(x.sign()))
    assert len(set(tree(normal(COUNT, 400, D))[0].tolist())) > 1


def test_a_trees_zero_is_not_positive() -> None:
    tree = small("tree").draw(COUNT, generator())
    assert torch.equal(tree(torch.zeros(COUNT, 1, D)), tree(-torch.ones(COUNT, 1, D)))


@pytest.mark.parametrize(
    "family",
    [
        FunctionClass("linear", 3),
        FunctionClass("linear", 3, mean=-0.75, spread=1.25),
        FunctionClass("sparse-linear", 5, sparsity=2),
        FunctionClass("sparse-linear", 5, sparsity=2, mean=1.0, spread=0.5),
        FunctionClass("sparse-linear", 2, sparsity=3),
        FunctionClass("relu", 3, hidden=7),
        FunctionClass("relu", 3, hidden=40, mean=2.0),
        FunctionClass("tree", 3, depth=2),
    ],
    ids=str,
)
def test_the_variance_is_the_error_of_predicting_zero(family: FunctionClass) -> None:
    drawn = generator(2)
    y = family.draw(20_000, drawn)(torch.randn(20_000, 4, family.d, generator=drawn))
    assert family.variance == pytest.approx(float(y.square().mean()), rel=0.07)


@each_kind
def test_a_function_depends_on_its_own_points_alone(kind: Kind) -> None:
    functions, x = small(kind).draw(COUNT, generator()), normal(COUNT, N, D)
    other = torch.cat([x[:1], normal(COUNT - 1, N, D, seed=9)])
    assert torch.equal(functions(x)[0], functions(other)[0])
    assert not torch.equal(functions(x)[1:], functions(other)[1:])


@each_kind
def test_a_seed_says_which_functions(kind: Kind) -> None:
    x = normal(COUNT, N, D)
    one, same, other = (small(kind).draw(COUNT, generator(seed))(x) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "change", [{"d": 0}, {"sparsity": 0}, {"hidden": 0}, {"depth": 0}, {"spread": 0.0}, {"spread": float("nan")}]
)
def test_sizes_and_spread_are_positive(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        FunctionClass(**{"kind": "linear", "d": 2, **change})


def test_an_unknown_class_names_the_known_ones() -> None:
    made = FunctionClass("linear", 2)
    object.__setattr__(made, "kind", "cubic")  # past beartype, which only the tests have
    with pytest.raises(InputError, match=r"linear, sparse-linear, relu, tree; found 'cubic'"):
        made.__post_init__()


# --- the inputs ------------------------------------------------------------------------------------------------------


def covariance(x: Tensor) -> Tensor:
    return x.T @ x / len(x)  # around 0, where all inputs have their mean


def test_standard_inputs_are_normal() -> None:
    x = draw_inputs((1, 20_000, 3), generator())[0]
    torch.testing.assert_close(covariance(x), torch.eye(3), atol=0.05, rtol=0)
    assert x.mean(0).abs().max() < 0.04


def test_scaled_inputs_are_the_same_points_twice_as_far() -> None:
    assert torch.equal(draw_inputs((2, 3, D), generator(), "scaled"), 2 * draw_inputs((2, 3, D), generator()))


def test_skewed_inputs_have_eigenvalues_like_one_over_i_and_trace_d() -> None:
    expected = torch.tensor([1.0, 1 / 2, 1 / 3, 1 / 4]) * 4 / (1 + 1 / 2 + 1 / 3 + 1 / 4)
    for x in draw_inputs((3, 20_000, 4), generator(), "skewed"):
        found = torch.linalg.eigvalsh(covariance(x)).flip(0)
        torch.testing.assert_close(found, expected, atol=0, rtol=0.06)
        assert float(covariance(x).trace()) == pytest.approx(4, rel=0.03)


def test_skewed_inputs_lie_otherwise_for_each_function() -> None:
    tops = [
        torch.linalg.eigh(covariance(x)).eigenvectors[:, -1] for x in draw_inputs((2, 5000, 4), generator(), "skewed")
    ]
    assert abs(float(tops[0] @ tops[1])) < 0.95
    assert max(float(top.abs().max()) for top in tops) < 0.99  # along no coordinate


@pytest.mark.parametrize("d", [2, 3, 5])
def test_an_orthogonal_query_is_square_root_d_long_and_orthogonal_to_all_examples(d: int) -> None:
    x = draw_inputs((6, 9, d), generator(), "orthogonal")
    for examples, query in zip(x[:, :-1], x[:, -1], strict=True):
        assert (examples @ query).abs().max() < 1e-4
        assert float(query.norm()) == pytest.approx(math.sqrt(d), rel=1e-5)
        assert int(torch.linalg.matrix_rank(examples, tol=1e-4)) == d - 1


def test_orthogonal_examples_are_as_large_as_standard_ones_in_every_direction_they_have() -> None:
    x = draw_inputs((1, 20_001, 3), generator(), "orthogonal")[0, :-1]
    torch.testing.assert_close(torch.linalg.eigvalsh(covariance(x)), torch.tensor([0, 1.5, 1.5]), atol=0.06, rtol=0)


def test_orthogonal_queries_point_both_ways() -> None:
    # the basis alone would do no harm: with its sign fixed, half of all queries must still be turned around
    x = draw_inputs((400, 1, 2), generator(), "orthogonal")[:, 0]
    assert float((x[:, 0] > 0).float().mean()) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("inputs", ["standard", "skewed", "scaled", "orthogonal"])
def test_a_seed_says_which_inputs(inputs: Inputs) -> None:
    one, same, other = (draw_inputs((2, 3, D), generator(seed), inputs) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_orthogonal_inputs_need_two_dimensions() -> None:
    with pytest.raises(InputError, match="two dimensions"):
        draw_inputs((1, 3, 1), generator(), "orthogonal")


def test_unknown_inputs_name_the_known_ones() -> None:
    plain = inspect.unwrap(draw_inputs)  # past beartype, which only the tests have
    with pytest.raises(InputError, match="standard, skewed, scaled, orthogonal; found 'odd'"):
        plain((1, 3, 2), generator(), "odd")


# --- settings --------------------------------------------------------------------------------------------------------


def config(**changes: Any) -> LearnerConfig:
    return checked(PLAIN | changes, "here")


def test_a_bad_key_is_told_with_the_nearest_one() -> None:
    with pytest.raises(UnknownName, match=r"in here; found 'layer'; did you mean layers\?"):
        config(layer=3)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match="found width: Field required"):
        checked({key: value for key, value in PLAIN.items() if key != "width"}, "here")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"points": 1}, "points: "),
        ({"d": 0}, "d: "),
        ({"layers": 1.5}, "layers: "),
        ({"name": ""}, "name: "),
        ({"lr": 0}, "lr: "),
        ({"lr": float("inf")}, "lr: "),
        ({"clip": -1}, "clip: "),
        ({"decay": 1.1}, "decay: "),
        ({"warmup": -1}, "warmup: "),
        ({"check": 0}, "check: "),
        ({"function": "cubic"}, "function: "),
        ({"curriculum": {"every": -1}}, "curriculum.every: "),
        ({"curriculum": {"d_by": 0}}, "curriculum.d_by: "),
    ],
)
def test_wrong_values_are_refused_by_name(change: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"configuration in here; found {found}")):
        config(**change)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"heads": 3}, "width 16 is no multiple of 3 heads"),
        ({"positions": 2}, "positions 2 are fewer than the 3 points"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(change: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=found):
        config(**change)


def test_exactly_as_many_positions_as_points_will_do() -> None:
    assert config(positions=3).positions == 3


@pytest.mark.parametrize("plain", [None, [1, 2], "text"])
def test_a_configuration_is_keys_and_values(plain: Any) -> None:
    with pytest.raises(InputError, match="write keys and values"):
        checked(plain, "here")


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config().width = 32


def test_a_configurations_functions_are_of_its_shape() -> None:
    made = config(function="sparse-linear", d=5, sparsity=2, hidden=9, depth=3)
    assert made.family == FunctionClass("sparse-linear", 5, 2, 9, 3)


PLAN = {"every": 10, "d": 2, "points": 3, "d_by": 2, "points_by": 4}


@pytest.mark.parametrize(
    ("step", "stage"),
    [(0, (2, 3)), (9, (2, 3)), (10, (4, 7)), (19, (4, 7)), (20, (5, 11)), (30, (5, 12)), (10**6, (5, 12))],
)
def test_dimensions_and_points_grow_until_they_are_whole(step: int, stage: tuple[int, int]) -> None:
    assert config(d=5, points=12, positions=12, curriculum=PLAN).stage(step) == stage


def test_without_a_curriculum_all_steps_are_whole() -> None:
    assert {config().stage(step) for step in (0, 1, 9)} == {(2, 3)}


def test_the_rate_rises_stays_and_falls() -> None:
    made = config(lr=2.0, warmup=3, decay=0.5)
    expected = [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4]
    assert [made.rate(step) for step in range(10)] == pytest.approx(expected)


def test_without_warmup_and_decay_the_rate_is_constant() -> None:
    assert {config(lr=0.5).rate(step) for step in range(10)} == {0.5}


def test_where_warmup_and_decay_meet_the_lower_rate_counts() -> None:
    made = config(steps=4, warmup=3, decay=1.0, lr=1.0)
    assert [made.rate(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.5, 0.25])


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 80), st.floats(0, 1))
def test_a_rate_is_never_zero_nor_above_lr(steps: int, warmup: int, decay: float) -> None:
    made = config(steps=steps, warmup=warmup, decay=decay, lr=0.1)
    assert all(0 < made.rate(step) <= 0.1 for step in range(steps))


@pytest.mark.parametrize("name", sorted(builtin_configs()))
def test_built_in_configurations_load_under_their_own_name(name: str) -> None:
    made = load_config(name)
    assert made.name == name
    assert made.stage(made.steps - 1) == (made.d, made.points)  # every curriculum ends


@pytest.mark.parametrize(
    ("name", "points", "positions", "first", "grown", "variance"),
    [
        ("published-linear", 41, 101, 11, 13, 20),
        ("published-sparse-linear", 41, 101, 11, 13, 3),
        ("published-relu", 101, 201, 26, 31, 20),
        ("published-tree", 101, 201, 26, 31, 1),
    ],
)
def test_published_settings_are_those_of_the_page(
    name: str, points: int, positions: int, first: int, grown: int, variance: float
) -> None:
    made = load_config(name)
    assert (made.layers, made.heads, made.width, made.d) == (12, 8, 256, 20)
    assert (made.steps, made.batch, made.points, made.positions) == (500_001, 64, points, positions)
    assert {made.rate(step) for step in (0, 1, 250_000, 500_000)} == {1e-4}
    assert made.clip >= 1e6  # the publication clips nothing
    assert [made.stage(step) for step in (0, 1999, 2000)] == [(5, first), (5, first), (6, grown)]
    assert made.stage(29_999)[0] == 19
    assert made.stage(30_000) == (20, points)  # "ends at 30k"
    assert made.family.variance == variance


def test_the_published_trees_and_networks_have_the_pages_shape() -> None:
    assert load_config("published-tree").family.depth == 4
    assert load_config("published-relu").family.hidden == 100


def test_the_small_learner_is_the_pages_recipe() -> None:
    made = load_config("linear-d3")
    assert (made.layers, made.heads, made.width, made.d, made.points, made.batch) == (3, 2, 64, 3, 11, 64)
    assert (made.lr, made.warmup, made.clip, made.decay) == (1e-3, 500, 1.0, 0.3)


def test_a_file_stands_for_its_configuration(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(PLAIN | {"curriculum": PLAN}))
    assert load_config(str(path)) == config(curriculum=PLAN)


@pytest.mark.parametrize("content", [b"name: [", b"\xff\xfe\xfa", b"- 1\n", b""])
def test_a_file_that_is_no_configuration_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"a learner's configuration in {path}")):
        load_config(str(path))


def test_an_unknown_configuration_names_the_nearest_and_all() -> None:
    with pytest.raises(UnknownName, match=r"did you mean linear-d3\? name one of: linear-d3, linear-d5, published-"):
        load_config("linear-d33")


# --- what classical estimators make of it ----------------------------------------------------------------------------


def prompts(k: int, d: int = 3, kind: Kind = "linear", count: int = 6) -> tuple[Tensor, Tensor]:
    """Points (count, k + 1, d) and their values, the query last."""
    x = normal(count, k + 1, d, seed=k)
    return x, FunctionClass(kind, d, sparsity=1).draw(count, generator(3))(x)


def by_prompt(rule: Callable[[Any, Any, Any], float], x: Tensor, y: Tensor) -> Tensor:
    """A rule of (examples, their values, query), prompt by prompt."""
    rows = zip(x.double().numpy(), y.double().numpy(), strict=True)
    return torch.tensor([rule(points[:-1], values[:-1], points[-1]) for points, values in rows])


@pytest.mark.parametrize("k", [3, 4, 9])
@pytest.mark.parametrize("kind", ["linear", "sparse-linear"])
def test_least_squares_is_exact_from_as_many_examples_as_dimensions(k: int, kind: Kind) -> None:
    x, y = prompts(k, 3, kind)
    torch.testing.assert_close(estimated("least squares", x, y), y[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_least_squares_is_numpys_and_the_shortest_where_many_fit(k: int) -> None:
    x, y = prompts(k)
    noisy = y + normal(*y.shape, seed=8)
    expected = by_prompt(lambda a, b, q: float(q @ np.linalg.lstsq(a, b, rcond=None)[0]), x, noisy)
    torch.testing.assert_close(estimated("least squares", x, noisy), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_ridge_solves_its_normal_equations(k: int) -> None:
    x, y = prompts(k)
    expected = by_prompt(lambda a, b, q: float(q @ np.linalg.solve(a.T @ a + 0.1 * np.eye(3), a.T @ b)), x, y)
    torch.testing.assert_close(estimated("ridge", x, y), expected, atol=1e-5, rtol=1e-4)


def test_lasso_of_one_number_shrinks_by_its_strength() -> None:
    x, y = prompts(4, d=1)

    def shrunk(a: Any, b: Any, q: Any) -> float:
        """The minimum of sum (b - a w)^2 / 2n + 0.01 |w|."""
        along = float(a[:, 0] @ b) / len(a)
        w = math.copysign(max(0.0, abs(along) - 0.01), along) / (float(a[:, 0] @ a[:, 0]) / len(a))
        return float(q[0] * w)

    torch.testing.assert_close(estimated("lasso", x, y), by_prompt(shrunk, x, y), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("k", [1, 4])
def test_averaging_weighs_each_point_with_its_value(k: int) -> None:
    x, y = prompts(k)
    expected = []
    for points, values in zip(x.tolist(), y.tolist(), strict=True):
        w = [sum(values[i] * points[i][j] for i in range(k)) / k for j in range(3)]
        expected.append(dot(w, points[k]))
    torch.testing.assert_close(averaging(x, y), torch.tensor(expected))


@pytest.mark.parametrize("k", [3, 6])
def test_three_nearest_is_the_mean_of_the_three_nearest(k: int) -> None:
    x, y = prompts(k)

    def near(a: Any, b: Any, q: Any) -> float:
        order = sorted(range(len(a)), key=lambda i: math.dist(a[i], q))
        return float(sum(b[i] for i in order[:3]) / 3)

    torch.testing.assert_close(estimated("3 nearest", x, y), by_prompt(near, x, y))


@pytest.mark.parametrize("name", ["tree", "boosted trees"])
def test_trees_remember_an_example(name: str) -> None:
    x, _ = prompts(4)
    x[:, -1] = x[:, 0]
    y = torch.tensor([5.0, 0.0, 0.0, 0.0, 9.0]).expand(len(x), 5)
    found = estimated(name, x, y)
    if name == "tree":
        torch.testing.assert_close(found, torch.full((len(x),), 5.0))
    assert bool((found > 3).all())  # twenty boosts of a tenth go 88 % of the way from the mean


def test_three_nearest_of_two_is_zero() -> None:
    assert torch.equal(estimated("3 nearest", *prompts(2)), torch.zeros(6))


def test_all_yardsticks_are_zero_without_examples() -> None:
    found = references(*prompts(0))
    assert set(found) == {"zero", "averaging", *estimators()}
    assert all(torch.equal(one, torch.zeros(6)) for one in found.values())


def test_one_example_moves_all_but_zero_and_three_nearest() -> None:
    moved = {name for name, one in references(*prompts(1)).items() if bool((one != 0).all())}
    assert moved == {"averaging", *estimators()} - {"3 nearest"}
    assert not zero(*prompts(1)).any()


def test_no_yardstick_sees_the_querys_value() -> None:
    x, y = prompts(5, count=3)
    other = torch.cat([y[:, :-1], y[:, -1:] + 100], 1)
    told = references(x, other)
    assert all(torch.equal(found, told[name]) for name, found in references(x, y).items())


# --- are two sets of states one? -------------------------------------------------------------------------------------

CROSS = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
"""Mean 0, covariance diag(2/3, 8/3), root mean square distance from its mean sqrt(10 / 4)."""


@pytest.mark.parametrize(
    ("scale", "shift", "mean", "covariance"),
    [
        ([1.0, 1.0], [3.0, 4.0], 5.0, 0.0),
        ([2.0, 2.0], [0.0, 0.0], 0.0, math.sqrt(2 / 3 + 8 / 3)),
        ([3.0, 0.5], [0.0, 1.0], 1.0, math.sqrt(2**2 * 2 / 3 + 0.5**2 * 8 / 3)),
        ([0.0, 1.0], [0.0, 0.0], 0.0, math.sqrt(2 / 3)),
    ],
)
def test_distances_of_means_and_covariances_are_in_spreads(
    scale: list[float], shift: list[float], mean: float, covariance: float
) -> None:
    found = alignment(CROSS * torch.tensor(scale) + torch.tensor(shift), CROSS, range(4))
    assert found.mean == pytest.approx(mean / math.sqrt(2.5), abs=1e-6)
    assert found.covariance == pytest.approx(covariance / math.sqrt(2.5), abs=1e-6)


def test_the_spread_is_the_references() -> None:
    far = alignment(CROSS * 10 + 1, CROSS, range(4))
    near = alignment(CROSS, CROSS * 10 + 1, range(4))
    assert (far.mean, far.covariance) == pytest.approx((10 * near.mean, 10 * near.covariance))


def test_states_are_aligned_with_themselves() -> None:
    states = normal(20, 5)
    found = alignment(states, states, range(20))
    assert (found.mean, found.covariance, found.mmd) == pytest.approx((0, 0, 0), abs=1e-6)
    assert found.p == 1.0


def test_alignment_does_not_see_how_states_are_turned() -> None:
    a, b = normal(12, 4), normal(12, 4, seed=2) * torch.tensor([1.0, 2, 3, 4])
    turn = torch.linalg.qr(normal(4, 4, seed=3).double()).Q
    one, other = (alignment(a.double() @ t, b.double() @ t, range(12)) for t in (torch.eye(4).double(), turn))
    assert (one.mean, one.covariance, one.mmd, one.p) == pytest.approx(
        (other.mean, other.covariance, other.mmd, other.p), rel=1e-6
    )


@pytest.mark.parametrize(("one", "two"), [([1.0, 4.0, 9.0], [4.0, 4.0, 1.0]), ([2.0, 0.0], [0.0, 3.0]), ([5.0], [5.0])])
def test_bures_of_diagonals_is_the_distance_of_their_roots(one: list[float], two: list[float]) -> None:
    expected = math.dist([math.sqrt(a) for a in one], [math.sqrt(b) for b in two])
    made = torch.tensor(one).double().diag(), torch.tensor(two).double().diag()
    assert bures(*made) == pytest.approx(expected, abs=1e-7)
    assert bures(*reversed(made)) == pytest.approx(expected, abs=1e-7)


sides = st.lists(st.floats(-3, 3), min_size=4, max_size=4)


@settings(deadline=None)
@given(sides, sides)
def test_bures_of_two_by_two_has_a_closed_form(one: list[float], two: list[float]) -> None:
    """tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), where A and B need not share axes."""
    a, b = (torch.tensor(m).double().reshape(2, 2) for m in (one, two))
    a, b = a @ a.T, b @ b.T
    cross = math.sqrt(max(0.0, float((a @ b).trace() + 2 * (a.det() * b.det()).clamp_min(0).sqrt())))
    expected = float(a.trace() + b.trace()) - 2 * cross
    assert bures(a, b) ** 2 == pytest.approx(expected, abs=1e-5)


def mmd_by_hand(points: list[list[float]], marks: Sequence[float]) -> float:
    """Sum over pairs of marks times a Gaussian kernel whose width is the median squared distance of distinct points."""
    apart = [[math.dist(a, b) ** 2 for b in points] for a in points]
    middle = sorted(one for row in apart for one in row if one > 0)
    width = middle[(len(middle) - 1) // 2]  # the lower one of two, as torch has it
    each = range(len(points))
    return sum(marks[i] * marks[j] * math.exp(-apart[i][j] / width) for i in each for j in each)


def marks_of(n: int) -> NDArray[np.float64]:
    return np.array([1 / n] * n + [-1 / n] * n)


@pytest.mark.parametrize("functions", [[0, 1, 2, 3], [7, 7, 3, 3], [0, 0, 0, 5]])
def test_the_two_sample_test_swaps_whole_functions(functions: list[int]) -> None:
    a, b = normal(4, 2).double(), normal(4, 2, seed=50).double() + 0.5
    points = torch.cat([a, b]).tolist()
    found, p = two_sample(a, b, functions, seed=0)
    true = mmd_by_hand(points, marks_of(4).tolist())
    assert found == pytest.approx(true, rel=1e-9)
    swaps = list(itertools.product((1, -1), repeat=len(set(functions))))
    sides = [dict(zip(sorted(set(functions)), swap, strict=True)) for swap in swaps]
    marks = [[sign * side[f] / 4 for sign in (1, -1) for f in functions] for side in sides]
    exact = sum(mmd_by_hand(points, one) >= true - 1e-12 for one in marks) / len(marks)
    assert p == pytest.approx(exact, abs=4 * math.sqrt(0.25 / PERMUTATIONS) + 0.005)


def test_queries_of_one_function_are_no_evidence_of_their_own() -> None:
    """All of one function: the swap that changes nothing is every swap."""
    a, b = normal(40, 2).double(), normal(40, 2, seed=2).double() + 3
    assert two_sample(a, b, [0] * 40, seed=0)[1] == 1.0
    assert two_sample(a, b, range(40), seed=0)[1] == pytest.approx(1 / (PERMUTATIONS + 1))


def test_p_is_large_for_equal_distributions_and_small_for_others() -> None:
    pairs = [(normal(20, 3, seed=s).double(), normal(20, 3, seed=s + 99).double()) for s in range(30)]
    same = [two_sample(a, b, range(20), seed=s)[1] for s, (a, b) in enumerate(pairs)]
    assert 0.3 < np.mean(same) < 0.7  # uniform, standard error .05
    assert sum(p < 0.05 for p in same) <= 5
    wider = normal(40, 3).double(), 5 * normal(40, 3, seed=2).double()
    assert two_sample(*wider, range(40), seed=0)[1] < 0.02  # equal means


def test_alignments_seed_is_the_tests() -> None:
    a, b = normal(8, 3), normal(8, 3, seed=2)
    found = alignment(a, b, range(8), seed=5)
    assert found == alignment(a, b, range(8), seed=5)
    assert (found.mmd, found.p) == two_sample(a.double(), b.double(), range(8), seed=5)
    assert isinstance(found, Alignment)


# --- is it the task that a vector carries? ---------------------------------------------------------------------------

ZERO, EXAMPLES = [5.0, 3.0, 4.0, 8.0], [1.0, 0.5, 0.0, 0.5]
values = st.lists(st.floats(0, 10), min_size=3, max_size=3)


def score(own: Sequence[float], zero: Sequence[float], shown: Sequence[float]) -> Any:
    return fidelity(torch.tensor(own), torch.tensor(zero), torch.tensor(shown))


def test_fidelity_is_0_where_it_is_as_good_as_0_and_1_where_it_is_as_good_as_examples() -> None:
    none, whole = score(ZERO, ZERO, EXAMPLES), score(EXAMPLES, ZERO, EXAMPLES)
    assert (none.value, none.low, none.high) == (0, 0, 0)
    assert (whole.value, whole.low, whole.high) == (1, 1, 1)


def test_fidelity_is_a_ratio_of_means() -> None:
    # by function the ratios are 1, 1, 0, so their mean would be 2/3
    assert score([0.0, 0.0, 6.0], [1.0, 2.0, 6.0], [0.0, 0.0, 0.0]).value == pytest.approx(3 / 9)


@pytest.mark.parametrize("share", [0.0, 0.27, 0.5, 1.0, -1.0])
def test_a_share_of_the_function_scores_as_the_docs_say(share: float) -> None:
    truth = normal(50, 20)
    zero, own = truth.square().mean(1), ((1 - share) * truth).square().mean(1)
    found = fidelity(own, zero, torch.zeros(50))
    assert found is not None
    assert found.value == pytest.approx(1 - (1 - share) ** 2, rel=1e-5)


def test_no_prediction_without_the_task_gets_above_0() -> None:
    """Noise, a constant, another function's values: each adds its own variance."""
    truth = normal(200, 20)
    for guess in (normal(200, 20, seed=3), torch.full((200, 20), 0.7), truth.roll(1, 0)):
        found = fidelity((guess - truth).square().mean(1), truth.square().mean(1), torch.zeros(200))
        assert found is not None
        assert found.high < 0


def test_fidelity_is_below_0_where_it_is_worse_than_0() -> None:
    assert score([9.0, 5.0], [5.0, 3.0], [1.0, 1.0]).value == pytest.approx(-1)


def test_where_examples_are_not_clearly_better_than_0_there_is_no_fidelity() -> None:
    assert score([0.0] * 3, [0.0] * 3, [5.0] * 3) is None
    assert score([0.0] * 4, [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 3.0]) is None  # better in the mean, not for sure
    assert score([0.0] * 4, [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]) is not None


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_contains_the_value_and_is_no_point(seed: int) -> None:
    own, zero, shown = normal(3, 30, seed=seed).square() * torch.tensor([[1.0], [2.0], [0.2]])
    found = fidelity(own, zero, shown)
    assert found is not None
    assert found.low < found.value < found.high
    assert found == fidelity(own, zero, shown)


def test_the_interval_is_of_functions_kept_together() -> None:
    # in each function 3/4 of the gap is kept: drawn apart, errors would give an interval
    zero, shown = torch.tensor([1.0, 5.0, 9.0, 40.0]), torch.tensor([0.5, 0.2, 1.0, 3.0])
    found = fidelity(zero - 0.75 * (zero - shown), zero, shown)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.75, 0.75, 0.75), rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(values, values, values)
def test_between_examples_and_0_fidelity_is_from_0_to_1(a: Any, b: Any, c: Any) -> None:
    shown, own, zero = zip(*(sorted(one) for one in zip(a, b, c, strict=True)), strict=True)
    found = score(own, zero, shown)
    if found is None:  # no gap to speak of
        return
    assert -1e-6 <= found.low <= found.value + 1e-6 <= found.high + 2e-6 <= 1 + 3e-6


@settings(deadline=None, max_examples=25)
@given(values, values, values, st.floats(0.1, 10))
def test_units_do_not_matter(own: Any, zero: Any, shown: Any, unit: float) -> None:
    a, b, c = ([one * unit for one in part] for part in (own, zero, shown))
    found, other = score(own, zero, shown), score(a, b, c)
    assert found is None or other is None or found.value == pytest.approx(other.value, rel=1e-3, abs=1e-4)


# --- numbers as text -------------------------------------------------------------------------------------------------

finite = st.floats(-1e300, 1e300)
wordy = st.text(st.characters(exclude_categories=["Nd", "Cs"]))
"""Text without digits of any script."""


@settings(deadline=None)
@given(finite, st.sampled_from(["{}", "{:.4f}", "{:+.3e}", "{:G}", "{:.17g}"]))
def test_a_number_is_read_back_however_it_was_written(value: float, format: str) -> None:
    text = format.format(value)
    assert number(text) == float(text)
    assert number(f"y: {text}\n\nx: [") == float(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" 7\n", 7.0),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("+2.50", 2.5),
        ("1e-3", 1e-3),
        ("2E+2", 200.0),
        ("1.5 apples", 1.5),
        ("4e", 4.0),
        ("4.e", 4.0),
        ("5-6", 5.0),
        ("[-1.25, 3]", -1.25),
        ("1.2.3", 1.2),
        ("a - 3", 3.0),
        ("e5", 5.0),
    ],
)
def test_numbers_are_found_where_they_stand(text: str, found: float) -> None:
    assert number(text) == found


@settings(deadline=None)
@given(finite, wordy, finite)
def test_the_first_number_wins(first: float, between: str, second: float) -> None:
    assert number(f"{first:.4f} {between} {second:.4f}") == float(f"{first:.4f}")


@settings(deadline=None)
@given(wordy)
def test_text_without_digits_is_no_number(text: str) -> None:
    assert number(text) is None


@pytest.mark.parametrize("text", ["", "nan", "inf", "-", ".", "-.e", "y:"])
def test_what_only_looks_like_a_number_is_none(text: str) -> None:
    assert number(text) is None


SIZES = TextSizes(shots=4, n_test=12, queries=10)
WRITTEN = re.compile(r"-?\d+\.\d{4}")


def parsed(examples: Sequence[Example]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x = np.array([[float(one) for one in example.input.strip("[]").split(", ")] for example in examples])
    return x, np.array([float(example.output) for example in examples])


def test_numbers_have_four_decimals_in_brackets() -> None:
    for example in text_task(FunctionClass("linear", 3), SIZES, seed=0).examples:
        parts = example.input.removeprefix("[").removesuffix("]").split(", ")
        assert example.input == f"[{', '.join(parts)}]"
        assert len(parts) == 3
        assert all(WRITTEN.fullmatch(part) for part in [*parts, example.output])


def test_a_text_prompt_is_the_papers() -> None:
    task = text_task(FunctionClass("linear", 2), SIZES, seed=0)
    demo, query = task.train.examples[0], task.test.examples[0]
    expected = f"x: {demo.input}\ny: {demo.output}\n\nx: {query.input}\ny:"
    assert task.spec.format.prompt(query.input, [demo]).text == expected
    assert task.spec.format.answer(query.output) == f" {query.output}"


@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_those_of_the_rounded_inputs(seed: int) -> None:
    # weights of 10,000: what rounding the inputs moves (about 1) is a thousand times float32's own error here
    task = text_task(FunctionClass("linear", 3, spread=1e4), SIZES, seed=seed)
    x, y = parsed(task.examples)
    w, *_ = np.linalg.lstsq(x, y, rcond=None)
    assert np.abs(x @ w - y).max() < 0.02


@each_kind
def test_a_text_task_is_one_function_of_the_class(kind: Kind) -> None:
    family = FunctionClass(kind, 3, sparsity=1, hidden=5, depth=1)
    x, y = parsed(text_task(family, SIZES, seed=0).examples)
    assert y.std() > 0
    if kind == "tree":
        assert len(set(y.tolist())) <= 2
    if kind == "sparse-linear":
        w, *_ = np.linalg.lstsq(x, y, rcond=None)
        assert sorted(np.abs(w) > 1e-3) == [False, False, True]
    if kind == "relu":  # f(x) - f(-x) is linear, f(x) is not
        w, *_ = np.linalg.lstsq(x, y, rcond=None)
        assert np.abs(x @ w - y).max() > 1e-3


def test_a_text_task_holds_demonstrations_queries_and_tests() -> None:
    for sizes in (SIZES, TextSizes()):
        task = text_task(FunctionClass("linear", 3), sizes, seed=0)
        assert len(task.test) == sizes.n_test
        assert task.spec.shots == len(demos := task.train.demonstrations(seed=0)) == sizes.shots
        assert len(task.train.queries(demos, sizes.queries, seed=0)) == sizes.queries
        assert len({example.input for example in task.examples}) == len(task.examples)


def test_the_papers_sizes_are_the_default() -> None:
    assert TextSizes().shots == 12


def test_a_text_task_depends_on_its_seed_alone() -> None:
    family = FunctionClass("linear", 2)
    torch.manual_seed(1)
    one = text_task(family, SIZES, seed=0)
    torch.manual_seed(2)
    assert one == text_task(family, SIZES, seed=0)
    other = text_task(family, SIZES, seed=1)
    assert not {example.input for example in one.examples} & {example.input for example in other.examples}


# --- bad input, found once and kept ----------------------------------------------------------------------------------


def test_a_bad_key_of_the_curriculum_names_its_own_neighbours() -> None:
    plain = config().model_dump() | {"curriculum": {"evry": 3}}
    with pytest.raises(UnknownName, match=r"did you mean every\?"):
        checked(plain, "here")


@pytest.mark.parametrize("text", ["name: 2020-99-99", "seed: " + "9" * 5000, "[" * 100_000, "a: [", "\x00"])
def test_yaml_that_cannot_be_read_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"a learner's configuration in .*mine\.yaml"):
        load_config(str(path))


def test_a_name_of_any_length_is_a_name() -> None:
    with pytest.raises(UnknownName, match="a built-in learner"):
        load_config("x" * 300)


@pytest.mark.parametrize("fields", [{"mean": math.nan}, {"spread": math.inf}, {"spread": 0.0}])
def test_weights_of_no_distribution_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InputError, match="a finite mean"):
        FunctionClass("linear", 2, **fields)  # type: ignore[arg-type]


def test_what_is_no_finite_number_counts_as_none() -> None:
    assert number("1e999") is None
    assert number("9" * 400) is None


@pytest.mark.parametrize("n_test", [85, 90, 99, 100])
def test_a_text_task_has_all_the_queries_that_are_asked_for(n_test: int) -> None:
    sizes = TextSizes(n_test=n_test)
    task = text_task(FunctionClass("linear", 1), sizes, seed=0)  # one dimension: rounded points would repeat
    demos = task.train.demonstrations(seed=0)
    assert len(task.train.queries(demos, sizes.queries, seed=0)) == sizes.queries
    assert len(task.test) == n_test


def test_states_that_are_one_point_are_refused() -> None:
    some = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="not one point"):
        alignment(some, torch.ones(4, 2), range(4))
    with pytest.raises(InputError, match="two states or more"):
        alignment(some[:1], some[:1], [0])
