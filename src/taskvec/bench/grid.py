"""The grid: which cells there are, in which order they are run, and a hash of everything a cell depends on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from taskvec import methods as registry
from taskvec.comparison import with_controls
from taskvec.errors import InputError
from taskvec.lm import LM
from taskvec.methods import Method
from taskvec.results import CONTROL_SUFFIXES, OTHER_TASK, SHUFFLED
from taskvec.tasks import Task
from taskvec.tasks.suite import Suite

METHODS = ("hendel", "function-vector", "linear", "learned")
PRESET: dict[str, dict[str, str]] = {
    "function-vector": {"shared": "true", "trials": "5"},
    "learned": {"queries": "64", "steps": "72"},
}
"""What a benchmark sets where nobody says otherwise: fits of about a minute, on work that methods share."""
UNLABELLED = {"linear": "queries", "mean-difference": "queries", "function-vector": "prompts"}
"""The field that a suite's `queries` sets: unlabelled queries, the same ones for all."""


@dataclass(frozen=True)
class Cell:
    """One method (or control) on one task with one seed. `key` is the hash of all it depends on, `fit` that of all its
    fit depends on: one fit on tasks together serves many cells."""

    task: str
    method: str
    seed: int
    key: str
    fit: str


@dataclass(frozen=True)
class Variant:
    """A row of the grid: a method; one of its controls (by the end of its name); or `random` (no method)."""

    name: str
    method: Method | None
    control: str = ""

    @property
    def joint(self) -> bool:
        """Can it be fitted on many tasks together?"""
        return bool(getattr(self.method, "joint", False)) and not self.control


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
        asked = with_controls(methods)
        tasks = suite.load(lm.chat_format if suite.format == "chat" else None)
        return cls(suite, tuple(tasks), tuple(_variants(asked, suite)), tuple(dict.fromkeys(seeds)), model)

    @property
    def seen(self) -> tuple[Task, ...]:
        """The tasks that may be fitted on."""
        return self.tasks[: len(self.suite.tasks)]

    def groups(self) -> list[tuple[Task, int]]:
        """(task, seed) pairs: what shares prompts, and is run together."""
        return [(task, seed) for task in self.tasks for seed in self.seeds]

    def cells(self, task: Task, seed: int) -> list[Cell]:
        """A group's cells, in the order of the variants."""
        return [
            Cell(task.name, v.name, seed, self._key(task, v, seed), self._fit(task, v, seed)) for v in self.variants
        ]

    def other(self, task: Task) -> Task | None:
        """The next of the tasks fitted on: whose queries' vectors are a control."""
        others = [one for one in self.seen if one.name != task.name]
        place = next((i for i, one in enumerate(self.seen) if one.name == task.name), 0)
        return others[place % len(others)] if others else None

    def to_dict(self) -> dict[str, Any]:
        """What is written down, and compared before a run goes on: plain JSON values."""
        return {
            "taskvec": version("taskvec"),
            "model": self.model,
            "suite": self.suite.model_dump(mode="json"),
            "tasks": {task.name: _data(task) | self._group(task) for task in self.tasks},
            "methods": {variant.name: _settings(variant) for variant in self.variants},
            "seeds": list(self.seeds),
        }

    def _group(self, task: Task) -> dict[str, Any]:
        """What the report puts it together with."""
        unseen = {"unseen": task not in self.seen} if self.suite.unseen else {}
        return {"category": task.spec.category, **unseen}

    def _key(self, task: Task, variant: Variant, seed: int) -> str:
        depends = self._depends(variant, seed) | {"task": task.name, "data": _data(task)}
        if self.suite.joint and variant.method is not None and getattr(variant.method, "joint", False):
            depends["together"] = [_data(one) for one in self.seen]
        if variant.name == "random":  # matched to whichever candidate dev chooses
            depends["others"] = {other.name: _settings(other) for other in self.variants if other.name != "random"}
        return _hash(depends)

    def _fit(self, task: Task, variant: Variant, seed: int) -> str:
        if not (self.suite.joint and variant.joint):
            return self._key(task, variant, seed)
        return _hash(self._depends(variant, seed) | {"together": [_data(one) for one in self.seen]})

    def _depends(self, variant: Variant, seed: int) -> dict[str, Any]:
        settings = _settings(variant)
        made = {"taskvec": version("taskvec"), "model": self.model}
        return made | {"seed": seed, "method": variant.name, "settings": settings}


def _hash(depends: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def _variants(methods: Sequence[Method], suite: Suite) -> list[Variant]:
    """Few-shot first: it is the reference of all others. Random last: it is matched to one of them."""
    ordered = sorted(methods, key=lambda method: method.name != "few-shot")
    out = list[Variant]()
    for method in ordered:
        out.append(Variant(method.name, method))
        controls = [SHUFFLED] if hasattr(method, "shuffled") or hasattr(method, "source") else []
        if getattr(method, "joint", False) and hasattr(method, "source"):
            controls = list(CONTROL_SUFFIXES)
        out += [Variant(method.name + control, method, control) for control in controls if _possible(control, suite)]
    return [*out, Variant("random", None)]


def _possible(control: str, suite: Suite) -> bool:
    return control != OTHER_TASK or len(suite.tasks) > 1


def _data(task: Task) -> dict[str, Any]:
    spec = task.spec
    return {"hash": spec.data_hash, "format": spec.format.hash, "shots": spec.shots, "n_test": spec.n_test}


def _settings(variant: Variant) -> dict[str, Any]:
    plain: dict[str, Any] = asdict(variant.method) if variant.method is not None else {}  # type: ignore[call-overload]
    settings: dict[str, Any] = json.loads(json.dumps(plain))  # tuples as lists
    return settings


def bench_methods(
    names: Sequence[str] | None, settings: Mapping[str, dict[str, str]], queries: int | None = None
) -> list[Method]:
    """The methods asked for (None: `METHODS`) and mean-difference, with the preset and the suite's `queries`, and what
    `--set` says above both."""
    preset = {name: dict(fields) for name, fields in PRESET.items()}
    for name, field in UNLABELLED.items() if queries is not None else ():
        preset.setdefault(name, {})[field] = str(queries)
    asked = [*(METHODS if names is None else names), *(["mean-difference"] if queries is not None else [])]
    return registry.make_all(asked, settings, preset)
