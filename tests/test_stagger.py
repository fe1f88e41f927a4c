"""Skipping the blocks below each edit: the same logits as the plain way, on every architecture that packs."""

import logging

import pytest
import torch

from taskvec.replay import Ask, Packed, Plain, Trial
from taskvec.replay import packed as packed_module
from taskvec.replay.stagger import join_block, staggers
from taskvec.sites import Site
from taskvec.vector import Add, Edit, Replace, TaskVector
from tests.tiny import MAIN, PACKED, fresh_lm, random_prompts, random_vector, tiny_lm


def trials_everywhere(name: str) -> tuple[list[Trial], list[int]]:
    """One trial per site and prompt, edits of two kinds, and one trial without an edit; and the prompts' lengths."""
    lm = tiny_lm(name)
    sites = [Site("embed"), Site("lm_head_in"), Site("heads", 1, 2), Site("heads", lm.n_layers - 1, 0)]
    sites += [Site("resid", layer) for layer in range(lm.n_layers)]
    vectors: list[TaskVector | None] = [None]
    for i, site in enumerate(sites):
        op = Add(random_vector(lm.width(site), i)) if i % 2 else Replace(random_vector(lm.width(site), i))
        vectors.append(TaskVector((Edit(site, op),)))
    two = Edit(Site("resid", 0), Add(random_vector(lm.width(Site("resid", 0)), 77)))
    vectors.append(TaskVector((Edit(Site("lm_head_in"), Add(random_vector(lm.width(Site("lm_head_in")), 78))), two)))
    lengths = [9, 14, 23]
    return [Trial(i, vector) for vector in vectors for i in range(len(lengths))], lengths


@pytest.mark.parametrize("name", PACKED)
def test_a_staggered_replay_equals_the_plain_way(name: str) -> None:
    lm = tiny_lm(name)
    trials, lengths = trials_everywhere(name)
    prompts = random_prompts(lengths, shared=4)
    ask = Ask(keep=lambda _, logits: logits, labels=((7,), (9,)), max_new=1)
    engine = Packed(lm, prompts, [length - 1 for length in lengths])
    assert staggers(lm)
    quick, plain = engine.answer(trials, ask), Plain(lm, prompts).answer(trials, ask)
    assert float((quick.kept - plain.kept).abs().max()) < 1e-4 * float(plain.kept.abs().max().clamp_min(1))
    assert torch.allclose(quick.label_logprobs, plain.label_logprobs, atol=1e-3)
    assert quick.tokens == plain.tokens


def test_tokens_below_the_edit_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fresh_lm("llama")
    prompts = random_prompts([12])
    vectors = [TaskVector((Edit(Site("resid", 2), Add(random_vector(32, i))),)) for i in range(6)]
    engine = Packed(lm, prompts, [11])
    staggers(lm)
    seen: list[tuple[int, int]] = []
    for layer, block in enumerate(lm.blocks):
        block.module.self_attn.register_forward_hook(  # type: ignore[union-attr]
            lambda _, __, out, layer=layer: seen.append((layer, out[0].shape[1]))
        )
    engine.answer([Trial(0, vector) for vector in vectors], Ask(keep=lambda _, logits: logits))
    assert seen[-3:] == [(0, 1), (1, 1), (2, 7)]


def test_longer_answers_take_the_full_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a staggered pass cannot be continued")

    monkeypatch.setattr(packed_module, "grow_staggered", forbidden)
    lm = tiny_lm("llama")
    engine = Packed(lm, random_prompts([8, 9]), [7, 8])
    trials = [Trial(0), Trial(1)]
    asks = (Ask(max_new=2), Ask(labels=((3, 4), (5,))), Ask(states=(Site("resid", 0),)))
    for ask in asks:
        engine.answer(trials, ask)
    with pytest.raises(AssertionError, match="continued"):
        engine.answer(trials, Ask(keep=lambda _, logits: logits))


def test_a_model_that_fails_the_proof_runs_in_full(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm = fresh_lm("gpt2")
    lm.proofs["staggered"] = False
    monkeypatch.setattr(packed_module, "grow_staggered", lambda *_: pytest.fail("it must not be used"))
    prompts = random_prompts([8])
    vectors = [TaskVector((Edit(Site("resid", i), Add(random_vector(32, i))),)) for i in range(2)]
    trials = [Trial(0, vector) for vector in vectors]
    ask = Ask(keep=lambda _, logits: logits)
    with caplog.at_level(logging.WARNING):
        got = Packed(lm, prompts, [7]).answer(trials, ask).kept
    assert torch.allclose(got, Plain(lm, prompts).answer(trials, ask).kept, atol=1e-4)


@pytest.mark.parametrize("name", MAIN)
def test_edits_join_at_the_first_block_they_change(name: str) -> None:
    lm = tiny_lm(name)
    last = lm.n_layers - 1
    op = Add(random_vector(4, 0))
    blocks = {"embed": 0, "lm_head_in": last, "resid[1]": 1, "heads[2,0]": 2}
    for site, block in blocks.items():
        assert join_block(lm, [Edit(Site.parse(site), op)]) == block
    assert join_block(lm, [Edit(Site.parse(site), op) for site in ("lm_head_in", "resid[1]")]) == 1
    assert join_block(lm, []) == last
