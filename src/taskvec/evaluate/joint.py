"""Several tasks fitted together: their rows, what was read of them, and one origin."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from taskvec.errors import InputError
from taskvec.evaluate.fitting import Fitting, longest_answer
from taskvec.tasks import Dev, Split, Train
from taskvec.vector import Origin


@dataclass(frozen=True)
class Joint:
    """Train and dev splits of one task or many, in one order."""

    trains: tuple[Train, ...]
    devs: tuple[Dev, ...]

    @classmethod
    def of(cls, train: Train | Sequence[Train], dev: Dev | Sequence[Dev]) -> "Joint":
        """Raises `InputError` where there is no dev split for every train split, or a task comes twice."""
        trains = (train,) if isinstance(train, Train) else tuple(train)
        devs = (dev,) if isinstance(dev, Dev) else tuple(dev)
        if not trains or len(trains) != len(devs):
            raise InputError("a dev split for every train split", f"{len(trains)} and {len(devs)}", "pass both of each")
        names = [one.spec.name for one in trains]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError("each task once", f"{', '.join(twice)} twice", "leave one out")
        return cls(trains, devs)

    @property
    def hashes(self) -> list[str]:
        """What the tasks are: data and format of each."""
        return [f"{one.spec.data_hash} {one.spec.format.hash}" for one in self.trains]

    def rows(self, limit: int, *, seed: int) -> tuple[Split, ...]:
        """Up to `limit` training rows of each task, drawn by the seed."""
        return tuple(replace(one, examples=one.queries((), limit, seed=seed)) for one in self.trains)

    def looks(self, limit: int) -> tuple[Split, ...]:
        """The first dev items of each task."""
        return tuple(replace(one, examples=one.examples[:limit]) for one in self.devs)

    def count(self, fitting: Fitting, *splits: Sequence[Split]) -> None:
        """Gold labels read."""
        for split in (one for some in splits for one in some):
            fitting.read |= {f"{split.spec.data_hash} {example.input}" for example in split.examples}

    def origin(self, fitting: Fitting, found: Mapping[str, Any]) -> Origin:
        """The fit's origin: of one task its own; of many what they have in common, and no demonstrations."""
        specs = [one.spec for one in self.trains]
        if len(specs) == 1:
            return fitting.origin(found=found)
        also = {spec.data_hash: spec.n_test for spec in specs[1:]}
        also.pop(specs[0].data_hash, None)
        common: dict[str, Any] = {"task": " + ".join(spec.name for spec in specs), "also": also, "demos": ()}
        common["any_format"] = len({spec.format.hash for spec in specs}) > 1
        common["labels"] = specs[0].labels if all(spec.labels == specs[0].labels for spec in specs) else None
        common["max_new_tokens"] = max(longest_answer(fitting.lm, one) for one in self.trains)
        return fitting.origin(found=found).model_copy(update=common)
