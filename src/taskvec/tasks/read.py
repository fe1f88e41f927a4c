"""Reading task files: JSONL with `input` and `output`, and an optional `NAME.yaml` beside it."""

import json
import math
import os
import re
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from taskvec.errors import DataError, unknown
from taskvec.prompts import Example, PromptFormat
from taskvec.tasks.hub import read_hub
from taskvec.tasks.hub_sets import HUB
from taskvec.tasks.staicc import DATASETS, read_dataset
from taskvec.tasks.task import Task, TaskSpec

_DATA = Path(str(files("taskvec.tasks") / "data"))
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")  # NUL, and halves of surrogate pairs: UTF-8 has no bytes for those


class Sidecar(BaseModel):
    """What `NAME.yaml` may say about a task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    category: str = ""
    labels: tuple[str, ...] | None = None
    format: str | None = None
    instruction: str = ""


@cache
def builtin_tasks() -> dict[str, Sidecar]:
    """The built-in tasks by name, with what their sidecars say."""
    return {path.stem: read_sidecar(path) for path in sorted(_DATA.glob("*.jsonl"))}


def load_task(
    source: str | Path,
    *,
    format: PromptFormat | None = None,
    shots: int = 10,
    n_test: int = 100,
    instruct: bool = False,
) -> Task:
    """The task in the file `source`, the built-in task of that name (`past-tense` and `past_tense` are one name), a
    set of the package StaICC, or a synthetic task for the model `tiny` (`tiny_upper`).

    `format` stands above the sidecar's, and that above `qa`. `instruct` puts the sidecar's description before every
    prompt that has no instruction. Raises `DataError` or `UnknownName`.
    """
    name = _plain_name(source)
    if name in DATASETS and not os.path.isfile(source):
        about, examples = _described(name), read_dataset(name)
    elif name in HUB and not os.path.isfile(source):
        about, examples = _described(name), read_hub(name)
    else:
        path = _find(source)
        name, about, examples = path.stem, read_sidecar(path), read_examples(path)
    chosen = format or PromptFormat.named(about.format or "qa", about.instruction)
    if instruct and not chosen.instruction and name not in (*DATASETS, *HUB):
        chosen = replace(chosen, instruction=about.description)
    spec = TaskSpec(name=name, format=chosen, shots=shots, labels=about.labels, category=about.category)
    return Task.from_examples(spec, examples, n_test=n_test)


def datasets() -> dict[str, Sidecar]:
    """The classification sets of the package StaICC, and those fetched through `datasets`, by name."""
    return {name: _described(name) for name in (*DATASETS, *HUB)}


def _described(name: str) -> Sidecar:
    if name in DATASETS:
        there = DATASETS[name]
        return Sidecar(description=there.about, category="StaICC", labels=there.labels, format=there.format)
    found = HUB[name]
    about = f"{found.about}; fetched from the Hub"
    return Sidecar(description=about, category=found.category, labels=found.labels, format=found.format)


def _plain_name(source: str | Path) -> str:
    return str(source).replace("-", "_").lower()


def read_sidecar(path: Path) -> Sidecar:
    """The sidecar of the task file `path`; an empty one where there is none."""
    sidecar = path.with_suffix(".yaml")
    if not sidecar.exists():
        return Sidecar()
    try:
        return Sidecar.model_validate(yaml.safe_load(sidecar.read_text("utf-8")) or {})
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:  # yaml lets all of them out
        found = " ".join(str(error).splitlines()[:3])
        wanted = f"a sidecar {sidecar.name} with description, category, labels, format, instruction"
        raise DataError(wanted, found, "mend it or remove it") from None


def read_examples(path: Path) -> list[Example]:
    """All examples of a JSONL file. Blank lines are passed over; any other bad line is a `DataError` with its
    number."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} in UTF-8", f"a bad byte at {error.start}", "save it as UTF-8") from None
    examples = [_example(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not examples:
        raise DataError(f"examples in {path}", "an empty file", 'write one {"input": ..., "output": ...} a line')
    return examples


def _find(source: str | Path) -> Path:
    path = Path(source)
    if os.path.isfile(path):  # Path.is_file raises where the name is too long
        return path
    for folder in (_DATA, _DATA / "tiny"):
        builtin = folder / f"{_plain_name(source)}.jsonl"
        if path.name == str(source) and os.path.isfile(builtin):
            return builtin
    tiny = sorted(path.stem for path in (_DATA / "tiny").glob("*.jsonl"))
    raise unknown("a task file or a built-in task", str(source), [*builtin_tasks(), *datasets(), *tiny])


def _example(line: str, place: str) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, or a number of over 4,300 digits
        raise DataError(f"JSON at {place}", str(error), "mend the line") from None
    if not isinstance(row, dict) or not {"input", "output"} <= row.keys():
        found = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise DataError(f'the keys "input" and "output" at {place}', found, "mend the line")
    return Example(_text(row["input"], f'"input" at {place}'), _text(row["output"], f'"output" at {place}'))


def _text(value: Any, place: str) -> str:
    if isinstance(value, str):
        if value.strip() and not _NO_TEXT.search(value):
            return value.strip()
        raise DataError(f"text in {place}", repr(value), "fill it in or remove the line")
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return json.dumps(value)
    raise DataError(f"a string or a finite number as {place}", repr(value), "mend the line")
