"""capture() and inject(): the only code that touches a model. Hooks are registered in `_attached` and nowhere else.

Shapes: B rows, T tokens, w width of a site, n edited tokens.

Nothing here writes into an activation: an edited activation is a new tensor, and gradients flow through it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taskvec.errors import InputError, MissingSite, UnfiredEdit, VectorMismatch
from taskvec.lm import LM, Batch, Encoded
from taskvec.placing import Injecting, Injection, Pass, Placed, Plan, Transform, Vectors, part_of
from taskvec.sites import Site
from taskvec.vector import Adapted, Predictor, TaskVector, VectorSource

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
        require(lm, site)
    seen, running = Captured(), list[Pass]()

    def reader(site: Site) -> Transform:
        def read(h: Tensor) -> Tensor:
            part = h[..., part_of(lm, site)]
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
    running = Injecting(lm, vectors, strength, check_fits)
    with _attached(lm, running.begin, running.transforms()):
        yield running.injection
    running.check()


@contextmanager
def inject_at(lm: LM, placed: Sequence[Placed]) -> Iterator[None]:
    """Apply edits at known rows and columns of the one forward pass that follows: the replay engine's way in.

    The caller has checked the vectors; an edit that does not fire raises `UnfiredEdit`, as in `inject`.
    """
    injection = Injection([p.edit for p in placed])
    plan = Plan(lm, placed, injection)
    with _attached(lm, plan.begin, {site: plan.transform(site) for site in plan.sites}):
        yield
    injection.check()


@contextmanager
def stagger(lm: LM, joins: Sequence[int], sources: Sequence[int]) -> Iterator[None]:
    """Let token t of the coming pass (batch 1) skip the blocks below `joins[t]`, which never decreases.

    It enters with the state that token `sources[t]` has there, an earlier one that joined before. The pass' cache is of
    no use afterwards: skipped blocks have no keys and values of the tokens that skipped them.
    """
    counts = [sum(1 for join in joins if join <= layer) for layer in range(lm.n_layers)]
    total = len(joins)

    def enter(layer: int) -> Callable[..., Any]:
        here, before = counts[layer], counts[layer - 1] if layer else counts[0]

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            h = (args[0] if args else kwargs["hidden_states"])[:, :before]
            if here > before:
                h = torch.cat([h, h[:, list(sources[before:here])]], 1)
            rest = [_first_tokens(value, here, total) for value in args[1:]]
            named = {k: _first_tokens(value, here, total) for k, value in kwargs.items() if k != "hidden_states"}
            return ((h, *rest), named) if args else ((), {**named, "hidden_states": h})

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(lm.blocks):
            stack.callback(block.module.register_forward_pre_hook(enter(layer), with_kwargs=True).remove)
        yield


def _first_tokens(value: Any, here: int, total: int) -> Any:
    """What a block is told about `total` tokens, for the first `here` of them: masks, positions, rotary embeddings."""
    if isinstance(value, tuple):
        return tuple(_first_tokens(part, here, total) for part in value)
    if not isinstance(value, Tensor):
        return value
    at = 2 if value.dim() == 4 else 1  # masks are (1, 1, T, K), the rest (1, T, ...)
    if value.dim() <= at or value.shape[at] != total:
        return value
    return value[:, :, :here, : value.shape[3] - total + here] if at == 2 else value[:, :here]


def check_fits(lm: LM, vector: TaskVector | VectorSource | Adapted | Predictor | None) -> None:
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
        require(lm, edit.site)
        if edit.op.width != lm.width(edit.site):
            found = f"an op of width {edit.op.width}"
            raise VectorMismatch(f"width {lm.width(edit.site)} at {edit.site}", found, "use the model it was made for")


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
    return lm.batch([Encoded(tuple((7 * i + 5) % lm.vocabulary for i in range(length)))] * rows)


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


def require(lm: LM, site: Site) -> None:
    """Raise `MissingSite` for a site that a model lacks or that failed its proof."""
    lm.point(site)
    reason = lm.proofs.get("sites", {}).get(site.whole)
    if reason is not None:
        raise MissingSite(f"{site} of {lm.id} as its name says", reason, "use another site (resid[l] is always there)")
