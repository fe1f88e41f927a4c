"""What is measured of learners: planted vectors and their fidelity, class-wide methods against plain loops, the bench's
folder, tables and pages, the commands."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import huber_loss
from typer.testing import CliRunner

from taskvec.cli.app import app
from taskvec.errors import InputError
from taskvec.evaluate.ridge import solve
from taskvec.hooks import capture, inject
from taskvec.methods.learnable import basis
from taskvec.regress.bench import regress_bench
from taskvec.regress.experiments import fidelity_rows, long_rows, probe, reference_rows, shifts
from taskvec.regress.ground import Place, Prompts, Support, owners
from taskvec.regress.learner import Learner, make_model
from taskvec.regress.measure import Bench, Fitted, Sizes, Stand, stand, writers
from taskvec.regress.rows import LENGTH, MEAN, SHUFFLED, VANILLA, WRONG, RegressRow
from taskvec.regress.tables import all_tables, answer, pick
from taskvec.regress.text import TextSizes, text_rows
from taskvec.regress.trained import ConstantVectors, LearnableVectors, LearnedVectors, Training
from taskvec.regress.write import write_results
from taskvec.regress.writers import FunctionVectors, InContextVectors, LinearVectors, ask, head_means
from taskvec.report.tables import markdown
from taskvec.results import Metric
from taskvec.sites import Site
from taskvec.vector import Add, Affine, Edit, Replace, TaskVector
from tests import tiny
from tests.mini import CONFIG, learner

FUNCTIONS = 24
SIZES = Sizes(teach=4, look=3, test=6, clean=2, placed=6, queries=2, steps=4)
HEAD = Site("lm_head_in")


@cache
def bench() -> Bench:
    return Bench(learner(), 0, SIZES)


@cache
def trained_bench() -> Bench:
    """The shipped learner, which has learned its functions."""
    return Bench(Learner.from_pretrained("linear-d3"), 0, Sizes(test=FUNCTIONS, queries=6))


def support(place: Place, count: int = 4, what: str = "teach") -> Support:
    return bench().support(what, bench().functions(what, count), place)


def predict(vector: TaskVector, prompts: Prompts, numbers: Sequence[int]) -> Tensor:
    with inject(prompts.learner, vector):
        return prompts.learner.predict([prompts.encoded[i] for i in numbers])


# --- prompts of many functions ---------------------------------------------------------------------------------------


def test_prompts_show_their_own_functions_values() -> None:
    functions = bench().functions("any", 3)
    prompts = Prompts.draw(learner(), functions, 2, Place(3), seed=1)
    flat = functions(prompts.x.reshape(3, 8, 2)).reshape(3, 2, 4)
    torch.testing.assert_close(prompts.y[..., :-1], flat[..., :-1])
    torch.testing.assert_close(prompts.values, flat[..., -1])
    assert owners(prompts) == [0, 0, 1, 1, 2, 2]
    assert [len(one) for one in prompts.encoded] == [7] * 6


def test_other_functions_examples_are_of_a_new_function_in_each_prompt() -> None:
    functions = bench().functions("any", 3)
    own, other, again = (
        Prompts.draw(learner(), functions, 2, Place(3, own=mine), seed=seed)
        for mine, seed in ((True, 1), (False, 1), (False, 2))
    )
    assert torch.equal(own.x, other.x)
    torch.testing.assert_close(own.values, other.values)
    shown = [weights_of(one) for one in (other, again)]
    true = weights_of(own)
    assert len({tuple(row.round(decimals=3).tolist()) for row in torch.cat([*shown, true[::2]])}) == 6 + 6 + 3


def weights_of(prompts: Prompts) -> Tensor:
    """The linear function that each prompt's examples show."""
    x, y = prompts.x.flatten(0, 1)[:, :-1], prompts.y.flatten(0, 1)[:, :-1]
    found: Tensor = torch.linalg.lstsq(x, y[..., None]).solution[..., 0]
    return found


def test_queries_are_the_same_at_every_place_and_stand_among_no_examples() -> None:
    functions = bench().functions("any", 3)
    places = [Place(0), Place(3), Place(6), Place(3, own=False), Place(3, noise=1.0)]
    drawn = [Prompts.draw(learner(), functions, 20, place, seed=1, what="test") for place in places]
    queries = {tuple(row.tolist()) for row in drawn[0].x[..., -1, :].flatten(0, 1)}
    for one in drawn:
        assert torch.equal(one.x[..., -1, :], drawn[0].x[..., -1, :])
        assert not queries & {tuple(row.tolist()) for row in one.x[..., :-1, :].flatten(0, 2)}


def test_support_and_test_share_no_point() -> None:
    for place in (Place(0), Place(6), Place(3, own=False)):
        some = support(place, 5, "test")
        one = stand(bench(), "any", bench().functions("test", 5), place)
        seen, asked = (
            {tuple(row.tolist()) for prompts in part for row in prompts.x.flatten(0, 2)}
            for part in ((some.clean, some.placed, some.best), (one.prompts, one.best))
        )
        assert not seen & asked


def test_noise_is_on_the_examples_only() -> None:
    functions = bench().functions("any", 3)
    clean, noisy = (Prompts.draw(learner(), functions, 200, Place(3, noise=n), seed=1) for n in (0.0, 0.5))
    torch.testing.assert_close(clean.values, noisy.values)
    gap = (noisy.y - clean.y)[..., :-1]
    assert float(gap.std()) == pytest.approx(0.5, rel=0.1)


def test_permuted_prompts_keep_points_and_move_every_value() -> None:
    own = Prompts.draw(learner(), bench().functions("any", 3), 4, Place(3), seed=1)
    mixed = own.permuted(seed=2)
    assert torch.equal(own.x, mixed.x)
    assert torch.equal(own.y[..., :-1].sort(-1).values, mixed.y[..., :-1].sort(-1).values)
    assert torch.equal(own.values.sort(1).values, mixed.values.sort(1).values)
    assert not (own.y[..., :-1] == mixed.y[..., :-1]).any()
    assert not (own.values == mixed.values).any()


@pytest.mark.parametrize("place", [Place(0), Place(3, own=False), Place(6)])
def test_a_support_asks_the_same_queries_behind_own_examples(place: Place) -> None:
    some = support(place)
    assert torch.equal(some.placed.x[..., -1, :], some.best.x[..., -1, :])
    assert torch.equal(some.placed.values, some.best.values)
    assert some.best.x.shape[2] - 1 == CONFIG.points - 1


@pytest.mark.parametrize(
    "fields", [{"examples": -1}, {"examples": 2, "noise": -1.0}, {"examples": 2, "noise": float("nan")}]
)
def test_places_that_mean_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="0 or more examples"):
        Place(**fields)


def test_teachers_choosers_and_tests_are_different_functions() -> None:
    x = torch.ones(4, 1, 2)
    found = [bench().functions(what, 4)(x) for what in ("teach", "look", "test")]
    assert not any(torch.equal(a, b) for a, b in ((found[0], found[1]), (found[1], found[2]), (found[0], found[2])))


# --- methods on many functions ---------------------------------------------------------------------------------------


def test_predictions_are_those_of_inject() -> None:
    prompts = support(Place(2)).placed
    candidates = [
        [TaskVector((Edit(Site("resid", 0), Add(tiny.random_vector(16, 4 * c + f))),)) for f in range(4)]
        for c in (0, 1)
    ]
    found = ask(prompts, candidates, states=True)
    for c, vectors in enumerate(candidates):
        for f, vector in enumerate(vectors):
            mine = [f * prompts.per + p for p in range(prompts.per)]
            torch.testing.assert_close(found.predictions[c, f], predict(vector, prompts, mine), atol=1e-5, rtol=1e-5)
    with inject(learner(), candidates[1][2]), capture(learner(), [HEAD]) as seen:
        learner().forward(learner().batch([prompts.encoded[2 * prompts.per]]))
    torch.testing.assert_close(found.states[1, 2 * prompts.per], seen[HEAD][0, -1].detach(), atol=1e-5, rtol=1e-5)


def test_head_means_are_those_of_each_functions_own_prompts() -> None:
    clean = support(Place(2)).clean
    found = head_means(clean)
    for f in range(clean.count):
        rows = []
        for prompt in clean.encoded[f * clean.per : (f + 1) * clean.per]:
            with capture(learner(), ["heads[1]"]) as seen:
                learner().forward(learner().batch([prompt]))
            rows.append(seen["heads[1]"][0, -1].detach())
        torch.testing.assert_close(found[f, 1].flatten(), torch.stack(rows).mean(0), atol=1e-5, rtol=1e-5)


def test_a_function_vector_sums_the_functions_own_heads_at_one_layer() -> None:
    some = support(Place(5))
    write = FunctionVectors(share=1.0).fit(learner(), some, support(Place(5), 3, "look"), seed=0)
    vectors = write(some)
    assert len({vector.edits[0].site for vector in vectors}) == 1
    for vector, means in zip(vectors, head_means(some.clean), strict=True):
        expected = torch.zeros(16)
        for layer in range(2):
            weight = learner().model.transformer.h[layer].attn.c_proj.weight.detach()  # Conv1D: (in, out)
            expected += means[layer].flatten() @ weight
        op = vector.edits[0].op
        assert isinstance(op, Add)
        torch.testing.assert_close(op.vector, expected, atol=1e-4, rtol=1e-4)


def test_icv_reads_what_the_last_value_adds_behind_its_point() -> None:
    clean = support(Place(5)).clean
    found = InContextVectors().differences(learner(), clean)
    x, y = clean.x[1, 1, :-1], clean.y[1, 1, :-1]
    with capture(learner(), ["resid[1]"]) as seen:
        learner().forward(learner().batch([learner().points(x, y)]))
    h = seen["resid[1]"][0].detach()
    torch.testing.assert_close(found[1, 1, 1], h[-1] - h[-2], atol=1e-5, rtol=1e-5)


def test_each_linear_map_is_its_functions_own_ridge() -> None:
    some = support(Place(0))
    vectors = LinearVectors().fit(learner(), some, some, seed=0)(some)
    for f in (0, 3):
        rows = []
        for prompts in (some.placed, some.best):
            with capture(learner(), [HEAD]) as seen:
                learner().forward(learner().batch(prompts.encoded[6 * f : 6 * f + 6]))
            h = seen[HEAD].detach()
            rows.append(
                torch.stack([h[i, len(prompt) - 1] for i, prompt in enumerate(prompts.encoded[6 * f : 6 * f + 6])])
            )
        found = solve(rows[0], rows[1] - rows[0], "loo", intercept=True)
        op = vectors[f].edits[0].op
        assert isinstance(op, Affine)
        expected = rows[0] + (rows[0].double() @ found.read.T @ found.write + found.bias).float()
        torch.testing.assert_close(op.apply(rows[0]), expected, atol=1e-3, rtol=1e-3)


def test_one_step_of_learnable_weights_is_adam_on_the_huber_loss_of_all_functions() -> None:
    some, look = support(Place(2)), support(Place(2), 3, "look")
    training = Training(lr=0.1, steps=1, rounds=SIZES.placed, check=1)
    vectors = LearnableVectors(training=training).fit(learner(), some, look, seed=0)(some)
    fixed = [basis(learner(), means, "heads") for means in head_means(some.clean)]
    phi = torch.zeros(2, 2, requires_grad=True)
    losses = []
    for f in range(4):
        added = (phi[..., None] * fixed[f]).sum(1)
        for p in range(some.placed.per):
            vector = TaskVector(tuple(Edit(Site("resid", layer), Add(added[layer])) for layer in range(2)))
            with inject(learner(), vector):
                out = learner().forward(learner().batch([some.placed.encoded[f * some.placed.per + p]]))[0, -1, 0]
            losses.append(huber_loss(out, some.placed.values[f, p]))
    (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), phi)
    stepped = -0.1 * gradient.sign()  # Adam's first step
    found = [edit.op for edit in vectors[2].edits]
    if all(float(op.vector.norm()) == 0 for op in found if isinstance(op, Add)):
        pytest.fail("the step made dev worse: choose another seed")
    for layer, op in enumerate(found):
        assert isinstance(op, Add)
        torch.testing.assert_close(op.vector, (stepped[layer][:, None] * fixed[2][layer]).sum(0), atol=1e-4, rtol=1e-3)


def test_learned_vectors_lower_their_own_functions_loss() -> None:
    some = support(Place(0))
    vectors = LearnedVectors(lr_rms=0.05, steps=30).fit(learner(), some, support(Place(0), 3, "look"), seed=0)(some)
    nobody, moved = ask(some.placed, [[None] * 4, vectors]).predictions
    losses = [huber_loss(found, some.placed.values, reduction="none").mean(1) for found in (moved, nobody)]
    assert bool((losses[0] < losses[1]).all())
    assert len({vector.edits[0].site for vector in vectors}) == 1


def test_a_constant_is_the_same_for_all_functions() -> None:
    some = support(Place(2))
    vectors = ConstantVectors(Training(lr=0.05, steps=4, check=2)).fit(learner(), some, some, seed=0)(some)
    first, last = (torch.stack([edit.op.tensors()["vector"] for edit in vectors[f].edits]) for f in (0, 3))
    assert torch.equal(first, last)


def test_training_leaves_the_model_as_it_was() -> None:
    before = {name: p.detach().clone() for name, p in learner().model.named_parameters()}
    some = support(Place(2))
    for writer in writers(2):
        writer.fit(learner(), some, some, seed=0)
    for name, p in learner().model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.requires_grad


# --- planted vectors -------------------------------------------------------------------------------------------------


@cache
def weights() -> Tensor:
    """Of the functions that are tested."""
    functions = trained_bench().functions("test", FUNCTIONS)
    return functions(torch.eye(3).expand(FUNCTIONS, 3, 3))


@cache
def point_of_state() -> tuple[Tensor, Tensor]:
    """(P, c) with x = P h + c, for the state h at the input of the read-out behind a bare query: no function is in
    it."""
    model, x = trained_bench().learner, torch.randn(2000, 3, generator=torch.Generator().manual_seed(8))
    prompts = [model.points(torch.zeros(0, 3), torch.zeros(0), row) for row in x]
    with capture(model, [HEAD]) as seen:
        model.forward(model.batch(prompts))
    h = torch.cat([seen[HEAD][:, 0].detach(), torch.ones(2000, 1)], 1)
    found = torch.linalg.lstsq(h.double(), x.double()).solution.float()
    return found[:-1].T, found[-1]


def planted(share: float, of: Tensor) -> list[TaskVector]:
    """For each row w of weights the edit that makes a bare query x answer share * w'x."""
    read_out = trained_bench().learner.model.lm_head.weight[0].detach()
    unit, (points, constant) = read_out / read_out.square().sum(), point_of_state()
    return [
        TaskVector(
            (
                Edit(
                    HEAD,
                    Affine((share * w @ points - read_out)[None], unit[None], bias=share * float(w @ constant) * unit),
                ),
            )
        )
        for w in of
    ]


@cache
def alone() -> Stand:
    """Queries without examples: the prompt says nothing of the function."""
    bench = trained_bench()
    return stand(bench, "no-examples", bench.functions("test", FUNCTIONS), Place(0))


def score(vectors: Sequence[TaskVector], at: Stand | None = None) -> Metric:
    (one,) = (at or alone()).rows("planted", {"": [vectors]})
    assert one.fidelity is not None
    return one.fidelity


def test_the_right_weights_have_fidelity_near_one() -> None:
    found = score(planted(1.0, weights()))
    assert 0.95 < found.value < 1.1
    assert found.low > 0.9


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_of_the_weights_has_its_share_of_fidelity(share: float) -> None:
    assert score(planted(share, weights())).value == pytest.approx(1 - (1 - share) ** 2, abs=0.08)


def test_the_weights_of_other_functions_have_fidelity_below_zero() -> None:
    found = score(planted(1.0, weights().roll(7, 0)))
    assert found.high < 0


@pytest.mark.parametrize("seed", range(3))
def test_small_vectors_without_the_task_have_fidelity_near_zero(seed: int) -> None:
    width = trained_bench().learner.width(HEAD)
    random = [TaskVector((Edit(HEAD, Add(tiny.random_vector(width, 100 * seed + f, 0.03))),)) for f in range(FUNCTIONS)]
    for vectors in (random, random[:1] * FUNCTIONS, planted(0.0, weights())):
        found = score(vectors)
        assert -0.1 < found.value < 0.05
        assert found.low < 0.02


def test_no_constant_gets_above_zero_behind_other_functions_examples() -> None:
    bench = trained_bench()
    at = stand(bench, "other-examples", bench.functions("test", FUNCTIONS), Place(bench.trained, own=False))
    nothing = [TaskVector((Edit(HEAD, Replace(torch.zeros(64))),))] * FUNCTIONS
    assert score(nothing, at).value == pytest.approx(0, abs=1e-5)
    bare = at.bare()[0].fidelity
    assert bare is not None
    assert bare.high < 0


def test_behind_its_own_examples_nothing_is_scored() -> None:
    bench = trained_bench()
    at = stand(bench, LENGTH, bench.functions("test", FUNCTIONS), Place(bench.trained))
    assert [one.fidelity for one in at.bare()] == [None]


# --- experiments -----------------------------------------------------------------------------------------------------


@cache
def rows() -> tuple[RegressRow, ...]:
    return (*reference_rows(bench()), *long_rows(bench()), *fidelity_rows(bench()))


def test_every_method_has_its_controls_at_every_place() -> None:
    names = {writer.name for writer in writers()}
    for test in ("length", "no-examples", "other-examples", "skewed", "scaled", "orthogonal", "noise", "weights"):
        some = [one for one in rows() if one.test == test and one.control != "yardstick"]
        assert {one.method for one in some} >= names | {VANILLA}
        assert {one.control for one in some if one.method == "learned"} == {"", WRONG, SHUFFLED, MEAN}
        assert {one.control for one in some if one.method == "linear"} == {"", WRONG, SHUFFLED, MEAN}
        assert {one.control for one in some if one.method == "constant"} == {""}


def test_lengths_go_from_half_the_trained_one_to_the_last_position() -> None:
    assert bench().lengths == [1, 2, 3, 4, 6, 8]
    assert trained_bench().lengths == [3, 5, 9, 10, 11, 15, 20, 30, 40]
    assert sorted({one.examples for one in rows() if one.test == "length"}) == bench().lengths


def test_states_are_compared_beyond_the_trained_length_only() -> None:
    compared = {(one.test, one.examples) for one in rows() if one.alignment is not None}
    assert compared == {("length", k) for k in (4, 6, 8)}


def test_least_squares_makes_no_error_from_as_many_points_as_dimensions() -> None:
    for one in rows():
        if one.method == "least squares" and one.examples >= CONFIG.d:
            assert one.mse is not None
            assert one.mse.value < 1e-6


def test_shifts_are_what_their_names_say() -> None:
    found = dict(shifts(bench(), Place(6)))
    assert {name: place.inputs for name, place in found.items() if name != "noise"} == {
        name: name for name in ("skewed", "scaled", "orthogonal")
    }
    assert found["noise"].noise == pytest.approx((2 / 20) ** 0.5)


def test_the_mean_is_fitted_on_all_functions_together() -> None:
    place, some = Place(0), support(Place(0), 6, "test")
    fitted = Fitted(bench(), FunctionVectors(share=1.0), place, support(place), support(place, 3, "look"))
    tried = fitted.tried({"": some, MEAN: some.pooled(), SHUFFLED: some.permuted(seed=0)})
    own, middle = (torch.stack([v.edits[0].op.tensors()["vector"] for v in tried[name][0] if v]) for name in ("", MEAN))
    torch.testing.assert_close(middle, own.mean(0).expand(6, -1), atol=1e-5, rtol=1e-4)
    assert torch.equal(tried[WRONG][1][0].edits[0].op.tensors()["vector"], own[2])  # type: ignore[union-attr]


def test_the_support_alone_tells_a_linear_function() -> None:
    """Least squares on exact values is exact; here the values are the untrained model's."""
    some = support(Place(0), 6, "test")
    one = stand(bench(), "no-examples", bench().functions("test", 6), Place(0))
    x, told = some.placed.x[2, :, -1], ask(some.best, [[None] * 6]).predictions[0, 2]
    expected = one.prompts.x[2, :, -1] @ torch.linalg.lstsq(x, told[:, None]).solution[:, 0]
    torch.testing.assert_close(probe(some, one)[2], expected)


def test_positions_that_end_before_twice_the_trained_length_are_refused() -> None:
    short = CONFIG.model_copy(update={"positions": 6})
    with pytest.raises(InputError, match="positions for 6 examples and a query; found 6 positions"):
        long_rows(Bench(Learner(make_model(short), short), 0, SIZES))


@pytest.mark.parametrize("size", ["teach", "look", "test", "clean", "placed", "queries", "steps"])
def test_sizes_that_measure_nothing_are_refused(size: str) -> None:
    with pytest.raises(InputError, match=f"{size} of at least"):
        Sizes(**{size: 0})


def test_rows_survive_json() -> None:
    for one in rows():
        assert RegressRow.from_dict(json.loads(json.dumps(one.to_dict()))) == one


# --- text ------------------------------------------------------------------------------------------------------------


def test_a_language_model_is_measured_beside_the_references() -> None:
    family = replace(CONFIG.family, d=1)
    found = text_rows(tiny.tiny_lm("llama"), family, seed=0, sizes=TextSizes(shots=2, n_test=4, queries=4))
    by_name = {(one.method, one.control): one for one in found}
    assert set(by_name) == {
        *((name, "") for name in ("zero-shot", "few-shot", "mean-difference", "linear")),
        ("linear", SHUFFLED),
        *((name, "yardstick") for name in ("zero", "mean of the demonstrations", "least squares")),
    }
    exact = by_name["least squares", "yardstick"].mse
    assert exact is not None
    assert exact.value < 1e-6  # one dimension, two noise-free demonstrations: only rounding is left
    assert all(one.n == 4 for one in found)


# --- the folder, the tables, the page, the commands ------------------------------------------------------------------


def test_a_bench_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def one_row(bench: Bench) -> list[RegressRow]:
        measured.append(bench.seed)
        if measured == [0, 1]:
            raise KeyboardInterrupt
        return [replace(rows()[0], seed=bench.seed)]

    monkeypatch.setattr("taskvec.regress.bench.MEASURED", {"fidelity": one_row})
    with pytest.raises(KeyboardInterrupt):
        regress_bench([learner()], tmp_path, seeds=(0, 1), sizes=SIZES)
    assert [row.seed for row in regress_bench([learner()], tmp_path, seeds=(0, 1), sizes=SIZES)] == [0, 1]
    assert measured == [0, 1, 1]
    regress_bench([learner()], tmp_path, seeds=(0,), sizes=replace(SIZES, steps=5))
    assert measured == [0, 1, 1, 0]


@pytest.mark.slow
def test_processes_measure_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(teach=2, look=2, test=3, clean=2, placed=2, queries=1, steps=2)
    found = [regress_bench([learner()], tmp_path / str(n), seeds=(0, 1), sizes=sizes, jobs=n) for n in (1, 2)]
    assert found[0] == found[1]


def test_the_same_seed_measures_the_same() -> None:
    again = Bench(learner(), 0, SIZES)
    assert [one for one in rows() if one.test in ("no-examples", "other-examples")] == fidelity_rows(again)


@pytest.mark.parametrize("seeds", [(), (-1,)])
def test_a_bench_without_seeds_is_refused(seeds: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a learner, a seed of 0 or more, a job"):
        regress_bench([learner()], tmp_path, seeds=seeds)


def test_learners_of_one_name_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="learners of different names"):
        regress_bench([learner(), learner()], tmp_path, sizes=SIZES)


def test_results_tables_pictures_and_page_are_written(tmp_path: Path) -> None:
    names = {path.name for path in write_results(rows(), tmp_path)}
    write_results(rows(), tmp_path / "again")
    pictures = {f"mini-{kind}.svg" for kind in ("fidelity", "methods", "yardsticks")}
    assert names == {"results.json", "tables.md", "report.html"} | pictures
    plain = json.loads((tmp_path / "results.json").read_text())
    assert [RegressRow.from_dict(one) for one in plain["rows"]] == list(rows())
    page = (tmp_path / "report.html").read_text()
    assert answer(rows())[0] in page
    assert page.count("data:image/svg+xml;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    for path in tmp_path.glob("*.svg"):
        assert path.read_text() == (tmp_path / "again" / path.name).read_text()
        assert "<script" not in path.read_text()


def test_tables_hold_every_method_and_the_answer_names_them() -> None:
    by_name = {table.name: table for table in all_tables(rows())}
    assert set(by_name) == {"fidelity", "length", "shifts", "alignment"}
    for writer in writers():
        assert writer.name in {line[0] for line in by_name["fidelity"].rows}
    assert by_name["length"].header[1:] == tuple(map(str, bench().lengths))
    assert markdown(by_name["alignment"])
    lead, details = answer(rows())
    assert lead == "No task fidelity was measured."  # an untrained model's examples tell it nothing
    assert "behind 8 examples" in details[0]


def test_the_answer_counts_a_method_only_where_the_interval_says_so() -> None:
    def scored(method: str, low: float, high: float) -> RegressRow:
        base = pick(rows(), test="no-examples", method="linear", control="")[0]
        return replace(base, method=method, fidelity=Metric((low + high) / 2, low, high))

    lead, _ = answer([scored("linear", 0.9, 1.0), scored("learned", 0.1, 0.4), scored("icv", -0.1, 0.2)])
    assert "linear carried the function" in lead
    assert "learned carried some of it" in lead
    assert "icv did not, or not everywhere" in lead


def test_the_commands_train_and_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    config = tmp_path / "mini.yaml"
    config.write_text(yaml.safe_dump(CONFIG.model_dump()))
    run = CliRunner().invoke(app, ["regress", "train", str(config), "--out", str(tmp_path / "made"), "--json"])
    assert run.exit_code == 0, run.output
    made = json.loads(run.stdout)
    assert [point["step"] for point in made["curve"]] == [2, 4, 6]
    assert (tmp_path / "made" / "error.svg").is_file()
    monkeypatch.setattr("taskvec.regress.measure.Sizes", lambda: SIZES)
    asked = [
        "regress",
        "bench",
        "--learner",
        str(tmp_path / "made"),
        "--out",
        str(tmp_path / "run"),
        "--seeds",
        "1",
        "--text",
        "",
    ]
    run = CliRunner().invoke(app, [*asked, "--functions", "6", "--jobs", "1", "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    keys = {"method", "learner", "function", "examples", "mse", "fidelity", "seed"}
    assert all(keys <= one.keys() for one in found["rows"])
    assert {Path(path).name for path in found["files"]} >= {"results.json", "report.html"}


def test_the_command_names_the_learners_it_ships() -> None:
    run = CliRunner().invoke(app, ["regress", "bench", "--learner", "linear-d2", "--out", "nowhere"])
    assert run.exit_code != 0
    assert "linear-d3" in str(run.exception)
    assert not Path("nowhere").exists()
