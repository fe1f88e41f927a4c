"""State vector (Li, Liu, Hu, Sun, Hu, Zhang, arXiv 2404.11225): the attention states of separators, optimised.

**Idea.** The states at the separators of a few-shot prompt follow each other like the steps of an optimiser, one an
example. So average the last ones (inner optimisation), or add a weighted sum of their differences (momentum), and put
the result in place of a bare query's own.

**Formula.** s_i^l is the input of the attention output projection of layer l at the separator behind the i-th
demonstration's input, s_dummy that of a dummy query behind all of them.

    none      V = s_dummy
    inner     V = mean of the last 7 of s_1 .. s_N, s_dummy
    momentum  V = V_avg + lr sum of w_i diff_i / sum of w,   over the last len(w) differences of s_1 .. s_N, V_avg

and at the query's separator the attention of layers 0 .. L* becomes W_O V^l. Several groups of demonstrations are
averaged, or conquered: a prompt with one dummy demonstration a group, whose separators are replaced by the groups'
states, gives the final one.

**Where we differ.** Written from the paper's description (the code has no licence). Separators are found by their role
in the prompt, not by a search for a token. L* is chosen on dev; with `divide-and-conquer` it is chosen for the groups'
average and kept. States are averaged over `draws` orders and dummies.

**Cost.** About shots + 1 nested prompts a draw; choosing L* is a replay a layer and dev item. No gradient.

**When to use it.** When a vector has to come from more demonstrations than one prompt holds.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import DataError, InputError
from taskvec.evaluate import Fitting, at_least_one, pick, single
from taskvec.evaluate.drawing import head_sites
from taskvec.lm import LM
from taskvec.prompts import Example
from taskvec.replay import Ask, Trial, replay
from taskvec.replay.trials import first_edited
from taskvec.sites import Site
from taskvec.tasks import Dev, Train
from taskvec.vector import Edit, Replace, TaskVector, Where

Optimize = Literal["none", "inner", "momentum"]
INNER = 7  # six demonstrations and the dummy


def optimized(
    states: Float[Tensor, "n L w"], how: Optimize, lr: float, weights: Sequence[float]
) -> Float[Tensor, "L w"]:
    """V from the states at N separators and, last, the dummy's (eq. 4 to 6)."""
    if how == "none":
        return states[-1]
    average = states[-INNER:].mean(0)
    if how == "inner":
        return average
    steps = torch.cat([states[:-1], average[None]])
    differences = (steps[1:] - steps[:-1])[-len(weights) :]
    w = torch.tensor(list(weights), dtype=states.dtype)[-len(differences) :]
    if not w.any():  # one demonstration: its only difference has the paper's last weight, 0
        return average
    return average + lr * (w[:, None, None] * differences).sum(0) / w.sum()


def replacing(state: Float[Tensor, "L w"], depth: int, where: Where | None = None) -> TaskVector:
    """The attention of layers 0 .. `depth` computed from `state` instead."""
    edits = (Edit(Site("heads", layer), Replace(state[layer]), where or Where()) for layer in range(depth + 1))
    return TaskVector(tuple(edits))


@dataclass(frozen=True)
class StateVector:
    """Fields.

    - `optimize`: `none`, `inner` (6 demonstrations and the dummy averaged) or `momentum` (`lr`, `weights`).
    - `depth`: L*, the last layer that is replaced (None: every one is tried on dev).
    - `draws`: orders of the demonstrations, each with a dummy of its own, that are averaged (paper: 5).
    - `groups`: groups of demonstrations, as many in each as shots; `aggregate`: `average` or `divide-and-conquer`.
    - `n_dev`: dev items L* is chosen on.
    """

    name: ClassVar[str] = "state-vector"
    cites: ClassVar[str] = "arXiv 2404.11225"
    sites: ClassVar[tuple[str, ...]] = ("heads",)
    ops: ClassVar[tuple[str, ...]] = ("replace",)
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    optimize: Optimize = "inner"
    lr: float = 1.0
    weights: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 0.0)
    depth: int | None = None
    draws: int = 5
    groups: int = 1
    aggregate: Literal["average", "divide-and-conquer"] = "average"
    n_dev: int = 40

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Read the separators, optimise, choose the depth on dev."""
        train, dev = single(train, dev)
        self._check(lm, train)
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            groups = self._groups(fitting)
            states = torch.stack([self._state(fitting, demos, g) for g, demos in enumerate(groups)])
            depths = list(range(lm.n_layers)) if self.depth is None else [self.depth]
            whole = replacing(states.mean(0), lm.n_layers - 1)
            candidates = [TaskVector(whole.edits[: depth + 1]) for depth in depths]
            best, accuracy = pick(fitting, dev, candidates, self.n_dev)
            vector = candidates[best]
            if self.aggregate == "divide-and-conquer":
                vector = replacing(self._conquered(fitting, states, depths[best]), depths[best])
            found = {"depth": depths[best], "dev_accuracy": accuracy}
            return TaskVector(vector.edits, fitting.origin(found=found))

    def _check(self, lm: LM, train: Train) -> None:
        at_least_one(self, "draws", "groups", "n_dev")
        head_sites(lm)
        lm.point(Site("heads", self.depth or 0))
        used = self.weights[-train.spec.shots :]
        if not self.weights or not (sum(used) > 0 or not any(used)) or not sum(self.weights) > 0:
            raise InputError("weights with a sum above 0", f"state-vector.weights = {self.weights}", "mend them")
        wanted = self.groups * train.spec.shots + 1
        if len(train) < wanted:
            raise DataError(
                f"{wanted} train examples for {self.groups} groups of {train.spec.shots} shots and a dummy",
                f"{len(train)}",
                "lower state-vector.groups or --shots, or add examples",
            )

    def _groups(self, fitting: Fitting) -> list[tuple[Example, ...]]:
        """The seed's demonstrations, and more groups of as many from the rest of train."""
        more = fitting.train.queries(fitting.demos, (self.groups - 1) * len(fitting.demos), seed=fitting.seed)
        fitting.read |= {example.input for example in more}
        n = len(fitting.demos)
        return [fitting.show(), *(more[i * n : (i + 1) * n] for i in range(self.groups - 1))]

    def _state(self, fitting: Fitting, demos: Sequence[Example], group: int) -> Float[Tensor, "L w"]:
        """One group's V, averaged over draws."""
        rng = random.Random(f"state vector {fitting.seed} {group}")
        rest = [example for example in fitting.train.examples if example not in demos]
        drawn = []
        for draw in range(self.draws):
            order = list(demos) if draw == 0 else rng.sample(list(demos), len(demos))
            drawn.append((order, rng.choice(rest)))
        fitting.queries += len({dummy.input for _, dummy in drawn})
        return torch.stack([self._of_prompt(fitting, order, dummy) for order, dummy in drawn]).mean(0)

    def _of_prompt(self, fitting: Fitting, demos: Sequence[Example], dummy: Example) -> Float[Tensor, "L w"]:
        """V of one prompt. The state at the i-th separator is that of the prompt which ends there: its last token."""
        format, lm = fitting.train.spec.format, fitting.lm
        ends = [lm.encode(format.prompt(one.input, demos[:i])) for i, one in enumerate([*demos, dummy])]
        sites = head_sites(lm)
        states = fitting.states_of(ends, sites)
        return optimized(torch.stack([states[s] for s in sites], dim=1), self.optimize, self.lr, self.weights)

    def _conquered(self, fitting: Fitting, states: Float[Tensor, "g L w"], depth: int) -> Float[Tensor, "L w"]:
        """Divide and conquer: each group's state at the separator of a dummy demonstration; the last one is read."""
        lm, format = fitting.lm, fitting.train.spec.format
        rng = random.Random(f"conquer {fitting.seed}")
        sites = head_sites(lm)
        finals = []
        for _ in range(self.draws):
            *dummies, query = rng.sample(list(fitting.train.examples), len(states) + 1)
            fitting.read |= {example.input for example in dummies}
            prompt = lm.encode(format.prompt(query.input, dummies))
            places = prompt.roles["separator"]
            edits = [
                edit
                for place, state in zip(places, states, strict=True)
                for edit in replacing(state, depth, Where("at", positions=(place,))).edits
            ]
            vector = TaskVector(tuple(edits))
            engine = replay(lm, [prompt], starts=[first_edited(prompt, vector)])
            found = engine.answer([Trial(0, vector)], Ask(states=tuple(sites))).states
            finals.append(torch.stack([found[site][0] for site in sites]))
        return torch.stack(finals).mean(0)
