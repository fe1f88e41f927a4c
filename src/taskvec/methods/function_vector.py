"""Function vector (Todd, Li, Sen Sharma, Mueller, Wallace, Bau, arXiv 2310.15213): the summed mean outputs of a few
heads.

**Idea.** A few attention heads carry the task at the last token of a few-shot prompt. Find them by causal mediation on
prompts whose labels are shuffled, and add what they write on average to the residual stream of a bare query.

**Formula.** Over clean few-shot prompts, abar_lj = mean of head (l, j)'s output at the last token. Over prompts with
shuffled labels, the average indirect effect of a head is

    AIE_lj = mean of [ p(answer | head (l, j) at the last token replaced by abar_lj) - p(answer) ]

and with A the heads of the largest AIE, FV = sum over A of W_O[:, slot j] abar_lj, added to `resid[l]`.

**Where we differ.** The projection's bias is left out (the released code adds it once for each head). Heads are found
for this model and this task; nothing is filtered by what the model already answers. The layer is chosen on dev (the
paper: about a third of the depth). `each_last` is what the released code does, `last_prompt` the default. In families
with a norm after attention the sum is taken before that norm, as the formula says.

**Cost.** `prompts` few-shot prompts, then `trials` x heads x one token by replay; no gradient unless `prefilter` is
set: then one backward pass a trial ranks all heads by first-order attribution, and only the best are confirmed
exactly.

**When to use it.** To learn which heads carry a task, and for a vector that is a sum of head outputs. `found` names the
heads and their effects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate import Fitting, at_least_one, pick, reaching, single
from taskvec.evaluate.choose import Gold, goodness
from taskvec.evaluate.drawing import (
    draw,
    encode_drawn,
    head_sites,
    labels_read,
    mean_heads,
    need_two_shots,
    projected_heads,
)
from taskvec.lm import LM, Encoded
from taskvec.replay import Ask, Trial, replay
from taskvec.replay.trials import first_edited
from taskvec.sites import Site
from taskvec.tasks import Dev, Train
from taskvec.vector import Add, Edit, Replace, TaskVector, Where

Head = tuple[int, int]
NOTHING = TaskVector(())
"""No vector."""


def indirect_effects(
    lm: LM,
    prompts: Sequence[Encoded],
    golds: Sequence[Gold],
    means: Float[Tensor, "*own L J w"],
    heads: Sequence[Head],
    *,
    base: TaskVector = NOTHING,
) -> Float[Tensor, "n k"]:
    """p(gold) with one head's last-token output replaced by its mean, minus p(gold) without: per prompt and head, both
    under the `base` vector. Means are the same for all prompts, or each prompt's own. Of a function learner: what the
    squared error falls by."""
    rows = means if means.dim() == 4 else means[None]
    patches = [
        [TaskVector((*base.edits, Edit(Site("heads", *head), Replace(row[head])))) for head in heads] for row in rows
    ]
    own = patches if means.dim() == 4 else patches * len(prompts)  # one patch for all acts once in a pass
    trials = [Trial(i, patch) for i, mine in enumerate(own) for patch in (base, *mine)]

    def keep(trial: int, logits: Tensor) -> Tensor:
        return goodness(lm, logits, golds[trials[trial].prompt])

    starts = [first_edited(prompt, base) for prompt in prompts]
    kept = replay(lm, prompts, starts=starts).answer(trials, Ask(keep=keep)).kept.reshape(len(prompts), -1)
    return kept[:, 1:] - kept[:, :1]


def attributions(
    lm: LM,
    prompts: Sequence[Encoded],
    golds: Sequence[Gold],
    means: Float[Tensor, "L J w"],
    *,
    base: TaskVector = NOTHING,
) -> Float[Tensor, "n L J"]:
    """The same to first order, for all heads from one backward pass a prompt: grad of p(gold) by the head's output,
    times (mean - output)."""
    sites = head_sites(lm)
    engine = replay(lm, prompts, starts=[first_edited(prompt, base) for prompt in prompts])
    states = engine.answer([Trial(i, base) for i in range(len(prompts))], Ask(states=tuple(sites))).states
    nudges = [torch.zeros(len(sites), means[0].numel(), requires_grad=True) for _ in prompts]
    trials = [Trial(i, TaskVector((*base.edits, *_nudged(sites, row).edits))) for i, row in enumerate(nudges)]
    with lm.frozen(), torch.enable_grad():
        for numbers, logits in engine.batches(trials):
            total = [goodness(lm, out[-1].float(), golds[i]) for i, out in zip(numbers, logits, strict=True)]
            torch.stack(total).sum().backward()  # type: ignore[no-untyped-call]
    gradients = torch.stack([nudge.grad for nudge in nudges if nudge.grad is not None])
    away = means.flatten(1)[None] - torch.stack([states[site] for site in sites], dim=1)
    return (gradients * away).reshape(len(prompts), *means.shape).sum(-1)


def _nudged(sites: Sequence[Site], rows: Float[Tensor, "L w"]) -> TaskVector:
    return TaskVector(tuple(Edit(site, Add(row)) for site, row in zip(sites, rows, strict=True)))


@dataclass(frozen=True)
class FunctionVector:
    """Fields.

    - `heads`: how many heads are summed (paper: 10 for GPT-J, more for larger models).
    - `prompts`: clean few-shot prompts averaged (paper: 100), each with demonstrations of its own; `shared`: all behind
      the seed's demonstrations instead, which costs only their queries.
    - `trials`: prompts with shuffled labels (paper: 25).
    - `prefilter`: 0 measures every head; k measures the k heads of the largest attribution.
    - `layer`: where to add (None: every layer is tried on dev); `where`: `last_prompt` or `each_last`.
    - `n_dev`: dev items the layer is chosen on.
    """

    name: ClassVar[str] = "function-vector"
    cites: ClassVar[str] = "arXiv 2310.15213"
    sites: ClassVar[tuple[str, ...]] = ("resid",)
    ops: ClassVar[tuple[str, ...]] = ("add",)
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    heads: int = 10
    prompts: int = 100
    shared: bool = False
    trials: int = 25
    prefilter: int = 0
    layer: int | None = None
    where: str = "last_prompt"
    n_dev: int = 40

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Average the heads, measure their effects, sum the best, choose the layer on dev."""
        train, dev = single(train, dev)
        where = self._check(lm, train)
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            means = mean_heads(fitting, self._clean(fitting))
            ranked, effects = self._ranked(fitting, means)
            chosen = ranked[: self.heads]
            written = projected_heads(lm, means)
            vector = torch.stack([written[head] for head in chosen]).sum(0)
            layers = list(range(lm.n_layers)) if self.layer is None else [self.layer]
            candidates = [TaskVector((Edit(Site("resid", layer), Add(vector), where),)) for layer in layers]
            best, accuracy = pick(fitting, dev, candidates, self.n_dev)
            found = {"layer": layers[best], "heads": chosen, "effects": effects[: self.heads], "dev_accuracy": accuracy}
            return TaskVector(candidates[best].edits, fitting.origin(found=found))

    def _check(self, lm: LM, train: Train) -> Where:
        at_least_one(self, "heads", "prompts", "trials", "n_dev")
        need_two_shots(train, self.name)
        count = lm.n_layers * lm.n_heads
        if self.heads > count or (self.prefilter and not self.heads <= self.prefilter <= count):
            found = f"heads = {self.heads}, prefilter = {self.prefilter}"
            raise InputError(
                f"heads <= prefilter <= the {count} heads of {lm.id} (prefilter 0: all)", found, "mend them"
            )
        head_sites(lm)
        lm.point(Site("resid", self.layer or 0))
        return reaching(lm, train, self.where)

    def _clean(self, fitting: Fitting) -> list[Encoded]:
        train, lm = fitting.train, fitting.lm
        if self.shared:
            queries = train.queries(fitting.demos, self.prompts, seed=fitting.seed)
            fitting.queries += len(queries)
            return [lm.encode(train.spec.format.prompt(query.input, fitting.show())) for query in queries]
        drawn = draw(train, self.prompts, seed=fitting.seed)
        fitting.read |= labels_read(drawn, queries=False)
        fitting.queries += len({one.query.input for one in drawn})
        return encode_drawn(lm, train, drawn)[0]

    def _ranked(self, fitting: Fitting, means: Float[Tensor, "L J w"]) -> tuple[list[Head], list[float]]:
        """Heads by their average indirect effect, the largest first, and the effects."""
        lm = fitting.lm
        drawn = draw(fitting.train, self.trials, seed=fitting.seed, shuffled=True)
        fitting.read |= labels_read(drawn, queries=True)
        prompts, answers = encode_drawn(lm, fitting.train, drawn)
        golds = [answer[0] for answer in answers]
        heads = [(layer, head) for layer in range(lm.n_layers) for head in range(lm.n_heads)]
        if self.prefilter:
            first_order = attributions(lm, prompts, golds, means).mean(0).flatten()
            heads = [heads[i] for i in sorted(first_order.argsort(descending=True)[: self.prefilter].tolist())]
        effects = indirect_effects(lm, prompts, golds, means, heads).mean(0)
        order = effects.argsort(descending=True, stable=True).tolist()
        return [heads[i] for i in order], [float(effects[i]) for i in order]
