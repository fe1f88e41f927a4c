"""The task vector: a tuple of edits and where they come from. And its two relatives: sources and adapted models."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from taskvec.sites import Site
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
class Adapted(Protocol):
    """What a rival that has no edits returns (LoRA, a calibration): the model behaves otherwise inside `applied`."""

    @property
    def origin(self) -> Origin | None:
        """Where it comes from, as for a vector."""
        ...

    def applied(self, lm: Any) -> AbstractContextManager[None]:
        """A context in which `lm` is adapted; outside it is as before."""
        ...
