"""Sums, differences, multiples and means of task vectors, where their ops have them; and one after the other.

A vector of `add` and `affine` edits is a map h -> h + f(h), so it has sums and multiples: edits at the same site and
tokens melt into one. `replace`, `blend` and `add-keep-norm` set what h becomes: they have no sum (of `replace`, and of
`blend` with equal scalars, a mean). What has no sum can still act one after the other: `then`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from taskvec.errors import InputError, VectorMismatch
from taskvec.sites import Site
from taskvec.vector.edits import Edit
from taskvec.vector.ops import Add, Affine, Blend, Op, Replace
from taskvec.vector.origin import Origin

LINEAR = (Add, Affine)


def total(rows: Sequence[Sequence[Edit]]) -> tuple[Edit, ...]:
    """The sum of several vectors' `add` and `affine` edits: one for each site and place.

    Raises `InputError` for any other op, and where an `affine` edit meets others of its own vector at its site, or
    others' at different tokens: then the order in which they act counts, and there is no sum.
    """
    edits = [edit for row in rows for edit in row]
    for edit in edits:
        if not isinstance(edit.op, LINEAR):
            raise _no_sum(edit.op)
    _check_order(rows)
    groups: dict[tuple[Any, Any], list[Edit]] = {}
    for edit in edits:
        groups.setdefault((edit.site, edit.where), []).append(edit)
    return tuple(Edit(site, _melted(group), where) for (site, where), group in groups.items())


def _check_order(rows: Sequence[Sequence[Edit]]) -> None:
    """Raise `InputError` where an `affine` edit shares numbers with edits it cannot melt into: order would count."""
    for edit in [edit for row in rows for edit in row if isinstance(edit.op, Affine)]:
        if any(_clashes(edit, row) for row in rows):
            found = f"edits at {edit.site} whose order counts"
            raise InputError("affine edits that stand alone, to add up", found, "inject one after the other: .then()")


def _clashes(edit: Edit, row: Sequence[Edit]) -> bool:
    """Does a vector edit the same numbers more than once, or as another site or at other tokens?"""
    near = [other for other in row if _overlap(edit.site, other.site)]
    return len(near) > 1 or any((other.site, other.where) != (edit.site, edit.where) for other in near)


def _overlap(one: Site, other: Site) -> bool:
    """Do two sites share numbers? A head's site lies inside its layer's."""
    return one == other or (one.whole == other.whole and one.whole in (one, other))


def mean(rows: Sequence[Sequence[Edit]]) -> tuple[Edit, ...]:
    """The mean of several vectors' edits. Vectors that replace or blend must do so at the same places, alike."""
    if all(isinstance(edit.op, LINEAR) for edits in rows for edit in edits):
        return total([[replace(edit, strength=edit.strength / len(rows)) for edit in edits] for edits in rows])
    if len({len(edits) for edits in rows}) > 1:
        raise InputError("vectors that edit alike, to average", "some edit more", "average vectors of one kind")
    return tuple(_middle(alike) for alike in zip(*rows, strict=True))


def _middle(alike: Sequence[Edit]) -> Edit:
    """The mean of edits that replace or blend alike."""
    first = alike[0]
    key = _key(first)
    if any(_key(edit) != key for edit in alike):
        raise InputError("vectors that edit alike, to average", f"{key} beside others", "average vectors of one kind")
    if not isinstance(first.op, Replace | Blend):
        raise _no_sum(first.op)
    middle = torch.stack([edit.op.tensors()["vector"].float() for edit in alike]).mean(0)
    return replace(first, op=replace(first.op, vector=middle))


def joint(origins: Sequence[Origin | None], name: str) -> Origin | None:
    """The origin of vectors put together: it keeps what they have in common, and refuses what they may not differ in.

    Costs add up. None where one has none. Raises `VectorMismatch` for vectors of different models, templates or
    prompts.
    """
    known = [origin for origin in origins if origin is not None]
    if len(known) < len(origins) or not known:
        return None
    first = known[0]
    for other in known[1:]:
        _one_kind(first, other)
    parts = [{"method": o.method, "task": o.task, "seed": o.seed, "data_hash": o.data_hash} for o in known]
    cost = {field: sum(getattr(o.cost, field) for o in known) for field in type(first.cost).model_fields}
    return first.model_copy(
        update={
            "method": name,
            "hyperparameters": {"parts": parts},
            "max_new_tokens": max(o.max_new_tokens for o in known),
            "cost": type(first.cost)(**cost),
            "found": {},
            **_data(known),
        }
    )


def _one_kind(first: Origin, other: Origin) -> None:
    for what, one, two in (
        ("model", first.model.fingerprint, other.model.fingerprint),
        ("template", first.format.hash, other.format.hash),
        ("prompt", (first.prompt, first.shown), (other.prompt, other.shown)),
    ):
        if one != two:
            found = f"vectors of {first.task} and {other.task} that differ in it"
            raise VectorMismatch(f"one {what} for vectors put together", found, "combine vectors of one kind")


def _data(known: Sequence[Origin]) -> dict[str, Any]:
    """What the vectors' data have in common, and of each data set the fewest items that were kept away."""
    first = known[0]
    kept: dict[str, int] = {}
    for origin in known:
        for data, n in origin.kept_away.items():
            kept[data] = min(n, kept.get(data, n))
    tasks = dict.fromkeys(origin.task for origin in known)
    return {
        "task": " + ".join(tasks),
        "data_hash": first.data_hash if len(kept) == 1 else "",
        "n_test": min(kept.values()),
        "also": kept if len(kept) > 1 else {},
        "labels": first.labels if all(o.labels == first.labels for o in known) else None,
        "demos": first.demos if all(o.demos == first.demos for o in known) else (),
    }


def _melted(group: Sequence[Edit]) -> Op:
    """One op that does what the group's do together."""
    maps = [(edit.strength, edit.op) for edit in group if isinstance(edit.op, Affine)]
    shifts = [part for edit in group if (part := _shift(edit)) is not None]
    shift: Tensor | None = torch.stack(shifts).sum(0) if shifts else None
    if not maps:
        assert shift is not None  # every edit here is an `add`
        return Add(shift)
    read = torch.cat([op.read for _, op in maps])
    return Affine(read, torch.cat([strength * op.write for strength, op in maps]), shift)


def _shift(edit: Edit) -> Tensor | None:
    """The constant part of what an edit adds."""
    constant = edit.op.vector if isinstance(edit.op, Add) else edit.op.bias if isinstance(edit.op, Affine) else None
    return None if constant is None else edit.strength * constant.float()


def _key(edit: Edit) -> tuple[Any, ...]:
    return str(edit.site), type(edit.op).__name__, str(edit.where), edit.strength, tuple(edit.op.numbers().items())


def _no_sum(op: Op) -> InputError:
    found = type(op).__name__
    return InputError("ops that add up: add or affine", found, "inject one after the other: first.then(second)")
