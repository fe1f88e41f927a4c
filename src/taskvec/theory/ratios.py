"""E3d: how a prefix and a vector change the ratios of attention between content tokens.

    log(a_i / a_j) = score_i - score_j

A prefix makes all content weights of its own layer smaller by one factor, so their ratios stay. A vector v behind
layer l changes the scores of layer l + 1. Without a norm before attention, with v at the last token or at all,

    change of log(a_i / a_j) = (v W_q) . (k_i - k_j) / sqrt(k)

for v at all tokens moves all keys by the same v W_k, which cancels in every ratio: only the query's move counts. With a
norm (or rotary positions) keys move by different amounts, and their move alone changes ratios.

The comparison is between a layer and the next one: a prefix in layer l changes the states that leave it, and so the
ratios of layer l + 1. Where every layer has a prefix, each leaves the ratios that its layer's own input gives.

Two layers of one causal head, no MLP. Shapes: t content tokens (the last one asks), m prefix tokens, w width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.theory.statement import EXACT, Theorem, generator, normal

WIDTH, CONTENT, PREFIX = 16, 8, 3
MOVES = 0.01
"""The least change of a log-ratio that counts as one."""


@dataclass(frozen=True, eq=False)
class Layer:
    """Queries, keys and values of one head; `normed`: a layer norm before it."""

    w_q: Float[Tensor, "w w"]
    w_k: Float[Tensor, "w w"]
    w_v: Float[Tensor, "w w"]
    normed: bool = False

    def read(self, states: Float[Tensor, "t w"]) -> Float[Tensor, "t w"]:
        """What the head sees."""
        return torch.nn.functional.layer_norm(states, states.shape[-1:]) if self.normed else states

    def log_weights(
        self,
        asking: Float[Tensor, "t w"],
        states: Float[Tensor, "t w"],
        prefix: Float[Tensor, "m w"] | None = None,
    ) -> Float[Tensor, "t mt"]:
        """Logarithms of the attention weights, causal: the prefix' columns, then the tokens' own."""
        queries, keys = self.read(asking) @ self.w_q, self.read(states) @ self.w_k
        later = torch.ones(len(states), len(states), dtype=torch.bool).triu(1)
        over = (queries @ keys.T / math.sqrt(WIDTH)).masked_fill(later, -math.inf)
        if prefix is not None:
            over = torch.cat([queries @ prefix.T / math.sqrt(WIDTH), over], 1)
        return torch.log_softmax(over, dim=-1)

    def __call__(
        self, states: Float[Tensor, "t w"], prefix: tuple[Tensor, Tensor] | None = None
    ) -> Float[Tensor, "t w"]:
        """The residual stream behind the layer."""
        keys, values = (None, states[:0]) if prefix is None else prefix
        return states + self.log_weights(states, states, keys).exp() @ torch.cat([values, self.read(states) @ self.w_v])


@dataclass(frozen=True, eq=False)
class Stack:
    """Two layers, the states that enter the first and leave it, its prefix, and a vector."""

    first: Layer
    second: Layer
    entering: Float[Tensor, "t w"]
    between: Float[Tensor, "t w"]
    prefix: tuple[Float[Tensor, "m w"], Float[Tensor, "m w"]]
    vector: Float[Tensor, " w"]

    @classmethod
    def random(cls, seed: int, *, normed: bool = False) -> "Stack":
        """Scores of size one."""
        source = generator(seed)
        weights = normal(source, 6, WIDTH, WIDTH) / math.sqrt(WIDTH)
        first, second = (Layer(w[0], w[1], w[2], normed) for w in (weights[:3], weights[3:]))
        states = normal(source, CONTENT, WIDTH)
        prefix = normal(source, PREFIX, WIDTH), normal(source, PREFIX, WIDTH)
        return cls(first, second, states, first(states), prefix, normal(source, WIDTH))


def largest_change(before: Float[Tensor, " s"], after: Float[Tensor, " s"]) -> float:
    """The largest change of log(a_i / a_j) over pairs: log weights may all shift by one constant."""
    shift = after - before
    return float(shift.max() - shift.min())


def _next(stack: Stack, asking: Tensor, states: Tensor) -> float:
    """The change in the second layer, at the last token, among the tokens before it."""
    before, after = (
        stack.second.log_weights(*pair)[-1, :-1] for pair in ((stack.between, stack.between), (asking, states))
    )
    return largest_change(before, after)


def _at_last(stack: Stack) -> Tensor:
    moved = stack.between.clone()
    moved[-1] += stack.vector
    return moved


def predicted_change(stack: Stack) -> float:
    """The formula above, without a norm."""
    moved = stack.between[:-1] @ stack.second.w_k @ (stack.vector @ stack.second.w_q) / math.sqrt(WIDTH)
    return largest_change(torch.zeros_like(moved), moved)


# --- statements ------------------------------------------------------------------------------------------------------


def prefix_here(seed: int = 0) -> Theorem:
    """A prefix, in its own layer."""
    stack = Stack.random(seed)
    before = stack.first.log_weights(stack.entering, stack.entering)[-1]
    after = stack.first.log_weights(stack.entering, stack.entering, stack.prefix[0])[-1, PREFIX:]
    says = "A prefix leaves the ratios of attention between content tokens, in its own layer."
    return Theorem("E3d prefix", says, "equal", 0.0, largest_change(before, after), EXACT)


def vector_at_last(seed: int = 0) -> Theorem:
    """A vector at the last token moves the next layer's query."""
    stack = Stack.random(seed)
    moved = _at_last(stack)
    says = (
        "A vector at the last token changes the next layer's ratios, without a norm by (v W_q)(k_i - k_j)' / sqrt(k)."
    )
    measured = _next(stack, moved, moved)
    return Theorem("E3d vector, last token", says, "equal", predicted_change(stack), measured, EXACT)


def vector_at_all(seed: int = 0) -> Theorem:
    """A vector at all tokens moves the keys, too."""
    stack = Stack.random(seed)
    moved = stack.between + stack.vector
    says = "A vector at all tokens changes the next layer's ratios by as much: without a norm the keys' move cancels."
    measured = _next(stack, moved, moved)
    return Theorem("E3d vector, all tokens", says, "equal", predicted_change(stack), measured, EXACT)


def keys_alone(seed: int = 0) -> Theorem:
    """The keys' move without the query's."""
    stack = Stack.random(seed)
    says = "Without a norm, the keys' move alone changes no ratio."
    measured = _next(stack, stack.between, stack.between + stack.vector)
    return Theorem("E3d keys alone", says, "equal", 0.0, measured, EXACT)


def keys_alone_normed(seed: int = 0) -> Theorem:
    """The same behind a layer norm."""
    stack = Stack.random(seed, normed=True)
    says = "Behind a layer norm, the keys' move alone changes ratios."
    measured = _next(stack, stack.between, stack.between + stack.vector)
    return Theorem("E3d keys alone, norm", says, "at least", MOVES, measured, 0.0)


def prefix_next(seed: int = 0) -> Theorem:
    """A prefix, in the layer behind its own."""
    stack = Stack.random(seed)
    moved = stack.first(stack.entering, stack.prefix)
    says = "A prefix changes the next layer's ratios, too, through the states that leave its own."
    return Theorem("E3d prefix, next layer", says, "at least", MOVES, _next(stack, moved, moved), 0.0)


STATEMENTS: tuple[Callable[[int], Theorem], ...] = (
    prefix_here,
    vector_at_last,
    vector_at_all,
    keys_alone,
    keys_alone_normed,
    prefix_next,
)
