"""Encoded prompts and batches of them.

Shapes: B rows, T tokens, d width of the embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad as pad_rows

from taskvec.errors import InputError
from taskvec.prompts import Prompt

Answer = tuple[Any, ...]
"""An answer's tokens; of a function learner its one number."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt as token ids, or as embeddings (a function learner's points), with the tokens of each role.

    `answer` trailing tokens are a teacher-forced answer: they belong to the sequence, not to the prompt, so that
    `last_prompt` is the token before them. `text` is what it was encoded from, where there was text;
    `query` is the query's input in it.
    """

    ids: tuple[int, ...] = ()
    embeds: Float[Tensor, "t d"] | None = None
    roles: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    answer: int = 0
    text: str = ""
    query: str = ""

    def __post_init__(self) -> None:
        if bool(self.ids) == (self.embeds is not None) or self.prompt_length < 1:
            raise InputError(
                "a prompt of at least one token, as ids or as embeddings", repr(self), "give one of the two"
            )

    def __len__(self) -> int:
        return len(self.ids) if self.embeds is None else self.embeds.shape[0]

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, without a teacher-forced answer."""
        return len(self) - self.answer

    def tokens(self, start: int, stop: int) -> "tuple[int, ...] | Tensor":
        """Tokens `start` to `stop` as they are: ids, or embeddings."""
        return self.ids[start:stop] if self.embeds is None else self.embeds[start:stop]

    def shared(self, other: "Encoded") -> int:
        """How many tokens at their start are equal."""
        if self.embeds is not None and other.embeds is not None:
            n = min(len(self), len(other))
            same = (self.embeds[:n] == other.embeds[:n]).all(dim=-1)
            return int(same.long().cumprod(0).sum())
        pairs = zip(self.ids, other.ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(other.ids)))

    def followed_by(self, ids: Sequence[int]) -> "Encoded":
        """The prompt with more teacher-forced answer tokens (of a prompt of ids)."""
        return replace(self, ids=self.ids + tuple(ids), answer=self.answer + len(ids))


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts padded to one length. `mask` is 1 at real tokens; position ids always come from it."""

    prompts: tuple[Encoded, ...]
    mask: Int[Tensor, "B T"]
    ids: Int[Tensor, "B T"] | None = None
    embeds: Float[Tensor, "B T d"] | None = None

    @classmethod
    def of(cls, prompts: Sequence[Encoded], *, pad: int = 0, side: Literal["left", "right"] = "right") -> "Batch":
        """Pad `prompts` on one side. All of them carry ids, or all embeddings."""
        width = max(len(p) for p in prompts)
        sides = [(width - len(p), 0) if side == "left" else (0, width - len(p)) for p in prompts]
        pairs = list(zip(prompts, sides, strict=True))
        mask = torch.tensor([[0] * before + [1] * len(p) + [0] * after for p, (before, after) in pairs])
        if any(p.embeds is not None for p in prompts):
            rows = [pad_rows(p.embeds, (0, 0, *around)) for p, around in pairs if p.embeds is not None]
            return cls(tuple(prompts), mask, embeds=torch.stack(rows))
        ids = [[pad] * before + list(p.ids) + [pad] * after for p, (before, after) in pairs]
        return cls(tuple(prompts), mask, ids=torch.tensor(ids))

    @property
    def last(self) -> Int[Tensor, " B"]:
        """The column of each row's last prompt token: counted from the mask, not by its sum."""
        first = self.mask.argmax(dim=1)
        return first + torch.tensor([p.prompt_length for p in self.prompts]) - 1


@dataclass(frozen=True)
class Running:
    """The prompts a model is running on right now, so that `inject` knows lengths and roles without being told."""

    prompts: tuple[Encoded, ...]


def token_roles(prompt: Prompt, offsets: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """The tokens of each role, from the characters each token covers. A separator is its last token."""
    roles: dict[str, list[int]] = {}
    for span in prompt.spans:
        tokens = [i for i, (a, b) in enumerate(offsets) if a < span.stop and b > span.start]
        roles.setdefault(span.role, []).extend(tokens[-1:] if span.role == "separator" else tokens)
    return {role: tuple(tokens) for role, tokens in roles.items()}
