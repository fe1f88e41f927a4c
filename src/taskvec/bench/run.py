"""Running a grid: group by group, each cell written down as soon as it is done."""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context, parent_process
from threading import Thread

from taskvec.bench.folder import Outcome, RunFolder
from taskvec.bench.grid import Cell, Grid, Variant
from taskvec.comparison import as_shuffled, dev_score, is_candidate, matched
from taskvec.errors import InputError, TaskvecError
from taskvec.evaluate import Condition, Observation, observe, random_like, score_observed
from taskvec.evaluate.controls import source_controls
from taskvec.evaluate.shared import shared_work
from taskvec.lm import LM
from taskvec.progress import track
from taskvec.results import Results
from taskvec.tasks import Task
from taskvec.vector import TaskVector, VectorSource

Loader = Callable[[], LM]
Held = dict[str, Condition]
"""What was fitted on many tasks together, by the hash of the fit."""


def run_bench(lm: LM, grid: Grid, folder: RunFolder, *, jobs: int = 1, load: Loader | None = None) -> None:
    """Run what is missing in the folder. `jobs` processes each `load` a model of their own and share the groups.

    A cell that fails is written down with its error, and the rest goes on; it is tried again when the run is resumed.
    """
    if jobs < 1:
        raise InputError("at least one job", f"--jobs {jobs}", "raise it")
    with folder.locked():
        missing = [(task, seed) for task, seed in grid.groups() if _missing(grid, folder, task, seed)]
        if jobs == 1 or len(missing) <= 1:
            todo = sum(len(_missing(grid, folder, task, seed)) for task, seed in missing)
            for _ in track(_all_cells(lm, grid, folder, missing), "cells", todo):
                pass
            return
        if load is None:
            raise InputError("a way to load the model in each process", "none", "pass load=, or run one job")
        _in_processes(grid, folder, missing, jobs, load)


def _missing(grid: Grid, folder: RunFolder, task: Task, seed: int) -> list[Cell]:
    """Cells that were not run, or failed."""
    cells = grid.cells(task, seed)
    missing = [cell for cell in cells if not _done(folder.outcome(cell))]
    last = cells[-1]  # random: it is matched to one of the others
    return [*missing, last] if missing and last not in missing else missing


def _done(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.error is None


def _all_cells(lm: LM, grid: Grid, folder: RunFolder, groups: list[tuple[Task, int]]) -> Iterator[Cell]:
    together: Held = {}
    for task, seed in groups:
        yield from run_group(lm, grid, folder, task, seed, together)


def _in_processes(grid: Grid, folder: RunFolder, groups: list[tuple[Task, int]], jobs: int, load: Loader) -> None:
    import torch

    threads = max(1, torch.get_num_threads() // jobs)
    context = get_context("spawn")  # a fork would copy torch's threads in the middle of their work
    with ProcessPoolExecutor(jobs, context, _start, (grid, folder, load, threads)) as pool:
        waiting = [pool.submit(_work, task.name, seed) for task, seed in groups]
        try:
            for done in track(as_completed(waiting), "groups of cells", len(waiting)):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is not begun is not begun any more
            raise


_HERE: list[tuple[LM, Grid, RunFolder, Held]] = []
"""A worker process's own model and grid: loaded once, for all the groups it is given."""


def _start(grid: Grid, folder: RunFolder, load: Loader, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    begin_worker()
    _HERE.append((load(), grid, folder, {}))


def begin_worker() -> None:
    """End with the parent: a run that was killed leaves nobody behind who writes into its folder."""
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(name: str, seed: int) -> None:
    lm, grid, folder, together = _HERE[0]
    (task,) = (task for task in grid.tasks if task.name == name)
    for _ in run_group(lm, grid, folder, task, seed, together):
        pass


def run_group(
    lm: LM, grid: Grid, folder: RunFolder, task: Task, seed: int, together: Held | None = None
) -> Iterator[Cell]:
    """The missing cells of one task and seed, each as it is done. They share prompts, so their states and prefixes
    are computed once. `together` holds fits on many tasks that cannot be saved, for the groups that follow."""
    cells = dict(zip((variant.name for variant in grid.variants), grid.cells(task, seed), strict=True))
    missing = _missing(grid, folder, task, seed)
    if missing:  # random is matched anew: its old match must not outlive a kill
        folder.forget(missing[-1])
    with shared_work(lm):
        group = _Group(lm, grid, folder, task, seed, cells, {} if together is None else together)
        for variant in grid.variants:
            if cells[variant.name] in missing:
                folder.write(cells[variant.name], group.run(variant))
                yield cells[variant.name]


@dataclass(eq=False)
class _Group:
    """One task and seed in progress: what was fitted, and few-shot as everybody's reference."""

    lm: LM
    grid: Grid
    folder: RunFolder
    task: Task
    seed: int
    cells: dict[str, Cell]
    together: Held
    fitted: dict[str, Condition] = field(default_factory=dict)

    def run(self, variant: Variant) -> Outcome:
        """Fit, observe, score. Whatever goes wrong belongs to this cell alone."""
        start = time.perf_counter()
        with self.lm.metered() as meter:
            try:
                done = self._random() if variant.method is None else self._scored(variant)
                json.dumps([done.dev, done.results.to_dict()], allow_nan=False)  # else it cannot be written down
            except TaskvecError as error:
                done = Outcome(error=str(error))
            except Exception as error:
                done = Outcome(error=f"{type(error).__name__}: {error}")
        ledger = {"tokens": meter.tokens, "passes": meter.passes, "seconds": time.perf_counter() - start}
        ledger |= {name: getattr(row, name) for row in done.results.rows[:1] for name in ("fit_labels", "fit_queries")}
        return Outcome(done.results, done.error, done.dev, ledger)

    def _scored(self, variant: Variant) -> Outcome:
        condition = self._condition(variant.name)
        candidate = is_candidate(variant.name, condition)
        dev = dev_score(observe(self.lm, self.task.dev, condition), self._few_on_dev) if candidate else None
        if isinstance(condition, TaskVector | VectorSource):
            self.folder.keep(self.cells[variant.name], condition)
        return Outcome(self._row(variant.name, condition), dev=dev)

    def _row(self, name: str, condition: Condition) -> Results:
        seen = self._few if name == "few-shot" else observe(self.lm, self.task.test, condition)
        part = score_observed(self.lm, seen, condition, self._few, seed=self.seed)
        if name == "few-shot":
            part += score_observed(self.lm, seen, condition, self._few, seed=self.seed, cached=True)
        return part

    def _random(self) -> Outcome:
        """Matched to the candidate that dev chose."""
        scores = dict[str, tuple[float, float, int]]()
        for variant in self.grid.variants:
            outcome = self.folder.outcome(self.cells[variant.name])
            if outcome is not None and outcome.error is None and outcome.dev is not None:
                accuracy, far = outcome.dev
                scores[variant.name] = (-accuracy, far, outcome.results.rows[0].fit_tokens)
        chosen = min(scores, key=lambda name: scores[name], default="mean-difference")
        condition = self._condition(chosen)
        assert isinstance(condition, TaskVector | VectorSource)
        part = self._row("random", random_like(condition, seed=self.seed))
        return Outcome(matched(part, condition, chosen))

    @cached_property
    def _few(self) -> Observation:
        return observe(self.lm, self.task.test, self._condition("few-shot"))

    @cached_property
    def _few_on_dev(self) -> Observation:
        return observe(self.lm, self.task.dev, self._condition("few-shot"))

    def _condition(self, name: str) -> Condition:
        """What was fitted: in this run, in an earlier one, or now."""
        if name not in self.fitted:
            cell = self.cells[name]
            kept = self.folder.kept(cell) or self.together.get(cell.fit)
            self.fitted[name] = kept if kept is not None else self._fit(name)
        return self.fitted[name]

    def _fit(self, name: str) -> Condition:
        (variant,) = (variant for variant in self.grid.variants if variant.name == name)
        method = variant.method
        assert method is not None
        if variant.control:
            return self._control(variant)
        if self.grid.suite.joint and variant.joint:
            trains, devs = [one.train for one in self.grid.seen], [one.dev for one in self.grid.seen]
            made = method.fit(self.lm, trains, devs, seed=self.seed)
            if not hasattr(made, "save_pretrained"):
                self.together[self.cells[name].fit] = made
            return made
        return method.fit(self.lm, self.task.train, self.task.dev, seed=self.seed)

    def _control(self, variant: Variant) -> Condition:
        method = variant.method
        assert method is not None
        if hasattr(method, "shuffled"):
            return as_shuffled(method.shuffled().fit(self.lm, self.task.train, self.task.dev, seed=self.seed))
        source = self._condition(method.name)
        assert isinstance(source, VectorSource)
        other = self.grid.other(self.task)
        train = other.train if other is not None else None
        made = source_controls(self.lm, method.name, source, self.task.train, train, seed=self.seed)
        self.fitted |= made
        if variant.name not in made:
            raise InputError("a vector for every query, for its mean", "none for some", "leave this control out")
        return made[variant.name]
