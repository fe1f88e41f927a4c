"""Every method on every family keeps the same promises: `check_*(method, lm)`, each on one cached fit."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from taskvec import methods
from taskvec.errors import InputError
from taskvec.evaluate import Condition, observe
from taskvec.evaluate.adapters import PeftAdapter
from taskvec.evaluate.expansion import AdaptiveVectors
from taskvec.hooks import capture, inject
from taskvec.lm import LM, Encoded
from taskvec.methods import METHODS, Method
from taskvec.methods.adaptive import AdaptiveTaskVector
from taskvec.methods.adaptive_ridge import AdaptiveRidge
from taskvec.methods.calibration import Calibrated, Calibration
from taskvec.methods.elicit import Elicit, ElicitLibrary
from taskvec.methods.function_vector import FunctionVector
from taskvec.methods.hendel import HendelTaskVector
from taskvec.methods.i2cl import I2CL
from taskvec.methods.icv import InContextVector
from taskvec.methods.learnable import LearnableTaskVector
from taskvec.methods.learned import LearnedTaskVector
from taskvec.methods.linear import LinearTaskVector
from taskvec.methods.linear_probe import LinearProbe, Probe
from taskvec.methods.lora import LoRA
from taskvec.methods.mean_difference import MeanDifference
from taskvec.methods.prefix_tuning import PrefixTuning
from taskvec.methods.prompt_tuning import PromptTuning
from taskvec.methods.prompted import FewShot, ZeroShot
from taskvec.methods.state_vector import StateVector
from taskvec.replay import Packed, packs, replay
from taskvec.sites import Site
from taskvec.tasks import Task
from taskvec.vector import Adapted, Origin, TaskVector, VectorSource
from tests import tiny

PROMPTED: tuple[Method, ...] = (ZeroShot(), FewShot())
EDITING: tuple[Method, ...] = (
    HendelTaskVector(n_dev=3),
    MeanDifference(queries=5, n_dev=3),
    LinearTaskVector(queries=8),
    LearnedTaskVector(steps=3, batch=4, queries=8, check=1, sweep=2, n_dev=3),
    FunctionVector(heads=2, prompts=4, trials=2, n_dev=3),
    LearnableTaskVector(prompts=3, trials=3, steps=2, batch=2, check=1, n_dev=3),
    StateVector(draws=2, n_dev=3),
    I2CL(epochs=2),
    InContextVector(),
)
SOURCES: tuple[Method, ...] = (
    Elicit(others=(), prompts=2, n_dev=3, retriever="dense"),
    AdaptiveTaskVector(rows=6, epochs=2, batch=3, n_dev=3),
    AdaptiveRidge(queries=6),
)
BOUNDED: dict[str, Any] = {"steps": 2, "batch": 2, "queries": 4, "check": 1, "n_dev": 3}
ADAPTING: tuple[Method, ...] = (
    LoRA(**BOUNDED),
    PrefixTuning(length=2, **BOUNDED),
    PromptTuning(length=2, **BOUNDED),
)
PREDICTING: tuple[Method, ...] = (LinearProbe(queries=9, folds=2), Calibration())
COSTS: dict[str, tuple[int | None, int | None]] = {  # gold labels and unlabelled queries read: 3 shots, 3 dev items
    "zero-shot": (0, 0),
    "few-shot": (3, 0),
    "hendel": (3 + 3, 2),
    "mean-difference": (3 + 3, 5),
    "linear": (3, 8),
    "learned": (3 + 8, 0),
    "function-vector": (None, None),  # distinct train items of random prompts: a count of its own in its own tests
    "learnable": (None, None),
    "state-vector": (3 + 3, 2),
    "i2cl": (3, 0),
    "icv": (3, 0),
    "elicit": (None, None),
    "adaptive": (6 + 3, 0),
    "adaptive-ridge": (3, 6),
    "lora": (4 + 3, 0),
    "prefix-tuning": (4 + 3, 0),
    "prompt-tuning": (4 + 3, 0),
    "linear-probe": (9, 0),
    "calibration": (0, 0),
}
SEED = 1


@cache
def task(labels: bool = False) -> Task:
    """Sixty examples, three shots."""
    return tiny.tiny_task(shots=3, labels=labels)


def task_of(method: Method) -> Task:
    """The open task, or the one with labels for methods that need some."""
    return task(method in PREDICTING)


@dataclass(frozen=True, eq=False)
class Fit:
    """What was fitted, and what the fit found and left behind."""

    condition: Condition
    before: "Surroundings"
    after: "Surroundings"

    @property
    def vector(self) -> TaskVector:
        assert isinstance(self.condition, TaskVector)
        return self.condition


@dataclass(frozen=True, eq=False)
class Surroundings:
    """Everything outside a fit that it must leave alone."""

    weights: dict[str, Tensor]
    hooks: int
    trainable: tuple[bool, ...]
    gradients: tuple[bool, ...]
    training: bool
    torch_state: Tensor
    numpy_state: tuple[Any, ...]
    grad_enabled: bool

    @classmethod
    def of(cls, lm: LM) -> "Surroundings":
        model = lm.model
        return cls(
            tiny.weights_of(model),
            tiny.count_hooks(model),
            tuple(p.requires_grad for p in model.parameters()),
            tuple(p.grad is not None for p in model.parameters()),
            model.training,
            torch.get_rng_state(),
            np.random.get_state(legacy=True),  # type: ignore[arg-type]
            torch.is_grad_enabled(),
        )


@contextmanager
def partly_trainable(lm: LM) -> Iterator[None]:
    """Every other weight has requires_grad inside, so that neither all-on nor all-off passes for restored."""
    before = [p.requires_grad for p in lm.model.parameters()]
    for i, p in enumerate(lm.model.parameters()):
        p.requires_grad = i % 2 == 0
    try:
        yield
    finally:
        for p, flag in zip(lm.model.parameters(), before, strict=True):
            p.requires_grad = flag


def fit(method: Method, lm: LM, seed: int = SEED) -> Condition:
    return method.fit(lm, task_of(method).train, task_of(method).dev, seed=seed)


def numbers_of(condition: Condition) -> dict[str, Tensor]:
    """Every tensor that a fit made."""
    if isinstance(condition, TaskVector):
        return condition.tensors()
    if isinstance(condition, ElicitLibrary):
        return {f"{i} {k}": t for i, e in enumerate(condition.entries) for k, t in e.tensors().items()}
    if isinstance(condition, AdaptiveVectors):
        return condition.expansion.tensors()
    if isinstance(condition, PeftAdapter):
        return dict(condition.weights)
    if isinstance(condition, Probe):
        return {"weight": condition.weight, "bias": condition.bias}
    assert isinstance(condition, Calibrated)
    return {"prior": condition.prior}


_FITS: dict[tuple[str, str], Fit] = {}


def fitted(method: Method, lm: LM) -> Fit:
    """The one fit that most checks look at."""
    key = method.name, lm.id
    if key not in _FITS:
        with partly_trainable(lm):
            before = Surroundings.of(lm)
            condition = fit(method, lm)
            _FITS[key] = Fit(condition, before, Surroundings.of(lm))
    return _FITS[key]


@cache
def prompts(lm: LM) -> tuple[Encoded, ...]:
    """Zero-shot prompts of different lengths."""
    format = task().spec.format
    return tuple(lm.encode(format.prompt(query)) for query in ("red7", "film 12 walk3", "q1"))


@torch.no_grad()
def last_logits(lm: LM, vector: TaskVector | None, rows: Sequence[Encoded], side: Any = "right") -> Tensor:
    """Logits at the last prompt token of each row, the plain way."""
    batch = lm.batch(rows, side=side)
    with inject(lm, [vector] * len(rows)):
        logits = lm.forward(batch)
    return logits[torch.arange(len(rows)), batch.last]


def origin_of(condition: Condition) -> Origin:
    assert condition is not None
    assert condition.origin is not None
    return condition.origin


# --- what a fit leaves behind -----------------------------------------------------------------------------------------


def check_weights_unchanged(method: Method, lm: LM) -> None:
    found = fitted(method, lm)
    assert found.before.weights.keys() == found.after.weights.keys()
    assert all(torch.equal(found.after.weights[name], w) for name, w in found.before.weights.items())


def check_no_hooks_left(method: Method, lm: LM) -> None:
    found = fitted(method, lm)
    assert found.before.hooks == found.after.hooks  # transformers leaves its own where hidden states were asked for


def check_random_state_unchanged(method: Method, lm: LM) -> None:
    # Python's own generator is not compared: beartype draws from it
    found = fitted(method, lm)
    assert torch.equal(found.before.torch_state, found.after.torch_state)
    for before, after in zip(found.before.numpy_state, found.after.numpy_state, strict=True):
        assert np.array_equal(before, after)


def check_gradients_left_as_they_were(method: Method, lm: LM) -> None:
    found = fitted(method, lm)
    assert True in found.before.trainable
    assert False in found.before.trainable
    assert found.after.trainable == found.before.trainable
    assert not any(found.after.gradients)
    assert (found.after.training, found.after.grad_enabled) == (False, True)
    assert not any(tensor.requires_grad for tensor in numbers_of(found.condition).values())


# --- seeds ------------------------------------------------------------------------------------------------------------


def check_same_seed_same_bits(method: Method, lm: LM) -> None:
    """Also where gradients are off and the global generators stand elsewhere."""
    first = fitted(method, lm).condition
    numpy_state = np.random.get_state()
    with torch.no_grad(), tiny.seeded(4321):
        np.random.seed(4321)
        second = fit(method, lm)
    np.random.set_state(numpy_state)
    if isinstance(first, TaskVector) and isinstance(second, TaskVector):
        one_way, other_way = ([(e.site, e.where, e.strength) for e in v.edits] for v in (first, second))
        assert one_way == other_way
    assert numbers_of(first).keys() == numbers_of(second).keys()
    assert all(torch.equal(numbers_of(second)[name], tensor) for name, tensor in numbers_of(first).items())
    one, two = origin_of(first), origin_of(second)
    cost = two.cost.model_copy(update={"seconds": one.cost.seconds})
    assert one == two.model_copy(update={"cost": cost})


def check_another_seed_other_demonstrations(method: Method, lm: LM) -> None:
    one, other = origin_of(fitted(method, lm).condition), origin_of(fit(method, lm, seed=SEED + 1))
    assert set(one.demos) != set(other.demos)
    assert (one.seed, other.seed) == (SEED, SEED + 1)
    assert one.data_hash == other.data_hash


# --- the origin and the folder ----------------------------------------------------------------------------------------


def check_origin_complete(method: Method, lm: LM) -> None:
    task = task_of(method)
    origin, spec = origin_of(fitted(method, lm).condition), task.spec
    assert origin.method == method.name
    assert METHODS[method.name].endswith(f":{type(method).__name__}")
    assert origin.hyperparameters == json.loads(json.dumps(asdict(method)))  # type: ignore[call-overload]
    assert (origin.model.id, origin.model.fingerprint) == (lm.id, lm.fingerprint)
    assert origin.tokenizer_hash == lm.tokenizer_hash != ""
    assert origin.format.format() == spec.format
    assert (origin.task, origin.data_hash, origin.n_test, origin.labels) == ("tiny", spec.data_hash, 12, spec.labels)
    assert origin.demos == task.train.demonstrations(seed=SEED)
    assert len(origin.demos) == 3
    assert origin.prompt == ("few-shot" if isinstance(method, FewShot) else "zero-shot")
    assert set(origin.versions) == {"taskvec", "torch", "transformers"}
    assert origin.max_new_tokens >= 4
    assert type(origin).model_validate_json(origin.model_dump_json()) == origin


def check_cost_counted(method: Method, lm: LM) -> None:
    """Tokens by a count of our own: whatever the model itself is called with during a fit."""
    seen: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        seen.append((ids if ids is not None else kwargs["inputs_embeds"][..., 0]).numel())

    expected = origin_of(fitted(method, lm).condition).cost
    handle = lm.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        cost = origin_of(fit(method, lm)).cost
    finally:
        handle.remove()
    assert cost.tokens == expected.tokens == sum(seen)
    assert cost.seconds > 0
    labels, queries = COSTS[method.name]
    assert cost.queries == queries if queries is not None else 0 < cost.queries <= 4
    assert cost.labels == labels if labels is not None else 3 < cost.labels <= len(task().train) + 3
    assert (cost.tokens > 0) == (method not in PROMPTED)


def check_exact_save_and_load(method: Method, lm: LM) -> None:
    vector = fitted(method, lm).vector
    with tempfile.TemporaryDirectory() as folder:
        vector.save_pretrained(Path(folder) / "v")
        loaded = TaskVector.from_pretrained(Path(folder) / "v")
    assert loaded.origin == vector.origin
    assert loaded.sites == vector.sites
    assert torch.equal(last_logits(lm, loaded, prompts(lm)), last_logits(lm, vector, prompts(lm)))


# --- bad use ----------------------------------------------------------------------------------------------------------


def check_several_tasks_refused(method: Method, lm: LM) -> None:
    train, dev = task_of(method).train, task_of(method).dev
    for trains, devs in (([train, train], [dev, dev]), ([train], [dev, dev]), ([], [])):
        with pytest.raises(InputError, match="wanted one task"):
            method.fit(lm, trains, devs)


def check_test_split_refused(method: Method, lm: LM) -> None:
    hooks = tiny.count_hooks(lm.model)
    with pytest.raises(TypeCheckError):
        method.fit(lm, task().test, task().dev)  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        method.fit(lm, task().train, task().test)  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        method.fit(lm, [task().test], [task().dev])  # type: ignore[list-item]
    assert tiny.count_hooks(lm.model) == hooks


# --- what the vector does ---------------------------------------------------------------------------------------------


def check_vector_moves_the_logits(method: Method, lm: LM) -> None:
    vector = fitted(method, lm).vector
    moved = last_logits(lm, vector, prompts(lm)) - last_logits(lm, None, prompts(lm))
    assert moved.isfinite().all()
    assert (moved.abs().amax(-1) > 1e-3).all()


def check_batch_size_and_padding_side_do_not_matter(method: Method, lm: LM) -> None:
    vector = fitted(method, lm).vector
    alone = torch.cat([last_logits(lm, vector, [prompt]) for prompt in prompts(lm)])
    assert len({len(prompt) for prompt in prompts(lm)}) > 1
    for side in ("left", "right"):
        torch.testing.assert_close(last_logits(lm, vector, prompts(lm), side), alone, atol=1e-4, rtol=0)


def _behind(site: Site) -> Site:
    """The first residual site that an edit at `site` can change."""
    return site if site.layer is None else Site("resid", site.layer)


@torch.no_grad()
def check_only_declared_sites_and_tokens_change(method: Method, lm: LM) -> None:
    """Bit for bit: everything at earlier tokens, and everything at the edited token before the edit."""
    vector = fitted(method, lm).vector
    if {str(edit.where) for edit in vector.edits} != {"last_prompt"}:
        assert {str(edit.where) for edit in vector.edits} == {"all"}  # no token is left alone: nothing to compare
        return
    batch = lm.batch([prompts(lm)[1]])
    every = [Site("embed"), *(Site("resid", layer) for layer in range(lm.n_layers)), Site("lm_head_in")]
    with capture(lm, every) as clean:
        logits = lm.forward(batch)
    with inject(lm, vector), capture(lm, every) as edited:
        moved = lm.forward(batch)
    assert torch.equal(moved[:, :-1], logits[:, :-1])
    assert not torch.equal(moved[:, -1], logits[:, -1])
    first = min(every.index(_behind(site)) for site in vector.sites)
    for place, site in enumerate(every):
        assert torch.equal(edited[site][:, :-1], clean[site][:, :-1])
        assert torch.equal(edited[site][:, -1], clean[site][:, -1]) == (place < first)


def check_strength_zero_is_no_injection(method: Method, lm: LM) -> None:
    vector = fitted(method, lm).vector.scaled(0.0)
    assert len(vector.edits) > 0
    assert torch.equal(last_logits(lm, vector, prompts(lm)), last_logits(lm, None, prompts(lm)))


def check_plain_engine_gives_the_same_vector(method: Method, lm: LM) -> None:
    vector = fitted(method, lm).vector
    assert packs(lm) is None
    assert isinstance(replay(lm, prompts(lm)), Packed)
    lm.proofs["packed"] = "switched off by a test"
    try:
        plain = fit(method, lm)
        assert isinstance(plain, TaskVector)
    finally:
        lm.proofs["packed"] = None
    assert plain.sites == vector.sites
    for name, tensor in vector.tensors().items():
        scale = max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(plain.tensors()[name], tensor, atol=1e-4 * scale, rtol=0)
    for one, other in zip(vector.edits, plain.edits, strict=True):
        assert one.op.numbers() == pytest.approx(other.op.numbers(), abs=1e-4)
    assert origin_of(plain).cost.tokens > origin_of(vector).cost.tokens


# --- what sources, adapted models and predictors do -------------------------------------------------------------------


def check_source_writes_for_every_prompt(method: Method, lm: LM) -> None:
    source = fitted(method, lm).condition
    assert isinstance(source, VectorSource)
    alone = [source.vectors(lm, [prompt])[0] for prompt in prompts(lm)]
    together = source.vectors(lm, prompts(lm))
    assert [v is None for v in alone] == [v is None for v in together]
    for one, other in zip(alone, together, strict=True):
        if one is None or other is None:
            continue
        for name, tensor in one.tensors().items():
            torch.testing.assert_close(other.tensors()[name], tensor, atol=1e-4, rtol=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        assert isinstance(source, ElicitLibrary | AdaptiveVectors)
        source.save_pretrained(Path(folder) / "v")
        loaded = methods.load(Path(folder) / "v")
    assert loaded.origin == source.origin
    batch = lm.batch(prompts(lm))
    with torch.no_grad():
        with inject(lm, source):
            saved = lm.forward(batch)
        with inject(lm, loaded):
            assert torch.equal(lm.forward(batch), saved)


def check_adapted_only_inside(method: Method, lm: LM) -> None:
    adapter = fitted(method, lm).condition
    assert isinstance(adapter, Adapted)
    before, clean = Surroundings.of(lm), last_logits(lm, None, prompts(lm))
    with adapter.applied(lm):
        moved = last_logits(lm, None, prompts(lm))
    after = Surroundings.of(lm)
    assert not torch.allclose(moved, clean, atol=1e-5)
    assert torch.equal(last_logits(lm, None, prompts(lm)), clean)
    assert (before.hooks, before.trainable, before.gradients) == (after.hooks, after.trainable, after.gradients)
    assert before.weights.keys() == after.weights.keys()
    assert all(torch.equal(after.weights[name], w) for name, w in before.weights.items())
    assert torch.equal(before.torch_state, after.torch_state)


def check_scored_alike_packed_and_plain(method: Method, lm: LM) -> None:
    condition, split = fitted(method, lm).condition, task_of(method).dev
    packed = observe(lm, split, condition)
    with mock.patch("taskvec.replay.run._why_not", return_value="switched off by a test"):
        lm.proofs["packed"] = "switched off by a test"
        try:
            plain = observe(lm, split, condition)
        finally:
            lm.proofs["packed"] = None
    torch.testing.assert_close(packed.logits, plain.logits, atol=2e-4, rtol=1e-4)
    assert packed.texts == plain.texts


def check_free_text_refused(method: Method, lm: LM) -> None:
    with lm.metered() as meter, pytest.raises(InputError, match="a task with labels"):
        method.fit(lm, task().train, task().dev)
    assert meter.tokens == 0


Check = Callable[[Method, LM], None]
ANY_METHOD: tuple[Check, ...] = (
    check_weights_unchanged,
    check_no_hooks_left,
    check_random_state_unchanged,
    check_gradients_left_as_they_were,
    check_same_seed_same_bits,
    check_another_seed_other_demonstrations,
    check_origin_complete,
    check_cost_counted,
    check_test_split_refused,
)
VECTOR: tuple[Check, ...] = (
    check_several_tasks_refused,
    check_exact_save_and_load,
    check_vector_moves_the_logits,
    check_batch_size_and_padding_side_do_not_matter,
    check_only_declared_sites_and_tokens_change,
    check_strength_zero_is_no_injection,
    check_plain_engine_gives_the_same_vector,
)
SCORED: Check = check_scored_alike_packed_and_plain
CASES = [
    *((method, check) for method in PROMPTED for check in (*ANY_METHOD, *VECTOR[:2])),
    *((method, check) for method in EDITING for check in (*ANY_METHOD, *VECTOR)),
    *((m, c) for m in SOURCES for c in (*ANY_METHOD, check_source_writes_for_every_prompt, SCORED)),
    *((m, c) for m in ADAPTING for c in (*ANY_METHOD, check_adapted_only_inside, SCORED)),
    *((m, c) for m in PREDICTING for c in (*ANY_METHOD, check_several_tasks_refused, check_free_text_refused, SCORED)),
]


@pytest.mark.parametrize("family", tiny.MAIN)
@pytest.mark.parametrize(
    ("method", "check"), CASES, ids=[f"{m.name}-{c.__name__.removeprefix('check_')}" for m, c in CASES]
)
def test_conformance(method: Method, check: Check, family: str) -> None:
    check(method, tiny.tiny_lm(family))


def test_conformance_covers_every_built_in_method() -> None:
    every = (*PROMPTED, *EDITING, *SOURCES, *ADAPTING, *PREDICTING)
    assert {method.name for method in every} == set(METHODS)
    assert set(tiny.MAIN) <= set(tiny.PACKED)
