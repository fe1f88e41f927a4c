"""Scores: every number against plain loops over single prompts, the controls, the choice on dev, the comparison."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taskvec import results
from taskvec.comparison import compare, compare_once
from taskvec.errors import InputError, VectorMismatch
from taskvec.evaluate import Condition, choose, observe, random_like, score, score_observed
from taskvec.evaluate.cost import cached_query_cost, query_cost
from taskvec.evaluate.metrics import d_ntp, head_gain, hidden_error, kl, label_logit_error
from taskvec.evaluate.scoring import few_shot
from taskvec.hooks import capture, inject
from taskvec.lm import LM, Encoded
from taskvec.methods import Method
from taskvec.methods.hendel import HendelTaskVector
from taskvec.methods.learned import LearnedTaskVector
from taskvec.methods.linear import LinearTaskVector
from taskvec.methods.prompted import FewShot, ZeroShot
from taskvec.prompts import Example, PromptFormat
from taskvec.replay import Trial
from taskvec.results import Metric, Results, Row
from taskvec.sites import Site
from taskvec.tasks import Dev, Task, TaskSpec
from taskvec.vector import Add, AddKeepNorm, Affine, Edit, Op, Origin, Replace, TaskVector, Where
from tests import tiny

LABELS = ("good", "bad", "not good at all")
R1 = Site("resid", 1)


@cache
def lm() -> LM:
    return tiny.tiny_lm("llama")


@cache
def open_task() -> Task:
    return tiny.tiny_task(shots=3)


@cache
def label_task() -> Task:
    return tiny.tiny_task(shots=3, labels=True)


def task_of(labels: bool) -> Task:
    return label_task() if labels else open_task()


def fitted(method: Method, task: Task, seed: int = 0) -> TaskVector:
    vector = method.fit(lm(), task.train, task.dev, seed=seed)
    assert isinstance(vector, TaskVector)
    return vector


@cache
def linear(labels: bool) -> TaskVector:
    return fitted(LinearTaskVector(queries=10), task_of(labels))


def origin_of(condition: Condition) -> Origin:
    assert condition is not None
    assert condition.origin is not None
    return condition.origin


def ids(text: str) -> list[int]:
    return list(tiny.tokenizer()(text)["input_ids"])


def prompt(query: str, demos: Sequence[Example] = ()) -> str:
    return "".join(f"{demo.input} -> {demo.output}\n" for demo in demos) + f"{query} ->"


@torch.no_grad()
def plain_logits(tokens: Sequence[int], vector: TaskVector | None = None, answer: int = 0) -> Tensor:
    """(T, V) of one sequence whose last `answer` tokens are no part of the prompt."""
    with inject(lm(), [vector]):
        return lm().forward(lm().batch([Encoded(tuple(tokens), answer=answer)]))[0]


def add_vector(seed: int = 1, scale: float = 6.0, site: Site = R1, where: str = "last_prompt") -> TaskVector:
    return TaskVector((Edit(site, Add(tiny.random_vector(lm().width(site), seed, scale)), Where.parse(where)),))


def value(metric: Metric | None) -> float:
    assert metric is not None
    return metric.value


def answers_as(task: Task, condition: Condition, split: str) -> Task:
    """The task, with what `condition` predicts on a split as that split's outputs."""
    part = getattr(task, split)
    said = observe(lm(), part, condition).predictions
    examples = tuple(replace(e, output=text) for e, text in zip(part.examples, said, strict=True))
    return replace(task, **{split: replace(part, examples=examples)})


# --- the divergences --------------------------------------------------------------------------------------------------


def test_d_ntp_by_hand() -> None:
    icl, tv = torch.tensor([[9.0, 0.0, math.log(3.0)]]), torch.tensor([[-9.0, 0.0, 0.0]])
    assert float(d_ntp(icl, tv, [1, 2])) == pytest.approx(0.130812, abs=1e-6)
    assert float(d_ntp(tv, icl, [1, 2])) == pytest.approx(0.143841, abs=1e-6)
    assert float(d_ntp(icl, tv, [2, 1])) == pytest.approx(0.130812, abs=1e-6)
    assert float(kl(icl[:, 1:], tv[:, 1:])) == pytest.approx(0.130812, abs=1e-6)


def test_kl_against_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(4, 7, generator=generator) for _ in range(2))
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    for row, got in enumerate(kl(a, b).tolist()):
        terms = [float(x * (x / y).log()) for x, y in zip(p[row], q[row], strict=True)]
        assert got == pytest.approx(sum(terms), abs=1e-5)
    assert torch.equal(kl(a, a), torch.zeros(4))
    assert (kl(a, b) > 0).all()
    shifted = a + torch.tensor([[1.0], [-5.0], [0.0], [30.0]])
    torch.testing.assert_close(kl(shifted, b), kl(a, b), atol=1e-4, rtol=0)
    torch.testing.assert_close(kl(a, shifted), torch.zeros(4), atol=1e-5, rtol=0)


def test_kl_is_finite_for_huge_logits_and_half_precision() -> None:
    a = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    b = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 0.0, -1e4]])
    found = kl(a, b)
    assert found.isfinite().all()
    assert float(found[0]) == pytest.approx(2e4)
    assert kl(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_d_ntp_keeps_the_bounds_of_the_paper_page() -> None:
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        n, d, k = 12, 16, 2 + seed % 5
        u = torch.randn(k, d, generator=generator) * 0.3
        h_icl = torch.randn(n, d, generator=generator)
        h_tv = h_icl + 10 ** (seed % 3 - 2) * torch.randn(n, d, generator=generator)
        z_icl, z_tv = h_icl @ u.T, h_tv @ u.T
        found = float(d_ntp(z_icl, z_tv, range(k)).mean())
        gap = (z_icl - z_tv) - (z_icl - z_tv).mean(-1, keepdim=True)
        mse = float((h_icl - h_tv).square().sum(-1).mean())
        centred = float(torch.linalg.matrix_norm(u - u.mean(0), 2))
        tight, loose = 0.25 * float(gap.square().sum(-1).mean()), 0.25 * centred**2 * mse
        assert 0 < found <= tight + 1e-6
        assert tight <= loose + 1e-6
        assert found <= 2 * float(torch.linalg.matrix_norm(u, 2)) * mse**0.5


# --- observe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("where", ["last_prompt", "each_last", "at(-2)"])
def test_texts_are_what_generate_says_up_to_the_terminator(labels: bool, where: str) -> None:
    task = task_of(labels)
    for vector in (None, add_vector(where=where)):
        seen = observe(lm(), task.test, vector)
        longest = max(len(ids(f"a -> {output}\n")) - len(ids("a ->")) for output in task.spec.outputs)
        for example, text in zip(task.test.examples, seen.texts, strict=True):
            with inject(lm(), [vector]):
                said = lm().generate(prompt(example.input), max_new_tokens=longest)
            assert text == said.split("\n")[0].strip()
    assert len(set(seen.texts)) > 1


@pytest.mark.parametrize("shown", [False, True])
def test_label_logprobs_are_sums_over_each_labels_tokens(shown: bool) -> None:
    task = label_task()
    condition = few_shot(origin_of(linear(True))) if shown else add_vector()
    demos = origin_of(condition).demos if shown else ()
    seen = observe(lm(), task.test, condition)
    assert seen.labels is not None
    for i, example in enumerate(task.test.examples):
        sums = []
        for label in LABELS:
            head, whole = ids(prompt(example.input, demos)), ids(prompt(example.input, demos) + f" {label}")
            tail = whole[len(head) :]
            assert len(tail) == len(label.split())
            logs = plain_logits(whole, None if shown else add_vector(), len(tail)).log_softmax(-1)
            sums.append(sum(float(logs[len(head) - 1 + k, token]) for k, token in enumerate(tail)))
        assert seen.label_logprobs[i].tolist() == pytest.approx(sums, abs=1e-3)
        assert seen.labels[i] == LABELS[sums.index(max(sums))]


def test_logits_and_golds_are_those_of_the_prompt_and_the_answer_with_its_terminator() -> None:
    task = open_task()
    for vector in (None, add_vector()):
        seen = observe(lm(), task.test, vector)
        for i, example in enumerate(task.test.examples):
            head = ids(prompt(example.input))
            assert seen.prompts[i].ids == tuple(head)
            assert list(seen.golds[i]) == ids(prompt(example.input) + f" {example.output}\n")[len(head) :]
            torch.testing.assert_close(seen.logits[i], plain_logits(head, vector)[-1], atol=1e-4, rtol=0)
        assert seen.labels is None
        assert seen.predictions == seen.texts


# --- score ------------------------------------------------------------------------------------------------------------


def recomputed(records: Sequence[dict[str, Any]], labels: Sequence[str] | None) -> dict[str, float | None]:
    """A row's metrics from its records alone, by their definitions."""

    def share(hits: list[bool]) -> float | None:
        return sum(hits) / len(hits) if hits else None

    hit = "label_correct" if labels else "correct"
    compared = "agrees" in records[0]
    out: dict[str, float | None] = {
        "accuracy": share([r["answer"] == r["output"] for r in records]),
        "first_token_accuracy": share([r["first_token_correct"] for r in records]),
        "label_accuracy": share([r["label"] == r["output"] for r in records]) if labels else None,
        "in_label_rate": share([r["answer"] in labels for r in records]) if labels else None,
        "agreement": share([r["agrees"] for r in records]) if compared else None,
        "when_icl_wrong": share([r[hit] for r in records if r["icl_wrong"]]) if compared else None,
        "macro_f1": None,
    }
    for name in ("d_ntp", "d_ntp_full"):
        terms = [r[name] for r in records if r.get(name) is not None]
        out[name] = math.fsum(terms) / len(terms) if terms else None
    if labels:
        f1s = []
        for label in labels:
            gold, said = ([r[key] == label for r in records] for key in ("output", "label"))
            both = sum(g and s for g, s in zip(gold, said, strict=True))
            if sum(gold) + sum(said):
                f1s.append(2 * both / (sum(gold) + sum(said)))
        out["macro_f1"] = sum(f1s) / len(f1s)
    return out


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("which", ["bare", "linear", "few-shot", "added"])
def test_every_metric_is_recomputed_from_the_records(labels: bool, which: str) -> None:
    task = task_of(labels)
    conditions: dict[str, Condition] = {
        "bare": None,
        "linear": linear(labels),
        "few-shot": few_shot(origin_of(linear(labels))),
        "added": replace(add_vector(), origin=linear(labels).origin),
    }
    # half of the outputs are what the condition says, so that no accuracy is trivially 0
    half = answers_as(task, conditions[which], "test").test.examples[:6] + task.test.examples[6:]
    found = score(lm(), replace(task.test, examples=half), conditions[which])
    (row,) = found.rows
    assert len(found.examples) == row.n == 12
    for name, expected in recomputed(found.examples, task.spec.labels).items():
        metric = getattr(row, name)
        if expected is None:
            assert metric is None, name
        else:
            assert metric.value == pytest.approx(expected, abs=1e-6), name
            assert metric.low - 1e-9 <= metric.value <= metric.high + 1e-9, name
    assert 0 < value(row.headline) <= 1
    assert (row.d_ntp is None) == (which == "bare" or not labels)  # the open task's answers all begin with one token
    for record, example in zip(found.examples, half, strict=True):
        assert (record["input"], record["output"]) == (example.input, example.output)
        assert (record["method"], record["task"], record["seed"]) == (row.method, row.task, row.seed)


@pytest.mark.parametrize("labels", [False, True])
def test_records_are_those_of_plain_passes(labels: bool) -> None:
    task, vector = task_of(labels), linear(labels)
    demos = origin_of(vector).demos
    found = score(lm(), task.test, vector).examples
    support = [ids(f"a -> {label}")[2] for label in LABELS]
    icl_labels = observe(lm(), task.test, few_shot(origin_of(vector))).predictions
    for record, example, icl_says in zip(found, task.test.examples, icl_labels, strict=True):
        tv = plain_logits(ids(prompt(example.input)), vector)[-1].double()
        icl = plain_logits(ids(prompt(example.input, demos)))[-1].double()
        p, q = icl.softmax(-1), tv.softmax(-1)
        assert record["d_ntp_full"] == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-3)
        gold = ids(prompt(example.input) + f" {example.output}\n")[len(ids(prompt(example.input)))]
        assert record["first_token_correct"] == (int(tv.argmax()) == gold)
        if labels:
            p, q = icl[support].softmax(-1), tv[support].softmax(-1)
            assert record["d_ntp"] == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-3)
            assert record["agrees"] == (record["label"] == icl_says)
        else:
            assert record["agrees"] == (record["answer"] == icl_says)
        assert record["icl_wrong"] == (icl_says != example.output)


def test_a_row_says_what_the_vector_cost_and_what_a_query_costs() -> None:
    task = label_task()
    vector = linear(True)
    cost = origin_of(vector).cost
    (row,) = score(lm(), task.test, vector).rows
    assert (row.method, row.task, row.seed, row.n, row.source, row.dtype) == ("linear", "tiny", 0, 12, None, "float32")
    assert (row.fit_labels, row.fit_queries, row.fit_tokens) == (3, 10, cost.tokens)
    assert row.fit_seconds == cost.seconds > 0
    assert row.hyperparameters["queries"] == 10
    mean = sum(len(ids(prompt(e.input))) for e in task.test.examples) / 12
    assert row.prompt_tokens == row.computed_tokens == pytest.approx(mean)
    assert row.query_ms > 0
    few = score(lm(), task.test, few_shot(origin_of(vector))).rows[0]
    longer = sum(len(ids(prompt(e.input, origin_of(vector).demos))) for e in task.test.examples) / 12
    assert few.prompt_tokens == few.computed_tokens == pytest.approx(longer)
    assert longer > mean + 10


def test_a_cached_query_costs_the_tokens_behind_the_shared_prefix() -> None:
    task = label_task()
    origin = origin_of(linear(True))
    prompts = observe(lm(), task.test, few_shot(origin)).prompts
    rows = [list(p.ids) for p in prompts]
    shared = next(i for i in range(999) if len({tuple(row[: i + 1]) for row in rows}) > 1)
    cached, plain = cached_query_cost(lm(), prompts), query_cost(lm(), prompts)
    assert cached is not None
    assert cached.prompt_tokens == plain.prompt_tokens == plain.computed_tokens
    assert cached.computed_tokens == pytest.approx(plain.prompt_tokens - shared)
    assert shared > 10
    assert cached_query_cost(tiny.tiny_lm("mpt"), prompts) is None


def test_few_shot_against_itself_has_no_divergence_and_agrees() -> None:
    task = label_task()
    (row,) = score(lm(), task.test, few_shot(origin_of(linear(True)))).rows
    assert (value(row.d_ntp), value(row.d_ntp_full), value(row.agreement)) == (0, 0, 1)
    assert value(row.when_icl_wrong) == 0  # where few-shot is wrong, it is wrong
    assert row.method == "few-shot"
    assert row.d_ntp_support == 3


def test_a_given_reference_is_used_in_place_of_the_origins() -> None:
    task = label_task()
    bare = observe(lm(), task.test)
    assert value(score(lm(), task.test, None, reference=bare).rows[0].d_ntp_full) == 0
    (row,) = score(lm(), task.test, linear(True), reference=bare).rows
    terms = kl(bare.logits, observe(lm(), task.test, linear(True)).logits)
    assert value(row.d_ntp_full) == pytest.approx(float(terms.mean()), rel=1e-5)
    assert value(row.d_ntp_full) > 0.01


def test_names_of_rows() -> None:
    task = label_task()
    assert score(lm(), task.dev, seed=7).rows[0].method == "zero-shot"
    assert score(lm(), task.dev, seed=7).rows[0].seed == 7
    made = score(lm(), task.dev, add_vector(), seed=7)
    assert (made.rows[0].method, made.rows[0].seed) == ("hand-made", 7)  # not zero-shot
    assert {record["method"] for record in made.examples} == {"hand-made"}
    assert made.rows[0].agreement is made.rows[0].d_ntp_full is None  # nothing says what to compare with
    seen = observe(lm(), task.dev, few_shot(origin_of(linear(True))))
    cached = score_observed(lm(), seen, few_shot(origin_of(linear(True))), None, seed=0, cached=True)
    assert cached.rows[0].method == "few-shot-cached"


def words_task(outputs: Sequence[str], *, labels: bool) -> Task:
    examples = [Example(f"q{i}", outputs[i % len(outputs)]) for i in range(40)]
    names = tuple(outputs) if labels else None
    spec = TaskSpec("words", format=PromptFormat.named("arrow"), shots=4, labels=names)
    return Task.from_examples(spec, examples, n_test=8)


def test_labels_whose_first_tokens_clash_have_no_d_ntp() -> None:
    task = words_task(["not good", "not bad", "fine"], labels=True)
    firsts = [ids(f"a -> {label}")[2] for label in task.spec.labels or ()]
    assert len(set(firsts)) == 2
    found = score(lm(), task.test, fitted(FewShot(), task))
    row = found.rows[0]
    assert row.d_ntp is None
    assert row.d_ntp_support is None
    assert row.d_ntp_full is not None
    assert [record["d_ntp"] for record in found.examples] == [None] * 8


def test_the_support_of_an_open_task_is_the_distinct_first_tokens_of_all_its_outputs() -> None:
    task = words_task(["walked", "talked", "red", "not good", "not bad"], labels=False)
    narrow = replace(task.test, examples=tuple(e for e in task.test.examples if e.output == "walked"))
    vector = fitted(ZeroShot(), task)
    found = score(lm(), narrow, vector)
    support = list({ids(f"a -> {output}")[2] for output in task.spec.outputs})
    assert found.rows[0].d_ntp_support == len(support) == 4
    for record, example in zip(found.examples, narrow.examples, strict=True):
        icl = plain_logits(ids(prompt(example.input, origin_of(vector).demos)))[-1][support].log_softmax(-1)
        tv = plain_logits(ids(prompt(example.input)))[-1][support].log_softmax(-1)
        assert record["d_ntp"] == pytest.approx(float((icl.exp() * (icl - tv)).sum()), abs=1e-4)


def test_another_template_is_refused() -> None:
    task = label_task()
    for other in (PromptFormat.named("qa"), PromptFormat.named("arrow", "Answer.")):
        with pytest.raises(VectorMismatch, match="template"):
            score(lm(), task.with_format(other).test, linear(True))
    with pytest.raises(VectorMismatch, match="the model it was made for"):
        score(tiny.tiny_lm("qwen2"), task.test, linear(True))


def test_test_items_that_the_vector_may_have_seen_are_refused() -> None:
    small, large = (tiny.tiny_task(shots=3, labels=True, n_test=n) for n in (6, 12))
    vector = fitted(HendelTaskVector(layer=1), small)
    with pytest.raises(InputError, match="at most the 6 test items"):
        score(lm(), large.test, vector)
    assert score(lm(), small.test, vector).rows[0].n == 6
    assert score(lm(), small.test, fitted(HendelTaskVector(layer=1), large)).rows[0].n == 6
    other = words_task(["good", "bad"], labels=True)  # other data, of which the vector has seen the demonstrations only
    assert set(origin_of(vector).demos) & set(other.test.examples)
    with pytest.raises(InputError, match="1 of its demonstrations among them"):
        score(lm(), other.test, vector)
    apart = type(other.test)(other.spec, tuple(e for e in other.test.examples if e not in origin_of(vector).demos))
    assert score(lm(), apart, vector).rows[0].n == len(apart) > 0


# --- the random control -----------------------------------------------------------------------------------------------


def some_ops(width: int) -> dict[str, Op]:
    v = tiny.random_vector(width, 1, 2.0)
    generator = torch.Generator().manual_seed(5)
    read, write = (0.2 * torch.randn(4, width, generator=generator) for _ in range(2))
    return {"add": Add(v), "replace": Replace(v), "affine": Affine(read, write), "add-keep-norm": AddKeepNorm(v)}


@pytest.mark.parametrize("name", ["add", "replace", "affine", "add-keep-norm"])
@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_random_moves_as_far_as_the_original_in_another_direction(name: str, strength: float) -> None:
    op = some_ops(32)[name]
    source = random_like(TaskVector((Edit(R1, op, strength=strength),)), seed=0)
    (vector,) = source.vectors(lm(), tiny.random_prompts((9,)))
    assert vector is not None
    (edit,) = vector.edits
    assert (edit.site, edit.where, edit.strength) == (R1, Where(), strength)
    h = torch.stack([tiny.random_vector(32, seed, 3.0) for seed in range(100, 120)])
    original, control = op(h, strength) - h, edit.op(h, edit.strength) - h
    torch.testing.assert_close(control.norm(dim=-1), original.norm(dim=-1), atol=1e-3, rtol=1e-4)
    cosines = torch.cosine_similarity(control, original)
    assert original.norm(dim=-1).min() > 0.1
    assert cosines.abs().max() < 0.8


def test_random_moves_the_models_own_activations_by_the_originals_norm() -> None:
    task, vector = label_task(), linear(True)
    site = Site("lm_head_in")
    control = random_like(vector, seed=3)
    rows = [lm().encode(prompt(e.input)) for e in task.test.examples]
    batch = lm().batch(rows)
    states = []
    for condition in ([None] * len(rows), vector, control):
        with torch.no_grad(), inject(lm(), condition), capture(lm(), [site]) as seen:
            lm().forward(batch)
        states.append(seen[site][torch.arange(len(rows)), batch.last])
    moved, nudged = states[1] - states[0], states[2] - states[0]
    torch.testing.assert_close(nudged.norm(dim=-1), moved.norm(dim=-1), atol=1e-3, rtol=1e-3)
    assert moved.norm(dim=-1).min() > 0.5
    assert (nudged - moved).norm(dim=-1).min() > 0.5


def directions(vectors: Sequence[TaskVector | None]) -> list[Tensor]:
    return [edit.op.tensors()["direction"] for vector in vectors if vector is not None for edit in vector.edits]


def test_random_directions_depend_on_seed_prompt_and_edit_and_on_nothing_else() -> None:
    twice = TaskVector((add_vector().edits[0], add_vector(2).edits[0]))
    a, b, c = tiny.random_prompts((9, 7, 9))
    one = directions(random_like(twice, seed=0).vectors(lm(), [a, b, c]))
    assert len(one) == 6
    assert all(float(d.norm()) == pytest.approx(1) for d in one)
    assert max(abs(float(one[i] @ one[j])) for i in range(6) for j in range(i)) < 0.8
    with tiny.seeded(99):
        torch.rand(3)
        again = directions(random_like(twice, seed=0).vectors(lm(), [c, a]))
    assert all(torch.equal(x, y) for x, y in zip(again, [*one[4:], *one[:2]], strict=True))
    other = directions(random_like(twice, seed=1).vectors(lm(), [a, b, c]))
    assert not any(torch.equal(x, y) for x, y in zip(other, one, strict=True))


def test_random_directions_are_isotropic() -> None:
    drawn = torch.stack(directions(random_like(add_vector(), seed=0).vectors(lm(), tiny.random_prompts((5,) * 400))))
    assert drawn.mean(0).abs().max() < 4 / math.sqrt(400 * 32)
    covariance = drawn.T @ drawn / 400
    torch.testing.assert_close(covariance, torch.eye(32) / 32, atol=0.015, rtol=0)


def test_random_of_a_prompt_of_embeddings() -> None:
    a, b = (Encoded(embeds=torch.full((4, 32), x)) for x in (0.5, 0.25))
    one, two = directions(random_like(add_vector(), seed=0).vectors(lm(), [a, b]))
    assert not torch.equal(one, two)
    assert torch.equal(one, directions(random_like(add_vector(), seed=0).vectors(lm(), [a]))[0])


def test_random_is_scored_alike_however_it_is_run() -> None:
    task, control = label_task(), random_like(linear(True), seed=0)
    whole = observe(lm(), task.test, control)
    part = observe(lm(), replace(task.test, examples=task.test.examples[5:7]), control)
    torch.testing.assert_close(part.logits, whole.logits[5:7], atol=1e-4, rtol=0)
    assert (whole.logits - observe(lm(), task.test, linear(True)).logits).abs().max() > 0.1
    row = score(lm(), task.test, control).rows[0]
    assert row.method == "random"
    assert control.sites == linear(True).sites


# --- sources and adapted models ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ByLength:
    """A vector source: the vector where the prompt's length is even, none where it is odd."""

    vector: TaskVector
    origin: Origin | None = None
    sites: tuple[Site, ...] = (R1,)

    def vectors(self, lm: Any, prompts: Sequence[Any]) -> list[TaskVector | None]:
        return [self.vector if len(p) % 2 == 0 else None for p in prompts]


def test_a_vector_source_is_scored_row_by_row() -> None:
    task = label_task()
    source = ByLength(add_vector(), origin=origin_of(linear(True)).model_copy(update={"method": "by-length"}))
    seen = observe(lm(), task.test, source)
    bare, all_rows = observe(lm(), task.test), observe(lm(), task.test, add_vector())
    even = torch.tensor([len(p) % 2 == 0 for p in seen.prompts])
    assert 0 < int(even.sum()) < len(even)
    torch.testing.assert_close(seen.logits[even], all_rows.logits[even], atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.logits[~even], bare.logits[~even], atol=1e-4, rtol=0)
    assert (all_rows.logits - bare.logits).abs().amax(-1).min() > 0.1
    row = score(lm(), task.test, source).rows[0]
    assert row.method == "by-length"
    assert row.agreement is not None
    control = random_like(source, seed=0).vectors(lm(), seen.prompts)
    assert [vector is not None for vector in control] == even.tolist()


@dataclass(frozen=True, eq=False)
class Biased:
    """An adapted rival: a bias on the unembedding while applied."""

    bias: Tensor
    origin: Origin | None = None

    @contextmanager
    def applied(self, lm: Any) -> Iterator[None]:
        lm.model.lm_head.bias = nn.Parameter(self.bias, requires_grad=False)
        try:
            yield
        finally:
            lm.model.lm_head.bias = None


def test_an_adapted_model_is_proved_anew_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    task, bias = label_task(), tiny.random_vector(tiny.VOCABULARY, 4, 3.0)
    adapted = Biased(bias, origin_of(linear(True)).model_copy(update={"method": "bias"}))
    bare, before = observe(lm(), task.test), tiny.weights_of(lm().model)
    reference = observe(lm(), task.test, few_shot(origin_of(linear(True))))

    proofs, asked, real = dict(lm().proofs), list[bool](), import_module("taskvec.replay.run")._why_not

    def why_not(model: LM) -> str | None:
        asked.append("packed" in model.proofs)
        reason: str | None = real(model)
        return reason

    monkeypatch.setattr(import_module("taskvec.replay.run"), "_why_not", why_not)
    seen = observe(lm(), task.test, adapted)
    assert asked == [False]
    assert lm().proofs == proofs
    torch.testing.assert_close(seen.logits, bare.logits + bias, atol=1e-4, rtol=0)
    assert seen.texts != bare.texts
    row = score(lm(), task.test, adapted, reference=reference).rows[0]
    assert row.method == "bias"
    assert value(row.d_ntp_full) > 0.01
    assert row.query_ms > 0
    after = tiny.weights_of(lm().model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    monkeypatch.undo()
    torch.testing.assert_close(observe(lm(), task.test).logits, bare.logits, atol=0, rtol=0)


def test_nothing_is_proved_about_a_model_while_it_is_adapted() -> None:
    fresh, proved = tiny.fresh_lm("llama"), []

    class Watching(Biased):
        @contextmanager
        def applied(self, lm: Any) -> Iterator[None]:
            proved.append("sites" in lm.proofs)
            with super().applied(lm):
                yield

    observe(fresh, label_task().dev, Watching(torch.zeros(tiny.VOCABULARY)))
    assert proved == [True]


# --- choose -----------------------------------------------------------------------------------------------------------


def answered_dev(task: Task, candidates: Sequence[TaskVector], by: Sequence[int]) -> Dev:
    """Dev items whose outputs are what candidate by[i] answers to item i.

    In an open task, items to which all candidates answer something short and different, so that a gold answer ends
    before the longest one may.
    """
    if task.spec.labels:
        pool: Dev = task.dev
    else:
        spec = replace(task.spec, format=PromptFormat("{input} -> {output}|"), outputs=("0123456789",))
        pool = Dev(spec, task.examples)
    answers = zip(*(observe(lm(), pool, candidate).predictions for candidate in candidates), strict=True)
    rows = list(zip(pool.examples, answers, strict=True))
    if not task.spec.labels:
        rows = [(e, said) for e, said in rows if len(set(said)) == len(said) and _short(said)]
    assert len(rows) >= len(by)
    items = [replace(e, output=said[c]) for (e, said), c in zip(rows, by, strict=False)]
    return replace(pool, examples=tuple(items))


def _short(texts: Sequence[str]) -> bool:
    return all(text and len(ids(text)) < 8 for text in texts)


@pytest.mark.parametrize("labels", [False, True])
def test_choose_takes_the_most_accurate_and_prunes_without_changing_it(labels: bool) -> None:
    candidates = [add_vector(seed) for seed in (2, 10, 13)]
    dev = answered_dev(task_of(labels), candidates, [2, 2, 0, 0, 2, 0, 0, 2] if labels else [2, 0, 2, 1, 2])
    found = choose(lm(), dev, candidates)
    assert found.best == 2
    assert found.accuracy == pytest.approx((6 / 8, 3 / 8, 7 / 8) if labels else (0.2, 0.2, 0.6))
    for c, candidate in enumerate(candidates):  # the unpruned way
        seen = observe(lm(), dev, candidate)
        hits = [said == e.output for said, e in zip(seen.predictions, dev.examples, strict=True)]
        assert found.accuracy[c] == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("labels", [False, True])
def test_choose_takes_candidates_that_edit_different_tokens(labels: bool) -> None:
    wheres = ("last_prompt", "at(-3)", "each_last", "at(0)")
    candidates = [add_vector(seed, where=where) for seed, where in zip((2, 10, 13, 4), wheres, strict=True)]
    dev = answered_dev(task_of(labels), candidates, [2, 1, 1])
    found = choose(lm(), dev, candidates)
    assert any(found.accuracy)
    for c, candidate in enumerate(candidates):
        seen = observe(lm(), dev, candidate)
        hits = [said == e.output for said, e in zip(seen.predictions, dev.examples, strict=True)]
        assert found.accuracy[c] == pytest.approx(sum(hits) / len(hits))
        logs = seen.logits.log_softmax(-1)
        terms = [float(logs[i, gold[0]]) for i, gold in enumerate(seen.golds)]
        assert found.logprob[c] == pytest.approx(sum(terms) / len(terms), abs=1e-3)
    assert found.best == max(range(4), key=lambda c: (found.accuracy[c], found.logprob[c]))


def test_choose_reads_the_first_dev_items_only_and_breaks_ties_by_logprob_then_order() -> None:
    task = open_task()
    candidates = [add_vector(seed) for seed in (2, 10, 13)]
    dev = answered_dev(task, candidates, [1, 1, 2, 2, 2])
    assert choose(lm(), dev, candidates, limit=2).best == 1
    assert choose(lm(), dev, candidates).best == 2
    wrong = Dev(task.spec, tuple(replace(e, output="nobody says this") for e in task.dev.examples))
    found = choose(lm(), wrong, candidates)
    assert set(found.accuracy) == {0.0}
    assert found.best == max(range(3), key=lambda c: found.logprob[c])
    assert len(set(found.logprob)) == 3
    assert choose(lm(), wrong, [candidates[found.best]] * 3).best == 0


@pytest.mark.parametrize(
    ("text", "settled"),
    [
        ("", False),
        (" c", False),
        (" caf", False),
        (" caf\ufffd", False),
        (" caf\ufffdx", True),
        (" café", False),
        (" café\n", True),
        (" cat", True),
    ],
)
def test_choose_goes_on_while_an_answer_may_become_the_gold_one(text: str, settled: bool) -> None:
    """A character of several tokens shows as U+FFFD until its last: that is no wrong answer yet."""
    dev = Dev(open_task().spec, (Example("coffee", "café"),))
    ask = import_module("taskvec.evaluate.choose")._ask(lm(), dev, [Trial(0)])
    assert ask.done(0, text) is settled


# --- compare ----------------------------------------------------------------------------------------------------------

QUICK: tuple[Method, ...] = (HendelTaskVector(layer=1), LinearTaskVector(queries=6))
ROWS = ["zero-shot", "few-shot", "few-shot-cached", "mean-difference", "random", "hendel", "linear", "linear-shuffled"]


@cache
def compared() -> Results:
    return compare(lm(), label_task(), QUICK, seeds=(0, 1))


def test_compare_has_a_row_for_every_method_control_and_seed() -> None:
    found = compared()
    assert [(row.method, row.seed) for row in found.rows] == [(name, seed) for seed in (0, 1) for name in ROWS]
    assert {row.task for row in found.rows} == {"tiny"}
    assert all(row.n == 12 and row.label_accuracy and row.d_ntp_full for row in found.rows)
    assert [row.matched for row in found.rows if row.method != "random"] == [None] * 14
    assert {row.matched for row in found.rows if row.method == "random"} <= {"hendel", "linear"}
    assert len(found.verdicts) == 2


def test_compares_records_belong_to_its_rows() -> None:
    found = compared()
    for row in found.rows:
        records = [r for r in found.examples if (r["method"], r["seed"], r["source"]) == (row.method, row.seed, None)]
        assert [record["input"] for record in records] == [e.input for e in label_task().test.examples]
        for name, expected in recomputed(records, LABELS).items():
            assert (getattr(row, name) is None) == (expected is None)
            if expected is not None:
                assert value(getattr(row, name)) == pytest.approx(expected, abs=1e-6)
    assert len(found.examples) == 12 * len(found.rows)


def test_compares_rows_are_those_of_score() -> None:
    task = label_task()
    row = compared()["linear"]
    alone = score(lm(), task.test, fitted(LinearTaskVector(queries=6), task)).rows[0]
    free = {"fit_seconds": 0.0, "query_ms": 0.0}
    assert replace(row, **free) == replace(alone, **free)  # type: ignore[arg-type]
    few, cached = compared()["few-shot"], compared()["few-shot-cached"]
    assert few.prompt_tokens == few.computed_tokens == cached.prompt_tokens > cached.computed_tokens
    assert few.accuracy == cached.accuracy
    assert compared()["random"].fit_tokens == 0 < row.fit_tokens
    assert compared()["zero-shot"].prompt_tokens == row.prompt_tokens < few.prompt_tokens


def test_compare_chooses_on_dev_and_matches_random_to_the_choice() -> None:
    task = label_task()
    done = compare_once(lm(), task, QUICK)
    reference = observe(lm(), task.dev, done.fitted["few-shot"])
    order = {}
    for name in ("hendel", "linear"):
        seen = observe(lm(), task.dev, done.fitted[name])
        hits = [said == e.output for said, e in zip(seen.predictions, task.dev.examples, strict=True)]
        order[name] = (-sum(hits) / len(hits), float(kl(reference.logits, seen.logits).mean()))
    assert done.chosen == min(order, key=lambda name: order[name])
    assert done.dev.keys() == order.keys()
    for name, (accuracy, divergence) in done.dev.items():
        assert (-accuracy, divergence) == pytest.approx(order[name], abs=1e-4)
    row = done.results["random"]
    assert (row.matched, row.source, row.hyperparameters) == (done.chosen, None, {})
    control = score(lm(), task.test, random_like(done.fitted[done.chosen], seed=0)).rows[0]  # type: ignore[arg-type]
    assert row.d_ntp_full == control.d_ntp_full


def test_compare_without_methods_judges_the_mean_difference() -> None:
    done = compare_once(lm(), label_task(), ["zero-shot", "random"])
    assert [row.method for row in done.results.rows] == ROWS[:5]
    assert done.chosen == done.results["random"].matched == "mean-difference"


def test_a_verdict_says_what_is_kept_and_what_is_saved() -> None:
    task = answers_as(label_task(), few_shot(origin_of(linear(True))), "test")  # few-shot is right everywhere
    done = compare_once(lm(), task, [LinearTaskVector(queries=10)])
    zero, few, kept = (value(done.results[name].headline) for name in ("zero-shot", "few-shot", "linear"))
    assert (few, zero < 1) == (1, True)
    assert done.verdict is not None
    assert done.verdict.kept is not None
    assert done.verdict.kept.value == pytest.approx((kept - zero) / (few - zero))
    assert done.verdict.kept.low <= done.verdict.kept.value <= done.verdict.kept.high
    part = round(100 * done.verdict.kept.value)
    tokens = round(done.results["linear"].prompt_tokens), round(done.results["few-shot"].prompt_tokens)
    assert done.verdict.sentence.startswith(f"tiny: linear keeps {part} % of few-shot")
    assert done.verdict.sentence.endswith(f"with {tokens[0]} instead of {tokens[1]} prompt tokens.")
    assert done.results.verdicts == (done.verdict,)
    assert done.verdict.sentence in str(done.results)


def test_where_few_shot_is_not_above_zero_shot_the_verdict_is_not_to_compile() -> None:
    task = answers_as(label_task(), None, "test")  # zero-shot is right everywhere
    done = compare_once(lm(), task, [LinearTaskVector(queries=10)])
    assert done.verdict is not None
    assert done.verdict.kept is None
    few = round(100 * value(done.results["few-shot"].headline))
    assert done.verdict.sentence == f"tiny: do not compile: few-shot ({few} %) is not above zero-shot (100 %)."
    assert (done.chosen, done.verdict.chosen) == ("linear", "linear")


def test_ready_made_vectors_stand_in_the_table_with_their_source(tmp_path: Path) -> None:
    task = label_task()
    saved = []
    for name, method in (("one", HendelTaskVector(layer=1)), ("two", LinearTaskVector(queries=4))):
        fitted(method, task, seed=5).save_pretrained(tmp_path / name)
        saved.append(TaskVector.from_pretrained(tmp_path / name))
    task = answers_as(answers_as(task, saved[1], "dev"), few_shot(origin_of(saved[1])), "test")
    done = compare_once(lm(), task, [HendelTaskVector(layer=1)], vectors=saved, seed=0)
    rows = done.results.rows
    assert [row.method for row in rows] == [*ROWS[:6], "hendel", "linear"]
    assert [row.source for row in rows] == [None] * 6 + [str(tmp_path / "one"), str(tmp_path / "two")]
    assert {row.seed for row in rows} == {record["seed"] for record in done.results.examples} == {0}
    # dev's outputs are the second's answers: it is chosen, and named by its folder
    assert done.chosen == "vector 1"
    assert done.verdict is not None
    assert done.verdict.chosen == str(tmp_path / "two")
    assert str(tmp_path / "two") in done.verdict.sentence
    assert done.results["random"].matched == "linear"
    by_source = [record for record in done.results.examples if record["source"] == str(tmp_path / "one")]
    assert value(rows[6].label_accuracy) == pytest.approx(np.mean([r["label_correct"] for r in by_source]))
    assert value(rows[7].label_accuracy) == value(
        score(lm(), task.test, saved[1]).rows[0].label_accuracy,
    )


def test_a_hand_made_vector_is_not_called_zero_shot_in_a_table() -> None:
    done = compare_once(lm(), label_task(), [], vectors=[add_vector()])
    assert [row.method for row in done.results.rows] == [*ROWS[:5], "hand-made"]
    assert done.chosen == done.results["random"].matched == "vector 0"
    methods = [record["method"] for record in done.results.examples]
    assert {name: methods.count(name) for name in methods} == dict.fromkeys([*ROWS[:5], "hand-made"], 12)


def test_compare_refuses_what_makes_no_table() -> None:
    task = label_task()
    with pytest.raises(InputError, match="a seed of 0 or more"):
        compare(lm(), task, [], seeds=(-1,))
    with pytest.raises(InputError, match="hendel twice"):
        compare(lm(), task, ["hendel", HendelTaskVector(layer=1)])
    other = replace(linear(True), origin=origin_of(fitted(ZeroShot(), task.with_format(PromptFormat.named("qa")))))
    with pytest.raises(VectorMismatch, match="template"):
        compare(lm(), task, [], vectors=[other])


def test_compare_on_an_open_task_with_a_vector_for_few_shot_prompts() -> None:
    task = open_task()
    method = LearnedTaskVector(layer=1, prompt="few-shot", steps=2, batch=4, queries=6, n_dev=4)
    found = compare(lm(), task, [method])
    assert [row.method for row in found.rows] == [*ROWS[:5], "learned"]
    assert found["learned"].prompt_tokens == found["few-shot"].prompt_tokens
    assert found["learned"].label_accuracy is None
    assert found["learned"].headline == found["learned"].accuracy


def test_an_averaged_table_has_a_line_per_method() -> None:
    lines = results.average_seeds(compared())
    assert [row.method for row in lines] == ROWS
    one, two = (row for row in compared().rows if row.method == "linear")
    assert value(lines[-2].d_ntp_full) == pytest.approx((value(one.d_ntp_full) + value(two.d_ntp_full)) / 2)
    assert all(isinstance(row, Row) for row in lines)


def test_a_method_that_needs_labels_is_refused_before_any_other_is_fitted() -> None:
    with pytest.raises(InputError, match="a task with labels"), lm().metered() as meter:
        compare(lm(), open_task(), ["learned", "calibration"])
    assert meter.passes == 0


# --- errors behind d_ntp ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0.01, 30.0))
def test_a_quarter_of_the_errors_bounds_d_ntp(seed: int, labels: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(12, 7, generator=generator)
    icl, other = (scale * torch.randn(5, 7, generator=generator) for _ in range(2))
    support = list(range(labels))
    apart = label_logit_error(icl @ head.T, other @ head.T, support)
    narrow = d_ntp(icl @ head.T, other @ head.T, support)
    assert (narrow <= apart / 4 + 1e-4 * (1 + apart)).all()
    assert (apart <= head_gain(head[:labels]) * hidden_error(icl, other) * (1 + 1e-4) + 1e-4).all()


def test_the_label_logit_error_is_centred_and_the_hidden_error_is_not() -> None:
    one, two = torch.tensor([[0.0, 3.0, 9.0]]), torch.tensor([[5.0, 4.0, -7.0]])
    assert label_logit_error(one, two, [0, 1]).item() == pytest.approx(2**2 + 2**2)  # D = (-5, -1), mean -3
    assert label_logit_error(one, one + 4.0, [0, 1]).item() == pytest.approx(0.0, abs=1e-9)
    assert hidden_error(one, two).item() == pytest.approx(25 + 1 + 256)


def test_a_row_holds_the_errors_and_the_bound() -> None:
    found = compare(lm(), label_task(), [LinearTaskVector(queries=8)])
    for name in ("zero-shot", "linear", "random"):
        row = found[name]
        assert row.d_ntp is not None
        assert row.label_logit_error is not None
        assert row.d_ntp_bound is not None
        assert 0 < row.d_ntp.value <= row.label_logit_error.value / 4 <= row.d_ntp_bound
    assert found["few-shot"].d_ntp_bound == 0.0
