"""Suites: named lists of tasks with one setting for all, as YAML.

name: mine
tasks: [past_tense, sst2, data/tickets.jsonl]   # built-in names, data sets, task files (paths from this file)
shots: 10        # optional, as are n_test, queries (unlabelled, for methods that take them) and format
unseen: [plural] # optional: tested on, never trained on; methods that can (adaptive) are fitted on all tasks together
instruct: true   # optional: word tasks' descriptions stand before every prompt, so that it says what is asked
"""

import os
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from taskvec.errors import DataError, InputError, unknown
from taskvec.prompts import PromptFormat
from taskvec.tasks.read import load_task
from taskvec.tasks.task import Task

_SUITES = Path(str(files("taskvec.tasks") / "data" / "suites"))
Positive = Annotated[int, Field(ge=1)]


class Suite(BaseModel):
    """Tasks that are benchmarked together. `queries` of None leaves each method its own number. With `together` (or
    `unseen` tasks) methods that take many tasks are fitted once on all of `tasks`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    shots: Positive = 10
    n_test: Positive = 100
    queries: Positive | None = None
    format: str | None = None
    unseen: tuple[str, ...] = ()
    together: bool = False
    instruct: bool = False

    @property
    def joint(self) -> bool:
        """Are methods that can fitted on all tasks together?"""
        return self.together or bool(self.unseen)

    def load(self, chat: Callable[[str], PromptFormat] | None = None) -> list[Task]:
        """The tasks, then the unseen ones. Raises `DataError` or `UnknownName` for the first that cannot be read,
        `InputError` where two have one name, or one data set under two names is to be seen and unseen. A suite with
        `format: chat` needs `chat(instruction)`, the model's own template."""
        format = None if self.format in (None, "chat") else PromptFormat.named(self.format)
        if self.format == "chat":
            if chat is None:
                raise InputError("a model with a chat template, for format: chat", "none", "name another format")
            format = chat("")
        options: dict[str, Any] = {"format": format, "shots": self.shots, "n_test": self.n_test}
        tasks = [load_task(name, instruct=self.instruct, **options) for name in (*self.tasks, *self.unseen)]
        _check_apart(tasks[: len(self.tasks)], tasks[len(self.tasks) :])
        return tasks


def _check_apart(seen: list[Task], unseen: list[Task]) -> None:
    """Raise `InputError` where a task comes twice, or one data set is to be seen and unseen."""
    known = {task.spec.data_hash for task in seen}
    for task in unseen:
        if task.spec.data_hash in known:
            raise InputError("a task in tasks or in unseen, not in both", f"{task.name} in both", "take it out of one")
    names = [task.name for task in (*seen, *unseen)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError("each task once in a suite", f"{', '.join(twice)} twice", "rename or remove one")


@cache
def builtin_suites() -> dict[str, Suite]:
    """The built-in suites by name."""
    return {path.stem.replace("_", "-"): read_suite(path) for path in sorted(_SUITES.glob("*.yaml"))}


def load_suite(source: str | Path) -> Suite:
    """The suite in the YAML file `source`, or the built-in one of that name."""
    if os.path.isfile(source):
        return read_suite(Path(source))
    found = builtin_suites().get(str(source).replace("_", "-").lower())
    if found is None:
        raise unknown("a suite file or a built-in suite", str(source), builtin_suites())
    return found


def read_suite(path: Path) -> Suite:
    """The suite in a YAML file. Paths of task files are relative to it. Raises `DataError` with the bad key."""
    try:
        plain = yaml.safe_load(path.read_text("utf-8"))
        suite = Suite.model_validate(plain)
    except ValidationError as error:
        raise _bad(path, error) from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        found = " ".join(str(error).splitlines()[:3])
        raise DataError(f"a suite in YAML in {path}", found, "mend it") from None
    return suite.model_copy(update={"tasks": _beside(path, suite.tasks), "unseen": _beside(path, suite.unseen)})


def _beside(path: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Task files named from the suite's own folder."""
    return tuple(str(path.parent / name) if os.path.isfile(path.parent / name) else name for name in names)


def _bad(path: Path, error: ValidationError) -> InputError:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return unknown(f"the keys of a suite in {path}", key, Suite.model_fields)
    return DataError(f"a suite in {path} (name, tasks, ...)", f"{key}: {first['msg']}", "mend it")
