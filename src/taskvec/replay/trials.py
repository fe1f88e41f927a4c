"""What is asked of the engine, and what it answers. Shapes: n trials, L labels, V vocabulary, w width of a site."""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from taskvec.lm import Encoded
from taskvec.sites import Site
from taskvec.vector import Edit, TaskVector


@dataclass(frozen=True, eq=False)
class Trial:
    """Prompt number `prompt` (of those the engine was given) under a vector, with a teacher-forced continuation."""

    prompt: int
    vector: TaskVector | None = None
    continuation: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ask:
    """What is wanted of each trial.

    `keep(i, logits)`: what to keep of trial i's logits (V,) at the last prompt token, a tensor of one shape for all
    trials; `labels`: the summed log-probability of each; `max_new`: a greedy answer of at most so many tokens, which
    ends at an end token or where `done(i, text)` holds; `states`: these sites at the last prompt token.
    """

    keep: Callable[[int, Tensor], Tensor] | None = None
    labels: tuple[tuple[int, ...], ...] = ()
    max_new: int = 0
    done: Callable[[int, str], bool] = field(default=lambda trial, text: False)
    states: tuple[Site, ...] = ()


@dataclass(frozen=True, eq=False)
class Answers:
    """One row per trial, in their order, float32 on the CPU. What was not asked for has width 0."""

    kept: Float[Tensor, "_ ..."]
    label_logprobs: Float[Tensor, "_ L"]
    tokens: list[list[int]]
    states: dict[Site, Float[Tensor, "_ _"]]


@dataclass(frozen=True)
class Budget:
    """How much one pass may hold: new tokens, and bytes of its mask and of its logits (each)."""

    tokens: int = 1024
    bytes: int = 256 * 2**20

    @classmethod
    def of(cls, width: int) -> "Budget":
        """For a model of this width: in narrow ones attention costs more than the rest of a pass, so passes are
        shorter."""
        return cls(tokens=min(cls.tokens, 8 * width))

    def rows(self, vocabulary: int) -> int:
        """How many rows of logits fit."""
        return max(1, self.bytes // (4 * vocabulary))

    def fits(self, new: int, past: int) -> bool:
        """May a pass hold `new` tokens behind `past` cached ones?"""
        return new <= self.tokens and 4 * new * (new + past) <= self.bytes


def first_edited(prompt: Encoded, vector: TaskVector | None) -> int:
    """The first token of the prompt that a vector edits: its last one where it edits none."""
    edits: tuple[Edit, ...] = vector.edits if vector is not None else ()
    tokens = [t for edit in edits for t in edit.where.tokens(prompt.prompt_length, prompt.roles)]
    return min([*tokens, prompt.prompt_length - 1])
