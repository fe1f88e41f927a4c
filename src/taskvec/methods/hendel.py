"""Hendel task vector (Hendel, Geva, Globerson, arXiv 2310.15916): the few-shot state of a dummy query, put in its
place.

For demonstrations S and dummy queries x': theta_l = mean over x' of resid[l] at the last token of (S, x'); a query's
resid[l] at its last token is overwritten by theta_l. The layer is the one with the best dev accuracy.

Where we differ, on purpose: one set of demonstrations per seed, shared by all test items and by few-shot beside it (the
paper draws one per item); whole answers are scored, not their first token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from taskvec.evaluate import Fitting, at_least_one, choose, single
from taskvec.lm import LM
from taskvec.sites import Site
from taskvec.tasks import Dev, Train
from taskvec.vector import Edit, Replace, TaskVector


@dataclass(frozen=True)
class HendelTaskVector:
    """`layer`: where to replace (None: every layer is tried on dev); `dummies`: dummy queries averaged (paper: 2);
    `n_dev`: dev items the layer is chosen on (paper: 50 of its own)."""

    name: ClassVar[str] = "hendel"
    layer: int | None = None
    dummies: int = 2
    n_dev: int = 40

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Read theta at every candidate layer, choose one on dev. No gradient; the dummies' outputs are not read."""
        at_least_one(self, "dummies", "n_dev")
        train, dev = single(train, dev)
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            dummies = train.queries(fitting.demos, self.dummies, seed=seed)
            fitting.queries += len(dummies)
            layers = range(lm.n_layers) if self.layer is None else [self.layer]
            sites = [Site("resid", layer) for layer in layers]
            states = fitting.states(dummies, sites, shown=fitting.demos)
            candidates = [TaskVector((Edit(site, Replace(states[site].mean(0))),)) for site in sites]
            best = 0
            if len(candidates) > 1:
                fitting.labels += len(dev.examples[: self.n_dev])
                best = choose(lm, dev, candidates, limit=self.n_dev).best
            return TaskVector(candidates[best].edits, fitting.origin())
