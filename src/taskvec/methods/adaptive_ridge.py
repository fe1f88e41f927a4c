"""Closed-form adaptive vector (ours): ridge from a generator's states to few-shot minus zero-shot states.

**Idea.** Where the linear and the adaptive task vector meet: the query is read by a generator, as in the adaptive one,
and the map to the model's states is solved for, as in the linear one. No gradient, no labels but the demonstrations'.

**Formula.** With Z the generator's states of N unlabelled queries of all tasks (each behind its own demonstrations
where few-shot),

    E_s = argmin |Y_s - Z E_s'|^2 + lam |E_s|^2,   Y_s = few-shot - zero-shot states at site s
    h <- h + E_s z(x) at site s, at the last prompt token

With the model as its own generator and the site `lm_head_in` it is the linear task vector.

**Where we differ.** Ours; the adaptive paper trains by gradient. `lam` is chosen by closed-form leave-one-out (`ridge =
loo`), because a generator's states have a scale of their own.

**Cost.** A generator pass, a bare and a few-shot prompt a query, and one N x N solve.

**When to use it.** To serve several tasks without labels or training. Its teacher, few-shot, caps it. Differences at
several sites add up on the way through the model: give one site, or few.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate import Fitting, at_least_one, changed_by_context, reaching
from taskvec.evaluate.expansion import AdaptiveVectors, Expansion
from taskvec.evaluate.generator import Reads, generator_of
from taskvec.evaluate.joint import Joint
from taskvec.evaluate.ridge import Solved, check_ridge, solve
from taskvec.lm import LM, Encoded
from taskvec.sites import Site
from taskvec.tasks import Dev, Train


@dataclass(frozen=True)
class AdaptiveRidge:
    """Fields.

    - `generator`, `reads`: as in `adaptive`.
    - `at`: the sites it writes at; `where`: `last_prompt` or `each_last`.
    - `ridge`: lam, in the squared units of the generator's states, or `loo`: by leave-one-out.
    - `queries`: unlabelled, a task; `intercept`: centre states and differences.
    """

    name: ClassVar[str] = "adaptive-ridge"
    cites: ClassVar[str] = "ours, after arXiv 2506.03426 and 2605.20730"
    sites: ClassVar[tuple[str, ...]] = ("lm_head_in",)
    ops: ClassVar[tuple[str, ...]] = ("add",)
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    joint: ClassVar[bool] = True
    source: ClassVar[type[AdaptiveVectors]] = AdaptiveVectors
    generator: str = ""
    reads: Reads = "prompt"
    at: tuple[str, ...] = ("lm_head_in",)
    where: str = "last_prompt"
    ridge: float | Literal["loo"] = "loo"
    queries: int = 128
    intercept: bool = False

    def fit(
        self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0
    ) -> AdaptiveVectors:
        """Two passes and a generator's over the queries, one solve. Takes one task or many. Dev is not used."""
        sites = self._check(lm)
        joint = Joint.of(train, dev)
        where = reaching(lm, joint.trains[0], self.where)
        generator = generator_of(lm, self.generator, self.reads)
        with Fitting.of(lm, self, joint.trains[0], seed=seed) as fitting:
            prompts, parts = list[Encoded](), list[Tensor]()
            for one in joint.trains:
                bare, differences = _of_task(fitting, one, self.queries, sites)
                prompts, parts = prompts + bare, [*parts, differences]
                fitting.queries += len(bare)
                fitting.read |= {f"{one.spec.data_hash} {demo.input}" for demo in one.demonstrations(seed=seed)}
            with torch.no_grad():
                z = generator.states(generator.texts(lm, prompts)).double().cpu()
            y = torch.cat(parts)
            solved = solve(z, y.flatten(1), self.ridge, intercept=self.intercept)
            origin = joint.origin(fitting, solved.found)
        expansion = _expansion(solved, (y.shape[1], y.shape[2]))
        return AdaptiveVectors(expansion, sites, where, 1.0, generator.model, self.reads, origin).use(generator)

    def _check(self, lm: LM) -> tuple[Site, ...]:
        at_least_one(self, "queries")
        check_ridge("adaptive-ridge.ridge", self.ridge)
        sites = tuple(map(Site.parse, self.at))
        if not sites or len(set(sites)) < len(sites) or len({lm.width(site) for site in sites}) > 1:
            raise InputError("one site or several of one width, each once", f"{self.at}", "mend adaptive-ridge.at")
        for site in sites:
            changed_by_context(lm, site)
        return sites


def _expansion(solved: Solved, shape: tuple[int, int]) -> Expansion:
    """The map as an expansion to (S, d): as factors where there are fewer queries than states are wide."""
    bias, write = solved.bias.reshape(shape).float(), solved.write.T.reshape(*shape, len(solved.read))
    if len(solved.read) < solved.read.shape[1]:
        return Expansion(write.float().contiguous(), bias, solved.read.float().contiguous())
    return Expansion((write @ solved.read).float().contiguous(), bias)


def _of_task(
    fitting: Fitting, train: Train, limit: int, sites: Sequence[Site]
) -> tuple[list[Encoded], Float[Tensor, "N S d"]]:
    """(a task's bare prompts, their few-shot minus zero-shot states), behind the task's own demonstrations."""
    demos = train.demonstrations(seed=fitting.seed)
    queries = train.queries(demos, limit, seed=fitting.seed)
    bare, shown = ([fitting.lm.encode(train.spec.format.prompt(q.input, d)) for q in queries] for d in ((), demos))
    few, zero = (fitting.states_of(prompts, sites) for prompts in (shown, bare))
    return bare, torch.stack([few[site].double() - zero[site].double() for site in sites], 1).cpu()
