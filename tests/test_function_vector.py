"""The function vector, and the few-shot prompts and heads it is drawn from, against whole-prompt passes.

The hooks here stand on the attention's output projection itself: its input is all heads side by side, its output what
attention writes. Nothing from `projections` to `plain_means` knows taskvec's sites, hooks or engine.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from taskvec.errors import InputError, MissingSite
from taskvec.evaluate import Fitting
from taskvec.evaluate.drawing import Drawn, draw, encode_drawn, labels_read, mean_heads, projected_heads
from taskvec.lm import LM
from taskvec.methods.function_vector import FunctionVector, attributions, indirect_effects
from taskvec.sites import Site
from taskvec.vector import Add, Edit, TaskVector, Where
from tests import tiny
from tests.reference import answer, best_of, blocks, exact_lm, ids, label_task, open_task, plus, prompt, run

# a bias on the projection; Conv1D; head sizes that are not width / heads, with grouped queries
FAMILIES = ("llama", "gpt2", "qwen3", "gemma3")
every_shape = pytest.mark.parametrize("family", FAMILIES)
Change = Callable[[Tensor], Tensor]
Head = tuple[int, int]


# --- the reference ----------------------------------------------------------------------------------------------------


def projections(model: Any) -> list[Any]:
    """Each block's attention output projection."""
    return [block.self_attn.o_proj if hasattr(block, "self_attn") else block.attn.c_proj for block in blocks(model)]


def weight(model: Any, layer: int) -> Tensor:
    """W_O (d, J w). GPT-2's Conv1D keeps its transpose."""
    module = projections(model)[layer]
    kept: Tensor = module.weight.detach()
    return kept if isinstance(module, torch.nn.Linear) else kept.T


def bias(model: Any, layer: int) -> Tensor:
    """b (d,), zero where the projection has none."""
    kept = projections(model)[layer].bias
    return torch.zeros(weight(model, layer).shape[0]) if kept is None else kept.detach()


@dataclass(frozen=True)
class Attention:
    """One prompt's logits (T, V), and by layer the projection's input (T, J w) and output (T, d)."""

    logits: Tensor
    heads: list[Tensor]
    written: list[Tensor]


def attend(model: Any, tokens: Sequence[int], change: Mapping[int, Change] | None = None) -> Attention:
    """The whole prompt, once. `change[l]` maps the input of layer l's projection (T, J w) to another."""
    heads: list[Tensor] = []
    written: list[Tensor] = []

    def before(layer: int) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = change[layer](args[0][0]) if change and layer in change else args[0][0]
            heads.append(z)
            return (z[None],)

        return hook

    handles = []
    for layer, module in enumerate(projections(model)):
        handles.append(module.register_forward_pre_hook(before(layer)))
        handles.append(module.register_forward_hook(lambda _, __, output: written.append(output[0])))
    try:
        logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return Attention(logits, heads, written)


def put_head(at: int, slot: slice, value: Tensor) -> Change:
    """Some columns of token `at` replaced."""

    def changed(z: Tensor) -> Tensor:
        out = z.clone()
        out[at, slot] = value.to(z)
        return out

    return changed


def slot(model: Any, head: int) -> slice:
    """The columns of one head in the projection's input."""
    width = weight(model, 0).shape[1] // model.config.num_attention_heads
    return slice(head * width, (head + 1) * width)


def all_heads(lm: LM) -> list[Head]:
    return [(layer, head) for layer in range(lm.n_layers) for head in range(lm.n_heads)]


def tokens_of(one: Drawn) -> list[int]:
    return ids(prompt(one.query.input, one.demos))


@torch.no_grad()
def plain_means(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """By layer, the mean over prompts of the projection's input (J w) at the last token."""
    runs = [attend(model, tokens) for tokens in prompts]
    return [sum((r.heads[layer][-1] for r in runs[1:]), runs[0].heads[layer][-1]) / len(runs)
            for layer in range(len(runs[0].heads))]  # fmt: skip


@torch.no_grad()
def plain_effect(model: Any, drawn: Drawn, means: Sequence[Tensor], head: Head) -> float:
    """p(first answer token) with one head at the last token at its mean, minus p without: two whole passes."""
    tokens, (gold, *_) = answer(drawn.query.input, f" {drawn.query.output}\n", drawn.demos)
    (layer, number), last = head, len(tokens) - 1
    patch = {layer: put_head(last, slot(model, number), means[layer][slot(model, number)])}
    return float(
        attend(model, tokens, patch).logits[-1].softmax(-1)[gold] - attend(model, tokens).logits[-1].softmax(-1)[gold]
    )


def plain_vector(model: Any, means: Sequence[Tensor], heads: Sequence[Head]) -> Tensor:
    """sum over heads of W_O[:, slot j] abar_lj."""
    total = torch.zeros(weight(model, 0).shape[0], dtype=torch.float64)
    for layer, head in heads:
        total += weight(model, layer)[:, slot(model, head)] @ means[layer][slot(model, head)]
    return total


# --- the fits these tests look at -------------------------------------------------------------------------------------

PROMPTS, TRIALS = 5, 3


@cache
def ranking(family: str) -> tuple[list[Tensor], dict[Head, float]]:
    """Mean heads and all average indirect effects for the task with labels and seed 0, by the reference."""
    lm, train = exact_lm(family), label_task().train
    means = plain_means(lm.model, [tokens_of(one) for one in draw(train, PROMPTS, seed=0)])
    trials = draw(train, TRIALS, seed=0, shuffled=True)
    return means, {
        head: sum(plain_effect(lm.model, one, means, head) for one in trials) / TRIALS for head in all_heads(lm)
    }


def split_by_head(lm: LM, means: Sequence[Tensor]) -> Tensor:
    return torch.stack([z.float().reshape(lm.n_heads, -1) for z in means])


def fitted(family: str, **settings: Any) -> TaskVector:
    method = FunctionVector(**{"heads": 3, "prompts": PROMPTS, "trials": TRIALS, "layer": 1, **settings})
    return method.fit(exact_lm(family), label_task().train, label_task().dev)


def edit_of(vector: TaskVector) -> Edit:
    assert len(vector.edits) == 1
    return vector.edits[0]


def added_by(vector: TaskVector) -> Tensor:
    op = edit_of(vector).op
    assert isinstance(op, Add)
    return op.vector.double()


def found_in(vector: TaskVector) -> dict[str, Any]:
    assert vector.origin is not None
    return dict(vector.origin.found)


def heads_in(vector: TaskVector) -> list[Head]:
    return [(layer, head) for layer, head in found_in(vector)["heads"]]


def close(got: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), expected.double(), atol=atol, rtol=1e-5)


# --- drawn prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [open_task(), label_task()], ids=["open", "labels"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_drawn_prompts_show_train_examples_and_ask_for_another(task: Any, shuffled: bool) -> None:
    drawn = draw(task.train, 30, seed=3, shuffled=shuffled)
    true = {example.input: example.output for example in task.train.examples}
    assert len(drawn) == 30
    for one in drawn:
        shown = [demo.input for demo in one.demos]
        assert len(set(shown)) == len(shown) == task.spec.shots
        assert set(shown) <= set(true)
        assert one.query.input not in shown
        assert one.query.output == true[one.query.input]  # the query's own answer is never shuffled
        assert sorted(demo.output for demo in one.demos) == sorted(true[name] for name in shown)
    assert len({one.demos for one in drawn}) > 25  # demonstrations of their own
    assert len({one.query for one in drawn}) > 10
    moved = [one for one in drawn if any(demo.output != true[demo.input] for demo in one.demos)]
    assert (len(moved) > 15) if shuffled else not moved


def test_shuffled_outputs_come_in_every_order() -> None:
    """Three outputs have six orders: a shuffle shows each of them but the true one."""
    orders = set()
    true = {example.input: example.output for example in open_task().train.examples}
    for one in draw(open_task().train, 100, seed=0, shuffled=True):
        shown = [true[demo.input] for demo in one.demos]
        assert len(set(shown)) == 3
        orders.add(tuple(shown.index(demo.output) for demo in one.demos))
    assert len(orders) == 5
    assert (0, 1, 2) not in orders


def test_drawing_depends_on_its_seed_alone_and_leaves_the_global_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    train = open_task().train

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the global generator was used")

    # not by random.getstate(): the tests' type checker takes bits of its own from the global generator
    for name in ("seed", "random", "shuffle", "choice", "choices", "sample", "randint", "randrange"):
        monkeypatch.setattr(random, name, forbidden)
    before = torch.get_rng_state()
    first = draw(train, 8, seed=1, shuffled=True)
    assert draw(train, 8, seed=1, shuffled=True) == first
    assert draw(train, 8, seed=2, shuffled=True) != first
    assert draw(train, 5, seed=1, shuffled=True) == first[:5]
    clean = draw(train, 8, seed=1)
    assert [one.query for one in clean] != [one.query for one in first]  # means and effects stand on other prompts
    assert torch.equal(torch.get_rng_state(), before)


def test_drawn_prompts_in_tokens_with_whole_answers() -> None:
    lm, train = exact_lm("llama"), label_task().train
    drawn = draw(train, 6, seed=0, shuffled=True)
    for bare in (False, True):
        prompts, golds = encode_drawn(lm, train, drawn, bare=bare)
        for one, encoded, gold in zip(drawn, prompts, golds, strict=True):
            head, tail = answer(one.query.input, f" {one.query.output}\n", () if bare else one.demos)
            assert (list(encoded.ids), list(gold)) == (head, tail)
    shown = {demo.input for one in drawn for demo in one.demos}
    assert labels_read(drawn, queries=False) == shown
    assert labels_read(drawn, queries=True) == shown | {one.query.input for one in drawn}


# --- heads and their projection ---------------------------------------------------------------------------------------


@every_shape
def test_mean_heads_are_the_means_of_plain_captures(family: str) -> None:
    lm, train = exact_lm(family), label_task().train
    drawn = draw(train, PROMPTS, seed=0)
    with Fitting.of(lm, FunctionVector(), train, seed=0) as fitting:
        got = mean_heads(fitting, encode_drawn(lm, train, drawn)[0])
        swapped = mean_heads(fitting, encode_drawn(lm, train, drawn[::-1])[0])
        one = mean_heads(fitting, encode_drawn(lm, train, drawn[:1])[0])
    expected = ranking(family)[0]
    assert got.shape == (lm.n_layers, 4, expected[0].shape[0] // 4)
    close(got.flatten(1), torch.stack(expected))
    close(swapped, got)
    close(one.flatten(1), torch.stack(plain_means(lm.model, [tokens_of(drawn[0])])))


@every_shape
def test_each_head_goes_through_its_own_columns_of_the_projection_without_the_bias(family: str) -> None:
    lm = exact_lm(family)
    means, _ = ranking(family)
    got = projected_heads(lm, split_by_head(lm, means))
    assert got.shape == (lm.n_layers, 4, weight(lm.model, 0).shape[0])
    for head in all_heads(lm):
        close(got[head], plain_vector(lm.model, means, [head]))


@every_shape
def test_a_layers_heads_add_up_to_its_mean_attention_output_minus_the_bias(family: str) -> None:
    lm, train = exact_lm(family), label_task().train
    drawn = draw(train, PROMPTS, seed=0)
    with torch.no_grad():
        runs = [attend(lm.model, tokens_of(one)) for one in drawn]
    got = projected_heads(lm, split_by_head(lm, ranking(family)[0]))
    for layer in range(lm.n_layers):
        output = torch.stack([r.written[layer][-1] for r in runs]).mean(0)
        close(got[layer].sum(0), output - bias(lm.model, layer))
        # else a bias added once, or once a head, would pass unseen
        assert (bias(lm.model, layer).abs().max() > 0.1) == (family in ("llama", "gpt2"))


@every_shape
def test_the_vector_of_all_heads_is_the_sum_of_all_layers_attention_outputs_minus_biases(family: str) -> None:
    lm, train = exact_lm(family), label_task().train
    with torch.no_grad():
        runs = [attend(lm.model, tokens_of(one)) for one in draw(train, PROMPTS, seed=0)]
    vector = fitted(family, heads=lm.n_layers * 4, trials=1)
    layers = range(lm.n_layers)
    outputs = [torch.stack([r.written[layer][-1] for r in runs]).mean(0) - bias(lm.model, layer) for layer in layers]
    close(added_by(vector), torch.stack(outputs).sum(0), atol=1e-4)


def test_a_vector_from_shared_demonstrations_averages_behind_the_seeds_own() -> None:
    lm, task = exact_lm("llama"), label_task()
    demos = task.train.demonstrations(seed=0)
    queries = task.train.queries(demos, PROMPTS, seed=0)
    means = plain_means(lm.model, [ids(prompt(query.input, demos)) for query in queries])
    vector = fitted("llama", shared=True)
    close(added_by(vector), plain_vector(lm.model, means, heads_in(vector)))
    assert (added_by(vector) - plain_vector(lm.model, ranking("llama")[0], heads_in(vector))).norm() > 0.1
    assert vector.origin is not None
    assert vector.origin.cost.queries == PROMPTS


# --- effects ----------------------------------------------------------------------------------------------------------


@every_shape
def test_indirect_effects_are_those_of_whole_patched_passes(family: str) -> None:
    lm, train = exact_lm(family), label_task().train
    means, _ = ranking(family)
    drawn = draw(train, TRIALS, seed=0, shuffled=True)
    prompts, golds = encode_drawn(lm, train, drawn)
    got = indirect_effects(lm, prompts, [gold[0] for gold in golds], split_by_head(lm, means), all_heads(lm))
    expected = torch.tensor([[plain_effect(lm.model, one, means, head) for head in all_heads(lm)] for one in drawn])
    assert expected.abs().max() > 5e-4
    assert len(set(expected.flatten().tolist())) == expected.numel()  # no two heads look the same
    close(got, expected, atol=1e-7)
    some = [(2, 3), (0, 1)]
    part = indirect_effects(lm, prompts[:1], [golds[0][0]], split_by_head(lm, means), some)
    close(part, torch.tensor([[plain_effect(lm.model, drawn[0], means, head) for head in some]]), atol=1e-7)


@every_shape
def test_a_head_patched_by_its_own_value_has_no_effect(family: str) -> None:
    lm, train = exact_lm(family), label_task().train
    drawn = draw(train, 1, seed=5, shuffled=True)
    prompts, golds = encode_drawn(lm, train, drawn)
    own = split_by_head(lm, plain_means(lm.model, [tokens_of(drawn[0])]))
    effects = indirect_effects(lm, prompts, [golds[0][0]], own, all_heads(lm))
    assert effects.abs().max() < 1e-6
    firsts = attributions(lm, prompts, [golds[0][0]], own)
    assert firsts.abs().max() < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_that_writes_nothing_has_no_effect_and_adds_nothing(family: str) -> None:
    model = tiny.build(family).double()
    module = projections(model)[1]
    with torch.no_grad():
        columns = module.weight.T if family == "gpt2" else module.weight
        columns[slice(None), slot(model, 2)] = 0.0
    lm, train = LM(model, tiny.tokenizer(), name=f"silent-{family}"), label_task().train
    means = plain_means(model, [tokens_of(one) for one in draw(train, 2, seed=0)])
    prompts, golds = encode_drawn(lm, train, draw(train, 2, seed=0, shuffled=True))
    effects = indirect_effects(lm, prompts, [gold[0] for gold in golds], split_by_head(lm, means), [(1, 2), (1, 1)])
    assert effects[:, 0].abs().max() < 1e-7
    assert effects[:, 1].abs().min() > 1e-6
    assert projected_heads(lm, split_by_head(lm, means))[1, 2].abs().max() == 0.0


@every_shape
def test_attributions_are_the_plain_gradient_times_the_distance_to_the_mean(family: str) -> None:
    lm, train = exact_lm(family), label_task().train
    means, _ = ranking(family)
    drawn = draw(train, TRIALS, seed=0, shuffled=True)
    prompts, golds = encode_drawn(lm, train, drawn)
    got = attributions(lm, prompts, [gold[0] for gold in golds], split_by_head(lm, means))
    assert got.shape == (TRIALS, lm.n_layers, 4)
    for row, one in zip(got, drawn, strict=True):
        for head, expected in plain_attributions(lm.model, one, means).items():
            assert float(row[head]) == pytest.approx(expected, abs=1e-7, rel=1e-4)


def plain_attributions(model: Any, one: Drawn, means: Sequence[Tensor]) -> dict[Head, float]:
    """grad of p(gold) by the head's output at the last token, times (mean - output), by autograd on a whole pass."""
    tokens, (gold, *_) = answer(one.query.input, f" {one.query.output}\n", one.demos)
    leaves = [torch.zeros(z.shape[0], dtype=torch.float64, requires_grad=True) for z in means]
    seen = attend(model, tokens, {layer: plus(len(tokens) - 1, leaf) for layer, leaf in enumerate(leaves)})
    gradients = torch.autograd.grad(seen.logits[-1].softmax(-1)[gold], leaves)
    out = {}
    for layer, (gradient, mean) in enumerate(zip(gradients, means, strict=True)):
        away = (mean - seen.heads[layer][-1].detach()) * gradient
        for head in range(model.config.num_attention_heads):
            out[layer, head] = float(away[slot(model, head)].sum())
    return out


# --- the fit ----------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("count", [1, 3])
def test_the_vector_sums_the_heads_of_the_largest_average_effect(family: str, count: int) -> None:
    lm = exact_lm(family)
    means, effects = ranking(family)
    top = sorted(effects, key=lambda head: -effects[head])[:count]
    vector = fitted(family, heads=count)
    assert heads_in(vector) == top
    assert found_in(vector)["effects"] == pytest.approx([effects[head] for head in top], abs=1e-6)
    assert (edit_of(vector).site, edit_of(vector).where, edit_of(vector).strength) == (Site("resid", 1), Where(), 1.0)
    close(added_by(vector), plain_vector(lm.model, means, top))


def test_effects_that_are_largest_below_zero_are_not_chosen() -> None:
    """The paper ranks by the effect itself: a head that hurts the answer most is last, not first."""
    _, effects = ranking("llama")
    by_size = sorted(effects, key=lambda head: -abs(effects[head]))[:4]
    assert min(effects[head] for head in by_size) < 0
    assert heads_in(fitted("llama", heads=12))[-1] == min(effects, key=lambda head: effects[head])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kept", [3, 5])
def test_with_a_prefilter_only_the_heads_it_kept_are_measured_exactly_and_used(family: str, kept: int) -> None:
    lm, train = exact_lm(family), label_task().train
    means, effects = ranking(family)
    rows = [plain_attributions(lm.model, one, means) for one in draw(train, TRIALS, seed=0, shuffled=True)]
    first_order = {head: sum(row[head] for row in rows) / TRIALS for head in all_heads(lm)}
    passed = sorted(first_order, key=lambda head: -first_order[head])[:kept]
    top = sorted(passed, key=lambda head: -effects[head])[:3]
    vector = fitted(family, prefilter=kept)
    assert heads_in(vector) == top
    # confirmed: the effects are the exact ones, not the first-order ones
    assert found_in(vector)["effects"] == pytest.approx([effects[head] for head in top], abs=1e-6)
    assert found_in(vector)["effects"] != pytest.approx([first_order[head] for head in top], abs=1e-6)
    close(added_by(vector), plain_vector(lm.model, means, top))


def test_a_prefilter_of_all_heads_changes_nothing() -> None:
    every, none = fitted("llama", prefilter=12), fitted("llama")
    assert found_in(every)["heads"] == found_in(none)["heads"]
    assert torch.equal(added_by(every), added_by(none))


@pytest.mark.parametrize(("family", "seed"), [("llama", 0), ("llama", 2), ("gpt2", 1), ("gemma3", 0)])
@pytest.mark.parametrize("where", ["last_prompt", "each_last"])
def test_the_layer_is_the_best_on_dev(family: str, seed: int, where: str) -> None:
    """Scored with whole answers: under `each_last` the answer's own tokens are edited too."""
    lm, task = exact_lm(family), label_task()
    method = FunctionVector(heads=4, prompts=3, trials=1, n_dev=10, where=where)
    vector = method.fit(lm, task.train, task.dev, seed=seed)
    means = plain_means(lm.model, [tokens_of(one) for one in draw(task.train, 3, seed=seed)])
    expected = plain_vector(lm.model, means, heads_in(vector))

    def changed(layer: int, tokens: list[int], at: int) -> Tensor:
        def change(h: Tensor) -> Tensor:
            for token in range(at, len(tokens) if where == "each_last" else at + 1):
                h = plus(token, expected)(h)
            return h

        return run(lm.model, tokens, {layer: change}).logits

    scores = best_of(lm.model, task.dev, 10, changed, lm.n_layers)
    best = max(range(lm.n_layers), key=lambda layer: scores[layer])
    assert (edit_of(vector).site, edit_of(vector).where) == (Site("resid", best), Where.parse(where))
    assert found_in(vector)["layer"] == best
    assert found_in(vector)["dev_accuracy"] == pytest.approx([accuracy for accuracy, _ in scores])
    close(added_by(vector), expected)


def test_where_changes_the_tokens_edited_and_not_the_vector() -> None:
    each, last = fitted("llama", where="each_last"), fitted("llama")
    assert edit_of(each).where == Where("each_last")
    assert torch.equal(added_by(each), added_by(last))
    assert heads_in(each) == heads_in(last)


def test_labels_count_what_was_shown_and_asked_for() -> None:
    """Outputs read: those of the drawn prompts, the gold answers of the trials, and dev; the clean queries' are not."""
    task = label_task()
    clean = {demo.input for one in draw(task.train, 2, seed=0) for demo in one.demos}
    trials = draw(task.train, 2, seed=0, shuffled=True)
    asked = {example.input for one in trials for example in (*one.demos, one.query)}
    for layer, read in ((1, 0), (None, 5)):
        vector = fitted("llama", prompts=2, trials=2, layer=layer, n_dev=5)
        assert vector.origin is not None
        assert vector.origin.cost.labels == len(clean | asked) + read
        assert vector.origin.cost.queries == len({one.query for one in draw(task.train, 2, seed=0)})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"heads": 13}, InputError, "heads = 13"),
        ({"heads": 4, "prefilter": 3}, InputError, "heads = 4, prefilter = 3"),
        ({"heads": 4, "prefilter": 13}, InputError, "prefilter = 13"),
        ({"heads": 0}, InputError, "function-vector.heads of at least 1"),
        ({"prompts": 0}, InputError, "function-vector.prompts of at least 1"),
        ({"trials": 0}, InputError, "function-vector.trials of at least 1"),
        ({"n_dev": 0}, InputError, "function-vector.n_dev of at least 1"),
        ({"where": "first"}, InputError, "last_prompt, each_last"),
        ({"layer": 3}, MissingSite, "a layer from 0 to 2"),
    ],
    ids=str,
)
def test_what_cannot_be_fitted_is_refused_before_any_pass(settings: Any, error: type[Exception], message: str) -> None:
    lm = exact_lm("llama")
    with lm.metered() as meter, pytest.raises(error, match=message):
        fitted("llama", **settings)
    assert meter.tokens == 0
