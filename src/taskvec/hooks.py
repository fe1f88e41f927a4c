"""capture() and inject(): the only code that touches a model. Hooks are registered in `_attached` and nowhere else.

Shapes: B rows, T tokens, w width of a site, n edited tokens.

Nothing here writes into an activation: an edited activation is a new tensor, and gradients flow through it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taskvec.errors import InputError, MissingSite, UnfiredEdit, VectorMismatch
from taskvec.lm import LM, Batch, Encoded
from taskvec.sites import Site
from taskvec.vector import Edit, TaskVector, VectorSource

Transform = Callable[[Tensor], Tensor]
Vectors = TaskVector | VectorSource | Sequence[TaskVector | None]


@dataclass(frozen=True, eq=False)
class Placed:
    """One edit and the tokens it acts on in the coming pass: rows and columns of the same length."""

    edit: Edit
    rows: tuple[int, ...]
    cols: tuple[int, ...]


class Pass:
    """What is known of the forward pass that is running: its shape, and which columns the unembedding sees."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        self.rows, self.cols = tokens.shape[0], tokens.shape[1]
        cache = inputs.get("past_key_values")
        self.past = int(cache.get_seq_length()) if cache is not None else 0
        mask = inputs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
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


# --- the one place where hooks are registered ------------------------------------------------------------------------


@contextmanager
def _attached(lm: LM, begin: Callable[[Pass], None], transforms: Mapping[Site, Transform]) -> Iterator[None]:
    """Call `begin` at the start of every forward pass, and give each site's activation (B, T, w) to its transform.

    A transform that returns the very tensor it was given leaves the model's own output object alone.
    """
    hooks = _Hooks(lm, begin)
    with ExitStack() as stack:
        handle = lm.inner.register_forward_pre_hook(hooks.start, with_kwargs=True)
        stack.callback(handle.remove)
        for site, transform in transforms.items():
            point = lm.point(site)
            if point.side == "in":
                handle = point.module.register_forward_pre_hook(hooks.before(transform), with_kwargs=True)
            else:
                handle = point.module.register_forward_hook(hooks.after(transform))
            stack.callback(handle.remove)
        yield


class _Hooks:
    """The hooks' bodies: one accessor for tensors and tuples, for positional and keyword inputs, for (B T, w)."""

    def __init__(self, lm: LM, begin: Callable[[Pass], None]) -> None:
        self.begin, self.rows, self.names = begin, 0, lm.arguments

    def start(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = Pass(dict(zip(self.names, args, strict=False)) | kwargs)
        self.begin(now)  # a vector source may run the model in there
        self.rows = now.rows

    def before(self, transform: Transform) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self.through(transform, args[0]), *args[1:]), kwargs
            name = next(name for name in ("hidden_states", "input", "x") if name in kwargs)
            return args, {**kwargs, name: self.through(transform, kwargs[name])}

        return hook

    def after(self, transform: Transform) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self.through(transform, output[0]), *output[1:])
            return self.through(transform, output)

        return hook

    def through(self, transform: Transform, h: Tensor) -> Tensor:
        if h.dim() == 3:
            return transform(h)
        flat = h.reshape(self.rows, -1, h.shape[-1])  # OPT's MLP works on (B T, w)
        changed = transform(flat)
        return h if changed is flat else changed.reshape(h.shape)


# --- capture ---------------------------------------------------------------------------------------------------------


class Captured:
    """The activations of the last forward pass, by site: `captured[site]` is (B, T, width)."""

    def __init__(self) -> None:
        self._seen: dict[Site, Tensor] = {}

    def __getitem__(self, site: Site | str) -> Float[Tensor, "B T w"]:
        key = Site.parse(site)
        if key not in self._seen:
            raise UnfiredEdit(f"activations of {key}", "no forward pass reached it", "run the model inside capture()")
        return self._seen[key]


@contextmanager
def capture(lm: LM, sites: Sequence[Site | str], *, columns: Int[Tensor, " k"] | None = None) -> Iterator[Captured]:
    """Read activations: `with capture(lm, ["resid[3]"]) as seen: lm.forward(batch); seen["resid[3]"]`.

    They are copies (Falcon adds into its MLP output in place) and keep their gradients. `columns` keeps these tokens
    only. At `lm_head_in` a model hands over only the tokens whose logits it was asked for; ask for all, or for those
    `columns`. Inside `inject`, a capture entered later sees the edited activations. Raises `MissingSite`.
    """
    wanted = [Site.parse(site) for site in sites]
    prove(lm)
    for site in wanted:
        _require(lm, site)
    seen, running = Captured(), list[Pass]()

    def reader(site: Site) -> Transform:
        def read(h: Tensor) -> Tensor:
            part = h[..., _slice(lm, site)]
            if columns is not None:
                part = part[:, _find(running[0].columns(site), columns, site).to(h.device)]
            seen._seen[site] = part.clone()
            return h

        return read

    def begin(now: Pass) -> None:
        running[:] = [now]

    with _attached(lm, begin, {site: reader(site) for site in wanted}):
        yield seen


def _find(held: Tensor, columns: Tensor, site: Site) -> Tensor:
    places = (held[None, :] == columns[:, None]).long()
    if not bool(places.any(dim=1).all()):
        raise InputError(
            f"{site} at tokens {columns.tolist()}", f"only {held.tolist()}", "ask for logits of those tokens"
        )
    return places.argmax(dim=1)


# --- inject ----------------------------------------------------------------------------------------------------------


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


@contextmanager
def inject(lm: LM, vectors: Vectors, *, strength: float = 1.0) -> Iterator[Injection]:
    """Apply a task vector to everything the model runs inside: `with inject(lm, vector): lm.generate(prompt)`.

    `vectors` is one vector for all rows, a vector source, or one vector (or None) per row of the batch. `strength`
    multiplies every edit's own. Prompt lengths and roles come from `lm.forward` and `lm.generate`; where the model's
    own methods are called, a first pass is taken for the prompt and its last real token for the prompt's last.

    Raises `VectorMismatch` for a vector of another model or width, `MissingSite`, and, on leaving, `UnfiredEdit` if an
    edit never reached a token. Edits of strength 0 count as fired and change nothing, bit for bit.
    """
    prove(lm)
    given: Sequence[TaskVector | None]
    given = vectors if isinstance(vectors, Sequence) else [vectors] if isinstance(vectors, TaskVector) else []
    source = vectors if isinstance(vectors, VectorSource) else None
    for vector in (*given, source):
        check_fits(lm, vector)
    given = _scaled(given, strength)
    edits = [edit for vector in given if vector is not None for edit in vector.edits]
    sites = source.sites if source is not None else tuple(edit.site for edit in edits)
    injection = Injection(edits)
    running = _Injecting(lm, given, source, strength, injection)
    running.one_for_all = isinstance(vectors, TaskVector)
    with running.attached(sites):
        yield injection
    if source is not None and not running.rows:
        raise UnfiredEdit("a forward pass that the vector source writes for", "none", "run the model inside inject()")
    injection.check()


@contextmanager
def inject_at(lm: LM, placed: Sequence[Placed]) -> Iterator[None]:
    """Apply edits at known rows and columns of the one forward pass that follows: the replay engine's way in.

    The caller has checked the vectors; an edit that does not fire raises `UnfiredEdit`, as in `inject`.
    """
    injection = Injection([p.edit for p in placed])
    plan = _Plan(lm, placed, injection)
    with _attached(lm, plan.begin, {site: plan.transform(site) for site in plan.sites}):
        yield
    injection.check()


def check_fits(lm: LM, vector: TaskVector | VectorSource | None) -> None:
    """Refuse a vector of another model (`VectorMismatch`), or with a site this one has not (`MissingSite`)."""
    if vector is None:
        return
    if vector.origin is not None and vector.origin.model.fingerprint != lm.fingerprint:
        made = vector.origin.model
        raise VectorMismatch(
            f"the model it was made for, {made.id} (revision {made.revision}, fingerprint {made.fingerprint[:12]})",
            f"{lm.id} (revision {lm.revision}, fingerprint {lm.fingerprint[:12]})",
            "load that model, or compile the task again for this one",
        )
    if not isinstance(vector, TaskVector):
        return
    for edit in vector.edits:
        _require(lm, edit.site)
        if edit.op.width != lm.width(edit.site):
            found = f"an op of width {edit.op.width}"
            raise VectorMismatch(f"width {lm.width(edit.site)} at {edit.site}", found, "use the model it was made for")


class _Plan:
    """Edits at given tokens, as one transform per site."""

    def __init__(self, lm: LM, placed: Sequence[Placed], injection: Injection) -> None:
        self.lm, self.injection = lm, injection
        self.now: Pass | None = None
        self.by_site: dict[Site, list[Placed]] = {}
        self.set(placed)

    def set(self, placed: Sequence[Placed]) -> None:
        self.by_site = {}
        for item in placed:
            self.by_site.setdefault(item.edit.site, []).append(item)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.by_site)

    def begin(self, now: Pass) -> None:
        self.now = now

    def transform(self, site: Site) -> Transform:
        part = _slice(self.lm, site)

        def change(h: Tensor) -> Tensor:
            placed = self.by_site.get(site)
            if not placed or self.now is None:
                return h
            columns = {int(c): i for i, c in enumerate(self.now.columns(site))}
            width = h.shape[-1]
            new = self._apply(h[..., part], placed, columns)
            if part == slice(0, width):
                return new
            return torch.cat([h[..., : part.start], new, h[..., part.stop :]], dim=-1)

        return change

    def _apply(self, h: Tensor, placed: Sequence[Placed], columns: Mapping[int, int]) -> Tensor:
        """Edits act in order; those that touch different tokens act together, so that a token is gathered once."""
        for together in _rounds(placed):
            rows, cols, values = list[int](), list[int](), list[Tensor]()
            for item in together:
                # each token once: at(-1, 4) may name one twice, and its gradient must not double
                tokens = dict.fromkeys(zip(item.rows, item.cols, strict=True))
                here = [(r, columns[c]) for r, c in tokens if c in columns]
                if not here:
                    continue
                self.injection.count(item.edit, len(here))
                if item.edit.strength == 0.0:
                    continue
                at = torch.tensor(here, device=h.device)
                values.append(item.edit.op(h[at[:, 0], at[:, 1]], item.edit.strength))
                rows += [r for r, _ in here]
                cols += [c for _, c in here]
            if values:
                index = (torch.tensor(rows, device=h.device), torch.tensor(cols, device=h.device))
                h = h.index_put(index, torch.cat(values))
        return h


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


class _Injecting:
    """Resolves `where` at the start of each pass: prompt or answer token, row by row."""

    def __init__(
        self,
        lm: LM,
        given: Sequence[TaskVector | None],
        source: VectorSource | None,
        strength: float,
        injection: Injection,
    ) -> None:
        self.lm, self.given, self.source, self.strength = lm, given, source, strength
        self.plan = _Plan(lm, (), injection)
        self.rows: Sequence[TaskVector | None] = ()
        self.one_for_all = self.writing = False
        self.lengths: list[int] = []
        self.roles: list[Mapping[str, tuple[int, ...]]] = []

    @contextmanager
    def attached(self, sites: Sequence[Site]) -> Iterator[None]:
        transforms = {site: self.plan.transform(site) for site in dict.fromkeys(sites)}
        with _attached(self.lm, self.begin, transforms):
            yield

    def begin(self, now: Pass) -> None:
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
            check_fits(self.lm, vector)
        scaled = _scaled(written, self.strength)
        for edit in (edit for vector in scaled if vector is not None for edit in vector.edits):
            self.plan.injection.count(edit, 0)  # from now on it must fire
        return scaled

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


def _scaled(vectors: Sequence[TaskVector | None], strength: float) -> list[TaskVector | None]:
    """The vectors at another strength; one that stands in several rows stays one."""
    if strength == 1.0:
        return list(vectors)
    scaled = {id(vector): vector.scaled(strength) for vector in vectors if vector is not None}
    return [None if vector is None else scaled[id(vector)] for vector in vectors]


def _slice(lm: LM, site: Site) -> slice:
    """The part of the whole site's width that a head is; everything for other sites."""
    width = lm.width(site)
    return slice((site.head or 0) * width, ((site.head or 0) + 1) * width)


# --- proof -----------------------------------------------------------------------------------------------------------


def prove(lm: LM) -> None:
    """Prove once per model that every site it names moves the logits, and that attn + mlp is what a block adds.

    One pass does it: a batch of one short prompt per site, where each row has noise at its own site. What fails is
    kept in `lm.proofs["sites"]` (site -> reason) and refused when used.
    """
    if "sites" in lm.proofs:
        return
    sites = lm.sites()
    batch = probe(lm, len(sites) + 1)
    seen: dict[Site, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def noisy(row: int, site: Site) -> Transform:
        def change(h: Tensor) -> Tensor:
            seen[site] = h[-1].detach().clone()
            noise = torch.randn(h.shape[1:], generator=generator).to(h)
            moved = h[row] + noise * h[row].float().norm() / noise.float().norm()
            return torch.cat([h[:row], moved[None].to(h.dtype), h[row + 1 :]])

        return change

    transforms = {site: noisy(row, site) for row, site in enumerate(sites)}
    with torch.no_grad(), _attached(lm, lambda _: None, transforms):
        logits = lm.forward(batch)[:, -1].float()
    scale = (logits[-1].max() - logits[-1].min()).clamp_min(1e-6)
    moved = (logits[:-1] - logits[-1]).abs().amax(-1) / scale
    reasons = {s: "changing it does not move the logits" for s, m in zip(sites, moved, strict=True) if not m > 1e-4}
    lm.proofs["sites"] = reasons | _not_additive(lm, seen)


def probe(lm: LM, rows: int, length: int = 3) -> Batch:
    """A batch of equal short prompts of arbitrary tokens."""
    embedding = lm.model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    return lm.batch([Encoded(tuple((7 * i + 5) % vocabulary for i in range(length)))] * rows)


def _not_additive(lm: LM, seen: Mapping[Site, Tensor]) -> dict[Site, str]:
    """The attn and mlp sites of blocks where resid[l] is not resid[l-1] + attn[l] + mlp[l]."""
    out: dict[Site, str] = {}
    tolerance = 1e-4 if lm.dtype in (torch.float32, torch.float64) else 0.05
    for layer in range(lm.n_layers):
        parts = Site("attn", layer), Site("mlp", layer)
        if any(part not in seen for part in parts):
            continue
        before = seen[Site("resid", layer - 1) if layer else Site("embed")].float()
        after = seen[Site("resid", layer)].float()
        device = after.device
        error = after - before.to(device) - seen[parts[0]].float().to(device) - seen[parts[1]].float().to(device)
        if error.norm() > tolerance * after.norm():
            out |= dict.fromkeys(parts, "it is not what the block adds to the residual stream in this family")
    return out


def _require(lm: LM, site: Site) -> None:
    lm.point(site)
    reason = lm.proofs.get("sites", {}).get(site.whole)
    if reason is not None:
        raise MissingSite(f"{site} of {lm.id} as its name says", reason, "use another site (resid[l] is always there)")
