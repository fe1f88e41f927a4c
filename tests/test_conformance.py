"""Every method on every family keeps the same promises: `check_*(method, lm)`, each on one cached fit."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from taskvec.errors import InputError
from taskvec.hooks import capture, inject
from taskvec.lm import LM, Encoded
from taskvec.methods import METHODS, Method
from taskvec.methods.hendel import HendelTaskVector
from taskvec.methods.learned import LearnedTaskVector
from taskvec.methods.linear import LinearTaskVector
from taskvec.methods.mean_difference import MeanDifference
from taskvec.methods.prompted import FewShot, ZeroShot
from taskvec.replay import Packed, packs, replay
from taskvec.sites import Site
from taskvec.tasks import Task
from taskvec.vector import Origin, TaskVector
from tests import tiny

PROMPTED: tuple[Method, ...] = (ZeroShot(), FewShot())
EDITING: tuple[Method, ...] = (
    HendelTaskVector(n_dev=3),
    MeanDifference(queries=5, n_dev=3),
    LinearTaskVector(queries=8),
    LearnedTaskVector(steps=3, batch=4, queries=8, check=1, sweep=2, n_dev=3),
)
COSTS = {  # gold labels and unlabelled queries read: 3 demonstrations, 3 dev items, the queries
    "zero-shot": (0, 0),
    "few-shot": (3, 0),
    "hendel": (3 + 3, 2),
    "mean-difference": (3 + 3, 5),
    "linear": (3, 8),
    "learned": (3 + 3 + 8, 0),
}
SEED = 1


@cache
def task() -> Task:
    """Sixty examples, three shots."""
    return tiny.tiny_task(shots=3)


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted vector, and what the fit found and left behind."""

    vector: TaskVector
    before: "Surroundings"
    after: "Surroundings"


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


def fit(method: Method, lm: LM, seed: int = SEED) -> TaskVector:
    vector = method.fit(lm, task().train, task().dev, seed=seed)
    assert isinstance(vector, TaskVector)
    return vector


_FITS: dict[tuple[str, str], Fit] = {}


def fitted(method: Method, lm: LM) -> Fit:
    """The one fit that most checks look at."""
    key = method.name, lm.id
    if key not in _FITS:
        with partly_trainable(lm):
            before = Surroundings.of(lm)
            vector = fit(method, lm)
            _FITS[key] = Fit(vector, before, Surroundings.of(lm))
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


def origin_of(vector: TaskVector) -> Origin:
    assert vector.origin is not None
    return vector.origin


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
    assert not any(tensor.requires_grad for tensor in found.vector.tensors().values())


# --- seeds ------------------------------------------------------------------------------------------------------------


def check_same_seed_same_bits(method: Method, lm: LM) -> None:
    """Also where gradients are off and the global generators stand elsewhere."""
    first = fitted(method, lm).vector
    numpy_state = np.random.get_state()
    with torch.no_grad(), tiny.seeded(4321):
        np.random.seed(4321)
        second = fit(method, lm)
    np.random.set_state(numpy_state)
    assert [(e.site, e.where, e.strength) for e in first.edits] == [(e.site, e.where, e.strength) for e in second.edits]
    assert first.tensors().keys() == second.tensors().keys()
    assert all(torch.equal(second.tensors()[name], tensor) for name, tensor in first.tensors().items())
    one, two = origin_of(first), origin_of(second)
    cost = two.cost.model_copy(update={"seconds": one.cost.seconds})
    assert one == two.model_copy(update={"cost": cost})


def check_another_seed_other_demonstrations(method: Method, lm: LM) -> None:
    one, other = origin_of(fitted(method, lm).vector), origin_of(fit(method, lm, seed=SEED + 1))
    assert set(one.demos) != set(other.demos)
    assert (one.seed, other.seed) == (SEED, SEED + 1)
    assert one.data_hash == other.data_hash


# --- the origin and the folder ----------------------------------------------------------------------------------------


def check_origin_complete(method: Method, lm: LM) -> None:
    vector = fitted(method, lm).vector
    origin, spec = origin_of(vector), task().spec
    assert origin.method == method.name
    assert METHODS[method.name].endswith(f":{type(method).__name__}")
    assert origin.hyperparameters == json.loads(json.dumps(asdict(method)))  # type: ignore[call-overload]
    assert (origin.model.id, origin.model.fingerprint) == (lm.id, lm.fingerprint)
    assert origin.tokenizer_hash == lm.tokenizer_hash != ""
    assert origin.format.format() == spec.format
    assert (origin.task, origin.data_hash, origin.n_test, origin.labels) == ("tiny", spec.data_hash, 12, None)
    assert origin.demos == task().train.demonstrations(seed=SEED)
    assert len(origin.demos) == 3
    assert origin.prompt == ("few-shot" if isinstance(method, FewShot) else "zero-shot")
    assert set(origin.versions) == {"taskvec", "torch", "transformers"}
    assert origin.max_new_tokens >= 4
    assert type(origin).model_validate_json(origin.model_dump_json()) == origin


def check_cost_counted(method: Method, lm: LM) -> None:
    """Tokens by a count of our own: whatever the model itself is called with during a fit."""
    seen: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["input_ids"]).numel())

    expected = origin_of(fitted(method, lm).vector).cost
    handle = lm.model.register_forward_pre_hook(count, with_kwargs=True)
    cost = origin_of(fit(method, lm)).cost
    handle.remove()
    assert cost.tokens == expected.tokens == sum(seen)
    assert cost.seconds > 0
    assert (cost.labels, cost.queries) == COSTS[method.name]
    assert (cost.tokens > 0) == (method in EDITING)


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
    train, dev = task().train, task().dev
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


@torch.no_grad()
def check_only_declared_sites_and_tokens_change(method: Method, lm: LM) -> None:
    """Bit for bit: everything at earlier tokens, and everything at the edited token before the edit."""
    vector = fitted(method, lm).vector
    batch = lm.batch([prompts(lm)[1]])
    every = [Site("embed"), *(Site("resid", layer) for layer in range(lm.n_layers)), Site("lm_head_in")]
    with capture(lm, every) as clean:
        logits = lm.forward(batch)
    with inject(lm, vector), capture(lm, every) as edited:
        moved = lm.forward(batch)
    assert torch.equal(moved[:, :-1], logits[:, :-1])
    assert not torch.equal(moved[:, -1], logits[:, -1])
    first = min(every.index(site) for site in vector.sites)
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
    finally:
        lm.proofs["packed"] = None
    assert plain.sites == vector.sites
    for name, tensor in vector.tensors().items():
        scale = max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(plain.tensors()[name], tensor, atol=1e-4 * scale, rtol=0)
    assert origin_of(plain).cost.tokens > origin_of(vector).cost.tokens


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
    check_exact_save_and_load,
    check_several_tasks_refused,
    check_test_split_refused,
)
VECTOR: tuple[Check, ...] = (
    check_vector_moves_the_logits,
    check_batch_size_and_padding_side_do_not_matter,
    check_only_declared_sites_and_tokens_change,
    check_strength_zero_is_no_injection,
    check_plain_engine_gives_the_same_vector,
)
CASES = [
    *((method, check) for method in PROMPTED for check in ANY_METHOD),
    *((method, check) for method in EDITING for check in (*ANY_METHOD, *VECTOR)),
]


@pytest.mark.parametrize("family", tiny.MAIN)
@pytest.mark.parametrize(
    ("method", "check"), CASES, ids=[f"{m.name}-{c.__name__.removeprefix('check_')}" for m, c in CASES]
)
def test_conformance(method: Method, check: Check, family: str) -> None:
    check(method, tiny.tiny_lm(family))


def test_conformance_covers_every_built_in_method() -> None:
    assert {method.name for method in (*PROMPTED, *EDITING)} == set(METHODS)
    assert set(tiny.MAIN) <= set(tiny.PACKED)
