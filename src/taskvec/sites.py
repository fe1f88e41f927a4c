"""Where in a model something is read or changed. Plain names; nothing here knows a model."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from taskvec.errors import UnknownName

SiteKind = Literal["resid", "attn", "mlp", "heads", "embed", "lm_head_in"]
_LAYERED = ("resid", "attn", "mlp", "heads")
_NAME = re.compile(r"(?P<kind>[a-z_]+)(\[(?P<layer>[0-9]{1,9})(\s*,\s*(?P<head>[0-9]{1,9}))?\])?")


@dataclass(frozen=True)
class Site:
    """One place in a transformer. Layers and heads are counted from 0.

    - `resid[l]`: the residual stream after block l;
    - `attn[l]`, `mlp[l]`: what attention or MLP adds to it, after a post-norm where the family has one, so that
      `resid[l] = resid[l-1] + attn[l] + mlp[l]`;
    - `heads[l]`: the input of block l's attention output projection, all heads side by side; `heads[l,h]`: one head;
    - `embed`: the input of block 0; `lm_head_in`: the input of the unembedding, after the final norm.

    >>> str(Site.parse("heads[3,1]")), Site("resid", 7)
    ('heads[3,1]', Site('resid[7]'))
    """

    kind: SiteKind
    layer: int | None = None
    head: int | None = None

    def __post_init__(self) -> None:
        layered = self.kind in _LAYERED
        if self.kind not in get_args(SiteKind) or layered != (self.layer is not None):
            raise _unknown(self._text())
        if (self.head is not None and self.kind != "heads") or min(self.layer or 0, self.head or 0) < 0:
            raise _unknown(self._text())

    @classmethod
    def parse(cls, text: "str | Site") -> "Site":
        """The site of that name. Raises `UnknownName` for anything else."""
        if isinstance(text, Site):
            return text
        match = _NAME.fullmatch(text.strip())
        if match is None or match["kind"] not in get_args(SiteKind):
            raise _unknown(text)
        layer, head = match["layer"], match["head"]
        return cls(match["kind"], None if layer is None else int(layer), None if head is None else int(head))  # type: ignore[arg-type]

    @property
    def whole(self) -> "Site":
        """The site without its head: `heads[l]` for `heads[l,h]`, itself otherwise."""
        return Site(self.kind, self.layer)

    def __lt__(self, other: "Site") -> bool:
        key, than = ((s.kind, *(-1 if i is None else i for i in (s.layer, s.head))) for s in (self, other))
        return key < than

    def _text(self) -> str:
        index = ",".join(str(i) for i in (self.layer, self.head) if i is not None)
        return f"{self.kind}[{index}]" if index else self.kind

    def __str__(self) -> str:
        return self._text()

    def __repr__(self) -> str:
        return f"Site({self._text()!r})"


def _unknown(text: str) -> UnknownName:
    return UnknownName(
        "a site: resid[l], attn[l], mlp[l], heads[l], heads[l,h], embed or lm_head_in", repr(text), "name one of those"
    )
