"""Are a model's last hidden states under a vector those of the model at its best length? Numbers for what the paper
read off overlaid histograms.

Shapes: n states, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError

PERMUTATIONS = 200


@dataclass(frozen=True)
class Alignment:
    """Distances of states from a reference, in units of the reference's root mean square spread: of the means, and of
    the covariances (Bures). `mmd` is the squared maximum mean discrepancy under a Gaussian kernel of the median
    distance; `p` its p value under swaps of whole functions between the two sets."""

    mean: float
    covariance: float
    mmd: float
    p: float


def alignment(
    found: Float[Tensor, "n d"], reference: Float[Tensor, "n d"], functions: Sequence[int], *, seed: int = 0
) -> Alignment:
    """How far `found` is from `reference`, states of the same queries; `functions` says whose each query is. Raises
    `InputError` for fewer than two states, or a reference that is one point."""
    a, b = found.double(), reference.double()
    spread = float((b - b.mean(0)).square().sum(1).mean().sqrt())
    if len(a) < 2 or not spread > 0:
        fix = "compare states of more prompts"
        raise InputError("two states or more, and a reference that is not one point", f"{len(a)} states", fix)
    mmd, p = two_sample(a, b, functions, seed=seed)
    shift = float((a.mean(0) - b.mean(0)).norm())
    return Alignment(shift / spread, bures(a.T.cov(), b.T.cov()) / spread, mmd, p)


def bures(one: Float[Tensor, "d d"], two: Float[Tensor, "d d"]) -> float:
    """The distance of two covariances: sqrt(tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2))."""
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    return float((one.trace() + two.trace() - 2 * cross).clamp_min(0).sqrt())


def two_sample(
    a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], functions: Sequence[int], *, seed: int
) -> tuple[float, float]:
    """(squared maximum mean discrepancy, p value). The two sets are pairs, and queries of a function hang together: so
    whole functions change sides, not single states."""
    both = torch.cat([a, b])
    distances = torch.cdist(both, both).square()
    kernel = torch.exp(-distances / distances[distances > 0].median()).numpy()
    owner = np.unique(np.asarray(functions), return_inverse=True)[1]
    marks = np.concatenate([np.full(len(a), 1 / len(a)), np.full(len(b), -1 / len(b))])
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (PERMUTATIONS, owner.max() + 1))
    drawn = np.stack([marks, *(marks * np.tile(sign[owner], 2) for sign in signs)])
    found = ((drawn @ kernel) * drawn).sum(1)
    ties = found[1:] >= found[0] - 1e-12  # what rounding leaves of equal ones
    return float(found[0]), float(ties.sum() + 1) / (PERMUTATIONS + 1)
