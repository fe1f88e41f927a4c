"""Linear probe, a rival: logistic regression on the bare query's state. It asks what the labels alone could do.

**Idea.** The zero-shot state already holds much of the answer; a classifier on it needs no vector. With few-shot
predictions as targets it is the hard-label relative of the Linear task vector; with gold labels, its ceiling.

**Formula.** p(label | x) = softmax(W h(x) + b), h = the state at `site` behind the zero-shot prompt, standardised;
L2-regularised, its strength by cross-validation (scikit-learn).

**Where we differ.** Nothing to differ from: it is the control of the papers' reviewers.

**Cost.** One zero-shot prompt a query, `few-shot` targets one few-shot prompt more. A query costs a bare prompt.

**When to use it.** On tasks with labels, beside every vector. It predicts labels only: no text, no d_ntp_full.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate import Fitting, need_labels, single
from taskvec.evaluate.observe import NEVER, encode_answers
from taskvec.lm import LM, Encoded
from taskvec.prompts import Example
from taskvec.replay import Ask, Trial, replay
from taskvec.sites import Site
from taskvec.tasks import Dev, Train
from taskvec.vector import Origin


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier on a state: a predictor."""

    weight: Float[Tensor, "K d"]
    bias: Float[Tensor, " K"]
    site: Site
    origin: Origin

    def label_logprobs(self, lm: LM, prompts: Sequence[Encoded]) -> Float[Tensor, "n K"]:
        """log softmax(W h + b) of each prompt."""
        h = replay(lm, prompts).answer([Trial(i) for i in range(len(prompts))], Ask(states=(self.site,)))
        return (h.states[self.site].double() @ self.weight.T + self.bias).log_softmax(-1)


@dataclass(frozen=True)
class LinearProbe:
    """Fields.

    - `target`: `gold` labels or the `few-shot` prompt's predictions (pseudo-labels: no label but the demonstrations').
    - `queries`: training items (0: the demonstrations alone, with gold labels); `site`: where the state is read.
    - `folds`: of the cross-validation of the regularisation.
    """

    name: ClassVar[str] = "linear-probe"
    cites: ClassVar[str] = "scikit-learn, LogisticRegressionCV"
    sites: ClassVar[tuple[str, ...]] = ("lm_head_in",)
    ops: ClassVar[tuple[str, ...]] = ()
    needs_labels: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False
    target: Literal["gold", "few-shot"] = "gold"
    queries: int = 256
    site: str = "lm_head_in"
    folds: int = 5

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> Probe:
        """Read states, fit. Dev is not used."""
        train, dev = single(train, dev)
        names = need_labels(train.spec, self.name)
        site = Site.parse(self.site)
        lm.point(site)
        if self.folds < 2:
            raise InputError("at least two folds", f"linear-probe.folds = {self.folds}", "raise it")
        if self.queries < 0 or (self.queries == 0 and self.target == "few-shot"):
            raise InputError("queries to predict", f"linear-probe.queries = {self.queries}", "raise it")
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            examples = train.queries(fitting.demos, self.queries, seed=seed) if self.queries else fitting.demos
            targets = self._targets(fitting, examples)
            weight, bias, strength = _fitted(fitting.states(examples, [site])[site], targets, names, self.folds)
            return Probe(weight, bias, site, fitting.origin(found={"C": strength, "items": len(examples)}))

    def _targets(self, fitting: Fitting, examples: Sequence[Example]) -> list[str]:
        if self.target == "gold":
            fitting.read |= {example.input for example in examples}
            return [example.output for example in examples]
        fitting.queries += len(examples)
        lm, train = fitting.lm, fitting.train
        prompts = [lm.encode(train.spec.format.prompt(example.input, fitting.show())) for example in examples]
        _, labels, _ = encode_answers(lm, train, fitting.demos)
        logs = replay(lm, prompts).answer([Trial(i) for i in range(len(prompts))], Ask(labels=labels)).label_logprobs
        assert train.spec.labels is not None
        return [train.spec.labels[int(i)] for i in logs.argmax(-1)]


def _fitted(
    h: Float[Tensor, "n d"], targets: Sequence[str], names: Sequence[str], folds: int
) -> tuple[Tensor, Tensor, float | None]:
    """(K, d) weights and biases on raw states, and the chosen strength. Labels without items are never predicted."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

    centre, spread = h.double().mean(0), h.double().std(0).clamp_min(1e-8)
    x = ((h.double() - centre) / spread).numpy()
    there = [name for name in names if name in set(targets)]
    weight, bias = torch.zeros(len(names), h.shape[1], dtype=torch.float64), torch.full((len(names),), NEVER).double()
    rows = [names.index(name) for name in there]
    if len(there) == 1:
        bias[rows] = 0.0
        return weight, bias, None
    least = min(targets.count(name) for name in there)
    model: Any = LogisticRegression(C=0.01, max_iter=1000)
    if least >= 2:
        model = LogisticRegressionCV(Cs=[1e-4, 1e-3, 1e-2, 1e-1, 1.0], cv=min(folds, least), max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, and of defaults that scikit-learn is about to change
        model.fit(x, [there.index(name) for name in targets])
    w, b = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(there) == 2:  # one row for both
        w, b = torch.cat([-w / 2, w / 2]), torch.cat([-b / 2, b / 2])
    weight[rows] = w / spread
    bias[rows] = b - (w / spread) @ centre
    chosen = getattr(model, "C_", None)
    return weight, bias, float(chosen[0]) if chosen is not None else None
