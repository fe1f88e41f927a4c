"""compile, eval, generate, demo: what the commands do."""

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from taskvec import methods as registry
from taskvec.cli import show
from taskvec.errors import DataError, InputError, UnknownName
from taskvec.files import replaced
from taskvec.progress import shown, track
from taskvec.prompts import TEMPLATES, PromptFormat
from taskvec.tasks import Task, load_task

DEMO_TASK, DEMO_INPUTS = "past_tense", ("whisper", "invent", "sneeze")
ROWS = 16


@dataclass(frozen=True)
class PromptOptions:
    """How a task becomes prompts."""

    format: str | None
    instruction: str
    shots: int
    n_test: int


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where."""

    name: str
    device: str | None
    dtype: str | None

    def load(self) -> Any:
        """The LM."""
        from taskvec.lm import LM

        return LM.load(self.name, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Choices:
    """What is fitted and scored."""

    methods: list[str] | None
    settings: list[str] | None
    seeds: tuple[int, ...]
    overwrite: bool = False
    vectors: tuple[Path, ...] = ()
    examples: Path | None = None
    other: str | None = None


@dataclass(frozen=True)
class Asked:
    """What a saved vector is asked."""

    text: str | None
    input: Path | None
    out: Path | None
    raw: bool
    max_new_tokens: int | None


def compile_task(
    data: str, out: Path, prompts: PromptOptions, where: ModelOptions, choices: Choices, *, as_json: bool
) -> None:
    """Fit, choose on dev, report on test, save."""
    if out.exists() and not choices.overwrite:
        raise InputError("a new folder for --out", f"{out} exists", "name another one or pass --overwrite")
    task = read_task(data, prompts)
    chosen = make_methods(choices.methods, choices.settings, compiling=True)
    from taskvec.comparison import compare_once
    from taskvec.vector import TaskVector, VectorSource
    from taskvec.vector.card import card

    with shown():
        lm = where.load()
        done = compare_once(lm, with_chat(task, prompts, lm), chosen, seed=choices.seeds[0])
    vector = done.fitted[done.chosen] if done.chosen is not None else None
    if not isinstance(vector, TaskVector | VectorSource) or not hasattr(vector, "save_pretrained"):
        raise InputError("a method whose vector can be saved", str(done.chosen), "compile with another --method")
    vector.save_pretrained(out, overwrite=choices.overwrite, card=card(vector, str(done.results)))
    if as_json:
        show.emit({**done.results.to_dict(), "chosen": done.chosen, "vector": str(out), "dev": _dev(done.dev)})
        return
    show.results(done.results)
    show.say(f"Saved {done.chosen} in {out}.")


def eval_task(data: str, prompts: PromptOptions, where: ModelOptions, choices: Choices, *, as_json: bool) -> None:
    """Score on test."""
    if choices.examples is not None and choices.examples.exists():
        raise InputError("a new file for --examples", f"{choices.examples} exists", "name another one")
    task = read_task(data, prompts)
    other = read_task(choices.other, prompts) if choices.other is not None else None
    asked = [] if choices.methods is None and choices.vectors else choices.methods
    chosen = make_methods(asked, choices.settings)
    from taskvec.comparison import compare

    vectors = [registry.load(folder) for folder in choices.vectors]
    with shown():
        lm = where.load()
        other = with_chat(other, prompts, lm) if other is not None else None
        found = compare(lm, with_chat(task, prompts, lm), chosen, vectors=vectors, seeds=choices.seeds, other=other)
    if choices.examples is not None:
        found.write_examples(choices.examples)
    if as_json:
        show.emit(found.to_dict())
    else:
        show.results(found)


def generate_answers(folder: Path, asked: Asked, where: ModelOptions, *, as_json: bool) -> None:
    """Answer one text or a file."""
    inputs = _inputs(asked)
    vector = registry.load(folder)
    if vector.origin is None:
        raise InputError(
            "a vector with an origin", f"none in {folder}", "use it from Python: with inject(lm, vector): ..."
        )
    if asked.raw:
        show.note("taskvec: the text is sent as it is: nothing checks that it has the vector's template")
    with shown():
        lm = replace(where, name=where.name or vector.origin.model.id).load()
        answers = answer(lm, vector, inputs, raw=asked.raw, max_new_tokens=asked.max_new_tokens)
    rows = [{"input": text, "output": got} for text, got in zip(inputs, answers, strict=True)]
    if asked.out is not None:
        _write_lines(asked.out, rows)
    if as_json:
        show.emit({"rows": rows, "vector": str(folder), "out": str(asked.out) if asked.out else None})
    elif asked.out is None:
        show.say(answers[0])


def answer(
    lm: Any, vector: Any, inputs: Sequence[str], *, raw: bool = False, max_new_tokens: int | None = None
) -> list[str]:
    """A vector's answers to inputs, each put into the vector's template, cut at its terminator."""
    from taskvec.hooks import inject

    origin = vector.origin
    format = origin.format.format()
    prompts = [text if raw else format.prompt(text, origin.shown) for text in inputs]
    limit = max_new_tokens or origin.max_new_tokens
    answers: list[str] = []
    with inject(lm, vector):
        for start in track(range(0, len(prompts), ROWS), "generating", -(-len(prompts) // ROWS)):
            part = prompts[start : start + ROWS]
            answers += lm.generate(part, max_new_tokens=limit, stop=format.terminator)
    return [format.cut(text) for text in answers]


def run_demo(out: Path, model: str, *, as_json: bool) -> None:
    """The demo: compile a built-in task, then three inputs that are in none of its splits."""
    prompts, where = PromptOptions(None, "", 10, 100), ModelOptions(model, None, None)
    say = show.note if as_json else show.say
    say(f"Compiling {DEMO_TASK} on {model}: ten-shot prompts against task vectors.\n")
    compile_task(DEMO_TASK, out, prompts, where, Choices(None, None, (0,), overwrite=True), as_json=as_json)
    from taskvec.vector import TaskVector

    vector = TaskVector.from_pretrained(out)
    answers = answer(where.load(), vector, DEMO_INPUTS)
    say("\nThe saved vector on three new inputs, without any example in the prompt:")
    for text, got in zip(DEMO_INPUTS, answers, strict=True):
        say(f"  {text} -> {got}")


def make_methods(names: list[str] | None, settings: list[str] | None, *, compiling: bool = False) -> list[Any]:
    """The methods asked for (None: the default ones) with their `--set` fields."""
    from taskvec.comparison import DEFAULT

    asked = list(DEFAULT if names is None else names)
    made = registry.make_all(asked, parse_settings(settings or []))
    if compiling and not any(registry.facts(method.name)["ops"] for method in made):
        raise UnknownName("a method that makes a vector", ", ".join(asked), "add --method learned, for example")
    return made


def parse_settings(settings: Sequence[str]) -> dict[str, dict[str, str]]:
    """METHOD.FIELD=VALUE, by method and field."""
    fields: dict[str, dict[str, str]] = {}
    for setting in settings:
        target, equals, value = setting.partition("=")
        method, dot, field = target.partition(".")
        if not (equals and dot):
            raise InputError("--set METHOD.FIELD=VALUE", repr(setting), "write it like learned.layer=12")
        fields.setdefault(method, {})[field] = value
    return fields


def read_task(data: str, prompts: PromptOptions) -> Task:
    """The task; a chat format waits for the model's tokenizer."""
    format = None
    if prompts.format is not None and prompts.format != "chat":
        text = prompts.format if prompts.format in TEMPLATES else _decoded(prompts.format)
        if text.isidentifier() and text not in TEMPLATES:
            raise UnknownName("a format: qa, arrow, chat or a template", repr(text), "name one of those")
        format = PromptFormat.named(text, prompts.instruction)
    task = load_task(data, format=format, shots=prompts.shots, n_test=prompts.n_test)
    if prompts.instruction and format is None:
        task = task.with_format(replace(task.spec.format, instruction=prompts.instruction))
    return task


def with_chat(task: Task, prompts: PromptOptions, lm: Any) -> Task:
    """The task under the model's own chat template, where that was asked for."""
    return task.with_format(lm.chat_format(prompts.instruction)) if prompts.format == "chat" else task


def _decoded(text: str) -> str:
    """The text with backslash escapes decoded, other characters as they are."""
    try:
        return codecs.decode(text.encode("latin-1", "backslashreplace"), "unicode_escape")
    except UnicodeDecodeError as error:
        raise InputError(
            "backslash escapes that mean something", f"{text!r} ({error.reason})", "mend --format"
        ) from None


def _dev(dev: Any) -> dict[str, dict[str, float]]:
    return {name: {"headline": headline, "d_ntp_full": full} for name, (headline, full) in dev.items()}


def _inputs(asked: Asked) -> list[str]:
    if (asked.text is None) == (asked.input is None) or (asked.input is None) != (asked.out is None):
        raise InputError(
            "one TEXT, or --input X.jsonl with --out Y.jsonl", "another combination", "give one of the two"
        )
    if asked.text is not None:
        if not asked.text.strip():
            raise InputError("a text", repr(asked.text), "write one")
        return [asked.text if asked.raw else asked.text.strip()]
    assert asked.input is not None
    assert asked.out is not None
    if asked.out.exists():
        raise InputError("a new file for --out", f"{asked.out} exists", "name another one")
    if not asked.input.is_file():
        raise InputError("a JSONL file for --input", f"none at {asked.input}", "check the path")
    return _read_inputs(asked.input)


def _read_inputs(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)["input"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f'{{"input": ...}} at {path}, line {number}', line[:80], "mend the line") from None
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise DataError(f"text or a number at {path}, line {number}", repr(value), "mend the line")
        texts.append(value.strip() if isinstance(value, str) else json.dumps(value))
    if not texts:
        raise DataError(f"inputs in {path}", "none", 'write one {"input": ...} a line')
    return texts


def _write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with replaced(path) as new:
        new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
