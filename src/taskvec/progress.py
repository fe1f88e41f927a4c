"""Progress for long loops: silent in a library, a bar on a terminal, a plain line now and then elsewhere.

The command line switches it on with `shown()`. Everything goes to standard error. The environment variables
`TQDM_DISABLE` and `HF_HUB_DISABLE_PROGRESS_BARS` switch it off.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
_bars: ContextVar[Any] = ContextVar("taskvec_progress", default=None)
_open: ContextVar[tuple[Any, ...]] = ContextVar("taskvec_open", default=())
_LINE_EVERY_SECONDS = 10.0


@contextmanager
def shown() -> Iterator[None]:
    """Show the progress of every `track` inside."""
    if _switched_off():
        yield
        return
    with _display() as display:
        token = _bars.set(display)
        try:
            yield
        finally:
            _bars.reset(token)


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """The items, one by one, with a bar called `label` where progress is shown."""
    display = _bars.get()
    if display is None:
        yield from items
        return
    task = display.add_task(label, total=total)
    open_tasks = _open.get()
    _open.set((*open_tasks, task))
    try:
        for item in items:
            yield item
            display.update(task, advance=1)
    finally:
        _open.set(open_tasks)
        display.remove_task(task)


def note(text: str) -> None:
    """Say something about the innermost `track`: its label changes."""
    display = _bars.get()
    if display is not None and _open.get():
        display.update(_open.get()[-1], description=text)


def _switched_off() -> bool:
    names = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def _display() -> Any:
    if not sys.stderr.isatty():
        return _Lines()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    forever = 1e9  # the time left from all that was done: benchmark cells take 3 to 60 seconds each
    return Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=forever)


class _Lines:
    """Where there is no terminal: one line when a task starts, and one every ten seconds."""

    def __init__(self) -> None:
        self._tasks: dict[int, list[Any]] = {}

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self._tasks.clear()

    def add_task(self, label: str, total: int) -> int:
        key = len(self._tasks)
        self._tasks[key] = [label, total, 0, time.monotonic(), time.monotonic()]
        print(f"{label} ...", file=sys.stderr, flush=True)
        return key

    def update(self, key: int, advance: int = 0, description: str | None = None) -> None:
        task = self._tasks[key]
        task[0] = description or task[0]
        task[2] += advance
        if time.monotonic() - task[3] > _LINE_EVERY_SECONDS:
            task[3] = time.monotonic()
            print(f"{task[0]} {task[2]}/{task[1]}{_left(task)}", file=sys.stderr, flush=True)

    def remove_task(self, key: int) -> None:
        """Nothing to take away."""


def _left(task: list[Any]) -> str:
    """How long the rest takes, if it goes on as it went."""
    _, total, done, now, began = task
    if not done or done >= total:
        return ""
    seconds = (now - began) * (total - done) / done
    return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"
