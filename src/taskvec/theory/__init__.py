"""Theory in numbers: what an adaptive task vector (ATV, Kang et al., arXiv 2506.03426) can and cannot imitate.

The paper sets its vectors against LoRA ("as expressive at equal rank") and prefix-tuning ("more expressive"). Each
statement is one small computation in float64 that puts a measured number beside a predicted one. With h the state at
an adapted site, z(x) the generator's features, v(x) = E z(x) + b, and D = h A' B' what a LoRA adds:

    E1   for every x there is a v with logits(h + v) = logits(LoRA)     trivial: it holds for any change of the model
    E2a  D = E z + b on all inputs, iff A h is read out of z linearly   conditional on the generator
    E2b  v = h W' on n inputs, for generic v iff n <= rank(H)           conditional on n
    E2c  v constant: no bias-free LoRA, but one where h has a constant coordinate or LoRA a bias       conditional
    E2d  rank of the stacked vectors <= generator width + 1, with a bottleneck of rank r <= r + 1      sharp
    E3a  head with prefix = (1 - rho) head + rho g, rho = Z_P / (Z_P + Z_X)                            an identity
    E3b  unnormalised linear attention: a prefix adds q P_k' P_v, rank <= m, linear in q               sharp
    E3c  two inputs of one query and one Z_X: a prefix misses by 1/2 min_t |T+ - T- - t (h+ - h-)|     sharp
    E3d  a prefix leaves the ratios of attention between content tokens, in its own layer              an identity

E1 is no evidence of equal rank. E2 speaks of two classes of functions that contain each other under conditions only.
E3 is right and sharp, read like this: E3c needs a vector that depends on the input (a static one misses T = 2 h by as
much as a prefix), and E3d speaks of one layer (a prefix changes the next layer's ratios, too).

`theorems(seed)` runs them all in seconds; `python -m taskvec.theory` prints them.
"""

from taskvec.theory import lora, pointwise, prefix, ratios
from taskvec.theory.statement import Theorem

__all__ = ["Theorem", "theorems"]


def theorems(seed: int = 0) -> tuple[Theorem, ...]:
    """Every statement, measured on random numbers of that seed. The global generator is not used."""
    parts = (pointwise, lora, prefix, ratios)
    return tuple(statement(seed) for part in parts for statement in part.STATEMENTS)
