"""Calibration (Zhao et al., arXiv 2102.09690; Zhou et al., arXiv 2309.17249), a rival: the model's own label
probabilities, divided by what it says of nothing.

**Idea.** Much of what a vector does on labels may be the removal of a bias towards one of them. Calibration removes
that bias and nothing else, without labels or gradients.

**Formula.** argmax over labels of p(label | x) / pbar(label), where pbar is

    contextual  the mean over content-free inputs "N/A", "" and "[MASK]"
    batch       the mean over unlabelled queries

**Where we differ.** Label probabilities are those of whole labels, renormalised over the labels. For `batch`, pbar is
the mean of probabilities (not of logarithms) over queries of train, never over the test items. Zero-shot prompts by
default, because that is the price a vector has; `prompt = few-shot` is the papers' own use.

**Cost.** Three prompts, or `queries`. A query costs its prompt.

**When to use it.** On tasks with labels, beside every vector. It predicts labels only: no text, no d_ntp_full.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from taskvec.evaluate import Fitting, at_least_one, need_labels, single
from taskvec.evaluate.observe import encode_answers
from taskvec.lm import LM, Encoded
from taskvec.replay import Ask, Trial, replay
from taskvec.tasks import Dev, Train
from taskvec.vector import Origin

CONTENT_FREE = ("N/A", "", "[MASK]")


@dataclass(frozen=True, eq=False)
class Calibrated:
    """The model's label distribution over a prior: a predictor."""

    labels: tuple[tuple[int, ...], ...]
    prior: Float[Tensor, " K"]
    origin: Origin

    def label_logprobs(self, lm: LM, prompts: Sequence[Encoded]) -> Float[Tensor, "n K"]:
        """log of p / pbar, renormalised."""
        return (label_logs(lm, prompts, self.labels) - self.prior.log()).log_softmax(-1)


def label_logs(lm: LM, prompts: Sequence[Encoded], labels: tuple[tuple[int, ...], ...]) -> Float[Tensor, "n K"]:
    """The model's log-probabilities of whole labels, renormalised over them."""
    answers = replay(lm, prompts).answer([Trial(i) for i in range(len(prompts))], Ask(labels=labels))
    return answers.label_logprobs.double().log_softmax(-1)


@dataclass(frozen=True)
class Calibration:
    """Fields.

    - `how`: `contextual` or `batch`; `queries`: unlabelled ones, for `batch`.
    - `prompt`: calibrate zero-shot or few-shot prompts.
    """

    name: ClassVar[str] = "calibration"
    cites: ClassVar[str] = "arXiv 2102.09690, arXiv 2309.17249"
    sites: ClassVar[tuple[str, ...]] = ()
    ops: ClassVar[tuple[str, ...]] = ()
    needs_labels: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False
    how: Literal["contextual", "batch"] = "contextual"
    queries: int = 128
    prompt: Literal["zero-shot", "few-shot"] = "zero-shot"

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> Calibrated:
        """Run the content-free inputs, or the queries. Dev is not used."""
        train, dev = single(train, dev)
        names = need_labels(train.spec, self.name)
        at_least_one(self, "queries")
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            shown = fitting.show() if self.prompt == "few-shot" else ()
            inputs: Sequence[str] = CONTENT_FREE
            if self.how == "batch":
                inputs = [query.input for query in train.queries(fitting.demos, self.queries, seed=seed)]
                fitting.queries += len(inputs)
            prompts = [lm.encode(train.spec.format.prompt(text, shown)) for text in inputs]
            _, labels, _ = encode_answers(lm, train, shown)
            prior = label_logs(lm, prompts, labels).exp().mean(0)
            found = {"prior": dict(zip(names, prior.tolist(), strict=True))}
            return Calibrated(labels, prior, fitting.origin(prompt=self.prompt, found=found))
