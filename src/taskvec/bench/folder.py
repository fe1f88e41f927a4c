"""The run's folder. A cell is there when its JSON is: written last, in one step.

config.yaml            the grid; a run that goes on must have the same
env.json               versions, processor, threads
cells/KEY.json         rows, ledger, dev scores, or the error of a cell
cells/KEY.parquet      its per-example records
vectors/FIT/           what was fitted, where it can be saved
"""

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from taskvec import methods as registry
from taskvec.bench.grid import Cell, Grid
from taskvec.errors import InputError
from taskvec.files import replaced
from taskvec.results import Results, Row
from taskvec.vector import TaskVector, VectorSource

FORMAT_VERSION = 1
PACKAGES = ("taskvec", "torch", "transformers", "numpy", "scipy", "polars")


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its rows and examples, or an error; what it cost; how it did on dev, as a candidate
    does."""

    results: Results = field(default_factory=lambda: Results(()))
    error: str | None = None
    dev: tuple[float, float] | None = None
    ledger: Mapping[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """A run's folder on disk."""

    path: Path

    @classmethod
    def open(cls, path: Path, grid: Grid, *, resume: bool) -> "RunFolder":
        """A new folder, or with `resume` the one of an earlier run of the same grid and version."""
        wanted = {"format_version": FORMAT_VERSION, **grid.to_dict()}
        config = path / "config.yaml"
        if config.is_file():
            if not resume:
                raise InputError("a new folder for --out", f"{path} holds a run", "pass --resume or name another")
            _same(wanted, _read_yaml(config), path)
            _same_packages(path)
        elif path.exists() and (not path.is_dir() or any(not file.name.startswith(".new.") for file in path.iterdir())):
            raise InputError("a new folder for --out", f"{path} is something else", "name another one")
        path.mkdir(parents=True, exist_ok=True)
        write(config, yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True))
        if not (path / "env.json").is_file():
            write(path / "env.json", json.dumps(_environment(), indent=2) + "\n")
        (path / "cells").mkdir(exist_ok=True)
        (path / "vectors").mkdir(exist_ok=True)
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time writes here."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError("a folder no other run writes to", f"{self.path} is in use", "wait for it") from None
        try:
            yield
        finally:
            lock.release()

    def outcome(self, cell: Cell) -> Outcome | None:
        """What became of a cell; None where it was not run. Failed cells of an earlier run are run again."""
        path = self._cell(cell)
        if not path.is_file():
            return None
        plain = json.loads(path.read_text("utf-8"))
        rows = tuple(Row.from_dict(row) for row in plain["rows"])
        dev = tuple(plain["dev"]) if plain["dev"] is not None else None
        return Outcome(Results(rows), plain["error"], dev, plain["ledger"])

    def write(self, cell: Cell, outcome: Outcome) -> None:
        """Write a cell down: the examples first, then the JSON that says it is there."""
        if outcome.results.examples:
            self._write_examples(cell, outcome.results)
        plain = {
            "cell": asdict(cell),
            "rows": outcome.results.to_dict()["rows"],
            "error": outcome.error,
            "dev": outcome.dev,
            "ledger": dict(outcome.ledger),
        }
        write(self._cell(cell), json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")

    def _write_examples(self, cell: Cell, results: Results) -> None:
        with replaced(self.path / "cells" / f"{cell.key}.parquet") as new:
            results.write_examples(new)

    def forget(self, cell: Cell) -> None:
        """As if the cell had not been run."""
        self._cell(cell).unlink(missing_ok=True)

    def keep(self, cell: Cell, vector: TaskVector | VectorSource) -> None:
        """Save what was fitted, if it can be saved."""
        folder = self.path / "vectors" / cell.fit
        if hasattr(vector, "save_pretrained") and not folder.exists():
            try:
                vector.save_pretrained(folder)
            except InputError:
                if not folder.exists():  # else another process has just fitted the same tasks together
                    raise

    def kept(self, cell: Cell) -> TaskVector | VectorSource | None:
        """What was fitted and saved."""
        folder = self.path / "vectors" / cell.fit
        return replace(registry.load(folder), source=None) if folder.is_dir() else None  # type: ignore[type-var]

    def _cell(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.key}.json"


def write(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replaced(path) as new:
        new.write_text(text, "utf-8")


def _same(wanted: dict[str, Any], found: Any, path: Path) -> None:
    """Refuse a folder of another version or another grid, naming the first part that differs."""
    if not isinstance(found, dict):
        raise InputError(f"a run's config.yaml in {path}", type(found).__name__, "name another folder")
    for part in dict.fromkeys([*wanted, *found]):
        if wanted.get(part) != found.get(part):
            differs = f"another {part}: {_short(found.get(part))} there, {_short(wanted.get(part))} asked for"
            raise InputError(f"the same grid as in {path}", differs, "name another folder, or ask for the same")


def _same_packages(path: Path) -> None:
    """Refuse a folder whose cells were computed by other versions of what computes them."""
    if not (path / "env.json").is_file():
        return
    there, here = json.loads((path / "env.json").read_text("utf-8"))["packages"], _environment()["packages"]
    other = [f"{name} {there.get(name)}" for name in PACKAGES if there.get(name) != here[name]]
    if other:
        found = f"{', '.join(other)} there"
        raise InputError(f"the versions {path} was begun with", found, "install those, or name another folder")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + " ..."


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"a run's configuration in {path}", str(error), "name another folder") from None


def _environment() -> dict[str, Any]:
    import torch

    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    machine = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    return {"packages": found, **machine, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
