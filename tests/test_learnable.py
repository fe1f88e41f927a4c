"""The learnable task vector against plain loops: its three bases in closed form, autograd and Adam on whole prompts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from taskvec.errors import InputError
from taskvec.evaluate import Lessons, observe
from taskvec.evaluate.drawing import Drawn, draw
from taskvec.hooks import inject
from taskvec.lm import LM
from taskvec.methods.learnable import Form, LearnableTaskVector, added, basis, layer_vectors
from taskvec.sites import Site
from taskvec.tasks import answer_nll
from taskvec.vector import Add, TaskVector, Where
from tests.reference import answer, both_families, exact_lm, ids, label_task, open_task, plus, prompt, run
from tests.test_function_vector import attend, bias, close, every_shape, plain_means, slot, tokens_of, weight

RELEASED: tuple[Form, ...] = ("released-text", "released-regression")
SMALL: dict[str, Any] = {"prompts": 4, "trials": 4, "batch": 99, "n_dev": 3}


# --- the reference ----------------------------------------------------------------------------------------------------


def plain_basis(model: Any, means: Sequence[Tensor]) -> Tensor:
    """(L, J, d): W_O[:, slot j] abar_lj."""
    heads = range(model.config.num_attention_heads)
    return torch.stack(
        [
            torch.stack([weight(model, layer)[:, slot(model, j)] @ z[slot(model, j)] for j in heads])
            for layer, z in enumerate(means)
        ]
    )


@cache
def drawn_basis(family: str) -> Tensor:
    """The basis of the clean prompts that a SMALL fit draws with seed 0, by the reference."""
    model = exact_lm(family).model
    clean = draw(label_task().train, SMALL["prompts"], seed=0)
    return plain_basis(model, plain_means(model, [tokens_of(one) for one in clean]))


def weighted(phi: Tensor, fixed: Tensor) -> list[Tensor]:
    """v_l = sum over j of w_lj a_lj, one vector a layer."""
    out = []
    for row, vectors in zip(phi, fixed, strict=True):
        total = torch.zeros_like(vectors[0])
        for w, a in zip(row, vectors, strict=True):
            total = total + w * a
        out.append(total)
    return out


def plain_loss(model: Any, lessons: Sequence[Drawn], vectors: Sequence[Tensor], target: str = "first-token") -> Tensor:
    """Mean over prompts of the loss of the answer's first token (or of the whole answer with its terminator), every
    block's output moved at the query token."""
    losses = []
    for one in lessons:
        head, tail = answer(one.query.input, f" {one.query.output}\n", one.demos)
        tail = tail if target == "answer" else tail[:1]
        moves = {layer: plus(len(head) - 1, v) for layer, v in enumerate(vectors)}
        logits = run(model, head + tail[:-1], moves).logits[len(head) - 1 :]
        losses.append(cross_entropy(logits.float(), torch.tensor(tail)))
    return torch.stack(losses).mean()


def bare(lessons: Sequence[Drawn]) -> list[Drawn]:
    return [replace(one, demos=()) for one in lessons]


def fitted(family: str = "llama", seed: int = 0, **settings: Any) -> TaskVector:
    method = LearnableTaskVector(**{**SMALL, **settings})
    return method.fit(exact_lm(family), label_task().train, label_task().dev, seed=seed)


def found_in(vector: TaskVector) -> dict[str, Any]:
    assert vector.origin is not None
    return dict(vector.origin.found)


def phi_of(vector: TaskVector) -> Tensor:
    return torch.tensor(found_in(vector)["phi"])


def rows_of(vector: TaskVector) -> Tensor:
    ops = [edit.op for edit in vector.edits]
    assert all(isinstance(op, Add) for op in ops)
    return torch.stack([op.tensors()["vector"] for op in ops])


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_means(lm: LM, seed: int = 0) -> Tensor:
    """(L, J, w) of no prompt."""
    return gaussian(lm.n_layers, lm.n_heads, weight(lm.model, 0).shape[1] // lm.n_heads, seed=seed)


def descending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain gradient descent in Adam's place: with rate 1 a step is the gradient itself."""
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)


# --- the vector is linear in its weights ------------------------------------------------------------------------------


@every_shape
def test_weights_of_zero_leave_every_bit_as_it_was(family: str) -> None:
    lm = exact_lm(family)
    fixed = basis(lm, random_means(lm))
    batch = lm.batch([prompt(e.input) for e in label_task().dev.examples[:4]])
    with torch.no_grad():
        before = lm.forward(batch)
        with inject(lm, added(layer_vectors(torch.zeros(fixed.shape[:2]), fixed))):
            assert torch.equal(lm.forward(batch), before)
        with inject(lm, added(layer_vectors(torch.ones(fixed.shape[:2]), fixed))):
            assert (lm.forward(batch) - before).abs().max() > 0.1


def test_the_vectors_are_linear_in_the_weights() -> None:
    lm = exact_lm("llama")
    fixed = basis(lm, random_means(lm))
    p, q = (gaussian(3, 4, seed=seed) for seed in (1, 2))
    both = layer_vectors(2.5 * p - 0.5 * q, fixed)
    close(both, 2.5 * layer_vectors(p, fixed) - 0.5 * layer_vectors(q, fixed))
    close(both, torch.stack(weighted(2.5 * p - 0.5 * q, fixed)))
    assert both.shape == (3, 32)


# --- the three bases --------------------------------------------------------------------------------------------------


@every_shape
def test_the_basis_is_what_each_head_writes_and_adds_up_to_the_projection_without_its_bias(family: str) -> None:
    lm = exact_lm(family)
    means = random_means(lm)
    got = basis(lm, means)
    close(got, plain_basis(lm.model, list(means.double().flatten(1))))
    for layer in range(lm.n_layers):
        close(got[layer].sum(0), weight(lm.model, layer) @ means[layer].double().flatten())


@every_shape
def test_weights_of_one_add_the_attention_output_of_a_prompt_minus_the_bias(family: str) -> None:
    lm = exact_lm(family)
    (one,) = draw(label_task().train, 1, seed=0)
    with torch.no_grad():
        seen = attend(lm.model, tokens_of(one))
    vector = fitted(family, prompts=1, trials=1, lr=0.0, steps=1, init=1.0)
    # that fit's weights are its random start: divide them out of its rows by the reference's own basis
    fixed = plain_basis(lm.model, [z[-1] for z in seen.heads])
    close(rows_of(vector), torch.stack(weighted(phi_of(vector).double(), fixed)), atol=1e-4)
    ones = torch.stack(weighted(torch.ones(fixed.shape[:2], dtype=torch.float64), fixed))
    close(ones, torch.stack([seen.written[i][-1] - bias(lm.model, i) for i in range(lm.n_layers)]))


@both_families
def test_the_released_text_form_scales_coordinate_blocks_of_the_summed_output(family: str) -> None:
    lm = exact_lm(family)
    means, phi = random_means(lm), gaussian(3, 4, seed=1).double()
    got = layer_vectors(phi, basis(lm, means, "released-text").double())
    faithful = basis(lm, means).double()
    for layer in range(lm.n_layers):
        output = weight(lm.model, layer) @ means[layer].double().flatten()
        close(got[layer], output * phi[layer].repeat_interleave(32 // 4))
        constant = torch.full((3, 4), float(phi[layer, 0]), dtype=torch.float64)
        same = layer_vectors(constant, basis(lm, means, "released-text").double())
        close(same[layer], layer_vectors(constant, faithful)[layer])
        for head in range(4):
            one_hot = torch.zeros(3, 4, dtype=torch.float64)
            one_hot[layer, head] = 1.0
            there = layer_vectors(one_hot, basis(lm, means, "released-text").double())[layer]
            assert int((there != 0).sum()) <= 8  # a block of coordinates, where a head writes to all 32
            assert (there - layer_vectors(one_hot, faithful)[layer]).norm() > 0.5


@both_families
def test_the_released_regression_form_projects_twice_with_the_bias_each_time(family: str) -> None:
    lm = exact_lm(family)
    means = random_means(lm)
    got = basis(lm, means, "released-regression")
    for layer in range(lm.n_layers):
        w, b = weight(lm.model, layer), bias(lm.model, layer)
        once = w @ means[layer].double().flatten() + b
        close(got[layer].sum(0), w @ once + 4 * b)
        assert b.abs().max() > 0.1  # else it would not matter where the bias is added
        for head in range(4):
            chunk = slice(8 * head, 8 * head + 8)
            close(got[layer, head], w[:, chunk] @ once[chunk] + b)


@pytest.mark.parametrize("form", RELEASED)
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_released_forms_are_refused_where_heads_are_not_as_wide_together_as_the_residual(
    family: str, form: Form
) -> None:
    lm = exact_lm(family)
    widths = rf"{weight(lm.model, 0).shape[1]} and {weight(lm.model, 0).shape[0]}"
    with pytest.raises(InputError, match=widths):
        basis(lm, random_means(lm), form)
    with pytest.raises(InputError, match="use form = heads"), lm.metered() as meter:
        fitted(family, form=form, steps=1)
    assert meter.passes == 0


@pytest.mark.parametrize("form", RELEASED)
def test_a_released_form_is_trained_on_its_own_basis(form: Form) -> None:
    lm = exact_lm("llama")
    means = torch.stack(
        plain_means(lm.model, [tokens_of(one) for one in draw(label_task().train, SMALL["prompts"], seed=0)])
    )
    vector = fitted(form=form, steps=2, lr=0.1)
    fixed = basis(lm, means.float().reshape(3, 4, 8), form).double()
    close(rows_of(vector), torch.stack(weighted(phi_of(vector).double(), fixed)), atol=1e-4)


# --- the injection ----------------------------------------------------------------------------------------------------


@both_families
def test_every_layer_gets_one_edit_and_only_the_query_token_is_touched(family: str) -> None:
    lm = exact_lm(family)
    vector = fitted(family, steps=3, lr=0.1)
    layers = range(lm.n_layers)
    assert [(edit.site, edit.where, edit.strength) for edit in vector.edits] == [
        (Site("resid", layer), Where(), 1.0) for layer in layers
    ]
    (one, *_) = draw(label_task().train, 1, seed=9)
    tokens, rows = tokens_of(one), rows_of(vector)
    with torch.no_grad():
        clean = run(lm.model, tokens)
        moved = run(lm.model, tokens, {layer: plus(len(tokens) - 1, rows[layer]) for layer in layers})
        with inject(lm, vector):
            seen = run(lm.model, tokens)
    for layer in layers:
        assert torch.equal(seen.resid[layer][:-1], clean.resid[layer][:-1])
        assert (seen.resid[layer][-1] - clean.resid[layer][-1]).norm() > 1e-2
        close(seen.resid[layer], moved.resid[layer])  # each block sees what was added before it
    close(seen.logits, moved.logits)


def test_only_as_many_numbers_are_trained_as_there_are_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, trained = exact_lm("llama"), list[int]()
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    kind = torch.optim.Adam

    def watched(parameters: Any, **options: Any) -> torch.optim.Optimizer:
        trained.extend(p.numel() for p in parameters)
        assert options.get("weight_decay", 0.0) == 0.0
        return kind(parameters, **options)

    monkeypatch.setattr(torch.optim, "Adam", watched)
    vector = fitted(steps=3)
    assert trained == [3 * 4]
    assert phi_of(vector).shape == (3, 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())


# --- training ---------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("target", ["first-token", "answer"])
@pytest.mark.parametrize("behind", ["shuffled", "true", "nothing"])
def test_the_first_step_follows_the_gradient_through_whole_prompts(
    family: str, target: str, behind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From weights of 0: after one step of plain descent with rate 1, they are minus the gradient."""
    descending(monkeypatch)
    lm, train = exact_lm(family), label_task().train
    vector = fitted(family, steps=1, lr=1.0, behind=behind, target=target)
    lessons: Sequence[Drawn] = draw(train, SMALL["trials"], seed=0, shuffled=behind == "shuffled")
    lessons = bare(lessons) if behind == "nothing" else lessons
    phi = torch.zeros(lm.n_layers, 4, dtype=torch.float64, requires_grad=True)
    loss = plain_loss(lm.model, lessons, weighted(phi, drawn_basis(family)), target)
    (gradient,) = torch.autograd.grad(loss, phi)
    assert gradient.abs().max() > 1e-2
    torch.testing.assert_close(-phi_of(vector).double(), gradient, atol=2e-5, rtol=1e-4)
    close(rows_of(vector), torch.stack(weighted(-gradient, drawn_basis(family))), atol=1e-3)


@both_families
def test_a_first_step_of_adam_moves_each_weight_by_the_rate_at_most(family: str) -> None:
    for lr in (0.03, 0.3):
        moved = phi_of(fitted(family, steps=1, lr=lr)).abs()
        assert 0 < moved.max() <= lr * (1 + 1e-5)
        # Adam's first step is lr g / (|g| + 1e-8): all but lr where there is any gradient
        assert (moved > 0.99 * lr).float().mean() > 0.9
    start, after = (phi_of(fitted(family, steps=1, lr=lr, init=1.0, seed=4)) for lr in (0.0, 0.05))
    assert 0 < (after - start).abs().max() <= 0.05 * (1 + 1e-4)


def adam(family: str, steps: int, lr: float) -> list[tuple[Tensor, float]]:
    """(weights, dev loss) after 1, 2, ... steps: torch's own Adam on whole prompts, all of them in each step.

    Dev item i stands behind the demonstrations of training prompt i.
    """
    lm, task = exact_lm(family), label_task()
    lessons = draw(task.train, SMALL["trials"], seed=0, shuffled=True)
    looks = [Drawn(e, lessons[i].demos) for i, e in enumerate(task.dev.examples[: SMALL["n_dev"]])]
    phi = torch.zeros(lm.n_layers, 4, requires_grad=True)
    optimizer = torch.optim.Adam([phi], lr=lr)
    out = []
    for _ in range(steps):
        (phi.grad,) = torch.autograd.grad(plain_loss(lm.model, lessons, weighted(phi, drawn_basis(family))), phi)
        optimizer.step()
        with torch.no_grad():
            out.append((phi.detach().clone(), float(plain_loss(lm.model, looks, weighted(phi, drawn_basis(family))))))
    return out


STEPS = 14


@cache
def path(lr: float) -> list[tuple[Tensor, float]]:
    return adam("llama", STEPS, lr)


def stops(losses: Sequence[float], patience: int, *, resets: bool) -> tuple[int, int]:
    """(looks taken, the best of them), where a look without a new lowest loss costs one of `patience`; a gain gives
    all back, or nothing."""
    best, misses = 0, 0
    for k, loss in enumerate(losses):
        if k == 0 or loss < losses[best]:
            best, misses = k, 0 if resets else misses
        else:
            misses += 1
        if misses == patience:
            return k + 1, best
    return len(losses), best


@pytest.mark.parametrize("lr", [0.05, 1.0])
def test_training_is_adam_on_whole_prompts_and_keeps_the_step_best_on_dev(lr: float) -> None:
    losses = [loss for _, loss in path(lr)]
    vector = fitted(steps=STEPS, lr=lr, check=1, patience=99)
    best = losses.index(min(losses))
    assert found_in(vector)["steps"] == STEPS
    assert found_in(vector)["dev_loss"] == pytest.approx(losses[best], abs=1e-3)
    torch.testing.assert_close(phi_of(vector), path(lr)[best][0], atol=2e-3, rtol=0)
    assert found_in(vector)["phi_moved"] == pytest.approx(float(path(lr)[best][0].norm()), abs=1e-2)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_starts_again_after_each_gain(patience: int) -> None:
    losses = [loss for _, loss in path(1.0)]
    looks, best = stops(losses, patience, resets=True)
    vector = fitted(steps=STEPS, lr=1.0, check=1, patience=patience)
    assert found_in(vector)["steps"] == looks
    torch.testing.assert_close(phi_of(vector), path(1.0)[best][0], atol=2e-3, rtol=0)


def test_patience_is_given_back_by_a_gain_and_not_counted_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [5.0, 6.0, 4.0, 6.0, 3.0, 6.0, 6.0, 6.0]
    assert stops(losses, 2, resets=True)[0] > stops(losses, 2, resets=False)[0]
    script = iter(losses)
    monkeypatch.setattr(Lessons, "mean_losses", lambda *_: [next(script)])
    assert found_in(fitted(steps=STEPS, lr=1.0, check=1, patience=2))["steps"] == stops(losses, 2, resets=True)[0]


def test_dev_is_looked_at_every_so_many_steps_and_at_the_end() -> None:
    losses = [loss for _, loss in path(1.0)]
    seen = [losses[k - 1] for k in (4, 8, 10)]
    vector = fitted(steps=10, lr=1.0, check=4, patience=99)
    assert found_in(vector)["dev_loss"] == pytest.approx(min(seen), abs=1e-3)
    kept = (4, 8, 10)[seen.index(min(seen))]
    torch.testing.assert_close(phi_of(vector), path(1.0)[kept - 1][0], atol=2e-3, rtol=0)


def test_the_log_tells_how_far_the_weights_went_from_their_start() -> None:
    settings: dict[str, Any] = {"steps": 4, "check": 4, "init": 1.0, "seed": 2}
    start = phi_of(fitted(lr=0.0, **settings))
    still = found_in(fitted(lr=0.0, **settings))
    vector = fitted(lr=0.1, **settings)
    assert still["phi_moved"] == 0.0
    assert found_in(vector)["phi_moved"] == pytest.approx(float((phi_of(vector) - start).norm()), rel=1e-5)
    assert 0.1 < found_in(vector)["phi_moved"] <= 4 * 0.1 * 12**0.5
    # the published rate cannot move the weights away from their start: the reason why that number is kept
    stuck = LearnableTaskVector.published(**{**SMALL, "steps": 4, "form": "heads"})
    assert stuck.lr == 5e-5
    log = found_in(stuck.fit(exact_lm("llama"), label_task().train, label_task().dev))
    assert 0 < log["phi_moved"] <= 4 * 5e-5 * 12**0.5 * 1.01


def test_weights_start_at_zero_or_normally_spread_by_the_seed() -> None:
    assert phi_of(fitted(lr=0.0, steps=1)).abs().max() == 0.0
    draws = [phi_of(fitted(lr=0.0, steps=1, init=2.0, seed=seed)) for seed in range(6)]
    values = torch.stack(draws)
    assert torch.equal(draws[0], phi_of(fitted(lr=0.0, steps=1, init=2.0, seed=0)))
    assert len({float(value) for value in values.flatten()}) == 72
    assert float(values.std()) == pytest.approx(2.0, rel=0.3)
    assert abs(float(values.mean())) < 0.8
    assert values.abs().max() > 2.0  # not uniform within one deviation


def test_a_step_takes_as_many_different_prompts_as_its_batch() -> None:
    task, targets = label_task(), list[int]()

    def watched(logits: Tensor, target: Tensor) -> Tensor:
        assert logits.shape[0] == len(target) == 1
        targets.append(int(target))
        loss: Tensor = answer_nll(logits, target)
        return loss

    train = replace(task.train, spec=replace(task.spec, loss=watched))
    method = LearnableTaskVector(**{**SMALL, "trials": 8, "batch": 5, "steps": 6, "check": 99})
    method.fit(exact_lm("llama"), train, task.dev)
    golds = [
        answer(one.query.input, f" {one.query.output}\n", one.demos)[1][0]
        for one in draw(task.train, 8, seed=0, shuffled=True)
    ]
    assert len(targets) == 6 * 5
    steps = [targets[5 * k : 5 * k + 5] for k in range(6)]
    assert all(step.count(token) <= golds.count(token) for step in steps for token in step)
    assert len({tuple(sorted(step)) for step in steps}) > 1


def test_more_dev_items_than_trials_stand_behind_the_same_demonstrations_again() -> None:
    lm, task = exact_lm("llama"), label_task()
    lessons = draw(task.train, 2, seed=0, shuffled=True)
    vector = fitted(trials=2, n_dev=5, lr=0.0, steps=1)
    looks = [Drawn(e, lessons[i % 2].demos) for i, e in enumerate(task.dev.examples[:5])]
    with torch.no_grad():
        expected = float(plain_loss(lm.model, looks, weighted(torch.zeros(3, 4), drawn_basis("llama"))))
    assert found_in(vector)["dev_loss"] == pytest.approx(expected, abs=1e-5)


def test_training_makes_first_answer_tokens_likelier_behind_demonstrations_it_has_not_seen() -> None:
    lm, task = exact_lm("llama"), label_task()
    vector = LearnableTaskVector(prompts=10, trials=16, batch=16, steps=40, lr=0.1, check=5, n_dev=10).fit(
        lm, task.train, task.dev
    )
    demos = draw(task.train, len(task.test), seed=11, shuffled=True)
    lessons = [Drawn(e, one.demos) for e, one in zip(task.test.examples, demos, strict=True)]
    rows = list(rows_of(vector))
    with torch.no_grad():
        before = plain_loss(lm.model, lessons, [torch.zeros(32)] * 3)
        after = plain_loss(lm.model, lessons, rows)
    assert after < 0.9 * before


def test_the_fit_reads_no_token_behind_the_query() -> None:
    """Causality: the prediction behind a query does not depend on what the query's own answer is."""
    lm, train = exact_lm("llama"), open_task().train
    clean = draw(train, SMALL["prompts"], seed=0)
    asked = {one.query.input for one in clean} - {demo.input for one in clean for demo in one.demos}
    lessons = draw(train, SMALL["trials"], seed=0, shuffled=True)
    kept = asked - {example.input for one in lessons for example in (one.query, *one.demos)}
    assert kept
    other = tuple(replace(e, output="red") if e.input in kept else e for e in train.examples)
    method = LearnableTaskVector(**SMALL, steps=2)
    one, two = (method.fit(lm, split, open_task().dev) for split in (train, replace(train, examples=other)))
    assert torch.equal(rows_of(one), rows_of(two))


def test_published_settings_are_those_of_the_released_text_code() -> None:
    made = LearnableTaskVector.published()
    assert (made.form, made.init, made.lr, made.steps, made.batch) == ("released-text", 1.0, 5e-5, 2000, 32)
    assert (made.behind, made.target, made.prompts) == ("shuffled", "first-token", 100)
    assert LearnableTaskVector.published(lr=0.5) == replace(made, lr=0.5)


def test_labels_count_shown_and_training_answers_and_dev() -> None:
    task = label_task()
    clean, lessons = draw(task.train, 4, seed=0), draw(task.train, 4, seed=0, shuffled=True)
    read = {demo.input for one in (*clean, *lessons) for demo in one.demos} | {one.query.input for one in lessons}
    vector = fitted(steps=1)
    assert vector.origin is not None
    assert vector.origin.cost.labels == len(read) + SMALL["n_dev"]


@pytest.mark.parametrize("name", ["prompts", "trials", "steps", "batch", "check", "n_dev"])
def test_numbers_below_one_are_refused_before_any_pass(name: str) -> None:
    lm = exact_lm("llama")
    with lm.metered() as meter, pytest.raises(InputError, match=rf"learnable\.{name} of at least 1"):
        LearnableTaskVector(**{**SMALL, name: 0}).fit(lm, label_task().train, label_task().dev)
    assert meter.tokens == 0


def test_a_rate_that_leaves_no_finite_loss_is_refused() -> None:
    with pytest.raises(InputError, match="no finite dev loss"):
        fitted(lr=float("inf"), steps=2)


@pytest.mark.parametrize("lr", [-1.0, float("nan")])
def test_a_rate_that_is_no_rate_is_an_error_of_the_librarys_own(lr: float) -> None:
    with pytest.raises(InputError):
        fitted(lr=lr, steps=2)


def test_the_vector_steers_bare_queries() -> None:
    lm, task = exact_lm("llama"), label_task()
    vector = fitted(steps=4, lr=0.2)
    rows = rows_of(vector)
    expected = []

    with torch.no_grad():
        for example in task.dev.examples[:4]:
            tokens = ids(prompt(example.input))
            moves = {layer: plus(len(tokens) - 1, row) for layer, row in enumerate(rows)}
            expected.append(run(lm.model, tokens, moves).logits[-1])
    dev = replace(task.dev, examples=task.dev.examples[:4])
    close(observe(lm, dev, vector).logits, torch.stack(expected), atol=1e-4)
