"""Edits: what happens (op), where in the model (site), at which tokens (where)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from taskvec.errors import InputError
from taskvec.sites import Site
from taskvec.vector.ops import Op

WhereKind = Literal["last_prompt", "each_last", "all", "role", "at"]
_NAME = re.compile(r"(?P<kind>last_prompt|each_last|all)|role\((?P<role>\w+)\)|at\((?P<at>-?\d+(,-?\d+)*)\)")


@dataclass(frozen=True)
class Where:
    """At which tokens an edit acts. Padding, batching and the KV cache don't change the meaning.

    - `last_prompt`: the prompt's last token, when the prompt is read (prefill); its keys and values keep the edit;
    - `each_last`: that token and every token generated (or teacher-forced) after it;
    - `all`: every token of the prompt and every one after it;
    - `role(NAME)`: the prompt's tokens with that role;
    - `at(i,j,...)`: those tokens of the prompt, counted from 0, or from its end if negative.

    An edit that acts in decoding only cannot change the first generated token: its logits come from the prefill.

    >>> Where.parse("at(-2,-1)").tokens(7, {})
    (5, 6)
    """

    kind: WhereKind = "last_prompt"
    role: str = ""
    positions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        named = {"role": bool(self.role), "at": bool(self.positions)}
        if _NAME.fullmatch(str(self)) is None or any(given != (self.kind == kind) for kind, given in named.items()):
            raise InputError("a place that has a name", repr(self), "give a role to role only, positions to at only")

    @classmethod
    def parse(cls, text: "str | Where") -> "Where":
        """The place of that name. Raises `InputError` for anything else."""
        if isinstance(text, Where):
            return text
        match = _NAME.fullmatch(text.replace(" ", ""))
        if match is None:
            raise InputError("last_prompt, each_last, all, role(NAME) or at(i,...)", repr(text), "name one of those")
        if match["role"]:
            return cls("role", role=match["role"])
        if match["at"]:
            return cls("at", positions=tuple(int(i) for i in match["at"].split(",")))
        return cls(match["kind"])  # type: ignore[arg-type]

    @property
    def every_step(self) -> bool:
        """Does it act on the tokens after the prompt too?"""
        return self.kind in ("each_last", "all")

    def tokens(self, length: int, roles: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The prompt's token numbers it names, in a prompt of `length` tokens with these `roles`."""
        if self.kind == "all":
            return tuple(range(length))
        if self.kind == "role":
            return tuple(roles.get(self.role, ()))
        if self.kind == "at":
            return tuple(i % length for i in self.positions if -length <= i < length)
        return (length - 1,)

    def __str__(self) -> str:
        if self.kind == "role":
            return f"role({self.role})"
        return f"at({','.join(map(str, self.positions))})" if self.kind == "at" else self.kind


LAST_PROMPT = Where()


@dataclass(frozen=True, eq=False)
class Edit:
    """One op at one site, at some tokens, with a strength s: h + s (op(h) - h)."""

    site: Site
    op: Op
    where: Where = field(default_factory=Where)
    strength: float = 1.0
