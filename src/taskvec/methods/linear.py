"""Linear task vector (Kwon, Choi, Sohn, arXiv 2605.20730): a closed-form ridge map from zero-shot to few-shot states.

Shapes: N queries, d width of the site. Rows are queries here (the paper writes columns).

    H = zero-shot states (N, d)      Y = few-shot states - H (N, d)      G = H H' (N, N)
    W = argmin |Y - H W'|^2 + lam |W|^2        W h = (h H') A,   A = (G + lam I)^-1 Y        (dual form, float64)

and h + W h replaces h at the same site. The vector depends on the query; no gradient, no labels beyond the
demonstrations', no layer search.

Where we differ, on purpose: fitted and applied at one site, `lm_head_in` (the released code fits after the final norm
and adds before it); the factors H and A are kept instead of W, so that a vector has 2 N d numbers; the solve is
float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate import Fitting, at_least_one, single
from taskvec.lm import LM
from taskvec.sites import Site
from taskvec.tasks import Dev, Train
from taskvec.vector import Affine, Edit, TaskVector, Where


def ridge_dual(h: Float[Tensor, "N d"], y: Float[Tensor, "N d"], ridge: float) -> Float[Tensor, "N d"]:
    """A = (H H' + lam I)^-1 Y in float64: the dual coefficients of ridge without intercept (section 3 of the paper)."""
    h, y = h.double(), y.double()
    gram: Tensor = h @ h.T + ridge * torch.eye(len(h), dtype=h.dtype, device=h.device)
    coefficients: Tensor = torch.linalg.solve(gram, y)
    return coefficients.contiguous()  # it comes column by column, and a saved copy would multiply with other bits


@dataclass(frozen=True)
class LinearTaskVector:
    """`ridge`: lam, in the squared units of the states (paper: 5.0); `queries`: N, unlabelled (paper: 256); `site`:
    where states are read and edited; `where`: `last_prompt` (the released code) or `each_last` (the paper's appendix
    A.5)."""

    name: ClassVar[str] = "linear"
    ridge: float = 5.0
    queries: int = 256
    site: str = "lm_head_in"
    where: str = "last_prompt"

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Two passes over the queries and one solve. Dev is not used."""
        at_least_one(self, "queries")
        if not self.ridge > 0:
            raise InputError("a ridge above 0", f"linear.ridge = {self.ridge}", "raise it")
        train, dev = single(train, dev)
        site, where = Site.parse(self.site), Where.parse(self.where)
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            queries = train.queries(fitting.demos, self.queries, seed=seed)
            fitting.queries += len(queries)
            h = fitting.states(queries, [site])[site]
            y = fitting.states(queries, [site], shown=fitting.demos)[site].double() - h.double()
            op = Affine(read=h, write=ridge_dual(h, y, self.ridge).float())
            return TaskVector((Edit(site, op, where),), fitting.origin())
