"""The packed pass: segments of many sequences side by side in one sequence of batch 1, as a tree over a shared cache.

Shapes: T new tokens, K cached and new tokens, S segments, V vocabulary, w width of a site.

Each token sees its own segment up to itself and all of its ancestors, nothing else; its position id is its depth. So a
pass over the tree gives each leaf the logits it would have at the end of its own whole prompt: an identity, tested
against the plain forward on every architecture. Nothing is padded and nothing is computed twice.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taskvec.errors import PromptTooLong
from taskvec.hooks import Captured, capture, inject_at
from taskvec.lm import LM
from taskvec.placing import Placed
from taskvec.sites import Site
from taskvec.vector import Edit

ROOT = -1


@dataclass(frozen=True, eq=False)
class Segment:
    """Some tokens behind a parent segment (`ROOT`: the start of a sequence), with the edits at its tokens.

    `edits` pairs an edit with the offsets in this segment it acts at. `keep` is how many of its last tokens' logits are
    wanted.
    """

    parent: int
    tokens: "tuple[int, ...] | Tensor"
    edits: tuple[tuple[Edit, tuple[int, ...]], ...] = ()
    keep: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Grown:
    """What one pass over new segments gave: the tree with them, their numbers, their kept logits, and captured
    states."""

    tree: "Tree"
    nodes: tuple[int, ...]
    logits: tuple[Float[Tensor, "_ V"], ...]
    states: Captured | None


@dataclass(frozen=True, eq=False)
class Tree:
    """Segments with their keys and values. Immutable: growing it gives a new tree and leaves this one as it was.

    `owner[k]` is the segment of cached token k, `position[k]` its position id; `sees[a, b]` says whether segment a sees
    segment b (an ancestor, or itself); `ends[a]` is the position after segment a's last token.
    """

    lm: LM
    cache: Any = None
    owner: Int[Tensor, " K"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    position: Int[Tensor, " K"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    sees: Bool[Tensor, "S S"] = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    ends: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.owner)

    def grow(self, segments: Sequence[Segment], *, states: Sequence[Site] = ()) -> Grown:
        """One forward pass over new segments. A parent may be an old segment or an earlier new one.

        `states` are captured at each segment's last token, in order: (1, S_new, w).
        Under gradients the new tree's cache holds the graph: use it for that step only. This tree stays clean.
        """
        tree = self._with(segments)
        stops = torch.tensor([len(segment) for segment in segments]).cumsum(0)
        wanted = [max(segment.keep, 1 if states else 0) for segment in segments]
        columns = [c for stop, n in zip(stops.tolist(), wanted, strict=True) for c in range(stop - n, stop)]
        inputs = tree._inputs(segments, len(self), columns or [int(stops[-1]) - 1])
        with inject_at(self.lm, _placed(segments, stops.tolist())), ExitStack() as stack:
            seen = stack.enter_context(capture(self.lm, states, columns=stops - 1)) if states else None
            out = self.lm.call(**inputs)
        # split, not indexing: the gradient of each indexed part would be a whole matrix of logits
        parts = out.logits[0].split(wanted) if columns else [out.logits[0, :0]] * len(segments)
        logits = tuple(part[len(part) - segment.keep :] for part, segment in zip(parts, segments, strict=True))
        first = len(self.ends)
        return Grown(tree, tuple(range(first, first + len(segments))), logits, seen)

    @torch.no_grad()
    def joined(self, grown: "Sequence[Tree]") -> "Tree":
        """One tree with all that `grown` grew from this one, each by itself: their new segments keep their order."""
        if len(grown) <= 1:
            return grown[0] if grown else self
        past, old = len(self), len(self.ends)
        sees = torch.block_diag(self.sees, *(tree.sees[old:, old:] for tree in grown)).bool()  # type: ignore[no-untyped-call]
        sees[old:, :old] = torch.cat([tree.sees[old:, :old] for tree in grown])
        owner, position, ends = [self.owner], [self.position], self.ends
        for tree in grown:
            owner.append(tree.owner[past:] + len(ends) - old)
            position.append(tree.position[past:])
            ends += tree.ends[old:]
        cache = _joined([tree.cache for tree in grown], past)
        return Tree(self.lm, cache, torch.cat(owner), torch.cat(position), sees, ends)

    def _with(self, segments: Sequence[Segment]) -> "Tree":
        """The tree with the segments' bookkeeping, and a cache of its own that shares this one's tensors."""
        old, new = len(self.ends), len(segments)
        sees = torch.zeros(old + new, old + new, dtype=torch.bool)
        sees[:old, :old] = self.sees
        ends, owner, position = list(self.ends), [self.owner], [self.position]
        for i, segment in enumerate(segments, old):
            start = 0
            if segment.parent != ROOT:
                sees[i] |= sees[segment.parent]
                start = ends[segment.parent]
            sees[i, i] = True
            ends.append(start + len(segment))
            if self.lm.max_length is not None and ends[-1] > self.lm.max_length:
                found = f"{ends[-1]} with its answer"
                raise PromptTooLong(f"at most {self.lm.max_length} tokens", found, "use fewer shots or shorter inputs")
            owner.append(torch.full((len(segment),), i))
            position.append(torch.arange(start, start + len(segment)))
        return Tree(self.lm, _fork(self.cache), torch.cat(owner), torch.cat(position), sees, tuple(ends))

    def _inputs(self, segments: Sequence[Segment], past: int, columns: list[int]) -> dict[str, Any]:
        device, inputs = self.lm.device, dict[str, Any]()
        if isinstance(segments[0].tokens, Tensor):
            rows = torch.cat([torch.as_tensor(segment.tokens) for segment in segments])
            inputs["inputs_embeds"] = rows[None].to(device, self.lm.dtype)
        else:
            inputs["input_ids"] = torch.tensor([[i for segment in segments for i in segment.tokens]], device=device)
        return inputs | {
            "attention_mask": self._masks(past),
            "position_ids": self.position[None, past:].to(device),
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": torch.tensor(columns, device=device),
        }

    def _masks(self, past: int) -> Any:
        """The additive mask (1, 1, T, K); for models that mix layer types, one for each type."""
        new = self.owner[past:]
        slots = torch.arange(len(self))
        seen = self.sees[new][:, self.owner] & (slots[None, :] <= slots[past:, None])
        windows = self._windows
        if len(windows) == 1:
            return self._additive(seen, past, next(iter(windows.values())))
        return {kind: self._additive(seen, past, window) for kind, window in windows.items()}

    def _additive(self, seen: Tensor, past: int, window: int | None) -> Tensor:
        if window is not None:
            seen = seen & (self.position[past:, None] - self.position[None, :] < window)
        dtype = self.lm.dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        return mask[None, None].to(self.lm.device)

    @cached_property
    def _windows(self) -> dict[str, int | None]:
        """The attention window of each layer type: None where a layer sees everything."""
        config = self.lm.config
        window = getattr(config, "sliding_window", None)
        kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
        if not kinds:
            return {"": window}
        return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _fork(cache: Any) -> Any:
    """A cache that starts with the same tensors. Growing it never touches the first: layers rebind, they don't
    write."""
    from transformers import DynamicCache

    if cache is None:
        return DynamicCache()  # without a configuration: full-length layers, so that windows are the mask's business
    fork = copy(cache)
    fork.layers = [copy(layer) for layer in cache.layers]
    return fork


def _joined(caches: Sequence[Any], past: int) -> Any:
    """One cache: the first `past` tokens, which all have, and what each has behind them."""
    out = _fork(caches[0])
    for number, layer in enumerate(out.layers):
        for part in ("keys", "values"):
            own = [getattr(cache.layers[number], part)[..., past:, :] for cache in caches]
            setattr(layer, part, torch.cat([getattr(layer, part)[..., :past, :], *own], dim=-2))
    return out


def _placed(segments: Sequence[Segment], stops: Sequence[int]) -> list[Placed]:
    """The segments' edits at their columns of the pass: one and the same edit acts once, on all of its tokens."""
    joined: dict[tuple[int, int], tuple[Edit, list[int]]] = {}
    for segment, stop in zip(segments, stops, strict=True):
        for place, (edit, offsets) in enumerate(segment.edits):
            _, cols = joined.setdefault((place, id(edit)), (edit, []))
            cols += [stop - len(segment) + offset for offset in offsets]
    in_order = sorted(joined.items(), key=lambda item: item[0][0])  # each segment's edits in its own order
    return [Placed(edit, (0,) * len(cols), tuple(cols)) for _, (edit, cols) in in_order]
