"""A function learner is an LM: its prompts, its text, and the methods and the engine on it, against plain forwards."""

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from taskvec.errors import DataError, InputError, PromptTooLong, VectorMismatch
from taskvec.evaluate import observe
from taskvec.evaluate.choose import choose
from taskvec.hooks import capture, inject, prove
from taskvec.lm import Encoded
from taskvec.methods import Method
from taskvec.methods.function_vector import FunctionVector, indirect_effects
from taskvec.methods.hendel import HendelTaskVector
from taskvec.methods.icv import InContextVector
from taskvec.methods.learnable import LearnableTaskVector
from taskvec.methods.learned import LearnedTaskVector
from taskvec.methods.linear import LinearTaskVector
from taskvec.regress.learner import Learner, numbers
from taskvec.replay import Ask, Plain, Trial, packs, replay
from taskvec.sites import Site
from taskvec.vector import Add, Edit, TaskVector, Where
from tests import mini, tiny
from tests.mini import learner, points, task

METHODS: dict[str, Method] = {
    "hendel": HendelTaskVector(n_dev=5),
    "function-vector": FunctionVector(heads=2, prompts=4, trials=3, n_dev=5),
    "icv": InContextVector(rank=1, site="resid"),
    "learnable": LearnableTaskVector(prompts=4, trials=6, steps=4, batch=3, n_dev=5),
    "learnable-released": LearnableTaskVector(
        form="released-regression", prompts=4, trials=6, steps=4, batch=3, n_dev=5
    ),
    "learned": LearnedTaskVector(layer=1, steps=4, batch=4, queries=8, n_dev=5),
    "linear": LinearTaskVector(queries=12),
}


@torch.no_grad()
def plain(model: Any, rows: Tensor) -> Tensor:
    """Every token's output, of rows (T, d) as they stand in the prompt."""
    embeds = rows @ model.transformer.wte.weight
    out: Tensor = model(inputs_embeds=embeds[None], use_cache=False).logits[0, :, 0]
    return out


def interleaved(x: Tensor, y: Tensor) -> Tensor:
    rows = []
    for point, value in zip(x, y, strict=False):
        rows += [point, torch.tensor([float(value), 0.0])]
    return torch.stack([*rows, *x[len(y) :]])


def some_prompts(sizes: Sequence[int] = (0, 1, 3, 5)) -> list[Encoded]:
    x = points(7, 1)
    return [learner().points(x[:k], x[:k, 0] - 1, x[6]) for k in sizes]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_pairs_stand_one_after_another_and_a_value_in_the_first_coordinate() -> None:
    x, y = points(3), torch.tensor([0.5, -2.0])
    found = learner().predict([learner().points(x[:2], y, x[2])])
    torch.testing.assert_close(found[0], plain(learner().model, interleaved(x, y))[-1])


def test_a_padded_batch_predicts_what_single_prompts_do() -> None:
    alone = torch.cat([learner().predict([prompt]) for prompt in some_prompts()])
    torch.testing.assert_close(learner().predict(some_prompts()), alone, atol=1e-5, rtol=1e-5)


def test_roles_name_points_and_values() -> None:
    prompt = learner().points(points(2), torch.ones(2), points(1)[0])
    assert dict(prompt.roles) == {
        "demo_input": (0, 2),
        "separator": (0, 2),
        "demo_output": (1, 3),
        "input": (4,),
        "query_end": (4,),
    }
    assert prompt.prompt_length == 5


def test_a_prompt_may_end_with_a_value() -> None:
    prompt = learner().points(points(2), torch.ones(2))
    assert (len(prompt), prompt.roles["input"]) == (4, ())


def test_what_stands_behind_the_query_changes_nothing() -> None:
    x, y = points(4), torch.tensor([0.5, -2.0, 3.0])
    rows = interleaved(x, y)
    changed = rows.clone()
    changed[5:] = 9.0
    torch.testing.assert_close(plain(learner().model, rows)[:5], plain(learner().model, changed)[:5])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="finite points"):
        learner().points(points(1), torch.tensor([bad]), points(1)[0])
    with pytest.raises(InputError, match="finite points"):
        learner().points(points(1), torch.ones(1), torch.tensor([bad, 1.0]))


def test_points_of_another_dimension_are_refused() -> None:
    for x, y, query in ((1, 3), (1,), (3,)), ((1, 2), (1,), (3,)), ((1, 2), (2,), (2,)), ((2,), (2,), (2,)):
        with pytest.raises(InputError, match=r"\(k, 2\) points, .* for learner:mini; found"):
            inspect.unwrap(Learner.points)(learner(), torch.ones(x), torch.ones(y), torch.ones(query))


def test_no_prompts_have_no_predictions() -> None:
    assert learner().predict([]).shape == (0,)


def test_as_many_pairs_as_positions_fit_and_no_query_more() -> None:
    x = points(10)
    assert len(learner().points(x[:9], x[:9, 0])) == 18
    assert len(learner().points(x[:8], x[:8, 0], x[9])) == 17
    with pytest.raises(PromptTooLong, match="9 pairs and a query"):
        learner().points(x[:9], x[:9, 0], x[9])


# --- points as text --------------------------------------------------------------------------------------------------


def test_text_reads_as_points_do() -> None:
    split, x = task(), points(4, seed=5)
    demos = split.train.examples[:2]
    encoded = learner().encode(split.spec.format.prompt("0.25 -1", demos))
    rows = [numbers(demo.input) for demo in demos]
    expected = learner().points(
        torch.tensor(rows), torch.tensor([float(demo.output) for demo in demos]), torch.tensor([0.25, -1.0])
    )
    assert encoded.embeds is not None
    assert expected.embeds is not None
    assert torch.equal(encoded.embeds, expected.embeds)
    assert encoded.roles == expected.roles
    assert encoded.text.endswith("0.25 -1 ->")
    assert x.shape == (4, 2)


def test_a_bare_text_is_a_point_or_a_value() -> None:
    weight = learner().model.transformer.wte.weight
    for text, row in (("1.5, -2", [1.5, -2.0]), ("3", [3.0, 0.0])):
        embeds = learner().encode(text).embeds
        assert embeds is not None
        torch.testing.assert_close(embeds[0], torch.tensor(row) @ weight)


def test_an_answer_is_its_number() -> None:
    format = task().spec.format
    for terminator in (False, True):
        assert learner().answer_ids(format.prompt("1 2"), " -0.5", format, terminator=terminator) == (-0.5,)


@pytest.mark.parametrize("text", ["one", "", "1 two", "nan", "inf 1"])
def test_text_that_is_no_numbers_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="finite numbers"):
        learner().encode(text)


@pytest.mark.parametrize(
    ("query", "demos"), [("1 2 3", ()), ("1", ()), ("1 2", (("1", "2"),)), ("1 2", (("1 2", "3 4"),))]
)
def test_text_of_another_size_is_refused(query: str, demos: Sequence[tuple[str, str]]) -> None:
    from taskvec.prompts import Example

    prompt = task().spec.format.prompt(query, [Example(*demo) for demo in demos])
    with pytest.raises(DataError, match="number"):
        learner().encode(prompt)


def test_an_answer_of_two_numbers_is_refused() -> None:
    format = task().spec.format
    with pytest.raises(DataError, match="one number as an output"):
        learner().answer_ids(format.prompt("1 2"), "1 2", format, terminator=True)


def test_language_scores_are_refused() -> None:
    with pytest.raises(InputError, match=r"measure function learners with taskvec\.regress"):
        observe(learner(), task().dev)


# --- the same objects ------------------------------------------------------------------------------------------------


def test_every_site_is_proved_and_prompts_are_packed() -> None:
    prove(learner())
    assert learner().proofs["sites"] == {}
    assert packs(learner()) is None


def test_capture_reads_the_state_before_the_read_out() -> None:
    prompt = some_prompts((3,))[0]
    with capture(learner(), ["lm_head_in"]) as seen:
        learner().forward(learner().batch([prompt]))
    read_out = learner().model.lm_head.weight[0]
    torch.testing.assert_close(seen["lm_head_in"][0, -1] @ read_out, learner().predict([prompt])[0])


@pytest.mark.parametrize("where", ["last_prompt", "all", "each_last"])
@pytest.mark.parametrize("site", ["embed", "resid[0]", "attn[1]", "mlp[0]", "heads[1]", "heads[0,1]", "lm_head_in"])
def test_replay_is_inject_is_plain(site: str, where: str) -> None:
    at = Site.parse(site)
    vector = TaskVector((Edit(at, Add(tiny.random_vector(learner().width(at), 3)), Where.parse(where)),))
    prompts = some_prompts()
    with inject(learner(), vector):
        expected = learner().predict(prompts)
    assert not torch.allclose(expected, learner().predict(prompts))
    trials = [Trial(i, vector) for i in range(len(prompts))]
    ask = Ask(keep=lambda _, logits: logits[0])
    starts = [0] * len(prompts) if where == "all" else None
    for engine in (replay(learner(), prompts, starts=starts), Plain(learner(), prompts)):
        torch.testing.assert_close(engine.answer(trials, ask).kept, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_fits_a_function_and_its_vector_acts(name: str) -> None:
    vector = METHODS[name].fit(learner(), task().train, task().dev, seed=1)
    assert isinstance(vector, TaskVector)
    assert vector.origin is not None
    assert vector.origin.model.fingerprint == learner().fingerprint
    prompt = learner().encode(task().spec.format.prompt("0.5 0.5"))
    with inject(learner(), vector):
        moved = learner().predict([prompt])
    assert moved.isfinite().all()
    if name != "learnable-released":  # its weights start at 0, and dev may keep them there
        assert not torch.equal(moved, learner().predict([prompt]))


def test_a_head_is_ranked_by_the_squared_error_it_takes_away() -> None:
    model, prompts = learner(), some_prompts((3, 4))
    means = torch.stack([tiny.random_vector(2 * 2 * 8, seed).reshape(2, 2, 8) for seed in (1, 2)])
    golds, heads = [0.3, -1.2], [(0, 1), (1, 0)]
    found = indirect_effects(model, prompts, golds, means, heads)
    for i, prompt in enumerate(prompts):
        bare = float(model.predict([prompt])[0])
        for j, (layer, head) in enumerate(heads):
            patched = _patched(model, prompt, layer, head, means[i, layer, head])
            expected = (bare - golds[i]) ** 2 - (patched - golds[i]) ** 2
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def _patched(model: Learner, prompt: Encoded, layer: int, head: int, value: Tensor) -> float:
    """A hook of the test's own: the projection's input at the last token."""

    def change(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h = args[0].clone()
        h[0, -1, 8 * head : 8 * head + 8] = value
        return (h, *args[1:])

    handle = model.model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(change)
    try:
        assert prompt.embeds is not None
        out: Tensor = model.model(inputs_embeds=prompt.embeds[None], use_cache=False).logits
    finally:
        handle.remove()
    return float(out[0, -1, 0])


def test_dev_chooses_the_smallest_squared_error() -> None:
    model, dev = learner(), task().dev
    read_out = model.model.lm_head.weight[0].detach()
    candidates = [
        TaskVector((Edit(Site("lm_head_in"), Add(shift * read_out / read_out.square().sum())),))
        for shift in (-1.0, 0.0, 2.0)
    ]
    prompts = [model.encode(dev.spec.format.prompt(example.input)) for example in dev.examples]
    values = torch.tensor([float(example.output) for example in dev.examples])
    losses = [float((model.predict(prompts) + shift - values).square().mean()) for shift in (-1.0, 0.0, 2.0)]
    choice = choose(model, dev, candidates)
    assert choice.best == losses.index(min(losses))
    assert choice.logprob == pytest.approx([-loss for loss in losses], rel=1e-4)


def test_a_vector_of_another_learner_is_refused() -> None:
    other = mini.fresh()
    with torch.no_grad():
        other.model.lm_head.weight.add_(1.0)
    vector = METHODS["linear"].fit(learner(), task().train, task().dev)
    assert isinstance(vector, TaskVector)
    with pytest.raises(VectorMismatch), inject(other, vector):
        pass
