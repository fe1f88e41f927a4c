"""A grid of cells: the same rows as compare's, whatever kills the run, and nothing run twice or taken for another."""

import gc
import json
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
import pytest
import torch
import yaml
from transformers import Cache

from taskvec.bench import Cell, Grid, RunFolder, run_bench
from taskvec.bench import folder as folders
from taskvec.bench import grid as grids
from taskvec.bench import run as runs
from taskvec.bench.grid import bench_methods
from taskvec.bench.run import run_group
from taskvec.cli import main
from taskvec.comparison import compare, with_controls
from taskvec.errors import InputError, ModelError, UnknownName
from taskvec.lm import LM
from taskvec.methods import Method
from taskvec.methods.adaptive import AdaptiveTaskVector
from taskvec.methods.adaptive_ridge import AdaptiveRidge
from taskvec.methods.elicit import Elicit
from taskvec.methods.function_vector import FunctionVector
from taskvec.methods.hendel import HendelTaskVector
from taskvec.methods.learned import LearnedTaskVector
from taskvec.methods.linear import LinearTaskVector
from taskvec.methods.mean_difference import MeanDifference
from taskvec.prompts import Example, PromptFormat
from taskvec.replay import Packed
from taskvec.report import read_run
from taskvec.results import Results, Row
from taskvec.sites import Site
from taskvec.tasks import Task, TaskSpec, Train, load_task
from taskvec.tasks.suite import Suite, load_suite
from taskvec.vector import Add, Edit, TaskVector

CONTROLS = ["few-shot", "zero-shot", "mean-difference", "random"]
SMALL = ["--set", "elicit.others=", "--set", "elicit.prompts=2", "--set", "elicit.n_dev=4"]
ASKED = ("--model", "tiny", "--method", "linear", "--method", "elicit", *SMALL, "--seeds", "1")
Cells = dict[tuple[str, str, int], list[dict[str, Any]]]


@cache
def lm() -> LM:
    return LM.load("tiny")


def settings() -> dict[str, dict[str, str]]:
    return {"elicit": {"others": "", "prompts": "2", "n_dev": "4"}}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of twenty rows, one of them with labels."""
    folder = tmp_path_factory.mktemp("suite")
    for name in ("spell", "vowel"):
        task = load_task(f"tiny_{name}")
        rows = [{"input": e.input, "output": e.output} for e in sorted(task.examples, key=lambda e: e.input)[::3][:20]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sidecar: dict[str, Any] = {"format": "arrow"}
        sidecar |= {"labels": list(task.spec.labels)} if task.spec.labels else {}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(sidecar))
    text = "name: small\ntasks: [spell.jsonl, vowel.jsonl]\nshots: 4\nn_test: 4\nqueries: 8\n"
    (folder / "small.yaml").write_text(text)
    return folder / "small.yaml"


def one_task(suite: Path) -> Suite:
    whole = load_suite(suite)
    return whole.model_copy(update={"tasks": whole.tasks[:1]})


@pytest.fixture(scope="module")
def grid(suite: Path) -> Grid:
    return Grid.of(lm(), load_suite(suite), bench_methods(["linear", "elicit"], settings(), 8), [0])


@dataclass(frozen=True)
class Victim:
    """A real process that runs the same grid, to be killed."""

    process: subprocess.Popen[bytes]
    path: Path

    def die(self) -> float:
        """Kill it at a random moment after it has begun: how many seconds after."""
        until = time.monotonic() + 120
        while not (self.path / "config.yaml").exists() and time.monotonic() < until and self.process.poll() is None:
            time.sleep(0.01)
        moment = random.SystemRandom().uniform(0, 2)
        time.sleep(moment)
        self.process.kill()
        self.process.wait()
        return moment


@pytest.fixture(scope="module")
def victim(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    path = tmp_path_factory.mktemp("runs") / "victim"
    command = [sys.executable, "-c", "from taskvec.cli import main; main()", "bench", str(suite), "--out", str(path)]
    process = subprocess.Popen([*command, *ASKED], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield Victim(process, path)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def whole(grid: Grid, victim: Victim, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run: 2 tasks x 1 seed x 8 rows of the grid. Meanwhile the victim starts."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    go(grid, path)
    return path


@pytest.fixture(scope="module", autouse=True)
def _versions_read_once() -> Iterator[None]:
    """Every key asks for taskvec's version, which takes milliseconds to read: here there are thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "version", cache(version))
        yield


def go(grid: Grid, path: Path, *, resume: bool = False, **options: Any) -> RunFolder:
    folder = RunFolder.open(path, grid, resume=resume)
    run_bench(lm(), grid, folder, **options)
    return folder


def all_cells(grid: Grid) -> list[Cell]:
    return [cell for task, seed in grid.groups() for cell in grid.cells(task, seed)]


def files(path: Path, key: str) -> list[Path]:
    return [path / "cells" / f"{key}.json", path / "cells" / f"{key}.parquet", path / "vectors" / key]


def drop(path: Path, cells: Sequence[Cell]) -> None:
    """As if the run had been killed before these cells."""
    for cell in cells:
        for file in files(path, cell.key):
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)


def part_of(whole: Path, path: Path, missing: Sequence[Cell]) -> Path:
    """A copy of a run without some of its cells."""
    shutil.copytree(whole, path)
    drop(path, missing)
    return path


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("fit_seconds", "query_ms")}


def plain_cells(path: Path) -> Cells:
    """What a run's folder says by (task, method, seed), read without taskvec: rows but for the times, dev scores,
    errors, and records."""
    out: Cells = {}
    for file in (path / "cells").glob("*.json"):
        found = json.loads(file.read_text())
        cell = found["cell"]
        assert cell["key"] == file.stem
        records = file.with_suffix(".parquet")
        out[cell["task"], cell["method"], cell["seed"]] = [
            *map(timeless, found["rows"]),
            {"dev": found["dev"], "error": found["error"]},
            *(pl.read_parquet(records).to_dicts() if records.is_file() else []),
        ]
    return out


@contextmanager
def counted() -> Iterator[list[str]]:
    """The cells that are run inside, by method."""
    done: list[str] = []
    original = runs._Group.run

    def run(self: Any, variant: Any) -> Any:
        done.append(variant.name)
        return original(self, variant)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs._Group, "run", run)
        yield done


def only(done: Sequence[str], missing: Sequence[str]) -> None:
    """Just these were run, in this order. `random` may be among them: it hangs on all the others."""
    assert [name for name in done if name != "random" or name in missing] == list(missing)


# --- methods of this file's own ---------------------------------------------------------------------------------------

FAULTS: dict[str, BaseException] = {}
"""What `moody` raises: set by the tests."""


@dataclass(frozen=True)
class Moody:
    """A good method (the linear task vector), but for its moods."""

    name: ClassVar[str] = "moody"
    queries: int = 30

    def fit(self, lm: LM, train: Any, dev: Any, *, seed: int = 0) -> TaskVector:
        if "moody" in FAULTS:
            raise FAULTS["moody"]
        return renamed(LinearTaskVector(queries=self.queries).fit(lm, train, dev, seed=seed), "moody")


@dataclass(frozen=True)
class Dear:
    """A mean difference at one site, which claims to have cost much."""

    name: ClassVar[str] = "dear"
    tokens: int = 10**6

    def fit(self, lm: LM, train: Any, dev: Any, *, seed: int = 0) -> TaskVector:
        vector = MeanDifference(site="lm_head_in", queries=8).fit(lm, train, dev, seed=seed)
        assert vector.origin is not None
        cost = vector.origin.cost.model_copy(update={"tokens": self.tokens})
        return renamed(replace(vector, origin=vector.origin.model_copy(update={"cost": cost})), self.name)


@dataclass(frozen=True)
class Cheap(Dear):
    name: ClassVar[str] = "cheap"
    tokens: int = 1


@dataclass(frozen=True)
class Broken:
    """A vector after which no number is one."""

    name: ClassVar[str] = "broken"

    def fit(self, lm: LM, train: Any, dev: Any, *, seed: int = 0) -> TaskVector:
        vector = MeanDifference(site="lm_head_in", queries=8).fit(lm, train, dev, seed=seed)
        nowhere = Add(torch.full((lm.width(Site("lm_head_in")),), float("nan")))
        return renamed(replace(vector, edits=(Edit(Site("lm_head_in"), nowhere),)), self.name)


def renamed(vector: TaskVector, name: str) -> TaskVector:
    assert vector.origin is not None
    return replace(vector, origin=vector.origin.model_copy(update={"method": name}))


def test_kill_9_at_a_random_moment(grid: Grid, whole: Path, victim: Victim) -> None:
    """Gone without a word; what it left is another process's work to finish. The first test: it is running already."""
    moment = victim.die()
    there = len(list((victim.path / "cells").glob("*.json")))
    with counted() as done:
        go(grid, victim.path, resume=True)
    assert len(done) == 16 - there, f"killed after {moment} s"
    assert plain_cells(victim.path) == plain_cells(whole), f"killed after {moment} s"


# --- rows -------------------------------------------------------------------------------------------------------------


def test_every_cell_is_there_once_controls_unasked(grid: Grid, whole: Path) -> None:
    found = plain_cells(whole)
    methods = [*CONTROLS, "linear", "linear-shuffled", "elicit", "elicit-shuffled"]
    assert set(found) == {(task, method, 0) for task in ("spell", "vowel") for method in methods}
    assert len(list((whole / "cells").iterdir())) == 2 * len(found) == 32
    for (task, method, seed), parts in found.items():
        rows = [part for part in parts if "accuracy" in part]
        assert [row["method"] for row in rows] == [method, *(["few-shot-cached"] if method == "few-shot" else [])]
        assert all((row["task"], row["seed"], row["n"]) == (task, seed, 4) for row in rows)
        (state,) = (part for part in parts if "dev" in part)
        assert state["error"] is None
        assert (state["dev"] is not None) == (method in ("linear", "elicit"))
    order = [cell.method for cell in grid.cells(grid.tasks[0], 0)]
    assert (order[0], order[-1]) == ("few-shot", "random")
    assert sorted(order) == sorted(methods)


def test_every_cell_has_a_record_for_every_test_item(grid: Grid, whole: Path) -> None:
    rows = plain_cells(whole)
    for task, seed in grid.groups():
        for cell in grid.cells(task, seed):
            records = pl.read_parquet(files(whole, cell.key)[1])
            names = [cell.method, "few-shot-cached"] if cell.method == "few-shot" else [cell.method]
            assert records["method"].to_list() == [name for name in names for _ in range(4)]
            assert records["input"].to_list() == [e.input for e in task.test.examples] * len(names)
            assert set(records["seed"]) == {seed}
            assert set(records["task"]) == {task.name}
            row = rows[task.name, cell.method, seed][0]
            hit = "label_correct" if task.spec.labels else "correct"
            metric = row["label_accuracy"] if task.spec.labels else row["accuracy"]
            assert sum(records[hit].to_list()[:4]) / 4 == pytest.approx(metric["value"])


def rows_of(cells: Cells) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The rows of a run by (task, method, seed)."""
    rows = [part for parts in cells.values() for part in parts if "accuracy" in part]
    return {(row["task"], row["method"], row["seed"]): row for row in rows}


def compared(results: Results) -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(row.task, row.method, row.seed): json.loads(json.dumps(timeless(row.to_dict()))) for row in results.rows}


def test_rows_are_those_of_compare(grid: Grid, whole: Path) -> None:
    asked: list[Method] = [LinearTaskVector(queries=8), Elicit(others=(), prompts=2, n_dev=4)]
    expected = compared(compare(lm(), grid.tasks[1], [MeanDifference(queries=8), *asked]))
    expected = {key: row for key, row in expected.items() if not key[1].endswith("-task-mean")}
    assert len(expected) == 9
    found = {key: row for key, row in rows_of(plain_cells(whole)).items() if key[0] == "vowel"}
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert found[key] == row, key


def test_rows_of_several_seeds_are_those_of_compare_and_the_ledger_adds_up(suite: Path, tmp_path: Path) -> None:
    grid = Grid.of(lm(), one_task(suite), [LinearTaskVector(queries=8)], [2, 1])
    computed = list[int]()
    handle = lm().model.register_forward_pre_hook(
        lambda _, __, inputs: computed.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    with lm().metered() as meter:
        folder = go(grid, tmp_path / "run")
    handle.remove()
    found = rows_of(plain_cells(folder.path))
    assert found == compared(compare(lm(), grid.tasks[0], [LinearTaskVector(queries=8)], seeds=[2, 1]))
    assert len(found) == 14
    assert found["spell", "linear", 1] != found["spell", "linear", 2] | {"seed": 1}
    ledgers = [outcome.ledger for cell in all_cells(grid) if (outcome := folder.outcome(cell)) is not None]
    assert len(ledgers) == 12
    assert sum(ledger["tokens"] for ledger in ledgers) == meter.tokens
    assert sum(ledger["passes"] for ledger in ledgers) == meter.passes == len(computed)
    assert sum(computed) < meter.tokens  # the rest was shared
    assert all(ledger["seconds"] > 0 for ledger in ledgers)


def test_a_tie_on_dev_goes_to_the_cheaper_as_in_compare(suite: Path, tmp_path: Path) -> None:
    methods: list[Method] = [Dear(), Cheap()]
    grid = Grid.of(lm(), one_task(suite), methods, [0])
    folder = go(grid, tmp_path / "run")
    (cell,) = (cell for cell in grid.cells(grid.tasks[0], 0) if cell.method == "random")
    outcome = folder.outcome(cell)
    assert outcome is not None
    assert compare(lm(), grid.tasks[0], methods)["random"].matched == "cheap"
    assert outcome.results["random"].matched == "cheap"


def test_nothing_of_a_group_is_held_for_the_next(grid: Grid, tmp_path: Path) -> None:
    """Prefix caches and states are what fills memory: it must not grow with the number of cells."""

    def held() -> int:
        return sum(issubclass(type(one), Packed | Cache) for one in gc.get_objects())

    gc.collect()
    folder, before = RunFolder.open(tmp_path / "run", grid, resume=False), held()
    for task in grid.tasks:
        assert max(held() for _ in run_group(lm(), grid, folder, task, 0)) > before
        gc.collect()
        assert held() == before


def test_what_was_fitted_is_kept_where_it_can_be(grid: Grid, whole: Path) -> None:
    cells = {cell.method: cell for cell in grid.cells(grid.tasks[0], 0)}
    folder = RunFolder(whole)
    kept = {name for name, cell in cells.items() if folder.kept(cell) is not None}
    assert kept == {*cells} - {"random", "elicit-shuffled"}
    linear = folder.kept(cells["linear"])
    fresh = LinearTaskVector(queries=8).fit(lm(), grid.tasks[0].train, grid.tasks[0].dev, seed=0)
    assert isinstance(linear, TaskVector)
    assert all(torch.equal(tensor, fresh.tensors()[name]) for name, tensor in linear.tensors().items())


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_runs_nothing(grid: Grid, whole: Path, tmp_path: Path) -> None:
    path = part_of(whole, tmp_path / "run", [])
    before = {file: file.stat().st_mtime_ns for file in (path / "cells").iterdir()}
    with counted() as done, lm().metered() as meter:
        go(grid, path, resume=True)
    assert (done, meter.passes, meter.tokens) == ([], 0, 0)
    assert {file: file.stat().st_mtime_ns for file in (path / "cells").iterdir()} == before


def test_any_missing_cells_are_run_again_and_no_others(grid: Grid, whole: Path, tmp_path: Path) -> None:
    missing = [
        cell for cell in grid.cells(grid.tasks[1], 0) if cell.method in ("zero-shot", "linear", "elicit-shuffled")
    ]
    path = part_of(whole, tmp_path / "run", missing)
    with counted() as done:
        go(grid, path, resume=True)
    only(done, [cell.method for cell in missing])
    assert plain_cells(path) == plain_cells(whole)


POINTS = ("before anything", "after the vector is kept", "after the records are written")


@contextmanager
def killed(cell: Cell, point: str) -> Iterator[None]:
    """Ctrl-C at one moment of one cell."""
    original_run, original_keep, original_write = runs._Group.run, RunFolder.keep, folders.write

    def run(self: Any, variant: Any) -> Any:
        if variant.name == cell.method:
            raise KeyboardInterrupt
        return original_run(self, variant)

    def keep(self: RunFolder, at: Cell, vector: Any) -> None:
        original_keep(self, at, vector)
        if at == cell:
            raise KeyboardInterrupt

    def write(path: Path, text: str) -> None:
        if path.stem == cell.key:
            raise KeyboardInterrupt
        original_write(path, text)

    with pytest.MonkeyPatch.context() as patch:
        if point == POINTS[0]:
            patch.setattr(runs._Group, "run", run)
        elif point == POINTS[1]:
            patch.setattr(RunFolder, "keep", keep)
        else:
            patch.setattr(folders, "write", write)
        yield


def test_a_run_killed_at_every_cell_and_moment_ends_as_an_unbroken_one(
    suite: Path, whole: Path, tmp_path: Path
) -> None:
    """Killed and resumed again and again: at each cell in turn, at three moments of it."""
    grid = Grid.of(lm(), one_task(suite), bench_methods(["linear"], {}, 8), [0])
    path = tmp_path / "run"
    moments = [(cell, point) for cell in all_cells(grid) for point in POINTS]
    moments.remove((all_cells(grid)[-1], POINTS[1]))  # of random nothing is kept
    for cell, point in moments:
        with killed(cell, point), pytest.raises(KeyboardInterrupt):
            go(grid, path, resume=True)
        assert "shared" not in lm().proofs
        assert not files(path, cell.key)[0].exists()
    assert len(moments) == 17
    go(grid, path, resume=True)
    unbroken = plain_cells(whole)
    methods = {cell.method for cell in all_cells(grid)}
    assert plain_cells(path) == {
        (task, method, seed): parts
        for (task, method, seed), parts in unbroken.items()
        if task == "spell" and method in methods
    }


@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_run_killed_once_ends_as_an_unbroken_one(grid: Grid, whole: Path, tmp_path: Path, number: int) -> None:
    """Killed in one cell of the second task after its vector was kept; all that follows is run in one go."""
    last = grid.cells(grid.tasks[1], 0)
    path = part_of(whole, tmp_path / "run", last[number:])
    vector = files(whole, last[number].key)[2]
    if vector.exists():
        shutil.copytree(vector, files(path, last[number].key)[2])
    with counted() as done:
        go(grid, path, resume=True)
    only(done, [cell.method for cell in last[number:]])
    assert plain_cells(path) == plain_cells(whole)


def test_half_written_cells_and_stray_folders_are_no_hindrance(grid: Grid, whole: Path, tmp_path: Path) -> None:
    linear, random_ = (c for c in grid.cells(grid.tasks[0], 0) if c.method in ("linear", "random"))
    path = part_of(whole, tmp_path / "run", [])
    files(path, linear.key)[0].unlink()
    shutil.rmtree(files(path, linear.key)[2])
    files(path, random_.key)[0].unlink()
    files(path, random_.key)[1].write_bytes(b"PAR1 and no more")
    for parent in (path, path / "cells", path / "vectors"):
        (parent / ".new.abcdef").mkdir()
        (parent / ".new.abcdef" / f"{linear.key}.json").write_text('{"cell": ')
    with counted() as done:
        go(grid, path, resume=True)
    only(done, ["linear", "random"])
    assert plain_cells(path) == plain_cells(whole)


def test_a_run_killed_before_its_first_cell_can_go_on(suite: Path, tmp_path: Path) -> None:
    """In `open` itself: between the folder and its config.yaml."""
    grid = Grid.of(lm(), one_task(suite), [], [0])
    original = folders.write

    def interrupted(path: Path, text: str) -> None:
        if path.name == "config.yaml":
            raise KeyboardInterrupt
        original(path, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            RunFolder.open(tmp_path / "run", grid, resume=False)
    assert RunFolder.open(tmp_path / "run", grid, resume=True).path.is_dir()


def two_unfinished(grid: Grid, whole: Path, path: Path) -> Path:
    return part_of(whole, path, [*grid.cells(grid.tasks[0], 0)[3:], *grid.cells(grid.tasks[1], 0)[5:]])


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(grid: Grid, whole: Path, tmp_path: Path) -> None:
    path = two_unfinished(grid, whole, tmp_path / "run")
    with counted() as done:
        go(grid, path, resume=True, jobs=2, load=partial(LM.load, "tiny"))
    assert done == []  # none of them here
    assert plain_cells(path) == plain_cells(whole)


def test_jobs_give_the_rows_of_one(grid: Grid, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in a thread in place of the processes: all they get is a copy of what can be sent to them."""
    path, asked = two_unfinished(grid, whole, tmp_path / "run"), list[int]()

    def pool(jobs: int, context: Any, start: Callable[..., None], sent: tuple[Any, ...]) -> ThreadPoolExecutor:
        assert context.get_start_method() == "spawn"
        asked.append(jobs)
        return ThreadPoolExecutor(1, initializer=start, initargs=pickle.loads(pickle.dumps(sent)))

    monkeypatch.setattr(runs, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(runs, "_HERE", [])
    with lm().metered() as meter:
        go(grid, path, resume=True, jobs=2, load=partial(LM.load, "tiny"))
    assert (asked, meter.passes) == ([2], 0)  # another model ran
    assert plain_cells(path) == plain_cells(whole)


def test_where_one_group_cannot_be_written_what_is_not_begun_is_not_begun(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: groups wait in line behind the first, and none of them is run."""
    grid = Grid.of(lm(), one_task(suite), [], range(6))
    begun = list[int]()

    def full(name: str, seed: int) -> None:
        begun.append(seed)
        time.sleep(0.2)
        raise OSError("no space left on device")

    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(runs, "_work", full)
    with pytest.raises(OSError, match="no space left"):
        go(grid, tmp_path / "run", jobs=2, load=partial(LM.load, "tiny"))
    assert len(begun) < 6


def test_a_worker_ends_with_its_parent() -> None:
    """The parent is killed without a word; its worker, which waits for nothing else, must go."""
    code = (
        "from multiprocessing import get_context\n"
        "from taskvec.bench.run import _end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    child = get_context('spawn').Process(target=_end_with_parent)\n"
        "    child.start()\n"
        "    print(child.pid, flush=True)\n"
        "    child.join()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = Path(f"/proc/{parent.stdout.readline().strip()}/stat")
    if not worker.parent.parent.joinpath("self").exists():
        pytest.skip("no /proc to see processes in")
    assert worker.exists()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(600):
        if not worker.exists() or worker.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker lives on")


def test_jobs_are_checked(grid: Grid, whole: Path, tmp_path: Path) -> None:
    folder = RunFolder(part_of(whole, tmp_path / "run", [*grid.cells(grid.tasks[0], 0), *grid.cells(grid.tasks[1], 0)]))
    with pytest.raises(InputError, match="at least one job; found --jobs 0"):
        run_bench(lm(), grid, folder, jobs=0)
    with pytest.raises(InputError, match="a way to load the model in each process"):
        run_bench(lm(), grid, folder, jobs=2)


# --- cells that fail --------------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[BaseException, str]] = {
    "its own": (ModelError("a thing", "none", "do\nthis"), "wanted a thing; found none; do this"),
    "any other": (RuntimeError("out of memory"), "RuntimeError: out of memory"),
}


@pytest.fixture(scope="module")
def moody(suite: Path) -> Grid:
    """A grid in which dev chooses `moody`, where it works."""
    return Grid.of(lm(), one_task(suite), [HendelTaskVector(layer=0), Moody()], [0])


@pytest.fixture(scope="module")
def in_good_mood(moody: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moody") / "run"
    go(moody, path)
    return path


@pytest.mark.parametrize("kind", ERRORS)
def test_a_cell_that_fails_is_written_down_and_the_rest_goes_on(
    moody: Grid, in_good_mood: Path, tmp_path: Path, kind: str
) -> None:
    error, said = ERRORS[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAULTS, "moody", error)
        folder = go(moody, tmp_path / "run")
    assert "shared" not in lm().proofs
    for cell in all_cells(moody):
        outcome = folder.outcome(cell)
        assert outcome is not None
        assert outcome.error == (said if cell.method == "moody" else None)
        assert len(outcome.results.rows) == {"moody": 0, "few-shot": 2}.get(cell.method, 1)
        assert outcome.ledger["seconds"] > 0
    assert [(f.task, f.method, f.seed, f.error) for f in read_run(folder.path).failures] == [
        ("spell", "moody", 0, said)
    ]
    found, expected = plain_cells(folder.path), plain_cells(in_good_mood)
    apart = {("spell", "moody", 0), ("spell", "random", 0)}
    assert {key: found[key] for key in found.keys() - apart} == {key: expected[key] for key in expected.keys() - apart}
    assert read_run(folder.path).rows_of("spell", "random")[0].matched == "hendel"  # the best of those that are there


def failed_once(moody: Grid, in_good_mood: Path, path: Path) -> Path:
    """A copy of a run in which `moody` failed, and random was matched to the best of the others."""
    shutil.copytree(in_good_mood, path)
    cells = {cell.method: cell for cell in all_cells(moody)}
    drop(path, [cells["moody"], cells["random"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAULTS, "moody", RuntimeError("out of memory"))
        go(moody, path, resume=True)
    assert [failure.method for failure in read_run(path).failures] == ["moody"]
    return path


def test_a_cell_that_failed_is_run_again_and_again(moody: Grid, in_good_mood: Path, tmp_path: Path) -> None:
    path = failed_once(moody, in_good_mood, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, counted() as done:
        patch.setitem(FAULTS, "moody", RuntimeError("out of memory"))
        go(moody, path, resume=True)
    only(done, ["moody"])
    with counted() as done:
        go(moody, path, resume=True)
    only(done, ["moody"])
    assert read_run(path).failures == ()
    assert plain_cells(path)["spell", "moody", 0] == plain_cells(in_good_mood)["spell", "moody", 0]
    with counted() as done:
        go(moody, path, resume=True)
    assert done == []


def test_random_is_matched_to_what_dev_chooses_after_a_second_try(
    moody: Grid, in_good_mood: Path, tmp_path: Path
) -> None:
    path = failed_once(moody, in_good_mood, tmp_path / "run")
    assert read_run(path).rows_of("spell", "random")[0].matched == "hendel"
    go(moody, path, resume=True)
    assert read_run(in_good_mood).rows_of("spell", "random")[0].matched == "moody"
    assert read_run(path).rows_of("spell", "random")[0].matched == "moody"
    assert plain_cells(path) == plain_cells(in_good_mood)


def test_a_kill_between_a_second_try_and_random_leaves_no_stale_match(
    moody: Grid, in_good_mood: Path, tmp_path: Path
) -> None:
    path = failed_once(moody, in_good_mood, tmp_path / "run")

    def killed(_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs._Group, "_random", killed)
        with pytest.raises(KeyboardInterrupt):
            go(moody, path, resume=True)
    assert read_run(path).rows_of("spell", "random") == []  # not the match with what was best before
    go(moody, path, resume=True)
    assert plain_cells(path) == plain_cells(in_good_mood)


def test_other_versions_of_torch_are_refused_and_what_it_was_begun_with_stays(
    grid: Grid, whole: Path, tmp_path: Path
) -> None:
    path = part_of(whole, tmp_path / "run", [])
    there = json.loads((path / "env.json").read_text())
    there["packages"]["torch"] = "1.0"
    (path / "env.json").write_text(json.dumps(there))
    with pytest.raises(InputError, match=r"the versions .* was begun with; found torch 1.0 there"):
        RunFolder.open(path, grid, resume=True)
    assert json.loads((path / "env.json").read_text()) == there
    (path / "env.json").unlink()  # a kill within open
    RunFolder.open(path, grid, resume=True)
    assert (path / "env.json").is_file()


def test_where_few_shot_fails_all_cells_say_so(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> TaskVector:
        raise RuntimeError("no prompt")

    grid = Grid.of(lm(), one_task(suite), [], [0])
    with monkeypatch.context() as patch:
        patch.setattr("taskvec.methods.prompted.FewShot.fit", fail)
        folder = go(grid, tmp_path / "run")
    outcomes = [folder.outcome(cell) for cell in all_cells(grid)]
    assert [outcome.error for outcome in outcomes if outcome is not None] == ["RuntimeError: no prompt"] * 4
    go(grid, tmp_path / "run", resume=True)
    assert not read_run(tmp_path / "run").failures
    # without a candidate, random is matched to the mean difference
    assert read_run(tmp_path / "run").rows_of("spell", "random")[0].matched == "mean-difference"


def test_a_method_that_needs_labels_fails_where_there_are_none(suite: Path, tmp_path: Path) -> None:
    grid = Grid.of(lm(), one_task(suite), bench_methods(["calibration"], {}), [0])
    go(grid, tmp_path / "run")
    (failure,) = read_run(tmp_path / "run").failures
    assert failure.method == "calibration"
    assert failure.error.startswith("wanted a task with labels")


def test_numbers_that_are_none_belong_to_their_cell(suite: Path, tmp_path: Path) -> None:
    grid = Grid.of(lm(), one_task(suite), [Broken()], [0])
    folder = go(grid, tmp_path / "run")
    outcomes = {cell.method: folder.outcome(cell) for cell in all_cells(grid)}
    assert all(outcome is not None for outcome in outcomes.values())
    assert [name for name, outcome in outcomes.items() if outcome is not None and outcome.error] == ["broken"]


@pytest.mark.parametrize("what", ["json", "parquet"])
def test_a_full_disk_costs_the_cell_in_flight(grid: Grid, whole: Path, tmp_path: Path, what: str) -> None:
    last = grid.cells(grid.tasks[0], 0)
    path = part_of(whole, tmp_path / "run", last[5:])
    full = last[6]
    write, examples = folders.write, Results.write_examples

    def write_text(target: Path, text: str) -> None:
        if what == "json" and target.stem == full.key:
            raise OSError(28, "No space left on device")
        write(target, text)

    def write_examples(results: Results, target: Any) -> None:
        if what == "parquet" and Path(target).stem == full.key:
            Path(target).write_bytes(b"PAR1 half")
            raise OSError(28, "No space left on device")
        examples(results, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "write", write_text)
        patch.setattr(Results, "write_examples", write_examples)
        with pytest.raises(OSError, match="No space left") as error:
            go(grid, path, resume=True)
    assert error.value.errno == 28
    done = {key: parts for key, parts in plain_cells(path).items() if parts}
    lost = {("spell", cell.method, 0) for cell in last[6:]}
    assert done == {key: parts for key, parts in plain_cells(whole).items() if key not in lost}
    assert not list((path / "cells").glob(".new.*"))
    with counted() as again:
        go(grid, path, resume=True)
    only(again, [cell.method for cell in last[6:]])
    assert plain_cells(path) == plain_cells(whole)


# --- folders that are refused -----------------------------------------------------------------------------------------


def with_data(task: Task) -> Task:
    return replace(task, spec=replace(task.spec, data_hash="f" * 64))


OTHERS: dict[str, tuple[Callable[[Grid], Grid], str]] = {
    "another model": (lambda g: replace(g, model=g.model | {"fingerprint": "x"}), "model"),
    "another dtype": (lambda g: replace(g, model=g.model | {"dtype": "torch.bfloat16"}), "model"),
    "another suite": (lambda g: replace(g, suite=g.suite.model_copy(update={"name": "other"})), "suite"),
    "other data": (lambda g: replace(g, tasks=(with_data(g.tasks[0]), *g.tasks[1:])), "tasks"),
    "fewer tasks": (lambda g: replace(g, tasks=g.tasks[:1]), "tasks"),
    "fewer methods": (lambda g: replace(g, variants=g.variants[1:]), "methods"),
    "another setting": (
        lambda g: replace(g, variants=(replace(g.variants[0], method=Moody()), *g.variants[1:])),
        "methods",
    ),
    "more seeds": (lambda g: replace(g, seeds=(0, 1)), "seeds"),
    "another seed": (lambda g: replace(g, seeds=(1,)), "seeds"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_folder_of_another_grid_is_refused_with_the_part_that_differs(
    grid: Grid, whole: Path, tmp_path: Path, kind: str
) -> None:
    change, part = OTHERS[kind]
    (tmp_path / "run").mkdir()
    before = (whole / "config.yaml").read_bytes()
    (tmp_path / "run" / "config.yaml").write_bytes(before)
    with pytest.raises(
        InputError, match=rf"wanted the same grid as in .*; found another {part}: .* there, .* asked for;"
    ):
        RunFolder.open(tmp_path / "run", change(grid), resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert RunFolder.open(tmp_path / "run", grid, resume=True).path == tmp_path / "run"


def test_a_folder_of_another_version_is_refused(
    grid: Grid, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = part_of(whole, tmp_path / "run", [])
    with monkeypatch.context() as patch:
        patch.setattr(grids, "version", lambda _: "9.9.9")
        with pytest.raises(InputError, match=r'another taskvec: "0\.1\.0" there, "9\.9\.9" asked for'):
            RunFolder.open(path, grid, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "FORMAT_VERSION", 2)
        with pytest.raises(InputError, match="another format_version: 1 there, 2 asked for"):
            RunFolder.open(path, grid, resume=True)


def test_a_run_is_not_begun_where_there_is_one(grid: Grid, whole: Path) -> None:
    with pytest.raises(InputError, match="holds a run; pass --resume or name another"):
        RunFolder.open(whole, grid, resume=False)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["a file", "other files", "a list", "no YAML", "no text", "an odd date"])
def test_a_folder_of_something_else_is_refused_and_left_alone(
    grid: Grid, tmp_path: Path, kind: str, resume: bool
) -> None:
    path = tmp_path / "theirs"
    if kind == "a file":
        path.write_text("hello")
    else:
        path.mkdir()
        contents: dict[str, bytes] = {
            "a list": b"- 1\n",
            "no YAML": b"{",
            "no text": b"\xff",
            "an odd date": b"a: 2001-99-99\n",
        }
        (path / ("notes.txt" if kind == "other files" else "config.yaml")).write_bytes(contents.get(kind, b"hello"))
    before = [path.read_bytes()] if path.is_file() else [file.read_bytes() for file in path.iterdir()]
    with pytest.raises(InputError) as error:
        RunFolder.open(path, grid, resume=resume)
    assert str(path) in str(error.value)
    assert before == ([path.read_bytes()] if path.is_file() else [file.read_bytes() for file in path.iterdir()])


def test_an_empty_folder_is_taken_with_or_without_resume(grid: Grid, tmp_path: Path) -> None:
    for resume in (False, True):
        path = tmp_path / str(resume)
        path.mkdir()
        assert RunFolder.open(path, grid, resume=resume).path == path
        assert RunFolder.open(tmp_path / f"new {resume}" / "deeper", grid, resume=resume).path.is_dir()


def test_a_run_in_use_is_refused(grid: Grid, whole: Path, tmp_path: Path) -> None:
    folder = RunFolder(part_of(whole, tmp_path / "run", []))
    with folder.locked(), pytest.raises(InputError, match=r"a folder no other run writes to; found .* is in use; wait"):
        run_bench(lm(), grid, folder)
    run_bench(lm(), grid, folder)
    with pytest.raises(KeyboardInterrupt), folder.locked():
        raise KeyboardInterrupt
    with folder.locked():  # free again
        pass


def test_the_environment_is_written_down(whole: Path) -> None:
    found = json.loads((whole / "env.json").read_text())
    assert found["packages"].keys() >= {"taskvec", "torch", "transformers", "numpy"}
    assert found["packages"]["torch"] == torch.__version__
    assert 1 <= found["threads"] <= found["cores"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


# --- keys -------------------------------------------------------------------------------------------------------------


def a_task(name: str = "t", *, n_test: int = 8, labels: tuple[str, ...] | None = None, **spec: Any) -> Task:
    format = spec.pop("format", PromptFormat.named("arrow"))
    examples = [Example(f"w{i}", "xy"[i % 2]) for i in range(40)]
    changed = spec.pop("changed", {})
    examples = [replace(e, **changed) if i == 7 else e for i, e in enumerate(examples)]
    return Task.from_examples(
        TaskSpec(name, format=format, labels=labels, **{"shots": 4, **spec}), examples, n_test=n_test
    )


MODEL = {"id": "m", "revision": None, "fingerprint": "f", "dtype": "torch.float32", "tokenizer": "t"}
LINEAR, HENDEL = LinearTaskVector(queries=8), HendelTaskVector(layer=1)
BASE: dict[str, Any] = {"task": a_task(), "model": MODEL, "seed": 0, "methods": (LINEAR, HENDEL)}


def keys(**changed: Any) -> dict[str, str]:
    """The keys of one group's cells by method."""
    what = BASE | {"others": (), "seeds": (0, 1), "suite": Suite(name="s", tasks=("t",))} | changed
    variants = grids._variants(with_controls(list(what["methods"])), what["suite"])
    tasks = (what["task"], *what["others"])
    grid = Grid(what["suite"], tasks, tuple(variants), what["seeds"], what["model"])
    return {cell.method: cell.key for cell in grid.cells(what["task"], what["seed"])}


ALL_CHANGE: dict[str, dict[str, Any]] = {
    **{f"the model's {part}": {"model": MODEL | {part: "other"}} for part in MODEL},
    "the task's name": {"task": a_task("u")},
    "an output": {"task": a_task(changed={"output": "y" if 7 % 2 == 0 else "x"})},
    "an input": {"task": a_task(changed={"input": "other"})},
    "labels": {"task": a_task(labels=("x", "y"))},
    "the order of labels": {"task": a_task(labels=("y", "x"))},
    "the template": {"task": a_task(format=PromptFormat.named("qa"))},
    "the instruction": {"task": a_task(format=PromptFormat.named("arrow", "Answer."))},
    "shots": {"task": a_task(shots=5)},
    "the number of test items": {"task": a_task(n_test=9)},
    "the seed": {"seed": 1},
}


@pytest.mark.parametrize("what", ALL_CHANGE)
def test_every_key_changes_with(what: str) -> None:
    before, after = keys(), keys(**ALL_CHANGE[what])
    assert len(set(before.values())) == 7
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())


def test_labels_and_their_order_are_three_different_tasks() -> None:
    found = [keys(), keys(**ALL_CHANGE["labels"]), keys(**ALL_CHANGE["the order of labels"])]
    assert len({key for some in found for key in some.values()}) == 21


def test_every_key_changes_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys()
    monkeypatch.setattr(grids, "version", lambda _: "9.9.9")
    assert not set(before.values()) & set(keys().values())


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        (LinearTaskVector(queries=9), {"linear", "linear-shuffled", "random"}),
        (LinearTaskVector(queries=8, ridge=1.0), {"linear", "linear-shuffled", "random"}),
        (LinearTaskVector(queries=8, ridge="loo"), {"linear", "linear-shuffled", "random"}),
        (HendelTaskVector(layer=2), {"hendel", "random"}),
        (HendelTaskVector(layer=1, n_dev=39), {"hendel", "random"}),
        (MeanDifference(queries=63), {"mean-difference", "random"}),
        (LearnedTaskVector(), {"random"}),
    ],
)
def test_a_setting_changes_the_keys_of_its_method_and_of_random(method: Method, changed: set[str]) -> None:
    rest = [m for m in (LINEAR, HENDEL) if m.name != method.name]
    before, after = keys(), keys(methods=(*rest, method))
    assert {name for name in before if before[name] != after[name]} == changed
    assert after.keys() - before.keys() <= {method.name}


NOTHING_CHANGES: dict[str, dict[str, Any]] = {
    "the suite's name": {"suite": Suite(name="other", description="other", tasks=("t", "u"), queries=3)},
    "other tasks": {"others": (a_task("u"), a_task("v"))},
    "other seeds": {"seeds": (0, 1, 2, 3)},
    "the order of methods": {"methods": (HENDEL, LINEAR)},
    "a control asked for": {"methods": (MeanDifference(), LINEAR, HENDEL)},
}


@pytest.mark.parametrize("what", NOTHING_CHANGES)
def test_no_key_changes_with(what: str) -> None:
    assert keys(**NOTHING_CHANGES[what]) == keys()


def test_keys_are_the_same_in_every_process() -> None:
    """Short hexadecimal numbers; nothing in them depends on the order of a set or a hash of Python's own."""
    found = keys()
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in found.values())
    loaded: dict[str, Any] = {"task": BASE["task"], "model": dict(reversed(MODEL.items()))}
    assert keys(**loaded) == found


# --- tasks together, and unseen ones ----------------------------------------------------------------------------------

TOGETHER: list[Method] = [
    AdaptiveTaskVector(rows=6, epochs=1, batch=6, n_dev=3),
    AdaptiveRidge(queries=6),
    LinearTaskVector(queries=6),
]


def joint_suite(**changed: Any) -> Suite:
    tasks = {"tasks": ("tiny_spell", "tiny_upper"), "unseen": ("tiny_successor",)}
    return Suite(**{"name": "joint", "shots": 4, "n_test": 6, **tasks, **changed})


def test_methods_that_can_are_fitted_once_a_seed_on_all_seen_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid.of(lm(), joint_suite(), TOGETHER, [0, 1])
    fits = list[tuple[str, int]]()
    for kind in (AdaptiveTaskVector, AdaptiveRidge, LinearTaskVector):
        original: Any = kind.fit

        def fit(self: Any, lm: LM, train: Any, dev: Any, *, seed: int, original: Any = original) -> Any:
            trains = [train] if isinstance(train, Train) else train
            fits.append((f"{self.name} {','.join(one.spec.name for one in trains)}", seed))
            return original(self, lm, train, dev, seed=seed)

        monkeypatch.setattr(kind, "fit", fit)
    folder = go(grid, tmp_path / "run")
    for name in ("adaptive", "adaptive-ridge"):
        assert [item for item in fits if item[0].startswith(f"{name} ")] == [
            (f"{name} tiny_spell,tiny_upper", seed) for seed in (0, 1)
        ]
    assert len([item for item in fits if item[0] == "linear tiny_successor"]) == 2 * 2  # and its shuffled control
    errors = [folder.outcome(cell) for task, seed in grid.groups() for cell in grid.cells(task, seed)]
    assert all(outcome is not None and outcome.error is None for outcome in errors)
    unseen = {cell.method: cell for cell in grid.cells(grid.tasks[2], 0)}
    ends = ("-shuffled", "-other-task", "-task-mean", "-bias")
    assert {f"{name}{end}" for name in ("adaptive", "adaptive-ridge") for end in ends} <= unseen.keys()
    row = folder.outcome(unseen["adaptive"])
    assert row is not None
    seen = folder.kept(unseen["adaptive"])
    assert seen is not None
    assert seen.origin is not None
    assert grid.tasks[2].spec.data_hash not in seen.origin.kept_away
    assert {task.spec.data_hash for task in grid.seen} == set(seen.origin.kept_away)


def test_a_stopped_run_of_tasks_together_goes_on_without_a_new_fit(tmp_path: Path) -> None:
    grid = Grid.of(lm(), joint_suite(), TOGETHER[:1], [0])
    whole = go(grid, tmp_path / "whole").path
    path = part_of(whole, tmp_path / "part", [])
    (cell,) = (cell for cell in grid.cells(grid.tasks[2], 0) if cell.method == "adaptive")
    for file in (path / "cells").glob(f"{cell.key}.*"):
        file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptiveTaskVector, "fit", lambda *_, **__: pytest.fail("it is kept"))
        go(grid, path, resume=True)
    assert plain_cells(path) == plain_cells(whole)


@pytest.mark.parametrize(
    ("changed", "which"),
    [
        ({"unseen": ("tiny_lower",)}, set()),
        ({"tasks": ("tiny_spell", "tiny_vowel")}, {"adaptive", "adaptive-shuffled", "adaptive-bias", "random"}),
        ({"unseen": ()}, {"adaptive", "adaptive-shuffled", "adaptive-bias"}),
    ],
)
def test_a_key_changes_with_the_tasks_fitted_on_together(changed: Any, which: set[str]) -> None:
    suites = joint_suite(), joint_suite(**changed)
    before, after = (Grid.of(lm(), suite, TOGETHER[:1], [0]) for suite in suites)
    cells = [{cell.method: cell for cell in grid.cells(grid.tasks[0], 0)} for grid in (before, after)]
    moved = {name for name in cells[0] if cells[0][name].key != cells[1][name].key}
    assert which - {"random"} <= moved
    assert not moved & {"zero-shot", "few-shot", "mean-difference"}
    assert (cells[0]["adaptive"].fit == cells[1]["adaptive"].fit) == (not which)


def test_without_together_every_task_has_its_own_fit() -> None:
    grid = Grid.of(lm(), joint_suite(unseen=()), TOGETHER[:1], [0])
    fits = [cell.fit for task in grid.tasks for cell in grid.cells(task, 0) if cell.method == "adaptive"]
    keys = [cell.key for task in grid.tasks for cell in grid.cells(task, 0) if cell.method == "adaptive"]
    assert fits == keys
    assert len(set(fits)) == 2


# --- grids ------------------------------------------------------------------------------------------------------------


def test_what_is_written_down_is_read_back_equal(grid: Grid) -> None:
    plain = grid.to_dict()
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert json.loads(json.dumps(plain)) == plain
    assert plain["seeds"] == [0]
    assert list(plain["tasks"]) == ["spell", "vowel"]


@pytest.mark.parametrize("seeds", [[], [-1], [0, -1]])
def test_seeds_are_checked(suite: Path, seeds: list[int]) -> None:
    with pytest.raises(InputError, match="seeds of 0 or more, at least one"):
        Grid.of(lm(), load_suite(suite), [], seeds)


def test_a_seed_given_twice_is_run_once(suite: Path) -> None:
    assert Grid.of(lm(), one_task(suite), [], [1, 0, 1]).seeds == (1, 0)


def test_a_method_given_twice_is_refused(suite: Path) -> None:
    with pytest.raises(InputError, match="each method once"):
        Grid.of(lm(), load_suite(suite), [LINEAR, LinearTaskVector()], [0])


def test_a_suites_queries_reach_the_methods_that_take_them_and_give_way_to_a_setting(suite: Path) -> None:
    names, queries = ["linear", "function-vector", "learned", "hendel"], load_suite(suite).queries
    methods = bench_methods(names, {}, queries)
    made = {v.name: v.method for v in Grid.of(lm(), load_suite(suite), methods, [0]).variants}
    assert made["linear"] == made["linear-shuffled"] == LinearTaskVector(queries=8)
    assert made["function-vector"] == FunctionVector(prompts=8, shared=True, trials=5)
    assert made["learned"] == LearnedTaskVector(queries=64, steps=72)
    assert made["hendel"] == HendelTaskVector()
    assert made["mean-difference"] == MeanDifference(queries=8)
    set_ = {"linear": {"queries": "256"}, "mean-difference": {"queries": "7"}}  # 256 is linear's own default
    own = {method.name: method for method in bench_methods(names, set_, queries)}
    assert own["linear"] == LinearTaskVector(queries=256)
    assert own["mean-difference"] == MeanDifference(queries=7)
    assert {method.name: method for method in bench_methods(names, {}, None)}["linear"] == LinearTaskVector()


def test_the_methods_of_a_benchmark() -> None:
    asked = bench_methods(None, {})
    assert [method.name for method in asked] == ["hendel", "function-vector", "linear", "learned"]
    assert asked[1] == FunctionVector(shared=True, trials=5)
    assert asked[3] == LearnedTaskVector(queries=64, steps=72)
    set_ = bench_methods(
        ["learned", "random", "learned"], {"learned": {"queries": "5"}, "mean-difference": {"site": "resid[1]"}}
    )
    assert set_ == [LearnedTaskVector(queries=5, steps=72), MeanDifference(site="resid[1]")]
    with pytest.raises(InputError, match="--set for a method that runs; found 'linear'; add --method linear"):
        bench_methods(["learned"], {"linear": {"queries": "5"}})
    with pytest.raises(InputError, match="--set for a method that runs; found 'random'"):
        bench_methods(["learned"], {"random": {"queries": "5"}})
    with pytest.raises(UnknownName, match=r"found 'liner'; did you mean linear\? name one of: zero-shot, "):
        bench_methods(["liner"], {})
    with pytest.raises(InputError, match="'query'"):
        bench_methods(["learned"], {"learned": {"query": "5"}})


# --- the command ------------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `taskvec bench ARGUMENTS`: (exit code, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["taskvec", "bench", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr()
        return int(stopped.value.code or 0), out.out, out.err

    return call


def test_the_command_goes_on_with_what_python_began(
    run: Run, suite: Path, grid: Grid, whole: Path, tmp_path: Path
) -> None:
    path = part_of(whole, tmp_path / "run", grid.cells(grid.tasks[1], 0)[6:])
    with counted() as done:
        code, stdout, _ = run(str(suite), "--out", str(path), *ASKED, "--resume", "--json")
    assert (code, done) == (0, ["elicit-shuffled", "random"])
    assert plain_cells(path) == plain_cells(whole)
    result = json.loads(stdout)
    assert len(result["rows"]) == 2 * 9
    assert {timeless(row)["method"] for row in result["rows"]} >= {*CONTROLS, "few-shot-cached", "elicit-shuffled"}
    assert [Row.from_dict(row) for row in result["rows"]] == list(read_run(path).rows)
    assert len(result["verdicts"]) == 2
    assert result["run"] == str(path)
    assert all(Path(name).is_file() for name in result["files"])
    assert len(result["files"]) >= 4
    found = read_run(path)
    assert found.tasks == ["spell", "vowel"]
    assert found.hits("spell", "linear").shape == found.hits("vowel", "elicit").shape == (1, 4)
    assert len(found.examples) == 2 * 9 * 4
    assert pl.read_parquet(path / "results.parquet").equals(found.examples)


def test_the_command_prints_a_table_the_verdicts_and_what_failed(run: Run, suite: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    code, stdout, stderr = run(
        str(suite), "--out", str(path), "--model", "tiny", "--method", "calibration", "--seeds", "1"
    )
    assert code == 0
    lines = stdout.splitlines()
    assert lines[0].split() == ["method", "spell", "vowel", "mean"]
    assert [line.split()[0] for line in lines[1:6]] == [
        "zero-shot",
        "few-shot",
        "mean-difference",
        "random",
        "calibration",
    ]
    assert "failed" in lines[5]
    assert any(line.startswith("spell: mean-difference keeps") for line in lines)
    assert "failed: spell calibration seed 0: wanted a task with labels" in stderr
    assert f"wrote {path / 'tables.md'}" in stderr
    code, _, err = run(str(suite), "--out", str(path), "--model", "tiny", "--method", "calibration", "--seeds", "1")
    assert code == 2
    assert "pass --resume" in err


BAD_OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown suite": (("wrods",), "did you mean words?"),
    "unknown method": (("SUITE", "--method", "liner"), "did you mean linear?"),
    "unknown field": (("SUITE", "--method", "linear", "--set", "linear.rigde=1"), "'rigde'"),
    "a setting without a method": (("SUITE", "--method", "linear", "--set", "hendel.layer=1"), "hendel"),
    "no seeds": (("SUITE", "--seeds", "0"), "seeds"),
    "no jobs": (("SUITE", "--method", "linear", "--jobs", "0"), "jobs"),
    "unknown key": (("KEY",), "did you mean shots?"),
    "unknown task": (("TASK",), "did you mean past_tense?"),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_bad_options_are_one_line_and_exit_2_and_nothing_written(
    run: Run, suite: Path, tmp_path: Path, kind: str
) -> None:
    (source, *options), wanted = BAD_OPTIONS[kind]
    texts = {"KEY": "name: m\ntasks: [plural]\nshot: 3\n", "TASK": "name: m\ntasks: [past_tens]\n"}
    if source in texts:
        (tmp_path / "suite.yaml").write_text(texts[source])
    place = str(suite) if source == "SUITE" else str(tmp_path / "suite.yaml") if source in texts else source
    before = sorted(tmp_path.iterdir())
    code, stdout, err = run(place, "--model", "tiny", "--out", str(tmp_path / "out"), *options)
    assert (code, stdout) == (2, "")
    (line,) = (line for line in err.splitlines() if line.startswith("taskvec:"))
    assert wanted in line
    assert sorted(tmp_path.iterdir()) == before
