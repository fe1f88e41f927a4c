"""LoRA (Hu et al., arXiv 2106.09685), a rival: a trained low-rank change of the weights.

**Idea.** Not a vector: every chosen weight becomes W + (alpha / rank) B A, with A and B trained on the examples a
learned vector sees. It says what training could reach if the model itself may change.

**Formula.** A starts uniform (Kaiming), B at zero, so that the first step starts from the bare model; the loss is the
answer's with its terminator behind zero-shot prompts.

**Where we differ.** Through the package peft. `targets` is every linear module by default (the paper: queries and
values). Bounded to `tokens` trained tokens, about a minute on the default model and two cores: a fair rival in time,
not the best LoRA there is.

**Cost.** Whole prompts forward and backward; a query costs what a bare one does, once the weights are merged.

**When to use it.** When there are labels, time and a model of one's own to change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from taskvec.errors import InputError
from taskvec.evaluate import Fitting, above_zero, at_least_one
from taskvec.evaluate.adapters import PeftAdapter, bounded, peft, train_adapter
from taskvec.evaluate.joint import Joint
from taskvec.lm import LM
from taskvec.tasks import Dev, Train


@dataclass(frozen=True)
class LoRA:
    """Fields.

    - `rank`, `alpha`: of the change; `targets`: names of modules, or `all-linear`.
    - `lr`, `steps`, `batch`: AdamW's; `tokens`: trained tokens at most; `queries`: examples a task at most.
    - `check`: steps between looks at dev, the best of which is kept; `n_dev`: dev items used.
    """

    name: ClassVar[str] = "lora"
    cites: ClassVar[str] = "arXiv 2106.09685"
    sites: ClassVar[tuple[str, ...]] = ()
    ops: ClassVar[tuple[str, ...]] = ()
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("all-linear",)
    lr: float = 1e-3
    steps: int = 100
    batch: int = 16
    tokens: int = 10_000
    queries: int = 256
    check: int = 20
    n_dev: int = 40

    def _check(self, lm: LM) -> None:
        """Every module a target names must be a linear map: what else peft cannot wrap, it says half-way."""
        for target in self.targets if self.targets != ("all-linear",) else ():
            there = [module for name, module in lm.model.named_modules() if f".{name}".endswith(f".{target}")]
            if not there or not all(isinstance(module, nn.Linear | Conv1D) for module in there):
                found = f"{target!r}, which is {type(there[0]).__name__ if there else 'nowhere'}"
                raise InputError(f"linear modules of {lm.id} as lora.targets", found, "name the model's own")

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> PeftAdapter:
        """Train on gold answers, keep the step that is best on dev. Takes one task or many."""
        at_least_one(self, "rank", "steps", "batch", "tokens", "queries", "check", "n_dev")
        above_zero(self, "lr", "alpha")
        joint = Joint.of(train, dev)
        targets = self.targets[0] if self.targets == ("all-linear",) else list(self.targets)
        self._check(lm)
        config = peft().LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
        )
        with Fitting.of(lm, self, joint.trains[0], seed=seed) as fitting:
            return train_adapter(fitting, joint, config, bounded(self))
