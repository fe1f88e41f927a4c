"""The packed engine is an identity: held against the plain way on every family, at every site, where and budget."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taskvec.errors import UnfiredEdit
from taskvec.hooks import inject, prove
from taskvec.lm import LM, Encoded
from taskvec.replay import Answers, Ask, Budget, Packed, Plain, Segment, Tree, Trial, packs, replay
from taskvec.replay.packed import KEPT_PARTS
from taskvec.replay.stagger import staggers
from taskvec.replay.tree import ROOT
from taskvec.replay.trials import first_edited
from taskvec.sites import Site
from taskvec.vector import Add, Affine, Edit, Replace, TaskVector, Where
from tests import tiny

LABELS = ((5,), (6, 7), (6, 11), (8, 9, 10))
WHERES = ("last_prompt", "each_last", "all", "role(pair)", "role(mark)", "at(0)", "at(-3,-1)")
SMALL = Budget(tokens=16, bytes=4096)
R1 = Site("resid", 1)

packed_families = pytest.mark.parametrize("name", tiny.PACKED)
unpacked_families = pytest.mark.parametrize("name", tiny.UNPACKED)
windowed_families = pytest.mark.parametrize("name", ["gemma3", "gemma2", "mistral"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


def edit(lm: LM, site: str = "resid[1]", where: str = "last_prompt", seed: int = 1, scale: float = 2.0) -> Edit:
    at = Site.parse(site)
    return Edit(at, Add(tiny.random_vector(lm.width(at), seed, scale)), Where.parse(where))


def full_ask(*states: Site, max_new: int = 4) -> Ask:
    return Ask(keep=lambda _, row: row, labels=LABELS, max_new=max_new, states=states)


def packed(lm: LM, prompts: Sequence[Encoded], trials: Sequence[Trial], budget: Budget | None = None) -> Packed:
    """The packed engine for these trials, whatever `packs` says."""
    prove(lm)
    starts = [
        min([len(prompt) - 1, *(first_edited(prompt, t.vector) for t in trials if t.prompt == i)])
        for i, prompt in enumerate(prompts)
    ]
    return Packed(lm, prompts, starts, budget or Budget())


def assert_same(got: Answers, expected: Answers, atol: float = 1e-4) -> None:
    torch.testing.assert_close(got.kept, expected.kept, atol=atol, rtol=0)
    torch.testing.assert_close(got.label_logprobs, expected.label_logprobs, atol=3 * atol, rtol=0)
    assert got.tokens == expected.tokens
    assert got.states.keys() == expected.states.keys()
    for site, states in expected.states.items():
        torch.testing.assert_close(got.states[site], states, atol=atol, rtol=1e-4)


def usable(lm: LM) -> list[Site]:
    """One site of each kind that the family has, and one head."""
    prove(lm)
    names = (
        "embed",
        "resid[0]",
        f"resid[{lm.n_layers - 1}]",
        "attn[1]",
        "mlp[1]",
        "heads[1]",
        "heads[1,2]",
        "lm_head_in",
    )
    return [s for s in map(Site.parse, names) if s.whole in lm.sites() and s.whole not in lm.proofs["sites"]]


# --- packed is plain --------------------------------------------------------------------------------------------------


@packed_families
def test_packed_equals_plain_at_every_kind_of_site(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((36, 41, 33), shared=30)
    sites = usable(lm)
    vectors = [None, *(TaskVector((edit(lm, str(s), w),)) for s in sites for w in ("last_prompt", "each_last"))]
    trials = [Trial(i, vector) for vector in vectors for i in range(3)]
    ask = full_ask(*sites, max_new=3)
    engine = packed(lm, prompts, trials)
    assert engine.shared == 30
    got = engine.answer(trials, ask)
    assert_same(got, Plain(lm, prompts, rows=32).answer(trials, ask))
    moved = (got.kept[3:] - got.kept[:3].repeat(len(vectors) - 1, 1)).abs().amax(-1)
    assert moved.min() > 1e-3
    assert got.kept.shape == (len(trials), tiny.VOCABULARY)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon"])
@pytest.mark.parametrize("where", WHERES)
def test_packed_equals_plain_for_every_where(name: str, where: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((12, 9, 17), shared=4)
    one, two = (
        TaskVector((edit(lm, where=where),)),
        TaskVector((edit(lm, "mlp[0]", where), edit(lm, "heads[1,2]", where))),
    )
    trials = [Trial(2, two), Trial(0, one), Trial(1), Trial(1, two), Trial(0), Trial(2, one)]
    got = packed(lm, prompts, trials).answer(trials, full_ask(R1))
    assert_same(got, Plain(lm, prompts).answer(trials, full_ask(R1)))
    assert (got.kept[1] - got.kept[4]).abs().max() > 1e-2


@packed_families
def test_teacher_forced_logits_equal_the_plain_ones(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((12, 9, 17), shared=4)
    vectors = [None, TaskVector((edit(lm),)), TaskVector((edit(lm, "resid[0]", "each_last", 3),))]
    answers = ((), (9,), (4, 8, 15))
    trials = [Trial(i, vector, answer) for i, answer in enumerate(answers) for vector in vectors]
    with torch.no_grad():
        outs = [collected(e, trials) for e in (packed(lm, prompts, trials), Plain(lm, prompts, rows=4))]
    for trial, a, b in zip(trials, *outs, strict=True):
        assert a.shape == b.shape == (1 + len(trial.continuation), tiny.VOCABULARY)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def collected(engine: Packed | Plain, trials: Sequence[Trial]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for numbers, logits in engine.batches(trials):
        found |= dict(zip(numbers, logits, strict=True))
    return [found[i] for i in range(len(trials))]


@packed_families
def test_greedy_answers_equal_those_of_generate(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((12, 9, 17), shared=4)
    vector = TaskVector((edit(lm, where="each_last", seed=4),))
    engine = replay(lm, prompts)
    assert engine.packed
    got = engine.answer([Trial(i, v) for v in (None, vector) for i in range(3)], Ask(max_new=5)).tokens
    with inject(lm, vector):
        steered = lm.generate_ids(prompts, max_new_tokens=5)
    assert got == lm.generate_ids(prompts, max_new_tokens=5) + steered


@pytest.mark.parametrize("name", tiny.MAIN)
def test_gradients_of_a_vector_equal_the_plain_ones(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((12, 9, 17), shared=4)
    grads = []
    for kind in (Packed, Plain):
        vectors = [torch.full((lm.width(R1),), 0.1).requires_grad_() for _ in range(2)]
        edits = [Edit(R1, Add(v), Where.parse(w)) for v, w in zip(vectors, ("last_prompt", "each_last"), strict=True)]
        trials = [Trial(i, TaskVector((e,)), (9, 8, 7)) for e in edits for i in range(3)]
        prove(lm)
        engine: Packed | Plain
        engine = Packed(lm, prompts, [11, 8, 16], Budget(tokens=8), keep=True) if kind is Packed else Plain(lm, prompts)
        with lm.frozen():
            for numbers, logits in engine.batches(trials):
                targets = torch.tensor([9, 8, 7, 6])
                loss = torch.stack([torch.nn.functional.cross_entropy(out, targets) for out in logits]).sum()
                assert len(numbers) == len(logits)
                loss.backward()  # type: ignore[no-untyped-call]
        grads.append([v.grad for v in vectors])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        assert b is not None
        assert float((a - b).norm() / b.norm()) < 1e-4
        assert float(b.norm()) > 1e-3
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())


@windowed_families
def test_prompts_longer_than_the_sliding_window_are_exact(name: str) -> None:
    lm = tiny.tiny_lm(name)
    window = lm.config.sliding_window
    assert window == tiny.WINDOW
    prompts = tiny.random_prompts((95, 73, 110), shared=50)  # prefix and own parts both outgrow the window
    vectors = [None, TaskVector((edit(lm, where="at(-20,-1)"),)), TaskVector((edit(lm, "mlp[0]", "each_last"),))]
    trials = [Trial(i, vector) for vector in vectors for i in range(3)]
    engine = packed(lm, prompts, trials)
    got = engine.answer(trials, full_ask(R1))
    assert_same(got, Plain(lm, prompts).answer(trials, full_ask(R1)))
    far = Encoded((7, *prompts[0].ids[1:]))  # the window is there: the first token is out of most layers' reach
    with torch.no_grad():
        near = lm.forward(lm.batch([prompts[0], far]))[:, 40]
    assert (near[0] - near[1]).abs().max() < 3.0


def test_several_edits_keep_their_order_in_each_trial() -> None:
    lm = tiny.tiny_lm("llama")
    width = lm.width(R1)
    plus, put = edit(lm), Edit(R1, Replace(tiny.random_vector(width, 8)), strength=0.5)
    moved = Edit(R1, Affine(0.3 * torch.randn(2, width), 0.3 * torch.randn(2, width)), Where("all"))
    orders = [(plus, put), (put, plus), (plus, plus), (moved, plus, put), (put, moved)]
    prompts = tiny.random_prompts((8, 6))
    trials = [Trial(i, TaskVector(order)) for order in orders for i in range(2)]
    assert_same(
        packed(lm, prompts, trials).answer(trials, full_ask(R1)), Plain(lm, prompts).answer(trials, full_ask(R1))
    )


def test_strengths_and_zero_edits_are_as_in_the_plain_way() -> None:
    lm = tiny.tiny_lm("llama")
    prompts = tiny.random_prompts((8, 6))
    vector = TaskVector((edit(lm),))
    trials = [Trial(i, vector.scaled(s)) for s in (0.0, 0.5, -2.0) for i in range(2)] + [Trial(0), Trial(1)]
    got = packed(lm, prompts, trials).answer(trials, full_ask())
    assert_same(got, Plain(lm, prompts).answer(trials, full_ask()))
    zero, bare = (packed(lm, prompts, some).answer(some, full_ask()) for some in (trials[:2], trials[-2:]))
    assert torch.equal(zero.kept, bare.kept)
    assert torch.equal(zero.label_logprobs, bare.label_logprobs)


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 3), (6,), (6, 6)])
def test_short_single_and_equal_prompts(lengths: tuple[int, ...]) -> None:
    lm = tiny.tiny_lm("gemma3")
    prompts = [Encoded(tiny.random_ids(n, 3)) for n in lengths]
    vector = TaskVector((edit(lm, where="all"),))
    trials = [Trial(i, v) for v in (None, vector) for i in range(len(prompts))]
    for some in (trials[: len(prompts)], trials):
        got = packed(lm, prompts, some).answer(some, full_ask(R1, max_new=2))
        assert_same(got, Plain(lm, prompts).answer(some, full_ask(R1, max_new=2)))


def test_a_trial_that_never_fires_is_an_error() -> None:
    lm = tiny.tiny_lm("llama")
    prompts = tiny.random_prompts((8,))
    trials = [Trial(0, TaskVector((edit(lm, where="role(absent)"),)))]
    for engine in (packed(lm, prompts, trials), Plain(lm, prompts)):
        with pytest.raises(UnfiredEdit, match=r"role\(absent\)"):
            engine.answer(trials, full_ask())


# --- skipping blocks --------------------------------------------------------------------------------------------------


@packed_families
def test_a_sweep_that_skips_the_blocks_below_each_edit_equals_the_plain_way(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prove(lm)
    assert staggers(lm)
    common = tiny.random_ids(20, 1)
    # two prompts that differ in their last token only, one of another length, one that shares nothing
    prompts = [Encoded((*common, 5)), Encoded((*common, 77)), Encoded((*common, 8, 5)), Encoded(tiny.random_ids(7, 2))]
    sites = [*usable(lm), Site("resid", 1), *(Site("heads", i, 1) for i in range(lm.n_layers))]
    sites = [site for site in sites if site.whole in lm.sites()]
    pairs = [(edit(lm, str(site), w, seed),) for seed, site in enumerate(sites) for w in ("last_prompt", "each_last")]
    vectors = [None, *map(TaskVector, pairs), TaskVector((pairs[-1][0], pairs[0][0])), TaskVector((edit(lm), edit(lm)))]
    trials = [Trial(i, vector) for vector in vectors for i in range(4)]
    ask = Ask(keep=lambda _, row: row, labels=((5,), (9,)), max_new=1)
    got = packed(lm, prompts, trials).answer(trials, ask)
    assert_same(got, Plain(lm, prompts).answer(trials, ask))
    alone = packed(lm, prompts[:2], trials[:2]).answer(trials[:2], ask)  # both hang on one segment, as do 2 of 4 above
    torch.testing.assert_close(alone.kept, got.kept[:2], atol=1e-4, rtol=0)


def test_skipped_blocks_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.tiny_lm("llama")
    prove(lm)
    assert staggers(lm)
    prompts = tiny.random_prompts((9, 7), shared=3)
    trials = [Trial(i, TaskVector((edit(lm, f"resid[{layer}]"),))) for layer in (2, 0, 2, 1) for i in range(2)]
    engine = packed(lm, prompts, trials)
    engine.answer(trials[:1], Ask(states=(R1,)))  # what is run once is run
    sizes = list[list[int]]()

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        sizes[-1].append(args[0].shape[1])

    call = LM.call

    def noted(self: LM, **inputs: Any) -> Any:
        sizes.append([])
        queries = [block.module.get_submodule("self_attn.q_proj") for block in lm.blocks]
        handles = [query.register_forward_pre_hook(note) for query in queries]
        out = call(self, **inputs)
        for handle in handles:
            handle.remove()
        return out

    monkeypatch.setattr(LM, "call", noted)
    ask = Ask(keep=lambda _, row: row)
    got = engine.answer(trials, ask)
    monkeypatch.undo()
    assert sizes[-1] == [2 + 2, 2 + 2 + 2, 2 + 2 + 2 + 4]  # the clean tokens, then edits at block 0, 1 and 2
    assert_same(got, Plain(lm, prompts).answer(trials, ask))


def test_embeddings_skip_blocks_alike() -> None:
    lm = tiny.tiny_lm("gpt2")
    prompts = [Encoded((4, 5, 6)), Encoded((4, 5, 7))]
    table = lm.model.get_input_embeddings()
    with torch.no_grad():
        embedded = [Encoded(embeds=table(torch.tensor(p.ids))) for p in prompts]
    trials = [Trial(i, TaskVector((edit(lm, site),))) for site in ("resid[0]", "heads[2,1]") for i in range(2)]
    ask = Ask(keep=lambda _, row: row)
    got = packed(lm, embedded, trials).answer(trials, ask)
    assert_same(got, packed(lm, prompts, trials).answer(trials, ask))
    assert_same(got, Plain(lm, prompts).answer(trials, ask))


def test_a_model_whose_blocks_cannot_be_skipped_runs_them_all() -> None:
    model = tiny.build("llama")
    forward = model.model.layers[2].forward
    model.model.layers[2].forward = lambda h, **kwargs: forward(h, **kwargs) + 0.5 * h.mean(1, keepdim=True)
    lm = LM(model, tiny.tokenizer())
    prove(lm)
    assert not staggers(lm)
    assert staggers(tiny.tiny_lm("llama"))


# --- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "plain"])
def test_only_what_is_asked_is_answered_in_the_trials_order(kind: str) -> None:
    lm = tiny.tiny_lm("llama")
    prompts = tiny.random_prompts((12, 9, 17), shared=4)
    trials = [Trial(i, v) for i in (2, 0, 1, 0) for v in (None, TaskVector((edit(lm),)))]
    engine = packed(lm, prompts, trials, SMALL) if kind == "packed" else Plain(lm, prompts, rows=3)
    whole = engine.answer(trials, full_ask(R1))
    seen = list[int]()

    def keep(i: int, row: Tensor) -> Tensor:
        seen.append(i)
        return torch.stack([row[i], torch.tensor(float(i))])

    only = engine.answer(trials, Ask(keep=keep))
    assert sorted(seen) == list(range(8))
    assert only.kept[:, 1].tolist() == list(range(8))
    torch.testing.assert_close(only.kept[:, 0], whole.kept[range(8), range(8)], atol=1e-4, rtol=0)
    assert only.label_logprobs.numel() == 0
    assert only.tokens == []
    assert only.states == {}
    labels = engine.answer(trials, Ask(labels=LABELS))
    torch.testing.assert_close(labels.label_logprobs, whole.label_logprobs, atol=1e-4, rtol=0)
    assert labels.kept.numel() == 0
    torch.testing.assert_close(engine.answer(trials, Ask(states=(R1,))).states[R1], whole.states[R1], atol=1e-4, rtol=0)
    assert engine.answer(trials, Ask(max_new=4)).tokens == whole.tokens


def test_label_logprobs_are_sums_over_the_labels_tokens() -> None:
    lm = tiny.tiny_lm("qwen3")
    (prompt,) = tiny.random_prompts((9,))
    got = packed(lm, [prompt], [Trial(0)]).answer([Trial(0)], Ask(labels=LABELS)).label_logprobs
    for label, value in zip(LABELS, got[0], strict=True):
        with torch.no_grad():
            logs = lm.model(torch.tensor([[*prompt.ids, *label]])).logits[0].log_softmax(-1)
        expected = sum(float(logs[len(prompt) - 1 + k, token]) for k, token in enumerate(label))
        assert float(value) == pytest.approx(expected, abs=1e-4)


def test_answers_end_where_done_holds_or_at_an_end_token() -> None:
    model = tiny.build("llama")
    lm = LM(model, tiny.tokenizer())
    prompts = tiny.random_prompts((12, 9, 17), shared=4)
    trials = [Trial(i) for i in range(3)]
    free = replay(lm, prompts).answer(trials, Ask(max_new=6)).tokens
    assert all(len(row) == 6 for row in free)
    stops = [lm.decode(row[:n]) for row, n in zip(free, (1, 3, 4), strict=True)]

    def done(trial: int, text: str) -> bool:
        return text == stops[trial]

    ended = LM(model, tiny.tokenizer())
    ended.end_ids = frozenset({free[2][2]})  # replaces the cached property
    for engine in (replay(lm, prompts), Plain(lm, prompts), packed(lm, prompts, trials, SMALL)):
        assert engine.answer(trials, Ask(max_new=6, done=done)).tokens == [free[0][:1], free[1][:3], free[2][:4]]
    for engine in (replay(ended, prompts), Plain(ended, prompts)):
        expected = [row[: row.index(free[2][2])] if free[2][2] in row else row for row in free]
        assert engine.answer(trials, Ask(max_new=6)).tokens == expected
        assert len(expected[2]) == 2


# --- budgets, caches, costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("budget", [SMALL, Budget(tokens=1, bytes=1), Budget(tokens=1024, bytes=2000)])
def test_tiny_budgets_give_the_same_answers(name: str, budget: Budget) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((12, 9, 17, 14, 6), shared=4)
    vectors = [None, *(TaskVector((edit(lm, where=w),)) for w in ("at(-3,-1)", "each_last"))]
    trials = [Trial(i, vector) for vector in vectors for i in range(5)]
    small, big = packed(lm, prompts, trials, budget), packed(lm, prompts, trials, Budget(10**6, 2**30))
    ask = full_ask(R1, max_new=3)
    with lm.metered() as many:
        got = small.answer(trials, ask)
    with lm.metered() as few:
        expected = big.answer(trials, ask)
    assert_same(got, expected)
    assert many.passes > few.passes
    assert len(big._groves) == 1 < len(small._groves)


def test_no_pass_exceeds_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.tiny_lm("llama")
    prompts = tiny.random_prompts((12, 9, 17, 14, 6), shared=4)
    trials = [Trial(i, v) for v in (None, TaskVector((edit(lm),))) for i in range(5)]
    sizes = list[tuple[int, int]]()
    call = LM.call

    def counted(self: LM, **inputs: Any) -> Any:
        sizes.append((inputs["input_ids"].shape[1], inputs["attention_mask"].numel()))
        return call(self, **inputs)

    engine = packed(lm, prompts, trials, SMALL)
    monkeypatch.setattr(LM, "call", counted)
    engine.answer(trials, Ask(labels=LABELS))
    assert len(sizes) > 5
    assert max(size for size, _ in sizes) <= SMALL.tokens
    assert max(4 * mask for _, mask in sizes) <= SMALL.bytes


@pytest.mark.parametrize("budget", [SMALL, Budget()])
def test_keeping_the_groves_changes_nothing_but_the_cost(budget: Budget) -> None:
    lm = tiny.tiny_lm("gemma3")
    prompts = tiny.random_prompts((12, 9, 17), shared=4)
    trials = [Trial(i, v) for v in (None, TaskVector((edit(lm),))) for i in range(3)]
    kept = Packed(lm, prompts, [11, 8, 16], budget, keep=True)
    again = Packed(lm, prompts, [11, 8, 16], budget, keep=False)
    first = kept.answer(trials, full_ask(R1))
    with lm.metered() as warm:
        second = kept.answer(trials, full_ask(R1))
    again.answer(trials, full_ask(R1))
    with lm.metered() as cold:
        third = again.answer(trials, full_ask(R1))
    assert torch.equal(first.kept, second.kept)
    assert_same(second, first)
    assert_same(third, first, atol=1e-5)  # its groves are smaller
    assert cold.tokens - warm.tokens == (11 - 4) + (8 - 4) + (16 - 4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("shared", [0, 4])
def test_a_kept_grove_of_several_parts_equals_the_plain_way(name: str, shared: int) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((12, 9, 17, 14, 6, 13), shared=shared)
    trials = [Trial(i, v, (3, 4)) for v in (None, TaskVector((edit(lm),))) for i in range(6)]
    engine = Packed(lm, prompts, [len(p) - 1 for p in prompts], Budget(tokens=14, bytes=2**20), keep=True)
    assert any(len(parts) == KEPT_PARTS for parts in engine._groves)
    assert len(engine._groves) < sum(map(len, engine._groves))
    got, expected = collected(engine, trials), collected(Plain(lm, prompts), trials)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_a_prefix_is_run_once_and_a_trial_costs_its_last_token() -> None:
    lm = tiny.tiny_lm("llama")
    prompts = tiny.random_prompts((36, 41, 33), shared=30)
    trials = [Trial(i, TaskVector((edit(lm, seed=s),))) for s in range(5) for i in range(3)]
    engine = packed(lm, prompts, trials)
    with lm.metered() as meter:
        engine.answer(trials, Ask(keep=lambda _, row: row, states=(R1,)))
    assert meter.tokens == 30 + (5 + 10 + 2) + 15
    assert meter.passes == 3


def test_training_through_a_kept_grove_can_be_repeated() -> None:
    lm = tiny.tiny_lm("llama")
    prompts = tiny.random_prompts((12, 9), shared=4)
    engine = Packed(lm, prompts, [11, 8], keep=True)
    v = torch.zeros(lm.width(R1), requires_grad=True)
    trials = [Trial(i, TaskVector((Edit(R1, Add(v)),)), (5,)) for i in range(2)]
    grads = []
    with lm.frozen():
        for _ in range(2):
            loss = torch.stack([out.square().mean() for _, outs in engine.batches(trials) for out in outs]).sum()
            grads.append(torch.autograd.grad(loss, v)[0])
    torch.testing.assert_close(grads[0], grads[1], atol=0, rtol=0)
    assert grads[0].norm() > 1e-4


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_prompts_of_embeddings_equal_prompts_of_ids(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((12, 9, 17), shared=4)
    table = lm.model.get_input_embeddings()
    with torch.no_grad():
        embedded = [Encoded(embeds=table(torch.tensor(p.ids)), roles=p.roles) for p in prompts]
    vectors = [None, TaskVector((edit(lm, where="role(pair)"),)), TaskVector((edit(lm, "heads[1,2]"),))]
    trials = [Trial(i, vector) for vector in vectors for i in range(3)]
    expected = packed(lm, prompts, trials).answer(trials, full_ask(R1))
    engine = packed(lm, embedded, trials)
    assert engine.shared == 4
    assert_same(engine.answer(trials, full_ask(R1)), expected)
    plain = Plain(lm, embedded).answer(trials, Ask(keep=lambda _, row: row, labels=((5,),), states=(R1,)))
    torch.testing.assert_close(plain.kept, expected.kept, atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.label_logprobs[:, 0], expected.label_logprobs[:, 0], atol=1e-4, rtol=0)


# --- the tree ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon"])
def test_growing_a_tree_leaves_it_as_it_was(name: str) -> None:
    lm = tiny.tiny_lm(name)
    with torch.no_grad():
        root = Tree(lm).grow([Segment(ROOT, tiny.random_ids(9, 1))]).tree
        keys = [layer.keys.clone() for layer in root.cache.layers]
        segments = [Segment(0, tiny.random_ids(4, 2), keep=4), Segment(0, tiny.random_ids(3, 3), keep=1)]
        one = root.grow(segments)
        other = root.grow([Segment(0, tiny.random_ids(5, 4), ((edit(lm), (1,)),), keep=1)])
        two = root.grow(segments)
    assert all(torch.equal(a, b) for a, b in zip(one.logits, two.logits, strict=True))
    assert all(torch.equal(key, layer.keys) for key, layer in zip(keys, root.cache.layers, strict=True))
    assert (len(root), len(one.tree), len(other.tree)) == (9, 16, 14)
    assert (one.nodes, other.nodes, root.ends) == ((1, 2), (1,), (9,))
    assert [tuple(out.shape) for out in one.logits] == [(4, tiny.VOCABULARY), (1, tiny.VOCABULARY)]


def test_a_segment_may_hang_on_one_of_the_same_pass() -> None:
    lm = tiny.tiny_lm("llama")
    a, b, c = (tiny.random_ids(n, n) for n in (5, 3, 2))
    with torch.no_grad():
        grown = Tree(lm).grow([Segment(ROOT, a), Segment(0, b, keep=1), Segment(1, c, keep=2), Segment(0, c, keep=1)])
        whole, short = (lm.model(torch.tensor([ids])).logits[0] for ids in (a + b + c, a + c))
    torch.testing.assert_close(grown.logits[2], whole[-2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grown.logits[1], whole[[7]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grown.logits[3], short[[-1]], atol=1e-5, rtol=1e-5)
    assert grown.logits[0].shape == (0, tiny.VOCABULARY)


def test_states_are_those_of_each_segments_last_token() -> None:
    lm = tiny.tiny_lm("llama")
    a, b, c = (tiny.random_ids(n, n) for n in (5, 3, 2))
    with torch.no_grad():
        root = Tree(lm).grow([Segment(ROOT, a)]).tree
        grown = root.grow([Segment(0, b), Segment(0, c, keep=1)], states=[R1, Site("lm_head_in")])
        hidden = [lm.model(torch.tensor([a + x]), output_hidden_states=True).hidden_states for x in (b, c)]
    assert grown.states is not None
    assert [len(out) for out in grown.logits] == [0, 1]
    for row in range(2):
        torch.testing.assert_close(grown.states[R1][0, row], hidden[row][2][0, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grown.states["lm_head_in"][0, row], hidden[row][-1][0, -1], atol=1e-5, rtol=1e-5)


@st.composite
def trees(draw: st.DrawFn) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Passes of segments (parent, tokens): a parent is any earlier segment, of an earlier or of the same pass."""
    passes, count = list[list[tuple[int, tuple[int, ...]]]](), 0
    for _ in range(draw(st.integers(1, 3))):
        segments = list[tuple[int, tuple[int, ...]]]()
        for _ in range(draw(st.integers(1, 4))):
            parent = draw(st.integers(-1, count - 1))
            segments.append((parent, tuple(draw(st.lists(st.integers(3, 170), min_size=1, max_size=9)))))
            count += 1
        passes.append(segments)
    return passes


@settings(deadline=None, max_examples=25)
@given(name=st.sampled_from(["llama", "gemma3", "gpt2", "gptj"]), passes=trees())
def test_each_leaf_of_a_random_tree_gets_the_logits_of_its_own_sequence(
    name: str, passes: list[list[tuple[int, tuple[int, ...]]]]
) -> None:
    lm = tiny.tiny_lm(name)
    tree, sequences = Tree(lm), list[tuple[int, ...]]()
    with torch.no_grad():
        for segments in passes:
            grown = tree.grow([Segment(parent, tokens, keep=len(tokens)) for parent, tokens in segments])
            tree = grown.tree
            assert grown.nodes == tuple(range(len(sequences), len(sequences) + len(segments)))
            for (parent, tokens), logits in zip(segments, grown.logits, strict=True):
                sequences.append((sequences[parent] if parent >= 0 else ()) + tokens)
                whole = lm.model(torch.tensor([sequences[-1]])).logits[0, -len(tokens) :]
                torch.testing.assert_close(logits, whole, atol=1e-4, rtol=0)
    assert tree.ends == tuple(map(len, sequences))


# --- which engine -----------------------------------------------------------------------------------------------------


@packed_families
def test_a_family_that_packs_is_proved_once(name: str) -> None:
    lm = tiny.fresh_lm(name)
    with lm.metered() as first:
        assert packs(lm) is None
    with lm.metered() as second:
        assert packs(lm) is None
    assert first.passes > 2
    assert second.passes == 0
    assert isinstance(replay(lm, tiny.random_prompts((5,))), Packed)


@unpacked_families
def test_a_family_that_cannot_be_packed_runs_the_plain_way_and_says_so(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    lm = tiny.fresh_lm(name)
    prompts = tiny.random_prompts((80, 74, 91), shared=50)
    with caplog.at_level(logging.WARNING, "taskvec"):
        engines = [replay(lm, prompts) for _ in range(2)]
    assert all(isinstance(engine, Plain) for engine in engines)
    reason = packs(lm)
    assert reason
    assert [record.getMessage() for record in caplog.records] == [
        f"tiny-{name} runs the plain way (slower, same results): {reason}"
    ]
    with lm.metered() as meter:
        packs(lm)
    assert meter.passes == 0
    vector = TaskVector((edit(lm, where="each_last"),))
    got = engines[0].answer([Trial(i, v) for v in (None, vector) for i in range(3)], full_ask(R1, max_new=2))
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            alone = lm.model(torch.tensor([prompt.ids])).logits[0, -1]
            torch.testing.assert_close(got.kept[i], alone, atol=1e-4, rtol=0)
    with inject(lm, vector):
        assert got.tokens[3:] == lm.generate_ids(prompts, max_new_tokens=2)


@pytest.mark.parametrize("name", ["gpt_neo", "gpt_neo_wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_local_attention_is_refused_whatever_its_reach_and_dtype(name: str, dtype: torch.dtype) -> None:
    lm = LM(tiny.build(name).to(dtype), tiny.tokenizer())
    reason = packs(lm)
    assert reason is not None
    assert "differs from the plain one" in reason
    if dtype == torch.float32:  # and rightly so
        prompts = tiny.random_prompts((80, 74), shared=50)
        trials = [Trial(0), Trial(1)]
        ask = Ask(keep=lambda _, row: row)
        gap = packed(lm, prompts, trials).answer(trials, ask).kept - Plain(lm, prompts).answer(trials, ask).kept
        assert gap.abs().max() > 0.1


def test_a_window_of_unknown_kind_that_is_too_long_to_prove_is_refused() -> None:
    model = tiny.build("llama")
    model.config.max_position_embeddings = 4096
    model.config.attention_chunk_size = 2048
    reason = str(packs(LM(model, tiny.tokenizer())))
    assert "attention_chunk_size" in reason
    assert "2048" in reason
    model.config.attention_chunk_size = 8192  # never reached
    assert packs(LM(model, tiny.tokenizer())) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_pack(dtype: torch.dtype) -> None:
    lm = LM(tiny.build("gemma3").to(dtype), tiny.tokenizer())
    prompts = tiny.random_prompts((30, 24), shared=20)
    trials = [Trial(i, v) for v in (None, TaskVector((edit(lm),))) for i in range(2)]
    engine = replay(lm, prompts)
    assert isinstance(engine, Packed)
    got = engine.answer(trials, Ask(keep=lambda _, row: row, labels=LABELS))
    assert got.kept.dtype == got.label_logprobs.dtype == torch.float32
    exact = Plain(lm, prompts).answer(trials, Ask(keep=lambda _, row: row, labels=LABELS))
    assert (got.kept - exact.kept).abs().max() < (0.3 if dtype == torch.bfloat16 else 1e-5)


def renamed(model: Any, name: str) -> Any:
    """The same model under another family's name."""
    model.__class__ = type(name, (type(model),), {})
    model.config._name_or_path = name
    model.config.architectures = [name]
    return model


def test_no_name_is_trusted() -> None:
    good = LM(renamed(tiny.build("llama"), "MptForCausalLM"), tiny.tokenizer(), name="mpt-7b")
    bad = LM(renamed(tiny.build("gpt_neo"), "LlamaForCausalLM"), tiny.tokenizer(), name="llama-7b")
    assert packs(good) is None
    assert packs(bad) is not None


def test_a_model_that_fails_in_a_packed_pass_gets_the_plain_way() -> None:
    model = tiny.build("llama")
    forward = model.forward

    def picky(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4:
            raise ValueError("only 2-D masks here\nsecond line")
        return forward(*args, **kwargs)

    picky.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = picky
    lm = LM(model, tiny.tokenizer())
    assert packs(lm) == "a packed pass failed (ValueError: only 2-D masks here)"
    assert isinstance(replay(lm, tiny.random_prompts((5,))), Plain)
