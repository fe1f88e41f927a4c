"""Learned task vector (Yang, Cho, Ding, Inoue, arXiv 2509.24169): a vector trained by gradient, the model frozen.

**Idea.** Do not read the vector out of few-shot states: train it, on bare queries, from the answers.

**Formula.**

    min over theta of E[ -log p(answer | query, theta at layers L and positions P) ]          (eq. 3)

One theta per layer and position, added to the residual stream; multi-token answers by the mean over their tokens.

**Cost.** Each step is a replay: the prompts up to their first edited token are run once for the whole fit, a step
costs the edited tokens and the answers. A sweep over layers is one run: one position per (prompt, layer); after each
look at dev the worse half of the layers goes, until one is left.

**Where we differ.** The whole answer *with its terminator* is trained (else the vector does not know when to
stop); `resid[l]` is the output of block l (the released code adds to its input); the learning rate is 0.01 x the rms
of the site by default, because one number cannot serve residual streams whose scale differs by orders of magnitude
(`LearnedTaskVector.paper()` and `.code()` are the published 1e-3 and 5e-3); zero init; layer and early stop on dev,
which is not test; the released schedule (its denominator was never reached) is left out.

**When to use it.** First: on word tasks it comes closest to few-shot, with as many gold answers as `queries` and
`n_dev` say; `target = few-shot` needs none beyond the demonstrations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate import (
    Fitting,
    Lessons,
    above_zero,
    at_least_one,
    distilled,
    encode_answers,
    never_negative,
    single,
)
from taskvec.lm import LM
from taskvec.progress import track
from taskvec.prompts import Example
from taskvec.replay import Ask
from taskvec.sites import Site
from taskvec.tasks import Dev, Split, Train
from taskvec.vector import Add, Edit, TaskVector, Where


@dataclass(frozen=True)
class LearnedTaskVector:
    """Fields.

    - `layer`: one layer; several (a vector at each, trained together); None: a sweep over `sweep` layers, one at a
      time.
    - `positions`: tokens counted from the prompt's end.
    - `prompt`: train and use it on zero-shot prompts, or on top of the few-shot prompt.
    - `target`: the gold answer, or what the few-shot prompt predicts at every token (distillation: no labels but the
      demonstrations').
    - `lr`: AdamW's learning rate; None: `lr_rms` x the root mean square of the site's clean activations.
    - `steps`, `batch`: at most so many steps over so many prompts each; `queries`: training examples at most.
    - `check`: steps between looks at dev; `patience`: looks without a lower dev loss before it stops.
    - `weight_decay`, `init`: AdamW's, and theta ~ U(-init, init). `n_dev`: dev items used.
    """

    name: ClassVar[str] = "learned"
    cites: ClassVar[str] = "arXiv 2509.24169"
    sites: ClassVar[tuple[str, ...]] = ("resid",)
    ops: ClassVar[tuple[str, ...]] = ("add",)
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = True
    layer: int | tuple[int, ...] | None = None
    sweep: int = 6
    positions: tuple[int, ...] = (-1,)
    prompt: Literal["zero-shot", "few-shot"] = "zero-shot"
    target: Literal["gold", "few-shot"] = "gold"
    lr: float | None = None
    lr_rms: float = 0.01
    steps: int = 120
    batch: int = 16
    queries: int = 256
    check: int = 8
    patience: int = 2
    weight_decay: float = 0.01
    init: float = 0.0
    n_dev: int = 40

    @classmethod
    def paper(cls, **fields: Any) -> "LearnedTaskVector":
        """The paper's text: learning rate 1e-3, init U(-0.1, 0.1), batch 1, up to 1000 steps."""
        return cls(**{"lr": 1e-3, "init": 0.1, "batch": 1, "steps": 1000, "check": 100, **fields})

    @classmethod
    def code(cls, **fields: Any) -> "LearnedTaskVector":
        """The released code: as the paper, with learning rate 5e-3."""
        return cls.paper(**{"lr": 5e-3, **fields})

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Train, choose the layer and the step on dev."""
        train, dev = single(train, dev)
        self._check(lm)
        with Fitting.of(lm, self, train, seed=seed) as fitting, lm.frozen():
            shown = fitting.show() if self.prompt == "few-shot" else ()
            examples = train.queries(fitting.demos, self.queries, seed=seed)
            kept = dev.examples[: self.n_dev]
            self._count(fitting, len(examples), len(kept))
            lessons = self._lessons(fitting, replace(train, examples=examples), shown)
            looks = self._lessons(fitting, replace(dev, examples=kept), shown)
            generator = torch.Generator().manual_seed(seed)
            scale = self._rates(fitting, examples, shown)
            runs = [_Run(self, lm, layers, scale, generator) for layers in self._candidates(lm)]
            runs, step = self._trained(runs, lessons, looks, generator)
            best = min(runs, key=lambda run: run.best_loss)
            if best.best_loss == float("inf"):
                raise InputError("a learning rate that trains", f"no finite dev loss with {self}", "lower learned.lr")
            found = {"layers": sorted({layer for layer, _ in best.places}), "steps": step, "dev_loss": best.best_loss}
            return TaskVector(best.best.edits, fitting.origin(prompt=self.prompt, found=found))

    def _trained(
        self, runs: "list[_Run]", lessons: Lessons, looks: Lessons, generator: torch.Generator
    ) -> "tuple[list[_Run], int]":
        """The runs that are left, and the last step."""
        step = 0
        for step in track(range(1, self.steps + 1), "learned", self.steps):
            picked = torch.randperm(len(lessons.targets), generator=generator)[: self.batch].tolist()
            _descend(lessons, runs, picked)
            if step % self.check == 0 or step == self.steps:
                runs = _survivors(runs, looks.mean_losses([run.vector for run in runs]))
            if all(run.misses >= self.patience for run in runs):
                break
        return runs, step

    def _count(self, fitting: Fitting, trained: int, looked: int) -> None:
        """Gold labels read; with the few-shot model as teacher the same inputs count as unlabelled queries."""
        if self.target == "gold":
            fitting.labels += trained + looked
        else:
            fitting.queries += trained + looked

    def _lessons(self, fitting: Fitting, split: Split, shown: Sequence[Example]) -> Lessons:
        lm, spec = fitting.lm, split.spec
        prompts = [lm.encode(spec.format.prompt(example.input, shown)) for example in split.examples]
        starts = [p.prompt_length + min(self.positions) for p in prompts]
        if min(starts) < 0:
            found = f"{min(self.positions)} in a prompt of {min(p.prompt_length for p in prompts)} tokens"
            raise InputError("learned.positions inside every prompt", found, "name tokens nearer the end")
        golds, _, longest = encode_answers(lm, split, shown)
        if self.target == "gold":
            return Lessons.of(lm, prompts, golds, spec.loss, starts=starts)
        teachers = [lm.encode(spec.format.prompt(example.input, fitting.show())) for example in split.examples]
        ask = Ask(max_new=longest, done=lambda _, text: spec.format.terminator in text)
        return distilled(lm, prompts, teachers, ask, starts=starts)

    def _check(self, lm: LM) -> None:
        at_least_one(self, "sweep", "steps", "batch", "queries", "check", "patience", "n_dev")
        above_zero(self, "lr", "lr_rms")
        never_negative(self, "weight_decay", "init")
        if self.layer == ():
            raise InputError("at least one layer", "learned.layer = ()", "name one, or none for a sweep")
        if not self.positions or any(p >= 0 for p in self.positions):
            raise InputError(
                "positions counted from the prompt's end (-1 is the last token)", str(self.positions), "mend them"
            )
        if self.prompt == self.target:
            raise InputError(
                "a student that differs from its teacher", "learned.prompt = learned.target = few-shot", "change one"
            )
        for layers in self._candidates(lm):
            if len(set(layers)) < len(layers):
                raise InputError("each layer once", f"learned.layer = {layers}", "mend it")
            for layer in layers:
                lm.point(Site("resid", layer))

    def _candidates(self, lm: LM) -> list[tuple[int, ...]]:
        if isinstance(self.layer, tuple):
            return [self.layer]
        if self.layer is not None:
            return [(self.layer,)]
        spread = torch.linspace(0, lm.n_layers - 1, min(self.sweep, lm.n_layers) + 2).round().long().tolist()[1:-1]
        return [(layer,) for layer in dict.fromkeys(spread)]

    def _rates(self, fitting: Fitting, examples: Sequence[Any], shown: Sequence[Any]) -> dict[int, float]:
        layers = sorted({layer for layers in self._candidates(fitting.lm) for layer in layers})
        if self.lr is not None:
            return dict.fromkeys(layers, self.lr)
        states = fitting.states(examples[: self.batch], [Site("resid", layer) for layer in layers], shown=shown)
        return {
            site.layer: self.lr_rms * float(h.square().mean().sqrt())
            for site, h in states.items()
            if site.layer is not None
        }


class _Run:
    """One candidate: its thetas, its optimiser, and its best state so far by dev loss."""

    def __init__(
        self,
        method: LearnedTaskVector,
        lm: LM,
        layers: tuple[int, ...],
        rates: dict[int, float],
        generator: torch.Generator,
    ) -> None:
        places = [(layer, position) for layer in layers for position in method.positions]
        width = lm.width(Site("resid", layers[0]))
        self.thetas = [
            ((torch.rand(width, generator=generator) * 2 - 1) * method.init).to(lm.device).requires_grad_()
            for _ in places
        ]
        groups = [{"params": [t], "lr": rates[layer]} for t, (layer, _) in zip(self.thetas, places, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=method.weight_decay)
        self.places = places
        self.vector = self._vector(self.thetas)
        self.best, self.best_loss, self.misses = (
            self._vector([t.detach().clone() for t in self.thetas]),
            float("inf"),
            0,
        )

    def _vector(self, thetas: Sequence[Tensor]) -> TaskVector:
        wheres = [Where() if p == -1 else Where("at", positions=(p,)) for _, p in self.places]
        sites = [Site("resid", layer) for layer, _ in self.places]
        return TaskVector(tuple(Edit(s, Add(t), w) for s, t, w in zip(sites, thetas, wheres, strict=True)))

    def look(self, loss: float) -> None:
        """Keep the thetas if this dev loss is the lowest."""
        self.misses += 1
        if loss < self.best_loss:
            self.best_loss, self.misses = loss, 0
            self.best = self._vector([t.detach().cpu().clone() for t in self.thetas])


def _descend(lessons: Lessons, runs: Sequence[_Run], picked: Sequence[int]) -> None:
    """One step of every run on the same prompts."""
    for run in runs:
        run.optimizer.zero_grad()
    lessons.descend([run.vector for run in runs], picked)
    for run in runs:
        run.optimizer.step()


def _survivors(runs: list[_Run], losses: Sequence[float]) -> list[_Run]:
    """Note the dev losses and keep the better half."""
    for run, loss in zip(runs, losses, strict=True):
        run.look(loss)
    return sorted(runs, key=lambda run: run.best_loss)[: (len(runs) + 1) // 2]
