"""The grid: which cells there are, in which order they are run, and a hash of everything a cell depends on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from typing import Any

from taskvec import methods as registry
from taskvec.comparison import SHUFFLED, with_controls
from taskvec.errors import InputError
from taskvec.lm import LM
from taskvec.methods import Method
from taskvec.tasks import Task
from taskvec.tasks.suite import Suite

METHODS = ("hendel", "function-vector", "linear", "learned")
PRESET: dict[str, dict[str, str]] = {
    "function-vector": {"shared": "true", "trials": "10"},
    "learned": {"queries": "64"},
}
"""What a benchmark sets where nobody says otherwise: fits of about a minute, on work that methods share."""
UNLABELLED = {"linear": "queries", "mean-difference": "queries", "function-vector": "prompts"}
"""The field that a suite's `queries` sets: unlabelled queries, the same ones for all."""


@dataclass(frozen=True)
class Cell:
    """One method (or control) on one task with one seed. `key` is the hash of all it depends on."""

    task: str
    method: str
    seed: int
    key: str


@dataclass(frozen=True)
class Variant:
    """A row of the grid: a method; its shuffled-pairing control; or `random` (no method)."""

    name: str
    method: Method | None
    shuffled: bool = False


@dataclass(frozen=True)
class Grid:
    """Everything a run depends on. `model` holds the model's id, revision, fingerprint and dtype."""

    suite: Suite
    tasks: tuple[Task, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    model: dict[str, Any]

    @classmethod
    def of(cls, lm: LM, suite: Suite, methods: Sequence[Method], seeds: Sequence[int]) -> "Grid":
        """The grid of methods and controls on a suite's tasks. Raises `InputError` for no seeds or negative ones."""
        if not seeds or min(seeds) < 0:
            raise InputError("seeds of 0 or more, at least one", str(list(seeds)), "mend --seeds")
        model = {"id": lm.id, "revision": lm.revision, "fingerprint": lm.fingerprint, "dtype": str(lm.dtype)}
        model["tokenizer"] = lm.tokenizer_hash
        asked = with_controls([_with_queries(method, suite.queries) for method in methods])
        tasks = suite.load(lm.chat_format if suite.format == "chat" else None)
        return cls(suite, tuple(tasks), tuple(_variants(asked)), tuple(dict.fromkeys(seeds)), model)

    def groups(self) -> list[tuple[Task, int]]:
        """(task, seed) pairs: what shares prompts, and is run together."""
        return [(task, seed) for task in self.tasks for seed in self.seeds]

    def cells(self, task: Task, seed: int) -> list[Cell]:
        """A group's cells, in the order of the variants."""
        return [Cell(task.name, variant.name, seed, self._key(task, variant, seed)) for variant in self.variants]

    def to_dict(self) -> dict[str, Any]:
        """What is written down, and compared before a run goes on: plain JSON values."""
        return {
            "taskvec": version("taskvec"),
            "model": self.model,
            "suite": self.suite.model_dump(mode="json"),
            "tasks": {task.name: _data(task) for task in self.tasks},
            "methods": {variant.name: _settings(variant) for variant in self.variants},
            "seeds": list(self.seeds),
        }

    def _key(self, task: Task, variant: Variant, seed: int) -> str:
        depends: dict[str, Any] = {
            "taskvec": version("taskvec"),
            "model": self.model,
            "task": task.name,
            "data": _data(task),
        }
        depends |= {"seed": seed, "method": variant.name, "settings": _settings(variant)}
        if variant.name == "random":  # matched to whichever candidate dev chooses
            depends["others"] = {other.name: _settings(other) for other in self.variants if other.name != "random"}
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def _variants(methods: Sequence[Method]) -> list[Variant]:
    """Few-shot first: it is the reference of all others. Random last: it is matched to one of them."""
    ordered = sorted(methods, key=lambda method: method.name != "few-shot")
    out = list[Variant]()
    for method in ordered:
        out.append(Variant(method.name, method))
        if hasattr(method, "shuffled") or hasattr(method, "source"):
            out.append(Variant(method.name + SHUFFLED, method, shuffled=True))
    return [*out, Variant("random", None)]


def _with_queries(method: Method, queries: int | None) -> Method:
    """The method with the suite's number of unlabelled queries, where it has its default number."""
    name = UNLABELLED.get(method.name)
    default = {f.name: f.default for f in fields(method)} if name else {}  # type: ignore[arg-type]
    if queries is None or name is None or getattr(method, name) != default[name]:
        return method
    return replace(method, **{name: queries})  # type: ignore[type-var]


def _data(task: Task) -> dict[str, Any]:
    spec = task.spec
    return {"hash": spec.data_hash, "format": spec.format.hash, "shots": spec.shots, "n_test": spec.n_test}


def _settings(variant: Variant) -> dict[str, Any]:
    plain: dict[str, Any] = asdict(variant.method) if variant.method is not None else {}  # type: ignore[call-overload]
    settings: dict[str, Any] = json.loads(json.dumps(plain))  # tuples as lists
    return settings


def bench_methods(names: Sequence[str] | None, settings: Mapping[str, dict[str, str]]) -> list[Method]:
    """The methods asked for (None: `METHODS`) with the preset, and what `--set` says above it."""
    return registry.make_all(METHODS if names is None else names, settings, PRESET)
