"""Task fidelity: is it the task that a vector carries?

A vector of function f is injected where its queries say nothing of f (no examples, or examples of other functions), and
its predictions are compared with f. With the mean squared errors L_own under the vector, L_zero of predicting 0, and
L_examples of the bare model behind as many examples of f as it was trained on,

    fidelity = (L_zero - L_own) / (L_zero - L_examples)

1: as good as the examples. 0: as good as 0, and no prediction that does not depend on f does better, because the
classes of functions are symmetric about 0: so a vector without the task, a constant, a better format cannot get above 0
but by chance. Below 0: something else is computed, another function for one. A vector that computes a f scores
1 - (1 - a)^2. Every control is scored by the same formula on the same queries. The interval is a percentile bootstrap
over functions, of the ratio of means. Where the examples do not do clearly better than 0 there is nothing to measure:
None.

This measure is ours. An error alone cannot tell task content behind a function's own examples: there a constant that
helps all functions lowers it.

Shapes: F functions.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from taskvec.results import Metric, bootstrap


def fidelity(own: Float[Tensor, " F"], zero: Float[Tensor, " F"], examples: Float[Tensor, " F"]) -> Metric | None:
    """The score of errors by function."""
    a, b, c = (part.double().numpy() for part in (own, zero, examples))
    if bootstrap(lambda picked: (b[picked] - c[picked]).mean(-1), len(a)).low <= 0:
        return None

    def ratio(picked: NDArray[np.int64]) -> NDArray[np.float64]:
        gap = (b[picked] - c[picked]).mean(-1)
        gained = (b[picked] - a[picked]).mean(-1)
        return np.divide(  # type: ignore[no-any-return]
            gained, gap, out=np.full(gap.shape, np.nan), where=gap > 0
        )

    return bootstrap(ratio, len(a))
