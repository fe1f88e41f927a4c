"""Linear task vector (Kwon, Choi, Sohn, arXiv 2605.20730): a closed-form ridge map from zero-shot to few-shot states.

**Idea.** A task vector should make the zero-shot model predict what the few-shot model predicts. Collect states of
unlabelled queries with and without the demonstrations, and fit one ridge map from the zero-shot state to the
difference. The vector W h(x) depends on the query.

**Formula.** Shapes: N queries, d width of the site. Rows are queries here (the paper writes columns).

    H = zero-shot states (N, d)      Y = few-shot states - H (N, d)      G = H H' (N, N)
    W = argmin |Y - H W'|^2 + lam |W|^2        W h = (h H') A,   A = (G + lam I)^-1 Y        (dual form, float64)

and h + W h replaces h at the same site.

**Where we differ.** Fitted and applied at one site, `lm_head_in` (the released code fits after the final norm and
adds before it). The factors H and A are kept instead of W: 2 N d numbers; with `labels_only` W is cut down to what
the labels see, 2 K d numbers for K labels. The solve is float64. `ridge = loo` chooses lam by closed-form
leave-one-out on the queries, `intercept` centres both sides; the paper has neither. `found` reports lam, the
effective degrees of freedom tr(G (G + lam I)^-1), and lam over the mean squared norm of h.

**Cost.** Two prompts a query, one of them behind the demonstrations, and one N x N solve. No gradient, no labels beyond
the demonstrations', no search over layers.

**When to use it.** On tasks with labels, to come close to the few-shot distribution. Its teacher caps it: where
few-shot is wrong, so is it. It edits the answer's first token only, unless `where = each_last`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate import Fitting, at_least_one, changed_by_context, need_labels, reaching, single
from taskvec.evaluate.observe import first_tokens
from taskvec.evaluate.ridge import check_ridge, solve
from taskvec.lm import LM
from taskvec.sites import Site
from taskvec.tasks import Dev, Train
from taskvec.vector import Affine, Edit, TaskVector


def seen_by_labels(op: Affine, rows: Float[Tensor, "K d"]) -> Affine:
    """The map cut down to what K unembedding rows see: P W and P b with P the projection on their span.

    The labels' logits stay as they are; the map has rank K. Raises `InputError` where rows depend on each other.
    """
    rows = rows.double()
    _check_rank(rows)
    back = torch.linalg.pinv(rows).T  # (K, d): U_C back' = I
    read = (op.write.double() @ rows.T).T @ op.read.double()
    bias = None if op.bias is None else ((rows @ op.bias.double()) @ back).float()
    return Affine(read.float().contiguous(), back.float().contiguous(), bias)


def _check_rank(rows: Float[Tensor, "K d"]) -> None:
    if int(torch.linalg.matrix_rank(rows)) < len(rows):
        found = f"{len(rows)} labels whose first tokens have dependent rows"
        raise InputError(
            "labels with first tokens of their own, for labels_only", found, "rename labels or switch it off"
        )


def label_rows(lm: LM, train: Train) -> Float[Tensor, "K d"]:
    """The unembedding rows of the labels' first tokens."""
    ids = [tokens[0] for tokens in first_tokens(lm, train)]
    return lm.model.get_output_embeddings().weight[ids].detach().float().cpu()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LinearTaskVector:
    """Fields.

    - `ridge`: lam, in the squared units of the states (paper: 5.0), or `loo`: by leave-one-out.
    - `queries`: N, unlabelled (paper: 256); `site`: where states are read and edited.
    - `where`: `last_prompt` (the released code) or `each_last` (the paper's appendix A.5).
    - `intercept`: centre states and differences; `labels_only`: keep what the labels' rows of the head see.
    - `pairing`: `shuffled` fits each state to another query's difference (a control: a mean difference that only
      looks query-dependent).
    """

    name: ClassVar[str] = "linear"
    cites: ClassVar[str] = "arXiv 2605.20730"
    sites: ClassVar[tuple[str, ...]] = ("lm_head_in",)
    ops: ClassVar[tuple[str, ...]] = ("affine",)
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    ridge: float | Literal["loo"] = 5.0
    queries: int = 256
    site: str = "lm_head_in"
    where: str = "last_prompt"
    intercept: bool = False
    labels_only: bool = False
    pairing: Literal["own", "shuffled"] = "own"

    def shuffled(self) -> "LinearTaskVector":
        """The control that stands beside it: differences that belong to other queries."""
        return replace(self, pairing="shuffled")

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Two passes over the queries and one solve. Dev is not used."""
        train, dev = single(train, dev)
        self._check(lm, train)
        site, where = Site.parse(self.site), reaching(lm, train, self.where)
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            queries = train.queries(fitting.demos, self.queries, seed=seed)
            fitting.queries += len(queries)
            h = fitting.states(queries, [site])[site]
            y = fitting.states(queries, [site], shown=fitting.demos)[site].double() - h.double()
            if self.pairing == "shuffled":
                y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
            solved = solve(h, y, self.ridge, intercept=self.intercept)
            bias = solved.bias.float() if self.intercept else None
            op = Affine(solved.read.float(), solved.write.float(), bias)
            if self.labels_only:
                op = seen_by_labels(op, label_rows(lm, train))
            return TaskVector((Edit(site, op, where),), fitting.origin(found=solved.found))

    def _check(self, lm: LM, train: Train) -> None:
        at_least_one(self, "queries")
        check_ridge("linear.ridge", self.ridge)
        changed_by_context(lm, Site.parse(self.site))
        if self.labels_only:
            need_labels(train.spec, "linear.labels_only")
            if self.site != "lm_head_in":
                raise InputError("site = lm_head_in, for labels_only", self.site, "change one of the two")
            _check_rank(label_rows(lm, train).double())
