"""Function classes of in-context regression (Garg et al., arXiv 2208.01066) and the inputs they meet, in batches.

    linear         y = w'x                       w ~ N(0, I)
    sparse-linear  the same, all but `sparsity` of the weights 0
    relu           y = sqrt(2 / m) a' relu(W x)   a, W ~ N(0, 1), m hidden units
    tree           a binary tree of some depth: each node asks whether one coordinate is positive, leaves ~ N(0, 1)

Shapes: F functions, n points, d dimensions, m hidden units. Everything is float32 on the CPU.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError

Kind = Literal["linear", "sparse-linear", "relu", "tree"]
KINDS: tuple[Kind, ...] = ("linear", "sparse-linear", "relu", "tree")
Inputs = Literal["standard", "skewed", "scaled", "orthogonal"]
INPUTS: tuple[Inputs, ...] = ("standard", "skewed", "scaled", "orthogonal")
Rule = Callable[[Float[Tensor, "F n d"]], Float[Tensor, "F n"]]


@dataclass(frozen=True)
class FunctionClass:
    """A class of functions of `d` numbers. `sparsity`, `hidden` and `depth` shape its sparse, ReLU and tree
    functions. `mean` and `spread` are of linear weights (a shift of the class; 0 and 1 in training)."""

    kind: Kind
    d: int
    sparsity: int = 3
    hidden: int = 100
    depth: int = 4
    mean: float = 0.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"a function class: {', '.join(KINDS)}", repr(self.kind), "name one of those")
        whole = math.isfinite(self.mean) and 0 < self.spread < math.inf
        if min(self.d, self.sparsity, self.hidden, self.depth) < 1 or not whole:
            raise InputError("sizes of at least 1, a finite mean and spread above 0", str(self), "mend it")

    @property
    def variance(self) -> float:
        """E[y^2] for x ~ N(0, I): the error of predicting zero."""
        if self.kind == "tree":
            return 1.0
        per_weight = self.mean**2 + self.spread**2 if self.kind != "relu" else 1.0
        return per_weight * (min(self.sparsity, self.d) if self.kind == "sparse-linear" else self.d)

    def draw(self, count: int, generator: torch.Generator) -> "Functions":
        """`count` functions."""
        makers = {"linear": _linear, "sparse-linear": _sparse, "relu": _relu, "tree": _tree}
        return Functions(makers[self.kind](self, count, generator), count)


@dataclass(frozen=True, eq=False)
class Functions:
    """`count` functions, evaluated together: `rule` maps (F, n, d) to (F, n)."""

    rule: Rule
    count: int

    def __call__(self, x: Float[Tensor, "F n d"]) -> Float[Tensor, "F n"]:
        """Function i of its own points."""
        return self.rule(x)


def _weights(family: FunctionClass, count: int, generator: torch.Generator) -> Float[Tensor, "F d"]:
    return family.mean + family.spread * torch.randn(count, family.d, generator=generator)


def _of_weights(w: Float[Tensor, "F d"]) -> Rule:
    return lambda x: (x * w[:, None]).sum(-1)


def _linear(family: FunctionClass, count: int, generator: torch.Generator) -> Rule:
    return _of_weights(_weights(family, count, generator))


def _sparse(family: FunctionClass, count: int, generator: torch.Generator) -> Rule:
    w = _weights(family, count, generator)
    kept = torch.rand(w.shape, generator=generator).argsort(1) < family.sparsity
    return _of_weights(w * kept)


def _relu(family: FunctionClass, count: int, generator: torch.Generator) -> Rule:
    inner = torch.randn(count, family.d, family.hidden, generator=generator)
    outer = torch.randn(count, family.hidden, 1, generator=generator)
    return lambda x: (2 / family.hidden) ** 0.5 * ((x @ inner).relu() @ outer)[..., 0]


def _tree(family: FunctionClass, count: int, generator: torch.Generator) -> Rule:
    nodes, leaves = 2**family.depth - 1, 2**family.depth
    asked = torch.randint(family.d, (count, nodes), generator=generator)
    values = torch.randn(count, leaves, generator=generator)

    def rule(x: Tensor) -> Tensor:
        at = torch.zeros(x.shape[:2], dtype=torch.long)
        for _ in range(family.depth):
            coordinate = asked.gather(1, at)
            positive = x.gather(2, coordinate[..., None])[..., 0] > 0
            at = 2 * at + 1 + positive.long()
        found: Tensor = values.gather(1, at - nodes)
        return found

    return rule


def seed_of(seed: int, what: str) -> int:
    """A generator's seed for one use."""
    return int.from_bytes(hashlib.sha256(f"{seed} {what}".encode()).digest()[:8]) >> 1


def generator_of(seed: int, what: str) -> torch.Generator:
    """A generator for one use."""
    return torch.Generator().manual_seed(seed_of(seed, what))


def draw_inputs(
    shape: tuple[int, int, int], generator: torch.Generator, inputs: Inputs = "standard"
) -> Float[Tensor, "F n d"]:
    """Points of each function's own distribution.

    - `standard`: N(0, I).
    - `skewed`: a covariance with eigenvalues proportional to 1 / i, of trace d, in a basis drawn for each prompt
      (as the paper says; the released code scales coordinates by 1 / i, a covariance of 1 / i^2, in one basis).
    - `scaled`: N(0, 4 I).
    - `orthogonal`: all points but the last lie in a random subspace of d - 1 dimensions (variance d / (d - 1) in it),
      the last, the query, on the line it leaves out, sqrt(d) from 0: the examples say nothing of it.
    """
    count, _, d = shape
    x = torch.randn(shape, generator=generator)
    if inputs == "standard":
        return x
    if inputs == "scaled":
        return 2 * x
    basis = torch.linalg.qr(torch.randn(count, d, d, generator=generator)).Q
    if inputs == "skewed":
        sizes = 1 / torch.arange(1, d + 1)
        x = x * (sizes * d / sizes.sum()).sqrt()
        return x @ basis.mT  # type: ignore[no-any-return]
    if inputs != "orthogonal":
        raise InputError(f"inputs: {', '.join(INPUTS)}", repr(inputs), "name one of those")
    if d < 2:
        raise InputError("at least two dimensions, for orthogonal inputs", f"d = {d}", "name other inputs")
    x[:, :, 0] = 0
    x *= (d / (d - 1)) ** 0.5
    signs = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    x[:, -1] = 0
    x[:, -1, 0] = signs * d**0.5
    turned: Tensor = x @ basis.mT
    return turned
