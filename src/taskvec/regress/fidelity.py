"""Task fidelity: is it the task that a vector carries?

A vector of function f is injected where its queries say nothing of f, and its predictions are compared with f. So are
those under the vectors of other functions, on the same queries. With the mean squared errors L_own, L_wrong (over other
functions' vectors) and L_examples (the bare model behind as many own examples as it was trained on),

    fidelity = (L_wrong - L_own) / (L_wrong - L_examples)

0: a function's own vector is no better for it than another's, so what helps is no task content (a free constant, the
format). 1: as good as the examples. Below 0: its own vector is worse than another's. The interval is a percentile
bootstrap over functions, of the ratio of means. Where other functions' vectors do as well as the examples, there is
nothing to measure, and the score is None.

This measure is ours. An error alone cannot tell task content: a constant that is better for all functions lowers it.

Shapes: F functions.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from taskvec.results import Metric, bootstrap

LEAST = 0.05
"""The least gap between other functions' vectors and the examples, as a share of the variance of the values."""


def fidelity(
    own: Float[Tensor, " F"], wrong: Float[Tensor, " F"], examples: Float[Tensor, " F"], variance: float
) -> Metric | None:
    """The score of errors by function."""
    a, b, c = (part.double().numpy() for part in (own, wrong, examples))
    if b.mean() - c.mean() < LEAST * variance:
        return None

    def ratio(picked: NDArray[np.int64]) -> NDArray[np.float64]:
        gap = (b[picked] - c[picked]).mean(-1)
        gained = (b[picked] - a[picked]).mean(-1)
        return np.divide(  # type: ignore[no-any-return]
            gained, gap, out=np.full(gap.shape, np.nan), where=gap > 0
        )

    return bootstrap(ratio, len(a))
