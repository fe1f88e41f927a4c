"""The methods on many functions at once: what depends on the class of functions is fitted on some (`teach`), chosen on
others (`look`), and every function then gets a vector of its own from its own support, all by the same passes.

Each is made of its method's parts (`taskvec.methods`); only the loop over functions is new: one batch of replays.

Shapes: F functions, P prompts of each, L layers, J heads, w width of a head, d width of the residual stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from taskvec.evaluate.drawing import projected_heads
from taskvec.evaluate.ridge import solve
from taskvec.methods.function_vector import indirect_effects
from taskvec.methods.icv import STRENGTHS, direction
from taskvec.regress.ground import Prompts, Support, owners, states, whole
from taskvec.regress.learner import Learner
from taskvec.replay import Ask, Trial
from taskvec.replay.trials import first_edited
from taskvec.sites import Site
from taskvec.vector import Add, AddKeepNorm, Affine, Edit, TaskVector, Where

HEAD = Site("lm_head_in")
Write = Callable[[Support], list[TaskVector]]
"""From the support of some functions to a vector for each."""


@runtime_checkable
class Writer(Protocol):
    """A method on many functions."""

    @property
    def name(self) -> str:
        """As in rows."""
        ...

    def fit(self, learner: Learner, teach: Support, look: Support, *, seed: int) -> Write:
        """What is fitted on the class."""
        ...


@dataclass(frozen=True, eq=False)
class Asked:
    """Of C candidates: predictions, and the last states where they were asked for (width 0 elsewhere)."""

    predictions: Float[Tensor, "C F P"]
    states: Float[Tensor, "C FP d"]


def ask(prompts: Prompts, candidates: Sequence[Sequence[TaskVector | None]], *, states: bool = False) -> Asked:
    """Run the prompts under each candidate: one vector (or none) for each function."""
    who = owners(prompts)
    trials = [Trial(i, vectors[f]) for vectors in candidates for i, f in enumerate(who)]
    pairs = list(zip(prompts.encoded, who, strict=True))
    last = all(first_edited(prompt, vectors[f]) == len(prompt) - 1 for vectors in candidates for prompt, f in pairs)
    engine = prompts.engine if last else whole(prompts.learner, prompts.encoded)
    found = engine.answer(trials, Ask(keep=lambda _, logits: logits, states=(HEAD,) if states else ()))
    rows = found.states[HEAD] if states else torch.zeros(len(trials), 0)
    shape = (len(candidates), prompts.count, prompts.per)
    return Asked(found.kept.reshape(shape), rows.reshape(len(candidates), len(who), -1))


def head_means(clean: Prompts, *, first: int = 0) -> Float[Tensor, "F L J w"]:
    """The mean output of every head at the query, for each function, over its prompts from `first` on."""
    return clean.heads[:, first:].mean(1)


def best_of(prompts: Prompts, candidates: Sequence[Sequence[TaskVector]]) -> int:
    """The candidate with the smallest error."""
    found = ask(prompts, candidates).predictions - prompts.values
    return int(found.square().mean((1, 2)).argmin())


@dataclass(frozen=True)
class FunctionVectors:
    """Function vector: the heads with the largest mean indirect effect over functions (the means of a function's other
    prompts put into its first one, with permuted values), each function's own mean outputs, the layer chosen on
    `look`. `share` of all heads is summed (the published 35 of 96)."""

    name: ClassVar[str] = "function-vector"
    share: float = 35 / 96

    def fit(self, learner: Learner, teach: Support, look: Support, *, seed: int) -> Write:
        """Rank the heads, choose the layer."""
        means = head_means(teach.clean, first=min(1, teach.clean.per - 1))
        heads = [(layer, head) for layer in range(learner.n_layers) for head in range(learner.n_heads)]
        corrupt = teach.clean.permuted(seed=seed)
        one = [f * corrupt.per for f in range(corrupt.count)]
        golds = teach.clean.values[:, 0].tolist()
        effects = indirect_effects(learner, [corrupt.encoded[i] for i in one], golds, means, heads).mean(0)
        order = effects.argsort(descending=True, stable=True).tolist()
        chosen = [heads[i] for i in order[: max(1, round(self.share * len(heads)))]]

        def summed(support: Support) -> list[Tensor]:
            written = (projected_heads(learner, mine) for mine in head_means(support.clean))
            return [torch.stack([rows[head] for head in chosen]).sum(0) for rows in written]

        def at(layer: int, rows: Sequence[Tensor]) -> list[TaskVector]:
            return [TaskVector((Edit(Site("resid", layer), Add(row)),)) for row in rows]

        tried = summed(look)
        best = best_of(look.placed, [at(layer, tried) for layer in range(learner.n_layers)])
        return lambda support: at(best, summed(support))


@dataclass(frozen=True)
class InContextVectors:
    """ICV as the regression paper has it: behind every block, the state at the last shown value minus that at its
    point, at unit length; mean plus first principal direction over a function's prompts, layer by layer; added to all
    tokens, norms kept. The strength is chosen on `look`, the paper's 1.5 among them."""

    name: ClassVar[str] = "icv"
    strengths: tuple[float, ...] = (*STRENGTHS, 1.5)

    def fit(self, learner: Learner, teach: Support, look: Support, *, seed: int) -> Write:
        """Choose the strength."""

        def rows(support: Support) -> list[Float[Tensor, "L d"]]:
            gaps = normalize(self.differences(learner, support.clean), dim=-1)
            rank = min(1, gaps.shape[1] - 1)
            return [torch.stack([direction(one[:, layer], rank) for layer in range(one.shape[1])]) for one in gaps]

        def steered(found: Sequence[Tensor], strength: float) -> list[TaskVector]:
            return [
                TaskVector(tuple(self.edit(layer, part, strength) for layer, part in enumerate(row))) for row in found
            ]

        tried = rows(look)
        best = self.strengths[best_of(look.placed, [steered(tried, strength) for strength in self.strengths])]
        return lambda support: steered(rows(support), best)

    def edit(self, layer: int, row: Float[Tensor, " d"], strength: float) -> Edit:
        """One layer's."""
        return Edit(Site("resid", layer), AddKeepNorm(row, strength), Where("all"))

    def differences(self, learner: Learner, clean: Prompts) -> Float[Tensor, "F P L d"]:
        """h(y_k) - h(x_k) of the last example, behind every block."""
        x, y = clean.x.flatten(0, 1)[:, :-1], clean.y.flatten(0, 1)[:, :-1]
        sites = [Site("resid", layer) for layer in range(learner.n_layers)]
        asked, told = learner.all_points(x, y[:, :-1]), learner.all_points(x, y)
        before, after = states(learner, asked, sites), states(learner, told, sites)
        gaps = torch.stack([after[site] - before[site] for site in sites], 1)
        return gaps.reshape(clean.count, clean.per, *gaps.shape[1:])


@dataclass(frozen=True)
class LinearVectors:
    """Linear task vector: for each function the ridge map from the state where its queries stand to what its own
    examples change of it (at the input of the read-out; ridge by leave-one-out, with an intercept)."""

    name: ClassVar[str] = "linear"

    def fit(self, learner: Learner, teach: Support, look: Support, *, seed: int) -> Write:
        """Nothing is fitted on the class."""

        def write(support: Support) -> list[TaskVector]:
            before, after = (
                states(learner, part.encoded, [HEAD])[HEAD].reshape(part.count, part.per, -1)
                for part in (support.placed, support.best)
            )
            return [self.solved(h, goal - h) for h, goal in zip(before, after, strict=True)]

        return write

    def solved(self, h: Float[Tensor, "P d"], y: Float[Tensor, "P d"]) -> TaskVector:
        """One function's map."""
        found = solve(h, y, "loo", intercept=True)
        return TaskVector((Edit(HEAD, Affine(found.read.float(), found.write.float(), found.bias.float())),))
