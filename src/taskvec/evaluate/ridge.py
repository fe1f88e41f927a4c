"""Ridge in its dual form, float64: what closed-form vectors are fitted by. Shapes: N queries, g features, d width."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError

RIDGES = tuple(10.0**e for e in range(-4, 5))
"""Candidates of leave-one-out, times the mean squared norm of the states."""


def ridge_dual(h: Float[Tensor, "N g"], y: Float[Tensor, "N d"], ridge: float) -> Float[Tensor, "N d"]:
    """A = (H H' + lam I)^-1 Y in float64: the dual coefficients of ridge without intercept (section 3 of the paper)."""
    h, y = h.double(), y.double()
    gram: Tensor = h @ h.T + ridge * torch.eye(len(h), dtype=h.dtype, device=h.device)
    coefficients: Tensor = torch.linalg.solve(gram, y)
    return coefficients.contiguous()  # it comes column by column, and a saved copy would multiply with other bits


def leave_one_out(
    h: Float[Tensor, "N g"], y: Float[Tensor, "N d"], ridges: Sequence[float], *, intercept: bool = False
) -> list[float]:
    """The mean squared leave-one-out error of each ridge, from one eigendecomposition: residual_j / (1 - S_jj) with
    S = G (G + lam I)^-1, to which an intercept (on centred h and y) adds 1/N."""
    h, y = h.double(), y.double()
    values, vectors = torch.linalg.eigh(h @ h.T)
    values = values.clamp_min(0.0)
    rotated, out = vectors.T @ y, []
    for ridge in ridges:
        shrink = values / (values + ridge)
        fitted = vectors @ (shrink[:, None] * rotated)
        leverage = (vectors.square() * shrink).sum(1) + (1 / len(h) if intercept else 0.0)
        out.append(float(((y - fitted) / (1 - leverage).clamp_min(1e-12)[:, None]).square().sum(1).mean()))
    return out


def degrees_of_freedom(h: Float[Tensor, "N g"], ridge: float) -> float:
    """tr(G (G + lam I)^-1): how many of the N directions the ridge leaves in use."""
    values = torch.linalg.eigvalsh(h.double() @ h.double().T).clamp_min(0.0)
    return float((values / (values + ridge)).sum())


@dataclass(frozen=True, eq=False)
class Solved:
    """A ridge map in dual form: y(h) = (h read') write + bias. `found` says what it took."""

    read: Float[Tensor, "N g"]
    write: Float[Tensor, "N d"]
    bias: Float[Tensor, " d"]
    found: dict[str, float]


def solve(
    h: Float[Tensor, "N g"], y: Float[Tensor, "N d"], ridge: float | Literal["loo"], *, intercept: bool
) -> Solved:
    """The map from h to y, `ridge` as given or by leave-one-out; with an intercept both sides are centred (without
    one the bias is 0)."""
    h, y = h.double(), y.double()
    centre, shift = (side.mean(0) * intercept for side in (h, y))
    x, target = h - centre, y - shift
    scale = float(h.square().sum(1).mean())
    if ridge == "loo":
        ridges = [r * scale for r in RIDGES]
        errors = leave_one_out(x, target, ridges, intercept=intercept)
        ridge = ridges[errors.index(min(errors))]
    write = ridge_dual(x, target, ridge)
    found = {"ridge": ridge, "degrees_of_freedom": degrees_of_freedom(x, ridge), "ridge_over_norm": ridge / scale}
    return Solved(x, write, shift - (centre @ x.T) @ write, found)


def check_ridge(name: str, ridge: float | Literal["loo"]) -> None:
    """Raise `InputError` for a ridge that means nothing."""
    if ridge != "loo" and not 0 < ridge < float("inf"):
        raise InputError("a finite ridge above 0, or loo", f"{name} = {ridge}", "mend it")
