"""inject and capture: where edits act under padding, batching, caches and answers, and that no edit is ever silent."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taskvec.errors import InputError, MissingSite, UnfiredEdit, VectorMismatch
from taskvec.hooks import capture, check_fits, inject, inject_at, prove
from taskvec.lm import LM, Encoded
from taskvec.placing import Placed
from taskvec.prompts import PromptFormat
from taskvec.sites import Site
from taskvec.vector import Add, AddKeepNorm, Affine, Blend, Edit, ModelId, Origin, Replace, TaskVector, Where
from taskvec.vector.origin import FormatRecord
from tests import tiny

FAMILIES = ("llama", "gemma3", "gpt2")
WHERES = ("last_prompt", "each_last", "all", "role(pair)", "at(0,-2)")
R1 = Site("resid", 1)

some_families = pytest.mark.parametrize("name", FAMILIES)
every_where = pytest.mark.parametrize("where", WHERES)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


def add(lm: LM, *, site: str = "resid[1]", where: str = "last_prompt", seed: int = 1, scale: float = 2.0) -> Edit:
    at = Site.parse(site)
    return Edit(at, Add(tiny.random_vector(lm.width(at), seed, scale)), Where.parse(where))


def vector_of(*edits: Edit) -> TaskVector:
    return TaskVector(edits)


@torch.no_grad()
def logits_of(
    lm: LM, vectors: Any, prompts: Sequence[Encoded], side: Literal["left", "right"] = "right"
) -> list[Tensor]:
    """Each prompt's logits at its real tokens, in one batch under these vectors."""
    batch = lm.batch(prompts, side=side)
    with inject(lm, vectors):
        out = lm.forward(batch)
    return [row[keep] for row, keep in zip(out, batch.mask.bool(), strict=True)]


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], atol: float = 2e-5) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


# --- the reference: one whole sequence, a plain hook, tokens counted by hand -----------------------------------------


def edited_tokens(where: str, prompt: int, whole: int, roles: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Which tokens of a sequence an edit acts on, written out from the definition."""
    if where == "last_prompt":
        return [prompt - 1]
    if where == "each_last":
        return list(range(prompt - 1, whole))
    if where == "all":
        return list(range(whole))
    if where.startswith("role"):
        return list(roles[where[5:-1]])
    return [(int(i) + prompt) % prompt for i in where[3:-1].split(",")]


@torch.no_grad()
def reference(lm: LM, layer: int, v: Tensor, tokens: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Logits (T, V) of one unpadded sequence with v added to a block's output at some tokens."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        new = h.clone()
        for t in tokens:
            new[0, t] = new[0, t] + v
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = lm.blocks[layer].module.register_forward_hook(hook)
    try:
        return lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]  # type: ignore[no-any-return]
    finally:
        handle.remove()


def reference_answer(lm: LM, edit: Edit, prompt: Encoded, steps: int) -> list[int]:
    """The slow greedy loop: the full sequence again at each step, edited at the prompt and at all answer tokens."""
    assert isinstance(edit.op, Add)
    assert edit.site.layer is not None
    ids = list(prompt.ids)
    for _ in range(steps):
        tokens = edited_tokens(str(edit.where), len(prompt), len(ids), prompt.roles)
        ids.append(int(reference(lm, edit.site.layer, edit.op.vector, tokens, ids)[-1].argmax()))
    return lm.before_end(ids[len(prompt) :])


# --- where: one meaning ----------------------------------------------------------------------------------------------


@some_families
@every_where
def test_where_means_the_same_under_any_padding_and_batching(name: str, where: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((21, 5, 13))
    edit = add(lm, where=where)
    assert isinstance(edit.op, Add)
    expected = [reference(lm, 1, edit.op.vector, edited_tokens(where, len(p), len(p), p.roles), p.ids) for p in prompts]
    vector = vector_of(edit)
    assert_same(logits_of(lm, vector, prompts, "right"), expected)
    assert_same(logits_of(lm, vector, prompts, "left"), expected)
    assert_same([logits_of(lm, vector, [prompt])[0] for prompt in prompts], expected)
    bare = logits_of(lm, [None] * 3, prompts)
    assert all((a - b)[-1].abs().max() > 1e-2 for a, b in zip(expected, bare, strict=True))


@some_families
@every_where
def test_where_means_the_same_under_a_teacher_forced_answer(name: str, where: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((11, 5))
    whole = [p.followed_by(answer) for p, answer in zip(prompts, ((9, 8, 7), (4,)), strict=True)]
    edit = add(lm, where=where)
    assert isinstance(edit.op, Add)
    expected = [
        reference(lm, 1, edit.op.vector, edited_tokens(where, len(p), len(w), p.roles), w.ids)
        for p, w in zip(prompts, whole, strict=True)
    ]
    for side in ("left", "right"):
        assert_same(logits_of(lm, vector_of(edit), whole, side), expected)


@some_families
@every_where
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_equals_the_slow_loop(name: str, where: str, use_cache: bool) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((9, 5, 7), seed=3)
    edit = add(lm, where=where, seed=4)
    with inject(lm, vector_of(edit)):
        got = lm.generate_ids(prompts, max_new_tokens=6, use_cache=use_cache)
    assert got == [reference_answer(lm, edit, prompt, 6) for prompt in prompts]
    assert got != lm.generate_ids(prompts, max_new_tokens=6)


def test_each_last_and_last_prompt_give_different_answers() -> None:
    lm = tiny.tiny_lm("llama")
    prompts = tiny.random_prompts((9, 5, 7), seed=3)
    answers = []
    for where in ("last_prompt", "each_last"):
        with inject(lm, vector_of(add(lm, where=where, seed=4))):
            answers.append(lm.generate_ids(prompts, max_new_tokens=6))
    assert [row[0] for row in answers[0]] == [row[0] for row in answers[1]]
    assert answers[0] != answers[1]


def test_roles_of_an_encoded_text_are_edited_at_their_tokens() -> None:
    lm = tiny.tiny_lm("gpt2")
    task = tiny.tiny_task()
    prompt = lm.encode(task.spec.format.prompt("red3", task.train.examples[:2]))
    assert len(prompt.roles["separator"]) == 2
    with torch.no_grad(), capture(lm, ["resid[0]"]) as clean:
        lm.forward(lm.batch([prompt]))
    edit = add(lm, site="resid[0]", where="role(separator)")
    with torch.no_grad(), inject(lm, vector_of(edit)) as injection, capture(lm, ["resid[0]"]) as dirty:
        lm.forward(lm.batch([prompt]))
    moved = (clean["resid[0]"] - dirty["resid[0]"])[0].abs().amax(-1).nonzero()[:, 0]
    assert tuple(moved.tolist()) == prompt.roles["separator"]
    assert injection.fired == {"resid[0] role(separator)": 2}


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    answers=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    kind=st.sampled_from(["last_prompt", "each_last", "all", "at(-1)", "at(0)", "at(0,-1)"]),
    side=st.sampled_from(["left", "right"]),
)
def test_the_edited_tokens_are_exactly_those_of_the_definition(
    lengths: list[int], answers: list[int], kind: str, side: Literal["left", "right"]
) -> None:
    lm = tiny.tiny_lm("llama")
    prompts = [
        Encoded(tiny.random_ids(n, i)).followed_by(tiny.random_ids(answers[i], 9)) for i, n in enumerate(lengths)
    ]
    batch = lm.batch(prompts, side=side)
    with torch.no_grad():
        with capture(lm, [R1]) as clean:
            lm.forward(batch)
        with inject(lm, vector_of(add(lm, where=kind))), capture(lm, [R1]) as dirty:
            lm.forward(batch)
    for row, prompt in enumerate(prompts):
        moved = (clean[R1][row] - dirty[R1][row]).abs().amax(-1) > 0
        assert not moved[batch.mask[row] == 0].any()
        expected = edited_tokens(kind, prompt.prompt_length, len(prompt), {})
        assert moved[batch.mask[row].bool()].nonzero()[:, 0].tolist() == sorted(set(expected))


# --- the model's own methods -----------------------------------------------------------------------------------------


@some_families
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_raw_forward_pass_works_by_its_mask(name: str, side: Literal["left", "right"]) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((9, 5))
    batch = lm.batch(prompts, side=side)
    vector = vector_of(add(lm))
    expected = logits_of(lm, vector, prompts, side)
    with torch.no_grad(), inject(lm, vector):
        out = lm.model(**lm.inputs(batch)).logits
    assert_same([row[keep] for row, keep in zip(out, batch.mask.bool(), strict=True)], expected)


def test_a_raw_forward_pass_without_a_mask_takes_every_token_as_real() -> None:
    lm = tiny.tiny_lm("llama")
    (prompt,) = tiny.random_prompts((9,))
    vector = vector_of(add(lm, where="at(0,-1)"))
    with torch.no_grad(), inject(lm, vector):
        out = lm.model(torch.tensor([prompt.ids])).logits
    assert_same([out[0]], logits_of(lm, vector, [prompt]))


def test_a_mask_that_is_passed_by_position_counts() -> None:
    lm = tiny.tiny_lm("llama")
    batch = lm.batch(tiny.random_prompts((9, 5)), side="left")
    vector = vector_of(add(lm, where="at(0)"))
    with torch.no_grad(), inject(lm, vector):
        by_name = lm.model(input_ids=batch.ids, attention_mask=batch.mask).logits
        by_position = lm.model(batch.ids, batch.mask).logits
    assert torch.equal(by_name, by_position)


@some_families
def test_the_models_own_generate_works_by_its_mask(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((9, 5), seed=3)
    batch = lm.batch(prompts, side="left")
    for where in ("last_prompt", "each_last", "all"):
        edit = add(lm, where=where, seed=4)
        with inject(lm, vector_of(edit)):
            out = lm.model.generate(
                input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=5, do_sample=False, pad_token_id=0
            )
        got = [lm.before_end(row) for row in out[:, batch.mask.shape[1] :].tolist()]
        assert got == [reference_answer(lm, edit, prompt, 5) for prompt in prompts]


def test_a_second_generation_inside_the_same_context_starts_anew() -> None:
    lm = tiny.tiny_lm("llama")
    long, short = tiny.random_prompts((14, 5), seed=3)
    edit = add(lm, where="each_last", seed=4)
    with inject(lm, vector_of(edit)):
        first, second = (lm.generate_ids([prompt], max_new_tokens=4) for prompt in (long, short))
    assert (first, second) == ([reference_answer(lm, edit, long, 4)], [reference_answer(lm, edit, short, 4)])


# --- vectors per row, sources, strength ------------------------------------------------------------------------------


@some_families
def test_each_row_gets_its_own_vector_or_none(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((9, 5, 7))
    one, two = vector_of(add(lm, seed=1)), vector_of(add(lm, site="mlp[0]", where="all", seed=2))
    got = logits_of(lm, [one, None, two], prompts, "left")
    expected = [logits_of(lm, [v], [p])[0] for v, p in zip([one, None, two], prompts, strict=True)]
    assert_same(got, expected)
    with inject(lm, [one, None, two]):
        answers = lm.generate_ids(prompts, max_new_tokens=4)
    assert answers[1] == lm.generate_ids([prompts[1]], max_new_tokens=4)[0]


def test_as_many_vectors_as_rows_are_wanted() -> None:
    lm = tiny.tiny_lm("llama")
    with pytest.raises(InputError, match="2 vectors for 3 rows"), inject(lm, [None, vector_of(add(lm))]):
        lm.forward(lm.batch(tiny.random_prompts((4, 4, 4))))


def test_rows_may_use_the_same_edits_in_other_orders() -> None:
    lm = tiny.tiny_lm("llama")
    width = lm.width(R1)
    plus, put = Edit(R1, Add(torch.ones(width))), Edit(R1, Replace(torch.ones(width)))
    with torch.no_grad(), inject(lm, [TaskVector((plus, put)), TaskVector((put, plus))]), capture(lm, [R1]) as seen:
        lm.forward(lm.batch(tiny.random_prompts((5, 5))))
    torch.testing.assert_close(seen[R1][:, -1], torch.tensor([[1.0], [2.0]]).expand(2, width))


@dataclass(frozen=True, eq=False)
class Source:
    """A vector source that adds, at resid[1], a multiple of what it reads there on the bare prompt."""

    scale: float = 1.0
    where: str = "last_prompt"
    origin: Origin | None = None
    sites: tuple[Site, ...] = (R1,)

    def vectors(self, lm: Any, prompts: Sequence[Any]) -> list[TaskVector | None]:
        with torch.no_grad(), capture(lm, [R1]) as seen:
            lm.forward(lm.batch(prompts))
        states = [seen[R1][i, len(p) - 1] for i, p in enumerate(prompts)]
        return [vector_of(Edit(R1, Add(self.scale * h), Where.parse(self.where))) for h in states]


@some_families
def test_a_source_that_runs_the_model_writes_a_vector_per_row(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((9, 5))
    written = Source(0.5).vectors(lm, prompts)
    expected = logits_of(lm, written, prompts)
    assert_same(logits_of(lm, Source(0.5), prompts, "left"), expected)
    assert not torch.allclose(expected[0], logits_of(lm, [None, None], prompts)[0], atol=1e-2)


def test_a_source_writes_once_per_generation_from_the_prompt() -> None:
    lm = tiny.tiny_lm("llama")
    prompts = tiny.random_prompts((9, 5), seed=3)
    source = Source(0.5, "each_last")
    written = source.vectors(lm, prompts)
    with inject(lm, source):
        got = lm.generate_ids(prompts, max_new_tokens=4)
    expected = [reference_answer(lm, v.edits[0], p, 4) for v, p in zip(written, prompts, strict=True) if v is not None]
    assert got == expected


def test_strength_scales_a_source_and_rows_alike() -> None:
    lm = tiny.tiny_lm("llama")
    prompts = tiny.random_prompts((9, 5))
    batch = lm.batch(prompts)
    with torch.no_grad():
        with inject(lm, Source(1.0), strength=0.25):
            scaled = lm.forward(batch)
        with inject(lm, Source(0.25)):
            smaller = lm.forward(batch)
        with inject(lm, Source(0.25).vectors(lm, prompts), strength=0.5):
            rows = lm.forward(batch)
        with inject(lm, Source(0.125)):
            smallest = lm.forward(batch)
    torch.testing.assert_close(scaled, smaller, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows, smallest, atol=1e-5, rtol=1e-5)


def test_a_source_needs_the_prompts() -> None:
    lm = tiny.tiny_lm("llama")
    with pytest.raises(InputError, match="a bare forward pass"), inject(lm, Source()):
        lm.model(torch.tensor([[5, 6, 7]]))


def test_a_source_that_was_never_asked_or_never_fired_is_an_error() -> None:
    lm = tiny.tiny_lm("llama")
    with pytest.raises(UnfiredEdit), inject(lm, Source()):
        pass
    with pytest.raises(UnfiredEdit), inject(lm, Source(where="role(absent)")):
        lm.forward(lm.batch(tiny.random_prompts((5,))))


@pytest.mark.parametrize("strength", [0.5, 2.0, -1.0])
def test_strength_is_how_far_the_state_moves(strength: float) -> None:
    lm = tiny.tiny_lm("llama")
    width = lm.width(R1)
    batch = lm.batch(tiny.random_prompts((6, 6)))
    v, matrix = tiny.random_vector(width, 3), torch.stack([tiny.random_vector(width, i) for i in range(2)])
    with torch.no_grad(), capture(lm, [R1]) as clean:
        lm.forward(batch)
    h = clean[R1][:, -1]
    for op in (Add(v), Replace(v), Blend(v, 0.3, 0.6), Affine(matrix, matrix, v), AddKeepNorm(v)):
        target = h + strength * (op.apply(h) - h)
        for vector, outer in (
            (TaskVector((Edit(R1, op, strength=strength),)), 1.0),
            (vector_of(Edit(R1, op)), strength),
        ):
            with torch.no_grad(), inject(lm, vector, strength=outer), capture(lm, [R1]) as seen:
                lm.forward(batch)
            torch.testing.assert_close(seen[R1][:, -1], target, atol=1e-5, rtol=1e-5)


# --- what changes nothing --------------------------------------------------------------------------------------------


@some_families
def test_zero_edits_are_bit_identical_to_no_edit(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((9, 5))
    batch = lm.batch(prompts)
    edit = add(lm, where="all")
    nothing = Edit(R1, Add(torch.zeros(lm.width(R1))), Where("all"))
    with torch.no_grad():
        bare = lm.forward(batch)
        cases: list[tuple[Any, float]] = [
            (vector_of(replace(edit, strength=0.0)), 1.0),
            (vector_of(edit), 0.0),
            (vector_of(nothing), 1.0),
            (TaskVector(()), 1.0),
            ([None, None], 1.0),
            (Source(), 0.0),
        ]
        for vectors, strength in cases:
            with inject(lm, vectors, strength=strength):
                assert torch.equal(lm.forward(batch), bare)
        with inject(lm, vector_of(edit)):
            assert not torch.equal(lm.forward(batch), bare)


@some_families
@pytest.mark.parametrize("site", ["embed", "resid[1]", "attn[1]", "mlp[1]", "heads[1]", "heads[1,3]", "lm_head_in"])
def test_replacing_a_state_by_itself_changes_nothing(name: str, site: str) -> None:
    lm = tiny.tiny_lm(name)
    at = Site.parse(site)
    batch = lm.batch(tiny.random_prompts((9,)))
    with torch.no_grad():
        with capture(lm, [at]) as seen:
            bare = lm.forward(batch)
        with inject(lm, vector_of(Edit(at, Replace(seen[at][0, -1])))):
            assert torch.equal(lm.forward(batch), bare)
        with inject(lm, vector_of(Edit(at, Replace(seen[at][0, 0])))):
            assert not torch.equal(lm.forward(batch), bare)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_edit_that_never_fires_is_an_error_that_names_it() -> None:
    lm = tiny.tiny_lm("llama")
    with pytest.raises(UnfiredEdit, match=r"Add at resid\[1\], last_prompt"), inject(lm, vector_of(add(lm))):
        pass
    absent = vector_of(add(lm), add(lm, site="mlp[0]", where="role(absent)"))
    with pytest.raises(UnfiredEdit, match=r"mlp\[0\], role\(absent\)"), inject(lm, absent):
        lm.forward(lm.batch(tiny.random_prompts((5,))))
    outside = vector_of(add(lm, where="at(7)"))
    with pytest.raises(UnfiredEdit, match=r"at\(7\)"), inject(lm, outside):
        lm.forward(lm.batch(tiny.random_prompts((5,))))
    with pytest.raises(UnfiredEdit), inject(lm, [None, vector_of(add(lm, where="at(7)"))]):
        lm.forward(lm.batch(tiny.random_prompts((9, 5))))


def test_placed_edits_that_never_fire_are_an_error() -> None:
    lm = tiny.tiny_lm("llama")
    prove(lm)
    edit = add(lm)
    with pytest.raises(UnfiredEdit), inject_at(lm, [Placed(edit, (0,), (9,))]):
        lm.forward(lm.batch(tiny.random_prompts((5,))))


def test_fired_counts_tokens() -> None:
    lm = tiny.tiny_lm("llama")
    vector = vector_of(add(lm), add(lm, site="mlp[0]", where="each_last"), add(lm, site="embed", where="at(0,1)"))
    with inject(lm, vector) as injection:
        assert set(injection.fired.values()) == {0}
        lm.generate_ids([Encoded((5, 6, 7)), Encoded((8, 9))], max_new_tokens=1)
        assert injection.fired == {"resid[1] last_prompt": 2, "mlp[0] each_last": 2, "embed at(0,1)": 4}
        lm.forward(lm.batch([Encoded((5, 6, 7)).followed_by((4, 4))]))
    assert injection.fired == {"resid[1] last_prompt": 3, "mlp[0] each_last": 5, "embed at(0,1)": 6}


def origin_of(lm: LM, fingerprint: str) -> Origin:
    return Origin(
        method="hand",
        model=ModelId(id="another-model", fingerprint=fingerprint),
        format=FormatRecord.of(PromptFormat.named("qa")),
        task="t",
        data_hash="",
        seed=0,
    )


def test_a_vector_of_another_model_is_refused() -> None:
    lm = tiny.tiny_lm("llama")
    edits = (add(lm),)
    own = TaskVector(edits, origin_of(lm, lm.fingerprint))
    other = TaskVector(edits, origin_of(lm, tiny.tiny_lm("qwen3").fingerprint))
    check_fits(lm, own)
    with pytest.raises(VectorMismatch, match="another-model"), inject(lm, other):
        pass
    with pytest.raises(VectorMismatch, match="another-model"), inject(lm, [own, other]):
        pass
    with pytest.raises(VectorMismatch, match="another-model"):
        check_fits(lm, Source(origin=other.origin))
    logits_of(lm, own, tiny.random_prompts((4,)))


def test_a_source_of_another_model_is_refused() -> None:
    lm = tiny.tiny_lm("llama")
    source = Source(origin=origin_of(lm, tiny.tiny_lm("qwen3").fingerprint))
    with pytest.raises(VectorMismatch, match="another-model"), inject(lm, source):
        lm.forward(lm.batch(tiny.random_prompts((5,))))


@pytest.mark.parametrize("site", ["resid[1]", "heads[0]", "heads[0,1]", "lm_head_in"])
def test_a_vector_of_another_width_is_refused(site: str) -> None:
    lm = tiny.tiny_lm("qwen3")
    at = Site.parse(site)
    wrong = vector_of(Edit(at, Add(torch.ones(lm.width(at) + 1))))
    with pytest.raises(VectorMismatch, match=f"width {lm.width(at)} at"), inject(lm, wrong):
        pass


def test_a_missing_layer_is_refused() -> None:
    lm = tiny.tiny_lm("llama")
    vector = vector_of(Edit(Site("resid", 3), Add(torch.ones(32))))
    with pytest.raises(MissingSite, match="a layer from 0 to 2"), inject(lm, vector):
        pass
    with pytest.raises(MissingSite, match="a layer from 0 to 2"), capture(lm, ["attn[9]"]):
        pass


def test_what_was_not_run_was_not_captured() -> None:
    lm = tiny.tiny_lm("llama")
    with capture(lm, ["resid[1]"]) as seen:
        pass
    with pytest.raises(UnfiredEdit, match=r"activations of resid\[1\]"):
        seen["resid[1]"]


def test_an_exception_inside_is_not_masked_and_leaves_no_hook() -> None:
    lm = tiny.tiny_lm("llama")
    prove(lm)
    hooks = tiny.count_hooks(lm.model)
    inside = list[int]()

    def fail() -> None:
        inside.append(tiny.count_hooks(lm.model))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), inject(lm, vector_of(add(lm))), capture(lm, [R1, "lm_head_in"]):
        fail()
    assert inside[0] == hooks + 2 + 3  # two starts of a pass, one edit, two readers
    assert tiny.count_hooks(lm.model) == hooks
    with pytest.raises(UnfiredEdit), inject(lm, vector_of(add(lm))):
        pass
    assert tiny.count_hooks(lm.model) == hooks
    with pytest.raises(MissingSite), capture(lm, ["resid[1]", "resid[7]"]):
        pass
    assert tiny.count_hooks(lm.model) == hooks


def test_a_source_that_fails_is_not_masked_and_leaves_no_hook() -> None:
    class Failing(Source):
        def vectors(self, lm: Any, prompts: Sequence[Any]) -> list[TaskVector | None]:
            raise ZeroDivisionError

    lm = tiny.tiny_lm("llama")
    prove(lm)
    hooks = tiny.count_hooks(lm.model)
    with pytest.raises(ZeroDivisionError), inject(lm, Failing()):
        lm.forward(lm.batch(tiny.random_prompts((5,))))
    assert tiny.count_hooks(lm.model) == hooks
    assert lm.running is None


# --- composition, nesting, gradients ---------------------------------------------------------------------------------


def test_edits_on_one_site_act_in_order() -> None:
    lm = tiny.tiny_lm("llama")
    width = lm.width(R1)
    a, b = tiny.random_vector(width, 1), tiny.random_vector(width, 2)
    batch = lm.batch(tiny.random_prompts((6, 4)))
    cases: dict[tuple[Edit, ...], Callable[[Tensor], Tensor]] = {
        (Edit(R1, Add(a)), Edit(R1, Blend(b, 0.5, 2.0))): lambda h: 0.5 * (h + a) + 2.0 * b,
        (Edit(R1, Blend(b, 0.5, 2.0)), Edit(R1, Add(a))): lambda h: 0.5 * h + 2.0 * b + a,
        (Edit(R1, Add(a), Where("all")), Edit(R1, Replace(b), strength=0.5)): lambda h: 0.5 * (h + a) + 0.5 * b,
    }
    with torch.no_grad(), capture(lm, [R1]) as clean:
        lm.forward(batch)
    rows, last = torch.arange(2), batch.last
    for edits, expected in cases.items():
        with torch.no_grad(), inject(lm, TaskVector(edits)), capture(lm, [R1]) as seen:
            lm.forward(batch)
        torch.testing.assert_close(seen[R1][rows, last], expected(clean[R1][rows, last]), atol=1e-5, rtol=1e-5)


def test_the_same_edit_twice_acts_twice() -> None:
    lm = tiny.tiny_lm("llama")
    edit = add(lm, scale=1.0)
    twice = replace(edit, strength=2.0)
    prompts = tiny.random_prompts((6, 4))
    assert_same(logits_of(lm, vector_of(edit, edit), prompts), logits_of(lm, vector_of(twice), prompts))


def test_a_head_and_the_whole_site_are_the_same_place() -> None:
    lm = tiny.tiny_lm("qwen3")
    width = lm.width(Site("heads", 1, 0))
    parts = [tiny.random_vector(width, head) for head in range(lm.n_heads)]
    prompts = tiny.random_prompts((6, 4))
    whole = vector_of(Edit(Site("heads", 1), Add(torch.cat(parts))))
    split = TaskVector(tuple(Edit(Site("heads", 1, head), Add(part)) for head, part in enumerate(parts)))
    assert_same(logits_of(lm, split, prompts), logits_of(lm, whole, prompts))


@some_families
def test_gradients_reach_both_of_two_edits_on_one_site(name: str) -> None:
    lm = tiny.tiny_lm(name)
    width = lm.width(R1)
    a, b = (tiny.random_vector(width, seed).requires_grad_() for seed in (1, 2))
    vector = vector_of(Edit(R1, Add(a)), Edit(R1, AddKeepNorm(b), Where("all")))
    batch = lm.batch(tiny.random_prompts((6, 4)))
    with lm.frozen(), inject(lm, vector):
        loss = lm.forward(batch)[:, -1].square().mean()
    grads = torch.autograd.grad(loss, [a, b])
    assert all(float(grad.norm()) > 1e-4 for grad in grads)
    step = 1e-2
    for which, v in enumerate((a, b)):  # against a central difference along the gradient
        direction = grads[which] / grads[which].norm()
        values = []
        for sign in (1, -1):
            moved = [x.detach() + (sign * step * direction if x is v else 0) for x in (a, b)]
            shifted = vector_of(Edit(R1, Add(moved[0])), Edit(R1, AddKeepNorm(moved[1]), Where("all")))
            with torch.no_grad(), inject(lm, shifted):
                values.append(float(lm.forward(batch)[:, -1].square().mean()))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(grads[which].norm()), rel=0.02)


@pytest.mark.parametrize("name", tiny.MAIN)
def test_a_vector_at_any_layer_has_a_gradient_under_a_teacher_forced_answer(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = [p.followed_by((9, 8)) for p in tiny.random_prompts((6, 4))]
    batch = lm.batch(prompts)
    vectors = [torch.zeros(lm.width(Site("resid", layer)), requires_grad=True) for layer in range(lm.n_layers)]
    edits = tuple(Edit(Site("resid", layer), Add(v)) for layer, v in enumerate(vectors))
    with lm.frozen(), inject(lm, TaskVector(edits)):
        logs = lm.forward(batch).log_softmax(-1)
    loss = -(logs[torch.arange(2), batch.last, 9] + logs[torch.arange(2), batch.last + 1, 8]).sum()
    grads = torch.autograd.grad(loss, vectors)
    assert all(float(grad.norm()) > 1e-4 for grad in grads)


def test_a_token_that_is_named_twice_counts_once() -> None:
    lm = tiny.tiny_lm("llama")
    (prompt,) = tiny.random_prompts((5,))
    grads = []
    for where in ("at(-1)", "at(-1,4)"):
        v = torch.ones(lm.width(R1), requires_grad=True)
        with lm.frozen(), inject(lm, vector_of(Edit(R1, Add(v), Where.parse(where)))) as injection:
            loss = lm.forward(lm.batch([prompt]))[0, -1].square().mean()
        grads.append(torch.autograd.grad(loss, v)[0])
        assert set(injection.fired.values()) == {1}
    torch.testing.assert_close(grads[0], grads[1])


def test_captured_states_keep_their_gradients_and_are_copies() -> None:
    lm = tiny.tiny_lm("falcon")
    v = torch.zeros(32, requires_grad=True)
    batch = lm.batch(tiny.random_prompts((5,)))
    with lm.frozen(), inject(lm, vector_of(Edit(Site("resid", 0), Add(v)))), capture(lm, ["mlp[2]", R1]) as seen:
        lm.forward(batch)
    (grad,) = torch.autograd.grad(seen["mlp[2]"][0, -1].sum(), v)
    assert grad.norm() > 1e-4
    with torch.no_grad():
        before = seen[R1].clone()
        seen[R1].zero_()
        with capture(lm, [R1]) as again:
            lm.forward(batch)
    torch.testing.assert_close(again[R1], before)


def test_a_later_capture_sees_edits_and_an_earlier_one_does_not() -> None:
    lm = tiny.tiny_lm("llama")
    edit = add(lm)
    assert isinstance(edit.op, Add)
    batch = lm.batch(tiny.random_prompts((5,)))
    with torch.no_grad(), capture(lm, [R1]) as before, inject(lm, vector_of(edit)), capture(lm, [R1]) as after:
        lm.forward(batch)
    torch.testing.assert_close((after[R1] - before[R1])[0, -1], edit.op.vector, atol=1e-5, rtol=1e-5)


def test_nested_injections_add_up() -> None:
    lm = tiny.tiny_lm("llama")
    one, two = add(lm, seed=1), add(lm, site="mlp[0]", where="all", seed=2)
    prompts = tiny.random_prompts((6, 4))
    with inject(lm, vector_of(one)):
        nested = logits_of(lm, vector_of(two), prompts)
    assert_same(nested, logits_of(lm, vector_of(one, two), prompts))


def test_columns_select_captured_tokens() -> None:
    lm = tiny.tiny_lm("llama")
    batch = lm.batch(tiny.random_prompts((8,)))
    wanted = torch.tensor([6, 2])
    with (
        torch.no_grad(),
        capture(lm, [R1, "lm_head_in"]) as whole,
        capture(lm, [R1, "lm_head_in"], columns=wanted) as part,
    ):
        lm.forward(batch)
        assert torch.equal(part[R1], whole[R1][:, wanted])
        assert torch.equal(part["lm_head_in"], whole["lm_head_in"][:, wanted])
        lm.forward(batch, logits_to_keep=torch.tensor([2, 5, 6]))
        assert torch.equal(part["lm_head_in"], whole["lm_head_in"][:, [2, 0]])
    with pytest.raises(InputError, match="lm_head_in at tokens"), capture(lm, ["lm_head_in"], columns=wanted):
        lm.forward(batch, logits_to_keep=1)


def test_lm_head_in_is_edited_where_logits_are_kept() -> None:
    lm = tiny.tiny_lm("llama")
    site = Site("lm_head_in")
    vector = vector_of(Edit(site, Add(tiny.random_vector(lm.width(site), 1))))
    batch = lm.batch(tiny.random_prompts((8, 8)))
    with torch.no_grad(), inject(lm, vector):
        whole = lm.forward(batch)
        for keep, columns in ((1, [7]), (3, [5, 6, 7]), (torch.tensor([3, 7]), [3, 7])):
            kept = lm.forward(batch, logits_to_keep=keep)
            torch.testing.assert_close(kept, whole[:, columns], atol=1e-5, rtol=1e-5)
    assert (whole - lm.forward(batch))[:, -1].abs().max() > 1e-2


# --- other models ----------------------------------------------------------------------------------------------------


def wrapped(build: Callable[[], Any], *, zero: bool) -> Any:
    """A model wrapped by PEFT's LoRA; its B is zero at first, so that it changes nothing."""
    import peft

    with warnings.catch_warnings(), tiny.seeded(0):
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj", "down_proj"], r=2)
        model = peft.get_peft_model(build(), config)
        for name, weight in model.named_parameters():
            if "lora_B" in name and not zero:
                nn.init.normal_(weight, std=0.5)
    return model


def test_a_model_that_peft_wraps_works_and_equals_the_bare_one_where_lora_is_zero() -> None:
    pytest.importorskip("peft")
    lm = tiny.tiny_lm("llama")
    inside = LM(wrapped(tiny.ARCHITECTURES["llama"], zero=True), lm.tokenizer)
    prompts = tiny.random_prompts((9, 5))
    sites = ("embed", "resid[1]", "attn[1]", "mlp[1]", "heads[1]", "heads[1,2]", "lm_head_in")
    for site in sites:
        vector = vector_of(add(lm, site=site, where="each_last"))
        assert_same(logits_of(inside, vector, prompts), logits_of(lm, vector, prompts))
    assert inside.proofs["sites"] == {}
    assert [str(s) for s in inside.sites()] == [str(s) for s in lm.sites()]


def test_generation_of_a_model_that_peft_wraps_fires_edits() -> None:
    pytest.importorskip("peft")
    lm = tiny.tiny_lm("llama")
    inside = LM(wrapped(tiny.ARCHITECTURES["llama"], zero=True), lm.tokenizer)
    adapted = LM(wrapped(tiny.ARCHITECTURES["llama"], zero=False), lm.tokenizer)
    prompts = tiny.random_prompts((9, 5), seed=3)
    vector = vector_of(add(lm, where="each_last", seed=4))
    answers = []
    for model in (lm, inside, adapted):
        with inject(model, vector) as injection:
            answers.append(model.generate_ids(prompts, max_new_tokens=4))
        assert injection.fired["resid[1] each_last"] >= 2
    assert answers[0] == answers[1] != answers[2]


def test_a_model_in_training_mode_is_put_into_evaluation() -> None:
    model = tiny.build("gpt2")  # GPT-2 has dropout
    model.train()
    assert model.config.resid_pdrop > 0
    lm = LM(model, tiny.tokenizer())
    assert not any(module.training for module in model.modules())
    vector, prompts = vector_of(add(lm)), tiny.random_prompts((5,))
    assert_same(logits_of(lm, vector, prompts), logits_of(tiny.tiny_lm("gpt2"), vector, prompts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@some_families
def test_other_dtypes_are_kept(name: str, dtype: torch.dtype) -> None:
    lm = LM(tiny.build(name).to(dtype), tiny.tokenizer())
    prompts = tiny.random_prompts((6, 4))
    vector = vector_of(add(lm), add(lm, site="heads[1,2]"), add(lm, site="mlp[0]", where="all"))
    batch = lm.batch(prompts)
    with torch.no_grad(), inject(lm, vector), capture(lm, [R1, "heads[1]"]) as seen:
        out = lm.forward(batch)
    assert out.dtype == seen[R1].dtype == seen["heads[1]"].dtype == dtype
    assert lm.proofs["sites"] == {}
    exact = logits_of(tiny.tiny_lm(name), vector, prompts)
    got = [row[keep].float() for row, keep in zip(out, batch.mask.bool(), strict=True)]
    assert_same(got, exact, atol=0.4 if dtype == torch.bfloat16 else 1e-4)


def test_a_bfloat16_edit_of_zero_is_bit_identical() -> None:
    lm = LM(tiny.build("llama").to(torch.bfloat16), tiny.tokenizer())
    batch = lm.batch(tiny.random_prompts((6,)))
    nothing = vector_of(Edit(R1, Add(torch.zeros(32)), Where("all")))
    with torch.no_grad():
        bare = lm.forward(batch)
        with inject(lm, nothing):
            assert torch.equal(lm.forward(batch), bare)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_give_the_same_logits_as_ids(name: str, side: Literal["left", "right"]) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((9, 5))
    table = lm.model.get_input_embeddings()
    with torch.no_grad():
        embedded = [Encoded(embeds=table(torch.tensor(p.ids)), roles=p.roles) for p in prompts]
    for where in ("last_prompt", "role(pair)", "all"):
        vector = vector_of(add(lm, where=where))
        assert_same(logits_of(lm, vector, embedded, side), logits_of(lm, vector, prompts, side))


def test_embeddings_are_continued_by_generate() -> None:
    lm = tiny.tiny_lm("llama")
    prompts = tiny.random_prompts((9, 5), seed=3)
    with torch.no_grad():
        embedded = [Encoded(embeds=lm.model.get_input_embeddings()(torch.tensor(p.ids))) for p in prompts]
    with inject(lm, vector_of(add(lm, where="each_last", seed=4))):
        assert lm.generate_ids(embedded, max_new_tokens=4) == lm.generate_ids(prompts, max_new_tokens=4)
