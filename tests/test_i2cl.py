"""I2CL against its formula (baselines.md, section 6): plain captures, plain blends, plain autograd."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from taskvec import methods
from taskvec.errors import InputError
from taskvec.evaluate import Lessons, observe, score
from taskvec.hooks import inject
from taskvec.lm import LM
from taskvec.methods.i2cl import I2CL, Calibrating
from taskvec.prompts import Example
from taskvec.sites import Site
from taskvec.tasks import Task, Train
from taskvec.vector import Blend, TaskVector, Where
from tests import tiny
from tests.reference import answer, blocks, both_families, exact_lm, ids, label_task, open_task, prompt

Place = tuple[str, int]
BARE = I2CL(calibrate=False)


def parts(
    model: Any, tokens: Sequence[int], change: Mapping[Place, Callable[[Tensor], Tensor]] | None = None
) -> tuple[Tensor, dict[Place, Tensor]]:
    """One prompt's logits (T, V), and what every attention and MLP wrote (T, d), changed by `change`."""
    seen: dict[Place, Tensor] = {}

    def after(place: Place) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            new = change[place](h[0]) if change and place in change else h[0]
            seen[place] = new
            return (new[None], *output[1:]) if isinstance(output, tuple) else new[None]

        return hook

    handles: list[Any] = []
    for layer, block in enumerate(blocks(model)):
        attention = block.self_attn if hasattr(block, "self_attn") else block.attn
        handles += [attention.register_forward_hook(after(("attn", layer)))]
        handles += [block.mlp.register_forward_hook(after(("mlp", layer)))]
    try:
        logits: Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


@torch.no_grad()
def contexts(lm: LM, demos: Sequence[Example], end: str = "") -> dict[Place, Tensor]:
    """The mean over demonstrations, each alone, of every output at the last token of "x -> y" + end."""
    runs = []
    for demo in demos:
        head, tail = answer(demo.input, f" {demo.output}{end}")
        runs.append(parts(lm.model, head + tail)[1])
    return {place: torch.stack([run[place][-1] for run in runs]).mean(0) for place in runs[0]}


def blends(context: Mapping[Place, Tensor], scalars: Any) -> dict[Place, Callable[[Tensor], Tensor]]:
    """beta out + lambda v for every place, scalars[i] = (beta, lambda) in the order attn[0], mlp[0], attn[1], ..."""
    order = [(kind, layer) for layer in range(len(context) // 2) for kind in ("attn", "mlp")]

    def blend(place: Place, pair: Any) -> Callable[[Tensor], Tensor]:
        return lambda h: pair[0] * h + pair[1] * context[place]

    return {place: blend(place, scalars[i]) for i, place in enumerate(order)}


def scalars_of(vector: TaskVector) -> list[tuple[float, float]]:
    ops = [edit.op for edit in vector.edits]
    assert all(type(op) is Blend for op in ops)
    return [(op.keep, op.weight) for op in ops if isinstance(op, Blend)]


def label_loss(lm: LM, demos: Sequence[Example], change: Mapping[Place, Callable[[Tensor], Tensor]]) -> Tensor:
    """Mean over demonstrations of the cross-entropy, over the whole vocabulary, of the label's first token."""
    losses = []
    for demo in demos:
        head, tail = answer(demo.input, f" {demo.output}\n")
        logits = parts(lm.model, head, change)[0]
        losses.append(cross_entropy(logits[-1:].float(), torch.tensor(tail[:1])))
    return torch.stack(losses).mean()


def fitted(lm: LM, task: Task, method: Any, seed: int = 0) -> TaskVector:
    vector: TaskVector = method.fit(lm, task.train, task.dev, seed=seed)
    return vector


# --- the context vectors ----------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize(("ends", "end"), [("answer", ""), ("terminator", "\n")])
@pytest.mark.parametrize("labels", [False, True])
def test_context_vectors_are_means_over_demonstrations_run_alone(
    family: str, ends: Any, end: str, labels: bool
) -> None:
    lm, task = exact_lm(family), label_task() if labels else open_task()
    vector = fitted(lm, task, replace(BARE, ends=ends), seed=2)
    expected = contexts(lm, task.train.demonstrations(seed=2), end)
    places = [(kind, layer) for layer in range(lm.n_layers) for kind in ("attn", "mlp")]
    assert [(edit.site.kind, edit.site.layer) for edit in vector.edits] == places
    for edit, place in zip(vector.edits, places, strict=True):
        assert (edit.where, edit.strength) == (Where("all"), 1.0)
        got = edit.op.tensors()["vector"].double()
        torch.testing.assert_close(got, expected[place], atol=1e-5, rtol=1e-5)


def test_the_two_ends_of_a_demonstration_are_two_tokens() -> None:
    """Else the parametrisation above would say nothing."""
    lm, demos = exact_lm("llama"), open_task().train.demonstrations(seed=2)
    one, two = contexts(lm, demos), contexts(lm, demos, "\n")
    assert all((one[place] - two[place]).abs().max() > 0.05 for place in one)


def test_before_calibration_beta_is_one_and_lambda_a_tenth() -> None:
    for keep, weight in scalars_of(fitted(exact_lm("llama"), open_task(), BARE)):
        assert keep == 1.0
        assert weight == pytest.approx(0.1)


def test_the_order_of_demonstrations_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), open_task()
    one = fitted(lm, task, BARE)
    drawn = Train.demonstrations
    monkeypatch.setattr(Train, "demonstrations", lambda self, *, seed: drawn(self, seed=seed)[::-1])
    two = fitted(lm, task, BARE)
    assert one.origin is not None
    assert two.origin is not None
    assert one.origin.demos == two.origin.demos[::-1] != two.origin.demos
    for a, b in zip(one.tensors().values(), two.tensors().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


# --- the edit ---------------------------------------------------------------------------------------------------------


@both_families
def test_beta_one_and_lambda_zero_are_the_identity(family: str) -> None:
    lm, task = exact_lm(family), open_task()
    vector = fitted(lm, task, I2CL(calibrate=False, keep=1.0, weight=0.0))
    batch = lm.batch([prompt(example.input) for example in task.dev.examples])
    with torch.no_grad():
        bare = lm.forward(batch)
        with inject(lm, vector):
            assert torch.equal(lm.forward(batch), bare)
    torch.testing.assert_close(observe(lm, task.dev, vector).logits, observe(lm, task.dev).logits, atol=1e-5, rtol=0)


@both_families
def test_every_token_of_every_layer_is_blended(family: str) -> None:
    lm, task = exact_lm(family), open_task()
    vector = fitted(lm, task, I2CL(calibrate=False, keep=0.8, weight=0.3))
    change = blends(contexts(lm, task.train.demonstrations(seed=0)), [(0.8, 0.3)] * 6)
    with torch.no_grad():
        rows = [parts(lm.model, ids(prompt(example.input)), change)[0][-1] for example in task.dev.examples]
    expected = torch.stack(rows).float()
    assert (observe(lm, task.dev).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(observe(lm, task.dev, vector).logits, expected, atol=1e-4, rtol=0)


def test_generated_tokens_are_blended_too() -> None:
    lm, task = exact_lm("llama"), open_task()
    vector = fitted(lm, task, I2CL(calibrate=False, keep=0.8, weight=0.3))
    change = blends(contexts(lm, task.train.demonstrations(seed=0)), [(0.8, 0.3)] * 6)
    queries = [prompt(example.input) for example in task.dev.examples[:3]]
    expected = []
    for query in queries:
        tokens = ids(query)
        with torch.no_grad():
            for _ in range(6):
                tokens.append(int(parts(lm.model, tokens, change)[0][-1].argmax()))
        expected.append(lm.before_end(tokens[-6:]))
    with inject(lm, vector):
        assert lm.generate_ids(queries, max_new_tokens=6) == expected
    assert lm.generate_ids(queries, max_new_tokens=6) != expected


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_changes_4l_numbers_and_nothing_else() -> None:
    lm, task = tiny.fresh_lm("llama"), label_task()
    lm.model.model.norm.weight.requires_grad = False
    before = tiny.weights_of(lm.model), {name: p.requires_grad for name, p in lm.model.named_parameters()}
    bare = fitted(lm, task, BARE)
    vector = fitted(lm, task, I2CL(epochs=3, lr=0.05))
    for one, two in zip(bare.edits, vector.edits, strict=True):
        assert (one.site, one.where, one.strength) == (two.site, two.where, two.strength)
        assert torch.equal(one.op.tensors()["vector"], two.op.tensors()["vector"])
    numbers = [number for pair in scalars_of(vector) for number in pair]
    assert len(numbers) == 4 * lm.n_layers
    start = [number for pair in scalars_of(bare) for number in pair]
    assert all(abs(a - b) > 1e-3 for a, b in zip(numbers, start, strict=True))
    after = tiny.weights_of(lm.model), {name: p.requires_grad for name, p in lm.model.named_parameters()}
    assert after[1] == before[1]
    assert all(torch.equal(after[0][name], weight) for name, weight in before[0].items())
    assert all(p.grad is None for p in lm.model.parameters())
    assert tiny.count_hooks(lm.model) == 0


@both_families
@pytest.mark.parametrize("labels", [False, True])
def test_the_gradient_is_that_of_the_first_answer_tokens_loss_behind_zero_shot_prompts(
    family: str, labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain gradient descent with rate 1 and one step over all demonstrations: the scalars move by minus the gradient.
    (AdamW's own first step shows the gradient's sign only.)"""
    lm, task = exact_lm(family), label_task() if labels else open_task()
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    method = I2CL(epochs=1, batch=99, lr=1.0, weight_decay=0.0, noise=0.0)
    moved = torch.tensor(scalars_of(fitted(lm, task, method)))
    demos = task.train.demonstrations(seed=0)
    scalars = torch.tensor([[1.0, 0.1]] * 6, requires_grad=True)
    loss = label_loss(lm, demos, blends(contexts(lm, demos), scalars))
    (gradient,) = torch.autograd.grad(loss, [scalars])
    assert (gradient.abs() > 1e-4).all()
    torch.testing.assert_close(moved, scalars.detach() - gradient, atol=1e-4, rtol=1e-4)


def test_calibration_is_adamw_with_a_warm_up_and_a_cosine() -> None:
    lm, task = exact_lm("llama"), label_task()
    demos = task.train.demonstrations(seed=0)
    context = contexts(lm, demos)
    scalars = torch.tensor([[1.0, 0.1]] * 6, requires_grad=True)
    optimizer = torch.optim.AdamW([scalars], lr=0.02, weight_decay=0.1)
    losses = []
    for share in (1 / 3, 2 / 3, 1.0, 1.0, 0.75, 0.25):  # half of six steps up, then half a cosine over three
        optimizer.param_groups[0]["lr"] = 0.02 * share
        loss = label_loss(lm, demos, blends(context, scalars))
        (scalars.grad,) = torch.autograd.grad(loss, [scalars])
        optimizer.step()
        losses.append(float(loss.detach()))
    method = I2CL(epochs=6, batch=99, lr=0.02, weight_decay=0.1, warmup=0.5, noise=0.0)
    vector = fitted(lm, task, method)
    assert (scalars.detach() - torch.tensor([1.0, 0.1])).abs().max() > 0.05
    torch.testing.assert_close(torch.tensor(scalars_of(vector)), scalars.detach(), atol=1e-4, rtol=0)
    assert vector.origin is not None
    assert vector.origin.found["loss"] == pytest.approx([losses[0], losses[-1]], abs=1e-4)


def test_the_released_settings() -> None:
    method = I2CL()
    assert (method.weight, method.keep, method.lr, method.weight_decay) == (0.1, 1.0, 0.01, 1e-3)
    assert (method.epochs, method.batch, method.warmup, method.noise) == (100, 2, 0.05, 1e-3)


def test_epochs_lower_the_loss_found_and_the_loss_without_noise() -> None:
    lm, task = exact_lm("llama"), label_task()
    vector = fitted(lm, task, I2CL(epochs=20, lr=0.02))
    assert vector.origin is not None
    losses: Any = vector.origin.found["loss"]
    assert losses[1] < 0.9 * losses[0]
    demos = task.train.demonstrations(seed=0)
    with torch.no_grad():
        context = contexts(lm, demos)
        before = label_loss(lm, demos, blends(context, [(1.0, 0.1)] * 6))
        after = label_loss(lm, demos, blends(context, scalars_of(vector)))
    assert after < 0.9 * before


# --- noise ------------------------------------------------------------------------------------------------------------


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Calibrating], list[int]]]:
    """Every training step's ops and picked demonstrations."""
    steps: list[tuple[list[Calibrating], list[int]]] = []
    descend = Lessons.descend

    def spy(self: Lessons, vectors: Sequence[TaskVector], picked: Sequence[int]) -> float:
        ops = [edit.op for vector in vectors for edit in vector.edits]
        steps.append(([op for op in ops if isinstance(op, Calibrating)], list(picked)))
        return descend(self, vectors, picked)

    monkeypatch.setattr(Lessons, "descend", spy)
    return steps


def test_training_noise_is_fresh_at_every_step_and_site_and_of_the_scale_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), label_task()
    steps = watched(monkeypatch)
    fitted(lm, task, I2CL(epochs=5, noise=0.01))
    noises = [op.noise for ops, _ in steps for op in ops]
    assert len(noises) == 5 * 2 * 6  # epochs, batches of 2 out of 3, sites
    rows = torch.stack([noise for noise in noises if noise is not None])
    assert len(rows) == len(noises)
    assert float(rows.std()) == pytest.approx(0.01, rel=0.1)
    assert float(rows.mean()) == pytest.approx(0.0, abs=1e-3)
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_noise_is_scaled_by_each_outputs_norm() -> None:
    h, v, n = (tiny.random_vector(24, seed).reshape(4, 6) for seed in (1, 2, 3))
    scalars = torch.tensor([0.8, -0.3])
    got = Calibrating(v[0], scalars, n[0]).apply(h)
    rows = [[0.8 * x - 0.3 * y + z * float(row.norm()) for x, y, z in zip(row, v[0], n[0], strict=True)] for row in h]
    torch.testing.assert_close(got, torch.tensor(rows))
    torch.testing.assert_close(Calibrating(v[0], scalars).apply(h), 0.8 * h - 0.3 * v[0])


def test_there_is_no_noise_at_test() -> None:
    lm, task = exact_lm("llama"), label_task()
    vector = fitted(lm, task, I2CL(epochs=3, noise=0.5))
    scalars = scalars_of(vector)  # plain blends: an op without a noise to draw
    change = blends(contexts(lm, task.train.demonstrations(seed=0)), scalars)
    with torch.no_grad():
        rows = [parts(lm.model, ids(prompt(example.input)), change)[0][-1] for example in task.dev.examples]
    seen = [observe(lm, task.dev, vector).logits for _ in range(2)]
    assert torch.equal(*seen)
    torch.testing.assert_close(seen[0], torch.stack(rows).float(), atol=1e-4, rtol=0)


def test_the_seed_decides_noise_and_batches_and_the_global_generator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), label_task()
    state = torch.get_rng_state()
    steps = watched(monkeypatch)
    method = I2CL(epochs=4, noise=0.2)
    one, two = (scalars_of(fitted(lm, task, method)) for _ in range(2))
    assert one == two
    assert one != scalars_of(fitted(lm, task, replace(method, noise=0.0)))
    assert torch.equal(torch.get_rng_state(), state)
    picked = [numbers for _, numbers in steps[:8]]
    assert all(len(numbers) == len(set(numbers)) == 2 for numbers in picked)
    assert len({tuple(sorted(numbers)) for numbers in picked}) > 1


# --- what is refused, and what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["epochs", "batch"])
def test_numbers_of_things_below_one_are_refused(field: str) -> None:
    with pytest.raises(InputError, match=rf"i2cl\.{field} of at least 1; found 0"):
        fitted(exact_lm("llama"), open_task(), methods.make("i2cl", {field: "0"}))


@pytest.mark.parametrize("rate", [float("inf"), float("nan"), -1.0])
def test_a_rate_that_cannot_train_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match=r"lower i2cl\.lr"):
        fitted(exact_lm("llama"), open_task(), I2CL(epochs=2, lr=rate))


def test_the_demonstrations_are_all_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = exact_lm("llama"), open_task()
    demos = task.train.demonstrations(seed=0)
    hidden = tuple(e if e in set(demos) else replace(e, output="red") for e in task.train.examples)
    dev = replace(task.dev, examples=(Example("other", "thing"),))
    method = I2CL(epochs=2)
    one = fitted(lm, task, method)
    two = method.fit(lm, replace(task.train, examples=hidden), dev)
    assert scalars_of(one) == scalars_of(two)
    assert all(torch.equal(a, b) for a, b in zip(one.tensors().values(), two.tensors().values(), strict=True))
    assert one.origin is not None
    assert (one.origin.cost.labels, one.origin.cost.queries) == (3, 0)


def test_it_is_saved_loaded_and_scored(tmp_path: Any) -> None:
    lm, task = exact_lm("llama"), label_task()
    vector = fitted(lm, task, I2CL(epochs=2))
    vector.save_pretrained(tmp_path / "v")
    loaded = TaskVector.from_pretrained(tmp_path / "v")
    assert scalars_of(loaded) == scalars_of(vector)
    assert loaded.sites == tuple(Site(kind, layer) for layer in range(3) for kind in ("attn", "mlp"))
    row = score(lm, task.dev, loaded).rows[0]
    assert (row.method, row.n) == ("i2cl", len(task.dev))
    assert torch.equal(observe(lm, task.dev, loaded).logits, observe(lm, task.dev, vector).logits)
