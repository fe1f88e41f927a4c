"""ICV, in-context vectors (Liu, Ye, Xing, Zou, arXiv 2311.06668): the common direction from inputs to outputs, in every
layer.

**Idea.** Demonstrations are pairs of texts: how it is, how it should be. The direction from one to the other, read at
the last token of each text alone, turns every token's latent state towards it while its norm is kept.

**Formula.** D_i = H(y_i) - H(x_i), H the last-token residual states of all layers side by side;

    direction = mean of D + the sum of the first `rank` principal directions of the centred D, cut into layers icv^l
    mlp[l] <- |x| normalize( normalize(x) + strength s normalize(icv^l) ),   s = 1 + max(0, cos(x, -icv^l))

at every token, prompt and answer (x = the MLP's output).

**Where we differ.** The edited site is a field: `mlp`, as the code does, or `resid`, as the paper says. The embedding's
row is dropped, and each layer gets its own (one re-implementation is off by one). The activation's dtype is kept.
`texts = pair` reads the rendered prompt and the prompt with its answer in place of the bare texts, which suits
classification better.

**Cost.** Two short texts a demonstration. No gradient, no choice on dev unless `strength` is None.

**When to use it.** For a change of style that shows in every token (register, case, sentiment). For tasks whose answer
depends on the query it often fails, and the tables say so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate import Fitting, at_least_one, pick, single
from taskvec.hooks import prove, require
from taskvec.lm import LM, Encoded
from taskvec.prompts import Example, PromptFormat
from taskvec.sites import Site
from taskvec.tasks import Dev, Train
from taskvec.vector import AddKeepNorm, Edit, TaskVector, Where

STRENGTHS = (0.05, 0.1, 0.2, 0.4, 0.8)


def direction(differences: Float[Tensor, "n w"], rank: int) -> Float[Tensor, " w"]:
    """The mean plus the sum of the first `rank` principal directions: unit vectors, signed as scikit-learn's PCA does
    (by the largest coordinate)."""
    from sklearn.decomposition import PCA

    mean = differences.double().mean(0)
    if rank == 0:
        return mean.float()
    components = PCA(n_components=rank, svd_solver="full").fit(differences.double().numpy()).components_
    return (mean + torch.from_numpy(components).sum(0)).float()


@dataclass(frozen=True)
class InContextVector:
    """Fields.

    - `strength`: lambda (paper: 0.1; None: chosen on dev among 0.05, 0.1, 0.2, 0.4, 0.8).
    - `rank`: principal directions added to the mean (paper: 1).
    - `site`: `mlp` (the code) or `resid` (the paper's words).
    - `texts`: `bare` input and output, or `pair`: the prompt without and with its answer.
    - `n_dev`: dev items the strength is chosen on.
    """

    name: ClassVar[str] = "icv"
    cites: ClassVar[str] = "arXiv 2311.06668"
    sites: ClassVar[tuple[str, ...]] = ("mlp",)
    ops: ClassVar[tuple[str, ...]] = ("add-keep-norm",)
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    strength: float | None = 0.1
    rank: int = 1
    site: Literal["mlp", "resid"] = "mlp"
    texts: Literal["bare", "pair"] = "bare"
    n_dev: int = 40

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Read both texts of every demonstration. Dev is used only where the strength is chosen."""
        train, dev = single(train, dev)
        self._check(lm, train)
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            rows = self.differences(fitting)
            layers = direction(rows.flatten(1), self.rank).reshape(rows.shape[1:])[1:]  # without the embedding's row
            strengths = STRENGTHS if self.strength is None else (self.strength,)
            candidates = [
                TaskVector(
                    tuple(
                        Edit(Site(self.site, layer), AddKeepNorm(row, steer), Where("all"))
                        for layer, row in enumerate(layers)
                    )
                )
                for steer in strengths
            ]
            best, _ = pick(fitting, dev, candidates, self.n_dev)
            return TaskVector(candidates[best].edits, fitting.origin(found={"strength": strengths[best]}))

    def _check(self, lm: LM, train: Train) -> None:
        at_least_one(self, "n_dev")
        if not 0 <= self.rank < train.spec.shots:
            raise InputError(
                f"a rank from 0 to {train.spec.shots - 1} (below the shots)", f"icv.rank = {self.rank}", "lower it"
            )
        if self.strength is not None and not self.strength > 0:
            raise InputError("a strength above 0", f"icv.strength = {self.strength}", "raise it")
        prove(lm)
        for layer in range(lm.n_layers):
            require(lm, Site(self.site, layer))

    def differences(self, fitting: Fitting) -> Float[Tensor, "n L1 d"]:
        """H(y_i) - H(x_i): the embedding, and the residual stream behind every block."""
        lm, format = fitting.lm, fitting.train.spec.format
        sites = [Site("embed"), *(Site("resid", layer) for layer in range(lm.n_layers))]
        pairs = [self._pair(lm, format, demo) for demo in fitting.show()]
        before, after = (fitting.states_of([pair[i] for pair in pairs], sites) for i in (0, 1))
        return torch.stack([after[site] - before[site] for site in sites], dim=1)

    def _pair(self, lm: LM, format: PromptFormat, demo: Example) -> tuple[Encoded, Encoded]:
        """A demonstration's two texts: input and output bare, or its prompt without and with the answer."""
        if self.texts == "bare":
            return lm.encode(demo.input), lm.encode(demo.output)
        prompt = format.prompt(demo.input)
        asked = lm.encode(prompt)
        return asked, lm.encode(Encoded(asked.ids + lm.answer_ids(prompt, demo.output, format, terminator=False)))
