"""Prompts as text with named parts, and the formats that make them. Nothing here knows a tokenizer or a model.

A format is a template such as ``"Q: {input}\\nA: {output}\\n\\n"``. What stands after ``{output}`` is its
*terminator*: it ends a demonstration, and it ends an answer. Blanks just before ``{output}`` belong to the answer,
because that is how today's tokenizers cut them (``"A:"`` + ``" walked"``); so the leading-space rule is decided here,
once, for all methods.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from taskvec.errors import InputError

TEMPLATES = {
    "qa": "Q: {input}\nA: {output}\n\n",
    "arrow": "{input} -> {output}\n",
}


@dataclass(frozen=True)
class Example:
    """An input and its output, both text."""

    input: str
    output: str


@dataclass(frozen=True)
class Span:
    """Characters `start` to `stop` (exclusive) of a prompt's text, and the part they play."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Prompt:
    """A prompt's text with its roles.

    Roles: `demo_input`, `demo_output`, and `separator` (the last character before each demonstration's answer) for
    demonstrations; `input` and `query_end` (the last character) for the query. `special_tokens` says whether the
    tokenizer adds its own (a chat template has already written them).
    """

    text: str
    spans: tuple[Span, ...] = ()
    special_tokens: bool = True


@dataclass(frozen=True)
class PromptFormat:
    """How examples become prompts.

    `template` holds `{input}` once and, after it, `{output}` once; a template that ends with `{output}` gets a newline
    as its terminator. `instruction` stands before everything, followed by a blank line unless `name` is "chat", where
    the header comes from the tokenizer's own template.

    >>> qa = PromptFormat.named("qa")
    >>> qa.prompt("run", [Example("walk", "walked")]).text
    'Q: walk\\nA: walked\\n\\nQ: run\\nA:'
    >>> qa.answer("ran"), qa.terminator
    (' ran', '\\n\\n')
    """

    template: str
    instruction: str = ""
    name: str = "custom"
    special_tokens: bool = True
    _parts: tuple[str, str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        counts = self.template.count("{input}"), self.template.count("{output}")
        if counts != (1, 1) or self.template.index("{input}") > self.template.index("{output}"):
            raise InputError(
                "a template with {input} once and {output} once after it",
                repr(self.template),
                'write one like "Review: {input}\\nSentiment: {output}\\n" or name qa, arrow or chat',
            )
        before, rest = self.template.split("{input}")
        between, after = rest.split("{output}")
        if not between:
            raise InputError(
                "a template with text between {input} and {output}", repr(self.template), "put a separator there"
            )
        object.__setattr__(self, "_parts", (before, between, after or "\n"))

    @classmethod
    def named(cls, text: str, instruction: str = "") -> "PromptFormat":
        """The format called `qa` or `arrow`, or the one whose template is `text`. (`LM.chat_format` makes `chat`.)"""
        return cls(TEMPLATES.get(text, text), instruction, text if text in TEMPLATES else "custom")

    @property
    def terminator(self) -> str:
        """The text that ends an answer; generated text is cut there."""
        return self._parts[2]

    @property
    def header(self) -> str:
        """What stands before the first demonstration."""
        return self.instruction if self.name == "chat" or not self.instruction else self.instruction.rstrip() + "\n\n"

    @property
    def hash(self) -> str:
        """SHA-256 of everything that shapes a prompt."""
        parts = (self.template, self.instruction, str(self.special_tokens), str(self.name == "chat"))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def answer(self, output: str) -> str:
        """The answer's text as it follows a prompt: with the blanks that the template puts before `{output}`."""
        between = self._parts[1]
        return between[len(between.rstrip(" ")) :] + output

    def following(self, output: str) -> str:
        """An answer, its terminator, and the start of a next example: the context in which answers are tokenised.

        "\\n\\n" before "Q:" is tokenised otherwise than "\\n\\n" at the end of a text, and a model under few-shot
        prompts has only ever seen the first.
        """
        return self.answer(output) + self.terminator + self._parts[0]

    def prompt(self, query: str, demos: Sequence[Example] = ()) -> Prompt:
        """The prompt that asks for `query`'s output after the demonstrations `demos` (none: a zero-shot prompt)."""
        before, between, after = self._parts
        asks = between.rstrip(" ")
        text, spans = self.header, list[Span]()
        for demo in demos:
            start = len(text) + len(before)
            stop = start + len(demo.input)
            answer = stop + len(between)
            spans += [Span("demo_input", start, stop), Span("separator", stop + len(asks) - 1, stop + len(asks))]
            spans += [Span("demo_output", answer, answer + len(demo.output))]
            text += before + demo.input + between + demo.output + after
        start = len(text) + len(before)
        text += before + query + asks
        spans += [Span("input", start, start + len(query)), Span("query_end", len(text) - 1, len(text))]
        return Prompt(text, tuple(spans), self.special_tokens)

    def cut(self, text: str) -> str:
        """A generated text up to its terminator, without surrounding white space."""
        return text.split(self.terminator, 1)[0].strip()
