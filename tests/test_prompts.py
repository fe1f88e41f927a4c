"""Prompt formats: the text they make, the spans of its parts, where answers are cut, hashes."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec.errors import InputError
from taskvec.prompts import Example, Prompt, PromptFormat

QA, ARROW = PromptFormat.named("qa"), PromptFormat.named("arrow")
FORMATS = [
    QA,
    ARROW,
    PromptFormat.named("qa", "Do as shown."),
    PromptFormat("Review: {input}\nSentiment: {output}\n###\n"),
    PromptFormat("<{input}>\t{output}"),
    PromptFormat("{input}:   {output}\n\n", instruction="  Be brief.\n\n"),
    PromptFormat("{input} {output}\n"),
    PromptFormat("<user>{input}</user><bot>{output}</bot>", "<system>x</system>", "chat", False),
]
NASTY = ["{input}", "{output}", "{}", "{0}", "%s", "\\n", "Q: x\nA: y", " lead", "tail ", "é", "\U0001f600", "a{b}c"]
texts = st.one_of(st.sampled_from(NASTY), st.text(min_size=1, max_size=12))
examples = st.builds(Example, texts, texts)
demo_lists = st.lists(examples, max_size=4)
formats = st.sampled_from(FORMATS)


def _parts(prompt: Prompt, role: str) -> list[str]:
    return [prompt.text[s.start : s.stop] for s in prompt.spans if s.role == role]


def _written_out(fmt: PromptFormat, query: str, demos: list[Example]) -> str:
    """The prompt by the letter of the template, filled in one pass (no value is expanded again)."""
    template = fmt.template if not fmt.template.endswith("{output}") else fmt.template + "\n"

    def filled(pattern: str, example: Example) -> str:
        return re.sub(r"\{(input|output)\}", lambda m: getattr(example, m[1]), pattern)

    query_part = template.split("{output}")[0].rstrip(" ")
    return fmt.header + "".join(filled(template, d) for d in demos) + filled(query_part, Example(query, ""))


def test_qa_prompt_is_written_as_documented() -> None:
    prompt = QA.prompt("run", [Example("walk", "walked"), Example("go", "went")])
    assert prompt.text == "Q: walk\nA: walked\n\nQ: go\nA: went\n\nQ: run\nA:"
    assert (QA.answer("ran"), QA.terminator) == (" ran", "\n\n")
    assert QA.following("ran") == " ran\n\nQ: "


def test_arrow_prompt_is_written_as_documented() -> None:
    prompt = ARROW.prompt("run", [Example("walk", "walked")])
    assert prompt.text == "walk -> walked\nrun ->"
    assert (ARROW.answer("ran"), ARROW.terminator, ARROW.following("ran")) == (" ran", "\n", " ran\n")


def test_own_template_may_end_with_the_output() -> None:
    fmt = PromptFormat.named("<{input}>={output}")
    assert fmt.terminator == "\n"
    assert fmt.prompt("b", [Example("a", "A")]).text == "<a>=A\n<b>="
    assert (fmt.name, QA.name, ARROW.name) == ("custom", "qa", "arrow")


@given(formats, texts, demo_lists)
@settings(deadline=None, max_examples=100)
def test_text_is_the_template_filled_once(fmt: PromptFormat, query: str, demos: list[Example]) -> None:
    assert fmt.prompt(query, demos).text == _written_out(fmt, query, demos)


@given(formats, texts, demo_lists)
@settings(deadline=None, max_examples=100)
def test_spans_index_the_parts_they_name(fmt: PromptFormat, query: str, demos: list[Example]) -> None:
    prompt = fmt.prompt(query, demos)
    assert _parts(prompt, "demo_input") == [demo.input for demo in demos]
    assert _parts(prompt, "demo_output") == [demo.output for demo in demos]
    assert _parts(prompt, "input") == [query]
    assert all(s.role in {"demo_input", "demo_output", "separator", "input", "query_end"} for s in prompt.spans)
    assert all(0 <= s.start < s.stop <= len(prompt.text) for s in prompt.spans)
    starts = [s.start for s in prompt.spans if s.role in ("demo_input", "demo_output", "input")]
    assert starts == sorted(starts)
    (end,) = (s for s in prompt.spans if s.role == "query_end")
    assert (end.start, end.stop) == (len(prompt.text) - 1, len(prompt.text))


@given(formats, texts, demo_lists)
@settings(deadline=None, max_examples=100)
def test_separators_stand_just_before_the_answers_blanks(fmt: PromptFormat, query: str, demos: list[Example]) -> None:
    prompt = fmt.prompt(query, demos)
    separators = [s for s in prompt.spans if s.role == "separator"]
    outputs = [s for s in prompt.spans if s.role == "demo_output"]
    assert len(separators) == len(outputs) == len(demos)
    for separator, output, demo in zip(separators, outputs, demos, strict=True):
        assert separator.stop - separator.start == 1
        assert prompt.text[separator.stop : output.stop] == fmt.answer(demo.output)


@given(formats, texts, demo_lists)
@settings(deadline=None, max_examples=100)
def test_zero_shot_prompts_and_answers_add_up_to_the_few_shot_prompt(
    fmt: PromptFormat, query: str, demos: list[Example]
) -> None:
    def bare(text: str) -> str:
        return fmt.prompt(text).text.removeprefix(fmt.header)

    shown = "".join(bare(demo.input) + fmt.answer(demo.output) + fmt.terminator for demo in demos)
    assert fmt.prompt(query, demos).text == fmt.header + shown + bare(query)


@given(formats, texts)
@settings(deadline=None, max_examples=60)
def test_following_is_what_stands_between_two_inputs(fmt: PromptFormat, output: str) -> None:
    text = fmt.prompt("second", [Example("first", output)]).text
    head = text.index("first") + len("first")
    between = fmt.template.split("{input}")[1].split("{output}")[0].rstrip(" ")
    assert text[head:].startswith(between + fmt.following(output) + "second")


@pytest.mark.parametrize("value", ["{input}", "{output}", "{input}{output}", "{}", "{0}", "%(x)s", "$input", "\\1"])
def test_braces_in_values_are_left_as_they_are(value: str) -> None:
    assert QA.prompt(value, [Example(value, value)]).text == f"Q: {value}\nA: {value}\n\nQ: {value}\nA:"
    assert QA.answer(value) == " " + value
    assert PromptFormat.named("qa", value).prompt("x").text == f"{value}\n\nQ: x\nA:"


plain_outputs = st.text(max_size=12).map(str.strip).filter(lambda text: "\n" not in text)


@given(st.sampled_from([f for f in FORMATS if f.terminator[0] == "\n"]), plain_outputs, st.text(max_size=20))
@settings(deadline=None, max_examples=100)
def test_cut_gives_an_answer_back_from_whatever_was_generated_after_it(
    fmt: PromptFormat, output: str, junk: str
) -> None:
    assert fmt.cut(fmt.answer(output) + fmt.terminator + junk) == output
    assert fmt.cut(fmt.answer(output)) == output
    assert fmt.cut("\n"[: len(fmt.terminator) - 1] + fmt.answer(output)) == output


def test_cut_ends_at_the_first_terminator_only() -> None:
    assert QA.cut(" one\ntwo\n\nthree\n\nfour") == "one\ntwo"
    assert ARROW.cut(" one\ntwo") == "one"
    assert QA.cut("\n\none") == ""
    assert FORMATS[-1].cut("a</bot>b</bot>") == "a"


@pytest.mark.parametrize(
    ("template", "blanks"),
    [
        ("{input}={output}\n", ""),
        ("{input} ->   {output}\n", "   "),
        ("{input}\n{output}\n", ""),
        ("{input}\t{output}", ""),
    ],
)
def test_the_answer_starts_with_the_blanks_before_output(template: str, blanks: str) -> None:
    fmt = PromptFormat(template)
    assert fmt.answer("x") == blanks + "x"
    assert not fmt.prompt("q").text.endswith(" ")
    assert fmt.prompt("q").text + fmt.answer("x") == template.split("{output}")[0].replace("{input}", "q") + "x"


@pytest.mark.parametrize(
    "template",
    [
        "",
        "qb",
        "chat",
        "{input}",
        "{output}",
        "{output} {input}",
        "{input}{output}",
        "{input} {input} {output}",
        "{input} {output} {output}",
        "{Input}: {output}",
        "{ input }: {output}",
    ],
)
def test_a_bad_template_is_refused_with_what_was_found(template: str) -> None:
    with pytest.raises(InputError, match="wanted a template with") as caught:
        PromptFormat.named(template)
    assert caught.value.found == repr(template)


def test_the_instruction_stands_once_before_everything_and_a_blank_line_after_it() -> None:
    fmt = PromptFormat.named("arrow", "Say the past tense. \n")
    assert fmt.header == "Say the past tense.\n\n"
    assert fmt.prompt("go", [Example("run", "ran")]).text == "Say the past tense.\n\nrun -> ran\ngo ->"
    assert fmt.prompt("go").text == "Say the past tense.\n\ngo ->"
    assert ARROW.header == ""


def test_a_chat_header_is_left_exactly_as_the_tokenizer_wrote_it() -> None:
    fmt = PromptFormat("[u]{input}[/u]{output}[e]", "[system] hi \n", "chat", special_tokens=False)
    assert fmt.header == "[system] hi \n"
    assert fmt.prompt("q").text == "[system] hi \n[u]q[/u]"
    assert PromptFormat("[u]{input}[/u]{output}[e]", "", "chat").header == ""


@pytest.mark.parametrize("special", [True, False])
def test_prompts_say_whether_the_tokenizer_adds_special_tokens(special: bool) -> None:
    assert replace(QA, special_tokens=special).prompt("q").special_tokens is special


def test_hash_changes_with_each_field_that_shapes_a_prompt() -> None:
    variants = [
        QA,
        replace(QA, template=QA.template + "\n"),
        replace(QA, instruction="x"),
        replace(QA, special_tokens=False),
        replace(QA, name="chat"),
        replace(QA, template=QA.template + "\x00a", instruction="b"),
        replace(QA, template=QA.template, instruction="a\x00b"),
        replace(QA, template=QA.template + "\x00a\x00b"),
    ]
    assert len({fmt.hash for fmt in variants}) == len(variants)
    assert all(re.fullmatch("[0-9a-f]{64}", fmt.hash) for fmt in variants)


def test_hash_does_not_change_with_the_mere_name() -> None:
    assert replace(QA, name="custom").hash == QA.hash == PromptFormat.named(QA.template).hash


def test_parts_of_a_hash_do_not_run_into_each_other() -> None:
    template = "{input} {output}"
    assert PromptFormat(template + "\x00x", "y").hash != PromptFormat(template, "x\x00y").hash
    assert PromptFormat(template, "\ud800").hash != PromptFormat(template).hash
