"""Shared work: the same bits and the same bills as alone, in any order; nothing of it where the model is another."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taskvec.evaluate import Condition, observe
from taskvec.evaluate.adapters import PeftAdapter
from taskvec.evaluate.scoring import few_shot
from taskvec.evaluate.shared import KEPT, engine_of, shared_work, states_of
from taskvec.lm import LM, Encoded
from taskvec.methods import Method
from taskvec.methods.elicit import Elicit, ElicitLibrary
from taskvec.methods.function_vector import FunctionVector
from taskvec.methods.hendel import HendelTaskVector
from taskvec.methods.learned import LearnedTaskVector
from taskvec.methods.linear import LinearTaskVector
from taskvec.methods.lora import LoRA
from taskvec.methods.mean_difference import MeanDifference
from taskvec.replay import Ask, Packed, Plain, Trial
from taskvec.sites import Site
from taskvec.tasks import Task, load_task
from taskvec.vector import Origin, TaskVector
from tests import tiny

R1, R2, HEAD = Site("resid", 1), Site("resid", 2), Site("lm_head_in")
METHODS: dict[str, Method] = {
    "hendel": HendelTaskVector(n_dev=6),
    "mean-difference": MeanDifference(queries=6, n_dev=6),
    "linear": LinearTaskVector(queries=6),
    "function-vector": FunctionVector(heads=2, shared=True, prompts=6, trials=2, n_dev=6),
    "learned": LearnedTaskVector(steps=2, layer=1, queries=6, batch=3, n_dev=6),
    "elicit": Elicit(others=(), prompts=2, n_dev=6),
}
RIVAL = LoRA(rank=2, steps=2, batch=4, queries=8, check=1, n_dev=4, lr=0.05)


@cache
def lm() -> LM:
    return LM.load("tiny")


@cache
def bare() -> LM:
    """The same model, in which nothing is ever shared."""
    return LM.load("tiny")


@cache
def task(name: str = "tiny_spell") -> Task:
    return load_task(name, shots=4, n_test=6)


def fit(name: str, model: LM | None = None, on: Task | None = None) -> Condition:
    on = on or task()
    return METHODS[name].fit(model or lm(), on.train, on.dev, seed=1)


@cache
def alone(name: str) -> Condition:
    return fit(name, bare())


@cache
def adapter() -> PeftAdapter:
    return RIVAL.fit(bare(), task().train, task().dev)


def origin_of(condition: Condition) -> Origin:
    assert condition is not None
    assert condition.origin is not None
    return condition.origin


def numbers(condition: Condition) -> dict[str, Tensor]:
    """Every number of a vector or a library, by name."""
    vectors = condition.entries if isinstance(condition, ElicitLibrary) else (condition,)
    assert all(isinstance(vector, TaskVector) for vector in vectors)
    return {
        f"{i}.{key}": t for i, v in enumerate(vectors) if isinstance(v, TaskVector) for key, t in v.tensors().items()
    }


def same(one: Condition, other: Condition) -> None:
    """The same bits, and the same origin but for the seconds."""
    a, b = numbers(one), numbers(other)
    assert a.keys() == b.keys()
    assert a
    assert all(torch.equal(a[key], b[key]) for key in a)
    first, second = (origin_of(c).model_dump(exclude={"cost": {"seconds"}}) for c in (one, other))
    assert first == second


def prompts(inputs: Sequence[str] = ("ba", "du", "li", "ke"), *, shown: bool = False) -> list[Encoded]:
    demos = origin_of(alone("linear")).demos if shown else ()
    return [lm().encode(task().spec.format.prompt(text, demos)) for text in inputs]


@contextmanager
def computed() -> Iterator[list[int]]:
    """What really goes through the model inside: the tokens of each pass."""
    passes: list[int] = []

    def count(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        passes.append(inputs["input_ids"].numel())

    handle = lm().model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def by_hand(some: Sequence[Encoded]) -> int:
    """Tokens that the states of prompts take: what all begin with once, the rest of each."""
    shortest = min(len(p) for p in some)
    common = next(i for i in range(shortest) if i == shortest - 1 or len({p.ids[i] for p in some}) > 1)
    return common + sum(len(p) - common for p in some)


# --- results and bills ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_first_or_from_memory(name: str) -> None:
    with shared_work(lm()):
        same(fit(name), alone(name))
        same(fit(name), alone(name))


@given(st.permutations(["hendel", "mean-difference", "linear", "function-vector"]))
@settings(deadline=None, max_examples=3)
def test_results_do_not_depend_on_the_order(order: list[str]) -> None:
    with shared_work(lm()):
        for name in order:
            same(fit(name), alone(name))


def test_another_seed_and_another_task_stand_beside_it() -> None:
    method = METHODS["mean-difference"]
    others = [(task(), 0), (task("tiny_vowel"), 1), (task("tiny_vowel"), 0)]
    outside = [method.fit(lm(), some.train, some.dev, seed=seed) for some, seed in others]
    with shared_work(lm()):
        same(fit("mean-difference"), alone("mean-difference"))
        for (some, seed), expected in zip(others, outside, strict=True):
            same(method.fit(lm(), some.train, some.dev, seed=seed), expected)


@pytest.mark.parametrize("name", ["tiny_spell", "tiny_vowel"])
def test_observations_are_the_same_bits(name: str) -> None:
    some = task(name)
    vectors: list[Condition] = [None, *(METHODS[m].fit(lm(), some.train, some.dev) for m in ("linear", "hendel"))]
    vectors.append(few_shot(origin_of(vectors[1])))
    outside = [observe(lm(), some.test, vector) for vector in vectors]
    with shared_work(lm()):
        for vector, seen in [*zip(vectors, outside, strict=True), *reversed(list(zip(vectors, outside, strict=True)))]:
            found = observe(lm(), some.test, vector)
            assert torch.equal(found.logits, seen.logits)
            assert torch.equal(found.label_logprobs, seen.label_logprobs)
            assert found.texts == seen.texts
            assert found.states is not None
            assert seen.states is not None
            assert torch.equal(found.states, seen.states)


def test_what_was_computed_is_what_was_charged_less_what_was_saved() -> None:
    with shared_work(lm()) as shared:
        for name in ("function-vector", "linear", "hendel", "mean-difference", "linear"):
            before = shared.saved
            with computed() as passes, lm().metered() as meter:
                fit(name)
            assert sum(passes) == meter.tokens - (shared.saved - before)
            assert meter.passes == len(passes)
            assert meter.tokens == origin_of(alone(name)).cost.tokens
    assert shared.saved > 0


def test_saved_counts_what_two_methods_ask_for() -> None:
    demos = origin_of(alone("linear")).demos
    queries = [e.input for e in task().train.queries(demos, 6, seed=1)]
    with shared_work(lm()) as shared:
        fit("mean-difference")
        assert shared.saved == 0
        with computed() as passes:
            fit("linear")
        assert passes == []
        assert shared.saved == by_hand(prompts(queries)) + by_hand(prompts(queries, shown=True))
    assert origin_of(alone("linear")).cost.tokens == shared.saved


def test_seconds_are_those_of_the_first_computation() -> None:
    with shared_work(lm()) as shared:
        fit("linear")
        assert len(shared.states) == 2
        for known in shared.states.values():
            known.seconds = 1000.0
        assert 2000 < origin_of(fit("linear")).cost.seconds < 2100
    assert origin_of(alone("linear")).cost.seconds < 1000


def test_no_method_changes_what_another_one_finds() -> None:
    with shared_work(lm()) as shared:
        for name in METHODS:
            fit(name)
        kept = {key: dict(known.states) for key, known in shared.states.items()}
    assert len(kept) >= 3
    for key, states in kept.items():
        assert isinstance(key, tuple)
        again, _ = states_of(lm(), [Encoded(ids) for ids in key], list(states))
        assert all(torch.equal(states[site], again[site]) for site in states)


def test_a_model_that_runs_the_plain_way_gives_the_same() -> None:
    model, some = tiny.tiny_lm("mpt"), tiny.tiny_task(shots=3)
    outside = fit("hendel", model, some)
    with shared_work(model) as shared:
        same(fit("hendel", model, some), outside)
        same(fit("hendel", model, some), outside)
        assert all(isinstance(engine, Plain) for engine in shared.engines.values())


# --- states -----------------------------------------------------------------------------------------------------------


def test_states_are_answered_from_memory_for_equal_prompts_only() -> None:
    outside, _ = states_of(lm(), prompts(), [R1, HEAD])
    with shared_work(lm()) as shared:
        with lm().metered() as first:
            states_of(lm(), prompts(), [R1])
        with lm().metered() as second:
            states, seconds = states_of(lm(), prompts(), [HEAD, R1])
        assert (second.tokens, second.passes, shared.saved) == (first.tokens, 0, first.tokens)
        assert first.tokens == by_hand(prompts())
        assert set(states) == {R1, HEAD}
        assert all(torch.equal(states[site], outside[site]) for site in states)
        assert seconds > 0
        for other in (prompts()[:3], prompts()[::-1], prompts(shown=True)):
            with lm().metered() as meter:
                found, seconds = states_of(lm(), other, [R1])
            assert meter.passes > 0
            assert seconds == 0
            assert len(found[R1]) == len(other)
        assert shared.saved == first.tokens


def test_a_site_nobody_foresaw_is_computed_and_then_known() -> None:
    attn = Site("attn", 1)
    outside, _ = states_of(lm(), prompts(), [attn])
    with shared_work(lm()) as shared:
        states_of(lm(), prompts(), [R1])
        with lm().metered() as meter:
            found, _ = states_of(lm(), prompts(), [attn])
        assert meter.passes > 0
        assert shared.saved == 0
        assert torch.equal(found[attn], outside[attn])
        with lm().metered() as meter:
            again, _ = states_of(lm(), prompts(), [attn, R2])
        assert meter.passes == 0
        assert torch.equal(again[attn], outside[attn])


def test_prompts_of_embeddings_are_not_mistaken_for_each_other() -> None:
    width = lm().width(R1)
    points = [Encoded(embeds=tiny.random_vector(3 * width, seed).reshape(3, width)) for seed in range(2)]
    outside = [states_of(lm(), [point], [R1])[0][R1] for point in points]
    assert not torch.equal(*outside)
    with shared_work(lm()) as shared:
        for point, expected in [*zip(points, outside, strict=True)] * 2:
            assert torch.equal(states_of(lm(), [point], [R1])[0][R1], expected)
            engine_of(lm(), [point], [2])
        assert (shared.states, shared.engines, shared.saved) == ({}, {}, 0)


# --- engines ----------------------------------------------------------------------------------------------------------


def asked(engine: Packed | Plain) -> Tensor:
    ask = Ask(keep=lambda _, row: row, states=(R1,))
    return engine.answer([Trial(i) for i in range(len(engine.prompts))], ask).kept


def test_an_engine_is_kept_for_equal_prompts_and_starts_only() -> None:
    some = prompts(shown=True)
    starts = [len(p) - 1 for p in some]
    outside = asked(engine_of(lm(), some, starts))
    with shared_work(lm()) as shared:
        with lm().metered() as first:
            engine = engine_of(lm(), some, starts)
            assert torch.equal(asked(engine), outside)
        with lm().metered() as second:
            assert engine_of(lm(), some, starts) is engine
            assert torch.equal(asked(engine), outside)
        once = by_hand(some) - len(some)  # all but each prompt's last token
        assert first.tokens == second.tokens == by_hand(some)
        assert shared.saved == once
        others = [engine_of(lm(), some, [s - 1 for s in starts]), engine_of(lm(), some[:2], starts[:2])]
        assert all(other is not engine for other in others)
        assert shared.saved == once


def test_an_engine_that_was_never_asked_is_charged_once() -> None:
    """A method that stops before its first pass leaves no bill for the next one."""
    some = prompts(shown=True)
    starts = [len(p) - 1 for p in some]
    with shared_work(lm()) as shared:
        engine_of(lm(), some, starts)
        with computed() as passes, lm().metered() as meter:
            asked(engine_of(lm(), some, starts))
    assert sum(passes) == meter.tokens - shared.saved
    assert meter.tokens == by_hand(some)


def test_the_engines_used_last_are_held() -> None:
    groups = [prompts([text, "ba"]) for text in ("du", "li", "ke", "mo")]
    assert len(groups) == KEPT + 1
    with shared_work(lm()) as shared:
        a, b, c = (engine_of(lm(), some, [1, 1]) for some in groups[:3])
        assert engine_of(lm(), groups[0], [1, 1]) is a
        d = engine_of(lm(), groups[3], [1, 1])
        assert len(shared.engines) == KEPT
        assert engine_of(lm(), groups[2], [1, 1]) is c
        assert engine_of(lm(), groups[0], [1, 1]) is a
        assert engine_of(lm(), groups[3], [1, 1]) is d
        assert engine_of(lm(), groups[1], [1, 1]) is not b


# --- where it must not be seen ----------------------------------------------------------------------------------------


def test_an_adapted_model_neither_reads_nor_writes_it() -> None:
    outside = observe(lm(), task().test, adapter())
    bare = observe(lm(), task().test)
    assert not torch.equal(outside.logits, bare.logits)
    with shared_work(lm()) as shared:
        for condition, seen in ((None, bare), (adapter(), outside), (None, bare), (adapter(), outside)):
            found = observe(lm(), task().test, condition)
            assert torch.equal(found.logits, seen.logits)
            assert found.texts == seen.texts
        states_of(lm(), prompts(), [R1])
        before = {name: len(getattr(shared, name)) for name in ("states", "engines")}
        with adapter().applied(lm()):
            assert "shared" not in lm().proofs
            changed, _ = states_of(lm(), prompts(), [R1])
        assert {name: len(getattr(shared, name)) for name in before} == before
        assert lm().proofs["shared"] is shared
        known, _ = states_of(lm(), prompts(), [R1])
        assert not torch.equal(changed[R1], known[R1])
    assert torch.equal(known[R1], states_of(lm(), prompts(), [R1])[0][R1])


def test_lora_fitted_inside_is_lora_fitted_outside() -> None:
    with shared_work(lm()):
        observe(lm(), task().dev)
        inside = RIVAL.fit(lm(), task().train, task().dev)
    assert inside.weights.keys() == adapter().weights.keys()
    assert all(torch.equal(inside.weights[name], weight) for name, weight in adapter().weights.items())
    assert inside.origin.cost.tokens == adapter().origin.cost.tokens
    assert inside.origin.found == adapter().origin.found


def test_it_is_forgotten_afterwards() -> None:
    before = dict(lm().proofs)
    with shared_work(lm()) as shared:
        fit("linear")
        assert lm().proofs["shared"] is shared
    assert "shared" not in lm().proofs
    assert lm().proofs.keys() >= before.keys()
    with computed() as passes:
        same(fit("linear"), alone("linear"))
    assert passes
    with shared_work(lm()) as another:
        assert (another.states, another.engines, another.saved) == ({}, {}, 0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_it_is_forgotten_after_an_error(error: type[BaseException]) -> None:
    def stop() -> None:
        with shared_work(lm()):
            fit("linear")
            raise error

    with pytest.raises(error):
        stop()
    assert "shared" not in lm().proofs


def test_one_inside_another_ends_with_nothing_left() -> None:
    with shared_work(lm()):
        fit("linear")
        with shared_work(lm()):
            same(fit("linear"), alone("linear"))
        same(fit("linear"), alone("linear"))
    assert "shared" not in lm().proofs


def test_another_model_knows_nothing_of_it() -> None:
    other = tiny.tiny_lm("llama")
    with shared_work(lm()):
        assert "shared" not in other.proofs
