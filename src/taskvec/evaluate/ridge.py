"""Ridge in its dual form, float64: what closed-form vectors are fitted by. Shapes: N queries, g features, d width."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

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
