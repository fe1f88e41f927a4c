"""The task vector: a tuple of edits and where they come from. And its two relatives: sources and adapted models."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from taskvec.errors import InputError
from taskvec.sites import Site
from taskvec.vector import arithmetic
from taskvec.vector.edits import Edit
from taskvec.vector.origin import Origin


@dataclass(frozen=True, eq=False)
class TaskVector:
    """An in-context task vector: edits in the order they act, and their origin (None: made by hand).

    Plain data: apply it with `with inject(lm, vector):`. Without edits it is its origin's bare prompt: zero-shot, or
    few-shot with the demonstrations named there. `source` is the folder it was loaded from.
    """

    edits: tuple[Edit, ...]
    origin: Origin | None = None
    source: str | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: `0.vector` is field `vector` of the first edit's op."""
        return {f"{i}.{name}": t for i, edit in enumerate(self.edits) for name, t in edit.op.tensors().items()}

    def scaled(self, strength: float) -> "TaskVector":
        """The same vector with every strength multiplied."""
        return replace(self, edits=tuple(replace(e, strength=e.strength * strength) for e in self.edits))

    def __add__(self, other: "TaskVector") -> "TaskVector":
        """The vector that does what both do together. Raises `InputError` where an op has no sum, `VectorMismatch`
        where they belong to different models, templates or prompts."""
        return TaskVector(
            arithmetic.total([self.edits, other.edits]), arithmetic.joint([self.origin, other.origin], "sum")
        )

    def __neg__(self) -> "TaskVector":
        """The vector whose sum with it is no change: only `add` and `affine` have one. After an `affine` edit it meets
        another state: `then` does not undo it."""
        arithmetic.total([self.edits])
        return self.scaled(-1.0)

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        """The sum with the other's negative."""
        return self + -other

    def __mul__(self, strength: float) -> "TaskVector":
        """The same as `scaled`."""
        return self.scaled(strength)

    __rmul__ = __mul__

    def then(self, *others: "TaskVector") -> "TaskVector":
        """This vector's edits, then the others': for any ops. At one site and token they act in this order."""
        every = (self, *others)
        edits = tuple(edit for vector in every for edit in vector.edits)
        return TaskVector(edits, arithmetic.joint([vector.origin for vector in every], "sequence"))

    @staticmethod
    def mean(vectors: "Sequence[TaskVector]") -> "TaskVector":
        """The mean of several vectors. Raises `InputError` where their ops have none."""
        if not vectors:
            raise InputError("at least one vector", "none", "pass some")
        edits = arithmetic.mean([vector.edits for vector in vectors])
        return TaskVector(edits, arithmetic.joint([vector.origin for vector in vectors], "mean"))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites it edits, each once."""
        return tuple(dict.fromkeys(edit.site for edit in self.edits))

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False, card: str | None = None) -> None:
        """Write the vector folder: tensors, configuration, card. All or nothing; an existing folder is an
        `InputError`."""
        from taskvec.vector.store import save

        save(self, Path(folder), overwrite=overwrite, card=card)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TaskVector":
        """Read a vector folder. Anything unknown, missing, extra or changed is a `VectorCorrupt` that names it."""
        from taskvec.vector.store import load

        return load(Path(folder))


@runtime_checkable
class VectorSource(Protocol):
    """Writes one task vector per prompt, for methods whose vector depends on the query."""

    @property
    def origin(self) -> Origin | None:
        """Where it comes from, as for a vector."""
        ...

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site its vectors may edit."""
        ...

    def vectors(self, lm: Any, prompts: Sequence[Any]) -> list[TaskVector | None]:
        """One vector (or None) for each encoded prompt (`taskvec.lm.Encoded`)."""
        ...


@runtime_checkable
class Predictor(Protocol):
    """What a rival that only chooses among the labels returns (a probe, a calibration): no edit, no generated text."""

    @property
    def origin(self) -> Origin | None:
        """Where it comes from, as for a vector."""
        ...

    def label_logprobs(self, lm: Any, prompts: Sequence[Any]) -> Tensor:
        """(n, K): the log-probability of each of the task's labels behind each encoded prompt."""
        ...


@runtime_checkable
class Adapted(Protocol):
    """What a rival that has no edits returns (LoRA, a calibration): the model behaves otherwise inside `applied`."""

    @property
    def origin(self) -> Origin | None:
        """Where it comes from, as for a vector."""
        ...

    def applied(self, lm: Any) -> AbstractContextManager[None]:
        """A context in which `lm` is adapted; outside it is as before."""
        ...
