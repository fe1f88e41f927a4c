"""A task and its three splits. The splits are different types, so that a test item cannot reach `fit`."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from taskvec.errors import DataError, InputError
from taskvec.prompts import Example, PromptFormat

Loss = Callable[[Any, Any], Any]
"""(logits of the answer's tokens (t, V), the answer's tokens (t,)) -> a scalar, lower is better. Differentiable."""


def answer_nll(logits: Any, target: Any) -> Any:
    """Mean negative log-likelihood per answer token, in nats (Learned TV, arXiv 2509.24169, eq. 3)."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.float(), target)


@dataclass(frozen=True)
class TaskSpec:
    """What a task's splits share: its name, format, number of shots, labels (None: an open task), loss, data hash,
    number of test items, the distinct outputs that occur (they say what answers look like, not which input has
    which), and its category in reports."""

    name: str
    format: PromptFormat = field(default_factory=lambda: PromptFormat.named("qa"))
    shots: int = 10
    labels: tuple[str, ...] | None = None
    loss: Loss = answer_nll
    data_hash: str = ""
    outputs: tuple[str, ...] = ()
    n_test: int = 0
    category: str = ""


@dataclass(frozen=True)
class Split:
    """Some of a task's examples. Use the subclasses: they say what the examples may be used for."""

    spec: TaskSpec
    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.examples)


class Train(Split):
    """Examples to fit on, and to show as demonstrations."""

    def demonstrations(self, *, seed: int) -> tuple[Example, ...]:
        """`spec.shots` examples in random order; with labels, as many of each label as shots allow.

        Where shots is no multiple of the number of labels, some labels come once more than others.
        """
        pool = list(self.examples)
        random.Random(f"demonstrations {seed}").shuffle(pool)
        if self.spec.labels is None:
            return tuple(pool[: self.spec.shots])
        rounds: dict[str, int] = dict.fromkeys(self.spec.labels, 0)
        ranked = []
        for place, example in enumerate(pool):
            ranked.append((rounds[example.output], place, example))
            rounds[example.output] += 1
        chosen = sorted(sorted(ranked, key=lambda item: item[:2])[: self.spec.shots], key=lambda item: item[1])
        return tuple(example for _, _, example in chosen)

    def queries(self, demos: Sequence[Example], limit: int | None = None, *, seed: int) -> tuple[Example, ...]:
        """Up to `limit` examples (None: all) that are not among `demos`, in random order."""
        shown = set(demos)
        rest = [example for example in self.examples if example not in shown]
        random.Random(f"queries {seed}").shuffle(rest)
        return tuple(rest[:limit])


class Dev(Split):
    """Examples on which layers, steps and methods are chosen."""


class Test(Split):
    """Examples on which results are reported. Only `score` takes them."""

    __test__ = False  # not a test class, whatever pytest thinks of its name


@dataclass(frozen=True)
class Task:
    """Examples cut into train, dev and test. The cut depends on the data alone (its hash), never on a seed.

    test = min(n_test, 40 %), dev = min(100, 20 %), train = the rest; from 40 examples up with ten shots.
    """

    spec: TaskSpec
    train: Train
    dev: Dev
    test: Test

    @classmethod
    def from_examples(cls, spec: TaskSpec, examples: Sequence[Example], *, n_test: int = 100) -> "Task":
        """Check the examples and cut them. Raises `DataError` where they are too few or repeat an input."""
        outputs = spec.labels or tuple(sorted({example.output for example in examples}))
        tests, devs = min(n_test, int(0.4 * len(examples))), min(100, int(0.2 * len(examples)))
        spec = replace(spec, data_hash=_data_hash(examples, spec.labels), outputs=outputs, n_test=tests)
        _check(spec, examples)
        if n_test < 1:
            raise InputError("at least one test item", f"n_test = {n_test}", "raise --n-test")
        order = list(examples)
        random.Random(spec.data_hash).shuffle(order)
        train = order[tests + devs :]
        if len(train) <= spec.shots or not devs or not tests:
            raise DataError(
                f"enough examples for {spec.shots} shots, some left to fit on, and dev and test items",
                f"{len(order)} examples in {spec.name} ({len(train)} train, {devs} dev, {tests} test)",
                "add examples or lower --shots or --n-test",
            )
        splits = (
            Train(spec, tuple(train)),
            Dev(spec, tuple(order[tests : tests + devs])),
            Test(spec, tuple(order[:tests])),
        )
        return cls(spec, *splits)

    @classmethod
    def from_jsonl(cls, path: str | Path, **options: Any) -> "Task":
        """The task in a JSONL file or of a built-in name; `options` as in `tasks.load_task`."""
        from taskvec.tasks.read import load_task

        return load_task(path, **options)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.spec.name

    @property
    def examples(self) -> tuple[Example, ...]:
        """All examples: train, dev, test."""
        return self.train.examples + self.dev.examples + self.test.examples

    def with_format(self, format: PromptFormat) -> "Task":
        """The same task and splits under another prompt format."""
        spec = replace(self.spec, format=format)
        return Task(spec, replace(self.train, spec=spec), replace(self.dev, spec=spec), replace(self.test, spec=spec))


def _data_hash(examples: Sequence[Example], labels: tuple[str, ...] | None) -> str:
    rows = [[example.input, example.output] for example in examples]
    return hashlib.sha256(json.dumps([rows, labels], ensure_ascii=False).encode()).hexdigest()


def _check(spec: TaskSpec, examples: Sequence[Example]) -> None:
    if spec.shots < 1:
        raise InputError("at least one shot", f"shots = {spec.shots}", "raise --shots")
    seen: set[str] = set()
    for example in examples:
        if example.input in seen:
            raise DataError(f"each input once in {spec.name}", f"{example.input!r} twice", "remove one of the lines")
        seen.add(example.input)
        if spec.labels is not None and example.output not in spec.labels:
            wanted = f"an output of {spec.name} among its labels {', '.join(spec.labels)}"
            raise DataError(wanted, repr(example.output), "mend the line or the labels in the sidecar file")
