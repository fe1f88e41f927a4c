"""Prompts of many functions at once, and what methods are given of them.

A function is a task: its examples are what a vector is fitted on, and its own points what it is tested on. Where a
query stands (`Place`) is the test: behind examples of its own function, behind another function's, or alone.

Shapes: F functions, P prompts of each, k examples, d dimensions; L layers, J heads of a layer, w width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate.drawing import head_sites
from taskvec.lm import Encoded
from taskvec.regress.functions import Functions, Inputs, draw_inputs, generator_of
from taskvec.regress.learner import Learner
from taskvec.replay import Ask, Packed, Plain, Trial, replay
from taskvec.sites import Site

POOLED = 512


@dataclass(frozen=True)
class Place:
    """What stands before a query: so many examples, of the query's own function or, drawn for each prompt, of another
    one. `inputs` and the standard deviation `noise` of the examples' values are shifts from training."""

    examples: int
    own: bool = True
    inputs: Inputs = "standard"
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.examples < 0 or not self.noise >= 0:
            raise InputError("0 or more examples, noise of 0 or more", str(self), "mend it")


@dataclass(frozen=True, eq=False)
class Prompts:
    """F x P prompts, function by function, and the values of their queries. `x` and `y` are all points (F, P, k + 1, d)
    and what stands for their values; the last is the query, whose value is not shown."""

    learner: Learner
    x: Float[Tensor, "F P n d"]
    y: Float[Tensor, "F P n"]
    values: Float[Tensor, "F P"]
    encoded: tuple[Encoded, ...]

    @classmethod
    def draw(
        cls, learner: Learner, functions: Functions, per: int, place: Place, *, seed: int, what: str = ""
    ) -> "Prompts":
        """`per` prompts of each function. Standard queries depend on the seed and `what` alone, the same at every
        place; no query is drawn with examples of any length."""
        count, n, d = functions.count, place.examples + 1, learner.settings.d
        x = draw_inputs((count * per, n, d), generator_of(seed, f"examples {what} {n}"), place.inputs)
        if place.inputs == "standard":
            x[:, -1] = torch.randn(count * per, d, generator=generator_of(seed, f"queries {what}"))
        true = functions(x.reshape(count, per * n, d)).reshape(count, per, n)
        generator = generator_of(seed, f"shown {what} {n}")
        if not place.own:
            others = learner.settings.family.draw(count * per, generator)
        shown = true if place.own else others(x).reshape(count, per, n)
        noisy = shown + place.noise * torch.randn(shown.shape, generator=generator)
        return cls.of(learner, x.reshape(count, per, n, d), noisy, true[..., -1])

    @classmethod
    def of(
        cls,
        learner: Learner,
        x: Float[Tensor, "F P n d"],
        y: Float[Tensor, "F P n"],
        values: Float[Tensor, "F P"],
    ) -> "Prompts":
        """Points and the values shown, in tokens."""
        return cls(learner, x, y, values, learner.all_points(x.flatten(0, 1), y.flatten(0, 1)[:, :-1]))

    @property
    def count(self) -> int:
        """F."""
        return self.x.shape[0]

    @property
    def per(self) -> int:
        """P."""
        return self.x.shape[1]

    @cached_property
    def engine(self) -> Packed | Plain:
        """The prompts in an engine, for vectors at their last token."""
        return replay(self.learner, self.encoded, keep=True)

    @cached_property
    def heads(self) -> Float[Tensor, "F P L J w"]:
        """What every head hands to its layer's output projection, at each query."""
        learner, sites = self.learner, head_sites(self.learner)
        found = states(learner, self.encoded, sites)
        rows = torch.stack([found[site] for site in sites], 1)
        return rows.reshape(self.count, self.per, len(sites), learner.n_heads, -1)

    def asked(self, other: "Prompts") -> "Prompts":
        """These examples, before the queries of other prompts of the same functions."""
        x = torch.cat([self.x[..., :-1, :], other.x[..., -1:, :]], -2)
        return Prompts.of(self.learner, x, self.y, other.values)

    def pooled(self) -> "Prompts":
        """Prompts of all functions by turns, at most `POOLED`, as if they were of one function."""
        parts = (part.transpose(0, 1).flatten(0, 1) for part in (self.x, self.y, self.values))
        x, y, values = (part[None, :POOLED] for part in parts)
        order = [f * self.per + turn for turn in range(self.per) for f in range(self.count)][:POOLED]
        return Prompts(self.learner, x, y, values, tuple(self.encoded[i] for i in order))

    def permuted(self, *, seed: int) -> "Prompts":
        """The same points with each other's values: in each prompt the examples' are turned around by a drawn number of
        places, and so are the queries' among a function's prompts. No value stays where it was."""
        generator = generator_of(seed, "permuted")
        y = torch.cat([_turned(self.y[..., :-1], generator), self.y[..., -1:]], -1)
        return Prompts.of(self.learner, self.x, y, _turned(self.values, generator))


@dataclass(frozen=True, eq=False)
class Support:
    """What methods may see of some functions: `clean` prompts of the trained length; `placed` ones, whose queries stand
    as they will in the test; and `best`, the placed queries behind the trained number of own examples."""

    clean: Prompts
    placed: Prompts
    best: Prompts

    @classmethod
    def draw(
        cls, learner: Learner, functions: Functions, place: Place, *, clean: int, placed: int, seed: int
    ) -> "Support":
        """`clean` and `placed` prompts of each function."""
        trained = Place(learner.settings.points - 1)
        whole = Prompts.draw(learner, functions, clean, trained, seed=seed, what="clean")
        stands = Prompts.draw(learner, functions, placed, place, seed=seed, what="placed")
        shown = Prompts.draw(learner, functions, placed, trained, seed=seed, what="best")
        return cls(whole, stands, shown.asked(stands))

    def pooled(self) -> "Support":
        """All functions as one."""
        return Support(self.clean.pooled(), self.placed.pooled(), self.best.pooled())

    def permuted(self, *, seed: int) -> "Support":
        """Values belong to other points: what is left of a function is their distribution."""
        clean, placed, best = (part.permuted(seed=seed) for part in (self.clean, self.placed, self.best))
        return Support(clean, placed, best)


def whole(learner: Learner, prompts: Sequence[Encoded]) -> Plain:
    """An engine for prompts that are run once: of equal lengths, with no token in common, by tiny models, they are
    fastest as rows of a batch."""
    return Plain(learner, prompts, rows=64)


def states(learner: Learner, prompts: Sequence[Encoded], sites: Sequence[Site]) -> dict[Site, Float[Tensor, "n w"]]:
    """The states at the last token of each prompt."""
    trials = [Trial(i) for i in range(len(prompts))]
    return whole(learner, prompts).answer(trials, Ask(states=tuple(sites))).states


def shifted(count: int, by: int) -> list[int]:
    """Function i + by in place i, around the end."""
    return [(i + by) % count for i in range(count)]


def _turned(values: Float[Tensor, "... n"], generator: torch.Generator) -> Float[Tensor, "... n"]:
    """Each row turned around by 1 to n - 1 places (as it is where it has fewer than two)."""
    n = values.shape[-1]
    if n < 2:
        return values
    by = torch.randint(1, n, (*values.shape[:-1], 1), generator=generator)
    return values.gather(-1, (torch.arange(n) + by) % n)


def owners(prompts: Prompts) -> list[int]:
    """The function of each encoded prompt."""
    return [f for f in range(prompts.count) for _ in range(prompts.per)]
