"""Learnable task vector (Saglam, Hu, Yang, Kalogerias, Karbasi, arXiv 2502.05390): a trained weighted sum of heads.

**Idea.** Take the mean output of every attention head at the query token of few-shot prompts, and learn one weight a
head: with L layers of J heads only L x J numbers are trained, through the frozen model, from the true answers.

**Formula.** With abar_lj = W_O[:, slot j] times the mean of head (l, j)'s output over clean prompts,

    v_l = sum over j of w_lj abar_lj,   resid[l] <- resid[l] + v_l at the last prompt token, in every layer
    w <- argmin of the loss of the answer behind prompts whose demonstrations have shuffled labels

**Where we differ.** True heads, through the projection once and without its bias (`form = heads`). The released text
code scales coordinate blocks of the summed output (`released-text`), the regression code projects twice with the bias
(`released-regression`); both are here for comparison. Weights start at 0 with a learning rate that moves them
(`LearnableTaskVector.published()` starts at N(0, 1) with 5e-5, which leaves them near their start). The mean outputs
are drawn once, from train; the step is chosen on dev; patience starts again after each gain. The loss is that of the
first answer token, as published; `target = answer` trains the whole answer with its terminator.

**Cost.** `prompts` clean prompts and `trials` shuffled ones once; a step is one token a prompt, by replay.

**When to use it.** To see how much a re-weighting of heads can do; on text it writes no answer format unless
`target = answer`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate import Fitting, Lessons, at_least_one, single
from taskvec.evaluate.drawing import (
    Drawn,
    draw,
    encode_drawn,
    head_sites,
    labels_read,
    mean_heads,
    need_two_shots,
    one_slot_each,
    projected_heads,
)
from taskvec.lm import LM
from taskvec.progress import track
from taskvec.sites import Site
from taskvec.tasks import Dev, Split, Train
from taskvec.vector import Add, Edit, TaskVector

Form = Literal["heads", "released-text", "released-regression"]


def basis(lm: LM, means: Float[Tensor, "L J w"], form: Form = "heads") -> Float[Tensor, "L J d"]:
    """What one unit of each weight adds to the residual stream.

    - `heads`: W_O[:, slot j] z_j;
    - `released-text`: slot j of the summed W_O z: coordinate blocks, not heads;
    - `released-regression`: the projected output, cut into slots, each projected again with the bias.
    """
    check_form(lm, form)
    written = projected_heads(lm, means)
    if form == "heads":
        return written
    if form == "released-text":
        return torch.stack([one_slot_each(layer.sum(0).reshape(lm.n_heads, -1)) for layer in written])
    return torch.stack([_twice(lm, layer, z) for layer, z in enumerate(means)])


def check_form(lm: LM, form: Form) -> None:
    """Raise `InputError` where a model's heads don't fill the residual stream, which the released forms need."""
    heads, width = lm.n_heads * lm.width(Site("heads", 0, 0)), lm.width(Site("resid", 0))
    if form != "heads" and heads != width:
        found = f"{heads} and {width}"
        raise InputError(
            "heads as wide together as the residual stream, for a released form", found, "use form = heads"
        )


@torch.no_grad()
def _twice(lm: LM, layer: int, z: Float[Tensor, "J w"]) -> Float[Tensor, "J d"]:
    module = lm.point(Site("heads", layer)).module
    once = module(z.reshape(1, -1).to(lm.device, lm.dtype))
    rows = one_slot_each(once.reshape(lm.n_heads, -1))
    return module(rows).float().cpu()  # type: ignore[no-any-return]


def layer_vectors(phi: Float[Tensor, "L J"], basis: Float[Tensor, "L J d"]) -> Float[Tensor, "L d"]:
    """v_l = sum over j of phi_lj basis_lj: linear in phi."""
    return (phi[..., None] * basis).sum(1)


def added(rows: Float[Tensor, "L d"]) -> TaskVector:
    """One row a layer, added after every block at the last prompt token."""
    return TaskVector(tuple(Edit(Site("resid", layer), Add(row)) for layer, row in enumerate(rows)))


@dataclass(frozen=True)
class LearnableTaskVector:
    """Fields.

    - `form`: see above; `prompts`: clean prompts averaged.
    - `trials`: training prompts, drawn from train; `behind`: what stands before their query: demonstrations with
      shuffled labels (the paper), the true ones, or nothing.
    - `target`: the answer's first token (the paper), or the whole answer with its terminator.
    - `lr`, `steps`, `batch`: Adam's, without decay; `init`: the weights' standard deviation at the start.
    - `check`, `patience`: steps between looks at dev, looks without gain before it stops; `n_dev`: dev items used.
    """

    name: ClassVar[str] = "learnable"
    cites: ClassVar[str] = "arXiv 2502.05390"
    sites: ClassVar[tuple[str, ...]] = ("resid",)
    ops: ClassVar[tuple[str, ...]] = ("add",)
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = True
    form: Form = "heads"
    prompts: int = 100
    trials: int = 64
    behind: Literal["shuffled", "true", "nothing"] = "shuffled"
    target: Literal["first-token", "answer"] = "first-token"
    lr: float = 0.02
    steps: int = 150
    batch: int = 32
    init: float = 0.0
    check: int = 10
    patience: int = 3
    n_dev: int = 40

    @classmethod
    def published(cls, **fields: Any) -> "LearnableTaskVector":
        """The released text code: coordinate blocks, N(0, 1) start, learning rate 5e-5, 2,000 steps."""
        return cls(**{"form": "released-text", "init": 1.0, "lr": 5e-5, "steps": 2000, "check": 100, **fields})

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Average the heads once, train the weights, keep the step that is best on dev."""
        train, dev = single(train, dev)
        at_least_one(self, "prompts", "trials", "steps", "batch", "check", "n_dev")
        if not self.lr >= 0:
            raise InputError("a learning rate of 0 or more", f"learnable.lr = {self.lr}", "mend it")
        if self.behind == "shuffled":
            need_two_shots(train, self.name)
        head_sites(lm)
        check_form(lm, self.form)
        generator = torch.Generator().manual_seed(seed)
        with Fitting.of(lm, self, train, seed=seed) as fitting, lm.frozen():
            clean = draw(train, self.prompts, seed=seed)
            fitting.read |= labels_read(clean, queries=False)
            fitting.queries += len({one.query.input for one in clean})
            fixed = basis(lm, mean_heads(fitting, encode_drawn(lm, train, clean)[0]), self.form).to(lm.device)
            lessons, looks = self._lessons(fitting, dev)
            start = self.init * torch.randn(fixed.shape[:2], generator=generator).to(lm.device)
            phi, found = self._trained(lessons, looks, fixed, start, generator)
            vector = added(layer_vectors(phi, fixed).cpu())
            return TaskVector(vector.edits, fitting.origin(found=found))

    def _lessons(self, fitting: Fitting, dev: Dev) -> tuple[Lessons, Lessons]:
        """Training prompts from train; dev's own items behind demonstrations of the same kind."""
        lm, train = fitting.lm, fitting.train
        shuffled = self.behind == "shuffled"
        drawn = draw(train, self.trials, seed=fitting.seed, shuffled=shuffled)
        bare = self.behind == "nothing"
        fitting.read |= {one.query.input for one in drawn} if bare else labels_read(drawn, queries=True)
        fitting.labels += len(dev.examples[: self.n_dev])
        behind = [Drawn(e, one.demos) for e, one in zip(dev.examples[: self.n_dev], drawn * self.n_dev, strict=False)]
        return self._taught(lm, train, drawn), self._taught(lm, dev, behind)

    def _taught(self, lm: LM, split: Split, drawn: Sequence[Drawn]) -> Lessons:
        prompts, golds = encode_drawn(lm, split, drawn, bare=self.behind == "nothing")
        targets = golds if self.target == "answer" else [gold[:1] for gold in golds]
        return Lessons.of(lm, prompts, targets, split.spec.loss)

    def _trained(
        self, lessons: Lessons, looks: Lessons, fixed: Tensor, start: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        phi = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([phi], lr=self.lr)
        best, best_loss, misses, step = start, float("inf"), 0, 0
        for step in track(range(1, self.steps + 1), "learnable", self.steps):
            picked = torch.randperm(len(lessons.targets), generator=generator)[: self.batch].tolist()
            optimizer.zero_grad()
            with torch.enable_grad():
                rows = layer_vectors(phi, fixed)
                leaf = rows.detach().requires_grad_()  # a step may take several passes, but goes through `rows` once
                lessons.descend([added(leaf)], picked)
                rows.backward(leaf.grad)  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % self.check and step < self.steps:
                continue
            (loss,) = looks.mean_losses([added(layer_vectors(phi.detach(), fixed))])
            misses += 1
            if loss < best_loss:
                best, best_loss, misses = phi.detach().clone(), loss, 0
            if misses >= self.patience:
                break
        if best_loss == float("inf"):
            raise InputError("a learning rate that trains", f"no finite dev loss with {self}", "lower learnable.lr")
        moved = float((best - start).norm())
        return best, {"steps": step, "dev_loss": best_loss, "phi": best.tolist(), "phi_moved": moved}
