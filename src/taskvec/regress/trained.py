"""The trained methods on many functions at once: learnable head weights, a vector a function, one constant for all.

Shapes: F functions, S sites, L layers, J heads, d width of the residual stream.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import huber_loss

from taskvec.errors import InputError
from taskvec.evaluate import Lessons
from taskvec.methods.learnable import Form, basis
from taskvec.regress.ground import Prompts, Support, states
from taskvec.regress.learner import Learner
from taskvec.regress.writers import Write, best_of, head_means
from taskvec.sites import Site
from taskvec.vector import Add, Edit, TaskVector

Rows = Callable[[Tensor], Float[Tensor, "F S d"]]
"""From what is trained to what each function's vector adds at each site."""


@dataclass(frozen=True)
class Training:
    """Adam: `steps` of `rounds` prompts of every function, a look at dev every `check` steps, the best kept; it stops
    after `patience` looks without gain. The rate falls to 0 over the steps."""

    lr: float
    steps: int = 200
    rounds: int = 2
    check: int = 20
    patience: int = 4


@dataclass(frozen=True, eq=False)
class Trainee:
    """What is trained: tensors of `shape`, from zero, that `rows` turns into vectors at `sites` for the functions of
    some prompts."""

    learner: Learner
    sites: Sequence[Site]
    shape: tuple[int, ...]

    def run(
        self, training: Training, teach: tuple[Prompts, Rows], look: tuple[Prompts, Rows] | None, *, seed: int
    ) -> Tensor:
        """Train on `teach`; without `look` the last step counts."""
        prompts, rows = teach
        lessons, count = _lessons(self.learner, prompts), prompts.count
        dev = None if look is None else self._dev(*look)
        theta = torch.zeros(self.shape).requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=training.lr)
        generator = torch.Generator().manual_seed(seed)
        best = theta.detach().clone()
        best_loss, misses = dev(best) if dev is not None else float("inf"), 0
        for step in range(1, training.steps + 1):
            first = int(torch.randint(prompts.per, (1,), generator=generator))
            turns = [(first + i) % prompts.per for i in range(min(training.rounds, prompts.per))]
            optimizer.param_groups[0]["lr"] = training.lr * (1 - (step - 1) / training.steps)
            optimizer.zero_grad()
            with torch.enable_grad():
                made = rows(theta)
                leaf = made.detach().requires_grad_()  # a step may take several passes, but goes through `rows` once
                picked = [turn * count + f for turn in turns for f in range(count)]
                lessons.descend_each(self.vectors(leaf) * len(turns), picked)
                made.backward(leaf.grad)  # type: ignore[no-untyped-call]
            optimizer.step()
            if dev is None or (step % training.check and step < training.steps):
                continue
            loss = dev(theta.detach())
            misses += 1
            if loss < best_loss:
                best, best_loss, misses = theta.detach().clone(), loss, 0
            if misses >= training.patience:
                break
        if dev is not None and not math.isfinite(best_loss):
            raise InputError("a learning rate that trains", f"no finite dev loss at {training.lr}", "lower it")
        return theta.detach() if dev is None else best

    def vectors(self, rows: Float[Tensor, "F S d"]) -> list[TaskVector]:
        """A vector for each function."""
        return [
            TaskVector(tuple(Edit(site, Add(part)) for site, part in zip(self.sites, row, strict=True))) for row in rows
        ]

    def _dev(self, prompts: Prompts, rows: Rows) -> Callable[[Tensor], float]:
        looks = _lessons(self.learner, prompts)

        def loss(theta: Tensor) -> float:
            found = looks.losses(list(enumerate(self.vectors(rows(theta)) * prompts.per)))
            return sum(found) / len(found)

        return loss


def _lessons(learner: Learner, prompts: Prompts) -> Lessons:
    """The prompts with the true values of their queries, under the paper's Huber loss (delta 1). Function by function
    in turns: one turn after another lies together, and is run together."""
    order = [f * prompts.per + turn for turn in range(prompts.per) for f in range(prompts.count)]
    targets = [(float(value),) for value in prompts.values.T.flatten()]
    return Lessons.of(learner, [prompts.encoded[i] for i in order], targets, _huber)


def _huber(logits: Float[Tensor, "t 1"], target: Float[Tensor, " t"]) -> Tensor:
    return huber_loss(logits[:, 0].float(), target)


def _every_layer(learner: Learner) -> list[Site]:
    return [Site("resid", layer) for layer in range(learner.n_layers)]


@dataclass(frozen=True)
class LearnableVectors:
    """Learnable task vector: one weight a head for the whole class, trained where queries stand; each function's own
    mean head outputs. `form` as in `taskvec.methods.learnable`."""

    name: str = "learnable"
    form: Form = "heads"
    training: Training = Training(lr=0.02)

    def fit(self, learner: Learner, teach: Support, look: Support, *, seed: int) -> Write:
        """Train the weights."""
        trainee = Trainee(learner, _every_layer(learner), (learner.n_layers, learner.n_heads))
        with learner.frozen():
            (taught, looked) = ((part.placed, self.rows(learner, part)) for part in (teach, look))
            phi = trainee.run(self.training, taught, looked, seed=seed)
        return lambda support: trainee.vectors(self.rows(learner, support)(phi))

    def rows(self, learner: Learner, support: Support) -> Rows:
        """v_l = sum over j of phi_lj times what head (l, j) writes on average, for each function."""
        fixed = torch.stack([basis(learner, mine, self.form) for mine in head_means(support.clean)])
        return lambda phi: (phi[..., None] * fixed).sum(2)


@dataclass(frozen=True)
class LearnedVectors:
    """Learned task vector: for each function a vector at one layer, trained on its own placed prompts (`batch` a step,
    of all functions); the layer is chosen on `look`. The rate is `lr_rms` of the site's rms."""

    name: ClassVar[str] = "learned"
    lr_rms: float = 0.05
    steps: int = 100
    batch: int = 128

    def fit(self, learner: Learner, teach: Support, look: Support, *, seed: int) -> Write:
        """Choose the layer: half of each function's prompts train, the other half decides."""
        train, decide = _halves(look.placed)
        tried = [self.train(learner, train, layer, seed) for layer in range(learner.n_layers)]
        best = best_of(decide, tried)
        return lambda support: self.train(learner, support.placed, best, seed)

    def train(self, learner: Learner, placed: Prompts, layer: int, seed: int) -> list[TaskVector]:
        """A vector for each function at a layer."""
        site = Site("resid", layer)
        rms = float(states(learner, placed.encoded[:64], [site])[site].square().mean().sqrt())
        training = Training(lr=self.lr_rms * rms, steps=self.steps, rounds=max(1, self.batch // placed.count))
        trainee = Trainee(learner, [site], (placed.count, 1, learner.width(site)))
        with learner.frozen():
            return trainee.vectors(trainee.run(training, (placed, lambda theta: theta), None, seed=seed))


@dataclass(frozen=True)
class ConstantVectors:
    """A control without any task: one vector a layer, the same for all functions, trained as the learnable one is."""

    name: ClassVar[str] = "constant"
    training: Training = Training(lr=0.02)

    def fit(self, learner: Learner, teach: Support, look: Support, *, seed: int) -> Write:
        """Train it."""
        sites = _every_layer(learner)
        trainee = Trainee(learner, sites, (len(sites), learner.width(sites[0])))
        with learner.frozen():
            taught, looked = ((part.placed, _same_for(part.placed.count)) for part in (teach, look))
            theta = trainee.run(self.training, taught, looked, seed=seed)
        return lambda support: trainee.vectors(_same_for(support.placed.count)(theta))


def _same_for(count: int) -> Rows:
    return lambda theta: theta.expand(count, *theta.shape)


def _halves(prompts: Prompts) -> tuple[Prompts, Prompts]:
    """Each with half of every function's prompts."""
    half = prompts.per // 2
    one, two = (
        Prompts.of(prompts.learner, prompts.x[:, part], prompts.y[:, part], prompts.values[:, part])
        for part in (slice(0, half), slice(half, None))
    )
    return one, two
