"""Hendel task vector (Hendel, Geva, Globerson, arXiv 2310.15916): the few-shot state of a dummy query, put in its
place.

**Idea.** Behind demonstrations, the state of some middle layer at the last token is the task itself, hardly touched by
the query there. Read it once, and put it in place of a bare query's.

**Formula.** For demonstrations S and dummy queries x': theta_l = mean over x' of `resid[l]` at the last token of (S,
x'); a query's `resid[l]` at its last token is overwritten by theta_l. The layer is the one with the best dev
accuracy.

**Where we differ.** Written from the paper's description (the code has no licence). One set of demonstrations a seed,
shared by all test items and by few-shot beside it (the paper draws one an item); whole answers are scored, not their
first token.

**Cost.** `dummies` few-shot prompts, and a replay a layer and dev item. No gradient.

**When to use it.** As the cheapest look at where in depth a task is recognised. It edits one token: an answer of
several tokens often starts right and does not stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from taskvec.evaluate import Fitting, at_least_one, pick, single
from taskvec.lm import LM
from taskvec.sites import Site
from taskvec.tasks import Dev, Train
from taskvec.vector import Edit, Replace, TaskVector


@dataclass(frozen=True)
class HendelTaskVector:
    """`layer`: where to replace (None: every layer is tried on dev); `dummies`: dummy queries averaged (paper: 2);
    `n_dev`: dev items the layer is chosen on (paper: 50 of its own)."""

    name: ClassVar[str] = "hendel"
    cites: ClassVar[str] = "arXiv 2310.15916"
    sites: ClassVar[tuple[str, ...]] = ("resid",)
    ops: ClassVar[tuple[str, ...]] = ("replace",)
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    layer: int | None = None
    dummies: int = 2
    n_dev: int = 40

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Read theta at every candidate layer, choose one on dev. No gradient; the dummies' outputs are not read."""
        at_least_one(self, "dummies", "n_dev")
        train, dev = single(train, dev)
        lm.point(Site("resid", self.layer or 0))
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            dummies = train.queries(fitting.demos, self.dummies, seed=seed)
            fitting.queries += len(dummies)
            layers = range(lm.n_layers) if self.layer is None else [self.layer]
            sites = [Site("resid", layer) for layer in layers]
            states = fitting.states(dummies, sites, shown=fitting.demos)
            candidates = [TaskVector((Edit(site, Replace(states[site].mean(0))),)) for site in sites]
            best, accuracy = pick(fitting, dev, candidates, self.n_dev)
            found = {"layer": layers[best], "dev_accuracy": accuracy}
            return TaskVector(candidates[best].edits, fitting.origin(found=found))
