"""The controls of vectors and sources: random directions of equal norm; vectors written for other queries, their mean,
what is written whatever the query. Shapes: n tokens, w width."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.lm import LM, Encoded
from taskvec.results import BIAS, OTHER_TASK, SHUFFLED, TASK_MEAN
from taskvec.sites import Site
from taskvec.tasks import Train
from taskvec.vector import Edit, Op, Origin, TaskVector, VectorSource
from taskvec.vector.ops import like


@dataclass(frozen=True, eq=False)
class Nudge(Op):
    """h + |op(h) - h| u with a unit vector u: as far as `op` moves h, in another direction."""

    direction: Float[Tensor, " w"]
    op: Op

    def apply(self, h: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        """h + |op(h) - h| u."""
        distance: Tensor = (self.op.apply(h) - h).norm(dim=-1, keepdim=True)
        return h + distance * like(self.direction, h)


@dataclass(frozen=True, eq=False)
class RandomLike:
    """A vector source: for each prompt and edit an isotropic direction of the norm the original edit has there.

    Defined for every op and every source. The directions depend on the seed, the prompt and the edit's place only.
    """

    original: TaskVector | VectorSource
    seed: int

    @property
    def origin(self) -> Origin | None:
        """The original's, under the method name `random`."""
        origin = self.original.origin
        return None if origin is None else origin.model_copy(update={"method": "random"})

    @property
    def sites(self) -> tuple[Site, ...]:
        """The original's."""
        return self.original.sites

    def vectors(self, lm: LM, prompts: Sequence[Encoded]) -> list[TaskVector | None]:
        """One random vector per prompt."""
        if isinstance(self.original, TaskVector):
            originals: Sequence[TaskVector | None] = [self.original] * len(prompts)
        else:
            originals = self.original.vectors(lm, prompts)
        return [self._nudged(vector, prompt) for vector, prompt in zip(originals, prompts, strict=True)]

    def _nudged(self, vector: TaskVector | None, prompt: Encoded) -> TaskVector | None:
        if vector is None:
            return None
        key = f"{self.seed} {prompt.ids} {prompt.embeds.tolist() if prompt.embeds is not None else ''}"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1)
        return TaskVector(tuple(_nudge(edit, generator) for edit in vector.edits), self.origin)


@dataclass(frozen=True, eq=False)
class _Rewritten:
    """A vector source whose vectors are another's, in other places: its sites, and its name with `suffix` behind."""

    suffix: ClassVar[str]
    original: VectorSource

    @property
    def origin(self) -> Origin | None:
        """The original's, under the control's name."""
        return _renamed(self.original.origin, self.suffix)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The original's."""
        return self.original.sites


@dataclass(frozen=True, eq=False)
class ShuffledPairing(_Rewritten):
    """A vector source whose vectors go to other prompts: does it matter which query a vector was written for?

    Among the prompts given together, each gets the vector of the next one in an order drawn from the seed; a prompt
    alone keeps its own.
    """

    suffix: ClassVar[str] = SHUFFLED
    seed: int

    def vectors(self, lm: LM, prompts: Sequence[Encoded]) -> list[TaskVector | None]:
        """The original's vectors, each for another prompt."""
        own = self.original.vectors(lm, prompts)
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(self.seed)).tolist()
        other = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        return [own[other[i]] for i in range(len(own))]


@dataclass(frozen=True, eq=False)
class OtherTask(_Rewritten):
    """A vector source whose vectors were written for prompts of another task: does it matter which task they are for?

    Prompt i gets the vector of the other task's prompt i, in its order, again from the start where it has fewer.
    """

    suffix: ClassVar[str] = OTHER_TASK
    others: Sequence[Encoded]

    def vectors(self, lm: LM, prompts: Sequence[Encoded]) -> list[TaskVector | None]:
        """The original's vectors for the other task's prompts."""
        return self.original.vectors(lm, [self.others[i % len(self.others)] for i in range(len(prompts))])


MEAN_OVER = 64


def source_controls(
    lm: LM, name: str, source: VectorSource, train: Train, other: Train | None = None, *, seed: int
) -> "dict[str, TaskVector | VectorSource]":
    """A source's controls on a task, by name: what a claim that the query matters has to beat. `-task-mean` and `-bias`
    where there is such a thing (a source that finds nothing for a query, as a library may, has no mean)."""
    found: dict[str, TaskVector | VectorSource] = {name + SHUFFLED: ShuffledPairing(source, seed)}
    if other is not None:
        found[name + OTHER_TASK] = OtherTask(source, bare_prompts(lm, other))
    written = source.vectors(lm, bare_prompts(lm, train))
    if all(vector is not None for vector in written):
        mean = TaskVector.mean([vector for vector in written if vector is not None])
        found[name + TASK_MEAN] = replace(mean, origin=_renamed(source.origin, TASK_MEAN))
    if hasattr(source, "bias_only"):
        found[name + BIAS] = source.bias_only()
    return found


def bare_prompts(lm: LM, train: Train) -> list[Encoded]:
    """The zero-shot prompts of a task's first training queries."""
    return [lm.encode(train.spec.format.prompt(example.input)) for example in train.examples[:MEAN_OVER]]


def _renamed(origin: Origin | None, suffix: str) -> Origin | None:
    return None if origin is None else origin.model_copy(update={"method": origin.method + suffix})


def random_like(original: TaskVector | VectorSource, *, seed: int) -> RandomLike:
    """The random control of a vector or a source."""
    return RandomLike(original, seed)


def _nudge(edit: Edit, generator: torch.Generator) -> Edit:
    direction = torch.randn(edit.op.width, generator=generator)
    return replace(edit, op=Nudge(direction / direction.norm(), edit.op))
