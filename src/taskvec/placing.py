"""Where edits act: from `where` to the rows and columns of a pass, and from those to changed activations.

Shapes: B rows, T tokens, w width of a site, n edited tokens.

Nothing here touches a model: `hooks` asks for transforms and attaches them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taskvec.errors import InputError, UnfiredEdit
from taskvec.lm import LM, Encoded
from taskvec.sites import Site
from taskvec.vector import Edit, TaskVector, VectorSource

Transform = Callable[[Tensor], Tensor]
Vectors = TaskVector | VectorSource | Sequence[TaskVector | None]


class Pass:
    """What is known of the forward pass that is running: its shape, and which columns the unembedding sees."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        self.rows, self.cols = tokens.shape[0], tokens.shape[1]
        cache = inputs.get("past_key_values")
        self.past = int(cache.get_seq_length()) if cache is not None else 0
        mask = inputs.get("attention_mask")
        self.mask = (mask != 0).long() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        keep = inputs.get("logits_to_keep", 0)
        everything = torch.arange(self.cols)
        self.kept = keep.cpu() if isinstance(keep, Tensor) else everything[-keep:] if keep else everything

    def columns(self, site: Site) -> Int[Tensor, " k"]:
        """The columns of this pass that a site holds: at `lm_head_in` only those whose logits are wanted."""
        return self.kept if site.kind == "lm_head_in" else torch.arange(self.cols)

    def indices(self) -> Int[Tensor, "B T"]:
        """Each token's number in its row's sequence, padding left out (negative before its start)."""
        if self.mask is None:
            return torch.arange(self.past, self.past + self.cols).expand(self.rows, -1)
        return (self.mask.cumsum(-1) - 1).cpu()[:, -self.cols :]

    def real(self) -> Tensor:
        """Which tokens are no padding (B, T)."""
        everywhere = torch.ones(self.rows, self.cols, dtype=torch.bool)
        return everywhere if self.mask is None else self.mask[:, -self.cols :].bool().cpu()

    def lengths(self) -> list[int]:
        """How many real tokens each row has had by the end of this pass."""
        if self.mask is None:
            return [self.past + self.cols] * self.rows
        return [int(n) for n in self.mask.sum(-1)]


@dataclass(frozen=True, eq=False)
class Placed:
    """One edit and the tokens it acts on in the coming pass: rows and columns of the same length."""

    edit: Edit
    rows: tuple[int, ...]
    cols: tuple[int, ...]


class Injection:
    """What `inject` yields: `fired` counts the tokens each edit has changed so far."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self._edits = {id(edit): edit for edit in edits}
        self._counts = dict.fromkeys(self._edits, 0)

    @property
    def fired(self) -> dict[str, int]:
        """Tokens changed, by site and place of the edit."""
        out: dict[str, int] = {}
        for key, edit in self._edits.items():
            name = f"{edit.site} {edit.where}"
            out[name] = out.get(name, 0) + self._counts[key]
        return out

    def count(self, edit: Edit, tokens: int) -> None:
        """Note that an edit has changed so many tokens."""
        self._edits.setdefault(id(edit), edit)
        self._counts[id(edit)] = self._counts.get(id(edit), 0) + tokens

    def check(self) -> None:
        """Raise `UnfiredEdit` if one never did."""
        for key, count in self._counts.items():
            if count == 0:
                edit = self._edits[key]
                raise UnfiredEdit(
                    f"the edit {type(edit.op).__name__} at {edit.site}, {edit.where}, to reach a token",
                    "it never did",
                    "run the model inside inject(), and check that the prompts have such tokens",
                )


class Plan:
    """Edits at given tokens, as one transform per module: the heads of a layer share one."""

    def __init__(self, lm: LM, placed: Sequence[Placed], injection: Injection) -> None:
        self.lm, self.injection = lm, injection
        self.now: Pass | None = None
        self.by_site: dict[Site, list[Placed]] = {}
        self.set(placed)

    def set(self, placed: Sequence[Placed]) -> None:
        """Forget the placements there were, and take these."""
        self.by_site = {}
        for item in placed:
            self.by_site.setdefault(item.edit.site.whole, []).append(item)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The modules' sites, heads taken whole."""
        return tuple(self.by_site)

    def begin(self, now: Pass) -> None:
        """Note the pass that starts."""
        self.now = now

    def transform(self, site: Site) -> Transform:
        """The site's activation with all of its edits made."""

        def change(h: Tensor) -> Tensor:
            placed = self.by_site.get(site)
            if not placed or self.now is None:
                return h
            columns = {c: i for i, c in enumerate(self.now.columns(site).tolist())}
            return self._apply(h, placed, columns)

        return change

    def _apply(self, h: Tensor, placed: Sequence[Placed], columns: Mapping[int, int]) -> Tensor:
        """Edits act in order; those that touch different tokens act together, so that a token is gathered once."""
        for together in _rounds(placed):
            found: list[tuple[int, int]] = []
            values: list[Tensor] = []
            for item in together:
                # each token once: at(-1, 4) may name one twice, and its gradient must not double
                tokens = dict.fromkeys(zip(item.rows, item.cols, strict=True))
                here = [(r, columns[c]) for r, c in tokens if c in columns]
                self.injection.count(item.edit, len(here))
                if here and item.edit.strength != 0.0:
                    at = torch.tensor(here, device=h.device)
                    values.append(self._edited(h[at[:, 0], at[:, 1]], item.edit))
                    found += here
            if found:
                index = torch.tensor(found, device=h.device)
                h = h.index_put((index[:, 0], index[:, 1]), torch.cat(values))
        return h

    def _edited(self, tokens: Float[Tensor, "n w"], edit: Edit) -> Float[Tensor, "n w"]:
        """The tokens with the edit's part of their width changed: one head, or all of it."""
        if edit.site.head is None:
            return edit.op(tokens, edit.strength)
        part = part_of(self.lm, edit.site)
        changed = edit.op(tokens[:, part], edit.strength)
        return torch.cat([tokens[:, : part.start], changed, tokens[:, part.stop :]], dim=-1)


def _rounds(placed: Sequence[Placed]) -> Iterator[list[Placed]]:
    """The placements in order, cut where one touches a token that an earlier one of its group has touched."""
    group, touched = list[Placed](), set[tuple[int, int]]()
    for item in placed:
        tokens = set(zip(item.rows, item.cols, strict=True))
        if group and tokens & touched:
            yield group
            group, touched = [], set()
        group.append(item)
        touched |= tokens
    if group:
        yield group


class Injecting:
    """Resolves `where` at the start of each pass: prompt or answer token, row by row."""

    def __init__(
        self, lm: LM, vectors: Vectors, strength: float, fits: Callable[[LM, TaskVector | VectorSource | None], None]
    ) -> None:
        self.lm, self.strength, self.fits = lm, strength, fits
        self.one_for_all = isinstance(vectors, TaskVector)
        self.source = vectors if isinstance(vectors, VectorSource) else None
        given = vectors if isinstance(vectors, Sequence) else [vectors] if isinstance(vectors, TaskVector) else []
        for vector in (*given, self.source):
            fits(lm, vector)
        self.given = scaled(given, strength)
        self.edits = [edit for vector in self.given if vector is not None for edit in vector.edits]
        self.injection = Injection(self.edits)
        self.plan = Plan(lm, (), self.injection)
        self.rows: Sequence[TaskVector | None] = ()
        self.writing = False
        self.lengths: list[int] = []
        self.roles: list[Mapping[str, tuple[int, ...]]] = []

    def transforms(self) -> dict[Site, Transform]:
        """One transform for each module that may be edited."""
        sites = self.source.sites if self.source is not None else [edit.site for edit in self.edits]
        return {site: self.plan.transform(site) for site in dict.fromkeys(site.whole for site in sites)}

    def check(self) -> None:
        """Raise `UnfiredEdit` if an edit never reached a token, or a source never saw a prompt."""
        if self.source is not None and not self.rows:
            raise UnfiredEdit("a pass that the vector source writes for", "none", "run the model inside inject()")
        self.injection.check()

    def begin(self, now: Pass) -> None:
        """Find each row's vector and prompt if a new prompt starts, and place the edits for this pass."""
        if self.writing:  # a pass of the source's own: no edits
            return
        prompts = self.lm.running.prompts if self.lm.running is not None else None
        if now.past == 0 or not self.lengths:
            self._new_prompts(now, prompts)
        if len(self.rows) != now.rows:
            found = f"{len(self.rows)} vectors for {now.rows} rows"
            raise InputError("one vector (or None) per row of the batch", found, "pass as many as there are prompts")
        self.plan.begin(now)
        self.plan.set(self._place(now))

    def _new_prompts(self, now: Pass, prompts: tuple[Encoded, ...] | None) -> None:
        if prompts is not None and len(prompts) == now.rows:
            self.lengths, self.roles = [p.prompt_length for p in prompts], [p.roles for p in prompts]
        else:
            self.lengths, self.roles = now.lengths(), [{}] * now.rows
        if self.source is not None:
            self.rows = self._written(self.source, prompts)
        else:
            self.rows = list(self.given) * now.rows if self.one_for_all else self.given

    def _written(self, source: VectorSource, prompts: tuple[Encoded, ...] | None) -> list[TaskVector | None]:
        if prompts is None:
            raise InputError("the prompts, for a vector source", "a bare forward pass", "use lm.forward or lm.generate")
        self.plan.set(())  # the source may run this very model: without edits
        self.writing = True
        try:
            written = source.vectors(self.lm, prompts)
        finally:
            self.writing = False
        for vector in written:
            self.fits(self.lm, vector)
        rows = scaled(written, self.strength)
        for edit in (edit for vector in rows if vector is not None for edit in vector.edits):
            self.plan.injection.count(edit, 0)  # from now on it must fire
        return rows

    def _place(self, now: Pass) -> list[Placed]:
        indices, real = now.indices(), now.real()
        columns = [
            {int(i): c for c, (i, ok) in enumerate(zip(row, keep, strict=True)) if ok}
            for row, keep in zip(indices.tolist(), real.tolist(), strict=True)
        ]
        hits: dict[tuple[int, int], tuple[Edit, list[int], list[int]]] = {}
        for row, vector in enumerate(self.rows):
            for place, edit in enumerate(vector.edits if vector is not None else ()):
                _, rows, cols = hits.setdefault((place, id(edit)), (edit, [], []))
                found = [columns[row][t] for t in self._tokens(edit, row, columns[row]) if t in columns[row]]
                rows += [row] * len(found)
                cols += found
        in_order = sorted(hits.items(), key=lambda item: item[0][0])  # each row's edits in its own vector's order
        return [Placed(edit, tuple(rows), tuple(cols)) for _, (edit, rows, cols) in in_order]

    def _tokens(self, edit: Edit, row: int, columns: Mapping[int, int]) -> list[int]:
        length = self.lengths[row]
        after = [t for t in columns if t >= length] if edit.where.every_step else []
        return [*edit.where.tokens(length, self.roles[row]), *after]


def scaled(vectors: Sequence[TaskVector | None], strength: float) -> list[TaskVector | None]:
    """The vectors at another strength; one that stands in several rows stays one."""
    if strength == 1.0:
        return list(vectors)
    scaled = {id(vector): vector.scaled(strength) for vector in vectors if vector is not None}
    return [None if vector is None else scaled[id(vector)] for vector in vectors]


def part_of(lm: LM, site: Site) -> slice:
    """The part of the whole site's width that a head is; everything for other sites."""
    width = lm.width(site)
    return slice((site.head or 0) * width, ((site.head or 0) + 1) * width)
