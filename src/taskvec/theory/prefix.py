"""E3a to E3c: what a prefix of trained keys and values does to an attention head, and what it cannot do.

    head_P = (1 - rho) h + rho g,   rho = Z_P / (Z_P + Z_X),   Z = sum of exp(score),   g = the prefix' own output

**E3c.** Two inputs X+ and X- with one query and one Z_X have one rho and one g under every prefix, so their outputs
become t h+ + c and t h- + c. Against targets T+ and T- the larger of the two errors is at least

    floor = 1/2 min over 0 <= t <= 1 of |T+ - T- - t (h+ - h-)|        (c halves the difference; t is a parabola's)

and every 0 < t < 1 with every c is some prefix': no greater bound is true. For T = 2 h it is 1/2 |h+ - h-|, at
t = 1, which prefixes approach (rho to 0, g to infinity) and none reaches. Such inputs exist where a head's keys do not
see all of the state: X+ and X- differ in the null space of W_k.

Shapes: n queries, k width of keys, m prefix tokens, t content tokens, w width of states, d width of values.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.theory.statement import EXACT, Theorem, generator, miss, normal, rank, solved, with_ones

KEYS, VALUES, STATES, CONTENT, PREFIX = 8, 16, 24, 6, 4
CLOSE = 0.01
"""The share of the floor by which the best prefix found may lie above it."""


def scores(queries: Float[Tensor, "n k"], keys: Float[Tensor, "t k"]) -> Float[Tensor, "n t"]:
    """q K' / sqrt(k)."""
    return queries @ keys.T / math.sqrt(keys.shape[1])


def attend(
    queries: Float[Tensor, "n k"], keys: Float[Tensor, "t k"], values: Float[Tensor, "t d"]
) -> Float[Tensor, "n d"]:
    """A softmax head."""
    return torch.softmax(scores(queries, keys), dim=-1) @ values


def attend_linearly(
    queries: Float[Tensor, "n k"], keys: Float[Tensor, "t k"], values: Float[Tensor, "t d"]
) -> Float[Tensor, "n d"]:
    """A head of linear attention without a denominator: q K' V."""
    return queries @ keys.T @ values


def prefix_share(
    queries: Float[Tensor, "n k"], prefix: Float[Tensor, "m k"], keys: Float[Tensor, "t k"]
) -> Float[Tensor, " n"]:
    """rho = Z_P / (Z_P + Z_X)."""
    of_prefix, of_content = (scores(queries, some).exp().sum(-1) for some in (prefix, keys))
    return of_prefix / (of_prefix + of_content)


# --- E3a, E3b --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Head:
    """Random queries, content and prefix."""

    queries: Float[Tensor, "n k"]
    keys: Float[Tensor, "t k"]
    values: Float[Tensor, "t d"]
    prefix_keys: Float[Tensor, "m k"]
    prefix_values: Float[Tensor, "m d"]

    @classmethod
    def random(cls, seed: int, n: int = 100) -> "Head":
        """Of the sizes above."""
        sizes = ((n, KEYS), (CONTENT, KEYS), (CONTENT, VALUES), (PREFIX, KEYS), (PREFIX, VALUES))
        source = generator(seed)
        return cls(*(normal(source, *size) for size in sizes))

    def update(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Float[Tensor, "n d"]:
        """What the prefix adds to the head's output."""
        keys, values = torch.cat([self.prefix_keys, self.keys]), torch.cat([self.prefix_values, self.values])
        return attention(self.queries, keys, values) - attention(self.queries, self.keys, self.values)


def identity(seed: int = 0) -> Theorem:
    """E3a: (1 - rho) h + rho g against the head over prefix and content together."""
    head = Head.random(seed)
    rho = prefix_share(head.queries, head.prefix_keys, head.keys)[:, None]
    h = attend(head.queries, head.keys, head.values)
    g = attend(head.queries, head.prefix_keys, head.prefix_values)
    wanted = head.update(attend) + h
    says = "A prefix mixes the head's output with its own: (1 - rho) h + rho g, rho its share of the partition sum."
    return Theorem("E3a identity", says, "equal", 0.0, float(((1 - rho) * h + rho * g - wanted).abs().max()), EXACT)


def linear_rank(seed: int = 0) -> Theorem:
    """E3b: the rank of what a prefix adds to linear attention."""
    says = "In linear attention a prefix of m tokens adds a change of rank m at most, over all queries."
    measured = float(rank(Head.random(seed).update(attend_linearly)))
    return Theorem("E3b rank", says, "at most", float(PREFIX), measured, 0.0)


def linear_in_query(seed: int = 0) -> Theorem:
    """E3b: that change as a linear map of the query, without a bias."""
    head = Head.random(seed)
    says = "In linear attention what a prefix adds is linear in the query."
    return Theorem("E3b linear", says, "equal", 0.0, miss(head.queries, head.update(attend_linearly)), EXACT)


def softmax_rank(seed: int = 0) -> Theorem:
    """E3b does not carry over: rho (g - h) mixes m + t values with weights that sum to nought."""
    says = "In softmax attention a prefix of m tokens adds a change of rank m + t - 1 with t content tokens."
    measured = float(rank(Head.random(seed).update(attend)))
    return Theorem("E3b softmax", says, "equal", PREFIX + CONTENT - 1.0, measured, 0.0)


# --- E3c -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Twins:
    """Two inputs that a head's query and keys cannot tell apart, and targets for its two outputs at the last token."""

    inputs: Float[Tensor, "2 t w"]
    w_q: Float[Tensor, "w k"]
    w_k: Float[Tensor, "w k"]
    w_v: Float[Tensor, "w d"]
    targets: Float[Tensor, "2 d"]

    @classmethod
    def random(cls, seed: int) -> "Twins":
        """States x + u and x - u with u W_k = 0; u is zero at the last token, which asks. T = 2 h."""
        source = generator(seed)
        states, unseen = normal(source, CONTENT, STATES), normal(source, CONTENT, STATES)
        w_q, w_k, w_v = (normal(source, STATES, size) / math.sqrt(STATES) for size in (KEYS, KEYS, VALUES))
        unseen -= unseen @ w_k @ torch.linalg.pinv(w_k)
        unseen[-1] = 0.0
        blank = cls(torch.stack([states + unseen, states - unseen]), w_q, w_k, w_v, normal(source, 2, VALUES))
        return replace(blank, targets=2 * blank.outputs())

    def outputs(self, *, prefix: tuple[Tensor, Tensor] | None = None) -> Float[Tensor, "2 d"]:
        """h+ and h-, behind a prefix of keys and values if one is given."""
        keys, values = prefix if prefix is not None else (self.w_k[:0], self.w_v[:0])
        heads = [
            attend(x[-1:] @ self.w_q, torch.cat([keys, x @ self.w_k]), torch.cat([values, x @ self.w_v]))
            for x in self.inputs
        ]
        return torch.cat(heads)

    def error(self, outputs: Float[Tensor, "2 d"]) -> float:
        """The larger distance to the targets."""
        return float((outputs - self.targets).norm(dim=1).max())


def half_gap(pair: Float[Tensor, "2 d"]) -> float:
    """1/2 |a - b|."""
    return float((pair[0] - pair[1]).norm() / 2)


def floor(outputs: Float[Tensor, "2 d"], targets: Float[Tensor, "2 d"]) -> float:
    """1/2 min over 0 <= t <= 1 of |T+ - T- - t (h+ - h-)|: a parabola in t, cut to the interval."""
    apart, wanted = outputs[0] - outputs[1], targets[0] - targets[1]
    t = float((wanted @ apart / apart.square().sum()).clamp(0, 1))
    return half_gap(targets - t * outputs)


def best_prefix(twins: Twins, seed: int = 0, tokens: int = PREFIX) -> tuple[Tensor, Tensor]:
    """Keys and values by L-BFGS on the mean squared error, whose least lies where the larger error has its own.

    The best of three starts, whose scores lie lower and lower: from high ones the search may end on the plateau t = 0,
    where the prefix takes all weight.
    """
    source, query = generator(seed), twins.inputs[0, -1:] @ twins.w_q
    down = query * math.sqrt(KEYS) / query.square().sum()
    starts = [
        torch.cat([normal(source, tokens, KEYS) - level * down, normal(source, tokens, VALUES)], 1)
        for level in (0, 3, 6)
    ]
    return min((_descended(twins, start) for start in starts), key=lambda pair: twins.error(twins.outputs(prefix=pair)))


def _descended(twins: Twins, start: Float[Tensor, "m kd"]) -> tuple[Tensor, Tensor]:
    from scipy.optimize import minimize

    def loss(flat: Any) -> tuple[float, Any]:
        both = torch.from_numpy(flat).reshape(start.shape).requires_grad_()
        value = (twins.outputs(prefix=(both[:, :KEYS], both[:, KEYS:])) - twins.targets).square().mean()
        (gradient,) = torch.autograd.grad(value, both)
        return value.item(), gradient.numpy().ravel()

    options = {"maxiter": 300, "gtol": 1e-10, "ftol": 1e-15}
    found = minimize(loss, start.numpy().ravel(), jac=True, method="L-BFGS-B", options=options)
    both = torch.from_numpy(found.x).reshape(start.shape)
    return both[:, :KEYS], both[:, KEYS:]


@cache
def _found(seed: int) -> float:
    """The error of the best prefix found for T = 2 h."""
    twins = Twins.random(seed)
    return twins.error(twins.outputs(prefix=best_prefix(twins, seed)))


def closed_form(seed: int = 0) -> Theorem:
    """The floor of T = 2 h."""
    twins = Twins.random(seed)
    h = twins.outputs()
    says = "Any prefix misses the targets 2 h+ and 2 h- of two inputs it cannot tell apart by 1/2 |h+ - h-| or more."
    return Theorem("E3c floor", says, "equal", half_gap(h), floor(h, twins.targets), EXACT)


def none_below(seed: int = 0) -> Theorem:
    """The best prefix found, from below."""
    twins = Twins.random(seed)
    says = "The best prefix found is not below the floor."
    return Theorem("E3c none below", says, "at least", floor(twins.outputs(), twins.targets), _found(seed), EXACT)


def reached(seed: int = 0) -> Theorem:
    """The best prefix found, from above."""
    twins = Twins.random(seed)
    least = floor(twins.outputs(), twins.targets)
    says = "The best prefix found comes within 1 % of the floor: the bound is sharp."
    return Theorem("E3c reached", says, "at most", least, _found(seed), CLOSE * least)


def within_reach(seed: int = 0) -> Theorem:
    """A control: T = h / 2 + c, whose floor is nought."""
    twins = Twins.random(seed)
    h = twins.outputs()
    twins = replace(twins, targets=h / 2 + normal(generator(seed), VALUES))
    found = twins.error(twins.outputs(prefix=best_prefix(twins, seed)))
    says = "Control: targets h / 2 + c have floor 0, and the same search finds their prefix."
    return Theorem("E3c control", says, "equal", 0.0, found, 1e-3 * half_gap(h))


def static_vector(seed: int = 0) -> Theorem:
    """One vector for both inputs is t = 1."""
    twins = Twins.random(seed)
    h = twins.outputs()
    error = twins.error(h + (twins.targets - h).mean(0))
    says = (
        "The best static vector misses 2 h by as much as a prefix: what separates is that vectors depend on the input."
    )
    return Theorem("E3c static vector", says, "equal", floor(h, twins.targets), error, EXACT)


def adaptive_vector(seed: int = 0) -> Theorem:
    """v = E z + b, from any features that differ between the two inputs."""
    twins = Twins.random(seed)
    h, z = twins.outputs(), with_ones(normal(generator(seed), 2, KEYS))
    error = twins.error(h + z @ solved(z, twins.targets - h))
    says = "An adaptive vector reaches both targets, whatever feature tells the two inputs apart."
    return Theorem("E3c adaptive vector", says, "equal", 0.0, error, EXACT)


def value_lora(seed: int = 0) -> Theorem:
    """W_v + s+ (T - h) of rank 2, with s the two attention-weighted mean states."""
    twins = Twins.random(seed)
    h = twins.outputs()
    patterns = [torch.softmax(scores(x[-1:] @ twins.w_q, x @ twins.w_k), dim=-1) for x in twins.inputs]
    means = torch.cat([pattern @ x for pattern, x in zip(patterns, twins.inputs, strict=True)])
    changed = replace(twins, w_v=twins.w_v + solved(means, twins.targets - h))
    says = "A LoRA of rank 2 on the head's values reaches both targets."
    return Theorem("E3c value LoRA", says, "equal", 0.0, changed.error(changed.outputs()), EXACT)


STATEMENTS: tuple[Callable[[int], Theorem], ...] = (
    identity,
    linear_rank,
    linear_in_query,
    softmax_rank,
    closed_form,
    none_below,
    reached,
    within_reach,
    static_vector,
    adaptive_vector,
    value_lora,
)
