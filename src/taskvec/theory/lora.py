"""E2: adaptive vectors and LoRA as classes of functions. Neither contains the other; each does under a condition.

    H (n, d) states, Z (n, g) generator features, D = H A' B' of a LoRA of rank r, V = Z E' + b of the vectors
    LoRA -> ATV   min over E, b of |D - Z E' - b| / |D|      ATV -> LoRA   min over W of |V - H W'| / |V|

Where H and Z are independent and normal, the columns that are read span a uniformly random subspace of R^n. k columns
then miss sqrt(1 - k / n) of any target on average, with a known spread: that is what is predicted, and the tolerance
is four standard deviations (`expected_miss`). h is a free variable here, as in the paper: one site, no later layers.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.evaluate.expansion import Expansion
from taskvec.theory.statement import (
    EXACT,
    Theorem,
    effective_rank,
    expected_miss,
    generator,
    miss,
    normal,
    rank,
    solved,
    with_ones,
)

WIDTH, RANK, FEATURES, LAYERS = 32, 4, 4, 3


def lora_change(states: Float[Tensor, "n d"], a: Float[Tensor, "r d"], b: Float[Tensor, "d r"]) -> Float[Tensor, "n d"]:
    """D = H A' B'."""
    return states @ a.T @ b.T


def expansion(source: torch.Generator, features: int, bottleneck: int | None = None, layers: int = 1) -> Expansion:
    """The map that this library's adaptive vectors are written by, with random weights."""
    inner = features if bottleneck is None else bottleneck
    read = None if bottleneck is None else normal(source, bottleneck, features)
    return Expansion(normal(source, layers, WIDTH, inner), normal(source, layers, WIDTH), read)


# --- E2a: LoRA -> ATV ------------------------------------------------------------------------------------------------


def oracle(seed: int = 0, n: int = 200) -> Theorem:
    """Features that mix A h with as many others, by a random invertible map."""
    source = generator(seed)
    h, a, b = normal(source, n, WIDTH), normal(source, RANK, WIDTH), normal(source, WIDTH, RANK)
    mixed = torch.cat([h @ a.T, normal(source, n, FEATURES)], 1) @ normal(source, RANK + FEATURES, RANK + FEATURES)
    says = "A generator whose features hold A h, linearly mixed with others, writes the LoRA's change."
    return Theorem(f"E2a oracle, n = {n}", says, "equal", 0.0, miss(with_ones(mixed), lora_change(h, a, b)), EXACT)


def oblivious(seed: int = 0, n: int = 200) -> Theorem:
    """Features that know nothing of h."""
    source = generator(seed)
    h, a, b = normal(source, n, WIDTH), normal(source, RANK, WIDTH), normal(source, WIDTH, RANK)
    change, read = lora_change(h, a, b), with_ones(normal(source, n, FEATURES))
    predicted, tolerance = expected_miss(n, read.shape[1], change)
    says = "A generator that knows nothing of A h misses sqrt(1 - (features + 1) / n) of it."
    if n <= read.shape[1]:
        says = "On no more inputs than features + 1, any generator writes any LoRA's change: it interpolates."
    return Theorem(f"E2a oblivious, n = {n}", says, "equal", predicted, miss(read, change), tolerance)


# --- E2b: ATV -> LoRA ------------------------------------------------------------------------------------------------


def as_lora(seed: int = 0, n: int = 20) -> Theorem:
    """Claims that a bias-free LoRA reproduces n generic vectors: false for n above the rank of H."""
    h, v = _states_and_vectors(seed, n)
    says = "On n <= rank(H) inputs some bias-free LoRA reproduces the vectors."
    return Theorem(f"E2b n = {n}", says, "equal", 0.0, miss(h, v), EXACT)


def as_lora_of_rank(seed: int = 0, n: int = 20, bottleneck: int = 3) -> Theorem:
    """The rank that this LoRA needs: W = H+ V, and H+ loses nothing while n <= rank(H)."""
    h, v = _states_and_vectors(seed, n, bottleneck=bottleneck)
    says = "The LoRA that reproduces the vectors of n <= rank(H) inputs has the vectors' rank: bottleneck + 1."
    return Theorem("E2b rank", says, "equal", float(bottleneck + 1), float(rank(solved(h, v))), 0.0)


def no_lora(seed: int = 0, n: int = 200, dimensions: int = WIDTH) -> Theorem:
    """More inputs than H has rank; `dimensions` of h are in use."""
    h, v = _states_and_vectors(seed, n, dimensions=dimensions)
    predicted, tolerance = expected_miss(n, dimensions, v)
    says = "On n > rank(H) inputs every bias-free LoRA misses sqrt(1 - rank(H) / n) of vectors that know nothing of h."
    name = f"E2b n = {n}, rank(H) = {dimensions}"
    return Theorem(name, says, "equal", predicted, miss(h, v), tolerance)


def _states_and_vectors(
    seed: int, n: int, *, dimensions: int = WIDTH, bottleneck: int | None = None
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    source = generator(seed)
    h = normal(source, n, dimensions) @ normal(source, dimensions, WIDTH)
    return h, expansion(source, 2 * FEATURES, bottleneck)(normal(source, n, 2 * FEATURES))[:, 0]


# --- E2c: static vectors ---------------------------------------------------------------------------------------------


def static_without_bias(seed: int = 0, n: int = 200) -> Theorem:
    """One vector for all inputs, against h W'."""
    source = generator(seed)
    h, v = normal(source, n, WIDTH), normal(source, WIDTH).expand(n, -1)
    predicted, tolerance = expected_miss(n, WIDTH, v)
    says = "A static vector is no bias-free LoRA: every one misses sqrt(1 - d / n) of it."
    return Theorem("E2c no bias", says, "equal", predicted, miss(h, v), tolerance)


def static_constant_coordinate(seed: int = 0, n: int = 200) -> Theorem:
    """States whose last coordinate is the same everywhere."""
    source = generator(seed)
    h, v = normal(source, n, WIDTH), normal(source, WIDTH).expand(n, -1)
    h[:, -1] = 2.5
    says = "A static vector is a bias-free LoRA where a coordinate of h is constant."
    return Theorem("E2c constant coordinate", says, "equal", 0.0, miss(h, v), EXACT)


def static_with_bias(seed: int = 0, n: int = 200) -> Theorem:
    """A LoRA with a bias: h W' + b."""
    source = generator(seed)
    h, v = normal(source, n, WIDTH), normal(source, WIDTH).expand(n, -1)
    says = "A static vector is a LoRA with a bias."
    return Theorem("E2c bias", says, "equal", 0.0, miss(with_ones(h), v), EXACT)


# --- E2d: the implemented rank ---------------------------------------------------------------------------------------


def implemented_rank(seed: int = 0, features: int = 8, bottleneck: int | None = None, n: int = 200) -> Theorem:
    """The vectors of n inputs and all layers side by side, (n, L d)."""
    source = generator(seed)
    rows = expansion(source, features, bottleneck, LAYERS)(normal(source, n, features))
    inner = "the generator's width" if bottleneck is None else "the bottleneck's rank"
    says = f"The stacked vectors of all inputs and layers have at most {inner} + 1 as their rank."
    name = "E2d full" if bottleneck is None else "E2d bottleneck"
    bound = (bottleneck or features) + 1.0
    return Theorem(name, says, "at most", bound, float(rank(rows.flatten(1))), 0.0)


def spread(seed: int = 0, features: int = 8, n: int = 200) -> Theorem:
    """The largest effective rank of a layer's vectors, from features each half as large as the one before."""
    source = generator(seed)
    z = normal(source, n, features) * 0.5 ** torch.arange(features)
    rows = expansion(source, features, None, LAYERS)(z)
    largest = max(effective_rank(rows[:, layer]) for layer in range(LAYERS))
    says = "A layer's effective rank (entropy of the singular values) is at most its rank, and less where few dominate."
    return Theorem("E2d effective", says, "at most", features + 1.0, largest, 0.0)


def _sized(statement: Callable[..., Theorem], **sizes: int) -> Callable[[int], Theorem]:
    return lambda seed: statement(seed, **sizes)


STATEMENTS: tuple[Callable[[int], Theorem], ...] = (
    _sized(oracle, n=20),
    _sized(oracle, n=200),
    _sized(oblivious, n=20),
    _sized(oblivious, n=200),
    _sized(oblivious, n=FEATURES + 1),
    as_lora,
    as_lora_of_rank,
    no_lora,
    _sized(no_lora, n=20, dimensions=10),
    static_without_bias,
    static_constant_coordinate,
    static_with_bias,
    implemented_rank,
    _sized(implemented_rank, bottleneck=3),
    spread,
)
