"""Mean difference: the mean of (few-shot state - zero-shot state), added. The simplest vector, and a control.

**Idea.** What demonstrations change in a state, on average over queries. A method that does no better has found no more
than a constant.

**Formula.** theta_s = mean over queries x of h_icl(x) - h_zs(x) at site s and the last prompt token, added there. It
is the "Vanilla TV" of the Learned TV paper (arXiv 2509.24169) with a mean in place of one query, and at `lm_head_in`
the constant-map ablation of the Linear TV paper (arXiv 2605.20730, appendix A.7), where it is a constant bias of the
logits.

**Where we differ.** The site is chosen on dev among all layers and `lm_head_in` unless it is named.

**Cost.** Two prompts a query, one of them behind the demonstrations, and a replay a site and dev item. No gradient.

**When to use it.** It stands in every table without being asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from taskvec.evaluate import Fitting, at_least_one, changed_by_context, pick, single
from taskvec.lm import LM
from taskvec.sites import Site
from taskvec.tasks import Dev, Train
from taskvec.vector import Add, Edit, TaskVector


@dataclass(frozen=True)
class MeanDifference:
    """`site`: where to add (None: every `resid[l]` and `lm_head_in` are tried on dev); `queries`: unlabelled queries
    averaged; `n_dev`: dev items the site is chosen on."""

    name: ClassVar[str] = "mean-difference"
    cites: ClassVar[str] = "arXiv 2509.24169, arXiv 2605.20730"
    sites: ClassVar[tuple[str, ...]] = ("resid", "lm_head_in")
    ops: ClassVar[tuple[str, ...]] = ("add",)
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    site: str | None = None
    queries: int = 64
    n_dev: int = 40

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Average the differences at every candidate site, choose one on dev. No gradient, no query's output read."""
        at_least_one(self, "queries", "n_dev")
        train, dev = single(train, dev)
        if self.site is not None:
            changed_by_context(lm, Site.parse(self.site))
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            queries = train.queries(fitting.demos, self.queries, seed=seed)
            fitting.queries += len(queries)
            everywhere = [*(Site("resid", layer) for layer in range(lm.n_layers)), Site("lm_head_in")]
            sites = everywhere if self.site is None else [Site.parse(self.site)]
            zero, few = fitting.states(queries, sites), fitting.states(queries, sites, shown=fitting.demos)
            thetas = [(few[site] - zero[site]).mean(0) for site in sites]
            candidates = [TaskVector((Edit(site, Add(theta)),)) for site, theta in zip(sites, thetas, strict=True)]
            best, accuracy = pick(fitting, dev, candidates, self.n_dev)
            found = {"site": str(sites[best]), "dev_accuracy": accuracy}
            return TaskVector(candidates[best].edits, fitting.origin(found=found))
