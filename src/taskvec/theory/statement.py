"""One numerical statement, and the few tools that all of them use. Shapes: n inputs, f features, d width."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

EXACT = 1e-10
"""What an identity may miss by in float64."""


@dataclass(frozen=True)
class Theorem:
    """What a statement says, and a measured number beside the predicted one (a value, or a bound)."""

    name: str
    says: str
    relation: Literal["equal", "at most", "at least"]
    predicted: float
    measured: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Does the measured number stand to the predicted one as `relation` says, within the tolerance?"""
        over = self.measured - self.predicted
        within = {"equal": abs(over), "at most": over, "at least": -over}
        return within[self.relation] <= self.tolerance


def generator(seed: int) -> torch.Generator:
    """A generator of its own: the global one stays where it is."""
    return torch.Generator().manual_seed(seed)


def normal(source: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def with_ones(features: Float[Tensor, "n f"]) -> Float[Tensor, "n f1"]:
    """The features and a constant one: what a map with a bias reads."""
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


def solved(features: Float[Tensor, "n f"], targets: Float[Tensor, "n d"]) -> Float[Tensor, "f d"]:
    """W = F+ T: the least of the maps that come closest to F W = T."""
    inverse: Tensor = torch.linalg.pinv(features, rtol=EXACT)
    return inverse @ targets


def miss(features: Float[Tensor, "n f"], targets: Float[Tensor, "n d"]) -> float:
    """|T - F W| / |T| for the best linear map W."""
    return float((targets - features @ solved(features, targets)).norm() / targets.norm())


def expected_miss(n: int, directions: int, targets: Float[Tensor, "n d"]) -> tuple[float, float]:
    """What `directions` random directions of R^n miss of n fixed targets, and a tolerance: four standard deviations.

    The share they explain of one target is Beta(k/2, (n - k)/2): mean k / n, variance 2 k (n - k) / (n^2 (n + 2)).
    Several targets average it with their shares of |T|^2 as weights. From k = n on, nothing is missed.
    """
    k = min(directions, n)
    if k == n:
        return 0.0, EXACT
    missed = math.sqrt(1 - k / n)
    shares = torch.linalg.svdvals(targets).square()
    weight = float((shares / shares.sum()).square().sum())
    deviation = math.sqrt(2 * k * (n - k) / (n**2 * (n + 2)) * weight)
    return missed, 4 * deviation / (2 * missed)


def rank(matrix: Float[Tensor, "n f"]) -> int:
    """Singular values above 1e-10 of the largest."""
    return int(torch.linalg.matrix_rank(matrix, rtol=EXACT))


def effective_rank(matrix: Float[Tensor, "n f"]) -> float:
    """exp of the entropy of the singular values, as shares of their sum: at most the rank, less where few dominate."""
    values = torch.linalg.svdvals(matrix)
    shares = values / values.sum()
    return math.exp(float(torch.special.entr(shares).sum()))
