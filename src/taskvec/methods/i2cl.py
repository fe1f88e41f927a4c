"""I2CL, implicit in-context learning (Li et al., arXiv 2405.14660): context vectors blended into every attention and
MLP output.

**Idea.** Run every demonstration alone, average what attention and MLP write at its last token, and mix these context
vectors into every token of a bare query; four scalars a layer are calibrated on the demonstrations themselves.

**Formula.** With v_a^l, v_m^l the means over demonstrations of `attn[l]` and `mlp[l]` at the demonstration's last
token,

    attn[l] <- beta_a attn[l] + lambda_a v_a^l,   mlp[l] <- beta_m mlp[l] + lambda_m v_m^l      at every token

with lambda = 0.1, beta = 1 before calibration; then AdamW on the loss of the label's first token behind the zero-shot
prompt, with noise of scale `noise` x |output| added to the outputs while training.

**Where we differ.** The demonstration ends with its answer (`ends = answer`); the released code reads the line end
behind it (`ends = terminator`). Targets are tokenised in the full context. The schedule is the released one: 5 %
warm-up, then a cosine.

**Cost.** One short prompt a demonstration; calibration is `epochs` x demonstrations whole prompts with gradients, since
every token is edited and nothing can be replayed: two minutes on the default model with the paper's 100 epochs.

**When to use it.** For labels with one-token names, where the order of demonstrations should not matter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate import Fitting, Lessons, at_least_one, never_negative, single
from taskvec.hooks import prove, require
from taskvec.lm import LM, Encoded
from taskvec.progress import track
from taskvec.prompts import Example
from taskvec.sites import Site
from taskvec.tasks import Dev, Train
from taskvec.vector import Blend, Edit, Op, TaskVector, Where
from taskvec.vector.ops import like


@dataclass(frozen=True, eq=False)
class Calibrating(Op):
    """`Blend` with scalars that are trained: scalars = (keep, weight). `noise` is scaled by the output's norm."""

    vector: Float[Tensor, " w"]
    scalars: Float[Tensor, " two"]
    noise: Float[Tensor, " w"] | None = None

    def apply(self, h: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        """keep h + weight v (+ noise |h|)."""
        keep, weight = like(self.scalars, h)
        blended: Tensor = keep * h + weight * like(self.vector, h)
        if self.noise is None:
            return blended
        noisy: Tensor = blended + like(self.noise, h) * h.detach().norm(dim=-1, keepdim=True)
        return noisy


@dataclass(frozen=True)
class I2CL:
    """Fields.

    - `ends`: the demonstration's last token: its answer's (ours) or its terminator's (the released code).
    - `calibrate`: train the scalars; without, lambda = 0.1 and beta = 1 stay.
    - `epochs`, `batch`, `lr`, `weight_decay`, `warmup`, `noise`: of the calibration, as released.
    """

    name: ClassVar[str] = "i2cl"
    cites: ClassVar[str] = "arXiv 2405.14660"
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    ops: ClassVar[tuple[str, ...]] = ("blend",)
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = True
    ends: Literal["answer", "terminator"] = "answer"
    calibrate: bool = True
    weight: float = 0.1
    keep: float = 1.0
    epochs: int = 100
    batch: int = 2
    lr: float = 0.01
    weight_decay: float = 1e-3
    warmup: float = 0.05
    noise: float = 1e-3

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Read the context vectors, calibrate the scalars on the same demonstrations. Dev is not used."""
        train, dev = single(train, dev)
        at_least_one(self, "epochs", "batch")
        if not self.lr >= 0:
            raise InputError("a learning rate of 0 or more", f"i2cl.lr = {self.lr}", "raise or lower i2cl.lr")
        sites = [Site(kind, layer) for layer in range(lm.n_layers) for kind in ("attn", "mlp")]
        never_negative(self, "weight_decay", "noise")
        prove(lm)
        for site in sites:
            require(lm, site)
        with Fitting.of(lm, self, train, seed=seed) as fitting, lm.frozen():
            context = self.context(fitting, sites)
            scalars = torch.tensor([[self.keep, self.weight]] * len(sites))
            found: dict[str, Any] = {}
            if self.calibrate:
                scalars, found["loss"] = self._calibrated(fitting, context, scalars)
            edits = [
                Edit(site, Blend(vector, float(keep), float(weight)), Where("all"))
                for (site, vector), (keep, weight) in zip(context.items(), scalars.tolist(), strict=True)
            ]
            return TaskVector(tuple(edits), fitting.origin(found=found))

    def context(self, fitting: Fitting, sites: Sequence[Site]) -> Mapping[Site, Float[Tensor, " w"]]:
        """The context vectors: means over the demonstrations, each run alone. Their order does not matter."""
        prompts = [self._alone(fitting, demo) for demo in fitting.show()]
        states = fitting.states_of(prompts, sites)
        return {site: states[site].mean(0) for site in sites}

    def _alone(self, fitting: Fitting, demo: Example) -> Encoded:
        format = fitting.train.spec.format
        prompt = format.prompt(demo.input)
        answer = fitting.lm.answer_ids(prompt, demo.output, format, terminator=self.ends == "terminator")
        return fitting.lm.encode(Encoded(fitting.lm.encode(prompt).ids + answer))

    def _calibrated(
        self, fitting: Fitting, context: Mapping[Site, Tensor], start: Tensor
    ) -> tuple[Tensor, list[float]]:
        """The scalars after training, and the mean loss of the first and of the last epoch."""
        lm, format, demos = fitting.lm, fitting.train.spec.format, fitting.show()
        prompts = [format.prompt(demo.input) for demo in demos]
        answers = [
            lm.answer_ids(prompt, demo.output, format, terminator=True)[:1]
            for prompt, demo in zip(prompts, demos, strict=True)
        ]
        lessons = Lessons.of(
            lm, [lm.encode(p) for p in prompts], answers, fitting.train.spec.loss, starts=[0] * len(demos)
        )
        generator = torch.Generator().manual_seed(fitting.seed)
        scalars = start.to(lm.device).requires_grad_()
        optimizer = torch.optim.AdamW([scalars], lr=self.lr, weight_decay=self.weight_decay)
        each = -(-len(demos) // self.batch)
        total = self.epochs * each
        losses = []
        for step in track(range(total), "i2cl", total):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * _schedule(step, total, self.warmup)
            picked = torch.randperm(len(demos), generator=generator)[: self.batch].tolist()
            optimizer.zero_grad()
            with torch.enable_grad():
                losses.append(lessons.descend([self._noisy(context, scalars, generator)], picked))
            optimizer.step()
        if not bool(torch.isfinite(scalars).all()):
            raise InputError("a learning rate that trains", f"scalars that are not finite with {self}", "lower i2cl.lr")
        ends = [sum(part) / each for part in (losses[:each], losses[-each:])]
        return scalars.detach().cpu(), ends

    def _noisy(self, context: Mapping[Site, Tensor], scalars: Tensor, generator: torch.Generator) -> TaskVector:
        rows = zip(context.items(), scalars, strict=True)
        return TaskVector(
            tuple(
                Edit(site, Calibrating(v, row, self.noise * torch.randn(len(v), generator=generator)), Where("all"))
                for (site, v), row in rows
            )
        )


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then half a cosine down to 0."""
    begun = max(1, round(warmup * total))
    if step < begun:
        return (step + 1) / begun
    return 0.5 * (1 + math.cos(math.pi * (step - begun) / max(1, total - begun)))
